"""Append-only conversations: what the model has read is never rewritten.

The recurrent state cannot be cut back, so a prompt may only grow. Rendering the whole history anew does not do that:
the family's template drops the thinking of earlier turns, and generated text need not encode to the ids that were
generated. So the ids of a reply are kept, and only what was said since is rendered, with the checkpoint's own template,
after a stand-in for what was before. What precedes the first generated reply, a given history for example, is rendered
as a whole, and so has exactly the ids that the template gives it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

from edgeq.errors import EdgeqError, ModelError, UsageError
from edgeq.printable import brief
from edgeq.text.channels import ends_in_thinking
from edgeq.text.messages import ROLES, check_thinking, checked_messages, protected_message, protected_tools
from edgeq.text.template import ChatTemplate, Content, Message
from edgeq.text.tokenizer import Tokenizer
from edgeq.text.visuals import Outline, Spelling, expanded

__all__ = ["Conversation", "Entry", "Generated"]

# Stands for a reply in the stand-in history. A lone surrogate: neither templates nor protected text contain it.
_REPLY = "\udfff"
_STAND_IN: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _REPLY}]
# Ends the text of an assistant's message that is to be gone on with.
_CUT = "\udffe"


class _Said(NamedTuple):
    """A message, its texts protected, and the pictures in it. open: an assistant's that the reply goes on with."""

    message: Message
    outlines: tuple[Outline, ...] = ()
    open: bool = False

    @property
    def role(self) -> object:
        return self.message["role"]


