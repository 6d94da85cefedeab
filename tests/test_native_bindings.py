"""What the bindings promise whatever they are given: nothing is used that nobody holds, no size overflows, and every
sequence may be any sequence."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from process import run_python

from edgeq.formats.bf16 import Array

native = pytest.importorskip(
    "edgeq.backends.cpu._native", reason="the native kernels are not built", exc_type=ImportError
)

LARGEST = 2**63 - 1


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(8)


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape, np.float32)


# --- held while the GIL is released ----------------------------------------------------------------------------------


class Made:
    """A sequence whose items are made when they are asked for, and that keeps none."""

    def __init__(self, make: Callable[[int], Any], count: int) -> None:
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        if i >= self.count:
            raise IndexError(i)
        return self.make(i)


@pytest.mark.parametrize("form", [list, tuple, deque, iter, "made", "generator"])
def test_linears_hold_their_matrices(rng: np.random.Generator, form: Any) -> None:
    """Their memory is large enough to be given back to the system at once."""
    values = [normal(rng, 300, 512) for _ in range(4)]
    x = normal(rng, 2, 512)

    def fresh(i: int) -> Any:
        return native.Matrix(values[i].copy())

    def generated() -> Iterator[Any]:
        yield from map(fresh, range(4))

    outs = [np.empty((2, 300), np.float32) for _ in values]
    ws = {"made": Made(fresh, 4), "generator": generated()}.get(form) if isinstance(form, str) else form(generated())
    native.linears(x, ws, outs)
    for w, out in zip(values, outs, strict=True):
        np.testing.assert_allclose(out, x @ w.T, rtol=1e-4, atol=1e-4)


CLEARED = """
import sys
import threading
import numpy as np
from edgeq.backends.cpu import _native as native

def beside(call, clear):
    '''The call, while another thread empties what it was given as soon as the GIL is free.'''
    started = threading.Event()
    def work():
        started.wait()
        clear()
        junk = [np.full(1 << 20, np.nan, np.float32) for _ in range(8)]
    thread = threading.Thread(target=work)
    thread.start()
    started.set()
    call()
    thread.join()

sys.setswitchinterval(10)  # the GIL changes hands where it is released, and nowhere else
native.set_thread_count(2)
rng = np.random.default_rng(0)
for _ in range(5):
    x = rng.standard_normal((64, 1024), np.float32)
    ws = [native.Matrix(np.ones((1024, 1024), np.float32)) for _ in range(4)]
    outs = [np.empty((64, 1024), np.float32) for _ in ws]
    kept = list(outs)
    beside(lambda: native.linears(x, ws, outs), lambda: (ws.clear(), outs.clear()))
    for out in kept:
        assert np.allclose(out, x.sum(1, keepdims=True), atol=1e-2)

    q, k = np.ones((2048, 4, 64), np.float32), np.ones((2048, 2, 64), np.float32)
    pages, out = [native.Page("f32", 2, 64) for _ in range(8)], np.empty_like(q)
    beside(lambda: native.attention(q, k, k, 0, pages, out), pages.clear)
    assert np.allclose(out, 1)

    def ones(*shape):
        return np.ones(shape, np.float32)
    def matrix(*shape):
        return native.Matrix(ones(*shape) / shape[1])
    x, angle = ones(2048, 64) / 8, np.zeros((2048, 8), np.float32)
    mlp = [matrix(256, 64), matrix(256, 64), matrix(64, 256)]
    attention = [matrix(128, 64), matrix(32, 64), matrix(32, 64), matrix(64, 64), ones(32), ones(32)]
    delta = [matrix(192, 64), matrix(64, 64), matrix(2, 64), matrix(2, 64), ones(192, 4), -ones(2), ones(2), ones(32),
             matrix(64, 64)]
    results = []
    for beside_it in (lambda call, clear: call(), beside):
        pages, state = [native.Page("f16", 1, 32) for _ in range(8)], [ones(3, 192), ones(2, 32, 32)]
        layers = [[ones(64), list(delta), ones(64), list(mlp)], [ones(64), list(attention), ones(64), list(mlp)]]
        states, lengths, keep = [[state], [[0, pages]]], [2048], [0]
        def clear():
            for items in (*layers[0], *layers[1], layers, pages, state, states, lengths, keep):
                if isinstance(items, list):
                    items.clear()
        results.append(out := np.empty_like(x))
        call = lambda: native.decoder_layers(x, layers, 2, 1e-6, angle, angle, states, lengths, keep, tuple, out)
        beside_it(call, clear)
    assert np.array_equal(*results)

    q = np.ones((4096, 4, 128), np.float32) / 128
    g, beta = np.full((4096, 4), -1, np.float32), np.full((4096, 4), 0.5, np.float32)
    after, state = [np.empty((4, 128, 128), np.float32)], np.zeros((4, 128, 128), np.float32)
    kept, out = list(after), np.empty_like(q)
    beside(lambda: native.delta_rule(q, q, q, g, beta, state, after, out), after.clear)
    assert np.isfinite(kept[0]).all()

    table, ids = native.Matrix(np.ones((100, 64), np.float32)), np.zeros(200_000, np.int32)
    out = np.empty((len(ids), 64), np.float32)
    beside(lambda: native.embed(table, ids, out), lambda: ids.fill(2**31 - 1))
