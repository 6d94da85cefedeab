"""`edgeq quantize`: from a checkpoint to a smaller one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from edgeq.cli.console import new_bar, peak_memory_text, say, show, show_warning
from edgeq.cli.options import AdapterOption, chat_template_option, option
from edgeq.cli.outputs import check_outputs
from edgeq.errors import UsageError
from edgeq.printable import printable
from edgeq.quant.quantizer import Progress
from edgeq.quant.quantizer import quantize as quantize_checkpoint
from edgeq.quant.recipe import RECIPES
from edgeq.quant.report import Report, format_table

__all__ = ["progress_bar", "quantize"]

_RECIPE_HELP = "\n".join(
    ["Which tensors get how many bits:", *(f"{recipe.name:5}{recipe.summary}" for recipe in RECIPES.values())]
)


CalibrateOption = Annotated[
    str | None,
    option(
        "--calibrate",
        metavar="[TEXT]",
        env=False,
        help="Allocate bits to the matrices by what each gains, and round them for what they are multiplied by on a "
        "UTF-8 text; a run that was killed goes on.",
    ),
]
EffortOption = Annotated[
    str | None,
    option(
        "--effort",
        metavar="fast|standard|best",
        env=False,
        default="standard",
        help="How much work calibration is.",
    ),
]
TargetBpwOption = Annotated[
    float | None,
    option(
        "--target-bpw",
        metavar="BITS",
        env=False,
        help="Bits per weight of the language model, all its bytes counted.",
        default="as many as without calibration",
    ),
]
TargetSizeOption = Annotated[
    str | None,
    option("--target-size", metavar="SIZE", env=False, help="The same as the size of all tensors: 1.2G, 900M."),
]
KeepBitsOption = Annotated[
    bool, option("--keep-bits", env=False, help="Calibrate with the bits that matrices have without it.")
]
CalibrationSeedOption = Annotated[
    int | None,
    option("--seed", metavar="N", env=False, default="0", help="Chooses parts of a long calibration text."),
]


def quantize(
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
    bits: Annotated[
        int | None,
        option("--bits", "--q-bits", metavar="N", env=False, default="the recipe's", help="Bits: 2, 3, 4, 5, 6 or 8."),
    ] = None,
    group_size: Annotated[
        int | None,
        option(
            "--group-size",
            "--q-group-size",
            metavar="N",
            env=False,
            default="the recipe's",
            help="Weights per scale: 32, 64 or 128.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        option(
            "--recipe",
            metavar="NAME",
            env=False,
            default="q4; q8 with --bits 8; keep for GPTQ and the like",
            help=_RECIPE_HELP,
        ),
    ] = None,
    types: Annotated[
        list[str] | None,
        option(
            "--type",
            metavar="PATTERN=SPEC",
            env=False,
            help="Store tensors whose name matches PATTERN as SPEC: bits (4), bits and group size (6g32), bf16, f16 "
            "or f32; repeatable, last match wins.",
        ),
    ] = None,
    vision: Annotated[
        str | None,
        option(
            "--vision",
            metavar="16|8|none",
            env=False,
            default="8; 16 with --recipe none or keep",
            help="The vision tower: as it is, its matrices in 8 bits, or left out.",
        ),
    ] = None,
    no_vision: Annotated[
        bool, option("--no-vision", env=False, help="Leave the vision tower out: --vision none.")
    ] = False,
    no_mtp: Annotated[bool, option("--no-mtp", env=False, help="Leave the MTP head out.")] = False,
    calibrate: CalibrateOption = None,
    effort: EffortOption = None,
    target_bpw: TargetBpwOption = None,
    target_size: TargetSizeOption = None,
    keep_bits: KeepBitsOption = False,
    seed: CalibrationSeedOption = None,
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
    edgeq quantize Qwen/Qwen3.5-2B -o q2b --calibrate --target-bpw 4.6
    edgeq quantize Qwen/Qwen3.5-2B -o q2b --adapter my-lora

    The result runs in edgeq, and unchanged in mlx-lm and mlx-vlm. A quantized GGUF file is accepted as MODEL, with a
    warning if it is below Q8_0. GPTQ, AWQ, AutoRound and compressed-tensors are converted without a change in value.
    """
    del quantize_flag
    if no_vision and vision not in (None, "none"):
        raise UsageError(f"--no-vision and --vision {vision} contradict each other", hint="give one of them")
    check_outputs(None if dry_run else out, report)
    with progress_bar() as progress:
        result = quantize_checkpoint(
            source,
            out,
            bits=bits,
            group_size=group_size,
            recipe=recipe,
            types=types or (),
            vision="none" if no_vision else vision,
            mtp=not no_mtp,
            adapter=adapter,
            chat_template=chat_template,
            dry_run=dry_run,
            report=report,
            force=force,
            progress=progress,
            calibrate=calibrate,
            effort=effort,
            target_bpw=target_bpw,
            target_size=target_size,
            keep_bits=keep_bits,
            seed=seed,
        )
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
