"""How far a model's predictions are from a reference's.

    (result,) = compare(Stream(original, ops), [Stream(quantized, ops, floats=True)], cut(ids, 512))
    result.divergence.mean, result.divergence.top1, result.drift["layer.3"]

Conventions are those of llama.cpp's perplexity tool: every chunk of token ids is run from an empty state, and the
predictions of the second half of its tokens count. Logits are float32 and never rounded or clipped, sums over the
vocabulary float64: a KL divergence of 1e-9 is one.

What is held is a layer of each model, a piece of its vocabulary, and hidden states (see `edgeq.quality.stream`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from edgeq.errors import ModelError, QualityError, UsageError
from edgeq.formats.bf16 import Array, Float32
from edgeq.quality.stream import Chunks, Stream

__all__ = [
    "Comparison",
    "Divergence",
    "Perplexity",
    "Progress",
    "check",
    "compare",
    "compare_pairs",
    "cut",
    "perplexity",
]

HELD = 1 << 25  # numbers of hidden states of each model at once: 128 MB, which are 13,000 tokens of the 4B
PIECE = 1 << 24  # weights of a piece of the vocabulary: 64 MB in float32
LOGITS = 1 << 22  # logits of each model at once: 16 MB
SCORED = 1 << 18  # of them at once in float64

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the steps done and all steps: layers and pieces of the vocabulary, for each of the groups of chunks."""


class Perplexity(NamedTuple):
    """Of a text: exp of the mean loss of `positions` predictions, and its standard error."""

    positions: int
    perplexity: float
    error: float


