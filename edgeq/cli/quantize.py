"""`edgeq quantize`: from a checkpoint to a smaller one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from edgeq.cli.console import new_bar, peak_memory_text, say, show, show_warning
from edgeq.cli.options import AdapterOption, chat_template_option, command, option
from edgeq.cli.options.quantization import CalibrationOptions, RecipeOptions
from edgeq.cli.outputs import check_outputs
from edgeq.printable import printable
from edgeq.quant.quantizer import Progress
from edgeq.quant.quantizer import quantize as quantize_checkpoint
from edgeq.quant.report import Report, format_table

__all__ = ["progress_bar", "quantize"]


@command
def quantize(
    *,
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Checkpoint folder, .gguf file, Hugging Face ID (Qwen/Qwen3.5-2B) or short name (qwen3.5:2b), "
            "preferably unquantized.",
        ),
    ],
    out: Annotated[
        Path | None, option("--out", "-o", metavar="OUT", env=False, help="Folder to write; not needed with --dry-run.")
    ] = None,
    recipe: RecipeOptions,
    calibration: CalibrationOptions,
    adapter: AdapterOption = None,
    chat_template: Annotated[str | None, chat_template_option(env=False)] = None,
    dry_run: Annotated[
        bool, option("--dry-run", env=False, help="Print what would be written; write nothing.")
    ] = False,
    report: Annotated[
        Path | None,
        option(
            "--report",
            metavar="FILE",
            env=False,
            help="Write sizes and errors as JSON (.json), and as a page beside it (.html).",
        ),
    ] = None,
    force: Annotated[
        bool, option("--force", env=False, help="Overwrite OUT, only after the new model is complete.")
    ] = False,
    quantize_flag: Annotated[bool, typer.Option("--quantize", "-q", hidden=True)] = False,  # mlx-lm's -q: always so
) -> None:
    """Quantize a model to 2 to 8 bits.

    \b
    edgeq quantize Qwen/Qwen3.5-2B -o q2b
    edgeq quantize Qwen/Qwen3.5-2B -o q2b --type '*.down_proj=6' --dry-run
    edgeq quantize Qwen/Qwen3.5-2B -o q2b --calibrate
    edgeq quantize Qwen/Qwen3.5-2B -o q2b --adapter my-lora

    The result runs in edgeq, and unchanged in mlx-lm and mlx-vlm. A quantized GGUF file is accepted as MODEL, with a
    warning if it is below Q8_0. GPTQ, AWQ, AutoRound and compressed-tensors are converted without a change in value.
    """
    del quantize_flag
    settings = recipe.settings() | calibration.settings()
    check_outputs(None if dry_run else out, report)
    with progress_bar() as progress:
        result = quantize_checkpoint(
            source, out, adapter=adapter, chat_template=chat_template, dry_run=dry_run, report=report, force=force,
            progress=progress, **settings,
        )  # fmt: skip
    for warning in result.warnings:
        show_warning(warning)
    if dry_run:
        show(format_table(result))
    else:
        say(_summary(result))


def _summary(report: Report) -> str:
    written = (
        f"{printable(report.out)}: {report.nbytes() / 1e6:,.1f} MB, "
        f"text {report.bits_per_weight('text'):.3f} bits per weight | "
        f"{report.seconds:.1f} s | {peak_memory_text()}"
    )
    if report.gate is None:
        return written
    kl, plain = report.gate["kl"], report.gate["plain_rounding"]["kl"]
    return (
        f"{written}\nKL divergence on held-out text {kl['mean']:.5f} nats (plain rounding {plain['mean']:.5f}), "
        f"{kl['top1']:.1%} the same most likely token"
    )


@contextmanager
def progress_bar() -> Iterator[Progress | None]:
    """A bar on stderr; None off a terminal."""
    bar = new_bar(TextColumn("{task.description:44}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    if bar is None:
        yield None
        return
    task = bar.add_task("opening", total=None)

    def progress(done: int, total: int, name: str) -> None:
        bar.update(task, completed=done, total=total, description=name)

    try:
        yield progress
    finally:
        bar.stop()
