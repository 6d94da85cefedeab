"""torch's resize of 8-bit pixels, bicubic with antialias, bit by bit, in strips of rows.

torch (`interpolate(uint8, mode="bicubic", antialias=True)`) goes along rows first, rounds to 8 bits, and then along
columns. An output pixel is the sum of its neighbours times weights, which are 16-bit integers over a power of two:
Keys' cubic kernel with a = -0.5 (Keys 1981), stretched where the picture shrinks.

Such weights and pixels are multiples of one small power of two, so that a floating-point sum of products is exact as
long as it fits the mantissa, in whatever order a BLAS adds. So each pass is a product with a banded matrix, cut into
blocks of outputs, in float32 where 24 bits are enough (shrinking by less than 1.6) and in float64 elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Rows", "UInt8", "resize", "resized_strips", "weights"]

UInt8 = NDArray[np.uint8]

_OUTPUTS = 16  # of a block: fewer make more products, more make them sparser
_STRIP = 64  # rows of a strip; a multiple of every block of patches
_BAND = 1 << 20  # bytes of floating-point rows at a time
_BITS = 22  # of a weight's fraction, at most; 15 of them are kept


class Rows(Protocol):
    """A picture whose rows are there when they are asked for."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        ...

    def rows(self, first: int, last: int) -> UInt8:
        """Rows from `first` up to `last`: uint8 [last - first, width, 3]."""
        ...


class _Block(NamedTuple):
    """The outputs from `out` that inputs from `start` up to `stop` make: inputs @ weights [inputs, outputs]."""

    out: slice
    start: int
    stop: int
    weights: NDArray[np.floating]


def resize(picture: Rows, size: tuple[int, int], out: UInt8 | None = None) -> UInt8:
    """`picture` in another size (height, width): uint8 [3, height, width], put into `out` if that is given."""
    out = np.empty((3, *size), np.uint8) if out is None else out
    for first, strip in resized_strips(picture, size):
        out[:, first : first + strip.shape[1]] = strip
    return out


def resized_strips(picture: Rows, size: tuple[int, int]) -> Iterator[tuple[int, UInt8]]:
    """`picture` in another size, in strips of at most 64 rows: the number of a strip's first row, and the strip, uint8
    [3, rows, width]. Of the picture itself, no more rows are asked for than a strip is made of.
    """
    height, width = size
    down = _axis(picture.size[0], height)
    window, begin, end = np.empty((3, 0, width), np.uint8), 0, 0  # rows `begin` to `end`, in the new width
    for row in range(0, height, _STRIP):
        blocks = down[row // _OUTPUTS : (row + _STRIP) // _OUTPUTS]
        start, stop = blocks[0].start, blocks[-1].stop
        fresh = _narrowed(picture, max(start, end), stop, width)
        window = np.concatenate((window[:, max(start - begin, 0) :], fresh), axis=1)
        begin, end = start, stop
        strip = np.empty((3, min(_STRIP, height - row), width), np.uint8)
        for out, first, last, w in blocks:
            rows = slice(out.start - row, out.stop - row)
            _round(w.T @ window[:, first - begin : last - begin].astype(w.dtype), strip[:, rows])
        yield row, strip


def _narrowed(picture: Rows, first: int, last: int, width: int) -> UInt8:
    """Some rows of `picture` in another width: uint8 [3, rows, width]."""
    across = _axis(picture.size[1], width)
    dtype = across[0].weights.dtype
    out = np.empty((3, last - first, width), np.uint8)
    step = max(1, _BAND // (3 * picture.size[1] * dtype.itemsize))
    for row in range(first, last, step):
        stop = min(row + step, last)
        x = np.ascontiguousarray(picture.rows(row, stop).transpose(2, 0, 1), dtype).reshape(-1, picture.size[1])
        y = np.empty((len(x), width), dtype)
        for block in across:
            np.matmul(x[:, block.start : block.stop], block.weights, out=y[:, block.out])
        _round(y.reshape(3, -1, width), out[:, row - first : stop - first])
    return out


def _round(x: NDArray[np.floating], out: UInt8) -> None:
    """Round to the nearest of 0 to 255, halves up, as (sum + half) >> bits does; `x` is used up."""
    x += 0.5
    np.clip(x, 0, 255, out=x)
    out[...] = x


@lru_cache(maxsize=8)
def _axis(inputs: int, outputs: int) -> list[_Block]:
    """The products that resize one axis."""
    first, count, w, bits = weights(inputs, outputs)
    largest = np.abs(w).sum(axis=1).max() * 255 + (1 << bits) // 2
    dtype = np.float32 if largest < 1 << 24 else np.float64
    blocks = []
    for start in range(0, outputs, _OUTPUTS):
        out = slice(start, min(start + _OUTPUTS, outputs))
        begin, end = int(first[start]), int((first[out] + count[out]).max())
        matrix = np.zeros((end - begin, out.stop - start), dtype)
        for column in range(out.stop - start):
            i, taps = start + column, count[start + column]
            matrix[first[i] - begin :, column][:taps] = np.ldexp(w[i, :taps], -bits)
        blocks.append(_Block(out, begin, end, matrix))
    return blocks


def weights(
    inputs: int, outputs: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], int]:  # fmt: skip
    """Weights of an axis: for each output its first input, how many there are, and their weights [outputs, most of
    them], whole numbers that are to be divided by 2^bits; and the bits.

    Where nothing is resized, each output is its input: torch skips that axis.
    """
    if inputs == outputs:
        return np.arange(inputs), np.ones(inputs, np.int64), np.ones((inputs, 1)), 0
    scale = inputs / outputs
    stretch = max(scale, 1.0)
    centre = scale * (np.arange(outputs) + 0.5)
    first = np.maximum((centre - 2 * stretch + 0.5).astype(np.int64), 0)  # towards 0, as a cast in C
    count = np.minimum((centre + 2 * stretch + 0.5).astype(np.int64), inputs) - first
    w = np.zeros((outputs, count.max()))
    for tap in range(w.shape[1]):
        w[:, tap] = np.where(tap < count, _cubic((tap + first - centre + 0.5) * (1 / stretch)), 0)
    w /= np.add.accumulate(w, axis=1)[:, -1:]  # summed from left to right, as torch does
    bits = next(b for b in range(_BITS + 1) if b == _BITS or int(0.5 + w.max() * 2 ** (b + 1)) >= 1 << 15)
    return first, count, np.trunc(np.ldexp(w, bits) + np.copysign(0.5, w)), bits


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' kernel with a = -0.5."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0))
