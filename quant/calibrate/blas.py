"""NumPy's BLAS held to one thread for a while.

OpenBLAS sums in another order with another number of threads, so a result would depend on the machine. Work is cut into
fixed pieces instead, which run on threads of Python's (`in_threads`), each with a BLAS of one thread.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

__all__ = ["cores", "in_threads", "one_blas_thread"]

A = TypeVar("A")
B = TypeVar("B")

_AFFIXES = (("scipy_", "64_"), ("scipy_", ""), ("", "64_"), ("", ""))


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(job: Callable[[A], B], items: Sequence[A], threads: int) -> list[B]:
    """Results of `job` for every item, in order, on so many threads."""
    if threads == 1 or len(items) <= 1:
        return [job(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(job, items))


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """One thread for the OpenBLAS that came with NumPy; other libraries (Accelerate) are left as they are."""
    functions = _openblas()
    if functions is None:
        yield
        return
    get, put = functions
    before = get()
    put(1)
    try:
        yield
    finally:
        put(before)


@cache
def _openblas() -> tuple[Callable[[], int], Callable[[int], Any]] | None:
    """Its functions that tell and set the number of threads."""
    root = Path(np.__file__).parent
    for folder in (root.parent / "numpy.libs", root / ".dylibs"):
        for file in sorted(folder.glob("*openblas*")):
            try:
                library = ctypes.CDLL(str(file))  # loaded already: the same one
            except OSError:
                continue
            for before, after in _AFFIXES:
                names = (f"{before}openblas_{verb}_num_threads{after}" for verb in ("get", "set"))
                get, put = (getattr(library, name, None) for name in names)
                if get is not None and put is not None:
                    return get, put
    return None
