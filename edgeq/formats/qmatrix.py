"""A group-quantized matrix: what every quantized format that edgeq reads becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar

A = TypeVar("A")
B = TypeVar("B")

__all__ = ["MLX_MODES", "MODES", "Factors", "Matrix", "Mode", "QMatrix", "TwoLevel", "UpperHalves"]

Mode: TypeAlias = Literal["affine", "iq4", "mxfp4", "nvfp4", "mxfp8"]
"""What a code stands for: itself, or an entry of a table (`edgeq.formats.codebooks`)."""

MODES: Mapping[Mode, tuple[int, int]] = {"iq4": (4, 32), "mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
"""Bits and group size of the modes that have a table."""

MLX_MODES: tuple[Mode, ...] = ("mxfp4", "nvfp4", "mxfp8")
"""Those that MLX has: floating-point codes, scales of 8 bits."""


class TwoLevel(NamedTuple, Generic[A]):
    """Scales or biases as small integers in units of their block's, as GGUF's K and IQ types have them.

    steps: int8 [out, groups]; units: float16 [out, blocks], a block being 4, 8 or 16 groups.
    """

    steps: A
    units: A


class UpperHalves(NamedTuple, Generic[A]):
    """Biases as Q2_K has them: 4-bit integers in the upper halves of the scales' steps, which are uint8 then and have
    the scales in their lower halves. A bias is -integer * unit.

    units: float16 [out, blocks].
    """

    units: A


Factors: TypeAlias = A | TwoLevel[A]
"""A number for every group: an array [out, groups] (float16, float32 or bfloat16), or two levels of them."""


@dataclass(frozen=True, slots=True)
class QMatrix(Generic[A]):
    """A matrix [out, in] whose rows are cut into groups: weight = scale * value + bias.

    codes: uint32 [out, in * bits / 32], every row one little-endian stream of `bits`-bit codes, lowest bit first (the
    layout of MLX). groups = in / group_size.
    scales: one for every group; in the modes of MLX uint8 [out, groups], an E8M0 (mxfp4, mxfp8) or E4M3 (nvfp4) number.
    biases: likewise, and in two levels if the scales are; or an integer z, which stands for -z * scale.
    mode: what a code's value is; the code itself, or an entry of the mode's table. With a table biases are 0.

    A combination that no kernel knows is refused here, so that nobody else has to ask.
    """

    codes: A
    scales: Factors[A]
    biases: Factors[A] | UpperHalves[A] | int
    bits: int
    group_size: int
    mode: Mode = "affine"

    def __post_init__(self) -> None:
        two_levels = isinstance(self.scales, TwoLevel)
        if not isinstance(self.biases, int) and isinstance(self.biases, TwoLevel | UpperHalves) != two_levels:
            raise ValueError("scales and biases have to be on one level, or both on two")
        if isinstance(self.biases, int) and not 0 <= self.biases < 1 << 8:
            raise ValueError(f"a zero point of {self.biases} is no code")
        if two_levels and self.mode in MLX_MODES:
            raise ValueError(f"scales of {self.mode} are on one level")
        if self.mode != "affine" and ((self.bits, self.group_size), self.biases) != (MODES[self.mode], 0):
            raise ValueError("{} is for {} bits in groups of {}, without biases".format(self.mode, *MODES[self.mode]))

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

        biases: Factors[B] | UpperHalves[B] | int
        if isinstance(self.biases, UpperHalves):
            biases = UpperHalves(convert(self.biases.units))
        else:
            biases = self.biases if isinstance(self.biases, int) else factors(self.biases)
        return QMatrix(convert(self.codes), factors(self.scales), biases, self.bits, self.group_size, self.mode)

    def replaced(self, **fields: Any) -> QMatrix[A]:
        """The same with other fields."""
        return replace(self, **fields)


def _arrays(x: Factors[A] | UpperHalves[A]) -> tuple[A, ...]:
    return tuple(x) if isinstance(x, TwoLevel | UpperHalves) else (x,)


Matrix: TypeAlias = A | QMatrix[A]
"""A matrix [out, in] as a file holds it: an array (float32, float16 or bfloat16) or a QMatrix."""
