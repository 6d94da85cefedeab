"""Measure what decides how fast a model runs here: memory, and the native kernels at work on what does not fit caches.

A rate is the best of some passes within a fraction of a second, so that another program that runs now and then does not
count. Numbers of threads are tried with 4-bit products, for one token and for many apart: reading memory is often
fastest with fewer threads than arithmetic (of a Raspberry Pi 5's four cores, two read most).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.cpu import CpuOps, _native
from edgeq.backends.cpu.kv import NativeKV
from edgeq.config import TextConfig
from edgeq.family import family_config
from edgeq.formats.bf16 import Array
from edgeq.machine.facts import Facts
from edgeq.machine.speed import values_per_token
from edgeq.machine.stream import read_rate
from edgeq.model import text
from edgeq.weights import Matrix, Role, TensorSpec, declare_text, map_tree, text_tensors

__all__ = ["BITS", "KV_DTYPES", "Progress", "measure_machine"]

Progress = Callable[[int, int, str], None]
"""Called with the steps done, all steps, and what is measured next."""

BITS = (4, 6, 8, 16)
KV_DTYPES = ("f16", "int8", "int4")

_POOL = 128 << 20  # bytes of weights that are read: several times a laptop's last cache
_COLUMNS = 2048
_ROWS = 4096  # of a matrix that many tokens go through
_ONE_ROWS = 2048  # of those that one token goes through
_LARGEST = 2 * _ROWS * _COLUMNS  # bytes of the largest of them
_TOKENS = 256
_PAST = 4096  # tokens before those whose attention is measured
_HEADS, _KV_HEADS, _DIM = 8, 2, 256
_ROUNDS = 2
_CLEARLY = 1.05  # times as fast: the number of threads is another than the backend's own
_SCALE = 0x3C00  # bfloat16: 0.0078


def measure_machine(progress: Progress | None = None, *, seconds: float = 0.08, nbytes: int | None = None) -> Facts:
    """Measure this machine for about `seconds` per rate, a few seconds in all; the numbers of threads that were in
    force are again in the end. nbytes: of the weights that are read; None is what caches do not hold."""
    before = _native.thread_count()
    try:
        return _Probe(progress or (lambda *_: None), seconds, nbytes or _pool_nbytes()).facts()
    finally:
        _native.set_thread_count(before)


def _candidates() -> list[int]:
    """Numbers of threads to try: powers of two, the backend's own choice, and half of that."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    default = _native.thread_count()
    counts = {1 << i for i in range(usable.bit_length())} | {default, default // 2, usable}
    return sorted(n for n in counts if 1 <= n <= max(usable, default))


def _pool_nbytes() -> int:
    """Bytes of weights to read: an eighth of the memory where that is scarce."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(16 << 20, min(_POOL, total // 8)) >> 20 << 20


class _Probe:
    def __init__(self, progress: Progress, seconds: float, nbytes: int) -> None:
        self._load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0
        self._progress, self._seconds, self._read_nbytes = progress, seconds, nbytes
        self._rng = np.random.default_rng(0)
        self._pool = _small_pages(max(nbytes, _LARGEST) // 4)
        self._pool[:] = np.resize(self._rng.integers(0, 1 << 32, 1 << 20, dtype=np.uint32), self._pool.size)
        self._default, self._counts = _native.thread_count(), _candidates()
        self._steps = _ROUNDS * (3 * len(self._counts) + 2 * len(BITS) + 2 * len(KV_DTYPES) + 3)
        self._done = 0
        self._rates: dict[str, dict[str, float]] = {}

    def facts(self) -> Facts:
        for n in _ROUNDS * self._counts:
            self._use(n)
            self._step("stream", f"{n}", lambda: 1e9 * self._read(n))  # noqa: B023
            self._step("one token", f"{n}", lambda: self._weights_rate(4))
            self._step("many tokens", f"{n}", lambda: self._products_rate(4))
        one, many = (_best_count(self._rates[name], self._default) for name in ("one token", "many tokens"))
        for _ in range(_ROUNDS):
            self._use(one)
            for bits in BITS:
                self._step("weights", f"{bits}", partial(self._weights_rate, bits))
            for kv in KV_DTYPES:
                self._step("attention", kv, partial(self._attention_rate, kv, 1))
            self._step("delta", "", lambda: self._delta_rate(1))
            self._use(many)
            for bits in BITS:
                self._step("products", f"{bits}", partial(self._products_rate, bits))
            for kv in KV_DTYPES:
                self._step("prompt attention", kv, partial(self._attention_rate, kv, _TOKENS))
            self._step("prompt delta", "", lambda: self._delta_rate(_TOKENS))
            self._step("layer", "", self._layer_rate)
        rates = self._rates
        return Facts(
            isa=_native.isa(), measured=datetime.now().astimezone().isoformat(timespec="seconds"), load=self._load,
            prompt_threads=many, generation_threads=one, stream=rates["stream"], weights=rates["weights"],
            products=rates["products"], attention=rates["attention"], prompt_attention=rates["prompt attention"],
            delta=rates["delta"][""], prompt_delta=rates["prompt delta"][""], values=self._values(),
        )  # fmt: skip

    def _use(self, threads: int) -> None:
        _native.set_thread_count(threads)
        _native.start_threads()

    def _step(self, name: str, kind: str, rate: Callable[[], float]) -> None:
        """Measure a rate; of several rounds the best counts, for another program may run in one of them."""
        self._progress(self._done, self._steps, f"{name} {kind}")
        self._done += 1
        rates = self._rates.setdefault(name, {})
        rates[kind] = max(rates.get(kind, 0.0), rate())

    def _best(self, call: Callable[[], object]) -> float:
        """Seconds of the fastest of some calls; one that is not counted goes first."""
        call()
        best, end = float("inf"), perf_counter() + self._seconds
        for _ in range(3):
            best = min(best, _seconds(call))
        while perf_counter() < end:
            best = min(best, _seconds(call))
        return best

    def _read(self, threads: int) -> float:
        return read_rate(threads, nbytes=2 * self._read_nbytes)

    # --- products ----------------------------------------------------------------------------------------------------

    def _matrix(self, bits: int, rows: int, columns: int, start: int = 0) -> _native.Matrix:
        """A matrix in the pool's memory, from its word `start` on; its codes are the pool's, whatever they say."""
        if bits == 16:
            values = self._pool[start : start + rows * columns // 2].view(np.uint16).reshape(rows, columns)
            return _native.Matrix(values)
        words = columns * bits // 32
        codes = self._pool[start : start + rows * words].reshape(rows, words)
        scales = np.full((rows, columns // 64), _SCALE, np.uint16)
        return _native.Matrix(codes, scales, scales.copy(), bits, 64)

    def _weights_rate(self, bits: int) -> float:
        """One token through matrices of a layer's size, one after the other, which are more than caches hold."""
        words = _ONE_ROWS * _COLUMNS * bits // 32
        starts = range(0, max(1, self._read_nbytes // 4 - words), words)
        ws = [self._matrix(bits, _ONE_ROWS, _COLUMNS, start) for start in starts]
        x, y = self._normal(1, _COLUMNS), np.empty((1, _ONE_ROWS), np.float32)

        def through() -> None:
            for w in ws:
                _native.linear(x, w, y)

        return sum(w.nbytes for w in ws) / self._best(through)

    def _products_rate(self, bits: int) -> float:
        w = self._matrix(bits, _ROWS, _COLUMNS)
        return _TOKENS * _ROWS * _COLUMNS / self._product_seconds(w, _TOKENS)

    def _product_seconds(self, w: _native.Matrix, tokens: int) -> float:
        x, y = self._normal(tokens, w.shape[1]), np.empty((tokens, w.shape[0]), np.float32)
        return self._best(lambda: _native.linear(x, w, y))

    # --- between the products ----------------------------------------------------------------------------------------

    def _normal(self, *shape: int) -> NDArray[np.float32]:
        return self._rng.standard_normal(shape, dtype=np.float32)

    def _attention_rate(self, kv_dtype: str, tokens: int) -> float:
        ops = CpuOps(_native.thread_count(), kv_dtype)
        past = self._normal(_PAST, _KV_HEADS, _DIM)
        cache = NativeKV(_KV_HEADS, _DIM, kv_dtype).appended(past, past)
        q, kv = self._normal(tokens, _HEADS, _DIM), self._normal(tokens, _KV_HEADS, _DIM)
        each = 2 * _HEADS * _DIM * (_PAST + (tokens + 1) / 2)
        return tokens * each / self._best(lambda: ops.attention(q, kv, kv, cache))

    def _delta_rate(self, tokens: int) -> float:
        heads, width = 16, 128
        q, v = self._normal(tokens, heads, width), self._normal(tokens, heads, width)
        q *= np.float32(width**-0.5)
        g, beta = np.full((tokens, heads), -0.01, np.float32), np.full((tokens, heads), 0.5, np.float32)
        state, out = np.zeros((heads, width, width), np.float32), np.empty_like(v)
        after = [np.empty_like(state)]
        return tokens * state.size / self._best(lambda: _native.delta_rule(q, q, v, g, beta, state, after, out))

    def _layer_rate(self) -> float:
        """DeltaNet layers of 4 bits that a second is enough for, with many tokens."""
        c = _layer_config()
        ops = CpuOps(_native.thread_count())
        weights = ops.ready(map_tree(partial(self._leaf, ops), declare_text(c)), c)
        states = [[layer] for layer in text.initial_state(ops, c).layers]
        x, positions = self._normal(_TOKENS, c.hidden_size), np.tile(np.arange(_TOKENS, dtype=np.int32), (3, 1))
        return 1 / self._best(lambda: ops.decoder(x, weights, c, positions, states, [_TOKENS], [0]))

    def _values(self) -> float:
        """What is left of such a layer's time, by the numbers that it works through."""
        c, rates = _layer_config(), self._rates
        seconds = 1 / rates["layer"][""]
        macs = sum(spec.size for spec in _linear_specs(c))
        entries = c.linear_num_value_heads * c.linear_value_head_dim * c.linear_key_head_dim
        left = seconds - _TOKENS * (macs / rates["products"]["4"] + entries / rates["prompt delta"][""])
        return _TOKENS * values_per_token(c) / max(left, 0.05 * seconds)

    def _leaf(self, ops: CpuOps, spec: TensorSpec) -> Any:
        if spec.role is Role.GATE:
            return ops.matrix(self._bfloat16(spec))
        if spec.is_matrix:
            return self._matrix(4, *spec.shape)
        return ops.vector(np.full((spec.shape[0], *spec.shape[2:]), 0.1, np.float32))

    def _bfloat16(self, spec: TensorSpec) -> Matrix[Array]:
        return np.full(spec.shape, _SCALE, np.uint16)


def _layer_config() -> TextConfig:
    """A single layer of the 2B."""
    return replace(family_config("2b").text, layer_types=("linear_attention",), vocab_size=64)


def _linear_specs(c: TextConfig) -> Iterator[TensorSpec]:
    return (spec for spec in text_tensors(c) if spec.role is Role.LINEAR and spec.name != "lm_head.weight")


def _small_pages(words: int) -> NDArray[np.uint32]:
    """Memory in pages of the usual size, as those of most mapped files are: NumPy's own is in huge ones, which are read
    up to a fifth faster."""
    mapping = mmap.mmap(-1, 4 * words)
    if (advice := getattr(mmap, "MADV_NOHUGEPAGE", None)) is not None:
        with suppress(OSError):  # a kernel without huge pages
            mapping.madvise(advice)
    return np.frombuffer(mapping, np.uint32)


def _best_count(rates: Mapping[str, float], default: int) -> int:
    """The backend's own number of threads, unless another is clearly faster: a machine that was busy while it was
    measured is no reason to use less of it ever after."""
    best = max(rates, key=lambda n: rates[n])
    return int(best) if rates[best] > _CLEARLY * rates[f"{default}"] else default


def _seconds(call: Callable[[], object]) -> float:
    started = perf_counter()
    call()
    return perf_counter() - started
