"""A group-quantized matrix: what every quantized format that edgeq reads becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

A = TypeVar("A")
B = TypeVar("B")

__all__ = ["Factors", "Matrix", "QMatrix", "TwoLevel"]


class TwoLevel(NamedTuple, Generic[A]):
    """Scales or biases as small integers in units of their block's, as GGUF's K and IQ types have them.

    steps: int8 [out, groups]; units: float16 [out, blocks], a block being 4, 8 or 16 groups.
    """

    steps: A
    units: A


Factors: TypeAlias = A | TwoLevel[A]
"""A number for every group: an array [out, groups] (float16, float32 or bfloat16), or two levels of them."""


@dataclass(frozen=True, slots=True)
class QMatrix(Generic[A]):
    """A matrix [out, in] whose rows are cut into groups: weight = scale * code + bias.

    codes: uint32 [out, in * bits / 32], every row one little-endian stream of `bits`-bit codes, lowest bit first (the
    layout of MLX). groups = in / group_size.
    scales: one for every group.
    biases: likewise, and in two levels if the scales are; or an integer z, which stands for -z * scale.
    iq4: the code is a place in the table `edgeq.formats.affine.IQ4`, which has the number; 4 bits, groups of 32.

    A combination that no kernel knows is refused here, so that nobody else has to ask.
    """

    codes: A
    scales: Factors[A]
    biases: Factors[A] | int
    bits: int
    group_size: int
    iq4: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.biases, int) and isinstance(self.biases, TwoLevel) != isinstance(self.scales, TwoLevel):
            raise ValueError("scales and biases have to be on one level, or both on two")
        if isinstance(self.biases, int) and not 0 <= self.biases < 1 << 8:
            raise ValueError(f"a zero point of {self.biases} is no code")
        if self.iq4 and (self.bits, self.group_size) != (4, 32):
            raise ValueError("the table of iq4 is for 4 bits in groups of 32")

    @property
    def factors(self) -> list[A]:
        """The arrays that scales and biases are made of."""
        return [*_arrays(self.scales), *(() if isinstance(self.biases, int) else _arrays(self.biases))]

    @property
    def arrays(self) -> list[A]:
        """All arrays that it is made of, codes first."""
        return [self.codes, *self.factors]

    def map(self, convert: Callable[[A], B]) -> QMatrix[B]:
        """`convert` applied to every array."""

        def factors(x: Factors[A]) -> Factors[B]:
            return TwoLevel(*map(convert, x)) if isinstance(x, TwoLevel) else convert(x)

        biases = self.biases if isinstance(self.biases, int) else factors(self.biases)
        return QMatrix(convert(self.codes), factors(self.scales), biases, self.bits, self.group_size, self.iq4)

    def replaced(self, **fields: Any) -> QMatrix[A]:
        """The same with other fields."""
        return replace(self, **fields)


def _arrays(x: Factors[A]) -> tuple[A, ...]:
    return tuple(x) if isinstance(x, TwoLevel) else (x,)


Matrix: TypeAlias = A | QMatrix[A]
"""A matrix [out, in] as a file holds it: an array (float32, float16 or bfloat16) or a QMatrix."""
