"""Rounding by what a matrix reads: quant/calibrate/{hessian,rounding}.py."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.errors import ModelError
from edgeq.formats.affine import dequantize
from edgeq.formats.bf16 import Array, Float32, round_to
from edgeq.quant.calibrate.blas import _openblas, one_blas_thread
from edgeq.quant.calibrate.hessian import Hessian
from edgeq.quant.calibrate.rounding import (
    EFFORTS,
    AffineGrid,
    Effort,
    corrected,
    improve,
    round_rows,
    solve_matrix,
)
from edgeq.quant.matrix import quantize_rows
from edgeq.quant.recipe import QuantSpec
from edgeq.weights import QMatrix

BF16 = np.dtype(np.uint16)
STORED = [BF16, np.dtype(np.float16)]


def inputs(rng: np.random.Generator, tokens: int, columns: int) -> Float32:
    """Activations that depend on each other, some channels much larger than others, one dead."""
    mixing = rng.standard_normal((columns // 4, columns))
    x = rng.standard_normal((tokens, columns // 4)) @ mixing + 0.5 * rng.standard_normal((tokens, columns))
    x *= np.exp(rng.standard_normal(columns))
    x[:, rng.integers(columns)] = 0
    return x.astype(np.float32)


def weights(rng: np.random.Generator, rows: int, columns: int) -> Float32:
    return rng.standard_t(5, (rows, columns)).astype(np.float32) * np.float32(0.02)


def hessian(x: Float32, x_float: Float32 | None = None) -> Hessian:
    h = Hessian(x.shape[1])
    h.add(x, x_float)
    return h


def objective(error: Float32, h: Float32) -> Float32:
    """e H e^T of every row, float64."""
    e = error.astype(np.float64)
    each: Float32 = np.einsum("ij,ij->i", e @ h.astype(np.float64), e)
    return each


def gptq(w: Float32, h: Float32, scales: Float32, biases: Float32, group_size: int, levels: int) -> Array:
    """The slow twin: codes by the paper's recursion, float64, with the inverse of what is left at every column."""
    left, h = w.astype(np.float64), h.astype(np.float64)
    codes = np.zeros(w.shape)
    for k in range(w.shape[1]):
        inverse = np.linalg.inv(h[k:, k:])
        s, b = scales[:, k // group_size], biases[:, k // group_size]
        codes[:, k] = np.clip(np.rint((left[:, k] - b) / s), 0, levels)
        error = left[:, k] - (s * codes[:, k] + b)
        left[:, k:] -= error[:, None] * inverse[0] / inverse[0, 0]
    return codes


def test_codes_are_those_of_gptq() -> None:
    """Factor without inverse, blocks of columns and float32 choose the codes of the paper's recursion: all but those
    that fall on a boundary, of which every later column hears."""
    rng = np.random.default_rng(0)
    w, h = weights(rng, 64, 96), hessian(inputs(rng, 400, 96))
    rows = round_rows(w, h.factor, AffineGrid(QuantSpec(4, 32), BF16, 5))
    slow = gptq(w, h.damped(), rows.scales, rows.biases, 32, 15)
    assert (rows.codes == slow).all(1).mean() > 0.95


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group_size=st.sampled_from([32, 64]),
    dtype=st.sampled_from(STORED),
    tokens=st.sampled_from([3, 40, 500]),
)
def test_every_step_lowers_the_error_of_the_output(
    seed: int, bits: int, group_size: int, dtype: np.dtype[np.uint16], tokens: int
) -> None:
    """Descent is never worse than rounding by columns, row by row; that is better in sum than rounding to nearest by
    the full search, where there are more tokens than columns. (With fewer the Hessian is nearly the identity, and only
    the searches are compared: test_scales_are_near_those_of_the_full_search.)"""
    rng = np.random.default_rng(seed)
    w, h, spec = weights(rng, 24, 128), hessian(inputs(rng, tokens, 128)), QuantSpec(bits, group_size)
    gram = h.damped()
    grid = AffineGrid(spec, dtype, 5)
    rounded = round_rows(w, h.factor, grid)
    errors = [objective(rounded.weights() - w, gram)]
    for sweeps in (1, 3):
        errors.append(objective(improve(w, gram, rounded, grid, sweeps).weights() - w, gram))
        assert (errors[-1] <= errors[-2] * (1 + 1e-4)).all()  # sums in float32
    if tokens > 128:
        q = quantize_rows(w, bits, group_size, dtype)
        nearest = dequantize(QMatrix(q.codes, q.scales, q.biases, bits, group_size))
        assert errors[0].sum() < objective(nearest - w, gram).sum()


def test_descent_ends_where_no_single_code_helps() -> None:
    rng = np.random.default_rng(6)
    w, h = weights(rng, 6, 64), hessian(inputs(rng, 300, 64))
    gram, grid = h.damped(), AffineGrid(QuantSpec(3, 32), BF16, 5)
    rows = improve(w, gram, round_rows(w, h.factor, grid), grid, 40)
    least = objective(rows.weights() - w, gram)
    for j in range(64):
        for step in (-1, 1):
            codes = rows.codes.astype(int)
            codes[:, j] = np.clip(codes[:, j] + step, 0, 7)
            moved = rows._replace(codes=codes.astype(np.uint8)).weights()
            assert (objective(moved - w, gram) >= least * (1 - 1e-4)).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_scales_are_near_those_of_the_full_search(bits: int) -> None:
    """With equal weights: error within 4 % of the search of plain quantization; with others, less by those weights."""
    rng = np.random.default_rng(7)
    x, importance = weights(rng, 400, 64), rng.lognormal(0, 2, 64).astype(np.float32)
    grid, ones = AffineGrid(QuantSpec(bits, 64), BF16, 4), np.ones(64, np.float32)

    def errors(weighting: Float32) -> Float32:
        """Squared errors [64, 400] of the nearest codes, by the scales that `weighting` leads to."""
        scale, bias = grid.fit(np.ascontiguousarray(x.T), weighting)
        codes = np.clip(np.rint((x.T - bias) / scale), 0, grid.levels)
        return np.asarray(np.square(scale * codes + bias - x.T), np.float32)

    assert errors(ones).sum() < 1.04 * quantize_rows(x, bits, 64, BF16).squared_error
    assert importance @ errors(importance).sum(1) < importance @ errors(ones).sum(1)


