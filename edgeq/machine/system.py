"""What the system says of itself: cores, swap, huge pages, temperature, throttling, and the medium under a file.

Everything here reads a few small files (Linux's /proc and /sys) and says None, or nothing, where they are missing.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter, process_time
from typing import NamedTuple

from edgeq.inputs import read_text
from edgeq.machine.programs import ask_program

__all__ = [
    "Medium",
    "Neighbours",
    "Swap",
    "core_speeds",
    "firmware_bits",
    "governors",
    "huge_pages",
    "medium_of",
    "medium_rate",
    "swaps",
    "temperatures",
    "throttling",
]

_ROOT = Path("/")
_SMALL = 1 << 20  # bytes of such a file
_BLOCK, _READ, _SECONDS = 4 << 20, 256 << 20, 0.5  # of the probe of a medium: bytes at a time, at most, and how long
_LEAST = 8 << 20  # bytes of a file that says anything about its medium

_THROTTLED = {  # bits of the Raspberry Pi's firmware
    0: "the supply voltage is too low",
    1: "the clock is capped",
    2: "it is throttled",
    3: "it is at the soft temperature limit",
    16: "the supply voltage has been too low",
    17: "the clock has been capped",
    18: "it has been throttled",
    19: "it has been at the soft temperature limit",
}


def _read(path: Path) -> str | None:
    with suppress(OSError, ValueError):
        return read_text(path, _SMALL).strip()
    return None


# --- processor -------------------------------------------------------------------------------------------------------


def core_speeds(root: Path = _ROOT) -> dict[str, int]:
    """How many cores there are of each highest clock, by "2.40 GHz"; empty where the system does not say."""
    found: dict[str, int] = {}
    for path in sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/cpuinfo_max_freq")):
        if (text := _read(path)) and text.isdigit():
            name = f"{int(text) / 1e6:.2f} GHz"
            found[name] = found.get(name, 0) + 1
    return found


def governors(root: Path = _ROOT) -> list[str]:
    """What decides on the clock of the cores ("performance", "ondemand", "powersave")."""
    paths = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    return sorted({text for path in paths if (text := _read(path))})


def temperatures(root: Path = _ROOT) -> dict[str, float]:
    """Degrees Celsius by what was measured ("cpu-thermal")."""
    found: dict[str, float] = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        with suppress(ValueError):
            degrees = int(_read(zone / "temp") or "") / 1000
            if -50 < degrees < 200:
                found[_read(zone / "type") or zone.name] = degrees
    return found


def throttling(root: Path = _ROOT) -> list[str] | None:
    """What slows, or has slowed, the processor down; None where the system does not tell."""
    if (bits := firmware_bits(root)) is not None:
        return [text for bit, text in _THROTTLED.items() if bits >> bit & 1]
    counts = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
    times = [int(text) for path in counts if (text := _read(path)) and text.isdigit()]
    if not times:
        return None
    return [f"it has been throttled {sum(times)} times since it was started"] if any(times) else []


def firmware_bits(root: Path = _ROOT) -> int | None:
    """The Raspberry Pi's word about throttling, from the kernel or from its own program: bits 0 to 3 say what is now
    (too little voltage, capped, throttled, near the limit), bits 16 to 19 what has been; None where it says nothing.
    """
    text = _read(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    if text is None and root == _ROOT and (program := shutil.which("vcgencmd")):
        with suppress(OSError):
            text = ask_program(program, "get_throttled", seconds=3).out.strip().rpartition("=")[2]
    with suppress(ValueError):
        return None if text is None else int(text, 16)
    return None


class Neighbours:
    """Other programs, while a block runs.

    load: processors that they kept busy on average, of those that this process may use: from Linux's /proc/stat; what
    the average of the last minute was when the block began where there is none.
    """

    def __init__(self, root: Path = _ROOT) -> None:
        self._root, self.load = root, 0.0

    def __enter__(self) -> Neighbours:
        self._before, self._started = self._others(), perf_counter()
        self.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        return self

    def __exit__(self, *_: object) -> None:
        now, seconds = self._others(), perf_counter() - self._started
        if now is not None and self._before is not None and seconds:
            self.load = max(0.0, (now - self._before) / seconds)

    def _others(self) -> float | None:
        """Seconds of the processors that were idle for nobody, less this process's own."""
        usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set[int]()
        busy = list[int]()
        for line in (_read(self._root / "proc/stat") or "").splitlines():
            name, *words = line.split()
            if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in usable and len(words) >= 8:
                user, nice, kernel, _, _, *interrupts = map(int, words[:8])  # between them idle, and waiting for disks
                busy.append(user + nice + kernel + sum(interrupts))
        return sum(busy) / os.sysconf("SC_CLK_TCK") - process_time() if busy else None


