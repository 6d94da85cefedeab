"""The native matrix kernels against NumPy: the same integer arithmetic, and the effect of quantizing activations."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gguf_forms import FORMS, Form, gguf_matrix
from numpy.typing import NDArray
from process import run_python

from edgeq.formats.affine import dequantize, group_numbers, pack, unpack
from edgeq.formats.bf16 import from_float32, round_to, to_float32
from edgeq.formats.codebooks import VALUES
from edgeq.formats.qmatrix import TwoLevel, UpperHalves
from edgeq.testing import nmse
from edgeq.weights import QMatrix

native = pytest.importorskip(
    "edgeq.backends.cpu._native", reason="the native backend is not compiled", exc_type=ImportError
)

from edgeq.backends.cpu import CpuOps  # noqa: E402

Array = NDArray[Any]
DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}


Parts = tuple[Array, Array, Array, int, int]  # codes, scales, biases, bits, group size


@pytest.fixture(params=native.isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs on every instruction set that is here."""
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def quantized(rng: np.random.Generator, out: int, width: int, bits: int, group: int, dtype: Any = np.uint16) -> Parts:
    """Codes, scales, biases as random weights of about unit variance would have them."""
    codes = pack(rng.integers(0, 1 << bits, (out, width)), bits)
    scales = (rng.uniform(0.5, 1.5, (out, width // group)) * 4 / (1 << bits)).astype(np.float32)
    biases = (-scales * ((1 << bits) - 1) / 2 + rng.normal(0, 0.1, scales.shape)).astype(np.float32)
    return codes, round_to(scales, dtype), round_to(biases, dtype), bits, group


def multiply(x: Array, w: Any) -> Array:
    out = np.full((x.shape[0], w.shape[0]), np.nan, np.float32)
    native.linear(x, w, out)
    return out


def emulate(x: Array, w: QMatrix[Array]) -> Array:
    """The kernels' arithmetic: activations in int8 by groups, integer sums, float64 from there on; with E4M3 codes
    floats throughout."""
    if w.mode == "mxfp8":
        return x.astype(np.float64) @ dequantize(w).T
    groups = x.reshape(x.shape[0], -1, w.group_size)
    amax = np.abs(groups).max(-1, keepdims=True)
    q = np.rint(groups * (np.float32(127) / amax)).astype(np.int64)
    a = (amax / np.float32(127)).astype(np.float64)[..., 0]
    c: Array = unpack(w.codes, w.bits)
    c = (c if w.mode == "affine" else VALUES[w.mode][c]).astype(np.float64).reshape(len(c), -1, w.group_size)
    dots = np.einsum("tgi,ogi->tog", q, c)
    s, b = (v.astype(np.float64) for v in group_numbers(w))
    products: Array = np.einsum("tog,og,tg->to", dots, s, a)
    offsets: Array = np.einsum("tg,og,tg->to", q.sum(-1).astype(np.float64), b, a)
    return products + offsets


@pytest.mark.parametrize("tokens", [1, 3, 4, 6, 19])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_arithmetic(bits: int, group: int, tokens: int) -> None:
    """Equal to the emulation up to float32 rounding of 15 group sums: relative error 1e-6, NMSE 1e-12."""
    rng = np.random.default_rng(bits * group + tokens)
    parts = quantized(rng, 35, 5 * group, bits, group)
    x = rng.normal(size=(tokens, 5 * group)).astype(np.float32)
    assert nmse(emulate(x, QMatrix(*parts)), multiply(x, native.Matrix(*parts))) < 1e-12


@pytest.mark.parametrize("tokens", [1, 3, 6, 19])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_arithmetic_of_gguf_s_types(form: Form, tokens: int) -> None:
    """The same; 768 weights are 24 groups of 32, so that the last sixteen are only eight. Where codes and bias nearly
    cancel (zero 128, and iq4, whose codes the kernels have 128 higher), rounding weighs more."""
    rng = np.random.default_rng(tokens)
    w = gguf_matrix(rng, form, 35, 768)
    x = rng.normal(size=(tokens, 768)).astype(np.float32)
    bound = 1e-11 if form.zero == 128 or form.mode == "iq4" else 1e-12
    assert nmse(emulate(x, w), multiply(x, CpuOps().matrix(w))) < bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 7, 17])
def test_dtypes_of_scales(dtype: str, tokens: int) -> None:
    rng = np.random.default_rng(7)
    parts = quantized(rng, 9, 1152, 4, 64, DTYPES[dtype])  # 18 groups: more than 16, and no multiple of 4
    x = rng.normal(size=(tokens, 1152)).astype(np.float32)
    assert nmse(emulate(x, QMatrix(*parts)), multiply(x, native.Matrix(*parts))) < 1e-12


@pytest.mark.parametrize("bits", [4, 8])
def test_quantizing_activations_costs_little(bits: int) -> None:
    """int8 by groups of 64: relative error of an activation about 1/127/sqrt(12) of the group's largest, so about
    4e-5 of normal activations' power (the largest of 64 is some 2.4 standard deviations)."""
    rng = np.random.default_rng(bits)
    parts = quantized(rng, 256, 1024, bits, 64)
    x = rng.normal(size=(8, 1024)).astype(np.float32)
    assert nmse(x @ dequantize(QMatrix(*parts)).T, multiply(x, native.Matrix(*parts))) < 6e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (2, 31), (4, 1), (23, 200), (70, 129)])
