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
_KEEP = "add `--keep-bits` (keep_bits=True in Python) to keep the recipe's bits, or give more bits"
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
        columns = a.spec.shape[1]
        if columns % 64:
            return [QuantSpec(bits, 32) for bits in (3, 4, 5, 6, 8)]
        return [spec for spec in _CHOICES if columns % spec.group_size == 0]

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
    ) -> Allowance | None:  # fmt: skip
        """What `request` leaves to the matrices `free` of all `tensors`, which come with their bytes if nothing is
        chosen: they are what is left of a target, or without one the bytes of these matrices. None where bits are
        kept, or no matrix is free. UsageError for a target if none is, and where not even the smallest choices fit."""
        if request.keeps_bits or not (free or request.has_target):
            return None
        names, bpw = {a.spec.name for a in free}, request.target_bpw
        counted = [(spec, n) for spec, n in tensors if request.target_nbytes is not None or spec.part is Part.TEXT]
        weights, others = sum(spec.size for spec, _ in counted), sum(n for spec, n in counted if spec.name not in names)
        total, target = sum(n for _, n in counted), "the recipe's size"
        if bpw is not None:
            total, target = _nbytes(bpw, weights), f"target-bpw {bpw:g}"
        elif request.target_nbytes is not None:
            total, target = request.target_nbytes, f"target-size {request.target_nbytes:,} (bytes)"
        if not free:
            raise UsageError(f"{target}: no matrix is left to choose bits for", hint="leave it out")
        found = cls(free, total - others, others, menu)
        least = found.least + others
        if least > total and request.target_nbytes is None:
            raise UsageError(
                f"{target} is too small: the smallest choices take {8 * least / weights:.3f} bits per weight of the "
                f"language model ({8 * others / weights:.3f} of them for what is not allocated)",
                hint=_least_bpw(least, weights) if request.has_target else _KEEP,
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

    @property
    def largest(self) -> dict[str, QuantSpec] | None:
        """The largest choice of every matrix, where there is room for all: then nothing has to be measured."""
        sizes = {a.spec.name: {spec: self.menu.nbytes(a, spec) for spec in self.menu.choices(a)} for a in self.free}
        if sum(max(of.values()) for of in sizes.values()) > self.budget:
            return None
        return {name: max(of, key=lambda spec: (of[spec], spec.bits)) for name, of in sizes.items()}

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
