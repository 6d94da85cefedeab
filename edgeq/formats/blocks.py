"""Matrices that are converted some rows at a time, so that what lies between is small, on a few threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

__all__ = ["each_block"]

_BLOCK = 1 << 20  # weights at a time, for each thread
_THREADS = min(4, os.cpu_count() or 1)


def each_block(shape: tuple[int, ...], convert: Callable[[slice], None]) -> None:
    """Call `convert` for all rows of a matrix [out, in], some at a time; raises what it raises."""
    out, width = shape
    step = max(1, _BLOCK // width)
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(convert, (slice(row, row + step) for row in range(0, out, step))))
