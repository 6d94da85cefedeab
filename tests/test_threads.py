"""The native backend's threads and the process around them: several models, fork, idleness."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from process import run_python

import edgeq
from edgeq.api import Model
from edgeq.formats.bf16 import Array
from edgeq.testing import config_values, write_checkpoint

native = pytest.importorskip(
    "edgeq.backends.cpu._native", reason="the native kernels are not built", exc_type=ImportError
)


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


# --- little memory ---------------------------------------------------------------------------------------------------

LIMITED = """
import resource
import warnings
import numpy as np
from edgeq.backends.cpu import CpuOps, _native as native

def limit(more):
    '''Room for `more` bytes beyond what the process has.'''
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + more, resource.RLIM_INFINITY))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit is set by what /proc tells")
def test_fewer_threads_where_the_system_gives_no_more() -> None:
    done = run_python(f"""{LIMITED}
CpuOps(threads=2)
w = native.Matrix(np.ones((300, 256), np.float32))
x, y = np.ones((40, 256), np.float32), np.empty((40, 300), np.float32)
limit(200 << 20)
with warnings.catch_warnings(record=True) as caught:
    ops = CpuOps(threads=1024)
assert 1 <= ops.threads < 1024, ops.threads
assert str(caught[0].message) == f"the system does not give 1024 threads: using {{ops.threads}}", caught
native.linear(x, w, y)
assert (y == 256).all()
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert CpuOps(threads=3).threads == 3
native.linear(x, w, y)
assert (y == 256).all()
""")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit is set by what /proc tells")
def test_no_memory_for_scratch_is_a_memory_error_and_the_next_call_works() -> None:
    """The scratch of a product is an int8 copy of its input, 16 MB; the mixers' lies between their projections."""
    done = run_python(f"""{LIMITED}
native.set_thread_count(2)
native.start_threads()
x, y = np.ones((64_000, 256), np.float32), np.empty((64_000, 32), np.float32)
codes, numbers = np.zeros((32, 32), np.uint32), np.ones((32, 4), np.float32)
w = native.Matrix(codes, numbers, numbers, 4, 64)
mlp = [native.Matrix(np.ones((256, 256), np.float32)) for _ in range(3)]
out = np.empty_like(x)
limit(8 << 20)
for call in (lambda: native.linear(x, w, y), lambda: native.mlp(x, mlp, out), lambda: native.empty(100 << 20)):
    try:
        call()
    except MemoryError:
        continue
    raise AssertionError("there was memory")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
native.linear(x, w, y)
assert (y == 256).all()
native.empty(100 << 20)[:] = 1
""")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit is set by what /proc tells")
def test_chat_with_more_threads_than_the_system_gives() -> None:
    """An answer and one line, or out of memory and exit code 3: never an abort."""
    done = run_python(
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1_500_000_000, resource.RLIM_INFINITY))\n"
        "from edgeq.cli import main; main(['chat', 'demo', '--threads', '1024', '-p', 'hi', '-n', '2'])"
    )
    assert done.returncode in (0, 3), done.stderr
    if done.returncode == 0:
        warning, *_ = done.stderr.splitlines()
        assert warning.startswith("warning: the system does not give 1024 threads: using ")
