"""`edgeq generate`: continue a text as it is."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from edgeq.api import load
from edgeq.cli.console import dim, prefill_bar
from edgeq.cli.options import (
    BackendOption,
    ContextOption,
    FrequencyPenaltyOption,
    KvBitsOption,
    LoopGuardOption,
    MaxTokensOption,
    MinPOption,
    ModelArgument,
    PresencePenaltyOption,
    RepetitionPenaltyOption,
    SeedOption,
    StopOption,
    TemperatureOption,
    ThreadsOption,
    TopKOption,
    TopPOption,
)
from edgeq.cli.prompt import joined_prompt
from edgeq.cli.reply import reply_object, usage_line

__all__ = ["generate"]


def generate(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The text to continue; - reads stdin.")] = None,
    max_tokens: MaxTokensOption = 256,
    temp: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    presence_penalty: PresencePenaltyOption = None,
    frequency_penalty: FrequencyPenaltyOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    loop_guard: LoopGuardOption = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end of the text.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
    backend: BackendOption = "auto",
    threads: ThreadsOption = None,
    context: ContextOption = None,
    kv_bits: KvBitsOption = None,
) -> None:
    """Continue a text as it is, without a chat template: for base models.

    edgeq generate Qwen/Qwen3.5-2B-Base -p "The capital of France is" --max-tokens 20

    The text comes from --prompt, from stdin, or from both (joined). The continuation goes to stdout.
    """
    text = joined_prompt(prompt)
    loaded = load(model, backend=backend, threads=threads, context=context, kv_bits=kv_bits)
    with prefill_bar() as bar:
        reply = loaded.generate(
            text,
            ignore_eos=ignore_eos,
            on_prefill=bar,
            max_tokens=max_tokens,
            temperature=temp,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=tuple(stop) if stop else None,
            loop_guard=loop_guard,
        )
        for piece in reply:
            if not as_json:
                print(piece.text, end="", flush=True)
    print(json.dumps(reply_object(reply), ensure_ascii=False) if as_json else "")
    print(dim(usage_line(reply, loaded.ops)), file=sys.stderr)
