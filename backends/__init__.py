"""edgeq.backends"""
