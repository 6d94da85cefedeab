"""The MLX backend beyond single operations: whole models, types, memory, and states that travel.

NMSE is sum((a - b)^2) / sum(a^2); every bound has its reason beside it. On a Mac these run on its GPU.
"""

from __future__ import annotations

import gc
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from edgeq.api import Model
from edgeq.backends.numpy import NumpyOps
from edgeq.checkpoint import open_checkpoint
from edgeq.config import TextConfig
from edgeq.errors import ModelError
from edgeq.formats.affine import dequantize
from edgeq.formats.bf16 import Array, round_to, to_float32
from edgeq.hub import DEMO
from edgeq.model import layers
from edgeq.model.text import forward, initial_state, logits, text_batch
from edgeq.state import DeltaState, KVCache, State
from edgeq.state_io import state_arrays, state_from_arrays
from edgeq.testing import config_values, file_weights, nmse, on_backend, write_checkpoint
from edgeq.weights import QMatrix, TextWeights, leaves, map_tree

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

from edgeq.backends.mlx import MlxOps, limit_memory, used_memory  # noqa: E402
from edgeq.backends.mlx.kv import BufferedKV  # noqa: E402

ON_CPU = mx.default_device() == mx.Device(mx.cpu)

FLOAT32 = 1e-9  # logits of a tiny model: 1e-14 of rounding, which its random layers amplify some ten thousand times
ROUNDINGS = 80  # on the way through a tiny model of 4 layers: norms, gains, products and sums, about 20 in each
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # most that rounding changes a number by, relatively

CAN_COMPILE = not ON_CPU or shutil.which("g++") is not None
COMPILED = [pytest.mark.slow] if ON_CPU else []  # on a CPU, g++ takes a second for every kernel, when it first runs
compiled_too = pytest.mark.parametrize(
    "compiled", [pytest.param(False, id="plain"), pytest.param(True, id="compiled", marks=COMPILED)]
)


# --- models ----------------------------------------------------------------------------------------------------------


class Tiny:
    """A tiny model on a backend."""

    def __init__(self, ops: Any, c: TextConfig, weights: TextWeights[Array, Any]) -> None:
        self.ops, self.c, self.weights = ops, c, on_backend(ops, c, weights)

    def run(self, ids: Any, state: State[Any] | None = None, keep: int = 0) -> tuple[Array, tuple[State[Any], ...]]:
        """Logits of all of `ids`, and the kept states."""
        state = state or initial_state(self.ops, self.c)
        batch = text_batch([np.asarray(ids, np.int32)], [state])
        hidden, (kept,) = forward(self.ops, self.c, self.weights, batch, [state], keep)
        return self.ops.numpy(logits(self.ops, self.weights, hidden)), kept

    def greedy(self, ids: Any, tokens: int, state: State[Any] | None = None) -> tuple[list[int], State[Any]]:
        chosen: list[int] = []
        for _ in range(tokens):
            scores, (state,) = self.run(ids, state)
            chosen.append(int(scores[-1].argmax()))
            ids = chosen[-1:]
        assert state is not None
        return chosen, state


def quantize(weights: Any, bits: int, dtype: type) -> Any:
    """Every matrix in groups of 32, by MLX itself; scales and biases of `dtype`."""

    def matrix(m: Array) -> Any:
        if m.ndim != 2 or m.shape[1] % 32:
            return m
        codes, scales, biases = (np.array(x) for x in mx.quantize(mx.array(to_float32(m)), 32, bits))
        return QMatrix(codes, round_to(scales, dtype), round_to(biases, dtype), bits, 32)

    return map_tree(matrix, weights)


