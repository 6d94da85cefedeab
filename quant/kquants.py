"""Rounding to ggml's K-quants: Q4_K, Q5_K and Q6_K, weighted by what each weight matters.

A block of 256 weights has one float16 unit for the scales of its groups (and one for their biases), which are small
integers themselves (`edgeq.formats.ggml`). Four steps, each of which keeps what is better under the weighted error
sum(w (scale * q + bias - x)^2):

1. every group by itself: start grids, then codes and the weighted least-squares fit to them in turns;
2. the units: the largest scale, and bias, of the block becomes the largest integer;
3. units fitted by least squares to the integers and codes at hand;
4. every group's integers moved by one, up and down, for the units as stored.

ggml does 1 and 2 (`make_qkx3_quants`, `quantize_row_q4_K_impl`); 3 and 4 are what two levels leave to gain.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from edgeq.formats.bf16 import Array, Float32
from edgeq.formats.ggml import TYPES, GGMLType

__all__ = ["KQUANTS", "KGrid", "Levels", "codes_of", "encode", "fit", "pack"]

KQUANTS = {t.name: t for t in TYPES.values() if t.name in ("Q4_K", "Q5_K", "Q6_K")}
"""The types that are written here."""

_BLOCK = 256
_TILE = 1 << 10  # blocks that are fitted together: their arrays stay in the cache
_STRETCHES = (-1.0, -0.4, 0.0, 0.4, 0.8, 1.3, 2.0)
"""Start grids span a group's range with levels + stretch steps: below 0 wider than the range, above 0 clipping it."""
_DESCENTS = 2
_ROUNDS = 2  # of steps 3 and 4
_MOST_SCALE, _MOST_SIGNED = 63, 127


class Levels(NamedTuple):
    """The scales of n blocks in two levels.

    d float16 [n]; sc int8 [n, groups]; dmin float16 [n] and mn int8 [n, groups], or None where the zero is fixed.
    """

    d: Array
    sc: Array
    dmin: Array | None = None
    mn: Array | None = None

    def scales(self) -> Float32:
        """float32 [n, groups]."""
        return np.multiply(self.d.astype(np.float32)[:, None], self.sc, dtype=np.float32)

    def biases(self, zero: int) -> Float32:
        """float32 [n, groups]; zero: of a type that keeps no biases."""
        if self.dmin is None or self.mn is None:
            return np.multiply(self.scales(), np.float32(-zero))
        return -np.multiply(self.dmin.astype(np.float32)[:, None], self.mn, dtype=np.float32)


