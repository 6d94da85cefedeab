"""What has been said in a conversation: turns, the ids that they are, and the pictures among those."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from edgeq.session import turns as turns_of
from edgeq.session.places import Place, rope_delta
from edgeq.session.sight import Sight
from edgeq.session.turns import Said, Turn
from edgeq.session.visual_settings import VisualSettings
from edgeq.text.conversation import Conversation, Entry
from edgeq.text.messages import checked_messages
from edgeq.text.template import Message
from edgeq.text.visuals import Outline
from edgeq.vision.visual import Visual

__all__ = ["Dialogue", "SavedDialogue"]


class SavedDialogue(NamedTuple):
    """A dialogue as it was."""

    turns: list[Turn]
    system: Said | None
    entries: tuple[Entry, ...]
    places: list[Place]
    forgotten: int


class Dialogue:
    """Turns of a conversation, in step with its ids: whatever is appended, cut or forgotten, is so in both.

    conversation: the ids, as messages and generated replies. sight: opens the pictures of messages.
    system: the first message, if it is one of the system. places: of all pictures among the ids. forgotten: turns that
    had to make room so far.
    """

    def __init__(self, conversation: Conversation, sight: Sight) -> None:
        self.conversation, self._sight = conversation, sight
        self.system: Said | None = None
        self.turns = list[Turn]()
        self.places = list[Place]()
        self.forgotten = 0

    @property
    def prompt(self) -> Sequence[int]:
        """The ids before the last turn's reply."""
        ids, generated = self.conversation.ids, self.conversation.generated or ()
        return ids[: len(ids) - len(generated)]

    @property
    def last(self) -> Turn:
        """The last turn, of those that there must be."""
        return self.turns[-1]

    @last.setter
    def last(self, turn: Turn) -> None:
        self.turns[-1] = turn

    @property
    def visuals(self) -> list[Visual]:
        """The pictures so far."""
        return [place.visual for place in self.places if place.frame == 0]

    def saved(self) -> SavedDialogue:
        """The dialogue as it is now, for `restore`."""
        return SavedDialogue(list(self.turns), self.system, self.conversation.entries, self.places, self.forgotten)

    def restore(self, saved: SavedDialogue) -> None:
        """Be what was saved."""
        turns, self.system, entries, self.places, self.forgotten = saved
        self.turns = list(turns)
        self.conversation.restore(entries)
        self._stand()

    # --- more of it --------------------------------------------------------------------------------------------------

    def read(self, messages: Sequence[Message], settings: VisualSettings) -> list[Said]:
        """Messages as they are given, with their pictures opened at a size that `settings` say."""
        return [turns_of.said(message, self._sight, settings) for message in checked_messages(messages)]

    def append(self, messages: Sequence[Said], *, thinking: bool) -> None:
        """Messages of a history, or of one turn: each goes to the turn that it belongs to. thinking: whether a reply
        to them is to think."""
        for said in messages:
            role, last = said.message["role"], self.turns[-1] if self.turns else None
            begins, mark = not (self.turns or self.system), self.conversation.mark()
            self._hear([said])
            if role == "system" and begins:
                self.system = said
                continue
            if last is None or last.reply is not None or (role == "user" and last.role in ("user", "tool")):
                last = Turn((), mark, mark, thinking=thinking)
                self.turns.append(last)
            if role == "assistant":
                self.turns[-1] = replace(last, reply=said.message, shown=said.visuals)
            else:
                self.turns[-1] = replace(last, said=(*last.said, said), asked=self.conversation.mark())

    def adopt(self, given: Sequence[Said], before: Sequence[dict[str, Any]], *, thinking: bool) -> None:
        """Be a given history, keeping the turns that it begins with. before: the messages so far."""
        same = turns_of.agreeing(before, [said.message for said in given])
        done, kept = int(self.system is not None), 0
        for turn in self.turns:
            size = len(turn.said) + (turn.reply is not None)
            if done + size > same:
                break
            done, kept = done + size, kept + 1
        self.cut(kept)
        if not same:
            self.conversation.rewind(0)
            self.system, done = None, 0
        self.append(given[done:], thinking=thinking)

    def open(self, turn: Turn) -> None:
        """Stand where the reply to a turn begins."""
        self.conversation.rewind(turn.asked)
        self.conversation.enable_thinking = turn.thinking
        if turn.base is not None:
            self.conversation.open(turn.base)

    def find_places(self) -> None:
        """Find the pictures of what was said last; those before stay where they are."""
        ids, start = self.conversation.ids, self.conversation.settled
        before = [place for place in self.places if place.start < start]
        visuals = [visual for turn in self.turns for visual in turn.visuals]
        self.places = before + self._sight.places(
            ids[start:], visuals[sum(place.frame == 0 for place in before) :], start=start,
            position=start + rope_delta(before),
        )  # fmt: skip

    def _hear(self, messages: Sequence[Said]) -> None:
        for said in messages:
            self.conversation.append([said.rendered], visuals=[Outline.of(visual) for visual in said.visuals])

    # --- less of it --------------------------------------------------------------------------------------------------

    def cut(self, place: int) -> None:
        """Take back the turns from a place on."""
        if place < len(self.turns):
            self.conversation.rewind(self.turns[place].mark)
            del self.turns[place:]
            self._stand()
            self.find_places()

    @property
    def can_forget(self) -> bool:
        """Whether there is a later turn that a conversation could begin with: a user's."""
        return any(turn.role == "user" for turn in self.turns[1:])

    def forget(self, wanted: int, most: int, settings: VisualSettings) -> int:
        """Forget the oldest turns until at most `wanted` tokens are left, or else as many as can be; how many.

        None are forgotten if more than `most` tokens would be left. What is left begins with a user's turn, and is what
        the chat template makes of its messages, with pictures opened again at a size that `settings` say.
        """
        turns, saved = list(self.turns), self.saved()
        starts = [i for i in range(1, len(turns)) if turns[i].role == "user"]

        def fits(i: int) -> bool:
            self._replay(turns[i:], settings)
            return len(self.conversation.ids) <= wanted

        place = starts[min(bisect_left(starts, True, key=fits), len(starts) - 1)]
        self._replay(turns[place:], settings)
        if len(self.conversation.ids) > most:
            self.restore(saved)
            return 0
        self.places = []
        self.find_places()
        self.forgotten += place
        return place

    def _replay(self, turns: Sequence[Turn], settings: VisualSettings) -> None:
        """Consist of some turns, whose messages are rendered anew; the reply to the last is begun as it was."""
        conversation, generated = self.conversation, self.conversation.generated
        conversation.rewind(0)
        self._hear([self.system] if self.system else [])
        self.turns = []
        for turn in turns:
            mark = conversation.mark()
            self._hear(turn.said)
            asked = conversation.mark()
            if turn is not turns[-1] and turn.reply is not None:
                self._hear(self.read([turn.reply], settings))
                turn = replace(turn, base=None, tokens=())
            self.turns.append(replace(turn, mark=mark, asked=asked))
        self.open(self.turns[-1])
        if generated is not None:
            conversation.append_generated(generated)

    def _stand(self) -> None:
        """Expect a reply as it was expected before, if the last turn has none."""
        if self.turns:
            self.conversation.enable_thinking = self.turns[-1].thinking
