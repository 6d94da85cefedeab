"""Group-wise affine quantization: weight = scale * code + bias (see `edgeq.formats.qmatrix`).

A row of `n` weights is `n / group_size` groups; each group has one scale and one bias, 16 or 32 bits each. The codes
of a row are one little-endian bit stream, lowest bit first, cut into uint32 words: 32 codes fill exactly `bits`
words, whatever the width. Source of the layout: the MLX documentation of `mx.quantize`, checked bit for bit.

Scales in two levels, biases that follow from the scales, and codes that are places in a table are what ggml's formats
have beyond it; `mlx_layout` writes them out.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.bf16 import Array, Float32, round_to, to_float32
from edgeq.formats.qmatrix import Factors, QMatrix, TwoLevel

__all__ = [
    "BITS",
    "GROUP_SIZES",
    "IQ4",
    "apply_groups",
    "dequantize",
    "group_numbers",
    "mlx_layout",
    "one_level",
    "pack",
    "unpack",
]

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)

# What the 4-bit codes of ggml's IQ4_NL and IQ4_XS stand for (ggml/src/ggml-common.h), plus 128.
IQ4 = np.array([1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241], np.uint8)

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
    codes = unpack(w.codes, w.bits)
    return apply_groups(IQ4[codes] if w.iq4 else codes, *group_numbers(w))


def apply_groups(codes: NDArray[Any], scales: Float32, biases: Float32) -> Float32:
    """scale * code + bias, float32 [..., n]: codes [..., n], scales and biases [..., groups]."""
    weights = codes.astype(np.float32)
    groups = weights.reshape(*scales.shape, -1)
    groups *= scales[..., None]
    groups += biases[..., None]
    return weights


def group_numbers(w: QMatrix[Array]) -> tuple[Float32, Float32]:
    """The scale and the bias of every group, float32 [out, in / group_size]."""
    scales = _multiplied_out(w.scales)
    if isinstance(w.biases, int):
        return scales, scales * np.float32(-w.biases)
    return scales, _multiplied_out(w.biases)


def _multiplied_out(x: Factors[Array]) -> Float32:
    if not isinstance(x, TwoLevel):
        return to_float32(x)
    units: Float32 = np.repeat(to_float32(x.units), x.steps.shape[-1] // x.units.shape[-1], axis=-1)
    return np.asarray(x.steps * units)


def one_level(w: QMatrix[Array]) -> QMatrix[Array]:
    """The same weights with a scale and a bias for every group, float16 if the scales are, else float32."""
    if not isinstance(w.biases, int) and not isinstance(w.scales, TwoLevel):
        return w
    short = not isinstance(w.scales, TwoLevel) and w.scales.dtype == np.float16
    scales, biases = (round_to(x, np.float16 if short else np.float32) for x in group_numbers(w))
    return w.replaced(scales=scales, biases=biases)


def mlx_layout(w: QMatrix[Array]) -> QMatrix[Array]:
    """The same weights as MLX takes them: one level of scales, and codes that are numbers."""
    w = one_level(w)
    return w.replaced(codes=pack(IQ4[unpack(w.codes, 4)], 8), bits=8, iq4=False) if w.iq4 else w