class Divergence(NamedTuple):
    """A model against the reference, over all positions that count. An ..._error is the standard error of a mean, with
    positions taken as independent, as llama.cpp does.

    mean, median, p99, p999, max: KL(reference || model) of a position's prediction, in nats.
    top1: share of positions where both find the same token most likely.
    perplexity, reference_perplexity: of the text; delta_ln_perplexity: ln of their ratio.
    nmse: normalised mean squared error of the logits.
    """

    positions: int
    mean: float
    mean_error: float
    median: float
    p99: float
    p999: float
    max: float
    top1: float
    top1_error: float
    perplexity: float
    perplexity_error: float
    reference_perplexity: float
    delta_ln_perplexity: float
    delta_ln_perplexity_error: float
    nmse: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was found of a model at every position: float64 or bool [chunks, positions of a chunk].

    kl: KL(reference || model) in nats; same: whether both find the same token most likely; loss, reference_loss:
    -ln of the probability of the token that followed.
    nmse: of the logits; drift: NMSE of what comes out of each step, over all tokens ("embed", "layer.0", ...,
    "norm"); empty for models of different shapes.
    """

    kl: Array
    same: Array
    loss: Array
    reference_loss: Array
    nmse: float
    drift: dict[str, float]

    @property
    def divergence(self) -> Divergence:
        """All of it in a few numbers."""
        kl, delta = self.kl.reshape(-1), self.loss - self.reference_loss
        median, p99, p999 = (float(x) for x in np.quantile(kl, (0.5, 0.99, 0.999)))
        of_model, of_reference = _perplexity(self.loss), _perplexity(self.reference_loss)
        return Divergence(
            positions=kl.size, mean=float(kl.mean()), mean_error=_error_of_mean(kl), median=median, p99=p99, p999=p999,
            max=float(kl.max()), top1=float(self.same.mean()), top1_error=_error_of_mean(self.same),
            perplexity=of_model.perplexity, perplexity_error=of_model.error,
            reference_perplexity=of_reference.perplexity, delta_ln_perplexity=float(delta.mean()),
            delta_ln_perplexity_error=_error_of_mean(delta), nmse=self.nmse,
        )  # fmt: skip


def cut(ids: Sequence[int] | Array, context: int, most: int | None = None) -> Chunks:
    """The first `most` whole chunks of `context` tokens each: int32 [n, context]. UsageError where there is none."""
    if context < 4:
        raise UsageError(f"chunks must be of at least 4 tokens, got {context}", hint="512 is usual")
    count = len(ids) // context if most is None else min(most, len(ids) // context)
    if not count:
        raise UsageError(
            f"the text is {len(ids)} tokens long, expected at least one chunk of {context}",
            hint="use a longer text or smaller chunks",
        )
    return np.asarray(ids[: count * context], np.int32).reshape(count, context)


def compare(
    reference: Stream[Any, Any], models: Sequence[Stream[Any, Any]], chunks: Chunks, progress: Progress | None = None
) -> list[Comparison]:
    """Each of `models` against `reference` on the same chunks; the reference runs once for all of them."""
    pairs = [(0, i) for i in range(1, len(models) + 1)]
    return compare_pairs([reference, *models], pairs, chunks, progress)


def compare_pairs(
    streams: Sequence[Stream[Any, Any]], pairs: Sequence[tuple[int, int]], chunks: Chunks,
    progress: Progress | None = None,
) -> list[Comparison]:  # fmt: skip
    """For every pair (reference, model), both places in `streams`, what `compare` finds; each stream runs once."""
    for stream in streams[1:]:
        _check_vocabulary(streams[0], stream)
    tallies = [_Tally(*pair) for pair in pairs]
    for scores in _measure(streams, pairs, chunks, progress):
        for i, tally in enumerate(tallies):
            tally.add(scores, i)
    return [tally.comparison() for tally in tallies]


def perplexity(model: Stream[Any, Any], chunks: Chunks, progress: Progress | None = None) -> Perplexity:
    """How well `model` predicts the text."""
    return _perplexity(np.concatenate([scores.loss[0] for scores in _measure([model], [], chunks, progress)]))


def check(name: str, result: Divergence, max_kl: float) -> None:
    """Raise QualityError unless the mean KL divergence is at most `max_kl` nats."""
    if not result.mean <= max_kl:
        raise QualityError(
            f"{name}: the mean KL divergence is {result.mean:.6f} nats, expected at most {max_kl:g}",
            hint="quantize with more bits or smaller groups",
        )


def _check_vocabulary(reference: Stream[Any, Any], model: Stream[Any, Any]) -> None:
    sizes = [stream.config.vocab_size for stream in (reference, model)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"{model.checkpoint.path} has a vocabulary of {sizes[1]}, expected the reference's {sizes[0]}",
            hint="compare models of one family",
        )


def _perplexity(loss: Array) -> Perplexity:
    """The error is that of the mean loss, carried over."""
    value = math.exp(loss.mean()) if loss.mean() < 700 else math.inf
    return Perplexity(loss.size, value, value * _error_of_mean(loss))


def _error_of_mean(x: Array) -> float:
    return float(x.std(ddof=1) / math.sqrt(x.size)) if x.size > 1 else math.nan


# --- running ---------------------------------------------------------------------------------------------------------


Squares: TypeAlias = dict[str, tuple[float, float]]  # by step, the sums of squares of an error and of what was expected


class _Scores(NamedTuple):
    """Of a group of chunks: loss and best [streams, chunks, positions of a chunk], kl [pairs, ...], and for each pair
    the sums of squares."""

    loss: Array
    best: Array
    kl: Array
    squares: list[Squares]


def _measure(
    streams: Sequence[Stream[Any, Any]], pairs: Sequence[tuple[int, int]], chunks: Chunks, progress: Progress | None
) -> Iterator[_Scores]:
    """The predictions of all streams for group after group of chunks."""
    length = chunks.shape[1]
    width = max(stream.config.hidden_size for stream in streams)
    size, step = streams[0].config.vocab_size, max(1, PIECE // width)
    together = max(1, HELD // (width * length))
    groups = [chunks[i : i + together] for i in range(0, len(chunks), together)]
    ticks = _Ticks(len(groups) * (sum(stream.layers + 2 for stream in streams) + -(-size // step)), progress)
    for group in groups:
        hidden, squares = _run_layers(streams, pairs, group, ticks)
        scored = _Scored(group[:, length // 2 + 1 :], len(streams), pairs)
        halves = (x.reshape(*group.shape, -1)[:, length // 2 : -1] for x in hidden)
        hidden = [np.ascontiguousarray(x.reshape(scored.positions, -1)) for x in halves]
        for at, reads in zip(range(0, size, step), zip(*(s.head(step) for s in streams), strict=True), strict=True):
            scored.add(at, min(step, size - at), hidden, reads)
            ticks.tick()
        yield scored.result(streams, squares)


class _Ticks:
    """Counts steps for whoever watches."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self.total, self.progress = 0, total, progress
        self._tell()

    def tick(self) -> None:
        self.done += 1
        self._tell()

    def _tell(self) -> None:
        if self.progress is not None:
            self.progress(self.done, self.total)


