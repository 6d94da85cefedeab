"""Group-wise affine quantization: packing, error bounds, the search against min-max, native against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.formats.affine import BITS, GROUP_SIZES, dequantize, pack, unpack
from edgeq.formats.bf16 import Array, Float32, from_float32, round_to, to_float32
from edgeq.quant import matrix
from edgeq.quant.matrix import QuantizedRows, quantize_rows, quantize_rows_numpy
from edgeq.quant.search import min_max, search
from edgeq.weights import QMatrix

BF16, F16, F32 = np.dtype(np.uint16), np.dtype(np.float16), np.dtype(np.float32)
_native: Any = vars(matrix).get("_native")  # not there without a C++ compiler
native = pytest.mark.skipif(_native is None, reason="the native extension is not built")


def weights(kind: str, rows: int = 64, columns: int = 256, seed: int = 0) -> Float32:
    """Weights as they occur, and as they should not."""
    rng = np.random.default_rng(seed)
    x: Array = rng.standard_normal((rows, columns))
    match kind:
        case "heavy-tailed":
            x = rng.standard_t(3, x.shape)
        case "uniform":
            x = rng.uniform(-1, 1, x.shape)
        case "like a real matrix":  # rows and columns of different scale, one weight in 2,000 five times as large
            x *= np.exp(0.2 * rng.standard_normal((rows, 1))) * np.exp(0.1 * rng.standard_normal((1, columns)))
            x *= np.where(rng.random(x.shape) < 1 / 2000, 5, 1)
            x = to_float32(from_float32((0.02 * x).astype(np.float32)))
        case "one outlier":
            x = 1e-3 * x
            x[:, 5] = 1e3
        case "constant":
            x[:] = 0.3
        case "zero":
            x[:] = 0
        case "three values":
            x = 0.01 * rng.integers(-1, 2, x.shape)
        case "positive":
            x = 5 + np.abs(x)
        case "tiny":
            x = 1e-12 * x
        case "huge":
            x = 1e34 * x
    return x.astype(np.float32)


KINDS = ("gaussian", "heavy-tailed", "uniform", "like a real matrix", "one outlier", "constant", "zero", "three values",
         "positive", "tiny", "huge")  # fmt: skip


def decode(q: QuantizedRows, bits: int, group_size: int) -> Float32:
    return dequantize(QMatrix(q.codes, q.scales, q.biases, bits, group_size))


def squared_error(x: Float32, decoded: Float32) -> float:
    return float(np.sum((decoded.astype(np.float64) - x) ** 2))


def min_max_rows(x: Float32, bits: int, group_size: int, dtype: np.dtype[Any] = BF16) -> Float32:
    """What min-max gives, stored in 16 bits: decoded weights."""
    groups = x.reshape(-1, group_size).T
    scale, bias = (to_float32(round_to(v, dtype)) for v in min_max(groups, np.float32(2**bits - 1), np.float32(1e-7)))
    codes = np.rint(np.clip((groups - bias) / np.where(scale == 0, 1, scale), 0, 2**bits - 1))
    return (scale * codes + bias).T.reshape(x.shape).astype(np.float32)


class TestPacking:
    @given(st.data())
    def test_unpack_inverts_pack(self, data: st.DataObject) -> None:
        bits = data.draw(st.sampled_from(BITS))
        rows, blocks = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
        codes = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 1 << bits, (rows, 32 * blocks))
        words = pack(codes, bits)
        assert words.dtype == np.uint32
        assert words.shape == (rows, bits * blocks)
        assert np.array_equal(unpack(words, bits), codes)

    @pytest.mark.parametrize("bits", BITS)
    def test_is_one_little_endian_bit_stream(self, bits: int) -> None:
        codes = np.random.default_rng(bits).integers(0, 1 << bits, 64)
        stream = np.unpackbits(pack(codes, bits).astype("<u4").view(np.uint8), bitorder="little")
        assert np.array_equal(stream.reshape(-1, bits) @ (1 << np.arange(bits)), codes)


class TestSearch:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("bits", BITS)
    def test_never_worse_than_min_max(self, kind: str, bits: int) -> None:
        x = weights(kind, rows=16)
        for group_size in GROUP_SIZES:
            groups = x.reshape(-1, group_size).astype(np.float64)
            ours = decode(quantize_rows_numpy(x, bits, group_size, BF16), bits, group_size).reshape(groups.shape)
            theirs = min_max_rows(x, bits, group_size).reshape(groups.shape)
            # Errors are summed in float32: group for group they may differ by its rounding, 64 additions deep.
            ours_error, theirs_error = (((y - groups) ** 2).sum(1) for y in (ours, theirs))
            assert np.all(ours_error <= theirs_error * (1 + 1e-5) + 1e-30)

    # What the search is for. The margins are what it reached when written, rounded up by about half a percent.
    @pytest.mark.parametrize(("bits", "factor"), [(4, 0.82), (5, 0.845), (6, 0.845), (8, 0.87)])
    @pytest.mark.parametrize("kind", ["gaussian", "heavy-tailed", "like a real matrix"])
    def test_beats_min_max(self, kind: str, bits: int, factor: float) -> None:
        x = weights(kind, rows=256, columns=512)
        ours = squared_error(x, decode(quantize_rows_numpy(x, bits, 64, BF16), bits, 64))
        assert ours <= factor * squared_error(x, min_max_rows(x, bits, 64))

    @pytest.mark.parametrize("bits", BITS)
    def test_every_weight_is_near(self, bits: int) -> None:
        """Plain rounding errs by half a step at most; the search may clip the extremes for the sake of the rest."""
        x = weights("gaussian")
        groups = x.reshape(-1, 64)
        step = (groups.max(1) - groups.min(1)) / (2**bits - 1)
        q = quantize_rows_numpy(x, bits, 64, F32)
        error = np.abs(decode(q, bits, 64) - x).reshape(groups.shape)
        assert np.all(error.max(1) <= 4.5 * step)
        assert np.sqrt((error**2).mean()) <= np.sqrt((step**2).mean() / 12) * 1.05

    @pytest.mark.parametrize("dtype", [BF16, F16, F32])
    def test_errors_are_those_of_the_stored_values(self, dtype: np.dtype[Any]) -> None:
        x = weights("heavy-tailed")
        for bits in (4, 8):
            q = quantize_rows_numpy(x, bits, 64, dtype)
            assert q.scales.dtype == q.biases.dtype == dtype
            assert q.squared_error == pytest.approx(squared_error(x, decode(q, bits, 64)), rel=1e-4)

    @pytest.mark.parametrize("bits", BITS)
    def test_codes_are_the_nearest_to_the_stored_values(self, bits: int) -> None:
        x = weights("gaussian", rows=8)
        q = quantize_rows_numpy(x, bits, 64, BF16)
        scale, bias = (np.repeat(to_float32(v), 64, axis=1) for v in (q.scales, q.biases))
        nearest = np.clip((x - bias) / scale, 0, 2**bits - 1)
        assert np.abs(unpack(q.codes, bits) - nearest).max() <= 0.5 + 1e-3

    @pytest.mark.parametrize("kind", ["zero", "constant", "three values"])
    def test_groups_of_few_values_are_exact(self, kind: str) -> None:
        x = to_float32(from_float32(weights(kind)))
        decoded = decode(quantize_rows_numpy(x, 4, 64, BF16), 4, 64)
        assert squared_error(x, decoded) <= 1e-5 * np.sum(x.astype(np.float64) ** 2)

    def test_zero_stays_zero(self) -> None:
        q = quantize_rows_numpy(weights("zero"), 4, 64, BF16)
        assert not decode(q, 4, 64).any()

    def test_one_group_alone_equals_one_of_many(self) -> None:
        groups = weights("gaussian", rows=8, columns=64)
        together = search(groups, 4, BF16)
        for i in range(len(groups)):
            alone = search(groups[i : i + 1], 4, BF16)
            assert np.array_equal(alone.codes[0], together.codes[i])
            assert (alone.scales[0], alone.biases[0]) == (together.scales[i], together.biases[i])

    def test_min_max_is_the_rule_of_mlx(self) -> None:
        mx = pytest.importorskip("mlx.core")
        x = weights("like a real matrix")
        codes, scales, biases = mx.quantize(mx.array(x), group_size=64, bits=4)
        scale, bias = min_max(np.ascontiguousarray(x.reshape(-1, 64).T), np.float32(15), np.float32(1e-7))
        np.testing.assert_allclose(scale, np.array(scales).ravel(), rtol=1e-6)
        np.testing.assert_allclose(bias, np.array(biases).ravel(), rtol=1e-6)
        ours = decode(quantize_rows_numpy(x, 4, 64, F32), 4, 64)
        theirs = np.array(mx.dequantize(codes, scales, biases, group_size=64, bits=4))
        assert squared_error(x, ours) <= 0.81 * squared_error(x, theirs)

    def test_mlx_decodes_the_same(self) -> None:
        mx = pytest.importorskip("mlx.core")
        x = weights("gaussian")
        for bits in BITS:
            q = quantize_rows_numpy(x, bits, 64, F32)
            theirs = mx.dequantize(*(mx.array(v) for v in q[:3]), group_size=64, bits=bits)
            np.testing.assert_allclose(np.array(theirs), decode(q, bits, 64), rtol=1e-6, atol=1e-7)


@native
class TestNative:
    """The native search does the same operations in the same order: equality, not closeness."""

    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_gives_the_same_bits(self, kind: str, bits: int) -> None:
        x = weights(kind, rows=2, columns=384)
        for group_size in GROUP_SIZES:
            self.compare(x, bits, group_size, BF16)
        self.compare(x, bits, 64, F32)
        if kind != "huge":  # for float16
            self.compare(x, bits, 64, F16)

    @given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 999), st.sampled_from(BITS))
    @settings(max_examples=40, deadline=None)
    def test_of_any_shape(self, rows: int, groups: int, seed: int, bits: int) -> None:
        self.compare(weights("heavy-tailed", rows, 32 * groups, seed), bits, 32, BF16)

    @staticmethod
    def compare(x: Float32, bits: int, group_size: int, dtype: np.dtype[Any]) -> None:
        ours, twin = quantize_rows(x, bits, group_size, dtype), quantize_rows_numpy(x, bits, group_size, dtype)
        for a, b in zip(ours[:3], twin[:3], strict=True):
            assert a.dtype == b.dtype
            assert np.array_equal(a, b)
        assert ours.squared_error == pytest.approx(twin.squared_error, rel=1e-12)

    def test_refuses_what_does_not_fit(self) -> None:
        x = weights("gaussian", rows=2, columns=64)
        codes, factors = np.empty((2, 8), np.uint32), [np.empty((2, 1), np.float32) for _ in range(3)]
        _native.quantize(x, 4, 64, "bfloat16", codes, *factors)
        for arguments in ((x, 7, 64, "bfloat16"), (x, 4, 48, "bfloat16"), (x, 4, 128, "bfloat16"), (x, 4, 64, "half")):
            with pytest.raises(ValueError, match=r": expected"):
                _native.quantize(*arguments, codes, *factors)
        with pytest.raises(ValueError, match="words: expected shape"):
            _native.quantize(x, 8, 64, "bfloat16", codes, *factors)
