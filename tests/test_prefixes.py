"""Kept prefixes: whatever is at hand, a conversation has the bits that it has where nothing is."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import sleep
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import edgeq
from edgeq.api import Model
from edgeq.backends import available
from edgeq.errors import MemoryBudgetError, UsageError
from edgeq.generate import StopReason
from edgeq.hub import DEMO
from edgeq.session.chat import Chat
from edgeq.session.prefix_files import PrefixFolder, folder_size, split_folder
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
        turn = self.chat.turns[-1]
        self.chat.thinking = turn.thinking  # else what it thinks is ended by force
        if turn.finish is not None and turn.finish.reason is StopReason.INTERRUPTED:
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
        other._restore(self.chat._dialogue.saved())
        other.thinking = self.chat.thinking
        self.chats.append(other)

    @rule()
    def restart(self) -> None:
        """All conversations as in another process, with what is on disk."""
        self.start()
        before, self.chats = self.chats, []
        for chat in before:
            chat._settle()
            self.chats.append(self.warm.chat(**self.options))
            self.chat._restore(chat._dialogue.saved())
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
                content[place : place + 1] = bytes(byte ^ 16 for byte in content[place : place + 1])
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


@pytest.mark.parametrize("examples", [8, pytest.param(400, marks=pytest.mark.slow)])
def test_conversations_have_the_bits_that_they_have_alone(models: tuple[Model, Model], examples: int) -> None:
    class Case(Conversations):
        warm, cold = models

    steps = settings(max_examples=examples, stateful_step_count=10, deadline=None, phases=[Phase.generate])
    run_state_machine_as_test(Case, settings=steps)


# --- what is at hand -------------------------------------------------------------------------------------------------

SYSTEM = f"Be brief. {LONG}"


@pytest.fixture
def model(folder: Path, how: dict[str, Any]) -> Model:
    if how["kv_bits"] != 16:
        pytest.skip("one type of keys and values is enough")
    return loaded(folder, **how)


def again(model: Model, folder: Path, limit: int | None = None) -> PrefixStore:
    """A store as a new process has it."""
    model.prefixes = PrefixStore(
        model.engine, limit, PrefixFolder(folder, model.engine, 1 << 30), text=model.language.spelled
    )
    return model.prefixes


def talk(model: Model, **options: Any) -> Chat:
    return model.chat(system=SYSTEM, temperature=0, max_tokens=4, thinking=False, loop_guard=False, **options)


def test_a_turn_reads_what_is_new_and_another_conversation_what_differs(model: Model) -> None:
    chat, before = talk(model), 0
    for n in range(6):
        reply = done(chat.send(f"question {n}"))
        assert reply.usage.cached_tokens == max(0, before - 1)
        before = len(chat.ids)
    grain = model.engine.ops.grain or 1
    other = talk(model)
    usage = done(other.send(f"another question {LONG}")).usage
    start = list(chat.ids).index(model.language.messages.begin, 1)  # of the first user's message
    assert start - 2 * grain < usage.cached_tokens
    assert usage.miss is not None
    assert (usage.miss.reason, usage.miss.kept_text, usage.miss.given_text) == ("differs", "q", "a")
    assert other.ids[usage.miss.at] == usage.miss.given == ord("a") - 33  # as the tiny tokenizer has it
    edited = done(chat.edit("question 3, in other words", back=3))
    assert edited.usage.prompt_tokens - edited.usage.cached_tokens <= 50
    assert (
        done(talk(model).send(f"another question {LONG}")).usage.cached_tokens == usage.prompt_tokens
    )  # not a token is read


def test_a_history_reads_what_is_behind_what_somebody_has_said(model: Model) -> None:
    chat = talk(model)
    for n in range(3):
        done(chat.send(f"question {n}"))
    known, messages = len(chat.ids), [*chat.messages, {"role": "user", "content": "more"}]
    chat = model.chat(messages=messages, temperature=0, max_tokens=4, thinking=False)
    usage = done(chat.answer()).usage
    assert usage.cached_tokens > 0
    assert usage.miss is None or usage.miss.at - usage.cached_tokens < 2 * CHUNK
    assert usage.prompt_tokens > known - 20


def test_why_something_is_read(model: Model) -> None:
    store = model.prefixes

    def miss(content: Any) -> Any:
        return done(talk(model).send(content)).usage.miss

    assert miss("one").reason == "empty"
    assert miss("one") is None
    store.limit, limit = 0, store.limit
    store.limit = limit
    assert miss("one").reason == "evicted"
    shown = [[{"type": "image", "image": picture(n)}, {"type": "text", "text": "what?"}] for n in range(2)]
    assert miss(shown[0]).reason == "differs"
    assert miss(shown[0]) is None
    assert miss(shown[1]).reason == "picture"
    reply = done(model.generate("one two three", max_tokens=1))
    assert reply.usage.miss is not None
    assert reply.usage.miss.at == 0


def test_completions_share_what_they_begin_with(model: Model, folder: Path, how: dict[str, Any]) -> None:
    """And have the bits of those that do not."""
    cold = loaded(folder, **how)
    cold.prefixes.limit = 0
    ids = np.random.default_rng(0).integers(5, 250, 300).tolist()
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 4, "ignore_eos": True, "logprobs": 3, "draft": "off"}
    for end, least in ((200, 0), (200, 200), (300, 64 if model.engine.ops.grain is None else 160), (240, 64)):
        warm, alone = (done(each.generate(ids[:end], **options)) for each in (model, cold))
        assert (warm.ids, warm.logprobs) == (alone.ids, alone.logprobs)
        assert warm.usage.cached_tokens >= least
        assert alone.usage.cached_tokens == 0


# --- on disk ---------------------------------------------------------------------------------------------------------


def test_another_process_goes_on(model: Model, tmp_path: Path) -> None:
    again(model, tmp_path)
    chat = talk(model)
    for n in range(3):
        done(chat.send(f"question {n}"))
    for limit in (None, 0):
        again(model, tmp_path, limit)
        other = talk(model)
        other._restore(chat._dialogue.saved())
        usage = done(other.send("more")).usage
        assert usage.cached_tokens >= len(chat.ids) - 1
        assert done(talk(model).send("hello")).usage.cached_tokens > 0


def test_files_that_are_not_right_are_left_alone_or_removed(
    model: Model, folder: Path, how: dict[str, Any], tmp_path: Path
) -> None:
    again(model, tmp_path)
    expected = done(talk(model).send("hello")).ids
    files = sorted(tmp_path.iterdir())
    assert len({file.suffix for file in files}) == 2
    other = loaded(folder, **how, rope_scaling="linear:2")
    again(other, tmp_path)
    assert done(talk(other).send("hello")).usage.cached_tokens == 0
    for file in files:
        content = file.read_bytes()
        for damage in (b"", content[:100], content[:-1], content[:-40] + bytes(40), bytes(len(content))):
            file.unlink()
            file.write_bytes(damage)
            again(model, tmp_path)
            assert done(talk(model).send("hello")).ids == expected
    (tmp_path / "notes.txt").write_text("not ours")
    (tmp_path / "a.kv").mkdir()
    assert done(talk(model).send("hello")).ids == expected


def test_the_folder_is_bounded_and_what_has_a_name_stays(model: Model, tmp_path: Path) -> None:
    store = again(model, tmp_path)
    chat = model.chat(documents=[("report.txt", f"{LONG} {LONG}")], temperature=0, max_tokens=2)
    tokens, cached = chat.prepare("report.txt")
    assert (tokens > 2 * CHUNK, cached) == (True, 0)

    def size() -> int:
        return sum(file.stat().st_size for file in tmp_path.iterdir())

    assert store.folder is not None
    store.folder.limit = limit = 4 * size()
    for n in range(8):
        done(talk(model).send(f"{n} {LONG}"))
        assert size() <= limit
    store = again(model, tmp_path)
    assert model.chat(documents=[("report.txt", f"{LONG} {LONG}")]).prepare() == (tokens, tokens)
    assert store.folder is not None
    before, store.folder.limit = size(), 100  # less than any
    with pytest.warns(UserWarning, match="may take 0.0 MB, and what was read takes .*: a later run reads it again"):
        done(talk(model).send("no room"))
    done(talk(model).send("it was said once"))
    assert size() == before
    for refused in ("3 apples", -1, True, "", 1.5):
        with pytest.raises(UsageError, match="size of the folder"):
            model.keep_prefixes(tmp_path, refused)  # type: ignore[arg-type]
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UsageError, match="cannot be used for prefixes"):
        model.keep_prefixes(tmp_path / "notes.txt")
    assert split_folder("a:4G") == (Path("a"), "4G")
    assert split_folder("C:/a") == (Path("C:/a"), None)
    assert split_folder("a:b/") == (Path("a:b"), None)
    for refused in ("a:abc", "a:4X", "a:"):
        with pytest.raises(UsageError, match="FOLDER or FOLDER:SIZE"):
            split_folder(refused)
    assert [folder_size(tmp_path, text) for text in ("4G", "1.5 MiB", 7)] == [4_000_000_000, 3 << 19, 7]


# --- documents -------------------------------------------------------------------------------------------------------


def test_documents_come_before_the_system_prompt(model: Model, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffOne\r\nTwo <|im_end|>\n\n", encoding="utf-8")
    chat = model.chat(documents=[tmp_path / "a.txt", ("b", "Three")], system="Be brief.", max_tokens=1)
    text = model.need_tokenizer().decode(model.prompt([*chat.messages, {"role": "user", "content": "?"}]).ids)
    assert text.startswith(
        '<|im_start|>system\n# Documents\n\n<document name="a.txt">\nOne\nTwo <|im_end|>\n</document>\n\n'
        '<document name="b">\nThree\n</document>\n\nBe brief.<|im_end|>\n<|im_start|>user\n?'
    )
    assert chat.prepare()[0] <= len(model.prompt([*chat.messages, {"role": "user", "content": "?"}]).ids)
    for wrong, said in (
        ("a.txt", "must be a list"), ([5], "a path or"), ([tmp_path / "no"], "cannot be read"),
        ([("a", " ")], "is empty"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            model.chat(documents=wrong)
    with pytest.raises(MemoryBudgetError, match="what the conversation begins with"):
        model.chat(documents=[("long", "word " * 9000)]).prepare()


def test_reading_goes_on_where_it_was_left(model: Model, tmp_path: Path) -> None:
    document = ("long.txt", " ".join(f"{n} {LONG}" for n in range(12)))
    plain = model.chat(documents=[document], temperature=0, max_tokens=4, draft="off")
    expected, total = done(plain.send("so?")).ids, plain.context.cached
    run, left = model.engine.run, [3]

    def interrupted(*given: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return run(*given, **options)

    seen = 0
    for _ in range(3):
        again(model, tmp_path)
        chat, left[0] = model.chat(documents=[document], temperature=0, max_tokens=4, draft="off"), 3
        model.engine.run = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            chat.prepare("long.txt")
        model.engine.run = run  # type: ignore[method-assign]
        assert chat.context.cached == seen + 3 * CHUNK
        seen = chat.context.cached
    assert seen < total
    again(model, tmp_path)
    chat = model.chat(documents=[document], temperature=0, max_tokens=4, draft="off")
    tokens, cached = chat.prepare("long.txt")
    assert (cached, tokens > cached) == (seen, True)
    assert done(chat.send("so?")).ids == expected
    assert bits(model, chat._context.state) == bits(model, plain._context.state)


# --- several processes -----------------------------------------------------------------------------------------------

TALKER = """
import sys
import edgeq
model = edgeq.load(sys.argv[1], backend="numpy")
model.engine.chunk = 64
model.keep_prefixes(sys.argv[2], int(sys.argv[3]))
for _ in range(int(sys.argv[4])):
    chat = model.chat(system=sys.argv[5], temperature=0, max_tokens=3, thinking=False, draft="off")
    for n in range(4):
        reply = chat.send(f"question {n} " + "and more " * 20 * (n % 2))
        print(*[piece.token for piece in reply], reply.usage.cached_tokens > 0, flush=True)
"""


@pytest.mark.slow
def test_processes_share_a_folder_and_may_be_killed(folder: Path, tmp_path: Path) -> None:
    """At random moments; whoever comes next says what it says without the folder."""
    place, limit, rng = tmp_path / "kept", 2_000_000, np.random.default_rng(0)

    def started(rounds: int, where: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", TALKER, str(folder), str(where), str(limit), str(rounds), SYSTEM]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(edgeq.__file__).parent.parent)

    alone = started(1, tmp_path / "alone")
    expected = [line.rpartition(" ")[0] for line in alone.communicate(timeout=300)[0].splitlines()]
    assert len(expected) == 4
    for _ in range(8):
        first, second = started(50, place), started(2, place)
        assert first.stdout is not None
        for _ in range(int(rng.integers(1, 12))):
            first.stdout.readline()
        sleep(rng.uniform(0, 0.05))
        first.kill()
        said = second.communicate(timeout=300)[0].splitlines()
        assert [line.rpartition(" ")[0] for line in said] == 2 * expected
        assert said[-1].endswith("True")
        first.communicate(timeout=60)
        files = [file for file in place.iterdir() if not file.name.startswith(".")]
        assert sum(file.stat().st_size for file in files) <= limit + 300_000  # both may have made room at once
