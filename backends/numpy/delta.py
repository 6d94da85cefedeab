"""The gated delta rule, twice: token by token, and in chunks by matrix products.

Both follow Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule" (arXiv:2412.06464). Per value head,
with the state S [V, K], unit-length q, k [K], v [V], log decay g <= 0 and write strength beta:

    S <- exp(g) S;   d = beta (v - S k);   S <- S + d k^T;   o = K^-0.5 S q

The heads run side by side, so below every array has a leading axis H (value heads).
"""

from __future__ import annotations

import numpy as np

from edgeq.formats.bf16 import Float32

__all__ = ["delta_chunk", "delta_step"]


def delta_step(
    q: Float32, k: Float32, v: Float32, g: Float32, beta: Float32, state: Float32
) -> tuple[Float32, Float32]:
    """One token: q, k [H, K], v [H, V], g, beta [H], state [H, V, K] -> o [H, V] and the new state."""
    decayed = state * np.exp(g)[:, None, None]
    recalled = np.einsum("hvk,hk->hv", decayed, k)
    d = beta[:, None] * (v - recalled)
    new = decayed + d[:, :, None] * k[:, None, :]
    return np.einsum("hvk,hk->hv", new, q) * np.float32(q.shape[-1] ** -0.5), new


def delta_chunk(
    q: Float32, k: Float32, v: Float32, g: Float32, beta: Float32, state: Float32
) -> tuple[Float32, Float32]:
    """T tokens at once: q, k [H, T, K], v [H, T, V], g, beta [H, T], state [H, V, K] -> o [H, T, V], new state.

    Unrolling the recurrence with G_i = g_1 + ... + g_i gives

        S_i = e^{G_i} S_0 + sum_{j <= i} e^{G_i - G_j} d_j k_j^T
        d_i + beta_i sum_{j < i} e^{G_i - G_j} (k_j . k_i) d_j = beta_i (v_i - e^{G_i} S_0 k_i)

    so all d of the chunk solve one unit lower triangular system. Decay only ever appears as e^{G_i - G_j} with
    j <= i, at most 1: nothing overflows however strongly a head forgets.
    """
    total = np.cumsum(g, axis=1, dtype=np.float32)  # G [H, T]
    causal = np.tril(np.ones((q.shape[1],) * 2, bool))
    decay = np.exp(np.where(causal, total[:, :, None] - total[:, None, :], -np.inf))  # e^{G_i - G_j} [H, T, T]
    from_start = np.exp(total)[:, :, None]  # e^{G_i} [H, T, 1]

    system = np.tril(beta[:, :, None] * decay * (k @ k.mT), -1) + np.eye(q.shape[1], dtype=np.float32)
    rhs = beta[:, :, None] * (v - from_start * (k @ state.mT))
    d = np.linalg.solve(system, rhs).astype(np.float32, copy=False)  # [H, T, V]

    o = from_start * (q @ state.mT) + (decay * (q @ k.mT)) @ d
    to_end = decay[:, -1, :, None]  # e^{G_T - G_j} [H, T, 1]
    new = np.add(from_start[:, -1, :, None] * state, d.mT @ (to_end * k), dtype=np.float32)
    return o * np.float32(q.shape[-1] ** -0.5), new
