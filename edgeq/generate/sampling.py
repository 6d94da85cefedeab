"""Choosing the next token from the logits.

The order is that of Hugging Face transformers, for which the model cards' numbers are meant:

    bias -> repetition, presence and frequency penalties -> mask -> temperature -> top-k -> top-p -> min-p -> draw

Each step sees what the one before left over: top-p counts probabilities that are renormalised over the top-k tokens
and already shaped by the temperature. (llama.cpp applies the temperature last; with the same numbers it keeps other
tokens.) At temperature 0 the penalties still hold, and the largest score wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import ModelError, UsageError
from edgeq.generate.logprobs import Logprobs, logprobs
from edgeq.generate.settings import GenerationSettings

__all__ = ["Sampler"]

# Columns that the vocabulary is laid out in when its k largest entries are looked for: NumPy finds the largest of each
# column four times as fast as that of each row.
_COLUMNS = 1024


class Sampler:
    """Draws tokens; remembers the tokens of the reply for the penalties.

    `vocab_size` is the number of tokens that exist: the logits may have more rows, which are padding and never
    drawn. `drawn`: how often it has been drawn with the seed before; counts on.
    """

    def __init__(self, settings: GenerationSettings, *, vocab_size: int, drawn: int = 0) -> None:
        self.settings = settings
        self._vocab_size = vocab_size
        self._random = np.random.Generator(np.random.PCG64(settings.seed).advance(drawn))  # a number each
        self.drawn = drawn
        bias = settings.logit_bias or {}
        if wrong := [i for i in bias if i >= vocab_size]:
            raise UsageError(
                f"logit_bias names token {wrong[0]}, but the model has {vocab_size} tokens",
                hint="use token ids of this model's tokenizer",
            )
        self._biased = np.fromiter(bias, dtype=np.int64, count=len(bias))
        self._bias = np.fromiter(bias.values(), dtype=np.float32, count=len(bias))
        self._counts = np.zeros(vocab_size, dtype=np.int32)  # of each token in this reply
        self._penalty = np.zeros(vocab_size, dtype=np.float32)  # presence + frequency * count, where count > 0
        self._seen = np.zeros(vocab_size, dtype=np.bool_)  # in the prompt or the reply
        self._scores = np.full((-(-vocab_size // _COLUMNS), _COLUMNS), -np.inf, dtype=np.float32)
        self._flat = self._scores.reshape(-1)[:vocab_size]

    def observe_prompt(self, ids: Sequence[int]) -> None:
        """Begin a new reply to `ids`, which from now on count as seen (repetition penalty only).

        The presence and frequency penalties forget the reply before; it stays seen. The random stream goes on.
        """
        self._counts[:] = 0
        self._penalty[:] = 0
        known = np.asarray(ids, dtype=np.int64)
        self._seen[known[(known >= 0) & (known < self._vocab_size)]] = True

    def accept(self, token: int) -> None:
        """Count `token` as generated. `sample` does not, as its choice may yet be rejected."""
        self._counts[token] += 1
        self._penalty[token] = self.settings.presence_penalty + self.settings.frequency_penalty * self._counts[token]
        self._seen[token] = True

    def sample(self, logits: NDArray[np.float32], allowed: NDArray[np.bool_] | None = None) -> int:
        """The next token, given float32 logits [rows], rows >= vocab_size; one of `allowed`, a mask [vocab_size].

        Raises ModelError if there are fewer rows than tokens, or a logit is not finite.
        """
        scores = self._penalized(logits, allowed)
        if self.settings.temperature == 0:
            return int(np.argmax(scores))
        ids, probabilities = self._distribution(self._in_columns(scores))
        cumulative = np.cumsum(probabilities)
        at = self._random.random() * cumulative[-1]
        self.drawn += 1
        return int(ids[np.searchsorted(cumulative, at, side="right")])

    def logprobs(self, logits: NDArray[np.float32], token: int, most: int) -> Logprobs:
        """Log probabilities of `token` and the `most` most likely ones, before anything here has shaped them."""
        return logprobs(logits[: self._vocab_size], token, most)

    def distribution(
        self, logits: NDArray[np.float32], allowed: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """What `sample` draws from: the ids that can be drawn, ascending, and their probabilities (sum 1)."""
        scores = self._penalized(logits, allowed)
        if self.settings.temperature == 0:
            return np.array([np.argmax(scores)], dtype=np.int64), np.ones(1)
        return self._distribution(self._in_columns(scores))

    def _penalized(self, logits: NDArray[np.float32], allowed: NDArray[np.bool_] | None) -> NDArray[np.float32]:
        """Scores of the tokens [V]: logits with bias and penalties, -inf for what cannot be drawn.

        The logits themselves where nothing changes them, else a buffer that the next call overwrites.
        """
        if logits.ndim != 1 or len(logits) < self._vocab_size:
            raise ModelError(f"the model gives logits of shape {logits.shape} for a vocabulary of {self._vocab_size}")
        settings = self.settings
        scores = self._repetition_penalized(self._with_bias(logits[: self._vocab_size]))
        if settings.presence_penalty or settings.frequency_penalty:
            with np.errstate(over="ignore"):
                scores = np.subtract(scores, self._penalty, out=self._flat)
        if not (isfinite(scores.max()) and isfinite(scores.min())):  # the fastest two passes; NaN is both
            _require_finite(scores)
        if allowed is not None:
            scores = np.where(allowed, scores, np.float32(-np.inf))
        return scores

    def _in_columns(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores [V] as [rows, _COLUMNS], flat index = token id, -inf behind the last."""
        if scores is not self._flat:
            self._flat[:] = scores
        return self._scores

    def _with_bias(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if not len(self._biased):
            return logits
        self._flat[:] = logits
        self._flat[self._biased] += self._bias
        return self._flat

    def _repetition_penalized(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [V] with those of seen tokens moved away from "likely" by the repetition penalty (CTRL, 4.1)."""
        penalty = np.float32(self.settings.repetition_penalty)
        if penalty == 1:
            return logits
        seen = np.flatnonzero(self._seen)
        scores = logits.astype(np.float32, copy=True)
        scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
        return scores

    def _distribution(self, scores: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Temperature, top-k, top-p and min-p over scores [rows, _COLUMNS]: ids, ascending, and probabilities.

        Top-k comes first here, as it is the same before and after the temperature, and leaves little to compute.
        """
        settings = self.settings
        ids = _largest(scores, settings.top_k)
        probabilities = _softmax(scores.reshape(-1)[ids], settings.temperature)
        keep = _nucleus(probabilities, settings.top_p)
        keep &= probabilities >= settings.min_p * probabilities.max()
        keep &= probabilities > 0
        return ids[keep], probabilities[keep] / probabilities[keep].sum()


def _largest(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Flat indices, ascending, of the k largest entries of scores [rows, columns], and of all that tie with the last.

    k = 0 means all but -inf. The k-th largest of the columns' maxima is no larger than the k-th largest entry, so only
    the columns that reach it have any: one pass over the vocabulary, where np.partition takes ten times as long.
    """
    flat = scores.reshape(-1)
    if not 0 < k < flat.size:
        return np.flatnonzero(flat > -np.inf)
    tops = scores.max(axis=0)
    floor = _kth_largest(tops, k) if k <= len(tops) else np.float32(-np.inf)
    if floor == -np.inf:  # few are allowed
        candidates = np.flatnonzero(flat > -np.inf)
    else:
        columns = np.flatnonzero(tops >= floor)
        row, column = np.nonzero(scores[:, columns] >= floor)
        candidates = row * scores.shape[1] + columns[column]
    if len(candidates) <= k:
        return candidates
    return candidates[flat[candidates] >= _kth_largest(flat[candidates], k)]


def _kth_largest(values: NDArray[np.float32], k: int) -> np.float32:
    """The k-th largest of values [n], k from 1 to n."""
    return np.float32(np.partition(values, -k)[-k])


def _softmax(scores: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    """softmax(scores / temperature) of scores [n], in float64 so that a long tail sums up right."""
    with np.errstate(over="ignore"):  # a tiny temperature: -inf, whose exponential is right
        powers: NDArray[np.float64] = np.exp((scores.astype(np.float64) - scores.max()) / temperature)
    return powers / np.sum(powers, dtype=np.float64)


def _nucleus(probabilities: NDArray[np.float64], top_p: float) -> NDArray[np.bool_]:
    """Mask [n] of the fewest most likely entries whose probabilities reach `top_p` (Holtzman et al., 2020).

    Of equals the lower index goes first. Entries below (1 - top_p) / n sum to less than 1 - top_p, so none of them
    is needed: only the others are sorted.
    """
    if top_p == 1:
        return np.ones(len(probabilities), dtype=np.bool_)
    likely = np.flatnonzero(probabilities >= (1 - top_p) / len(probabilities))
    order = likely[np.argsort(-probabilities[likely], kind="stable")]
    more_likely = np.cumsum(probabilities[order]) - probabilities[order]
    keep = np.zeros(len(probabilities), dtype=np.bool_)
    keep[order[more_likely < top_p]] = True
    return keep


def _require_finite(scores: NDArray[np.float32]) -> None:
    """ModelError that names the first entry of scores [n] that is not finite, if there is one."""
    wrong = np.flatnonzero(~np.isfinite(scores))
    if len(wrong):
        raise ModelError(
            f"the model's logits are not finite (token {wrong[0]} has {scores[wrong[0]]})",
            hint="check the files with `edgeq info MODEL --verify`, or download the model again",
        )
