"""All layers in one native call: the bits of the layers one by one, and what an interruption leaves behind."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import edgeq
from edgeq.engine import Engine, Feed
from edgeq.formats.bf16 import Array
from edgeq.model import layers, text
from edgeq.quant import quantize
from edgeq.state import DeltaState, State
from edgeq.testing import config_values, write_checkpoint

native = pytest.importorskip("edgeq.backends.cpu._native", reason="the native kernels are not built")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine[Any, Any]:
    folder = tmp_path_factory.mktemp("stack")
    kinds = ["linear_attention", "full_attention", "full_attention", "linear_attention", "linear_attention"]
    write_checkpoint(folder / "plain", config_values(layer_types=kinds))
    quantize(folder / "plain", folder / "q4", group_size=32)
    return edgeq.load(folder / "q4", backend="cpu").engine


@contextmanager
def alarms(handler: Callable[[], object]) -> Iterator[None]:
    """The handler is called every 5 ms."""
    before = signal.signal(signal.SIGALRM, lambda *_: handler())
    signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def token_ids(count: int) -> Array:
    return np.random.default_rng(count).integers(0, 288, count).astype(np.int32)


def arguments(engine: Engine[Any, Any], lengths: Sequence[int], states: Sequence[State[Any]]) -> tuple[Any, ...]:
    """What `decoder_layers` takes, but for the states to keep."""
    positions = np.concatenate([text.next_positions(s, n) for s, n in zip(states, lengths, strict=True)], axis=1)
    weights = engine.weights.text
    x = text.embed(engine.ops, weights, token_ids(sum(lengths)))
    before = list(zip(*(state.layers for state in states), strict=True))
    angles = engine.ops.rope_angles(positions, engine.config.rope)
    return x, weights.layers, engine.config, angles, before, lengths


def arrays(layer: Any) -> list[Array]:
    return list(layer) if isinstance(layer, DeltaState) else list(layer.arrays())


@pytest.mark.parametrize(
    ("lengths", "keep"), [((1,), (0,)), ((4,), (4,)), ((1, 7, 2), (0, 3, 2)), ((300,), (0,)), ((33, 1, 290), (1, 0, 5))]
)
def test_one_call_gives_the_bits_of_layer_by_layer(
    engine: Engine[Any, Any], lengths: Sequence[int], keep: Sequence[int]
) -> None:
    states = [engine.run([Feed(engine.state(), token_ids(n))])[0].state for n in (20, 3, 400)][: len(lengths)]
    given = arguments(engine, lengths, states)
    unchanged = given[0].copy()
    x, ws, c, angles, before, lengths = given
    one, after_one = engine.ops.decoder_layers(x, ws, c, angles, before, lengths, keep)
    each, after_each = layers.decoder_layers(engine.ops, x, ws, c, angles, before, lengths, keep)
    assert np.array_equal(one, each)
    assert np.array_equal(x, unchanged)
    for layer_one, layer_each in zip(after_one, after_each, strict=True):
        for kept, expected, n in zip(layer_one, layer_each, keep, strict=True):
            assert len(kept) == len(expected) == n + 1
            for a, b in zip(kept, expected, strict=True):
                assert all(map(np.array_equal, arrays(a), arrays(b)))


def test_states_after_have_memory_of_their_own(engine: Engine[Any, Any]) -> None:
    out = engine.run([Feed(engine.state(), token_ids(3), keep=3)])[0]
    matrices = [np.asarray(arrays(state.layers[0])[1]) for state in out.states]
    for matrix in matrices:
        matrix[:] = 1  # one that shared memory would be 1 before its turn
        assert all(np.all(other != 1) for other in matrices if other is not matrix)
        matrix[:] = 0


def test_a_state_s_parts_are_arrays_to_whoever_reads_them(engine: Engine[Any, Any]) -> None:
    out = engine.run([Feed(engine.state(), token_ids(5), keep=4)])[0]
    first, last = (state.layers[0] for state in (out.states[0], out.state))
    assert isinstance(first, DeltaState)
    assert isinstance(last, DeltaState)
    for part in (*first, *last):
        whole = np.asarray(part)
        assert (part.shape, part.dtype, part.nbytes, len(part)) == (whole.shape, np.float32, whole.nbytes, len(whole))
        assert np.array_equal(part[1:], whole[1:])
        assert np.array_equal(part.reshape(-1), whole.ravel())
        assert np.array_equal(part * 2 - whole, part.copy())
        assert np.asarray(part, np.float64).dtype == np.float64
        assert (part == whole).all()
        whole[:] = 0
        assert np.any(part != whole)  # it was a copy
        with pytest.raises(ValueError, match="copy"):
            np.asarray(part, copy=False)
    mixed = DeltaState(last.conv, first.matrix)  # of two states, and as somebody's own arrays
    plain = DeltaState(*map(np.asarray, mixed))
    after = [
        engine.run([Feed(out.state._replace(layers=(layer, *out.state.layers[1:])), token_ids(2))])[0].logits
        for layer in (mixed, plain)
    ]
    assert np.array_equal(after[0], after[1])


def test_kept_states_share_what_they_can(engine: Engine[Any, Any]) -> None:
    """A state written and the updates since, not a state for every token; other branches have memory of their own."""
    out = engine.run([Feed(engine.state(), token_ids(5), keep=4)])[0]
    pieces = [matrix_pieces(state) for state in out.states]
    assert len({piece[0] for piece in pieces}) == 1
    assert [len(piece) for piece in pieces] == [1, 2, 3, 4, 5]
    again = matrix_pieces(engine.run([Feed(out.states[2], token_ids(1))])[0].state)
    assert len(again) == 1
    assert again[0] != pieces[0][0]


def matrix_pieces(state: State[Any]) -> list[tuple[int, int]]:
    """What the first layer's matrix holds."""
    layer = state.layers[0]
    assert isinstance(layer, DeltaState)
    return list(layer.matrix.memory())


