"""bfloat16 in NumPy, which has no such type.

Throughout edgeq a NumPy array of dtype uint16 holds bfloat16 bit patterns: no tensor of the model is a true
uint16, so the dtype alone says what it is and nothing has to be carried beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Float32 = NDArray[np.float32]
Bits = NDArray[np.uint16]

__all__ = ["Array", "Bits", "Float32", "all_finite", "from_float32", "round_to", "to_float32"]


def to_float32(x: Array) -> Float32:
    """Convert bfloat16 bits, float16 or float32 to float32; exact, and no copy when `x` is float32 already."""
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32, copy=False)


def from_float32(x: Float32) -> Bits:
    """Round float32 to bfloat16 bits: to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)


def round_to(x: Float32, dtype: np.dtype[Any] | type) -> Array:
    """Store float32 values as `dtype`: float32, float16 or uint16 (bfloat16 bits)."""
    return from_float32(x) if np.dtype(dtype) == np.uint16 else x.astype(dtype, copy=False)


def all_finite(x: Array) -> bool:
    """Whether no entry is NaN or infinite; converts nothing, and holds a few thousand rows at a time."""
    for start in range(0, len(x), 4096):
        block = x[start : start + 4096]
        if block.dtype == np.uint16:
            if ((block & 0x7F80) == 0x7F80).any():  # all bits of the exponent
                return False
        elif not np.isfinite(block).all():
            return False
    return True
