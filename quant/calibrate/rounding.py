"""Codes, scales and biases of a matrix that keep its output, not its weights.

The objective is sum_rows e H e^T, e the row's error and H the inputs' Hessian (`hessian`). Rows are independent of each
other. Three steps, each of which sees scales and biases as they are stored (rounded to 16 bits):

1. `round_rows`: columns one after the other, every one moved by what the errors before it can be repaired by. With
   H = V V^T, V upper triangular, the objective is |e V|^2, and column k of e V depends on the errors 0..k alone, so
   each code is chosen to make its own term small. This is GPTQ (Frantar et al. 2022) without the inverse, as LDLQ (Chee
   et al., "QuIP", 2023) has it. Scale and bias of a group are searched when its first column comes up, on the weights
   as moved so far, errors weighted by V_kk^2, what each column costs once the rest is repaired.
2. `improve`: sweeps of coordinate descent on the whole objective, group by group: scale and bias by least squares with
   everything else fixed, among their neighbours of 16 bits, then each code by its own parabola. Nothing is taken
   that does not lower the objective.
3. Before both, `corrected`: the weights that fit the float model's output best on the inputs as they are by now,
   W + share * W D H^-1 with D the sum of (x_float - x) x^T (Li et al., "GPTAQ", 2025, solve the same). All of it
   (share 1) fits the calibration text too closely.

Arrays are [columns, rows] inside, so that one column of a block of rows is contiguous.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import ModelError
from edgeq.formats.affine import Codes, pack
from edgeq.formats.bf16 import Array, Float32, round_to, to_float32
from edgeq.quant.calibrate.blas import in_threads, one_blas_thread
from edgeq.quant.calibrate.hessian import Hessian
from edgeq.quant.recipe import QuantSpec

__all__ = [
    "EFFORTS",
    "AffineGrid",
    "AffineMatrix",
    "Effort",
    "Grid",
    "Rows",
    "corrected",
    "improve",
    "round_rows",
    "sample_rows",
    "solve_matrix",
]

ROWS = 512
"""Rows that a thread works on at a time: fixed, so that no result depends on the number of threads."""


_TINY = np.finfo(np.float32).tiny
_LARGEST = 1e12  # of a weight; float32 holds what is summed of squares, times those of activations


class Effort(NamedTuple):
    """How much work goes into a matrix: `sweeps` of descent after rounding, the `share` of the input correction, and
    how many `starts` the search for scale and bias has."""

    sweeps: int
    share: float
    starts: int


EFFORTS: Mapping[str, Effort] = MappingProxyType(
    {"fast": Effort(0, 0.0, 3), "standard": Effort(3, 0.6, 4), "best": Effort(8, 0.6, 8)}
)


class AffineMatrix(NamedTuple):
    """A quantized matrix: codes uint8 [out, in], scales and biases [out, in / group_size] as stored (uint16 is
    bfloat16), and `error`, the objective per token: the squared error of the output, summed over rows."""

    codes: NDArray[np.uint8]
    scales: Array
    biases: Array
    bits: int
    group_size: int
    error: float

    def weights(self) -> Float32:
        """float32 [out, in]."""
        return Rows(self.codes, to_float32(self.scales), to_float32(self.biases)).weights()

    def packed(self) -> tuple[Codes, Array, Array]:
        """Words, scales and biases as they are written."""
        return pack(self.codes, self.bits), self.scales, self.biases


def solve_matrix(
    w: Float32,
    h: Hessian,
    spec: QuantSpec,
    *,
    dtype: np.dtype[Any],
    effort: Effort = EFFORTS["standard"],
    threads: int = 1,
) -> AffineMatrix:
    """Quantize w float32 [out, in], whose inputs `h` has seen; scales and biases are stored as `dtype`, uint16 for
    bfloat16. The result is the same for any number of `threads`. ModelError where weights are not finite."""
    if not np.isfinite(w).all() or np.abs(w).max(initial=0) > _LARGEST:
        raise ModelError(f"weights that are NaN or beyond {_LARGEST:g}", hint="download or copy the file again")
    gram, grid = h.damped(), AffineGrid(spec, dtype, effort.starts)

    def solve(start: int) -> tuple[Rows, float]:
        block = w[start : start + ROWS]
        target = corrected(block, h, effort.share)
        rows = improve(target, gram, round_rows(target, h.factor, grid), grid, effort.sweeps)
        error = rows.weights() - block
        return rows, float(np.einsum("ij,ij->", error @ h.gram, error))

    with one_blas_thread():
        _ = h.factor, h.corners  # once, before the threads
        parts, errors = zip(*in_threads(solve, range(0, len(w), ROWS), threads), strict=True)
    codes, scales, biases = (np.concatenate(x) for x in zip(*parts, strict=True))
    solved = AffineMatrix(codes, round_to(scales, dtype), round_to(biases, dtype), spec.bits, spec.group_size, 0.0)
    return solved._replace(error=sum(errors) / max(h.tokens, 1))


def corrected(w: Float32, h: Hessian, share: float) -> Float32:
    """Weights float32 [out, in] whose product with the inputs as they are is nearer to that of `w` with the float
    model's: `w` plus `share` of the least-squares correction."""
    if share == 0 or h.drift is None or not h.drift.any():
        return w
    return np.ascontiguousarray(w + np.float32(share) * h.solve((w @ h.drift).T).T)


