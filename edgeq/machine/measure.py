"""Measure what decides how fast a model runs here: memory, and the native kernels at work on what does not fit caches.

A rate is the median of some passes within a fraction of a second, and of several rounds, which are seconds apart, the
best one counts: what this machine usually gives while no other program runs beside. What a layer takes beside its
weights is what is left of a whole model's token. Numbers of threads are tried with 4-bit products, for one token and
for many apart: reading memory is often fastest with fewer threads than arithmetic (of a Raspberry Pi 5's four cores,
two read most).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.cpu import CpuOps, _native
from edgeq.backends.cpu.kv import NativeKV
from edgeq.config import TextConfig
from edgeq.engine import Engine, Feed
from edgeq.family import family_config
from edgeq.machine import system
from edgeq.machine.facts import BUSY, Facts
from edgeq.machine.speed import delta_entries, values_per_token
from edgeq.machine.stand_in import StandIn
from edgeq.machine.stream import read_rate
from edgeq.memory.ceiling import ceiling, machine_memory
from edgeq.memory.pages import turn_rate
from edgeq.weights import Role, TensorSpec, text_tensors

__all__ = ["BITS", "KV_DTYPES", "Progress", "measure_machine"]

Progress = Callable[[int, int, str], None]
"""Called with the steps done, all steps, and what is measured next."""

BITS = (4, 6, 8, 16)
KV_DTYPES = ("f16", "int8", "int4")

_POOL = 512 << 20  # bytes of weights that are read: many times a last cache, which otherwise keeps a fifth of them
_COLUMNS = 2048
_ROWS = 4096  # of a matrix that many tokens go through
_ONE_ROWS = 2048  # of those that one token goes through
_LARGEST = 2 * _ROWS * _COLUMNS  # bytes of the largest of them
_TOKENS = 256
_PAST = 4096  # tokens before those whose attention is measured
_CACHES = 6  # layers whose keys and values a token goes through, one after the other
_STATES = 18  # layers of DeltaNet, likewise
_HEADS, _KV_HEADS, _DIM = 8, 2, 256
_STATE = (16, 128, 128)  # of such a layer: heads, values, keys
_ROUNDS = 3
_CLEARLY = 1.05  # times as fast: the number of threads is another than the backend's own
_SCALE = 0x3C00  # bfloat16: 0.0078


class _Pass(NamedTuple):
    """A call, and the work that it does, in whatever a rate counts."""

    work: float
    call: Callable[[], object]


_Steps: TypeAlias = Sequence[Mapping[str, Callable[[], _Pass]]]
"""What is measured one after the other; of a step, what is measured in turns, by name."""

_Rates: TypeAlias = dict[str, float]


def measure_machine(progress: Progress | None = None, *, seconds: float = 0.06, nbytes: int | None = None) -> Facts:
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
    """Bytes of weights to read: an eighth of the memory, or of the limit, where that is scarce."""
    bound, memory = ceiling(), machine_memory()
    least = min(bound.nbytes if bound else _POOL * 8, memory or _POOL * 8)
    return max(16 << 20, min(_POOL, least // 8)) >> 20 << 20


class _Probe:
    def __init__(self, progress: Progress, seconds: float, nbytes: int) -> None:
        self._progress, self._seconds, self._read_nbytes = progress, seconds, nbytes
        self._rng = np.random.default_rng(0)
        self._pool = _large_pages(max(nbytes, _LARGEST) // 4)
        self._pool[:] = np.resize(self._rng.integers(0, 1 << 32, 1 << 20, dtype=np.uint32), self._pool.size)
        self._whole = _model_config(self._pool.nbytes)
        self._default, self._counts = _native.thread_count(), _candidates()
        self._done = 0

    def facts(self) -> Facts:
        token, prompt, when = self._of_a_token(), self._of_a_prompt(), datetime.now().astimezone()
        self._steps = _ROUNDS * (3 * len(self._counts) + len(token) + len(prompt))
        with system.Neighbours() as neighbours:
            with system.Neighbours() as first:
                stream, one, many = self._thread_counts()
            if first.load > BUSY:  # fewer threads are best beside others, which is no reason to use fewer ever after
                one = many = self._default
            rates = self._best_round(one, token, "model") | self._best_round(many, prompt, "layer")
        layers, tokens = _beside(rates, self._whole)

        def of(name: str, kinds: Sequence[object]) -> dict[str, float]:
            return {f"{kind}": rates[f"{name} {kind}"] for kind in kinds}

        return Facts(
            isa=_native.isa(), measured=when.isoformat(timespec="seconds"), load=round(neighbours.load, 2),
            prompt_threads=many, generation_threads=one, stream=stream, weights=of("weights", BITS),
            products=of("products", BITS), attention=of("attention", KV_DTYPES),
            prompt_attention=of("prompt attention", KV_DTYPES), delta=rates["delta"],
            prompt_delta=rates["prompt delta"], layers=layers, tokens=tokens, values=_values(rates),
            pages=turn_rate(Path(_native.__file__)),
        )  # fmt: skip

    def _of_a_token(self) -> _Steps:
        """The last step's are subtracted from each other."""
        return [
            *({f"attention {kv}": partial(self._attention, kv)} for kv in KV_DTYPES),
            *({f"weights {bits}": partial(self._weights, bits)} for bits in BITS if bits != 4),
            {
                "weights 4": partial(self._weights, 4),
                "delta": self._delta,
                "next to none": partial(self._model, _least_config(), 1),
                "model": partial(self._model, self._whole, 1),
            },
        ]

    def _of_a_prompt(self) -> _Steps:
        return [
            *({f"prompt attention {kv}": partial(self._prompt_attention, kv)} for kv in KV_DTYPES),
            *({f"products {bits}": partial(self._products, bits)} for bits in BITS if bits != 4),
            {
                "products 4": partial(self._products, 4),
                "prompt delta": self._prompt_delta,
                "layer": partial(self._model, _layer_config(), _TOKENS),
            },
        ]

    def _thread_counts(self) -> tuple[Mapping[str, float], int, int]:
        """What a plain read gets, by the number of threads; and those that are best for one token, and for many."""
        stream, one, many = dict[int, float](), dict[int, float](), dict[int, float]()
        for n in _ROUNDS * self._counts:
            self._use(n)
            self._tell(f"stream, {n} threads")
            stream[n] = max(stream.get(n, 0.0), 1e9 * read_rate(n, nbytes=min(self._read_nbytes, 256 << 20)))
            for rates, name, make in ((one, "one token", self._weights), (many, "many tokens", self._products)):
                self._tell(f"{name}, {n} threads")
                rates[n] = max(rates.get(n, 0.0), *self._measured({name: partial(make, 4)}).values())
        by_threads = {f"{n}": rate for n, rate in stream.items()}
        return by_threads, _best_count(one, self._default), _best_count(many, self._default)

    def _best_round(self, threads: int, steps: _Steps, by: str) -> _Rates:
        """Every rate, of the best of some rounds as a whole: the one with the highest rate `by`."""
        rounds = list[_Rates]()
        self._use(threads)
        for _ in range(_ROUNDS):
            rates: _Rates = {}
            for step in steps:
                self._tell(", ".join(step))
                rates |= self._measured(step)
            rounds.append(rates)
        return max(rounds, key=lambda rates: rates[by])

    def _use(self, threads: int) -> None:
        _native.set_thread_count(threads)
        _native.start_threads()

    def _tell(self, what: str) -> None:
        self._progress(self._done, self._steps, what)
        self._done += 1

    def _measured(self, step: Mapping[str, Callable[[], _Pass]]) -> _Rates:
        """Rates by the median of some passes, in turns. Each goes twice, and the second counts: the first finds in
        caches what another has left."""
        passes, times = {name: make() for name, make in step.items()}, list[list[float]]()
        end = perf_counter() + 2 * self._seconds * len(passes)
        while len(times) < 3 or perf_counter() < end:
            times.append([[_seconds(each.call) for _ in range(2)][1] for each in passes.values()])
        return {name: passes[name].work / median(of) for name, of in zip(passes, zip(*times, strict=True), strict=True)}

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

    def _weights(self, bits: int) -> _Pass:
        """Bytes of matrices of a layer's size, together more than caches hold, that one token goes through."""
        words = _ONE_ROWS * _COLUMNS * bits // 32
        starts = range(0, max(1, self._read_nbytes // 4 - words), words)
        ws = [self._matrix(bits, _ONE_ROWS, _COLUMNS, start) for start in starts]
        x, y = self._normal(1, _COLUMNS), np.empty((1, _ONE_ROWS), np.float32)

        def through() -> None:
            for w in ws:
                _native.linear(x, w, y)

        return _Pass(sum(w.nbytes for w in ws), through)

    def _products(self, bits: int) -> _Pass:
        """Multiply-adds of many tokens with a matrix."""
        w = self._matrix(bits, _ROWS, _COLUMNS)
        x, y = self._normal(_TOKENS, _COLUMNS), np.empty((_TOKENS, _ROWS), np.float32)
        return _Pass(_TOKENS * _ROWS * _COLUMNS, lambda: _native.linear(x, w, y))

    # --- between the products ----------------------------------------------------------------------------------------

    def _normal(self, *shape: int) -> NDArray[np.float32]:
        return self._rng.standard_normal(shape, dtype=np.float32)

    def _attention(self, kv_dtype: str) -> _Pass:
        """Multiply-adds of one token, in one layer after the other: keys and values are more than caches hold."""
        ops, (q, kv, first) = self._with_past(kv_dtype, 1)
        caches = [
            NativeKV(_KV_HEADS, _DIM, kv_dtype, tuple(page.copy() for page in first.pages), _PAST)
            for _ in range(_CACHES)
        ]

        def through() -> None:
            for cache in caches:
                ops.attention(q, kv, kv, cache)

        return _Pass(_CACHES * 2 * q.size * (_PAST + 1), through)

    def _prompt_attention(self, kv_dtype: str) -> _Pass:
        """Multiply-adds of many tokens in a layer, with those before them and with each other."""
        ops, (q, kv, cache) = self._with_past(kv_dtype, _TOKENS)
        return _Pass(2 * q.size * (_PAST + (_TOKENS + 1) / 2), lambda: ops.attention(q, kv, kv, cache))

    def _with_past(
        self, kv_dtype: str, tokens: int
    ) -> tuple[CpuOps, tuple[NDArray[np.float32], NDArray[np.float32], NativeKV]]:
        """Operations, queries, keys, and a cache of those before them."""
        past, ops = self._normal(_PAST, _KV_HEADS, _DIM), CpuOps(_native.thread_count(), kv_dtype)
        cache = NativeKV(_KV_HEADS, _DIM, kv_dtype).appended(past, past)
        return ops, (self._normal(tokens, _HEADS, _DIM), self._normal(tokens, _KV_HEADS, _DIM), cache)

    def _delta(self) -> _Pass:
        """Entries of states that one token updates, in one layer after the other."""
        step, states = self._delta_rule(1), [np.zeros(_STATE, np.float32) for _ in range(_STATES + 1)]

        def through() -> None:
            for before, after in pairwise(states):
                step(before, after)

        return _Pass(_STATES * states[0].size, through)

    def _prompt_delta(self) -> _Pass:
        """The same of many tokens in a layer."""
        step, state, after = self._delta_rule(_TOKENS), np.zeros(_STATE, np.float32), np.empty(_STATE, np.float32)
        return _Pass(_TOKENS * state.size, lambda: step(state, after))

    def _delta_rule(self, tokens: int) -> Callable[[NDArray[np.float32], NDArray[np.float32]], None]:
        """From a state before `tokens` tokens to that after them."""
        heads, width, _ = _STATE
        q, v = self._normal(tokens, heads, width), self._normal(tokens, heads, width)
        q *= np.float32(width**-0.5)
        g, beta = np.full((tokens, heads), -0.01, np.float32), np.full((tokens, heads), 0.5, np.float32)
        out = np.empty_like(v)
        return lambda before, after: _native.delta_rule(q, q, v, g, beta, before, [after], out)

    def _model(self, c: TextConfig, tokens: int) -> _Pass:
        """Calls of the engine with `tokens` tokens of a model of 4 bits; single tokens follow each other."""
        engine: Engine[Any, Any] = Engine(StandIn(c, self._pool), CpuOps(_native.thread_count()))
        ids, state = np.zeros(tokens, np.int32), engine.state()

        def run() -> None:
            nonlocal state
            (output,) = engine.run([Feed(state, ids)])
            state = output.state if tokens == 1 else state

        return _Pass(1, run)


def _beside(rates: _Rates, c: TextConfig) -> tuple[float, float]:
    """What one token takes beside weights and states: layers, and tokens of a model with next to none, in a second.
    c: the model's whose rate is among these."""
    token, seconds = 1 / rates["next to none"], 1 / rates["model"]
    nbytes = sum(StandIn.nbytes(spec) for spec in _used(c))
    left = seconds - token - nbytes / rates["weights 4"] - delta_entries(c) / rates["delta"]
    return len(c.layer_types) / max(left, 0.02 * seconds), 1 / token


def _values(rates: _Rates) -> float:
    """What is left of a layer's time with many tokens, by the numbers that it works through."""
    c, seconds = _layer_config(), 1 / rates["layer"]
    macs = sum(spec.size for spec in _used(c))
    left = seconds - _TOKENS * (macs / rates["products 4"] + delta_entries(c) / rates["prompt delta"])
    return _TOKENS * values_per_token(c) / max(left, 0.05 * seconds)


def _model_config(pool_nbytes: int) -> TextConfig:
    """The 0.8B, whose matrices are the smallest of the family: what a layer takes beside them shows. Its head is as
    large as the pool at most."""
    c = family_config("0.8b").text
    return replace(c, vocab_size=min(c.vocab_size, 2 * pool_nbytes // c.hidden_size))


def _least_config() -> TextConfig:
    """A layer that takes no time, so that what a token takes whatever the model shows."""
    return replace(
        _layer_config(), hidden_size=64, intermediate_size=64,
        linear_num_key_heads=1, linear_num_value_heads=1, linear_key_head_dim=64, linear_value_head_dim=64,
    )  # fmt: skip


def _layer_config() -> TextConfig:
    """A single layer of the 2B."""
    return replace(family_config("2b").text, layer_types=("linear_attention",), vocab_size=64)


def _used(c: TextConfig) -> Iterator[TensorSpec]:
    """The matrices that a token goes through."""
    head = "embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
    return (spec for spec in text_tensors(c) if spec.role is Role.LINEAR or spec.name == head)


def _large_pages(words: int) -> NDArray[np.uint32]:
    """Memory in large pages where the system has them, as a model's file is mapped."""
    mapping = mmap.mmap(-1, 4 * words)
    if (advice := getattr(mmap, "MADV_HUGEPAGE", None)) is not None:
        with suppress(OSError):  # a system without them
            mapping.madvise(advice)
    return np.frombuffer(mapping, np.uint32)


def _best_count(rates: Mapping[int, float], default: int) -> int:
    """The backend's own number of threads, unless another is clearly faster: a machine that was busy while it was
    measured is no reason to use less of it ever after."""
    best = max(rates, key=lambda n: rates[n])
    return best if rates[best] > _CLEARLY * rates[default] else default


def _seconds(call: Callable[[], object]) -> float:
    started = perf_counter()
    call()
    return perf_counter() - started