@pytest.fixture(scope="module", params=["bf16", "int4", "int8"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TextConfig, Any]:
    folder = tmp_path_factory.mktemp("tiny")
    config = write_checkpoint(folder, config_values(layer_types=["linear_attention", "full_attention"] * 2))
    weights = file_weights(open_checkpoint(folder))
    if request.param != "bf16":
        weights = quantize(weights, int(request.param[3:]), np.uint16)
    return config.text, weights


def prompt(c: TextConfig, n: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, c.vocab_size, n).astype(np.int32)


def bound(c: TextConfig, weights: Any, ids: Array, dtype: str) -> float:
    """What activations in `dtype` may cost: ROUNDINGS times the error that rounding the first ones alone makes.

    How far one rounding carries depends on the random model, so it is measured, in NumPy.
    """
    if dtype == "float32":
        return FLOAT32
    table = weights.embed_tokens
    table = dequantize(table) if isinstance(table, QMatrix) else to_float32(table)
    stored = weights.layers[0].mlp.gate_proj
    stored = stored.factors[0] if isinstance(stored, QMatrix) else stored
    unit = UNIT["bfloat16" if stored.dtype == np.uint16 else dtype]  # activations take the type of what they meet
    rounded = table * (1 + unit * np.random.default_rng(0).uniform(-1, 1, table.shape).astype(np.float32))
    expected, _ = Tiny(NumpyOps(), c, weights).run(ids)
    found, _ = Tiny(NumpyOps(), c, weights._replace(embed_tokens=rounded)).run(ids)
    return ROUNDINGS * nmse(expected, found)


@compiled_too
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_logits(model: Any, dtype: Any, compiled: bool) -> None:
    c, weights = model
    ids = prompt(c, 90)
    expected, _ = Tiny(NumpyOps(), c, weights).run(ids)
    tiny = Tiny(MlxOps(dtype, compiled), c, weights)
    pieces, state = [], None
    for piece in (ids[:70], ids[70:71], ids[71:72], ids[72:77], ids[77:]):  # long ones, and compiled short ones
        scores, (state,) = tiny.run(piece, state)
        pieces.append(scores)
    assert nmse(expected, np.concatenate(pieces)) <= bound(c, weights, ids, dtype)


@compiled_too
def test_greedy_tokens_are_those_of_numpy(model: Any, compiled: bool) -> None:
    c, weights = model
    expected, _ = Tiny(NumpyOps(), c, weights).greedy(prompt(c, 40), 60)
    found, _ = Tiny(MlxOps("float32", compiled), c, weights).greedy(prompt(c, 40), 60)
    assert found == expected


def test_demo_says_what_it_says_on_numpy() -> None:
    if not DEMO.exists():
        pytest.skip("the demo model is not part of this checkout")
    checkpoint = open_checkpoint(DEMO)
    models = [Model(checkpoint, ops) for ops in (NumpyOps(), MlxOps("float32"))]
    ids = models[0].need_tokenizer().encode("Once upon a time")
    expected, found = (Tiny(m.ops, m.config.text, file_weights(checkpoint)).greedy(ids, 64)[0] for m in models)
    assert found == expected


@pytest.mark.parametrize("dtype", UNIT)
def test_demo_in_16_bits(dtype: Any) -> None:
    """A trained model takes roundings well: bfloat16 measured 6e-4 nats, and the same likeliest token in 98 %."""
    if not DEMO.exists():
        pytest.skip("the demo model is not part of this checkout")
    checkpoint = open_checkpoint(DEMO)
    models = [Model(checkpoint, ops) for ops in (NumpyOps(), MlxOps(dtype))]
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    ids = models[0].need_tokenizer().encode(text)[:512]
    expected, found = (m.logits(ids).astype(np.float64) for m in models)
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (expected, found))
    assert (np.exp(p) * (p - q)).sum(axis=-1).mean() <= 5e-3
    assert (p.argmax(axis=-1) == q.argmax(axis=-1)).mean() >= 0.95


@pytest.mark.parametrize("scales", [np.float32, np.float16])
def test_scales_of_any_type(model: Any, scales: type) -> None:
    c, weights = model
    if not isinstance(weights.embed_tokens, QMatrix):
        weights = quantize(weights, 4, scales)
    ids = prompt(c, 12)
    expected, _ = Tiny(NumpyOps(), c, weights).run(ids)
    for dtype in ("float32", "float16", "bfloat16"):
        found, _ = Tiny(MlxOps(dtype), c, weights).run(ids)
        assert nmse(expected, found) <= bound(c, weights, ids, dtype)


