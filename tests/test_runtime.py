"""The Python API: loading, raw completion, conversations."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgeq
from edgeq.api import Model
from edgeq.errors import MemoryBudgetError, ModelError, UsageError
from edgeq.generate import StopReason
from edgeq.session.context import Context
from edgeq.testing import config_values, write_checkpoint


@pytest.fixture(scope="module")
def model(chat_folder: Path) -> Model:
    return edgeq.load(chat_folder, backend="numpy")


class TestPublicNames:
    def test_all_is_what_there_is(self) -> None:
        for name in edgeq.__all__:
            assert getattr(edgeq, name) is not None

    def test_an_unknown_name(self) -> None:
        with pytest.raises(AttributeError, match="no attribute 'nope'"):
            edgeq.nope  # noqa: B018


class TestLoad:
    def test_an_unknown_backend(self, chat_folder: Path) -> None:
        with pytest.raises(UsageError, match="unknown backend 'abacus'"):
            edgeq.load(chat_folder, backend="abacus")

    @pytest.mark.parametrize("context", [0, 4097])
    def test_an_impossible_context(self, chat_folder: Path, context: int) -> None:
        with pytest.raises(UsageError, match=f"context must be 1 to 4096 tokens, got {context}"):
            edgeq.load(chat_folder, backend="numpy", context=context)

    def test_a_tokenizer_of_another_model(self, chat_folder: Path, tmp_path: Path) -> None:
        write_checkpoint(tmp_path)  # 288 rows
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(chat_folder / file, tmp_path)
        with pytest.raises(ModelError, match="the tokenizer has 1057 tokens, the model 288"):
            edgeq.load(tmp_path, backend="numpy")

    def test_without_a_tokenizer(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, config_values())
        model = edgeq.load(tmp_path, backend="numpy")
        pieces = list(model.generate([1, 2, 3], max_tokens=5, temperature=0.0, ignore_eos=True))
        assert [piece.text for piece in pieces] == [""] * 6
        assert all(piece.token is not None for piece in pieces[:5])
        with pytest.raises(ModelError, match=r"no tokenizer\.json"):
            model.generate("text")
        with pytest.raises(ModelError, match=r"no tokenizer\.json"):
            model.chat()

    def test_stop_ids_come_from_everywhere(self, chat_folder: Path, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        shutil.copytree(chat_folder, folder)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5]}))
        model = edgeq.load(folder, backend="numpy")
        assert model.tokenizer is not None
        assert model.eos_ids == {5, *model.config.text.eos_token_ids, *model.tokenizer.eos_token_ids}


class TestGenerate:
    def test_the_same_as_forward_and_argmax(self, model: Model) -> None:
        prompt = [10, 20, 30]
        reply = model.generate(prompt, max_tokens=12, temperature=0.0, ignore_eos=True, loop_guard=False)
        logits, state = model.forward(prompt, model.state())
        for piece in list(reply)[:-1]:
            expected = int(np.argmax(logits[: model.tokenizer.vocab_size]))  # type: ignore[union-attr]
            assert piece.token == expected
            logits, state = model.forward([expected], state)
        assert reply.finish.reason is StopReason.LENGTH
        assert reply.usage.generated_tokens == 12

    def test_text_pieces_make_the_decoded_text(self, model: Model) -> None:
        reply = model.generate("Hello", max_tokens=40, seed=3, ignore_eos=True, temperature=2.0, top_k=0)
        text = "".join(piece.text for piece in reply)
        assert model.tokenizer is not None
        shown = [i for i in reply.ids if i not in model.tokenizer.eos_token_ids]
        assert text == reply.text == model.tokenizer.decode(shown)

    def test_padding_rows_are_never_sampled(self, model: Model) -> None:
        reply = model.generate([1], max_tokens=60, temperature=10.0, top_k=0, top_p=1.0, ignore_eos=True, seed=0)
        assert all(piece.token is None or piece.token < 1057 for piece in reply)

    def test_a_seed_repeats(self, model: Model) -> None:
        once, twice = (list(model.generate([1, 2], max_tokens=10, seed=7, temperature=1.5)) for _ in range(2))
        assert once == twice

    def test_a_stop_string_ends_the_text_before_it(self, model: Model) -> None:
        free = model.generate("abc", max_tokens=30, temperature=0.0, ignore_eos=True)
        text = "".join(piece.text for piece in free)
        stop = text[10:14]
        reply = model.generate("abc", max_tokens=30, temperature=0.0, ignore_eos=True, stop=(stop,))
        shown = "".join(piece.text for piece in reply)
        assert shown == text[: text.index(stop)]
        assert reply.finish.reason is StopReason.STOP_STRING

    def test_unknown_options_are_named(self, model: Model) -> None:
        with pytest.raises(UsageError, match="unknown generation option 'temprature'"):
            model.generate([1], temprature=1.0)

    def test_a_prompt_that_does_not_fit(self, chat_folder: Path) -> None:
        small = edgeq.load(chat_folder, backend="numpy", context=16)
        with pytest.raises(MemoryBudgetError, match=r"the prompt \(16 tokens\) leaves no room for a reply: 16 tokens"):
            small.generate([1] * 16)

    def test_long_prompts_report_progress(self, model: Model) -> None:
        seen: list[tuple[int, int]] = []
        context = Context(model.engine, on_prefill=lambda done, total: seen.append((done, total)))
        context.feed([1] * (model.engine.chunk + 1))
        assert seen == [(0, model.engine.chunk + 1), (model.engine.chunk + 1, model.engine.chunk + 1)]


class TestChat:
    def test_two_channels(self, model: Model) -> None:
        chat = model.chat(thinking=True, thinking_budget=6, max_tokens=5, seed=0, temperature=3.0)
        reply = chat.send("hello")
        channels = [piece.channel for piece in reply]
        assert channels == sorted(channels, reverse=True)  # thinking, then the answer
        assert set(channels) == {"thinking", "answer"}
        assert reply.usage.thinking_tokens <= 7

    def test_without_thinking_there_is_only_an_answer(self, model: Model) -> None:
        reply = model.chat(thinking=False, max_tokens=5, seed=0).send("hello")
        assert {piece.channel for piece in reply} == {"answer"}

    def test_nothing_is_processed_twice(self, model: Model) -> None:
        chat = model.chat(max_tokens=5, seed=0)
        first = chat.send("one")
        list(first)
        before = len(chat.ids)
        second = chat.send("two")
        list(second)
        assert first.usage.cached_tokens == 0
        assert second.usage.cached_tokens >= before - 1  # the last token of a reply is fed with the next turn

    def test_the_state_is_that_of_the_ids(self, model: Model) -> None:
        chat = model.chat(max_tokens=4, seed=0, temperature=0.0)
        for text in ("one", "two", "three"):
            list(chat.send(text))
        fed = chat.ids[: chat._context.position]
        ours, _ = model.forward([7], chat._context.state)
        cold, _ = model.forward([*fed, 7], model.state())
        assert np.allclose(ours, cold, atol=1e-3)

    def test_undo_and_regenerate(self, model: Model) -> None:
        chat = model.chat(max_tokens=4, temperature=0.0)
        list(chat.send("one"))
        before = list(chat.ids)
        reply = chat.send("two")
        list(reply)
        again = chat.regenerate()
        list(again)
        assert again.ids == reply.ids
        assert [turn.text for turn in chat.undo()] == ["two"]
        assert list(chat.ids) == before
        assert [turn.text for turn in chat.undo()] == ["one"]
        assert not chat.ids
        with pytest.raises(UsageError, match="nothing to undo"):
            chat.undo()

    def test_a_reply_left_early_counts_as_far_as_it_went(self, model: Model) -> None:
        chat = model.chat(max_tokens=20, seed=0)
        reply = chat.send("one")
        next(reply)
        ids = list(chat.ids)
        list(chat.send("two"))
        assert list(chat.ids)[: len(ids)] == ids
        assert reply.finish.reason is StopReason.INTERRUPTED

    def test_a_turn_that_does_not_fit_changes_nothing(self, chat_folder: Path) -> None:
        chat = edgeq.load(chat_folder, backend="numpy", context=120).chat(max_tokens=3, seed=0)
        list(chat.send("hello"))
        before = list(chat.ids)
        with pytest.raises(MemoryBudgetError, match="leaves no room for a reply"):
            chat.send("x" * 500)
        assert list(chat.ids) == before
        list(chat.send("ok"))

    @settings(max_examples=10, deadline=None)
    @given(
        turns=st.lists(st.tuples(st.text(max_size=20), st.booleans()), min_size=1, max_size=4), seed=st.integers(0, 99)
    )
    def test_ids_of_a_turn_are_a_prefix_of_the_next(
        self, model: Model, turns: list[tuple[str, bool]], seed: int
    ) -> None:
        chat = model.chat(max_tokens=6, thinking_budget=6, seed=seed, temperature=1.5, system="Be brief.")
        before: list[int] = []
        for text, thinking in turns:
            chat.thinking = thinking
            list(chat.send(text))
            assert list(chat.ids)[: len(before)] == before
            before = list(chat.ids)

    @pytest.mark.parametrize("thinking", ["x", 1, ()])
    def test_thinking_is_true_or_false(self, model: Model, thinking: Any) -> None:
        with pytest.raises(UsageError, match="thinking must be True, False or None"):
            model.chat(thinking=thinking)
        chat = model.chat()
        chat.thinking = thinking
        with pytest.raises(UsageError, match="thinking must be True"):
            chat.send("hi")
        assert not chat.ids

    def test_settings_come_from_the_checkpoint_or_the_card(
        self, model: Model, chat_folder: Path, tmp_path: Path
    ) -> None:
        assert model.chat(thinking=True).settings.presence_penalty == 1.5
        assert model.chat(thinking=False).settings.presence_penalty == 2.0
        folder = tmp_path / "model"
        shutil.copytree(chat_folder, folder)
        (folder / "generation_config.json").write_text('{"do_sample": false, "top_k": 7}')
        settings = edgeq.load(folder, backend="numpy").chat(seed=1).settings
        assert (settings.temperature, settings.top_k, settings.presence_penalty, settings.seed) == (0.0, 7, 2.0, 1)

    def test_a_recommendation_that_cannot_be_is_told_once(self, chat_folder: Path, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        shutil.copytree(chat_folder, folder)
        (folder / "generation_config.json").write_text('{"temperature": "hot", "top_p": 7, "presence_penalty": 0.5}')
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model = edgeq.load(folder, backend="numpy")
            settings = model.chat(temperature=0.5, top_p=0.5, max_tokens=1).settings
            assert (settings.temperature, settings.presence_penalty) == (0.5, 0.5)
        assert not told  # the caller's own settings win before anything is judged
        with pytest.warns(
            UserWarning, match=r"generation_config\.json: top_p must be above 0 and at most 1, got 7: left"
        ):
            assert model.chat(temperature=0.5).settings.top_p == 1.0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert model.chat().settings.temperature == 1.0