print("done")
"""


def test_nothing_goes_that_a_call_still_uses() -> None:
    done = run_python(CLEARED)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [2**40 * 100, 2**59, 2**60, 2**62, 2**64 - 1])
def test_more_memory_than_there_can_be(nbytes: int) -> None:
    with pytest.raises(MemoryError):
        native.empty(nbytes)


def test_empty_is_writable_to_its_end() -> None:
    for nbytes in (0, 1, 64, 65, 1 << 20, 5 << 20):
        x = native.empty(nbytes)
        assert x.nbytes == nbytes
        x[:] = 255


@pytest.mark.parametrize("shape", [(2**45, 0), (2**60, 0), (0, 2**45), (2**30, 2**30, 0), (2**20, 0, 2**20)])
def test_arrays_without_entries(shape: tuple[int, ...]) -> None:
    """However many rows they seem to have: nothing is computed, and no count overflows."""
    x = np.empty(shape, np.float32)
    for operation in (native.add, native.silu_mul, native.sigmoid_mul):
        operation(x, x, x)
    native.l2_norm(x, 1e-6, x)
    if shape[-1] == 0:
        native.rms_norm(x, np.empty(0, np.float32), x, 1e-6, x)


def test_numbers_of_tokens_do_not_overflow(rng: np.random.Generator) -> None:
    q, k = normal(rng, 1, 4, 32), normal(rng, 1, 2, 32)
    page = native.Page("f16", 2, 32)
    for past in (LARGEST, 2**39, -LARGEST - 1, -1):
        with pytest.raises(ValueError, match=r"(past|pages): expected"):
            native.attention(q, k, k, past, [page], np.empty_like(q))
        with pytest.raises(ValueError, match=r"(past|pages): expected"):
            native.append(k, k, past, [page])
    with pytest.raises(TypeError):
        native.attention(q, k, k, 2**64, [page], np.empty_like(q))


def test_pages_of_impossible_sizes() -> None:
    for heads, dim in ((0, 1), (1, 0), (2**20, 1), (1, 2**62), (2**32, 2**32), (-1, -1)):
        with pytest.raises(ValueError, match="heads, dim: expected"):
            native.Page("f16", heads, dim)


def test_kept_states_do_not_overflow(rng: np.random.Generator) -> None:
    x, state = normal(rng, 1, 4), (normal(rng, 3, 16), normal(rng, 2, 4, 4))
    for n, keep in ((1, LARGEST), (LARGEST, LARGEST), (LARGEST, 0), (1, -1)):
        with pytest.raises(ValueError, match="expected"):
            native.delta_net(x, delta_net(rng), 1, 1e-6, [state], [n], [keep], tuple, x.copy())


# --- any sequence ----------------------------------------------------------------------------------------------------


def delta_net(rng: np.random.Generator) -> tuple[Any, ...]:
    """Weights of a mixer with 2 value heads and 1 key head of 4, for 4 numbers a token."""
    matrices = [native.Matrix(normal(rng, out, 4)) for out in (16, 8, 2, 2)]
    vectors = normal(rng, 16, 4), -np.exp(normal(rng, 2)), normal(rng, 2), normal(rng, 4)
    return (*matrices, *vectors, native.Matrix(normal(rng, 4, 8)))


@pytest.mark.parametrize("form", [list, tuple, deque, iter, lambda items: (x for x in items)])
def test_sequences_may_be_any(rng: np.random.Generator, form: Callable[[Any], Any]) -> None:
    w, x = delta_net(rng), normal(rng, 1, 4)
    before = normal(rng, 3, 16), normal(rng, 2, 4, 4)
    results = []
    for shape in (tuple, form):
        out = np.empty((1, 4), np.float32)
        ((after,),) = native.delta_net(
            x, shape(w), 1, 1e-6, shape([shape(before)]), shape([1]), shape([0]), tuple, out
        )  # fmt: skip
        results.append((out, *after))
    for expected, found in zip(*results, strict=True):
        np.testing.assert_array_equal(expected, found)

    q, k, page = normal(rng, 1, 4, 32), normal(rng, 1, 2, 32), native.Page("f32", 2, 32)
    native.attention(q, k, k, 0, form([page]), out := np.empty_like(q))
    np.testing.assert_allclose(out, np.repeat(k, 2, axis=1), rtol=1e-5)
    native.append(k, k, 0, form([page]))


@pytest.mark.parametrize("bad", [None, 3, 1.5, object()])
def test_what_is_no_sequence_is_refused_by_name(rng: np.random.Generator, bad: Any) -> None:
    q, k = normal(rng, 1, 4, 32), normal(rng, 1, 2, 32)
    state = normal(rng, 4, 32, 32)
    gate = np.zeros((1, 4), np.float32)
    w, x, states = delta_net(rng), normal(rng, 1, 4), (normal(rng, 3, 16), normal(rng, 2, 4, 4))
    calls: dict[str, Callable[[], object]] = {
        "ws": lambda: native.linears(q[0], bad, []),
        "outs": lambda: native.linears(q[0], [native.Matrix(q[0])], bad),
        "after": lambda: native.delta_rule(q, q, q, gate, gate, state, bad, q.copy()),
        "pages": lambda: native.attention(q, k, k, 0, bad, q.copy()),
        "pages: expected Page objects": lambda: native.attention(q, k, k, 0, [bad], q.copy()),
        "w: ": lambda: native.delta_net(x, bad, 1, 1e-6, [states], [1], [0], tuple, x.copy()),
        "states: ": lambda: native.delta_net(x, w, 1, 1e-6, bad, [1], [0], tuple, x.copy()),
        r"states: expected \(conv, matrix\)": lambda: native.delta_net(x, w, 1, 1e-6, [bad], [1], [0], tuple, x.copy()),
        "conv: expected": lambda: native.delta_net(x, w, 1, 1e-6, [(bad, bad)], [1], [0], tuple, x.copy()),
        "lengths": lambda: native.delta_net(x, w, 1, 1e-6, [states], bad, [0], tuple, x.copy()),
        "keep": lambda: native.delta_net(x, w, 1, 1e-6, [states], [1], bad, tuple, x.copy()),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=name):
            call()


def test_an_iterator_s_own_error_comes_through(rng: np.random.Generator) -> None:
    def broken() -> Iterator[Any]:
        yield native.Matrix(normal(rng, 4, 4))
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        native.linears(normal(rng, 1, 4), broken(), [np.empty((1, 4), np.float32)])


# --- the quantizer ---------------------------------------------------------------------------------------------------


def test_quantize_checks_its_arrays(rng: np.random.Generator) -> None:
    x = normal(rng, 3, 128)

    def run(**changes: Any) -> None:
        numbers = [np.empty((3, 2), np.float32) for _ in range(3)]
        names = ("scales", "biases", "errors")
        good = {"x": x, "bits": 4, "group_size": 64, "stored": "bfloat16", "words": np.empty((3, 16), np.uint32)}
        native.quantize(*(good | dict(zip(names, numbers, strict=True)) | changes).values())

    run()
    raw = np.zeros(4 * 6 + 1, np.uint8)
    for name, bad in {
        "x": x[:, :100].copy(), "bits": 7, "group_size": 16, "stored": "int8", "words": np.empty((3, 15), np.uint32),
        "scales": np.empty((2, 2), np.float32), "biases": raw[1:].view(np.float32).reshape(3, 2),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: expected"):
            run(**{name: bad})
    for name, bad in {
        "x": x.astype(np.float64), "words": np.empty((3, 16), np.int64), "errors": np.empty((3, 2), np.float64),
    }.items():  # fmt: skip
        with pytest.raises(TypeError):  # a converted copy would take the result with it
            run(**{name: bad})
