"""docs/figures.json: from the report of a benchmark to the text of README."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from documents import ROOT


@pytest.fixture(scope="module")
def tools() -> tuple[ModuleType, ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        import figures
        import make_readme_figures
    return figures, make_readme_figures


REPORT = {
    "speed": [
        {
            "bits": 4, "threads": 2, "busy": 0, "test": "decode 64", "read_gb_per_s": 41.23,
            "tok_per_s": {"edgeq q4": 71.04, "llama.cpp Q4_0": 40.4, "llama.cpp Q4_K_M": 50.0},
            "gb_per_s": {"edgeq q4": 33.06, "llama.cpp Q4_0": 20.0, "llama.cpp Q4_K_M": 21.0},
        },
        {
            "bits": 4, "threads": 2, "busy": 1, "test": "decode 64",
            "tok_per_s": {"edgeq q4": 60.0, "llama.cpp Q4_0": 9.0},
        },
    ],
    "memory": [
        {
            "bits": 4, "threads": 2, "context": 4096,
            "peak_nbytes": {
                "edgeq q4": 606e6, "llama.cpp Q4_0": 970e6, "llama.cpp Q4_K_M": 980e6,
                "llama.cpp, smallest Q4_0": 650e6,
            },
        }
    ],
    "start": [{"bits": 4, "threads": 2, "seconds": {"edgeq q4": [0.3, 0.5, 0.4], "llama.cpp Q4_0": [0.9]}}],
    "quantize": [
        {"bits": 4, "threads": 2, "seconds": 18.2, "peak_nbytes": 222e6, "nbytes": 434e6, "bits_per_weight": 4.61729}
    ],
}  # fmt: skip


def test_rows_of_a_report(tools: tuple[ModuleType, ModuleType]) -> None:
    figures, _ = tools
    rows = {row.key[3:]: row.values for row in figures.rows_of(REPORT, "0.8B")}
    assert rows == {
        ("decode 64", "tokens/s", 0): {"edgeq": 71.0, "llama.cpp": 50.0},
        ("decode 64", "GB/s", 0): {"edgeq": 33.1, "llama.cpp": 21.0, "memory": 41.2},
        ("decode 64", "tokens/s", 1): {"edgeq": 60.0, "llama.cpp": 9.0},
        ("peak memory 4096", "MB", 0): {"edgeq": 606, "llama.cpp": 970, "llama.cpp, smallest": 650},
        ("first token", "s", 0): {"edgeq": 0.4, "llama.cpp": 0.9},
        ("quantize", "s", 0): {"edgeq": 18.2},
        ("quantize", "MB", 0): {"edgeq": 222},
        ("size", "MB", 0): {"edgeq": 434},
        ("size", "bits per weight", 0): {"edgeq": 4.617},
    }


def test_a_run_is_written_and_read_again(tools: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    figures, _ = tools
    file, rows = tmp_path / "figures.json", figures.rows_of(REPORT, "0.8B")
    figures.add("here", "a machine", "conditions", rows, file)
    figures.add("here", "a machine", "conditions", rows[:1], file)  # the same commit: the others stay
    run = figures.read(file)["here"]
    assert run.rows == rows
    assert run.find("0.8B", 4, "decode 64", unit="GB/s").values["memory"] == 41.2
    assert run.find("4B", 4, "decode 64") is None


def test_readme_follows_the_figures(tools: tuple[ModuleType, ModuleType]) -> None:
    """Another figure is another text, in README and benchmarks; without what is optional the text still reads."""
    figures, make = tools
    runs = figures.read()
    name, run = next((name, run) for name, run in runs.items() if run is make.latest(runs, "llama.cpp"))

    def faster(row: Any) -> Any:
        return row._replace(values={**row.values, "edgeq": 1234}) if row.test == "decode 64" and not row.busy else row

    changed = {**runs, name: run._replace(rows=[faster(row) for row in run.rows if not row.busy])}
    for page in ("README.md", "docs/reference/benchmarks.md"):
        text = (ROOT / page).read_text()
        assert make.filled(text, runs) == text
        assert "1234" in make.filled(text, changed)
    assert "another program" not in make.filled((ROOT / "README.md").read_text(), changed)


def test_the_latest_run_counts(tools: tuple[ModuleType, ModuleType]) -> None:
    figures, make = tools
    runs = figures.read()
    newer = make.latest(runs, "llama.cpp")._replace(machine="another machine", date="2999-01-01")
    assert "another machine" in make.headline({**runs, "newer": newer})
