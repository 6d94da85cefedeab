"""Sessions: a conversation that was saved goes on as if it had never stopped, or is refused with the reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from command import Run, leave_home, runner
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from kill_sessions import killed

import edgeq
from edgeq.api import Model
from edgeq.backends import available
from edgeq.checkpoint import open_checkpoint
from edgeq.errors import MemoryBudgetError, ModelError, UsageError
from edgeq.formats.growing import GrowingFile
from edgeq.formats.safetensors import SafetensorsFile
from edgeq.hub import DEMO
from edgeq.identify import is_session
from edgeq.session.chat import Chat
from edgeq.session.files import SavedSession, SessionFile
from edgeq.session.reply import Reply
from edgeq.testing import nmse
from edgeq.vision.visual import Visual

HERE = Path(__file__).parent
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
LONG = "Why is the sky blue? " * 20
BACKENDS = ["numpy", "cpu"]
DRAFT = {"numpy": "off", "cpu": "auto"}  # NumPy's products have other bits where drafts, by the clock, are verified
Do = Callable[[Chat], Reply]


@pytest.fixture(scope="module")
def folder(chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with an eye and the real template."""
    folder = tmp_path_factory.mktemp("sessions") / "model"
    shutil.copytree(chat_folder, folder)
    shutil.copy(DEMO / "chat_template.jinja", folder)
    return folder


def loaded(folder: Path, backend: str, **options: Any) -> Model:
    if backend not in {known.name for known in available() if known.ops}:
        pytest.skip(f"{backend} is not installed")
    return edgeq.load(folder, backend=backend, **options)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return loaded(folder, "numpy")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trip.eqs"


def done(reply: Reply, take: int | None = None) -> Reply:
    for i, _ in enumerate(reply, 1):
        if i == take:
            reply.close()
    return reply


def picture(seed: int = 0) -> Visual:
    """One for the tiny tower: 4 x 4 pixels a patch, two frames of three colours."""
    pixels = np.random.default_rng(seed).normal(size=(16, 96)).astype(np.float32)
    return Visual.given(("image", pixels, (1, 4, 4)), 2)


def forgotten(chat: Chat, *, seen: bool = False) -> Chat:
    """The conversation, its model having forgotten all that it kept, and saw but for what is `seen`."""
    chat.model.prefixes.__init__(chat.model.engine, text=chat.model.language.spelled)  # type: ignore[misc]
    if not seen:
        chat.model.sight.__init__(chat.model.engine)  # type: ignore[misc]
    return chat


def same(a: Chat, b: Chat) -> None:
    """Two conversations that nobody can tell apart."""
    assert list(a.ids) == list(b.ids)
    assert _comparable(a.messages) == _comparable(b.messages)
    assert [(t.attempt, t.finish, t.thinking, t.prefix, t.tokens, t.drawn) for t in a.turns] == [
        (t.attempt, t.finish, t.thinking, t.prefix, t.tokens, t.drawn) for t in b.turns
    ]
    assert (a.settings, a.thinking, a.forgotten, a.overflow) == (b.settings, b.thinking, b.forgotten, b.overflow)
    assert a.context == b.context


def _comparable(x: Any) -> Any:
    if isinstance(x, Visual):
        return x.kind, x.digest, x.grid, x.timestamps, x.name
    if isinstance(x, dict):
        return {key: _comparable(value) for key, value in x.items()}
    return [_comparable(value) for value in x] if isinstance(x, list | tuple) else x


GO_ON: list[Do] = [
    lambda c: c.resume(),
    lambda c: c.send("and then?"),
    lambda c: c.regenerate(),
    lambda c: c.edit("no, this", back=2),
    lambda c: (c.undo(), c.send("else"))[1],
    lambda c: c.edit("what else?", back=3),
]


