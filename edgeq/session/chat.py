"""A conversation with a model: every turn is appended, nothing is ever processed twice.

chat = model.chat(thinking=True, system="Answer in one sentence.")
for piece in chat.send("Why is the sky blue?"):
    print(piece.text, end="")        # piece.channel is "thinking" or "answer"
chat.send("What is this?", images=["photo.jpg"])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from edgeq.engine import Engine
from edgeq.errors import EdgeqError, UsageError
from edgeq.generate import Decoding, GenerationSettings
from edgeq.session.context import Context, Progress
from edgeq.session.language import Language
from edgeq.session.parts import sources_of, text_of
from edgeq.session.places import Place, rope_delta
from edgeq.session.reply import Reply
from edgeq.session.sight import Sight
from edgeq.session.visual_settings import CHAT_VISUALS, VisualSettings
from edgeq.state import State
from edgeq.text.channels import ChannelParser, ends_in_thinking
from edgeq.text.conversation import Conversation, Mark
from edgeq.text.messages import check_thinking
from edgeq.text.template import Content
from edgeq.text.visuals import Outline
from edgeq.vision.visual import Visual

__all__ = ["Chat", "Speaker"]


class Speaker(Protocol):
    """Who a conversation is with: an `edgeq.Model`, or whatever else has these three."""

    @property
    def engine(self) -> Engine[Any, Any]: ...
    @property
    def language(self) -> Language: ...
    @property
    def sight(self) -> Sight: ...


class _Said(NamedTuple):
    """What a user, or tools, said: contents for the template, and the pictures in them in order."""

    role: str
    contents: list[Content]
    visuals: list[Visual]


class _Turn(NamedTuple):
    """Where the conversation stood before a turn, and what was then said."""

    said: _Said
    mark: Mark
    places: int
    state: State[Any]


class Chat:
    """A conversation that keeps the ids actually generated and the model's state after them.

    thinking: whether the model thinks before it answers; None is the template's default.
    settings: replaces what the model card recommends for the mode, and over it the checkpoint (generation_config.json);
    `options` (fields of GenerationSettings) go over either.
    visual_settings: how large pictures become, and how many frames of a video are taken.
    draft: as in `Model.generate`.
    on_prefill, on_look (done, total): called while a long prompt goes through the model, pictures through the tower.
    """

    def __init__(
        self, model: Speaker, *, thinking: bool | None = None, system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None, settings: GenerationSettings | None = None,
        visual_settings: VisualSettings = CHAT_VISUALS, draft: str | int = "auto", on_prefill: Progress | None = None,
        on_look: Progress | None = None, **options: Any,
    ) -> None:  # fmt: skip
        tokenizer, template = model.language.need_tokenizer(), model.language.need_template()
        check_thinking(thinking)
        self.model = model
        self.thinking = template.thinking_default if thinking is None else thinking
        self.options = options
        self.system = system
        self.visual_settings = visual_settings
        self._settings = settings
        self._tools, self._on_prefill, self._on_look = tools, on_prefill, on_look
        self.draft = draft
        self._context = Context(
            model.engine, sight=model.sight, speculation=model.language.speculation(model.engine, draft),
            on_prefill=on_prefill, on_look=on_look,
        )  # fmt: skip
        self._conversation = Conversation(
            tokenizer, template, system=system, tools=tools, spelling=model.language.spelling,
            outer_vision_tokens=visual_settings.outer_vision_tokens,
        )  # fmt: skip
        self._places: list[Place] = []  # of all pictures of the conversation
        self._last: _Turn | None = None
        self._reply: Reply | None = None

    @property
    def ids(self) -> Sequence[int]:
        """Every token of the conversation so far."""
        return self._conversation.ids

    @property
    def settings(self) -> GenerationSettings:
        """What the next reply is generated with."""
        language = self.model.language
        chosen = [name for name, value in self.options.items() if value is not None]
        recommended = self._settings or language.recommended(
            thinking=self.thinking, vision=bool(self._places), chosen=chosen
        )
        return recommended.replace(**self.options)

    @property
    def visuals(self) -> list[Visual]:
        """The pictures of the conversation so far."""
        return [place.visual for place in self._places if place.frame == 0]

    def send(self, content: Content, *, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> Reply:
        """Say something; iterate over the result to generate the reply (see `edgeq.session.reply.Reply`).

        content: text, or a list of parts (see `Model.prompt`). images, videos: paths, bytes, data URLs, PIL images or
        arrays, of which a list or a folder is the frames of a video; they come before the text, or in the place of
        parts that do not say which picture they are.

        If you stop iterating, the partial reply stays in the conversation. Raises MemoryBudgetError if the turn does
        not fit the context; the conversation is then as it was before.
        """
        return self._say(self._opened("user", [content], images, videos))

    def send_tool_results(self, *results: Content) -> Reply:
        """Give the results of the tools that the last reply called, in order; like `send`."""
        return self._say(self._opened("tool", results))

    def undo(self) -> str:
        """Take back the last turn and its reply; returns what was said. Only one turn can be taken back."""
        return " ".join(map(text_of, self._take_back().contents))

    def regenerate(self) -> Reply:
        """Take back the last reply and generate another."""
        return self._say(self._take_back())

    def fresh(self, *, system: str | None = None) -> Chat:
        """A new, empty conversation with the same model and settings."""
        return Chat(
            self.model, thinking=self.thinking, system=system, tools=self._tools, settings=self._settings,
            visual_settings=self.visual_settings, draft=self.draft, on_prefill=self._on_prefill, on_look=self._on_look,
            **self.options,
        )  # fmt: skip

    def open(self, content: Content, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> list[Visual]:
        """The pictures that `send` would show the model, opened and resized; nothing is said yet."""
        return self._opened("user", [content], images, videos).visuals

    def _opened(
        self, role: str, contents: Sequence[Content], images: Sequence[Any] = (), videos: Sequence[Any] = ()
    ) -> _Said:
        read = [sources_of(content, images, videos) for content in contents]
        visuals = [self.model.sight.open(source, self.visual_settings) for _, sources in read for source in sources]
        return _Said(role, [content for content, _ in read], visuals)

    def _say(self, said: _Said) -> Reply:
        """Append a turn, and begin the reply to it."""
        self._settle()
        conversation, outlines = self._conversation, [Outline.of(visual) for visual in said.visuals]
        turn = _Turn(said, conversation.mark(), len(self._places), self._context.state)
        start = turn.mark.length
        if said.role == "user":
            (content,) = said.contents
            new = conversation.append_user(content, enable_thinking=self.thinking, visuals=outlines)
        else:
            new = conversation.append_tool(*said.contents, enable_thinking=self.thinking, visuals=outlines)
        try:
            self._places += self.model.sight.places(
                new, said.visuals, start=start, position=start + rope_delta(self._places)
            )
            reply = self._new_reply()
        except EdgeqError:
            self._restore(turn)
            raise
        self._last, self._reply = turn, reply
        return reply

    def _take_back(self) -> _Said:
        self._settle()
        if self._last is None:
            raise UsageError("nothing to undo", hint="send something first")
        turn, self._last = self._last, None
        self._restore(turn)
        return turn.said

    def _new_reply(self) -> Reply:
        language, ids, context = self.model.language, self._conversation.ids, self._context
        cached, settings, tokenizer = context.position, self.settings, language.need_tokenizer()
        sampler = language.sampler(settings)
        sampler.observe_prompt(ids[:cached])
        think = language.think_tokens()
        decoding = Decoding(
            ids[cached:], sampler, room=context.room, eos_ids=language.eos_ids, think=think,
            starts_in_thinking=think is not None and ends_in_thinking(ids, tokenizer),
            constraint=language.constraint(settings),
        )  # fmt: skip
        parser = ChannelParser(tokenizer, ids)
        tokens = context.tokens(decoding, self._places)
        return Reply(
            decoding, parser, tokens, settings.stop, cached=cached, prompt=len(ids), on_end=self._record,
            calls=language.tool_calls(self._tools, f"call_{len(ids)}"),
        )  # fmt: skip

    def _record(self, reply: Reply) -> None:
        self._conversation.append_generated(reply.ids)

    def _settle(self) -> None:
        """End a reply that nobody listened to until its end."""
        if self._reply is not None:
            self._reply.close()
            self._reply = None

    def _restore(self, turn: _Turn) -> None:
        self._conversation.rewind(turn.mark)
        del self._places[turn.places :]
        self._context.state = turn.state
