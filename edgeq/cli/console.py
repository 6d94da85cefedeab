"""What the commands print: data to stdout, everything else to stderr; no colour off a terminal.

`rich` is imported when there is a bar to show: most commands are done before one is due.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO, TextIOWrapper
from time import monotonic
from typing import TYPE_CHECKING, TextIO

from edgeq.errors import EdgeqError
from edgeq.printable import printable

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

__all__ = [
    "dim",
    "error_line",
    "for_terminal",
    "new_bar",
    "peak_memory",
    "peak_memory_text",
    "prefill_bar",
    "prepare_streams",
    "report_error",
    "show_json",
    "show_warning",
]

_CONTROLS = {c: f"\\x{c:02x}" for c in (*range(0x20), *range(0x7F, 0xA0)) if chr(c) not in "\t\n"} | {0x0D: ""}


def dim(text: str) -> str:
    """`text` greyed out, if stderr is a terminal that shows it."""
    return f"\033[2m{text}\033[0m" if sys.stderr.isatty() and not os.environ.get("NO_COLOR") else text


def show_json(value: object, *, indent: int | None = None) -> None:
    """Print a value as JSON: as readable as stdout's encoding allows, and valid in any."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:  # not a Unicode terminal, or a path with bytes that are no text
        text = json.dumps(value, indent=indent)
    print(text)


def for_terminal(text: str, stream: TextIO) -> str:
    """What a model says, without the control characters that would act on a terminal; as it is in a file or pipe."""
    return text.translate(_CONTROLS) if stream.isatty() else text


def prepare_streams() -> None:
    """Give the process three streams that take whatever is written: an odd character is no reason to end."""
    sys.stdin = StringIO() if sys.stdin is None else sys.stdin  # None: closed by the shell (<&-)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _Nowhere())
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Nowhere(StringIO):
    """Takes what is written, and forgets it."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        return len(text)


def error_line(error: EdgeqError) -> str:
    """An error for the person at the prompt."""
    hint = f"\nhint: {error.hint}" if error.hint else ""
    return f"error: {error.message}{hint}"


def show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning to stderr as one line; in the place of `warnings.showwarning`."""
    print(f"warning: {printable(str(message))}", file=sys.stderr)


def report_error(error: EdgeqError) -> None:
    """Print an error and its hint to stderr."""
    print(error_line(error), file=sys.stderr)


def peak_memory() -> int | None:
    """Peak RSS of this process so far, bytes; the mapped pages of the model count. None where it is not known."""
    try:
        import resource
    except ImportError:  # Windows has no such module
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_memory_text() -> str:
    """The peak for a line of statistics: "peak memory 614 MB", or "peak memory n/a"."""
    peak = peak_memory()
    return "peak memory n/a" if peak is None else f"peak memory {peak / 1e6:,.0f} MB"


def new_bar(*columns: str | ProgressColumn) -> Progress | None:
    """A started progress bar on stderr, gone when stopped; None off a terminal. `columns` as rich has them."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        return None
    bar = Progress(*columns, console=console, transient=True)
    bar.start()
    return bar


class PrefillBar:
    """A progress bar over a long prompt, or the tower's work on pictures, as `what` says: shown on a terminal once it
    has taken `patience` seconds, gone when it is done.
    """

    def __init__(self, what: str = "prefill", patience: float = 1) -> None:
        self._what, self._patience = what, patience
        self._bar: Progress | None = None
        self._started = monotonic()

    def __call__(self, done: int, total: int) -> None:
        if done == 0:
            self._started = monotonic()
        if self._bar is None and done < total and monotonic() - self._started >= self._patience:
            self._open(total)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)
            if done >= total:
                self.close()

    def close(self) -> None:
        """Take the bar off the screen, wherever it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _open(self, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

        columns = (TextColumn(self._what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = new_bar(*columns)
        if self._bar is not None:
            self._bar.add_task("", total=total)


@contextmanager
def prefill_bar(what: str = "prefill", patience: float = 1) -> Iterator[PrefillBar]:
    """A PrefillBar that is gone afterwards, however the work ended."""
    bar = PrefillBar(what, patience)
    try:
        yield bar
    finally:
        bar.close()
