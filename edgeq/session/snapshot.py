"""A conversation as a value: what a chat is made of, and can be made of again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from edgeq.generate import GenerationSettings
from edgeq.session.places import Place
from edgeq.session.prefixes import Prefix
from edgeq.session.turns import Said, Turn
from edgeq.session.visual_settings import VisualSettings

if TYPE_CHECKING:
    from edgeq.text.conversation import Entry

__all__ = ["Settings", "Snapshot"]


class Settings(NamedTuple):
    """How a conversation goes on: the parameters of Chat by the same names."""

    thinking: bool
    settings: GenerationSettings | None
    options: Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]] | None
    template_kwargs: Mapping[str, Any] | None
    visual_settings: VisualSettings
    draft: str | int
    overflow: str


class Snapshot(NamedTuple):
    """A conversation.

    entries: what its tokens are made of. places: of its pictures. forgotten: how many turns were.
    prefixes: what was read of it and the states after that, the first being where it stands.
    """

    settings: Settings
    system: Said | None
    turns: Sequence[Turn]
    entries: Sequence[Entry]
    places: Sequence[Place]
    forgotten: int
    prefixes: Sequence[Prefix]
