"""One set of tokens that end a text, whatever file names them: decoding, both channels, plain text, conversations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import BPE_TOKENS, END_OF_TEXT, IM_END, TEMPLATE, VOCAB_SIZE

import edgeq
from edgeq.api import Model
from edgeq.checkpoint import open_checkpoint
from edgeq.formats.gguf import GGUFFile
from edgeq.generate import Sampler, StopReason
from edgeq.quant import quantize
from edgeq.quant.gguf_export import export_gguf

FIM_PAD, BOX_END, BOX_START = BPE_TOKENS + 19, BPE_TOKENS + 6, BPE_TOKENS + 5
Say = Callable[..., None]


def changed(folder: Path, name: str, **values: Any) -> None:
    """Change fields of a JSON file of a folder; None takes one out."""
    file = folder / name
    given = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({key: value for key, value in {**given, **values}.items() if value is not None}))


def base_model(chat_folder: Path, folder: Path) -> Path:
    """A fine-tune of a base model: the files name the end of a document, and one of them another token, too."""
    shutil.copytree(chat_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    changed(folder, "config.json", text_config={**config["text_config"], "eos_token_id": END_OF_TEXT})
    changed(folder, "tokenizer_config.json", eos_token="<|endoftext|>")
    changed(folder, "generation_config.json", eos_token_id=[END_OF_TEXT, FIM_PAD])
    return folder


@pytest.fixture(scope="module", params=["folder", "gguf", "quantized", "quantized gguf"])
def base(request: pytest.FixtureRequest, chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    place = tmp_path_factory.mktemp("base")
    path = base_model(chat_folder, place / "model")
    if "gguf" in request.param:
        export_gguf(open_checkpoint(path), place / "model.gguf", "f16")
        path = place / "model.gguf"
    if "quantized" in request.param:
        quantize(path, place / "quantized", bits=8)
        path = place / "quantized"
    return edgeq.load(path, backend="numpy")


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Say:
    """Has models say these tokens, over and over."""

    def script(*ids: int) -> None:
        left: list[int] = []

        def sample(sampler: Sampler, logits: Any, *_: Any) -> int:
            if not left:
                left.extend(ids)
            return left.pop(0)

        monkeypatch.setattr(Sampler, "sample", sample)

    return script


@pytest.mark.parametrize("end", [IM_END, END_OF_TEXT, FIM_PAD])
def test_a_fine_tune_of_a_base_model_chats(base: Model, say: Say, end: int) -> None:
    tokenizer = base.need_tokenizer()
    assert base.eos_ids == {IM_END, END_OF_TEXT, FIM_PAD} == set(tokenizer.eos_token_ids)
    hello = tokenizer.encode("Hello")
    say(*hello, end)
    chat = base.chat(draft="off", thinking=False)
    for _ in range(2):  # the second turn follows a reply that ended with whatever it was
        reply = chat.send("hi")
        assert "".join(piece.text for piece in reply) == reply.text == "Hello"
        assert reply.finish.reason is StopReason.STOP_TOKEN
    turns = tokenizer.decode(chat.ids).split("<|im_end|>\n")
    assert [turn.partition("\n")[0] for turn in turns] == ["<|im_start|>user", "<|im_start|>assistant"] * 2
    assert turns[1].endswith("</think>\n\nHello")
    say(*hello, end)
    plain = base.generate("hi", draft="off")
    assert "".join(piece.text for piece in plain) == plain.text == "Hello"
    assert plain.finish.reason is StopReason.STOP_TOKEN
    say(*hello, end, *hello)
    shown = base.generate("hi", draft="off", ignore_eos=True, max_tokens=2 * len(hello) + 1)
    assert "".join(piece.text for piece in shown) == "HelloHello"


def test_thinking_ends_with_each_of_them(base: Model, say: Say) -> None:
    tokenizer = base.need_tokenizer()
    for end in (IM_END, END_OF_TEXT, FIM_PAD):
        say(*tokenizer.encode("why"), end)
        reply = base.chat(draft="off", thinking=True).send("hi")
        list(reply)
        assert "<|" not in reply.thinking + reply.text


@pytest.mark.parametrize("closing", ["<|box_end|>", "<|turn_end|>", "<turn>", "{{ eos_token }}"])
def test_the_templates_own_end_of_turn(chat_folder: Path, tmp_path: Path, say: Say, closing: str) -> None:
    """A turn that ends with a token of which no file says that it is a stop token: the family's, or added."""
    folder = tmp_path / "model"
    shutil.copytree(chat_folder, folder)
    changed(folder, "tokenizer_config.json", eos_token="<|box_start|>")
    source = TEMPLATE.replace("'<|im_end|>\\n'", f"'{closing}\\n'" if "{" not in closing else "eos_token + '\\n'")
    assert "<|im_end|>\\n' }}" not in source
    (folder / "chat_template.jinja").write_text(source)
    if closing in ("<|turn_end|>", "<turn>"):
        added = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        added[str(VOCAB_SIZE)] = {"content": closing, "special": closing != "<turn>"}  # a word, else, and normalized
        changed(folder, "tokenizer_config.json", added_tokens_decoder=added)
    model = edgeq.load(folder, backend="numpy")
    tokenizer = model.need_tokenizer()
    end = tokenizer.token_id(closing) if "{" not in closing else BOX_START
    assert end is not None
    assert end in model.eos_ids == set(tokenizer.eos_token_ids)
    say(*tokenizer.encode("Hello"), end)
    chat = model.chat(draft="off", thinking=False)
    for _ in range(2):
        reply = chat.send("hi")
        assert "".join(piece.text for piece in reply) == "Hello"
    assert list(chat.ids).count(end) == 4
    plain = model.generate("hi", draft="off")
    assert "".join(piece.text for piece in plain) == "Hello"
    list(chat.send(f"what is {closing}?"))
    assert list(chat.ids).count(end) == 6  # a user's text spells no stop token


