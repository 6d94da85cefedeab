"""What is promised to be equal, bit for bit (the table in docs/architecture.md), each promise by its name.

On the native backend a token's logits depend on its sequence and on how that was cut into calls, and on nothing else.
Of a cut only this matters: whether the call had more than 16 rows, and where its sequence of more than 16 tokens began.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgeq
from edgeq.engine import Feed
from edgeq.formats.affine import pack
from edgeq.formats.bf16 import Array, from_float32
from edgeq.quant import quantize
from edgeq.state import DeltaState, State
from edgeq.testing import config_values, write_checkpoint

native = pytest.importorskip(
    "edgeq.backends.cpu._native", reason="the native kernels are not built", exc_type=ImportError
)

FEW = 16  # rows of a call that are taken one as the other
DEEP = 2600  # tokens: eleven pages of keys
DEPTHS = (0, 5, 255, 256, 700, DEEP)
THREADS = (1, 2, 3, 8)

SHAPES: dict[str, dict[str, Any]] = {
    "narrow": {},
    "wide": {  # the family's delta rule, which has a loop of its own for 128 keys, and heads of several vectors
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_value_heads": 2,
        "linear_num_key_heads": 1, "head_dim": 64, "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
        },
    },
}  # fmt: skip
STORAGE: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "q8": {"bits": 8, "group_size": 32},
    "q4": {"bits": 4, "group_size": 32},
}
FASTEST = native.isa()
CASES = [  # shape, storage, bits of the KV cache, instruction set
    ("narrow", "bf16", 16, FASTEST), ("narrow", "q8", 8, FASTEST), ("narrow", "q4", 4, FASTEST),
    ("wide", "q4", 16, FASTEST), ("wide", "bf16", 4, FASTEST),
    *(("wide", "q4", 8, isa) for isa in native.isas() if isa != FASTEST),
]  # fmt: skip


class Runner:
    """A model, and the calls of `forward` in whatever company: the only place here that knows how they are made."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.model = edgeq.load(folder, **options)

    @property
    def chunk(self) -> int:
        """Prompts are cut at multiples of so many tokens."""
        return self.model.engine.chunk

    def empty(self) -> State[Any]:
        return self.model.state()

    def run(
        self, tokens: Sequence[Sequence[int]], states: Sequence[State[Any]], keep: int = 0
    ) -> tuple[list[Array], list[tuple[State[Any], ...]]]:
        """One call: each sequence's logits (of many rows the last alone) and its kept states."""
        few = sum(map(len, tokens)) <= FEW
        feeds = [
            Feed(state, np.array(ids, np.int32), keep=keep, rows=len(ids) if few else 1)
            for ids, state in zip(tokens, states, strict=True)
        ]
        outputs = self.model.engine.run(feeds)
        return [out.logits for out in outputs], [out.states for out in outputs]

    def one(self, ids: Sequence[int], state: State[Any], keep: int = 0) -> tuple[Array, tuple[State[Any], ...]]:
        """A call for a single sequence."""
        logits, after = self.run([ids], [state], keep)
        return logits[0], after[0]

    def after(self, ids: Sequence[int]) -> State[Any]:
        """The state after a prompt."""
        return self.model.forward(ids, self.empty())[1] if len(ids) else self.empty()

    @cached_property
    def states(self) -> list[State[Any]]:
        """Sequences of all depths."""
        return [self.after(token_ids(depth, seed=depth)) for depth in DEPTHS]

    @property
    def deep(self) -> State[Any]:
        return self.states[-1]


def token_ids(count: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, 288, count).tolist()
    return ids


def state_arrays(state: State[Any]) -> list[Array]:
    """Everything that a state remembers."""
    return [x for layer in state.layers for x in (layer if isinstance(layer, DeltaState) else layer.arrays())]


def assert_same(found: Any, expected: Any) -> None:
    """Arrays, states, or sequences of these: equal in every bit that a number has."""
    if isinstance(expected, np.ndarray):
        assert found.shape == expected.shape
        assert np.isfinite(expected).all()
        assert np.array_equal(found, expected)
    elif isinstance(expected, State):
        assert_same(state_arrays(found), state_arrays(expected))
    else:
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Checkpoints by shape and storage."""
    root, made = tmp_path_factory.mktemp("exactness"), {}
    for shape, values in SHAPES.items():
        made[shape, "bf16"] = root / shape
        write_checkpoint(root / shape, config_values(max_position_embeddings=8192, **values))
        for storage, options in STORAGE.items():
            if options is not None:
                made[shape, storage] = root / f"{shape}-{storage}"
                quantize(root / shape, made[shape, storage], **options)
    return made


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}-kv{case[2]}-{case[3]}")
def runner(request: pytest.FixtureRequest, folders: dict[tuple[str, str], Path]) -> Iterator[Runner]:
    """A model, its states made, on one of this machine's instruction sets."""
    shape, storage, kv_bits, isa = request.param
    made = Runner(folders[shape, storage], backend="cpu", kv_bits=kv_bits)
    assert made.states
    native.set_isa(isa)
    yield made
    native.set_isa(FASTEST)


