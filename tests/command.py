"""The command line in this process, as a test calls it."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import NamedTuple, Protocol

import pytest

from edgeq.cli import main


class Result(NamedTuple):
    code: int
    out: str
    err: str


class Run(Protocol):
    """`edgeq` with these arguments."""

    def __call__(self, *arguments: str | Path, stdin: str | None = None) -> Result: ...


def leave_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration, history or stdin of the person who runs the tests; the NumPy backend."""
    for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, str(folder / name))
    monkeypatch.setenv("EDGEQ_BACKEND", "numpy")
    monkeypatch.setattr(sys, "stdin", None)


def runner(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """What runs commands and returns what they print."""

    def run(*arguments: str | Path, stdin: str | None = None) -> Result:
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(int(left.value.code or 0), captured.out, captured.err)

    return run
