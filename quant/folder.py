"""A folder that appears complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeq.errors import MemoryBudgetError, UsageError

__all__ = ["check_room", "new_folder", "refuse_existing"]


def refuse_existing(out: Path, source: Path, force: bool) -> None:
    """UsageError where writing `out` would destroy something without being asked to."""
    a, b = out.resolve(), source.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise UsageError(f"the output {out} and the source {source} overlap", hint="choose a folder elsewhere")
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out} exists and is not a folder", hint="choose another name")
    if not force:
        raise UsageError(
            f"{out} exists", hint="choose another name, or overwrite it with --force (force=True in Python)"
        )
    if any(out.iterdir()) and not (out / "config.json").exists():
        raise UsageError(f"{out} is not a model folder, so it is not overwritten", hint="choose another name")


def check_room(out: Path, nbytes: int) -> None:
    """MemoryBudgetError if the disk of `out` cannot take `nbytes` more."""
    place = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(place).free
    if free < nbytes:
        raise MemoryBudgetError(
            f"not enough disk space for {out}: needs {nbytes / 1e9:.2f} GB, {free / 1e9:.2f} GB free",
            hint="free some space or choose another disk",
        )


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` to fill. It becomes `out` when the block ends well, else it is removed.

    A folder that `out` names already is replaced, and lives until then.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)  # of a process with our number that was killed
    try:
        partial.mkdir()
        yield partial
        _sync_folder(partial)
        _move(partial, out)
        _sync_folder(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _move(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.rename(out)
        return
    old = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    out.rename(old)
    try:
        partial.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(path: Path) -> None:
    """Make the names in a folder durable; not every system can, and none needs it for consistency."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
