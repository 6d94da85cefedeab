"""What `edgeq info` and `edgeq doctor` both say: the installation, and facts as lines."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping

import edgeq
from edgeq.backends import Backend
from edgeq.printable import printable

__all__ = ["Facts", "description", "lines", "versions"]

Facts = Mapping[str, object]
"""Values by name; a value may be facts again."""


def versions() -> dict[str, str]:
    """edgeq's version and Python's, and the machine."""
    return {
        "edgeq": edgeq.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
    }


def description(backend: Backend) -> str:
    """How a backend runs here, or why it cannot; UsageError for an EDGEQ_ISA that does not exist here."""
    return f"not available: {backend.reason}" if backend.ops is None else backend.ops.describe()


def lines(facts: Facts, indent: str = "") -> Iterator[str]:
    """A line per fact, names and values in columns; facts within facts are indented below their name."""
    width = max((len(key) for key, value in facts.items() if not isinstance(value, Mapping)), default=0)
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield f"{indent}{printable(key)}" + ("" if value else ": nothing")
            yield from lines(value, indent + "  ")
        else:
            yield f"{indent}{printable(key):{width}}  {printable(str(value))}"
