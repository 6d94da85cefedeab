"""A reply while it is being generated: tokens become pieces of text, and the whole becomes statistics.

A reply is told its tokens (`push`) and when there are no more (`flush`). One that was given a source of tokens drives
itself: iterating over it generates it. Leaving early is fine; `finish` and `usage` then tell what there was.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from edgeq.generate import Decoding, Finish, Logprobs, StopReason, StopStrings, Tally, Token
from edgeq.session.prefixes import Miss
from edgeq.text.channels import ChannelPiece
from edgeq.text.detokenizer import StreamingDetokenizer
from edgeq.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgeq.text.tool_calls import MalformedCall, ToolCall, ToolCallParser

__all__ = ["Piece", "PlainText", "Reply", "Transcript", "Usage"]


class Transcript(Protocol):
    """Makes pieces of text out of tokens."""

    def push(self, token: int) -> ChannelPiece:
        """The piece of the next token."""

    def flush(self) -> ChannelPiece:
        """What was still undecided when the tokens ended."""


_Channel = Literal["thinking", "answer", "tool_call"]
_Segment = tuple[_Channel, str]
"""Some text, and its channel."""


class Piece(NamedTuple):
    """Some text of a reply, in its channel: "thinking", "answer", or "tool_call" for a call as the model wrote it.

    token: the token that set it free; None for what the end of the reply set free, and for all but the last of several
    pieces of one token.
    logprob, top_logprobs: its log probability and the most likely tokens with theirs, `(id, logprob)`, where they were
    asked for and the model was asked for the token: of the model's own distribution, before bias, penalties, constraint
    and temperature.
    forced: the model had no choice; the token was put in, or was the only one that the constraint allowed.
    """

    channel: _Channel
    text: str
    token: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    forced: bool = False


class PlainText:
    """The transcript of a raw completion: every token's text as it is; no text without a tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._text = StreamingDetokenizer(tokenizer) if tokenizer else None
        self._silent = frozenset(tokenizer.eos_token_ids) if tokenizer else frozenset()

    def push(self, token: int) -> ChannelPiece:
        shown = self._text is not None and token not in self._silent
        return ChannelPiece("answer", self._text.push(token) if self._text and shown else "", token)

    def flush(self) -> ChannelPiece:
        return ChannelPiece("answer", self._text.flush() if self._text else "", None)


class Usage(NamedTuple):
    """What a reply took. Tokens of the prompt that a state was at hand of count as cached.

    passes: calls of the model after the prompt, with the drafts (`drafted_tokens`) that they verified; those accepted
    (`accepted_tokens`) came in addition to one token a pass. All three are 0 where drafting is off.
    forced_tokens: those of the answer that were the only ones that its schema, regex or grammar allowed.
    miss: why no more tokens were cached, where what was read before went on otherwise or is gone; else None.
    """

    prompt_tokens: int
    cached_tokens: int
    thinking_tokens: int
    answer_tokens: int
    prompt_seconds: float
    generate_seconds: float
    passes: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    forced_tokens: int = 0
    miss: Miss | None = None

    @property
    def generated_tokens(self) -> int:
        return self.thinking_tokens + self.answer_tokens

    @property
    def acceptance(self) -> float:
        """Part of the drafts that were accepted; 0 without any."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a pass gave on average; 1 without drafts."""
        return Tally(self.passes, self.drafted_tokens, self.accepted_tokens).tokens_per_pass

    @property
    def prompt_tok_per_s(self) -> float:
        """New prompt tokens per second, up to the first token generated."""
        return (self.prompt_tokens - self.cached_tokens) / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generate_tok_per_s(self) -> float:
        """Tokens per second after the first."""
        return max(0, self.generated_tokens - 1) / self.generate_seconds if self.generate_seconds else 0.0