def _run_layers(
    streams: Sequence[Stream[Any, Any]], pairs: Sequence[tuple[int, int]], group: Chunks, ticks: _Ticks
) -> tuple[list[Float32], list[Squares]]:
    """All streams through their layers, step by step so that they can be compared after every one: the last hidden
    states of each [n * T, hidden], and the sums of squares of each pair; none for streams of different shapes."""
    squares: list[Squares] = [{} for _ in pairs]
    if len({(stream.layers, stream.config.hidden_size) for stream in streams}) > 1:
        return [_last(stream, group, ticks) for stream in streams], squares
    for seen in zip(*(_ticking(stream, group, ticks) for stream in streams), strict=True):
        for of_pair, (expected, found) in zip(squares, pairs, strict=True):
            of_pair[seen[0][0]] = _squares(seen[expected][1], seen[found][1])
    return [x for _, x in seen], squares


def _ticking(stream: Stream[Any, Any], group: Chunks, ticks: _Ticks) -> Iterator[tuple[str, Float32]]:
    for step in stream.steps(group):
        ticks.tick()
        yield step


def _last(stream: Stream[Any, Any], group: Chunks, ticks: _Ticks) -> Float32:
    return [x for _, x in _ticking(stream, group, ticks)][-1]


def _squares(expected: Float32, found: Float32) -> tuple[float, float]:
    """The sums of the squares of found - expected and of expected, in float64."""
    error = size = 0.0
    for start in range(0, len(expected), 1024):
        wanted = expected[start : start + 1024].astype(np.float64)
        error += float(np.square(found[start : start + 1024] - wanted).sum())
        size += float(np.square(wanted).sum())
    return error, size


