"""Turns of a conversation: given histories, undoing, answering again, going on, what is kept and what is forgotten."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import edgeq
from edgeq.api import Model
from edgeq.errors import EdgeqError, MemoryBudgetError, ModelError, UsageError
from edgeq.generate import StopReason
from edgeq.hub import DEMO
from edgeq.session.chat import Chat
from edgeq.session.prefixes import PrefixStore
from edgeq.session.reply import Reply
from edgeq.testing import nmse
from edgeq.text.conversation import Conversation, Generated
from edgeq.text.template import ChatTemplate
from edgeq.text.tokenizer import Tokenizer
from edgeq.vision.visual import Visual

HISTORIES: dict[str, Any] = json.loads(
    gzip.decompress((Path(__file__).parent / "data" / "histories.json.gz").read_bytes())
)
CASES = HISTORIES["cases"]
TOOL = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
}
QUESTION = {"role": "user", "content": "where is it?"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [
    {"id": "a", "type": "function", "function": {"name": "look", "arguments": '{"at": "top"}'}},
    {"id": "b", "type": "function", "function": {"name": "look", "arguments": {"at": "left"}}},
]}  # fmt: skip


@pytest.fixture(scope="module")
def folder(chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with the real template, which takes parts and pictures."""
    folder = tmp_path_factory.mktemp("turns") / "model"
    shutil.copytree(chat_folder, folder)
    shutil.copy(DEMO / "chat_template.jinja", folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return edgeq.load(folder, backend="numpy")


@pytest.fixture(scope="module")
def small(folder: Path) -> Model:
    return edgeq.load(folder, backend="numpy", context=200)


def done(reply: Reply, take: int | None = None) -> Reply:
    """A reply, listened to until its end, or for some pieces."""
    for i, _ in enumerate(reply, 1):
        if i == take:
            reply.close()
    return reply


def picture(seed: int = 0, height: int = 2, width: int = 2) -> Visual:
    """One for the tiny tower: 4 x 4 pixels a patch, two frames of three colours."""
    pixels = np.random.default_rng(seed).normal(size=(4 * height * width, 96)).astype(np.float32)
    return Visual.given(("image", pixels, (1, 2 * height, 2 * width)), 2)


def assert_state(chat: Chat) -> None:
    """The state is that of the conversation's ids and pictures, read at once."""
    ids, position = list(chat.ids), chat.context.cached
    if ids:
        cold, _ = chat.model.forward([*ids, 7], visuals=chat.visuals)  # type: ignore[attr-defined]
        seen = sum(place.frame == 0 for place in chat._dialogue.places if place.start < position)
        warm, _ = chat.model.forward([*ids[position:], 7], chat._context.state, chat.visuals[seen:])  # type: ignore[attr-defined]
        assert nmse(cold, warm) <= 1e-6  # rounding: the tokens were cut elsewhere


def rebuilt(chat: Chat) -> list[int]:
    """The ids of a fresh conversation in which the same was said and generated."""
    old = chat._dialogue.conversation
    new = Conversation(
        chat.model.language.need_tokenizer(), chat.model.language.need_template(), enable_thinking=chat.thinking,
        spelling=chat.model.language.spelling,
    )  # fmt: skip
    new.append([] if chat._dialogue.system is None else [chat._dialogue.system.rendered])
    generated = [entry.ids for entry in old.entries if isinstance(entry, Generated)]
    for turn in chat.turns:
        new.enable_thinking = turn.thinking
        for said in turn.said:
            new.append([said.rendered], visuals=[edgeq.text.visuals.Outline.of(v) for v in said.visuals])
        if turn.reply is not None and not turn.tokens:
            new.append([turn.reply])
        elif turn.reply is not None or turn is chat.turns[-1]:
            if turn.base is not None:
                new.open(turn.base)
            if turn.tokens:
                new.append_generated(generated.pop(0))
    assert not generated
    return list(new.ids)


# --- given histories -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kits() -> dict[bool, tuple[Tokenizer, ChatTemplate]]:
    tokenizer = Tokenizer.from_folder(DEMO)
    small, large = (DEMO / "chat_template.jinja").read_text(), HISTORIES["large"]
    return {False: (tokenizer, ChatTemplate(small)), True: (tokenizer, ChatTemplate(large))}


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['name']}, {c['large']}, {c['tools']}, {c['thinking']}")
def test_histories_render_as_in_transformers(kits: Any, case: dict[str, Any]) -> None:
    tokenizer, template = kits[case["large"]]
    options = {"enable_thinking": case["thinking"], "tools": [TOOL] if case["tools"] else None}

    def ids(messages: list[dict[str, Any]]) -> list[int]:
        return list(Conversation.from_messages(tokenizer, template, messages, **options).ids)

    if case["text"] is None:
        with pytest.raises(EdgeqError, match=r"message \d is a system|message 1 has the role|No user query"):
            ids(case["messages"])
        return
    assert ids(case["messages"]) == tokenizer.encode(case["text"], control=True)
    spelled = json.loads(json.dumps(case["messages"]))
    for call in (call for message in spelled for call in message.get("tool_calls", ())):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    assert ids(spelled) == ids(case["messages"])
    if case.get("going on"):
        conversation = Conversation.from_messages(tokenizer, template, case["messages"][:-1], **options)
        conversation.open(case["messages"][-1])
        assert list(conversation.ids) == tokenizer.encode(case["going on"], control=True)


