"""The look at a model that is loaded with a KV cache of 4 bits."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

import edgeq
from edgeq import cache_check
from edgeq.backends import available
from edgeq.testing import config_values, write_checkpoint

BACKENDS = [backend.name for backend in available() if backend.ops is not None and backend.name != "mlx"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_error_is_the_divergence_of_two_caches(tmp_path: Path, backend: str) -> None:
    write_checkpoint(tmp_path / "model", config_values())
    ids = np.random.default_rng(3).integers(0, 288, 24).astype(np.int32)
    expected, found = (
        edgeq.load(tmp_path / "model", backend=backend, kv_bits=bits).logits(ids.tolist())[12:].astype(np.float64)
        for bits in (16, 4)
    )
    p, q = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (expected, found))
    kl = (np.exp(p) * (p - q)).sum(axis=-1).mean()
    engine = edgeq.load(tmp_path / "model", backend=backend, kv_bits=4).engine
    assert cache_check.cache_error(engine, ids) == pytest.approx(kl, rel=1e-3)
    assert kl > 1e-6


def test_a_model_that_bears_it_says_nothing_and_another_is_one_line(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edgeq.load(chat_folder, kv_bits=4)
        monkeypatch.setattr(cache_check, "LIMIT", 1e-9)
        edgeq.load(chat_folder, kv_bits=8)
    with pytest.warns(UserWarning, match=r"4 bits change its predictions by .* nats, .* use --kv-bits 8") as told:
        edgeq.load(chat_folder, kv_bits=4)
    assert len(told) == 1
    assert "\n" not in str(told[0].message)
    assert Path(told[0].filename) == Path(__file__)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native backend was not built")
def test_it_does_not_run_where_a_ceiling_has_no_room_for_it(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits once put the 0.8B 38 MB above a ceiling, when it was loaded."""
    monkeypatch.setattr(cache_check, "LIMIT", 1e-9)
    engine = edgeq.load(chat_folder, kv_bits=8).engine
    monkeypatch.setattr(type(engine.budget), "fits", lambda _, nbytes: nbytes < cache_check._nbytes(engine))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache_check.check_cache(engine, None)
