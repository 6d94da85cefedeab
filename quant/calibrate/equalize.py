"""Moving scale from the columns of matrices into what writes their inputs, so that the groups round better.

Columns of a group share a step. A column of small weights that reads a large activation gets the step of its neighbours
and multiplies its error by that activation. Since y = W x = (W S) (S^-1 x) for any diagonal S, scale can be moved where
S^-1 can be folded exactly into what makes x: a norm's gain, the rows of `up_proj` before `down_proj`, of `v_proj`
before `o_proj`, the gated norm before DeltaNet's `out_proj`.

If a group's step grows with the root mean square m of its columns and the error of column j counts V_jj^2 (see
`rounding`), then sum_j V_jj^2 / s_j^2 * sum_j m_j^2 s_j^2 is smallest, by Cauchy and Schwarz, at s_j^2 = V_jj / m_j.
AWQ (Lin et al., 2023) searches a similar power of activations for the error of the output; here several powers of this
ratio are tried on a sample of rows, rounded as they will be, and the best one, which may be none, is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.bf16 import Array, Float32, round_to, to_float32
from edgeq.quant.calibrate.hessian import Hessian
from edgeq.quant.calibrate.rounding import AffineGrid, round_rows, sample_rows
from edgeq.quant.recipe import QuantSpec

__all__ = ["column_factors", "fold_norm"]

POWERS = (0.25, 0.5, 0.75, 1.0)
"""Of V_jj / m_j; a half is best where the model above holds, more where single columns stand out of their group."""
ROWS = 64  # of every matrix that the powers are tried on
_GAIN = 0.98  # what is not better than this times the error without is left alone
_RANGE = 64.0  # factors lie between its inverse and itself
_FLOAT32 = np.dtype(np.float32)


def column_factors(
    ws: Sequence[Float32], h: Hessian, specs: Sequence[QuantSpec], share: NDArray[np.intp] | None = None
) -> Float32:
    """Factors s float32 [in] > 0 by which the columns of all `ws`, float32 [out, in], are to be multiplied.

    `h` has seen what they read, `specs` say how each is going to be quantized; columns with equal numbers in `share`
    [in] get one factor. All ones where nothing is gained.
    """
    square = sum(np.square(w).sum(0, dtype=np.float64) / max(np.square(w).sum(dtype=np.float64), 1e-30) for w in ws)
    diagonal = np.diagonal(h.factor).astype(np.float64)
    alive = (np.diagonal(h.gram) > 0) & (square > 0)
    log = np.zeros(h.columns)
    log[alive] = np.log(diagonal[alive]) - 0.5 * np.log(np.asarray(square)[alive])
    log[alive] -= log[alive].sum() / max(np.count_nonzero(alive), 1)
    if share is not None:
        sums, counts = np.bincount(share, log * alive), np.bincount(share, alive)
        log = (sums / np.maximum(counts, 1))[share]
    best, factors = _GAIN * _error(ws, h.factor, specs), np.ones(h.columns, np.float32)
    for power in POWERS:
        tried = np.exp(power * log).clip(1 / _RANGE, _RANGE).astype(np.float32)
        error = _error([w * tried for w in map(_sample, ws)], h.factor / tried[:, None], specs)
        if error < best:
            best, factors = error, tried
    return factors


def _sample(w: Float32) -> Float32:
    """Some rows, evenly spread."""
    return sample_rows(w, ROWS)


def _error(ws: Sequence[Float32], factor: Float32, specs: Sequence[QuantSpec]) -> float:
    """Error of the outputs of a sample of rows, each matrix relative to its outputs as they are."""
    total = 0.0
    for w, spec in zip(map(_sample, ws), specs, strict=True):
        rows = round_rows(w, factor, AffineGrid(spec, _FLOAT32, 1))
        error = (rows.weights() - w) @ factor
        total += float(np.square(error).sum(dtype=np.float64) / max(np.square(w @ factor).sum(dtype=np.float64), 1e-30))
    return total


def fold_norm(norm: Array, factors: Float32, *, centred: bool) -> tuple[Array, Float32]:
    """A norm's weights with their gain divided by `factors`, and the factors by which the columns that read it are to
    be multiplied, so that nothing changes: the ratio of the gains as they are stored.

    norm [n] as stored, bfloat16 (uint16), float16 or float32; `centred` where the gain is 1 + weight. Channels
    whose gain cannot take part (zero, or out of the type's range) keep theirs.
    """
    offset = np.float32(1 if centred else 0)
    gain = to_float32(norm) + offset
    folded = round_to(gain / factors - offset, norm.dtype)
    new = to_float32(folded) + offset
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = gain / new
    usable = (factors != 1) & np.isfinite(ratio) & (ratio > 0)
    return np.where(usable, folded, norm), np.where(usable, ratio, np.float32(1)).astype(np.float32)
