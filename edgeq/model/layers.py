"""The three pieces of a decoder layer, in terms of the backend's operations.

T tokens of one or more sequences; `lengths` says where one sequence ends and the next begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from edgeq.config import TextConfig
from edgeq.state import DeltaState, KVCache
from edgeq.weights import AttentionWeights, DeltaNetWeights, MLPWeights

if TYPE_CHECKING:
    from edgeq.backends.ops import Angles, ArrayLike, Ops

    A = TypeVar("A", bound=ArrayLike)
else:
    A = TypeVar("A")

__all__ = ["delta_net", "gated_attention", "mlp", "spans"]

_L2_EPS = 1e-6  # of the query and key normalisation; fixed by the architecture, not by the configuration


def spans(lengths: Sequence[int]) -> Iterator[slice]:
    """The rows of each sequence."""
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length


def mlp(ops: Ops[A], x: A, w: MLPWeights[A]) -> A:
    """SwiGLU: down(silu(gate(x)) * up(x))."""
    gate, up = ops.linears(x, (w.gate_proj, w.up_proj))
    return ops.linear(ops.silu_mul(gate, up), w.down_proj)


def delta_net(
    ops: Ops[A], x: A, w: DeltaNetWeights[A], c: TextConfig, states: Sequence[DeltaState[A]],
    lengths: Sequence[int], keep: int = 0,
) -> tuple[A, list[tuple[DeltaState[A], ...]]]:  # fmt: skip
    """Gated DeltaNet: project, convolve, remember and recall by the delta rule, norm and gate, project back."""
    hk, hv, k_dim, v_dim = (
        c.linear_num_key_heads, c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim,
    )  # fmt: skip
    qkv, z, b, a = ops.linears(x, (w.in_proj_qkv, w.in_proj_z, w.in_proj_b, w.in_proj_a))
    g, beta = ops.delta_gates(a, b, w.decay, w.dt_bias)  # [T, Hv]
    outputs, after = [], []
    for rows, state in zip(spans(lengths), states, strict=True):
        mixed, tails = ops.causal_conv_silu(qkv[rows], w.conv, state.conv, keep)  # [T, C]
        q = ops.l2_norm(mixed[:, : c.key_dim].reshape(-1, hk, k_dim), _L2_EPS)
        k = ops.l2_norm(mixed[:, c.key_dim : 2 * c.key_dim].reshape(-1, hk, k_dim), _L2_EPS)
        v = mixed[:, 2 * c.key_dim :].reshape(-1, hv, v_dim)
        o, matrices = ops.delta_rule(q, k, v, g[rows], beta[rows], state.matrix, keep)  # [T, Hv, V]
        outputs.append(o)
        after.append(tuple(map(DeltaState, tails, matrices)))
    o = ops.gated_rms_norm(ops.concat(outputs), w.norm, z.reshape(-1, hv, v_dim), c.rms_norm_eps)
    return ops.linear(o.reshape(-1, c.value_dim), w.out_proj), after


def gated_attention(
    ops: Ops[A], x: A, w: AttentionWeights[A], c: TextConfig, angles: Angles[A], caches: Sequence[KVCache[A]],
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