def test_signals_are_handled_in_the_midst_of_a_long_call(engine: Engine[Any, Any]) -> None:
    x, ws, c, angles, before, lengths = arguments(engine, [512], [engine.state()])
    many, seen = 1000, []
    with alarms(lambda: seen.append(1)):
        native.decoder_layers(
            x, ws[:1] * many, c.linear_num_key_heads, c.rms_norm_eps, *angles, before[:1] * many, lengths, [0],
            tuple, np.empty_like(x),
        )  # fmt: skip
    assert len(seen) > 2  # those that came during the call and waited for its end would have been one


def test_an_interrupted_call_leaves_the_states_before_it_valid(engine: Engine[Any, Any]) -> None:
    state = engine.run([Feed(engine.state(), token_ids(300))])[0].state
    expected = engine.run([Feed(state, token_ids(9))])[0]
    x, ws, c, angles, before, lengths = arguments(engine, [512], [state])

    class Interrupt(Exception):
        pass

    def interrupt() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)  # once
        raise Interrupt

    def run_long() -> None:
        with alarms(interrupt):
            engine.ops.decoder_layers(x, ws * 100, c, angles, before * 100, lengths, [0])

    with pytest.raises(Interrupt):
        run_long()
    found = engine.run([Feed(state, token_ids(9))])[0]
    assert np.array_equal(found.logits, expected.logits)


@pytest.mark.parametrize("kind", ["not a layer", "too few states", "another width"])
def test_bad_layers_are_refused(engine: Engine[Any, Any], kind: str) -> None:
    x, ws, c, angles, before, lengths = arguments(engine, [2], [engine.state()])
    if kind == "not a layer":
        ws = (ws[0], ws[0].mlp)
    elif kind == "too few states":
        before = before[:1]
    else:
        x = x[:, 1:].copy()
    with pytest.raises((ValueError, TypeError), match="expected"):
        native.decoder_layers(
            x, ws[:2], c.linear_num_key_heads, c.rms_norm_eps, *angles, [before[0]] * len(before[:2]), lengths, [0],
            tuple, np.empty_like(x),
        )  # fmt: skip
