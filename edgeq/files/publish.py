"""A result appears at its name whole or not at all, and replaces nothing that it was not told to.

It is made in a workspace beside its name (`edgeq.files.leftovers`), made durable, and put there by a rename that cannot
replace. Where something may be replaced, the two exchange names, what came out is looked at once more, and only then
removed; so at no time is there neither the old result nor the new one. A result that finds its name taken when it is
finished is kept under a name that the error tells.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import count
from pathlib import Path

from edgeq.errors import EdgeqError, MemoryBudgetError, UsageError
from edgeq.files.leftovers import Leftover, Workspace, find_leftovers
from edgeq.files.rename import exchange, rename_new

__all__ = ["MayReplace", "check_free", "check_room", "new_file", "new_folder", "real_place", "told"]

MayReplace = Callable[[Path], None]
"""Raises EdgeqError if what is at the path must not be replaced."""

_MOUNTED = (errno.EBUSY, errno.EXDEV)  # what a rename says of a mount point
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def new_folder(
    out: Path, *, room: int = 0, may_replace: MayReplace | None = None, alone: bool = True
) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `out` when the block ends well.

    `room` is the bytes that it takes on the disk. What is at `out` is replaced if `may_replace` does not object;
    without it, nothing is. With `alone`, UsageError if another run is writing to `out`. Raises EdgeqError for whatever
    the system does not allow.
    """
    with _published(out, room, may_replace, alone) as result:
        result.mkdir()
        yield result


@contextmanager
def new_file(out: Path, *, room: int = 0, may_replace: MayReplace | None = None, alone: bool = True) -> Iterator[Path]:
    """Yield a name to write a file to, which becomes `out` when the block ends well. See `new_folder`."""
    with _published(out, room, may_replace, alone) as result:
        yield result


def real_place(out: Path) -> Path:
    """`out` with all links in its parents resolved; whatever `out` itself is, is left as it is."""
    if out.name in ("", ".."):
        return out.resolve()
    return out.parent.resolve() / out.name


def check_free(out: Path, place: Path, may_replace: MayReplace | None) -> None:
    """Find out before the work what is certain to be refused after it: `out`, which is `place`, is there already.

    UsageError if nothing may be replaced; otherwise whatever `may_replace` raises.
    """
    if not os.path.lexists(place):
        return
    if may_replace is None:
        raise UsageError(
            f"{out} exists", hint="choose another name, or overwrite it with --force (force=True in Python)"
        )
    may_replace(place)


def check_room(out: Path, nbytes: int) -> None:
    """MemoryBudgetError if the disk of `out` cannot take `nbytes` more."""
    place = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(place).free
    if free < nbytes:
        raise MemoryBudgetError(
            f"not enough disk space for {out}: needs {nbytes / 1e9:.2f} GB, {free / 1e9:.2f} GB free",
            hint="free some disk space or choose another disk",
        )


@contextmanager
def _published(out: Path, room: int, may_replace: MayReplace | None, alone: bool) -> Iterator[Path]:
    with told(out):
        place = real_place(out)
        check_free(out, place, may_replace)
        _clear_leftovers(out, place, alone)
        check_room(out, room)
        place.parent.mkdir(parents=True, exist_ok=True)
        with closing(Workspace(place)) as workspace:
            yield workspace.result
            _sync(workspace.result)
            _put(workspace, out, may_replace)
            with suppress(OSError):  # the result is there and whole; not every system can do this
                _sync_one(place.parent)


@contextmanager
def told(out: Path) -> Iterator[None]:
    """The system's errors as edgeq's."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        problem = f"{out} could not be written: {error.strerror or error}"
        if error.errno in _FULL:
            hint = "partial output was removed; free some disk space or choose another disk"
            raise MemoryBudgetError(problem, hint=hint) from None
        if error.errno == errno.ENOMEM:
            raise MemoryBudgetError(problem, hint="partial output was removed; close other programs") from None
        hint = "partial output was removed; check the folder's permissions and the disk"
        raise EdgeqError(problem, hint=hint) from None


def _clear_leftovers(out: Path, place: Path, alone: bool) -> None:
    """Remove what killed runs to the same output left; UsageError if one is alive."""
    for wait in (0.0, 0.02, 0.1):  # one that is being removed looks alive for a moment
        time.sleep(wait)
        alive = [leftover for leftover in find_leftovers(place.parent, place.name) if not _removed(leftover)]
        if not alive or not alone:
            return
    raise UsageError(
        f"another run is writing {out} (its unfinished result: {alive[0].path.name})",
        hint="wait until it is done, or choose another name",
    )


def _removed(leftover: Leftover) -> bool:
    """Whether nobody lives who wrote to it; then it is removed, as far as that is possible."""
    if leftover.state == "dead":
        leftover.remove()
    return leftover.state != "alive"


# --- putting it in place ---------------------------------------------------------------------------------------------


def _put(workspace: Workspace, out: Path, may_replace: MayReplace | None) -> None:
    """Give the result its name; EdgeqError with the name it got instead if that is taken."""
    for _ in range(10):
        with suppress(FileExistsError):
            rename_new(workspace.result, workspace.out)
            return
        if may_replace is None:
            raise _kept(workspace, out, "appeared while this run was working")
        try:
            _replace(workspace, may_replace)
            return
        except FileNotFoundError:  # what was to be replaced has gone
            continue
        except FileExistsError:  # only where names cannot be exchanged: something came in between
            break
        except OSError as error:
            if error.errno not in _MOUNTED:
                raise
            raise _kept(workspace, out, f"could not be replaced ({error.strerror or error})") from None
        except EdgeqError as error:
            raise _kept(workspace, out, f"changed while this run was working ({error.message})") from None
    raise _kept(workspace, out, "changed while this run was working")


def _replace(workspace: Workspace, may_replace: MayReplace) -> None:
    """Take what is at the result's name into the workspace and put the result there, in one step if possible."""
    result, out = workspace.result, workspace.out
    may_replace(out)
    if exchange(result, out):
        try:
            may_replace(result)  # which is what was at `out` at the very moment
        except BaseException:
            exchange(result, out)
            raise
        return
    out.rename(workspace.old)  # back it goes when the workspace is closed, if nothing else is at its name by then
    may_replace(workspace.old)
    rename_new(result, out)


def _kept(workspace: Workspace, out: Path, problem: str) -> EdgeqError:
    """Keep a finished result under the first free name like its own."""
    place, is_folder = workspace.out, workspace.result.is_dir()
    for number in count(2):
        name = f"{place.name}-{number}" if is_folder else f"{place.stem}-{number}{place.suffix}"
        with suppress(FileExistsError):
            rename_new(workspace.result, place.with_name(name))
            break
    return EdgeqError(
        f"{out} {problem}; the finished result is in {out.with_name(name)}",
        hint="rename it, or run again with --force to overwrite the other (force=True in Python)",
    )


# --- making it durable -----------------------------------------------------------------------------------------------


def _sync(result: Path) -> None:
    """Make a file, or a folder and the files in it, durable."""
    if result.is_dir():
        for path in result.iterdir():
            _sync_one(path)
    _sync_one(result)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot, for folders
            raise
    finally:
        os.close(descriptor)
