"""`edgeq clean`: remove what killed runs have left behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from edgeq.cli.console import say, show
from edgeq.errors import EdgeqError, UsageError
from edgeq.files import find_leftovers
from edgeq.printable import printable
from edgeq.text.table_cache import cache_folder, stale_tables

__all__ = ["clean"]


class _Item(NamedTuple):
    """Something to remove; `remove` says whether it is gone."""

    path: Path
    nbytes: int
    what: str
    remove: Callable[[], bool]


def clean(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FOLDER...]", help="Folders with results.", show_default="the current one"),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False,
) -> None:
    """Remove what killed runs left behind.

    \b
    edgeq clean
    edgeq clean ~/models --yes

    Lists unfinished results in each FOLDER (not below it) and tokenizer tables that are not used any more, and asks.
    What a living run is writing stays.
    """
    for folder in folders or []:
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder", hint="name the folder that the result was to appear in")
    items = _items(folders or [Path()])
    for item in items:
        show(f"{printable(str(item.path))}  {item.nbytes / 1e6:,.1f} MB, {item.what}")
    if not items:
        say("nothing to remove")
    elif yes or _agreed(items):
        _remove(items)


def _items(folders: list[Path]) -> list[_Item]:
    from edgeq.quant.calibrate.workspace import find_unfinished

    dead = [
        _Item(leftover.path, leftover.nbytes, "unfinished result", leftover.remove)
        for folder in dict.fromkeys([*folders, cache_folder()])
        for leftover in find_leftovers(folder)
        if leftover.state == "dead"
    ]
    dead += [
        _Item(work.path, work.nbytes, "unfinished calibration, which the same command goes on from", work.remove)
        for folder in dict.fromkeys(folders)
        for work in find_unfinished(folder)
    ]
    return dead + [
        _Item(path, path.lstat().st_size, "unused tokenizer table", _unlink(path)) for path in stale_tables()
    ]


def _unlink(path: Path) -> Callable[[], bool]:
    def unlink() -> bool:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return not path.exists()

    return unlink


def _agreed(items: list[_Item]) -> bool:
    if not sys.stdin.isatty():
        say("nothing was removed: add --yes to remove")
        return False
    total = sum(item.nbytes for item in items)
    return typer.confirm(f"Remove these {len(items)} ({total / 1e6:,.1f} MB)?", err=True)


def _remove(items: list[_Item]) -> None:
    kept = [item.path for item in items if not item.remove()]
    total = sum(item.nbytes for item in items if item.path not in kept)
    say(f"removed {len(items) - len(kept)}: {total / 1e6:,.1f} MB")
    if kept:
        raise EdgeqError(f"{kept[0]} could not be removed", hint="check its permissions, or whether a run has it")
