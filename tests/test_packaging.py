"""What pyproject.toml promises: the version, and libraries that the package really uses."""

from __future__ import annotations

import re
import sys
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from imports import imports, modules

import edgeq

PROJECT: dict[str, Any] = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
REQUIRED = {re.split(r"[^\w.-]", requirement)[0] for requirement in PROJECT["dependencies"]}
OPTIONAL = {
    re.split(r"[^\w.-]", requirement)[0]
    for extra in ("video", "grammar")
    for requirement in PROJECT["optional-dependencies"][extra]
}
CALLED = {"PIL": "pillow"}  # by its package
IMPORTED = {
    CALLED.get(top, top) for top in (name.partition(".")[0] for module in modules() for name, _ in imports(module))
}
ALSO_INSTALLED = {"click": "typer", "markdown_it": "rich"}  # what one is imported for comes with the other


def test_every_required_library_is_imported() -> None:
    assert IMPORTED >= REQUIRED


def test_every_imported_library_is_required() -> None:
    libraries = {ALSO_INSTALLED.get(name, name) for name in IMPORTED - sys.stdlib_module_names - {"edgeq"}}
    assert libraries <= REQUIRED | OPTIONAL


def test_the_version_is_written_once() -> None:
    assert "version" not in PROJECT
    assert "version" in PROJECT["dynamic"]
    with suppress(PackageNotFoundError):  # a checkout
        assert version("edgeq") == edgeq.__version__