def sample_rows(w: Float32, rows: int) -> Float32:
    """At most `rows` rows of `w`, evenly spread."""
    chosen = np.linspace(0, len(w) - 1, min(rows, len(w))).astype(int)
    return np.ascontiguousarray(w[chosen])


class Rows(NamedTuple):
    """Some rows of a matrix: codes uint8 [rows, columns], scales and biases float32 [rows, groups], as stored."""

    codes: NDArray[np.uint8]
    scales: Float32
    biases: Float32

    def weights(self) -> Float32:
        """float32 [rows, columns]."""
        groups = self.codes.reshape(*self.scales.shape, -1).astype(np.float32)
        groups *= self.scales[..., None]
        groups += self.biases[..., None]
        return groups.reshape(self.codes.shape)


# --- rounding column by column ---------------------------------------------------------------------------------------


class Grid(Protocol):
    """What codes stand for: weight = scale * code + bias, codes 0 to `levels`, in groups of `group_size`, of which as
    many as fill `columns` are fitted at once."""

    columns: int
    group_size: int
    levels: np.float32

    def fit(self, x: Float32, importance: Float32) -> tuple[Float32, Float32]:
        """Scales and biases float32 [columns / group_size, rows], as stored, for x float32 [columns, rows], the squares
        of whose errors count by `importance` [columns]."""
        ...

    def refit(
        self, q: Float32, block: Float32, pull: Float32, scale: Float32, bias: Float32, /
    ) -> tuple[Float32, Float32]:
        """A better scale and bias [rows] of one group, as stored, if there are any, all else fixed: q [group, rows] are
        its codes, block [group, group] its part of the Hessian, and pull [group, rows] half the gradient."""
        ...


