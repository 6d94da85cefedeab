"""Drafts change no token: replies with them against replies without, whatever shapes and whatever the drafts are worth.

Random weights accept next to none of their head's drafts, so most tests put others in their place (`bend`): tokens that
the model is known to say, right with some probability.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgeq
from edgeq.api import Model
from edgeq.backends import available
from edgeq.engine import Feed
from edgeq.errors import UsageError
from edgeq.formats.bf16 import Array
from edgeq.generate import Decoding, GenerationSettings, StopReason, Tally, check_draft, look_up
from edgeq.hub import DEMO
from edgeq.quant import quantize
from edgeq.session.context import Context
from edgeq.state import State
from edgeq.state_io import state_arrays
from edgeq.testing import config_values, write_checkpoint

BACKENDS = [b.name for b in available() if b.ops is not None]
WAYS: tuple[str | int, ...] = (1, 2, 3, 4, 8, "auto", "mtp", "ngram")
RATIOS: dict[str, dict[str, Any]] = {  # value heads for each key head, query heads for each pair of keys and values
    "1x": {"linear_num_key_heads": 4, "num_key_value_heads": 4},
    "2x": {"num_key_value_heads": 2},
    "4x": {"linear_num_key_heads": 1, "num_key_value_heads": 1},
}
GREEDY = GenerationSettings(temperature=0, max_tokens=20, loop_guard=False)

needs_native = pytest.mark.skipif("cpu" not in BACKENDS, reason="the native kernels are not built")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("speculation")
    for ratio, values in RATIOS.items():
        layers = ["linear_attention", "full_attention"]
        write_checkpoint(root / ratio, config_values(mtp=True, layer_types=layers, vocab_size=288, **values))
    quantize(root / "2x", root / "q4", bits=4, group_size=32)
    quantize(root / "4x", root / "q8", bits=8, group_size=32)
    write_checkpoint(root / "headless", config_values(layer_types=["linear_attention", "full_attention"]))
    return {path.name: path for path in root.iterdir()}


class Run:
    """A reply on a context of its own, or on one that goes on."""

    def __init__(
        self, model: Model, prompt: Sequence[int], draft: str | int, options: GenerationSettings = GREEDY, *,
        context: Context | None = None, bend: Callable[[int, list[int]], list[int]] | None = None, take: int = 10_000,
        eos_ids: Sequence[int] = (),
    ) -> None:  # fmt: skip
        speculation = model.language.speculation(model.engine, draft)
        if speculation is not None:
            speculation.bend = bend
        self.context = context or Context(model.engine, speculation=speculation)
        self.decoding = Decoding(
            prompt, model.language.sampler(options), room=self.context.room, eos_ids=eos_ids
        )  # fmt: skip
        tokens = self.context.tokens(self.decoding)
        for _ in zip(range(take), tokens, strict=False):
            pass
        tokens.close()  # type: ignore[attr-defined]

    @property
    def ids(self) -> list[int]:
        return list(self.decoding.reply_ids)

    @property
    def state(self) -> State[Any]:
        return self.context.state


def knowing(text: Sequence[int], chance: float, seed: int = 0) -> Callable[[int, list[int]], list[int]]:
    """Drafts of a known text, each right with `chance`."""
    rng = np.random.default_rng(seed)

    def bend(place: int, drafts: list[int]) -> list[int]:
        told = [*text[place : place + len(drafts)], *[0] * len(drafts)][: len(drafts)]
        return [token if rng.random() < chance else (token + 1) % 288 for token in told]

    return bend


def layers(model: Model, state: State[Any]) -> dict[str, Array]:
    """What a state holds, but for the head's part."""
    return {name: x for name, x in state_arrays(model.ops, state).items() if not name.startswith("draft.")}


def assert_same_state(model: Model, found: State[Any], expected: State[Any]) -> None:
    a, b = layers(model, found), layers(model, expected)
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(a[name], b[name]), name


def prompt_of(seed: int, most: int = 40) -> list[int]:
    rng = np.random.default_rng(seed)
    found: list[int] = rng.integers(0, 288, int(rng.integers(1, most))).tolist()
    return found