@pytest.fixture(autouse=True)
def _same_threads_after() -> Iterator[None]:
    before = native.thread_count()
    yield
    native.set_thread_count(before)


class TestCallsOfFewRows:
    """At most 16 rows in a call, whatever sequences they belong to."""

    def test_logits_do_not_depend_on_the_number_of_threads(self, runner: Runner) -> None:
        def run() -> Any:
            several = [token_ids(n, seed=n) for n in (1, 3, 2, 1, 4, 5)]
            return [
                runner.one([7], runner.deep), runner.one(token_ids(16), runner.deep, keep=16),
                runner.run(several, runner.states, keep=1),
            ]  # fmt: skip

        native.set_thread_count(1)
        expected = run()
        for threads in THREADS[1:]:
            native.set_thread_count(threads)
            assert_same(run(), expected)

    @pytest.mark.parametrize("lengths", [(1,) * 6, (4, 1, 2, 3, 5, 1), (8, 8, 0, 0, 0, 0), (0, 0, 1, 0, 0, 15)])
    def test_logits_do_not_depend_on_other_sequences_in_the_call(
        self, runner: Runner, lengths: tuple[int, ...]
    ) -> None:
        calls = [(token_ids(n, seed=n), s) for n, s in zip(lengths, runner.states, strict=True) if n]
        alone = [runner.one(ids, state, keep=1) for ids, state in calls]
        for some in (calls, calls[::-1]):
            together = runner.run([ids for ids, _ in some], [state for _, state in some], keep=1)
            assert_same(list(zip(*together, strict=True)), alone[:: 1 if some is calls else -1])

    @pytest.mark.parametrize("depth", [0, 250, DEEP])
    def test_verifying_tokens_in_one_call_equals_decoding_them_one_by_one(self, runner: Runner, depth: int) -> None:
        states = [runner.deep if depth == DEEP else runner.after(token_ids(depth))]
        ids, rows = token_ids(FEW, seed=1), []
        for i in ids:
            logits, after = runner.one([i], states[-1])
            rows += [*logits]
            states += after
        for count in (1, 2, 3, 4, 5, 8, 11, 16):
            for keep in sorted({0, 1, count // 2, count}):
                expected = np.stack(rows[:count]), tuple(states[count - keep : count + 1])
                assert_same(runner.one(ids[:count], states[0], keep), expected)

    def test_tokens_may_be_spread_over_calls_in_any_way(self, runner: Runner) -> None:
        ids, cuts = token_ids(40, seed=2), ([16, 16, 8], [1, 15, 2, 14, 3, 5], [8] * 5)
        ends = []
        for cut in cuts:
            state, at = runner.states[2], 0
            for n in cut:
                _, (state,) = runner.one(ids[at : at + n], state)
                at += n
            ends.append(state)
        assert_same(ends[1:], ends[:1] * 2)


class TestPrompts:
    """More than 16 rows in a call."""

    def test_logits_do_not_depend_on_the_number_of_threads(self, runner: Runner) -> None:
        def run() -> Any:
            ids = token_ids(100)
            return [runner.one(ids, runner.empty(), keep=3), runner.one(ids[:50], runner.deep), runner.run(
                [ids[:40], ids[:3], ids[:60]], [runner.deep, runner.states[1], runner.empty()]
            )]  # fmt: skip

        native.set_thread_count(1)
        expected = run()
        for threads in THREADS[1:]:
            native.set_thread_count(threads)
            assert_same(run(), expected)

    def test_logits_do_not_depend_on_other_sequences_in_the_call(self, runner: Runner) -> None:
        ids = token_ids(90)
        alone = [runner.one(ids[:n], s) for n, s in ((40, runner.deep), (90, runner.states[1]))]
        few, many = [runner.run([ids[:5], ids[:n]], [runner.states[2], runner.deep]) for n in (12, 40)]
        together = runner.run([ids[:40], ids, ids[:5]], [runner.deep, runner.states[1], runner.states[2]])
        assert_same([x[:2] for x in together], [list(x) for x in zip(*alone, strict=True)])
        assert_same([x[0] for x in few], [x[0] for x in many])
        assert_same([x[2] for x in together], [x[0] for x in many])

    def test_a_prompt_may_be_cut_at_any_multiple_of_32(self, runner: Runner) -> None:
        ids = token_ids(147, seed=3)
        whole = runner.one(ids, runner.deep)
        for cuts in ([32], [96, 128]):
            state = runner.deep
            for begin, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
                logits, (state,) = runner.one(ids[begin:end], state)
            assert_same((logits, (state,)), whole)


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_call_of_few_rows_gives_each_token_what_decoding_gives_it(runner: Runner, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, FEW), min_size=1, max_size=6).filter(lambda n: sum(n) <= FEW))
    which = data.draw(st.lists(st.integers(0, len(DEPTHS) - 1), min_size=len(lengths), max_size=len(lengths)))
    keep = data.draw(st.integers(0, min(lengths)))
    native.set_thread_count(data.draw(st.sampled_from(THREADS)))
    tokens, states = [token_ids(n, seed=n) for n in lengths], [runner.states[i] for i in which]
    logits, after = runner.run(tokens, states, keep)
    native.set_thread_count(data.draw(st.sampled_from(THREADS)))
    for ids, state, rows, kept in zip(tokens, states, logits, after, strict=True):
        for i, token in enumerate(ids):
            row, (state,) = runner.one([token], state)
            assert_same(rows[i : i + 1], row)
            if (left := len(ids) - 1 - i) <= keep:
                assert_same(kept[keep - left], state)