@pytest.mark.parametrize("backend", BACKENDS)
class TestGoingOn:
    @pytest.fixture
    def twins(self, folder: Path, path: Path, backend: str) -> tuple[Chat, Chat]:
        """A conversation that never stopped, and one that was saved by one model and loaded by another."""
        one, other = loaded(folder, backend), loaded(folder, backend)
        chat = one.chat(
            system="Be brief.", tools=[TOOL], thinking=True, seed=3, temperature=1.5, max_tokens=6, thinking_budget=6,
            logprobs=2, overflow="shift", template_kwargs={"x": "y"}, draft=DRAFT[backend],
        )  # fmt: skip
        done(chat.send("What is this? " * 8, images=[picture(1)]))
        chat.save(path)
        done(chat.send(LONG, assistant_prefix="Well"))
        chat.thinking = False
        done(chat.send("and this?", images=[picture(2), picture(1)]))
        chat.save(path)
        chat.thinking = True
        done(chat.send("what of that?"), take=3)  # left
        chat.save(path)
        return chat, edgeq.load_session(path, other)

    def test_it_never_stopped(self, twins: tuple[Chat, Chat], path: Path) -> None:
        """Whatever comes next: that was saved and loaded again before, by a model that remembers nothing of it."""
        one, other = twins
        for go_on in GO_ON:
            same(one, other)
            a, b = done(go_on(one)), done(go_on(other))
            assert a.ids == b.ids
            assert a.usage.cached_tokens == b.usage.cached_tokens  # as much was kept
            assert np.array_equal(after(one), after(other))
            other.save(path)
            other = edgeq.load_session(path, forgotten(other).model)  # type: ignore[arg-type]


def after(chat: Chat) -> Any:
    """The logits after a token more than the state has read."""
    return chat.model.forward([7], chat._context.state)[0]  # type: ignore[attr-defined]


