"""How fast memory can be read: what bounds generation."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

__all__ = ["read_rate"]

PROBE_NBYTES = 256 << 20  # many times what caches hold
PROBE_PASSES = 5
PIECES = 8  # per thread: large, because handing one out takes tens of microseconds


def read_rate(threads: int | None = None, *, nbytes: int | None = None) -> float:
    """Rate at which `threads` threads (None: as many as there are cores) read memory, GB/s: the best of a few passes.

    A thread has several pieces on average and takes one at a time, so that one that the system puts aside for another
    program does not hold up the others: the figure is what this machine gives now.
    """
    threads = threads or os.cpu_count() or 1
    pieces = np.array_split(_memory(nbytes or PROBE_NBYTES), PIECES * threads)
    with ThreadPoolExecutor(threads) as pool:
        return max(_read_once(pool, pieces) for _ in range(PROBE_PASSES))


def _read_once(pool: ThreadPoolExecutor, pieces: list[NDArray[np.uint64]]) -> float:
    started = perf_counter()
    deque(pool.map(np.bitwise_xor.reduce, pieces), maxlen=0)  # NumPy computes without the GIL
    return sum(piece.nbytes for piece in pieces) / 1e9 / (perf_counter() - started)


@cache
def _memory(nbytes: int) -> NDArray[np.uint64]:
    """Memory to read: written once, so that it is there."""
    return np.ones(nbytes // 8, np.uint64)
