"""Bits and group sizes for every matrix under a budget of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Protocol

from edgeq.errors import UsageError
from edgeq.quant.calibrate.allocate import Choice, allocate
from edgeq.quant.calibrate.request import BPW, CalibrationRequest
from edgeq.quant.calibrate.sensitivity import Costs
from edgeq.quant.recipe import Assignment, QuantSpec
from edgeq.weights import Part, TensorSpec

__all__ = ["AFFINE", "Allowance", "Menu", "as_json", "from_json"]

_CHOICES = (
    QuantSpec(3, 128), QuantSpec(3, 64), QuantSpec(4, 128), QuantSpec(4, 64), QuantSpec(4, 32), QuantSpec(5, 128),
    QuantSpec(5, 64), QuantSpec(6, 128), QuantSpec(6, 64), QuantSpec(8, 128), QuantSpec(8, 64),
)  # fmt: skip
_FACTORS = 4  # bytes of a group's scale and bias
_WITHOUT = {
    Part.VISION: "leave out the vision tower with `--no-vision` (vision='none' in Python)",
    Part.MTP: "leave out the MTP head with `--no-mtp` (mtp=False in Python)",
}


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
    counts beside them."""

    free: Sequence[Assignment]
    budget: int
    others: int
    menu: Menu = AFFINE

    @classmethod
    def of(
        cls, request: CalibrationRequest, tensors: Iterable[tuple[TensorSpec, int]], free: Sequence[Assignment],
        menu: Menu = AFFINE,
    ) -> Allowance:  # fmt: skip
        """What the target of `request` leaves to the matrices `free` of all `tensors`, which come with their bytes if
        nothing is chosen. UsageError if there is none, or not even the smallest choices fit."""
        names, bpw = {a.spec.name for a in free}, request.target_bpw
        counted = [(spec, nbytes) for spec, nbytes in tensors if bpw is None or spec.part is Part.TEXT]
        weights, others = sum(spec.size for spec, _ in counted), sum(n for spec, n in counted if spec.name not in names)
        total = _nbytes(bpw, weights) if bpw is not None else request.target_nbytes or 0
        found = cls(free, total - others, others, menu)
        target = f"target-size {total:,} (bytes)" if bpw is None else f"target-bpw {bpw:g}"
        if not free:
            raise UsageError(f"{target}: no matrix is left to choose bits for", hint="leave it out")
        least = found.least + others
        if least > total and bpw is not None:
            raise UsageError(
                f"{target} is too small: the smallest choices take {8 * least / weights:.3f} bits per weight of the "
                f"language model ({8 * others / weights:.3f} of them for what is not allocated)",
                hint=_least_bpw(least, weights),
            )
        if least > total:
            parts = {spec.part for spec, _ in counted}
            raise UsageError(
                f"{target} is too small: the smallest choices take {least:,} bytes ({others:,} of them for what is not "
                "allocated)",
                hint=", or ".join((f"give at least {least}", *(_WITHOUT[p] for p in _WITHOUT if p in parts))),
            )
        return found

    @property
    def least(self) -> int:
        """Bytes of the smallest choices."""
        return sum(min(self.menu.nbytes(a, spec) for spec in self.menu.choices(a)) for a in self.free)

    @property
    def record(self) -> dict[str, Any]:
        """Its figures."""
        return {"matrices": len(self.free), "budget": self.budget, "others": self.others, "least": self.least}

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


def _nbytes(bpw: float, weights: int) -> int:
    """Whole bytes of so many bits per weight."""
    return int(bpw * weights / 8)


def _least_bpw(nbytes: int, weights: int) -> str:
    """What to do about a target below so many bytes: the least that is not, in hundredths of a bit."""
    least = next(x / 100 for x in count(800 * nbytes // weights) if _nbytes(x / 100, weights) >= nbytes)
    return f"give at least {least:g}" if BPW.holds(least) else "take back some of `--type` (types= in Python)"


def as_json(costs: Costs) -> dict[str, Any]:
    """Costs as they are kept."""
    return {name: [[spec.bits, spec.group_size, cost] for spec, cost in of.items()] for name, of in costs.items()}


def from_json(kept: Mapping[str, Any]) -> Costs:
    """The same back."""
    return {name: {QuantSpec(bits, size): cost for bits, size, cost in of} for name, of in kept.items()}