class Generated(NamedTuple):
    """A reply as it was generated, after the ids of what was said since the one before."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]


Entry = _Said | Generated


class Conversation:
    """The token ids of a conversation, and what they were made of.

    Call `append` (or `append_user`, `append_tool`), feed the model `ids` from where its state stands, generate, call
    `append_generated`, and so on. Up to the last generated reply (`settled`) the ids never change; what was said since
    is rendered together, whenever `ids` is asked for. Text of messages and tools stays text even where it spells
    special tokens; only those of the template count.

    enable_thinking: for the reply that comes next, and may be set at any time; None is the template's default.
    spelling: how places of pictures are written, for a model that sees. outer_vision_tokens: see `expanded`.

    Raises ModelError for a template that writes a turn differently depending on those before it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        system: Content | None = None,
        enable_thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        spelling: Spelling | None = None,
        outer_vision_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._spelling, self._outer = spelling, outer_vision_tokens
        check_thinking(enable_thinking)
        self._enable_thinking = enable_thinking
        self._tools = protected_tools(tools, tokenizer)
        self._entries = list[Entry]()
        self._ids = list[int]()
        self._settled = 0  # so many of them end with a generated reply
        self._stale = False  # the others are to be rendered again
        self._close_text = self._find_close()
        self._close = tokenizer.encode(self._close_text, control=True)
        self._check_append_only()
        if system is not None:
            self.append([{"role": "system", "content": system}])

    @classmethod
    def from_messages(
        cls,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        messages: Sequence[Message],
        *,
        visuals: Sequence[Outline] = (),
        **options: Any,
    ) -> Self:
        """A conversation that begins with a given history, OpenAI-shaped (see `checked_messages`).

        Its ids are those that the template gives the history, with the beginning of a reply if it ends with anything
        but an assistant's message. visuals: the pictures of all messages, in order; options: as above.
        """
        conversation = cls(tokenizer, template, **options)
        conversation.append(messages, visuals=visuals)
        conversation.ids  # noqa: B018 (what the template refuses is refused here)
        return conversation

    @property
    def ids(self) -> Sequence[int]:
        """Every token so far, in order."""
        if self._stale:
            self._ids[self._settled :] = self._tail()
            self._stale = False
        return self._ids

    @property
    def settled(self) -> int:
        """How many of the ids will not change by what is appended."""
        return self._settled

    @property
    def enable_thinking(self) -> bool | None:
        return self._enable_thinking

    @enable_thinking.setter
    def enable_thinking(self, thinking: bool | None) -> None:
        check_thinking(thinking)
        self._stale |= thinking != self._enable_thinking
        self._enable_thinking = thinking

    @property
    def awaits_reply(self) -> bool:
        """Whether something was said that nobody has replied to."""
        last = self._entries[-1] if self._entries else None
        return isinstance(last, _Said) and (last.open or last.role not in ("system", "assistant"))

    def append(self, messages: Sequence[Message], *, visuals: Sequence[Outline] = ()) -> None:
        """Add messages, {"role": ..., "content": ..., ...}. visuals: the pictures of their parts, in order."""
        said, left = list[_Said](), list(visuals)
        for i, message in enumerate(checked_messages(messages)):
            shown = len(left) if i == len(messages) - 1 else _places(message)
            said.append(_Said(protected_message(message, self._tokenizer), tuple(left[:shown])))
            del left[:shown]
        self._entries += said
        self._stale = True

    def append_user(
        self, content: Content, *, enable_thinking: bool | None = None, visuals: Sequence[Outline] = ()
    ) -> list[int]:
        """Add a user's message and the start of the reply; the ids that are new.

        They include the system prompt the first time, and whatever the previous reply lacks at its end if it was cut
        short. `enable_thinking` is for this reply only. visuals: the pictures of its parts, in order.
        """
        return self._appended("user", [content], enable_thinking, visuals)

    def append_tool(
        self, *results: Content, enable_thinking: bool | None = None, visuals: Sequence[Outline] = ()
    ) -> list[int]:
        """Add the results of the tools that the last reply called, in order; otherwise like `append_user`."""
        if not any(entry.role != "system" for entry in self._entries if isinstance(entry, _Said)):
            raise UsageError("a tool result cannot open a conversation", hint="start with a user's turn")
        return self._appended("tool", results, enable_thinking, visuals)

    def open(self, message: Message) -> None:
        """Begin the reply with an assistant's message, which is not ended: what is generated goes on with it."""
        (checked,) = checked_messages([message])
        if checked["role"] != "assistant" or checked.get("tool_calls"):
            raise UsageError("only a text of the assistant's can be gone on with", hint="send something")
        self._entries.append(_Said(protected_message(checked, self._tokenizer), open=True))
        self._stale = True

    def append_generated(self, ids: Sequence[int]) -> None:
        """Record generated ids as they are, with or without the stop token at their end; again: more of the same reply.

        A stop token that is not the one that ends a turn (`<|endoftext|>`) is left out: the turn's own takes its place.
        """
        if ids and ids[-1] in self._tokenizer.eos_token_ids and ids[-1] != self._close[0]:
            ids = ids[:-1]
        last = self._entries[-1] if self._entries else None
        if isinstance(last, Generated):
            self._entries[-1] = last._replace(ids=(*last.ids, *ids))
        elif self.awaits_reply:
            self._entries.append(Generated(tuple(self.ids[self._settled :]), tuple(ids)))
        else:
            raise UsageError("nothing was asked, so nothing can have been generated", hint="call append_user first")
        self._ids += ids
        self._settled = len(self._ids)

    def entry(self, message: Message, visuals: Sequence[Outline] = (), *, open: bool = False) -> Entry:
        """What `append`, or `open`, of a message adds, for `restore`."""
        (checked,) = checked_messages([message])
        return _Said(protected_message(checked, self._tokenizer), tuple(visuals), open)

    @property
    def generated(self) -> tuple[int, ...] | None:
        """The ids of the generated reply that it ends with; None where it ends otherwise."""
        last = self._entries[-1] if self._entries else None
        return last.ids if isinstance(last, Generated) else None

    @property
    def spoken(self) -> list[tuple[int, int]]:
        """The spans of the generated replies among the ids, in order."""
        spans, end = list[tuple[int, int]](), 0
        for entry in self._entries:
            if isinstance(entry, Generated):
                start = end + len(entry.prompt)
                end = start + len(entry.ids)
                spans.append((start, end))
        return spans

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What it is made of, for `restore`; their number is a place to which it can be rewound."""
        return tuple(self._entries)

    def mark(self) -> int:
        """Where the conversation stands, for `rewind`."""
        return len(self._entries)

    def rewind(self, mark: int) -> None:
        """Forget everything since `mark`."""
        self.restore(self._entries[:mark])

    def restore(self, entries: Sequence[Entry]) -> None:
        """Be made of `entries`, which it, or another with the same template, was made of before."""
        self._entries = list(entries)
        self._ids = [i for entry in entries if isinstance(entry, Generated) for i in (*entry.prompt, *entry.ids)]
        self._settled, self._stale = len(self._ids), True

    def _appended(
        self, role: str, contents: Sequence[Content], enable_thinking: bool | None, visuals: Sequence[Outline]
    ) -> list[int]:
        check_thinking(enable_thinking)
        before, usual = self.entries, self._enable_thinking
        try:
            self.append([{"role": role, "content": content} for content in contents], visuals=visuals)
            self._enable_thinking = usual if enable_thinking is None else enable_thinking
            return list(self.ids[self._settled :])
        except EdgeqError:
            self.restore(before)
            raise
        finally:
            self._enable_thinking = usual

    def _tail(self) -> list[int]:
        """The ids of what was said since the last generated reply, with what that lacks at its end."""
        start = len(self._entries)
        while start and isinstance(self._entries[start - 1], _Said):
            start -= 1
        said = [entry for entry in self._entries[start:] if isinstance(entry, _Said)]
        if all(entry.role == "system" for entry in said):
            return []
        try:
            text = self._text(said, first=not start)
        except ModelError as error:
            raise self._refusal(error) from None
        outlines = [outline for entry in said for outline in entry.outlines]
        text = expanded(text, outlines, self._spelling, outer=self._outer)
        return self._missing_close() + self._tokenizer.encode(text, control=True)

    def _text(self, said: Sequence[_Said], *, first: bool) -> str:
        """What the template makes of some messages, at the beginning (`first`) or after a generated reply."""
        messages, last = [entry.message for entry in said], said[-1]
        if last.open:
            messages[-1] = _to_be_cut(last.message)
        awaited = last.role != "assistant"
        if first:
            text = self._render(messages, self._enable_thinking, awaited)
        else:
            text = self._render_turn(messages, self._enable_thinking, generation=awaited)
        if not last.open:
            return text
        text, found, _ = text.partition(_CUT)
        if not found:
            raise self._not_append_only("does not write an assistant's message as it is")
        return text

    def _missing_close(self) -> list[int]:
        """The end of the last reply, as far as it was not generated; unfinished thinking is closed first."""
        reply = next((entry.ids for entry in reversed(self._entries) if isinstance(entry, Generated)), None)
        if reply is None:
            return []
        for length in range(len(self._close), 0, -1):
            if list(reply[-length:]) == self._close[:length]:
                return self._close[length:]
        thinking = ends_in_thinking(self._ids[: self._settled], self._tokenizer)
        return self._tokenizer.encode(self._template.thinking_close if thinking else "", control=True) + self._close

    def _render(self, messages: Sequence[Message], thinking: bool | None, generation: bool = True) -> str:
        return self._template.render(
            messages, add_generation_prompt=generation, enable_thinking=thinking, tools=self._tools
        )

    def _render_turn(
        self, turn: Sequence[Message], thinking: bool | None, before: Sequence[Message] = (), *, generation: bool = True
    ) -> str:
        """The text of `turn` where it follows a finished reply."""
        text = self._after_reply(self._render([*before, *_STAND_IN, *turn], thinking, generation))
        if not text.startswith(self._close_text):
            raise self._not_append_only("ends a reply differently when a turn follows")
        return text[len(self._close_text) :]

    def _after_reply(self, text: str) -> str:
        _, found, tail = text.partition(_REPLY)
        if not found or _REPLY in tail:
            raise self._not_append_only("does not write a reply exactly once")
        return tail

    def _find_close(self) -> str:
        """What ends a finished reply: `<|im_end|>` and a newline."""
        close = self._after_reply(self._render(_STAND_IN, None, generation=False))
        ids = self._tokenizer.encode(close, control=True)
        if not ids or ids[0] not in self._tokenizer.control_ids:
            raise self._not_append_only(f"ends a reply with {close!r}, which does not begin with a stop token")
        return close

    def _check_append_only(self) -> None:
        """A turn must read the same whatever came before it, and whatever follows."""
        turn: list[Message] = [{"role": "user", "content": "?"}]
        earlier: list[Message] = [*turn, {"role": "assistant", "content": "!"}]
        if self._render_turn(turn, None) != self._render_turn(turn, None, before=earlier):
            raise self._not_append_only("writes a turn differently depending on the turns before it")
        for before in ([], _STAND_IN):
            last = self._render([*before, *turn], None, generation=False)
            if not self._render([*before, *earlier, *turn], None).startswith(last):
                raise self._not_append_only("writes a turn differently when another follows")

    def _not_append_only(self, what: str) -> ModelError:
        return ModelError(f"{self._template.name} {what}: it cannot be used for an append-only conversation")

    def _refusal(self, error: ModelError) -> EdgeqError:
        """What to say where the template does not take the messages."""
        for i, entry in enumerate(self._entries):
            if isinstance(entry, _Said) and entry.role not in ROLES:
                return UsageError(
                    f"message {i + 1} has the role {brief(entry.role)}, which the chat template does not take",
                    hint="use system, user, assistant or tool",
                )
            if i and isinstance(entry, _Said) and entry.role == "system":
                return UsageError(
                    f"message {i + 1} is a system message, which the chat template takes at the beginning only",
                    hint="make one of all system messages",
                )
        return error


def _places(message: Message) -> int:
    """Parts of a message that are pictures."""
    content = message.get("content")
    return 0 if isinstance(content, str) or content is None else sum("text" not in part for part in content)


def _to_be_cut(message: Message) -> Message:
    """An assistant's message with a sign at the end of its text."""
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": [*content, {"type": "text", "text": _CUT}]}
    return {**message, "content": (content or "") + _CUT}
