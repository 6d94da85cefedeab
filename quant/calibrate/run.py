"""A calibration as the quantizer has it done: windows, a working folder, allocation, the pass, and a record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import EdgeqError, QualityError
from edgeq.formats.bf16 import Array, Float32, to_float32
from edgeq.quant.calibrate.allocation import Allowance, as_json, from_json
from edgeq.quant.calibrate.blas import one_blas_thread
from edgeq.quant.calibrate.calibrator import Calibrator, Rounder
from edgeq.quant.calibrate.request import CalibrationRequest
from edgeq.quant.calibrate.rounder import AffineRounder
from edgeq.quant.calibrate.sensitivity import Costs, expected, measure
from edgeq.quant.calibrate.taps import tapped_ops
from edgeq.quant.calibrate.windows import Windows, read_windows
from edgeq.quant.calibrate.workspace import Solved, Workspace
from edgeq.quant.provenance import hash_files
from edgeq.quant.recipe import Assignment, QuantSpec
from edgeq.quant.source import WeightSource
from edgeq.version import __version__
from edgeq.weights import Part, Role, TensorSpec

__all__ = ["Calibration", "calibrated"]

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Calibration:
    """Calibrated matrices by name, in the working folder, and what led to them: the assignments with bits as they were
    chosen, and the windows."""

    request: CalibrationRequest
    windows: Windows
    assignments: Sequence[Assignment]
    allowance: Allowance | None
    work: Workspace
    layers: int
    centred: bool

    @cached_property
    def specs(self) -> dict[str, QuantSpec]:
        """The matrices that are calibrated."""
        return _specs(self.assignments)

    def solved(self, name: str) -> Any:
        """One of them as it is to be written, in the rounder's form."""
        solved = self.work.solved(name)
        if solved is None:
            raise EdgeqError(f"{self.work.folder}: {name} has gone", hint="run again: what is missing is made again")
        return solved

    @cached_property
    def changed(self) -> dict[str, Array]:
        """Tensors that are not quantized, but were changed by equalization, as they are to be written."""
        layers = (self.work.arrays(f"layers.{i}") or {} for i in range(self.layers))
        return {name: x for changed in layers for name, x in changed.items()}

    def changed_value(self, spec: TensorSpec) -> Float32 | None:
        """A tensor that was changed by equalization, as the model has it: norms are gains."""
        found = self.changed.get(spec.name)
        if found is None:
            return None
        return to_float32(found.reshape(spec.shape)) + np.float32(self.centred and spec.role is Role.NORM)

    @property
    def record(self) -> dict[str, Any]:
        """For the provenance record."""
        budget = self.request.budget
        stages = {
            "allocation": self.allowance is not None,
            "equalization": budget.equalize,
            "rounding": self.request.rounding._asdict(),
            "inputs": "of the model as quantized so far" if budget.asymmetric else "of the float model",
        }
        record = {**self.request.record, **self.windows.record, "stages": stages}
        if self.allowance is not None:
            free = {a.spec.name for a in self.allowance.free}
            record["allocation"] = self.allowance.record | {
                "bits": {a.spec.name: str(a.storage) for a in self.assignments if a.spec.name in free}
            }
        return record


@contextmanager
def calibrated(
    request: CalibrationRequest, source: WeightSource, assignments: Sequence[Assignment],
    allowance: Allowance | None, recipe: Mapping[str, Any], out: Path, dtype: np.dtype[Any], threads: int,
    progress: Progress | None, *, rounder: Callable[[Mapping[str, QuantSpec]], Rounder] | None = None,
    form: type[Any] = Solved,
) -> Iterator[Calibration]:  # fmt: skip
    """Calibrate what `assignments` quantize of the language model and the MTP head, for an output at `out`, with the
    bits of an `allowance` chosen first; `recipe` is what else decides the result, scales are stored as `dtype`. The
    working folder is kept where this ends with an error. `rounder` is made for the bits of all matrices and gives what
    has `form`; None is MLX's affine groups."""
    budget = request.budget
    windows = read_windows(source.checkpoint, request.text, budget.tokens, budget.judged, request.seed)
    ops = tapped_ops(threads)
    asked = {
        "source": hash_files(source.files),
        "adapters": [dict(adapter) for adapter in source.adapters],
        "text": windows.record,
        "settings": request.record,
        "recipe": dict(recipe),
        "allocation": None if allowance is None else allowance.record,
        "version of edgeq": __version__,
        "backend": ops.describe(),
    }
    with Workspace(out, asked, form) as work, one_blas_thread():
        meter = _Meter(progress)

        def calibrator(ids: NDArray[np.int32], chosen: Sequence[Assignment]) -> Calibrator:
            specs = _specs(chosen)
            rounds = rounder(specs) if rounder else AffineRounder(specs, dtype, request.rounding, threads)
            equalized = source if budget.equalize else None
            return Calibrator(
                source.checkpoint, ops, ids, specs, rounds, work,
                asymmetric=budget.asymmetric, told=meter, equalize=equalized,
            )  # fmt: skip

        meter.total = calibrator(windows.calibration, assignments).expected()
        if allowance is not None:
            chosen = allowance.largest
            if chosen is None:
                sweep = calibrator(_spread(windows.calibration, budget.measured), ())
                chosen = allowance.allocate(_costs(allowance, sweep, budget.probes, dtype, work, meter))
            assignments = allowance.applied(assignments, chosen)
        final = calibrator(windows.calibration, assignments)
        final.run()
        layers = len(final.declared.layers)
        try:
            yield Calibration(request, windows, assignments, allowance, work, layers, source.centred)
        except QualityError:
            work.remove()  # going on from it would end the same way
            raise
        work.remove()


def _costs(
    allowance: Allowance, sweep: Calibrator, probes: int, dtype: np.dtype[Any], work: Workspace, meter: _Meter
) -> Costs:
    """What every choice costs, once for all runs in a working folder."""
    kept = work.value("costs")
    if kept is None:
        offered = {a.spec.name: allowance.menu.choices(a) for a in allowance.free}
        meter.total += expected(sweep, offered, probes)
        kept = as_json(measure(sweep, offered, probes, dtype))
        work.keep_value("costs", kept)
    return from_json(kept)


def _specs(assignments: Sequence[Assignment]) -> dict[str, QuantSpec]:
    """What is to be calibrated."""
    return {
        a.spec.name: a.storage
        for a in assignments
        if a.spec.part in (Part.TEXT, Part.MTP) and isinstance(a.storage, QuantSpec)
    }


def _spread(windows: NDArray[np.int32], tokens: int) -> NDArray[np.int32]:
    """Some of the windows, of about so many tokens, from all over them."""
    count = min(len(windows), max(1, tokens // windows.shape[1]))
    return np.ascontiguousarray(windows[np.linspace(0, len(windows) - 1, count).astype(int)])


class _Meter:
    """Work as it is done, shown as progress."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress, self.total, self.done = progress, 0.0, 0.0

    def __call__(self, work: float, what: str) -> None:
        self.done = min(self.done + work, self.total)
        if self.progress is not None:
            self.progress(round(self.done / 1e6), round(self.total / 1e6), what)
