"""Calibration for a GGUF file: which of its matrices are rounded by what they read, and to which types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from math import prod
from pathlib import Path

import numpy as np

from edgeq.checkpoint import Checkpoint
from edgeq.errors import UsageError
from edgeq.formats.ggml import GGMLType
from edgeq.quant.calibrate.allocation import Allowance
from edgeq.quant.calibrate.blas import cores
from edgeq.quant.calibrate.kquant import MENU, BlockRounder, KMenu, SolvedBlocks
from edgeq.quant.calibrate.request import CalibrationRequest
from edgeq.quant.calibrate.run import Calibration, calibrated
from edgeq.quant.recipe import Assignment
from edgeq.quant.source import source_of
from edgeq.weights import Part, Role, TensorSpec

__all__ = ["calibrated_blocks"]

Progress = Callable[[int, int, str], None]

_SPECS = {kind.name: spec for spec, kind in MENU.items()}


def calibrated_blocks(
    checkpoint: Checkpoint, out: Path, specs: Sequence[TensorSpec], types: Mapping[str, GGMLType],
    request: CalibrationRequest, threads: int | None, progress: Progress | None,
) -> AbstractContextManager[Calibration]:  # fmt: skip
    """What `specs` become in the file `out`: matrices of a K-quant by `types` are calibrated, and those of the
    language model get the types that cost least for a target's bytes, or for as many as `types` take, unless bits are
    kept. UsageError for a target that is too small, and where no matrix is of a K-quant."""
    source, threads = source_of(checkpoint), threads or cores()
    assignments = [
        Assignment(spec, spec.name, _SPECS[types[spec.name].name])
        for spec in specs
        if spec.role in (Role.LINEAR, Role.EMBEDDING) and types[spec.name].block == 256
    ]
    if not assignments:
        raise UsageError(
            f"{checkpoint.path} has no matrix to calibrate: rows of K-quants are multiples of 256, and none here are",
            hint="leave calibration out",
        )
    tensors = ((spec, _nbytes(spec, types[spec.name])) for spec in specs)
    allowance = Allowance.of(request, tensors, [a for a in assignments if a.spec.part is Part.TEXT], KMenu())
    recipe = {"types": {name: kind.name for name, kind in types.items()}}
    return calibrated(
        request, source, assignments, allowance, recipe, out, np.dtype(np.float16), threads, progress,
        rounder=lambda chosen: BlockRounder(checkpoint.config.text, chosen, request.rounding, threads),
        form=SolvedBlocks,
    )  # fmt: skip


def _nbytes(spec: TensorSpec, kind: GGMLType) -> int:
    return prod(spec.shape) // kind.block * kind.nbytes
