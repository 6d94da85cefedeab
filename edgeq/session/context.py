"""One sequence that grows: what generation drives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from edgeq.engine import Engine, Feed
from edgeq.formats.bf16 import Float32
from edgeq.generate import Decoding, Token
from edgeq.session.speculation import Speculation
from edgeq.state import State

__all__ = ["Context", "Progress"]

Progress = Callable[[int, int], None]
"""Called with the tokens done and all tokens, as a prompt of more than one chunk goes through the model."""


class Context:
    """A sequence on an engine: its state, and the only place where prompts are run.

    speculation: drafts for its replies; None generates a token at a time.
    """

    def __init__(
        self, engine: Engine[Any, Any], state: State[Any] | None = None, *, speculation: Speculation | None = None,
        on_prefill: Progress | None = None,
    ) -> None:  # fmt: skip
        self.engine = engine
        self._speculation = speculation
        if state is None:
            state = engine.state(draft=speculation is not None and speculation.with_head)
        self.state = state
        self._on_prefill = on_prefill

    @property
    def position(self) -> int:
        """Tokens in the context."""
        return self.state.length

    @property
    def room(self) -> int:
        """Tokens that it can still take."""
        return self.engine.context_limit - self.state.length

    def feed(self, ids: Sequence[int], rows: int = 1) -> Float32:
        """Append `ids`; return the logits after the last `rows` of them, float32 [rows, vocabulary].

        They are run a chunk at a time, so that an interruption loses one chunk at most.
        """
        tokens = self.engine.checked_ids(ids, self.state)
        if self._speculation is not None:
            self._speculation.observe(self.state.length, tokens)
        total, logits = len(tokens), list[Float32]()
        pieces = list(self.engine.cut(self.state.length, total))
        for piece in pieces:
            if self._on_prefill and piece is not pieces[-1]:
                self._on_prefill(piece.start, total)
            wanted = max(0, piece.stop - max(piece.start, total - rows))
            (output,) = self.engine.run([Feed(self.state, tokens[piece], rows=wanted)])
            self.state = output.state
            if wanted:
                logits.append(output.logits)
        if self._on_prefill and len(pieces) > 1:
            self._on_prefill(total, total)
        return logits[0] if len(logits) == 1 else np.concatenate(logits or [output.logits])

    def tokens(self, decoding: Decoding) -> Iterator[Token]:
        """Drive a reply to a prompt that comes next in this context; leaving early leaves nothing to repair."""
        start = self.position
        try:
            while not decoding.finished:
                token = decoding.forced()
                if token is None:
                    token = decoding.take(self._logits_after(decoding.unseen(self.position - start), decoding))
                if token is not None:
                    yield token
        finally:
            if self._speculation is not None:
                self._speculation.settle()

    def _logits_after(self, ids: Sequence[int], decoding: Decoding) -> Float32:
        """Append `ids`; return the logits after them, float32 [vocabulary], which drafts may have brought already."""
        if self._speculation is None or len(ids) > 1 or not self.position:
            logits: Float32 = self.feed(ids)[-1]
            return logits
        logits, self.state = self._speculation.advance(self.state, ids[0], decoding.remaining, decoding.tally)
        return logits
