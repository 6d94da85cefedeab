"""The native layers: every instruction set of this machine against scalar, the real sizes, and bad input refused."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from process import run_python

from edgeq.backends.numpy import NumpyOps
from edgeq.config import RopeConfig
from edgeq.formats.affine import pack
from edgeq.formats.bf16 import Array, to_float32
from edgeq.model import rotary
from edgeq.testing import nmse
from edgeq.weights import MLPWeights, QMatrix

native = pytest.importorskip(
    "edgeq.backends.cpu._native", reason="the native kernels are not built", exc_type=ImportError
)

from edgeq.backends.cpu import CpuOps  # noqa: E402
from edgeq.backends.cpu.kv import PAGE, NativeKV  # noqa: E402
from edgeq.errors import UsageError  # noqa: E402

# Between instruction sets only the order of float32 sums and the fusing of multiply-adds differ: 6e-8 an operation,
# a few dozen operations deep; the delta rule feeds its errors back.
SUMS = 1e-12
RECURRENT = 1e-10

FAST = [isa for isa in native.isas() if isa != "scalar"]


@pytest.fixture(autouse=True)
def _same_isa_after() -> Iterator[None]:
    before = native.isa()
    yield
    native.set_isa(before)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(21)


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape, np.float32)


def compare(isa: str, compute: Callable[[], Any], bound: float) -> None:
    """`compute` under `isa` and under scalar; results are arrays or (nested) sequences of them."""

    def arrays(x: Any) -> list[Array]:
        return [x] if isinstance(x, np.ndarray) else [a for part in x for a in arrays(part)]

    results = []
    for name in ("scalar", isa):
        native.set_isa(name)
        results.append(arrays(compute()))
    for slow, fast in zip(*results, strict=True):
        assert np.all(np.isfinite(fast))
        assert nmse(slow, fast) <= bound


# --- instruction sets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", FAST)
@pytest.mark.parametrize("n", [1, 3, 15, 16, 17, 31, 33, 128, 1000])
def test_rows(isa: str, rng: np.random.Generator, n: int) -> None:
    ops, x, y, gain = CpuOps(), 5 * normal(rng, 7, n), 5 * normal(rng, 7, n), normal(rng, n)
    compare(isa, lambda: ops.add(x, y), 0.0)
    compare(isa, lambda: ops.silu_mul(x, y), SUMS)
    compare(isa, lambda: ops.sigmoid_mul(x, y), SUMS)
    compare(isa, lambda: ops.rms_norm(x, gain, 1e-6), SUMS)
    compare(isa, lambda: ops.gated_rms_norm(x, gain, y, 1e-6), SUMS)
    compare(isa, lambda: ops.l2_norm(x, 1e-6), SUMS)


@pytest.mark.parametrize("isa", FAST)
@pytest.mark.parametrize(("T", "channels", "width"), [(1, 6144, 4), (70, 37, 4), (9, 130, 3), (2, 129, 8)])
def test_convolution(isa: str, rng: np.random.Generator, T: int, channels: int, width: int) -> None:
    x, w, tail = normal(rng, T, channels), normal(rng, channels, width), normal(rng, width - 1, channels)
    compare(isa, lambda: CpuOps().causal_conv_silu(x, w, tail, keep=1), SUMS)


@pytest.mark.parametrize("isa", native.isas())
def test_convolutions_of_any_width(isa: str, rng: np.random.Generator) -> None:
    """Against NumPy, whose sums of up to 64 products run in the same order, without fused multiply-adds."""
    native.set_isa(isa)
    for width in range(1, 65):
        for T, channels in ((1, 130), (70, 137)):
            x, w, tail = normal(rng, T, channels), normal(rng, channels, width), normal(rng, width - 1, channels)
            expected, _ = NumpyOps().causal_conv_silu(x, w, tail)
            native.causal_conv_silu(x, w, tail, found := np.empty_like(x))
            assert nmse(expected, found) <= SUMS, width


@pytest.mark.parametrize("isa", native.isas())
def test_mixers_with_convolutions_of_any_width(isa: str, rng: np.random.Generator) -> None:
    """The DeltaNet mixer against NumPy's operations, with the states before its last two tokens."""
    native.set_isa(isa)
    for width in range(1, 65):
        mixer, before = Mixer(rng, width), (normal(rng, width - 1, Mixer.C), normal(rng, Mixer.Hv, Mixer.V, Mixer.K))
        x = normal(rng, 9, Mixer.hidden)
        expected, states = mixer.numpy(x, before, keep=2)
        found = np.empty_like(x)
        (after,) = native.delta_net(x, mixer.weights, Mixer.Hk, 1e-6, [before], [len(x)], [2], tuple, found)
        assert nmse(expected, found) <= RECURRENT, width
        for (tail, matrix), (found_tail, found_matrix) in zip(states, after, strict=True):
            assert nmse(tail, found_tail) <= SUMS, width  # of the projection
            assert nmse(matrix, found_matrix) <= RECURRENT, width