# --- the same tokens -------------------------------------------------------------------------------------------------


def check_identity(models: dict[str, Model], prompts: Sequence[int], *, bits: bool) -> Tally:
    """Greedy replies to random prompts, every way to draft and every model in turn."""
    total, names = Tally(), list(models)
    for i in prompts:
        model, prompt = models[names[i % len(names)]], prompt_of(i)
        plain = Run(model, prompt, "off")
        for j, chance in enumerate((0.0, 0.6, 0.95)):
            way = WAYS[(i + 3 * j) % len(WAYS)]
            drafted = Run(model, prompt, way, bend=knowing(prompt + plain.ids, chance, i))
            assert drafted.ids == plain.ids, (i, way, chance)
            if bits:
                assert_same_state(model, drafted.state, plain.state)
            tally = drafted.decoding.tally
            assert len(drafted.ids) == 1 + tally.passes + tally.accepted
            total.accepted += tally.accepted
            total.drafted += tally.drafted
    return total


@needs_native
def test_native_200_prompts_bit_for_bit(folders: dict[str, Path]) -> None:
    models = {
        f"{name} {kv}": edgeq.load(folders[name], backend="cpu", kv_bits=kv)
        for name in ("1x", "2x", "4x", "q4", "q8")
        for kv in (16, 8, 4)
    }
    total = check_identity(models, range(200), bits=True)
    assert total.accepted > 1000
    assert total.drafted - total.accepted > 1000


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "cpu"])
def test_other_backends(folders: dict[str, Path], name: str) -> None:
    models = {ratio: edgeq.load(folders[ratio], backend=name) for ratio in RATIOS}
    assert check_identity(models, range(8), bits=False).accepted > 30


