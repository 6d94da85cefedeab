#!/usr/bin/env python3
"""Fill the figures of docs/figures.json into README and docs. `--check` only compares, as tests/test_docs.py does.

A block of text between `<!-- figures:NAME -->` and `<!-- figures:end -->` is what the function NAME here makes. Speeds
are those of the latest run against the peer; a figure that it lacks is that of the latest run that has it.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import figures  # noqa: E402
from figures import Row, Run  # noqa: E402

Runs = dict[str, Run]

PAGES = ("README.md", "docs/guides/choosing.md", "docs/reference/benchmarks.md")

# The same whatever is measured: docs/concepts/model.md, "Sizes".
KV_PER_TOKEN = {"0.8B": 12 * 1024, "2B": 12 * 1024, "4B": 32 * 1024}  # bytes, 16 bits


# --- README ----------------------------------------------------------------------------------------------------------


def headline(runs: Runs) -> str:
    """What edgeq does and how fast, in one sentence."""
    run = latest(runs, "llama.cpp")
    prefill, decode = (run.row("0.8B", 4, test).values["edgeq"] for test in ("prefill 512", "decode 64"))
    return fill(
        "edgeq quantizes and runs Qwen3.5 0.8B, 2B and 4B on laptops, Macs and Raspberry Pi, without torch or "
        f"transformers: the 0.8B at 4 bits prefills {prefill:.0f} and decodes {decode:.0f} tokens/s in "
        f"{peak(runs, '0.8B', 4)} of RAM, with a 4,096-token context on {run.machine}."
    )


def why(runs: Runs) -> str:
    """Six reasons, each with a figure and its condition."""
    run = latest(runs, "llama.cpp")
    reasons = (
        prompts(run),
        answers(runs, run),
        little_memory(runs, run),
        quantizes(runs, run),
        "**Processes nothing twice.** A new turn prefills only its own text. States are immutable: keep one to branch "
        "or undo. It holds 19.3 MiB and 12 KiB per token, which branches share (0.8B, 16-bit KV cache).",
        "**Tested against transformers.** Logits of a whole text differ by an NMSE of at most 1e-9 (NumPy backend, "
        "float32, eight shapes of the architecture).",
    )
    conditions = (
        f"Unless stated otherwise: 0.8B, 4 bits, {run.row('0.8B', 4, 'decode 64').threads} threads, {run.machine}, "
        f"{run.date}, random weights of the real shapes. [Benchmarks](docs/reference/benchmarks.md) has all figures, "
        "their conditions and the targets that were missed."
    )
    return "\n".join(fill("* " + reason, "  ") for reason in reasons) + "\n\n" + fill(conditions)


def prompts(run: Run) -> str:
    row = run.row("0.8B", 4, "prefill 512")
    how = f"{row.ratio():.1f} times as fast"
    return f"**Fast prompts.** Prefill of 512 tokens at {versus(row)} with llama.cpp, {how}."


def answers(runs: Runs, run: Run) -> str:
    text = f"**Fast answers.** Decode of 64 tokens at {versus(run.row('0.8B', 4, 'decode 64'))} with llama.cpp"
    if busy := run.find("0.8B", 4, "decode 64", busy=1):
        text += f", and at {versus(busy)} while another program is busy"
    ik_run = latest(runs, "ik_llama.cpp")
    row = ik_run.row("0.8B", 4, "decode 64")
    ours, theirs = row.values["edgeq"], row.values["ik_llama.cpp"]
    how = "faster" if theirs > ours else "slower"
    return (
        f"{text}. ik_llama.cpp is {how}: {theirs:.1f} against edgeq's {ours:.1f} ({row.threads} threads, "
        f"{ik_run.machine}, {ik_run.date})."
    )


def little_memory(runs: Runs, run: Run) -> str:
    text = (
        f"**Little memory.** The 2B at 4 bits peaks at {peak(runs, '2B', 4)}: the whole process, 4,096-token context."
    )
    found, row = anywhere(runs, "0.8B", 4, "first token")
    return (
        f"{text} The first token of the 0.8B comes {row.values['edgeq']:.2f} s after launch "
        f"(warm page cache{where(found, run)})."
    )


def quantizes(runs: Runs, run: Run) -> str:
    found, seconds = anywhere(runs, "4B", 4, "quantize", unit="s")
    _, memory = anywhere(runs, "4B", 4, "quantize", unit="MB")
    return (
        f"**Quantizes where it runs.** The 4B to 4 bits in {seconds.values['edgeq']:.0f} s and "
        f"{memory.values['edgeq']:.0f} MB of RAM, from a checkpoint on disk{where(found, run)}. The result runs "
        "unchanged in mlx-lm and mlx-vlm."
    )


def machines(runs: Runs) -> str:
    """Which model fits which machine."""
    rows = [
        ("1 GB", "0.8B, 4 bits", peak(runs, "0.8B", 4), "0.8B"),
        ("2 GB", "2B, 4 bits", peak(runs, "2B", 4), "2B"),
        ("4 GB", "2B, 8 bits", peak(runs, "2B", 8), "2B"),
        ("4 GB", "4B, 4 bits", peak(runs, "4B", 4), "4B"),
        ("8 GB", "2B, unquantized", peak(runs, "2B", 16), "2B"),
        ("8 GB", "4B, 8 bits", peak(runs, "4B", 8), "4B"),
    ]
    head = ("RAM of the machine", "model", "peak memory, 4,096-token context", "every further 10,000 tokens")
    return table(head, "llll", ((*row[:3], per_10k(row[3])) for row in rows))


# --- benchmarks ------------------------------------------------------------------------------------------------------


def speed(runs: Runs) -> str:
    """Every speed against llama.cpp, the latest run first."""
    head = ("model", "threads", "test", "edgeq, tokens/s", "llama.cpp", "ratio")
    tables = []
    for run in reversed(by_date(runs)):
        rows = [
            (name(row), row.threads, in_words(row), f"{row.values['edgeq']:g}", f"{row.values['llama.cpp']:g}",
             f"{row.ratio():.2f}")
            for row in run.rows if row.unit == "tokens/s" and "llama.cpp" in row.values
        ]  # fmt: skip
        if rows:
            tables.append(fill(conditions(run)) + "\n\n" + table(head, "lrlrrr", rows))
    return "\n\n".join(tables)


def bandwidth(runs: Runs) -> str:
    """The bytes that a token reads, per second, beside what the memory gives."""
    found = [row for row in latest(runs, "llama.cpp").rows if row.unit == "GB/s"]
    heads = {
        "edgeq": "edgeq, GB/s",
        "llama.cpp": "llama.cpp",
        "ik_llama.cpp": "ik_llama.cpp",
        "memory": "memory bandwidth",
    }
    shown = [who for who in heads if any(who in row.values for row in found)]
    rows = [
        (name(row), row.threads, in_words(row), *(f"{row.values[who]:g}" if who in row.values else "" for who in shown))
        for row in found
    ]
    return table(("model", "threads", "test", *(heads[who] for who in shown)), "lrl" + "r" * len(shown), rows)


def memory_and_start(runs: Runs) -> str:
    """Peak memory, launch to first token, and what quantizing takes."""
    wanted = (("first token", "s"), ("peak memory 4096", "MB"), ("quantize", "s"), ("quantize", "MB"))
    newest: dict[tuple[int, str, int], Row] = {}  # whoever was measured last, each for himself
    for row in (row for run in by_date(runs) for row in run.rows if (row.test, row.unit) in wanted):
        key = wanted.index((row.test, row.unit)), row.model, row.bits
        newest[key] = row._replace(values={**newest.get(key, row).values, **row.values})
    rows = []
    for _, row in sorted(newest.items()):
        peers = " / ".join(f"{value:,g} {row.unit}" for who, value in row.values.items() if who != "edgeq")
        rows.append((name(row), in_words(row), f"{row.values['edgeq']:,g} {row.unit}", peers))
    return table(("model", "what", "edgeq", "llama.cpp"), "llrr", rows)


def sizes(runs: Runs) -> str:
    """The language model at 4 bits."""
    rows = []
    for model in ("0.8B", "2B", "4B"):
        size, bits = (anywhere(runs, model, 4, "size", unit=unit)[1].values["edgeq"] for unit in SIZE_UNITS)
        rows.append((model, gigabytes(size), f"{bits:.3f}"))
    return table(("", "language model at 4 bits, scales and norms included", "bits per weight"), "lrr", rows)


def ik(runs: Runs) -> str:
    """Against ik_llama.cpp."""
    run = latest(runs, "ik_llama.cpp")
    rows = [
        (name(row), row.threads, in_words(row), f"{row.values['edgeq']:g}", f"{row.values['ik_llama.cpp']:g}",
         f"{row.ratio('ik_llama.cpp'):.2f}")
        for row in run.rows if "ik_llama.cpp" in row.values and row.unit == "tokens/s"
    ]  # fmt: skip
    head = ("model", "threads", "test", "edgeq, tokens/s", "ik_llama.cpp", "ratio")
    return fill(conditions(run)) + "\n\n" + table(head, "lrlrrr", rows)


# --- finding figures -------------------------------------------------------------------------------------------------

SIZE_UNITS = ("MB", "bits per weight")


def by_date(runs: Runs) -> list[Run]:
    return sorted(runs.values(), key=lambda run: run.date)


def latest(runs: Runs, peer: str) -> Run:
    """The latest run that measured speed against `peer`."""
    return [run for run in by_date(runs) if any(peer in row.values and row.unit == "tokens/s" for row in run.rows)][-1]


def anywhere(runs: Runs, model: str, bits: int, test: str, *, unit: str = "") -> tuple[Run, Row]:
    """The figure of the latest run that has it."""
    found = [(run, row) for run in by_date(runs) if (row := run.find(model, bits, test, unit=unit))]
    return found[-1]


def where(found: Run, run: Run) -> str:
    """A figure's machine, if it is not the one that the reader was told."""
    return "" if found is run else f", {found.machine}"