def encode(x: Float32, kind: GGMLType, importance: Float32 | None = None) -> Array:
    """Rows as they are stored: x float32 [rows, n], n a multiple of 256 -> uint8 [rows, n / 256 * bytes of a block].

    importance: float32 [n], how much an error of each column matters: the mean square of what the matrix is multiplied
    by. None is the same for all.
    """
    rows, n = x.shape
    weights = None if importance is None else _spread(importance).reshape(-1, _BLOCK)
    blocks, out = x.reshape(-1, _BLOCK), np.empty((rows * n // _BLOCK, kind.nbytes), np.uint8)
    step = max(1, _TILE // (n // _BLOCK)) * (n // _BLOCK)  # whole rows
    for start in range(0, len(blocks), step):
        some = np.ascontiguousarray(blocks[start : start + step])
        levels = fit(some, kind, None if weights is None else np.tile(weights, (len(some) // len(weights), 1)))
        out[start : start + step] = pack(codes_of(some, kind, levels), kind, levels)
    return out.reshape(rows, -1)


def _spread(importance: Float32) -> Float32:
    """Importance with its extremes moved towards its mean, so that a channel that the text never used is not lost."""
    mean = np.float32(importance.mean(dtype=np.float64))
    return importance + np.float32(0.01) * mean if mean > 0 else np.ones_like(importance)


def fit(blocks: Float32, kind: GGMLType, importance: Float32 | None = None, *, by_size: bool = True) -> Levels:
    """Units and levels for blocks float32 [n, 256], finite; importance [n, 256], positive, or None.

    Weights count by their importance and, if `by_size`, a little by their size: w = importance * sqrt(sigma^2 + x^2)
    with sigma^2 twice the block's mean square, as in ggml, where it has been found to be better than importance alone.
    """
    assert kind.coding is not None
    with np.errstate(all="ignore"):  # a candidate out of range has an undefined error and loses by itself
        w = np.ones_like(blocks) if importance is None else importance
        if by_size:
            w = w * np.sqrt(2 * np.square(blocks).mean(1, keepdims=True) + np.square(blocks))
        group, n = kind.coding.group_size, len(blocks)
        x, w = (np.ascontiguousarray(v.reshape(-1, group).T) for v in (blocks, w))
        levels, zero = (1 << kind.coding.bits) - 1, kind.coding.zero
        return (_Symmetric(x, w, n, levels, zero) if zero else _Affine(x, w, n, levels)).levels()


def codes_of(blocks: Float32, kind: GGMLType, levels: Levels) -> Array:
    """The codes nearest to the weights: uint8 [n, 256]."""
    assert kind.coding is not None
    groups = blocks.reshape(len(blocks), -1, kind.coding.group_size)
    scales, biases = levels.scales()[..., None], levels.biases(kind.coding.zero)[..., None]
    q = (groups - biases) / np.where(scales == 0, np.float32(np.inf), scales)
    codes: Array = np.rint(q.clip(0, (1 << kind.coding.bits) - 1)).astype(np.uint8).reshape(blocks.shape)
    return codes


def pack(codes: Array, kind: GGMLType, levels: Levels) -> Array:
    """Blocks as bytes, uint8 [n, bytes]: the inverse of `edgeq.formats.ggml`."""
    out = np.zeros(len(codes), kind.layout)
    out["d"] = levels.d
    if levels.dmin is None or levels.mn is None:
        out["scales"] = levels.sc
        c = codes.reshape(-1, 2, 4, 32)  # of each half: four runs of 32, whose high bits share bytes
        out["ql"] = (c[:, :, :2] & 15 | (c[:, :, 2:] & 15) << 4).reshape(-1, 128)
        shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
        out["qh"] = np.bitwise_or.reduce((c >> 4) << shifts, axis=2).reshape(-1, 64)
    else:
        out["dmin"], sc, mn = levels.dmin, levels.sc.view(np.uint8), levels.mn.view(np.uint8)
        out["scales"] = np.concatenate([
            sc[:, :4] | sc[:, 4:] >> 4 << 6,
            mn[:, :4] | mn[:, 4:] >> 4 << 6,
            sc[:, 4:] & 15 | (mn[:, 4:] & 15) << 4,
        ], axis=1)  # fmt: skip
        c = codes.reshape(-1, 4, 2, 32)
        out["qs"] = (c[:, :, 0] & 15 | (c[:, :, 1] & 15) << 4).reshape(-1, 128)
        if kind.name == "Q5_K":
            bits = (codes >> 4).reshape(-1, 8, 32) << np.arange(8, dtype=np.uint8)[:, None]
            out["qh"] = np.bitwise_or.reduce(bits, axis=1)
    return out.view(np.uint8).reshape(len(codes), kind.nbytes)


class KGrid:
    """The grids of K-quants for `edgeq.quant.calibrate.rounding`, which rounds a matrix with them block by block.

    `found` has the levels of every block of columns, in order, each of all rows.
    """

    columns = _BLOCK

    def __init__(self, kind: GGMLType) -> None:
        assert kind.coding is not None
        self.kind, self.coding, self.found = kind, kind.coding, list[Levels]()
        self.group_size, self.levels = kind.coding.group_size, np.float32((1 << kind.coding.bits) - 1)

    def fit(self, x: Float32, importance: Float32) -> tuple[Float32, Float32]:
        """Scales and biases float32 [256 / group_size, rows] for x [256, rows]."""
        blocks = np.ascontiguousarray(x.T)
        levels = fit(blocks, self.kind, np.broadcast_to(importance, blocks.shape), by_size=False)
        self.found.append(levels)
        return levels.scales().T, levels.biases(self.coding.zero).T

    def refit(
        self, _q: Float32, _block: Float32, _pull: Float32, scale: Float32, bias: Float32, /
    ) -> tuple[Float32, Float32]:
        """They stay: a group's scale is tied to those of its block."""
        return scale, bias

    def pack(self, codes: Array) -> Array:
        """The rows as stored, for codes uint8 [rows, n] of the blocks that were fitted: uint8 [rows, bytes]."""
        starts = range(0, codes.shape[1], _BLOCK)
        parts = (pack(codes[:, i : i + _BLOCK], self.kind, at) for i, at in zip(starts, self.found, strict=True))
        return np.concatenate(list(parts), axis=1)


class _Affine:
    """Groups with a scale and a bias that is at most 0. x, w [group, groups of all blocks]."""

    def __init__(self, x: Float32, w: Float32, blocks: int, levels: int) -> None:
        self.x, self.w, self.blocks, self.top = x, w, blocks, np.float32(levels)
        self.sum_w, self.sum_wx = w.sum(0), (w * x).sum(0)
        self.error = np.full(x.shape[1], np.inf, np.float32)
        self.scale, self.bias = np.zeros_like(self.error), np.zeros_like(self.error)

    def levels(self) -> Levels:
        for scale, bias in self.starts():
            for _ in range(1 + _DESCENTS):
                scale, bias = self.step(scale, bias)
        d, sc = _in_units(self.by_block(self.scale), _MOST_SCALE)
        dmin, mn = _in_units(self.by_block(-self.bias), _MOST_SCALE)
        least = self.block_errors(d, sc, dmin, mn)
        for _ in range(_ROUNDS):
            new_d, new_dmin = self.fit_units(d, sc, dmin, mn)
            new_sc, new_mn = self.moved(new_d, sc, new_dmin, mn)
            error = self.block_errors(new_d, new_sc, new_dmin, new_mn)
            better = error < least
            least, some = np.where(better, error, least), better[:, None]
            d, sc = np.where(better, new_d, d), np.where(some, new_sc, sc)
            dmin, mn = np.where(better, new_dmin, dmin), np.where(some, new_mn, mn)
        return Levels(d, sc, dmin, mn)

    def starts(self) -> Iterator[tuple[Float32, Float32]]:
        low = np.minimum(self.x.min(0), 0)
        span = np.maximum(self.x.max(0), 0) - low
        for stretch in _STRETCHES:
            scale = span / (self.top + np.float32(stretch))
            yield scale, np.minimum(low + (span - scale * self.top) / 2, 0)

    def codes(self, scale: Float32, bias: Float32) -> Float32:
        q: Float32 = self.x - bias
        q /= np.where(scale > 0, scale, np.float32(np.inf))
        np.rint(q, out=q)
        np.clip(q, 0, self.top, out=q)
        return q

    def errors(self, q: Float32, scale: Float32, bias: Float32) -> Float32:
        e = q * scale
        e += bias
        e -= self.x
        e *= e
        e *= self.w
        total: Float32 = e.sum(0)
        return total

    def step(self, scale: Float32, bias: Float32) -> tuple[Float32, Float32]:
        """Try a candidate; the scale and bias that fit its codes best."""
        q = self.codes(scale, bias)
        error = self.errors(q, scale, bias)
        better = error < self.error
        self.error = np.where(better, error, self.error)
        self.scale, self.bias = np.where(better, scale, self.scale), np.where(better, bias, self.bias)
        wq = self.w * q
        sum_q, sum_qq, sum_xq = wq.sum(0), (wq * q).sum(0), (wq * self.x).sum(0)
        determinant = self.sum_w * sum_qq - sum_q * sum_q
        solvable = determinant > 0
        fitted = (self.sum_w * sum_xq - sum_q * self.sum_wx) / np.where(solvable, determinant, np.float32(1))
        bias_fitted = (self.sum_wx - fitted * sum_q) / self.sum_w
        through_zero = sum_xq / np.where(sum_qq > 0, sum_qq, np.float32(1))
        above = bias_fitted > 0  # the format has none
        fitted, bias_fitted = np.where(above, through_zero, fitted), np.where(above, np.float32(0), bias_fitted)
        usable = solvable & (fitted > 0)
        return np.where(usable, fitted, scale), np.where(usable, bias_fitted, bias)

    def by_block(self, x: Float32) -> Float32:
        return x.reshape(self.blocks, -1)

    def group_errors(self, d: Array, sc: Array, dmin: Array, mn: Array) -> Float32:
        """[blocks, groups] for levels as they are stored."""
        levels = Levels(d, sc, dmin, mn)
        scale, bias = levels.scales().reshape(-1), levels.biases(0).reshape(-1)
        return self.by_block(self.errors(self.codes(scale, bias), scale, bias))

    def block_errors(self, d: Array, sc: Array, dmin: Array, mn: Array) -> Float32:
        total: Float32 = self.group_errors(d, sc, dmin, mn).sum(1)
        return total

    def fit_units(self, d: Array, sc: Array, dmin: Array, mn: Array) -> tuple[Array, Array]:
        """Both units by weighted least squares for the integers and codes at hand, as float16."""
        at = Levels(d, sc, dmin, mn)
        q = self.codes(at.scales().reshape(-1), at.biases(0).reshape(-1))
        wq = self.w * q
        s, m = sc.astype(np.float32), -mn.astype(np.float32)
        by = self.by_block
        aa, ab = (by((wq * q).sum(0)) * s * s).sum(1), (by(wq.sum(0)) * s * m).sum(1)
        bb = (by(self.sum_w) * m * m).sum(1)
        ax, bx = (by((wq * self.x).sum(0)) * s).sum(1), (by(self.sum_wx) * m).sum(1)
        determinant = aa * bb - ab * ab
        solvable = determinant > 0
        by_two = np.where(solvable, determinant, np.float32(1))
        alone = ax / np.where(aa > 0, aa, np.float32(1))
        fitted = np.where(solvable, (ax * bb - bx * ab) / by_two, alone)
        return _usable(fitted, d), _usable(np.where(solvable, (bx * aa - ax * ab) / by_two, 0), dmin)

    def moved(self, d: Array, sc: Array, dmin: Array, mn: Array) -> tuple[Array, Array]:
        """Every group's best integers of those beside the ones that it has."""
        best_sc, best_mn, least = sc, mn, self.group_errors(d, sc, dmin, mn)
        for i in (-1, 0, 1):
            for j in (-1, 0, 1):
                if i or j:
                    a, b = ((x + np.int8(k)).clip(0, _MOST_SCALE) for x, k in ((sc, i), (mn, j)))
                    error = self.group_errors(d, a, dmin, b)
                    better = error < least
                    least = np.where(better, error, least)
                    best_sc, best_mn = np.where(better, a, best_sc), np.where(better, b, best_mn)
        return best_sc, best_mn


class _Symmetric:
    """Groups with a scale of either sign and a fixed zero. x, w [group, groups of all blocks]."""

    def __init__(self, x: Float32, w: Float32, blocks: int, levels: int, zero: int) -> None:
        self.x, self.w, self.blocks = x, w, blocks
        self.low, self.high = np.float32(-zero), np.float32(levels - zero)
        self.error = np.full(x.shape[1], np.inf, np.float32)
        self.scale = np.zeros_like(self.error)

    def levels(self) -> Levels:
        extreme = np.take_along_axis(self.x, np.abs(self.x).argmax(0)[None], 0)[0]
        for stretch in _STRETCHES:
            scale = extreme / (self.low - np.float32(stretch) / 2)
            for _ in range(1 + _DESCENTS):
                scale = self.step(scale)
        d, sc = _in_units(self.scale.reshape(self.blocks, -1), _MOST_SIGNED)
        least = self.group_errors(d, sc).sum(1)
        for _ in range(_ROUNDS):
            new_d = self.fit_unit(d, sc)
            new_sc = self.moved(new_d, sc)
            error = self.group_errors(new_d, new_sc).sum(1)
            better = error < least
            least, d = np.where(better, error, least), np.where(better, new_d, d)
            sc = np.where(better[:, None], new_sc, sc)
        return Levels(d, sc)

    def codes(self, scale: Float32) -> Float32:
        q = np.rint(self.x / np.where(scale != 0, scale, np.float32(np.inf)), dtype=np.float32)
        np.clip(q, self.low, self.high, out=q)
        return q

    def errors(self, q: Float32, scale: Float32) -> Float32:
        e = q * scale
        e -= self.x
        e *= e
        e *= self.w
        total: Float32 = e.sum(0)
        return total

    def step(self, scale: Float32) -> Float32:
        q = self.codes(scale)
        error = self.errors(q, scale)
        better = error < self.error
        self.error, self.scale = np.where(better, error, self.error), np.where(better, scale, self.scale)
        wq = self.w * q
        sum_qq = (wq * q).sum(0)
        return np.where(sum_qq > 0, (wq * self.x).sum(0) / np.where(sum_qq > 0, sum_qq, np.float32(1)), scale)

    def group_errors(self, d: Array, sc: Array) -> Float32:
        scale = Levels(d, sc).scales().reshape(-1)
        return self.errors(self.codes(scale), scale).reshape(self.blocks, -1)

    def fit_unit(self, d: Array, sc: Array) -> Array:
        q = self.codes(Levels(d, sc).scales().reshape(-1))
        wq, s = self.w * q, sc.astype(np.float32)
        aa = ((wq * q).sum(0).reshape(self.blocks, -1) * s * s).sum(1)
        ax = ((wq * self.x).sum(0).reshape(self.blocks, -1) * s).sum(1)
        return _usable(ax / np.where(aa > 0, aa, np.float32(1)), d)

    def moved(self, d: Array, sc: Array) -> Array:
        best, least = sc, self.group_errors(d, sc)
        for i in (-1, 1):
            a = (sc.astype(np.int16) + i).clip(-_MOST_SIGNED, _MOST_SIGNED).astype(np.int8)
            error = self.group_errors(d, a)
            better = error < least
            least, best = np.where(better, error, least), np.where(better, a, best)
        return best


def _in_units(x: Float32, most: int) -> tuple[Array, Array]:
    """Numbers [n, groups] as integers of at most `most` in float16 units [n], the largest exactly that."""
    unit = (np.abs(x).max(1) / np.float32(most)).astype(np.float16)
    by = np.where(unit > 0, unit, np.float16(np.inf)).astype(np.float32)[:, None]
    return unit, np.rint(x / by).clip(-most, most).astype(np.int8)


def _usable(unit: Float32, before: Array) -> Array:
    """As float16, where it is a unit; else the one before."""
    stored = unit.astype(np.float16)
    return np.where(np.isfinite(stored) & (stored > 0), stored, before)
