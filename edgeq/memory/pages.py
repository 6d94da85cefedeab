"""Pages of the mapped weights: which are in memory, reading those ahead that are not, and locking all of them.

Weights come from the disk where they are first used, a few pages at a time and in the order in which threads happen to
need them: a card that reads 90 MB/s in one piece gives a fraction of that. Read ahead, in the order of use and a large
piece at a time, they come as fast as the medium allows.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from edgeq.errors import EdgeqError, MemoryBudgetError
from edgeq.formats.bf16 import Array
from edgeq.formats.mapped import Pages, is_mapped, map_file
from edgeq.memory.ceiling import available_memory
from edgeq.weights import TextWeights, leaves

__all__ = ["Reading", "lock_pages", "missing_nbytes", "read_ahead", "turn_rate", "weights_in_order"]

Reading = Callable[[int, int], None]
"""Called with the bytes read and all bytes that are to be, before each piece and at the end."""

_PIECE = 8 << 20  # bytes read between two reports
_TURNED = 32 << 20  # bytes that are let go and come again, to see how long it takes
_LITTLE = 16 << 20  # bytes that are not worth it
_PAGE = mmap.PAGESIZE


def weights_in_order(tree: TextWeights[Any, Any]) -> list[Array]:
    """The arrays of a language model's weights that lie in mapped files, in the order of use: the layers, then the head
    (of an embedding that is not also the head, rows are looked up: it is not among them)."""
    used = [leaf for layer in tree.layers for leaf in leaves(layer)]
    arrays = (x for leaf in [*used, tree.lm_head] for x in getattr(leaf, "arrays", (leaf,)))
    return [x for x in arrays if isinstance(x, np.ndarray) and is_mapped(x)]


def missing_nbytes(arrays: Sequence[Array]) -> int:
    """Bytes of their pages that are not in memory; 0 where the system does not say."""
    return sum(map(_missing, arrays))


def read_ahead(arrays: Sequence[Array], reading: Reading | None = None) -> int:
    """Read what is not in memory yet, in order; the bytes that were read.

    Nothing is where it would not stay: where all of it is more than the memory that is free.
    """
    missing = [nbytes for x in arrays if (nbytes := _missing(x)) >= 0]
    total, free = sum(missing), available_memory()
    if total < _LITTLE or (free is not None and sum(x.nbytes for x in arrays) > free):
        return 0
    done = 0
    for x, nbytes in zip(arrays, missing, strict=True):
        for piece in _pieces(x) if nbytes else ():
            if reading is not None:
                reading(min(done, total), total)
            np.max(piece[::_PAGE])  # a byte of every page, without the GIL
            done += len(piece) * nbytes // x.nbytes
    if reading is not None:
        reading(total, total)
    return total


def turn_rate(path: Path, nbytes: int = _TURNED) -> float:
    """Bytes a second at which pages of a mapped file that is in the page cache are let go and come again, as those of
    weights do that do not stay: `nbytes` from its middle on, the median of a few times."""
    whole = np.frombuffer(map_file(path), np.uint8)
    start = max(0, (len(whole) - nbytes) // 2)
    pages, times = Pages([whole[start : start + nbytes]]), list[float]()
    for _ in range(6):
        started = perf_counter()
        pages.read_ahead()
        pages.come()
        np.max(whole[start : start + nbytes : _PAGE])
        pages.let_go()
        times.append(perf_counter() - started)
    return pages.nbytes / median(times[1:])


def _pieces(x: Array) -> Iterator[Array]:
    flat = x.reshape(-1).view(np.uint8)
    return (flat[start : start + _PIECE] for start in range(0, len(flat), _PIECE))


def lock_pages(arrays: Sequence[Array]) -> int:
    """Keep their pages in memory, whatever else wants it, until they are unmapped; the bytes that they are.

    Raises MemoryBudgetError, with numbers, where the system does not allow so much.
    """
    libc, total = _libc(), sum(x.nbytes for x in arrays)
    if libc is None or not hasattr(libc, "mlock"):
        raise EdgeqError("this system cannot lock memory", hint="leave out --lock (lock= in Python)")
    for begin, end in _ranges(arrays):
        if libc.mlock(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin)) != 0:
            libc.munlockall()
            raise _not_locked(total, ctypes.get_errno())
    return total


def _not_locked(total: int, number: int) -> MemoryBudgetError:
    import resource

    limit, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    allowed = (
        "" if limit == resource.RLIM_INFINITY else f", and RLIMIT_MEMLOCK (ulimit -l) allows {limit / 1e6:,.1f} MB"
    )
    if most == resource.RLIM_INFINITY or most >= total:
        hint = f"run `ulimit -l {-(-total // 1024) + 1024}` before"
    else:
        hint = "set LimitMEMLOCK=infinity in the systemd unit, or memlock in /etc/security/limits.conf"
    return MemoryBudgetError(
        f"locking the weights takes {total / 1e6:,.1f} MB of memory{allowed}: {os.strerror(number)}",
        hint=f"{hint}, or leave out --lock (lock= in Python)",
    )


def _ranges(arrays: Sequence[Array]) -> list[tuple[int, int]]:
    """Addresses of whole pages that hold them, joined where they touch."""
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(map(_pages, arrays)):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined


def _pages(x: Array) -> tuple[int, int]:
    begin = x.__array_interface__["data"][0]
    return begin // _PAGE * _PAGE, -(-(begin + x.nbytes) // _PAGE) * _PAGE


def _missing(x: Array) -> int:
    """Bytes of its pages that are not in memory."""
    libc, (begin, end) = _libc(), _pages(x)
    if libc is None or not hasattr(libc, "mincore"):
        return 0
    found = np.empty((end - begin) // _PAGE, np.uint8)
    where = found.ctypes.data_as(ctypes.c_void_p)
    if libc.mincore(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), where) != 0:
        return 0
    return min(x.nbytes, _PAGE * int(np.count_nonzero(found & 1 == 0)))


@cache
def _libc() -> Any:
    try:
        return ctypes.CDLL(None, use_errno=True)
    except (OSError, TypeError):  # Windows
        return None
