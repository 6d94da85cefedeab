"""ggml's block formats as group-wise affine codes, exactly.

A row of a tensor is cut into blocks of 32, 64 or 256 weights; a block holds codes, and one or more scales (layouts:
ggml/src/ggml-common.h and ggml-quants.c). Each format that edgeq reads is `scale * value + bias` over groups of 16 or
32 weights, with small codes, so it runs as a `QMatrix`, whose fields leave out what ggml leaves out:

    Q4_0 Q5_0 Q8_0  d (q - 8 | 16 | 128)     scale d, zero 8 ...
    Q4_1 Q5_1       d q + m                  scale d, bias m
    Q4_K Q5_K       d sc q - dmin mn         scale sc in units of d, bias -mn in units of dmin
    Q2_K            d sc q - dmin mn         the same in groups of 16; sc and mn are two halves of a byte
    Q3_K Q6_K       d sc (q - 4 | 32)        scale sc in units of d, zero 4 ..., groups of 16
    IQ4_NL IQ4_XS   d (sc) table[q]          scale d, or sc in units of d; mode iq4
    MXFP4           2^(e - 127) E2M1[q]      scale e; mode mxfp4
    NVFP4           E4M3[s] E2M1[q]          scale s; mode nvfp4, groups of 16

d, m and dmin are float16; sc and mn have 6 bits in the file (4 in Q2_K, 8 in Q6_K) and take 8 (4, 8) in memory.

No product has more than 24 significant bits, so float32 holds it exactly and `scale * value + bias` rounds at most
once, where ggml's own formula does: the dequantized values are equal to ggml's, bit for bit (but for the sign of 0).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from edgeq.formats.bf16 import Array
from edgeq.formats.qmatrix import Factors, Mode, QMatrix, TwoLevel, UpperHalves

__all__ = ["TYPES", "Coding", "GGMLType", "decode", "finite", "type_name"]

Codes = Array  # uint8


class Groups(NamedTuple):
    """Decoded blocks: codes uint8 [blocks, block]; scales, and biases if the blocks hold any, as in `QMatrix`, a row
    a block."""

    codes: Codes
    scales: Factors[Array]
    biases: Factors[Array] | UpperHalves[Array] | None = None


class Coding(NamedTuple):
    """How a quantized format becomes affine groups. zero: where blocks hold no biases, a bias is -zero * scale."""

    bits: int
    group_size: int
    groups: Callable[[Array], Groups]
    zero: int = 0
    mode: Mode = "affine"


class GGMLType(NamedTuple):
    """A tensor type: `block` weights in `nbytes` bytes, laid out as `layout`; `coding` is None for plain floats."""

    name: str
    layout: np.dtype[Any]
    block: int = 1
    coding: Coding | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of a block in the file."""
        return self.layout.itemsize

    @property
    def memory_nbytes(self) -> int:
        """Bytes of a block as a `QMatrix`, codes packed."""
        if self.coding is None:
            return self.nbytes
        w = decode(np.zeros(1, self.layout), self.coding)
        return self.block * w.bits // 8 + sum(x.nbytes for x in w.factors)


def decode(blocks: Array, coding: Coding) -> QMatrix[Array]:
    """Blocks, of a type's `layout`, as a matrix of one block a row, codes not packed yet: uint8 [blocks, block].

    Numbers that are not finite, of a damaged file, are the caller's to refuse (`finite`).
    """
    codes, scales, biases = coding.groups(blocks)
    return QMatrix(
        codes, scales, coding.zero if biases is None else biases, coding.bits, coding.group_size, coding.mode
    )


def finite(w: QMatrix[Array]) -> bool:
    """Whether all scales and biases are numbers; E8M0 and E4M3 have NaN with all bits set (of a scale's sign aside)."""
    if w.mode in ("mxfp4", "nvfp4"):
        return not (w.factors[0] == 255).any()
    return all(np.isfinite(x).all() for x in w.factors if x.dtype == np.float16)


