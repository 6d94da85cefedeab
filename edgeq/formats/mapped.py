"""Files mapped into memory, and what can happen to them while they are.

Reading from a file that has been cut short since it was mapped, or whose disk fails, is a signal, not an error.
`check_whole` finds out beforehand, as well as one can: between the check and the reading there is time. A guard
(`edgeq.guard`) catches the signal itself.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from edgeq.errors import MemoryBudgetError, ModelError
from edgeq.inputs import open_file
from edgeq.printable import printable
from edgeq.shortage import limits

__all__ = [
    "Guard",
    "Pages",
    "check_whole",
    "drop_pages",
    "guard_when_mapped",
    "is_mapped",
    "map_file",
    "reading_on",
    "set_guard",
]


_PAGE_OUT = 21 if sys.platform == "linux" else None  # likewise
_READ_AHEAD = 1 << 20  # bytes; the system reads no more ahead for one call
_POPULATE_READ = 22 if sys.platform == "linux" else None  # Python 3.13 has its name
_UNLOCKED = 256 << 10  # bytes of a file that are let go at a time where others are locked
_LARGE = 64 << 20  # bytes of a file from which on page tables cost time


class Guard(Protocol):
    """Catches the signal. Mapped files are announced to it, and have numbers there."""

    def add(self, begin: int, size: int, path: str) -> int: ...

    def forget(self, number: int) -> None: ...

    def hit(self, number: int) -> bool:
        """Whether pages of the file were replaced by zeros, because they could not be read."""

    def zeros(self, wanted: bool) -> bool:
        """Whether to replace such pages by zeros from now on, instead of ending the process; what held before."""


class _Guarded:
    """The guard, if there is one, and the numbers of mapped files with it."""

    def __init__(self) -> None:
        self.guard: Guard | None = None
        self.install: Callable[[], object] | None = None
        self.paths: weakref.WeakKeyDictionary[mmap.mmap, Path] = weakref.WeakKeyDictionary()
        self.numbers: weakref.WeakKeyDictionary[mmap.mmap, int] = weakref.WeakKeyDictionary()

    def announce(self, mapping: mmap.mmap, path: Path) -> None:
        self.paths[mapping] = path
        if self.install is not None:
            install, self.install = self.install, None
            install()
        if self.guard is not None and mapping not in self.numbers:
            import numpy as np  # nothing else here needs it

            begin = np.frombuffer(mapping, np.uint8, 1).__array_interface__["data"][0]
            self.numbers[mapping] = number = self.guard.add(begin, len(mapping), printable(str(path)))
            weakref.finalize(mapping, self.guard.forget, number).atexit = False


_guarded = _Guarded()


def set_guard(guard: Guard) -> None:
    """From now on `guard` knows of every mapped file, of those that are mapped already too."""
    _guarded.guard = guard
    for mapping, path in list(_guarded.paths.items()):
        _guarded.announce(mapping, path)


def guard_when_mapped(install: Callable[[], object]) -> None:
    """Call `install`, which sets the guard, when the next file is mapped: it may have to load native code."""
    _guarded.install = install


@contextmanager
def reading_on() -> Iterator[None]:
    """While it lasts, pages that cannot be read are zeros, if there is a guard; call `check_whole` after reading."""
    guard = _guarded.guard
    before = guard.zeros(True) if guard else False
    try:
        yield
    finally:
        if guard:
            guard.zeros(before)


def map_file(path: Path) -> mmap.mmap:
    """Map a file for reading; ModelError if it cannot be read, MemoryBudgetError if it does not fit.

    A large one on large pages, where the system has them: for what is read from the disk now, and for what was written
    in pieces of them (`edgeq.files.pieces`).
    """
    nbytes = 0
    try:
        with open_file(path) as file:
            nbytes = os.fstat(file.fileno()).st_size
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if nbytes >= _LARGE and (advice := getattr(mmap, "MADV_HUGEPAGE", None)) is not None:
            with suppress(OSError):  # a system without them
                mapping.madvise(advice)
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist", hint="download the missing file") from None
    except ValueError:
        raise ModelError(f"{path} is empty", hint="download or copy the file again") from None
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise _does_not_fit(path, nbytes) from None
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    _guarded.announce(mapping, path)
    return mapping


def drop_pages(mapping: mmap.mmap) -> None:
    """Tell the system that the pages read so far are not needed in memory; they stay readable. Locked ones stay."""
    if not hasattr(mapping, "madvise"):
        return
    try:
        mapping.madvise(mmap.MADV_DONTNEED)
    except OSError:  # some of them are locked, and those behind stay, too
        for start in range(0, len(mapping), _UNLOCKED):
            with suppress(OSError):
                mapping.madvise(mmap.MADV_DONTNEED, start, min(_UNLOCKED, len(mapping) - start))


def is_mapped(x: object) -> bool:
    """Whether a NumPy array lies in a mapped file."""
    while (base := getattr(x, "base", None)) is not None:
        x = base
    return isinstance(x, mmap.mmap) or (isinstance(x, memoryview) and isinstance(x.obj, mmap.mmap))


class Pages:
    """The pages of mapped files that some NumPy arrays lie in; of those that lie elsewhere nothing.

    cached: whether the page cache is to have them when they have been let go. Where it has no room for all that is read
    again and again, those that stay would have to leave it.
    """

    def __init__(self, arrays: Iterable[Any], *, cached: bool = True) -> None:
        self._cached = cached
        self._parts = [part for x in arrays if x.nbytes and (part := _place(x)) is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, parts of pages rounded up."""
        return sum(nbytes for _, _, nbytes in self._parts)

    def let_go(self) -> None:
        """They are no longer this process's memory; they come again, from the page cache or the disk, when read."""
        if not self._cached:  # of a file that is its user's, and in no other process's memory
            with suppress(OSError):  # a system before Linux 5.4
                self._advise("MADV_PAGEOUT", default=_PAGE_OUT)
        self._advise("MADV_DONTNEED")

    def read_ahead(self) -> None:
        """Begin to read what of them is not in the page cache, without waiting."""
        self._advise("MADV_WILLNEED", _READ_AHEAD)

    def come(self) -> None:
        """Make all of them this process's memory at once, in a quarter of the time that page faults take; those that
        cannot be read are left to these."""
        with suppress(OSError):  # a system before Linux 5.14
            self._advise("MADV_POPULATE_READ", default=_POPULATE_READ)

    def _advise(self, name: str, most: int | None = None, *, default: int | None = None) -> None:
        if (advice := getattr(mmap, name, default)) is None:  # Windows
            return
        for mapping, start, nbytes in self._parts:
            for at in range(start, start + nbytes, most or nbytes):
                mapping.madvise(advice, at, min(most or nbytes, start + nbytes - at))