def test_plain(dtype: str, tokens: int, width: int) -> None:
    """Exact products, float32 sums: NMSE 1e-12."""
    rng = np.random.default_rng(width)
    values = round_to(rng.normal(size=(37, width)).astype(np.float32), DTYPES[dtype])
    x = rng.normal(size=(tokens, width)).astype(np.float32)
    expected = x.astype(np.float64) @ to_float32(values).astype(np.float64).T
    assert nmse(expected, multiply(x, native.Matrix(values))) < 1e-12


def test_several_matrices_equal_one_at_a_time() -> None:
    rng = np.random.default_rng(1)
    ws = [native.Matrix(*quantized(rng, n, 256, bits, 64)) for n, bits in ((40, 4), (300, 4), (16, 8))]
    ws.append(native.Matrix(from_float32(rng.normal(size=(16, 256)).astype(np.float32))))
    for tokens in (1, 6, 20):
        x = rng.normal(size=(tokens, 256)).astype(np.float32)
        outs = [np.empty((tokens, w.shape[0]), np.float32) for w in ws]
        native.linears(x, ws, outs)
        for w, out in zip(ws, outs, strict=True):
            np.testing.assert_array_equal(out, multiply(x, w))


def test_tokens_do_not_depend_on_company() -> None:
    """Within gemv and within gemm every token is computed alone: the same row, whatever stands beside it."""
    rng = np.random.default_rng(2)
    w = native.Matrix(*quantized(rng, 100, 512, 4, 64))
    x = rng.normal(size=(40, 512)).astype(np.float32)
    many = multiply(x, w)
    np.testing.assert_array_equal(multiply(x[3:23].copy(), w), many[3:23])
    few = multiply(x[:6].copy(), w)
    np.testing.assert_array_equal(multiply(x[2:3].copy(), w), few[2:3])
    assert nmse(many[:6], few) < 1e-12


def test_scales_and_biases_in_the_same_units() -> None:
    """Q2_K's two halves of a byte are told apart even where one array has the units of both."""
    rng = np.random.default_rng(6)
    w = gguf_matrix(rng, FORMS["Q2_K"], 40, 512)
    assert isinstance(w.scales, TwoLevel)
    units = w.scales.units
    x = rng.normal(size=(40, 512)).astype(np.float32)
    shared = w.replaced(biases=UpperHalves(units))
    apart = w.replaced(biases=UpperHalves(units.copy()))
    np.testing.assert_array_equal(multiply(x, CpuOps().matrix(shared)), multiply(x, CpuOps().matrix(apart)))


def test_threads_do_not_change_results() -> None:
    rng = np.random.default_rng(3)
    w = native.Matrix(*quantized(rng, 777, 1024, 4, 64))
    before = native.thread_count()
    try:
        for tokens in (1, 33):
            x = rng.normal(size=(tokens, 1024)).astype(np.float32)
            results = []
            for threads in (1, 2, 3, 4):
                native.set_thread_count(threads)
                results.append(multiply(x, w))
            for result in results[1:]:
                np.testing.assert_array_equal(result, results[0])
    finally:
        native.set_thread_count(before)


