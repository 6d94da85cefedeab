"""A decoder layer and its three pieces, in terms of the backend's operations.

T tokens of one or more sequences; `lengths` says where one sequence ends and the next begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.ops import Angles, ArrayLike, Ops
from edgeq.config import TextConfig
from edgeq.state import DeltaState, KVCache, LayerState
from edgeq.weights import AttentionWeights, DeltaNetWeights, LayerWeights, MLPWeights, TextWeights

A = TypeVar("A", bound=ArrayLike)
M = TypeVar("M")

__all__ = ["decoder", "decoder_layer", "decoder_layers", "delta_net", "gated_attention", "mlp", "spans"]

_L2_EPS = 1e-6  # of the query and key normalisation; fixed by the architecture, not by the configuration


def spans(lengths: Sequence[int]) -> Iterator[slice]:
    """The rows of each sequence."""
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length


def decoder(
    ops: Ops[A, M], x: A, w: TextWeights[A, M], c: TextConfig, positions: NDArray[np.int32],
    states: Sequence[Sequence[LayerState[A]]], lengths: Sequence[int], keep: Sequence[int],
) -> tuple[A, list[list[tuple[LayerState[A], ...]]]]:  # fmt: skip
    """All layers and the final norm: [T, hidden], and for each layer and sequence its keep + 1 states."""
    angles = ops.rope_angles(ops.array(positions), c.rope)
    x, after = ops.decoder_layers(x, w.layers, c, angles, states, lengths, keep)
    return ops.rms_norm(x, w.norm, c.rms_norm_eps), after


def decoder_layers(
    ops: Ops[A, M], x: A, ws: Sequence[LayerWeights[A, M]], c: TextConfig, angles: Angles[A],
    states: Sequence[Sequence[LayerState[A]]], lengths: Sequence[int], keep: Sequence[int],
) -> tuple[A, list[list[tuple[LayerState[A], ...]]]]:  # fmt: skip
    """Layer after layer: [T, hidden], and for each layer and sequence its keep + 1 states."""
    after = []
    for w, before in zip(ws, states, strict=True):
        x, kept = decoder_layer(ops, x, w, c, angles, before, lengths, keep)
        after.append(kept)
    return x, after


def decoder_layer(
    ops: Ops[A, M], x: A, w: LayerWeights[A, M], c: TextConfig, angles: Angles[A], states: Sequence[LayerState[A]],
    lengths: Sequence[int], keep: Sequence[int],
) -> tuple[A, list[tuple[LayerState[A], ...]]]:  # fmt: skip
    """x + mixer(norm(x)), then x + mlp(norm(x)): [T, hidden], and keep + 1 states for each sequence."""
    mixed, after = _mix(ops, ops.rms_norm(x, w.input_layernorm, c.rms_norm_eps), w, c, angles, states, lengths, keep)
    x = ops.add(x, mixed)
    del mixed  # a prompt's arrays are large
    return ops.add(x, ops.mlp(ops.rms_norm(x, w.post_attention_layernorm, c.rms_norm_eps), w.mlp)), after


def _mix(
    ops: Ops[A, M], h: A, w: LayerWeights[A, M], c: TextConfig, angles: Angles[A], states: Sequence[LayerState[A]],
    lengths: Sequence[int], keep: Sequence[int],
) -> tuple[A, list[tuple[LayerState[A], ...]]]:  # fmt: skip
    """The layer's mixer: [T, hidden] -> [T, hidden], and keep + 1 states for each sequence."""
    if isinstance(w.mixer, AttentionWeights):
        caches = [s for s in states if isinstance(s, KVCache)]
        mixed, longer = ops.gated_attention(h, w.mixer, c, angles, caches, lengths)
        return mixed, [kept_caches(cache, n) for cache, n in zip(longer, keep, strict=True)]
    memories = [s for s in states if isinstance(s, DeltaState)]
    mixed, kept = ops.delta_net(h, w.mixer, c, memories, lengths, keep)
    return mixed, list(kept)


