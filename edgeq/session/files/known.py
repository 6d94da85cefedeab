"""What a session file has, by what stands for it in memory: so that saving again writes only what is new."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from edgeq.state import KVCache, State
from edgeq.vision.visual import Visual

__all__ = ["FORMAT", "SMALL", "VERSION", "Handle", "Known", "Row", "cache_groups", "owner", "picture_name", "row_key"]

FORMAT, VERSION = "edgeq session", 1
SMALL = ("ids", "tokens", "flags")  # arrays of the conversation itself


class Row(NamedTuple):
    """Where a file has the keys and values of BLOCK tokens of all layers.

    marks: what stands for them in memory, a layer each (`KVCache.mark`); tokens: so many of them were there.
    """

    marks: tuple[object, ...]
    segment: str
    place: int
    tokens: int


class Handle(NamedTuple):
    """What stands for a state, whose own arrays need not be held for it: a cache, and what the MTP head remembers."""

    cache: object
    draft: object

    @classmethod
    def of(cls, state: State[Any]) -> Self:
        return cls(next((layer for layer in state.layers if isinstance(layer, KVCache)), state.layers), state.draft)

    def means(self, state: State[Any]) -> bool:
        other = self.of(state)
        return other.cache is self.cache and other.draft is self.draft


class Known(NamedTuple):
    """What a file has: rows by what stands for them, states with what stands for each, and checksums."""

    rows: dict[tuple[int, ...], Row]
    states: list[tuple[Handle, dict[str, Any]]]
    checksums: dict[str, Any]

    def copy(self) -> Known:
        return Known(dict(self.rows), list(self.states), dict(self.checksums))


def cache_groups(state: State[Any]) -> dict[str, list[KVCache[Any]]]:
    """What it holds of keys and values: of the model's layers, and of the MTP head."""
    caches = [layer for layer in state.layers if isinstance(layer, KVCache)]
    return {"kv": caches} if state.draft is None else {"kv": caches, "draft": [state.draft.cache]}


def row_key(caches: Sequence[KVCache[Any]], i: int) -> tuple[int, ...]:
    """What tells the keys and values of a place, a layer each, from all others in memory."""
    return tuple(id(cache.mark(i)) for cache in caches)


def owner(name: str) -> str:
    """The state, segment or picture that a tensor is part of."""
    return ".".join(name.split(".")[:3]) if name.startswith("state.") else name


def picture_name(visual: Visual) -> str:
    """The array of what the model saw of a picture."""
    return f"picture.{visual.digest.hex()}"
