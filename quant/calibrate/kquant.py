"""Calibrated K-quants: the same pass, with ggml's blocks in place of affine groups.

For what is measured and allocated a K-quant is the affine groups it is nearest to (`MENU`). It is rounded as it is
stored: columns in the file's order, scales in two levels (`edgeq.quant.kquants.KGrid`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from edgeq.checkpoint.gguf_layout import head_order
from edgeq.config import TextConfig
from edgeq.formats.bf16 import Array, Float32
from edgeq.formats.ggml import TYPES, GGMLType
from edgeq.quant.calibrate.blas import in_threads, one_blas_thread
from edgeq.quant.calibrate.hessian import Hessian
from edgeq.quant.calibrate.rounding import ROWS, Effort, Rows, corrected, improve, round_rows
from edgeq.quant.kquants import KQUANTS, KGrid, encode
from edgeq.quant.recipe import Assignment, QuantSpec

__all__ = ["MENU", "BlockRounder", "KMenu", "SolvedBlocks"]

_Q8_0 = next(t for t in TYPES.values() if t.name == "Q8_0")
MENU: Mapping[QuantSpec, GGMLType] = MappingProxyType(
    {
        QuantSpec(4, 32): KQUANTS["Q4_K"],
        QuantSpec(5, 32): KQUANTS["Q5_K"],
        QuantSpec(6, 32): KQUANTS["Q6_K"],
        QuantSpec(8, 32): _Q8_0,
    }
)
"""The types that can be chosen, by the affine groups that they are most like."""


class KMenu:
    """What matrices may be stored as in a GGUF file."""

    def choices(self, a: Assignment) -> list[QuantSpec]:
        """The types whose blocks divide a matrix' rows."""
        return [spec for spec, kind in MENU.items() if a.spec.shape[1] % kind.block == 0]

    def nbytes(self, a: Assignment, spec: QuantSpec) -> int:
        """Bytes of a matrix stored so."""
        rows, columns = a.spec.shape
        return rows * columns // MENU[spec].block * MENU[spec].nbytes


class SolvedBlocks(NamedTuple):
    """A matrix as a GGUF file has it, but for the order of rows: blocks uint8 [out, bytes]. Column i of the file is
    column order[i] of the model.

    error: the squared error of its output per token; squares, squared_error: of the weights that were rounded, and of
    the difference.
    """

    blocks: Array
    order: Array
    kind: str
    error: float
    squares: float
    squared_error: float

    def rows(self, rows: slice | Array) -> Float32:
        """Some rows as float32 [rows, in], columns in the model's order."""
        values = _values(self.blocks[rows], self.kind)
        out = np.empty_like(values)
        out[:, self.order] = values
        return out

    def stacked(self, below: Sequence[SolvedBlocks]) -> SolvedBlocks:
        """One matrix of these rows and those below."""
        parts = (self, *below)
        return self._replace(
            blocks=np.concatenate([part.blocks for part in parts]),
            error=sum(part.error for part in parts),
            squares=sum(part.squares for part in parts),
            squared_error=sum(part.squared_error for part in parts),
        )


class BlockRounder:
    """Blocks by the `specs` of names, each a type by MENU."""

    def __init__(self, c: TextConfig, specs: Mapping[str, QuantSpec], effort: Effort, threads: int) -> None:
        self.c, self.specs, self.effort, self.threads = c, specs, effort, threads

    def __call__(self, name: str, w: Float32, h: Hessian | None, /) -> SolvedBlocks:
        kind, order = MENU[self.specs[name]], self._columns(name, w.shape[1])
        blocks = _plain(w[:, order], kind) if h is None or kind is _Q8_0 else self._solve(w, h, kind, order)
        solved = SolvedBlocks(blocks, order.astype(np.int32), kind.name, 0.0, float(np.vdot(w, w)), 0.0)
        difference = solved.rows(slice(None))
        difference -= w
        squared_error = float(np.vdot(difference, difference))
        error = squared_error if h is None else float(np.vdot(difference @ h.gram, difference)) / max(h.tokens, 1)
        return solved._replace(error=error, squared_error=squared_error)

    def _columns(self, name: str, columns: int) -> NDArray[np.intp]:
        """The model's columns in the file's order."""
        order = head_order(name, self.c)
        if order is None or order.axis == 0:
            return np.arange(columns)
        return np.argsort(order.positions)

    def _solve(self, w: Float32, h: Hessian, kind: GGMLType, order: NDArray[np.intp]) -> Array:
        h = h if (order == np.arange(len(order))).all() else h.reordered(order)
        gram = h.damped()

        def solve(start: int) -> Array:
            target = corrected(np.ascontiguousarray(w[start : start + ROWS, order]), h, self.effort.share)
            grid = KGrid(kind)
            rows: Rows = improve(target, gram, round_rows(target, h.factor, grid), grid, self.effort.sweeps)
            return grid.pack(rows.codes)

        with one_blas_thread():
            _ = h.factor, h.corners  # once, before the threads
            return np.concatenate(in_threads(solve, range(0, len(w), ROWS), self.threads))


def _plain(w: Float32, kind: GGMLType) -> Array:
    """By the weights alone."""
    if kind is _Q8_0:
        return np.asarray(quants.quantize(np.ascontiguousarray(w), GGMLQuantizationType.Q8_0))
    return encode(np.ascontiguousarray(w), kind)


def _values(blocks: Array, kind: str) -> Float32:
    return np.asarray(quants.dequantize(np.ascontiguousarray(blocks), GGMLQuantizationType[kind]), np.float32)
