"""Chat templates wherever a checkpoint keeps them, by name; read, chosen, carried over, and never in the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
from command import Run, leave_home, runner
from test_gguf import with_metadata
from test_template import ENDLESS
from tiny_tokenizer import TEMPLATE, build_tiny_tokenizer

import edgeq
from edgeq.checkpoint import open_checkpoint
from edgeq.errors import ModelError, UsageError
from edgeq.quant import quantize, verify
from edgeq.quant.gguf_export import export_gguf
from edgeq.text import sandbox
from edgeq.text.template import ChatTemplate
from edgeq.text.template_files import DEFAULT, FOLDER, read_templates

LOUD = TEMPLATE.replace("'<|im_start|>user\\n' + content", "'<|im_start|>user\\n' + content | upper")
NAMED = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": LOUD}]
NO_DEFAULT = [{**NAMED[0], "name": "rag"}, NAMED[1]]
BROKEN: dict[str, dict[str, Any]] = {
    "a number": {"tokenizer_config.json": {"chat_template": 5}},
    "a list of nothing": {"tokenizer_config.json": {"chat_template": [1, {"name": "default"}]}},
    "half a character": {"tokenizer_config.json": {"chat_template": "\ud800"}},
    "no syntax": {"chat_template.jinja": "{% if %}"},
    "no filter": {"chat_template.jinja": "{{ messages | quack }}"},
    "it always raises": {"chat_template.jinja": "{{ raise_exception('never') }}"},
    "it never ends": {"chat_template.jinja": ENDLESS["nested loops"]},
    "not UTF-8": {"chat_template.jinja": b"\xff\xfe{{"},
    "not JSON": {"chat_template.json": b"{"},
    "several without a default": {"tokenizer_config.json": {"chat_template": NO_DEFAULT}},
}  # fmt: skip


def write(folder: Path, files: dict[str, Any]) -> Path:
    """The template files in `folder`, and no others; fields go into JSON files that are there."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    for name in ("chat_template.jinja", "chat_template.json", "processor_config.json"):
        (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        if isinstance(content, dict):
            content = json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **content})
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.fixture(scope="module")
def model_folder(chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose text files each test writes anew."""
    folder = tmp_path_factory.mktemp("templates") / "model"
    shutil.copytree(chat_folder, folder)
    return folder


@pytest.fixture
def folder(model_folder: Path) -> Path:
    build_tiny_tokenizer(model_folder)
    return write(model_folder, {})


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    leave_home(tmp_path, monkeypatch)
    return runner(capsys, monkeypatch)


class TestReading:
    @pytest.mark.parametrize(
        ("files", "expected"),
        [
            ({}, {}),
            ({"chat_template.jinja": "a"}, {"default": "a"}),
            ({"chat_template.jinja": " \n"}, {}),
            ({"tokenizer_config.json": {"chat_template": None}}, {}),
            ({"tokenizer_config.json": {"chat_template": "a"}}, {"default": "a"}),
            ({"tokenizer_config.json": {"chat_template": NAMED}}, {"default": TEMPLATE, "tool_use": LOUD}),
            ({"tokenizer_config.json": {"chat_template": {"default": "a", "rag": "b"}}}, {"default": "a", "rag": "b"}),
            ({"chat_template.json": {"chat_template": "a"}, "tokenizer_config.json": {"chat_template": "b"}},
             {"default": "a"}),
            ({"processor_config.json": {"chat_template": "a"}, "tokenizer_config.json": {"chat_template": "b"}},
             {"default": "a"}),
            ({"chat_template.jinja": "a", "chat_template.json": {"chat_template": "b"}}, {"default": "a"}),
            ({"chat_template.jinja": "a", "tokenizer_config.json": {"chat_template": NAMED}}, {"default": "a"}),
            ({"chat_template.jinja": "a", f"{FOLDER}/rag.jinja": "b", f"{FOLDER}/x.txt": "c"},
             {"default": "a", "rag": "b"}),
            ({f"{FOLDER}/rag.jinja": "b", "tokenizer_config.json": {"chat_template": "a"}},
             {"default": "a", "rag": "b"}),
        ],
    )  # fmt: skip
    def test_places(self, folder: Path, files: dict[str, Any], expected: dict[str, str]) -> None:
        found = read_templates(write(folder, files))
        assert {name: template.source for name, template in found.found.items()} == expected
        assert not found.problems

    @pytest.mark.slow
    @pytest.mark.parametrize("given", [TEMPLATE, {"default": TEMPLATE, "tool_use": LOUD, "rag": "b"}])
    @pytest.mark.parametrize("files", [True, False])
    def test_as_transformers_writes_them(self, folder: Path, tmp_path: Path, given: Any, files: bool) -> None:
        transformers = pytest.importorskip("transformers")
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        tokenizer.chat_template = given
        tokenizer.save_pretrained(tmp_path / "saved", save_jinja_files=files)
        found = {name: template.source for name, template in read_templates(tmp_path / "saved").found.items()}
        assert found == (given if isinstance(given, dict) else {"default": given})

    def test_one_template_by_another_name_is_the_one(self, folder: Path) -> None:
        named = read_templates(write(folder, {f"{FOLDER}/rag.jinja": "b"})).pick()
        assert named is not None
        assert named.where == f"{FOLDER}/rag.jinja"


class TestChoosing:
    @pytest.fixture
    def named(self, folder: Path) -> Path:
        return write(folder, {"tokenizer_config.json": {"chat_template": [*NAMED, {"name": "rag", "template": LOUD}]}})

    def prompt(self, model: edgeq.Model, **options: Any) -> str:
        return model.need_tokenizer().decode(model.prompt("hi", **options).ids)

    def test_tools_have_their_own(self, named: Path) -> None:
        """As in transformers: "tool_use" with tools, unless another was asked for."""
        model = edgeq.load(named, backend="numpy")
        tool = {"type": "function", "function": {"name": "look"}}
        assert "\nhi<|im_end|>" in self.prompt(model)
        assert "\nHI<|im_end|>" in self.prompt(model, tools=[tool])
        chat = model.chat(tools=[tool], max_tokens=1)
        list(chat.send("hi"))
        assert "\nHI<|im_end|>" in model.need_tokenizer().decode(chat.ids)
        chosen = edgeq.load(named, backend="numpy", chat_template="default")
        assert "\nhi<|im_end|>" in self.prompt(chosen, tools=[tool])

    def test_by_name_by_file_and_as_text(self, named: Path, tmp_path: Path) -> None:
        (tmp_path / "loud.jinja").write_text(LOUD)
        (tmp_path / "loud.json").write_text(json.dumps({"chat_template": LOUD}))
        for what in ("rag", tmp_path / "loud.jinja", str(tmp_path / "loud.json"), LOUD):
            assert "\nHI<|im_end|>" in self.prompt(edgeq.load(named, backend="numpy", chat_template=what))

    def test_what_is_neither(self, named: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no chat template or file is called 'nope'") as caught:
            edgeq.load(named, backend="numpy", chat_template="nope")
        assert "the model's are called default, tool_use, rag" in str(caught.value.hint)
        with pytest.raises(UsageError, match="must be a file, a name or a template's text, got 5"):
            edgeq.load(named, backend="numpy", chat_template=cast(str, 5))
        (tmp_path / "x.json").write_text('{"chat_template": 5}')
        (tmp_path / "empty").touch()
        for path, message in (
            (tmp_path, "cannot be read: it is a folder"), (tmp_path / "x.json", "chat_template is 5"),
            (tmp_path / "empty", "is empty"),
        ):  # fmt: skip
            with pytest.raises(ModelError, match=message):
                edgeq.load(named, backend="numpy", chat_template=path)

    def test_kwargs(self, named: Path) -> None:
        source = TEMPLATE.replace(
            "{%- if not enable_thinking %}", "{{- eos_token ~ who }}{%- if not enable_thinking %}"
        )
        model = edgeq.load(named, backend="numpy", chat_template=source)
        ids = model.prompt("hi", template_kwargs={"who": "<|im_end|>", "enable_thinking": True}).ids
        assert model.need_tokenizer().decode(ids).endswith("<think>\n<|im_end|><|im_end|>")
        assert ids.count(model.need_tokenizer().eos_token_ids[0]) == 2  # the user's and the template's: not the text's
        other = self.prompt(model, template_kwargs={"who": [1, None], "eos_token": "<|endoftext|>"})
        assert other.endswith("<think>\n<|endoftext|>[1, None]\n</think>\n\n")
        assert self.prompt(model, thinking=False, template_kwargs={"enable_thinking": True}).endswith("</think>\n\n")

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ([1], "must be an object"), ({"a b": 1}, "must be an object"), ({1: 1}, "must be an object"),
            ({"messages": []}, "has 'messages', which the conversation fills"), ({"tools": []}, "has 'tools'"),
            ({"add_generation_prompt": False}, "has 'add_generation_prompt'"), ({"x": {1}}, "must be JSON"),
            ({"enable_thinking": "yes"}, "thinking must be"),
        ],
    )  # fmt: skip
    def test_kwargs_that_are_none(self, named: Path, kwargs: Any, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            edgeq.load(named, backend="numpy").prompt("hi", template_kwargs=kwargs)


FILES = {"chat_template.jinja": TEMPLATE, f"{FOLDER}/tool_use.jinja": LOUD, f"{FOLDER}/a.b.jinja": "{{ 1 }}"}


class TestCarried:
    def sources(self, path: Path) -> dict[str, str]:
        return {name: template.source for name, template in open_checkpoint(path).templates.found.items()}

    def test_by_quantize_and_export(self, folder: Path, tmp_path: Path) -> None:
        write(folder, FILES)
        all_three = {"default": TEMPLATE, "tool_use": LOUD, "a.b": "{{ 1 }}"}
        in_gguf = {"default": TEMPLATE, "tool_use": LOUD, "a_b": "{{ 1 }}"}
        quantize(folder, tmp_path / "q8", bits=8)
        assert self.sources(tmp_path / "q8") == all_three
        assert f"{FOLDER}/tool_use.jinja" in verify(tmp_path / "q8")
        (tmp_path / "q8" / FOLDER / "tool_use.jinja").write_text(LOUD + " ")
        with pytest.raises(ModelError, match=r"tool_use\.jinja has"):
            verify(tmp_path / "q8")
        export_gguf(open_checkpoint(folder), tmp_path / "x.gguf", "f16")
        assert self.sources(tmp_path / "x.gguf") == in_gguf
        quantize(tmp_path / "x.gguf", tmp_path / "q8", bits=8, force=True)
        assert self.sources(tmp_path / "q8") == in_gguf
        (tmp_path / "q8" / FOLDER / "notes.txt").write_text("mine")
        with pytest.raises(UsageError, match="not a model folder"):
            quantize(tmp_path / "x.gguf", tmp_path / "q8", bits=8, force=True)

    def test_another_default(self, folder: Path, tmp_path: Path, run: Run) -> None:
        write(folder, {"chat_template.json": {"chat_template": TEMPLATE}, f"{FOLDER}/loud.jinja": LOUD})
        assert run("quantize", folder, "-o", tmp_path / "q", "--bits", "8", "--chat-template", "loud").code == 0
        assert self.sources(tmp_path / "q") == {"default": LOUD, "loud": LOUD}
        (tmp_path / "mine.jinja").write_text(LOUD)
        assert run("export", folder, "-o", tmp_path / "x.gguf", "--chat-template", tmp_path / "mine.jinja").code == 0
        assert self.sources(tmp_path / "x.gguf") == {"loud": LOUD, "default": LOUD}
        for command in ("quantize", "export"):
            (tmp_path / "mine.jinja").write_text("{% if %}")
            done = run(command, folder, "-o", tmp_path / "y.gguf", "--chat-template", tmp_path / "mine.jinja")
            assert (done.code, (tmp_path / "y.gguf").exists()) == (4, False)
            assert "mine.jinja is not a usable chat template: line 1" in done.err

    def test_names_that_lead_elsewhere(self, folder: Path, tmp_path: Path) -> None:
        export_gguf(open_checkpoint(write(folder, FILES)), tmp_path / "x.gguf", "f16")
        strange = with_metadata(tmp_path / "x.gguf", {"tokenizer.chat_template.../../evil": "{{ 2 }}"})
        quantize(strange, tmp_path / "q", bits=8)
        assert self.sources(tmp_path / "q")["______evil"] == "{{ 2 }}"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["changed.gguf", "q", "x.gguf"]


@pytest.mark.parametrize("what", BROKEN)
def test_a_template_that_cannot_be_used_is_in_nobodys_way(
    folder: Path, tmp_path: Path, run: Run, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "FUEL", 1 << 21)
    write(folder, BROKEN[what])
    shown = run("info", folder)
    assert shown.code == 0
    assert "cannot be used: " in shown.out
    assert run("generate", folder, "-p", "hi", "-n", "1").code == 0
    assert run("quantize", folder, "-o", tmp_path / "q", "--bits", "8").code == 0
    exported = run("export", folder, "-o", tmp_path / "x.gguf")
    assert exported.code == 0
    assert "note: chats will not work" in exported.err or what.startswith("it ")
    for path in (folder, tmp_path / "q"):
        said = run("chat", path, "-p", "hi")
        assert said.code == 4
        assert said.err.startswith("error: ")
        assert "Traceback" not in said.err
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    assert run("chat", folder, "-p", "hi", "-n", "1", "--chat-template", tmp_path / "mine.jinja").code == 0


def test_from_folder(folder: Path) -> None:
    write(folder, {"tokenizer_config.json": {"chat_template": "{{ eos_token }}{{ pad_token }}{{ bos_token }}"}})
    assert ChatTemplate.from_folder(folder).render([], add_generation_prompt=False) == "<|im_end|><|endoftext|>"
    assert DEFAULT == "default"