def _nibbles(packed: Codes) -> Codes:
    """[blocks, chunks, width] bytes -> 4-bit codes: of each chunk the low halves, then the high halves."""
    codes: Codes = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)
    return codes


def _column(x: Array) -> Array:
    return x[:, None]


def _nibble_groups(b: Array) -> Groups:
    return Groups(_nibbles(b["qs"][:, None]), _column(b["d"]))


def _q4_1(b: Array) -> Groups:
    return Groups(_nibbles(b["qs"][:, None]), _column(b["d"]), _column(b["m"]))


def _five_bits(b: Array) -> Codes:
    fifth = np.unpackbits(b["qh"], axis=1, bitorder="little")
    codes: Codes = _nibbles(b["qs"][:, None]) | fifth << 4
    return codes


def _q5_0(b: Array) -> Groups:
    return Groups(_five_bits(b), _column(b["d"]))


def _q5_1(b: Array) -> Groups:
    return Groups(_five_bits(b), _column(b["d"]), _column(b["m"]))


def _q8_0(b: Array) -> Groups:
    return Groups(b["qs"] ^ 0x80, _column(b["d"]))  # two's complement + 128


def _iq4_xs(b: Array) -> Groups:
    low = np.stack([b["scales_l"] & 15, b["scales_l"] >> 4], axis=2).reshape(len(b), 8)
    high = b["scales_h"][:, None] >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    scales = (low | high << 4).astype(np.int8) - np.int8(32)
    return Groups(_nibbles(b["qs"].reshape(-1, 8, 16)), TwoLevel(scales, _column(b["d"])))


def _k_groups(codes: Codes, b: Array) -> Groups:
    """Q4_K and Q5_K: eight pairs of 6-bit numbers in 12 bytes.

    The first four pairs are the low six bits of bytes 0-3 and 4-7; the others have their low four bits in the
    nibbles of bytes 8-11 and their high two on top of the first four.
    """
    first, second, third = (b["scales"][:, i : i + 4] for i in (0, 4, 8))
    sc = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1).view(np.int8)
    mn = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1).view(np.int8)
    return Groups(codes, TwoLevel(sc, _column(b["d"])), TwoLevel(-mn, _column(b["dmin"])))


def _q4_k(b: Array) -> Groups:
    return _k_groups(_nibbles(b["qs"].reshape(-1, 4, 32)), b)


def _q5_k(b: Array) -> Groups:
    fifth = b["qh"][:, None] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # [blocks, 8, 32]
    return _k_groups(_nibbles(b["qs"].reshape(-1, 4, 32)) | fifth.reshape(-1, 256) << 4, b)


def _q6_k(b: Array) -> Groups:
    high = b["qh"].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3  # [blocks, 2, 4, 32]
    codes = _nibbles(b["ql"].reshape(-1, 2, 64)) | high.reshape(-1, 256) << 4
    return Groups(codes, TwoLevel(b["scales"], _column(b["d"])))


def _pairs_of_bits(b: Array) -> Codes:
    """Q2_K and Q3_K: of each 32 bytes the lowest pairs, then the next higher ones: [blocks, 2, 4, 32]."""
    pairs: Codes = b["qs"].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    return pairs.reshape(-1, 256)


def _q2_k(b: Array) -> Groups:
    return Groups(_pairs_of_bits(b), TwoLevel(b["scales"], _column(b["d"])), UpperHalves(_column(b["dmin"])))


def _q3_k(b: Array) -> Groups:
    """Sixteen scales of 6 bits, less 32: low halves and high halves of bytes 0-7, with two more bits in bytes 8-11."""
    third = b["hmask"][:, None] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # [blocks, 8, 32]
    low = (b["scales"][:, None, :8] >> np.array([[0], [4]], np.uint8) & 15).reshape(-1, 16)
    high = (b["scales"][:, None, 8:] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3).reshape(-1, 16)
    scales = (low | high << 4).view(np.int8) - np.int8(32)
    return Groups(_pairs_of_bits(b) | third.reshape(-1, 256) << 2, TwoLevel(scales, _column(b["d"])))


