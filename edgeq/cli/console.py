"""What the commands print: data to stdout, everything else to stderr; no colour off a terminal.

`rich` is imported when there is a bar to show: most commands are done before one is due.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import StringIO, TextIOWrapper
from time import monotonic
from typing import TYPE_CHECKING, TextIO

from edgeq.errors import EdgeqError
from edgeq.numbers import for_json
from edgeq.printable import printable

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

__all__ = [
    "Visible",
    "dim",
    "error_line",
    "for_terminal",
    "is_dumb",
    "measuring_bar",
    "new_bar",
    "peak_memory",
    "peak_memory_text",
    "prefill_bar",
    "prepare_streams",
    "report_error",
    "report_notes",
    "say",
    "show",
    "show_json",
    "show_warning",
    "warn",
]

_CONTROLS = {c: f"\\x{c:02x}" for c in (*range(0x20), *range(0x7F, 0xA0)) if chr(c) not in "\t\n"}


def show(text: str, *, end: str = "\n") -> None:
    """Print data, to stdout."""
    print(for_terminal(text, sys.stdout), end=end, flush=True)


def say(text: str, *, faint: bool = False, end: str = "\n") -> None:
    """Print what is not data, to stderr; `faint` for figures and other asides."""
    shown = for_terminal(text, sys.stderr)
    print(dim(shown) if faint else shown, end=end, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print a warning as one line, to stderr."""
    say(f"warning: {printable(text)}")


def dim(text: str) -> str:
    """`text` greyed out, if stderr is a terminal that shows it."""
    plain = os.environ.get("NO_COLOR") or is_dumb() or not sys.stderr.isatty()
    return text if plain else f"\033[2m{text}\033[0m"


def is_dumb() -> bool:
    """Whether the terminal knows no escape sequences, or nobody says what it knows."""
    return os.name == "posix" and os.environ.get("TERM", "").lower() in ("", "dumb", "unknown")


def show_json(value: object, *, indent: int | None = None) -> None:
    """Print a value as JSON: as readable as stdout's encoding allows, and valid in any."""
    value = for_json(value)
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:  # not a Unicode terminal, or a path with bytes that are no text
        text = json.dumps(value, indent=indent)
    print(text.translate(_JSON_CONTROLS), flush=True)


_JSON_CONTROLS = {c: f"\\u{c:04x}" for c in range(0x7F, 0xA0)}  # those that JSON itself lets pass


def for_terminal(text: str, stream: TextIO) -> str:
    """A text from elsewhere, with the control characters that would act on a terminal made visible (\\x1b); newline and
    tab stay, and in a file or pipe everything does.
    """
    if not stream.isatty():
        return text
    visible = Visible()
    return visible.push(text) + visible.flush()


class Visible:
    """Makes control characters of a text visible that comes in pieces: \\r\\n is a newline, alone \\r would act."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> str:
        """The next piece, as a terminal may have it."""
        text, self._held = self._held + text, ""
        if text.endswith("\r"):
            text, self._held = text[:-1], "\r"
        return text.replace("\r\n", "\n").translate(_CONTROLS)

    def flush(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return held.translate(_CONTROLS)


def prepare_streams() -> None:
    """Give the process three streams that take whatever is written: an odd character is no reason to end.

    A descriptor that the shell has closed (`<&-`, `2>&-`) leads nowhere: the next file opened would get its number, and
    what a library writes to "stderr" would go into that file.
    """
    for descriptor in range(3):
        with suppress(OSError):  # every number is taken: no such file can get it
            _fill(descriptor)
        with suppress(OSError, AttributeError):  # left by another program, and reads and writes would fail
            os.set_blocking(descriptor, True)
    sys.stdin = StringIO() if sys.stdin is None else sys.stdin  # None: closed by the shell (<&-)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _Nowhere())
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _fill(descriptor: int) -> None:
    """Lead a closed descriptor to the null device."""
    try:
        os.fstat(descriptor)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)  # the lowest that is free
        if opened != descriptor:
            os.dup2(opened, descriptor)
            os.close(opened)


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
    warn(str(message))


def report_error(error: EdgeqError) -> None:
    """Print an error and its hint to stderr."""
    say(error_line(error))


def report_notes(error: BaseException) -> None:
    """Print to stderr what was noted on the way of an error: what it leaves behind."""
    for note in getattr(error, "__notes__", ()):
        say(f"note: {note}")


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
    if not console.is_terminal or is_dumb():
        return None
    bar = Progress(*columns, console=console, transient=True)
    bar.start()
    return bar


class PrefillBar:
    """A progress bar over a long prompt, the tower's work on pictures or the reading of weights, as `what` says: shown
    on a terminal once it has taken `patience` seconds, gone when it is done. `nbytes`: what is counted are bytes.
    """

    def __init__(self, what: str = "prefill", patience: float = 1, *, nbytes: bool = False) -> None:
        self._what, self._patience, self._nbytes = what, patience, nbytes
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
        from rich import progress

        counted = (
            (progress.DownloadColumn(), progress.TransferSpeedColumn())
            if self._nbytes
            else (progress.MofNCompleteColumn(),)
        )
        columns = (progress.TextColumn(self._what), progress.BarColumn(), *counted, progress.TimeRemainingColumn())
        self._bar = new_bar(*columns)
        if self._bar is not None:
            self._bar.add_task("", total=total)


@contextmanager
def prefill_bar(what: str = "prefill", patience: float = 1, *, nbytes: bool = False) -> Iterator[PrefillBar]:
    """A PrefillBar that is gone afterwards, however the work ended."""
    bar = PrefillBar(what, patience, nbytes=nbytes)
    try:
        yield bar
    finally:
        bar.close()


class _MeasuringBar:
    """Shows what is measured of the machine, step by step; nothing off a terminal."""

    def __init__(self, bar: Progress | None) -> None:
        self._bar = bar

    def __call__(self, done: int, total: int, what: str) -> None:
        if self._bar is None:
            return
        if not self._bar.task_ids:
            self._bar.add_task("")
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, description=what)


@contextmanager
def measuring_bar() -> Iterator[_MeasuringBar]:
    """A bar for `edgeq.machine.measure` that is gone afterwards."""
    from rich.progress import BarColumn, TextColumn

    bar = new_bar(TextColumn("measuring this machine"), BarColumn(), TextColumn("{task.description}"))
    try:
        yield _MeasuringBar(bar)
    finally:
        if bar is not None:
            bar.stop()