@compiled_too
def test_several_sequences_at_once(model: Any, compiled: bool) -> None:
    """Decoding four sequences together gives what each gives alone."""
    c, weights = model
    tiny = Tiny(MlxOps("float32", compiled), c, weights)
    states = [tiny.run(prompt(c, n, n))[1][0] for n in (3, 1, 300)]
    states.append(states[0])  # two that go on from the same state
    ids = [np.array([n], np.int32) for n in (5, 6, 7, 8)]
    hidden, after = forward(tiny.ops, c, tiny.weights, text_batch(ids, states), states)
    together = tiny.ops.numpy(logits(tiny.ops, tiny.weights, hidden))
    for i, state in enumerate(states):
        scores, (alone,) = tiny.run(ids[i], state)
        assert nmse(scores[0], together[i]) <= FLOAT32
        assert after[i][0].length == alone.length


@compiled_too
def test_kept_states_and_old_states_stay_good(model: Any, compiled: bool) -> None:
    c, weights = model
    tiny = Tiny(MlxOps("float32", compiled), c, weights)
    ids = prompt(c, 30)
    expected, _ = tiny.run(ids)
    _, (start,) = tiny.run(ids[:20])
    scores, kept = tiny.run(ids[20:25], start, keep=4)
    assert nmse(expected[20:25], scores) <= FLOAT32
    assert [state.length for state in kept] == [21, 22, 23, 24, 25]
    for state in (*kept, start):
        scores, _ = tiny.run(ids[state.length :], state)
        assert nmse(expected[state.length :], scores) <= FLOAT32


@compiled_too
def test_any_thread_may_run_the_model(model: Any, compiled: bool) -> None:
    """MLX computes nothing that another thread has left to be computed: weights and states are there when returned."""
    c, weights = model
    tiny = Tiny(MlxOps("float32", compiled), c, weights)
    expected, _ = tiny.greedy(prompt(c, 40), 6)
    found: list[int] = []
    state: State[Any] | None = initial_state(tiny.ops, c)

    def decode(ids: Any) -> None:
        nonlocal state
        tokens, state = tiny.greedy(ids, 2, state)
        found.extend(tokens)

    for _ in range(3):
        thread = threading.Thread(target=decode, args=(found[-1:] or prompt(c, 40),))
        thread.start()
        thread.join()
    assert found == expected


@pytest.mark.skipif(not CAN_COMPILE, reason="without g++, mx.compile does nothing on a CPU")
def test_a_trace_dies_with_its_backend() -> None:
    """MLX finds traces by a function's address, and forgets them in one thread only when the function goes."""
    x = mx.arange(50.0)

    def answer(n: int) -> float:
        def run() -> None:
            found.append(ops._piece(("test",), lambda x: x[n])(x).item())

        found: list[float] = []
        ops = MlxOps("float32", compiled=True)
        run()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return found[0]

    assert [answer(n) for n in range(50)] == list(range(50))


# --- operations in 16 bits -------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """An input for the specification, and the same for MLX."""

    spec: Any
    mlx: Any


