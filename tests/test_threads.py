"""The native backend's threads and the process around them: several models, fork, idleness."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import edgeq
from edgeq.api import Model
from edgeq.formats.bf16 import Array
from edgeq.testing import config_values, write_checkpoint

native = pytest.importorskip("edgeq.backends.cpu._native", reason="the native kernels are not built")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    """Two models of different shapes in one process, sharing the pool."""
    root, found = tmp_path_factory.mktemp("threads"), []
    for i, width in enumerate((128, 96)):
        write_checkpoint(root / str(i), config_values(intermediate_size=width))
        found.append(edgeq.load(root / str(i), backend="cpu"))
    return found


def run(model: Model) -> Array:
    """Logits after a prompt and a few tokens."""
    logits, state = model.forward([i % model.vocab_size for i in range(70)], model.state())
    for _ in range(5):
        logits, state = model.forward([int(logits.argmax())], state)
    return logits


def test_two_models_in_two_threads(models: list[Model]) -> None:
    expected = [run(model) for model in models]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(run, models * 6))
    for i, logits in enumerate(found):
        assert np.array_equal(logits, expected[i % 2])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_models_after_a_fork(models: list[Model]) -> None:
    expected = [run(model) for model in models]
    child = os.fork()
    if child == 0:
        same = all(np.array_equal(run(model), logits) for model, logits in zip(models, expected, strict=True))
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(run(models[0]), expected[0])  # and the parent goes on


def test_the_number_of_threads_is_told(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", config_values())
    before = native.thread_count()
    try:
        for count in (1, 3):
            model = edgeq.load(tmp_path / "model", backend="cpu", threads=count)
            assert model.ops.threads == count
            assert f"{count} threads" in model.ops.describe()
        assert edgeq.load(tmp_path / "model", backend="numpy").ops.threads is None
    finally:
        native.set_thread_count(before)


def test_idle_threads_take_no_time(models: list[Model]) -> None:
    """They poll for 60 microseconds after the last piece and sleep then."""
    run(models[0])
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.02
