"""A whole history as one prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeq.session.language import Language
from edgeq.session.parts import Source, sources_of
from edgeq.session.prompt import Prompt
from edgeq.session.sight import Sight
from edgeq.session.visual_settings import VisualSettings
from edgeq.text.messages import check_thinking, checked_messages, protected_message, protected_tools
from edgeq.text.template import Message
from edgeq.text.visuals import Outline, expanded

__all__ = ["make_prompt"]


def make_prompt(
    language: Language, sight: Sight, messages: Sequence[Message] | str, *, thinking: bool | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None, settings: VisualSettings | None = None,
    add_vision_id: bool = False, template_kwargs: Mapping[str, Any] | None = None,
) -> Prompt:  # fmt: skip
    """The prompt for a reply to `messages`, by the checkpoint's own template.

    thinking: None is the template's default. settings: None is the checkpoint's own limits. add_vision_id: number the
    pictures ("Picture 1: "). template_kwargs: variables for the template.
    """
    check_thinking(thinking)
    tokenizer = language.need_tokenizer()
    template = language.need_template(tools=bool(tools), kwargs=template_kwargs)
    settings = settings or VisualSettings()
    history, sources = list[dict[str, Any]](), list[Source]()
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    for message in checked_messages(messages):
        content, own = sources_of(message.get("content", ""), role=message["role"])
        history.append(protected_message({**message, "content": content}, tokenizer))
        sources += own
    visuals = [sight.open(source, settings) for source in sources]
    text = template.render(
        history, add_generation_prompt=True, enable_thinking=thinking, tools=protected_tools(tools, tokenizer),
        **({"add_vision_id": True} if add_vision_id else {}),
    )  # fmt: skip
    outlines = [Outline.of(visual) for visual in visuals]
    ids = tokenizer.encode(
        expanded(text, outlines, language.spelling, outer=settings.outer_vision_tokens), control=True
    )
    return Prompt.of(ids, sight.places(ids, visuals))