def test_two_models_at_once() -> None:
    rng = np.random.default_rng(4)
    w = native.Matrix(*quantized(rng, 500, 512, 4, 64))
    xs = [rng.normal(size=(1, 512)).astype(np.float32) for _ in range(3)]
    expected = [multiply(x, w) for x in xs]
    wrong = []

    def work(i: int) -> None:
        for _ in range(50):
            if not np.array_equal(multiply(xs[i], w), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
def test_embed_is_dequantize(bits: int) -> None:
    rng = np.random.default_rng(bits)
    parts = quantized(rng, 50, 320, bits, 64)
    ids = np.array([0, 49, 7, 7, 31, 2, 3, 4, 5, 6], np.int32)
    out = np.empty((10, 320), np.float32)
    native.embed(native.Matrix(*parts), ids, out)
    np.testing.assert_array_equal(out, dequantize(QMatrix(*parts))[ids])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_embed_is_dequantize_for_gguf_s_types(form: Form) -> None:
    w = gguf_matrix(np.random.default_rng(5), form, 20, 768)
    ids, out = np.array([19, 0, 7], np.int32), np.empty((3, 768), np.float32)
    native.embed(CpuOps().matrix(w), ids, out)
    np.testing.assert_array_equal(out, dequantize(w)[ids])


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed_plain(dtype: str) -> None:
    values = round_to(np.linspace(-3, 3, 60, dtype=np.float32).reshape(6, 10), DTYPES[dtype])
    out = np.empty((2, 10), np.float32)
    native.embed(native.Matrix(values), np.array([5, 0], np.int32), out)
    np.testing.assert_array_equal(out, to_float32(values)[[5, 0]])


def test_read_only_weights_are_used_in_place() -> None:
    rng = np.random.default_rng(5)
    codes, scales, biases, bits, group = quantized(rng, 8, 128, 4, 64)
    for part in (codes, scales, biases):
        part.flags.writeable = False
    w = native.Matrix(codes, scales, biases, bits, group)
    assert w.shape == (8, 128)
    assert w.nbytes == codes.nbytes + scales.nbytes + biases.nbytes


class TestBadInput:
    """Nothing wrong reaches a kernel."""

    @pytest.fixture
    def parts(self) -> Parts:
        return quantized(np.random.default_rng(0), 8, 128, 4, 64)

    def test_bits(self, parts: Parts) -> None:
        for bits in (0, 1, 7, 9, 16):
            with pytest.raises(ValueError, match="bits"):
                native.Matrix(*parts[:3], bits, 64)

    def test_group(self, parts: Parts) -> None:
        for group in (0, 16, 48, 256):
            with pytest.raises(ValueError, match="group_size"):
                native.Matrix(*parts[:4], group)

    def test_shapes(self, parts: Parts) -> None:
        codes, scales, biases, bits, group = parts
        with pytest.raises(ValueError, match="scales: expected shape"):
            native.Matrix(codes, scales[:, :1].copy(), biases, bits, group)
        with pytest.raises(ValueError, match="biases: expected shape"):
            native.Matrix(codes, scales, biases[:4], bits, group)
        with pytest.raises(ValueError, match="codes: expected rows that are whole groups, found"):
            native.Matrix(codes[:, :12].copy(), scales, biases, bits, group)
        with pytest.raises(ValueError, match="codes: expected rows that are whole groups, found"):
            native.Matrix(codes[:0], scales[:0], biases[:0], bits, group)

    def test_dtypes(self, parts: Parts) -> None:
        codes, scales, biases, bits, group = parts
        with pytest.raises(TypeError):
            native.Matrix(codes.view(np.int32), scales, biases, bits, group)
        with pytest.raises(TypeError):
            native.Matrix(codes, scales.astype(np.int32), biases.astype(np.int32), bits, group)
        with pytest.raises(ValueError, match="biases: expected the dtype"):
            native.Matrix(codes, scales, biases.view(np.float16), bits, group)
        with pytest.raises(TypeError):
            native.Matrix(np.zeros((2, 2), np.float64))

    def test_gguf_s_fields(self) -> None:
        w = gguf_matrix(np.random.default_rng(0), FORMS["Q4_K"], 8, 512)
        assert CpuOps().matrix(w).nbytes == sum(x.nbytes for x in w.arrays)
        assert isinstance(w.scales, TwoLevel)
        assert isinstance(w.biases, TwoLevel)
        right = {
            "codes": w.codes, "scales": w.scales.steps, "biases": w.biases.steps, "bits": 4, "group_size": 32,
            "block_scales": w.scales.units, "block_biases": w.biases.units,
        }  # fmt: skip
        wrong = {
            "block_biases: expected with biases": {"block_biases": None},
            "scales: expected the dtype": {"scales": w.scales.steps.astype(np.float16)},
            "scales: expected float32, float16": {"block_scales": None, "block_biases": None},
            "block_scales: expected the dtype": {"block_scales": w.scales.units.astype(np.float32)},
            "block_scales: expected one number for 4, 8 or 16": {"block_scales": np.ones((8, 16), np.float16)},
            "block_biases: expected shape": {"block_biases": np.ones((8, 4), np.float16)},
            "zero: expected 0 to 128": {"zero": 129},
            "iq4: expected 4 bits": {"mode": "iq4", "bits": 8, "codes": np.repeat(w.codes, 2, axis=1)},
            "iq4: expected no biases": {"mode": "iq4"},
            "mode: expected affine, iq4": {"mode": "nf4"},
            "mxfp4: expected no biases": {"mode": "mxfp4"},
            "biases: expected none beside": {"scales": w.scales.steps.view(np.uint8)},
            "block_scales: expected none in this mode": {
                "mode": "mxfp4",
                "scales": w.scales.steps.view(np.uint8),
                "biases": None,
                "block_biases": None,
            },
        }
        for message, change in wrong.items():
            with pytest.raises((ValueError, TypeError), match=message):
                native.Matrix(**(right | change))

    def test_strides(self, parts: Parts) -> None:
        codes, scales, biases, bits, group = parts
        with pytest.raises(TypeError):
            native.Matrix(np.asfortranarray(codes), scales, biases, bits, group)
        with pytest.raises(TypeError):
            multiply_into(parts, np.zeros((2, 256), np.float32)[:, ::2], np.empty((2, 8), np.float32))

    def test_misaligned(self, parts: Parts) -> None:
        codes, scales, biases, bits, group = parts
        raw = np.zeros(codes.nbytes + 1, np.uint8)
        shifted = raw[1:].view(np.uint32).reshape(codes.shape)
        with pytest.raises(ValueError, match="codes: expected aligned data"):
            native.Matrix(shifted, scales, biases, bits, group)

    def test_product(self, parts: Parts) -> None:
        x, out = np.zeros((2, 128), np.float32), np.empty((2, 8), np.float32)
        with pytest.raises(ValueError, match="x: expected 128 columns"):
            multiply_into(parts, np.zeros((2, 64), np.float32), out)
        with pytest.raises(ValueError, match="out: expected shape"):
            multiply_into(parts, x, np.empty((2, 7), np.float32))
        with pytest.raises(ValueError, match="out: expected shape"):
            multiply_into(parts, x, np.empty((1, 8), np.float32))
        with pytest.raises(TypeError):
            multiply_into(parts, x.astype(np.float64), out)
        with pytest.raises(TypeError):
            multiply_into(parts, x[0], out)
        out.flags.writeable = False
        with pytest.raises(TypeError):
            multiply_into(parts, x, out)

    def test_several(self, parts: Parts) -> None:
        w, x = native.Matrix(*parts), np.zeros((1, 128), np.float32)
        out = np.empty((1, 8), np.float32)
        for ws, outs in (([], []), ([w], []), ([w, w], [out])):
            with pytest.raises(ValueError, match=r"ws: expected at least one|outs: expected one array for each matrix"):
                native.linears(x, ws, outs)
        for ws, outs, name in ((["w"], [out], "ws"), ([None], [out], "ws"), (w, [out], "ws"), ([w], [out[0]], "outs")):
            with pytest.raises(TypeError, match=f"{name}: expected"):
                native.linears(x, ws, outs)

    def test_ids(self, parts: Parts) -> None:
        table, out = native.Matrix(*parts), np.empty((1, 128), np.float32)
        for bad in (-1, 8, 2**31 - 1):
            with pytest.raises(ValueError, match="ids: expected 0 to 7, found"):
                native.embed(table, np.array([bad], np.int32), out)

    def test_no_tokens(self, parts: Parts) -> None:
        multiply_into(parts, np.zeros((0, 128), np.float32), np.empty((0, 8), np.float32))

    def test_threads(self) -> None:
        for threads in (0, -1, 5000):
            with pytest.raises(ValueError, match="threads"):
                native.set_thread_count(threads)

    def test_isa(self) -> None:
        with pytest.raises(RuntimeError, match="unknown instruction set 'mmx'; here: scalar"):
            native.set_isa("mmx")


def multiply_into(parts: Parts, x: Array, out: Array) -> None:
    native.linear(x, native.Matrix(*parts), out)


def test_forcing_by_environment(isa: str) -> None:
    code = "from edgeq.backends.cpu import _native; print(_native.isa())"
    for name, expected in ((isa, isa), ("mmx", "unknown instruction set 'mmx'")):
        done = run_python(code, EDGEQ_ISA=name)
        assert expected in done.stdout + done.stderr


def test_after_fork() -> None:
    rng = np.random.default_rng(6)
    w = native.Matrix(*quantized(rng, 500, 512, 4, 64))
    x = rng.normal(size=(1, 512)).astype(np.float32)
    expected = multiply(x, w)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(multiply(x, w), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
