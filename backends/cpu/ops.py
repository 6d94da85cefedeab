"""The operations of the seam on native kernels. Arrays are NumPy's; Python only makes room and passes pointers.

What is not here is NumPy's: the gates of the unfused DeltaNet mixer. Everything that a token or a prompt spends time in
is native, and all layers of the model are one native call.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.cpu import _native
from edgeq.backends.cpu.kv import PAGE, NativeKV
from edgeq.backends.numpy import ArrayOps
from edgeq.backends.ops import Angles
from edgeq.config import RopeConfig, TextConfig, VisionConfig
from edgeq.errors import UsageError
from edgeq.formats.bf16 import Array, Float32
from edgeq.formats.mapped import Pages, is_mapped
from edgeq.formats.qmatrix import TwoLevel, UpperHalves
from edgeq.machine.facts import kept_facts
from edgeq.model import rotary
from edgeq.model.layers import kept_caches
from edgeq.model.vision import EPS
from edgeq.numbers import Range
from edgeq.printable import brief
from edgeq.state import DeltaState, KVCache, LayerState
from edgeq.weights import (
    AttentionWeights,
    DeltaNetWeights,
    LayerWeights,
    Matrix,
    MLPWeights,
    QMatrix,
    StreamedLayers,
    TextWeights,
    VisionBlockWeights,
)

__all__ = ["CpuOps"]

FEW = 16  # tokens of a call whose time is that of reading the weights: generation, and the verification of drafts


def plain(x: Array) -> Array:
    """The array as the kernels read it: itself, or a copy of what is misaligned or in pieces."""
    return np.require(x, requirements=("C_CONTIGUOUS", "ALIGNED"))


def like(x: Array) -> Array:
    """Room for a result of x's shape."""
    return np.empty(x.shape, np.float32)


def start_threads() -> None:
    """Start the pool's threads. Where the system gives fewer, the work is done by those, and a warning says so."""
    wanted, found = _native.thread_count(), _native.start_threads()
    if found < wanted:
        warnings.warn(f"the system does not give {wanted} threads: using {found}", RuntimeWarning, stacklevel=4)


def instruction_set() -> str:
    """The instruction set whose kernels run; UsageError if EDGEQ_ISA names none that is here."""
    try:
        name: str = _native.isa()
    except RuntimeError as error:
        raise UsageError(str(error), hint="unset EDGEQ_ISA, or set it to one that is listed") from None
    return name


class ReadyLayers(tuple[LayerWeights[Array, _native.Matrix], ...]):
    """Layers, and beside them what the native decoder takes: weights are looked through once, not for every token."""

    native: _native.Layers


