"""Quantized matrices as GPTQ, AWQ, compressed-tensors and FP8 checkpoints have them.

The integer ones hold what a `QMatrix` holds, packed otherwise: weight = (code - zero) * scale, with the zero point and
the scale of the column's group. `matrix` repacks the codes as they are; nothing is quantized again. The layouts, as the
formats' own tools write them (int32 words, first field in the lowest bits; fields of 3 bits run on into the next word):

* GPTQ: codes [in * bits / 32, out], zero points [groups, out * bits / 32], scales [groups, out], and `g_idx` [in] with
  every column's group. The first version of the format stores zero - 1, the second the zero point itself.
* AWQ, "gemm": codes [in, out / 8], zero points [groups, out / 8], scales [groups, out]; 4 bits, and the fields of a
  word are rows 0, 2, 4, 6, 1, 3, 5, 7. "gemv": codes [out, in / 8], zero points [out, ...], scales [out, ...], in
  order, with padding behind the groups.
* compressed-tensors, "pack-quantized": codes [out, in * bits / 32] and zero points [out * bits / 32, groups], both with
  2^(bits - 1) added, scales [out, groups]; "int-quantized": int8 [out, in].

8-bit floats [out, in] have a scale for all, for every row, for every group of a row, or for every block of rows and
columns. Microscaling formats have a power of two for every 32 columns, and codes that lie as in a `QMatrix`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.affine import Codes, dequantize, pack, unpack
from edgeq.formats.bf16 import Array, Float32, round_to, to_float32
from edgeq.formats.blocks import each_block
from edgeq.formats.codebooks import E4M3, E5M2, E8M0
from edgeq.formats.qmatrix import MODES, Matrix, Mode, QMatrix

__all__ = [
    "AWQ",
    "FLOAT8",
    "GPTQ",
    "AWQRows",
    "CompressedTensors",
    "Float8",
    "Grouped",
    "Int8",
    "Microscaled",
    "Packed",
    "fields",
]

Indices = NDArray[np.intp]
Zeros = NDArray[np.uint8]

FLOAT8: Mapping[str, Float32] = {"F8_E4M3": E4M3, "F8_E5M2": E5M2}
"""What the codes of 8-bit floats stand for, by safetensors' names of them."""

_RUNS = (128, 64, 32, 16)  # sizes of a QMatrix's groups
_AWQ_FIELD = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # of the eight rows of a word


class Packed(ABC):
    """A matrix in a format's own layout, in the memory of its file."""

    shape: tuple[int, int]  # out, in
    bits: int  # of a code

    @abstractmethod
    def rows(self, rows: slice | Array) -> Float32:
        """The weights of some rows, by the format's own formula: products of 16-bit scales are exact in float32."""

    @abstractmethod
    def matrix(self) -> Matrix[Array]:
        """The matrix to compute with."""

    @property
    @abstractmethod
    def is_widened(self) -> bool:
        """Whether `matrix` is plain, of 16 bits or more."""

    @property
    @abstractmethod
    def memory_nbytes(self) -> int:
        """Bytes that `matrix` takes, at most."""

    def _dense(self, dtype: np.dtype[np.generic]) -> Array:
        """The weights rounded once to `dtype`: float32, float16 or uint16 (bfloat16)."""
        whole = np.empty(self.shape, dtype)

        def convert(rows: slice) -> None:
            with np.errstate(over="ignore"):
                whole[rows] = round_to(self.rows(rows), dtype)

        each_block(self.shape, convert)
        return whole


