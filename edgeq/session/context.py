"""One sequence that grows: what generation drives."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from edgeq.engine import Engine, Feed, Ids
from edgeq.formats.bf16 import Float32
from edgeq.generate import Decoding, Token
from edgeq.session.places import Place, positions
from edgeq.session.prefixes import Prefix, Prefixes
from edgeq.session.sight import Looking, Sight
from edgeq.session.speculation import Speculation
from edgeq.state import State

__all__ = ["Context", "Progress"]

LONG = 64
"""Tokens of a prompt that a state is kept for, so that another reply to it need not run them again."""

Progress = Callable[[int, int], None]
"""Called with the tokens done and all tokens, as a prompt of more than one chunk goes through the model."""


class Context:
    """A sequence on an engine: its state, and the only place where prompts are run.

    state: where it goes on from, one that the engine has made or checked; None begins.
    sight: for a sequence with pictures. speculation: drafts for its replies; None generates a token at a time.
    prefixes: keeps the states from which replies began, for `resume`.
    """

    def __init__(
        self, engine: Engine[Any, Any], state: State[Any] | None = None, *, sight: Sight | None = None,
        speculation: Speculation | None = None, prefixes: Prefixes | None = None, on_prefill: Progress | None = None,
        on_look: Looking | None = None,
    ) -> None:  # fmt: skip
        self.engine = engine
        self._sight, self._speculation, self._prefixes = sight, speculation, prefixes
        self._ids = array("i")  # for `prefixes`: what was run from an empty state on, perhaps more than was finished
        self._places: Sequence[Place] = ()
        if state is None:
            state = engine.state(draft=speculation is not None and speculation.with_head)
        self.state = state
        self._on_prefill, self._on_look = on_prefill, on_look

    @property
    def position(self) -> int:
        """Tokens in the context."""
        return self.state.length

    @property
    def room(self) -> int:
        """Tokens that it can still take."""
        return self.engine.context_limit - self.state.length

    def feed(self, ids: Sequence[int] | Ids, rows: int = 1, places: Sequence[Place] = ()) -> Float32:
        """Append `ids`; return the logits after the last `rows` of them, float32 [rows, vocabulary].

        places: the pictures of the sequence, those before and after `ids` included. They are looked at first; then the
        tokens are run a chunk at a time, so that an interruption loses one chunk at most.
        """
        tokens = self.engine.checked_ids(ids, self.state)
        self._note(tokens, places)
        if self._speculation is not None:
            self._speculation.observe(self.state.length, tokens)
        total, start, logits = len(tokens), self.state.length, list[Float32]()
        pictures = self._look(_between(places, start, start + total))
        pieces = list(self.engine.cut(start, total))
        for piece in pieces:
            if self._on_prefill and piece is not pieces[-1]:
                self._on_prefill(piece.start, total)
            wanted = max(0, piece.stop - max(piece.start, total - rows))
            (output,) = self.engine.run([self._piece(tokens[piece], wanted, pictures)], checked=True)
            self.state = output.state
            if wanted:
                logits.append(output.logits)
        if self._on_prefill and len(pieces) > 1:
            self._on_prefill(total, total)
        return logits[0] if len(logits) == 1 else np.concatenate(logits or [output.logits])

    def _note(self, tokens: Ids, places: Sequence[Place]) -> None:
        """Take down what is about to be run, where prefixes of it are kept."""
        if self._prefixes is not None:
            self._ids[self.position :], self._places = array("i", tokens.tobytes()), places

    def _look(self, places: Sequence[Place]) -> dict[Place, Any]:
        """The features of some places."""
        if not places:
            return {}
        assert self._sight is not None, "a context without sight has no pictures"
        return dict(zip(places, self._sight.look(places, self._on_look), strict=True))

    def _piece(self, tokens: Ids, rows: int, pictures: Mapping[Place, Any]) -> Feed[Any]:
        """The next tokens, with what they show of pictures in their place."""
        start, stop = self.state.length, self.state.length + len(tokens)
        here = _between(list(pictures), start, stop)
        if not here:
            return Feed(self.state, tokens, rows=rows)
        inserts = [
            (max(0, place.start - start), pictures[place][max(0, start - place.start) : stop - place.start])
            for place in here
        ]
        where = positions(here, start, len(tokens), self.state.next_position)
        return Feed(self.state, tokens, inserts, where, rows=rows)

    def resume(self, ids: Sequence[int], places: Sequence[Place] = ()) -> Prefix:
        """Go on from the longest prefix of a sequence that is at hand, whatever was run before; the prefix."""
        assert self._prefixes is not None, "a context that keeps no prefixes has none to go on from"
        tokens, here = np.array(ids, np.int32), self._prefix()
        found = self._prefixes.longest(tokens, places)
        if here.begins(tokens, places) and (found is None or len(here.ids) > len(found.ids)):
            found = here
        if found is None:
            empty = self.engine.state(draft=self.state.draft is not None)
            found = Prefix(tokens[:0], (), empty)
        self.state, self._ids = found.state, array("i", found.ids.tobytes())
        if self._speculation is not None:
            self._speculation.observe(0, found.ids)
        return found

    def keep(self, logits: Float32 | None = None) -> None:
        """Keep the state for `resume`; logits: those after its last token, if known."""
        if self._prefixes is not None and self.position:
            self._prefixes.keep(self._prefix(logits))

    def _prefix(self, logits: Float32 | None = None) -> Prefix:
        return Prefix(np.array(self._ids[: self.position], np.int32), tuple(self._places), self.state, logits)

    def tokens(
        self, decoding: Decoding, places: Sequence[Place] = (), *, start: int | None = None,
        logits: Float32 | None = None,
    ) -> Iterator[Token]:  # fmt: skip
        """Drive a reply to a prompt that comes next in this context; leaving early leaves nothing to repair.

        places: the pictures of the sequence. start: where in it the prompt begins; None is here. logits: those after
        the prompt, where all of it was run and they are known.
        """
        start, known, first = self.position if start is None else start, logits, True
        try:
            while not decoding.finished:
                token = decoding.forced()
                if token is None:
                    unseen = decoding.unseen(self.position - start)
                    if known is None or unseen:
                        known = self._logits_after(unseen, decoding, places)
                        if first and len(unseen) >= LONG:
                            self.keep(known)
                    token, known, first = decoding.take(known), None, False
                if token is not None:
                    yield token
        finally:
            if self._speculation is not None:
                self._speculation.settle()

    def _logits_after(self, ids: Sequence[int], decoding: Decoding, places: Sequence[Place]) -> Float32:
        """Append `ids`; return the logits after them, float32 [vocabulary], which drafts may have brought already."""
        if self._speculation is None or len(ids) > 1 or not self.position:
            logits: Float32 = self.feed(ids, places=places)[-1]
            return logits
        self._note(np.array(ids, np.int32), self._places)
        logits, self.state = self._speculation.advance(self.state, ids[0], decoding.remaining, decoding.tally)
        return logits


def _between(places: Sequence[Place], start: int, stop: int) -> list[Place]:
    """Those of `places`, in order, that have tokens among `start`..`stop` of the sequence."""
    if not places or places[-1].stop <= start:  # as for every token of a reply
        return []
    return [place for place in places if place.start < stop and place.stop > start]
