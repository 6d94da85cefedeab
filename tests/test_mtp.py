"""The MTP head: its logits and drafts against a plain float64 reference, in every format and on every backend."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeq
from edgeq.api import Model
from edgeq.backends import available
from edgeq.checkpoint import Checkpoint, open_checkpoint
from edgeq.checkpoint.folder import FolderCheckpoint
from edgeq.config import Yarn
from edgeq.draft_head import draft_prefix
from edgeq.engine import Feed
from edgeq.errors import UsageError
from edgeq.formats.affine import dequantize
from edgeq.formats.bf16 import Array, from_float32, to_float32
from edgeq.formats.names import mlx_module
from edgeq.formats.safetensors import SafetensorsWriter
from edgeq.model import text
from edgeq.quant import quantize
from edgeq.quant.gguf_export import export_gguf
from edgeq.state import State, held_nbytes, joined
from edgeq.state_io import state_arrays, state_from_arrays
from edgeq.testing import config_values, nmse, write_checkpoint
from edgeq.weights import QMatrix, Role, declare_mtp, map_tree

# A head narrower and wider than the hidden size, one and several groups of key heads; sizes that quantizers take.
SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 1},
    "untied": {"hidden_size": 64, "tie_word_embeddings": False, "num_key_value_heads": 4},
}
FORMATS = ("bf16", "q8", "q4", "mlx", "gguf bf16", "gguf q8_0", "gguf q4_0")

# By backend and format, NMSE of the logits against float64 arithmetic on the same weights and hidden states.
NMSE = {
    ("numpy", "any"): 1e-11,  # float32 sums over some hundred terms
    ("mlx", "any"): 1e-11,
    ("cpu", "any"): 2e-3,  # activations rounded to int8 groups (tests/test_ops.py: 1e-4 a product), eight in a row
    ("cpu", "bf16"): 1e-4,  # bfloat16 activations and float16 keys, likewise
}


def ids_of(count: int, seed: int = 0) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(0, 288, count).tolist()
    return found


def write_mlx(checkpoint: Checkpoint, folder: Path) -> None:
    """The folder in MLX's layout: its names, convolutions with the channels last but one, norms with their 1 added."""
    assert isinstance(checkpoint, FolderCheckpoint)
    tensors = {}
    for spec, _ in checkpoint.storage():
        x = checkpoint.raw(spec.name)
        if spec.role is Role.CONV:
            x = np.moveaxis(x, 2, 1)
        elif spec.role is Role.NORM:
            x = from_float32(1 + to_float32(x))
        tensors[f"{mlx_module(spec.name)}{'.weight' if spec.name.endswith('.weight') else ''}"] = x
    folder.mkdir()
    (folder / "config.json").write_text((checkpoint.path / "config.json").read_text())
    types = {name: ("F32" if x.dtype == np.float32 else "BF16", x.shape) for name, x in tensors.items()}
    with SafetensorsWriter(folder / "model.safetensors", dict(sorted(types.items(), key=lambda t: t[1][0]))) as file:
        for name, (dtype, _) in sorted(types.items(), key=lambda t: t[1][0]):
            assert dtype
            file.write(name, np.ascontiguousarray(tensors[name]))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Checkpoints by shape and format."""
    root, made = tmp_path_factory.mktemp("mtp"), {}
    for shape, values in SHAPES.items():
        folder = root / shape
        write_checkpoint(folder, config_values(mtp=True, linear_key_head_dim=32, linear_value_head_dim=32, **values))
        made[shape, "bf16"] = folder
        for form in FORMATS[1:]:
            made[shape, form] = root / f"{shape}-{form.replace(' ', '-')}"
            if form.startswith("gguf"):
                made[shape, form] = made[shape, form].with_suffix(".gguf")
                export_gguf(open_checkpoint(folder), made[shape, form], form.split()[1])
            elif form == "mlx":
                write_mlx(open_checkpoint(folder), made[shape, form])
            else:
                quantize(folder, made[shape, form], bits=int(form[1:]), group_size=32)
    return made


@pytest.fixture(scope="module", params=[b.name for b in available() if b.ops])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


# --- the reference ---------------------------------------------------------------------------------------------------


def wide(checkpoint: Checkpoint, name: str) -> Array:
    """A weight as float64, dequantized."""
    found = checkpoint.matrix(name)
    return (dequantize(found) if isinstance(found, QMatrix) else to_float32(found)).astype(np.float64)


class Reference:
    """The head as a formula: one token after another, float64."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.c = c = checkpoint.config.text
        self.w: Any = map_tree(
            lambda spec: wide(checkpoint, spec.name) if spec.is_matrix else checkpoint.dense(spec.name), declare_mtp(c)
        )
        self.table = wide(checkpoint, "embed_tokens.weight")
        self.head = self.table if c.tie_word_embeddings else wide(checkpoint, "lm_head.weight")
        self.keys: list[Array] = []
        self.values: list[Array] = []

    def norm(self, x: Array, gain: Array) -> Array:
        return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + self.c.rms_norm_eps) * gain)

    def turn(self, x: Array, position: int) -> Array:
        pairs = self.c.rope.dim // 2
        angle = position * self.c.rope.theta ** (-np.arange(pairs) * 2 / self.c.rope.dim)
        a, b = x[:, :pairs], x[:, pairs : 2 * pairs]
        turned = [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle), x[:, 2 * pairs :]]
        return np.concatenate(turned, axis=1)

    def step(self, hidden: Array, following: int, position: int) -> Array:
        """h' of the token at `position`, whose hidden state is given, and which `following` follows."""
        c, w, mixer = self.c, self.w, self.w.layer.mixer
        both = [self.norm(self.table[following], w.pre_fc_norm_embedding), self.norm(hidden, w.pre_fc_norm_hidden)]
        x = w.fc @ np.concatenate(both)
        h = self.norm(x, w.layer.input_layernorm)
        q, gate = np.split((mixer.q_proj @ h).reshape(c.num_attention_heads, -1), 2, axis=1)
        shape = (c.num_key_value_heads, c.head_dim)
        self.keys.append(self.turn(self.norm((mixer.k_proj @ h).reshape(shape), mixer.k_norm), position))
        self.values.append((mixer.v_proj @ h).reshape(shape))
        q, out = self.turn(self.norm(q, mixer.q_norm), position), []
        for i in range(c.num_attention_heads):
            j = i * c.num_key_value_heads // c.num_attention_heads
            scores = np.array([key[j] @ q[i] for key in self.keys]) / np.sqrt(c.head_dim)
            weights = np.exp(scores - scores.max())
            mixed = sum(a * v[j] for a, v in zip(weights / weights.sum(), self.values, strict=True))
            out.append(mixed / (1 + np.exp(-gate[i])))
        x = x + mixer.o_proj @ np.concatenate(out)
        h = self.norm(x, w.layer.post_attention_layernorm)
        gated = w.layer.mlp.gate_proj @ h
        x = x + w.layer.mlp.down_proj @ (gated / (1 + np.exp(-gated)) * (w.layer.mlp.up_proj @ h))
        return self.norm(x, w.norm)

    def run(self, hidden: Array, ids: list[int]) -> Array:
        """Logits of all rows: hidden [n, hidden], ids [n + 1]."""
        self.keys, self.values = [], []
        return np.array([self.head @ self.step(hidden[k], ids[k + 1], k) for k in range(len(ids) - 1)])

    def draft(self, hidden: Array, ids: list[int], first: int, drafts: list[int]) -> Array:
        """Logits of the drafts after `ids` and then `first`, if they are those."""
        self.run(hidden, ids)
        logits, x = [], hidden[-1]
        for k, token in enumerate([first, *drafts[:-1]]):
            x = self.step(x, token, len(ids) - 1 + k)
            logits.append(self.head @ x)
        return np.array(logits)


