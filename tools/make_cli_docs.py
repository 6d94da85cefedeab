#!/usr/bin/env python3
"""Write docs/reference/commands.md from the commands' own --help. `--check` only compares."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

PAGE = ROOT / "docs" / "reference" / "commands.md"

INTRO = """\
# Commands

Generated from `--help` by tools/make_cli_docs.py.

Data goes to stdout, everything else to stderr. Many options can also be set by environment variables, and all in a
configuration file; see [configuration](configuration.md). Exit codes are in
[exit-codes.md](exit-codes.md); where results may go, and what `--force` overwrites, in [files.md](files.md).
"""

ALIASES = """\
## Names from other engines

Flags of llama.cpp, ollama and mlx-lm that mean the same as one of edgeq's work, too:

| command | flag | also accepted |
|---|---|---|
"""


def help_of(*command: str) -> str:
    from edgeq.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def aliases() -> str:
    """The table of the names that help does not show."""
    import typer

    from edgeq.cli import app
    from edgeq.cli.help import spellings

    commands: dict[tuple[str, str], list[str]] = {}
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        for option in command.params:
            if option.param_type_name == "option" and (others := _others(option, spellings)):
                commands.setdefault(others, []).append(name)
    rows = [f"| {', '.join(names)} | {flag} | {others} |\n" for (flag, others), names in commands.items()]
    return ALIASES + "".join(rows)


def _others(option: Any, spellings: Any) -> tuple[str, str] | None:
    shown, others = spellings(option)
    if option.hidden:  # all its names are those of others
        shown, others = [f"the argument {option.metavar}" if option.metavar else "always so"], [*others, *shown]
    elif others and set(others) <= set(option.secondary_opts):
        shown = option.secondary_opts[:1]
    names = ", ".join(f"`{name}`" for name in sorted(others, key=lambda name: (len(name) > 3, name)))
    own = f"`{shown[-1]}`" if shown[-1].startswith("-") else shown[-1]
    return (own, names) if others else None


def document() -> str:
    os.environ |= {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1"}
    from edgeq.cli import COMMANDS

    sections = [f"## edgeq {name}\n\n```\n{help_of(name)}\n```\n" for name in COMMANDS]
    return "\n".join([INTRO, f"```\n{help_of()}\n```\n", *sections, aliases()])


def main() -> None:
    path, text = ROOT / "docs" / "reference" / "commands.md", document()
    if "--check" in sys.argv[1:]:
        sys.exit(
            None
            if path.read_text() == text
            else "docs/reference/commands.md is out of date: run tools/make_cli_docs.py"
        )
    path.write_text(text)


if __name__ == "__main__":
    main()