@compiled_too
@pytest.mark.parametrize("dtype", UNIT)
def test_operations_in_16_bits(dtype: Any, compiled: bool) -> None:
    """On inputs that `dtype` holds exactly, each operation rounds a few times, and everything between is float32."""
    rng = np.random.default_rng(0)
    spec, ops = NumpyOps(), MlxOps(dtype, compiled)
    short = np.float16 if dtype == "float16" else np.uint16

    def pair(*shape: int, scale: float = 1.0) -> Pair:
        x = round_to(scale * rng.standard_normal(shape, np.float32), short)
        return Pair(to_float32(x), ops.matrix(x))

    def exact(x: Array) -> Pair:
        return Pair(x.astype(np.float32), ops.vector(x.astype(np.float32)))

    def check(name: str, *inputs: Any) -> None:
        expected, found = (
            getattr(which, name)(*(x[i] if isinstance(x, Pair) else x for x in inputs))
            for i, which in enumerate((spec, ops))
        )
        if isinstance(found, tuple):
            expected, found = expected[0], found[0]
        assert name == "delta_gates" or found.dtype == ops.dtype, name
        assert nmse(expected, ops.numpy(found)) <= UNIT[dtype] ** 2, name  # four roundings of half a unit each

    T, H, D = 70, 2, 64
    x, gain, z = pair(T, 128), exact(1 + rng.standard_normal(128) / 5), pair(T, 128)
    codes, *affine = (np.array(a) for a in mx.quantize(mx.array(x[0]), 32, 4))
    scales, biases = (round_to(a, short) for a in affine)
    stored = QMatrix(codes, scales, biases, 4, 32)
    check("linear", z, Pair(stored, ops.matrix(stored)))
    check("linear", z, x)
    check("rms_norm", x, gain, 1e-6)
    check("gated_rms_norm", x, gain, z, 1e-6)
    check("l2_norm", x, 1e-6)
    check("silu_mul", x, z)
    check("sigmoid_mul", x, z)
    check("delta_gates", x, z, exact(-np.exp(rng.standard_normal(128))), exact(rng.standard_normal(128)))
    check("causal_conv_silu", x, exact(rng.standard_normal((128, 4))), pair(3, 128))
    q, k, v = pair(T, H, D, scale=0.1), pair(T, H, D, scale=0.1), pair(T, H, D)
    g, beta = exact(-rng.uniform(0, 1, (T, H))), exact(rng.uniform(0, 1, (T, H)))
    check("delta_rule", q, k, v, g, beta, exact(rng.standard_normal((H, D, D))))
    angles = exact(rng.uniform(0, 6, (T, 8)))
    turns = Pair(*((which.array(np.cos(angles[0])), which.array(np.sin(angles[0]))) for which in (spec, ops)))
    check("rope", q, turns)
    check("attention", q, k, v, Pair(*(which.kv_cache(k[0][:9], v[0][:9]) for which in (spec, ops))))


# --- states travel ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [("numpy", "mlx"), ("mlx", "numpy")])
def test_a_state_goes_on_elsewhere(model: Any, tmp_path: Path, first: str, second: str) -> None:
    from safetensors.numpy import load_file, save_file

    c, weights = model
    backends = {"numpy": NumpyOps(), "mlx": MlxOps("float32")}
    here, there = (Tiny(backends[name], c, weights) for name in (first, second))
    expected, _ = here.greedy(prompt(c, 40), 30)
    begun, state = here.greedy(prompt(c, 40), 10)
    save_file(state_arrays(here.ops, state), tmp_path / "state.safetensors")
    restored = state_from_arrays(there.ops, c, load_file(tmp_path / "state.safetensors"))
    assert (restored.length, restored.next_position) == (49, 49)
    rest, _ = there.greedy(begun[-1:], 20, restored)
    assert begun + rest == expected


def test_a_state_of_another_model_is_refused(model: Any) -> None:
    c, weights = model
    tiny = Tiny(NumpyOps(), c, weights)
    arrays = state_arrays(tiny.ops, tiny.run(prompt(c, 3))[1][0])
    with pytest.raises(ModelError, match=r"layers\.1\.keys is float32 \[2, 2, 32\], expected float32 \[3, 2, 32\]"):
        state_from_arrays(tiny.ops, c, {**arrays, "layers.1.keys": arrays["layers.1.keys"][:2]})
    with pytest.raises(ModelError, match=r"layers\.0\.conv is missing"):
        state_from_arrays(tiny.ops, c, {k: v for k, v in arrays.items() if k != "layers.0.conv"})
    with pytest.raises(ModelError, match="lacks 'length'"):
        state_from_arrays(tiny.ops, c, {})


# --- laziness and memory ---------------------------------------------------------------------------------------------


class Lazy(MlxOps):
    """Builds graphs and computes nothing."""

    def start(self, hidden: Any, states: Any) -> None:
        pass