class Mixer:
    """A DeltaNet mixer with random weights, native and as NumPy's operations one after another."""

    hidden, Hk, Hv, K, V = 12, 2, 4, 20, 17
    C = 2 * Hk * K + Hv * V

    def __init__(self, rng: np.random.Generator, width: int) -> None:
        rows = (self.C, self.Hv * self.V, self.Hv, self.Hv)
        self.projections = [normal(rng, n, self.hidden) / 4 for n in rows]
        self.out_proj = normal(rng, self.hidden, self.Hv * self.V)
        self.conv, self.decay = normal(rng, self.C, width) / width**0.5, -np.exp(normal(rng, self.Hv))
        self.bias, self.norm = normal(rng, self.Hv), normal(rng, self.V)
        matrices = [native.Matrix(w) for w in (*self.projections, self.out_proj)]
        self.weights = (*matrices[:4], self.conv, self.decay, self.bias, self.norm, matrices[4])

    def numpy(self, x: Array, before: tuple[Array, Array], keep: int) -> tuple[Array, list[tuple[Array, Array]]]:
        ops, T = NumpyOps(), len(x)
        qkv, z, b, a = (x @ w.T for w in self.projections)
        convolved, tails = ops.causal_conv_silu(qkv, self.conv, before[0], keep)
        q, k, v = np.split(convolved, [self.Hk * self.K, 2 * self.Hk * self.K], axis=1)
        q, k = (ops.l2_norm(part.reshape(T, self.Hk, self.K), 1e-6) for part in (q, k))
        g, beta = ops.delta_gates(a, b, self.decay, self.bias)
        o, matrices = ops.delta_rule(q, k, v.reshape(T, self.Hv, self.V), g, beta, before[1], keep)
        o = ops.gated_rms_norm(o, self.norm, z.reshape(o.shape), 1e-6)
        return o.reshape(T, -1) @ self.out_proj.T, list(zip(tails, matrices, strict=True))


@pytest.mark.parametrize("isa", FAST)
@pytest.mark.parametrize(("T", "K", "V"), [(1, 128, 128), (2, 128, 128), (97, 128, 128), (33, 40, 7), (5, 300, 9)])
def test_delta_rule(isa: str, rng: np.random.Generator, T: int, K: int, V: int) -> None:
    q, k = normal(rng, T, 2, K) / K**0.5, normal(rng, T, 2, K) / K**0.5
    v, g, beta = normal(rng, T, 4, V), -np.exp(2 * normal(rng, T, 4)), rng.uniform(0, 1, (T, 4)).astype(np.float32)
    state = native.empty(4 * 4 * V * K).view(np.float32).reshape(4, V, K)
    state[:] = normal(rng, 4, V, K)
    compare(isa, lambda: CpuOps().delta_rule(q, k, v, g, beta, state, keep=min(T, 2)), RECURRENT)


@pytest.mark.parametrize("isa", FAST)
@pytest.mark.parametrize("kv_dtype", ["f16", "bf16", "f32", "int8", "int4"])
@pytest.mark.parametrize(
    ("T", "past", "heads", "dim"), [(1, 700, 8, 256), (40, 250, 4, 64), (3, 0, 2, 40), (9, 64, 6, 16)]
)
def test_attention(isa: str, rng: np.random.Generator, kv_dtype: str, T: int, past: int, heads: int, dim: int) -> None:
    ops = CpuOps(kv_dtype=kv_dtype)
    q, k, v = 2 * normal(rng, T, heads, dim), normal(rng, T, 2, dim), normal(rng, T, 2, dim)
    old = normal(rng, past, 2, dim), normal(rng, past, 2, dim)

    def attend() -> tuple[Array, ...]:
        out, cache = ops.attention(q, k, v, ops.kv_cache(*old))
        return out, *cache.arrays()

    # Keys and values come from outside and every set rounds them alike; a rotation adds in the same order everywhere.
    compare(isa, attend, SUMS)