class Reply:
    """A reply in progress: an iterator of `Piece(channel, text, token, ...)`.

    A piece per token, with the text that is already final, and at the end one without a token for what was held back.
    `text` and `thinking` collect the two channels; `tool_calls` are those of `calls`, complete so far, and
    `malformed_calls` what looked like one and stayed text.
    tokens: what drives it (`Context.tokens`). `on_end`, if given, is called once, however the reply ends.

    shown: the answer as it was generated, calls included, up to a stop string.
    prefix: what the message began with before this was generated: a text that was put there, or the reply that goes on.
    forgotten: turns that were forgotten to make room for it (`overflow="shift"`).
    ended: nothing more comes. failed: an error ended it, and not whoever listened.
    message: the assistant's message, as it stands in the conversation since the reply ended; None before, and without.
    """

    def __init__(
        self, decoding: Decoding, transcript: Transcript, tokens: Iterator[Token], stop: tuple[str, ...], *,
        cached: int, prompt: int, miss: Miss | None = None, on_end: Callable[[Reply], None] | None = None,
        calls: ToolCallParser | None = None, prefix: str = "", forgotten: int = 0,
    ) -> None:  # fmt: skip
        self._miss = miss
        self.text = ""
        self.thinking = ""
        self.logprobs: list[tuple[int, Logprobs]] = []
        """Of every token, where they were asked for and the model was asked for the token."""
        self.shown = ""
        self.prefix, self.forgotten, self.failed, self.ended = prefix, forgotten, False, False
        self.message: dict[str, Any] | None = None
        self._calls = calls
        self._decoding, self._transcript, self._stop = decoding, transcript, StopStrings(stop)
        self._cached, self._prompt, self._on_end = cached, prompt, on_end
        self._started = self._prompt_seconds = self._generate_seconds = 0.0
        self._pieces = self._generate(tokens)

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """End the reply here; further pieces are not generated."""
        self._pieces.close()
        self._end()

    @property
    def ids(self) -> list[int]:
        """Every token of the reply so far, those put in by force included."""
        return list(self._decoding.reply_ids)

    @property
    def accepted(self) -> int:
        """Drafts that were accepted so far."""
        return self._decoding.tally.accepted

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The functions that the model calls, in order."""
        return list(self._calls.calls) if self._calls else []

    @property
    def malformed_calls(self) -> list[MalformedCall]:
        """What began like a call and is part of the answer, and why."""
        return list(self._calls.malformed) if self._calls else []

    @property
    def finish(self) -> Finish:
        """How the reply ended, or would if it were left now."""
        return self._decoding.finish

    @property
    def usage(self) -> Usage:
        """What it took so far."""
        finish, tally = self.finish, self._decoding.tally
        return Usage(
            self._prompt, self._cached, finish.thinking_tokens, finish.answer_tokens,
            self._prompt_seconds, self._generate_seconds, tally.passes, tally.drafted, tally.accepted,
            self._decoding.constrained, self._miss,
        )  # fmt: skip

    def start(self) -> None:
        """The prompt is about to be run: time counts from here."""
        self._started = perf_counter()

    def push(self, token: Token) -> list[Piece]:
        """The pieces of the next token: one, unless a call begins or ends in it."""
        now = perf_counter()
        if not self._prompt_seconds and not token.forced:  # what is put in at the start comes before the prompt is run
            self._prompt_seconds, self._started = now - self._started, now
        if self._prompt_seconds:
            self._generate_seconds = now - self._started
        *others, (channel, text) = self._collect(self._transcript.push(token.id))
        logprob, top = token.logprobs or (None, ())
        if token.logprobs:
            self.logprobs.append((token.id, token.logprobs))
        last = Piece(channel, text, token.id, logprob, top, token.forced or token.only)
        return [*(Piece(*segment, None) for segment in others), last] if others else [last]

    def flush(self) -> list[Piece]:
        """What was held back, when the tokens have ended."""
        return [Piece(*segment, None) for segment in self._collect(self._transcript.flush(), last=True)]

    def _generate(self, tokens: Iterator[Token]) -> Generator[Piece, None, None]:
        self.start()
        try:
            for token in tokens:
                yield from self.push(token)
            yield from self.flush()
        except Exception:
            self.failed = True
            raise
        finally:
            self._end()

    def _collect(self, piece: ChannelPiece, *, last: bool = False) -> list[_Segment]:
        """Pass the answer through the stop strings, take the calls out of it, and remember what is shown."""
        segments: list[_Segment] = [("thinking", piece.text)] if piece.channel == "thinking" else []
        shown = "" if segments else self._stop.push(piece.text)
        if last:
            shown += self._stop.flush()
        if self._stop.matched is not None:
            self._decoding.stop(StopReason.STOP_STRING)
        self.shown += shown
        if shown or last or not segments:
            segments += self._without_calls(shown, last=last)
        for segment in segments:
            self._remember(segment)
        return segments

    def _without_calls(self, text: str, *, last: bool) -> Sequence[_Segment]:
        """Text of the answer, in which calls are channels of their own; at least one."""
        if self._calls is None:
            return [("answer", text)]
        segments = self._calls.push(text) + (self._calls.flush() if last else [])
        return segments or [("tool_call" if self._calls.in_call else "answer", "")]

    def _remember(self, segment: _Segment) -> None:
        channel, text = segment
        if channel == "thinking":
            self.thinking += text
        elif channel == "answer":
            self.text += text

    def _end(self) -> None:
        for segment in self._calls.flush() if self._calls else ():  # a call that was left in its middle is text
            self._remember(segment)
        self.ended = True
        if self._on_end:
            on_end, self._on_end = self._on_end, None
            on_end(self)
