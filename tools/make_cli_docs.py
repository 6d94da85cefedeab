#!/usr/bin/env python3
"""Write docs/cli.md from the commands' own --help.  `--check` only compares (tests/test_docs.py does that)."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

INTRO = """\
# Commands

Made from `--help` by tools/make_cli_docs.py.

Data goes to stdout, everything else to stderr. The options of `chat` and `generate` can also be
set by environment variables (EDGEQ_ and the option's name) and in ~/.config/edgeq/config.toml; `edgeq info --config`
shows which won. Exit codes: 0 done, 1 failed while
running, 2 usage, 3 does not fit, 4 bad model, 5 network, 6 quality check failed, 130 interrupted, 143 terminated.
"""


def help_of(*command: str) -> str:
    from edgeq.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def document() -> str:
    os.environ |= {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1"}
    from edgeq.cli import COMMANDS

    sections = [f"## edgeq {name}\n\n```\n{help_of(name)}\n```\n" for name in COMMANDS]
    return "\n".join([INTRO, f"```\n{help_of()}\n```\n", *sections])


def main() -> None:
    path, text = ROOT / "docs" / "cli.md", document()
    if "--check" in sys.argv[1:]:
        sys.exit(None if path.read_text() == text else "docs/cli.md is out of date: run tools/make_cli_docs.py")
    path.write_text(text)


if __name__ == "__main__":
    main()