def hidden_states(model: Model, ids: list[int]) -> Array:
    """The model's own, after the final norm."""
    batch, state = text.text_batch([np.array(ids, np.int32)], [model.state()]), model.state()
    hidden, _ = text.forward(model.ops, model.config.text, model.engine.weights.text, batch, [state])
    return model.ops.numpy(hidden).astype(np.float64)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_drafts(folders: dict[tuple[str, str], Path], backend: str, shape: str, form: str) -> None:
    model, ids = edgeq.load(folders[shape, form], backend=backend), ids_of(40)
    bound = NMSE.get((backend, form), NMSE[backend, "any"])
    reference, hidden = Reference(model.checkpoint), hidden_states(model, ids)
    logits = model.mtp_logits(ids)
    assert logits.shape == (39, model.vocab_size)
    assert nmse(reference.run(hidden, ids), logits) <= bound
    first = int(model.forward(ids, model.state())[0].argmax())
    drafts, rows = model.mtp_draft(ids, 4)
    assert drafts == rows.argmax(axis=1).tolist()
    assert nmse(reference.draft(hidden, ids, first, drafts), rows) <= 4 * bound  # each is made from the one before


@pytest.mark.parametrize("count", [1, 2, 3, 63, 64, 65, 130])
def test_texts_of_any_length(folders: dict[tuple[str, str], Path], count: int) -> None:
    """In pieces of a chunk, which the head reads as one."""
    model, ids = edgeq.load(folders["grouped", "bf16"], backend="numpy"), ids_of(count)
    model.engine.chunk = 64
    logits = model.mtp_logits(ids)
    assert logits.shape == (count - 1, 288)
    if count > 1:
        assert nmse(Reference(model.checkpoint).run(hidden_states(model, ids), ids), logits) <= 1e-11


