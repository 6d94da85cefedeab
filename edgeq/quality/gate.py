"""The gate: what a quantized model has to show before it gets its name.

    result = check(source, folder, held_out_chunks)
    result.need()          # QualityError (exit code 6) for a damaged model

Two things are measured on text that was not calibrated on, of the weights alone (float32 activations): how far the
output of every layer has drifted from the source's, and how far the predictions have (KL divergence).

The bounds tell damage from what so many bits cost. A bit less doubles every rounding error, so squared errors grow by
four, and KL divergence, which is a quadratic form in them, does too. Both are therefore bounded by `4^(4.5 - bits)`
times a constant, with all bits of the language model counted, 4.5 being what 4 bits in groups of 64 come to. What was
measured stands in docs/concepts/quantization.md (test bed, its twin with outliers, the demo model; 3 to 8 bits, min-max
to calibrated): good files stay ten times below the bounds, and files with one broken matrix are above.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgeq.backends.floats import float_ops
from edgeq.checkpoint import Checkpoint, open_checkpoint
from edgeq.errors import QualityError
from edgeq.quality.kld import Divergence, Progress, compare
from edgeq.quality.stream import Chunks, Stream
from edgeq.weights import Part

__all__ = ["GateResult", "Verdict", "bits_per_weight", "check"]

KL_AT_4_5 = 0.5  # nats at 4.5 bits
DRIFT_AT_4_5 = 0.5  # NMSE of any layer's output at 4.5 bits
MOST = 1.0  # of either, however few the bits are: predictions, or a layer, that have lost the source
LEAST = 1e-3  # of either, however many: what rounding to 16 bits may cost a model without quantization
BINS = np.geomspace(1e-7, 10, 41)  # of the histogram of KL divergence, nats


class Verdict(NamedTuple):
    """One thing that was looked at: what was found, and the most that passes."""

    what: str
    found: float
    bound: float

    @property
    def passed(self) -> bool:
        """Not for NaN."""
        return self.found <= self.bound


@dataclass(frozen=True, slots=True)
class GateResult:
    """What was measured of `path` against its source, and whether it will do.

    drift: NMSE of what comes out of each step ("embed", "layer.0", ..., "norm"). histogram: how many positions have a
    KL divergence up to each edge of BINS (the last count: above all of them).
    """

    path: str
    source: str
    bits: float
    context: int
    chunks: int
    divergence: Divergence
    drift: dict[str, float]
    histogram: tuple[int, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        return all(verdict.passed for verdict in self.verdicts)

    def need(self) -> None:
        """Raise QualityError unless everything passed."""
        failed = [v for v in self.verdicts if not v.passed]
        if failed:
            worst = max(failed, key=lambda v: math.inf if math.isnan(v.found) else v.found / v.bound)
            raise QualityError(
                f"{self.path}: the quantized model is damaged: {worst.what} is {worst.found:.3g}, expected at most "
                f"{worst.bound:.3g} at {self.bits:.2f} bits per weight",
                hint="nothing was written; use more bits, or other calibration text, and report this if neither helps",
            )

    def as_json(self) -> dict[str, Any]:
        """Everything, for a program."""
        return {
            "passed": self.passed, "source": self.source, "bits_per_weight": self.bits, "context": self.context,
            "chunks": self.chunks, "kl": self.divergence._asdict(), "drift": self.drift,
            "kl_histogram": {"edges": BINS.tolist(), "counts": list(self.histogram)},
            "verdicts": [{**v._asdict(), "passed": v.passed} for v in self.verdicts],
        }  # fmt: skip

    def __str__(self) -> str:
        d = self.divergence
        return (
            f"KL divergence {d.mean:.5f} nats (median {d.median:.5f}, 99 % {d.p99:.4f}, largest {d.max:.3f}), "
            f"{d.top1:.1%} the same most likely token, perplexity {d.perplexity:.3f} after {d.reference_perplexity:.3f}"
        )


def check(
    source: Checkpoint, folder: Path, chunks: Chunks, *, threads: int | None = None, progress: Progress | None = None
) -> GateResult:
    """Measure the model in `folder` against `source` on chunks int32 [n, T]. A bad result is no error here."""
    model, ops = open_checkpoint(folder), float_ops(threads)
    (found,) = compare(Stream(source, ops, floats=True), [Stream(model, ops, floats=True)], chunks, progress)
    bits = bits_per_weight(model)
    counts = np.bincount(np.searchsorted(BINS, found.kl.reshape(-1)), minlength=len(BINS) + 1)
    return GateResult(
        path=str(folder), source=str(source.path), bits=bits, context=chunks.shape[1], chunks=len(chunks),
        divergence=found.divergence, drift=found.drift, histogram=tuple(counts.tolist()),
        verdicts=_verdicts(found.divergence, found.drift, bits),
    )  # fmt: skip


def _verdicts(divergence: Divergence, drift: dict[str, float], bits: float) -> tuple[Verdict, ...]:
    kl, layer = (min(MOST, max(LEAST, at * 4 ** (4.5 - bits))) for at in (KL_AT_4_5, DRIFT_AT_4_5))
    worst = max(drift, key=lambda name: math.inf if math.isnan(drift[name]) else drift[name])
    return (
        Verdict("the mean KL divergence in nats", divergence.mean, kl),
        Verdict(f"the NMSE of {worst}", drift[worst], layer),
    )


def bits_per_weight(checkpoint: Checkpoint) -> float:
    """All bytes of the language model over all of its weights."""
    tensors = [(spec.size, held.nbytes) for spec, held in checkpoint.storage() if spec.part is Part.TEXT]
    return 8 * sum(nbytes for _, nbytes in tensors) / sum(size for size, _ in tensors)
