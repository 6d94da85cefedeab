"""Dividing bytes among matrices: bits and group sizes under a budget, by what each choice costs.

The cost of a matrix at some bits and group size is the divergence that it alone would cause; costs of several add up
where each is small. What adds up best under a budget is found with a price per byte (Lagrange): every matrix takes its
own cheapest choice at that price, and the price is moved until the bytes fit. That is optimal but for the bytes left
over, which the best single steps up then use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from edgeq.errors import UsageError
from edgeq.formats.bf16 import Float32
from edgeq.quant.calibrate.hessian import Hessian
from edgeq.quant.calibrate.rounding import AffineGrid, round_rows, sample_rows
from edgeq.quant.recipe import QuantSpec

__all__ = ["Choice", "allocate", "sample_errors"]


class Choice(NamedTuple):
    """What a matrix may be stored as: its bytes, and the divergence that is expected of it."""

    spec: QuantSpec
    nbytes: int
    cost: float


def sample_errors(
    w: Float32, h: Hessian, specs: Sequence[QuantSpec], *, dtype: np.dtype[Any], rows: int = 256
) -> dict[QuantSpec, float]:
    """The squared error of the output per token, summed over rows, of w float32 [out, in] at each of `specs`: rounded
    as it would be, a sample of `rows` rows for all."""
    sample = sample_rows(w, rows)
    share = len(w) / len(sample) / max(h.tokens, 1)
    errors = {}
    for spec in specs:
        rounded = round_rows(sample, h.factor, AffineGrid(spec, dtype, 3))
        errors[spec] = share * float(np.square((rounded.weights() - sample) @ h.factor).sum(dtype=np.float64))
    return errors


def allocate(choices: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, QuantSpec]:
    """One choice for every name, of at most `budget` bytes in all, that makes the sum of costs small.

    The same for equal arguments. UsageError where even the smallest choices do not fit.
    """
    hulls = {name: _hull(offered) for name, offered in choices.items()}
    chosen = dict.fromkeys(hulls, 0)
    left = budget - sum(hull[0].nbytes for hull in hulls.values())
    if left < 0:
        raise UsageError(
            f"{budget:,} bytes are not enough: the matrices take at least {budget - left:,}",
            hint="give a larger size, or more bits per weight",
        )
    # Steps up along convex hulls come in falling order of gain per byte: taking them in that order is what a falling
    # price does. A step that does not fit ends its matrix' climb, and smaller ones of others still fill the rest.
    steps = [
        ((a.cost - b.cost) / (b.nbytes - a.nbytes), name, i, b.nbytes - a.nbytes)
        for name, hull in hulls.items()
        for i, (a, b) in enumerate(pairwise(hull))
    ]
    stopped = set[str]()
    for _, name, i, nbytes in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        if name in stopped or nbytes > left:
            stopped.add(name)
            continue
        chosen[name] = i + 1
        left -= nbytes
    return {name: hulls[name][i].spec for name, i in chosen.items()}


def _hull(offered: Sequence[Choice]) -> list[Choice]:
    """The lower convex hull of cost over bytes, from the smallest choice up: falling costs, falling gains per byte."""
    hull: list[Choice] = []
    for choice in sorted(offered, key=lambda c: (c.nbytes, c.cost)):
        if hull and choice.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _gain(hull[-2], choice) >= _gain(hull[-2], hull[-1]):
            hull.pop()
        if hull and hull[-1].nbytes == choice.nbytes:
            continue
        hull.append(choice)
    return hull


def _gain(a: Choice, b: Choice) -> float:
    return (a.cost - b.cost) / (b.nbytes - a.nbytes)
