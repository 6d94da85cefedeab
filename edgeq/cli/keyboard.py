"""What is typed at the prompt: line editing, history, pastes; and the keyboard while the model talks.

Prompt and echo belong on the terminal, wherever stdout leads. A terminal that knows no escape sequences (TERM=dumb)
gets the line editing of the system.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.application import create_app_session
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import Output, create_output

from edgeq.cli.console import is_dumb, warn
from edgeq.inputs import expand_user
from edgeq.printable import one_line

__all__ = ["FENCE", "Keyboard", "Line"]

FENCE = '"""'

_LONGEST_ENTRY = 1 << 16  # characters of a line that the history keeps; a pasted book is not worth its room


class Line(NamedTuple):
    """What was entered. A paste is text: only a beginning that was typed can be a command, or open a fence."""

    text: str
    typed_start: bool = True
    typed_end: bool = True


class Keyboard:
    """Lines from the terminal that stdin is, with a history unless EDGEQ_NOHISTORY is set.

    A context manager. Within it, what is typed or pasted while nobody reads, as when the model talks, is neither
    echoed nor changed: it waits for the next line.
    """

    def __init__(self) -> None:
        self._history = _History(_history_file())
        self._stack = ExitStack()
        self._terminal: TextIO | None = None
        self._session: PromptSession[str] | None = None
        self._pastes: list[str] = []

    def __enter__(self) -> Keyboard:
        if sys.stdin is not None and sys.stdin.isatty():
            self._terminal = self._stack.enter_context(_terminal())
            if is_dumb():
                return self
            self._stack.enter_context(_kept(sys.stdin.fileno()))
            self._stack.enter_context(create_app_session(output=_output(self._terminal)))
            self._stack.callback(self._mark_pastes, False)
        self._session = PromptSession(
            history=self._history, key_bindings=self._bindings(), enable_suspend=True, reserve_space_for_menu=0
        )
        self._mark_pastes(True)
        return self

    def __exit__(self, *failure: object) -> None:
        self._stack.close()

    @property
    def edits(self) -> bool:
        """Whether `read` can begin with a text to change."""
        return self._session is not None

    def read(self, prompt: str, default: str = "", *, literal: bool = False, remember: bool = True) -> Line:
        """The next line. EOFError at Ctrl-D, KeyboardInterrupt at Ctrl-C.

        literal: what is entered is text, whatever it begins with; the history keeps it so that it is text again.
        remember: put it into the history.
        """
        self._pastes.clear()
        self._history.asleep = not remember
        self._history.is_text = lambda text: literal or self._is_pasted(text, str.startswith)
        try:
            entered = self._session.prompt(prompt, default=default) if self._session else self._plain(prompt)
        finally:
            self._mark_pastes(True)  # prompt_toolkit has ended it
            self._history.report()
        text = _clean(entered)
        return Line(text, not self._is_pasted(text, str.startswith), not self._is_pasted(text, str.endswith))

    def send(self, sequence: str) -> bool:
        """Send an escape sequence to the terminal; False if there is none that would obey it."""
        if self._terminal is None or is_dumb():
            return False
        return self._send(sequence)

    def _send(self, sequence: str) -> bool:
        assert self._terminal is not None
        try:
            self._terminal.write(sequence)
            self._terminal.flush()
        except OSError:
            return False
        return True

    def _mark_pastes(self, on: bool) -> None:
        if self._terminal is not None and self._session is not None:
            self._send("\033[?2004h" if on else "\033[?2004l")

    def _plain(self, prompt: str) -> str:
        """A line as the terminal itself edits it."""
        if self._terminal is not None:
            self._terminal.write(prompt)
            self._terminal.flush()
        line = sys.stdin.buffer.readline()
        if not line:
            self._send("\n")
            raise EOFError
        return line.decode("utf-8", "surrogateescape").removesuffix("\n").removesuffix("\r")

    def _bindings(self) -> KeyBindings:
        bindings = KeyBindings()

        @bindings.add(Keys.BracketedPaste)
        def paste(event: KeyPressEvent) -> None:
            text = event.data.replace("\r\n", "\n").replace("\r", "\n")
            self._pastes.append(_clean(text))
            event.current_buffer.insert_text(text)

        @bindings.add(Keys.Vt100MouseEvent)
        def no_mouse(event: KeyPressEvent) -> None:  # a colour in a pasted log looks like one
            event.current_buffer.insert_text(event.data)

        @bindings.add(Keys.Escape, Keys.Enter)
        def new_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        return bindings

    def _is_pasted(self, text: str, at: Any) -> bool:
        """Whether a paste is what `text` starts or ends with."""
        return any(at(text, paste) for paste in self._pastes if paste.strip())


