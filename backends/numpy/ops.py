"""Every operation of the seam in plain NumPy, float32: slow, short, and the definition of right."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import finalize

import numpy as np

from edgeq.backends.base import BaseOps
from edgeq.backends.numpy.delta import delta_chunk, delta_step
from edgeq.backends.numpy.kv import PAGE, STORED, Page, PagedKV
from edgeq.backends.numpy.kv_types import check_kv_dtype
from edgeq.backends.ops import Angles
from edgeq.config import RopeConfig, TextConfig, VisionConfig
from edgeq.formats.affine import dequantize
from edgeq.formats.bf16 import Array, Float32, to_float32
from edgeq.model import layers, rotary
from edgeq.state import DeltaState, KVCache
from edgeq.weights import DeltaNetWeights, Matrix, QMatrix

if TYPE_CHECKING:
    from numpy.polynomial import Chebyshev

__all__ = ["ArrayOps", "NumpyOps"]

M = TypeVar("M")

CHUNK = 64  # tokens of the chunked delta rule; the triangular system is CHUNK x CHUNK per head
SCORES = 1 << 22  # scores of full attention at a time: 16 MB
ERF_END = 4.0  # where erf is 1 in float32
TILE = 1 << 20  # weights widened to float32 at a time: 4 MB, so a quantized model never exists in float32


def sigmoid(x: Float32) -> Float32:
    """1 / (1 + exp(-x)), without overflow at either end."""
    e = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1, e) / (1 + e))


def silu(x: Float32) -> Float32:
    """x * sigmoid(x)."""
    return x * sigmoid(x)


def softplus(x: Float32) -> Float32:
    """log(1 + exp(x)), without overflow."""
    return np.logaddexp(x, np.float32(0))


@cache
def _erf_series() -> Chebyshev:
    """erf(x) / x as a polynomial in x^2 up to ERF_END^2: within 1e-14, taken from the standard library's."""
    from numpy.polynomial import Chebyshev  # 10 ms, and only a picture needs it

    def over_x(square: float) -> float:
        x = math.sqrt(square)
        return math.erf(x) / x if x else 2 / math.sqrt(math.pi)

    return Chebyshev.interpolate(np.vectorize(over_x, otypes=[float]), 24, (0, ERF_END**2))


def erf(x: Float32) -> Float32:
    """The error function, to the last bit or two of float32."""
    x = np.clip(x, -ERF_END, ERF_END)
    return np.asarray(x * _erf_series()(np.square(x, dtype=np.float64)), np.float32)


def matrix_rows(w: Matrix[Array], rows: slice | Array) -> Float32:
    """Some rows of a matrix as float32 [rows, in]."""
    if isinstance(w, QMatrix):
        return dequantize(w.map(lambda x: x[rows]))
    return to_float32(w[rows])


