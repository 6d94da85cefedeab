"""Append-only conversations: what the model has read is never rewritten.

The recurrent state cannot be cut back, so a prompt may only grow. Rendering the whole history anew does not do that:
the family's template drops the thinking of earlier turns, and generated text need not encode to the ids that were
generated. So the ids are kept, and only a new turn is rendered, with the checkpoint's own template, after a stand-in
for the turns before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from edgeq.errors import ModelError, UsageError
from edgeq.text.channels import ends_in_thinking
from edgeq.text.messages import check_thinking, protected_content, protected_tools
from edgeq.text.template import ChatTemplate, Content, Message
from edgeq.text.tokenizer import Tokenizer
from edgeq.text.visuals import Outline, Spelling, expanded

__all__ = ["Conversation", "Mark"]

# Stands for a reply in the stand-in history. A lone surrogate: neither templates nor protected text contain it.
_REPLY = "\udfff"
_STAND_IN: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _REPLY}]


class Mark(NamedTuple):
    """A place in a conversation to which it can be rewound."""

    length: int
    reply_start: int | None


class Conversation:
    """The token ids of a conversation: `ids` only ever grows at its end.

    Call `append_user` (or `append_tool`), feed the model, generate, call `append_generated`, and so on. The model has
    to be fed `ids` from where its state stands, and the `append_*` return what they added. Text of users, systems and
    tools stays text even where it spells special tokens; only those of the template count.

    spelling: how places of pictures are written, for a model that sees. outer_vision_tokens: see `expanded`.
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
        self._system: list[Message] = []
        if system is not None:
            self._system.append({"role": "system", "content": protected_content(system, tokenizer)})
        check_thinking(enable_thinking)
        self._enable_thinking = enable_thinking
        self._tools = protected_tools(tools, tokenizer)
        self._ids: list[int] = []
        self._reply_start: int | None = None  # where the reply that is being generated begins in `_ids`
        self._close_text = self._find_close()
        self._close = tokenizer.encode(self._close_text, control=True)
        self._check_append_only()

    @property
    def ids(self) -> Sequence[int]:
        """Every token so far, in order."""
        return self._ids

    def append_user(
        self, content: Content, *, enable_thinking: bool | None = None, visuals: Sequence[Outline] = ()
    ) -> list[int]:
        """Add a user's turn and the start of the reply; the ids that are new.

        They include the system prompt the first time, and whatever the previous reply lacks at its end if it was cut
        short. `enable_thinking` is for this turn only. visuals: the pictures of its parts, in order.
        """
        return self._append("user", [content], enable_thinking, visuals)

    def append_tool(
        self, *results: Content, enable_thinking: bool | None = None, visuals: Sequence[Outline] = ()
    ) -> list[int]:
        """Add the results of the tools that the last reply called, in order; otherwise like `append_user`."""
        if not self._ids:
            raise UsageError("a tool result cannot open a conversation", hint="start with a user's turn")
        return self._append("tool", results, enable_thinking, visuals)

    def append_generated(self, ids: Sequence[int]) -> None:
        """Record generated ids as they are, with or without the stop token at their end.

        A stop token that is not the one that ends a turn (`<|endoftext|>`) is left out: the turn's own takes its place.
        """
        if self._reply_start is None:
            raise UsageError("nothing was asked, so nothing can have been generated", hint="call append_user first")
        if ids and ids[-1] in self._tokenizer.eos_token_ids and ids[-1] != self._close[0]:
            ids = ids[:-1]
        self._ids += ids

    def mark(self) -> Mark:
        """Where the conversation stands, for `rewind`."""
        return Mark(len(self._ids), self._reply_start)

    def rewind(self, mark: Mark) -> None:
        """Forget everything since `mark`. The model's state of that moment has to be taken up again with it."""
        del self._ids[mark.length :]
        self._reply_start = mark.reply_start

    def _append(
        self, role: str, contents: Sequence[Content], enable_thinking: bool | None, visuals: Sequence[Outline]
    ) -> list[int]:
        check_thinking(enable_thinking)
        thinking = self._enable_thinking if enable_thinking is None else enable_thinking
        protected = (protected_content(content, self._tokenizer) for content in contents)
        turn: list[Message] = [{"role": role, "content": content} for content in protected]
        if self._ids:
            text = self._render_turn(turn, thinking)
        else:
            text = self._render([*self._system, *turn], thinking)
        text = expanded(text, visuals, self._spelling, outer=self._outer)
        new = self._missing_close() + self._tokenizer.encode(text, control=True)
        self._ids += new
        self._reply_start = len(self._ids)
        return new

    def _missing_close(self) -> list[int]:
        """The end of the last reply, as far as it was not generated; unfinished thinking is closed first."""
        if self._reply_start is None:
            return []
        reply = self._ids[self._reply_start :]
        for length in range(len(self._close), 0, -1):
            if reply[-length:] == self._close[:length]:
                return self._close[length:]
        thinking = ends_in_thinking(self._ids, self._tokenizer)
        return self._tokenizer.encode(self._template.thinking_close if thinking else "", control=True) + self._close

    def _render(self, messages: list[Message], thinking: bool | None, generation: bool = True) -> str:
        return self._template.render(
            messages, add_generation_prompt=generation, enable_thinking=thinking, tools=self._tools
        )

    def _render_turn(self, turn: list[Message], thinking: bool | None, before: Sequence[Message] = ()) -> str:
        """The text of `turn` where it follows a finished reply."""
        text = self._after_reply(self._render([*before, *_STAND_IN, *turn], thinking))
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
        """A turn must read the same whatever came before it."""
        turn: list[Message] = [{"role": "user", "content": "?"}]
        earlier: list[Message] = [*turn, {"role": "assistant", "content": "!"}]
        if self._render_turn(turn, None) != self._render_turn(turn, None, before=earlier):
            raise self._not_append_only("writes a turn differently depending on the turns before it")

    def _not_append_only(self, what: str) -> ModelError:
        return ModelError(f"{self._template.name} {what}: it cannot be used for an append-only conversation")
