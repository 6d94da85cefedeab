"""What the program says: rules for error messages and hints, checked on every one of them in the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
ERRORS = {"EdgeqError", "MediaError", "UsageError", "MemoryBudgetError", "ModelError", "NetworkError", "QualityError"}
OURS = ("edgeq", "quant", "backends")


class Said(NamedTuple):
    """The text of an error in the source; what is filled in stands as {}."""

    place: str
    message: str
    hint: str


def errors_in_source() -> Iterator[Said]:
    files = [path for folder in OURS for path in sorted((ROOT / folder).rglob("*.py"))]
    for path in {path.resolve() for path in files}:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS and node.args:
                hints = [keyword.value for keyword in node.keywords if keyword.arg == "hint"]
                place = f"{path.relative_to(ROOT)}:{node.lineno}"
                yield Said(place, text(node.args[0]), text(hints[0]) if hints else "")


def text(node: ast.expr) -> str:
    """The literal text of an expression."""
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.JoinedStr(values=parts):
            return "".join(text(part) if isinstance(part, ast.Constant) else "{}" for part in parts)
        case ast.BinOp(left=left, right=right):
            return text(left) + text(right)
        case ast.IfExp(body=one, orelse=other):
            return f"{text(one)} / {text(other)}"
        case _:
            return "{}"


SAID = sorted(errors_in_source())
LIBRARY = [said for said in SAID if "/cli/" not in said.place]
each = pytest.mark.parametrize("said", SAID, ids=lambda said: said.place)


def test_there_are_errors() -> None:
    assert len(SAID) > 80


@each
def test_messages_state_what_is_wrong(said: Said) -> None:
    assert not re.search(r"\bthere (is|are) no\b|\bhas to be\b|\bhave to be\b", said.message)
    assert not said.message.endswith((".", "!", "?"))


@each
def test_a_hint_is_the_next_action(said: Said) -> None:
    assert not said.hint.endswith((".", "!", "?"))
    assert not re.search(r"\b(is|are) (damaged|incomplete)\b", said.hint), "a diagnosis"


@pytest.mark.parametrize("said", LIBRARY, ids=lambda said: said.place)
def test_the_library_speaks_to_python_too(said: Said) -> None:
    """`load(kv_bits=3)` is not told about `--kv-bits` alone."""
    for spoken in (said.message, said.hint):
        without_commands = re.sub("`[^`]*`", "", spoken)
        assert not re.search(r"(^| )--?[a-z]", without_commands) or "Python" in spoken
