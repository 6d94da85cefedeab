"""Choosing a backend: names, the environment, reasons, third parties."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

import edgeq.backends as backends
from edgeq.backends.numpy import NumpyOps
from edgeq.errors import EdgeqError, UsageError


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGEQ_BACKEND", raising=False)


def offer(monkeypatch: pytest.MonkeyPatch, *entries: tuple[str, str]) -> None:
    """Pretend that these entry points are installed."""
    points = [EntryPoint(name, value, backends.GROUP) for name, value in entries]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points)


def test_numpy_by_name_always_works() -> None:
    assert isinstance(backends.select("numpy"), NumpyOps)
    assert backends.choose("numpy").reason == "asked for by name"


def test_every_backend_has_a_reason() -> None:
    for backend in backends.available():
        assert backend.reason


def test_auto_takes_one_that_runs() -> None:
    chosen = backends.choose()
    assert chosen.ops is not None
    assert "automatically" in chosen.reason


def test_auto_prefers_mlx_on_apple_silicon_and_numpy_without_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def point(name: str, value: str) -> EntryPoint:
        return EntryPoint(name, value, backends.GROUP)

    numpy = "edgeq.backends.numpy:NumpyOps"
    built_in = (point("mlx", numpy), point("cpu", "no_such_module:Ops"), point("numpy", numpy))
    monkeypatch.setattr(backends, "_BUILT_IN", built_in)
    monkeypatch.setattr(backends, "_apple_silicon", lambda: True)
    assert backends.choose("auto").name == "mlx"
    monkeypatch.setattr(backends, "_apple_silicon", lambda: False)
    fallback = backends.choose("auto")
    assert fallback.name == "numpy"
    assert "cpu passed over: No module named 'no_such_module'" in fallback.reason


def test_the_environment_decides_when_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEQ_BACKEND", "numpy")
    assert backends.choose().reason == "EDGEQ_BACKEND=numpy"
    monkeypatch.setenv("EDGEQ_BACKEND", "cuda")
    with pytest.raises(UsageError, match="unknown backend 'cuda'"):
        backends.choose()


def test_a_third_party_adds_one(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, ("mine", "edgeq.backends.numpy:NumpyOps"), ("broken", "no_such_module:Ops"), ("cpu", "evil:Ops"))
    assert isinstance(backends.select("mine"), NumpyOps)
    with pytest.raises(EdgeqError, match="broken backend cannot run here: No module named 'no_such_module'"):
        backends.select("broken")
    assert [b.name for b in backends.available()] == ["mlx", "cpu", "numpy", "broken", "mine"]


def test_settings_that_a_backend_lacks_are_refused() -> None:
    assert isinstance(backends.select("numpy", threads=None), NumpyOps)
    with pytest.raises(UsageError, match="numpy backend has no setting 'threads'"):
        backends.select("numpy", threads=4)
