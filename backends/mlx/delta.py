"""The gated delta rule on MLX: by matrix products for any device, and as a kernel for Apple GPUs.

The recurrence and its unrolling are those of `edgeq.backends.numpy.delta`, which see (Yang et al., "Gated Delta
Networks", arXiv:2412.06464). Everything here is float32, and the heads run side by side: H value heads, T tokens.

By products, tokens go in chunks of C. Within a chunk all d solve one unit lower triangular system, whose inverse takes
2 log2(C) - 2 products, of all chunks at once. Only the state then passes from chunk to chunk. On a CPU the heads are
shared out among its cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

__all__ = ["cpu_streams", "delta_metal", "delta_products"]


class _Tokens(NamedTuple):
    """Inputs of the delta rule, every one a row for each head: q, k [H, T, K], v [H, T, V], g, beta [H, T]."""

    q: mx.array
    k: mx.array
    v: mx.array
    g: mx.array
    beta: mx.array

    def map(self, f: Callable[[mx.array], mx.array]) -> _Tokens:
        return _Tokens(f(self.q), f(self.k), f(self.v), f(self.g), f(self.beta))


@cache
def cpu_streams() -> Sequence[mx.Stream]:
    """A stream of the CPU for every core; MLX runs each in a thread of its own."""
    new = getattr(mx, "new_thread_local_stream", mx.new_stream)  # older ones serve all Python threads as they are
    return [new(mx.cpu) for _ in range(os.cpu_count() or 1)]


def delta_products(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array, keep: int, C: int,
    streams: Sequence[mx.Stream] = (),
) -> tuple[mx.array, tuple[mx.array, ...]]:  # fmt: skip
    """The seam's delta rule by matrix products, in chunks of C tokens, the heads shared out among `streams`, if any.

    q, k [T, Hk, K], v [T, Hv, V] of any float type; g, beta [T, Hv], state [Hv, V, K] float32
    -> o float32 [T, Hv, V] and the states after all tokens but the last keep, keep - 1, ..., 0.
    """
    T, share = q.shape[0], v.shape[1] // q.shape[1]
    x = _Tokens(q, k, v, g, beta).map(lambda x: x.astype(mx.float32).swapaxes(0, 1))
    if share > 1:
        x = x._replace(q=mx.repeat(x.q, share, axis=0), k=mx.repeat(x.k, share, axis=0))
    outputs, states = [], [state]
    if T - keep == 1:
        o, state = _step(x.map(lambda x: x[:, 0]), state)
        outputs, states = [o[:, None]], [state]
    elif T - keep > 1:
        o, state = _chunks(x.map(lambda x: x[:, : T - keep]), state, C, streams)
        outputs, states = [o], [state]
    if keep:
        o, later = _each(x.map(lambda x: x[:, T - keep :]), state)
        outputs, states = [*outputs, o], [*states, *later]
    return mx.concatenate(outputs, axis=1).swapaxes(0, 1), tuple(states)


def _step(x: _Tokens, state: mx.array) -> tuple[mx.array, mx.array]:
    """One token, all arrays without the axis T: state [H, V, K] -> o [H, V] and the new state."""
    decayed = state * mx.exp(x.g)[:, None, None]
    d = x.beta[:, None] * (x.v - (decayed @ x.k[:, :, None]).squeeze(-1))
    new = decayed + d[:, :, None] * x.k[:, None, :]
    return (new @ x.q[:, :, None]).squeeze(-1) * x.q.shape[-1] ** -0.5, new


def _chunks(x: _Tokens, state: mx.array, C: int, streams: Sequence[mx.Stream]) -> tuple[mx.array, mx.array]:
    """T tokens: state [H, V, K] -> o [H, T, V] and the new state.

    The longer the chunks, the more work there is in them, and the fewer steps from one to the next. Where several
    streams walk abreast, every step is started at once: MLX hands out work only so far ahead of what is done, and on
    its own would come to the end of one stream's chunks before it begins with those of the next.
    """
    T, H = x.q.shape[1], state.shape[0]
    lanes = streams[:H] if streams and T > C else [mx.default_stream(mx.default_device())]
    bounds = [i * H // len(lanes) for i in range(len(lanes) + 1)]
    walks = [_Walk(stream, x, state, slice(*bounds[i : i + 2]), C) for i, stream in enumerate(lanes)]
    for n in range(-(-T // C)):
        for walk in walks:
            walk.step(n)
        if len(walks) > 1:
            mx.async_eval([walk.memory for walk in walks])  # type: ignore[no-untyped-call]
    outputs, states = map(list, zip(*(walk.end() for walk in walks), strict=True))
    return mx.concatenate(outputs)[:, :T], mx.concatenate(states)


class _Walk:
    """Some of the heads on their way from chunk to chunk, in a stream."""

    def __init__(self, stream: mx.Stream, x: _Tokens, state: mx.array, heads: slice, C: int) -> None:
        self.stream = stream
        with mx.stream(stream):
            self.chunks = _solve(x.map(lambda x: _in_chunks(x[heads], C)))
            self.memory = state[heads].swapaxes(-1, -2)  # [H, K, V]
        self.recalled: list[mx.array] = []
        self.wrote: list[mx.array] = []

    def step(self, n: int) -> None:
        """Chunk n."""
        c = self.chunks
        C = c.values.shape[2]
        with mx.stream(self.stream):
            known = c.lookups[:, n] @ self.memory  # [H, 2 C, V]
            d = c.values[:, n] - known[:, :C]
            self.memory = c.whole_decay[:, n] * self.memory + c.late_keys[:, n].swapaxes(-1, -2) @ d
            self.recalled.append(known[:, C:])
            self.wrote.append(d)

    def end(self) -> tuple[mx.array, mx.array]:
        """After the last chunk: o of all tokens [H, N C, V], and the state [H, V, K]."""
        with mx.stream(self.stream):
            o = mx.stack(self.recalled, axis=1) + self.chunks.scores @ mx.stack(self.wrote, axis=1)
            return o.flatten(1, 2), mx.contiguous(self.memory.swapaxes(-1, -2))


def _each(x: _Tokens, state: mx.array) -> tuple[mx.array, list[mx.array]]:
    """A few tokens: state [H, V, K] -> o [H, T, V] and the state after every one of them."""
    T = x.q.shape[1]
    c = _solve(x.map(lambda x: x[:, None]))
    known = c.lookups[:, 0] @ state.swapaxes(-1, -2)
    d = c.values[:, 0] - known[:, :T]
    o = known[:, T:] + c.scores[:, 0] @ d
    decay, from_start = _decay(x.g)
    left = decay.swapaxes(0, 1)[..., None] * x.k  # [T, H, T, K]: of each key, what is left at token i
    states = from_start.T[:, :, None, None] * state + d.swapaxes(-1, -2) @ left
    return o, [mx.contiguous(states[i]) for i in range(T)]


class _Chunks(NamedTuple):
    """What N chunks of C tokens do, but for the state each starts from."""

    values: mx.array  # [H, N, C, V]: the d if the state were zero
    lookups: mx.array  # [H, N, 2 C, K]: what, times the state, is to be taken from those d; then the decayed queries
    scores: mx.array  # [H, N, C, C]: what the output of a token takes of the d of each
    late_keys: mx.array  # [H, N, C, K]: the keys, decayed to the end of the chunk
    whole_decay: mx.array  # [H, N, 1, 1]


def _solve(x: _Tokens) -> _Chunks:
    """Tokens in chunks: q, k [H, N, C, K], v [H, N, C, V], g, beta [H, N, C]."""
    scale = x.q.shape[-1] ** -0.5
    decay, from_start = _decay(x.g)
    keys = mx.contiguous(x.k.swapaxes(-1, -2))
    inverse = _unit_lower_inverse(x.beta[..., None] * decay * (x.k @ keys)) * x.beta[..., None, :]
    early = from_start[..., None, :]
    return _Chunks(
        values=inverse @ x.v,
        lookups=mx.concatenate([(inverse * early) @ x.k, (from_start * scale)[..., None] * x.q], axis=2),
        scores=decay * scale * (x.q @ keys),
        late_keys=decay[..., -1, :, None] * x.k,
        whole_decay=from_start[..., -1:, None],
    )


def _decay(g: mx.array) -> tuple[mx.array, mx.array]:
    """Log decays [..., C] -> e^(G_i - G_j) [..., C, C], zero for j > i, and e^G_i [..., C], where G sums g."""
    total = mx.cumsum(g, axis=-1)
    apart = total[..., :, None] - total[..., None, :]
    return mx.tril(mx.exp(mx.minimum(apart, 0))), mx.exp(total)


def _unit_lower_inverse(a: mx.array) -> mx.array:
    """(I + A)^-1 for the part A of `a` [..., C, C] below the diagonal.

    By blocks, [[P, 0], [Q, R]]^-1 = [[P^-1, 0], [-R^-1 Q P^-1, R^-1]]: from the inverses of all blocks of 1 to those of
    2, of 4, and so on. (The product (I - A)(I + A^2)(I + A^4)... takes as many steps, but its powers of A grow like
    binomial coefficients where keys repeat, and cancel.)
    """
    below = _below_left(a.shape[-1])
    inverse = mx.eye(a.shape[-1]) - below[0] * a
    for mask in below[1:]:
        inverse = inverse - inverse @ (mask * a) @ inverse
    return inverse


@cache
def _below_left(C: int) -> list[mx.array]:
    """For blocks of 1, 2, 4...: ones in the lower left quarter of each pair of neighbours on the diagonal [C, C]."""
    row, column = np.indices((C, C))
    sizes = [1 << i for i in range(max(1, (C - 1).bit_length()))]
    masks = [(row // (2 * b) == column // (2 * b)) & (row // b > column // b) for b in sizes]
    return [mx.array(mask.astype(np.float32)) for mask in masks]


def _in_chunks(x: mx.array, C: int) -> mx.array:
    """[H, T, ...] -> [H, N, C, ...]; zeros at the end are tokens that neither decay nor write."""
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, -x.shape[1] % C)
    return mx.pad(x, padding).reshape(x.shape[0], -1, C, *x.shape[2:])


# --- Metal -----------------------------------------------------------------------------------------------------------

_METAL = """
    // A SIMD group of 32 threads holds one row of one head's state, S[row, :], in registers, and goes through the
    // tokens. Thread `lane` holds the entries lane, lane + 32, ...; those beyond K stay zero.
    const uint lane = thread_position_in_grid.x;
    const uint row = thread_position_in_grid.y;
    const uint head = thread_position_in_grid.z;
    const uint key_head = head / (Hv / Hk);
    constexpr uint N = (K + 31) / 32;

    float s[N];
    for (uint i = 0; i < N; ++i) {
        const uint at = lane + 32 * i;
        s[i] = at < K ? state[(head * V + row) * K + at] : 0.0f;
    }
    for (uint t = 0; t <= uint(T); ++t) {
        if (t + KEEP >= uint(T)) {  // the state after t tokens is one of those asked for
            const uint copy = t + KEEP - uint(T);
            for (uint i = 0; i < N; ++i) {
                const uint at = lane + 32 * i;
                if (at < K) states[((copy * Hv + head) * V + row) * K + at] = s[i];
            }
        }
        if (t == uint(T)) break;

        const uint token = t * Hk + key_head;
        const float decay = metal::exp(g[t * Hv + head]);
        float keys[N];
        float recalled = 0.0f;
        for (uint i = 0; i < N; ++i) {
            const uint at = lane + 32 * i;
            keys[i] = at < K ? float(k[token * K + at]) : 0.0f;
            s[i] *= decay;
            recalled += s[i] * keys[i];
        }
        const uint here = (t * Hv + head) * V + row;
        const float d = beta[t * Hv + head] * (float(v[here]) - metal::simd_sum(recalled));
        float out = 0.0f;
        for (uint i = 0; i < N; ++i) {
            const uint at = lane + 32 * i;
            s[i] += d * keys[i];
            out += s[i] * (at < K ? float(q[token * K + at]) : 0.0f);
        }
        out = metal::simd_sum(out);
        if (lane == 0) o[here] = out * metal::rsqrt(float(K));
    }
"""


@cache
def _metal_kernel() -> object:
    return mx.fast.metal_kernel(
        name="edgeq_delta_rule",
        input_names=["q", "k", "v", "g", "beta", "state", "T"],
        output_names=["o", "states"],
        source=_METAL,
    )


def delta_metal(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array, keep: int
) -> tuple[mx.array, tuple[mx.array, ...]]:
    """The seam's delta rule as one kernel, for Apple GPUs; inputs and outputs as those of `delta_products`."""
    (T, Hk, K), (_, Hv, V) = q.shape, v.shape
    o, states = _metal_kernel()(  # type: ignore[operator]
        inputs=[q, k, v, g, beta, state, T],
        template=[("Hk", Hk), ("Hv", Hv), ("K", K), ("V", V), ("KEEP", keep)],
        grid=(32, V, Hv),
        threadgroup=(32, min(V, 8), 1),
        output_shapes=[(T, Hv, V), (keep + 1, Hv, V, K)],
        output_dtypes=[mx.float32, mx.float32],
    )
    # of several states, each has to live and die by itself
    return o, tuple(mx.contiguous(states[i]) for i in range(keep + 1)) if keep else (states[0],)
