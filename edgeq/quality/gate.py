"""The gate: what a quantized model has to show before it gets its name.

    result = check(source, folder, held_out_chunks)
    result.need()          # QualityError (exit code 6) for a damaged model

Two things are measured on text that was not calibrated on, of the weights alone (float32 activations): how far the
output of every layer has drifted from the source's, and how far the predictions have (KL divergence).

How much of either so many bits may cost differs from model to model by a factor of fifty (docs/concepts/
quality.md), so no number fits all. The yardstick is the simplest thing that can be done with the same bits: every
matrix of the source rounded to the smallest and largest weight of each group, run beside. What chooses its scales, or
its codes by calibration, is far better than that (KL 0.1 to 0.7 of it), so a model that is worse has been damaged on
its way: by a bug, by calibration text that fits nothing, by a file that was not written as it was meant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgeq.backends.floats import float_ops
from edgeq.checkpoint import Checkpoint, open_checkpoint
from edgeq.errors import QualityError
from edgeq.formats.bf16 import Array, Float32, to_float32
from edgeq.quality.kld import Comparison, Divergence, Progress, compare
from edgeq.quality.stream import Chunks, Stream, Weights
from edgeq.weights import Matrix, Part, QMatrix

__all__ = ["GateResult", "Verdict", "bits_per_weight", "check"]

WORSE_KL = 1.2  # mean KL divergence in terms of plain rounding's, and three standard errors on top
WORSE_DRIFT = 4.0  # the same of a layer's output, of which a broken matrix makes ten times and more
LEAST = 1e-3  # of either: what is always allowed, such as rounding to 16 bits where nothing is quantized
MOST_KL = 2.0  # nats: the source's own choice has on average lost all but e^-2 of its weight, at however few bits
BLOCK = 1 << 20  # weights rounded at a time
BINS = np.geomspace(1e-7, 10, 41)  # of the histogram of KL divergence, nats


class Verdict(NamedTuple):
    """One thing that was looked at: what was found, the most that passes, and what plain rounding has."""

    what: str
    found: float
    bound: float
    plain: float

    @property
    def passed(self) -> bool:
        """Not for NaN."""
        return self.found <= self.bound


@dataclass(frozen=True, slots=True)
class GateResult:
    """What was measured of `path` against its source, and whether it will do.

    drift: NMSE of what comes out of each step ("embed", "layer.0", ..., "norm"). plain, plain_drift: the same of plain
    rounding to the same bits. histogram: how many positions have a
    KL divergence up to each edge of BINS (the last count: above all of them).
    """

    path: str
    source: str
    bits: float
    context: int
    chunks: int
    divergence: Divergence
    drift: dict[str, float]
    plain: Divergence
    plain_drift: dict[str, float]
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
                f"{worst.bound:.3g} (plain rounding to the same bits: {worst.plain:.3g})",
                hint="use more bits, or other calibration text",
            )

    def as_json(self) -> dict[str, Any]:
        """Everything, for a program."""
        return {
            "passed": self.passed, "source": self.source, "bits_per_weight": self.bits, "context": self.context,
            "chunks": self.chunks, "kl": self.divergence._asdict(), "drift": self.drift,
            "plain_rounding": {"kl": self.plain._asdict(), "drift": self.plain_drift},
            "kl_histogram": {"edges": BINS.tolist(), "counts": list(self.histogram)},
            "verdicts": [{**v._asdict(), "passed": v.passed} for v in self.verdicts],
        }  # fmt: skip

    def __str__(self) -> str:
        d = self.divergence
        return (
            f"KL divergence {d.mean:.5f} nats (99 % {d.p99:.4f}; plain rounding {self.plain.mean:.5f}), "
            f"{d.top1:.1%} the same most likely token, perplexity {d.perplexity:.3f} after {d.reference_perplexity:.3f}"
        )


def check(
    source: Checkpoint, folder: Path, chunks: Chunks, *, out: Path | None = None, threads: int | None = None,
    progress: Progress | None = None,
) -> GateResult:  # fmt: skip
    """Measure the model in `folder`, which is going to be `out` if that is given, against `source` on chunks int32
    [n, T]. A bad result is no error here."""
    model, ops = open_checkpoint(folder), float_ops(threads)
    streams = [Stream(one, ops, floats=True) for one in (model, PlainlyRounded(source, model))]
    found, plain = compare(Stream(source, ops, floats=True), streams, chunks, progress)
    counts = np.bincount(np.searchsorted(BINS, found.kl.reshape(-1)), minlength=len(BINS) + 1)
    return GateResult(
        path=str(out or folder), source=str(source.path), bits=bits_per_weight(model), context=chunks.shape[1],
        chunks=len(chunks), divergence=found.divergence, drift=found.drift, plain=plain.divergence,
        plain_drift=plain.drift, histogram=tuple(counts.tolist()), verdicts=tuple(_verdicts(found, plain)),
    )  # fmt: skip


def _verdicts(found: Comparison, plain: Comparison) -> Iterator[Verdict]:
    kl, chance = plain.divergence.mean, 3 * np.nan_to_num(found.divergence.mean_error + plain.divergence.mean_error)
    bound = min(MOST_KL, max(LEAST, WORSE_KL * kl + float(chance)))
    yield Verdict("the mean KL divergence in nats", found.divergence.mean, bound, kl)
    for name, error in found.drift.items():
        yield Verdict(f"the NMSE of {name}", error, max(LEAST, WORSE_DRIFT * plain.drift[name]), plain.drift[name])


class PlainlyRounded:
    """A checkpoint, its matrices rounded as plainly as can be to the bits and groups that they have in `model`: codes
    from the smallest to the largest weight of a group, nothing searched for. A matrix that is not in groups there, and
    one that is in the source already, stays as it is.
    """

    def __init__(self, source: Weights, model: Weights) -> None:
        self.source, self.model = source, model
        self.path, self.config = source.path, source.config

    def matrix(self, name: str) -> Matrix[Array]:
        own, theirs = self.source.matrix(name), self.model.matrix(name)
        if isinstance(own, QMatrix) or not isinstance(theirs, QMatrix):
            return own
        rounded = np.empty(own.shape, np.float32)
        step = max(1, BLOCK // own.shape[1])
        for start in range(0, len(own), step):
            rows = slice(start, start + step)
            rounded[rows] = _rounded(to_float32(own[rows]), theirs.bits, theirs.group_size)
        return rounded

    def rows(self, name: str, rows: slice | Array) -> Float32:
        own, theirs = self.source.rows(name, rows), self.model.matrix(name)
        if isinstance(self.source.matrix(name), QMatrix) or not isinstance(theirs, QMatrix):
            return own
        return _rounded(own, theirs.bits, theirs.group_size)

    def dense(self, name: str) -> Float32:
        return self.source.dense(name)

    def drop_pages(self) -> None:
        self.source.drop_pages()
        self.model.drop_pages()

    def find_non_finite(self) -> str | None:
        return self.source.find_non_finite()


def _rounded(x: Float32, bits: int, group: int) -> Float32:
    """Rows float32 [n, columns] on 2^bits equal steps from the smallest to the largest of each group."""
    groups = x.reshape(len(x), -1, group)
    low, high = (reduce(groups, axis=-1, keepdims=True) for reduce in (np.min, np.max))
    scale = (high - low) / np.float32(2**bits - 1)
    codes = np.rint((groups - low) / np.where(scale > 0, scale, 1))
    return np.asarray(codes * scale + low, np.float32).reshape(x.shape)


def bits_per_weight(checkpoint: Checkpoint) -> float:
    """All bytes of the language model over all of its weights."""
    tensors = [(spec.size, held.nbytes) for spec, held in checkpoint.storage() if spec.part is Part.TEXT]
    return 8 * sum(nbytes for _, nbytes in tensors) / sum(size for size, _ in tensors)