def _without_minus_zero(codes: Codes) -> Codes:
    """ggml's table has one zero."""
    codes[codes == 8] = 0
    return codes


def _mxfp4(b: Array) -> Groups:
    return Groups(_without_minus_zero(_nibbles(b["qs"][:, None])), _column(b["e"]))


def _nvfp4(b: Array) -> Groups:
    """ggml's scales have no sign: it passes over their highest bit, and takes 127 for 0."""
    unsigned = b["d"] & 0x7F
    scales = np.where(b["d"] == 255, np.uint8(255), np.where(unsigned == 0x7F, np.uint8(0), unsigned))
    return Groups(_without_minus_zero(_nibbles(b["qs"].reshape(-1, 4, 8))), scales)


_D, _M = ("d", "<f2"), ("m", "<f2")
_NIBBLES = ("qs", "u1", 16)
_K_HEAD = [_D, ("dmin", "<f2"), ("scales", "u1", 12)]
_TYPES = (
    (0, GGMLType("F32", np.dtype("<f4"))),
    (1, GGMLType("F16", np.dtype("<f2"))),
    (30, GGMLType("BF16", np.dtype("<u2"))),
    (2, GGMLType("Q4_0", np.dtype([_D, _NIBBLES]), 32, Coding(4, 32, _nibble_groups, 8))),
    (3, GGMLType("Q4_1", np.dtype([_D, _M, _NIBBLES]), 32, Coding(4, 32, _q4_1))),
    (6, GGMLType("Q5_0", np.dtype([_D, ("qh", "u1", 4), _NIBBLES]), 32, Coding(5, 32, _q5_0, 16))),
    (7, GGMLType("Q5_1", np.dtype([_D, _M, ("qh", "u1", 4), _NIBBLES]), 32, Coding(5, 32, _q5_1))),
    (8, GGMLType("Q8_0", np.dtype([_D, ("qs", "u1", 32)]), 32, Coding(8, 32, _q8_0, 128))),
    (12, GGMLType("Q4_K", np.dtype([*_K_HEAD, ("qs", "u1", 128)]), 256, Coding(4, 32, _q4_k))),
    (13, GGMLType("Q5_K", np.dtype([*_K_HEAD, ("qh", "u1", 32), ("qs", "u1", 128)]), 256,
                  Coding(5, 32, _q5_k))),
    (14, GGMLType("Q6_K", np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), _D]), 256,
                  Coding(6, 16, _q6_k, 32))),
    (10, GGMLType("Q2_K", np.dtype([("scales", "u1", 16), ("qs", "u1", 64), _D, ("dmin", "<f2")]), 256,
                  Coding(2, 16, _q2_k))),
    (11, GGMLType("Q3_K", np.dtype([("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), _D]), 256,
                  Coding(3, 16, _q3_k, 4))),
    (20, GGMLType("IQ4_NL", np.dtype([_D, _NIBBLES]), 32, Coding(4, 32, _nibble_groups, mode="iq4"))),
    (23, GGMLType("IQ4_XS", np.dtype([_D, ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)]), 256,
                  Coding(4, 32, _iq4_xs, mode="iq4"))),
    (39, GGMLType("MXFP4", np.dtype([("e", "u1"), _NIBBLES]), 32, Coding(4, 32, _mxfp4, mode="mxfp4"))),
    (40, GGMLType("NVFP4", np.dtype([("d", "u1", 4), ("qs", "u1", 32)]), 64, Coding(4, 16, _nvfp4, mode="nvfp4"))),
)  # fmt: skip
TYPES: Mapping[int, GGMLType] = dict(_TYPES)
"""The tensor types that edgeq reads, by ggml's number."""


def type_name(number: int) -> str:
    """What ggml calls a tensor type, known to edgeq or not."""
    from gguf import GGMLQuantizationType

    try:
        return GGMLQuantizationType(number).name
    except ValueError:
        return f"number {number}"
