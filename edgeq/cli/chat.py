"""`edgeq chat`: talk to a model, one shot or in a loop."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from edgeq.api import load
from edgeq.cli.console import prefill_bar
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
from edgeq.cli.reply import reply_object, show_reply
from edgeq.session.chat import Chat

__all__ = ["chat"]


def chat(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this and leave; - reads stdin.")] = None,
    system: Annotated[
        str | None, typer.Option("--system", envvar="EDGEQ_SYSTEM", show_envvar=False, help="System prompt.")
    ] = None,
    think: Annotated[
        bool | None,
        typer.Option(
            "--think/--no-think",
            envvar="EDGEQ_THINK",
            show_envvar=False,
            show_default="the model's",
            help="Think before answering.",
        ),
    ] = None,
    thinking_budget: Annotated[
        int | None,
        typer.Option(
            "--thinking-budget",
            envvar="EDGEQ_THINKING_BUDGET",
            show_envvar=False,
            show_default=False,
            help="Most tokens of thinking before the answer has to begin.",
        ),
    ] = None,
    max_tokens: MaxTokensOption = None,
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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object; for one shot.")] = False,
    backend: BackendOption = "auto",
    threads: ThreadsOption = None,
    context: ContextOption = None,
    kv_bits: KvBitsOption = None,
) -> None:
    """Talk to a model.

    edgeq chat demo

    cat build.log | edgeq chat Qwen/Qwen3.5-2B -p "Why did this fail?"

    Without --prompt and with a terminal, a conversation begins; /help lists its commands. The answer goes to stdout,
    thinking and figures go to stderr. Sampling options override what the model card recommends for the mode.
    """
    one_shot = prompt is not None or as_json or not sys.stdin.isatty()
    text = joined_prompt(prompt) if one_shot else ""
    loaded = load(model, backend=backend, threads=threads, context=context, kv_bits=kv_bits)
    with prefill_bar() as bar:
        conversation = loaded.chat(
            thinking=think,
            system=system,
            on_prefill=bar,
            thinking_budget=thinking_budget,
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
        if one_shot:
            answer_once(conversation, text, as_json=as_json)
        else:
            from edgeq.cli.repl import Repl  # line editing is a large library that one shot does not need

            Repl(conversation, model).run()


def answer_once(conversation: Chat, text: str, *, as_json: bool) -> None:
    """One question, one answer."""
    reply = conversation.send(text)
    if as_json:
        for _ in reply:
            pass
        print(json.dumps(reply_object(reply), ensure_ascii=False))
    elif not show_reply(reply, conversation.model.engine.ops):
        raise KeyboardInterrupt
