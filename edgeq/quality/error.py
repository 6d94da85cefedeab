"""The measure of an error that every tolerance is given in."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__ = ["nmse"]


def nmse(expected: Any, found: Any) -> float:
    """The normalised mean squared error, sum (expected - found)^2 / sum expected^2, of arrays of one shape."""
    expected, found = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    if expected.shape != found.shape:
        raise ValueError(f"the shapes differ: {expected.shape} expected, {found.shape} found")
    error, size = float(np.sum((expected - found) ** 2)), float(np.sum(expected**2))
    if error == 0:
        return 0.0
    return error / size if size else math.inf
