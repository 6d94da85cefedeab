"""Log probabilities of what the model says: of its own distribution, which nobody has shaped yet."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Logprobs", "logprobs"]


class Logprobs(NamedTuple):
    """Natural logarithms of probabilities: of the token that was said, and the most likely ones, `(id, logprob)`, the
    most likely first, of equals the lower id.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


def logprobs(logits: NDArray[np.float32], token: int, most: int) -> Logprobs:
    """Log softmax of logits float32 [tokens] at `token` and at the `most` most likely tokens, in float64."""
    scores = logits.astype(np.float64)
    scores -= scores.max()
    scores -= np.log(np.exp(scores).sum())
    likely = np.argpartition(-scores, most)[:most] if 0 < most < len(scores) else np.arange(min(most, len(scores)))
    if len(likely):  # whoever ties with the last of them may have the lower id
        likely = np.flatnonzero(scores >= scores[likely].min())
    order = likely[np.argsort(-scores[likely], kind="stable")][:most]
    return Logprobs(float(scores[token]), tuple((int(i), float(scores[i])) for i in order))
