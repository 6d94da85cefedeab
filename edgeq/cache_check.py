"""Whether a model bears a KV cache of 4 bits: asked when it is loaded with one, answered in a fraction of a second.

4 bits after a rotation cost little where keys and values are spread over a head's channels, which the rotation sees to,
and attention does not hang on small differences, which no rotation helps (docs/concepts/backends.md has the figures of
models that bear it). So a short text is run twice, with this cache and with 16 bits, and the predictions are compared.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.backends import select
from edgeq.backends.ops import Ops
from edgeq.engine import Engine
from edgeq.formats.bf16 import Array
from edgeq.model import text
from edgeq.text.tokenizer import Tokenizer

__all__ = ["LIMIT", "cache_error", "check_cache"]

TOKENS = 48
LIMIT = 0.02
"""Nats. Trained models: 1e-3 (the demo), 2e-3 (the test bed and its twin with outliers); ten times that is a model that
4 bits are not for. Random weights of the real 0.8B: 0.5."""

_SAMPLE = (
    "The ferry left at seven, an hour late, because the captain would not start before the fog had lifted. On deck "
    "stood eleven people and a goat. `if fog > 3: wait(60)` said a note beside the wheel; nobody knew who had written "
    "it, but everybody agreed that 3 was too careful a number for this harbour."
)


def check_cache(engine: Engine[Any, Any], tokenizer: Tokenizer | None) -> None:
    """Warn, in one line, if a cache of 4 bits changes what the model predicts by more than LIMIT."""
    error = cache_error(engine, _sample(engine, tokenizer))
    if not error <= LIMIT:
        warnings.warn(
            f"{engine.checkpoint.path}: keys and values in 4 bits change its predictions by {error:.2g} nats, more "
            f"than the {LIMIT:g} of models that bear it; use --kv-bits 8 (kv_bits=8 in Python)",
            stacklevel=3,
        )


def cache_error(engine: Engine[Any, Any], ids: NDArray[np.int32]) -> float:
    """The mean KL divergence in nats, over the second half of `ids` int32 [T], of the engine's predictions from those
    with keys and values in float16."""
    both = (select(engine.ops.name, kv_dtype="f16"), engine.ops)
    expected, found = (_log_probabilities(ops, engine, ids) for ops in both)
    return float((np.exp(expected) * (expected - found)).sum(axis=-1).mean())


def _sample(engine: Engine[Any, Any], tokenizer: Tokenizer | None) -> NDArray[np.int32]:
    if tokenizer is not None:
        return np.array(tokenizer.encode(_SAMPLE)[:TOKENS], np.int32)
    size = min(TOKENS, engine.context_limit)
    return np.random.default_rng(0).integers(0, engine.config.vocab_size, size).astype(np.int32)


def _log_probabilities(ops: Ops[Any, Any], engine: Engine[Any, Any], ids: NDArray[np.int32]) -> Array:
    c, weights = engine.config, engine.weights.text
    state = text.initial_state(ops, c)
    with np.errstate(all="ignore"):  # a damaged model says so when it is used
        hidden, _ = text.forward(ops, c, weights, text.text_batch([ids], [state]), [state])
        logits, _ = ops.read_out(hidden[len(ids) // 2 :], weights.lm_head)
        shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
