"""`edgeq kld`: `edgeq eval` by its older name, for a model as it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from edgeq.cli.eval import (
    ChunksOption,
    ContextOption,
    JsonOption,
    MaxKlOption,
    ReferenceAdapterOption,
    TextOption,
    check_max_kl,
    given_text,
    print_evaluations,
    progress_bar,
    warn_of_memory,
)
from edgeq.cli.options import MODEL_HELP, AdapterOption, BackendOption, KvBitsOption, ThreadsOption, option

__all__ = ["kld"]


def kld(
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help=MODEL_HELP)],
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="One or several models to compare with it.")],
    text: TextOption = None,
    context: ContextOption = 512,
    chunks: ChunksOption = 8,
    max_kl: MaxKlOption = None,
    as_json: JsonOption = False,
    reference_backend: Annotated[
        str | None,
        option("--reference-backend", metavar="NAME", env=False, default="--backend", help="Backend of REFERENCE."),
    ] = None,
    adapter: AdapterOption = None,
    reference_adapter: ReferenceAdapterOption = None,
    backend: BackendOption = "auto",
    threads: ThreadsOption = None,
    kv_bits: KvBitsOption = None,
) -> None:
    """Compare models with a reference, as they run on a backend.

    \b
    edgeq kld Qwen/Qwen3.5-2B q2b --text notes.txt
    edgeq kld demo demo --kv-bits 4 --reference-backend numpy
    edgeq kld Qwen/Qwen3.5-2B q2b --reference-adapter my-lora

    Prints what `edgeq eval` prints, of weights, activations and cache together. The reference runs on the same backend
    where no other is named.
    """
    from edgeq.quality.evaluate import evaluate

    check_max_kl(max_kl)
    warn_of_memory()
    with progress_bar() as progress:
        read, found = evaluate(
            models, reference, text=given_text(text), context=context, chunks=chunks, backend=backend, kv_bits=kv_bits,
            threads=threads, apart=False, adapter=adapter, reference_adapter=reference_adapter,
            reference_backend=reference_backend or backend, progress=progress,
        )  # fmt: skip
    print_evaluations(found, read, reference, max_kl, as_json=as_json)
