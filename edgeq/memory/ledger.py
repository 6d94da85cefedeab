"""What is held now, and by whom.

Whatever lives longer than a call, or grows with the input, has an account: weights, KV pages, DeltaNet states, scratch
memory, tables. An account is a function that counts when it is asked, so that nothing has to be kept in step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

__all__ = ["Holding", "Ledger"]


class Holding(NamedTuple):
    """Bytes that one owner holds; `mapped` ones are pages of a file, which the system can take back at any time."""

    owner: str
    nbytes: int
    mapped: bool = False


class Ledger:
    """The accounts of one engine and of what is built on it."""

    def __init__(self) -> None:
        self._accounts: dict[str, tuple[Callable[[], int], bool]] = {}

    def open(self, owner: str, count: Callable[[], int], *, mapped: bool = False) -> None:
        """Open an account, or replace the owner's."""
        self._accounts[owner] = count, mapped

    def open_all(self, count: Callable[[], Mapping[str, int]]) -> None:
        """Open an account for every owner that `count` names now."""
        for owner in count():
            self.open(owner, lambda owner=owner: count().get(owner, 0))  # type: ignore[misc]

    def holdings(self) -> list[Holding]:
        """What everybody holds, in the order in which the accounts were opened."""
        return [Holding(owner, count(), mapped) for owner, (count, mapped) in self._accounts.items()]

    def nbytes(self, *, mapped: bool | None = None) -> int:
        """Bytes held in all, or only those that are mapped, or only those that are not."""
        return sum(h.nbytes for h in self.holdings() if mapped in (None, h.mapped))
