"""The types of the native module (backends/cpu/_native.pyi) name what is there, with its parameters."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

native: Any = pytest.importorskip("edgeq.backends.cpu._native", reason="the native kernels are not built")

STUB = Path(__file__).parents[1] / "backends" / "cpu" / "_native.pyi"
CONSTRUCTORS = ("__init__", "__new__")


def declared(body: Iterable[ast.stmt], prefix: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names of the stub; a function's with its parameters, `self` and `cls` left out."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from declared(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            name = "__init__" if node.name in CONSTRUCTORS else node.name
            if name.startswith("__") and name != "__init__":
                continue
            names = [a.arg for a in node.args.args]
            yield prefix + name, tuple(names[1:] if prefix else names)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield prefix + node.target.id, ()


def parameters(signature: str) -> tuple[str, ...]:
    """Names of the parameters in one of nanobind's signatures, "def name(x: ndarray[...], n: int) -> None"."""
    depth, names = 0, [""]
    for character in signature[signature.index("(") + 1 :]:
        depth += (character in "[(") - (character in "])")
        if depth < 0:
            break
        if character == "," and depth == 0:
            names.append("")
        else:
            names[-1] += character
    found = [re.split(r"[:=]", name.strip())[0] for name in names if name.strip()]
    return tuple(name for name in found if name not in ("self", "cls"))


def present(owner: Any, prefix: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """The same of the module; a constructor that nanobind declares twice comes once."""
    for name, value in vars(owner).items():
        if isinstance(value, type):
            yield from present(value, f"{name}.")
        elif name == "__init__" or not name.startswith("__"):
            for signature, *_ in getattr(value, "__nb_signature__", [("()",)]):
                yield prefix + name, parameters(signature)


def test_the_stub_says_what_is_there() -> None:
    assert sorted(declared(ast.parse(STUB.read_text()).body)) == sorted(present(native))