def tiles(w: Matrix[Array], width: int) -> Iterator[slice]:
    """Row ranges of at most TILE weights."""
    out = w.codes.shape[0] if isinstance(w, QMatrix) else w.shape[0]
    step = max(1, TILE // width)
    return (slice(row, row + step) for row in range(0, out, step))


class Tally:
    """Bytes of the arrays that were added and are still alive."""

    def __init__(self) -> None:
        self.nbytes = 0

    def add(self, x: Array) -> None:
        self.nbytes += x.nbytes
        finalize(x, self._gone, x.nbytes)

    def _gone(self, nbytes: int) -> None:
        self.nbytes -= nbytes


class ArrayOps(BaseOps[Array, M]):
    """Every operation but those on matrices, on NumPy's arrays.

    kv_dtype: what the KV cache keeps of its entries, "f32", "f16", "bf16", "int8" or "int4".
    """

    def __init__(self, kv_dtype: str = "f32") -> None:
        self.kv_dtype = check_kv_dtype(kv_dtype)

    def vision_scratch_nbytes(self, c: VisionConfig, patches: int) -> int:
        """The feed-forward and its GELU's parts are widest, and then there are scores and what they are made of."""
        return super().vision_scratch_nbytes(c, patches) + 4 * 4 * SCORES

    # --- the edge ----------------------------------------------------------------------------------------------------

    def vector(self, x: Float32) -> Array:
        return x

    def array(self, x: Array) -> Array:
        return x

    def numpy(self, x: Array) -> Float32:
        return to_float32(x)

    def zeros(self, *shape: int) -> Array:
        return np.zeros(shape, np.float32)

    def kv_cache(self, keys: Float32, values: Float32) -> KVCache[Array]:
        return PagedKV(keys.shape[1], keys.shape[2], self.kv_dtype).appended(keys, values)

    def stored_cache(
        self, blocks: Sequence[Array], length: int, heads: int, dim: int, base: KVCache[Array] | None = None
    ) -> KVCache[Array]:
        before = base if isinstance(base, PagedKV) else PagedKV(heads, dim, self.kv_dtype)
        return before.of_blocks(blocks, length)

    def block_like(self, heads: int, dim: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
        return (2, heads, PAGE, dim), STORED[self.kv_dtype]

    def concat(self, xs: Sequence[Array], axis: int = 0) -> Array:
        return xs[0] if len(xs) == 1 else np.concatenate(xs, axis=axis)

    # --- matrices ----------------------------------------------------------------------------------------------------

    def affine(self, x: Array, w: M, bias: Array) -> Array:
        return np.asarray(self.linear(x, w) + bias)

    # --- norms and pointwise -----------------------------------------------------------------------------------------

    def layer_norm(self, x: Array, gain: Array, bias: Array, eps: float) -> Array:
        x = x - np.mean(x, axis=-1, keepdims=True)
        variance = np.mean(x * x, axis=-1, keepdims=True)
        return np.asarray(x / np.sqrt(variance + np.float32(eps)) * gain + bias)

    def gelu(self, x: Array, exact: bool) -> Array:
        if exact:
            return np.asarray(x * np.float32(0.5) * (1 + erf(x * np.float32(math.sqrt(0.5)))))
        inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
        return np.asarray(x * np.float32(0.5) * (1 + np.tanh(inner)))

    def rms_norm(self, x: Array, gain: Array, eps: float) -> Array:
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        return np.asarray(x / np.sqrt(mean_square + np.float32(eps)) * gain)

    def gated_rms_norm(self, x: Array, gain: Array, z: Array, eps: float) -> Array:
        return self.rms_norm(x, gain, eps) * silu(z)

    def l2_norm(self, x: Array, eps: float) -> Array:
        return np.asarray(x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + np.float32(eps)))

    def add(self, x: Array, y: Array) -> Array:
        return x + y

    def silu_mul(self, gate: Array, up: Array) -> Array:
        return silu(gate) * up

    def sigmoid_mul(self, x: Array, gate: Array) -> Array:
        return x * sigmoid(gate)

    def delta_gates(self, a: Array, b: Array, decay: Array, dt_bias: Array) -> tuple[Array, Array]:
        return decay * softplus(a + dt_bias), sigmoid(b)

    # --- attention ---------------------------------------------------------------------------------------------------

    def rope_angles(self, positions: Array, rope: RopeConfig) -> Angles[Array]:
        angles = positions.astype(np.float32)[rotary.axes(rope)].T * rotary.frequencies(rope)  # [T, pairs]
        factor = np.float32(rope.attention_factor)
        return np.cos(angles) * factor, np.sin(angles) * factor

    def rope(self, x: Array, angles: Angles[Array]) -> Array:
        cos, sin = (a[:, None, :] for a in angles)  # the same for every head
        pairs = cos.shape[-1]
        first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)

    def attention(self, q: Array, k: Array, v: Array, cache: KVCache[Array]) -> tuple[Array, KVCache[Array]]:
        assert isinstance(cache, PagedKV)
        start, longer = cache.length, cache.appended(k, v)
        T, heads, dim = q.shape
        groups = q.reshape(T, longer.heads, -1, dim).transpose(1, 2, 0, 3)  # [Hkv, Hq / Hkv, T, D]
        blocks = list(longer.parts())
        scores = np.concatenate([groups @ keys[:, None].mT for keys, _ in blocks], axis=-1) * np.float32(dim**-0.5)
        visible = np.arange(longer.length) <= np.arange(start, longer.length)[:, None]  # [T, length]
        scores = np.where(visible, scores, np.float32(-np.inf))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out, at = np.zeros_like(groups), 0
        for _, values in blocks:
            out += weights[..., at : at + values.shape[1]] @ values[:, None]
            at += values.shape[1]
        return out.transpose(2, 0, 1, 3).reshape(T, heads, dim), longer

    def full_attention(self, q: Array, k: Array, v: Array, lengths: Sequence[int]) -> Array:
        out, scale = np.empty_like(q), np.float32(q.shape[-1] ** -0.5)
        for span in layers.spans(lengths):
            keys, values = k[span].transpose(1, 2, 0), v[span].swapaxes(0, 1)  # [H, D, T], [H, T, D]
            step = max(1, SCORES // (values.shape[0] * values.shape[1]))
            for start in range(span.start, span.stop, step):
                rows = slice(start, min(start + step, span.stop))
                scores = q[rows].swapaxes(0, 1) @ keys * scale  # [H, rows, T]
                weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
                weights /= weights.sum(axis=-1, keepdims=True)
                out[rows] = (weights @ values).swapaxes(0, 1)
        return out

    def append(self, k: Array, v: Array, cache: KVCache[Array]) -> KVCache[Array]:
        assert isinstance(cache, PagedKV)
        return cache.appended(k, v)

    # --- DeltaNet ----------------------------------------------------------------------------------------------------

    def causal_conv_silu(self, x: Array, w: Array, tail: Array, keep: int = 0) -> tuple[Array, tuple[Array, ...]]:
        T, width = x.shape[0], w.shape[1]
        inputs = np.concatenate([tail, x])
        y = sum(inputs[i : i + T] * w[:, i] for i in range(width))
        return silu(np.asarray(y)), tuple(inputs[n : n + width - 1].copy() for n in range(T - keep, T + 1))

    def delta_rule(
        self, q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array, keep: int = 0
    ) -> tuple[Array, tuple[Array, ...]]:
        T, value_heads = g.shape
        repeat = value_heads // q.shape[1]
        q, k = (np.repeat(x.swapaxes(0, 1), repeat, axis=0) for x in (q, k))  # [Hv, T, K]
        v, g, beta = v.swapaxes(0, 1), g.T, beta.T  # [Hv, T, ...]
        outputs = []
        chunked = T - keep if T > 1 else 0
        for start in range(0, chunked, CHUNK):
            rows = slice(start, min(start + CHUNK, chunked))
            o, state = delta_chunk(q[:, rows], k[:, rows], v[:, rows], g[:, rows], beta[:, rows], state)
            outputs.append(o)
        states = [state] if chunked == T - keep else []
        for t in range(chunked, T):
            o, state = delta_step(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], state)
            outputs.append(o[:, None])
            states.append(state)
        return np.concatenate(outputs, axis=1).swapaxes(0, 1), tuple(states[-keep - 1 :])