@pytest.mark.skipif(not CAN_COMPILE, reason="without g++, mx.compile does nothing on a CPU")
def test_decoding_is_traced_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    c, weights = model
    tiny = Tiny(Lazy("float32", compiled=True), c, weights)
    state = initial_state(tiny.ops, c)
    traced: list[str] = []

    def spied(piece: str, body: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            traced.append(piece)
            return body(*arguments)

        return run

    for piece in ("mlp", "delta_net", "gated_attention"):
        monkeypatch.setattr(layers, piece, spied(piece, getattr(layers, piece)))
    for _ in range(50):
        batch = text_batch([np.array([1], np.int32)], [state])
        _, ((state,),) = forward(tiny.ops, c, tiny.weights, batch, [state])
    assert sorted(traced) == ["delta_net", "gated_attention", "mlp"]


def test_no_loop_over_tokens(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With chunks as long as the text, Python does the same for 300 tokens as for 500."""
    c, weights = model
    tiny = Tiny(Lazy("float32"), c, weights)

    def calls(T: int) -> int:
        state, count = initial_state(tiny.ops, c), 0

        def profile(*_: object) -> None:
            nonlocal count
            count += 1

        gc.collect()  # what it finds calls Python, and may not be found in mid-count
        gc.disable()
        sys.setprofile(profile)
        forward(tiny.ops, c, tiny.weights, text_batch([prompt(c, T)], [state]), [state])
        sys.setprofile(None)
        gc.enable()
        return count

    monkeypatch.setattr(tiny.ops, "_chunk", 512)
    calls(300)  # what is made once is made
    assert calls(500) == calls(300)


def test_a_call_does_not_wait(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    c, weights = model
    tiny = Tiny(MlxOps("float32"), c, weights)
    state = initial_state(tiny.ops, c)

    def waits(*_: object) -> None:
        raise AssertionError("it waited")

    monkeypatch.setattr(mx, "eval", waits)
    monkeypatch.setattr(mx, "synchronize", waits)
    for n in (70, 1):
        batch = text_batch([prompt(c, n)], [state])
        _, ((state,),) = forward(tiny.ops, c, tiny.weights, batch, [state])


def test_loading_copies_each_weight_once(model: Any) -> None:
    c, weights = model
    gc.collect()
    mx.clear_cache()  # a reused buffer may be larger than what is in it
    before = used_memory().active
    tiny = Tiny(MlxOps(), c, weights)
    stored = 0

    def count(x: Array) -> Array:
        nonlocal stored
        stored += x.nbytes
        return x

    for leaf in {id(leaf): leaf for leaf in leaves(weights)}.values():
        for array in leaf.arrays if isinstance(leaf, QMatrix) else [leaf]:
            count(array)
    assert tiny.weights.lm_head is tiny.weights.embed_tokens
    assert stored <= used_memory().active - before <= 1.05 * stored + 64 * 1024  # whole blocks for small vectors


@pytest.fixture
def limits() -> Iterator[None]:
    """Put MLX's limits back."""
    memory, cache = mx.set_memory_limit(1 << 40), mx.set_cache_limit(1 << 40)
    yield
    mx.set_memory_limit(memory)
    mx.set_cache_limit(cache)
    if mx.metal.is_available():
        mx.set_wired_limit(0)


def test_limit_memory(limits: None) -> None:
    limit_memory(64 << 20)
    assert mx.set_memory_limit(64 << 20) == 64 << 20  # the limit until now
    for _ in range(4):
        x = mx.zeros((32 << 18,)) + 1  # 32 MB
        mx.eval(x)
        del x
    assert used_memory().cached <= 8 << 20
    assert used_memory().peak >= 32 << 20


def test_a_mac_is_held_to_what_it_recommends(monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[str, int] = {}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda _: {"max_recommended_working_set_size": 6 << 30})
    for kind in ("memory", "cache", "wired"):
        monkeypatch.setattr(mx, f"set_{kind}_limit", lambda nbytes, kind=kind: held.__setitem__(kind, nbytes))
    limit_memory()
    assert held == {"memory": 6 << 30, "cache": 512 << 20, "wired": 6 << 30}
    limit_memory(2 << 30)
    assert held == {"memory": 2 << 30, "cache": 256 << 20, "wired": 2 << 30}
    limit_memory(8 << 30)
    assert held == {"memory": 8 << 30, "cache": 512 << 20, "wired": 6 << 30}


def test_a_model_is_loaded_under_the_limit(tmp_path: Path) -> None:
    class Watched(MlxOps):
        active = -1

        def limit_memory(self, nbytes: int | None = None) -> None:
            super().limit_memory(nbytes)
            self.active = used_memory().active

    write_checkpoint(tmp_path, config_values())
    gc.collect()  # what earlier tests left must not be freed in between
    ops = Watched("float32")
    kept = Model(open_checkpoint(tmp_path), ops)
    assert 0 <= ops.active < used_memory().active <= ops.peak_memory()
    del kept


def soak_model(folder: Path, compiled: bool) -> tuple[TextConfig, Tiny]:
    """The smallest thing that has every kind of state."""
    c = write_checkpoint(folder, config_values(max_position_embeddings=1 << 16)).text
    return c, Tiny(MlxOps("float32", compiled), c, file_weights(open_checkpoint(folder)))


def cache_bytes(state: State[Any]) -> int:
    return sum(layer.nbytes for layer in state.layers if isinstance(layer, KVCache))


def soak(tiny: Tiny, tokens: int, *, compiled: bool) -> None:
    """Decode `tokens`, 5000 to a sequence; what MLX holds besides the growing KV cache must not change by a byte.

    The compiled step is traced for every capacity of the cache, of which there are few; a trace has its constants.
    """
    token = [1]
    state: Any = None
    held, capacities = [], set()
    for n in range(tokens):
        scores, (state,) = tiny.run(token, state if n % 5000 else None)
        token = [int(scores[0].argmax())]
        capacities.add(cache_bytes(state))
        if n % 250 == 249:
            gc.collect()
            mx.synchronize()  # the token's logits are there; its states may not be yet
            held.append(used_memory().active - cache_bytes(state))
    half = len(held) // 2  # a sample may catch something that is just being freed; the least of many does not
    assert min(held[half:]) - min(held[:half]) <= (32 * len(capacities) if compiled else 0), held
    assert used_memory().peak < held[0] + 4 * cache_bytes(state) + (64 << 20)


@compiled_too
def test_decoding_appends_in_place(tmp_path: Path, compiled: bool) -> None:
    c, tiny = soak_model(tmp_path, compiled)
    _, (state,) = tiny.run(prompt(c, 3000))
    held = [state]
    for _ in range(3):
        held.append(tiny.run([1], held[-1])[1][0])
    mx.reset_peak_memory()
    before, buffer = used_memory().active, cache_bytes(state)
    for _ in range(4):
        held.append(tiny.run([1], held[-1])[1][0])
    assert cache_bytes(held[-1]) == buffer
    assert used_memory().peak - before < buffer / 2


@pytest.mark.no_cover
@compiled_too
def test_nothing_grows_over_2000_tokens(tmp_path: Path, compiled: bool) -> None:
    soak(soak_model(tmp_path, compiled)[1], 2000, compiled=compiled)


@pytest.mark.soak
@compiled_too
def test_nothing_grows_over_50000_tokens(tmp_path: Path, compiled: bool) -> None:
    soak(soak_model(tmp_path, compiled)[1], 50_000, compiled=compiled)


def test_a_call_starts_its_results(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, of every kept state: what is left lazy would keep its whole past."""
    c, weights = model
    tiny = Tiny(MlxOps("float32"), c, weights)
    started: list[int] = []

    def start(hidden: Any, arrays: list[Any]) -> None:
        started.extend(map(id, [hidden, *arrays]))

    monkeypatch.setattr(mx, "async_eval", start)
    state = initial_state(tiny.ops, c)
    hidden, (kept,) = forward(tiny.ops, c, tiny.weights, text_batch([prompt(c, 5)], [state]), [state], 2)
    results = [hidden]
    for state in kept:
        for layer in state.layers:
            if isinstance(layer, DeltaState):
                results += layer
            else:
                assert isinstance(layer, BufferedKV)
                results += [layer.buffer.keys, layer.buffer.values]
    assert {id(x) for x in results} == set(started)


def test_the_right_backend_for_int4_rows() -> None:
    """MLX's own dequantization is the specification's, bit for bit, in float32."""
    rng = np.random.default_rng(0)
    codes, scales, biases = mx.quantize(mx.array(rng.standard_normal((8, 128)).astype(np.float32)), 32, 4)
    ours = dequantize(QMatrix(np.array(codes), np.array(scales), np.array(biases), 4, 32))
    assert nmse(np.array(mx.dequantize(codes, scales, biases, 32, 4)), ours) <= 1e-13
