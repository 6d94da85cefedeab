"""Text to the clipboard, by a program of the desktop or, where there is none, by asking the terminal (OSC 52)."""

from __future__ import annotations

import os
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable
from shutil import which

from edgeq.errors import UsageError
from edgeq.printable import printable

__all__ = ["copy"]

_OSC_52_LIMIT = 74_994  # characters of base64 that every terminal with OSC 52 takes


def copy(text: str, send: Callable[[str], bool]) -> str:
    """Copy `text`, and say how. `send` sends an escape sequence to the terminal, or returns False.

    Raises UsageError where neither a program nor the terminal can be asked.
    """
    size = f"{len(text):,} character{'' if len(text) == 1 else 's'}"
    failed = ""
    for command in _programs():
        problem = _run(command, text)
        if problem is None:
            return f"copied {size} with {command[0]}"
        failed = failed or f"; {command[0]} failed: {problem}"
    encoded = b64encode(text.encode("utf-8", "replace")).decode("ascii")
    if len(encoded) <= _OSC_52_LIMIT and send(f"\033]52;c;{encoded}\a"):
        return f"asked the terminal to copy {size} (OSC 52, which not every terminal obeys{failed})"
    raise UsageError(
        f"{size} cannot be copied: no clipboard program, and the terminal cannot be asked{failed}",
        hint="install wl-clipboard or xclip, or write the conversation to a file with /save FILE.md",
    )


def _programs() -> list[list[str]]:
    """Those that are here and reach the clipboard of the screen that is looked at: over SSH, none does."""
    if os.environ.get("SSH_TTY") or os.environ.get("SSH_CONNECTION"):
        return []
    commands = []
    if sys.platform == "darwin":
        commands += [["pbcopy"]]
    if os.environ.get("WAYLAND_DISPLAY"):
        commands += [["wl-copy"]]
    if os.environ.get("DISPLAY"):
        commands += [["xclip", "-selection", "clipboard"], ["xsel", "--clipboard", "--input"]]
    return [command for command in commands if which(command[0])]


def _run(command: list[str], text: str) -> str | None:
    """None once the program has taken the text, or what went wrong.

    Its output is thrown away: xclip stays behind to serve the selection, and would keep a pipe open.
    """
    try:
        done = subprocess.run(
            command, input=text.encode("utf-8", "replace"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            timeout=5, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "it did not end"
    except OSError as error:
        return printable(error.strerror or str(error))
    return f"exit code {done.returncode}" if done.returncode else None