class TestElsewhere:
    def test_in_another_process(self, folder: Path, path: Path, model: Model) -> None:
        chat = model.chat(seed=5, max_tokens=8, temperature=1.0)
        done(chat.send(LONG))
        chat.save(path)
        program = (
            "import sys, edgeq\nchat = edgeq.load_session(sys.argv[1])\nreply = chat.send('and now?')\n"
            "list(reply)\nchat.save(sys.argv[1])\nprint(reply.ids, reply.usage.cached_tokens)"
        )
        run = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
        reply = done(chat.send("and now?"))
        assert run.stdout.strip() == f"{reply.ids} {reply.usage.cached_tokens}"
        same(chat, edgeq.load_session(path, model))

    @pytest.mark.parametrize(
        ("one", "other", "bound"),
        [
            (("cpu", None), ("numpy", None), 1e-6),  # the keys and values are the same 16-bit numbers
            (("numpy", None), ("cpu", None), 1e-5),  # these are rounded to 16 bits
            (("cpu", None), ("cpu", 8), 1e-3),  # to 8 bits
            (("cpu", 4), ("numpy", None), 1e-6),
            (("numpy", 8), ("mlx", None), 1e-6),
        ],
    )  # fmt: skip
    def test_on_another_backend(self, folder: Path, path: Path, one: Any, other: Any, bound: float) -> None:
        """NMSE of logits: of a state that one backend made, as that one and another read it. The tiny model's layers of
        random weights amplify a rounding some thousand times."""
        a, b = (loaded(folder, backend, kv_bits=bits) for backend, bits in (one, other))
        chat = a.chat(max_tokens=4, temperature=0)
        done(chat.send(LONG, images=[picture(3)]))
        chat.save(path)
        moved = edgeq.load_session(path, b)
        same(chat, moved)
        assert nmse(after(chat), after(moved)) < bound
        done(moved.send("go on"))
        moved.save(path)  # from now on it is that backend's
        same(moved, edgeq.load_session(path, b))
        assert SavedSession(path).values["backend"] == b.ops.name

    @pytest.mark.parametrize(("one", "other"), [("cpu", "numpy"), ("numpy", "cpu"), ("cpu", "mlx")])
    def test_on_another_backend_before_the_first_draft(
        self, folder: Path, path: Path, one: str, other: str
    ) -> None:  # fmt: skip
        """The MTP head has read nothing yet, what it has to read waits; and KV bits stay with their backend."""
        there, chat = loaded(folder, other), loaded(folder, one, kv_bits=8).chat(max_tokens=1, temperature=0)
        done(chat.send("hi"))
        chat.save(path)
        assert SavedSession(path).values["states"][0]["draft"] == [0, []]
        moved = edgeq.load_session(path, backend=other)
        same(chat, moved)
        assert moved.model.engine.ops.kv_dtype == there.ops.kv_dtype
        draft = moved._context.state.draft
        assert draft is not None
        assert draft.waiting == moved._context.position > 0

    def test_in_half_precision(self, folder: Path, path: Path) -> None:
        """On MLX activations may be bfloat16: so is, again, what the model saw, and what its MTP head has not read."""
        mlx = pytest.importorskip("edgeq.backends.mlx", reason="mlx is not installed", exc_type=ImportError)
        one, other = (Model(open_checkpoint(folder), mlx.MlxOps(dtype="bfloat16")) for _ in range(2))
        chat = one.chat(max_tokens=3, temperature=0, draft="off")
        done(chat.send("look", images=[picture(3)]))
        chat.save(path)
        again = edgeq.load_session(path, other)
        assert np.array_equal(after(chat), after(again))
        assert done(forgotten(chat).edit("what?")).ids == done(forgotten(again, seen=True).edit("what?")).ids
        assert np.array_equal(after(chat), after(again))

    def test_pictures_need_no_files(self, folder: Path, path: Path, model: Model, tmp_path: Path) -> None:
        """What the model saw is in the session; the file may be gone, and so may the room for what was seen."""
        from PIL import Image

        pytest.importorskip("PIL")
        file = tmp_path / "x.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(file)
        chat = model.chat(max_tokens=4, temperature=0)
        done(chat.send("look", images=[file]))
        done(chat.send("more", images=[picture(4)]))
        chat.save(path)
        file.unlink()
        again = edgeq.load_session(path, loaded(folder, "numpy"))
        assert done(again.edit("look again", back=2)).ids == done(forgotten(chat).edit("look again", back=2)).ids
        assert again.model.sight.encoded == 0
        assert again.visuals[0].name == str(file) or Path(again.visuals[0].name).name == "x.png"
        with pytest.raises(UsageError, match="not its pixels"):
            again.visuals[0].pixel_values  # noqa: B018

    def test_the_model_is_the_one_that_the_file_names(self, folder: Path, path: Path, tmp_path: Path) -> None:
        chat = edgeq.load(folder, backend="numpy", kv_bits=8, context=500).chat(max_tokens=2)
        done(chat.send("hi"))
        chat.save(path)
        again = edgeq.load_session(path)
        assert (again.model.ops.kv_dtype, again.model.context_limit) == ("int8", 500)  # type: ignore[attr-defined]
        assert edgeq.load_session(path, context=400).model.context_limit == 400  # type: ignore[attr-defined]
        with pytest.raises(UsageError, match="context is an option of a model that is yet to be loaded"):
            edgeq.load_session(path, again.model, context=3)  # type: ignore[arg-type]
        parts = Model(open_checkpoint(folder), chat.model.engine.ops)
        other = parts.chat(max_tokens=1)
        done(other.send("hi"))
        other.save(path)
        with pytest.raises(UsageError, match="does not say where its model is"):
            edgeq.load_session(path)

    def test_conversations_without_replies(self, path: Path, model: Model) -> None:
        history: list[dict[str, Any]] = [
            {"role": "system", "content": "x"}, {"role": "user", "content": "a <|im_end|>"},
            {"role": "assistant", "content": "b", "reasoning_content": "c"},
            {"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "?"}]},
        ]  # fmt: skip
        for messages in ([], history[:1], history, history[1:3]):
            chat = model.chat(messages=messages, max_tokens=3, seed=1)
            chat.save(path)
            again = edgeq.load_session(path, model)
            same(chat, again)
            if messages is history:
                assert done(chat.answer()).ids == done(again.answer()).ids
            assert done(chat.send("x")).ids == done(again.send("x")).ids

    def test_it_forgets_as_it_would_have(self, folder: Path, path: Path) -> None:
        small = [loaded(folder, "numpy", context=120) for _ in range(2)]
        chat = small[0].chat(overflow="shift", max_tokens=8, temperature=0)
        for n in range(6):
            done(chat.send(f"number {n}"))
            chat.save(path)
        assert chat.forgotten
        again = edgeq.load_session(path, small[1])
        for n in range(4):
            assert done(chat.send(f"more {n}")).ids == done(again.send(f"more {n}")).ids
            same(chat, again)


class TestFile:
    @pytest.fixture
    def chat(self, model: Model, path: Path) -> Chat:
        chat = model.chat(max_tokens=3, temperature=0)
        done(chat.send(LONG))
        chat.save(path)
        return chat

    def test_it_is_a_safetensors_file_with_the_names_of_the_reference(self, chat: Chat, path: Path) -> None:
        done(chat.send("x", images=[picture()]))
        chat.save(path)
        file, names = SafetensorsFile(path), (HERE.parent / "docs" / "reference" / "sessions.md").read_text()
        assert is_session(path)
        for name in file.tensors:
            shown = ".".join("N" if part.isdigit() else part for part in name.split("."))
            assert f"`{'picture.DIGEST' if shown.startswith('picture') else shown}`" in names
        for name in SavedSession(path).values:
            assert f"`{name}`" in names
        for name in SavedSession(path).values["states"][0]:
            assert f"`{name}`" in names

    def test_a_turn_costs_what_is_new(self, chat: Chat, path: Path) -> None:
        """And the file is written anew when half of it is of no use; a file that somebody else changed, at once."""
        before = path.stat()
        done(chat.send("x"))
        chat.save(path)
        after = path.stat()
        assert after.st_ino == before.st_ino
        assert after.st_size > before.st_size
        os.utime(path)
        chat.save(path)
        assert path.stat().st_ino != before.st_ino
        assert GrowingFile.open(path).unused == 0

    def test_it_does_not_grow_without_end(
        self, chat: Chat, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:  # fmt: skip
        monkeypatch.setattr("edgeq.session.files.file.WASTE", 1 << 16)
        monkeypatch.setattr("edgeq.session.files.writing.KEPT", 0)
        sizes = list[int]()
        for _ in range(30):
            done(chat.regenerate())
            chat.save(path)
            sizes.append(path.stat().st_size)
        assert max(sizes) < 3 * sizes[0]
        same(chat, edgeq.load_session(path, chat.model))  # type: ignore[arg-type]

    def test_another_model(self, chat: Chat, path: Path, folder: Path, tmp_path: Path) -> None:
        """With the same shapes; with the same weights, stretched."""
        other = tmp_path / "other"
        shutil.copytree(folder, other)
        data = bytearray((other / "model.safetensors").read_bytes())
        data[-4] ^= 1
        (other / "model.safetensors").write_bytes(data)
        with pytest.raises(ModelError, match=r"made with another model than .* whose weights are different"):
            edgeq.load_session(path, other, backend="numpy")
        with pytest.raises(ModelError, match=r"whose settings in config\.json are different"):
            edgeq.load_session(path, folder, backend="numpy", rope_scaling="linear:2")
        with pytest.raises(MemoryBudgetError, match="tokens, the context is 16"):
            edgeq.load_session(path, folder, backend="numpy", context=16)

    def test_what_is_no_session(self, chat: Chat, path: Path, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="does not exist"):
            edgeq.load_session(tmp_path / "none.eqs")
        with pytest.raises(ModelError, match="is not a session file"):
            edgeq.load_session(folder / "model.safetensors")
        with pytest.raises(UsageError, match="is a saved session, not a model"):
            edgeq.load(path)
        text = tmp_path / "notes.eqs"
        text.write_text("my notes")
        with pytest.raises(UsageError, match="is no session, so it is not replaced"):
            chat.save(text)
        assert text.read_text() == "my notes"
        version = path.read_bytes().replace(b'"version":"1"', b'"version":"9"')
        path.write_bytes(version)
        with pytest.raises(ModelError, match="is a session of version '9', expected 1"):
            edgeq.load_session(path)

    def test_damage(self, chat: Chat, path: Path, model: Model) -> None:
        """In each of its tensors, a byte; and cut short anywhere."""
        file, data, size = SafetensorsFile(path), path.read_bytes(), path.stat().st_size
        expected = done(edgeq.load_session(path, model).send("x")).ids
        for name, info in file.tensors.items():
            changed, at = bytearray(data), file.data_start + (info.start + info.end) // 2
            changed[at if info.end > info.start else -1] ^= 4
            path.write_bytes(changed)
            with pytest.raises(ModelError, match="is damaged: "):
                done(edgeq.load_session(path, model).send("x"))
            assert name
        for length in range(0, size, size // 20):
            path.write_bytes(data[:length])
            with pytest.raises(ModelError, match=r"is damaged|is not a session file"):
                edgeq.load_session(path, model)
        path.write_bytes(data + bytes(999))  # a change that was not finished
        assert done(edgeq.load_session(path, model).send("x")).ids == expected

    def test_damage_is_not_written_on(self, chat: Chat, path: Path, model: Model, tmp_path: Path) -> None:
        file, data = SafetensorsFile(path), bytearray(path.read_bytes())
        data[file.data_start + file.tensors["kv.1"].start] ^= 4
        path.write_bytes(data)
        again = edgeq.load_session(path, model)
        with pytest.raises(ModelError, match=r"'kv\.1' does not match its checksum"):
            again.save(tmp_path / "copy.eqs")
        assert again.turns
        assert not (tmp_path / "copy.eqs").exists()

    def test_only_one_saves_to_it(self, chat: Chat, path: Path, model: Model) -> None:
        with SessionFile(path, hold=True):
            for call in (lambda: SessionFile(path, hold=True), lambda: chat.save(path)):
                with pytest.raises(UsageError, match=r"trip\.eqs is in use by another process"):
                    call()
            edgeq.load_session(path, model)
        chat.save(path)

    def test_a_full_disk(self, chat: Chat, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data, real, left = path.read_bytes(), os.pwrite, iter(range(2))

        def write(file: int, part: Any, at: int) -> int:
            if next(left, None) is None:
                raise OSError(28, "No space left on device")
            return real(file, part, at)

        done(chat.send("x"))
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", write)
            with pytest.raises(MemoryBudgetError, match=r"trip\.eqs could not be written: No space left"):
                chat.save(path)
        assert path.read_bytes() == data
        chat.save(path)
        same(chat, edgeq.load_session(path, chat.model))  # type: ignore[arg-type]

    def test_what_cannot_be_written(self, model: Model, path: Path) -> None:
        chat = model.chat(tools=[{**TOOL, "x": MappingProxyType({})}])
        with pytest.raises(UsageError, match="cannot be written as JSON"):
            chat.save(path)
        assert not path.exists()


class TestCommand:
    """`edgeq chat --session` and `edgeq info`."""

    @pytest.fixture
    def run(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> Run:  # fmt: skip
        leave_home(tmp_path, monkeypatch)
        return runner(capsys, monkeypatch)

    def test_it_goes_on(self, run: Run, folder: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With its model, whatever the environment says, and with its settings but for those that are given."""
        first = run("chat", folder, "--session", path, "-p", LONG, "--max-tokens", "3", "--temp", "0", "--system", "x")
        assert first.code == 0
        monkeypatch.setenv("EDGEQ_MODEL", "demo")
        second = run("chat", "--session", path, "-p", "and?", "--json", "--seed", "4", "--overflow", "shift")
        assert second.code == 0
        told = json.loads(second.out)
        assert told["usage"]["cached_tokens"] > 100
        chat = edgeq.load_session(path)
        assert [turn.text for turn in chat.turns] == [LONG, "and?"]
        assert (chat.settings.max_tokens, chat.settings.temperature, chat.settings.seed) == (3, 0, 4)
        assert (chat.overflow, chat.system) == ("shift", "x")
        expected = model_says(folder)
        assert told["text"] == expected

    def test_what_is_refused(self, run: Run, folder: Path, path: Path, tmp_path: Path) -> None:
        assert "does not exist, and no model is given to begin it with" in run("chat", "--session", path, "-p", "x").err
        assert run("chat", folder, "--session", path, "-p", "x", "--max-tokens", "2").code == 0
        data, messages, tools = path.read_bytes(), tmp_path / "m.json", tmp_path / "t.json"
        messages.write_text('[{"role": "user", "content": "x"}]')
        tools.write_text(json.dumps([TOOL]))
        cases: list[tuple[str, str | Path, str]] = [
            ("--system", "y", "with no system prompt"), ("--messages", messages, "is a conversation that has begun"),
            ("--tools", tools, "with no tools"), ("--chat-template-kwargs", '{"x": 1}', "with no variables for the"),
        ]  # fmt: skip
        for option, what, why in cases:
            result = run("chat", "--session", path, "-p", "x", option, what)
            assert result.code == 2
            assert why in result.err
        with SessionFile(path, hold=True):
            result = run("chat", "--session", path, "-p", "x")
        assert (result.code, "in use by another process" in result.err) == (2, True)
        assert run("chat", "--session", path, "-p", "x", "--rope-scaling", "linear:2").code == 4
        assert run("chat", "demo", "--session", path, "-p", "x").code == 4
        assert path.read_bytes() == data
        (tmp_path / "cut.eqs").write_bytes(data[:-999])
        result = run("chat", "--session", tmp_path / "cut.eqs", "-p", "x")
        assert (result.code, "is damaged" in result.err) == (4, True)

    def test_info(self, run: Run, folder: Path, path: Path) -> None:
        run("chat", folder, "--session", path, "-p", LONG, "--max-tokens", "2")
        facts = json.loads(run("info", path, "--json", "--verify").out)
        assert facts["turns"] == 1
        assert facts["loaded as"] == str(folder)
        assert facts["begins with"].startswith("Why is the sky blue?")
        assert facts["verified"]
        data = bytearray(path.read_bytes())
        file = SafetensorsFile(path)
        data[file.data_start + file.tensors["kv.1"].start] ^= 1
        path.write_bytes(data)
        assert run("info", path).code == 0
        assert run("info", path, "--verify").code == 4


def model_says(folder: Path) -> str:
    """The second reply of the conversation above."""
    chat = edgeq.load(folder, backend="numpy").chat(max_tokens=3, temperature=0, system="x")
    done(chat.send(LONG))
    return done(chat.send("and?")).text


class Machine(RuleBasedStateMachine):
    """Two conversations, one of which is saved and loaded now and then."""

    folder: Path
    place: Path
    models: tuple[Model, Model]
    draft: str

    @initialize(thinking=st.booleans(), seed=st.integers(0, 9))
    def begin(self, thinking: bool, seed: int) -> None:
        self.place.unlink(missing_ok=True)
        self.chats = [
            forgotten(
                m.chat(thinking=thinking, seed=seed, temperature=1.2, max_tokens=3, thinking_budget=3, draft=self.draft)
            )
            for m in self.models
        ]

    def both(self, do: Do, take: int | None = None) -> None:
        one, other = (done(do(chat), take) for chat in self.chats)
        assert one.ids == other.ids
        same(*self.chats)

    @rule(text=st.sampled_from(["hi", LONG]), take=st.sampled_from([None, 1, 2]), shows=st.booleans())
    def say(self, text: str, take: int | None, shows: bool) -> None:
        self.both(lambda c: c.send(text, images=[picture()] if shows else []), take)

    @precondition(lambda self: self.chats[0].turns)
    @rule(n=st.integers(1, 3))
    def undo(self, n: int) -> None:
        for chat in self.chats:
            chat.undo(min(n, len(chat.turns)))
        same(*self.chats)

    @precondition(lambda self: self.chats[0].turns)
    @rule(how=st.sampled_from(["again", "edit"]))
    def anew(self, how: str) -> None:
        self.both((lambda c: c.regenerate()) if how == "again" else lambda c: c.edit("else"))

    @rule()
    def save(self) -> None:
        self.chats[1].save(self.place)

    @precondition(lambda self: self.place.exists())
    @rule(converts=st.booleans())
    def restore(self, converts: bool) -> None:
        self.chats[1].save(self.place)
        if converts:
            shutil.copy(self.place, self.place.with_suffix(".copy"))
            self.place.with_suffix(".copy").replace(self.place)
        forgotten(self.chats[1])
        self.chats[1] = edgeq.load_session(self.place, self.models[1])
        same(*self.chats)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_conversation(folder: Path, tmp_path: Path, backend: str) -> None:
    Machine.place, Machine.draft = tmp_path / "any.eqs", DRAFT[backend]
    Machine.models = loaded(folder, backend), loaded(folder, backend)
    run_state_machine_as_test(Machine, settings=settings(max_examples=4, stateful_step_count=8, deadline=None))


@pytest.mark.slow
def test_killed(folder: Path, path: Path) -> None:
    assert killed(loaded(folder, "numpy"), path, 10, Random(1), seconds=1).turns > 5
