"""A conversation with a model: every turn is appended, nothing is ever processed twice.

chat = model.chat(thinking=True, system="Answer in one sentence.")
for piece in chat.send("Why is the sky blue?"):
    print(piece.text, end="")        # piece.channel is "thinking" or "answer"
chat.send("What is this?", images=["photo.jpg"])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from edgeq.errors import MemoryBudgetError, UsageError
from edgeq.formats.bf16 import Float32
from edgeq.generate import Decoding, GenerationSettings, StopReason, Token
from edgeq.inputs import expand_user
from edgeq.printable import brief
from edgeq.session import turns as turns_of
from edgeq.session.context import Context, Progress
from edgeq.session.dialogue import Dialogue, SavedDialogue
from edgeq.session.parts import text_of
from edgeq.session.reply import Reply
from edgeq.session.snapshot import Settings, Snapshot
from edgeq.session.speaker import Speaker
from edgeq.session.turns import ContextUse, Said, Turn
from edgeq.session.visual_settings import CHAT_VISUALS, VisualSettings
from edgeq.text.channels import ChannelParser, ends_in_thinking
from edgeq.text.conversation import Conversation
from edgeq.text.messages import check_thinking
from edgeq.text.template import Content, Message
from edgeq.vision.visual import Visual

if TYPE_CHECKING:
    from edgeq.session.files import SavedSession, SessionFile
    from edgeq.text.tool_calls import ToolCallParser

__all__ = ["Chat"]

_WHOLE = (StopReason.STOP_TOKEN, StopReason.STOP_STRING, StopReason.COMPLETE)
"""How a reply ends that has nothing more to say."""


class Chat:
    """A conversation that keeps the ids actually generated and the model's state after them.

    messages: what was said before, OpenAI-shaped: a system message, users' and assistants' (with reasoning_content and
    tool_calls), results of tools. It has the ids that the chat template gives it.
    thinking: whether the model thinks before it answers; None is the template's default.
    settings: replaces what the model card recommends for the mode, and over it the checkpoint (generation_config.json);
    `options` (fields of GenerationSettings) go over either.
    visual_settings: how large pictures become, and how many frames of a video are taken.
    draft: as in `Model.generate`.
    overflow: what happens where a turn or a reply does not fit the context: "stop", or "shift", which forgets the
    oldest turns and reads what is left again (a recurrent state cannot be cut).
    template_kwargs: further variables for the chat template.
    on_prefill, on_look (done, total): called while a long prompt goes through the model, pictures through the tower.

    **Nothing is lost.** A reply that is left, by Ctrl-C for example, stays as far as it was generated, and `resume`
    goes on with it. Left before its first token, the turn stays without a reply: `answer` replies to it, `undo` takes
    it back, and what is said next comes beside it. After an error before the first token the conversation is as before
    the turn. A reply that is generated again is given up for the new one's first token.
    """

    def __init__(
        self, model: Speaker, *, messages: Sequence[Message] = (), thinking: bool | None = None,
        system: Content | None = None, tools: Sequence[Mapping[str, Any]] | None = None,
        settings: GenerationSettings | None = None, visual_settings: VisualSettings = CHAT_VISUALS,
        draft: str | int = "auto", overflow: str = "stop", template_kwargs: Mapping[str, Any] | None = None,
        on_prefill: Progress | None = None, on_look: Progress | None = None, **options: Any,
    ) -> None:  # fmt: skip
        tokenizer = model.language.need_tokenizer()
        template = model.language.need_template(tools=bool(tools), kwargs=template_kwargs)
        check_thinking(thinking)
        if settings is not None and not isinstance(settings, GenerationSettings):
            raise UsageError(f"settings must be GenerationSettings, got {brief(settings)}", hint="or give them by name")
        for name, call in (("on_prefill", on_prefill), ("on_look", on_look)):
            if call is not None and not callable(call):
                raise UsageError(f"{name} must be a function of two numbers, got {brief(call)}")
        self.model = model
        self.thinking = template.thinking_default if thinking is None else thinking
        self.options = options
        self.visual_settings = visual_settings
        self.draft, self.overflow = draft, overflow
        self._settings, self._tools, self._template_kwargs = settings, tools, template_kwargs
        self._on_prefill, self._on_look = on_prefill, on_look
        engine = model.engine
        self._context = Context(
            engine, sight=model.sight, speculation=model.language.speculation(engine, draft),
            prefixes=model.prefixes, messages=model.language.messages, on_prefill=on_prefill, on_look=on_look,
        )  # fmt: skip
        conversation = Conversation(
            tokenizer, template, tools=tools, enable_thinking=self.thinking, spelling=model.language.spelling,
            outer_vision_tokens=visual_settings.outer_vision_tokens,
        )  # fmt: skip
        self._dialogue = Dialogue(conversation, model.sight)
        self._reply: Reply | None = None
        self._check: Callable[[], None] | None = None  # of what it was made of, before that is used
        self._file: SessionFile | None = None  # that it was saved to, or comes from
        model.language.constraint(self.settings)  # what is wrong with the options is told here
        given = self._read(messages)
        if system is not None:
            if given and given[0].message["role"] == "system":
                raise UsageError("there are two system prompts", hint="give it in system= or as the first message")
            given = [*self._read([{"role": "system", "content": system}]), *given]
        self._dialogue.append(given, thinking=self.thinking)
        self._dialogue.find_places()

    # --- what there is -----------------------------------------------------------------------------------------------

    @property
    def ids(self) -> Sequence[int]:
        """Every token of the conversation so far; where something was said last, with the beginning of the reply."""
        return [*self._dialogue.conversation.ids, *self._coming]

    @property
    def overflow(self) -> str:
        """What happens where the context is full: "stop" or "shift"."""
        return self._overflow

    @overflow.setter
    def overflow(self, overflow: str) -> None:
        if overflow not in ("stop", "shift"):
            raise UsageError(f'overflow must be "stop" or "shift", got {brief(overflow)}')
        self._overflow = overflow

    @property
    def settings(self) -> GenerationSettings:
        """What the next reply is generated with."""
        language = self.model.language
        if not isinstance(self.options, Mapping):
            raise UsageError(f"options must be settings by name, got {brief(self.options)}")
        chosen = [name for name, value in self.options.items() if value is not None]
        recommended = self._settings or language.recommended(
            thinking=self.thinking, vision=bool(self._dialogue.places), chosen=chosen
        )
        return recommended.replace(**self.options)

    @property
    def system(self) -> Any:
        """The system prompt, text or parts; None without one."""
        return None if self._dialogue.system is None else self._dialogue.system.message["content"]

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What was said and replied so far, the last reply as far as it has come."""
        turns, coming = tuple(self._dialogue.turns), self._coming
        if self._reply is None or not coming:
            return turns
        message = self._message(turns[-1], [*(self._dialogue.conversation.generated or ()), *coming])
        return (*turns[:-1], replace(turns[-1], reply=message, finish=self._reply.finish))

    @property
    def _coming(self) -> list[int]:
        """What the reply has said that is not yet part of the conversation, because it has not ended."""
        return self._reply.ids if self._reply is not None and not self._reply.ended else []

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation, OpenAI-shaped; pictures are parts with a Visual, which `messages=` takes as well."""
        found = [] if self._dialogue.system is None else [self._dialogue.system.message]
        for turn in self.turns:
            found += [*turn.messages, *([] if turn.reply is None else [turn.reply])]
        return [dict(message) for message in found]

    def transcript(self) -> str:
        """The conversation as Markdown."""
        return turns_of.markdown(self.messages)

    @property
    def visuals(self) -> list[Visual]:
        """The pictures of the conversation so far."""
        return self._dialogue.visuals

    @property
    def context(self) -> ContextUse:
        """How full the context is."""
        return ContextUse(len(self.ids), self.model.engine.context_limit, self._context.position)

    @property
    def forgotten(self) -> int:
        """Turns that were forgotten so far because the context was full."""
        return self._dialogue.forgotten

    # --- what can be done --------------------------------------------------------------------------------------------

    def send(
        self, content: Content, *, images: Sequence[Any] = (), videos: Sequence[Any] = (), assistant_prefix: str = ""
    ) -> Reply:
        """Say something; iterate over the result to generate the reply (see `edgeq.session.reply.Reply`).

        content: text, or a list of parts (see `Model.prompt`). images, videos: paths, bytes, data URLs, PIL images or
        arrays, of which a list or a folder is the frames of a video; they come before the text, or in the place of
        parts that do not say which picture they are.
        assistant_prefix: the answer begins with this text, without thinking before it.

        If you stop iterating, the partial reply stays in the conversation. Raises MemoryBudgetError if the turn does
        not fit the context; the conversation is then as it was before.
        """
        said = self._opened("user", content, images, videos)
        return self._say([said], assistant_prefix)

    def send_tool_results(self, *results: Any, assistant_prefix: str = "") -> Reply:
        """Give the results of the tools that the last reply called, one for each call; like `send`.

        results: texts, or lists of parts, in the order of the calls; or messages with "tool_call_id" and "content"; or
        one object that has the results by the ids of their calls.
        """
        self._settle()
        if not self._dialogue.turns:
            raise UsageError("a tool result cannot open a conversation", hint="start with a user's turn")
        return self._say(self._read(turns_of.tool_results(results, self._dialogue.last.reply)), assistant_prefix)

    def answer(self, messages: Sequence[Message] | None = None, *, assistant_prefix: str = "") -> Reply:
        """Reply to what was said and has no reply.

        messages: a whole history, in place of the conversation; what both begin with stays as it is, so that only the
        rest is read. Thinking that the history leaves out does not count as a difference.
        """
        self._settle()
        saved = self._dialogue.saved()
        with self._undone_on_error(saved):
            if messages is not None:
                self._dialogue.adopt(self._read(messages), self.messages, thinking=self.thinking)
            if not self._dialogue.turns or self._dialogue.last.reply is not None:
                raise UsageError(
                    "there is nothing to answer: the last message is not a user's or a tool's",
                    hint="use send, or resume",
                )
            return self._begin(saved, assistant_prefix)

    def regenerate(self) -> Reply:
        """Take back the last reply and generate another, with the next seed (`seed` + `Turn.attempt`)."""
        self._settle()
        if not self._dialogue.turns:
            raise UsageError("nothing to answer again", hint="send something first")
        saved, turn = self._dialogue.saved(), self._dialogue.last
        with self._undone_on_error(saved):
            if not turn.said:
                raise UsageError("nothing was said that the last message replies to", hint="send something first")
            again = turn.attempt + (turn.reply is not None)
            self._dialogue.last = Turn(turn.said, turn.mark, turn.asked, attempt=again)
            return self._begin(saved, turn.prefix)

    def resume(self) -> Reply:
        """Go on with the last reply, which was left or cut at a limit; the Reply has the new text only.

        Thinking goes on, too, or is closed first if `thinking` was turned off in the meantime.
        """
        self._settle()
        if not self._dialogue.turns or self._dialogue.last.reply is None:
            return self.answer(assistant_prefix=self._dialogue.last.prefix if self._dialogue.turns else "")
        saved, turn = self._dialogue.saved(), self._dialogue.last
        if turn.finish is not None and turn.finish.reason in _WHOLE:
            raise UsageError("the last reply is complete", hint="send something, or generate it again")
        with self._undone_on_error(saved):
            return self._go_on(saved)

    def edit(
        self, content: Content, *, back: int = 1, images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None, assistant_prefix: str = "",
    ) -> Reply:  # fmt: skip
        """Say something in place of the user's last message, or of the one `back` users' messages ago; what was said
        after that is forgotten. images, videos: None keeps the message's own, unless the content has parts.
        """
        self._settle()
        users = [i for i, turn in enumerate(self._dialogue.turns) if turn.role == "user"]
        if not _counts(back, len(users)):
            raise UsageError(f"there are {len(users)} messages to edit, got back={brief(back)}")
        saved, place = self._dialogue.saved(), users[-back]
        own = self._dialogue.turns[place].visuals
        own = own if isinstance(content, str) else ()
        if images is None:
            images = [visual for visual in own if visual.kind == "image"]
        if videos is None:
            videos = [visual for visual in own if visual.kind == "video"]
        said = self._opened("user", content, images, videos)
        with self._undone_on_error(saved):
            self._dialogue.cut(place)
            return self._say([said], assistant_prefix, saved)

    def undo(self, n: int = 1) -> tuple[Turn, ...]:
        """Take back the last `n` turns with their replies; returns them, the oldest first."""
        self._settle()
        if not self._dialogue.turns:
            raise UsageError("nothing to undo", hint="send something first")
        if not _counts(n, len(self._dialogue.turns)):
            raise UsageError(f"{len(self._dialogue.turns)} turns can be undone, got {brief(n)}")
        taken = tuple(self._dialogue.turns[-n:])
        self._dialogue.cut(len(self._dialogue.turns) - n)
        self._rewind_state()
        return taken

    def fresh(self, *, system: Content | None = None, messages: Sequence[Message] = ()) -> Chat:
        """A new conversation with the same model and settings, empty but for what is given."""
        return Chat(
            self.model, messages=messages, thinking=self.thinking, system=system, tools=self._tools,
            settings=self._settings, visual_settings=self.visual_settings, draft=self.draft, overflow=self.overflow,
            template_kwargs=self._template_kwargs, on_prefill=self._on_prefill, on_look=self._on_look, **self.options,
        )  # fmt: skip

    def open(self, content: Content, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> list[Visual]:
        """The pictures that `send` would show the model, opened and resized; nothing is said yet."""
        return list(self._opened("user", content, images, videos).visuals)

    def prepare(self, named: str = "") -> tuple[int, int]:
        """Read what every conversation like this one begins with: tools, documents and the system prompt, or the
        history that was given. It is kept (`Model.prefixes`), so that the first reply, and later conversations, go on
        from there. Returns its tokens, and of how many a state was at hand already.

        named: what people call it; on disk, others make room for it. Interrupted, it goes on from there the next time.
        Raises MemoryBudgetError where it does not fit the context.
        """
        self._settle()
        ids = list(self._dialogue.conversation.ids) or self._opening()
        if len(ids) >= (limit := self.model.engine.context_limit):
            raise MemoryBudgetError(
                f"what the conversation begins with has {len(ids):,} tokens, the context window {limit:,}",
                hint="give fewer or shorter documents, or use a larger context",
            )
        return self._context.prepare(ids, named) if ids else (0, 0)

    def _opening(self) -> list[int]:
        """The ids that come before whatever is said first."""
        conversation, found = self._dialogue.conversation, list[list[int]]()
        mark = conversation.mark()
        for text in ("a", "b"):
            conversation.append([{"role": "user", "content": text}])
            found.append(list(conversation.ids))
            conversation.rewind(mark)
        same = [a == b for a, b in zip(*found, strict=False)]
        return found[0][: same.index(False) if False in same else len(same)]

    # --- what it is made of ------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the conversation to a session file, which `edgeq.load_session` goes on with as if it had never stopped
        (docs/reference/sessions.md). A file that it was saved to before is added to; another session is replaced.
        UsageError for any other file, and for one that another process saves to.
        """
        from edgeq.session.files import SessionFile

        place = expand_user(Path(path)).absolute()
        if self._file is None or self._file.path != place:
            self._file = SessionFile(place)
        self._file.save(self)

    def snapshot(self) -> Snapshot:
        """The conversation as a value; a reply in progress ends here."""
        self._settle()
        self._checked()
        given = Settings(
            self.thinking, self._settings, self.options, self._tools, self._template_kwargs, self.visual_settings,
            self.draft, self.overflow,
        )  # fmt: skip
        ids = np.array(self._dialogue.conversation.ids, np.int32)
        prefixes = [prefix for prefix in self._context.kept() if np.array_equal(prefix.ids, ids[: len(prefix.ids)])]
        turns, system, entries, places, forgotten = self._dialogue.saved()
        return Snapshot(given, system, turns, entries, places, forgotten, prefixes)

    @classmethod
    def of(
        cls, model: Speaker, snapshot: Snapshot, *, check: Callable[[], None] | None = None,
        file: SessionFile | None = None, on_prefill: Progress | None = None, on_look: Progress | None = None,
    ) -> Self:  # fmt: skip
        """The conversation that a snapshot is of. check: called before the states of the snapshot are first used; an
        error that it raises leaves the conversation as it is. file: the SessionFile that it was in."""
        options = snapshot.settings._asdict()
        chat = cls(model, on_prefill=on_prefill, on_look=on_look, **options.pop("options"), **options)
        _, system, turns, entries, places, forgotten, prefixes = snapshot
        chat._dialogue.restore(SavedDialogue(list(turns), system, tuple(entries), list(places), forgotten))
        chat._check, chat._file = check, file
        if prefixes:
            chat._context.take(prefixes)
        return chat

    @classmethod
    def restored(
        cls, model: Speaker, file: SessionFile, *, saved: SavedSession | None = None,
        on_prefill: Progress | None = None, on_look: Progress | None = None, **changes: Any,
    ) -> Self:  # fmt: skip
        """The conversation in a session file. saved: what was read of it. changes: fields of `Settings`."""
        saved = saved or file.read()
        snapshot = file.restored(saved, model)
        snapshot = snapshot._replace(settings=snapshot.settings._replace(**changes))
        return cls.of(model, snapshot, check=saved.check, file=file, on_prefill=on_prefill, on_look=on_look)

    def load(self, path: str | Path) -> Chat:
        """Another conversation with the same model, from a session file."""
        from edgeq.session.files import SessionFile

        file = SessionFile(expand_user(Path(path)).absolute())
        return Chat.restored(self.model, file, on_prefill=self._on_prefill, on_look=self._on_look)

    def _checked(self) -> None:
        if self._check is not None:
            self._check()
            self._check = None

    # --- messages ----------------------------------------------------------------------------------------------------

    def _opened(self, role: str, content: Content, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> Said:
        return turns_of.said({"role": role, "content": content}, self.model.sight, self.visual_settings, images, videos)

    def _read(self, messages: Sequence[Message]) -> list[Said]:
        return self._dialogue.read(messages, self.visual_settings)

    def _restore(self, saved: SavedDialogue) -> None:
        """Be as it was, and let go of the states of what came since."""
        self._dialogue.restore(saved)
        self._rewind_state()

    @contextmanager
    def _undone_on_error(self, saved: SavedDialogue) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._restore(saved)
            raise

    def _rewind_state(self) -> None:
        """Let go of states that are not the conversation's."""
        self._context.resume(self._dialogue.conversation.ids, self._dialogue.places, self._dialogue.conversation.spoken)

    # --- replies -----------------------------------------------------------------------------------------------------

    def _say(self, messages: Sequence[Said], prefix: str, saved: SavedDialogue | None = None) -> Reply:
        """Append a turn, and begin the reply to it. saved: the conversation before, if not as it is now."""
        self._settle()
        saved = saved or self._dialogue.saved()
        with self._undone_on_error(saved):
            self._dialogue.append(messages, thinking=self.thinking)
            return self._begin(saved, prefix)

    def _begin(self, saved: SavedDialogue, prefix: str) -> Reply:
        """The reply to the last turn, from its beginning."""
        if not isinstance(prefix, str):
            raise UsageError(f"assistant_prefix must be a text, got {brief(prefix)}")
        base = {"role": "assistant", "content": prefix} if prefix else None
        self._dialogue.last = replace(self._dialogue.last, thinking=self.thinking, prefix=prefix, base=base)
        self._dialogue.open(self._dialogue.last)
        return self._new_reply(saved)

    def _go_on(self, saved: SavedDialogue) -> Reply:
        """More of the last turn's reply."""
        turn = self._dialogue.last
        if self._dialogue.conversation.generated is None:
            self._dialogue.last = replace(turn, base=turn.reply)
            self._dialogue.open(self._dialogue.last)
        return self._new_reply(saved)

    def _new_reply(self, saved: SavedDialogue) -> Reply:
        """The reply that comes next: a turn's, or more of it."""
        self._checked()
        language, limit, forgotten = self.model.language, self.model.engine.context_limit, 0
        self._dialogue.find_places()
        if self.overflow == "shift" and len(self._dialogue.conversation.ids) >= limit:
            forgotten = self._forget(limit // 2, limit - 1)
        turn, ids = self._dialogue.last, self._dialogue.conversation.ids
        begun, settings = turn.tokens, self._settings_of(turn)
        prompt, think = ids[: len(ids) - len(begun)], language.think_tokens()
        sampler = language.sampler(settings, drawn=turn.drawn)
        decoding = Decoding(
            prompt, sampler, room=limit, eos_ids=language.eos_ids, think=think, begun=begun,
            starts_in_thinking=think is not None and ends_in_thinking(prompt, language.need_tokenizer()),
            constraint=language.constraint(settings, text_of((turn.base or {}).get("content") or "")),
        )  # fmt: skip
        found = self._context.resume(ids, self._dialogue.places, self._dialogue.conversation.spoken)

        def record(reply: Reply) -> None:
            self._record(reply, decoding, sampler.drawn, saved)

        parser = self._transcript(turn, prompt)
        message = turns_of.assistant_message(turn.base, parser, [token.id for token in begun], last=False)
        calls = self._calls(len(prompt))
        if calls is not None:
            calls.push(message["content"])  # a call may have been left in its middle
        self._reply = Reply(
            decoding, parser, self._tokens(decoding, found.logits), settings.stop,
            cached=len(found.ids), prompt=len(ids), miss=self._context.miss, on_end=record, calls=calls,
            prefix=message["content"], forgotten=forgotten,
        )  # fmt: skip
        return self._reply

    def _settings_of(self, turn: Turn) -> GenerationSettings:
        """What the reply to a turn is generated with: another seed for each attempt, and no more of thinking that was
        turned off while it was left.
        """
        settings = self.settings
        if settings.seed is not None:
            settings = settings.replace(seed=(settings.seed + turn.attempt) % (1 << 64))
        if turn.tokens and turn.thinking and not self.thinking:
            settings = settings.replace(thinking_budget=0)
        return settings

    def _tokens(self, decoding: Decoding, logits: Float32 | None) -> Iterator[Token]:
        """Drive a reply, also beyond the end of the context where turns can be forgotten. logits: those after what has
        been read, if known."""
        while True:
            yield from self._context.tokens(decoding, self._dialogue.places, start=0, logits=logits)
            if decoding.finish.reason is not StopReason.CONTEXT_FULL or self.overflow != "shift":
                return
            limit, said = self.model.engine.context_limit, [token.id for token in decoding.said]
            forgotten = self._forget(limit // 2 - len(said), limit * 7 // 8 - len(said))
            if not forgotten:
                return
            assert self._reply is not None, "the reply that is driven"
            self._reply.forgotten += forgotten
            decoding.move(self._dialogue.prompt)
            prompt = self._dialogue.prompt
            spoken = [span for span in self._dialogue.conversation.spoken if span[0] < len(prompt)]
            spoken.append((len(prompt), len(prompt) + len(said)))
            logits = self._context.resume([*prompt, *said], self._dialogue.places, spoken).logits

    def _forget(self, wanted: int, most: int) -> int:
        """Forget the oldest turns (`Dialogue.forget`); how many."""
        if not self._dialogue.can_forget:
            return 0
        with self._undone_on_error(self._dialogue.saved()):
            forgotten = self._dialogue.forget(wanted, most, self.visual_settings)
            if not forgotten:
                self._rewind_state()
            return forgotten

    def _record(self, reply: Reply, decoding: Decoding, drawn: int, saved: SavedDialogue) -> None:
        """Keep what a reply said, which has just ended. saved: the conversation before it began."""
        turn, conversation, new = self._dialogue.last, self._dialogue.conversation, reply.ids
        if not new:
            old = saved.turns[-1] if saved.turns else None
            if reply.failed or (old is not None and old.said is turn.said and old.reply is not None):
                self._restore(saved)
            else:  # the turn stays; what its reply was to begin with was not said
                conversation.rewind(turn.asked)
                self._dialogue.last = replace(turn, base=None)
            return
        if cut := reply.finish.reason is StopReason.STOP_STRING:
            parser = self._transcript(turn, self._dialogue.prompt, conversation.generated or ())
            new = turns_of.before_stop(self.model.language.need_tokenizer(), parser, new, reply.shown)
        conversation.append_generated(new)
        if cut:  # the state has read more
            self._rewind_state()
        message = self._message(turn, conversation.generated or ())
        self._dialogue.last = replace(turn, reply=message, finish=reply.finish, tokens=decoding.said, drawn=drawn)
        reply.message = message

    def _message(self, turn: Turn, generated: Sequence[int]) -> dict[str, Any]:
        """The message of a turn's reply, all of which is `generated` but for what it goes on with."""
        prompt = self._dialogue.prompt
        message = turns_of.assistant_message(turn.base, self._transcript(turn, prompt), generated)
        return turns_of.with_calls(message, self._calls(len(prompt)))

    def _transcript(self, turn: Turn, prompt: Sequence[int], begun: Sequence[int] = ()) -> ChannelParser:
        """What sorts the tokens of a turn's reply after `prompt` and `begun` into thinking and answer."""
        at_start = not (turn.base and turn.base["content"])
        parser = ChannelParser(self.model.language.need_tokenizer(), prompt, at_start=at_start)
        for token in begun:
            parser.push(token)
        return parser

    def _calls(self, prompt: int) -> ToolCallParser | None:
        """What takes the calls out of a reply after `prompt` tokens."""
        return self.model.language.tool_calls(self._tools, f"call_{prompt}")

    def _settle(self) -> None:
        """End a reply that nobody listened to until its end."""
        if self._reply is not None:
            self._reply.close()
            self._reply = None


def _counts(value: object, most: int) -> bool:
    """Whether `value` is a number from 1 to `most`."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(1 <= value <= most)
