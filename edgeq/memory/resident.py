"""The resident set of this process: how large it is, and giving back what nobody uses.

Linux tells anonymous pages from pages of files (/proc/self/status). macOS has a footprint, which leaves out what can be
read again from a file. Elsewhere nothing is measured, and the ledger's accounts have to do.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

__all__ = ["Resident", "peak_resident", "release_unused", "resident"]

_SYSTEM: str = sys.platform
_STATUS = Path("/proc/self/status")


class Resident(NamedTuple):
    """Bytes of the resident set: `private` ones exist nowhere else, `files` are pages of mapped files."""

    private: int
    files: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.private + self.files


def resident() -> Resident | None:
    """The resident set now; None where the system does not tell."""
    if _SYSTEM == "linux":
        found = _status(b"RssAnon:", b"RssFile:", b"RssShmem:")
        return None if found is None else Resident(found[0] + found[2], found[1])
    return _footprint() if _SYSTEM == "darwin" else None


def peak_resident() -> int | None:
    """Most bytes that the resident set has ever had; None where the system does not tell."""
    if _SYSTEM == "linux":
        found = _status(b"VmHWM:")
        return None if found is None else found[0]
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if _SYSTEM == "darwin" else peak << 10  # kilobytes elsewhere


def _status(*keys: bytes) -> list[int] | None:
    """Values of /proc/self/status, whose lines read "RssAnon:     1234 kB"."""
    try:
        lines = _STATUS.read_bytes().splitlines()
    except OSError:  # not mounted
        return None
    found = {key: int(words[0]) << 10 for key, *words in map(bytes.split, lines) if key in keys}
    return [found[key] for key in keys] if len(found) == len(keys) else None


def _footprint() -> Resident | None:  # pragma: no cover  (macOS)
    """By `proc_pid_rusage` of libSystem (xnu, bsd/sys/resource.h: rusage_info_v0)."""

    class Usage(ctypes.Structure):
        _fields_ = [("uuid", ctypes.c_uint8 * 16)] + [
            (name, ctypes.c_uint64)
            for name in (
                "user_time", "system_time", "pkg_idle_wkups", "interrupt_wkups", "pageins", "wired_size",
                "resident_size", "phys_footprint", "proc_start_abstime", "proc_exit_abstime",
            )
        ]  # fmt: skip

    import os

    usage = Usage()
    try:
        if ctypes.CDLL(None).proc_pid_rusage(os.getpid(), 0, ctypes.byref(usage)) != 0:
            return None
    except (AttributeError, OSError):
        return None
    return Resident(usage.phys_footprint, max(0, usage.resident_size - usage.phys_footprint))


@cache
def _trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim; None for another C library, which gives back by itself."""
    if _SYSTEM != "linux":
        return None
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim


def release_unused() -> None:
    """Give back to the system what was freed and the allocator has kept."""
    if (trim := _trim()) is not None:
        trim(0)
