"""A program at a real pseudo-terminal, as a test types at it and reads it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from time import monotonic
from typing import IO, Any

from process import ROOT

ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[()][A-Z0-9]|[=>78])")
_PATIENCE = 30  # seconds until a test gives up: no test waits that long for what comes


class Terminal:
    """`edgeq` with some arguments at a terminal of its own. stdout, stderr: files in its place."""

    def __init__(
        self, *arguments: str | Path, columns: int = 100, stdout: IO[Any] | int | None = None,
        stderr: IO[Any] | int | None = None, code: str = "from edgeq.__main__ import main; main()", **environment: str,
    ) -> None:  # fmt: skip
        self._end, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        paths = [path for path in sys.path if path and Path(path) != ROOT]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, *map(str, arguments)],
            stdin=end,
            stdout=end if stdout is None else stdout,
            stderr=end if stderr is None else stderr,
            env={
                **os.environ, "TERM": "xterm-256color", "EDGEQ_BACKEND": "numpy",
                "PYTHONPATH": os.pathsep.join([*paths, str(ROOT)]), **environment,
            },
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(end)
        self.output = ""  # all of it
        self._read = 0  # as far as it was expected

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *failure: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(_PATIENCE)
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
        return self.process.wait(_PATIENCE)

    def modes(self) -> int:
        """The local modes of the terminal (ECHO, ICANON, ...)."""
        modes: int = termios.tcgetattr(self._end)[3]
        return modes

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


def _take_terminal() -> None:
    """In the new process: a session of its own, whose terminal is stdin."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