# --- as a part of the state ------------------------------------------------------------------------------------------


def draft_arrays(model: Model, state: State[Any]) -> dict[str, Array]:
    return {name: x for name, x in state_arrays(model.ops, state).items() if name.startswith("draft.")}


def after(model: Model, state: State[Any], ids: list[int], pieces: list[int]) -> State[Any]:
    """`ids` run in pieces."""
    for i, n in enumerate(pieces):
        start = sum(pieces[:i])
        (output,) = model.engine.run([Feed(state, np.array(ids[start : start + n], np.int32))])
        state = output.state
    return state


@pytest.fixture(scope="module")
def model(folders: dict[tuple[str, str], Path], backend: str) -> Model:
    return edgeq.load(folders["grouped", "bf16"], backend=backend)


@pytest.mark.parametrize("pieces", [[50], [1] * 50, [16, 17, 17], [30, 1, 1, 1, 17], [3, 40, 7]])
def test_any_split_drafts_the_same(model: Model, pieces: list[int]) -> None:
    ids = ids_of(50)
    state = after(model, model.engine.state(draft=True), ids, pieces)
    assert state.draft is not None
    assert state.draft.length == state.length == 50
    head, vocabulary = model.engine.need_head(), model.engine.draft_vocabulary(288)
    drafts, state = head.draft(state, 7, 3, vocabulary.choose)
    assert state.draft is not None
    assert (state.draft.length, state.draft.waiting) == (50, 1)
    again, _ = head.draft(state, 7, 3, vocabulary.choose)
    reference = Reference(model.checkpoint).draft(hidden_states(model, ids), ids, 7, drafts)
    best = reference.max(axis=1)
    chosen = reference[np.arange(3), drafts]
    assert again == drafts
    assert (best - chosen < 0.05).all()  # on the CPU activations are bfloat16: two that are as good may change places


def test_kept_states_and_branches(model: Model) -> None:
    ids, root = ids_of(24), after(model, model.engine.state(draft=True), ids_of(10, 1), [10])
    (output,) = model.engine.run([Feed(root, np.array(ids, np.int32), keep=24)])
    for n, state in enumerate(output.states):
        expected = after(model, root, ids[:n], [n]) if n else root
        assert state.draft is not None
        assert state.draft.length == state.length == 10 + n
        head, vocabulary = model.engine.need_head(), model.engine.draft_vocabulary(288)
        assert head.draft(state, 5, 1, vocabulary.choose)[0] == head.draft(expected, 5, 1, vocabulary.choose)[0]
    assert root.draft is not None
    assert root.draft.length == 10


def test_a_head_that_joins_later_knows_what_came_since(model: Model) -> None:
    _, state = model.forward(ids_of(20), model.state())
    assert state.draft is None
    joining = state._replace(draft=model.engine.need_head().state())
    state = after(model, joining, ids_of(9, 2), [4, 5])
    assert state.draft is not None
    assert (state.length, state.draft.length) == (29, 9)
    drafts, _ = model.engine.need_head().draft(state, 3, 2, model.engine.draft_vocabulary(288).choose)
    assert len(drafts) == 2


@pytest.mark.parametrize("pieces", [[40], [30, 1, 1, 1], [1], [300], [257, 20, 1]])
def test_it_is_saved_and_comes_back(model: Model, pieces: list[int]) -> None:
    state = after(model, model.engine.state(draft=True), ids_of(sum(pieces)), pieces)
    saved = state_arrays(model.ops, state)
    back = state_from_arrays(model.ops, model.config.text, saved)
    model.engine.check_state(back)
    for name, x in state_arrays(model.ops, back).items():
        assert np.array_equal(x, saved[name]), name
    head, vocabulary = model.engine.need_head(), model.engine.draft_vocabulary(288)
    assert head.draft(back, 5, 3, vocabulary.choose)[0] == head.draft(state, 5, 3, vocabulary.choose)[0]


