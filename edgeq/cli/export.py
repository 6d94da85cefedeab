"""`edgeq export`: from a checkpoint to a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeq.adapters import adapted, given_adapters
from edgeq.checkpoint import open_checkpoint
from edgeq.cli.console import peak_memory_text, say
from edgeq.cli.options import MODEL_HELP, AdapterOption, ThreadsOption, chat_template_option, command, option
from edgeq.cli.options.quantization import CalibrationOptions
from edgeq.cli.outputs import check_outputs
from edgeq.cli.quantize import progress_bar
from edgeq.errors import UsageError
from edgeq.hub import find_model
from edgeq.printable import printable
from edgeq.quant.calibrate.request import choose_calibration
from edgeq.quant.gguf_export import EXPORT_TYPES, ExportReport, check_target, export_gguf, export_mmproj
from edgeq.weights import Part

__all__ = ["export"]


@command
def export(
    *,
    source: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    out: Annotated[Path, option("--out", "-o", metavar="FILE.gguf", env=False, help="File to write.")],
    kind: Annotated[
        str, option("--type", metavar="TYPE", env=False, help=f"Type of matrices: {', '.join(EXPORT_TYPES)}.")
    ] = "f16",
    mmproj: Annotated[
        Path | None,
        option("--mmproj", metavar="FILE", env=False, help="Write the vision tower, too, to this file (f16)."),
    ] = None,
    no_vision: Annotated[
        bool, option("--no-vision", env=False, help="Export even if the vision tower is not fit for use.")
    ] = False,
    no_mtp: Annotated[bool, option("--no-mtp", env=False, help="Leave the MTP head out.")] = False,
    calibration: CalibrationOptions,
    threads: ThreadsOption = None,
    adapter: AdapterOption = None,
    chat_template: Annotated[str | None, chat_template_option(env=False)] = None,
    force: Annotated[
        bool, option("--force", env=False, help="Overwrite existing files, only after the new ones are complete.")
    ] = False,
) -> None:
    """Export to GGUF for llama.cpp and ollama.

    \b
    edgeq export Qwen/Qwen3.5-0.8B -o qwen.gguf --type q8_0 --mmproj mmproj-qwen.gguf
    edgeq export Qwen/Qwen3.5-0.8B -o qwen.gguf --type q4_k_m --calibrate
    """
    kind = kind.lower()
    if kind not in EXPORT_TYPES:
        raise UsageError(f"unknown type {kind!r}", hint=f"use one of {', '.join(EXPORT_TYPES)}")
    request = choose_calibration(**calibration.settings())
    check_outputs(out, mmproj)
    checkpoint = adapted(open_checkpoint(find_model(source)), given_adapters(adapter))
    if no_vision and mmproj is not None:
        raise UsageError("--no-vision and --mmproj contradict each other", hint="give one of them")
    told = {Part.VISION: no_vision, Part.MTP: no_mtp}
    checkpoint.check_nothing_lost({part for part, dropped in told.items() if dropped})
    if chat_template is not None:
        checkpoint.templates = checkpoint.templates.choose(chat_template)
        checkpoint.template()  # what is asked for has to be usable
    reports = []
    check_target(checkpoint, out, force, [] if mmproj is None else [mmproj])
    with progress_bar() as progress:
        if mmproj is not None:  # first, because it is the quicker of the two to fail
            reports.append(export_mmproj(checkpoint, mmproj, kind, force=force, progress=progress))
        reports.append(export_gguf(
            checkpoint, out, kind, mtp=not no_mtp, force=force, progress=progress,
            calibration=request, threads=threads,
        ))  # fmt: skip
    for report in reports:
        say(_summary(report))


def _summary(report: ExportReport) -> str:
    types = ", ".join(f"{count} {name}" for name, count in report.types.items())
    notes = "".join(f"\nnote: {note}" for note in report.notes)
    gate = f"\n{report.gate}" if report.gate else ""
    return f"{printable(str(report.path))}: {report.nbytes / 1e6:,.1f} MB: {types} | {peak_memory_text()}{notes}{gate}"