@pytest.mark.parametrize("isa", native.isas())
def test_float16_rounds_to_nearest_even_and_saturates(isa: str) -> None:
    native.set_isa(isa)
    edges = [0, -0.0, 1, 1 + 2**-11, 1 + 3 * 2**-11, 2**-14, 2**-24, 2**-25, 1.5 * 2**-24, 65504, 65519, 7e4, -1e30]
    x = np.array([*edges, *np.random.default_rng(0).standard_normal(51) * 1e-5], np.float32)
    keys = x.reshape(1, 1, 64)
    found, _ = NativeKV(1, 64, "f16").appended(keys, keys).arrays()
    assert np.array_equal(found.ravel(), to_float32(np.clip(x, -65504, 65504).astype(np.float16)))


# --- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv_dtype", "bound"), [("f32", 1e-11), ("f16", 1e-6), ("bf16", 1e-4), ("int8", 1e-3), ("int4", 0.06)]
)
def test_kv_types_against_float32(rng: np.random.Generator, kv_dtype: str, bound: float) -> None:
    """Rounding errors of at most 2^-12 and 2^-9 of an entry, 6e-8 and 4e-6 squared, and half a 127th of the largest
    of a head (3 sigma): 5e-5; half an eighth of the largest of 32: 7e-3; scores of variance 4 pass them on enlarged.
    """
    q, k, v = 2 * normal(rng, 30, 8, 256), normal(rng, 30, 2, 256), normal(rng, 30, 2, 256)
    old = normal(rng, 500, 2, 256), normal(rng, 500, 2, 256)
    results = [ops.attention(q, k, v, ops.kv_cache(*old))[0] for ops in (NumpyOps(), CpuOps(kv_dtype=kv_dtype))]
    assert nmse(*results) <= bound


def test_pages_are_shared_until_branches_meet(rng: np.random.Generator) -> None:
    k = normal(rng, PAGE + 10, 2, 32)
    root = NativeKV(2, 32, "f16").appended(k, k)
    one = root.appended(k[:3], k[:3])
    two = root.appended(k[5:9], k[5:9])
    assert one.pages[1] is root.pages[1]  # first come: written behind
    assert two.pages[0] is root.pages[0]
    assert two.pages[1] is not root.pages[1]
    assert one.truncated(PAGE).nbytes == root.nbytes // 2


def test_an_unknown_kv_type_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown KV cache type 'int3'"):
        CpuOps(kv_dtype="int3")


def test_threads_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="threads must be 1 to 1024, got 0"):
        CpuOps(threads=0)


def test_an_unknown_instruction_set_is_refused() -> None:
    program = "from edgeq.backends import select; select('cpu')"
    done = run_python(program, EDGEQ_ISA="mmx")
    assert done.returncode == 1
    assert "UsageError: EDGEQ_ISA: unknown instruction set 'mmx'" in done.stderr


def test_a_matrix_keeps_its_memory_and_nothing_longer(rng: np.random.Generator) -> None:
    ops, x = CpuOps(), normal(rng, 1, 64)
    owner = normal(rng, 8, 64)
    expected, gone = x @ owner.T, weakref.ref(owner)
    matrix = ops.matrix(owner)
    del owner
    assert nmse(expected, ops.linear(x, matrix)) <= SUMS
    assert gone() is not None
    del matrix
    assert gone() is None


def test_weights_that_differ_in_one_array_are_others(rng: np.random.Generator) -> None:
    ops = CpuOps()
    shapes = ((48, 32), (48, 32), (32, 48))
    w = MLPWeights(*(ops.matrix(normal(rng, *shape)) for shape in shapes))
    x, other = normal(rng, 1, 32), w._replace(up_proj=ops.matrix(normal(rng, 48, 32)))
    assert nmse(ops.mlp(x, w), ops.mlp(x, other)) > 0.1
    codes = pack(rng.integers(0, 16, (8, 64)), 4)
    one, two = (np.full((8, 1), value, np.float32) for value in (1, 2))
    x = normal(rng, 1, 64)
    a, b = (ops.linear(x, ops.matrix(QMatrix(codes, scales, one, 4, 64))) for scales in (one, two))
    assert not np.array_equal(a, b)


