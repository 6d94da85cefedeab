"""What is held now, by whom, and who gives way.

Whatever lives longer than a call, or grows with the input, has an account: weights, KV pages, DeltaNet states, scratch
memory, tables. An account is a function that counts when it is asked, so that nothing has to be kept in step. Some can
do with less: they are asked in the order of `GIVING_WAY` where memory has a ceiling (`edgeq.memory.budget`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

__all__ = ["GIVING_WAY", "GiveWay", "Holding", "Ledger"]

GIVING_WAY = ("prefix checkpoints", "features of pictures", "vision tower", "scratch")
"""Who gives way to what has to grow, the first first: what is only read again, what is made again at the cost of a
prompt, of a picture, of loading, of page faults. Behind them prompts go through in smaller chunks, and then a request
is refused."""

GiveWay = Callable[[int], int]
"""Frees about as many bytes as it is asked for, and returns how many it freed."""


class Holding(NamedTuple):
    """Bytes that one owner holds; `mapped` ones are pages of a file, which the system can take back at any time."""

    owner: str
    nbytes: int
    mapped: bool = False


class _Account(NamedTuple):
    held: Callable[[], int]
    mapped: bool
    give_way: GiveWay | None


class Ledger:
    """The accounts of one engine and of what is built on it."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}

    def open(
        self, owner: str, count: Callable[[], int], *, mapped: bool = False, give_way: GiveWay | None = None
    ) -> None:
        """Open an account, or replace the owner's. give_way: for an owner of `GIVING_WAY`."""
        assert give_way is None or owner in GIVING_WAY, f"{owner} has no place in the order of giving way"
        self._accounts[owner] = _Account(count, mapped, give_way)

    def open_all(self, count: Callable[[], Mapping[str, int]]) -> None:
        """Open an account for every owner that `count` names now."""
        for owner in count():
            self.open(owner, lambda owner=owner: count().get(owner, 0))  # type: ignore[misc]

    def holdings(self) -> list[Holding]:
        """What everybody holds, in the order in which the accounts were opened."""
        return [Holding(owner, account.held(), account.mapped) for owner, account in self._accounts.items()]

    def nbytes(self, *, mapped: bool | None = None) -> int:
        """Bytes held in all, or only those that are mapped, or only those that are not."""
        return sum(h.nbytes for h in self.holdings() if mapped in (None, h.mapped))

    def yielding(self) -> Iterator[tuple[str, GiveWay]]:
        """Who can give way, in the order of `GIVING_WAY`."""
        for owner in GIVING_WAY:
            account = self._accounts.get(owner)
            if account is not None and account.give_way is not None:
                yield owner, account.give_way
