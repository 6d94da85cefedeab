"""The only reader of numbers that come from files: of the right type, in the right range, or an error that names them.

A damaged or hostile file can hold anything: true for 1, 4.0 for 4, integers of 400 digits, infinity, NaN. Each of them
passes some later check by accident.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from edgeq.errors import ModelError
from edgeq.printable import brief

__all__ = ["SAMPLING", "Range", "for_json", "number", "whole_number"]


class Range(NamedTuple):
    """The numbers from `low` to `high`; without `low` itself if `above`, and only whole ones if `whole`.

    A boolean is no number, and NaN and infinity are in no range.
    """

    low: float
    high: float
    above: bool = False
    whole: bool = False

    def holds(self, value: object) -> bool:
        """Whether `value` is one of them."""
        if type(value) is not int and (self.whole or type(value) is not float):
            return False
        return self.low <= value <= self.high and not (self.above and value == self.low)

    def wanted(self, value: object) -> str:
        """What is expected in the place of `value`, in words: the end that it is beyond, if the range has no name."""
        if self.high == _MAX_INTEGER and type(value) is int and value > self.high:
            return "a whole number below 2^64"
        return str(self)

    def __str__(self) -> str:
        if self.whole and self.high == _MAX_INTEGER:
            return f"a whole number of at least {self.low}"
        low, high = (f"{end:g}" if isinstance(end, float) else str(end) for end in (self.low, self.high))
        return ("a whole number " if self.whole else "") + (
            f"above {low} and at most {high}" if self.above else f"from {low} to {high}"
        )


_MAX_INTEGER = (1 << 64) - 1

SAMPLING: Mapping[str, Range] = {
    "temperature": Range(0, 10),
    "top_p": Range(0, 1, above=True),
    "min_p": Range(0, 1),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "repetition_penalty": Range(0.1, 10),
    "top_k": Range(0, _MAX_INTEGER, whole=True),
    "seed": Range(0, _MAX_INTEGER, whole=True),
    "logprobs": Range(0, 1000, whole=True),
    "max_tokens": Range(1, _MAX_INTEGER, whole=True),
    "thinking_budget": Range(0, _MAX_INTEGER, whole=True),
    "max_total_tokens": Range(1, _MAX_INTEGER, whole=True),
}
"""The settings of generation that are numbers, whether a user gives them or a file recommends them."""


def whole_number(value: object, where: str, low: int, high: int, *, hint: str | None = None) -> int:
    """`value` if it is an integer from `low` to `high`; ModelError, which begins with `where`, for anything else."""
    allowed = Range(low, high, whole=True)
    if isinstance(value, int) and allowed.holds(value):
        return value
    raise ModelError(f"{where} is {brief(value)}, expected {allowed}", hint=hint)


def number(
    value: object, where: str, low: float, high: float, *, above: bool = False, hint: str | None = None
) -> float:
    """`value` as a float if it is a number from `low` (with `above`: greater) to `high`; ModelError if not."""
    allowed = Range(low, high, above)
    if isinstance(value, int | float) and allowed.holds(value):
        return float(value)
    raise ModelError(f"{where} is {brief(value)}, expected a number {allowed}", hint=hint)


def for_json(value: Any) -> Any:
    """A value as JSON can have it: null in the place of NaN and infinity, which it has no words for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: for_json(one) for key, one in value.items()}
    return [for_json(one) for one in value] if isinstance(value, list | tuple) else value
