"""`edgeq generate`: continue a text as it is."""

from __future__ import annotations

from typing import Annotated

from edgeq.cli.answers import warn_of_a_cut
from edgeq.cli.console import prefill_bar, say
from edgeq.cli.options import (
    AnswerOptions,
    DisplayOptions,
    JsonOptions,
    ModelOptions,
    PrefixOptions,
    PromptArgument,
    PromptOptions,
    SamplingOptions,
    VisualOptions,
    command,
    option,
)
from edgeq.cli.pictures import announce
from edgeq.cli.reply import hear, print_json, show_reply, usage_line
from edgeq.generate import GenerationSettings
from edgeq.session.prompt import completion_prompt

__all__ = ["generate"]

_DEFAULTS = SamplingOptions.of(GenerationSettings(max_tokens=256))


@command
def generate(
    *,
    prompt: PromptOptions,
    ignore_eos: Annotated[bool, option("--ignore-eos", env=False, help="Keep generating after an end token.")] = False,
    form: JsonOptions,
    display: DisplayOptions,
    visuals: VisualOptions,
    answer: AnswerOptions,
    sampling: SamplingOptions = _DEFAULTS,
    prefixes: PrefixOptions,
    model: ModelOptions,
    words: PromptArgument = None,
) -> None:
    """Complete raw text, without a chat template (base models).

    \b
    edgeq generate Qwen/Qwen3.5-2B-Base -p "The capital of France is" --max-tokens 20

    The prompt comes from --prompt, a file or stdin; several are joined. Pictures come before it. The completion goes to
    stdout.
    """
    text = prompt.text(words, stdin=not visuals.takes_stdin)
    visuals.settings()  # what is wrong with them is told before the model is loaded
    options = sampling.given() | answer.given()
    form.check(logprobs=answer.logprobs)
    images, videos = visuals.named()
    loaded = model.load()
    prefixes.use(loaded, once=True)
    settings = visuals.settings(loaded.chat_visuals)
    shown = completion_prompt(loaded.language, loaded.sight, text, images, videos, settings)
    if not display.quiet:
        announce(loaded, shown.visuals)
    options |= {"draft": model.draft, "ignore_eos": ignore_eos}
    with prefill_bar() as reading, prefill_bar("looking", patience=0) as looking:
        reply = loaded.generate(shown, on_prefill=reading, on_look=looking, **options)
        whole = hear(reply, stream=form.stream) if form.as_json else show_reply(reply, loaded.ops, display)
    if form.as_json:
        print_json(reply, loaded.tokenizer, stream=form.stream)
        if not display.quiet:
            say(usage_line(reply, loaded.ops), faint=True)
    warn_of_a_cut(reply, options)
    if not whole:
        raise KeyboardInterrupt
