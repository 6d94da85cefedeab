#!/usr/bin/env python3
"""Time the native layers (everything but matrix products) at the 0.8B's sizes, on every instruction set.

    python tools/bench_layers.py [threads]

Best of many runs, one thread unless told otherwise. "Cold" means that the data was last touched 60 MB and more ago, as
when a token is decoded: every layer's state and cache comes from memory.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np

from edgeq.backends.cpu import CpuOps, _native
from edgeq.formats.bf16 import Array

SECONDS = 0.5  # for each figure
HEADS, K, V = 16, 128, 128  # DeltaNet
HQ, HKV, D = 8, 2, 256  # attention
rng = np.random.default_rng(0)


def normal(*shape: int) -> Array:
    return rng.standard_normal(shape, np.float32)


def best(run: Callable[[], object]) -> float:
    """Shortest time in seconds of one call."""
    times, end = list[float](), time.perf_counter() + SECONDS
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def state() -> Array:
    matrix: Array = _native.empty(4 * HEADS * V * K).view(np.float32).reshape(HEADS, V, K)
    matrix[:] = 1
    return matrix


def delta(tokens: int, copies: int) -> float:
    """Seconds of the delta rule per layer, going round `copies` layers."""
    q, k = (normal(tokens, HEADS, K) / K**0.5 for _ in "qk")
    v, g, beta = normal(tokens, HEADS, V), -np.exp(normal(tokens, HEADS)), np.full((tokens, HEADS), 0.5, np.float32)
    states, out = [(state(), state()) for _ in range(copies)], np.empty_like(v)

    def run() -> None:
        for before, after in states:
            _native.delta_rule(q, k, v, g, beta, before, [after], out)

    return best(run) / copies


def attention(ops: CpuOps, tokens: int, past: int, copies: int) -> float:
    """Seconds of attention per layer, the same way."""
    q, k, v = normal(tokens, HQ, D), normal(tokens, HKV, D), normal(tokens, HKV, D)
    caches = [ops.kv_cache(normal(past, HKV, D), normal(past, HKV, D)) for _ in range(copies)]

    def run() -> None:
        for cache in caches:
            ops.attention(q, k, v, cache)

    return best(run) / copies


def figures() -> dict[str, str]:
    x, w, tail = normal(64, 6144), normal(6144, 4), normal(3, 6144)
    gate, up, out = normal(64, 3584), normal(64, 3584), np.empty((64, 3584), np.float32)
    hidden, gain, normed = normal(64, 1024), normal(1024), np.empty((64, 1024), np.float32)
    prefill = attention(CpuOps(), 256, 1792, 1)
    return {
        "delta rule, 64 tokens: us per token": f"{delta(64, 1) / 64 * 1e6:.1f}",
        "delta rule, 1 token, cold: us": f"{delta(1, 36) * 1e6:.0f}",
        "convolution + SiLU: us per token": f"{best(lambda: CpuOps().causal_conv_silu(x, w, tail)) / 64 * 1e6:.1f}",
        "SwiGLU: us per token": f"{best(lambda: _native.silu_mul(gate, up, out)) / 64 * 1e6:.2f}",
        "RMSNorm: us per token": f"{best(lambda: _native.rms_norm(hidden, gain, None, 1e-6, normed)) / 64 * 1e6:.2f}",
        "attention, 256 tokens after 1,792: Gflop/s": f"{4 * HQ * D * 256 * (1792 + 128.5) / prefill / 1e9:.0f}",
        "attention, 1 token after 4,095, cold, f16: us": f"{attention(CpuOps(), 1, 4095, 12) * 1e6:.0f}",
        "the same, int8: us": f"{attention(CpuOps(kv_dtype='int8'), 1, 4095, 12) * 1e6:.0f}",
        "the same, int4: us": f"{attention(CpuOps(kv_dtype='int4'), 1, 4095, 12) * 1e6:.0f}",
    }


def main() -> None:
    _native.set_thread_count(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    columns = {}
    for isa in _native.isas():
        _native.set_isa(isa)
        columns[isa] = figures()
    names = list(next(iter(columns.values())))
    print(f"{'':46s}" + "".join(f"{isa:>12s}" for isa in columns))
    for name in names:
        print(f"{name:46s}" + "".join(f"{column[name]:>12s}" for column in columns.values()))


if __name__ == "__main__":
    main()
