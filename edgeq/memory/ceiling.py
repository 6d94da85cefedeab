"""Where a ceiling comes from: what was asked for, the environment, or the control group that the process is in."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from edgeq.errors import UsageError
from edgeq.memory.resident import resident
from edgeq.printable import brief

__all__ = ["Ceiling", "Size", "available_memory", "cache_room", "ceiling", "machine_memory", "parse_memory"]

Size = str | int
"""Bytes, or as people write them: "1.5G", "1500M", "1.5GiB", "50%"."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30,
          "TI": 1 << 40}  # fmt: skip
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?I?)(B?)")
_SHARE = re.compile(r"(\d+(?:\.\d*)?)\s*%")
_LEAST = 1 << 20
_NO_CEILING = ("none", "off", "unlimited")
_KERNEL = 0.01  # of a control group's limit, for page tables and what else the kernel has of its own

_SYSTEM: str = sys.platform
_MEMINFO = Path("/proc/meminfo")
_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class Ceiling(NamedTuple):
    """Bytes that the process may take, and who says so."""

    nbytes: int
    origin: str
    asked: bool = True  # for by somebody, not the control group's


def ceiling(asked: Size | None = None) -> Ceiling | None:
    """The ceiling: as asked for, else EDGEQ_MEMORY, else the control group's; None where there is none ("none" asks
    for that). A control group's holds as well where it is lower. Raises UsageError for what is no size.
    """
    variable = os.environ.get("EDGEQ_MEMORY") or None
    origin = "EDGEQ_MEMORY" if asked in (None, variable) else "--memory"  # a command hands the variable's value on
    asked = variable if asked is None else asked
    if isinstance(asked, str) and asked.strip().lower() in _NO_CEILING:
        return None
    group = _group_limit()
    if asked is None:
        return group
    nbytes = parse_memory(asked, "memory" if origin == "--memory" else origin)
    given = Ceiling(nbytes, f"{origin} {asked if isinstance(asked, str) else f'{asked:,}'}")
    return group if group is not None and group.nbytes < given.nbytes else given


def parse_memory(size: Size, name: str = "memory") -> int:
    """A size in bytes; UsageError, about the setting `name`, for anything else. G and GB are 10^9 bytes, GiB 2^30, % of
    the machine's memory.
    """
    nbytes: float = 0
    if isinstance(size, int) and not isinstance(size, bool):
        nbytes = size
    elif isinstance(size, str) and (found := _SIZE.fullmatch(size.strip().upper())):
        nbytes = float(found[1]) * _UNITS[found[2]] if found[2] != "I" else 0
    elif isinstance(size, str) and (found := _SHARE.fullmatch(size.strip())):
        share, machine = float(found[1]), machine_memory()
        if machine is None:
            raise UsageError(f"{name} {brief(size)}: the machine's memory is not known", hint="give a size, as in 1.5G")
        nbytes = machine * share / 100 if share <= 100 else 0
    if not _LEAST <= nbytes < 1 << 62:
        raise UsageError(
            f"{name} must be a size of at least 1 MB, such as 1.5G, 1500M, 1.5GiB or 50%, got {brief(size)}",
            hint="1.5G are 1,500,000,000 bytes; none takes as much as there is",
        )
    return int(nbytes)


def machine_memory() -> int | None:
    """Bytes of memory that the machine has."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def available_memory() -> int | None:
    """Bytes that the system could give now without swapping, as far as it tells."""
    if _SYSTEM != "linux":
        return None
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def cache_room(more: int, planned: int) -> int | None:
    """Bytes of files' pages that the system can keep beside a process that takes `more` than now, `planned` in all, as
    far as it tells."""
    free, group = available_memory(), _group_limit()
    rooms = ([] if free is None else [free - more]) + ([] if group is None else [group.nbytes - planned])
    return min(rooms, default=None)


# --- control groups --------------------------------------------------------------------------------------------------


def _group_limit() -> Ceiling | None:
    """What the control group leaves to this process: its limit, less what its other processes and the kernel hold."""
    if _SYSTEM != "linux":
        return None
    try:
        groups = [line.split(":", 2) for line in _OWN_GROUPS.read_text().splitlines()]
    except OSError:
        return None
    found = list[Ceiling]()
    for _, controllers, path in (group for group in groups if len(group) == 3):
        if controllers == "":
            found += _limits(_GROUPS, path, "memory.max")
        elif "memory" in controllers.split(","):
            found += _limits(_GROUPS / "memory", path, "memory.limit_in_bytes")
    return min(found, key=lambda limit: limit.nbytes, default=None)


def _limits(root: Path, path: str, name: str) -> list[Ceiling]:
    """The limits of a group and of those that it lies in."""
    place = Path(path.lstrip("/"))
    found, most = list[Ceiling](), machine_memory() or 1 << 60
    for group in (root / folder for folder in (place, *place.parents)):
        try:
            limit = int((group / name).read_text())
        except (OSError, ValueError):  # no such group in this namespace, or "max"
            continue
        if limit < most:
            left = max(0, limit - _others(group))
            found.append(
                Ceiling(int(left * (1 - _KERNEL)), f"{name} of the control group, {limit / 1e6:,.0f} MB,", asked=False)
            )
    return found


def _others(group: Path) -> int:
    """Bytes of a group that cannot be reclaimed, but for this process's own."""
    try:
        words = [line.split() for line in (group / "memory.stat").read_text().splitlines()]
    except OSError:
        return 0
    stat = {word[0]: int(word[1]) for word in words if len(word) == 2 and word[1].isdecimal()}
    names = ("anon", "shmem", "kernel_stack", "pagetables", "slab_unreclaimable") if "anon" in stat else ("total_rss",)
    own = resident()
    return max(0, sum(stat.get(name, 0) for name in names) - (own.private if own else 0))
