"""`edgeq generate`: continue a text as it is."""

from __future__ import annotations

import sys
from typing import Annotated

from edgeq.cli.console import dim, for_terminal, prefill_bar, show_json
from edgeq.cli.options import ModelOptions, PromptOptions, SamplingOptions, VisualOptions, command, option
from edgeq.cli.pictures import announce
from edgeq.cli.reply import reply_object, usage_line
from edgeq.generate import GenerationSettings
from edgeq.session.prompt import completion_prompt

__all__ = ["generate"]

_DEFAULTS = SamplingOptions.of(GenerationSettings(max_tokens=256))


@command
def generate(
    *,
    prompt: PromptOptions,
    ignore_eos: Annotated[bool, option("--ignore-eos", env=False, help="Keep generating after an end token.")] = False,
    as_json: Annotated[
        bool, option("--json", env=False, help="Print the reply as one JSON object instead of its text.")
    ] = False,
    visuals: VisualOptions,
    sampling: SamplingOptions = _DEFAULTS,
    model: ModelOptions,
) -> None:
    """Complete raw text, without a chat template (base models).

    \b
    edgeq generate Qwen/Qwen3.5-2B-Base -p "The capital of France is" --max-tokens 20

    The prompt comes from --prompt, a file or stdin; several are joined. Pictures come before it. The completion goes to
    stdout.
    """
    text, options, settings = prompt.text(stdin=not visuals.takes_stdin), sampling.given(), visuals.settings()
    images, videos = visuals.named()
    loaded = model.load()
    shown = completion_prompt(loaded.language, loaded.sight, text, images, videos, settings)
    announce(loaded, shown.visuals)
    options |= {"draft": model.draft, "ignore_eos": ignore_eos}
    with prefill_bar() as reading, prefill_bar("looking", patience=0) as looking:
        reply = loaded.generate(shown, on_prefill=reading, on_look=looking, **options)
        for piece in reply:
            if not as_json:
                print(for_terminal(piece.text, sys.stdout), end="", flush=True)
    if as_json:
        show_json(reply_object(reply))
    else:
        print()
    print(dim(usage_line(reply, loaded.ops)), file=sys.stderr)