def test_it_comes_back_where_the_context_was_stretched(model: Model) -> None:
    """A state whose last token stands behind the model's own context window."""
    state = after(model, model.engine.state(draft=True), ids_of(30), [30])
    c = model.config.text
    short = replace(c, max_position_embeddings=20, rope=replace(c.rope, scaling=Yarn(2.0, 20, 1.0)))
    saved = state_arrays(model.ops, state)
    for name, x in state_arrays(model.ops, state_from_arrays(model.ops, short, saved)).items():
        assert np.array_equal(x, saved[name]), name


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("draft.hidden", lambda x: x[:, 1:]),
        ("draft.hidden", lambda x: np.full_like(x, np.nan)),
        ("draft.keys", lambda x: x[1:]),
        ("draft.values", lambda x: x.astype(np.float64)),
        ("draft.positions", lambda x: x - 1000),
        ("draft.positions", lambda x: x[:2]),
        ("draft.positions", lambda x: x.astype(np.int64)),
        ("draft.vectors", lambda _: None),
    ],
)
def test_a_damaged_one_is_refused(model: Model, name: str, change: Any) -> None:
    saved = state_arrays(model.ops, after(model, model.engine.state(draft=True), ids_of(300), [300]))
    changed = change(saved[name])
    broken = {key: x for key, x in saved.items() if key != name} | ({name: changed} if changed is not None else {})
    with pytest.raises(edgeq.ModelError, match="saved state"):
        state_from_arrays(model.ops, model.config.text, broken)


def test_states_changed_by_hand_are_refused(model: Model) -> None:
    state = after(model, model.engine.state(draft=True), ids_of(300), [300])
    draft = state.draft
    assert draft is not None
    longer = draft._replace(unread=draft.unread * 2)
    narrow = draft._replace(unread=(draft.unread[0]._replace(hidden=draft.unread[0].vectors[:, 1:]),))
    wrong: Any
    for wrong in (longer, narrow, draft._replace(unread=()), (None, draft.unread), "draft"):
        with pytest.raises(UsageError, match="does not fit"):
            model.engine.run([Feed(state._replace(draft=wrong), np.array([1], np.int32))])


def test_it_costs_what_it_holds(model: Model) -> None:
    plain, drafting = model.state(), model.engine.state(draft=True)
    for start in range(0, 600, 60):
        ids = ids_of(60, start)
        plain, drafting = after(model, plain, ids, [60]), after(model, drafting, ids, [60])
    draft = drafting.draft
    assert draft is not None
    unread = joined(model.ops, draft)
    assert draft.waiting == 1
    held = sum(nbytes for _, nbytes in draft.cache.memory()) + sum(x.nbytes for x in unread)
    assert 0 < held_nbytes([drafting]) - held_nbytes([plain]) <= 2 * held


def test_a_checkpoint_without_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", config_values())
    model = edgeq.load(tmp_path / "model", backend="numpy")
    for call in (lambda: model.mtp_logits([1, 2]), lambda: model.mtp_draft([1, 2], 2)):
        with pytest.raises(UsageError, match="no MTP head") as caught:
            call()
        assert "ngram" in str(caught.value.hint)
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    assert values["text_config"]["mtp_num_hidden_layers"] == 0


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, 10**9])
def test_numbers_of_drafts(model: Model, wrong: Any) -> None:
    with pytest.raises(UsageError, match="drafts must be"):
        model.mtp_draft([1, 2], wrong)


def test_the_draft_vocabulary(model: Model) -> None:
    """The prefix, what is always in, and what the sequence holds; each at its own row of the head."""
    engine, ops = model.engine, model.ops
    head = ops.numpy(ops.linear(hidden := ops.array(np.eye(128, dtype=np.float32)[:1]), engine.weights.text.lm_head))[0]
    full = engine.draft_vocabulary(288)
    assert full.choose(hidden) == int(head.argmax())
    order = np.argsort(head)[::-1].tolist()
    small = type(full)(ops, engine.weights.text.lm_head, 288, 256, 8, [order[1]])
    assert small.choose(hidden) == (order[1] if order[0] >= 8 else order[0])
    small.include(np.array([order[0], 300, -1], np.int32))
    assert small.choose(hidden) == order[0]
    assert small.nbytes == 256 * len({i for i in order[:2] if i >= 8})
    assert type(full)(ops, engine.weights.text.lm_head, 280, 256, 288).choose(hidden) == next(
        i for i in order if i < 280
    )


@pytest.mark.parametrize(("row", "model", "rows"), [
    (576, 434 << 20, 1 << 15), (1152, 1060 << 20, 1 << 15), (1440, 2370 << 20, 1 << 16), (4000, 1 << 20, 1 << 13),
])  # fmt: skip
def test_rows_that_a_draft_weighs(row: int, model: int, rows: int) -> None:
    """0.8B, 2B and 4B at 4 bits; a model that is nearly all head."""
    assert draft_prefix(row, model) == rows
