"""How far a model's predictions are from a reference's.

    (result,) = compare(reference.engine, [model.engine], cut(ids, 512))
    result.mean, result.top1, result.perplexity

Every chunk of token ids is run from an empty state, and the second half of its positions counts, as in llama.cpp's
perplexity tool. Logits are float32, sums over the vocabulary float64. Logits come a few rows at a time and are dropped
when they are scored: memory grows neither with a chunk nor with the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from edgeq.engine import Engine, Feed
from edgeq.errors import QualityError, UsageError
from edgeq.formats.bf16 import Array, Float32

__all__ = ["Divergence", "check", "compare", "cut"]

ROWS = 64  # positions whose logits are held at once: 64 MB for each model of the real vocabulary
SCORED = 8  # of them at once in float64


class Divergence(NamedTuple):
    """A model against the reference, over all positions that count.

    mean, p99, p999, max: KL(reference || model) of a position's prediction, in nats.
    top1: share of positions where both find the same token most likely.
    perplexity, reference_perplexity: of the text.
    nmse: normalised mean squared error of the logits.
    """

    positions: int
    mean: float
    p99: float
    p999: float
    max: float
    top1: float
    perplexity: float
    reference_perplexity: float
    nmse: float


def cut(ids: Sequence[int], context: int, most: int | None = None) -> list[Sequence[int]]:
    """The first `most` whole chunks of `context` tokens each. Raises UsageError where there is none."""
    if context < 4:
        raise UsageError(f"chunks must be of at least 4 tokens, got {context}", hint="512 is usual")
    chunks = [ids[i : i + context] for i in range(0, len(ids) - context + 1, context)][:most]
    if not chunks:
        raise UsageError(
            f"the text is {len(ids)} tokens long, expected at least one chunk of {context}",
            hint="use a longer text or smaller chunks",
        )
    return chunks


def compare(
    reference: Engine[Any, Any], models: Sequence[Engine[Any, Any]], chunks: Sequence[Sequence[int]],
    on_chunk: Callable[[int, int], None] | None = None,
) -> list[Divergence]:  # fmt: skip
    """Each of `models` against `reference` on the same chunks; the reference runs once for all of them.

    on_chunk(done, total) is called before the first chunk and after each.
    """
    for model in models:
        _check_vocabulary(reference, model)
    tallies = [_Tally() for _ in models]
    for done, ids in enumerate(chunks):
        if on_chunk:
            on_chunk(done, len(chunks))
        first, targets = len(ids) // 2, np.asarray(ids[len(ids) // 2 + 1 :])
        engines = [_logits(engine, ids[:-1], first) for engine in (reference, *models)]
        at = 0
        for expected, *found in zip(*engines, strict=True):
            for tally, logits in zip(tallies, found, strict=True):
                tally.add(expected, logits, targets[at : at + len(expected)])
            at += len(expected)
    if on_chunk:
        on_chunk(len(chunks), len(chunks))
    return [tally.result() for tally in tallies]


def check(name: str, result: Divergence, max_kl: float) -> None:
    """Raise QualityError unless the mean KL divergence is at most `max_kl` nats."""
    if not result.mean <= max_kl:
        raise QualityError(
            f"{name}: the mean KL divergence is {result.mean:.6f} nats, expected at most {max_kl:g}",
            hint="quantize with more bits or smaller groups",
        )


def _check_vocabulary(reference: Engine[Any, Any], model: Engine[Any, Any]) -> None:
    sizes = [engine.config.vocab_size for engine in (reference, model)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"{model.checkpoint.path} has a vocabulary of {sizes[1]}, expected the reference's {sizes[0]}",
            hint="compare models of one family",
        )


def _logits(engine: Engine[Any, Any], ids: Sequence[int], first: int) -> Iterator[Float32]:
    """The logits after each of ids[first:], a few rows at a time."""
    state = engine.state()
    tokens = engine.checked_ids(ids, state)
    for piece in engine.cut(0, first):
        state = engine.run([Feed(state, tokens[piece], rows=0)])[0].state
    for start in range(first, len(tokens), ROWS):
        piece_ids = tokens[start : start + ROWS]
        (output,) = engine.run([Feed(state, piece_ids, rows=len(piece_ids))])
        state = output.state
        yield output.logits


class _Tally:
    """What is kept of the positions so far: a few numbers for each."""

    def __init__(self) -> None:
        self._kl, self._same = list[Array](), list[Array]()
        self._losses, self._reference_losses = list[Array](), list[Array]()
        self._error = self._size = 0.0

    def add(self, expected: Float32, found: Float32, targets: Array) -> None:
        """Score the logits [n, vocabulary] of both for the n tokens that followed."""
        for start in range(0, len(expected), SCORED):
            rows = slice(start, start + SCORED)
            self._add(expected[rows].astype(np.float64), found[rows].astype(np.float64), targets[rows])

    def _add(self, expected: Array, found: Array, targets: Array) -> None:
        self._error += float(np.square(expected - found).sum())
        self._size += float(np.square(expected).sum())
        p, q, row = _log_softmax(expected), _log_softmax(found), np.arange(len(targets))
        self._kl.append((np.exp(p) * (p - q)).sum(axis=-1))
        self._same.append(p.argmax(axis=-1) == q.argmax(axis=-1))
        self._losses.append(-q[row, targets])
        self._reference_losses.append(-p[row, targets])

    def result(self) -> Divergence:
        kl = np.concatenate(self._kl)
        return Divergence(
            positions=len(kl),
            mean=float(kl.mean()),
            p99=float(np.quantile(kl, 0.99)),
            p999=float(np.quantile(kl, 0.999)),
            max=float(kl.max()),
            top1=float(np.concatenate(self._same).mean()),
            perplexity=_perplexity(self._losses),
            reference_perplexity=_perplexity(self._reference_losses),
            nmse=self._error / self._size if self._error else 0.0,
        )


def _perplexity(losses: list[Array]) -> float:
    return float(np.exp(np.concatenate(losses).mean()))


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    out: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return out