class Grouped(Packed):
    """Integer codes in groups, `in` a multiple of 32. `groups` [in] says which one a column belongs to."""

    as_stored: ClassVar[bool] = False
    """Whether `words` are the file's own."""
    groups: Indices

    @abstractmethod
    def words(self, rows: slice | Array) -> Codes:
        """The codes of some rows in a `QMatrix`'s layout, uint32 [rows, in * bits / 32]."""

    @abstractmethod
    def scales(self, rows: slice | Array) -> Array:
        """The scales of some rows, [rows, groups] of a float type."""

    @abstractmethod
    def zeros(self, rows: slice | Array) -> Zeros:
        """The zero points of some rows, [rows, groups]."""

    def rows(self, rows: slice | Array) -> Float32:
        weights = unpack(self.words(rows), self.bits).astype(np.float32)
        weights -= self.zeros(rows)[:, self.groups]
        weights *= to_float32(self.scales(rows))[:, self.groups]
        return weights

    @property
    def run(self) -> int | None:
        """The size of a `QMatrix`'s groups that no group of the format's cuts; None if there is none, as with columns
        in the order of their activations."""
        width = len(self.groups)
        for run in _RUNS:
            if width % run == 0 and (self.groups.reshape(-1, run) == self.groups[::run, None]).all():
                return run if run > 16 or self.bits <= 6 else None
        return None

    @property
    def is_widened(self) -> bool:
        return self.run is None

    @property
    def memory_nbytes(self) -> int:
        (out, width), run = self.shape, self.run
        if run is None:
            return out * width * self.scales(slice(0, 1)).itemsize
        bits = 6 if run == 16 else self.bits
        return out * width * bits // 8 + out * width // run * 8

    def factors(self) -> tuple[Array, Array | int]:
        """Scales and biases of a `QMatrix` in groups of `run`, exactly: of 16 bits where -zero * scale fits, else both
        float32."""
        scales, zeros = self.scales(slice(None)), self.zeros(slice(None))
        order = self.groups[:: self.run]
        if not np.array_equal(order, np.arange(scales.shape[1])):
            scales, zeros = scales[:, order], zeros[:, order]
        zero = int(zeros.flat[0])
        if zero in (2, 4, 8, 16, 32, 128) and (zeros == zero).all():  # symmetric
            return np.ascontiguousarray(scales), zero
        wide = to_float32(scales)
        biases = -zeros.astype(np.float32) * wide
        short = round_to(biases, scales.dtype)
        if np.array_equal(to_float32(short), biases):
            return np.ascontiguousarray(scales), short
        return np.ascontiguousarray(wide), biases

    def matrix(self) -> Matrix[Array]:
        run = self.run
        if run is None:
            return self._dense(self.scales(slice(0, 1)).dtype)
        if run == 16 and self.bits != 6:  # such groups are there at 6 bits
            return QMatrix(self._codes(6, self._six_bits), *self.factors(), 6, 16)
        return QMatrix(self._codes(self.bits, self.words), *self.factors(), self.bits, run)

    def _six_bits(self, rows: slice | Array) -> Codes:
        return pack(unpack(self.words(rows), self.bits), 6)

    def _codes(self, bits: int, words: Callable[[slice], Codes]) -> Codes:
        if self.as_stored and bits == self.bits:
            return self.words(slice(None))
        out, width = self.shape
        codes = np.empty((out, width * bits // 32), np.uint32)

        def convert(rows: slice) -> None:
            codes[rows] = words(rows)

        each_block(self.shape, convert)
        return codes


def fields(words: Codes, bits: int, at: Indices) -> Zeros:
    """Fields of `bits` bits, by their numbers in the streams that the rows of `words` uint32 [rows, n] are: uint8
    [rows, len(at)]."""
    word, shift = np.divmod(at * bits, 32)
    values = words[:, word] >> shift.astype(np.uint32)
    beyond = np.flatnonzero(shift + bits > 32)
    if len(beyond):
        values[:, beyond] |= words[:, word[beyond] + 1] << (32 - shift[beyond]).astype(np.uint32)
    return (values & np.uint32((1 << bits) - 1)).astype(np.uint8)


def _numbers(count: int, rows: slice | Array) -> Indices:
    return np.arange(count)[rows]


@dataclass(frozen=True)
class GPTQ(Grouped):
    """codes: uint32 [in * bits / 32, out]; packed_zeros: uint32 [groups, out * bits / 32]; stored_scales: [groups,
    out].

    offset: what is to be added to a stored zero point, 1 in the first version of the format, else 0. The sum is taken
    modulo 2^bits, as the format's tools do.
    """

    codes: Codes
    packed_zeros: Codes
    stored_scales: Array
    bits: int
    groups: Indices
    offset: int

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.codes.shape[1], len(self.groups)

    def words(self, rows: slice | Array) -> Codes:
        return np.ascontiguousarray(self.codes[:, rows].T)

    def scales(self, rows: slice | Array) -> Array:
        return np.ascontiguousarray(self.stored_scales[:, rows].T)

    def zeros(self, rows: slice | Array) -> Zeros:
        stored = fields(self.packed_zeros, self.bits, _numbers(self.shape[0], rows)).T
        return (stored + np.uint8(self.offset)) & np.uint8((1 << self.bits) - 1)


@dataclass(frozen=True)
class AWQ(Grouped):
    """codes: uint32 [in, out / 8]; packed_zeros: uint32 [groups, out / 8]; stored_scales: [groups, out]. 4 bits."""

    codes: Codes
    packed_zeros: Codes
    stored_scales: Array
    groups: Indices
    bits: int = 4

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.stored_scales.shape[1], len(self.groups)

    def words(self, rows: slice | Array) -> Codes:
        if not isinstance(rows, slice):
            return pack(np.ascontiguousarray(self._fields(self.codes, rows).T), 4)
        first, end, step = rows.indices(self.shape[0])
        whole = slice(first // 8, -(-end // 8))  # words, of eight rows each
        eights = self.codes[:, whole].reshape(self.shape[1] // 8, 8, -1)  # of columns, which become one word of a row
        words = np.empty((eights.shape[2], 8, len(eights)), np.uint32)
        places = np.arange(0, 32, 4, dtype=np.uint32)[:, None]
        for row, field in enumerate(_AWQ_FIELD):
            codes = eights >> np.uint32(4 * field) & np.uint32(15)
            words[:, row] = np.bitwise_or.reduce(codes << places, axis=1).T
        return words.reshape(-1, len(eights))[first - 8 * whole.start : end - 8 * whole.start : step]

    def scales(self, rows: slice | Array) -> Array:
        return np.ascontiguousarray(self.stored_scales[:, rows].T)

    def zeros(self, rows: slice | Array) -> Zeros:
        return np.ascontiguousarray(self._fields(self.packed_zeros, rows).T)

    def _fields(self, words: Codes, rows: slice | Array) -> Zeros:
        row = _numbers(self.shape[0], rows)
        return fields(words, 4, row // 8 * 8 + _AWQ_FIELD[row % 8])


class _ByRows(Grouped):
    """Codes and scales that lie row after row, as the matrix does."""

    codes: Array
    stored_scales: Array

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return len(self.codes), len(self.groups)

    def words(self, rows: slice | Array) -> Codes:
        return self.codes[rows]

    def scales(self, rows: slice | Array) -> Array:
        return self.stored_scales[rows]


@dataclass(frozen=True)
class AWQRows(_ByRows):
    """AWQ's "gemv" layout. codes: uint32 [out, in / 8]; packed_zeros: uint32 [out, at least groups / 8]; stored_scales:
    [out, at least groups]. 4 bits."""

    as_stored = True
    codes: Codes
    packed_zeros: Codes
    stored_scales: Array
    groups: Indices
    bits: int = 4

    def scales(self, rows: slice | Array) -> Array:
        return self.stored_scales[rows, : self.groups[-1] + 1]

    def zeros(self, rows: slice | Array) -> Zeros:
        return fields(self.packed_zeros[rows], 4, np.arange(self.groups[-1] + 1))


@dataclass(frozen=True)
class CompressedTensors(_ByRows):
    """What is called "pack-quantized". codes: uint32 [out, in * bits / 32]; stored_zeros: uint32 [out * bits / 32,
    groups] packed, or int8 [out, groups], or None for symmetric ones; stored_scales: [out, groups]."""

    as_stored = True
    codes: Codes
    stored_zeros: Array | None
    stored_scales: Array
    bits: int
    groups: Indices

    def zeros(self, rows: slice | Array) -> Zeros:
        middle = 1 << (self.bits - 1)
        if self.stored_zeros is None:
            return np.broadcast_to(np.uint8(middle), self.stored_scales[rows].shape)
        if self.stored_zeros.dtype == np.int8:
            return (self.stored_zeros[rows].astype(np.int16) + middle).astype(np.uint8)
        return fields(self.stored_zeros.T, self.bits, _numbers(self.shape[0], rows)).T


@dataclass(frozen=True)
class Int8(_ByRows):
    """What compressed-tensors calls "int-quantized". codes: int8 [out, in]; offsets: int8 [out, groups], or None;
    stored_scales: [out, groups]."""

    codes: NDArray[np.int8]
    offsets: NDArray[np.int8] | None
    stored_scales: Array
    groups: Indices
    bits: int = 8

    def words(self, rows: slice | Array) -> Codes:
        return np.ascontiguousarray(self.codes[rows].view(np.uint8) ^ np.uint8(128)).view(np.uint32)

    def zeros(self, rows: slice | Array) -> Zeros:
        if self.offsets is None:
            return np.broadcast_to(np.uint8(128), self.stored_scales[rows].shape)
        return self.offsets[rows].view(np.uint8) ^ np.uint8(128)


@dataclass(frozen=True)
class Float8(Packed):
    """weight = value * scale. codes: uint8 [out, in], places in the table of `kind`, which is one of FLOAT8;
    stored_scales: [row blocks, column blocks], of `block` rows and columns each, of which the last may be cut short;
    uint8 ones are E8M0, 2^(byte - 127)."""

    codes: NDArray[np.uint8]
    stored_scales: Array
    block: tuple[int, int]
    kind: str
    bits: int = 8

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.codes.shape[0], self.codes.shape[1]

    def rows(self, rows: slice | Array) -> Float32:
        out, width = self.shape
        stored = self.stored_scales[_numbers(out, rows) // self.block[0]]
        scales = E8M0[stored] if stored.dtype == np.uint8 else to_float32(stored)
        weights: Float32 = FLOAT8[self.kind][self.codes[rows]]
        if scales.shape[1] > 1:
            scales = scales[:, np.arange(width) // self.block[1]]
        weights *= scales
        return weights

    def matrix(self) -> Matrix[Array]:
        return self._dense(np.dtype(np.uint16))

    @property
    def is_widened(self) -> bool:
        return True

    @property
    def memory_nbytes(self) -> int:
        return 2 * self.codes.size


@dataclass(frozen=True)
class Microscaled(Packed):
    """MXFP4 and MXFP8. codes: uint8 [out, in / 2], the first of two in the lower half, or [out, in]; exponents: uint8
    [out, in / 32], scales as E8M0."""

    codes: NDArray[np.uint8]
    exponents: NDArray[np.uint8]
    mode: Mode

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return len(self.codes), 32 * self.exponents.shape[1]

    @property
    def bits(self) -> int:  # type: ignore[override]
        return MODES[self.mode][0]

    def rows(self, rows: slice | Array) -> Float32:
        return dequantize(self.matrix().map(lambda x: x[rows]))

    def matrix(self) -> QMatrix[Array]:
        return QMatrix(self.codes.view(np.uint32), self.exponents, 0, *MODES[self.mode], self.mode)

    @property
    def is_widened(self) -> bool:
        return False

    @property
    def memory_nbytes(self) -> int:
        return self.codes.size + self.exponents.size
