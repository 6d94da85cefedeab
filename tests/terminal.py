"""A program at a real pseudo-terminal, as a test types at it and reads it."""

from __future__ import annotations

import fcntl
import gc
import io
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import IO, Any, NoReturn

from edgeq.cli import main

ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[()][A-Z0-9]|[=>78])")
_PATIENCE = 30  # seconds until a test gives up: no test waits that long for what comes


class Terminal:
    """`edgeq` with some arguments in a process whose terminal this is. stdout, stderr: files in its place.

    The process is a fork of this one, which has imported everything already: starting Python anew takes a second.
    prepare: called in it first. environment: what differs from this process's.
    """

    def __init__(
        self, *arguments: str | Path, columns: int = 100, stdout: IO[Any] | None = None, stderr: IO[Any] | None = None,
        prepare: Callable[[], None] = lambda: None, **environment: str,
    ) -> None:  # fmt: skip
        self._end, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads of the test runner are not needed there
            self.pid = os.fork()
        if self.pid == 0:
            os.environ.update({"TERM": "xterm-256color", "EDGEQ_BACKEND": "numpy", **environment})
            streams = [end, *(end if stream is None else stream.fileno() for stream in (stdout, stderr))]
            _run(streams, prepare, [str(argument) for argument in arguments])
        os.close(end)
        self._code: int | None = None
        self.output = ""  # all of it
        self._read = 0  # as far as it was expected

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *failure: object) -> None:
        if self._ended() is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._end)

    def send(self, keys: str | bytes) -> None:
        """Type `keys`."""
        data = keys.encode() if isinstance(keys, str) else keys
        while data:
            data = data[os.write(self._end, data[:1024]) :]

    def line(self, text: str) -> None:
        """Type a line, and Enter."""
        self.send(text + "\r")

    def paste(self, text: str) -> None:
        """Paste a text as terminals do that mark pastes; without Enter."""
        self.send(f"\x1b[200~{text}\x1b[201~")

    def expect(self, pattern: str) -> str:
        """Wait until the output goes on with something that matches; returns it, escape sequences left out."""
        deadline = monotonic() + _PATIENCE
        while True:
            text = self.text
            if found := re.search(pattern, text[self._read :]):
                self._read += found.end()
                return found[0]
            if not self._more(deadline - monotonic()):
                raise AssertionError(f"{pattern!r} did not come; the terminal shows:\n{text[self._read :][-3000:]}")

    @property
    def text(self) -> str:
        """The output without escape sequences, as far as they are whole."""
        whole = re.sub(r"(\x1b(\[[0-?]*[ -/]*|\][^\x07]*|[()])?|\r)\Z", "", self.output)
        return re.sub("\r+\n", "\n", ESCAPES.sub("", whole))

    def leave(self) -> int:
        """Wait until the program has ended; its exit code, negative for a signal."""
        deadline = monotonic() + _PATIENCE
        while self._more(deadline - monotonic()):
            pass
        while (code := self._ended()) is None:
            assert monotonic() < deadline, "the program does not end"
            sleep(0.01)
        return code

    def modes(self) -> int:
        """The local modes of the terminal (ECHO, ICANON, ...)."""
        modes: int = termios.tcgetattr(self._end)[3]
        return modes

    def _ended(self) -> int | None:
        if self._code is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self._code = os.waitstatus_to_exitcode(ended[1])
        return self._code

    def _more(self, patience: float) -> bool:
        """Read what comes next; False if nothing does."""
        if not select.select([self._end], [], [], max(0, patience))[0]:
            return False
        try:
            data = os.read(self._end, 1 << 16)
        except OSError:  # the other end is closed
            return False
        self.output += data.decode("utf-8", "replace")
        return bool(data)


def _run(streams: list[int], prepare: Callable[[], None], arguments: list[str]) -> NoReturn:
    """In the new process: be the program at its terminal."""
    code = 99
    try:
        gc.freeze()  # what belongs to the tests is not to be finalized here
        os.setsid()
        fcntl.ioctl(streams[0], termios.TIOCSCTTY, 0)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.closerange(3, 256)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        sys.stdin, sys.stdout, sys.stderr = (_text(number, mode) for number, mode in enumerate("rww"))
        prepare()
        main(arguments)
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _text(number: int, mode: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(open(number, mode + "b", closefd=False), "utf-8", line_buffering=True)
