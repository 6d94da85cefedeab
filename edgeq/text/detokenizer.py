"""Text out of a stream of tokens, as soon as it is certain."""

from __future__ import annotations

import codecs

from edgeq.text.tokenizer import Tokenizer

__all__ = ["StreamingDetokenizer"]


class StreamingDetokenizer:
    """Turns tokens into text one by one, in linear time, never emitting half a character.

    A character whose UTF-8 bytes are spread over several tokens comes out with its last token. Invalid bytes become
    U+FFFD, so that everything pushed and flushed, joined, equals `Tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Take the next token; the text that it completes, which may be empty."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """End the text: an unfinished character becomes U+FFFD. Ready for a new text afterwards."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest
