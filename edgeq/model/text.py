"""The Qwen3.5 language model: a stack of Gated DeltaNet and gated attention layers over a shared vocabulary.

Three steps: `embed` turns token ids into vectors, `run_layers` takes vectors (a token's, or an image's) through the
layers and moves the sequences' states on, `logits` reads the result out through the head. `forward` is the first two
for text. See docs/concepts/model.md for the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.ops import ArrayLike, Ops
from edgeq.config import TextConfig
from edgeq.model.layers import spans
from edgeq.state import DeltaState, LayerState, State
from edgeq.weights import TextWeights

A = TypeVar("A", bound=ArrayLike)
M = TypeVar("M")

__all__ = ["Batch", "embed", "forward", "initial_state", "logits", "next_positions", "run_layers", "text_batch"]


class Batch(NamedTuple):
    """The tokens of one or more sequences, one after another.

    ids: int32 [T]; positions: int32 [3, T] (time, height, width: equal for text); lengths: tokens of each sequence.
    """

    ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    lengths: tuple[int, ...]


def text_batch(ids: Sequence[NDArray[np.int32]], states: Sequence[State[A]]) -> Batch:
    """A batch of plain text: every token one position after the last."""
    positions = [next_positions(state, len(i)) for i, state in zip(ids, states, strict=True)]
    return Batch(np.concatenate(ids), np.concatenate(positions, axis=1), tuple(map(len, ids)))


def next_positions(state: State[A], tokens: int) -> NDArray[np.int32]:
    """Where `tokens` tokens of text stand after `state`: int32 [3, tokens]."""
    positions = np.empty((3, tokens), np.int32)
    positions[:] = np.arange(state.next_position, state.next_position + tokens)
    return positions


def initial_state(ops: Ops[A, M], c: TextConfig) -> State[A]:
    """The state of an empty sequence."""
    empty = np.zeros((0, c.num_key_value_heads, c.head_dim), np.float32)

    forgotten = DeltaState(  # states are values: one serves all layers
        conv=ops.zeros(c.linear_conv_kernel_dim - 1, c.conv_dim),
        matrix=ops.zeros(c.linear_num_value_heads, c.linear_value_head_dim, c.linear_key_head_dim),
    )
    layers = (ops.kv_cache(empty, empty) if kind == "full_attention" else forgotten for kind in c.layer_types)
    return State(tuple(layers), 0, 0)


def forward(
    ops: Ops[A, M], c: TextConfig, weights: TextWeights[A, M], batch: Batch, states: Sequence[State[A]],
    keep: int | Sequence[int] = 0,
) -> tuple[A, list[tuple[State[A], ...]]]:  # fmt: skip
    """Run the tokens of `batch`, each sequence from its state: see `run_layers`."""
    keep = [keep] * len(states) if isinstance(keep, int) else keep
    x = embed(ops, weights, batch.ids)
    return run_layers(ops, c, weights, x, batch.positions, batch.lengths, states, keep)


def embed(ops: Ops[A, M], weights: TextWeights[A, M], ids: NDArray[np.int32]) -> A:
    """The vectors of `ids` int32 [T]: [T, hidden]."""
    return ops.embed(weights.embed_tokens, ops.array(ids))


def run_layers(
    ops: Ops[A, M], c: TextConfig, weights: TextWeights[A, M], x: A, positions: NDArray[np.int32],
    lengths: Sequence[int], states: Sequence[State[A]], keep: Sequence[int],
) -> tuple[A, list[tuple[State[A], ...]]]:  # fmt: skip
    """Take x [T, hidden], which stands at `positions` int32 [3, T], through all layers, each sequence from its state.

    Returns the hidden states after the final norm [T, hidden] and, for sequence i, keep[i] + 1 states: entry n is the
    state after all but the last keep[i] - n of its tokens, so the last entry is the state after all of them.
    """
    before = list(zip(*(state.layers for state in states), strict=True))  # [layer][sequence]
    hidden, after = ops.decoder(x, weights, c, positions, before, lengths, keep)
    after_all = [
        _kept_states(state, positions[:, rows], list(kept))
        for state, rows, kept in zip(states, spans(lengths), zip(*after, strict=True), strict=True)
    ]
    ops.start(hidden, [state for kept in after_all for state in kept])
    return hidden, after_all


def _kept_states(
    before: State[A], positions: NDArray[np.int32], layers: Sequence[tuple[LayerState[A], ...]]
) -> tuple[State[A], ...]:
    """Regroup one sequence's kept layer states [layer][keep + 1] into keep + 1 whole states.

    Text after an image goes on one past the largest position the image used on any axis.
    """
    tokens, kept = positions.shape[1], len(layers[0])
    _, length, next_position, origin, draft = before
    furthest = list(map(max, *positions.tolist()))  # of each token on any axis; for one, NumPy would take longer
    states = []
    for whole, n in zip(zip(*layers, strict=True), range(tokens + 1 - kept, tokens + 1), strict=True):
        stands = max(next_position, 1 + max(furthest[:n], default=-1))
        states.append(State(whole, length + n, stands, origin, draft))
    return tuple(states)


def logits(ops: Ops[A, M], weights: TextWeights[A, M], hidden: A) -> A:
    """Read hidden states [T, hidden] out through the head: float32 [T, vocabulary rows]."""
    return ops.linear(hidden, weights.lm_head)