def test_a_template_that_cannot_be_used_stops_no_plain_text(chat_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(chat_folder, folder)
    for source in ("{% broken", "<|box_end|>{{ raise_exception('no') }}", "{{ messages[0].content }}"):
        (folder / "chat_template.jinja").write_text(source)
        model = edgeq.load(folder, backend="numpy")
        assert model.eos_ids == {IM_END, END_OF_TEXT}
        assert list(model.generate("hi", max_tokens=1))


def test_all_of_them_have_a_place_in_gguf(chat_folder: Path, tmp_path: Path) -> None:
    folder = base_model(chat_folder, tmp_path / "model")
    many = [END_OF_TEXT, FIM_PAD, BOX_END, BOX_START]
    changed(folder, "generation_config.json", eos_token_id=many)
    report = export_gguf(open_checkpoint(folder), tmp_path / "model.gguf", "f16")
    assert not report.notes
    assert edgeq.load(tmp_path / "model.gguf", backend="numpy").eos_ids == {*many, IM_END}
    file = GGUFFile(tmp_path / "model.gguf")
    assert [file.value(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom")] == many[:3]
    export_gguf(open_checkpoint(chat_folder), tmp_path / "usual.gguf", "f16")
    assert "tokenizer.ggml.eos_token_ids" not in GGUFFile(tmp_path / "usual.gguf")


def test_ids_beyond_the_vocabulary_end_nothing(chat_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(chat_folder, folder)
    changed(folder, "generation_config.json", eos_token_id=[5, 1 << 30])
    assert edgeq.load(folder, backend="numpy").eos_ids == {5, IM_END, END_OF_TEXT}


def test_only_what_ends_in_a_strange_way_costs_the_template_library(chat_folder: Path, tmp_path: Path) -> None:
    """Plain text with the family's templates is generated without it."""
    from process import run_python

    code = f"import sys, edgeq; edgeq.load({str(chat_folder)!r}, backend='numpy'); print('jinja2' in sys.modules)"
    assert run_python(code).stdout.strip() == "False"
