"""Programs of the system that are asked for something, and may never answer."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

__all__ = ["Answer", "ask_program"]


class Answer(NamedTuple):
    """What a program gave: its exit status, and its output, with U+FFFD for what is not UTF-8."""

    code: int
    out: str
    errors: str


def ask_program(*words: str, seconds: float) -> Answer:
    """Run a program that reads no input. One that takes longer than `seconds` is ended with all that it started.

    Raises OSError where it cannot be started, and TimeoutError, which is one, where it took too long.
    """
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        out, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{Path(words[0]).name} did not end within {seconds:g} seconds") from None
    finally:
        if process.returncode is None:
            _end(process)
    return Answer(process.returncode, out.decode(errors="replace"), errors.decode(errors="replace"))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program and what it started, which may hold its output open."""
    with suppress(ProcessLookupError, PermissionError, AttributeError):  # Windows has no groups
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
    with suppress(subprocess.TimeoutExpired):  # in the middle of a read from a device it does not end either
        process.wait(timeout=1)