def kept_caches(cache: KVCache[A], keep: int) -> tuple[KVCache[A], ...]:
    """The cache after all but the last keep, ..., 0 of its tokens."""
    return (*[cache.truncated(cache.length - keep + i) for i in range(keep)], cache)


def mlp(ops: Ops[A, M], x: A, w: MLPWeights[M]) -> A:
    """SwiGLU: down(silu(gate(x)) * up(x))."""
    gate, up = ops.linears(x, (w.gate_proj, w.up_proj))
    return ops.linear(ops.silu_mul(gate, up), w.down_proj)


def delta_net(
    ops: Ops[A, M], x: A, w: DeltaNetWeights[A, M], c: TextConfig, states: Sequence[DeltaState[A]],
    lengths: Sequence[int], keep: Sequence[int],
) -> tuple[A, list[tuple[DeltaState[A], ...]]]:  # fmt: skip
    """Gated DeltaNet: project, convolve, remember and recall by the delta rule, norm and gate, project back."""
    hk, hv, k_dim, v_dim = (
        c.linear_num_key_heads, c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim,
    )  # fmt: skip
    qkv, z, b, a = ops.linears(x, (w.in_proj_qkv, w.in_proj_z, w.in_proj_b, w.in_proj_a))
    g, beta = ops.delta_gates(a, b, w.decay, w.dt_bias)  # [T, Hv]
    outputs, after = [], []
    for rows, state, n in zip(spans(lengths), states, keep, strict=True):
        mixed, tails = ops.causal_conv_silu(qkv[rows], w.conv, state.conv, n)  # [T, C]
        q = ops.l2_norm(mixed[:, : c.key_dim].reshape(-1, hk, k_dim), _L2_EPS)
        k = ops.l2_norm(mixed[:, c.key_dim : 2 * c.key_dim].reshape(-1, hk, k_dim), _L2_EPS)
        v = mixed[:, 2 * c.key_dim :].reshape(-1, hv, v_dim)
        o, matrices = ops.delta_rule(q, k, v, g[rows], beta[rows], state.matrix, n)  # [T, Hv, V]
        outputs.append(o)
        after.append(tuple(map(DeltaState, tails, matrices)))
    o = ops.gated_rms_norm(ops.concat(outputs), w.norm, z.reshape(-1, hv, v_dim), c.rms_norm_eps)
    return ops.linear(o.reshape(-1, c.value_dim), w.out_proj), after


def gated_attention(
    ops: Ops[A, M], x: A, w: AttentionWeights[A, M], c: TextConfig, angles: Angles[A], caches: Sequence[KVCache[A]],
    lengths: Sequence[int],
) -> tuple[A, list[KVCache[A]]]:  # fmt: skip
    """Attention with normalised, partially rotated queries and keys, and a sigmoid gate on its output."""
    q_gate, k, v = ops.linears(x, (w.q_proj, w.k_proj, w.v_proj))
    q_gate = q_gate.reshape(-1, c.num_attention_heads, 2 * c.head_dim)  # per head: query, then gate
    q, gate = q_gate[:, :, : c.head_dim], q_gate[:, :, c.head_dim :]
    k = k.reshape(-1, c.num_key_value_heads, c.head_dim)
    v = v.reshape(-1, c.num_key_value_heads, c.head_dim)
    q = ops.rope(ops.rms_norm(q, w.q_norm, c.rms_norm_eps), angles)
    k = ops.rope(ops.rms_norm(k, w.k_norm, c.rms_norm_eps), angles)
    outputs, after = [], []
    for rows, cache in zip(spans(lengths), caches, strict=True):
        o, longer = ops.attention(q[rows], k[rows], v[rows], cache)  # [T, Hq, D]
        outputs.append(o)
        after.append(longer)
    o = ops.sigmoid_mul(ops.concat(outputs), gate)
    return ops.linear(o.reshape(-1, c.attention_dim), w.o_proj), after
