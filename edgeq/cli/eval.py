"""`edgeq eval`: what quantization does to predictions, and perplexity. `edgeq kld` is the same, arguments turned."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeq.cli.console import new_bar, peak_memory_text, say, show, show_json, show_warning
from edgeq.cli.options import MODEL_HELP, AdapterOption, ThreadsOption, option
from edgeq.cli.prompt import file_text, piped_text
from edgeq.errors import UsageError

if TYPE_CHECKING:
    from edgeq.quality.evaluate import Evaluation, Text
    from edgeq.quality.kld import Perplexity

__all__ = [
    "ChunksOption", "ContextOption", "JsonOption", "MaxKlOption", "ReferenceAdapterOption", "TextOption",
    "check_max_kl", "eval", "given_text", "print_evaluations", "progress_bar", "warn_of_memory",
]  # fmt: skip

TextOption = Annotated[
    Path | None,
    option(
        "--text", "-f", "--file", metavar="FILE", env=False, default="what edgeq's own holds out of calibration",
        help="Text to predict, UTF-8; - reads stdin.",
    ),
]  # fmt: skip
ContextOption = Annotated[
    int,
    option(
        "--context", "-c", "--ctx-size", metavar="N", env=False, minimum=4,
        help="Tokens per chunk; the second half is scored.",
    ),
]  # fmt: skip
ChunksOption = Annotated[int, option("--chunks", metavar="N", env=False, minimum=1, help="Maximum number of chunks.")]
MaxKlOption = Annotated[
    float | None,
    option(
        "--max-kl", metavar="X", env=False, default="no check",
        help="Exit with code 6 if a model's mean KL divergence is above X nats.",
    ),
]  # fmt: skip
JsonOption = Annotated[bool, option("--json", env=False, help="Print JSON.")]
ReferenceAdapterOption = Annotated[
    list[str] | None,
    option("--reference-adapter", metavar="PATH[:SCALE]", env=False, default="none", help="Adapter of the reference."),
]


def eval(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=MODEL_HELP)],
    kld: Annotated[
        str | None,
        option("--kld", metavar="REFERENCE", env=False, default="none", help="Compare with this model."),
    ] = None,
    perplexity: Annotated[
        bool, option("--perplexity", env=False, help="Perplexity only; the default without --kld.")
    ] = False,
    text: TextOption = None,
    context: ContextOption = 512,
    chunks: ChunksOption = 8,
    max_kl: MaxKlOption = None,
    as_json: JsonOption = False,
    backend: Annotated[
        str | None,
        option(
            "--backend", metavar="NAME", env=False, default="none: the weights alone, in float32",
            help="As it runs on a backend (auto, cpu, mlx or numpy): weights, activations, and both.",
        ),
    ] = None,
    kv_bits: Annotated[
        int | None,
        option(
            "--kv-bits", metavar="N", env=False, default="chosen by the backend (cpu: 16)",
            help="KV cache precision of MODEL on --backend in bits: 16, 8 or 4.",
        ),
    ] = None,
    adapter: AdapterOption = None,
    reference_adapter: ReferenceAdapterOption = None,
    threads: ThreadsOption = None,
) -> None:  # fmt: skip
    """Measure what quantization does to predictions.

    \b
    edgeq eval q2b --kld Qwen/Qwen3.5-2B
    edgeq eval q2b model-Q4_K_M.gguf --kld Qwen/Qwen3.5-2B --text notes.txt --context 2048
    edgeq eval q2b --kld Qwen/Qwen3.5-2B --backend cpu --kv-bits 4
    edgeq eval q2b --perplexity --text notes.txt

    Takes safetensors, MLX, GGUF, GPTQ and AWQ files, with one layer of each in memory at a time. Conventions are
    llama-perplexity's: chunks start from nothing, and the second half of each is scored. Prints KL divergence over the
    next token in nats (mean, median, 99 and 99.9 percentile, maximum), how often both find the same token most likely,
    perplexity and the logarithm of its ratio, and the normalised mean squared error of the logits.
    """
    from edgeq.quality.evaluate import evaluate, evaluate_perplexity

    check_max_kl(max_kl)
    warn_of_memory()
    if kld is None or perplexity:
        _check_alone(kld, max_kl, reference_adapter)
        given, rows = given_text(text), []
        for model in models:
            with progress_bar() as progress:
                read, result = evaluate_perplexity(
                    model, text=given, context=context, chunks=chunks, backend=backend, kv_bits=kv_bits,
                    threads=threads, adapter=adapter, progress=progress,
                )  # fmt: skip
            rows.append((model, result))
        _print_perplexities(rows, read, backend, as_json=as_json)
        return
    with progress_bar() as progress:
        read, found = evaluate(
            models, kld, text=given_text(text), context=context, chunks=chunks, backend=backend, kv_bits=kv_bits,
            threads=threads, adapter=adapter, reference_adapter=reference_adapter, progress=progress,
        )  # fmt: skip
    print_evaluations(found, read, kld, max_kl, as_json=as_json)


def _check_alone(kld: str | None, max_kl: float | None, reference_adapter: Sequence[str] | None) -> None:
    """Raise UsageError for what perplexity has no use for."""
    if kld is not None:
        raise UsageError("--perplexity is of a model by itself", hint="leave it out: --kld prints perplexities, too")
    if max_kl is not None:
        raise UsageError("--max-kl needs a model to compare with", hint="name it with --kld REFERENCE")
    if reference_adapter:
        raise UsageError("--reference-adapter is of a model to compare with", hint="name it with --kld REFERENCE")


def warn_of_memory() -> None:
    """A line where EDGEQ_MEMORY is set, which these commands do not keep."""
    if os.environ.get("EDGEQ_MEMORY"):
        show_warning("EDGEQ_MEMORY has no effect here: one layer of each model at a time is in memory")


def check_max_kl(max_kl: float | None) -> None:
    """Raise UsageError for what is no limit."""
    if max_kl is not None and not max_kl >= 0:
        raise UsageError(f"--max-kl must be a number of at least 0, got {max_kl:g}")


def given_text(file: Path | None) -> str | None:
    """The text of --text."""
    if file is None:
        return None
    if str(file) != "-":
        return file_text(file)
    if (text := piped_text()) is None:
        raise UsageError("no text on stdin", hint="pipe it in, or name a file with --text")
    return text


def print_evaluations(
    found: Sequence[Evaluation], read: Text, reference: str, max_kl: float | None, *, as_json: bool
) -> None:
    """The table or JSON, and then the error of whatever is above `max_kl`."""
    from edgeq.quality.kld import check

    say(f"{_scored(read, found[0].divergence.positions)}; reference {reference} | {peak_memory_text()}")
    if as_json:
        show_json([_record(one, read, reference) for one in found], indent=2)
    else:
        show("\n".join(table(found)))
    if max_kl is not None:
        for one in found:
            check(f"{one.model} ({one.what})" if one.what == "activations" else one.model, one.divergence, max_kl)


def _scored(read: Text, positions: int) -> str:
    count, context = read.chunks.shape
    return f"{read.name}: {count} chunk{'s' if count > 1 else ''} of {context} tokens, {positions:,} positions"


def table(found: Sequence[Evaluation]) -> Iterator[str]:
    """A line for the reference and one for each evaluation, in columns that stay apart."""
    names = [f"{one.model}: {one.what}" if len(found) > 1 else one.model for one in found]
    width = max(len("reference"), *map(len, names))
    columns = ("KL mean", "+-", "median", "99 %", "99.9 %", "maximum", "top-1", "perplexity", "ln ratio", "+-", "NMSE")
    yield f"{'model':{width}}" + "".join(f"{column:>11}" for column in columns)
    yield f"{'reference':{width}}{'':77} {found[0].divergence.reference_perplexity:10.4f}"
    for name, one in zip(names, found, strict=True):
        d = one.divergence
        kl = "".join(f"{x:11.6f}" for x in (d.mean, d.mean_error, d.median, d.p99, d.p999, d.max))
        ratio = f"{d.delta_ln_perplexity:+11.6f}{d.delta_ln_perplexity_error:11.6f}"
        yield f"{name:{width}}{kl}{d.top1:11.2%} {d.perplexity:10.4f}{ratio}{d.nmse:11.1e}"


def _record(one: Evaluation, read: Text, reference: str) -> dict[str, Any]:
    count, context = read.chunks.shape
    return {
        "model": one.model, "reference": reference, "what": one.what, "backend": one.backend, "kv": one.kv,
        "text": read.name, "context": context, "chunks": count, **one.divergence._asdict(), "drift": one.found.drift,
    }  # fmt: skip


def _print_perplexities(
    rows: Sequence[tuple[str, Perplexity]], read: Text, backend: str | None, *, as_json: bool
) -> None:
    say(f"{_scored(read, rows[0][1].positions)} | {peak_memory_text()}")
    if as_json:
        count, context = read.chunks.shape
        about = {"backend": backend or "float32", "text": read.name, "context": context, "chunks": count}
        show_json([{"model": model, **about, **result._asdict()} for model, result in rows], indent=2)
        return
    width = max(len("model"), *(len(model) for model, _ in rows))
    show(f"{'model':{width}} {'perplexity':>12} {'+-':>10}")
    for model, result in rows:
        show(f"{model:{width}} {result.perplexity:12.4f} {result.error:10.4f}")


@contextmanager
def progress_bar() -> Iterator[Any]:
    """A bar on stderr; None off a terminal."""
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

    bar = new_bar(TextColumn("layers"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    if bar is None:
        yield None
        return
    task = bar.add_task("", total=None)
    try:
        yield lambda done, total: bar.update(task, completed=done, total=total)
    finally:
        bar.stop()
