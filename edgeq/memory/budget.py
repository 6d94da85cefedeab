"""One ceiling over the process's resident set, kept: whatever grows asks first.

What counts is what the system counts: the resident set, Python, libraries and mapped weights included. It is measured,
and what is known to come is added: pages of weights that are planned to be resident and have not been read yet, and
the claim. Where that is more than the ceiling, memory that was freed and kept goes back to the system, then accounts
give way in the ledger's written order, and then the claim is refused with nothing changed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from threading import RLock, get_ident
from typing import ClassVar
from weakref import WeakSet

from edgeq.errors import MemoryBudgetError
from edgeq.memory.ceiling import Ceiling
from edgeq.memory.ledger import GIVING_WAY, GiveWay, Ledger
from edgeq.memory.resident import release_unused, resident

__all__ = ["SPARE", "Budget", "megabytes"]

SPARE = 6 << 20
"""Bytes that are always left for what is too small to ask: objects of Python, stacks, pages of code."""


class Budget:
    """A model's part in the ceiling of its process.

    ledger: who gives way. Every model of the process is asked, whoever claims.
    weights: bytes of mapped weights that are to be resident. release: gives back what a backend keeps and nobody uses.
    ceiling: bytes of the resident set; None is no bound. origin: where it comes from ("--memory 1.5G").
    """

    _all: ClassVar[WeakSet[Budget]] = WeakSet()
    _code: ClassVar[int] = 0  # pages of files that are no weights: of libraries, of tables
    _one_at_a_time: ClassVar[RLock] = RLock()
    _caller: ClassVar[int | None] = None  # the thread that has called a model
    _several: ClassVar[bool] = False  # have

    def __init__(
        self, ledger: Ledger, weights: Callable[[], int], release: Callable[[], None], ceiling: Ceiling | None = None
    ) -> None:
        self.ledger, self.weights, self.release = ledger, weights, release
        self.ceiling: int | None = ceiling.nbytes if ceiling else None
        self.origin = ceiling.origin if ceiling else ""
        self.locked = False
        """Whether the model's weights are locked in memory, so that nobody can let go of them."""
        Budget._all.add(self)

    @classmethod
    def look(cls, without: Budget | None = None) -> None:
        """Note how many pages of files are no weights, because those come back beside them: called where a model's have
        been let go, and before there is one. What was dropped and waits for Python to see it is given back then."""
        if without is None and cls._all:
            cls._collect()
        others = sum(budget.weights() for budget in cls._all if budget is not without)
        if (now := resident()) is not None and not (without and without.locked):
            cls._code = max(now.files - others, cls._code if others else 0)

    @classmethod
    def process(cls) -> int:
        """What the process takes, with all weights of its models that are planned to be resident."""
        now = resident()
        if now is None:
            return sum(budget.ledger.nbytes() for budget in cls._all)
        return now.private + max(now.files, cls._code + sum(budget.weights() for budget in cls._all))

    def used(self, *, weights: bool = True) -> int:
        """The same; `weights`: with those of this model, which otherwise have been let go (unless they are locked)."""
        now = resident()
        if weights or self.locked or now is None:
            return self.process()
        others = sum(budget.weights() for budget in Budget._all if budget is not self)
        return now.private + max(now.files, Budget._code + others)

    @property
    def alone(self) -> AbstractContextManager[object]:
        """While it lasts, no other thread of the process claims: what has been claimed is taken before."""
        return nullcontext() if self.ceiling is None else Budget._one_at_a_time

    @classmethod
    def by_several(cls) -> bool:
        """Whether more threads than this one have called a model. Each has scratch memory of its own, which only itself
        can give back, and so has to after its call."""
        Budget._several |= Budget._caller not in (None, get_ident())
        Budget._caller = get_ident()
        return Budget._several

    def room(self, *, weights: bool = True) -> int | None:
        """Bytes that can be claimed with nobody giving way; None without a ceiling, negative above it. weights: as of
        `claim`."""
        return None if self.ceiling is None else self.ceiling - SPARE - self.used(weights=weights)

    def fits(self, nbytes: int, *, weights: bool = True) -> bool:
        """Whether so much can be claimed with nobody giving way."""
        room = self.room(weights=weights)
        return room is None or nbytes <= room

    def claim(
        self, nbytes: int | Callable[[], int], what: str, *, weights: bool = True, hint: str | None = None
    ) -> None:
        """Make room for `nbytes` more, for a purpose `what` ("keys and values of 4,096 tokens").

        nbytes: or a function that says how many, where some are there already as long as nobody gives way.
        weights: whether this model's planned weights are resident meanwhile; if not, their pages have been let go
        before. Raises MemoryBudgetError, by which nothing has changed but that some have given way.
        """
        if self.ceiling is None:
            return
        needed = nbytes if callable(nbytes) else lambda: nbytes
        with self.alone:
            self._make_room(needed, what, weights, hint)

    def _make_room(self, needed: Callable[[], int], what: str, weights: bool, hint: str | None) -> None:
        if self.fits(needed(), weights=weights):
            return
        self._release()
        for give_way in self._yielding():
            while (lacking := needed() - (self.room(weights=weights) or 0)) > 0:
                if gave := give_way(lacking):
                    self._release()
                if gave < lacking:  # all that it could; else somebody may hold some of it as well
                    break
            else:
                return
        self._collect()
        if not self.fits(more := needed(), weights=weights):
            assert self.ceiling is not None
            whole = self.used(weights=weights) + more + SPARE
            raise MemoryBudgetError(
                f"{what} do not fit: {megabytes(more)} more would make {megabytes(whole)}, "
                f"and {self.origin or 'the ceiling'} allows {megabytes(self.ceiling)}",
                hint=hint or "let go of other conversations or states, or allow more with --memory (memory= in Python)",
            )

    @classmethod
    def _release(cls) -> None:
        for budget in cls._all:
            budget.release()
        release_unused()

    @classmethod
    def _collect(cls) -> None:
        """The same, after what refers to itself and is not used otherwise: a model that was dropped does."""
        gc.collect()
        cls._release()

    def _ledgers(self) -> Iterable[Ledger]:
        return [self.ledger, *(budget.ledger for budget in Budget._all if budget is not self)]

    def _yielding(self) -> Iterable[GiveWay]:
        """Everybody who can give way: in the written order, and of each kind this model's own first."""
        found = [each for ledger in self._ledgers() for each in ledger.yielding()]
        return [give_way for _, give_way in sorted(found, key=lambda each: GIVING_WAY.index(each[0]))]


def megabytes(nbytes: int) -> str:
    """Bytes for a message: "1,234 MB"."""
    return f"{nbytes / 1e6:,.0f} MB"
