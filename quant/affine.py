"""Group-wise affine quantization in the MLX layout: weight = scale * code + bias.

A row of `n` weights is `n / group_size` groups; each group has one scale and one bias, 16 or 32 bits each. The codes
of a row are one little-endian bit stream, lowest bit first, cut into uint32 words: 32 codes fill exactly `bits`
words, whatever the width. Source of the layout: the MLX documentation of `mx.quantize`, checked bit for bit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.bf16 import Array, Float32, to_float32

__all__ = ["BITS", "GROUP_SIZES", "dequantize", "pack", "unpack"]

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)

Codes = NDArray[np.uint32]


@cache
def _bit_positions(bits: int) -> tuple[NDArray[np.intp], NDArray[np.uint32], NDArray[np.intp]]:
    """For 32 codes in `bits` words: each code's word, its shift there, and which codes run over into the next word."""
    start = np.arange(32) * bits
    straddling = np.flatnonzero(start % 32 + bits > 32)
    return start // 32, (start % 32).astype(np.uint32), straddling


def pack(codes: NDArray[Any], bits: int) -> Codes:
    """Codes [..., n] below 2^bits -> words uint32 [..., n * bits / 32]; n is a multiple of 32.

    Works on bytes, where eight codes fill exactly `bits` of them: four times faster than on words.
    """
    if bits == 8:
        return np.ascontiguousarray(codes, np.uint8).view(np.uint32)
    eights = codes.astype(np.uint8, copy=False).reshape(*codes.shape[:-1], -1, 8)
    packed = np.zeros((*eights.shape[:-1], bits), np.uint8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        packed[..., byte] |= eights[..., i] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= eights[..., i] >> (8 - shift)
    return packed.reshape(*codes.shape[:-1], -1).view(np.uint32)


def unpack(words: Codes, bits: int) -> NDArray[np.uint32]:
    """Words uint32 [..., n * bits / 32] -> codes uint32 [..., n]; the inverse of `pack`."""
    word, shift, straddling = _bit_positions(bits)
    blocks = words.reshape(*words.shape[:-1], -1, bits)
    codes = blocks[..., word] >> shift
    for i in straddling:
        codes[..., i] |= blocks[..., word[i] + 1] << (32 - shift[i])
    codes &= np.uint32((1 << bits) - 1)
    return codes.reshape(*words.shape[:-1], -1)


def dequantize(codes: Codes, scales: Array, biases: Array, bits: int, group_size: int) -> Float32:
    """Packed codes [..., n * bits / 32], scales and biases [..., n / group_size] -> weights float32 [..., n]."""
    weights = unpack(codes, bits).astype(np.float32)
    groups = weights.reshape(*scales.shape, group_size)
    groups *= to_float32(scales)[..., None]
    groups += to_float32(biases)[..., None]
    return weights
