"""Imports inside the package point one way: no circles, also counting what only type checkers and functions import."""

from __future__ import annotations

from graphlib import TopologicalSorter

import pytest
from imports import imports, modules
from process import run_python

# Whoever stands in a line may import from the lines above it. A name stands for all modules below it that are not
# named themselves.
ORDER = [
    "edgeq.printable",
    "edgeq.errors",
    "edgeq.shortage",
    "edgeq.foreign",
    "edgeq.numbers",
    "edgeq.inputs",
    "edgeq.files",
    "edgeq.machine.facts",
    "edgeq.version",
    "edgeq.processor",
    "edgeq.config",
    "edgeq.formats",
    "edgeq.identify",
    "edgeq.vision",
    "edgeq.weights",
    "edgeq.state",
    "edgeq.backends.ops",
    "edgeq.model",
    "edgeq.backends",
    "edgeq.guard",
    "edgeq.text",
    "edgeq.checkpoint",
    "edgeq.hub",
    "edgeq.adapters",
    "edgeq.loading",
    "edgeq.family",
    "edgeq.memory",
    "edgeq.draft_head",
    "edgeq.pace",
    "edgeq.engine",
    "edgeq.machine",
    "edgeq.cache_check",
    "edgeq.state_io",
    "edgeq.generate",
    "edgeq.session",
    "edgeq.api",
    "edgeq.quality",
    "edgeq.quant",
    "edgeq.bench",
    "edgeq.fit",
    "edgeq.testing",
    "edgeq",
    "edgeq.cli",
    "edgeq.__main__",
]


def unit(module: str) -> str:
    """The line of ORDER that `module` belongs to."""
    name = module
    while name not in ORDER or (name == "edgeq" and module != name):
        assert "." in name, f"{module} has no place in the order of imports: give it one in {__file__}"
        name = name.rpartition(".")[0]
    return name


def imported(module: str) -> set[str]:
    """The package's modules that `module` imports."""
    return {name for name, _ in imports(module) if name in modules()}


def test_every_line_of_the_order_stands_once_for_something() -> None:
    assert len(set(ORDER)) == len(ORDER)
    assert {unit(module) for module in modules()} == set(ORDER)


def test_no_circles() -> None:
    graph = {module: imported(module) for module in modules()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names one


@pytest.mark.parametrize("module", modules())
def test_imports_point_one_way(module: str) -> None:
    place = ORDER.index(unit(module))
    wrong = [name for name in imported(module) if unit(name) != unit(module) and ORDER.index(unit(name)) > place]
    assert not wrong, f"{module} imports {wrong}, which stands above it"


def test_nothing_that_runs_imports_the_helpers_of_tests() -> None:
    assert not [module for module in modules() if "edgeq.testing" in imported(module)]


def test_importing_edgeq_imports_next_to_nothing() -> None:
    done = run_python("import sys\nimport edgeq\nprint(*sorted(m for m in sys.modules if m.startswith('edgeq')))")
    assert done.stdout.split() == ["edgeq", "edgeq.errors", "edgeq.printable", "edgeq.version"]


def test_completing_text_waits_for_nothing_of_conversations() -> None:
    done = run_python("import sys\nimport edgeq.api, edgeq.cli.generate\nprint(*sys.modules)")
    unwanted = {"jinja2", "prompt_toolkit", "rich", "edgeq.session.chat", "edgeq.text.tool_calls"}
    assert not unwanted & set(done.stdout.split())