@pytest.mark.parametrize("count", [pytest.param(80, marks=pytest.mark.slow), pytest.param(200, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "cpu"])
def test_other_backends_more_prompts(folders: dict[str, Path], name: str, count: int) -> None:
    models = {ratio: edgeq.load(folders[ratio], backend=name) for ratio in (*RATIOS, "q4")}
    # 80: every model ten times with each of its ways.
    assert check_identity(models, range(count), bits=False).accepted > 5 * count


@pytest.fixture(scope="module")
def model(folders: dict[str, Path]) -> Model:
    return edgeq.load(folders["2x"], backend="cpu" if "cpu" in BACKENDS else "numpy")


SHAPED = (
    {"temperature": 1.0}, {"temperature": 1.5, "top_k": 0, "top_p": 1.0}, {"presence_penalty": 2.0},
    {"frequency_penalty": 0.7, "temperature": 1.0}, {"repetition_penalty": 1.3, "temperature": 0},
    {"min_p": 0.05, "top_k": 50}, {"top_p": 0.5, "temperature": 0.8},
)  # fmt: skip


@pytest.mark.parametrize("shaped", SHAPED, ids=str)
def test_whatever_shapes_the_choice_holds(model: Model, shaped: dict[str, Any]) -> None:
    for seed in range(6):
        options, prompt = GREEDY.replace(temperature=0.7).replace(seed=seed, **shaped), prompt_of(seed)
        plain = Run(model, prompt, "off", options)
        for way in (2, 4, "auto"):
            drafted = Run(model, prompt, way, options, bend=knowing(prompt + plain.ids, 0.8))
            assert drafted.ids == plain.ids


def test_the_distribution_is_the_target_s(model: Model) -> None:
    """Seeds of their own, so that nothing is equal by construction: Pearson's chi-squared against the exact chances."""
    prompt, runs = prompt_of(3), 800
    options = GenerationSettings(temperature=1.0, top_k=3, top_p=1.0, max_tokens=3, loop_guard=False)
    chances = {}

    def walk(ids: tuple[int, ...], chance: float, state: State[Any], feed: Sequence[int]) -> None:
        logits, state = model.forward(feed, state)
        for token, p in zip(*model.language.sampler(options).distribution(logits), strict=True):
            following = (*ids, int(token))
            if len(following) == 3:
                chances[following] = chance * p
            else:
                walk(following, chance * p, state, [int(token)])

    walk((), 1.0, model.state(), prompt)
    assert sum(chances.values()) == pytest.approx(1)
    likely = max(chances, key=lambda ids: chances[ids])
    seen: Counter[tuple[int, ...]] = Counter()
    for seed in range(runs):
        drafted = Run(model, prompt, 2, options.replace(seed=10_000 + seed), bend=knowing([*prompt, *likely], 0.9))
        seen[tuple(drafted.ids)] += 1
    assert seen.keys() <= chances.keys()
    large = [ids for ids in chances if runs * chances[ids] >= 5]
    observed = [*(seen[ids] for ids in large), runs - sum(seen[ids] for ids in large)]
    expected = [*(runs * chances[ids] for ids in large), runs - sum(runs * chances[ids] for ids in large)]
    statistic = sum((a - b) ** 2 / b for a, b in zip(observed, expected, strict=True) if b > 1)
    freedom = len(large)
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5, "one in some ten thousand draws is farther off"


# --- where a reply ends, and what comes after it ---------------------------------------------------------------------


@pytest.mark.parametrize("limit", range(1, 9))
def test_the_last_tokens(model: Model, limit: int) -> None:
    prompt = prompt_of(5)
    plain = Run(model, prompt, "off", GREEDY.replace(max_tokens=limit))
    drafted = Run(model, prompt, 4, GREEDY.replace(max_tokens=limit), bend=knowing(prompt + plain.ids, 1.0))
    assert drafted.ids == plain.ids
    assert_same_state(model, drafted.state, plain.state)
    assert drafted.decoding.tally.drafted <= limit - 1


@pytest.mark.parametrize("room", range(1, 8))
def test_the_end_of_the_context(folders: dict[str, Path], room: int) -> None:
    prompt = prompt_of(6)
    small = edgeq.load(folders["2x"], backend="numpy", context=len(prompt) + room)
    endless = GREEDY.replace(max_tokens=1000)
    plain = Run(small, prompt, "off", endless)
    drafted = Run(small, prompt, 4, endless, bend=knowing(prompt + plain.ids, 1.0))
    assert drafted.ids == plain.ids
    assert drafted.decoding.finish == plain.decoding.finish
    assert drafted.decoding.finish.reason is StopReason.CONTEXT_FULL


def test_an_end_token_within_a_run(model: Model) -> None:
    prompt = prompt_of(7)
    full = Run(model, prompt, "off").ids
    for end in dict.fromkeys(full):
        plain = Run(model, prompt, "off", eos_ids=[end])
        drafted = Run(model, prompt, 4, bend=knowing(prompt + full, 1.0), eos_ids=[end])
        assert drafted.ids == plain.ids
        assert drafted.decoding.finish == plain.decoding.finish
        assert_same_state(model, drafted.state, plain.state)


def test_a_loop_within_a_run(model: Model) -> None:
    endless = GREEDY.replace(max_tokens=700, loop_guard=True)
    prompt = [5] * 8
    plain = Run(model, prompt, "off", endless)
    drafted = Run(model, prompt, 4, endless, bend=knowing(prompt + plain.ids, 0.9))
    assert (drafted.ids, drafted.decoding.finish) == (plain.ids, plain.decoding.finish)


@settings(max_examples=25)
@given(data=st.data())
def test_turns_left_anywhere_and_rolled_back(model: Model, data: st.DataObject) -> None:
    """Replies left after any token, states put back, further turns: always the state of the ids."""
    way = data.draw(st.sampled_from(WAYS))
    speculation = model.language.speculation(model.engine, way)
    assert speculation is not None
    drafts = data.draw(st.lists(st.lists(st.integers(0, 287), max_size=4), min_size=1, max_size=4))
    chance = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    context, plain = Context(model.engine, speculation=speculation), Context(model.engine)
    saved = (context.state, plain.state)
    for turn in range(data.draw(st.integers(1, 4))):
        prompt, take = prompt_of(data.draw(st.integers(0, 99)), 12), data.draw(st.integers(0, 12))
        before = plain.position
        expected = Run(model, prompt, "off", context=plain, take=take)
        known = knowing([0] * before + prompt + expected.ids + [3] * 8, chance, turn)
        speculation.bend = known if chance else lambda place, made: drafts[place % len(drafts)][: len(made)]
        found = Run(model, prompt, way, context=context, take=take)
        assert found.ids == expected.ids
        assert context.position == plain.position
        assert context.state.next_position == plain.state.next_position
        if model.ops.name == "cpu":
            assert_same_state(model, context.state, plain.state)
        if data.draw(st.booleans()):
            context.state, plain.state = saved
        elif data.draw(st.booleans()):
            saved = (context.state, plain.state)


def test_ctrl_c_in_a_pass_leaves_the_state_before_it(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompt_of(8)
    plain = Run(model, prompt, "off")
    speculation = model.language.speculation(model.engine, 3)
    assert speculation is not None
    speculation.bend = knowing(prompt + plain.ids, 0.7)
    context = Context(model.engine, speculation=speculation)
    decoding = Decoding(prompt, model.language.sampler(GREEDY), room=context.room, eos_ids=())
    run, calls = model.engine.run, [0]

    def interrupted(feeds: Sequence[Feed[Any]], **options: Any) -> Any:
        calls[0] += 1
        if calls[0] % 3 == 0:
            raise KeyboardInterrupt
        return run(feeds, **options)

    monkeypatch.setattr(model.engine, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        for _ in context.tokens(decoding):
            pass
    monkeypatch.undo()
    before = Run(model, prompt, "off", take=context.position - len(prompt) + 1)
    assert list(decoding.reply_ids) == before.ids
    assert context.position == before.context.position
    if model.ops.name == "cpu":
        assert_same_state(model, context.state, before.state)


# --- in a chat -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talker(chat_folder: Path) -> Model:
    return edgeq.load(chat_folder, backend="cpu" if "cpu" in BACKENDS else "numpy")


@pytest.mark.parametrize("options", [
    {"thinking": False, "max_tokens": 30, "temperature": 0}, {"thinking": True, "thinking_budget": 7, "max_tokens": 9},
    {"thinking": True, "thinking_budget": 1, "max_tokens": 20},
    {"thinking": False, "max_tokens": 25, "stop": ("e", "0")},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("draft", ["auto", 1, 3, "ngram"])
def test_conversations(talker: Model, draft: str | int, options: dict[str, Any]) -> None:
    plain = talker.chat(draft="off", seed=5, **options)
    drafted = talker.chat(draft=draft, seed=5, **options)
    for text in ("Hello there", "and again, and again", "what?"):
        replies = [chat.send(text) for chat in (plain, drafted)]
        pieces = [list(reply) for reply in replies]
        assert pieces[0] == pieces[1]
        assert replies[0].ids == replies[1].ids
        assert replies[0].finish == replies[1].finish
        assert plain.ids == drafted.ids
        assert replies[0].accepted == replies[0].usage.passes == 0
        assert replies[1].usage.accepted_tokens == replies[1].accepted <= replies[1].usage.drafted_tokens
    plain.undo()
    drafted.undo()
    assert list(plain.send("so")) == list(drafted.send("so"))
    assert list(plain.regenerate()) == list(drafted.regenerate())
    assert drafted.fresh().draft == draft


def test_a_stop_string_within_a_run_drops_the_rest(talker: Model) -> None:
    ids = talker.need_tokenizer().encode("one two three")
    full = talker.generate(ids, draft="off", temperature=0, max_tokens=40, ignore_eos=True)
    text = "".join(piece.text for piece in full)
    stop = text[len(text) // 2 :][:3]
    replies = [
        talker.generate(ids, draft=draft, temperature=0, max_tokens=40, ignore_eos=True, stop=(stop,))
        for draft in ("off", 4, "ngram")
    ]
    for reply in replies:
        list(reply)
        assert (reply.text, reply.ids) == (replies[0].text, replies[0].ids)
        assert reply.finish.reason is StopReason.STOP_STRING
        assert len(reply.ids) < 40


@pytest.mark.parametrize("draft", [2, 4, "auto", "ngram"])
def test_pictures_in_the_context(draft: str | int) -> None:
    """The demo model reads its picture, and drafts what it says of it."""
    demo = edgeq.load("demo", backend="cpu" if "cpu" in BACKENDS else "numpy")
    chats = [demo.chat(draft=way, temperature=0, thinking=False, max_tokens=20) for way in ("off", draft)]
    questions = (
        "How many figures are there?",
        "What is in the top left corner?",
        "What is in the bottom right corner?",
    )
    for i, question in enumerate(questions):
        replies = [chat.send(question, images=[DEMO / "picture.png"] if i == 0 else []) for chat in chats]
        for reply in replies:
            list(reply)
        assert replies[0].text == replies[1].text
        assert replies[0].ids == replies[1].ids
        if draft == 2:
            assert replies[1].accepted > 2
    if "cpu" in BACKENDS:
        assert_same_state(demo, chats[1]._context.state, chats[0]._context.state)


# --- what may be asked for -------------------------------------------------------------------------------------------


def test_a_model_without_a_head(folders: dict[str, Path]) -> None:
    model = edgeq.load(folders["headless"], backend="numpy")
    plain = Run(model, [7, 8, 9] * 5, "off")
    for way in ("auto", "ngram", 3):
        assert Run(model, [7, 8, 9] * 5, way).ids == plain.ids
    assert Run(model, [7, 8, 9] * 5, 3, take=1).decoding.tally.drafted == 0
    assert Run(model, [7, 8, 9] * 5, 3, bend=lambda _, made: made).state.draft is None
    with pytest.raises(UsageError, match="no MTP head") as caught:
        model.generate([1], draft="mtp")
    assert "ngram" in str(caught.value.hint)


def test_without_drafts_nothing_of_it_is_there(model: Model) -> None:
    assert Run(model, prompt_of(1), "off").state.draft is None
    assert Run(model, prompt_of(1), "ngram").state.draft is None
    assert Run(model, prompt_of(1), "auto").state.draft is not None


@pytest.mark.parametrize(("given", "expected"), [
    ("auto", "auto"), ("off", "off"), ("none", "off"), (0, "off"), ("0", "off"), ("draft-mtp", "mtp"), ("3", 3),
    (8, 8), ("ngram-simple", "ngram"),
])  # fmt: skip
def test_ways(given: str | int, expected: str | int) -> None:
    assert check_draft(given) == expected


@pytest.mark.parametrize("wrong", [9, -1, True, 1.0, "", "MTP", "9", None, "\u0663", []])
def test_no_ways(model: Model, wrong: Any) -> None:
    for call in (lambda: check_draft(wrong), lambda: model.generate([1], draft=wrong)):
        with pytest.raises(UsageError, match="draft must be") as caught:
            call()
        assert "auto, off, mtp, ngram" in str(caught.value.hint)


# --- n-grams ---------------------------------------------------------------------------------------------------------


def looked_up(ids: list[int], most: int) -> list[int]:
    """The same by trying every place."""
    best, start = 2, 0
    for end in range(1, len(ids)):
        agreed = 0
        while agreed < min(8, end) and ids[end - 1 - agreed] == ids[-1 - agreed]:
            agreed += 1
        if agreed >= max(best, 3):
            best, start = agreed, end
    return ids[start : start + most] if start else []


@given(ids=st.lists(st.integers(0, 3), max_size=60), most=st.integers(1, 8))
def test_look_up(ids: list[int], most: int) -> None:
    assert look_up(np.array(ids, np.int32), most) == looked_up(ids, most)


def test_look_up_in_a_long_text() -> None:
    ids = np.random.default_rng(0).integers(0, 50_000, 200_000).astype(np.int32)
    assert look_up(ids, 4) == []
    ids[-6:] = ids[1000:1006]
    assert look_up(ids, 4) == ids[1006:1010].tolist()
