"""Who a conversation is with."""

from __future__ import annotations

from typing import Any, Protocol

from edgeq.engine import Engine
from edgeq.session.language import Language
from edgeq.session.prefixes import PrefixStore
from edgeq.session.sight import Sight

__all__ = ["Speaker"]


class Speaker(Protocol):
    """An `edgeq.Model`, or whatever else has these four."""

    @property
    def engine(self) -> Engine[Any, Any]: ...
    @property
    def language(self) -> Language: ...
    @property
    def sight(self) -> Sight: ...
    @property
    def prefixes(self) -> PrefixStore: ...
