"""Full disks, broken disks, interruptions, short writes and kills at every step of every way of writing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from process import ROOT

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """faults.c, compiled: it stands between Python and the system's calls."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("shim") / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "faults.c", "-ldl"], check=True)
    return library


def run_faults(shim: Path, source: Path, work: Path, rounds: int, seed: int = 0, *, old: bool = False) -> int:
    """Run that many rounds (0: every step in every way); how many there were."""
    work.mkdir()
    paths = [path for path in sys.path if path and Path(path) != ROOT]
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", HERE / "faults.py", source, work, str(rounds), str(seed)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*paths, str(ROOT)]),
            "LD_PRELOAD": str(shim),
            "FAULTS_FOLDER": str(work),
            "OPENBLAS_NUM_THREADS": "1",
            **({"FAULTS_OLD_SYSTEM": "1"} if old else {}),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert min(result["steps"].values()) > 10  # or the calls are not seen
    return sum(count for seen in result["seen"].values() for count in seen.values())


def test_some_faults(shim: Path, chat_folder: Path, tmp_path: Path) -> None:
    assert run_faults(shim, chat_folder, tmp_path / "work", 40) == 40


def test_some_faults_where_names_cannot_be_exchanged(shim: Path, chat_folder: Path, tmp_path: Path) -> None:
    assert run_faults(shim, chat_folder, tmp_path / "work", 30, old=True) == 30


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 6))
def test_500_faults(shim: Path, chat_folder: Path, tmp_path: Path, seed: int) -> None:
    assert run_faults(shim, chat_folder, tmp_path / "work", 500, seed) == 500


@pytest.mark.soak
@pytest.mark.parametrize("old", [False, True])
def test_every_fault_at_every_step(shim: Path, chat_folder: Path, tmp_path: Path, old: bool) -> None:
    assert run_faults(shim, chat_folder, tmp_path / "work", 0, old=old) > 2000