@pytest.mark.parametrize("backend", ["cpu", "numpy"])
def test_going_on_from_a_multiple_of_the_chunk_equals_the_cold_run(
    folders: dict[tuple[str, str], Path], backend: str
) -> None:
    runner = Runner(folders["narrow", "q4"], backend=backend)
    ids = token_ids(2 * runner.chunk + 37)
    cold = runner.model.forward(ids, runner.empty())
    for at in (runner.chunk, 2 * runner.chunk):
        snapshot = runner.after(ids[:at])
        assert_same(runner.model.forward(ids[at:], snapshot), cold)


# --- matrices --------------------------------------------------------------------------------------------------------

NUMBERS = {"f32": lambda x: x, "f16": lambda x: x.astype(np.float16), "bf16": from_float32}


def matrix(out: int, width: int, bits: int, group: int, numbers: str) -> Any:
    rng = np.random.default_rng(bits + group)
    if bits == 0:
        return native.Matrix(NUMBERS[numbers](rng.standard_normal((out, width), np.float32)))
    codes = pack(rng.integers(0, 1 << bits, (out, width)), bits)
    scales, biases = (NUMBERS[numbers](rng.standard_normal((out, width // group), np.float32)) for _ in range(2))
    return native.Matrix(codes, scales, biases, bits, group)


FORMS = [
    *((bits, group, "bf16") for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)),
    (6, 16, "f16"), (4, 64, "f16"), (8, 32, "f32"), (0, 0, "bf16"), (0, 0, "f16"), (0, 0, "f32"),
]  # fmt: skip


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize(("bits", "group", "numbers"), FORMS)
def test_a_row_of_a_product_is_the_same_in_any_company(isa: str, bits: int, group: int, numbers: str) -> None:
    """Of up to 16 rows, and of more than 16: there the threads and with them the blocks differ, too."""
    width = 3 * group if group else 301  # no whole number of vectors
    w, before = matrix(43, width, bits, group, numbers), native.isa()
    x = np.random.default_rng(1).standard_normal((300, width), np.float32)

    def product(rows: slice, threads: int) -> Array:
        native.set_thread_count(threads)
        native.linear(x[rows], w, y := np.empty((len(x[rows]), 43), np.float32))
        return y

    native.set_isa(isa)
    try:
        alone = np.concatenate([product(slice(i, i + 1), 1) for i in range(FEW)])
        for count in range(2, FEW + 1):
            assert_same(product(slice(count), 2), alone[:count])
        many = product(slice(None), 1)
        for start, end, threads in ((0, 17, 2), (3, 22, 1), (0, 271, 8), (20, 300, 3)):
            assert_same(product(slice(start, end), threads), many[start:end])
    finally:
        native.set_isa(before)