def test_two_threads_of_python_at_once(rng: np.random.Generator) -> None:
    ops, inputs = CpuOps(), [(normal(rng, 50, 6, 64), normal(rng, 50, 2, 64)) for _ in range(8)]
    empty = np.zeros((0, 2, 64), np.float32)

    def attend(qk: tuple[Array, Array]) -> Array:
        return ops.attention(*qk, qk[1], ops.kv_cache(empty, empty))[0]

    with ThreadPoolExecutor(4) as threads:
        at_once = list(threads.map(attend, inputs * 5))
    for found, expected in zip(at_once, [attend(qk) for qk in inputs] * 5, strict=True):
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads_gives_the_same_bits(rng: np.random.Generator, threads: int) -> None:
    """Pieces are the same whoever takes them, and what several threads have summed is merged in one order."""
    before = native.thread_count()
    x, w, tail = normal(rng, 300, 96), normal(rng, 96, 4), normal(rng, 3, 96)
    q, k, v = normal(rng, 9, 4, 64), normal(rng, 9, 2, 64), normal(rng, 9, 2, 64)
    old = normal(rng, 1000, 2, 64)
    results = []
    for count in (1, threads):
        ops = CpuOps(threads=count)
        results.append([ops.causal_conv_silu(x, w, tail)[0], ops.attention(q, k, v, ops.kv_cache(old, old))[0]])
    native.set_thread_count(before)
    assert np.array_equal(results[0][0], results[1][0])
    assert np.array_equal(results[0][1], results[1][1])


# --- bad input -------------------------------------------------------------------------------------------------------

ROW = np.zeros((2, 8), np.float32)


def read_only(x: Array) -> Array:
    x = x.copy()
    x.flags.writeable = False
    return x


def misaligned(*shape: int) -> Array:
    size = int(np.prod(shape))
    return np.zeros(4 * size + 1, np.uint8)[1:].view(np.float32).reshape(shape)


@pytest.mark.parametrize(
    ("x", "out", "error"),
    [
        (ROW.astype(np.float64), ROW.copy(), TypeError),
        (ROW, ROW.astype(np.float16), TypeError),
        (ROW, read_only(ROW), TypeError),
        (ROW.T, ROW.T.copy(), ValueError),  # last axis not contiguous
        (ROW, np.zeros((2, 16), np.float32)[:, ::2], ValueError),
        (ROW, np.zeros((8, 2), np.float32), ValueError),
        (ROW, np.zeros((2, 9), np.float32), ValueError),
        (misaligned(2, 8), ROW.copy(), ValueError),
        (np.zeros((2, 2, 2, 2), np.float32), np.zeros((2, 2, 2, 2), np.float32), ValueError),
    ],
    ids=["float64", "float16 out", "read-only", "strided", "strided out", "swapped", "wide", "misaligned", "4 axes"],
)
def test_bad_rows_are_refused(x: Array, out: Array, error: type[Exception]) -> None:
    with pytest.raises(error):
        native.add(x, x, out)
    with pytest.raises(error):
        native.l2_norm(x, 1e-6, out)


def test_norms_and_rope_check_their_vectors() -> None:
    angles = np.zeros((2, 3), np.float32)
    heads = np.zeros((2, 1, 8), np.float32)
    calls: list[Callable[[], object]] = [
        lambda: native.rms_norm(ROW, np.zeros(7, np.float32), None, 1e-6, ROW.copy()),
        lambda: native.rms_norm(ROW, np.zeros(8, np.float32), np.zeros((2, 7), np.float32), 1e-6, ROW.copy()),
        lambda: native.rope(heads, angles[:1], angles[:1], heads.copy()),  # too few tokens
        lambda: native.rope(heads, np.zeros((2, 5), np.float32), np.zeros((2, 5), np.float32), heads.copy()),
        lambda: native.causal_conv_silu(ROW, np.zeros((8, 0), np.float32), np.zeros((0, 8), np.float32), ROW.copy()),
        lambda: native.causal_conv_silu(ROW, np.zeros((8, 4), np.float32), np.zeros((2, 8), np.float32), ROW.copy()),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="expected"):
            call()


