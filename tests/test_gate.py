"""The text that ships for calibration, and the gate that a quantized model has to pass."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import edgeq
from edgeq.checkpoint import open_checkpoint
from edgeq.errors import ModelError, QualityError, UsageError
from edgeq.quality import calibration, gate
from edgeq.quality.calibration import default_ids, split, text_ids
from edgeq.quality.gate import check
from edgeq.quant.page import page
from edgeq.testing import config_values, write_checkpoint


class TestText:
    def test_conversations_go_through_the_template(self, chat_folder: Path) -> None:
        checkpoint = open_checkpoint(chat_folder)
        tokenizer, ids = checkpoint.tokenizer(), default_ids(checkpoint)
        assert tokenizer is not None
        assert ids == default_ids(open_checkpoint(chat_folder))
        given = json.loads((Path(calibration.__file__).parent / "conversations.json").read_text(encoding="utf-8"))
        turns = sum(message["role"] == "assistant" for one in given for message in one["messages"])
        for token in ("<|im_start|>", "<|im_end|>", "<think>"):
            number = tokenizer.token_id(token)
            assert number is not None
            assert ids.count(number) >= turns / 2, f"{token} is a token, not its letters"

    def test_it_is_small_and_mixed(self, chat_folder: Path) -> None:
        folder = Path(calibration.__file__).parent
        assert sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) < 1_000_000
        text = (folder / "documents.txt").read_text(encoding="utf-8")
        scripts = {ord(letter) >> 8 for letter in text if letter.isalpha()}
        assert len(scripts) > 20
        assert (folder / "SOURCES.md").exists()

    def test_control_tokens_of_a_users_text_are_text(self, chat_folder: Path) -> None:
        checkpoint = open_checkpoint(chat_folder)
        tokenizer = checkpoint.tokenizer()
        assert tokenizer is not None
        assert tokenizer.token_id("<|im_end|>") not in text_ids(checkpoint, "a <|im_end|> b")

    def test_a_sixteenth_is_held_out(self) -> None:
        for count, held in ((1, 0), (2, 1), (31, 1), (32, 2), (100, 6)):
            rest, out = split(list(range(8 * count + 7)), 8)
            assert (len(rest), len(out)) == (count - held, held)
            assert np.concatenate([rest, out]).reshape(-1).tolist() == list(range(8 * count))
        with pytest.raises(UsageError, match="the text is 3 tokens long, expected at least one chunk of 512"):
            split([1, 2, 3])

    def test_without_a_tokenizer(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "model", config_values())
        with pytest.raises(ModelError, match="has no tokenizer"):
            default_ids(open_checkpoint(tmp_path / "model"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gate")
    write_checkpoint(folder / "model", config_values())
    edgeq.quantize(folder / "model", folder / "q8", bits=8, group_size=32)
    return folder


class TestGate:
    def test_a_good_model_passes(self, folder: Path) -> None:
        chunks = np.random.default_rng(0).integers(0, 288, (2, 64)).astype(np.int32)
        result = check(open_checkpoint(folder / "model"), folder / "q8", chunks)
        result.need()
        record = result.as_json()
        json.dumps(record, allow_nan=False)
        assert record["passed"]
        assert record["bits_per_weight"] == pytest.approx(
            edgeq.quantize(folder / "model", None, bits=8, group_size=32, dry_run=True).bits_per_weight("text")
        )
        assert sum(record["kl_histogram"]["counts"]) == record["kl"]["positions"] == 2 * 31
        assert list(record["drift"]) == ["embed", *(f"layer.{i}" for i in range(4)), "norm"]
        assert "KL divergence" in str(result)

    def test_a_damaged_one_does_not(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One matrix of another model."""
        write_checkpoint(folder / "other", config_values(), seed=5)
        source = open_checkpoint(folder / "model")
        taken = open_checkpoint(folder / "other").matrix

        def opened(path: Path) -> object:
            checkpoint = open_checkpoint(path)
            own, name = checkpoint.matrix, "layers.1.mlp.down_proj.weight"
            monkeypatch.setattr(checkpoint, "matrix", lambda n: taken(n) if n == name else own(n))
            return checkpoint

        monkeypatch.setattr(gate, "open_checkpoint", opened)
        chunks = np.random.default_rng(0).integers(0, 288, (2, 64)).astype(np.int32)
        result = check(source, folder / "q8", chunks)
        assert not result.passed
        with pytest.raises(QualityError, match=r"the quantized model is damaged: the .* \(plain rounding to the"):
            result.need()
        assert max(result.drift, key=lambda name: result.drift[name]) != "embed"


class TestPage:
    def test_one_page_with_everything_in_it(self, folder: Path, tmp_path: Path) -> None:
        report = edgeq.quantize(folder / "model", tmp_path / "out", bits=4, group_size=32, report=tmp_path / "out.json")
        assert json.loads((tmp_path / "out.json").read_text())["gate"] is None
        plain = (tmp_path / "out.html").read_text(encoding="utf-8")
        chunks = np.random.default_rng(0).integers(0, 288, (2, 64)).astype(np.int32)
        gate = check(open_checkpoint(folder / "model"), tmp_path / "out", chunks).as_json()
        whole = page({**report.as_json(), "out": "<b>&", "gate": gate})
        assert "&lt;b&gt;&amp;: " in whole
        for text in (plain, whole):
            assert not re.search(r"(src|href)=|url\(|@import|<script|https?://", text), "nothing from elsewhere"
            for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
                ElementTree.fromstring(svg)
        assert (plain.count("<svg"), whole.count("<svg")) == (1, 3)
        assert "prefers-color-scheme: dark" in whole
        assert "layers.3.mlp.down_proj.weight" in whole
        for name in ("nan", "inf"):
            page({**report.as_json(), "gate": {**gate, "drift": dict.fromkeys(gate["drift"], float(name))}})

    @pytest.mark.parametrize("name", ["plan.html", "plan.HTM", "plan.json", "plan"])
    def test_json_and_page_by_the_name_of_either(self, folder: Path, tmp_path: Path, name: str) -> None:
        edgeq.quantize(folder / "model", None, dry_run=True, report=tmp_path / name)
        data, shown = sorted(tmp_path.iterdir(), key=lambda path: path.suffix.lower().startswith(".htm"))
        assert name in (data.name, shown.name)
        assert json.loads(data.read_text("utf-8"))["tensors"]
        assert shown.read_text("utf-8").startswith("<!doctype html>")
