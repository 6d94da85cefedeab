"""The Qwen3.5 language model: a stack of Gated DeltaNet and gated attention layers over a shared vocabulary.

`forward` turns tokens into hidden states and moves the sequences' states on; `logits` reads hidden states out
through the head. Apart from the two there is only `initial_state`. See docs/model.md for the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeq.config import TextConfig
from edgeq.model.layers import spans
from edgeq.state import DeltaState, KVCache, LayerState, State
from edgeq.weights import AttentionWeights, LayerWeights, TextWeights

if TYPE_CHECKING:
    from edgeq.backends.ops import Angles, ArrayLike, Ops

    A = TypeVar("A", bound=ArrayLike)
else:
    A = TypeVar("A")

__all__ = ["Batch", "forward", "initial_state", "logits", "text_batch"]


class Batch(NamedTuple):
    """The tokens of one or more sequences, one after another.

    ids: int32 [T]; positions: int32 [3, T] (time, height, width: equal for text); lengths: tokens of each sequence.
    """

    ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    lengths: tuple[int, ...]


def text_batch(ids: Sequence[NDArray[np.int32]], states: Sequence[State[A]]) -> Batch:
    """A batch of plain text: every token one position after the last."""
    positions = [np.arange(s.next_position, s.next_position + len(i)) for i, s in zip(ids, states, strict=True)]
    one_axis = np.concatenate(positions).astype(np.int32)
    return Batch(np.concatenate(ids), np.stack([one_axis] * 3), tuple(map(len, ids)))


def initial_state(ops: Ops[A], c: TextConfig) -> State[A]:
    """The state of an empty sequence."""
    empty = np.zeros((0, c.num_key_value_heads, c.head_dim), np.float32)

    forgotten = DeltaState(  # states are values: one serves all layers
        conv=ops.zeros(c.linear_conv_kernel_dim - 1, c.conv_dim),
        matrix=ops.zeros(c.linear_num_value_heads, c.linear_value_head_dim, c.linear_key_head_dim),
    )
    layers = (ops.kv_cache(empty, empty) if kind == "full_attention" else forgotten for kind in c.layer_types)
    return State(tuple(layers), 0, 0)


def forward(
    ops: Ops[A], c: TextConfig, weights: TextWeights[A], batch: Batch, states: Sequence[State[A]], keep: int = 0
) -> tuple[A, list[tuple[State[A], ...]]]:
    """Run the tokens of `batch`, each sequence from its state.

    Returns the hidden states after the final norm [T, hidden] and, for each sequence, keep + 1 states: entry i is
    the state after all but the last keep - i of its tokens, so the last entry is the state after all of them.
    """
    angles = ops.rope_angles(ops.array(batch.positions), c.rope)
    x = ops.embed(weights.embed_tokens, ops.array(batch.ids))
    per_layer = []  # [layer][sequence][keep + 1]
    for i, w in enumerate(weights.layers):
        x, after = decoder_layer(ops, c, w, x, angles, [s.layers[i] for s in states], batch.lengths, keep)
        per_layer.append(after)
    hidden = ops.rms_norm(x, weights.norm, c.rms_norm_eps)
    after_all = [
        _sequence_states(state, batch.positions[:, rows], [layer[n] for layer in per_layer], keep)
        for n, (state, rows) in enumerate(zip(states, spans(batch.lengths), strict=True))
    ]
    ops.start(hidden, [state for kept in after_all for state in kept])
    return hidden, after_all


def decoder_layer(
    ops: Ops[A], c: TextConfig, w: LayerWeights[A], x: A, angles: Angles[A], states: Sequence[LayerState[A]],
    lengths: Sequence[int], keep: int = 0,
) -> tuple[A, list[tuple[LayerState[A], ...]]]:  # fmt: skip
    """x + mixer(norm(x)), then x + mlp(norm(x)): [T, hidden], and keep + 1 states for each sequence."""
    mixed, after = _mix(ops, c, w, ops.rms_norm(x, w.input_layernorm, c.rms_norm_eps), angles, states, lengths, keep)
    x = ops.add(x, mixed)
    del mixed  # a prompt's arrays are large
    return ops.add(x, ops.mlp(ops.rms_norm(x, w.post_attention_layernorm, c.rms_norm_eps), w.mlp)), after


def _mix(
    ops: Ops[A], c: TextConfig, w: LayerWeights[A], h: A, angles: Angles[A], states: Sequence[LayerState[A]],
    lengths: Sequence[int], keep: int,
) -> tuple[A, list[tuple[LayerState[A], ...]]]:  # fmt: skip
    """The layer's mixer: [T, hidden] -> [T, hidden], and keep + 1 states for each sequence."""
    after: list[tuple[LayerState[A], ...]]
    if isinstance(w.mixer, AttentionWeights):
        caches = [s for s in states if isinstance(s, KVCache)]
        mixed, longer = ops.gated_attention(h, w.mixer, c, angles, caches, lengths)
        after = [tuple(cache.truncated(cache.length - keep + i) for i in range(keep + 1)) for cache in longer]
    else:
        memories = [s for s in states if isinstance(s, DeltaState)]
        mixed, kept = ops.delta_net(h, w.mixer, c, memories, lengths, keep)
        after = list(kept)
    return mixed, after


def _sequence_states(
    before: State[A], positions: NDArray[np.int32], layers: Sequence[tuple[LayerState[A], ...]], keep: int
) -> tuple[State[A], ...]:
    """Regroup one sequence's kept layer states [layer][keep + 1] into keep + 1 whole states.

    Text after an image goes on one past the largest position the image used on any axis.
    """
    states = []
    for i, n in enumerate(range(positions.shape[1] - keep, positions.shape[1] + 1)):
        next_position = max(before.next_position, int(positions[:, :n].max(initial=-1)) + 1)
        states.append(State(tuple(layer[i] for layer in layers), before.length + n, next_position))
    return tuple(states)


def logits(ops: Ops[A], weights: TextWeights[A], hidden: A) -> A:
    """Read hidden states [T, hidden] out through the head: float32 [T, vocabulary rows]."""
    return ops.linear(hidden, weights.lm_head)