def test_a_chat_of_a_history() -> None:
    """Its ids are the template's; what is said next and generated comes behind, and only that is run."""
    demo = edgeq.load("demo", backend="numpy")
    demo.prefixes.limit = 0  # of other cases nothing is at hand
    for case in CASES:
        if case["large"] or case["tools"] or case["thinking"] is not None or not case["text"]:
            continue
        chat = demo.chat(messages=case["messages"], max_tokens=2, thinking=False)
        assert list(chat.ids) == demo.need_tokenizer().encode(case["text"], control=True), case["name"]
        assert len(demo.chat(messages=chat.messages).turns) == len(chat.turns)
        assert demo.chat(messages=chat.messages).messages == chat.messages
        if case["messages"][-1]["role"] == "assistant":
            with pytest.raises(UsageError, match="nothing to answer"):
                chat.answer()
            reply = done(chat.send("more"))
            whole = demo.prompt([*case["messages"], {"role": "user", "content": "more"}], thinking=False).ids
        else:
            reply, whole = done(chat.answer()), list(chat.ids)[: -len(chat.turns[-1].tokens)]
        assert reply.usage.cached_tokens == 0
        assert list(chat.ids)[: len(whole)] == whole
        before = len(chat.ids)
        reply = done(chat.answer([*chat.messages, {"role": "user", "content": "and now?"}]))
        assert reply.usage.cached_tokens >= before - 1


def test_a_longer_history_runs_only_what_is_new(model: Model) -> None:
    chat = model.chat(max_tokens=3, seed=1, thinking=True, thinking_budget=2)
    history: list[dict[str, Any]] = [{"role": "system", "content": "s"}]
    for text in ("one", "two", "three"):
        history.append({"role": "user", "content": text})
        before = len(chat.ids)
        reply = done(chat.answer(history))
        assert reply.usage.cached_tokens == max(0, before - 1)
        assert reply.message is not None
        history.append({"role": "assistant", "content": reply.message["content"]})  # its thinking is not sent back
    assert_state(chat)
    reply = done(chat.answer([*history[:-1], {"role": "assistant", "content": "something else"}, QUESTION]))
    assert [turn.role for turn in chat.turns] == ["user"] * 4
    assert chat.messages[-3]["content"] == "something else"
    assert reply.usage.cached_tokens >= before - 1  # all before the turn whose reply differs
    done(chat.answer([{"role": "system", "content": "other"}, QUESTION]))
    assert chat.messages[0] == {"role": "system", "content": "other"}
    assert [turn.role for turn in chat.turns] == ["user"]
    assert list(chat.ids)[: -len(chat.turns[0].tokens)] == list(
        model.chat(messages=[{"role": "system", "content": "other"}, QUESTION], thinking=True).ids
    )
    done(chat.answer([QUESTION]))
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]


