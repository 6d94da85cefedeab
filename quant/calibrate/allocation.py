"""Bits and group sizes for every matrix under a budget of bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from edgeq.errors import UsageError
from edgeq.quant.calibrate.allocate import Choice, allocate
from edgeq.quant.calibrate.sensitivity import Costs
from edgeq.quant.recipe import Assignment, QuantSpec

__all__ = ["AFFINE", "Allowance", "Menu", "as_json", "from_json"]

_CHOICES = (
    QuantSpec(3, 128), QuantSpec(3, 64), QuantSpec(4, 128), QuantSpec(4, 64), QuantSpec(4, 32), QuantSpec(5, 128),
    QuantSpec(5, 64), QuantSpec(6, 128), QuantSpec(6, 64), QuantSpec(8, 128), QuantSpec(8, 64),
)  # fmt: skip
_FACTORS = 4  # bytes of a group's scale and bias


class Menu(Protocol):
    """What matrices may be stored as in a format."""

    def choices(self, a: Assignment) -> list[QuantSpec]:
        """All that fit a matrix."""
        ...

    def nbytes(self, a: Assignment, spec: QuantSpec) -> int:
        """Bytes of it stored so."""
        ...


class _AffineMenu:
    def choices(self, a: Assignment) -> list[QuantSpec]:
        return [spec for spec in _CHOICES if a.spec.shape[1] % spec.group_size == 0] or [
            QuantSpec(bits, 32) for bits in (3, 4, 5, 6, 8)
        ]

    def nbytes(self, a: Assignment, spec: QuantSpec) -> int:
        rows, columns = a.spec.shape
        return rows * (columns * spec.bits // 8 + columns // spec.group_size * _FACTORS)


AFFINE: Menu = _AffineMenu()
"""MLX's affine groups."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """The matrices whose bits may be chosen, and the bytes that they may take together; `others` are those of what
    counts beside them. UsageError from `check` if they cannot fit."""

    free: Sequence[Assignment]
    budget: int
    others: int
    menu: Menu = AFFINE

    @property
    def least(self) -> int:
        """Bytes of the smallest choices."""
        return sum(min(self.menu.nbytes(a, spec) for spec in self.menu.choices(a)) for a in self.free)

    @property
    def record(self) -> dict[str, Any]:
        """Its figures."""
        return {"matrices": len(self.free), "budget": self.budget, "others": self.others, "least": self.least}

    def check(self) -> None:
        """UsageError where not even the smallest choices fit."""
        if self.budget < self.least:
            raise UsageError(
                f"the target allows {max(0, self.budget + self.others):,} bytes, and the smallest choices take "
                f"{self.least + self.others:,} ({self.others:,} of them for what is not allocated)",
                hint="give a larger target, or leave out the tower or the MTP head",
            )

    def allocate(self, costs: Costs) -> dict[str, QuantSpec]:
        """The choice of every matrix by `costs`."""
        offered = {
            a.spec.name: [Choice(spec, self.menu.nbytes(a, spec), cost) for spec, cost in costs[a.spec.name].items()]
            for a in self.free
        }
        return allocate(offered, self.budget)

    def applied(self, assignments: Sequence[Assignment], chosen: Mapping[str, QuantSpec]) -> list[Assignment]:
        """The assignments with what was chosen."""
        return [replace(a, storage=chosen.get(a.spec.name, a.storage)) for a in assignments]


def as_json(costs: Costs) -> dict[str, Any]:
    """Costs as they are kept."""
    return {name: [[spec.bits, spec.group_size, cost] for spec, cost in of.items()] for name, of in costs.items()}


def from_json(kept: Mapping[str, Any]) -> Costs:
    """The same back."""
    return {name: {QuantSpec(bits, size): cost for bits, size, cost in of} for name, of in kept.items()}
