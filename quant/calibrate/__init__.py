"""Calibrated quantization: rounding that knows what a model's matrices are multiplied by."""
