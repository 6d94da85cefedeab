"""The operations of the seam on native kernels. Arrays are NumPy's; Python only makes room and passes pointers.

What is not here is NumPy's: the edge, the rotary angles (once per call of the model) and the gates of the unfused
DeltaNet mixer. Everything a token or a prompt spends time in is native, and each mixer is one native call between
its projections.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np

from edgeq.backends.cpu import _native
from edgeq.backends.cpu.kv import NativeKV, check_kv_dtype, empty_aligned
from edgeq.backends.numpy import NumpyOps
from edgeq.backends.ops import Angles
from edgeq.bf16 import Array, Float32
from edgeq.config import RopeConfig, TextConfig
from edgeq.state import DeltaState, KVCache
from edgeq.weights import AttentionWeights, DeltaNetWeights, Matrix, QMatrix

__all__ = ["CpuOps"]


def like(x: Array) -> Array:
    """Room for a result of x's shape."""
    return np.empty(x.shape, np.float32)


def room(x: Array, count: int) -> list[Array]:
    """Room for `count` states of x's shape, on cache lines; each of its own, so that one can be kept alone."""
    return [empty_aligned(x.size * 4).view(np.float32).reshape(x.shape) for _ in range(count)]


class CpuOps(NumpyOps):
    """The native CPU backend.

    threads: how many the process's pool may use; None leaves that to the pool. kv_dtype: "f16", "bf16" or "f32".
    float16 is the default: as small as bfloat16 and eight times as fine, and keys (normalised) and values stay far
    from its largest number, 65504, at which it saturates.
    """

    name = "cpu"

    def __init__(self, threads: int | None = None, kv_dtype: str = "f16") -> None:
        if threads is not None:
            _native.set_thread_count(threads)
        self.kv_dtype = check_kv_dtype(kv_dtype)
        self._bound: dict[int, tuple[_native.Matrix, weakref.ref[Array]]] = {}

    @classmethod
    def describe(cls) -> str:
        return f"{_native.isa()} kernels, {_native.thread_count()} threads"

    def load(self, x: Array) -> Array:
        return x.view()  # an object of our own, so that its end is the end of the weights (see `_matrix`)

    def kv_cache(self, keys: Float32, values: Float32) -> NativeKV:
        return NativeKV(keys.shape[1], keys.shape[2], self.kv_dtype).appended(keys, values)

    # --- matrices ----------------------------------------------------------------------------------------------------

    def embed(self, table: Matrix[Array], ids: Array) -> Array:
        rows = self._matrix(table)
        _native.embed(rows, ids, out := np.empty((len(ids), rows.shape[1]), np.float32))
        return out

    def linear(self, x: Array, w: Matrix[Array]) -> Array:
        matrix = self._matrix(w)
        _native.linear(x, matrix, y := np.empty((len(x), matrix.shape[0]), np.float32))
        return y

    def linears(self, x: Array, ws: Sequence[Matrix[Array]]) -> tuple[Array, ...]:
        matrices = [self._matrix(w) for w in ws]
        ys = [np.empty((len(x), matrix.shape[0]), np.float32) for matrix in matrices]
        _native.linears(x, matrices, ys)
        return tuple(ys)

    def _matrix(self, w: Matrix[Array]) -> _native.Matrix:
        """The checked native form of a weight, made once and forgotten with the weight.

        It holds views of its own: the mapped file lives as long as either, but nothing holds the weight itself.
        """
        key = w.codes if isinstance(w, QMatrix) else w
        if found := self._bound.get(id(key)):
            return found[0]
        views = [x.view() for x in (w[:3] if isinstance(w, QMatrix) else (w,))]
        matrix = _native.Matrix(*views, w.bits, w.group_size) if isinstance(w, QMatrix) else _native.Matrix(*views)
        if key.base is not None:  # else a view of it would keep it, and be kept, for ever
            forget, address = self._bound.pop, id(key)
            self._bound[address] = matrix, weakref.ref(key, lambda _: forget(address, None))
        return matrix

    # --- norms and pointwise -----------------------------------------------------------------------------------------

    def rms_norm(self, x: Array, gain: Array, eps: float) -> Array:
        _native.rms_norm(x, gain, None, eps, y := like(x))
        return y

    def gated_rms_norm(self, x: Array, gain: Array, z: Array, eps: float) -> Array:
        _native.rms_norm(x, gain, z, eps, y := like(x))
        return y

    def l2_norm(self, x: Array, eps: float) -> Array:
        _native.l2_norm(x, eps, y := like(x))
        return y

    def add(self, x: Array, y: Array) -> Array:
        _native.add(x, y, total := like(x))
        return total

    def silu_mul(self, gate: Array, up: Array) -> Array:
        _native.silu_mul(gate, up, y := like(gate))
        return y

    def sigmoid_mul(self, x: Array, gate: Array) -> Array:
        _native.sigmoid_mul(x, gate, y := like(x))
        return y

    # --- attention ---------------------------------------------------------------------------------------------------

    def rope_angles(self, positions: Array, rope: RopeConfig) -> Angles[Array]:
        cos, sin = super().rope_angles(positions, rope)
        return np.ascontiguousarray(cos), np.ascontiguousarray(sin)

    def rope(self, x: Array, angles: Angles[Array]) -> Array:
        _native.rope(x, *angles, y := like(x))
        return y

    def attention(self, q: Array, k: Array, v: Array, cache: KVCache[Array]) -> tuple[Array, KVCache[Array]]:
        longer = _longer(cache, len(q))
        sequences = [(len(q), cache.length, longer.buffers())]
        _native.attention(q, k, v, None, None, None, 0.0, None, None, longer.dtype, sequences, out := like(q))
        return out, longer

    def gated_attention(
        self, x: Array, w: AttentionWeights[Array], c: TextConfig, angles: Angles[Array],
        caches: Sequence[KVCache[Array]], lengths: Sequence[int],
    ) -> tuple[Array, list[KVCache[Array]]]:  # fmt: skip
        q_gate, k, v = self.linears(x, (w.q_proj, w.k_proj, w.v_proj))
        q_gate = q_gate.reshape(-1, c.num_attention_heads, 2 * c.head_dim)  # per head: query, then gate
        q, gate = q_gate[:, :, : c.head_dim], q_gate[:, :, c.head_dim :]
        k = k.reshape(-1, c.num_key_value_heads, c.head_dim)
        v = v.reshape(-1, c.num_key_value_heads, c.head_dim)
        after = [_longer(cache, length) for cache, length in zip(caches, lengths, strict=True)]
        sequences = [
            (length, cache.length, longer.buffers())
            for length, cache, longer in zip(lengths, caches, after, strict=True)
        ]
        out, eps, dtype = like(q), c.rms_norm_eps, after[0].dtype
        _native.attention(q, k, v, gate, w.q_norm, w.k_norm, eps, *angles, dtype, sequences, out)
        return self.linear(out.reshape(-1, c.attention_dim), w.o_proj), list(after)

    # --- DeltaNet ----------------------------------------------------------------------------------------------------

    def causal_conv_silu(self, x: Array, w: Array, tail: Array, keep: int = 0) -> tuple[Array, tuple[Array, ...]]:
        _native.causal_conv_silu(x, w, tail, y := like(x))
        before, T = len(tail), len(x)
        inputs = np.concatenate([tail[max(0, T - keep) :], x[max(0, T - keep - before) :]])
        return y, tuple(inputs[i : i + before].copy() for i in range(keep + 1))

    def delta_rule(
        self, q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array, keep: int = 0
    ) -> tuple[Array, tuple[Array, ...]]:
        _native.delta_rule(q, k, v, g, beta, state, after := room(state, keep + 1), o := like(v))
        return o, tuple(after)

    def delta_net(
        self, x: Array, w: DeltaNetWeights[Array], c: TextConfig, states: Sequence[DeltaState[Array]],
        lengths: Sequence[int], keep: int = 0,
    ) -> tuple[Array, list[tuple[DeltaState[Array], ...]]]:  # fmt: skip
        qkv, z, b, a = self.linears(x, (w.in_proj_qkv, w.in_proj_z, w.in_proj_b, w.in_proj_a))
        sequences = [
            (length, *state, room(state.conv, keep + 1), room(state.matrix, keep + 1))
            for length, state in zip(lengths, states, strict=True)
        ]
        vectors = (w.conv, w.decay, w.dt_bias, w.norm)
        out, eps, key_heads = like(z), c.rms_norm_eps, c.linear_num_key_heads
        _native.delta_net(qkv, z, b, a, *vectors, eps, key_heads, keep, sequences, out)
        after = [tuple(map(DeltaState, tails, matrices)) for *_, tails, matrices in sequences]
        return self.linear(out, w.out_proj), after


def _longer(cache: KVCache[Array], tokens: int) -> NativeKV:
    assert isinstance(cache, NativeKV)
    return cache.with_room(tokens)
