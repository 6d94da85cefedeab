"""Turns of a conversation: messages that were said together, and the reply to them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from edgeq.errors import UsageError
from edgeq.generate import Finish, Token
from edgeq.printable import brief
from edgeq.session.parts import sources_of, text_of
from edgeq.session.sight import Sight
from edgeq.session.visual_settings import VisualSettings
from edgeq.text.channels import ChannelParser
from edgeq.text.messages import checked_messages
from edgeq.text.tokenizer import Tokenizer
from edgeq.vision.visual import Visual

if TYPE_CHECKING:
    from edgeq.text.tool_calls import ToolCallParser

__all__ = [
    "ContextUse", "Said", "Turn", "agreeing", "assistant_message", "before_stop", "markdown", "said",
    "tool_results", "with_calls",
]  # fmt: skip


class Said(NamedTuple):
    """A message with its pictures opened.

    message: OpenAI-shaped, every picture a part of its own with a Visual. rendered: as a chat template takes it, where
    pictures only have their places.
    """

    message: dict[str, Any]
    rendered: dict[str, Any]
    visuals: tuple[Visual, ...] = ()


@dataclass(frozen=True, slots=True)
class Turn:
    """What was said at once, and the reply to it.

    messages: OpenAI-shaped: a user's, the results of tools, or (of a given history) several. reply: the assistant's
    message; None as long as nothing was replied. finish: how the reply ended; None if it was given. attempt: how often
    it was generated again.

    The rest is Chat's: where the conversation stood before it (`mark`) and after its messages (`asked`); whether the
    reply was to think, the text that it was to begin with (`prefix`), the message that it goes on with (`base`), its
    tokens, and how often it drew with its seed; pictures in the reply (of a given history).
    """

    said: tuple[Said, ...]
    mark: int
    asked: int
    reply: dict[str, Any] | None = None
    finish: Finish | None = None
    attempt: int = 0
    thinking: bool = field(default=False, repr=False)
    prefix: str = field(default="", repr=False)
    base: dict[str, Any] | None = field(default=None, repr=False)
    tokens: tuple[Token, ...] = field(default=(), repr=False)
    drawn: int = field(default=0, repr=False)
    shown: tuple[Visual, ...] = field(default=(), repr=False)

    @property
    def messages(self) -> tuple[dict[str, Any], ...]:
        return tuple(said.message for said in self.said)

    @property
    def role(self) -> str:
        """Whose turn it was: "user", "tool", or "assistant" where nothing was said before a given reply."""
        return next((str(said.message["role"]) for said in reversed(self.said)), "assistant")

    @property
    def text(self) -> str:
        """The text of what was said."""
        return "\n".join(text_of(message["content"]) for message in self.messages)

    @property
    def visuals(self) -> tuple[Visual, ...]:
        """The pictures in it, in order."""
        return (*(visual for said in self.said for visual in said.visuals), *self.shown)


class ContextUse(NamedTuple):
    """How full a context is, in tokens.

    used: of the conversation. limit: the context window. cached: those that the state has read.
    """

    used: int
    limit: int
    cached: int

    @property
    def free(self) -> int:
        """Tokens that there is room for."""
        return max(0, self.limit - self.used)

    @property
    def share(self) -> float:
        """Part that is used, from 0 to 1."""
        return self.used / self.limit


def said(
    message: Mapping[str, Any], sight: Sight, settings: VisualSettings, images: Sequence[Any] = (),
    videos: Sequence[Any] = (),
) -> Said:  # fmt: skip
    """A message of `checked_messages`, its pictures opened. images, videos: those that its parts do not name."""
    content, sources = sources_of(message.get("content"), images, videos, role=message["role"])
    visuals = tuple(sight.open(source, settings) for source in sources)
    left, shown = iter(visuals), content
    if isinstance(content, list):
        shown = [
            {**part, part["type"]: next(left)} if part.get("type") in ("image", "video") else part for part in content
        ]
    return Said({**message, "content": shown}, {**message, "content": content}, visuals)


def assistant_message(
    base: Mapping[str, Any] | None, parser: ChannelParser, ids: Sequence[int], *, last: bool = True
) -> dict[str, Any]:
    """The message that generated `ids` make, going on with `base`. last: nothing comes after them."""
    texts = {"thinking": "", "answer": ""}
    for piece in [*map(parser.push, ids), *([parser.flush()] if last else [])]:
        texts[piece.channel] += piece.text
    message = {"role": "assistant", "content": "", **(base or {})}
    message["content"] = text_of(message["content"] or "") + texts["answer"]
    thought = (message.get("reasoning_content") or "") + texts["thinking"]
    return {**message, "reasoning_content": thought} if thought else message


def with_calls(message: dict[str, Any], parser: ToolCallParser | None) -> dict[str, Any]:
    """An assistant's message with the calls in its text as `tool_calls`."""
    if parser is None:
        return message
    segments = [*parser.push(message["content"]), *parser.flush()]
    if not parser.calls:
        return message
    text = "".join(segment.text for segment in segments if segment.channel == "answer")
    return {**message, "content": text, "tool_calls": [call.message() for call in parser.calls]}


