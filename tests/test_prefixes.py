"""Kept prefixes: whatever is at hand, a conversation has the bits that it has where nothing is."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import edgeq
from edgeq.api import Model
from edgeq.backends import available
from edgeq.generate import StopReason
from edgeq.hub import DEMO
from edgeq.session.chat import Chat
from edgeq.session.prefix_files import PrefixFolder
from edgeq.session.prefixes import PrefixStore
from edgeq.session.reply import Reply
from edgeq.state import State
from edgeq.state_io import state_arrays
from edgeq.vision.visual import Visual

CHUNK = 64  # a multiple of what prompts may be cut at
LONG = "and much more of it, again and again " * 6
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
GIVEN = [
    {"role": "user", "content": f"where is it? {LONG}"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]},
    {"role": "tool", "content": "at the top"},
    {"role": "assistant", "content": "there"},
]  # fmt: skip
BACKENDS = [("numpy", 16), ("cpu", 16), ("cpu", 4)]


@pytest.fixture(scope="module")
def folder(chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with the real template, which takes parts and pictures."""
    folder = tmp_path_factory.mktemp("prefixes") / "model"
    shutil.copytree(chat_folder, folder)
    shutil.copy(DEMO / "chat_template.jinja", folder)
    return folder


@pytest.fixture(scope="module", params=BACKENDS, ids=lambda case: f"{case[0]}-kv{case[1]}")
def how(request: pytest.FixtureRequest) -> dict[str, Any]:
    backend, kv_bits = request.param
    if next(b for b in available() if b.name == backend).ops is None:
        pytest.skip(f"the {backend} backend does not run here")
    return {"backend": backend, "kv_bits": kv_bits}


def loaded(folder: Path, **options: Any) -> Model:
    model = edgeq.load(folder, **options)
    model.engine.chunk = CHUNK
    return model


def done(reply: Reply, take: int | None = None) -> Reply:
    for _ in reply:
        if take is not None and len(reply.ids) >= take:
            reply.close()
    return reply


def picture(seed: int = 0) -> Visual:
    """One for the tiny tower: 4 x 4 pixels a patch, two frames of three colours; 4 tokens."""
    pixels = np.random.default_rng(seed).normal(size=(16, 96)).astype(np.float32)
    return Visual.given(("image", pixels, (1, 4, 4)), 2)


def bits(model: Any, state: State[Any]) -> dict[str, bytes]:
    """What the language model's part of a state holds."""
    found = state_arrays(model.engine.ops, state._replace(draft=None))
    return {name: array.tobytes() for name, array in found.items()}


def replayed(chat: Chat, model: Model) -> Chat:
    """The same conversation in another model, from its beginning and without detours."""
    cold = model.chat(messages=[m for t in chat.turns if not t.tokens for m in (*t.messages, t.reply) if m],
                      system=chat.system, tools=chat._tools, draft=chat.draft, **chat.options)  # fmt: skip
    cold.options["max_total_tokens"] = None
    for turn in chat.turns[len(cold.turns) :]:
        cold.thinking = turn.thinking
        if turn.role == "tool":
            reply = cold.send_tool_results(*(m["content"] for m in turn.messages), assistant_prefix=turn.prefix)
        else:
            reply = cold.send(turn.messages[0]["content"], assistant_prefix=turn.prefix)
        done(reply, len(turn.tokens))
    cold.options = chat.options
    return cold


# --- anything, in any order ------------------------------------------------------------------------------------------

texts = st.sampled_from(["one", "two words", LONG, f"other {LONG}", f"{LONG} and two"])
takes = st.sampled_from([1, 2, 5, None, None])


