"""The native backend's pages of keys and values (backends/cpu/layers/layers.h), read without it.

A session that was written on one backend goes on on another by this, and the kernels' own reading is held to it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeq.backends.numpy.kv_types import GROUP, rotated
from edgeq.formats.bf16 import Array, Float32, to_float32
from edgeq.state import BLOCK

__all__ = ["page_arrays", "page_nbytes"]

TILE = 16  # tokens of keys that lie together
_ENTRIES: dict[str, np.dtype[Any]] = {
    "f16": np.dtype(np.float16), "bf16": np.dtype(np.uint16), "f32": np.dtype(np.float32),
    "int8": np.dtype(np.int8), "int4": np.dtype(np.uint8),
}  # fmt: skip
_SCALES: dict[str, np.dtype[Any]] = {"int8": np.dtype(np.float32), "int4": np.dtype(np.float16)}


def _row(dtype: str, dim: int) -> int:
    """Numbers that a vector takes."""
    return -(-dim // GROUP) * GROUP // 2 if dtype == "int4" else -(-dim // TILE) * TILE


def _scale_count(dtype: str, dim: int) -> int:
    return -(-dim // GROUP) if dtype == "int4" else 1


def page_nbytes(dtype: str, heads: int, dim: int) -> int:
    """Bytes of a page of a type of cache, for so many heads of this width."""
    scales = _SCALES[dtype].itemsize * _scale_count(dtype, dim) if dtype in _SCALES else 0
    return 2 * heads * BLOCK * (_row(dtype, dim) * _ENTRIES[dtype].itemsize + scales)


def page_arrays(page: Array, dtype: str, heads: int, dim: int) -> tuple[Float32, Float32]:
    """Keys and values, each float32 [BLOCK, heads, dim], of a page uint8 [bytes]."""
    row, entries = _row(dtype, dim), _ENTRIES[dtype]
    half = heads * BLOCK * row * entries.itemsize
    keys = page[:half].view(entries).reshape(heads, BLOCK // TILE, row, TILE).transpose(1, 3, 0, 2)
    values = page[half : 2 * half].view(entries).reshape(heads, BLOCK, row).transpose(1, 0, 2)
    both = [keys.reshape(BLOCK, heads, row), values]
    if dtype not in _SCALES:
        one, other = (np.ascontiguousarray(to_float32(x)[..., :dim]) for x in both)
        return one, other
    scales = page[2 * half :].view(_SCALES[dtype]).reshape(2, heads, _scale_count(dtype, dim), BLOCK)
    one, other = (
        _scaled(x, scale.transpose(2, 0, 1).astype(np.float32), dtype, dim)
        for x, scale in zip(both, scales, strict=True)
    )
    return one, other


def _scaled(codes: Array, scales: Float32, dtype: str, dim: int) -> Float32:
    """Vectors [BLOCK, heads, dim] of codes [BLOCK, heads, row] and scales [BLOCK, heads, groups]."""
    if dtype == "int8":
        return codes[..., :dim] * scales
    groups = codes.reshape(*codes.shape[:2], -1, GROUP // 2)
    entries = np.concatenate([groups & 15, groups >> 4], axis=-1).astype(np.float32) - np.float32(8)
    vectors = (entries * scales[..., None]).reshape(*codes.shape[:2], -1)
    return rotated(vectors[..., :dim])