def _clean(text: str) -> str:
    """`text` without the lone surrogates that bytes become which are not UTF-8: each is U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def _as_text(text: str) -> str:
    """`text` as it is typed to be taken as text: with a slash more, or between fences."""
    if text.startswith("/"):
        return f"/{text}"
    return f"{FENCE}{text}{FENCE}" if text.lstrip().startswith(("/", FENCE)) else text


@contextmanager
def _kept(descriptor: int) -> Iterator[None]:
    """A terminal keeps what is typed for who reads it next, unseen and unchanged; Ctrl-C still interrupts."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    try:
        before: list[Any] = termios.tcgetattr(descriptor)
    except termios.error:  # the terminal is gone
        yield
        return
    local = before[3] & ~(termios.ECHO | termios.ICANON) | termios.NOFLSH  # Ctrl-C takes nothing typed with it
    quiet = [before[0] & ~termios.ICRNL, *before[1:3], local, *before[4:]]
    termios.tcsetattr(descriptor, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        with suppress(termios.error):
            termios.tcsetattr(descriptor, termios.TCSANOW, before)


@contextmanager
def _terminal() -> Iterator[TextIO]:
    """Where prompt and echo go: to stdout or stderr if it is a terminal, or else to the one that the process has."""
    for stream in (sys.stdout, sys.stderr):
        if stream.isatty():
            yield stream
            return
    try:
        opened = Path("/dev/tty").open("w", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed below
    except OSError:
        yield sys.stderr
        return
    with opened:
        yield opened


def _output(terminal: TextIO) -> Output:
    """The terminal for prompt_toolkit, which is not to ask where the cursor is: only its menus would need to know, and
    the answer of a slow line would be read as typed."""
    output = create_output(terminal)
    if hasattr(output, "enable_cpr"):
        output.enable_cpr = False
    return output


# --- history ---------------------------------------------------------------------------------------------------------


def _history_file() -> Path | None:
    """Lines of earlier conversations, in the user's state folder; off with EDGEQ_NOHISTORY."""
    if os.environ.get("EDGEQ_NOHISTORY"):
        return None
    return expand_user(Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state")) / "edgeq" / "history"


class _History(FileHistory):
    """The lines entered; those of `file`, if there is one, before them. A file that cannot be used is one warning."""

    def __init__(self, file: Path | None) -> None:
        super().__init__(str(file))
        self._file = file
        self._problem = ""
        self.asleep = False
        self.is_text: Callable[[str], bool] = lambda _: False
        if file is not None:
            self._try(lambda: _prepare(file))
            self.report()

    def report(self) -> None:
        """Tell, once, that the file cannot be used; not while a line is edited."""
        if self._problem:
            warn(f"lines are not remembered: {self._problem}")
            self._problem = ""

    def append_string(self, string: str) -> None:
        if self.asleep:
            return
        entry = _clean(string)
        super().append_string(_as_text(entry) if self.is_text(entry) else entry)

    def load_history_strings(self) -> Iterable[str]:
        return self._try(lambda: list(super(_History, self).load_history_strings())) or []

    def store_string(self, string: str) -> None:
        if len(string) <= _LONGEST_ENTRY:
            self._try(lambda: super(_History, self).store_string(string))

    def _try(self, work: Any) -> Any:
        if self._file is None:
            return None
        try:
            return work()
        except (OSError, ValueError) as error:
            self._problem = one_line(error)
            self._file = None
            return None


def _prepare(file: Path) -> None:
    """Make the folder and the file; OSError if it is none that lines can be read from and added to."""
    if not file.is_absolute():  # XDG_STATE_HOME is to be ignored then, or a user has no home
        raise OSError(f"{file} is not an absolute path")
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(file, flags, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{file} is not a regular file")
    finally:
        os.close(descriptor)
