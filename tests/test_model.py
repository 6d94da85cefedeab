"""The whole model on the NumPy backend: against Hugging Face transformers, and against itself in every split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgeq
from edgeq.api import Model
from edgeq.errors import MemoryBudgetError, ModelError, UsageError
from edgeq.formats.bf16 import Array
from edgeq.formats.safetensors import SafetensorsFile
from edgeq.model import text
from edgeq.state import DeltaState, KVCache, State
from edgeq.testing import config_values, nmse, write_checkpoint

MODELS = Path(__file__).parent / "data" / "models"  # made by tools/make_fixtures.py
SHAPES = sorted(path.name for path in MODELS.iterdir())
LENGTHS = (1, 2, 63, 64, 65, 257)

# Both sides are float32 with sums in different orders: single roundings of 6e-8 and 30-odd operations deep, squared.
NMSE = 1e-9
# Single positions can be unlucky: a query or key close to zero before its normalisation amplifies roundings. The worst
# position of all fixtures differs by 5e-8 from transformers, and as much between two orders of summation of our own.
NMSE_ONE_POSITION = 1e-6
GAP = 1e-3  # logits of spread 2 agree to 1e-4; a smaller gap between the two best is noise


@pytest.fixture(scope="module", params=SHAPES)
def golden(request: pytest.FixtureRequest) -> tuple[Model, SafetensorsFile]:
    folder = MODELS / request.param
    return edgeq.load(folder, backend="numpy"), SafetensorsFile(folder / "golden.safetensors")


class TestAgainstTransformers:
    def test_logits(self, golden: tuple[Model, SafetensorsFile]) -> None:
        model, reference = golden
        assert nmse(reference.array("logits"), model.logits(reference.array("ids").tolist())) <= NMSE

    @pytest.mark.parametrize("length", LENGTHS)
    def test_odd_lengths(self, golden: tuple[Model, SafetensorsFile], length: int) -> None:
        model, reference = golden
        logits, state = model.forward(reference.array("ids")[:length].tolist(), model.state())
        assert nmse(reference.array(f"last.{length}"), logits) <= NMSE
        assert state.length == state.next_position == length

    def test_greedy(self, golden: tuple[Model, SafetensorsFile]) -> None:
        model, reference = golden
        prompt = reference.array("ids")[:17].tolist()
        reply = model.generate(
            prompt, max_tokens=64, temperature=0.0, ignore_eos=True, loop_guard=False, repetition_penalty=1.0
        )
        ours = [piece.token for piece in reply if piece.token is not None]
        noisy = np.flatnonzero(reference.array("gaps") < GAP)
        sure = int(noisy[0]) if len(noisy) else 64
        assert sure >= 12, "the fixture proves too little"
        assert ours[:sure] == reference.array("greedy").tolist()[:sure]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, config_values(layer_types=["linear_attention", "full_attention"] * 2))
    return edgeq.load(folder, backend="numpy")


def state_arrays(state: State[Any]) -> list[Array]:
    arrays: list[Array] = []
    for layer in state.layers:
        arrays += layer.arrays() if isinstance(layer, KVCache) else layer
    return arrays


def same_state(a: State[Any], b: State[Any]) -> bool:
    """Equal up to float32 noise, measured as for the logits of one position: it is amplified in the same places."""
    assert a.length == b.length
    pairs = zip(state_arrays(a), state_arrays(b), strict=True)
    return all(x.shape == y.shape and nmse(y, x) <= NMSE_ONE_POSITION for x, y in pairs)


ids_strategy = st.lists(st.integers(0, 287), min_size=2, max_size=150)


class TestSplits:
    @settings(max_examples=25, deadline=None)
    @given(ids=ids_strategy, data=st.data())
    def test_any_split_gives_the_same(self, model: Model, ids: list[int], data: st.DataObject) -> None:
        whole_logits, whole = model.forward(ids, model.state())
        cuts = sorted(data.draw(st.sets(st.integers(1, len(ids) - 1), max_size=6)))
        state = model.state()
        for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True):
            logits, state = model.forward(ids[start:stop], state)
        assert nmse(whole_logits, logits) <= NMSE_ONE_POSITION
        assert same_state(state, whole)

    @settings(max_examples=10, deadline=None)
    @given(ids=st.lists(st.integers(0, 287), min_size=1, max_size=40))
    def test_token_by_token_equals_all_positions(self, model: Model, ids: list[int]) -> None:
        state, rows = model.state(), []
        for i in ids:
            logits, state = model.forward([i], state)
            rows.append(logits)
        assert nmse(model.logits(ids), np.stack(rows)) <= NMSE_ONE_POSITION

    @settings(max_examples=15, deadline=None)
    @given(prefix=ids_strategy, one=ids_strategy, two=ids_strategy)
    def test_an_old_state_stays_valid(self, model: Model, prefix: list[int], one: list[int], two: list[int]) -> None:
        _, root = model.forward(prefix, model.state())
        before = [x.copy() for x in state_arrays(root)]
        first, branch = model.forward(one, root)
        second, _ = model.forward(two, root)  # writes behind `root`, where `branch` has been already
        assert all(np.array_equal(x, y) for x, y in zip(before, state_arrays(root), strict=True))
        again, _ = model.forward(one, root)
        assert np.array_equal(first, again)
        assert nmse(model.forward(prefix + two, model.state())[0], second) <= NMSE_ONE_POSITION
        more, _ = model.forward([5], branch)
        assert nmse(model.forward([*prefix, *one, 5], model.state())[0], more) <= NMSE_ONE_POSITION

    def test_a_batch_of_sequences_equals_each_alone(self, model: Model) -> None:
        c, ops, weights = model.config.text, model.ops, model.engine.weights.text
        texts = [np.array(ids, np.int32) for ids in ([3, 1, 4, 1, 5], [9, 2], [6])]
        starts = [model.forward([7, 8], model.state())[1], model.state(), model.forward([1] * 70, model.state())[1]]
        hidden, after = text.forward(ops, c, weights, text.text_batch(texts, starts), starts)
        assert hidden.shape == (8, c.hidden_size)
        for ids, start, (end,) in zip(texts, starts, after, strict=True):
            assert same_state(end, model.forward(ids.tolist(), start)[1])


class TestKeep:
    @settings(max_examples=15, deadline=None)
    @given(prefix=ids_strategy, ids=st.lists(st.integers(0, 287), min_size=1, max_size=9), data=st.data())
    def test_each_kept_state_is_the_state_after_so_many_tokens(
        self, model: Model, prefix: list[int], ids: list[int], data: st.DataObject
    ) -> None:
        keep = data.draw(st.integers(0, len(ids)))
        _, root = model.forward(prefix, model.state())
        batch = text.text_batch([np.array(ids, np.int32)], [root])
        _, (states,) = text.forward(model.ops, model.config.text, model.engine.weights.text, batch, [root], keep)
        assert len(states) == keep + 1
        for i, state in enumerate(states):
            count = len(ids) - keep + i
            expected = model.forward(ids[:count], root)[1] if count else root
            assert same_state(state, expected)
            assert state.next_position == expected.next_position

    def test_going_on_from_a_kept_state(self, model: Model) -> None:
        _, root = model.forward(list(range(60)), model.state())
        batch = text.text_batch([np.arange(4, dtype=np.int32)], [root])
        _, (states,) = text.forward(model.ops, model.config.text, model.engine.weights.text, batch, [root], 4)
        logits, _ = model.forward([99, 98], states[2])  # two drafts accepted, two thrown away
        assert nmse(model.forward([*range(60), 0, 1, 99, 98], model.state())[0], logits) <= NMSE_ONE_POSITION


class TestState:
    def test_delta_state_has_constant_size(self, model: Model) -> None:
        def delta_nbytes(state: State[Any]) -> int:
            return sum(x.nbytes for layer in state.layers if isinstance(layer, DeltaState) for x in layer)

        _, long = model.forward([1] * 700, model.state())
        assert delta_nbytes(long) == delta_nbytes(model.state())

    def test_kv_grows_by_pages(self, model: Model) -> None:
        def kv_nbytes(count: int) -> int:
            _, state = model.forward([1] * count, model.state())
            return sum(layer.nbytes for layer in state.layers if isinstance(layer, KVCache))

        assert kv_nbytes(1) == kv_nbytes(256) < kv_nbytes(257) == kv_nbytes(512)


class TestBadRequests:
    def test_no_tokens(self, model: Model) -> None:
        with pytest.raises(UsageError, match="no tokens"):
            model.forward([], model.state())

    @pytest.mark.parametrize("wrong", [-1, 288, 10**12])
    def test_ids_outside_of_the_vocabulary(self, model: Model, wrong: int) -> None:
        with pytest.raises(UsageError, match=f"token id {wrong} is outside of the vocabulary of 288"):
            model.logits([1, wrong])

    def test_a_full_context(self, model: Model) -> None:
        small = Model(model.checkpoint, model.ops, context=8)
        _, state = small.forward([1] * 8, small.state())
        with pytest.raises(MemoryBudgetError, match="9 tokens exceed the context window of 8"):
            small.forward([1], state)

    def test_nan_weights_are_named(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path)
        file = SafetensorsFile(tmp_path / "model.safetensors")
        info = file.tensors["model.language_model.layers.1.mlp.down_proj.weight"]
        data = bytearray((tmp_path / "model.safetensors").read_bytes())
        start = file.data_start + info.start
        data[start : start + 2] = b"\xc0\x7f"
        (tmp_path / "model.safetensors").write_bytes(data)
        broken = edgeq.load(tmp_path, backend="numpy")
        with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN"):
            broken.forward([1], broken.state())

    @pytest.mark.parametrize("value", [b"\xc0\x7f", b"\x80\xff"])
    @pytest.mark.parametrize("part", ["scales", "biases"])
    def test_nan_and_infinite_scales_are_named(self, tmp_path: Path, part: str, value: bytes) -> None:
        """When the model is opened, whatever the backend: integer kernels would hide them."""
        write_checkpoint(tmp_path / "in")
        edgeq.quantize(tmp_path / "in", tmp_path / "q4", bits=4)
        path = tmp_path / "q4" / "model.safetensors"
        file = SafetensorsFile(path)
        start = file.data_start + file.tensors[f"model.language_model.layers.1.mlp.up_proj.{part}"].start
        data = bytearray(path.read_bytes())
        data[start : start + 2] = value
        path.write_bytes(data)
        with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight has NaN or infinity in its scales"):
            edgeq.load(tmp_path / "q4")
