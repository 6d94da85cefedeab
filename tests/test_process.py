"""How tests run Python in a process of its own."""

from __future__ import annotations

import os
import sys

import pytest
from process import run_python

COUNT_THREADS = """
import os
import numpy as np
x = np.ones((512, 512), np.float32)
x @ x
print(len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_numpy_has_the_threads_that_the_tests_have() -> None:
    done = run_python(COUNT_THREADS)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= int(os.environ["OPENBLAS_NUM_THREADS"])