def before_stop(tokenizer: Tokenizer, parser: ChannelParser, ids: Sequence[int], shown: str) -> list[int]:
    """Generated `ids`, as far as their answer is `shown`, without the stop string behind it."""
    length, lengths = 0, [0]
    for token in ids:
        piece = parser.push(token)
        length += len(piece.text) if piece.channel == "answer" else 0
        lengths.append(length)
    whole = max(i for i, length in enumerate(lengths) if length <= len(shown))
    while whole and tokenizer.decode(ids[:whole]).endswith("\ufffd"):  # in the middle of a character
        whole -= 1
    return [*ids[:whole], *tokenizer.encode(shown[lengths[whole] :])]


def tool_results(results: Sequence[Any], reply: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The messages of the results of tools that a reply called.

    results: a text or a list of parts each, in the order of the calls; or messages with the "tool_call_id" of each; or
    a single object that has them by id. UsageError where they are not one for each call.
    """
    calls = list((reply or {}).get("tool_calls") or ())
    ids = [call.get("id") for call in calls]
    if len(results) == 1 and isinstance(results[0], Mapping) and "content" not in results[0]:
        results = [{"tool_call_id": name, "content": content} for name, content in results[0].items()]
    if not results:
        raise UsageError("no result of a tool is given", hint="give one for each call of the last reply, in order")
    if calls and len(results) != len(calls):
        raise UsageError(f"{len(results)} results are given for {len(calls)} calls", hint="give one for each call")
    named = [result.get("tool_call_id") if isinstance(result, Mapping) else None for result in results]
    if any(name is not None for name in named):
        if len(set(map(str, named))) != len(named) or (calls and set(map(str, named)) != set(map(str, ids))):
            raise UsageError(f"results are given for the calls {brief(named)}, expected {brief(ids)}")
        if calls:
            results = [results[named.index(name)] for name in ids]
    messages = list[dict[str, Any]]()
    for i, result in enumerate(results):
        fields = dict(result) if isinstance(result, Mapping) else {"content": result}
        name = fields.get("tool_call_id") or (ids[i] if calls else None)
        messages.append({"role": "tool", **({"tool_call_id": name} if name else {}), "content": fields.get("content")})
    return messages


def agreeing(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> int:
    """How many messages two histories begin with that are the same. Thinking that theirs leave out does not count."""
    count = 0
    for a, b in zip(ours, theirs, strict=False):
        thought = b.get("reasoning_content")
        if _essence(a) != _essence(b) or (thought is not None and thought != a.get("reasoning_content")):
            break
        count += 1
    return count


def _essence(message: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes a message what it is: role, texts and pictures, calls."""
    content = message.get("content") or ""
    parts = list[Any]()
    for part in [{"text": content}] if isinstance(content, str) else content:
        shown = part.get("image") or part.get("video") if "text" not in part else None
        if isinstance(shown, Visual):
            parts.append((shown.kind, shown.digest, shown.timestamps))
        elif parts and isinstance(parts[-1], str):
            parts[-1] += part["text"]
        else:
            parts.append(part["text"])
    calls = _functions(message.get("tool_calls") or ())
    return message["role"], parts, [(call["name"], call["arguments"]) for call in calls]


def _functions(calls: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What is called, with the arguments as objects."""
    (checked,) = checked_messages([{"role": "assistant", "tool_calls": calls}])
    return [call.get("function", call) for call in checked["tool_calls"]]


def markdown(messages: Iterable[Mapping[str, Any]]) -> str:
    """A conversation as a Markdown document: a heading for each message, thinking as a quotation, calls as code."""
    titles = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
    blocks = list[str]()
    for message in messages:
        blocks.append(f"## {titles.get(message['role'], message['role'])}")
        if thought := message.get("reasoning_content"):
            blocks.append("\n".join(f"> {line}".rstrip() for line in thought.split("\n")))
        content = message.get("content") or ""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            if "text" in part:
                blocks.append(part["text"])
            else:
                visual = part.get("image") or part.get("video")
                blocks.append(f"*[{part['type']}: {getattr(visual, 'name', '')}]*")
        for call in message.get("tool_calls") or ():
            (function,) = _functions([call])
            shown = {name: function[name] for name in ("name", "arguments")}
            blocks.append(f"```json\n{json.dumps(shown, ensure_ascii=False)}\n```")
    return "\n\n".join(block for block in blocks if block) + "\n"
