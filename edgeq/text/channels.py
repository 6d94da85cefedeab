"""Thinking and answer, told apart in the stream of generated tokens.

The model thinks between the special tokens `<think>` and `</think>`. Only the tokens count: the same letters in
ordinary text change nothing. The newlines that the chat template puts around the block belong to neither channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from edgeq.text.detokenizer import StreamingDetokenizer
from edgeq.text.tokenizer import Tokenizer

__all__ = ["Channel", "ChannelParser", "ChannelPiece", "ends_in_thinking"]

Channel = Literal["thinking", "answer"]


class ChannelPiece(NamedTuple):
    """What one token adds to a channel: `text` is empty while a character or a newline is still undecided.

    `token` is None for the text that the end of the stream set free.
    """

    channel: Channel
    text: str
    token: int | None


def ends_in_thinking(ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether the last turn of `ids` has a `<think>` that is not closed."""
    opened, closed = tokenizer.token_id("<think>"), tokenizer.token_id("</think>")
    for token_id in reversed(ids):
        if token_id == opened:
            return True
        if token_id == closed or token_id in tokenizer.eos_token_ids:
            return False
    return False


class ChannelParser:
    """Sorts generated tokens into the channels "thinking" and "answer".

    Starts in the channel in which `prompt`, the ids before the first generated one, leaves off. One piece comes out
    per token: a thinking block's `</think>` is its own last piece, `<think>` the last piece of what came before it.
    at_start: no text of the channel has come before, so that newlines at its beginning are dropped.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), *, at_start: bool = True) -> None:
        self.think_open_id = tokenizer.token_id("<think>")
        self.think_close_id = tokenizer.token_id("</think>")
        self.in_thinking = ends_in_thinking(prompt, tokenizer)
        self._eos = frozenset(tokenizer.eos_token_ids)
        self._text = StreamingDetokenizer(tokenizer)
        self._at_start = at_start
        self._newlines = ""  # end the thinking so far; dropped if the block ends here

    @property
    def channel(self) -> Channel:
        return "thinking" if self.in_thinking else "answer"

    def push(self, token: int) -> ChannelPiece:
        """Take the next generated token. A stop token has no text."""
        if token in (self.think_open_id, self.think_close_id):
            return self._switch(token)
        text = self._text.flush() if token in self._eos else self._text.push(token)
        return ChannelPiece(self.channel, self._trim(text), token)

    def flush(self) -> ChannelPiece:
        """End the stream: the text that was still undecided."""
        return ChannelPiece(self.channel, self._trim(self._text.flush()), None)

    def _switch(self, token: int) -> ChannelPiece:
        last = ChannelPiece(self.channel, self._trim(self._text.flush()), token)
        thinking = token == self.think_open_id
        self._at_start = self._at_start or thinking != self.in_thinking
        self.in_thinking = thinking
        self._newlines = ""
        return last

    def _trim(self, text: str) -> str:
        """Drop newlines at the start of a channel and hold back those that may be at the end of the thinking."""
        if self._at_start:
            text = text.lstrip("\n")
            self._at_start = not text
        if not self.in_thinking:
            return text
        text = self._newlines + text
        kept = text.rstrip("\n")
        self._newlines = text[len(kept) :]
        return kept
