"""`edgeq chat`: talk to a model, one shot or in a loop."""

from __future__ import annotations

import sys
from typing import Annotated

from edgeq.cli.console import prefill_bar, show_json
from edgeq.cli.options import ConversationOptions, ModelOptions, PromptOptions, SamplingOptions, command, option
from edgeq.cli.reply import reply_object, show_reply
from edgeq.session.chat import Chat

__all__ = ["chat"]


@command
def chat(
    *,
    prompt: PromptOptions,
    as_json: Annotated[
        bool, option("--json", env=False, help="Print the reply as one JSON object (single prompt only).")
    ] = False,
    conversation: ConversationOptions,
    sampling: SamplingOptions,
    model: ModelOptions,
) -> None:
    """Talk to a model, in a terminal or for one answer.

    \b
    edgeq chat demo
    edgeq chat Qwen/Qwen3.5-2B --think --thinking-budget 512
    cat build.log | edgeq chat Qwen/Qwen3.5-2B -p "Why did this fail?"

    In a terminal, without --prompt, starts an interactive chat; /help lists its commands. With --prompt, --file, --json
    or piped input it answers once. The answer goes to stdout, thinking and statistics to stderr. Recommended sampling
    is that of the checkpoint's generation_config.json, or else of the model card for the mode.
    """
    one_shot = prompt.given or as_json or not sys.stdin.isatty()
    text = prompt.text() if one_shot else ""
    options = {**conversation.given(), **sampling.given()}
    loaded = model.load()
    with prefill_bar() as bar:
        talk = loaded.chat(draft=model.draft, on_prefill=bar, **options)
        if one_shot:
            answer_once(talk, text, as_json=as_json)
        else:
            from edgeq.cli.repl import Repl  # line editing is a large library that one shot does not need

            Repl(talk, model.name).run()


def answer_once(conversation: Chat, text: str, *, as_json: bool) -> None:
    """One question, one answer."""
    reply = conversation.send(text)
    if as_json:
        for _ in reply:
            pass
        show_json(reply_object(reply))
    elif not show_reply(reply, conversation.model.engine.ops):
        raise KeyboardInterrupt
