"""One sequence that grows: what generation drives."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from edgeq.engine import Engine, Feed, Ids
from edgeq.formats.bf16 import Float32
from edgeq.generate import Decoding, Token
from edgeq.session.cuts import WORTH, Cut, Cuts, Messages, Said, Span, no_messages
from edgeq.session.places import Place, positions
from edgeq.session.prefix_files import Line
from edgeq.session.prefixes import Miss, Prefix, PrefixStore, shown
from edgeq.session.sight import Looking, Sight
from edgeq.session.speculation import Speculation
from edgeq.state import State

__all__ = ["Context", "Progress"]

Progress = Callable[[int, int], None]
"""Called with the tokens done and all tokens, as a prompt of more than one chunk goes through the model."""


class Context:
    """A sequence on an engine: its state, and the only place where prompts are run.

    state: where it goes on from, one that the engine has made or checked; None begins.
    sight: for a sequence with pictures. speculation: drafts for its replies; None generates a token at a time.
    prefixes: keeps states of the sequence, for `resume`. messages: how those show among its ids.
    """

    def __init__(
        self, engine: Engine[Any, Any], state: State[Any] | None = None, *, sight: Sight | None = None,
        speculation: Speculation | None = None, prefixes: PrefixStore | None = None, messages: Messages = no_messages,
        on_prefill: Progress | None = None, on_look: Looking | None = None,
    ) -> None:  # fmt: skip
        self.engine = engine
        self._sight, self._speculation, self._prefixes = sight, speculation, prefixes
        self._messages = messages
        self._ids = array("i")  # for `prefixes`: what was run from an empty state on, perhaps more than was finished
        self._places: Sequence[Place] = ()
        self._cuts: Cuts | None = None  # of the sequence last resumed
        self.miss: Miss | None = None  # why no more of it was at hand
        self._named = ""  # what people call what it reads now
        self._line: Line = ()  # the files that have its keys and values, as far as they are known
        self._begun: tuple[int, Said] = 0, ()  # how long what it went on from was, and what was said in it
        self._end: tuple[Ids, Sequence[Place]] | None = None  # the last prompt replied to; its state is the store's
        if state is None:
            state = engine.state(draft=speculation is not None and speculation.with_head)
        self.state = state
        self._on_prefill, self._on_look = on_prefill, on_look
        if prefixes is not None:
            prefixes.attach(self)

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
        tokens are run a piece at a time, so that an interruption loses one piece at most.
        """
        tokens = self.engine.checked_ids(ids, self.state)
        self._note(tokens, places)
        if self._speculation is not None:
            self._speculation.observe(self.state.length, tokens)
        total, start, logits = len(tokens), self.state.length, list[Float32]()
        drafts = self.state.draft is not None
        self.engine.claim([(start, total, rows)], drafts=drafts)  # all of it, before any of the work
        pictures = self._look(_between(places, start, start + total))
        calls = self._calls(start, total)
        for call in calls:
            piece = slice(self.state.length - start, call.stop - start)
            if self._on_prefill and call is not calls[-1]:
                self._on_prefill(piece.start, total)
            wanted = max(0, piece.stop - max(piece.start, total - rows))
            (output,) = self.engine.run([self._piece(tokens[piece], wanted, pictures)], checked=True)
            self.state = output.state
            if wanted:
                logits.append(output.logits)
            if call.why:
                self.keep(call.why)
        if self._on_prefill and len(calls) > 1:
            self._on_prefill(total, total)
        return logits[0] if len(logits) == 1 else np.concatenate(logits or [output.logits])

    def _calls(self, start: int, total: int) -> list[Cut]:
        """The calls that append `total` tokens."""
        if self._cuts is not None:
            return list(self._cuts.calls(start, start + total))
        return [Cut(start + piece.stop) for piece in self.engine.cut(start, total)]

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

    def resume(self, ids: Sequence[int] | Ids, places: Sequence[Place] = (), spoken: Sequence[Span] = ()) -> Prefix:
        """Go on from the longest prefix of a sequence that is at hand, whatever was run before; the prefix.

        spoken: the spans of generated replies; the last may be going on.
        """
        assert self._prefixes is not None, "a context that keeps no prefixes has none to go on from"
        tokens, here = np.array(ids, np.int32), self._prefix()
        self._cuts = cuts = Cuts(self.engine, tokens, places, spoken, self._messages)

        def takes(place: int, said: Said) -> bool:  # a history that was given may have been said by somebody
            return (cuts.allows(place) and said == cuts.said(place)) or (bool(said) and not spoken)

        found, n = self._prefixes.longest(tokens, places, takes, WORTH), len(here.ids)
        known = 0 if found is None else len(found.ids)
        begins = n < len(tokens) and np.array_equal(here.ids, tokens[:n]) and shown(here.places, n) == shown(places, n)
        if begins and n > known and (takes(n, here.spoken) or n > known + WORTH):
            found = here
        if found is None:
            found = Prefix(tokens[:0], (), self.engine.state())
        self.miss = self._prefixes.miss(tokens, places, len(found.ids))
        self.state, self._ids, self._places = self._with_head(found.state), array("i", found.ids.tobytes()), places
        self._begun, self._line = (len(found.ids), found.spoken), found.line
        if self._speculation is not None:
            self._speculation.observe(0, found.ids)
        return found

    def prepare(self, ids: Sequence[int] | Ids, named: str = "") -> tuple[int, int]:
        """Read the beginning of sequences to come, as far as they will go on from it; how many tokens that are, and of
        how many a state was at hand.

        named: what people call it. An interruption loses one call: what was read is kept, on disk as well.
        """
        cached = len(self.resume(ids).ids)
        assert self._cuts is not None
        stop = self._cuts.last_kept
        self._named = named
        try:
            if cached < stop:
                self.feed(np.array(ids[cached:stop], np.int32), rows=0)
                self.keep("end")
        except BaseException:
            if self.position > cached:
                self.keep("interrupted")
            raise
        finally:
            self._named = ""
        return max(stop, cached), cached

    def _with_head(self, state: State[Any]) -> State[Any]:
        """The state with the MTP head's part if this sequence is drafted by it, and without it if not. A head that
        joins late knows only what comes."""
        drafts = self._speculation is not None and self._speculation.with_head
        if drafts == (state.draft is not None):
            return state
        return state._replace(draft=self.engine.need_head().state() if drafts else None)

    def kept(self) -> list[Prefix]:
        """Where it stands, and the states that are kept of what it has read, the longest first."""
        here = self._prefix()
        others = [] if self._prefixes is None else self._prefixes.along(here.ids, here.places)
        return [here, *(other for other in reversed(others) if other.state.length < self.position)]

    def take(self, prefixes: Sequence[Prefix]) -> None:
        """Stand where the first one ends, and keep them all, as `kept` of another context gave them."""
        assert self._prefixes is not None, "a context that keeps no prefixes takes none"
        here, *others = prefixes
        self.state, self._ids, self._places = here.state, array("i", here.ids.tobytes()), here.places
        self._begun, self._cuts = (len(here.ids), here.spoken), None
        self._end = next(((other.ids, other.places) for other in others if other.logits is not None), None)
        for prefix in reversed(prefixes):
            self._line = self._prefixes.keep(prefix)

    def keep(self, why: str = "", logits: Float32 | None = None) -> None:
        """Keep the state for `resume`; logits: those after its last token, if known."""
        if self._prefixes is not None and self.position:
            self._line = self._prefixes.keep(self._prefix(logits), why, named=self._named)

    def _prefix(self, logits: Float32 | None = None) -> Prefix:
        n = self.position
        return Prefix(
            np.array(self._ids[:n], np.int32), tuple(self._places), self.state, logits, self._said(n), self._line
        )

    def _said(self, stop: int) -> Said:
        """What was said of the first `stop` tokens. What it went on from may have been run another way."""
        start, said = self._begun
        own = () if self._cuts is None else self._cuts.said(stop)
        found = [*said]
        for a, b in own:
            if found and a < start == found[-1][1] < b:
                found[-1] = found[-1][0], b
            elif a >= start or b > start:
                found.append((max(a, start), b))
        return tuple(found)

    def _keep_end(self, logits: Float32) -> None:
        """Keep the state at a prompt's end, so that another reply to it need not run it again, in place of the one of
        the prompt before."""
        if self._prefixes is not None:
            if self._end is not None:
                self._prefixes.forget(*self._end)
            end = self._prefix(logits)
            self._end = end.ids, end.places
            self._prefixes.keep(end, "prompt")

    def tokens(
        self, decoding: Decoding, places: Sequence[Place] = (), *, start: int | None = None,
        logits: Float32 | None = None,
    ) -> Iterator[Token]:  # fmt: skip
        """Drive a reply to a prompt that comes next in this context; leaving early leaves nothing to repair.

        places: the pictures of the sequence. start: where in it the prompt begins; None is here. logits: those after
        the prompt, where all of it was run and they are known.
        """
        start, known, first, began = self.position if start is None else start, logits, True, self.position
        try:
            while not decoding.finished:
                token = decoding.forced()
                if token is None:
                    unseen = decoding.unseen(self.position - start)
                    if known is None or unseen:
                        known = self._logits_after(unseen, decoding, places)
                        if first and len(unseen) >= WORTH:
                            self._keep_end(known)
                    token, known, first = decoding.take(known), None, False
                if token is not None:
                    yield token
        finally:
            if self._speculation is not None:
                self._speculation.settle()
            if self.position > began:
                self.keep("reply")

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
