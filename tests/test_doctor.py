"""`edgeq doctor`: what it says of the machine, of models and folders, and what to do; pages read ahead and locked."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from process import run_python

from edgeq import load
from edgeq.cli import doctor as module
from edgeq.cli import main
from edgeq.formats.mapped import map_file
from edgeq.machine import measure, system
from edgeq.machine.boards import board_facts
from edgeq.machine.facts import Facts, kept_facts
from edgeq.memory import pages


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("EDGEQ_MEMORY", "EDGEQ_ISA", "EDGEQ_BACKEND", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(["doctor", *arguments])
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, out, err = run(capsys, "--json", "--no-measure", *arguments)
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


class TestCommand:
    def test_without_arguments(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = told(capsys)
        assert found.keys() >= {
            "edgeq", "python", "packages", "backends", "processor", "measured", "memory", "places", "environment",
            "left behind", "findings",
        }  # fmt: skip
        assert "RAM" in found["memory"]
        assert all(finding.keys() == {"found", "do"} and finding["do"] for finding in found["findings"])

    def test_measures_once_and_keeps(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        native = pytest.importorskip(
            "edgeq.backends.cpu", reason="the native backend is not built", exc_type=ImportError
        )
        facts = replace(board_facts("pi5"), isa=native._native.isa(), load=3.0, measured="then")
        calls = list[object]()

        def measured(progress: object) -> Facts:
            calls.append(progress)
            return facts

        monkeypatch.setattr(measure, "measure_machine", measured)
        for again, count in (([], 1), ([], 1), (["--measure"], 2), (["--no-measure"], 2)):
            code, out, _ = run(capsys, *again)
            assert (code, len(calls)) == (0, count)
            assert "13.2 GB/s with 2" in out
            assert "processors busy while this machine was measured" in out
        assert kept_facts(facts.isa) == facts

    def test_models_and_folders(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, chat_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "results").mkdir()
        monkeypatch.setattr(module, "_left_behind", lambda folders: {str(folder): "looked at" for folder in folders})
        found = told(capsys, "demo", str(chat_folder), str(tmp_path / "results"), str(tmp_path / "gone"))
        assert {name for name in found if name.startswith("model ")} == {"model demo", f"model {chat_folder}"}
        assert found["left behind"].keys() == {str(chat_folder), str(tmp_path / "results"), str(tmp_path / "gone")}
        assert {"path", "format", "medium", "memory"} <= found["model demo"].keys()
        assert found["model demo"]["memory"].endswith("MB with 4,096 tokens of context")

    def test_a_model_that_is_not_here(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
        code, out, err = run(capsys, "qwen3.5:2b", "--no-measure")
        assert (code, out) == (2, "")
        assert "is not on this machine" in err
        assert "edgeq fit qwen3.5:2b" in err

    def test_a_model_that_does_not_fit(self, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
        monkeypatch.setenv("EDGEQ_MEMORY", "40M")
        found = told(capsys, "demo")
        assert any("takes" in finding["found"] and "edgeq fit" in finding["do"] for finding in found["findings"])

    def test_no_native_kernels(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EDGEQ_BACKEND", "numpy")
        assert any("many times slower" in finding["found"] for finding in told(capsys)["findings"])


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a hot Raspberry Pi that swaps to its card."""
    root = tmp_path / "root"
    files = {
        "sys/class/thermal/thermal_zone0/temp": "84125\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone1/temp": "nonsense\n",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
        "proc/swaps": "Filename Type Size Used Priority\n/var/swap file 524284 300000 -2\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n",
        "sys/block/mmcblk0/device/type": "SD\n",
        "sys/block/mmcblk0/queue/rotational": "0\n",
        "sys/block/mmcblk0/mmcblk0p2/partition": "2\n",
        **{f"sys/devices/system/cpu/cpu{i}/cpufreq/cpuinfo_max_freq": "2400000\n" for i in range(4)},
        **{f"sys/devices/system/cpu/cpu{i}/cpufreq/scaling_governor": "powersave\n" for i in range(4)},
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    device = tmp_path.stat().st_dev
    number = root / f"sys/dev/block/{os.major(device)}:{os.minor(device)}"
    number.parent.mkdir(parents=True)
    number.symlink_to(root / "sys/block/mmcblk0/mmcblk0p2")
    for name in ("temperatures", "throttling", "swaps", "huge_pages", "governors", "core_speeds"):
        function = getattr(system, name)
        monkeypatch.setattr(system, name, lambda function=function: function(root))
    medium_of = system.medium_of
    monkeypatch.setattr(system, "medium_of", lambda _: medium_of(tmp_path, root))
    return root


class TestBoard:
    @pytest.mark.skipif(os.name != "posix" or not Path("/proc").exists(), reason="Linux's devices have such numbers")
    def test_each_finding_says_what_to_do(self, board: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert board
        found = told(capsys)
        assert found["processor"]["highest clock"] == "4 cores of 2.40 GHz"
        assert found["processor"]["temperature, cpu-thermal"] == "84 degrees Celsius"
        all_of_it = "\n".join(f"{finding['found']} -> {finding['do']}" for finding in found["findings"])
        for problem, remedy in (
            ("84 degrees", "fan"), ("supply voltage is too low", "power supply"), ("it is throttled", "cool it"),
            ("powersave", "echo performance"), ("swap lies on SD card", "--memory"), ("swapped out", "smaller model"),
            ("huge pages are off", "echo madvise"),
        ):  # fmt: skip
            assert any(problem in line and remedy in line for line in all_of_it.splitlines()), problem

    def test_media(self, board: Path, tmp_path: Path) -> None:
        assert board
        medium = system.medium_of(tmp_path)
        assert medium is not None
        assert (medium.kind, medium.device) == ("SD card", "mmcblk0")

    def test_nothing_is_there(self, tmp_path: Path) -> None:
        assert system.temperatures(tmp_path) == {}
        assert system.throttling(tmp_path) is None
        assert (system.swaps(tmp_path), system.huge_pages(tmp_path), system.governors(tmp_path)) == ([], None, [])
        assert system.medium_of(tmp_path / "gone") is None
        assert system.medium_rate([tmp_path / "gone"]) is None


def test_neighbours_are_what_others_take_of_the_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "proc" / "stat"
    stat.parent.mkdir()
    ticks = os.sysconf("SC_CLK_TCK")
    own = iter([10.0, 11.0])  # seconds of this process
    clock = iter([100.0, 104.0, 0.0, 0.0])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(system, "process_time", lambda: next(own))
    monkeypatch.setattr(system, "perf_counter", lambda: next(clock))

    def write(user: int) -> None:
        lines = [f"cpu{i} {user * ticks} {ticks} {ticks} 900 {user} 0 0 0 0 0" for i in range(3)]
        stat.write_text("\n".join(["cpu  1 1 1 1 1 1 1 1 1 1", *lines, "intr 5"]))

    write(20)
    with system.Neighbours(tmp_path) as neighbours:
        write(22)
    assert neighbours.load == pytest.approx((2 * 2 - 1) / 4)  # of two processors that it may use, less its own
    with system.Neighbours(tmp_path / "nowhere") as neighbours:
        pass
    assert neighbours.load == os.getloadavg()[0]


class TestPages:
    @pytest.fixture
    def mapped(self, tmp_path: Path) -> list[Any]:
        """Two arrays in a mapped file of 20 MB, the second of which begins within a page."""
        path = tmp_path / "weights"
        path.write_bytes(bytes(20_000_000))
        data = np.frombuffer(map_file(path), np.uint8)
        return [data[:12_000_000], data[12_000_001:].reshape(-1)]

    def test_weights_in_order(self) -> None:
        model = load("demo", backend="numpy")
        arrays = pages.weights_in_order(model.engine.weights.text)
        stored = {spec.name: spec for spec, _ in model.checkpoint.storage()}
        assert arrays[0].shape == stored["layers.0.linear_attn.in_proj_qkv.weight"].shape
        assert arrays[-1].shape == stored["embed_tokens.weight"].shape

    def test_what_is_in_memory_is_not_read(self, mapped: list[Any]) -> None:
        for x in mapped:
            x.max()
        assert pages.missing_nbytes(mapped) == 0
        assert pages.read_ahead(mapped, lambda *_: pytest.fail("nothing is to be read")) == 0

    def test_progress(self, mapped: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pages, "_missing", lambda x: x.nbytes)
        seen = list[tuple[int, int]]()
        total = sum(x.nbytes for x in mapped)
        assert pages.read_ahead(mapped, lambda done, of: seen.append((done, of))) == total
        assert seen[0] == (0, total)
        assert seen[-1] == (total, total)
        assert seen == sorted(seen)
        assert len(seen) == 4
        monkeypatch.setattr(pages, "available_memory", lambda: total - 1)
        assert pages.read_ahead(mapped) == 0

    def test_locked(self, tmp_path: Path) -> None:
        code = """
import os, resource, sys
from pathlib import Path
from edgeq import load
from edgeq.errors import MemoryBudgetError
if hasattr(os, "geteuid") and os.geteuid() == 0:
    os.setuid(65534)  # whom the limit holds for
before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, before[1]))
try:
    load(sys.argv[1], backend="numpy", lock=True)
except MemoryBudgetError as error:
    print(error.exit_code, error, error.hint)
"""
        from edgeq.hub import DEMO

        done = run_python(code, str(DEMO), XDG_CACHE_HOME=str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("3 locking the weights takes ")
        assert "RLIMIT_MEMLOCK (ulimit -l) allows 1.0 MB" in done.stdout
        assert "ulimit -l" in done.stdout.split("allows", 1)[1]

    def test_locked_pages_survive_being_let_go(self, mapped: list[Any]) -> None:
        from edgeq.formats.mapped import drop_pages

        part = [mapped[0][:8192]]
        assert pages.lock_pages(part) == 8192
        base = mapped[0]
        while (further := getattr(base, "base", None)) is not None:
            base = further
        drop_pages(getattr(base, "obj", base))
        assert not part[0].any()
