"""A conversation with a model: every turn is appended, nothing is ever processed twice.

chat = model.chat(thinking=True, system="Answer in one sentence.")
for piece in chat.send("Why is the sky blue?"):
    print(piece.text, end="")        # piece.channel is "thinking" or "answer"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from edgeq.engine import Engine
from edgeq.errors import EdgeqError, UsageError
from edgeq.generate import Decoding, GenerationSettings
from edgeq.session.context import Context, Progress
from edgeq.session.language import Language
from edgeq.session.reply import Reply
from edgeq.state import State
from edgeq.text.channels import ChannelParser, ends_in_thinking
from edgeq.text.conversation import Conversation, Mark
from edgeq.text.messages import check_thinking

__all__ = ["Chat", "Speaker"]


class Speaker(Protocol):
    """Who a conversation is with: an `edgeq.Model`, or whatever else has these two."""

    @property
    def engine(self) -> Engine[Any, Any]: ...
    @property
    def language(self) -> Language: ...


class _Turn(NamedTuple):
    """Where the conversation stood before a turn, and what was then said."""

    text: str
    mark: Mark
    state: State[Any]


class Chat:
    """A conversation that keeps the ids actually generated and the model's state after them.

    thinking: whether the model thinks before it answers; None is the template's default.
    settings: replaces what the checkpoint (generation_config.json) or else the model card recommends for the mode;
    `options` (fields of GenerationSettings) go over either.
    draft: as in `Model.generate`.
    on_prefill(done, total): called while a long prompt goes through the model.
    """

    def __init__(
        self, model: Speaker, *, thinking: bool | None = None, system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None, settings: GenerationSettings | None = None,
        draft: str | int = "auto", on_prefill: Progress | None = None, **options: Any,
    ) -> None:  # fmt: skip
        tokenizer, template = model.language.need_tokenizer(), model.language.need_template()
        check_thinking(thinking)
        self.model = model
        self.thinking = template.thinking_default if thinking is None else thinking
        self.options = options
        self.system = system
        self._settings = settings
        self._tools, self._on_prefill = tools, on_prefill
        self.draft = draft
        speculation = model.language.speculation(model.engine, draft)
        self._context = Context(model.engine, speculation=speculation, on_prefill=on_prefill)
        self._conversation = Conversation(tokenizer, template, system=system, tools=tools)
        self._last: _Turn | None = None
        self._reply: Reply | None = None

    @property
    def ids(self) -> Sequence[int]:
        """Every token of the conversation so far."""
        return self._conversation.ids

    @property
    def settings(self) -> GenerationSettings:
        """What the next reply is generated with."""
        recommended = self._settings or self.model.language.recommended(thinking=self.thinking)
        return recommended.replace(**self.options)

    def send(self, text: str, *, images: Sequence[object] = ()) -> Reply:
        """Say something; iterate over the result to generate the reply (see `edgeq.session.reply.Reply`).

        If you stop iterating, the partial reply stays in the conversation. Raises MemoryBudgetError if the turn does
        not fit the context; the conversation is then as it was before.
        """
        if images:
            raise UsageError("this version of edgeq reads text only", hint="send the text without images")
        self._settle()
        turn = _Turn(text, self._conversation.mark(), self._context.state)
        self._conversation.append_user(text, enable_thinking=self.thinking)
        return self._start(turn)

    def send_tool_results(self, *results: str) -> Reply:
        """Give the results of the tools that the last reply called, in order; like `send`."""
        self._settle()
        turn = _Turn("", self._conversation.mark(), self._context.state)
        self._conversation.append_tool(*results, enable_thinking=self.thinking)
        return self._start(turn)

    def undo(self) -> str:
        """Take back the last turn and its reply; returns what was said. Only one turn can be taken back."""
        self._settle()
        if self._last is None:
            raise UsageError("nothing to undo", hint="send something first")
        turn, self._last = self._last, None
        self._restore(turn)
        return turn.text

    def regenerate(self) -> Reply:
        """Take back the last reply and generate another."""
        return self.send(self.undo())

    def fresh(self, *, system: str | None = None) -> Chat:
        """A new, empty conversation with the same model and settings."""
        return Chat(
            self.model, thinking=self.thinking, system=system, tools=self._tools, settings=self._settings,
            draft=self.draft, on_prefill=self._on_prefill, **self.options,
        )  # fmt: skip

    def _start(self, turn: _Turn) -> Reply:
        try:
            reply = self._new_reply()
        except EdgeqError:
            self._restore(turn)
            raise
        self._last, self._reply = turn, reply
        return reply

    def _new_reply(self) -> Reply:
        language, ids, context = self.model.language, self._conversation.ids, self._context
        cached, settings, tokenizer = context.position, self.settings, language.need_tokenizer()
        sampler = language.sampler(settings)
        sampler.observe_prompt(ids[:cached])
        think = language.think_tokens()
        decoding = Decoding(
            ids[cached:], sampler, room=context.room, eos_ids=language.eos_ids, think=think,
            starts_in_thinking=think is not None and ends_in_thinking(ids, tokenizer),
        )  # fmt: skip
        parser = ChannelParser(tokenizer, ids)
        tokens = context.tokens(decoding)
        return Reply(decoding, parser, tokens, settings.stop, cached=cached, prompt=len(ids), on_end=self._record)

    def _record(self, reply: Reply) -> None:
        self._conversation.append_generated(reply.ids)

    def _settle(self) -> None:
        """End a reply that nobody listened to until its end."""
        if self._reply is not None:
            self._reply.close()
            self._reply = None

    def _restore(self, turn: _Turn) -> None:
        self._conversation.rewind(turn.mark)
        self._context.state = turn.state
