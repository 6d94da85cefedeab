"""The guide to the chat lists every command and option that there is."""

from __future__ import annotations

import re
from typing import Any

import typer
from documents import ROOT
from prompt_toolkit.application import create_app_session
from prompt_toolkit.output import DummyOutput

import edgeq
from edgeq.cli import app
from edgeq.cli.repl import Repl

PAGE = (ROOT / "docs" / "guides" / "chat.md").read_text()


def names(table: str) -> set[str]:
    """What stands in code in the first column of a table."""
    text = PAGE[PAGE.index(f"<!-- {table}:") :].split("\n\n")[0]
    first = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    return {name.split()[0] for cell in first for name in re.findall(r"`([^`]+)`", cell)}


def test_commands() -> None:
    with create_app_session(output=DummyOutput()):
        repl = Repl(edgeq.load("demo", backend="numpy").chat(), "demo")
    assert names("slash commands") == repl.names | {'"""', "//"}


def test_options() -> None:
    group: Any = typer.main.get_command(app)
    options = {parameter.opts[0] for parameter in group.commands["chat"].params if parameter.opts[0].startswith("--")}
    assert options <= names("options")
