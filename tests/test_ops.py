"""Every operation of the seam, on every backend that runs here, against slow obvious float64 loops.

One bound per operation is written in BOUNDS, as NMSE = sum((a - b)^2) / sum(a^2) against the loops, with its reason.
The composites are compared with their default bodies in `edgeq.model.layers` on the same backend.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gguf_forms import FORMS, Form, gguf_matrix

from edgeq.backends import available
from edgeq.backends.ops import Ops
from edgeq.config import Linear, RopeConfig, TextConfig, VisionConfig, Yarn
from edgeq.formats.affine import dequantize, pack
from edgeq.formats.bf16 import Array, from_float32, round_to, to_float32
from edgeq.model import layers, rotary, vision
from edgeq.state import DeltaState
from edgeq.testing import nmse
from edgeq.weights import (
    Affine,
    AttentionWeights,
    DeltaNetWeights,
    Matrix,
    MLPWeights,
    QMatrix,
    VisionBlockWeights,
)

LENGTHS = (1, 2, 63, 64, 65, 257)

EXACT = 0.0
POINTWISE = 1e-12  # float32 has 6e-8 of relative error an operation, 4e-15 squared; exp may lose a few bits more
SUMS = 1e-11  # float32 sums over up to a few thousand terms, in any order
RECURRENT = 1e-9  # float32 sums fed back a few hundred times
BOUNDS: dict[tuple[str, str], float] = {
    # The native backend rounds activations to int8 a group at a time: for a bell curve of 32..128 entries the step
    # is about 2.5 sigma / 127, so the error is 0.6 % of a sigma, 3e-5 squared.
    ("cpu", "linear quantized"): 1e-4,
    # Rows as 16-bit codes in groups of 128: 128 / (12 * 65500^2) = 2.5e-9, and the weights' (vision/kernels.h).
    ("cpu", "linear"): 3e-8,
    # Keys and values are kept as float16: 2^-11 of relative error, 8e-8 squared and averaged; scores amplify it.
    ("cpu", "attention"): 1e-6,
    ("cpu", "kv"): 1e-6,
    ("cpu", "full attention"): 1e-7,  # as for linear, four times: queries, keys, shares, values
    # An int8 rounding of an activation may fall the other way after a last-bit difference: a rare step of 1/127.
    ("cpu", "composite"): 1e-6,
    ("cpu", "vision blocks"): 1e-5,  # both: roundings to 16 and to 8 bits fall otherwise after a last-bit difference
}
DEFAULTS = {
    "linear quantized": SUMS, "linear": SUMS, "attention": SUMS, "kv": EXACT, "composite": RECURRENT,
    "full attention": SUMS, "vision blocks": RECURRENT,
}  # fmt: skip


def bound(ops: Ops[Any, Any], operation: str) -> float:
    return BOUNDS.get((ops.name, operation), DEFAULTS[operation])


def backends() -> Iterator[Any]:
    for backend in available():
        skip = [pytest.mark.skip(reason=f"{backend.name}: {backend.reason}")] if backend.ops is None else []
        yield pytest.param(backend.ops, id=backend.name, marks=skip)


@pytest.fixture(scope="module", params=backends())
def ops(request: pytest.FixtureRequest) -> Ops[Any, Any]:
    exact = {"dtype": "float32"} if request.param.name == "mlx" else {}  # on a GPU it is bfloat16 unless said otherwise
    made: Ops[Any, Any] = request.param(**exact)
    return made


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape, np.float32)


def quantized(rng: np.random.Generator, out: int, width: int, bits: int, group: int, dtype: type) -> QMatrix[Array]:
    codes = pack(rng.integers(0, 1 << bits, (out, width)), bits)
    scales = rng.uniform(0.01, 0.02, (out, width // group)).astype(np.float32)
    biases = (-scales * (1 << (bits - 1)) + 0.01 * normal(rng, *scales.shape)).astype(np.float32)
    return QMatrix(codes, round_to(scales, dtype), round_to(biases, dtype), bits, group)


def dense(m: Matrix[Array]) -> Array:
    """The matrix in float64."""
    weights = dequantize(m) if isinstance(m, QMatrix) else to_float32(m)
    return weights.astype(np.float64)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-np.clip(x.astype(np.float64), -700, 700)))


# --- the edge --------------------------------------------------------------------------------------------------------


def test_vectors_keep_their_values(ops: Ops[Any, Any], rng: np.random.Generator) -> None:
    x = normal(rng, 5, 7)
    assert np.array_equal(ops.numpy(ops.vector(x)), x)


def test_array_zeros_concat(ops: Ops[Any, Any], rng: np.random.Generator) -> None:
    x, y = normal(rng, 3, 4, 5), normal(rng, 2, 4, 5)
    assert np.array_equal(ops.numpy(ops.array(x)), x)
    assert np.array_equal(ops.numpy(ops.zeros(2, 3)), np.zeros((2, 3)))
    assert np.array_equal(ops.numpy(ops.concat([ops.array(x), ops.array(y)])), np.concatenate([x, y]))
    assert np.array_equal(ops.numpy(ops.concat([ops.array(x)])), x)


# --- matrices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_embed(ops: Ops[Any, Any], rng: np.random.Generator, dtype: type) -> None:
    table = round_to(normal(rng, 37, 96), dtype)
    ids = np.array([36, 0, 5, 5], np.int32)
    assert np.array_equal(ops.numpy(ops.embed(ops.matrix(table), ops.array(ids))), to_float32(table[ids]))


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_embed_quantized(ops: Ops[Any, Any], rng: np.random.Generator, bits: int, group: int, dtype: type) -> None:
    table = quantized(rng, 37, 384, bits, group, dtype)
    ids = np.array([36, 0, 5, 5], np.int32)
    assert nmse(dense(table)[ids], ops.numpy(ops.embed(ops.matrix(table), ops.array(ids)))) <= POINTWISE


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
@pytest.mark.parametrize("out", [1, 33])
def test_linear(ops: Ops[Any, Any], rng: np.random.Generator, T: int, dtype: type, out: int) -> None:
    x, w = normal(rng, T, 160), round_to(normal(rng, out, 160), dtype)
    y = ops.numpy(ops.linear(ops.array(x), ops.matrix(w)))
    assert nmse(x.astype(np.float64) @ dense(w).T, y) <= bound(ops, "linear")


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_linear_quantized(ops: Ops[Any, Any], rng: np.random.Generator, T: int, bits: int, group: int) -> None:
    for dtype, out in ((np.float32, 1), (np.float16, 33), (np.uint16, 70)):
        x, w = normal(rng, T, 384), quantized(rng, out, 384, bits, group, dtype)
        y = ops.numpy(ops.linear(ops.array(x), ops.matrix(w)))
        assert nmse(x.astype(np.float64) @ dense(w).T, y) <= bound(ops, "linear quantized")


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gguf_s_types(ops: Ops[Any, Any], rng: np.random.Generator, form: Form) -> None:
    w, ids = gguf_matrix(rng, form, 33, 768), np.array([32, 0, 5], np.int32)
    assert nmse(dense(w)[ids], ops.numpy(ops.embed(ops.matrix(w), ops.array(ids)))) <= POINTWISE
    for T in (1, 3, 20):
        x = normal(rng, T, 768)
        y = ops.numpy(ops.linear(ops.array(x), ops.matrix(w)))
        assert nmse(x.astype(np.float64) @ dense(w).T, y) <= bound(ops, "linear quantized")


@pytest.mark.parametrize("T", [1, 5])
def test_linears(ops: Ops[Any, Any], rng: np.random.Generator, T: int) -> None:
    x = normal(rng, T, 128)
    ws: list[Matrix[Array]] = [
        quantized(rng, 48, 128, 4, 64, np.uint16),
        quantized(rng, 7, 128, 8, 32, np.float16),
        normal(rng, 5, 128),
    ]
    together = ops.linears(ops.array(x), [ops.matrix(w) for w in ws])
    for y, w in zip(together, ws, strict=True):
        assert nmse(ops.numpy(ops.linear(ops.array(x), ops.matrix(w))), ops.numpy(y)) <= SUMS


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("bits", [8, None], ids=["int8", "bf16"])
def test_affine(ops: Ops[Any, Any], rng: np.random.Generator, T: int, bits: int | None) -> None:
    x, bias = normal(rng, T, 192), normal(rng, 33)
    w = from_float32(normal(rng, 33, 192)) if bits is None else quantized(rng, 33, 192, bits, 64, np.uint16)
    y = ops.numpy(ops.affine(ops.array(x), ops.matrix(w), ops.vector(bias)))
    expected = x.astype(np.float64) @ dense(w).T + bias
    assert nmse(expected, y) <= bound(ops, "linear" if bits is None else "linear quantized")


def test_embedding_bag(ops: Ops[Any, Any], rng: np.random.Generator) -> None:
    ids, weights = rng.integers(0, 37, (19, 4)).astype(np.int32), rng.random((19, 4), np.float32)
    for table in (from_float32(normal(rng, 37, 96)), quantized(rng, 37, 96, 8, 32, np.uint16)):
        y = ops.numpy(ops.embedding_bag(ops.matrix(table), ids, weights))
        assert nmse((dense(table)[ids] * weights[:, :, None]).sum(axis=1), y) <= POINTWISE


# --- norms and pointwise ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1024), (3, 100), (2, 5, 33), (65, 3, 64)])
def test_norms(ops: Ops[Any, Any], rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    x, z, gain = 3 * normal(rng, *shape), normal(rng, *shape), normal(rng, shape[-1])
    wide = x.astype(np.float64)
    normed = wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + 1e-6) * gain
    unit = wide / np.sqrt(np.sum(wide**2, -1, keepdims=True) + 1e-6)
    X, Z, G = ops.array(x), ops.array(z), ops.vector(gain)
    assert nmse(normed, ops.numpy(ops.rms_norm(X, G, 1e-6))) <= SUMS
    assert nmse(normed * z * sigmoid(z), ops.numpy(ops.gated_rms_norm(X, G, Z, 1e-6))) <= SUMS
    assert nmse(unit, ops.numpy(ops.l2_norm(X, 1e-6))) <= SUMS


def test_norms_of_zeros_and_of_views(ops: Ops[Any, Any], rng: np.random.Generator) -> None:
    both, gain = normal(rng, 5, 3, 128), normal(rng, 64)
    B, G = ops.array(both), ops.vector(gain)
    half = ops.array(np.ascontiguousarray(both[:, :, 64:]))
    of_copy, of_view = (ops.numpy(ops.rms_norm(x, G, 1e-6)) for x in (half, B[:, :, 64:]))
    assert nmse(of_copy, of_view) <= SUMS
    assert np.array_equal(ops.numpy(ops.rms_norm(ops.zeros(2, 64), G, 1e-6)), np.zeros((2, 64)))
    assert np.array_equal(ops.numpy(ops.l2_norm(ops.zeros(2, 64), 1e-6)), np.zeros((2, 64)))


@pytest.mark.parametrize("shape", [(1, 7), (63, 65), (2, 4, 33)])
def test_pointwise(ops: Ops[Any, Any], rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    x, y = 4 * normal(rng, *shape), 4 * normal(rng, *shape)
    X, Y = ops.array(x), ops.array(y)
    assert np.array_equal(ops.numpy(ops.add(X, Y)), x + y)
    assert nmse(x * sigmoid(x) * y, ops.numpy(ops.silu_mul(X, Y))) <= POINTWISE
    assert nmse(x * sigmoid(y), ops.numpy(ops.sigmoid_mul(X, Y))) <= POINTWISE


def test_pointwise_extremes(ops: Ops[Any, Any]) -> None:
    x = ops.array(np.array([[-1e4, -90, -80, 0, 80, 90, 1e4]], np.float32))
    one = ops.array(np.ones((1, 7), np.float32))
    assert np.allclose(ops.numpy(ops.silu_mul(x, one)), [[0, 0, 0, 0, 80, 90, 1e4]], atol=1e-30)
    assert np.allclose(ops.numpy(ops.sigmoid_mul(one, x)), [[0, 0, 0, 0.5, 1, 1, 1]], atol=1e-30)


@pytest.mark.parametrize("T", [1, 65])
def test_delta_gates(ops: Ops[Any, Any], rng: np.random.Generator, T: int) -> None:
    a, b, A, bias = 20 * normal(rng, T, 6), 20 * normal(rng, T, 6), -np.exp(normal(rng, 6)), normal(rng, 6)
    g, beta = ops.delta_gates(ops.array(a), ops.array(b), ops.vector(A), ops.vector(bias))
    assert nmse(A * np.logaddexp(a.astype(np.float64) + bias, 0), ops.numpy(g)) <= POINTWISE
    assert nmse(sigmoid(b), ops.numpy(beta)) <= POINTWISE


@pytest.mark.parametrize("size", [64, 768])
@pytest.mark.parametrize("mean", [0, 3], ids=["around 0", "around 3"])
def test_layer_norm(ops: Ops[Any, Any], rng: np.random.Generator, size: int, mean: float) -> None:
    x, gain, bias = normal(rng, 5, 2, size) + np.float32(mean), normal(rng, size), normal(rng, size)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * gain + bias
    y = ops.numpy(ops.layer_norm(ops.array(x), ops.vector(gain), ops.vector(bias), 1e-6))
    assert nmse(expected, y) <= SUMS


@pytest.mark.parametrize("exact", [True, False], ids=["erf", "tanh"])
def test_gelu(ops: Ops[Any, Any], rng: np.random.Generator, exact: bool) -> None:
    x = np.concatenate([normal(rng, 4000) * 3, np.linspace(-12, 12, 2401, dtype=np.float32)]).reshape(1, -1)
    wide = x.astype(np.float64)
    inner = np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
    share = np.vectorize(math.erf)(wide / np.sqrt(2)) if exact else np.tanh(inner)
    y = ops.numpy(ops.gelu(ops.array(x), exact))
    assert nmse(wide / 2 * (1 + share), y) <= POINTWISE
    assert np.abs(wide / 2 * (1 + share) - y).max() <= 2e-6  # the tail, too; the other GELU is 5e-4 off


# --- attention -------------------------------------------------------------------------------------------------------

ROPES = {
    "real": RopeConfig(1e7, 64, (11, 11, 10)),
    "tiny": RopeConfig(1e7, 16, (3, 3, 2)),
    "yarn": RopeConfig(1e7, 64, (11, 11, 10), Yarn(4.0, 262144, 1.25)),
    "linear": RopeConfig(1e4, 16, (3, 3, 2), Linear(3.0)),
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_rope(ops: Ops[Any, Any], rng: np.random.Generator, rope: RopeConfig) -> None:
    T, pairs = 9, rope.dim // 2
    positions = rng.integers(0, 262144, (3, T)).astype(np.int32)
    x = normal(rng, T, 3, rope.dim + 32)
    expected = x.astype(np.float64)
    for t in range(T):
        for i in range(pairs):
            axis = i % 3 if i < 3 * rope.sections[i % 3] else 0
            # the angle itself is float32, as in the reference
            angle = np.float32(positions[axis, t]) * rotary.frequencies(rope)[i]
            first, second = x[t, :, i].astype(np.float64), x[t, :, i + pairs].astype(np.float64)
            cos, sin = (rope.attention_factor * f(float(angle)) for f in (np.cos, np.sin))
            expected[t, :, i], expected[t, :, i + pairs] = first * cos - second * sin, second * cos + first * sin
    y = ops.numpy(ops.rope(ops.array(x), ops.rope_angles(ops.array(positions), rope)))
    assert nmse(expected, y) <= POINTWISE
    assert np.array_equal(y[:, :, rope.dim :], x[:, :, rope.dim :])


def slow_attention(q: Array, k: Array, v: Array, past: int) -> Array:
    """q [T, Hq, D] at positions past...; k, v [past + T, Hkv, D]; float64, one query at a time."""
    out = np.zeros(q.shape)
    k, v = k.astype(np.float64), v.astype(np.float64)
    share = q.shape[1] // k.shape[1]
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            scores = k[: past + t + 1, h // share] @ q[t, h] / np.sqrt(q.shape[2])
            weights = np.exp(scores - scores.max())
            out[t, h] = weights @ v[: past + t + 1, h // share] / weights.sum()
    return out


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("past", [0, 1, 255, 256, 300])
def test_attention(ops: Ops[Any, Any], rng: np.random.Generator, T: int, past: int) -> None:
    for heads, kv_heads, dim in ((4, 2, 64), (3, 3, 40), (8, 2, 256)) if T < 64 else ((4, 1, 64),):
        q = 2 * normal(rng, T, heads, dim)
        k, v = (normal(rng, past + T, kv_heads, dim) for _ in "kv")
        cache = ops.kv_cache(k[:past], v[:past])
        out, longer = ops.attention(ops.array(q), ops.array(k[past:]), ops.array(v[past:]), cache)
        assert (cache.length, longer.length) == (past, past + T)
        assert nmse(slow_attention(q, k, v, past), ops.numpy(out)) <= bound(ops, "attention")
        keys, values = map(ops.numpy, longer.arrays())
        assert nmse(k, keys) <= bound(ops, "kv")
        assert nmse(v, values) <= bound(ops, "kv")


@pytest.mark.parametrize("scale", [30.0, 1e-3])
def test_attention_with_large_and_small_scores(ops: Ops[Any, Any], rng: np.random.Generator, scale: float) -> None:
    q, k, v = scale * normal(rng, 70, 2, 64), normal(rng, 70, 2, 64), normal(rng, 70, 2, 64)
    k, v = to_float32(from_float32(k)).astype(np.float16), v.astype(np.float16)  # so that no backend rounds them
    empty = ops.kv_cache(np.zeros((0, 2, 64), np.float32), np.zeros((0, 2, 64), np.float32))
    out, _ = ops.attention(ops.array(q), ops.array(to_float32(k)), ops.array(to_float32(v)), empty)
    assert nmse(slow_attention(q, k, v, 0), ops.numpy(out)) <= 100 * SUMS  # scores near 300 lose 8 bits


def test_attention_caches_are_values(ops: Ops[Any, Any], rng: np.random.Generator) -> None:
    """Branch, roll back and go on: every cache keeps answering as if it were alone."""
    k, v, q = normal(rng, 300, 2, 64), normal(rng, 300, 2, 64), normal(rng, 7, 4, 64)

    def grow(cache: Any, rows: slice) -> Any:
        T = rows.stop - rows.start
        return ops.attention(ops.array(q[:T]), ops.array(k[rows]), ops.array(v[rows]), cache)[1]

    def held(cache: Any) -> Array:
        return np.stack([ops.numpy(x) for x in cache.arrays()])

    root = ops.kv_cache(k[:250], v[:250])
    before = held(root)
    one = grow(root, slice(250, 255))
    one_held = held(one)
    two = grow(root, slice(260, 267))  # the other branch, over a page's end
    back = one.truncated(252)
    three = grow(back, slice(280, 287))
    assert np.array_equal(held(root), before)
    assert np.array_equal(held(one), one_held)
    for cache, rows in ((two, [*range(250), *range(260, 267)]), (three, [*range(252), *range(280, 287)])):
        assert nmse(np.stack([k[rows], v[rows]]), held(cache)) <= bound(ops, "kv")
        assert cache.length == len(rows)
        assert cache.nbytes > 0


@pytest.mark.parametrize("lengths", [(1,), (65,), (2, 1, 70)], ids=str)
@pytest.mark.parametrize("dim", [16, 64, 72])
def test_full_attention(ops: Ops[Any, Any], rng: np.random.Generator, lengths: tuple[int, ...], dim: int) -> None:
    q, k, v = (normal(rng, sum(lengths), 3, dim) for _ in range(3))
    y = ops.numpy(ops.full_attention(ops.array(q), ops.array(k), ops.array(v), lengths))
    expected = np.zeros(q.shape)
    for span in layers.spans(lengths):
        for t in range(span.start, span.stop):
            for h in range(3):
                weights = np.exp(k[span, h].astype(np.float64) @ q[t, h] * dim**-0.5)
                expected[t, h] = weights @ v[span, h] / weights.sum()
    assert nmse(expected, y) <= bound(ops, "full attention")


# --- DeltaNet --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("channels", [1, 33, 96])
def test_causal_conv_silu(ops: Ops[Any, Any], rng: np.random.Generator, T: int, channels: int) -> None:
    x, w, tail = normal(rng, T, channels), normal(rng, channels, 4), normal(rng, 3, channels)
    inputs = np.concatenate([tail, x])
    expected = np.zeros((T, channels))
    for t in range(T):
        for i in range(4):
            expected[t] += inputs[t + i].astype(np.float64) * w[:, i]
    expected *= sigmoid(expected)
    for keep in {0, min(T, 3), min(T, 5)}:
        y, tails = ops.causal_conv_silu(ops.array(x), ops.vector(w), ops.array(tail), keep)
        assert nmse(expected, ops.numpy(y)) <= SUMS
        assert len(tails) == keep + 1
        for i, after in enumerate(tails):
            assert np.array_equal(ops.numpy(after), inputs[T - keep + i :][:3])


class DeltaInputs:
    """Inputs of the delta rule: unit-length queries and keys, decays from none to total."""

    def __init__(self, rng: np.random.Generator, T: int, key_heads: int, value_heads: int, K: int, V: int) -> None:
        q, k = normal(rng, T, key_heads, K), normal(rng, T, key_heads, K)
        self.q, self.k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
        self.v = normal(rng, T, value_heads, V)
        self.g = -np.exp(2 * normal(rng, T, value_heads) - 2)
        self.g[T // 2, 0] = -120.0  # forgets all: exp underflows
        self.beta = sigmoid(normal(rng, T, value_heads)).astype(np.float32)
        self.state = normal(rng, value_heads, V, K)

    def run(self, ops: Ops[Any, Any], keep: int = 0, rows: slice = slice(None), state: Any = None) -> Any:
        tokens = (self.q, self.k, self.v, self.g, self.beta)
        q, k, v, g, beta = (ops.array(np.ascontiguousarray(x[rows])) for x in tokens)
        return ops.delta_rule(q, k, v, g, beta, ops.array(self.state) if state is None else state, keep)

    def slow(self) -> tuple[Array, list[Array]]:
        """Outputs [T, Hv, V] and the state after each token, in float64."""
        state, outputs, states = self.state.astype(np.float64), np.zeros(self.v.shape), []
        share = self.v.shape[1] // self.q.shape[1]
        for t in range(len(self.q)):
            for h in range(self.v.shape[1]):
                q, k = self.q[t, h // share].astype(np.float64), self.k[t, h // share].astype(np.float64)
                decayed = state[h] * np.exp(np.float64(self.g[t, h]))
                d = self.beta[t, h] * (self.v[t, h] - decayed @ k)
                state[h] = decayed + np.outer(d, k)
                outputs[t, h] = state[h] @ q / np.sqrt(len(q))
            states.append(state.copy())
        return outputs, states


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_delta_rule(ops: Ops[Any, Any], rng: np.random.Generator, T: int, ratio: int) -> None:
    for K, V in ((32, 32), (128, 128), (40, 24), (7, 5)) if T < 65 else ((32, 32), (128, 16)):
        inputs = DeltaInputs(rng, T, 2, 2 * ratio, K, V)
        expected, after = inputs.slow()
        for keep in {0, 1, min(T, 4)}:
            o, states = inputs.run(ops, keep)
            assert nmse(expected, ops.numpy(o)) <= RECURRENT
            assert len(states) == keep + 1
            for i, state in enumerate(states):
                steps = T - keep + i
                assert nmse(after[steps - 1] if steps else inputs.state, ops.numpy(state)) <= RECURRENT


def test_delta_states_are_values(ops: Ops[Any, Any], rng: np.random.Generator) -> None:
    """Run in pieces, branch from an old state, and find every earlier state as it was."""
    inputs = DeltaInputs(rng, 70, 2, 4, 32, 32)
    expected, after = inputs.slow()
    _, (first,) = inputs.run(ops, 0, slice(0, 40))
    held = ops.numpy(first).copy()
    inputs.run(ops, 3, slice(3, 33), first)  # a branch that is thrown away
    _, (middle,) = inputs.run(ops, 0, slice(40, 41), first)
    o, states = inputs.run(ops, 2, slice(41, 70), middle)
    assert np.array_equal(ops.numpy(first), held)
    assert nmse(expected[41:], ops.numpy(o)) <= RECURRENT
    for state, steps in zip(states, (68, 69, 70), strict=True):
        assert nmse(after[steps - 1], ops.numpy(state)) <= RECURRENT


# --- larger pieces ---------------------------------------------------------------------------------------------------


def config(ratio: int) -> TextConfig:
    return TextConfig(
        vocab_size=64, hidden_size=128, intermediate_size=192, layer_types=("linear_attention", "full_attention"),
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, linear_num_key_heads=2,
        linear_num_value_heads=2 * ratio, linear_key_head_dim=32, linear_value_head_dim=32,
        linear_conv_kernel_dim=4, rms_norm_eps=1e-6, rope=ROPES["tiny"], max_position_embeddings=4096,
        tie_word_embeddings=True, mtp_num_hidden_layers=0, eos_token_ids=(0,),
    )  # fmt: skip


def matrix(ops: Ops[Any, Any], rng: np.random.Generator, out: int, width: int, bits: int | None) -> Any:
    if bits is None:
        return ops.matrix(from_float32(np.float32(0.1) * normal(rng, out, width)))
    return ops.matrix(quantized(rng, out, width, bits, 32, np.uint16))


BITS = pytest.mark.parametrize("bits", [4, None], ids=["int4", "bf16"])
PROMPTS = pytest.mark.parametrize("lengths", [(1,), (65,), (1, 1, 1), (5, 1, 70)], ids=str)


@BITS
@pytest.mark.parametrize("T", LENGTHS)
def test_mlp(ops: Ops[Any, Any], rng: np.random.Generator, T: int, bits: int | None) -> None:
    w = MLPWeights(*(matrix(ops, rng, *shape, bits) for shape in ((192, 128), (192, 128), (128, 192))))
    x = ops.array(normal(rng, T, 128))
    assert nmse(ops.numpy(layers.mlp(ops, x, w)), ops.numpy(ops.mlp(x, w))) <= bound(ops, "composite")


@BITS
@PROMPTS
@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_delta_net(
    ops: Ops[Any, Any], rng: np.random.Generator, lengths: tuple[int, ...], ratio: int, bits: int | None
) -> None:
    c = config(ratio)
    w = DeltaNetWeights(
        in_proj_qkv=matrix(ops, rng, c.conv_dim, 128, bits), in_proj_z=matrix(ops, rng, c.value_dim, 128, bits),
        in_proj_b=matrix(ops, rng, 2 * ratio, 128, None), in_proj_a=matrix(ops, rng, 2 * ratio, 128, None),
        conv=ops.vector(normal(rng, c.conv_dim, 4)), decay=ops.vector(-np.exp(normal(rng, 2 * ratio))),
        dt_bias=ops.vector(normal(rng, 2 * ratio)), norm=ops.vector(normal(rng, 32)),
        out_proj=matrix(ops, rng, 128, c.value_dim, bits),
    )  # fmt: skip
    states = [
        DeltaState(ops.array(normal(rng, 3, c.conv_dim)), ops.array(normal(rng, 2 * ratio, 32, 32))) for _ in lengths
    ]
    held = [[ops.numpy(x).copy() for x in state] for state in states]
    x = ops.array(normal(rng, sum(lengths), 128))
    for keep in {0, 1, min(4, *lengths)} if len(lengths) > 1 else {0, 1}:
        y, after = ops.delta_net(x, w, c, states, lengths, [keep] * len(lengths))
        y_default, after_default = layers.delta_net(ops, x, w, c, states, lengths, [keep] * len(lengths))
        assert nmse(ops.numpy(y_default), ops.numpy(y)) <= bound(ops, "composite")
        for kept, kept_default in zip(after, after_default, strict=True):
            assert len(kept) == keep + 1
            for state, state_default in zip(kept, kept_default, strict=True):
                for part, part_default in zip(state, state_default, strict=True):
                    assert nmse(ops.numpy(part_default), ops.numpy(part)) <= bound(ops, "composite")
    for state, arrays in zip(states, held, strict=True):
        assert all(np.array_equal(ops.numpy(x), old) for x, old in zip(state, arrays, strict=True))


@BITS
@PROMPTS
def test_gated_attention(
    ops: Ops[Any, Any], rng: np.random.Generator, lengths: tuple[int, ...], bits: int | None
) -> None:
    c, T = config(1), sum(lengths)
    w = AttentionWeights(
        q_proj=matrix(ops, rng, 512, 128, bits), k_proj=matrix(ops, rng, 128, 128, bits),
        v_proj=matrix(ops, rng, 128, 128, bits), o_proj=matrix(ops, rng, 128, 256, bits),
        q_norm=ops.vector(normal(rng, 64)), k_norm=ops.vector(normal(rng, 64)),
    )  # fmt: skip
    caches = [ops.kv_cache(normal(rng, past, 2, 64), normal(rng, past, 2, 64)) for past in (0, 250, 7)[: len(lengths)]]
    positions = rng.integers(0, 500, (3, T)).astype(np.int32)
    angles = ops.rope_angles(ops.array(positions), c.rope)
    x = ops.array(normal(rng, T, 128))
    y, longer = ops.gated_attention(x, w, c, angles, caches, lengths)
    y_default, longer_default = layers.gated_attention(ops, x, w, c, angles, caches, lengths)
    assert nmse(ops.numpy(y_default), ops.numpy(y)) <= bound(ops, "composite")
    for cache, default, old, length in zip(longer, longer_default, caches, lengths, strict=True):
        assert cache.length == default.length == old.length + length
        for side, side_default in zip(cache.arrays(), default.arrays(), strict=True):
            assert nmse(ops.numpy(side_default), ops.numpy(side)) <= bound(ops, "composite")


@pytest.mark.parametrize("bits", [8, None], ids=["int8", "bf16"])
@pytest.mark.parametrize("grid", [(1, 2, 2), (1, 10, 14), (3, 4, 6)], ids=str)
def test_vision_blocks(
    ops: Ops[Any, Any], rng: np.random.Generator, grid: tuple[int, int, int], bits: int | None
) -> None:
    c = VisionConfig(
        depth=2, hidden_size=192, intermediate_size=320, num_heads=3, in_channels=3, patch_size=16,
        temporal_patch_size=2, spatial_merge_size=2, num_position_embeddings=64, out_hidden_size=64,
    )  # fmt: skip

    def affine(out: int, width: int) -> Affine[Any, Any]:
        return Affine(matrix(ops, rng, out, width, bits), ops.vector(normal(rng, out)))

    def norm() -> Affine[Any, Any]:
        return Affine(ops.vector(normal(rng, 192)), ops.vector(normal(rng, 192)))

    ws = [
        VisionBlockWeights(norm(), norm(), affine(576, 192), affine(192, 192), affine(320, 192), affine(192, 320))
        for _ in range(2)
    ]
    frames, height, width = grid
    x, lengths = ops.array(normal(rng, math.prod(grid), 192)), [height * width] * frames
    angles = vision.vision_angles(ops, c, grid)
    y = ops.numpy(ops.vision_blocks(x, ws, c, angles, lengths))
    assert nmse(ops.numpy(vision.vision_blocks(ops, x, ws, c, angles, lengths)), y) <= bound(ops, "vision blocks")
