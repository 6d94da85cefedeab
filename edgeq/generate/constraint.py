"""What an answer may be, as decoding sees it: after every token, a mask of the tokens that may come next."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Constraint"]


class Constraint(Protocol):
    """A grammar on its way through an answer."""

    def allowed(self) -> NDArray[np.bool_]:
        """Mask [tokens] of what may come next, at least one: the ids that end a text where it may end here."""

    def accept(self, token: int) -> None:
        """Go on behind `token`, which was allowed and does not end the text."""

    @property
    def complete(self) -> bool:
        """Whether nothing but the end may follow."""
