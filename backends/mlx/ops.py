"""The operations of the seam on MLX.

MLX is lazy: these functions build a graph, `start` sets it going without waiting, and only `numpy` waits. On a GPU,
small steps (decoding, and the verification of a few drafted tokens) go through `mx.compile`: Python walks through a
layer's operations once and not for every token, and MLX makes one kernel of neighbouring pointwise operations.

**Types.** Activations have the type that `embed` gave them, and every operation answers in the type of its input;
inside, norms, softmax, exponentials and everything of the delta rule are float32. Matrices are used as they are stored:
16-bit activations are rounded to the matrix's own type for a product, float32 ones widen the scales instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import cache, partial
from importlib.metadata import version
from itertools import count
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, cast

import mlx.core as mx
import numpy as np

from edgeq.backends.base import BaseOps
from edgeq.backends.mlx.delta import cpu_streams, delta_metal, delta_products
from edgeq.backends.mlx.kv import Buffer, BufferedKV, StepKV, capacity_for
from edgeq.backends.mlx.memory import limit_memory, used_memory
from edgeq.backends.ops import Angles
from edgeq.config import RopeConfig, TextConfig, VisionConfig
from edgeq.errors import UsageError
from edgeq.formats.affine import mlx_layout
from edgeq.formats.bf16 import Array, Float32
from edgeq.model import layers, rotary, vision
from edgeq.state import BLOCK, DeltaState, KVCache, State
from edgeq.weights import AttentionWeights, DeltaNetWeights, Matrix, MLPWeights, QMatrix, VisionBlockWeights

__all__ = ["Dtype", "MlxOps", "MlxQMatrix"]

Dtype = Literal["float32", "float16", "bfloat16"]
F = TypeVar("F", bound=Callable[..., Any])


class MlxQMatrix(NamedTuple):
    """A quantized matrix as `mx.quantized_matmul` takes it: a scale for every group, and a bias in mode affine."""

    codes: mx.array
    scales: mx.array
    biases: mx.array | None
    bits: int
    group_size: int
    mode: str = "affine"

    def map(self, convert: Callable[[mx.array], mx.array]) -> MlxQMatrix:
        """`convert` applied to every array."""
        biases = None if self.biases is None else convert(self.biases)
        return self._replace(codes=convert(self.codes), scales=convert(self.scales), biases=biases)


MlxMatrix: TypeAlias = mx.array | MlxQMatrix

_STEP = 8  # tokens of a call that goes through mx.compile; longer ones would be traced for every length
_SCORES = 1 << 24  # attention scores at a time: 64 MB, where MLX has no fused kernel and spells them out
_NUMBERS = count()  # of compiled functions


class MlxOps(BaseOps[mx.array, MlxMatrix]):
    """MLX on its default device.

    `dtype` is the type of activations and of the KV cache. On a GPU it is bfloat16 unless said otherwise: the type the
    model was trained in, with float32's range, at half the traffic. (float16 is faster on an M1 or M2, which have no
    bfloat16 arithmetic, but nothing promises that activations stay below 65504.) On a CPU it is float32, which is what
    MLX multiplies fastest there, and exact.

    `compiled` says whether `mx.compile` is used: on a GPU, yes. On a CPU MLX runs the C++ compiler for every kernel it
    fuses, about a second each at the first use, where fusing saves next to nothing.

    `kv_dtype` may be "f16": keys and values are kept in the type of the activations, and in nothing smaller.
    """

    name = "mlx"
    few = None
    maps_files = False
    keeps_ceiling = False  # its limit is a guideline

    def __init__(self, dtype: Dtype | None = None, compiled: bool | None = None, kv_dtype: str | None = None) -> None:
        if kv_dtype not in (None, "f16"):
            raise UsageError(
                f"the mlx backend has no {kv_dtype} KV cache",
                hint="leave the KV bits to the backend, or use the cpu backend",
            )
        self._on_cpu = on_cpu = _on_cpu()
        name = dtype or ("float32" if on_cpu else "bfloat16")
        self.dtype: mx.Dtype = getattr(mx, name)
        self.kv_dtype = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[name]
        self._compiled = not on_cpu if compiled is None else compiled
        self._pieces: dict[Hashable, Callable[..., Any]] = {}  # compiled ones
        self._chunk = 16 if on_cpu else 64  # of the delta rule: few operations on a CPU, few steps on a GPU
        self._streams = cpu_streams() if on_cpu else ()
        self._metal = mx.metal.is_available() and not on_cpu
        self._weighted_silu, self._silu_mul = self._fused(_weighted_silu), self._fused(_silu_mul)
        self._sigmoid_mul, self._delta_gates = self._fused(_sigmoid_mul), self._fused(_delta_gates)
        self._gelu, self._gelu_tanh = self._fused(_gelu), self._fused(_gelu_tanh)

    @classmethod
    def describe(cls) -> str:
        device = "CPU" if _on_cpu() else "Metal" if mx.metal.is_available() else "CUDA"
        return f"MLX {version('mlx')}, {device} ({mx.device_info().get('device_name', 'unknown device')})"

    def limit_memory(self, nbytes: int | None = None) -> None:
        limit_memory(nbytes)

    def kv_nbytes(self, c: TextConfig, tokens: int) -> int:
        entries = 2 * c.num_key_value_heads * c.head_dim * c.layer_types.count("full_attention")
        return entries * capacity_for(tokens) * self.dtype.size

    def held(self) -> Mapping[str, int]:
        return {"MLX, weights included": used_memory().active}

    def peak_memory(self) -> int:
        return used_memory().peak

    # --- the edge ----------------------------------------------------------------------------------------------------

    def matrix(self, w: Matrix[Array]) -> MlxMatrix:
        if not isinstance(w, QMatrix):
            return _loaded(w)
        w = mlx_layout(w)
        codes, scales, *biases = map(_loaded, w.arrays)
        return MlxQMatrix(codes, scales, biases[0] if biases else None, w.bits, w.group_size, w.mode)

    def vector(self, x: Float32) -> mx.array:
        return _loaded(x)

    def array(self, x: Array) -> mx.array:
        return mx.array(x)

    def activations(self, x: Float32) -> mx.array:
        return mx.array(x).astype(self.dtype)

    def numpy(self, x: mx.array) -> Float32:
        return np.array(x.astype(mx.float32))

    def zeros(self, *shape: int) -> mx.array:
        return mx.array(np.zeros(shape, np.float32))

    def kv_cache(self, keys: Float32, values: Float32) -> BufferedKV:
        _, heads, dim = keys.shape
        room = (heads, capacity_for(1), dim)
        buffer = Buffer(mx.zeros(room, self.dtype), mx.zeros(room, self.dtype))
        cache = BufferedKV(buffer, 0).appended(mx.array(keys), mx.array(values))
        mx.eval(cache.buffer.keys, cache.buffer.values)
        return cache

    def stored_cache(
        self, blocks: Sequence[Array], length: int, heads: int, dim: int, base: KVCache[mx.array] | None = None
    ) -> BufferedKV:
        before = [base.buffer.keys, base.buffer.values] if isinstance(base, BufferedKV) else None
        held, capacity = (-(-length // BLOCK) - len(blocks)) * BLOCK, capacity_for(length)
        sides = list[mx.array]()
        for i in range(2):
            side = mx.zeros((heads, capacity, dim), self.dtype)
            if before and held:
                side[:, :held] = before[i][:, :held]
            for n, block in enumerate(blocks):
                start, stop = held + n * BLOCK, min(length, held + (n + 1) * BLOCK)
                rows = mx.array(np.ascontiguousarray(block[i, :, : stop - start]))
                side[:, start:stop] = rows.view(self.dtype) if rows.dtype == mx.uint16 else rows
            mx.eval(side)
            sides.append(side)
        buffer = Buffer(*sides)
        if isinstance(base, BufferedKV):
            buffer.marks = base.buffer.marks[: held // BLOCK]
        buffer.write(held, length)
        return BufferedKV(buffer, length)

    def block_like(self, heads: int, dim: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
        kept = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}[self.kv_dtype]
        return (2, heads, BLOCK, dim), np.dtype(kept)

    def concat(self, xs: Sequence[mx.array], axis: int = 0) -> mx.array:
        return xs[0] if len(xs) == 1 else mx.concatenate(list(xs), axis=axis)

    def start(self, hidden: mx.array, states: Sequence[State[mx.array]]) -> None:
        mx.async_eval(hidden, list(_arrays(states)))  # type: ignore[no-untyped-call]

    # --- matrices ----------------------------------------------------------------------------------------------------

    def embed(self, table: MlxMatrix, ids: mx.array) -> mx.array:
        if isinstance(table, MlxQMatrix):
            return _dequantize(table.map(lambda x: x[ids])).astype(self.dtype)
        return table[ids].astype(self.dtype)

    def linear(self, x: mx.array, w: MlxMatrix) -> mx.array:
        if isinstance(w, MlxQMatrix):
            # A CPU's 16-bit products sum in 16 bits.
            y = _quantized_product(x.astype(mx.float32) if self._on_cpu else _as_stored(x, w.scales), w)
        else:
            y = _as_stored(x, w) @ w.T
        return y.astype(x.dtype)

    def affine(self, x: mx.array, w: MlxMatrix, bias: mx.array) -> mx.array:
        return self.linear(x, w) + bias.astype(x.dtype)

    def embedding_bag(self, table: MlxMatrix, ids: Array, weights: Float32) -> mx.array:
        rows = self.embed(table, mx.array(ids.reshape(-1))).reshape(*ids.shape, -1)
        return (rows * mx.array(weights)[..., None]).sum(axis=1)

    def rows(self, w: MlxMatrix, rows: slice | Array) -> MlxMatrix:
        at = rows if isinstance(rows, slice) else mx.array(rows)
        if isinstance(w, MlxQMatrix):
            return w.map(lambda x: x[at])
        return w[at]

    # --- norms and pointwise -----------------------------------------------------------------------------------------

    def layer_norm(self, x: mx.array, gain: mx.array, bias: mx.array, eps: float) -> mx.array:
        return mx.fast.layer_norm(x, gain.astype(x.dtype), bias.astype(x.dtype), eps)

    def gelu(self, x: mx.array, exact: bool) -> mx.array:
        return self._gelu(x) if exact else self._gelu_tanh(x)

    def rms_norm(self, x: mx.array, gain: mx.array, eps: float) -> mx.array:
        return mx.fast.rms_norm(x, gain.astype(x.dtype), eps)

    def gated_rms_norm(self, x: mx.array, gain: mx.array, z: mx.array, eps: float) -> mx.array:
        return self._silu_mul(z, self.rms_norm(x, gain, eps))

    def l2_norm(self, x: mx.array, eps: float) -> mx.array:
        n = x.shape[-1]
        return mx.fast.rms_norm(x, None, eps / n) * float(n**-0.5)  # sum(x^2) + eps = n (mean(x^2) + eps / n)

    def add(self, x: mx.array, y: mx.array) -> mx.array:
        return x + y

    def silu_mul(self, gate: mx.array, up: mx.array) -> mx.array:
        return self._silu_mul(gate, up)

    def sigmoid_mul(self, x: mx.array, gate: mx.array) -> mx.array:
        return self._sigmoid_mul(x, gate)

    def delta_gates(self, a: mx.array, b: mx.array, A: mx.array, dt_bias: mx.array) -> tuple[mx.array, mx.array]:
        return self._delta_gates(a, b, A, dt_bias)

    # --- attention ---------------------------------------------------------------------------------------------------

    def rope_angles(self, positions: mx.array, rope: RopeConfig) -> Angles[mx.array]:
        frequencies, axes = _rope_tables(rope)
        angles = positions.astype(mx.float32)[axes].T * frequencies  # [T, pairs]
        cos, sin, factor = mx.cos(angles), mx.sin(angles), rope.attention_factor
        return (cos, sin) if factor == 1 else (cos * factor, sin * factor)

    def rope(self, x: mx.array, angles: Angles[mx.array]) -> mx.array:
        # mx.fast.rope turns by one position for each token; mRoPE has three
        cos, sin = (a[:, None, :] for a in angles)
        pairs = cos.shape[-1]
        first, second, rest = mx.split(x, [pairs, 2 * pairs], axis=-1)
        turned = [first * cos - second * sin, second * cos + first * sin]  # float32, as the angles are
        return mx.concatenate([*(y.astype(x.dtype) for y in turned), rest], axis=-1)

    def attention(
        self, q: mx.array, k: mx.array, v: mx.array, cache: KVCache[mx.array]
    ) -> tuple[mx.array, KVCache[mx.array]]:
        scale = q.shape[-1] ** -0.5
        queries = q.swapaxes(0, 1)[None]  # [1, Hq, T, D]
        if isinstance(cache, StepKV):
            after = cache.appended(k, v)
            last = cache.end + mx.arange(q.shape[0])  # [T], what each token sees last
            mask = mx.arange(after.keys.shape[1]) <= last[:, None]
            o = mx.fast.scaled_dot_product_attention(
                queries, after.keys[None], after.values[None], scale=scale, mask=mask
            )
            return o[0].swapaxes(0, 1).astype(q.dtype), after
        assert isinstance(cache, BufferedKV)
        longer = cache.appended(k, v)
        keys, values = longer.buffer.keys[None], longer.buffer.values[None]  # [1, Hkv, capacity, D]
        outputs = []
        for rows in _row_blocks(q.shape[0], _SCORES // (q.shape[1] * longer.length)):
            end = cache.length + rows.stop
            o = mx.fast.scaled_dot_product_attention(
                queries[:, :, rows], keys[:, :, :end], values[:, :, :end], scale=scale, mask="causal"
            )
            outputs.append(o[0].swapaxes(0, 1))
        return self.concat(outputs).astype(q.dtype), longer

    def full_attention(self, q: mx.array, k: mx.array, v: mx.array, lengths: Sequence[int]) -> mx.array:
        scale, outputs = q.shape[-1] ** -0.5, []
        for span in layers.spans(lengths):
            queries, keys, values = (x[span].swapaxes(0, 1)[None] for x in (q, k, v))  # [1, H, T, D]
            heads, tokens = queries.shape[1:3]
            for rows in _row_blocks(tokens, _SCORES // (heads * tokens)):
                o = mx.fast.scaled_dot_product_attention(queries[:, :, rows], keys, values, scale=scale)
                outputs.append(o[0].swapaxes(0, 1))
        return self.concat(outputs)

    def append(self, k: mx.array, v: mx.array, cache: KVCache[mx.array]) -> KVCache[mx.array]:
        assert isinstance(cache, BufferedKV)
        return cache.appended(k, v)

    # --- DeltaNet ----------------------------------------------------------------------------------------------------

    def causal_conv_silu(
        self, x: mx.array, w: mx.array, tail: mx.array, keep: int = 0
    ) -> tuple[mx.array, tuple[mx.array, ...]]:
        T, width = x.shape[0], w.shape[1]
        inputs = mx.concatenate([tail.astype(x.dtype), x])
        y = self._weighted_silu([inputs[i : i + T] for i in range(width)], [w[:, i] for i in range(width)])
        # a tail must not keep all of `inputs` alive, as a view of it would
        tails = tuple(mx.contiguous(inputs[n : n + width - 1]) for n in range(T - keep, T + 1))
        return y, tails

    def delta_rule(
        self, q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array, keep: int = 0
    ) -> tuple[mx.array, tuple[mx.array, ...]]:
        if self._metal:
            o, states = delta_metal(q, k, v, g, beta, state, keep)
        else:
            o, states = delta_products(q, k, v, g, beta, state, keep, self._chunk, self._streams)
        return o.astype(v.dtype), states

    # --- larger pieces, compiled where they are small ----------------------------------------------------------------

    def mlp(self, x: mx.array, w: MLPWeights[MlxMatrix]) -> mx.array:
        if not self._compiles(x):
            return layers.mlp(self, x, w)
        y: mx.array = self._piece(("mlp",), lambda x, w: layers.mlp(self, x, w))(x, w)
        return y

    def delta_net(
        self, x: mx.array, w: DeltaNetWeights[mx.array, MlxMatrix], c: TextConfig,
        states: Sequence[DeltaState[mx.array]], lengths: Sequence[int], keep: Sequence[int],
    ) -> tuple[mx.array, list[tuple[DeltaState[mx.array], ...]]]:  # fmt: skip
        if not self._compiles(x):
            return layers.delta_net(self, x, w, c, states, lengths, keep)
        piece = self._piece(
            ("delta_net", id(c), tuple(lengths), tuple(keep)),
            lambda x, w, states: layers.delta_net(self, x, w, c, states, lengths, keep),
        )
        y, after = piece(x, w, list(states))
        return y, after

    def gated_attention(
        self, x: mx.array, w: AttentionWeights[mx.array, MlxMatrix], c: TextConfig, angles: Angles[mx.array],
        caches: Sequence[KVCache[mx.array]], lengths: Sequence[int],
    ) -> tuple[mx.array, list[KVCache[mx.array]]]:  # fmt: skip
        if not self._compiles(x) or len(caches) > 1:  # several would be traced for every mixture of capacities
            return layers.gated_attention(self, x, w, c, angles, caches, lengths)

        def on_buffer(
            x: mx.array, w: AttentionWeights[mx.array, MlxMatrix], angles: Angles[mx.array], *held: mx.array
        ) -> tuple[mx.array, mx.array, mx.array]:
            y, (kv,) = layers.gated_attention(self, x, w, c, angles, [StepKV(*held)], lengths)
            assert isinstance(kv, StepKV)
            return y, kv.keys, kv.values

        (cache,) = caches
        assert isinstance(cache, BufferedKV)
        longer = cache.extended(x.shape[0])
        held = (longer.buffer.keys, longer.buffer.values, mx.array([cache.length]))
        piece = self._piece(("gated_attention", id(c), tuple(lengths)), on_buffer)
        y, longer.buffer.keys, longer.buffer.values = piece(x, w, angles, *held)
        return y, [longer]

    def vision_blocks(
        self, x: mx.array, ws: Sequence[VisionBlockWeights[mx.array, MlxMatrix]], c: VisionConfig,
        angles: Angles[mx.array], lengths: Sequence[int],
    ) -> mx.array:  # fmt: skip
        """In the type of activations, which patches, numbers from outside, do not have yet."""
        return vision.vision_blocks(self, x.astype(self.dtype), ws, c, angles, lengths)

    def _fused(self, f: F) -> F:
        """A pointwise function as one kernel, for all shapes at once."""
        return cast(F, mx.compile(f, shapeless=True)) if self._compiled else f

    def _compiles(self, x: mx.array) -> bool:
        return self._compiled and x.shape[0] <= _STEP

    def _piece(self, key: Hashable, f: Callable[..., Any]) -> Callable[..., Any]:
        """`f`, compiled when it is first asked for. MLX traces it once for every shape.

        The weights are inputs like any other, so that one trace serves all layers. `key` names everything else that
        `f` depends on; a configuration goes by its id, which stays its own as long as `f` refers to it.
        """
        if key not in self._pieces:
            # MLX knows a function by its address. Where one that several threads have called is gone, the next at its
            # address would get its traces, had not each a number of its own among its inputs.
            self._pieces[key] = partial(mx.compile(lambda _, *inputs: f(*inputs)), next(_NUMBERS))
        return self._pieces[key]


def _loaded(x: Array) -> mx.array:
    y = mx.array(x).view(mx.bfloat16) if x.dtype == np.uint16 else mx.array(x)
    mx.eval(y)  # what is still to be computed belongs to the thread that asked for it
    return y


def _on_cpu() -> bool:
    return mx.default_device() == mx.Device(mx.cpu)


# --- pointwise, float32 inside ----------------------------------------------------------------------------------------


def _weighted_silu(xs: list[mx.array], weights: list[mx.array]) -> mx.array:
    y = xs[0] * weights[0]
    for x, w in zip(xs[1:], weights[1:], strict=True):
        y = y + x * w
    return (y * mx.sigmoid(y)).astype(xs[0].dtype)


def _silu_mul(gate: mx.array, up: mx.array) -> mx.array:
    wide = gate.astype(mx.float32)
    return (wide * mx.sigmoid(wide) * up).astype(up.dtype)


def _sigmoid_mul(x: mx.array, gate: mx.array) -> mx.array:
    return (x * mx.sigmoid(gate.astype(mx.float32))).astype(x.dtype)


def _gelu(x: mx.array) -> mx.array:
    wide = x.astype(mx.float32)
    return (wide * 0.5 * (1 + mx.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def _gelu_tanh(x: mx.array) -> mx.array:
    wide = x.astype(mx.float32)
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    return (wide * 0.5 * (1 + mx.tanh(inner))).astype(x.dtype)


def _delta_gates(a: mx.array, b: mx.array, A: mx.array, dt_bias: mx.array) -> tuple[mx.array, mx.array]:
    return A * mx.logaddexp(a.astype(mx.float32) + dt_bias, 0), mx.sigmoid(b.astype(mx.float32))


# --- the rest ---------------------------------------------------------------------------------------------------------


@cache
def _rope_tables(rope: RopeConfig) -> tuple[mx.array, mx.array]:
    """The frequency of every pair, and which of time, height and width it follows."""
    return mx.array(rotary.frequencies(rope)), mx.array(rotary.axes(rope).astype(np.int32))


def _as_stored(x: mx.array, weights: mx.array) -> mx.array:
    """Activations in the type of the weights they meet; float32 stays, and the weights are widened. Scales of 8 bits
    meet any type."""
    return x if x.dtype == mx.float32 or weights.dtype == mx.uint8 else x.astype(weights.dtype)


def _quantized_product(x: mx.array, w: MlxQMatrix) -> mx.array:
    if _in_sixteens(w):
        first, second = _halves(w)
        mine = _in_first_half(x.shape[-1])
        return _quantized_product(mx.where(mine, x, 0), first) + _quantized_product(mx.where(mine, 0, x), second)
    return mx.quantized_matmul(
        x, w.codes, w.scales, w.biases, transpose=True, group_size=w.group_size, bits=w.bits, mode=w.mode
    )


def _dequantize(w: MlxQMatrix) -> mx.array:
    """Weights float32 [out, in]."""
    if w.biases is None:
        return mx.dequantize(
            w.codes, w.scales, group_size=w.group_size, bits=w.bits, mode=w.mode, dtype=mx.float32
        )  # fmt: skip
    if _in_sixteens(w):
        first, second = (_dequantize(half) for half in _halves(w))
        return mx.where(_in_first_half(first.shape[-1]), first, second)
    wide = w.scales.astype(mx.float32), w.biases.astype(mx.float32)
    return mx.dequantize(w.codes, *wide, group_size=w.group_size, bits=w.bits)


def _in_sixteens(w: MlxQMatrix) -> bool:
    """MLX has no affine groups of 16, which GGUF's Q2_K, Q3_K and Q6_K have."""
    return w.group_size == 16 and w.biases is not None


def _halves(w: MlxQMatrix) -> list[MlxQMatrix]:
    """Two readings of the same codes in groups of 32, one right in the first half of every group, one in the second."""
    assert w.biases is not None
    return [
        w._replace(scales=w.scales[..., half::2], biases=w.biases[..., half::2], group_size=32) for half in (0, 1)
    ]  # fmt: skip


def _in_first_half(n: int) -> mx.array:
    return mx.arange(n) % 32 < 16


def _row_blocks(T: int, size: int) -> Iterator[slice]:
    """T rows in blocks of `size`, at least 1."""
    size = max(1, size)
    return (slice(start, min(start + size, T)) for start in range(0, T, size))


def _arrays(states: Sequence[State[mx.array]]) -> Iterator[mx.array]:
    """All arrays of some states."""
    for state in states:
        for layer in (*state.layers, state.draft.cache) if state.draft else state.layers:
            if isinstance(layer, BufferedKV):
                yield from (layer.buffer.keys, layer.buffer.values)
            else:
                assert isinstance(layer, DeltaState)
                yield from layer
