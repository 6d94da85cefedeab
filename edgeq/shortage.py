"""Out of memory, by whatever name it comes: one line and exit code 3.

Python says MemoryError, the system ENOMEM, an import "failed to map segment", a thread pool "can't start new thread".
Some libraries say nothing and end the process: OpenBLAS while NumPy is imported, Rust's allocator in `tokenizers`.
Before those are started, `require` asks the system for what they are going to take. Imports nothing heavy.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from edgeq.errors import EdgeqError, MemoryBudgetError

__all__ = ["exit_on_shortage", "is_shortage", "limits", "prepare", "require"]

_MARKS = (
    "cannot allocate memory",
    "failed to map segment",
    "can't start new thread",
    "out of memory",
    "bad_alloc",
    "failed to allocate",
    "memory allocation of",
)
_START, _START_DATA = 140 << 20, 40 << 20  # bytes of address space, and of data, that NumPy takes with one thread
_TIGHT = 8 << 20  # bytes; where they are not to be had, any odd failure is for want of memory
_HINT = "close other programs, raise the limit, or use a smaller model, fewer bits or a smaller --context"


def is_shortage(error: BaseException | None) -> bool:
    """Whether it was memory (or threads, which are made of memory) that was lacking."""
    for _ in range(10):
        if error is None:
            return False
        if isinstance(error, (MemoryError, MemoryBudgetError)) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        if not isinstance(error, EdgeqError) and any(mark in str(error).lower() for mark in _MARKS):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_odd_and_tight(error: BaseException) -> bool:
    """Without memory, Python's own compiler and imports raise errors of all kinds."""
    return not isinstance(error, EdgeqError) and bool(limits()) and not _can_have(_TIGHT)


def limits() -> dict[str, int]:
    """The limits on this process's memory by the name of `ulimit`'s option, bytes; those that there are."""
    try:
        import resource
    except ImportError:  # Windows has no such module
        return {}
    kinds = {"ulimit -v": resource.RLIMIT_AS, "ulimit -d": resource.RLIMIT_DATA}
    found = {name: resource.getrlimit(kind)[0] for name, kind in kinds.items()}
    return {name: limit for name, limit in found.items() if limit != resource.RLIM_INFINITY}


def require(nbytes: int, what: str, *, address_space: int = 0) -> None:
    """MemoryBudgetError, with numbers, if the system would not give `nbytes` more now (and that much address space)."""
    if not (_can_have(nbytes) and _can_have(address_space, writable=False)):
        nbytes = max(nbytes, address_space)
        bounds = "".join(f"; {name} allows {limit / 1e6:,.0f} MB in all" for name, limit in limits().items())
        raise MemoryBudgetError(
            f"not enough memory for {what}: it takes {nbytes / 1e6:,.0f} MB{bounds}", hint=_HINT
        ) from None


def _can_have(nbytes: int, *, writable: bool = True) -> bool:
    """Whether the system would give that much memory; what is only read counts as address space alone."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return True
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    try:
        mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=protection).close()
    except (OSError, MemoryError):
        return False
    return True


def prepare() -> None:
    """Before NumPy is imported under a limit: a BLAS with one thread, and room for it."""
    if limits():
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # each takes address space, and one that fails is fatal
        if "numpy" not in sys.modules:
            require(_START_DATA, "NumPy", address_space=_START)


@contextmanager
def exit_on_shortage(*, debug: bool = False) -> Iterator[None]:
    """Turn any shortage of memory into one line and exit code 3; with `debug` the error goes on."""
    try:
        yield
    except Exception as error:
        if debug or not (is_shortage(error) or _is_odd_and_tight(error)):
            raise
        message = error.message if isinstance(error, EdgeqError) else "out of memory"
        hint = error.hint if isinstance(error, EdgeqError) else _HINT
        notes = "".join(f"note: {note}\n" for note in getattr(error, "__notes__", ()))
        sys.stderr.write(f"error: {message}\nhint: {hint}\n{notes}")
        sys.exit(3)
