"""Scale moved between neighbours, and bytes divided among matrices: quant/calibrate/{equalize,allocate}.py."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.errors import UsageError
from edgeq.formats.bf16 import Float32, round_to, to_float32
from edgeq.quant.calibrate.allocate import Choice, allocate, sample_errors
from edgeq.quant.calibrate.equalize import column_factors, fold_norm
from edgeq.quant.calibrate.hessian import Hessian
from edgeq.quant.calibrate.rounding import EFFORTS, solve_matrix
from edgeq.quant.recipe import QuantSpec

BF16 = np.dtype(np.uint16)
SPEC = QuantSpec(4, 32)


def layer(seed: int, columns: int = 64) -> tuple[Float32, Float32]:
    """Weights [48, columns] and activations [300, columns] without outliers."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((48, columns)).astype(np.float32) * np.float32(0.02)
    x = rng.standard_normal((300, 16)) @ rng.standard_normal((16, columns)) + rng.standard_normal((300, columns))
    return w, x.astype(np.float32)


def hessian(x: Float32) -> Hessian:
    h = Hessian(x.shape[1], drift=False)
    h.add(x)
    return h


def test_outliers_are_undone() -> None:
    """Channels 16 times larger where they are written and smaller where they are read cost what they cost before."""
    w, x = layer(0)
    x += 4 * layer(4, 64)[1][::-1]  # little that other columns could repair
    outlier = np.ones(64, np.float32)
    outlier[[3, 17, 40]] = 16
    worse, far = w / outlier, x * outlier
    factors = column_factors([worse], hessian(far), [SPEC])
    assert factors[3] > 4 * np.median(factors)
    errors = [
        solve_matrix(a, hessian(b), SPEC, dtype=BF16, effort=EFFORTS["fast"]).error
        for a, b in ((w, x), (worse, far), (worse * factors, far / factors))
    ]
    assert errors[1] > 1.25 * errors[0]
    assert errors[2] < 1.1 * errors[0]


def test_shared_channels_get_one_factor_and_dead_ones_take_no_harm() -> None:
    w, x = layer(1)
    x[:, 5] = 0
    w[:, 7] = 0
    x[:, [2, 34]] *= 30
    w[:, [2, 34]] /= 30
    share = np.arange(64) % 32
    factors = column_factors([w, w * 2], hessian(x), [SPEC, QuantSpec(3, 64)], share)
    assert (factors[:32] == factors[32:]).all()
    assert np.isfinite(factors).all()
    assert (factors > 0).all()
    assert not (factors == 1).all()


def test_nothing_to_gain_leaves_all_as_it_is() -> None:
    rng = np.random.default_rng(2)
    w = np.sign(rng.standard_normal((16, 64))).astype(np.float32)  # two values: no step is too coarse
    assert (column_factors([w], hessian(layer(2)[1]), [SPEC]) == 1).all()
    assert (column_factors([w], Hessian(64), [SPEC]) == 1).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([BF16, np.dtype(np.float16), np.dtype(np.float32)]),
    centred=st.booleans(),
)
def test_folding_into_a_norm_is_exact(seed: int, dtype: np.dtype[np.uint16], centred: bool) -> None:
    """The product of gain and columns is what it was, to float32, whatever the stored type makes of the new gain."""
    rng = np.random.default_rng(seed)
    norm = round_to(rng.standard_normal(64).astype(np.float32) * np.float32(2), dtype)
    norm[:2] = round_to(np.array([-1, 0], np.float32), dtype)  # gains of 0
    factors = np.exp(2 * rng.standard_normal(64)).astype(np.float32)
    factors[10:20] = 1
    folded, ratio = fold_norm(norm, factors, centred=centred)
    assert folded.dtype == norm.dtype
    offset = 1.0 if centred else 0.0
    before, after = (to_float32(v).astype(np.float64) + offset for v in (norm, folded))
    np.testing.assert_allclose(after * ratio, before, rtol=1e-6)
    assert (folded[10:20] == norm[10:20]).all()
    assert (ratio[10:20] == 1).all()
    assert (ratio > 0).all()


def test_sampled_errors_foretell_the_whole() -> None:
    w, x = layer(3)
    h = hessian(x)
    specs = [QuantSpec(b, g) for b in (3, 4, 8) for g in (32, 64)]
    errors = sample_errors(w, h, specs, dtype=BF16, rows=16)
    for spec in specs:
        error = solve_matrix(w, h, spec, dtype=BF16, effort=EFFORTS["fast"]).weights() - w
        assert errors[spec] == pytest.approx(np.square(error @ h.factor).sum() / h.tokens, rel=0.35)
    assert errors[specs[0]] < errors[specs[1]]
    assert errors[specs[0]] > 8 * errors[specs[4]]


OFFERS = st.lists(
    st.tuples(st.integers(1, 40), st.floats(0, 10, allow_nan=False)), min_size=1, max_size=5, unique_by=lambda o: o[0]
)


@settings(max_examples=60, deadline=None)
@given(offers=st.lists(OFFERS, min_size=1, max_size=4), room=st.integers(0, 120))
def test_allocation_against_all_combinations(offers: list[list[tuple[int, float]]], room: int) -> None:
    """Within the budget, and no worse than the best combination by more than one step (the bytes left over)."""
    choices = {
        str(i): [Choice(QuantSpec(j, 32), nbytes, cost) for j, (nbytes, cost) in enumerate(offer)]
        for i, offer in enumerate(offers)
    }
    budget = sum(min(c.nbytes for c in offer) for offer in choices.values()) + room
    taken = allocate(choices, budget)
    picked = [next(c for c in choices[name] if c.spec == spec) for name, spec in taken.items()]
    assert sum(c.nbytes for c in picked) <= budget
    best = min(
        sum(c.cost for c in combination)
        for combination in product(*choices.values())
        if sum(c.nbytes for c in combination) <= budget
    )
    slack = max(max(c.cost for c in offer) - min(c.cost for c in offer) for offer in choices.values())
    assert sum(c.cost for c in picked) <= best + slack + 1e-9
    assert taken == allocate(dict(reversed(choices.items())), budget)


def test_too_small_a_budget_is_told() -> None:
    with pytest.raises(UsageError, match="99 bytes are not enough: the matrices take at least 100"):
        allocate({"a": [Choice(SPEC, 100, 1.0)]}, 99)
