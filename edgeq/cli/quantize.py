"""`edgeq quantize`: from a checkpoint to a smaller one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from edgeq.cli.console import new_bar, peak_memory_text
from edgeq.errors import EdgeqError, UsageError
from edgeq.quant.quantizer import Progress
from edgeq.quant.quantizer import quantize as quantize_checkpoint
from edgeq.quant.recipe import RECIPES
from edgeq.quant.report import Report, format_table

__all__ = ["progress_bar", "quantize"]

_RECIPE_HELP = "; ".join(f"{recipe.name}: {recipe.summary}" for recipe in RECIPES.values())


def quantize(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A checkpoint folder, a .gguf file or a hub id, not quantized.")
    ],
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="OUT", help="The folder to write.")] = None,
    bits: Annotated[
        int | None, typer.Option("--bits", show_default="the recipe's", help="4 or 8; also 2, 3, 5, 6.")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option("--group-size", show_default="the recipe's", help="Weights that share a scale: 32, 64 or 128."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", show_default="q4, or q8 at 8 bits", help=f"{_RECIPE_HELP}.")
    ] = None,
    types: Annotated[
        list[str] | None,
        typer.Option(
            "--type",
            metavar="PATTERN=SPEC",
            help="Store tensors whose name fits as 4, 8, 6g32, bf16, f16, f32; may be repeated, later ones win.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")] = False,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Write sizes and errors of all tensors as JSON.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder OUT, once the new one is whole.")] = False,
    quantize_flag: Annotated[bool, typer.Option("--quantize", hidden=True)] = False,  # mlx-lm's -q: always so here
) -> None:
    """Quantize a checkpoint. The result runs in edgeq, and unchanged in mlx-lm and mlx-vlm.

    edgeq quantize Qwen/Qwen3.5-2B -o q2b

    edgeq quantize Qwen/Qwen3.5-2B -o q2b --type '*.down_proj=6' --dry-run
    """
    del quantize_flag
    if report is not None and not report.absolute().parent.is_dir():
        raise UsageError(f"--report {report}: there is no folder {report.parent}")
    with progress_bar() as progress:
        result = quantize_checkpoint(
            source,
            out,
            bits=bits,
            group_size=group_size,
            recipe=recipe,
            types=types or (),
            dry_run=dry_run,
            force=force,
            progress=progress,
        )
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if report is not None:
        _write_report(report, result)
    if dry_run:
        typer.echo(format_table(result))
    else:
        print(_summary(result), file=sys.stderr)


def _write_report(path: Path, report: Report) -> None:
    try:
        path.write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise EdgeqError(f"{path} cannot be written: {error.strerror}") from None


def _summary(report: Report) -> str:
    return (
        f"{report.out}: {report.nbytes() / 1e6:,.1f} MB, text {report.bits_per_weight('text'):.3f} bits per weight | "
        f"{report.seconds:.1f} s | {peak_memory_text()}"
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