# --- memory ----------------------------------------------------------------------------------------------------------


class Swap(NamedTuple):
    """Where pages go that do not fit memory: bytes of it, and bytes in use."""

    place: str
    nbytes: int
    used: int

    @property
    def compressed(self) -> bool:
        """Whether it is in memory itself."""
        return "zram" in self.place


def swaps(root: Path = _ROOT) -> list[Swap]:
    """The devices and files that are swapped to."""
    lines = (_read(root / "proc/swaps") or "").splitlines()[1:]
    words = [line.split() for line in lines]
    return [Swap(word[0], int(word[2]) << 10, int(word[3]) << 10) for word in words if len(word) >= 4]


def huge_pages(root: Path = _ROOT) -> str | None:
    """When memory is given in huge pages: "always", "madvise" or "never"."""
    text = _read(root / "sys/kernel/mm/transparent_hugepage/enabled")
    return None if text is None else next((word[1:-1] for word in text.split() if word.startswith("[")), None)


# --- media -----------------------------------------------------------------------------------------------------------


class Medium(NamedTuple):
    """What a file lies on: "SD card", "NVMe SSD" and so on, and the device's name."""

    kind: str
    device: str


def medium_of(path: Path, root: Path = _ROOT) -> Medium | None:
    """The medium of a file or folder; None where it cannot be told."""
    try:
        device = path.stat().st_dev
    except OSError:
        return None
    number = f"{os.major(device)}:{os.minor(device)}"
    if os.major(device) == 0:  # of no block device
        return _mounted(number, root)
    try:
        found = (root / "sys/dev/block" / number).resolve(strict=True)
    except OSError:
        return None
    disk = found.parent if (found / "partition").exists() else found
    return Medium(_kind_of(disk, root), disk.name)


def _kind_of(disk: Path, root: Path) -> str:
    name = disk.name
    if name.startswith(("dm-", "md")):
        below = sorted((disk / "slaves").glob("*"))
        return _kind_of(below[0].resolve(), root) if below else "a mapped device"
    if name.startswith("mmcblk"):
        return "SD card" if _read(disk / "device/type") == "SD" else "eMMC"
    if name.startswith("nvme"):
        return "NVMe SSD"
    if name.startswith(("zram", "ram", "loop")):
        return {"z": "compressed memory", "r": "memory", "l": "a file on another medium"}[name[0]]
    usb = " on USB" if "/usb" in str(disk) else ""
    if name.startswith(("vd", "xvd")):
        return "virtual disk"
    spins = _read(disk / "queue/rotational") == "1"
    return ("hard disk" if spins and not usb else "drive" if spins else "SSD") + usb


def _mounted(number: str, root: Path) -> Medium | None:
    """A file system without a block device, by its name in the table of mounts."""
    for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
        words = line.split()
        if len(words) > 4 and words[2] == number and "-" in words:
            kind, source = words[words.index("-") + 1 :][:2]
            network = kind.startswith(("nfs", "cifs", "smb", "9p", "fuse.sshfs"))
            named = "network share" if network else "memory" if kind in ("tmpfs", "ramfs") else f"{kind} file system"
            return Medium(named, source)
    return None


def medium_rate(files: Sequence[Path]) -> float | None:
    """Bytes a second that are read from the medium of some files, past the page cache; None for files that are too
    small, and where the system only reads through the cache."""
    for path in sorted(files, key=lambda path: -_size(path)):
        if _size(path) >= _LEAST:
            with suppress(OSError, AttributeError):  # O_DIRECT is Linux's, and not every file system's
                return _direct_rate(path)
        break
    return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _direct_rate(path: Path) -> float:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, _BLOCK) as buffer:  # aligned, as direct reading wants it
            total, started = 0, perf_counter()
            for start in _starts(_size(path)):
                total += os.preadv(descriptor, [buffer], start)
                if perf_counter() - started > _SECONDS:
                    break
            return total / (perf_counter() - started)
    finally:
        os.close(descriptor)


def _starts(size: int) -> Iterator[int]:
    """Places of blocks from the file's middle on, which is less likely to be what the device keeps in its own cache."""
    begin = size // 2 // _BLOCK * _BLOCK
    return iter(range(begin, min(size - _BLOCK, begin + _READ) + 1, _BLOCK))
