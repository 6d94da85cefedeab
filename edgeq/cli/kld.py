"""`edgeq kld`: how far a model's predictions are from a reference's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeq.cli.console import new_bar, say, show, show_json
from edgeq.cli.options import MODEL_HELP, AdapterOption, BackendOption, MemoryOption, ThreadsOption, option
from edgeq.cli.prompt import file_text, piped_text
from edgeq.errors import UsageError

if TYPE_CHECKING:
    from edgeq.api import Model
    from edgeq.quality.kld import Divergence

__all__ = ["kld"]


def kld(
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help=MODEL_HELP)],
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="One or several models to compare with it.")],
    text: Annotated[
        Path | None,
        option(
            "--text", "-f", "--file", metavar="FILE", env=False, default="random tokens",
            help="Text to predict, UTF-8; - reads stdin.",
        ),
    ] = None,
    context: Annotated[
        int,
        option(
            "--context", "-c", "--ctx-size", metavar="N", env=False, minimum=4,
            help="Tokens per chunk; the second half is scored.",
        ),
    ] = 512,
    chunks: Annotated[
        int, option("--chunks", metavar="N", env=False, minimum=1, help="Maximum number of chunks.")
    ] = 8,
    max_kl: Annotated[
        float | None,
        option(
            "--max-kl", metavar="X", env=False, default="no check",
            help="Exit with code 6 if a model's mean KL divergence is above X nats.",
        ),
    ] = None,
    as_json: Annotated[bool, option("--json", env=False, help="Print JSON.")] = False,
    reference_backend: Annotated[
        str | None,
        option("--reference-backend", metavar="NAME", env=False, default="--backend", help="Backend of REFERENCE."),
    ] = None,
    adapter: AdapterOption = None,
    reference_adapter: Annotated[
        list[str] | None,
        option("--reference-adapter", metavar="PATH[:SCALE]", env=False, default="none", help="Adapter of REFERENCE."),
    ] = None,
    backend: BackendOption = "auto",
    threads: ThreadsOption = None,
    kv_bits: Annotated[
        int | None,
        option(
            "--kv-bits", metavar="N", default="chosen by the backend (cpu: 16)",
            help="KV cache precision of MODEL in bits: 16, 8 or 4.",
        ),
    ] = None,
    memory: MemoryOption = None,
) -> None:  # fmt: skip
    """Measure what quantization does to predictions.

    \b
    edgeq kld Qwen/Qwen3.5-2B q2b --text notes.txt
    edgeq kld demo demo --kv-bits 4 --reference-backend numpy
    edgeq kld Qwen/Qwen3.5-2B q2b --reference-adapter my-lora

    Prints KL divergence over the next token in nats (mean, 99 and 99.9 percentile, maximum), how often both find the
    same token most likely, the text's perplexity, and the normalised mean squared error of the logits.
    """
    from edgeq.api import load
    from edgeq.quality.kld import check, compare, cut

    if max_kl is not None and not max_kl >= 0:
        raise UsageError(f"--max-kl must be a number of at least 0, got {max_kl:g}")
    given = None if text is None else _text(text)  # before a model is loaded for nothing
    expected = load(
        reference, backend=reference_backend or backend, threads=threads, adapter=reference_adapter, memory=memory
    )
    ids = _random_ids(expected, context * chunks) if given is None else expected.need_tokenizer().encode(given)
    pieces = cut(ids, context, chunks)
    found = [
        load(name, backend=backend, threads=threads, kv_bits=kv_bits, adapter=adapter, memory=memory) for name in models
    ]
    with _progress_bar() as progress:
        results = compare(expected.engine, [model.engine for model in found], pieces, progress)
    scored = (
        f"{len(pieces)} chunk{'s' if len(pieces) > 1 else ''} of {context} tokens, {results[0].positions:,} positions"
    )
    say(f"{scored}; reference {reference} on {expected.ops.name}")
    records = [_record(*row) for row in zip(models, found, results, strict=True)]
    if as_json:
        show_json(records, indent=2)
    else:
        show("\n".join(_table(models, results)))
    if max_kl is not None:
        for name, result in zip(models, results, strict=True):
            check(name, result, max_kl)


def _text(file: Path) -> str:
    if str(file) != "-":
        return file_text(file)
    if (text := piped_text()) is None:
        raise UsageError("no text on stdin", hint="pipe it in, or name a file with --text")
    return text


def _random_ids(model: Model, count: int) -> Sequence[int]:
    import numpy as np

    ids: list[int] = np.random.default_rng(0).integers(0, model.vocab_size, count).tolist()
    return ids


def _table(names: Sequence[str], results: Sequence[Divergence]) -> Iterator[str]:
    width = max(len("reference"), *map(len, names))
    columns = "".join(f"{name:>11}" for name in ("KL mean", "99 %", "99.9 %", "maximum", "top-1", "perplexity", "NMSE"))
    yield f"{'model':{width}}{columns}"
    yield f"{'reference':{width}}{'':55} {results[0].reference_perplexity:10.4f}"
    for name, r in zip(names, results, strict=True):
        kl = "".join(f"{x:11.6f}" for x in (r.mean, r.p99, r.p999, r.max))
        yield f"{name:{width}}{kl}{r.top1:11.2%} {r.perplexity:10.4f}{r.nmse:11.1e}"


def _record(name: str, model: Model, result: Divergence) -> dict[str, Any]:
    return {"model": name, "backend": model.ops.name, "kv": model.ops.kv_dtype, **result._asdict()}


@contextmanager
def _progress_bar() -> Iterator[Any]:
    """A bar on stderr; None off a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    bar = new_bar(TextColumn("chunks"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    if bar is None:
        yield None
        return
    task = bar.add_task("", total=None)
    try:
        yield lambda done, total: bar.update(task, completed=done, total=total)
    finally:
        bar.stop()
