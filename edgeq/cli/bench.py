"""`edgeq bench`: how fast a model runs here, with llama-bench's options and columns."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from io import StringIO
from itertools import product
from typing import Annotated, Any

import edgeq
from edgeq.api import Model, load
from edgeq.bench import Result, Test, measure, model_size
from edgeq.cli.console import new_bar, peak_memory, show, show_json
from edgeq.cli.options import AdapterOption, BackendOption, MemoryOption, ModelArgument, option
from edgeq.errors import UsageError
from edgeq.generate import check_draft

__all__ = ["bench"]

_COLUMNS = ("model", "size", "params", "backend", "threads", "kv", "test", "t/s", "GB/s", "of memory")
_DRAFT_COLUMNS = ("accepted", "tokens/pass")


def bench(
    model: ModelArgument,
    n_prompt: Annotated[
        str,
        option("--n-prompt", "-p", metavar="N,...", env=False, help="Prompt lengths (prefill), in tokens; 0 skips."),
    ] = "512",
    n_gen: Annotated[
        str, option("--n-gen", "-n", metavar="N,...", env=False, help="Tokens to generate (decode); 0 skips.")
    ] = "128",
    pg: Annotated[
        list[str] | None,
        option("--pg", "-pg", metavar="P,N", env=False, help="Prefill P, then decode N tokens; repeatable."),
    ] = None,
    n_depth: Annotated[
        str, option("--n-depth", "-d", metavar="N,...", env=False, help="Context depth before each test, in tokens.")
    ] = "0",
    threads: Annotated[
        str | None,
        option("--threads", "-t", metavar="N,...", default="chosen by the backend", help="Numbers of CPU threads."),
    ] = None,
    kv_bits: Annotated[
        str | None,
        option(
            "--kv-bits",
            metavar="N,...",
            default="chosen by the backend",
            help="KV cache precisions in bits: 16, 8 or 4.",
        ),
    ] = None,
    repetitions: Annotated[
        int,
        option(
            "--repetitions", "-r", metavar="N", env=False, minimum=1, help="Timed runs per test, after one warm-up."
        ),
    ] = 5,
    output: Annotated[
        str, option("--output", "-o", metavar="FORMAT", env=False, help="Output format: md, json or csv.")
    ] = "md",
    draft: Annotated[
        str,
        option(
            "--draft",
            "--spec-type",
            metavar="HOW,...",
            env=False,
            help="Generate with drafts as well: off, auto, mtp, ngram or 1 to 8 a pass.",
        ),
    ] = "off",
    adapter: AdapterOption = None,
    backend: BackendOption = "auto",
    memory: MemoryOption = None,
) -> None:
    """Benchmark prefill and decode, as llama-bench does.

    \b
    edgeq bench q2b -p 512,2048 -n 128 -d 0,4096 -t 1,2,4

    Speeds are in tokens/s. GB/s counts the weights and states that decode reads; "of memory" compares it with the
    memory bandwidth of as many threads, measured right before and after the test. With --draft the model says its own
    tokens after a text; "accepted" is the part of the drafts that were right.
    """
    if output not in ("md", "json", "csv"):
        raise UsageError(f"--output must be md, json or csv, got {output!r}")
    ways = [check_draft(way) for way in draft.split(",")]
    plain = _tests(_numbers("--n-prompt", n_prompt), _numbers("--n-gen", n_gen), pg or [], _numbers("-d", n_depth))
    tests = [test._replace(draft=way) for test in plain for way in (ways if test.generate else ["off"])]
    counts = [None] if threads is None else _numbers("--threads", threads, least=1)
    kv = [None] if kv_bits is None else _numbers("--kv-bits", kv_bits)
    rows = _measure_all(model, adapter, backend, memory, tests, list(product(counts, kv)), repetitions)
    if output == "md":
        _print_table(rows, drafts=ways != ["off"])
    else:
        {"json": _print_json, "csv": _print_csv}[output](rows)


def _numbers(option: str, text: str, least: int = 0) -> list[int]:
    """The numbers of a comma list."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < least:
        raise UsageError(f"{option} {text}: expected whole numbers from {least}, separated by commas")
    return numbers


def _tests(prompts: list[int], generated: list[int], pairs: list[str], depths: list[int]) -> list[Test]:
    """Every test at every depth: prompts, generation, then pairs of both."""
    both = [_numbers("-pg", pair) for pair in pairs]
    if any(len(pair) != 2 for pair in both):
        raise UsageError(f"-pg {pairs[0]}: expected the tokens of a prompt and of its continuation", hint="-pg 512,128")
    kinds = [(n, 0) for n in prompts] + [(0, n) for n in generated] + [(pair[0], pair[1]) for pair in both]
    tests = [Test(*kind, depth) for depth, kind in product(depths, kinds) if any(kind)]
    if not tests:
        raise UsageError("nothing to measure", hint="give -p, -n or -pg more than 0 tokens")
    return tests