def test_delta_rule_checks_its_arrays(rng: np.random.Generator) -> None:
    q, v, g = normal(rng, 2, 2, 8), normal(rng, 2, 4, 8), normal(rng, 2, 4)
    state = normal(rng, 4, 8, 8)

    def run(**changes: Any) -> None:
        good = {"q": q, "k": q, "v": v, "g": g, "beta": g, "state": state, "after": [state.copy()], "out": v.copy()}
        native.delta_rule(*(good | changes).values())

    run()
    for name, bad in {
        "k": q[:, :, :7], "v": normal(rng, 2, 3, 8), "g": g[:1], "state": state[:3], "after": [], "out": v[:1].copy(),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            run(**{name: bad})
    with pytest.raises(TypeError):
        run(after=[read_only(state)])
    with pytest.raises(ValueError, match="after"):
        run(after=[state.copy() for _ in range(4)])  # keep = 3 of 2 tokens


def test_attention_checks_its_pages(rng: np.random.Generator) -> None:
    q, k = normal(rng, 1, 4, 32), normal(rng, 1, 2, 32)
    page, another = native.Page("f16", 2, 32), native.Page("f16", 2, 32)

    def run(past: Any, *pages: Any) -> None:
        native.attention(q, k, k, past, pages, np.empty_like(q))

    run(0, page)
    run(PAGE, page, another)
    for bad in (
        (PAGE, page), (-1, page), (0,), (0, native.Page("f16", 4, 32)), (0, native.Page("f16", 2, 16)),
        (0, page, native.Page("f32", 2, 32)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            run(*bad)
    for bad_page in (np.zeros(page.nbytes, np.uint8), "page", None):
        with pytest.raises(TypeError, match="expected Page objects"):
            run(0, bad_page)
    with pytest.raises(TypeError):
        run("0", page)
    with pytest.raises(ValueError, match="expected f16, bf16"):
        native.Page("f8", 2, 32)
    for heads, dim in ((0, 32), (2, -1), (2, 1 << 20)):
        with pytest.raises(ValueError, match="1 to a million"):
            native.Page("f16", heads, dim)


def test_a_page_is_read_and_copied(rng: np.random.Generator) -> None:
    k, v = normal(rng, 5, 2, 32), normal(rng, 5, 2, 32)
    page = native.Page("f32", 2, 32)
    native.append(k, v, 0, (page,))
    copy = page.copy()
    native.append(v, k, 0, (page,))
    for one, keys, values in ((page, v, k), (copy, k, v)):
        found = np.empty_like(k), np.empty_like(v)
        one.read(*found)
        assert np.array_equal(found, (keys, values))
    for wrong in (np.empty((PAGE + 1, 2, 32), np.float32), np.empty((5, 2, 31), np.float32), k[0]):
        with pytest.raises(ValueError, match="expected"):
            page.read(wrong, wrong)


def test_rope_angles_of_any_view_of_positions(rng: np.random.Generator) -> None:
    rope = RopeConfig(dim=20, theta=1e4, sections=(4, 3, 3))
    frequencies = rotary.frequencies(rope)
    text = np.broadcast_to(np.arange(70_000, 70_009, dtype=np.int32), (3, 9))
    image = rng.integers(0, 500, (3, 18)).astype(np.int32)[:, ::2]
    for positions in (text, image, np.asfortranarray(image)):
        expected, found = NumpyOps().rope_angles(positions, rope), CpuOps().rope_angles(positions, rope)
        for a, b in zip(expected, found, strict=True):
            assert nmse(a, b) <= SUMS
    for bad in (text[:2], text[:, 1:]):
        with pytest.raises(ValueError, match="positions: expected shape"):
            native.rope_angles(bad, frequencies, 1.0, rope.sections, *(np.empty((9, 10), np.float32) for _ in range(2)))
    with pytest.raises(ValueError, match="frequencies: expected shape"):
        native.rope_angles(text, frequencies[1:], 1.0, rope.sections, *(np.empty((9, 10), np.float32) for _ in "cs"))


def test_mixers_check_their_weights(rng: np.random.Generator) -> None:
    def matrix(out: int, width: int) -> Any:
        return native.Matrix(normal(rng, out, width))

    x = normal(rng, 2, 4)
    mlp = (matrix(6, 4), matrix(6, 4), matrix(4, 6))
    native.mlp(x, mlp, x.copy())
    for name, wrong in {
        "up_proj": (mlp[0], matrix(5, 4), mlp[2]), "down_proj": (*mlp[:2], matrix(4, 5)), "gate_proj": (x, *mlp[1:]),
    }.items():  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=f"{name}: expected"):
            native.mlp(x, wrong, x.copy())
    for wrong_x, wrong_out, match in ((normal(rng, 2, 5), normal(rng, 2, 5), "gate_proj"), (x, x[:1].copy(), "out")):
        with pytest.raises(ValueError, match=f"{match}: expected"):
            native.mlp(wrong_x, mlp, wrong_out)
    with pytest.raises(ValueError, match="w: expected MLPWeights, found 2 items"):
        native.mlp(x, mlp[:2], x.copy())


def delta_weights(rng: np.random.Generator, **changes: Any) -> tuple[Any, ...]:
    """Of 2 value heads and 1 key head of 4, for 4 numbers a token."""
    shapes = {
        "in_proj_qkv": (16, 4), "in_proj_z": (8, 4), "in_proj_b": (2, 4), "in_proj_a": (2, 4), "conv": (16, 4),
        "decay": (2,), "dt_bias": (2,), "norm": (4,), "out_proj": (4, 8),
    } | changes  # fmt: skip
    arrays = {name: normal(rng, *shape) for name, shape in shapes.items()}
    return tuple(native.Matrix(x) if "proj" in name else x for name, x in arrays.items())


def test_delta_net_checks_its_weights_and_states(rng: np.random.Generator) -> None:
    x, state = normal(rng, 2, 4), (normal(rng, 3, 16), normal(rng, 2, 4, 4))

    def run(w: Any, key_heads: int = 1, state: Any = state, lengths: Any = (2,), keep: Any = (0,)) -> Any:
        return native.delta_net(x, w, key_heads, 1e-6, [state], lengths, keep, tuple, x.copy())

    good = delta_weights(rng)
    ((after,),) = run(good)
    assert [a.shape for a in after] == [a.shape for a in state]
    assert len(run(good, keep=(2,))[0]) == 3
    for name, shape in {
        "in_proj_z": (7, 4), "in_proj_a": (3, 4), "conv": (16, 9), "decay": (3,), "dt_bias": (1,), "norm": (5,),
        "out_proj": (4, 7), "in_proj_qkv": (15, 4),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            run(delta_weights(rng, **{name: shape}))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"key_heads": 3}, "key_heads"), ({"lengths": (1,)}, "lengths"), ({"lengths": (1, 1)}, "keep"),
        ({"keep": (3,)}, "keep"), ({"keep": (-1,)}, "keep"), ({"state": (state[0], state[1][:1])}, "matrix"),
        ({"state": (state[0][:2], state[1])}, "conv"),
    ]  # fmt: skip
    for arguments, name in wrong:
        with pytest.raises(ValueError, match=f"{name}: expected"):
            run(good, **arguments)
    with pytest.raises(ValueError, match=r"states: expected \(conv, matrix\), found 3 items"):
        run(good, state=state[0])
    with pytest.raises(TypeError, match="matrix: expected a float32 array"):
        run(good, state=(state[0], "matrix"))