class NumpyOps(ArrayOps[Matrix[Array]]):
    """The specification: `ArrayOps`, and matrices as the file has them, widened to float32 a tile at a time."""

    name = "numpy"

    @classmethod
    def describe(cls) -> str:
        return f"NumPy {np.__version__}, float32: the reference"

    def __init__(self, kv_dtype: str = "f32") -> None:
        super().__init__(kv_dtype)
        self._states = Tally()

    keeps_ceiling = False  # its attention holds the scores and copies of all keys and values of a layer

    def held(self) -> Mapping[str, int]:
        return {"KV cache": sum(page.nbytes for page in Page.alive), "DeltaNet states": self._states.nbytes}

    def delta_net(
        self, x: Array, w: DeltaNetWeights[Array, Matrix[Array]], c: TextConfig, states: Sequence[DeltaState[Array]],
        lengths: Sequence[int], keep: Sequence[int],
    ) -> tuple[Array, list[tuple[DeltaState[Array], ...]]]:  # fmt: skip
        y, after = layers.delta_net(self, x, w, c, states, lengths, keep)
        for array in (array for kept in after for state in kept for array in state):
            self._states.add(array)
        return y, after

    def matrix(self, w: Matrix[Array]) -> Matrix[Array]:
        return w

    def embed(self, table: Matrix[Array], ids: Array) -> Array:
        return matrix_rows(table, ids)

    def linear(self, x: Array, w: Matrix[Array]) -> Array:
        parts = [x @ matrix_rows(w, rows).T for rows in tiles(w, x.shape[1])]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def rows(self, w: Matrix[Array], rows: slice | Array) -> Matrix[Array]:
        return w.map(lambda x: x[rows]) if isinstance(w, QMatrix) else w[rows]