def round_rows(w: Float32, factor: Float32, grid: Grid) -> Rows:
    """Step 1 for w float32 [rows, columns], `factor` being `Hessian.factor`."""
    diagonal = np.diagonal(factor)
    importance = np.square(diagonal)
    wt = np.ascontiguousarray(w.T)
    error = np.empty_like(wt)  # of the columns that are done
    codes = np.empty(wt.shape, np.uint8)
    fits = []
    for start in range(0, len(wt), grid.columns):
        columns = slice(start, start + grid.columns)
        repair = factor[: columns.stop, columns] / diagonal[columns]  # of column j's error by column k: V_jk / V_kk
        wanted: Float32 = np.asarray(wt[columns] + repair[:start].T @ error[:start], np.float32)
        scales, biases = grid.fit(wanted, importance[columns])
        fits.append((scales, biases))
        for j in range(grid.columns):
            scale, bias = scales[j // grid.group_size], biases[j // grid.group_size]
            q = _codes(wanted[j], scale, bias, grid.levels)
            codes[start + j] = q
            error[start + j] = wt[start + j] - (scale * q + bias)
            wanted[j + 1 :] += repair[start + j, j + 1 :, None] * error[start + j]
    return Rows(
        np.ascontiguousarray(codes.T), *(np.ascontiguousarray(np.concatenate(x).T) for x in zip(*fits, strict=True))
    )


def _codes(x: Float32, scale: Float32, bias: Float32, levels: np.float32) -> Float32:
    """The nearest codes."""
    q = x - bias
    q *= _inverse(scale)
    np.rint(q, out=q)
    return q.clip(0, levels, out=q)


def _inverse(scale: Float32) -> Float32:
    """1 / scale; 0 where it is beyond float32, of zero and of what is next to it."""
    return np.divide(1, scale, out=np.zeros_like(scale), where=np.abs(scale) >= _TINY)


class AffineGrid:
    """Groups whose scale and bias are stored as `dtype`, found by a search.

    As `quant.search` does it, with weights and with fewer starts, for `improve` comes after: from grids wider and
    narrower than the range, alternate between codes and least squares, then try the neighbouring stored values. What is
    stored is what is judged. Its error is within 2 to 6 % of the full search's.
    """

    def __init__(self, spec: QuantSpec, dtype: np.dtype[Any], starts: int) -> None:
        self.columns = self.group_size = spec.group_size
        self.levels = np.float32(2**spec.bits - 1)
        self.dtype, self.starts = np.dtype(dtype), starts

    @property
    def nudge(self) -> np.float32:
        """What a stored value is changed by, relatively, to become the next one and not the one after."""
        return np.float32(1.2 * 2.0 ** (-8 if self.dtype == np.uint16 else -11))

    def stored(self, x: Float32) -> Float32:
        """`x` as it comes back from where it is stored."""
        return to_float32(round_to(x, self.dtype))

    def fit(self, x: Float32, importance: Float32) -> tuple[Float32, Float32]:
        """As `Grid.fit`."""
        low = x.min(0)
        span = x.max(0) - low
        best = _Best(self, x, importance)
        with np.errstate(all="ignore"):  # a pair out of range loses by itself
            for stretch in np.linspace(-0.5, 3, self.starts) if self.starts > 1 else (0.0,):
                scale = span / np.float32(self.levels + stretch)
                slack = span - scale * self.levels
                anchors = (0.0, 0.5, 1.0) if stretch > 0 else (0.5,)
                best.descend([(scale, low + slack * np.float32(anchor)) for anchor in anchors])
            best.descend([(best.scale, best.bias)])
            scale, bias = best.scale, best.bias
            for i, j in product((1 - self.nudge, np.float32(1), 1 + self.nudge), repeat=2):
                best.consider(scale * i, bias * j)
        return best.scale[None], best.bias[None]

    def refit(
        self, q: Float32, block: Float32, pull: Float32, scale: Float32, bias: Float32, /
    ) -> tuple[Float32, Float32]:
        """As `Grid.refit`: the best of those near the least-squares ones.

        The objective changes by a ds^2 + 2 b ds db + c db^2 + 2 (g ds + h db).
        """
        hq = block @ q
        a, b, c = np.einsum("ij,ij->j", q, hq), hq.sum(0), block.sum()
        g, h = np.einsum("ij,ij->j", q, pull), pull.sum(0)
        determinant = a * c - b * b
        solvable = determinant > 1e-6 * a * c
        safe = np.where(solvable, determinant, 1)
        ds = np.where(solvable, (b * h - c * g) / safe, 0)
        best, best_scale, best_bias = np.zeros_like(scale), scale, bias
        for factor in (1 - self.nudge, np.float32(1), 1 + self.nudge):
            s = self.stored((scale + ds) * factor)
            # with this scale, the bias that fits it
            t = self.stored(bias - (h + b * (s - scale)) / c) if c > 0 else bias
            es, et = s - scale, t - bias
            change = a * es * es + 2 * b * es * et + c * et * et + 2 * (g * es + h * et)
            better = change < best
            best = np.where(better, change, best)
            best_scale, best_bias = np.where(better, s, best_scale), np.where(better, t, best_bias)
        return best_scale, best_bias


class _Best:
    """The best scale and bias so far of groups x [group, rows]."""

    def __init__(self, grid: AffineGrid, x: Float32, importance: Float32) -> None:
        total = importance.sum()
        self.weights = importance / total if total > 0 else np.full_like(importance, 1 / len(importance))
        self.grid, self.x, self.mean = grid, x, self.weights @ x
        self.cost = np.full(x.shape[1], np.inf, np.float32)
        self.scale, self.bias = np.zeros_like(self.cost), np.zeros_like(self.cost)

    def descend(self, starts: Sequence[tuple[Float32, Float32]]) -> None:
        """From the best of `starts`, alternate between codes and least squares."""
        cost, scale, bias = self.consider(*starts[0])
        for start in starts[1:]:
            other, next_scale, next_bias = self.consider(*start)
            better = other < cost
            cost = np.where(better, other, cost)
            scale, bias = np.where(better, next_scale, scale), np.where(better, next_bias, bias)
        for _ in range(2):
            _, scale, bias = self.consider(scale, bias)

    def consider(self, scale: Float32, bias: Float32) -> tuple[Float32, Float32, Float32]:
        """Keep the pair where it is the best so far; its cost, and the least-squares fit to its codes."""
        scale, bias = self.grid.stored(scale), self.grid.stored(bias)
        q = _codes(self.x, scale, bias, self.grid.levels)
        error = q * scale
        error += bias
        error -= self.x
        cost = self.weights @ np.square(error, out=error)
        better = cost < self.cost
        self.cost = np.where(better, cost, self.cost)
        self.scale, self.bias = np.where(better, scale, self.scale), np.where(better, bias, self.bias)
        mean_q, mean_xq = self.weights @ q, self.weights @ (self.x * q)
        variance = self.weights @ np.square(q, out=q) - mean_q * mean_q
        solvable = variance > 1e-6
        fit = np.where(solvable, (mean_xq - self.mean * mean_q) / np.where(solvable, variance, 1), scale)
        return cost, fit, self.mean - fit * mean_q


# --- descent ---------------------------------------------------------------------------------------------------------


def improve(w: Float32, gram: Float32, rows: Rows, grid: Grid, sweeps: int) -> Rows:
    """Step 2 for w float32 [rows, columns] under `gram`, the damped Hessian: `sweeps` over all groups."""
    if sweeps == 0:
        return rows
    size = grid.group_size
    wt = np.ascontiguousarray(w.T)
    q = np.ascontiguousarray(rows.codes.T, np.float32)
    scales, biases = (np.ascontiguousarray(x.T) for x in (rows.scales, rows.biases))
    error = q * np.repeat(scales, size, 0)
    error += np.repeat(biases, size, 0)
    error -= wt
    pull = gram @ error  # half the gradient by every weight
    for sweep in range(sweeps):
        for group, start in enumerate(range(0, len(wt), size)):
            columns = slice(start, start + size)
            block, own = gram[columns, columns], q[columns]
            before = error[columns].copy()
            scales[group], biases[group] = grid.refit(own, block, pull[columns], scales[group], biases[group])
            now = own * scales[group] + biases[group] - wt[columns]
            _descend(own, block, pull[columns] + block @ (now - before), scales[group], grid.levels)
            error[columns] = own * scales[group] + biases[group] - wt[columns]
            still_read = slice(0 if sweep + 1 < sweeps else columns.stop, None)
            pull[still_read] += gram[still_read, columns] @ (error[columns] - before)
    return Rows(
        np.ascontiguousarray(q.T.astype(np.uint8)), np.ascontiguousarray(scales.T), np.ascontiguousarray(biases.T)
    )


def _descend(q: Float32, block: Float32, pull: Float32, scale: Float32, levels: np.float32) -> None:
    """Move every code of a group, in place, to the minimum of its parabola; `pull` [group, rows] is half the
    gradient."""
    inverse = _inverse(scale)
    for j in range(len(q)):
        curvature = block[j, j]
        if curvature <= 0:
            continue
        step = np.rint(pull[j] * (inverse / -curvature))
        moved = (q[j] + step).clip(0, levels)
        change = (moved - q[j]) * scale
        q[j] = moved
        if change.any():
            pull += block[:, j, None] * change