def test_result_is_what_is_stored_and_does_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeq.quant.calibrate.rounding.ROWS", 16)
    rng = np.random.default_rng(1)
    w, x = weights(rng, 50, 128), inputs(rng, 300, 128)
    h = hessian(x, x + inputs(rng, 300, 128) / np.float32(20))
    one, three = (
        solve_matrix(w, h, QuantSpec(3, 32), dtype=BF16, effort=EFFORTS["standard"], threads=n) for n in (1, 3)
    )
    for a, b in zip(one, three, strict=True):
        np.testing.assert_array_equal(a, b)
    words, scales, biases = one.packed()
    np.testing.assert_array_equal(dequantize(QMatrix(words, scales, biases, 3, 32)), one.weights())
    assert one.error == pytest.approx(objective(one.weights() - w, h.gram).sum() / 300, rel=1e-4)


def test_blas_has_one_thread_for_a_while() -> None:
    functions = _openblas()
    with one_blas_thread():
        assert functions is None or functions[0]() == 1
    if functions is not None:
        before = functions[0]()
        functions[1](2)
        with one_blas_thread():
            assert functions[0]() == 1
        assert functions[0]() == 2
        functions[1](before)


def test_correction_is_least_squares() -> None:
    """In full it is the minimum of |W' x - W x_float|^2 + damping |W' - W|^2, here by a solver for stacked rows."""
    rng = np.random.default_rng(2)
    w, x = weights(rng, 8, 32), inputs(rng, 200, 32)
    x_float = x + inputs(rng, 200, 32) / np.float32(10)
    h = hessian(x, x_float)
    stacked = np.vstack([x, np.sqrt(h.damping) * np.eye(32)])
    wanted = np.vstack([x_float @ w.T, np.sqrt(h.damping) * w.T])
    np.testing.assert_allclose(corrected(w, h, 1.0), np.linalg.lstsq(stacked, wanted)[0].T, rtol=2e-3, atol=2e-5)
    np.testing.assert_allclose(corrected(w, h, 0.5), (corrected(w, h, 1.0) + w) / 2, atol=1e-7)
    assert corrected(w, hessian(x), 0.5) is w


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("effort", EFFORTS.values())
def test_little_text_is_enough_for_an_answer(tokens: int, effort: Effort) -> None:
    """Nothing read, one token, three: no worse on the weights themselves than a few times rounding to nearest."""
    rng = np.random.default_rng(3)
    w, h = weights(rng, 16, 64), Hessian(64)
    h.add(inputs(rng, tokens, 64), inputs(rng, tokens, 64))
    solved = solve_matrix(w, h, QuantSpec(4, 64), dtype=BF16, effort=effort)
    assert np.isfinite(solved.weights()).all()
    assert solved.error < 1e6


@pytest.mark.parametrize("value", [0.0, 1.0, -3e-5, 1e9])
def test_matrices_without_variety_are_met(value: float) -> None:
    """Constant rows need no code but 0: what is stored is the value itself."""
    h = hessian(inputs(np.random.default_rng(4), 100, 64))
    solved = solve_matrix(np.full((4, 64), value, np.float32), h, QuantSpec(4, 32), dtype=BF16)
    stored = round_to(np.full((4, 64), value, np.float32), BF16)
    np.testing.assert_allclose(round_to(solved.weights(), BF16), stored, rtol=0.01)


def test_pieces_add_up_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeq.quant.calibrate.hessian._STRIP", 12)
    monkeypatch.setattr("edgeq.quant.calibrate.hessian._CORNER", 12)
    rng = np.random.default_rng(5)
    x, x_float = inputs(rng, 100, 32), inputs(rng, 100, 32)
    whole, pieces = hessian(x, x_float), Hessian(32)
    for part in np.split(np.arange(100), 4):
        pieces.add(x[part], x_float[part], threads=3)
    assert pieces.tokens == 100
    for one, other in zip(pieces.arrays().values(), whole.arrays().values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(pieces.gram, pieces.gram.T, rtol=1e-4, atol=1e-2)
    again = Hessian.of(whole.arrays())
    np.testing.assert_array_equal(again.factor, whole.factor)
    assert again.tokens == 100
    np.testing.assert_allclose(whole.factor @ whole.factor.T, whole.damped(), rtol=1e-3, atol=1e-2)
    b = rng.standard_normal((32, 5)).astype(np.float32)
    np.testing.assert_allclose(whole.solve(b), np.linalg.solve(whole.damped().astype(float), b), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_bad_activations_are_told(bad: float) -> None:
    x = np.ones((4, 32), np.float32)
    x[2, 3] = bad
    with pytest.raises(ModelError, match="activations"):
        hessian(x)


@pytest.mark.parametrize("bad", [np.nan, -np.inf, 1e30])
def test_bad_weights_are_told(bad: float) -> None:
    w = np.ones((4, 32), np.float32)
    w[1, 1] = bad
    with pytest.raises(ModelError, match="weights that are NaN"):
        solve_matrix(w, Hessian(32), QuantSpec(4, 32), dtype=BF16)