def _place(x: Any) -> tuple[mmap.mmap, int, int] | None:
    """Where an array lies: the mapped file, and the first byte and the bytes in it, whole pages."""
    base = x
    while (below := getattr(base, "base", None)) is not None:
        base = below
    mapping = base.obj if isinstance(base, memoryview) else base
    if not isinstance(mapping, mmap.mmap):
        return None
    import numpy as np  # nothing else here needs it

    begin = x.__array_interface__["data"][0] - np.frombuffer(mapping, np.uint8, 1).__array_interface__["data"][0]
    start = begin // mmap.PAGESIZE * mmap.PAGESIZE
    end = min(-(-(begin + x.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE, len(mapping))
    return mapping, start, end - start


def check_whole(mapping: mmap.mmap, path: Path) -> None:
    """ModelError if a file is shorter than when it was mapped, or could not be read."""
    nbytes, number, guard = mapping.size(), _guarded.numbers.get(mapping), _guarded.guard
    if nbytes < len(mapping):
        problem = f"was cut short while it was in use: it has {nbytes:,} bytes, and had {len(mapping):,}"
    elif guard is not None and number is not None and guard.hit(number):
        problem = "could not be read while it was in use"
    else:
        return
    raise ModelError(f"{path} {problem}", hint="copy or download it again, then repeat the command")


def _does_not_fit(path: Path, nbytes: int) -> MemoryBudgetError:
    limit = limits().get("ulimit -v")
    bound = "" if limit is None else f"; ulimit -v allows {limit / 1e9:.2f} GB in all"
    return MemoryBudgetError(
        f"{path} does not fit: mapping it takes {nbytes / 1e9:.2f} GB of address space{bound}",
        hint="raise the limit, or use a smaller model",
    )
