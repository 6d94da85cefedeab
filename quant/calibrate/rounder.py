"""Rounding to MLX's affine groups, as the calibrator asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgeq.formats.bf16 import Float32
from edgeq.quant.calibrate.blas import in_threads
from edgeq.quant.calibrate.hessian import Hessian
from edgeq.quant.calibrate.rounding import Effort, solve_matrix
from edgeq.quant.calibrate.taps import row_blocks
from edgeq.quant.calibrate.workspace import Solved
from edgeq.quant.matrix import quantize_rows
from edgeq.quant.recipe import QuantSpec

__all__ = ["AffineRounder", "searched"]

_BLOCK = 1 << 20  # weights that a thread searches scales for, where no Hessian says more


class AffineRounder:
    """Codes, scales and biases by the `specs` of names, scales stored as `dtype` (uint16: bfloat16)."""

    def __init__(self, specs: Mapping[str, QuantSpec], dtype: np.dtype[Any], effort: Effort, threads: int) -> None:
        self.specs, self.dtype, self.effort, self.threads = specs, dtype, effort, threads

    def __call__(self, name: str, w: Float32, h: Hessian | None, /) -> Solved:
        spec = self.specs[name]
        if h is None:
            return searched(w, spec, self.dtype, self.threads)
        solved = solve_matrix(w, h, spec, dtype=self.dtype, effort=self.effort, threads=self.threads)
        difference = solved.weights()
        difference -= w
        squared_error = float(np.vdot(difference, difference))
        return Solved(
            *solved.packed(), spec.bits, spec.group_size, solved.error, float(np.vdot(w, w)), squared_error
        )  # fmt: skip


def searched(w: Float32, spec: QuantSpec, dtype: np.dtype[Any], threads: int) -> Solved:
    """w float32 [rows, in] rounded plainly, by the weights alone; its error is theirs."""
    blocks = in_threads(
        lambda rows: quantize_rows(w[rows], spec.bits, spec.group_size, dtype), [*row_blocks(w.shape, _BLOCK)], threads
    )
    words, scales, biases = (np.concatenate(x) for x in list(zip(*blocks, strict=True))[:3])
    error = sum(block.squared_error for block in blocks)
    return Solved(words, scales, biases, spec.bits, spec.group_size, error, float(np.vdot(w, w)), error)