def test_histories_that_are_none(model: Model) -> None:
    wrong: list[tuple[Any, str]] = [
        ("text", "messages must be a list of objects, got 'text'"),
        ([5], "messages must be a list of objects"),
        ([{"content": "x"}], "message 1 has the role None"),
        ([QUESTION, {"role": "assistant", "content": "", "tool_calls": "look"}], "2 has the tool_calls 'look'"),
        ([QUESTION, {**CALLS, "tool_calls": [{"function": {"name": 5}}]}], "message 2 has the tool call"),
        ([QUESTION, {**CALLS, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "'f' with the argum"),
        ([QUESTION, {**CALLS, "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}], "'f' with the argum"),
        ([QUESTION, {**CALLS, "tool_calls": [{"function": {"name": "f", "arguments": "[" * 99_999}}]}], "'f' with the"),
        ([QUESTION, CALLS, {"role": "tool", "tool_call_id": "c", "content": "x"}], "result of the tool call 'c'"),
        ([{"role": "user", "content": "x", "function_call": {}}], "message 1 has a function_call"),
        ([{"role": "user", "content": None}], "must be text or a list of parts, got None"),
        ([{"role": "system", "content": [{"type": "image", "image": picture()}]}], "system message cannot have pict"),
    ]  # fmt: skip
    for messages, said in wrong:
        with pytest.raises(UsageError, match=said):
            model.chat(messages=messages)
        chat = model.chat(max_tokens=1, seed=0)
        done(chat.send("hi"))
        before, ids = chat.messages, list(chat.ids)
        with pytest.raises(UsageError, match=said):
            chat.answer(messages)
        assert (chat.messages, list(chat.ids)) == (before, ids)
    with pytest.raises(UsageError, match="two system prompts"):
        model.chat(system="a", messages=[{"role": "system", "content": "b"}])


# --- arguments are checked where they come in ------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "said"), [
    (lambda m: m.chat().send(None), "a message must be text or a list of parts, got None"),
    (lambda m: m.chat().send(b"x"), "a message must be text or a list of parts"),
    (lambda m: m.chat().send([{"type": "text", "text": "x", "image_url": "y"}]), "text and picture at once"),
    (lambda m: m.chat().send([{"type": "text", "text": "x", "image": "y"}]), "text and picture at once"),
    (lambda m: m.chat().send("x", assistant_prefix=5), "assistant_prefix must be a text, got 5"),
    (lambda m: m.chat().send([None]), "a part of the message is None"),
    (lambda m: m.chat(messages=[{"role": "user", "content": ["x"]}]), "a part of the message is 'x'"),
    (lambda m: m.chat(loop_guard="no"), "loop_guard must be True or False"),
    (lambda m: m.chat(settings={"temperature": 1}), "settings must be GenerationSettings"),
    (lambda m: m.generate("x", settings="x"), "settings must be GenerationSettings"),
    (lambda m: m.chat(tools=[{}]), "a tool has no name"),
    (lambda m: m.chat(tools=[{"type": "function", "function": {"name": ""}}]), "a tool has no name"),
    (lambda m: m.chat(tools=[{"name": "a", "parameters": "x"}]), "parameters of the tool a must be a JSON schema"),
    (lambda m: m.chat(tools=[TOOL, TOOL]), "several tools of the name"),
    (lambda m: m.chat(system=5), "a message must be text or a list of parts, got 5"),
    (lambda m: m.chat(tools="look"), "tools must be a list of objects, got 'look'"),
    (lambda m: m.chat(tools=TOOL), "tools must be a list of objects"),
    (lambda m: m.chat(temprature=1), "unknown generation option 'temprature'"),
    (lambda m: m.chat(temperature=11), "temperature must be from 0 to 10"),
    (lambda m: m.chat(stop=""), "stop must be"),
    (lambda m: m.chat(overflow="wrap"), 'overflow must be "stop" or "shift"'),
    (lambda m: setattr(m.chat(), "overflow", "wrap"), 'overflow must be "stop" or "shift"'),
    (lambda m: m.chat(on_look=5), "on_look must be a function"),
    (lambda m: m.chat(on_prefill="x"), "on_prefill must be a function"),
    (lambda m: m.chat().send_tool_results("x"), "a tool result cannot open a conversation"),
    (lambda m: m.chat(messages=[QUESTION, CALLS]).send_tool_results(), "no result of a tool is given"),
    (lambda m: m.chat(messages=[QUESTION, CALLS]).send_tool_results("x"), "1 results are given for 2 calls"),
    (lambda m: m.chat(messages=[QUESTION, CALLS]).send_tool_results({"a": "x", "c": "y"}), "are given for the calls"),
    (lambda m: m.chat(messages=[QUESTION, CALLS]).send_tool_results("x", None), "must be text or a list of parts"),
    (lambda m: m.chat().undo(), "nothing to undo"),
    (lambda m: m.chat(messages=[QUESTION]).undo(2), "1 turns can be undone, got 2"),
    (lambda m: m.chat(messages=[QUESTION]).undo(True), "1 turns can be undone, got True"),
    (lambda m: m.chat(messages=[QUESTION]).undo(0), "1 turns can be undone, got 0"),
    (lambda m: m.chat(messages=[QUESTION]).edit("x", back=2), "there are 1 messages to edit, got back=2"),
    (lambda m: m.chat().regenerate(), "nothing to answer again"),
    (lambda m: m.chat().resume(), "nothing to answer"),
    (lambda m: m.chat(messages=[QUESTION, CALLS]).resume(), "only a text of the assistant's"),
])  # fmt: skip
def test_arguments(model: Model, call: Callable[[Model], Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        call(model)


def test_what_is_meant_as_well(model: Model) -> None:
    chat = model.chat(
        temperature=np.float32(0.5), max_tokens=np.int64(3), seed=np.uint8(1), stop=["x"],
        logit_bias={np.int64(5): np.float32(1)},
    )  # fmt: skip
    assert chat.settings.logit_bias == {5: 1.0}
    assert (chat.settings.temperature, chat.settings.max_tokens, chat.settings.stop) == (0.5, 3, ("x",))
    assert model.chat(stop="x").settings.stop == ("x",)
    described = {"name": "look", "parameters": {"properties": {"n": {"maximum": np.int64(5)}}}}
    expected = {"name": "look", "parameters": {"properties": {"n": {"maximum": 5}}}}
    ids = [model.chat(tools=[tool], messages=[QUESTION]).ids for tool in (described, expected)]
    assert list(ids[0]) == list(ids[1])


# --- tools -----------------------------------------------------------------------------------------------------------


def test_results_by_order_and_by_id(model: Model) -> None:
    ids, chats = set(), []
    for results in (
        ("at the top", "at the left"),
        ({"b": "at the left", "a": "at the top"},),
        (
            {"role": "tool", "tool_call_id": "b", "content": "at the left"},
            {"tool_call_id": "a", "content": "at the top"},
        ),
    ):
        chat = model.chat(messages=[QUESTION, CALLS], max_tokens=3, temperature=0)
        reply = done(chat.send_tool_results(*results))
        ids.add(tuple(chat.ids))
        chats.append(chat)
        assert [m["tool_call_id"] for m in chat.turns[-1].messages] == ["a", "b"]
        again = done(chat.regenerate())
        assert again.ids == reply.ids
        assert tuple(chat.ids) in ids
    assert len(ids) == 1
    prompt = model.prompt([*chats[0].messages[:4]]).ids
    assert list(chats[0].ids)[: len(prompt)] == prompt
    (turn,) = chats[0].undo()
    assert (turn.role, turn.text) == ("tool", "at the top\nat the left")
    assert chats[0].messages[-1]["role"] == "assistant"


def test_a_reply_with_calls_is_a_message_with_calls(model: Model) -> None:
    """Said by the model (here: put in its mouth), heard by the parser, given to the template again."""
    chat = model.chat(tools=[TOOL], max_tokens=200, temperature=0, thinking=False)
    text = "Let me see.\n\n<tool_call>\n<function=look>\n<parameter=at>\ntop\n</parameter>\n</function>\n</tool_call>"
    says(chat, model.need_tokenizer().encode(text + "<|im_end|>", control=True))
    reply = done(chat.send("where?"))
    assert reply.message == chat.messages[-1]
    assert [call.message() for call in reply.tool_calls] == reply.message["tool_calls"]
    assert (reply.message["content"], reply.text) == ("Let me see.", "Let me see.")
    given = [{"role": "user", "content": "where?"}, reply.message, {"role": "tool", "content": "there"}]
    assert model.prompt(given, tools=[TOOL]).ids[-30:] == list(chat.fresh(messages=given).ids)[-30:]
    says(chat, model.need_tokenizer().encode("There.<|im_end|>", control=True))
    before = len(chat.ids)
    answer = done(
        chat.answer([*given[:2], {"role": "tool", "tool_call_id": reply.tool_calls[0].id, "content": "there"}])
    )
    assert answer.usage.cached_tokens >= before - 1
    assert chat.turns[-1].role == "tool"


def says(chat: Chat, ids: list[int]) -> None:
    """Let the model say certain ids next."""
    sampler = chat.model.language.sampler

    def scripted(settings: Any, **options: Any) -> Any:
        made, left = sampler(settings, **options), iter(ids)
        made.sample = lambda logits, allowed=None: next(left)  # type: ignore[method-assign]
        chat.model.language.sampler = sampler  # type: ignore[method-assign]
        return made

    chat.model.language.sampler = scripted  # type: ignore[method-assign]


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_a_stop_string_does_not_stay_in_the_context(model: Model) -> None:
    plain = model.chat(temperature=0, max_tokens=20, thinking=False)
    text = done(plain.send("one")).text
    for start in range(1, len(text) - 3, 5):
        if "\ufffd" in text[start : start + 3] or text.index(text[start : start + 3]) != start:
            continue
        chat = model.chat(temperature=0, max_tokens=20, thinking=False, stop=text[start : start + 3])
        reply = done(chat.send("one"))
        assert reply.finish.reason is StopReason.STOP_STRING
        assert reply.text == text[:start] == chat.messages[-1]["content"]
        seen = model.need_tokenizer().decode(chat.ids)
        assert seen.endswith("</think>\n\n" + text[:start])
        with pytest.raises(UsageError, match="complete"):
            chat.resume()
        done(chat.send("two"))
        assert_state(chat)


def test_cut_and_gone_on_with(model: Model) -> None:
    """Whatever the settings, a reply that was left and gone on with is the one that was not."""
    options: dict[str, Any] = {"temperature": 1.3, "seed": 11, "presence_penalty": 1.0, "thinking_budget": 5}
    for thinking in (False, True):
        whole = model.chat(thinking=thinking, max_total_tokens=15, **options)
        expected = done(whole.send("go"))
        for cut in (1, 3, 7, 9):
            chat = model.chat(thinking=thinking, max_total_tokens=15, **options)
            first = done(chat.send("go"), take=cut)
            assert first.finish.reason is StopReason.INTERRUPTED
            chat.options["max_total_tokens"] = 15 - first.usage.generated_tokens
            rest = done(chat.resume())
            assert first.ids + rest.ids == expected.ids
            if "\ufffd" not in first.text + first.thinking:
                assert (first.thinking + rest.thinking, first.text + rest.text) == (expected.thinking, expected.text)
            assert chat.messages == whole.messages
            assert list(chat.ids) == list(whole.ids)
            assert rest.usage.cached_tokens >= first.usage.prompt_tokens
            assert len(chat.turns) == 1
            assert done(chat.regenerate()).ids != expected.ids  # another seed
            assert chat.turns[-1].attempt == 1


def test_newlines_and_characters_that_a_cut_parts(model: Model) -> None:
    tokenizer = model.need_tokenizer()
    newline, (first, second) = tokenizer.encode("\n")[0], tokenizer.encode("\u0416")  # a character of two tokens
    for script in ([100, newline, newline, 101, first, second, 102], [newline, first, second, newline, newline, 103]):
        for cut in range(1, len(script)):
            chat = model.chat(thinking=False, max_tokens=cut)
            says(chat, script[:cut])
            done(chat.send("go"))
            chat.options["max_tokens"] = len(script) - cut
            says(chat, script[cut:])
            rest = done(chat.resume())
            assert chat.messages[-1]["content"] == tokenizer.decode(script).lstrip("\n")
            assert chat.messages[-1]["content"].endswith(rest.text)


def test_a_reply_in_progress(model: Model) -> None:
    chat = model.chat(thinking=False, temperature=0, max_tokens=6)
    done(chat.send("one"))
    begins: list[Callable[[], Reply]] = [lambda: chat.send("go", assistant_prefix="Sure"), chat.regenerate, chat.resume]
    for begin in begins:
        reply = begin()
        before, ids, said = reply.prefix, list(chat.ids), chat.messages
        for piece in reply:
            if piece.token is None:
                break
            assert list(chat.ids) == ids + reply.ids
            assert chat.context.used == len(chat.ids)
            last = chat.messages[-1]
            assert last == chat.turns[-1].reply
            assert last["content"].rstrip("\ufffd") == before + reply.text
        assert len(said) <= len(chat.messages) <= len(said) + 1
        reply.close()
        assert chat.messages[-1] == reply.message
        assert list(chat.ids) == ids + reply.ids


def test_limits_can_be_gone_beyond(model: Model) -> None:
    chat = model.chat(temperature=0, max_total_tokens=4, thinking=True)
    says(chat, [100, 101, 102, 103])
    first = done(chat.send("go"))
    assert (first.finish.reason, first.finish.in_thinking, first.usage.generated_tokens) == (StopReason.LENGTH, True, 4)
    says(chat, [104, 105, 106, 107])
    assert done(chat.resume()).finish.thinking_tokens == 4
    chat.thinking = False  # enough of it
    answer = done(chat.resume())
    assert answer.finish.answer_tokens == 4
    assert chat.messages[-1]["reasoning_content"].endswith("I can answer now.")
    assert_state(chat)


def test_a_given_reply_can_be_gone_on_with(model: Model) -> None:
    history = [QUESTION, {"role": "assistant", "content": "It is in", "reasoning_content": "hm"}]
    chat = model.chat(messages=history, temperature=0, max_tokens=4)
    reply = done(chat.resume())
    assert reply.prefix == "It is in"
    assert chat.messages[-1] == {**history[1], "content": "It is in" + reply.text}
    assert chat.messages[-1] == reply.message
    text = model.need_tokenizer().decode(chat.ids)
    assert text.endswith("<|im_start|>assistant\n<think>\nhm\n</think>\n\nIt is in" + reply.text)
    again = done(chat.resume())
    assert again.prefix == "It is in" + reply.text
    assert_state(chat)
    done(chat.regenerate())
    assert "It is in" not in chat.messages[-1]["content"]


def test_a_reply_that_begins_with_a_text(model: Model) -> None:
    for thinking in (False, True):
        chat = model.chat(temperature=0, max_tokens=4, thinking=thinking)
        reply = done(chat.send("a color", assistant_prefix="<|im_end|> The color"))
        assert reply.prefix == "<|im_end|> The color"
        assert not reply.thinking
        assert chat.messages[-1]["content"] == "<|im_end|> The color" + reply.text
        assert list(chat.ids).count(model.need_tokenizer().eos_token_ids[0]) == 1
        ids = list(chat.ids)
        assert done(chat.regenerate()).ids == reply.ids
        assert list(chat.ids) == ids
        assert chat.turns[-1].prefix == "<|im_end|> The color"
        assert_state(chat)
        done(chat.send("and?"))
        assert list(chat.ids)[: len(ids)] == ids


def test_another_seed_for_each_attempt(model: Model) -> None:
    chat, question = model.chat(temperature=2.0, top_k=0, max_tokens=6, seed=40), "one question of many " * 12
    replies = [done(chat.send(question)).ids, *(done(chat.regenerate()).ids for _ in range(3))]
    alone = []
    for seed in range(40, 44):
        one = model.chat(temperature=2.0, top_k=0, max_tokens=6, seed=seed)
        alone.append(done(one.send(question)).ids)
    assert replies == alone
    assert len({tuple(ids) for ids in replies}) == 4
    assert done(chat.regenerate()).usage.cached_tokens == len(chat.ids) - 6  # the prompt is not run again


def test_undo_and_edit(model: Model) -> None:
    chat = model.chat(temperature=0, max_tokens=3, system="s")
    marks = [list(chat.ids)]
    for n in range(5):
        done(chat.send(f"number {n}", images=[picture(n)] if n % 2 else []))
        marks.append(list(chat.ids))
    taken = chat.undo(np.int64(2))  # type: ignore[arg-type]
    assert [turn.text for turn in taken] == ["number 3", "number 4"]
    assert (list(chat.ids), len(chat.visuals)) == (marks[3], 1)
    done(chat.edit("instead", back=2))
    assert [turn.text for turn in chat.turns] == ["number 0", "instead"]
    assert [v.digest for v in chat.turns[-1].visuals] == [picture(1).digest]
    assert list(chat.ids)[: len(marks[1])] == marks[1]
    assert_state(chat)
    done(chat.edit("without", images=()))
    assert not chat.visuals
    assert done(chat.edit([{"type": "text", "text": "parts"}, {"type": "image", "image": picture(7)}])).message
    done(chat.edit("without", images=()))
    with pytest.raises(UsageError, match="must be text"):
        chat.edit(None)  # type: ignore[arg-type]
    assert [turn.text for turn in chat.turns] == ["number 0", "without"]
    chat.undo(2)
    assert (list(chat.ids), chat.system) == ([], "s")
    assert chat.context.cached == 0


def test_what_is_kept_of_states_is_bounded(folder: Path) -> None:
    model = edgeq.load(folder, backend="numpy")
    one = model.ops.state_nbytes(model.config.text)
    page = model.ops.kv_nbytes(model.config.text, 1)
    store, store.limit = model.prefixes, 6 * (one + page)
    chat = model.chat(temperature=0, max_tokens=3, draft="off")
    for n in range(6):
        done(chat.send(f"number {n} " + "and more of it " * 20 * (n % 2)))
        assert 0 < store.nbytes <= store.limit
    again = done(chat.edit("instead"))
    assert again.usage.cached_tokens >= again.usage.prompt_tokens - 45  # the message and what is around it
    for _ in range(2):
        chat.undo()
        assert chat.context.cached >= len(chat.ids) - 1
    assert store.give_way(page) >= one
    store.limit = 0
    assert (store.nbytes, len(store)) == (0, 0)


def test_a_transcript(model: Model) -> None:
    shown = [{"type": "image", "image": picture()}, {"type": "text", "text": "What is it?"}]
    chat = model.chat(system="Be brief.", messages=[
        {"role": "user", "content": shown},
        {"role": "assistant", "content": "Snow.", "reasoning_content": "White,\n\nall of it."},
        QUESTION, CALLS, {"role": "tool", "tool_call_id": "a", "content": "there"}, {"role": "tool", "content": "no"},
    ])  # fmt: skip
    blocks = [
        "## System", "Be brief.", "## User", "*[image: image]*", "What is it?", "## Assistant",
        "> White,\n>\n> all of it.", "Snow.", "## User", "where is it?", "## Assistant",
        '```json\n{"name": "look", "arguments": {"at": "top"}}\n```',
        '```json\n{"name": "look", "arguments": {"at": "left"}}\n```', "## Tool", "there", "## Tool", "no",
    ]  # fmt: skip
    assert chat.transcript() == "\n\n".join(blocks) + "\n"


# --- when the context is full ----------------------------------------------------------------------------------------


def test_the_oldest_turns_are_forgotten(small: Model) -> None:
    chat = small.chat(temperature=0, max_tokens=10, thinking=False, overflow="shift", system="remember")
    total = 0
    for n in range(9):
        reply = done(chat.send(f"number {n}", images=[picture(n)]))
        total += reply.forgotten
        assert chat.forgotten == total
        assert len(chat.ids) <= 200
        assert chat.turns[-1].text == f"number {n}"
        assert [v.digest for v in chat.visuals] == [picture(k).digest for k in range(n + 1 - len(chat.turns), n + 1)]
        if reply.forgotten:  # what is left is what the template makes of it
            fresh = small.chat(messages=chat.messages[:-1], thinking=False)
            assert list(chat.ids)[: len(fresh.ids)] == list(fresh.ids)
            assert len(fresh.ids) <= 100
        assert_state(chat)
    assert total >= 5
    assert chat.system == "remember"
    ids, said = list(chat.ids), chat.messages
    with pytest.raises(MemoryBudgetError, match="leaves no room for a reply"):
        chat.send("word " * 300)
    assert (list(chat.ids), chat.messages) == (ids, said)


def test_a_reply_goes_on_beyond_the_end_of_the_context(small: Model) -> None:
    options: dict[str, Any] = {"temperature": 1.5, "seed": 3, "max_tokens": 150, "loop_guard": False, "thinking": False}
    chat = small.chat(overflow="shift", **options)
    for n in range(5):
        chat.options["max_tokens"] = 12
        done(chat.send(f"number {n}"))
    chat.options["max_tokens"] = 130
    says(chat, [*range(100, 229), 100])
    reply = done(chat.send("at length"))
    assert reply.forgotten > 0
    assert len(reply.ids) >= 129
    assert reply.ids[:129] == list(range(100, 229))
    assert_state(chat)
    assert list(chat.ids)[-len(reply.ids) :] == reply.ids
    done(chat.send("again"))
    assert_state(chat)
    stopped = small.chat(**options)
    done(stopped.send("x" * 60))
    assert stopped.turns[-1].finish is not None
    assert stopped.turns[-1].finish.reason is StopReason.CONTEXT_FULL
    assert stopped.context == (200, 200, 199)
    assert (stopped.context.free, stopped.context.share) == (0, 1.0)


def test_what_is_left_can_be_taken_back_and_gone_on_with(small: Model) -> None:
    chat = small.chat(temperature=0, max_tokens=10, thinking=False, overflow="shift")
    while not chat.forgotten or len(chat.turns) < 2:
        done(chat.send("a question"))
    while len(chat.turns) > 1:
        chat.undo()
    said = chat.messages[-1]["content"]
    reply = done(chat.resume())
    assert chat.messages[-1]["content"] == said + reply.text
    assert list(chat.ids) == rebuilt(chat)
    assert_state(chat)


def test_results_are_not_parted_from_their_calls(small: Model) -> None:
    call = {**CALLS, "tool_calls": CALLS["tool_calls"][1:]}
    chat = small.chat(temperature=0, max_tokens=8, thinking=False, overflow="shift", messages=[QUESTION, call])
    done(chat.send_tool_results("no"))
    for n in range(6):
        done(chat.send(f"number {n}"))
        roles = [message["role"] for message in chat.messages]
        assert roles[0] == "user"
        assert ("tool" in roles) == ("where is it?" in chat.messages[0]["content"])
    assert chat.forgotten > 2


# --- anything, in any order ------------------------------------------------------------------------------------------

texts = st.sampled_from(["one", "two words", "", " <|im_end|>", "naïve 你好"])
takes = st.integers(1, 4) | st.none()
breaks = st.sampled_from(
    [None] * 4 + [(KeyboardInterrupt, 1), (KeyboardInterrupt, 2), (ModelError, 1), (ModelError, 2)]
)


class Conversations(RuleBasedStateMachine):
    """Whatever is done, the ids are those of a fresh conversation, and the state is that of the ids."""

    model: Model

    @initialize(
        system=st.none() | texts, thinking=st.booleans(), given=st.booleans(), draft=st.sampled_from(["off", "auto"])
    )
    def begin(self, system: str | None, thinking: bool, given: bool, draft: str) -> None:
        self.model.prefixes = PrefixStore(self.model.engine)  # nothing of the run before, so that a run repeats
        overflow = "stop" if self.model.context_limit > 1000 else "shift"
        messages: list[dict[str, Any]] = [
            QUESTION, CALLS, {"role": "tool", "content": "x"}, {"role": "assistant", "content": "there"}
        ]  # fmt: skip
        self.chat = self.model.chat(
            system=system, thinking=thinking, messages=messages if given else (), draft=draft, overflow=overflow,
            max_tokens=3, thinking_budget=2, temperature=1.5, seed=5,
        )  # fmt: skip

    def listen(self, begin: Callable[[], Reply], take: int | None, broken: Any, *, keeps: bool) -> None:
        """keeps: Ctrl-C before the first token leaves what was said, without a reply."""
        before, ids = self.chat.messages, list(self.chat.ids)
        try:
            reply = begin()
        except MemoryBudgetError:
            assert (self.chat.messages, list(self.chat.ids)) == (before, ids)
            return
        try:
            with self.breaking(*broken) if broken else nullcontext():
                done(reply, take)
        except (KeyboardInterrupt, ModelError) as error:
            if not reply.ids and (isinstance(error, ModelError) or not keeps):
                assert (self.chat.messages, list(self.chat.ids)) == (before, ids)
            elif not reply.ids:
                assert self.chat.turns[-1].reply is None
            else:
                assert self.chat.messages[-1] == reply.message

    @contextmanager
    def breaking(self, error: type[BaseException], when: int) -> Iterator[None]:
        engine, calls = self.model.engine, [0]
        run = engine.run

        def broken(feeds: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == when:
                raise error("broken")
            return run(feeds, **options)

        engine.run = broken  # type: ignore[method-assign]
        try:
            yield
        finally:
            engine.run = run  # type: ignore[method-assign]

    @rule(text=texts, shown=st.integers(0, 2), prefix=st.sampled_from(["", "", "Sure"]), take=takes, broken=breaks)
    def send(self, text: str, shown: int, prefix: str, take: int | None, broken: Any) -> None:
        pictures = [picture(n) for n in range(shown)]
        self.listen(lambda: self.chat.send(text, images=pictures, assistant_prefix=prefix), take, broken, keeps=True)

    @precondition(lambda self: self.chat.turns and self.chat.turns[-1].reply)
    @rule(text=texts, take=takes, broken=breaks)
    def results(self, text: str, take: int | None, broken: Any) -> None:
        self.listen(lambda: self.chat.send_tool_results(text, "y"), take, broken, keeps=True)

    @precondition(lambda self: self.chat.turns)
    @rule(take=takes, broken=breaks)
    def regenerate(self, take: int | None, broken: Any) -> None:
        unanswered = self.chat.turns[-1].reply is None
        self.listen(self.chat.regenerate, take, broken, keeps=unanswered)

    @precondition(lambda self: self.chat.turns)
    @rule(take=takes, broken=breaks)
    def resume(self, take: int | None, broken: Any) -> None:
        last = self.chat.turns[-1]
        ended = last.finish is not None and last.finish.reason is StopReason.STOP_TOKEN
        if not ended and not (last.reply and last.reply.get("tool_calls")):
            self.listen(self.chat.resume, take, broken, keeps=last.reply is None)

    @precondition(lambda self: self.chat.turns)
    @rule(data=st.data())
    def undo(self, data: Any) -> None:
        turns = self.chat.turns
        n = data.draw(st.integers(1, len(turns)))
        assert self.chat.undo(n) == turns[-n:]
        assert self.chat.turns == turns[:-n]

    @precondition(lambda self: any(turn.role == "user" for turn in self.chat.turns))
    @rule(data=st.data(), text=texts, take=takes)
    def edit(self, data: Any, text: str, take: int | None) -> None:
        back = data.draw(st.integers(1, sum(turn.role == "user" for turn in self.chat.turns)))
        self.listen(lambda: self.chat.edit(text, back=back), take, None, keeps=True)
        assert self.chat.turns[-1].text == text

    @rule(data=st.data(), take=takes)
    def answer_a_history(self, data: Any, take: int | None) -> None:
        messages = self.chat.messages
        if data.draw(st.booleans()):
            messages = messages[: data.draw(st.integers(0, len(messages)))]
        history = [*messages, {"role": "user", "content": "next"}]
        self.listen(lambda: self.chat.answer(history), take, None, keeps=True)
        assert history[-len(self.chat.messages) + 1 :] == self.chat.messages[:-1] or self.chat.forgotten

    @rule()
    def think(self) -> None:
        self.chat.thinking = not self.chat.thinking

    @rule()
    def leave_unheard(self) -> None:
        with suppress(MemoryBudgetError):
            self.chat.send("nobody listens")

    @invariant()
    def the_ids_are_those_of_a_fresh_conversation(self) -> None:
        if hasattr(self, "chat"):
            self.chat._settle()
            assert list(self.chat.ids) == rebuilt(self.chat)

    def teardown(self) -> None:
        if hasattr(self, "chat") and self.chat.turns:
            assert self.model.chat(messages=self.chat.messages).messages == self.chat.messages
            if self.chat.turns[-1].reply is None:
                with suppress(MemoryBudgetError):
                    done(self.chat.answer(), 2)
            if len(self.chat.ids) < self.model.context_limit:
                assert_state(self.chat)


@pytest.mark.parametrize("room", ["model", "small"])
def test_conversations(room: str, request: pytest.FixtureRequest) -> None:
    class Case(Conversations):
        pass

    Case.model = request.getfixturevalue(room)
    run_state_machine_as_test(Case, settings=settings(max_examples=14, stateful_step_count=12, deadline=None))
