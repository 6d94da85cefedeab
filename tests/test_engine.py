"""The engine: feeds of several sequences, of vectors instead of tokens, kept states, rows of logits; parts; states."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeq
from edgeq.api import Model
from edgeq.backends import available
from edgeq.engine import Engine, Feed
from edgeq.errors import MemoryBudgetError, UsageError
from edgeq.model import text
from edgeq.session.context import Context
from edgeq.state import DeltaState, KVCache, State, held_nbytes
from edgeq.testing import config_values, nmse, write_checkpoint
from edgeq.weights import Part, declare_mtp, declare_text, declare_vision, leaves, map_tree

ROUNDING = 1e-9  # float32, in another order: single roundings of 6e-8, some 30 operations deep, squared


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    write_checkpoint(
        folder, config_values(layer_types=["linear_attention", "full_attention"] * 2, mtp=True, vision=True)
    )
    return folder


@pytest.fixture(scope="module", params=["numpy", "cpu"])
def model(request: pytest.FixtureRequest, folder: Path) -> Model:
    if next(b for b in available() if b.name == request.param).ops is None:
        pytest.skip(f"the {request.param} backend does not run here")
    return edgeq.load(folder, backend=request.param)


def ids(n: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 288, n).astype(np.int32)


class TestFeeds:
    def test_each_feed_has_its_own_states_and_rows(self, model: Model) -> None:
        engine = model.engine
        longer = model.advance(ids(9).tolist(), engine.state())
        feeds = [
            Feed(engine.state(), ids(5, 1), keep=2, rows=3), Feed(longer, ids(1, 2), rows=0),
            Feed(longer, ids(4, 3), keep=4, rows=1),
        ]  # fmt: skip
        outputs = engine.run(feeds)
        assert [len(output.states) for output in outputs] == [3, 1, 5]
        assert [len(output.logits) for output in outputs] == [3, 0, 1]
        assert [[s.length for s in output.states] for output in outputs] == [[3, 4, 5], [10], [9, 10, 11, 12, 13]]
        for feed, together in zip(feeds, outputs, strict=True):
            (alone,) = engine.run([feed])
            if feed.rows:
                assert nmse(alone.logits, together.logits) <= ROUNDING
            for a, b in zip(alone.states, together.states, strict=True):
                assert a.length == b.length
                assert a.next_position == b.next_position

    @pytest.mark.parametrize("wanted", [{"rows": 4}, {"keep": 4}])
    def test_no_feed_reaches_into_its_neighbours(self, model: Model, wanted: Any) -> None:
        engine = model.engine
        with pytest.raises(AssertionError, match="neighbour"):
            engine.run([Feed(engine.state(), ids(5)), Feed(engine.state(), ids(3), **wanted)])

    def test_a_kept_state_goes_on_like_a_shorter_run(self, model: Model) -> None:
        engine, tokens = model.engine, ids(6)
        (output,) = engine.run([Feed(engine.state(), tokens, keep=6, rows=6)])
        for n, state in enumerate(output.states):
            logits, _ = model.forward([7], state)
            expected, _ = model.forward([*tokens[:n].tolist(), 7], engine.state())
            assert nmse(expected, logits) <= ROUNDING

    def test_vectors_stand_in_for_tokens(self, model: Model) -> None:
        engine, tokens = model.engine, ids(7)
        vectors = text.embed(engine.ops, engine.weights.text, tokens)
        looked_up = engine.run([Feed(engine.state(), tokens)])[0].logits
        others = np.zeros(7, np.int32)
        for cuts in ([0, 7], [0, 2, 4, 7]):
            inserts = [(a, vectors[a:b]) for a, b in pairwise(cuts)]
            assert np.array_equal(engine.run([Feed(engine.state(), others, inserts)])[0].logits, looked_up)
        others[[0, 3, 6]] = tokens[[0, 3, 6]]
        ready = Feed(engine.state(), others, [(1, vectors[1:3]), (4, vectors[4:6])])
        assert np.array_equal(engine.run([ready])[0].logits, looked_up)
        mixed = engine.run([Feed(engine.state(), ids(3, 1)), ready, Feed(engine.state(), ids(3, 1))])
        assert nmse(looked_up, mixed[1].logits) <= ROUNDING

    def test_positions_of_an_image_decide_where_text_goes_on(self, model: Model) -> None:
        engine = model.engine
        grid = np.array([[3, 3, 3, 3], [3, 3, 4, 4], [3, 4, 3, 4]], np.int32)  # time, height, width
        before = engine.state()._replace(next_position=3)
        (output,) = engine.run([Feed(before, ids(4), positions=grid, keep=2)])
        assert [state.next_position for state in output.states] == [5, 5, 5]
        assert output.state.length == 4
        same = np.broadcast_to(np.arange(3, 7, dtype=np.int32), (3, 4))
        assert np.array_equal(
            engine.run([Feed(before, ids(4))])[0].logits, engine.run([Feed(before, ids(4), positions=same)])[0].logits
        )
        assert not np.array_equal(output.logits, engine.run([Feed(before, ids(4))])[0].logits)

    def test_all_rows_are_those_of_single_tokens(self, model: Model) -> None:
        tokens = ids(150).tolist()  # more rows than are read out at a time
        rows, state = model.logits(tokens), model.state()
        for i in (0, 63, 64, 149):
            expected, _ = model.forward(tokens[: i + 1], state)
            assert nmse(expected, rows[i]) <= 1e-6  # one position may be unlucky, see test_model.py


class TestCut:
    def test_absolute_multiples(self, model: Model) -> None:
        engine = model.engine
        assert list(engine.cut(0, 3)) == [slice(0, 3)]
        assert list(engine.cut(0, 1024)) == [slice(0, 512), slice(512, 1024)]
        assert list(engine.cut(700, 600)) == [slice(0, 324), slice(324, 600)]
        assert list(engine.cut(511, 2)) == [slice(0, 1), slice(1, 2)]

    def test_going_on_from_a_multiple_is_the_cold_run(self, model: Model) -> None:
        tokens = ids(model.engine.chunk + 40).tolist()
        cold, state = model.forward(tokens, model.state())
        middle = model.advance(tokens[: model.engine.chunk], model.state())
        warm, again = model.forward(tokens[model.engine.chunk :], middle)
        assert np.array_equal(cold, warm)
        assert state.length == again.length

    @pytest.mark.parametrize("name", [backend.name for backend in available() if backend.ops is not None])
    def test_on_every_backend_the_same_calls_give_the_same_bits(self, folder: Path, name: str) -> None:
        model = edgeq.load(folder, backend=name)
        chunk, tokens = model.engine.chunk, ids(model.engine.chunk + 40).tolist()
        cold, again = (model.forward(tokens, model.state())[0] for _ in range(2))
        assert np.array_equal(cold, again)
        warm, _ = model.forward(tokens[chunk:], model.advance(tokens[:chunk], model.state()))
        assert np.array_equal(cold, warm)

    def test_progress_and_interruption(self, model: Model) -> None:
        chunk, seen = model.engine.chunk, list[tuple[int, int]]()

        def interrupt(done: int, total: int) -> None:
            seen.append((done, total))
            if done:
                raise KeyboardInterrupt

        context = Context(model.engine, on_prefill=interrupt)
        with pytest.raises(KeyboardInterrupt):
            context.feed(ids(3 * chunk).tolist())
        assert seen == [(0, 3 * chunk), (chunk, 3 * chunk)]
        assert context.position == chunk


class TestStates:
    """What is no state of this model on this backend is refused in one line."""

    def refused(self, model: Model, state: Any, match: str) -> None:
        with pytest.raises(UsageError, match=match):
            model.forward([1], state)

    def test_of_another_model(self, model: Model, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, config_values(layer_types=["linear_attention", "full_attention"] * 2), seed=1)
        other = edgeq.load(tmp_path, backend=model.ops.name)
        self.refused(model, other.state(), "another model")
        self.refused(model, other.advance([1, 2], other.state()), "another model")

    def test_of_another_backend_or_kv_type(self, model: Model, folder: Path) -> None:
        other = "cpu" if model.ops.name == "numpy" else "numpy"
        if next(b for b in available() if b.name == other).ops is not None:
            self.refused(model, edgeq.load(folder, backend=other).state(), "another backend")
        self.refused(model, edgeq.load(folder, backend=model.ops.name, kv_bits=8).state(), "another backend")

    def test_the_same_model_loaded_again_goes_on(self, model: Model, folder: Path) -> None:
        again = edgeq.load(folder, backend=model.ops.name)
        state = model.advance([1, 2, 3], model.state())
        assert np.array_equal(model.forward([4], state)[0], again.forward([4], state)[0])

    def test_taken_apart(self, model: Model) -> None:
        state = model.advance([1, 2, 3], model.state())
        first = state.layers[0]
        assert isinstance(first, DeltaState)
        for broken in (
            state._replace(layers=state.layers[:-1]), state._replace(layers=(*state.layers, state.layers[0])),
            state._replace(layers=()), state._replace(length=2), state._replace(layers=state.layers[::-1]),
            state._replace(origin="", layers=(first._replace(matrix=np.zeros((1, 2, 3))), *state.layers[1:])),
        ):  # fmt: skip
            self.refused(model, broken, "does not fit the model")
        for nothing in (3, (state.layers, 3, 3), "state"):
            self.refused(model, nothing, "a state is expected")

    def test_changed_by_hand(self, model: Model) -> None:
        state = model.advance([1, 2, 3], model.state())
        first, rest = state.layers[0], state.layers[1:]
        assert isinstance(first, DeltaState)
        layers: list[Any] = [
            None, list(state.layers), (None, *rest), (tuple(first), *rest), (first._replace(conv=None), *rest),
            (first._replace(conv=first.conv[:1]), *rest), (first._replace(matrix=first.matrix[:1]), *rest),
            (DeltaState(first.matrix, first.conv), *rest),
        ]  # fmt: skip
        numbers: list[Any] = [-1, 4, 10**9, 10**30, 1.5, 3.0, float("nan"), "3", None, True]
        broken = [state._replace(layers=wrong) for wrong in layers]
        broken += [state._replace(next_position=wrong) for wrong in numbers if wrong != 4]
        broken += [state._replace(length=wrong) for wrong in numbers]
        for wrong in broken:
            self.refused(model, wrong, "does not fit the model")
            self.refused(model, wrong._replace(origin=""), "does not fit the model")

    def test_without_an_origin_the_shapes_decide(self, model: Model) -> None:
        state = model.advance([1, 2, 3], model.state())
        assert np.array_equal(model.forward([4], state)[0], model.forward([4], state._replace(origin=""))[0])

    @pytest.mark.parametrize(
        "wrong",
        [[1.0], [1, 2.5], ["a"], "abc", [[1, 2]], [True], 3, [None], [1 << 70], np.array([1.0]), [[1], [2, 3]]],
        ids=repr,
    )
    def test_ids_are_integers(self, model: Model, wrong: Any) -> None:
        with pytest.raises(UsageError, match="token ids must be a sequence of integers"):
            model.forward(wrong, model.state())

    def test_ids_are_in_the_vocabulary_and_in_the_context(self, model: Model) -> None:
        with pytest.raises(UsageError, match="no tokens"):
            model.forward([], model.state())
        for wrong in (-1, 288, 1 << 40):
            with pytest.raises(UsageError, match=f"token id {wrong} is outside"):
                model.forward([1, wrong], model.state())
        small = Engine(model.checkpoint, model.ops, context=4)
        with pytest.raises(MemoryBudgetError, match="5 tokens exceed the context window of 4"):
            Context(small).feed([1] * 5)


class TestParts:
    def test_loaded_when_asked_for_and_let_go(self, model: Model) -> None:
        weights = model.engine.weights
        assert weights.parts == {Part.TEXT, Part.MTP, Part.VISION}
        mtp, vision = weights.mtp, weights.vision
        assert mtp is not None
        assert vision is not None
        assert weights.mtp is mtp
        assert len(vision.blocks) == 1
        weights.release(Part.MTP)
        again = weights.mtp
        assert again is not None
        assert again is not mtp

    def test_absent_parts_are_none(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path)
        weights = edgeq.load(tmp_path, backend="numpy").engine.weights
        assert weights.parts == {Part.TEXT}
        assert weights.mtp is None
        assert weights.vision is None

    def test_every_tensor_is_declared_once_and_by_its_part(self, model: Model) -> None:
        c = model.config
        assert c.vision is not None
        trees = {
            Part.TEXT: declare_text(c.text), Part.MTP: declare_mtp(c.text), Part.VISION: declare_vision(c.vision),
        }  # fmt: skip
        names = [spec.name for tree in trees.values() for spec in dict.fromkeys(leaves(tree))]
        assert len(names) == len(set(names))
        assert sorted(names) == sorted(spec.name for spec, _ in model.checkpoint.storage())
        for part, tree in trees.items():
            assert {spec.part for spec in leaves(tree)} == {part}

    def test_mapping_keeps_the_tree_and_a_tied_leaf_one(self, model: Model) -> None:
        tree = declare_text(model.config.text)
        names = map_tree(lambda spec: [spec.name], tree)
        assert type(names) is type(tree)
        assert names.lm_head is names.embed_tokens
        assert [name for (name,) in leaves(names)] == [spec.name for spec in leaves(tree)]


def test_shared_memory_is_counted_once(model: Model) -> None:
    state = model.advance(ids(300).tolist(), model.state())
    one, branch = model.advance([1], state), model.advance([2], state)
    held = held_nbytes([state, one, branch])
    assert held < held_nbytes([state]) + held_nbytes([one]) + held_nbytes([branch])
    assert held_nbytes([state, state]) == held_nbytes([state]) <= held
    kv = [layer for layer in state.layers if isinstance(layer, KVCache)]
    assert all(layer.nbytes == sum(nbytes for _, nbytes in layer.memory()) for layer in kv)
    assert isinstance(state, State)


@pytest.mark.parametrize("wrong", [0, -1, 2.5, 4.0, "4", True, 10**30, float("nan")], ids=repr)
def test_numbers_that_a_model_is_loaded_with(folder: Path, wrong: Any) -> None:
    with pytest.raises(UsageError, match="context must be"):
        edgeq.load(folder, backend="numpy", context=wrong)
    if next(b for b in available() if b.name == "cpu").ops is not None:
        with pytest.raises(UsageError, match="threads must be"):
            edgeq.load(folder, backend="cpu", threads=wrong)


@pytest.mark.parametrize("wrong", [5, None, b"hi", ["a"], [1.5], [[1]], [True], [None], ...], ids=repr)
def test_what_is_no_prompt(model: Model, wrong: Any) -> None:
    with pytest.raises(UsageError, match="a prompt must be a text or a sequence of token ids"):
        model.generate(wrong)
