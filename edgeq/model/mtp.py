"""The multi-token-prediction head: from a token's hidden state and the token that follows, the one after that.

For the token at place p with the hidden state h_p (after the final norm) and e_{p+1}, the vector of the token that
follows:

    x_p = fc([norm_e(e_{p+1}); norm_h(h_p)])          one gated attention layer          norm -> h'_p

The language model's own head reads h'_p out: it says what comes at p + 2. Drafting goes on by feeding h'_p back in the
place of h_{p+1}, with the vector of the token just drafted (after DeepSeek-V3, arXiv:2412.19437, section 2.2).
"""

from __future__ import annotations

from typing import TypeVar

from edgeq.backends.ops import ArrayLike, Ops
from edgeq.config import TextConfig
from edgeq.state import KVCache, Rows
from edgeq.weights import AttentionWeights, MTPWeights

A = TypeVar("A", bound=ArrayLike)
M = TypeVar("M")

__all__ = ["predict", "remember"]


def predict(
    ops: Ops[A, M], c: TextConfig, w: MTPWeights[A, M], rows: Rows[A], cache: KVCache[A]
) -> tuple[A, KVCache[A]]:
    """h' of T tokens in a row: [T, hidden], and the longer cache.

    rows: the tokens' hidden states and positions, and the vectors of the tokens that *follow* them.
    """
    T = rows.positions.shape[1]
    angles = ops.rope_angles(ops.array(rows.positions), c.rope)
    x, [[kept]] = ops.decoder_layers(_merged(ops, c, w, rows), (w.layer,), c, angles, [[cache]], [T], [0])
    (longer,) = kept
    assert isinstance(longer, KVCache)
    return ops.rms_norm(x, w.norm, c.rms_norm_eps), longer


def remember(ops: Ops[A, M], c: TextConfig, w: MTPWeights[A, M], rows: Rows[A], cache: KVCache[A]) -> KVCache[A]:
    """The cache of `predict` alone, for tokens of which nobody wants to know what comes after them."""
    mixer = w.layer.mixer
    assert isinstance(mixer, AttentionWeights)
    x = ops.rms_norm(_merged(ops, c, w, rows), w.layer.input_layernorm, c.rms_norm_eps)
    k, v = (y.reshape(-1, c.num_key_value_heads, c.head_dim) for y in ops.linears(x, (mixer.k_proj, mixer.v_proj)))
    angles = ops.rope_angles(ops.array(rows.positions), c.rope)
    return ops.append(ops.rope(ops.rms_norm(k, mixer.k_norm, c.rms_norm_eps), angles), v, cache)


def _merged(ops: Ops[A, M], c: TextConfig, w: MTPWeights[A, M], rows: Rows[A]) -> A:
    following = ops.rms_norm(rows.vectors, w.pre_fc_norm_embedding, c.rms_norm_eps)
    hidden = ops.rms_norm(rows.hidden, w.pre_fc_norm_hidden, c.rms_norm_eps)
    return ops.linear(ops.concat([following, hidden], axis=1), w.fc)
