"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# One thread for NumPy, here and in processes that tests start: a tiny matrix gains nothing from a second one, and on a
# busy machine with two cores two threads that wait for each other took five times as long. Before NumPy is imported.
for _variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
    os.environ.setdefault(_variable, "1")

settings.register_profile("edgeq", deadline=None)  # a busy machine is no failure
settings.load_profile("edgeq")

from tiny_tokenizer import IM_END, build_tiny_tokenizer  # noqa: E402

from edgeq.testing import config_values, write_checkpoint  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the cache of the person who runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete tiny checkpoint: random weights, tokenizer, chat template. Read-only; copy it to change it."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    write_checkpoint(folder, config_values(vocab_size=1088, eos_token_id=IM_END, mtp=True, vision=True))
    build_tiny_tokenizer(folder)
    return folder
