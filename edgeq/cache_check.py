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
from edgeq.formats.bf16 import Array, Float32
from edgeq.model import text
from edgeq.text.tokenizer import Tokenizer

__all__ = ["LIMIT", "cache_error", "check_cache"]

TOKENS = 48
ROWS = 4  # positions that are scored at a time
LIMIT = 0.02
"""Nats. Trained models: 1e-3 (the demo), 2e-3 (the test bed and its twin with outliers); ten times that is a model that
4 bits are not for. Random weights of the real 0.8B: 0.5."""

_SAMPLE = (
    "The ferry left at seven, an hour late, because the captain would not start before the fog had lifted. On deck "
    "stood eleven people and a goat. `if fog > 3: wait(60)` said a note beside the wheel; nobody knew who had written "
    "it, but everybody agreed that 3 was too careful a number for this harbour."
)


def check_cache(engine: Engine[Any, Any], tokenizer: Tokenizer | None) -> None:
    """Warn, in one line, if a cache of 4 bits changes what the model predicts by more than LIMIT. Nothing is checked
    where there is no room for it under the ceiling."""
    if not engine.budget.fits(_nbytes(engine)):
        return
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
    plain = select(engine.ops.name, kv_dtype="f16")
    expected, found = (_hidden(ops, engine, ids) for ops in (plain, engine.ops))
    errors = list[Array]()
    for start in range(len(ids) // 2, len(ids), ROWS):
        rows = slice(start, start + ROWS)
        read = (_logits(ops, engine, hidden[rows]) for ops, hidden in ((plain, expected), (engine.ops, found)))
        for one, other in zip(*read, strict=True):
            p, q = _log_softmax(one), _log_softmax(other)
            errors.append((np.exp(p) * (p - q)).sum())
    return float(np.mean(errors))


def _nbytes(engine: Engine[Any, Any]) -> int:
    """About what it takes: states before and after, twice, the work of the text, logits of a few rows and one in
    float64."""
    c, ops = engine.config, engine.ops
    return 4 * ops.state_nbytes(c) + ops.scratch_nbytes(c, TOKENS) + (2 * 4 * ROWS + 5 * 8) * c.vocab_size


def _sample(engine: Engine[Any, Any], tokenizer: Tokenizer | None) -> NDArray[np.int32]:
    if tokenizer is not None:
        return np.array(tokenizer.encode(_SAMPLE)[:TOKENS], np.int32)
    size = min(TOKENS, engine.context_limit)
    return np.random.default_rng(0).integers(0, engine.config.vocab_size, size).astype(np.int32)


def _hidden(ops: Ops[Any, Any], engine: Engine[Any, Any], ids: NDArray[np.int32]) -> Any:
    """Behind the final norm, [T, hidden]."""
    state = text.initial_state(ops, engine.config)
    with np.errstate(all="ignore"):  # a damaged model says so when it is used
        batch = text.text_batch([ids], [state])
        hidden, _ = text.forward(ops, engine.config, engine.weights.text, batch, [state])
        return hidden


def _logits(ops: Ops[Any, Any], engine: Engine[Any, Any], hidden: Any) -> Float32:
    with np.errstate(all="ignore"):
        return ops.read_out(hidden, engine.weights.text.lm_head)[0]


def _log_softmax(logits: Float32) -> Array:
    with np.errstate(all="ignore"):
        shifted = logits.astype(np.float64) - logits.max()
        return np.asarray(shifted - np.log(np.exp(shifted).sum()))