def peak(runs: Runs, model: str, bits: int) -> str:
    return gigabytes(anywhere(runs, model, bits, "peak memory 4096")[1].values["edgeq"])


# --- words -----------------------------------------------------------------------------------------------------------


def name(row: Row) -> str:
    return f"{row.model}, {row.bits} bits"


def in_words(row: Row) -> str:
    """`decode 64 at 4096` for a reader."""
    if row.test == "quantize":
        return "`edgeq quantize`, " + {"s": "time", "MB": "peak memory"}[row.unit]
    text = re.sub(r"\d{4,}", lambda number: f"{int(number[0]):,}", row.test)
    text = re.sub(r"^(prefill|decode) ([\d,]+)", r"\1, \2 tokens", text)
    text = re.sub(r"^peak memory ([\d,]+)", r"peak memory, \1-token context", text)
    text = text.replace(" at ", " at a context depth of ").replace("first token", "launch to first token")
    return text + (f", {row.busy} other program busy" if row.busy else "")


def versus(row: Row) -> str:
    return f"{row.values['edgeq']:.0f} tokens/s against {row.values['llama.cpp']:.0f}"


def gigabytes(megabytes: float) -> str:
    return f"{megabytes:.0f} MB" if megabytes < 500 else f"{megabytes / 1000:.2f} GB"


