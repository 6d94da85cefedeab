"""Which module of the package imports which, read from the source: nothing is executed."""

from __future__ import annotations

import ast
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import edgeq

PACKAGE = Path(edgeq.__file__).parent


class Import(NamedTuple):
    """A module that another imports: when that is loaded, or later (in a function) or never (for type checkers)."""

    name: str
    at_load: bool


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by name; of a compiled one, its stub. The links in a checkout count."""
    found = {}
    for folder, _, files in os.walk(PACKAGE, followlinks=True):
        for path in (Path(folder, file) for file in files if file.endswith((".py", ".pyi"))):
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> tuple[Import, ...]:
    """Everything that `module` imports; `from package import name` counts as the module `package.name` if it is one."""
    visitor = _Visitor()
    visitor.visit(ast.parse(modules()[module].read_text(encoding="utf-8")))
    return tuple(visitor.found)


class _Visitor(ast.NodeVisitor):
    def __init__(self) -> None:
        self.found: list[Import] = []
        self._at_load = True

    def visit_Import(self, node: ast.Import) -> None:
        self.found += (Import(alias.name, self._at_load) for alias in node.names)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.module, f"line {node.lineno}: a relative import"
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            self.found.append(Import(name if name in modules() else node.module, self._at_load))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._later(node.body)

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test).endswith("TYPE_CHECKING"):
            self._later(node.body)
            node = ast.If(node.test, [], node.orelse)
        self.generic_visit(node)

    def _later(self, body: list[ast.stmt]) -> None:
        before, self._at_load = self._at_load, False
        for statement in body:
            self.visit(statement)
        self._at_load = before