class CpuOps(ArrayOps[_native.Matrix]):
    """The native CPU backend.

    threads: how many the process's pool may use; None: for prompts and for generation apart what was measured here
    (`edgeq.machine`), and else one for every fast core. kv_dtype: "f16", "bf16", "f32", "int8"
    (one scale per token and head) or "int4" (rotated, one scale for 32 entries: 4.5 bits). float16 is the default: as
    small as bfloat16 and eight times as fine, and keys (normalised) and values stay far from its largest number, 65504,
    at which it saturates.
    """

    name = "cpu"
    few, grain = 16, 32

    def __init__(self, threads: int | None = None, kv_dtype: str = "f16") -> None:
        super().__init__(kv_dtype)
        isa = instruction_set()
        self._counts: tuple[int, int] | None = None  # threads of a few tokens, and of many, where they differ
        if threads is not None:
            if not Range(1, 1024, whole=True).holds(threads):
                raise UsageError(f"threads must be 1 to 1024, got {brief(threads)}")
            _native.set_thread_count(threads)
        elif (facts := kept_facts(isa)) is not None:
            _native.set_thread_count(facts.prompt_threads)
            if facts.generation_threads != facts.prompt_threads:
                self._counts = facts.generation_threads, facts.prompt_threads
        start_threads()

    def kv_nbytes(self, c: TextConfig, tokens: int) -> int:
        page: int = _native.Page(self.kv_dtype, c.num_key_value_heads, c.head_dim).nbytes
        return page * -(-tokens // PAGE) * c.layer_types.count("full_attention")

    def scratch_nbytes(self, c: TextConfig, tokens: int) -> int:
        """Between projections (layers/stack.cpp): the widest piece and its input; before and after the layers: hidden
        states; for a projection: its input as 8-bit integers, in groups of 32 at most."""
        delta = c.conv_dim + 2 * c.value_dim + 2 * c.linear_num_value_heads
        attention = 3 * c.attention_dim + 2 * c.kv_dim
        between = max(2 * c.intermediate_size, delta, attention) + c.hidden_size
        widest = max(c.intermediate_size, c.value_dim, c.attention_dim, c.hidden_size)
        quantized = widest + 3 * 4 * widest // 32
        return tokens * (4 * (between + 2 * c.hidden_size) + quantized)

    def vision_scratch_nbytes(self, c: VisionConfig, patches: int) -> int:
        """Hidden states before and after the blocks, and what these work in."""
        work: int = _native.vision_nbytes(patches, c.hidden_size, c.num_heads, c.intermediate_size)
        return 2 * 4 * patches * c.hidden_size + work

    def held(self) -> Mapping[str, int]:
        return dict(zip(("KV cache", "DeltaNet states", "scratch"), _native.memory_held(), strict=True))

    def idle_nbytes(self, c: TextConfig) -> int:
        matrix = 4 * c.linear_num_value_heads * c.linear_value_head_dim * c.linear_key_head_dim
        ready: int = _native.idle_blocks(matrix)
        return matrix * min(ready, c.layer_types.count("linear_attention"))

    def release_idle(self) -> None:
        _native.release_idle_blocks()

    def release_scratch(self) -> None:
        _native.release_scratch()

    @property
    def threads(self) -> int:
        count: int = _native.thread_count()
        return count

    @classmethod
    def describe(cls) -> str:
        return f"{instruction_set()} kernels, {_native.thread_count()} threads"

    def matrix(self, w: Matrix[Array]) -> _native.Matrix:
        """The matrix in the memory of the file; a copy only of what is misaligned or in pieces."""
        if not isinstance(w, QMatrix):
            return _native.Matrix(plain(w))
        w = w.map(plain)
        scales, units = w.scales if isinstance(w.scales, TwoLevel) else (w.scales, None)
        if isinstance(w.biases, int):
            return _native.Matrix(w.codes, scales, None, w.bits, w.group_size, units, None, w.biases, w.mode)
        match w.biases:
            case TwoLevel(biases, bias_units):
                pass
            case UpperHalves(bias_units):
                biases = None
            case biases:
                bias_units = None
        return _native.Matrix(w.codes, scales, biases, w.bits, w.group_size, units, bias_units)

    def vector(self, x: Float32) -> Array:
        return plain(x)

    def ready(self, w: TextWeights[Array, _native.Matrix], c: TextConfig) -> TextWeights[Array, _native.Matrix]:
        layers, rope = ReadyLayers(w.layers[:]), c.rope
        layers.native = _native.Layers(
            layers, c.linear_num_key_heads, c.rms_norm_eps, w.norm, rotary.frequencies(rope), rope.attention_factor,
            rope.sections,
        )  # fmt: skip
        if isinstance(w.layers, StreamedLayers):
            layers.native.call_after_each(w.layers.turns.done)
        return w._replace(layers=layers)

    def array(self, x: Array) -> Array:
        if self.maps_states or not is_mapped(x):
            return x
        copied = x.copy()
        Pages([x]).let_go()
        return copied

    def numpy(self, x: Array) -> Float32:
        return super().numpy(np.asarray(x))  # a state's part is written out

    def kv_cache(self, keys: Float32, values: Float32) -> NativeKV:
        return NativeKV(keys.shape[1], keys.shape[2], self.kv_dtype).appended(keys, values)

    def stored_cache(
        self, blocks: Sequence[Array], length: int, heads: int, dim: int, base: KVCache[Array] | None = None
    ) -> NativeKV:
        pages = list(base.pages[: -(-length // PAGE) - len(blocks)]) if isinstance(base, NativeKV) else []
        for block in blocks:
            page, stays = _native.Page(self.kv_dtype, heads, dim, block), self.maps_states and is_mapped(block)
            pages.append(page if stays else page.copy())
            pages[-1].written = PAGE if stays else min(PAGE, length - (len(pages) - 1) * PAGE)
            if not stays:
                Pages([block]).let_go()
        return NativeKV(heads, dim, self.kv_dtype, tuple(pages), length)

    def block_like(self, heads: int, dim: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
        return _native.Page(self.kv_dtype, heads, dim).data.shape, np.dtype(np.uint8)

    def _share(self, tokens: int) -> None:
        """Use the number of threads that is best for a call with so many tokens: results do not depend on it."""
        if self._counts is not None:
            _native.set_thread_count(self._counts[tokens > FEW])

    # --- matrices ----------------------------------------------------------------------------------------------------

    def embed(self, table: _native.Matrix, ids: Array) -> Array:
        _native.embed(table, ids, out := np.empty((len(ids), table.shape[1]), np.float32))
        return out

    def linear(self, x: Array, w: _native.Matrix) -> Array:
        _native.linear(x, w, y := np.empty((len(x), w.shape[0]), np.float32))
        return y

    def linears(self, x: Array, ws: Sequence[_native.Matrix]) -> tuple[Array, ...]:
        ys = [np.empty((len(x), w.shape[0]), np.float32) for w in ws]
        _native.linears(x, list(ws), ys)
        return tuple(ys)

    def rows(self, w: _native.Matrix, rows: slice | Array) -> _native.Matrix:
        if not w.bits:
            return _native.Matrix(plain(w.arrays[0][rows]))
        parts: Any = (plain(x[rows]) if x is not None else None for x in w.arrays)
        codes, scales, biases, block_scales, block_biases = parts
        return _native.Matrix(
            codes, scales, biases, w.bits, w.group_size, block_scales, block_biases, w.zero, w.mode
        )  # fmt: skip

    def affine(self, x: Array, w: _native.Matrix, bias: Array) -> Array:
        _native.affine(plain(x), w, bias, y := np.empty((len(x), w.shape[0]), np.float32))
        return y

    # --- norms and pointwise -----------------------------------------------------------------------------------------

    def layer_norm(self, x: Array, gain: Array, bias: Array, eps: float) -> Array:
        _native.layer_norm(x, gain, bias, eps, y := like(x))
        return y

    def gelu(self, x: Array, exact: bool) -> Array:
        _native.gelu(x, exact, y := like(x))
        return y

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
        cos, sin = (np.empty((positions.shape[1], rope.dim // 2), np.float32) for _ in range(2))
        _native.rope_angles(positions, rotary.frequencies(rope), rope.attention_factor, rope.sections, cos, sin)
        return cos, sin

    def rope(self, x: Array, angles: Angles[Array]) -> Array:
        _native.rope(x, *angles, y := like(x))
        return y

    def attention(self, q: Array, k: Array, v: Array, cache: KVCache[Array]) -> tuple[Array, KVCache[Array]]:
        longer = _longer(cache, len(q))
        _native.attention(q, k, v, cache.length, longer.pages, out := like(q))
        return out, longer

    def append(self, k: Array, v: Array, cache: KVCache[Array]) -> KVCache[Array]:
        assert isinstance(cache, NativeKV)
        return cache.appended(k, v)

    def full_attention(self, q: Array, k: Array, v: Array, lengths: Sequence[int]) -> Array:
        _native.full_attention(q, k, v, lengths, out := like(q))
        return out

    # --- DeltaNet ----------------------------------------------------------------------------------------------------

    def causal_conv_silu(self, x: Array, w: Array, tail: Array, keep: int = 0) -> tuple[Array, tuple[Array, ...]]:
        tail = np.asarray(tail)
        _native.causal_conv_silu(x, w, tail, y := like(x))
        before, T = len(tail), len(x)
        inputs = np.concatenate([tail[max(0, T - keep) :], x[max(0, T - keep - before) :]])
        return y, tuple(inputs[i : i + before].copy() for i in range(keep + 1))

    def delta_rule(
        self, q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array, keep: int = 0
    ) -> tuple[Array, tuple[Array, ...]]:
        after = [like(state) for _ in range(keep + 1)]
        _native.delta_rule(q, k, v, g, beta, np.asarray(state), after, o := like(v))
        return o, tuple(after)

    # --- larger pieces -----------------------------------------------------------------------------------------------

    def read_out(self, x: Array, head: _native.Matrix) -> tuple[Float32, bool]:
        finite = _native.read_out(x, head, logits := np.empty((len(x), head.shape[0]), np.float32))
        return logits, finite

    def mlp(self, x: Array, w: MLPWeights[_native.Matrix]) -> Array:
        _native.mlp(x, w, y := like(x))
        return y

    def delta_net(
        self, x: Array, w: DeltaNetWeights[Array, _native.Matrix], c: TextConfig, states: Sequence[DeltaState[Array]],
        lengths: Sequence[int], keep: Sequence[int],
    ) -> tuple[Array, list[tuple[DeltaState[Array], ...]]]:  # fmt: skip
        after = _native.delta_net(
            x, w, c.linear_num_key_heads, c.rms_norm_eps, states, lengths, keep, DeltaState, y := like(x)
        )  # fmt: skip
        return y, after

    def gated_attention(
        self, x: Array, w: AttentionWeights[Array, _native.Matrix], c: TextConfig, angles: Angles[Array],
        caches: Sequence[KVCache[Array]], lengths: Sequence[int],
    ) -> tuple[Array, list[KVCache[Array]]]:  # fmt: skip
        longer = list(map(_longer, caches, lengths))
        before = [(cache.length, after.pages) for cache, after in zip(caches, longer, strict=True)]
        _native.gated_attention(x, w, c.rms_norm_eps, *angles, before, lengths, y := like(x))
        return y, list(longer)

    def decoder_layers(
        self, x: Array, ws: Sequence[LayerWeights[Array, _native.Matrix]], c: TextConfig, angles: Angles[Array],
        states: Sequence[Sequence[LayerState[Array]]], lengths: Sequence[int], keep: Sequence[int],
    ) -> tuple[Array, list[list[tuple[LayerState[Array], ...]]]]:  # fmt: skip
        """All layers in one call. Ctrl-C interrupts a long one between two layers; the states before stay valid."""
        before, longer = _with_room(states, lengths)
        after = _native.decoder_layers(
            x, ws, c.linear_num_key_heads, c.rms_norm_eps, *angles, before, lengths, keep, DeltaState, y := like(x)
        )  # fmt: skip
        for i, caches in longer:
            after[i] = list(map(kept_caches, caches, keep))
        return y, after

    def decoder(
        self, x: Array, w: TextWeights[Array, _native.Matrix], c: TextConfig, positions: NDArray[np.int32],
        states: Sequence[Sequence[LayerState[Array]]], lengths: Sequence[int], keep: Sequence[int],
    ) -> tuple[Array, list[list[tuple[LayerState[Array], ...]]]]:  # fmt: skip
        """The same with everything before and after the layers."""
        if not isinstance(w.layers, ReadyLayers):
            return super().decoder(x, w, c, positions, states, lengths, keep)
        self._share(len(x))
        before, longer = _with_room(states, lengths)
        after = _native.decoder(x, w.layers.native, positions, before, lengths, keep, DeltaState, y := like(x))
        for i, caches in longer:
            after[i] = list(map(kept_caches, caches, keep))
        return y, after

    def vision_blocks(
        self, x: Array, ws: Sequence[VisionBlockWeights[Array, _native.Matrix]], c: VisionConfig,
        angles: Angles[Array], lengths: Sequence[int],
    ) -> Array:  # fmt: skip
        """All blocks in one call. Ctrl-C interrupts it within some seconds."""
        self._share(len(x))
        _native.vision_blocks(plain(x), ws, c.num_heads, EPS, *angles, lengths, y := like(x))
        return y


def _with_room(
    states: Sequence[Sequence[LayerState[Array]]], lengths: Sequence[int]
) -> tuple[list[Sequence[Any]], list[tuple[int, list[NativeKV]]]]:
    """States [layer][sequence] as the native stack takes them, caches as their lengths and pages that have room for the
    next tokens; and, by layer, the longer caches."""
    before, all_longer = list[Sequence[Any]](states), []
    for i, caches in enumerate(states):  # plain, because every token pays for it
        if type(caches[0]) is not DeltaState:
            longer = [_longer(cache, n) for cache, n in zip(caches, lengths, strict=True)]
            before[i] = [(cache.length, more.pages) for cache, more in zip(caches, longer, strict=True)]  # type: ignore[union-attr]
            all_longer.append((i, longer))
    return before, all_longer


def _longer(cache: Any, tokens: int) -> NativeKV:
    assert isinstance(cache, NativeKV)
    return cache.with_room(tokens)
