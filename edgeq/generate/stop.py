"""When a reply ends, and stop strings in a text that arrives piece by piece."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

__all__ = ["StopReason", "StopStrings"]


class StopReason(Enum):
    """Why a reply, or the thinking before it, ended."""

    STOP_TOKEN = "stop token"
    STOP_STRING = "stop string"
    COMPLETE = "complete"
    """Nothing may follow in the schema, regex or grammar that was asked for."""
    LENGTH = "length"
    LOOP = "loop"
    CONTEXT_FULL = "context full"
    INTERRUPTED = "interrupted"


class StopStrings:
    """Passes a text through up to the first stop string.

    `push` returns what is safe to show; what might be the beginning of a stop string is held back until it is decided.
    The first stop string is the one that is complete first (of two that end together, the longer), so the result does
    not depend on how the text was cut into pieces. The stop string and everything after it is swallowed.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        assert all(self._stops), "an empty stop string"
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found."""

    def push(self, text: str) -> str:
        """Take the next piece of text; return what may be shown."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, shown, self.matched = min(found)
            self._held = ""
        else:
            shown = len(text) - self._undecided(text)
            self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """The text is over: return what was held back."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        lengths = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(lengths, default=0)
