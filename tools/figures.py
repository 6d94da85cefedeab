"""docs/figures.json: what benchmarks measured, and what README and docs say of it.

A run has a machine, a date, a commit and conditions, and rows. A row is one test of one model: the values by engine, in
the unit that it names. `tools/bench_peers.py --figures NAME` writes a run; tools/make_readme_figures.py fills in text.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "figures.json"


class Row(NamedTuple):
    """One test. `busy` other programs computed meanwhile; `values` by engine, in `unit`."""

    model: str
    bits: int
    threads: int
    test: str
    unit: str
    values: dict[str, float]
    busy: int = 0

    @property
    def key(self) -> tuple[Any, ...]:
        return self.model, self.bits, self.threads, self.test, self.unit, self.busy

    def ratio(self, peer: str = "llama.cpp") -> float:
        """edgeq's value over the peer's."""
        return self.values["edgeq"] / self.values[peer]


class Run(NamedTuple):
    """What was measured on one machine at one commit."""

    machine: str
    date: str
    commit: str
    conditions: str
    rows: list[Row]

    def find(
        self, model: str, bits: int, test: str, *, threads: int | None = None, unit: str = "", busy: int = 0
    ) -> Row | None:
        """The row that matches, without `threads` that of the most threads; None where there is none."""
        found = [
            row for row in self.rows
            if (row.model, row.bits, row.test, row.busy) == (model, bits, test, busy)
            and row.threads == (threads or row.threads) and unit in ("", row.unit)
        ]  # fmt: skip
        return max(found, key=lambda row: row.threads, default=None)

    def row(self, model: str, bits: int, test: str) -> Row:
        """The row that matches; KeyError where there is none."""
        if (found := self.find(model, bits, test)) is None:
            raise KeyError(f"no figure for {model}, {bits} bits, {test}")
        return found


def read(file: Path = FILE) -> dict[str, Run]:
    """The runs by name."""
    return {
        name: Run(**{**run, "rows": [Row(**row) for row in run["rows"]]})
        for name, run in json.loads(file.read_text()).items()
    }


def write(runs: dict[str, Run], file: Path = FILE) -> None:
    """One row to a line, so that a changed figure is a changed line."""
    parts = []
    for name, run in runs.items():
        facts = "".join(f'  "{key}": {json.dumps(getattr(run, key))},\n' for key in Run._fields if key != "rows")
        rows = ",\n".join("   " + json.dumps(_without_defaults(row)) for row in run.rows)
        parts.append(f' "{name}": {{\n{facts}  "rows": [\n{rows}\n  ]\n }}')
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def _without_defaults(row: Row) -> dict[str, Any]:
    values = row._asdict()
    return values if row.busy else {key: value for key, value in values.items() if key != "busy"}


def add(name: str, machine: str, conditions: str, rows: Iterable[Row], file: Path = FILE) -> None:
    """Put rows into the run `name` as of today and of this commit; other rows stay if the commit is the same."""
    runs = read(file) if file.exists() else {}
    commit = _commit()
    kept = {row.key: row for row in runs[name].rows} if name in runs and runs[name].commit == commit else {}
    kept |= {row.key: row for row in rows}
    runs[name] = Run(machine, date.today().isoformat(), commit, conditions, list(kept.values()))
    write(runs, file)


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


# --- from the report of tools/bench_peers.py -------------------------------------------------------------------------


def rows_of(report: dict[str, list[Any]], model: str) -> list[Row]:
    """The rows of a report, by engine: the value of the better one of its files."""
    rows: list[Row] = []
    for found in report["speed"]:
        facts = (model, found["bits"], found["threads"], found["test"])
        rows.append(Row(*facts, "tokens/s", _best(found["tok_per_s"], max), found["busy"]))
        if "gb_per_s" in found:
            rates = {**_best(found["gb_per_s"], max), "memory": round(found["read_gb_per_s"], 1)}
            rows.append(Row(*facts, "GB/s", rates, found["busy"]))
    for found in report["memory"]:
        facts = (model, found["bits"], found["threads"], f"peak memory {found['context']}")
        rows.append(Row(*facts, "MB", _best({name: n / 1e6 for name, n in found["peak_nbytes"].items()}, min)))
    for found in report["start"]:
        seconds = {name: median(samples) for name, samples in found["seconds"].items()}
        rows.append(Row(model, found["bits"], found["threads"], "first token", "s", _best(seconds, min)))
    for found in report["quantize"]:
        facts = (model, found["bits"], found["threads"], "quantize")
        rows.append(Row(*facts, "s", {"edgeq": _short(found["seconds"])}))
        rows.append(Row(*facts, "MB", {"edgeq": _short(found["peak_nbytes"] / 1e6)}))
        size = (model, found["bits"], found["threads"], "size")
        rows.append(Row(*size, "MB", {"edgeq": _short(found["nbytes"] / 1e6)}))
        rows.append(Row(*size, "bits per weight", {"edgeq": round(found["bits_per_weight"], 3)}))
    return rows


def best_of(values: dict[str, float], better: Callable[[float, float], float]) -> dict[str, float]:
    """By engine, from values by "engine form": that of the better form."""
    best: dict[str, float] = {}
    for name, value in values.items():
        engine = name.rpartition(" ")[0]
        best[engine] = better(best[engine], value) if engine in best else value
    return best


def _best(values: dict[str, float], better: Callable[[float, float], float]) -> dict[str, float]:
    return {engine: _short(value) for engine, value in best_of(values, better).items()}


def _short(value: float) -> float:
    """Three significant digits, the fourth where the first is a 1."""
    return float(f"{value:.4g}" if f"{value:.0e}".startswith("1") else f"{value:.3g}")