def _measure_all(
    name: str,
    adapter: list[str] | None,
    backend: str,
    memory: str | None,
    tests: list[Test],
    settings: list[tuple[int | None, int | None]],
    repetitions: int,
) -> Iterator[tuple[dict[str, Any], Result]]:
    """Every test with every setting of threads and KV bits, as records and results, one model after another; what goes
    on shows on stderr."""
    bar = new_bar("{task.description}")
    task = bar.add_task("loading") if bar else None
    try:
        for count, kv_bits in settings:
            model = load(name, backend=backend, threads=count, kv_bits=kv_bits, adapter=adapter, memory=memory)
            results = measure(model, tests, repetitions=repetitions)
            for i, test in enumerate(tests):
                if bar and task is not None:
                    shared = f"{model.ops.threads} threads" if model.ops.threads else model.ops.name
                    bar.update(task, description=f"{test.name}, {shared} ({i + 1} of {len(tests)})")
                result = next(results)
                yield _record(model, result), result
            del model, results  # the next is to have their memory
    finally:
        if bar:
            bar.stop()


# --- output ----------------------------------------------------------------------------------------------------------


def _print_table(rows: Iterator[tuple[dict[str, Any], Result]], *, drafts: bool) -> None:
    """llama-bench's Markdown table, and three columns more; five with drafts."""
    widths = (18, 11, 9, 7, 7, 4, 16, 16, 6, 9) + (8, 11) * drafts
    show(_table_row(_COLUMNS + _DRAFT_COLUMNS * drafts, widths))
    show(_table_row([":" + "-" * (w - 1) if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)], widths))
    for record, result in rows:
        weights, nbytes = record["model_n_params"], record["model_size"]
        speed = f"{result.tok_per_s:.2f} ± {result.deviation:.2f}"
        rate = f"{result.gb_per_s:.1f}" if result.gb_per_s else ""
        share = f"{result.share:.0%}" if result.share else ""
        tally = result.tally
        accepted = f"{tally.accepted / tally.drafted:.0%}" if tally and tally.drafted else ""
        gain = (accepted, f"{tally.tokens_per_pass:.2f}" if tally else "") if drafts else ()
        cells = (
            record["model_type"], f"{nbytes / 2**20:.2f} MiB", f"{weights / 1e6:.2f} M", record["backends"],
            result.threads or "", record["type_k"], result.test.name, speed, rate, share, *gain,
        )  # fmt: skip
        show(_table_row(cells, widths))


def _table_row(cells: Any, widths: tuple[int, ...]) -> str:
    first, *others = (f"{cell!s:>{width}}" for cell, width in zip(cells, widths, strict=True))
    return f"| {first.strip():<{widths[0]}} | {' | '.join(others)} |"


def _print_json(rows: Iterator[tuple[dict[str, Any], Result]]) -> None:
    show_json([record for record, _ in rows], indent=2)


def _print_csv(rows: Iterator[tuple[dict[str, Any], Result]]) -> None:
    header = True
    for whole, _ in rows:
        record = {key: value for key, value in whole.items() if not isinstance(value, list)}
        writer = csv.DictWriter(lines := StringIO(), record, lineterminator="\n")
        if header:
            writer.writeheader()
            header = False
        writer.writerow(record)
        show(lines.getvalue(), end="")


def _record(model: Model, result: Result) -> dict[str, Any]:
    """One result under llama-bench's names, and edgeq's own: bytes per token, GB/s, the memory's rate,
    and the most memory until now, of the process and of the backend."""
    weights, nbytes = model_size(model)
    nanoseconds = [round(1e9 * seconds) for seconds in result.seconds]
    return {
        "build_number": edgeq.__version__,
        "backends": model.ops.name,
        "backend_info": model.ops.describe(),
        "model_filename": str(model.checkpoint.path),
        "model_type": _describe(model),
        "model_size": nbytes,
        "model_n_params": weights,
        "n_threads": result.threads,
        "type_k": model.ops.kv_dtype,
        "type_v": model.ops.kv_dtype,
        "n_prompt": result.test.prompt,
        "n_gen": result.test.generate,
        "n_depth": result.test.depth,
        "test": result.test.name,
        "avg_ns": round(sum(nanoseconds) / len(nanoseconds)),
        "avg_ts": result.tok_per_s,
        "stddev_ts": result.deviation,
        "samples_ns": nanoseconds,
        "samples_ts": result.rates,
        "token_nbytes": round(result.token_nbytes) if result.token_nbytes else None,
        "gb_per_s": result.gb_per_s,
        "read_gb_per_s": result.read_rate,
        "draft": result.test.draft,
        "n_passes": result.tally.passes if result.tally else None,
        "n_drafted": result.tally.drafted if result.tally else None,
        "n_accepted": result.tally.accepted if result.tally else None,
        "tokens_per_pass": result.tally.tokens_per_pass if result.tally else None,
        "peak_nbytes": peak_memory(),
        "backend_peak_nbytes": model.ops.peak_memory(),
    }


def _describe(model: Model) -> str:
    weights, nbytes = model_size(model)
    return f"qwen3.5 {8 * nbytes / weights:.2f} bits"
