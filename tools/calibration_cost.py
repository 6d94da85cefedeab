#!/usr/bin/env python3
"""What calibrating a model costs, from a few of its blocks: seconds of each stage, and of the whole by their number.

    tools/calibration_cost.py /work/ref/2b --tokens 4096 --cores 2

Blocks are timed on random hidden states, matrices are rounded as they would be. Passes and sums grow with the tokens
(they are timed with `--tokens` of them and scaled to the effort's), rounding does not. Processor seconds of all threads
are measured, so that other work on the machine matters little; divided by the number of cores they are the time on a
machine that does nothing else. Finding bits for a target is not in it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from edgeq.checkpoint import open_checkpoint  # noqa: E402
from edgeq.quant.calibrate.blas import one_blas_thread  # noqa: E402
from edgeq.quant.calibrate.calibrator import Calibrator, Recorded  # noqa: E402
from edgeq.quant.calibrate.folding import fold_block  # noqa: E402
from edgeq.quant.calibrate.request import CalibrationRequest  # noqa: E402
from edgeq.quant.calibrate.rounder import AffineRounder  # noqa: E402
from edgeq.quant.calibrate.taps import tapped_ops  # noqa: E402
from edgeq.quant.calibrate.workspace import Workspace  # noqa: E402
from edgeq.quant.recipe import QuantSpec  # noqa: E402
from edgeq.quant.source import open_source  # noqa: E402
from edgeq.weights import Role, TensorSpec, declare_text, leaves  # noqa: E402

__all__ = ["main"]


class Clock:
    """Processor seconds by stage."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[name] += time.process_time() - start


class Timed(Calibrator):
    """A calibrator whose stages are timed apart."""

    clock: Clock

    def hessian(self, name: str, x: Any, exact: Any) -> Any:
        with self.clock.stage("sums"):
            return super().hessian(name, x, exact)

    def _keep(self, w: Any, h: Any) -> None:
        with self.clock.stage("rounding"):
            super()._keep(w, h)


def main() -> None:
    """Print the stages of one block of each kind, and of the model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--effort", default="standard")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    request = CalibrationRequest("", options.effort, 0)
    budget, c = request.budget, open_checkpoint(options.model).config.text
    scale = budget.tokens / options.tokens
    total: defaultdict[str, float] = defaultdict(float)
    with one_blas_thread():
        for kind in dict.fromkeys(c.layer_types):
            seconds = time_block(options.model, c.layer_types.index(kind), options.tokens, options.threads, request)
            print(f"{kind}: " + ", ".join(f"{name} {s:.2f} s" for name, s in seconds.items()), flush=True)
            for name, s in seconds.items():
                passes = 2 if name == "float pass" and budget.asymmetric and c.tie_word_embeddings else 1
                grows = 1 if name in ("rounding", "equalization") else scale
                total[name] += s * grows * passes * c.layer_types.count(kind)
        total["head"] = time_head(options.model, options.tokens, options.threads, request)
    for name, s in total.items():
        print(f"{name:14}{s:9.0f} processor seconds")
    whole = sum(total.values())
    print(f"{'whole':14}{whole:9.0f}, {whole / options.cores / 60:.1f} minutes on {options.cores} cores")


def _made(
    model: Path, specs: dict[str, QuantSpec], tokens: int, threads: int, request: CalibrationRequest, work: Any
) -> Timed:
    context = 512
    ids = np.zeros((max(1, tokens // context), context), np.int32)
    source = open_source(model)
    rounder = AffineRounder(specs, np.dtype(np.uint16), request.rounding, threads)
    made = Timed(
        source.checkpoint, tapped_ops(threads), ids, specs, rounder, work,
        asymmetric=request.budget.asymmetric, told=_untold, equalize=source,
    )  # fmt: skip
    made.clock = Clock()
    return made


def _untold(*_: object) -> None:
    return None


def time_block(model: Path, i: int, tokens: int, threads: int, request: CalibrationRequest) -> dict[str, float]:
    """Processor seconds of a block's stages."""
    declared = declare_text(open_checkpoint(model).config.text).layers[i]
    specs = {s.name: QuantSpec(4, 64) for s in leaves(declared) if s.role is Role.LINEAR}
    with tempfile.TemporaryDirectory() as folder, Workspace(Path(folder) / "out", {}) as work:
        cal = _made(model, specs, tokens, threads, request, work)
        x = np.random.default_rng(0).standard_normal((cal.ids.size, cal.c.hidden_size)).astype(np.float32)
        recorded: dict[str, Recorded] = {}
        weights = cal.weights(declared)
        with cal.clock.stage("float pass"):
            cal.float_block(i, weights, x, recorded)
        inputs = {name: read.inputs for name, read in recorded.items()}
        with cal.clock.stage("equalization"):
            weights, _ = fold_block(cal.c, declared, weights, inputs, specs, open_source(model))
        start = time.process_time()
        with cal._listening(cal._solver(recorded)):
            cal.run_block(i, weights, x)
        seconds = dict(cal.clock.seconds)
        seconds["second pass"] = time.process_time() - start - seconds["sums"] - seconds["rounding"]
        return seconds


def time_head(model: Path, tokens: int, threads: int, request: CalibrationRequest) -> float:
    """Processor seconds of the head, by its first rows."""
    spec: TensorSpec = declare_text(open_checkpoint(model).config.text).lm_head
    rows = 8192
    with tempfile.TemporaryDirectory() as folder, Workspace(Path(folder) / "out", {}) as work:
        cal = _made(model, {spec.name: QuantSpec(4, 64)}, tokens, threads, request, work)
        x = np.random.default_rng(0).standard_normal((cal.ids.size, cal.c.hidden_size)).astype(np.float32)
        h = cal.hessian(spec.name, x, None)
        start = time.process_time()
        cal.rounder(spec.name, cal.matrix(spec).float_rows(slice(0, rows)), h)
        return (time.process_time() - start) * spec.shape[0] / rows


if __name__ == "__main__":
    main()
