"""Group-wise affine quantization: weight = scale * code + bias (see `edgeq.formats.qmatrix`).

A row of `n` weights is `n / group_size` groups; each group has one scale and one bias, 16 or 32 bits each. The codes
of a row are one little-endian bit stream, lowest bit first, cut into uint32 words: 32 codes fill exactly `bits`
words, whatever the width. Source of the layout: the MLX documentation of `mx.quantize`, checked bit for bit.

Scales in two levels, biases that follow from the scales, and codes that are places in a table are what other formats
have beyond it; `mlx_layout` writes out what MLX has not.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.bf16 import Array, Float32, round_to, to_float32
from edgeq.formats.codebooks import IQ4, SCALES, VALUES
from edgeq.formats.qmatrix import QMatrix, TwoLevel, UpperHalves

__all__ = [
    "BITS",
    "GROUP_SIZES",
    "dequantize",
    "dequantize_unpacked",
    "group_numbers",
    "mlx_layout",
    "one_level",
    "pack",
    "unpack",
]

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


def dequantize(w: QMatrix[Array]) -> Float32:
    """Weights float32 [out, in]. A product has at most 24 significant bits in all of ggml's formats, and so is exact:
    only the sum with the bias rounds.
    """
    return dequantize_unpacked(w.replaced(codes=unpack(w.codes, w.bits)))


def dequantize_unpacked(w: QMatrix[Array]) -> Float32:
    """The same of a matrix whose codes are not packed: any integers [out, in]."""
    values = w.codes if w.mode == "affine" else VALUES[w.mode][w.codes]
    weights = values.astype(np.float32)
    scales, biases = group_numbers(w)
    groups = weights.reshape(*scales.shape, -1)
    with np.errstate(over="ignore", invalid="ignore"):  # the largest scales of 8 bits, of a damaged file
        groups *= scales[..., None]
    if w.mode == "affine":
        groups += biases[..., None]
    return weights


def group_numbers(w: QMatrix[Array]) -> tuple[Float32, Float32]:
    """The scale and the bias of every group, float32 [out, in / group_size]."""
    if w.mode in SCALES:
        assert not isinstance(w.scales, TwoLevel)
        scales = SCALES[w.mode][w.scales]
        return scales, np.zeros_like(scales)
    if not isinstance(w.scales, TwoLevel):
        scales = to_float32(w.scales)
    elif isinstance(w.biases, UpperHalves):
        steps = w.scales.steps
        return _multiplied_out(steps & 15, w.scales.units), -_multiplied_out(steps >> 4, w.biases.units)
    else:
        scales = _multiplied_out(*w.scales)
    if isinstance(w.biases, int):
        return scales, scales * np.float32(-w.biases)
    assert not isinstance(w.biases, UpperHalves)
    return scales, _multiplied_out(*w.biases) if isinstance(w.biases, TwoLevel) else to_float32(w.biases)


def _multiplied_out(steps: Array, units: Array) -> Float32:
    every: Float32 = np.repeat(to_float32(units), steps.shape[-1] // units.shape[-1], axis=-1)
    return np.asarray(steps * every)


def one_level(w: QMatrix[Array]) -> QMatrix[Array]:
    """The same weights with a scale for every group, and a bias unless the mode has none: of the scales' type, or
    float32 if they are in two levels. In MLX's modes as they are. (Zero points are powers of two: nothing rounds.)"""
    if w.mode in SCALES or (not isinstance(w.biases, int) and not isinstance(w.scales, TwoLevel)):
        return w
    dtype = np.dtype(np.float32) if isinstance(w.scales, TwoLevel) else w.scales.dtype
    scales, biases = (round_to(x, dtype) for x in group_numbers(w))
    return w.replaced(scales=scales, biases=biases if w.mode == "affine" else 0)


def mlx_layout(w: QMatrix[Array]) -> QMatrix[Array]:
    """The same weights as MLX takes them: one level of scales, and codes that are numbers or of a mode of its own."""
    if w.mode == "iq4":
        codes = pack(IQ4.view(np.uint8)[unpack(w.codes, w.bits)] ^ 0x80, 8)  # two's complement + 128
        w = w.replaced(codes=codes, biases=128, bits=8, mode="affine")
    return one_level(w)
