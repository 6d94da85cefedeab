"""Where Python lacks what only Unix has, edgeq still runs, and says what it does not know."""

from __future__ import annotations

import pytest
from imports import imports, modules
from process import run_python

UNIX_ONLY = ["fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"]

HIDE = f"""
import os, signal, sys
sys.modules.update(dict.fromkeys({UNIX_ONLY}))
for module, name in [(os, "sched_getaffinity"), (signal, "SIGPIPE"), (signal, "SIGKILL")]:
    module.__dict__.pop(name, None)
"""

GENERATE = """
from edgeq.cli import main
main(["generate", "demo", "-p", "The sky is", "--max-tokens", "2", "--backend", "numpy"])
"""


@pytest.mark.parametrize("module", modules())
def test_no_module_needs_unix_to_load(module: str) -> None:
    assert not {name for name, at_load in imports(module) if at_load} & set(UNIX_ONLY)


def test_a_reply_without_unix() -> None:
    done = run_python(HIDE + GENERATE)
    assert done.returncode == 0, done.stderr
    assert "peak memory n/a" in done.stderr


def test_a_reply_with_unix_says_its_peak_memory() -> None:
    pytest.importorskip("resource")
    done = run_python(GENERATE)
    assert done.returncode == 0, done.stderr
    assert "peak memory n/a" not in done.stderr