def test_gated_attention_checks_its_weights_and_caches(rng: np.random.Generator) -> None:
    x, angles = normal(rng, 2, 4), normal(rng, 2, 4)
    shapes = {"q_proj": (32, 4), "k_proj": (8, 4), "v_proj": (8, 4), "o_proj": (4, 16), "q_norm": (8,), "k_norm": (8,)}

    def run(lengths: Any = (2,), caches: Any = None, **changes: Any) -> None:
        arrays = {name: normal(rng, *shape) for name, shape in (shapes | changes).items()}
        w = tuple(native.Matrix(a) if "proj" in name else a for name, a in arrays.items())
        caches = [(0, (native.Page("f16", 1, 8),))] * len(lengths) if caches is None else caches
        native.gated_attention(x, w, 1e-6, angles, angles, caches, lengths, x.copy())

    run()
    for name, shape in {
        "v_proj": (9, 4),
        "o_proj": (4, 15),
        "k_norm": (7,),
        "q_proj": (30, 4),
        "k_proj": (24, 4),
    }.items():
        with pytest.raises(ValueError, match="expected"):
            run(**{name: shape})
    two_types = [(0, (native.Page(dtype, 1, 8),)) for dtype in ("f16", "f32")]
    wrong: list[dict[str, Any]] = [
        {"lengths": (3,)}, {"lengths": (2, 0)}, {"caches": []}, {"lengths": (1, 1), "caches": two_types},
    ]  # fmt: skip
    for arguments in wrong:
        with pytest.raises(ValueError, match="expected"):
            run(**arguments)
    with pytest.raises(TypeError, match="pages"):
        run(caches=[(0, (normal(rng, 4),))])