class _Scored:
    """What is known of the predictions of n positions when some of the vocabulary has been seen.

    With z a logit and m the largest one so far, `total` is sum e^(z - m), and of a pair `gap` is sum e^(p - m_p) (p -
    q) of their logits p and q; both are brought to a new m when there is one (Milakov and Gimelshein, "Online
    normalizer calculation for softmax", arXiv:1805.02867). In the end ln Z = m + ln total, and KL = gap / total_p -
    (ln Z_p - ln Z_q).
    """

    def __init__(self, targets: Array, streams: int, pairs: Sequence[tuple[int, int]]) -> None:
        self.targets, self.shape, self.pairs = targets.reshape(-1), targets.shape, pairs
        self.positions = self.targets.size
        self.largest = np.full((streams, self.positions), -np.inf)
        self.total, self.target = np.zeros_like(self.largest), np.zeros_like(self.largest)
        self.best = np.zeros(self.largest.shape, np.int64)
        self.gap = np.zeros((len(pairs), self.positions))
        self.squares = np.zeros((len(pairs), 2))

    def add(
        self, at: int, count: int, hidden: Sequence[Float32], reads: Sequence[Callable[[Float32], Float32]]
    ) -> None:
        """See `count` rows of the vocabulary from `at` on."""
        step, few = max(1, LOGITS // count), max(1, SCORED // count)
        for first in range(0, self.positions, step):
            logits = [read(x[first : first + step]) for read, x in zip(reads, hidden, strict=True)]
            for start in range(0, len(logits[0]), few):
                some = [x[start : start + few].astype(np.float64) for x in logits]
                with np.errstate(all="ignore"):  # what is not a number is told in the end
                    self._add(at, slice(first + start, first + start + len(some[0])), some)

    def _add(self, at: int, rows: slice, logits: Sequence[Array]) -> None:
        row, here = np.arange(len(logits[0])), self.targets[rows] - at
        hits = np.flatnonzero((here >= 0) & (here < logits[0].shape[1]))
        fades, powers = [], []
        for i, z in enumerate(logits):
            self.target[i, rows][hits] = z[hits, here[hits]]
            best = z.argmax(axis=-1)
            top, before = z[row, best], self.largest[i, rows]
            largest = np.maximum(before, top)
            self.best[i, rows] = np.where(top > before, at + best, self.best[i, rows])
            fades.append(np.exp(before - largest))
            powers.append(np.exp(z - largest[:, None]))
            self.total[i, rows] = self.total[i, rows] * fades[i] + powers[i].sum(axis=-1)
            self.largest[i, rows] = largest
        for k, (p, q) in enumerate(self.pairs):
            apart = logits[p] - logits[q]
            self.gap[k, rows] = self.gap[k, rows] * fades[p] + np.einsum("rv,rv->r", powers[p], apart)
            self.squares[k] += np.vdot(apart, apart), np.vdot(logits[p], logits[p])

    def result(self, streams: Sequence[Stream[Any, Any]], squares: list[Squares]) -> _Scores:
        """All of the vocabulary has been seen. Raises ModelError where a model's logits are not numbers."""
        with np.errstate(all="ignore"):
            ends = self.largest + np.log(self.total)
        for stream, end in zip(streams, ends, strict=True):
            if not np.isfinite(end).all():
                culprit = stream.checkpoint.find_non_finite()
                raise ModelError(
                    f"{stream.checkpoint.path}: the model produced NaN or infinite logits"
                    + (f", because {culprit} holds NaN or infinity" if culprit else ""),
                    hint="download the checkpoint, or quantize it, again",
                )
        kl = np.empty_like(self.gap)
        for k, (p, q) in enumerate(self.pairs):
            kl[k] = np.maximum(self.gap[k] / self.total[p] - (ends[p] - ends[q]), 0)  # rounding may leave -1e-16
            error, size = self.squares[k].tolist()
            squares[k]["logits"] = error, size
        shape = (-1, *self.shape)
        return _Scores((ends - self.target).reshape(shape), self.best.reshape(shape), kl.reshape(shape), squares)


class _Tally:
    """What was found of one pair, group by group."""

    def __init__(self, reference: int, model: int) -> None:
        self.reference, self.model = reference, model
        self.kl, self.same = list[Array](), list[Array]()
        self.losses, self.reference_losses = list[Array](), list[Array]()
        self.squares: Squares = {}

    def add(self, scores: _Scores, i: int) -> None:
        """Of the i-th pair."""
        self.kl.append(scores.kl[i])
        self.same.append(scores.best[self.reference] == scores.best[self.model])
        self.losses.append(scores.loss[self.model])
        self.reference_losses.append(scores.loss[self.reference])
        for name, (error, size) in scores.squares[i].items():
            before = self.squares.get(name, (0.0, 0.0))
            self.squares[name] = before[0] + error, before[1] + size

    def comparison(self) -> Comparison:
        drift = {name: _ratio(*squares) for name, squares in self.squares.items()}
        kl, same, loss, expected = map(np.concatenate, (self.kl, self.same, self.losses, self.reference_losses))
        return Comparison(kl, same, loss, expected, drift.pop("logits"), drift)


def _ratio(error: float, size: float) -> float:
    if error == 0:
        return 0.0
    return error / size if size else math.inf
