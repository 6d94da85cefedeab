"""The native vision tower: what its bindings refuse, and what its results do not depend on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

_native = pytest.importorskip("edgeq.backends.cpu._native")

from edgeq.backends.numpy import NumpyOps  # noqa: E402
from edgeq.config import VisionConfig  # noqa: E402
from edgeq.formats.bf16 import Array, Float32, from_float32  # noqa: E402
from edgeq.model.vision import EPS, vision_blocks  # noqa: E402
from edgeq.testing import nmse  # noqa: E402
from edgeq.weights import Affine, VisionBlockWeights  # noqa: E402

HIDDEN, HEADS, WIDE = 80, 2, 200  # neither is a multiple of a group, a tile or a vector
LENGTHS = (300, 7)


@pytest.fixture(params=_native.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


def normal(*shape: int, scale: float = 1.0, seed: int = 1) -> Float32:
    return np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(scale)


def tower(matrix: Any) -> tuple[VisionBlockWeights[Array, Any], ...]:
    """Two blocks with random weights of 16 bits."""

    def affine(out: int, width: int, seed: int) -> Affine[Array, Any]:
        return Affine(matrix(from_float32(normal(out, width, scale=0.1, seed=seed))), normal(out, seed=seed + 1))

    norm = Affine(normal(HIDDEN, seed=5), normal(HIDDEN, seed=6))
    shapes = ((3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (WIDE, HIDDEN), (HIDDEN, WIDE))
    return tuple(
        VisionBlockWeights(norm, norm, *(affine(*shape, 10 * i + 7 * block) for i, shape in enumerate(shapes)))
        for block in range(2)
    )


X, COS, SIN = normal(sum(LENGTHS), HIDDEN), *(f(normal(sum(LENGTHS), HIDDEN // HEADS // 2)) for f in (np.cos, np.sin))


def run(x: Float32 = X, lengths: tuple[int, ...] = LENGTHS, rows: slice = slice(None)) -> Float32:
    out = np.empty_like(x[rows])
    angles = (np.ascontiguousarray(a[rows]) for a in (COS, SIN))
    _native.vision_blocks(x[rows], tower(_native.Matrix), HEADS, EPS, *angles, lengths, out)
    return out


def test_blocks_agree_with_numpy(isa: str) -> None:
    ops = NumpyOps()
    c = VisionConfig(
        depth=2, hidden_size=HIDDEN, intermediate_size=WIDE, num_heads=HEADS, in_channels=3, patch_size=16,
        temporal_patch_size=2, spatial_merge_size=2, num_position_embeddings=4, out_hidden_size=HIDDEN,
    )  # fmt: skip
    expected = vision_blocks(ops, X, tower(ops.matrix), c, (COS, SIN), LENGTHS)
    assert nmse(expected, run()) <= 1e-7  # sixteen products of codes, 4e-9 each


def test_results_depend_neither_on_threads_nor_on_other_frames() -> None:
    together, before = run(), _native.thread_count()
    for threads in (1, 3):
        _native.set_thread_count(threads)
        np.testing.assert_array_equal(run(), together)
    _native.set_thread_count(before)
    start = 0
    for length in LENGTHS:
        rows = slice(start, start := start + length)
        np.testing.assert_array_equal(run(lengths=(length,), rows=rows), together[rows])


def test_what_is_no_number_does_not_become_one(isa: str) -> None:
    for bad in (np.nan, np.inf):
        x = X.copy()
        x[3, 5] = bad
        out = run(x)
        assert np.isnan(out[: LENGTHS[0]]).all()  # every patch attends to this one
        assert np.isfinite(out[LENGTHS[0] :]).all()


@pytest.mark.parametrize("size", [1e-25, 1e-12, 1e12, 1e25])
def test_sizes_of_numbers(isa: str, size: float) -> None:
    x, w, bias = normal(7, 90), normal(5, 90), np.zeros(5, np.float32)
    _native.affine(x * np.float32(size), _native.Matrix(w), bias, out := np.empty((7, 5), np.float32))
    assert nmse(x @ w.T, out / np.float32(size)) <= 3e-8


def test_weights_of_every_size(isa: str) -> None:
    x, bias = normal(7, 300), normal(70)
    w = normal(70, 300) * np.geomspace(1e-3, 1e3, 70, dtype=np.float32)[:, None]
    for stored in (w, w.astype(np.float16), from_float32(w)):
        exact = NumpyOps().linear(np.eye(300, dtype=np.float32), stored).T
        _native.affine(x, _native.Matrix(stored), bias, out := np.empty((7, 70), np.float32))
        expected = x.astype(np.float64) @ exact.T + bias
        assert max(nmse(expected[:, i], out[:, i]) for i in range(70)) <= 3e-7  # seven numbers each


def test_refused() -> None:
    q = normal(4, 2, 16)
    with pytest.raises(ValueError, match="lengths"):
        _native.full_attention(q, q, q, (3,), np.empty_like(q))
    with pytest.raises(ValueError, match="lengths"):
        _native.full_attention(q, q, q, (4, 0), np.empty_like(q))
    with pytest.raises(ValueError, match="k: expected shape"):
        _native.full_attention(q, q[:3], q, (4,), np.empty_like(q))
    with pytest.raises(ValueError, match="bias"):
        _native.affine(X, _native.Matrix(normal(5, HIDDEN)), normal(4), np.empty((len(X), 5), np.float32))
    with pytest.raises(ValueError, match="columns"):
        _native.affine(X, _native.Matrix(normal(5, 32)), normal(5), np.empty((len(X), 5), np.float32))
    with pytest.raises(ValueError, match="heads"):
        _native.vision_blocks(X, tower(_native.Matrix), 3, EPS, COS, SIN, LENGTHS, np.empty_like(X))
    with pytest.raises(ValueError, match="gain"):
        _native.layer_norm(X, normal(3), normal(HIDDEN), EPS, np.empty_like(X))
    with pytest.raises(ValueError, match="out"):
        _native.gelu(X, True, np.empty((3, 3), np.float32))
    blocks = tower(_native.Matrix)
    wrong = blocks[0]._replace(fc2=blocks[0].proj)
    with pytest.raises(ValueError, match="fc2"):
        _native.vision_blocks(X, (wrong,), HEADS, EPS, COS, SIN, LENGTHS, np.empty_like(X))
    with pytest.raises(ValueError, match="VisionBlockWeights"):
        _native.vision_blocks(X, ((1, 2),), HEADS, EPS, COS, SIN, LENGTHS, np.empty_like(X))