class Conversations(RuleBasedStateMachine):
    """Conversations that share a store, in any order, with whatever is kept or gone; each is then what it is alone."""

    warm: Model
    cold: Model

    @initialize(
        system=st.sampled_from([None, "Be brief.", LONG]), given=st.booleans(), tools=st.booleans(),
        draft=st.sampled_from(["off", "auto"]), states=st.sampled_from([0, 3, 1000]),
        disk=st.sampled_from([None, 2 << 20, 1 << 30]),
    )  # fmt: skip
    def begin(self, system: str | None, given: bool, tools: bool, draft: str, states: int, disk: int | None) -> None:
        self.options: dict[str, Any] = {
            "system": system, "messages": GIVEN if given else (), "tools": [TOOL] if tools else None,
            "draft": draft if self.warm.engine.ops.few != 1 else "off", "max_total_tokens": 6, "temperature": 0,
            "loop_guard": False,
        }  # fmt: skip
        ops, c = self.warm.engine.ops, self.warm.config.text
        self.limit, self.disk = states * (ops.state_nbytes(c) + ops.kv_nbytes(c, 1)), disk
        self.made = TemporaryDirectory()
        self.start()
        self.chats = [self.warm.chat(**self.options)]

    def start(self) -> None:
        """Begin with what is on disk, as another process would."""
        engine, disk = self.warm.engine, self.disk
        folder = None if disk is None else PrefixFolder(Path(self.made.name), engine, disk)
        self.warm.prefixes = PrefixStore(engine, self.limit, folder)

    @property
    def chat(self) -> Chat:
        return self.chats[-1]

    @rule(text=texts, shown=st.integers(0, 1), prefix=st.sampled_from(["", "", "Sure"]), take=takes)
    def send(self, text: str, shown: int, prefix: str, take: int | None) -> None:
        if len(self.chat.ids) < 1500:
            done(self.chat.send(text, images=[picture(shown)] * shown, assistant_prefix=prefix), take)

    @precondition(lambda self: self.chat.turns and self.chat.turns[-1].reply)
    @rule(take=takes)
    def results(self, take: int | None) -> None:
        done(self.chat.send_tool_results("nothing there"), take)

    @precondition(lambda self: self.chat.turns and self.chat.turns[-1].tokens)
    @rule(take=takes)
    def regenerate(self, take: int | None) -> None:
        done(self.chat.regenerate(), take)

    @precondition(lambda self: self.chat.turns and self.chat.turns[-1].tokens)
    @rule()
    def resume(self) -> None:
        finish = self.chat.turns[-1].finish
        if finish is not None and finish.reason is StopReason.INTERRUPTED:
            done(self.chat.resume())

    @precondition(lambda self: self.chat.turns)
    @rule(data=st.data())
    def undo(self, data: Any) -> None:
        self.chat.undo(data.draw(st.integers(1, len(self.chat.turns))))

    @precondition(lambda self: any(turn.role == "user" for turn in self.chat.turns))
    @rule(data=st.data(), text=texts, take=takes)
    def edit(self, data: Any, text: str, take: int | None) -> None:
        back = data.draw(st.integers(1, sum(turn.role == "user" for turn in self.chat.turns)))
        done(self.chat.edit(text, back=back), take)

    @rule()
    def think(self) -> None:
        self.chat.thinking = not self.chat.thinking

    @rule()
    def another(self) -> None:
        self.chats.append(self.warm.chat(**self.options))

    @precondition(lambda self: self.chat.turns)
    @rule()
    def branch(self) -> None:
        """Another conversation that stands where this one does."""
        other = self.warm.chat(**self.options)
        other._restore(self.chat._save())
        self.chats.append(other)

    @rule()
    def restart(self) -> None:
        """All conversations as in another process, with what is on disk."""
        self.start()
        before, self.chats = self.chats, []
        for chat in before:
            chat._settle()
            self.chats.append(self.warm.chat(**self.options))
            self.chat._restore(chat._save())
            self.chat.thinking = chat.thinking

    @rule(data=st.data())
    def damage(self, data: Any) -> None:
        """A file loses its end, or a byte changes, or it is gone."""
        files = sorted(Path(self.made.name).iterdir())
        if files:
            file = data.draw(st.sampled_from(files))
            how, at = data.draw(st.sampled_from(["cut", "byte", "gone"])), data.draw(st.floats(0, 1, exclude_max=True))
            content = bytearray(file.read_bytes())
            file.unlink()  # what was mapped stays as it was
            if how != "gone":
                place = int(len(content) * at)
                content[place] ^= 16
                file.write_bytes(content[:place] if how == "cut" else content)

    @rule()
    def switch(self) -> None:
        self.chats.insert(0, self.chats.pop())

    @rule(share=st.sampled_from([2, 1]))
    def lose(self, share: int) -> None:
        store = self.warm.prefixes
        store.give_way(store.nbytes // share)

    def teardown(self) -> None:
        if not hasattr(self, "chats"):
            return
        for chat in self.chats:
            assert self.warm.prefixes.nbytes <= self.limit
            if not any(turn.tokens for turn in chat.turns):
                continue
            cold = replayed(chat, self.cold)
            assert list(chat.ids) == list(cold.ids)
            for one in (chat, cold):
                one.thinking = False
                done(one.send("the end"))
            assert list(chat.ids) == list(cold.ids)
            assert bits(self.warm, chat._context.state) == bits(self.cold, cold._context.state)
        if self.disk is not None:
            assert sum(file.stat().st_size for file in Path(self.made.name).iterdir()) <= self.disk
        self.made.cleanup()


@pytest.fixture(scope="module")
def models(folder: Path, how: dict[str, Any]) -> tuple[Model, Model]:
    warm, cold = loaded(folder, **how), loaded(folder, **how)
    cold.prefixes.limit = 0
    return warm, cold


@pytest.mark.parametrize("examples", [12, pytest.param(400, marks=pytest.mark.slow)])
def test_conversations_have_the_bits_that_they_have_alone(models: tuple[Model, Model], examples: int) -> None:
    class Case(Conversations):
        warm, cold = models

    steps = settings(max_examples=examples, stateful_step_count=10, deadline=None, phases=[Phase.generate])
    run_state_machine_as_test(Case, settings=steps)
