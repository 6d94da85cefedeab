"""The measure of an error that every tolerance is given in."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgeq.testing import nmse


def test_nmse_is_relative_to_what_was_expected() -> None:
    expected = np.array([3.0, 4.0], np.float32)
    assert nmse(expected, expected) == 0
    assert nmse(expected, expected + np.float32(0.5)) == pytest.approx(0.5 / 25)
    assert nmse(1e20 * expected, 2e20 * expected) == pytest.approx(1)  # no overflow in float32


def test_nothing_expected_and_something_found_is_no_small_error() -> None:
    zeros = np.zeros(3)
    assert nmse(zeros, zeros) == 0
    assert nmse(zeros, zeros + 1e-12) == math.inf


def test_arrays_of_other_shapes_are_not_broadcast() -> None:
    with pytest.raises(ValueError, match=r"\(3,\) expected, \(1, 3\) found"):
        nmse(np.ones(3), np.ones((1, 3)))
