"""The backends, and which one runs.

A backend is a class derived from `edgeq.backends.base.BaseOps`. Three are built in; a distribution adds one by naming
its class in the entry-point group `edgeq.backends`:

    [project.entry-points."edgeq.backends"]
    mine = "my_package:MyOps"

Importing the class must raise ImportError, with the reason in its message, where the backend cannot run.
"""

from __future__ import annotations

import inspect
import os
import platform
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from edgeq.errors import EdgeqError, UsageError
from edgeq.shortage import is_shortage

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from edgeq.backends.ops import Ops

__all__ = ["GROUP", "Backend", "available", "choose", "select"]

if __name__ != "edgeq.backends":
    raise ImportError(f"this folder is the package edgeq.backends, not {__name__}: import edgeq.backends")

GROUP = "edgeq.backends"


class _BuiltIn(NamedTuple):
    """What an entry point is, without the time it takes to import importlib.metadata."""

    name: str
    value: str

    def load(self) -> Any:
        module, _, ops = self.value.partition(":")
        return getattr(import_module(module), ops)


_BUILT_IN = (
    _BuiltIn("mlx", "edgeq.backends.mlx:MlxOps"),
    _BuiltIn("cpu", "edgeq.backends.cpu:CpuOps"),
    _BuiltIn("numpy", "edgeq.backends.numpy:NumpyOps"),
)


class Backend(NamedTuple):
    """A backend by name. `ops` is its class, or None where it cannot run; `reason` says why it can or cannot."""

    name: str
    ops: type[Ops[Any, Any]] | None
    reason: str


def available() -> list[Backend]:
    """Every backend this installation knows, usable or not: the built-in ones, then third parties' by name."""
    return [_probe(entry) for entry in _known()]


def choose(name: str | None = None) -> Backend:
    """The backend to use, its `reason` saying why it is this one.

    `name` is a backend's name or "auto"; None reads EDGEQ_BACKEND, and unset that means "auto": MLX on Apple
    Silicon, else the native CPU backend, else NumPy. Raises UsageError for an unknown name and EdgeqError
    where the named backend cannot run here.
    """
    asked = f"EDGEQ_BACKEND={os.environ['EDGEQ_BACKEND']}" if name is None and os.environ.get("EDGEQ_BACKEND") else None
    name = name or os.environ.get("EDGEQ_BACKEND") or "auto"
    if name == "auto":
        return _automatic()
    entry = next((entry for entry in _known() if entry.name == name), None)
    if entry is None:
        names = ", ".join(entry.name for entry in _known())
        raise UsageError(f"unknown backend {name!r}", hint=f"use one of auto, {names}")
    backend = _probe(entry)
    if backend.ops is None:
        raise EdgeqError(
            f"the {name} backend cannot run here: {backend.reason}",
            hint='use --backend auto (backend="auto" in Python)',
        )
    return backend._replace(reason=asked or "asked for by name")


def select(name: str | None = None, **settings: object) -> Ops[Any, Any]:
    """Make the backend's operations (see `choose`). Settings that are None are left to the backend.

    The native CPU backend has `threads` and `kv_dtype`; a setting that the chosen backend lacks is a UsageError.
    """
    backend = choose(name)
    assert backend.ops is not None
    given = {key: value for key, value in settings.items() if value is not None}
    unknown = given.keys() - inspect.signature(backend.ops).parameters.keys()
    if unknown:
        raise UsageError(f"the {backend.name} backend has no setting {min(unknown)!r}")
    return backend.ops(**given)


def _known() -> Iterator[_BuiltIn | EntryPoint]:
    """All backends, the built-in ones first; a third party cannot take a built-in name."""
    yield from _BUILT_IN
    from importlib.metadata import entry_points

    taken = {entry.name for entry in _BUILT_IN} | {"auto"}
    yield from sorted((e for e in entry_points(group=GROUP) if e.name not in taken), key=lambda e: e.name)


def _probe(entry: _BuiltIn | EntryPoint) -> Backend:
    """Whether a backend can be imported."""
    try:
        return Backend(entry.name, entry.load(), f"{entry.value} imports")
    except (ImportError, AttributeError) as error:
        if is_shortage(error):
            raise
        return Backend(entry.name, None, str(error))


def _automatic() -> Backend:
    """The first built-in backend that runs; MLX only counts on Apple Silicon (elsewhere it has no GPU to offer)."""
    passed_over: list[str] = []
    for entry in _BUILT_IN:
        if entry.name == "mlx" and not _apple_silicon():
            backend = Backend("mlx", None, "not Apple Silicon")
        else:
            backend = _probe(entry)
        if backend.ops is not None:
            return backend._replace(reason="; ".join(["chosen automatically", *passed_over]))
        passed_over.append(f"{backend.name} passed over: {backend.reason}")
    raise AssertionError("the NumPy backend always imports")


def _apple_silicon() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"
