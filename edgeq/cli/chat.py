"""`edgeq chat`: talk to a model, one shot or in a loop."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeq.cli.answers import warn_of_a_cut
from edgeq.cli.boxes import check_drawing
from edgeq.cli.console import prefill_bar
from edgeq.cli.documents import read_ahead
from edgeq.cli.messages import read_messages
from edgeq.cli.options import (
    AnswerOptions,
    ChatDisplayOptions,
    ConversationOptions,
    JsonOptions,
    ModelOptions,
    PrefixOptions,
    PromptArgument,
    PromptOptions,
    SamplingOptions,
    ToolOptions,
    VisualOptions,
    command,
    option,
)
from edgeq.cli.outputs import check_outputs
from edgeq.cli.pictures import announce, by_kind, check_one, draw_boxes_of
from edgeq.cli.reply import hear, print_json, show_reply
from edgeq.cli.session import Session, opened_session
from edgeq.cli.tools import follow, show_calls
from edgeq.errors import UsageError
from edgeq.session.reply import Reply

if TYPE_CHECKING:
    from edgeq.api import Model
    from edgeq.cli.tools import ToolRunner
    from edgeq.session.chat import Chat
    from edgeq.vision.visual import Visual

__all__ = ["chat"]

_SETTINGS = ("ENVIRONMENT", "DEFAULT_MAP")  # where an option comes from that was given once for all

DrawBoxesOption = Annotated[
    Path | None,
    option(
        "--draw-boxes", metavar="FILE", default="none", env=False,
        help="Draw the reply's boxes and points on the image (single prompt only).",
    ),
]  # fmt: skip


@command
def chat(
    ctx: typer.Context,
    *,
    prompt: PromptOptions,
    form: JsonOptions,
    draw_boxes: DrawBoxesOption = None,
    display: ChatDisplayOptions,
    visuals: VisualOptions,
    conversation: ConversationOptions,
    tools: ToolOptions,
    answer: AnswerOptions,
    sampling: SamplingOptions,
    prefixes: PrefixOptions,
    model: ModelOptions,
    words: PromptArgument = None,
) -> None:
    """Talk to a model, in a terminal or for one answer.

    \b
    edgeq chat demo
    edgeq chat demo "What is 7 * 8?"
    edgeq chat demo --image demo -p "How many figures are there?"
    edgeq chat Qwen/Qwen3.5-2B --think --thinking-budget 512
    edgeq chat Qwen/Qwen3.5-2B --document report.txt
    edgeq chat Qwen/Qwen3.5-2B --session trip.eqs
    cat build.log | edgeq chat Qwen/Qwen3.5-2B -p "Why did this fail?"

    In a terminal, without a prompt, starts an interactive chat; /help lists its commands. With a prompt, --file, --json
    or piped input it answers once. The answer goes to stdout, thinking and statistics to stderr. Recommended sampling
    is that of the model card for the mode, and over it that of the checkpoint's generation_config.json.
    """
    messages = [] if conversation.messages is None else read_messages(conversation.messages)
    asks = bool(messages) and messages[-1].get("role") in ("user", "tool")  # a prompt comes with the messages
    single = form.as_json or draw_boxes is not None or conversation.assistant_prefix is not None
    one_shot = bool(words) or prompt.given or single or asks or not sys.stdin.isatty()
    stdin_taken = visuals.takes_stdin or str(conversation.messages) == "-"
    text = prompt.text(words, stdin=not stdin_taken, needed=not asks) if one_shot else ""
    options = {**conversation.given(), **sampling.given(), **answer.given(), "visual_settings": visuals.settings()}
    options |= {**tools.given(), "messages": messages, "draft": model.draft}
    runner = tools.runner()
    form.check(logprobs=answer.logprobs)
    if draw_boxes is not None:
        check_drawing(draw_boxes)
        check_one(visuals.image or ())
    check_outputs(conversation.session, draw_boxes, quiet=display.quiet)
    images, videos = visuals.named()

    with (
        opened_session(conversation.session) as session, prefill_bar() as reading,
        prefill_bar("looking", patience=0) as looking,
    ):  # fmt: skip
        told = _told(ctx)
        loaded = _load(model, conversation, session, told)
        options["visual_settings"] = visuals.settings(loaded.chat_visuals)
        prefixes.use(loaded, once=one_shot and session is None, default=bool(conversation.document))
        calls: dict[str, Any] = {"on_prefill": reading, "on_look": looking}
        talk = session.chat(loaded, options, told, **calls) if session else loaded.chat(**options, **calls)
        if conversation.document and not (session and session.saved):
            read_ahead(talk, [file.name for file in conversation.document], quiet=display.quiet)
        opened = talk.open(text, images, videos)
        if not one_shot:
            from edgeq.cli.repl import Repl  # line editing is a large library that one shot does not need

            name = loaded.source["model"] if loaded.source and session and session.saved else model.name
            Repl(talk, name, opened, display, runner, session).run()
            return
        if not display.quiet:
            announce(loaded, opened)
        reply, whole = _shown(
            talk, _reply(talk, text, opened, conversation.assistant_prefix or ""), form, display, runner, session
        )
        warn_of_a_cut(reply, options)
        if not whole:
            raise KeyboardInterrupt
        if draw_boxes is not None:
            draw_boxes_of(reply.text, images[0], draw_boxes)


def _told(ctx: typer.Context) -> Callable[[str], bool]:
    """Whether an option was given; a model in the environment does for conversations that name none."""

    def told(name: str) -> bool:
        source = ctx.get_parameter_source(name)
        return source is not None and source.name in ("COMMANDLINE", *(() if name == "model" else _SETTINGS))

    return told


def _load(
    model: ModelOptions, conversation: ConversationOptions, session: Session | None, told: Callable[[str], bool]
) -> Model:
    """The model that was named, or the one that the session was held with."""
    if session is None:
        return model.load(conversation.chat_template)
    if not session.saved and not (model.named or model.model):
        raise UsageError(
            f"{session.path} does not exist, and no model is given to begin it with",
            hint="name the model: `edgeq chat MODEL --session FILE`; or correct the file's name",
        )
    before = session.load_options(model.backend if told("backend") else None)
    return model.load(conversation.chat_template, before, told)


def _reply(talk: Chat, text: str, opened: Sequence[Visual], prefix: str) -> Reply:
    """The reply to a prompt, or, without one, to the messages that were given."""
    if text or opened:
        return talk.send(text, assistant_prefix=prefix, **by_kind(opened))
    return talk.answer(assistant_prefix=prefix)


def _shown(
    talk: Chat, reply: Reply, form: JsonOptions, display: ChatDisplayOptions, runner: ToolRunner | None,
    session: Session | None,
) -> tuple[Reply, bool]:  # fmt: skip
    """Show a single reply, and those after the tools that it calls; the last of them, and whether it was not
    interrupted.
    """
    model, thinking = talk.model, not display.hide_thinking

    def show(reply: Reply) -> bool:
        if form.as_json:
            whole = hear(reply, stream=form.stream, thinking=thinking)
        else:
            whole = show_reply(reply, model.engine.ops, display, before=reply.prefix)
        if session:
            session.save(talk)
        return whole

    reply, whole = follow(talk, reply, show, runner)
    if form.as_json:
        ran = {"tool_runs": runner.runs} if runner else {}
        print_json(reply, model.language.tokenizer, stream=form.stream, thinking=thinking, **ran)
    else:
        show_calls(reply)
    return reply, whole