def per_10k(model: str) -> str:
    return f"{1e4 * KV_PER_TOKEN[model] / 1e9:.2f} GB"


def conditions(run: Run) -> str:
    return f"{run.date}, commit {run.commit}, {run.machine}: {run.conditions}."


def table(head: Sequence[object], align: str, rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; `align` has l or r for each column."""
    marks = "|".join("---:" if letter == "r" else "---" for letter in align)
    first, *others = ("|".join(f" {cell} " if cell != "" else " " for cell in line) for line in (head, *rows))
    return "\n".join(f"|{line}|" for line in (first, marks, *others))


def fill(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


BLOCKS: dict[str, Callable[[Runs], str]] = {
    function.__name__: function for function in (headline, why, machines, speed, bandwidth, memory_and_start, sizes, ik)
}


def filled(text: str, runs: Runs) -> str:
    """`text` with every block as it should be."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{BLOCKS[match[2]](runs)}\n{match[3]}"

    return re.sub(r"(<!-- figures:(\w+) -->)\n.*?(<!-- figures:end -->)", block, text, flags=re.DOTALL)


def main() -> None:
    runs, stale = figures.read(), []
    for page in PAGES:
        text = (ROOT / page).read_text()
        if (new := filled(text, runs)) != text:
            stale.append(page)
            if "--check" not in sys.argv[1:]:
                (ROOT / page).write_text(new)
    if stale and "--check" in sys.argv[1:]:
        sys.exit(f"{', '.join(stale)}: not what docs/figures.json says; run tools/make_readme_figures.py")


if __name__ == "__main__":
    main()
