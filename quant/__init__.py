"""edgeq.quant"""
