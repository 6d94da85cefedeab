"""Quantizing a block of rows: the native search where the extension is built, else its NumPy form."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from edgeq.formats.affine import Codes, pack
from edgeq.formats.bf16 import Array, Float32, round_to
from edgeq.quant.search import search

try:
    import edgeq.backends.cpu._native as _native

    BUILT = True
except ImportError:  # installed without a C++ compiler
    BUILT = False

__all__ = ["BUILT", "QuantizedRows", "quantize_rows", "quantize_rows_numpy"]

_BLOCK = 1 << 18  # weights that a NumPy search holds at once: its ten or so arrays of them stay in the cache
_STORED = {"uint16": "bfloat16", "float16": "float16", "float32": "float32"}


class QuantizedRows(NamedTuple):
    """Rows of a quantized matrix (codes, scales and biases as in `edgeq.weights.QMatrix`) and their squared error."""

    codes: Codes
    scales: Array
    biases: Array
    squared_error: float


def quantize_rows(x: Float32, bits: int, group_size: int, dtype: np.dtype[Any]) -> QuantizedRows:
    """Quantize x float32 [rows, n], finite, n a multiple of `group_size`, on the calling thread, without the GIL.

    Scales and biases are stored as `dtype`: uint16 (bfloat16), float16 or float32.
    """
    if not BUILT:
        return quantize_rows_numpy(x, bits, group_size, dtype)
    rows, columns = x.shape
    codes = np.empty((rows, columns * bits // 32), np.uint32)
    scales, biases, errors = (np.empty((rows, columns // group_size), np.float32) for _ in range(3))
    stored = _STORED[np.dtype(dtype).name]
    _native.quantize(np.ascontiguousarray(x), bits, group_size, stored, codes, scales, biases, errors)
    return QuantizedRows(codes, round_to(scales, dtype), round_to(biases, dtype), float(errors.sum(dtype=np.float64)))


def quantize_rows_numpy(x: Float32, bits: int, group_size: int, dtype: np.dtype[Any]) -> QuantizedRows:
    """`quantize_rows` without the extension: the same bits."""
    step = max(1, _BLOCK // x.shape[1])
    blocks = [_search_block(x[i : i + step], bits, group_size, dtype) for i in range(0, len(x), step)]
    codes, scales, biases, squared_errors = zip(*blocks, strict=True)
    return QuantizedRows(np.concatenate(codes), np.concatenate(scales), np.concatenate(biases), sum(squared_errors))


def _search_block(x: Float32, bits: int, group_size: int, dtype: np.dtype[Any]) -> QuantizedRows:
    groups = search(x.reshape(-1, group_size), bits, dtype)
    shape = (len(x), x.shape[1] // group_size)
    return QuantizedRows(
        pack(groups.codes.reshape(x.shape), bits),
        groups.scales.reshape(shape),
        groups.biases.reshape(shape),
        float(groups.errors.sum(dtype=np.float64)),
    )
