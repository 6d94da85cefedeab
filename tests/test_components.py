"""A tokenizer.json is built from known components only, and none of them can do harm."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizer

from edgeq.errors import ModelError
from edgeq.hub import DEMO
from edgeq.text.bpe import LibraryBpe, bpe_of
from edgeq.text.components import PATTERNS

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
Change = Callable[[dict[str, Any]], Any]


def split(pattern: dict[str, str], **fields: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False, **fields}


def pre(*parts: Any) -> Change:
    return lambda spec: spec.update(pre_tokenizer={"type": "Sequence", "pretokenizers": list(parts)})


def normalizer(value: Any) -> Change:
    return lambda spec: spec.update(normalizer=value)


def replace(pattern: Any, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def model(**fields: Any) -> Change:
    return lambda spec: spec["model"].update(fields)


def added(**fields: Any) -> Change:
    return lambda spec: spec["added_tokens"][0].update(fields)


def top(**fields: Any) -> Change:
    return lambda spec: spec.update(fields)


def changed(change: Change) -> str:
    spec = tiny_tokenizer.tokenizer_spec()
    change(spec)
    return json.dumps(spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pre(split({"Regex": "(a+)+$"}), BYTE_LEVEL), r"Split has the pattern \{'Regex': '\(a\+\)\+\$'\}"),
        (pre(split({"Regex": ""}), BYTE_LEVEL), "Split has the pattern"),
        (pre(split({"String": "a"}), BYTE_LEVEL), "Split has the pattern"),
        (pre(split({"Regex": PATTERNS["qwen2"]}, behavior="Removed"), BYTE_LEVEL), "is not 'Isolated'"),
        (pre(split({"Regex": PATTERNS["qwen2"]}, invert=True), BYTE_LEVEL), "or inverted"),
        (pre(split({"Regex": PATTERNS["qwen2"]}), {**BYTE_LEVEL, "use_regex": True}), "has use_regex True"),
        (pre(split({"Regex": PATTERNS["qwen2"]}), {**BYTE_LEVEL, "add_prefix_space": True}), "add_prefix_space True"),
        (pre(BYTE_LEVEL), "has use_regex False, expected True"),
        (pre({"type": "Metaspace"}, BYTE_LEVEL), "pre_tokenizer 'Metaspace' is not supported, expected Split"),
        (pre(split({"Regex": PATTERNS["qwen2"]}), {"type": "Digits"}), "'Digits' is not supported, expected ByteLevel"),
        (pre(*[BYTE_LEVEL] * 5), "pre_tokenizer has 5 parts"),
        (pre(*[BYTE_LEVEL] * 50), "expected a list of at most 8"),
        (pre(None, None), "pre_tokenizer"),
        (top(pre_tokenizer=None), "pre_tokenizer is missing"),
        (top(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer 'Whitespace' is not supported"),
        (normalizer(replace({"String": ""}, "x")), "normalizer 'Replace' is not supported, expected NFC"),
        (normalizer({"type": "Sequence", "normalizers": [replace({"String": "a"}, "a" * 10)] * 6}), "'Replace'"),
        (normalizer({"type": "Precompiled", "precompiled_charsmap": "////"}), "normalizer 'Precompiled' is not"),
        (normalizer({"type": "Prepend", "prepend": "_"}), "normalizer 'Prepend' is not supported"),
        (normalizer({"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": []}]}), "'Sequence'"),
        (normalizer({"type": "Sequence", "normalizers": [{"type": "NFC"}] * 50}), "at most 8"),
        (normalizer({"type": ["NFC"]}), r"normalizer \['NFC'\] is not supported"),
        (normalizer("NFC\x1b[2J"), r"normalizer 'NFC\\x1b\[2J' is not supported"),
        (top(decoder={"type": "WordPiece"}), "decoder 'WordPiece' is not supported"),
        (top(post_processor={"type": "RobertaProcessing"}), "post_processor 'RobertaProcessing' is not supported"),
        (top(pre_tokenizer="ByteLevel"), "pre_tokenizer 'ByteLevel' is not supported"),
        (pre("ByteLevel"), "pre_tokenizer 'ByteLevel' is not supported"),
        (pre("Split", "ByteLevel"), "pre_tokenizer 'Split' is not supported"),
        (normalizer("NFC"), "normalizer 'NFC' is not supported"),
        (normalizer({"type": "Sequence", "normalizers": ["NFC"]}), "normalizer 'NFC' is not supported"),
        (top(model="BPE", decoder=None), "model 'BPE' is not supported"),
        (top(decoder="ByteLevel"), "decoder 'ByteLevel' is not supported"),
        (top(extra=1), "the file has 'extra', which is not known"),
        (model(type="Unigram"), "model 'Unigram' is not supported"),
        (top(model=None), "model is missing"),
        (model(cache_capacity=10**12), "model has 'cache_capacity', which is not known"),
        (model(ignore_merges="x"), "model.ignore_merges is 'x'"),
        (model(unk_token=["x"]), "model.unk_token is"),
        (model(unk_token="!"), "model.unk_token is"),
        (model(continuing_subword_prefix="##"), "model.continuing_subword_prefix is '##', expected none"),
        (model(end_of_word_suffix="x" * 10**6), "model.end_of_word_suffix is"),
        (model(vocab=[]), "model.vocab is"),
        (model(vocab={"a": -1}), "model.vocab has an id"),
        (model(vocab={"a": True}), "model.vocab has an id"),
        (model(vocab={"a": 1.0}), "model.vocab has an id"),
        (model(vocab={"a": 10**400}), "model.vocab has an id"),
        (model(vocab={"a" * 5000: 1}), "model.vocab has a token of more than 4,096 characters"),
        (model(merges={}), "model.merges is"),
        (model(merges=["a"]), "not a pair of tokens"),
        (model(merges=["a b c"]), "not a pair of tokens"),
        (model(merges=[["a", 1]]), "not a pair of tokens"),
        (model(merges=["a nosuchtoken"]), "has 'a nosuchtoken', but model.vocab has not all three tokens"),
        (model(merges=["! !"]), "has '! !', but model.vocab has not all three tokens"),
        (lambda spec: spec["model"]["vocab"].popitem(), "but model.vocab has not all three tokens"),
        (added(content=""), "added_tokens has content ''"),
        (added(content="x" * 300), "added_tokens has content"),
        (added(id=-1), "the id of .* is -1, expected a whole number from 0"),
        (added(id=10**400), "the id of .* is 1000"),
        (added(lstrip="yes"), "added_tokens has"),
        (added(more=1), "added_tokens has 'more', which is not known"),
        (top(added_tokens={}), "added_tokens is"),
        (lambda spec: spec.update(added_tokens=spec["added_tokens"] * 1000), "expected a list of at most 4,096"),
    ],
)  # fmt: skip
def test_what_is_not_listed_is_refused_by_name(change: Change, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        bpe_of(changed(change))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("text", ["", "[", "[]", "1", "null", '"x"', "{}", "[" * 100_000, '{"model": 5}'])
def test_a_file_that_is_no_tokenizer(text: str) -> None:
    with pytest.raises(ModelError, match="is not a tokenizer"):
        bpe_of(text)


@pytest.mark.parametrize(
    "change",
    [
        pre(split({"Regex": PATTERNS["qwen2"]}), BYTE_LEVEL),
        pre(split({"Regex": PATTERNS["llama3"]}), BYTE_LEVEL),
        top(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}),
        top(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}),
        normalizer(None),
        normalizer({"type": "NFKC"}),
        normalizer({"type": "Sequence", "normalizers": [{"type": "NFC"}]}),
        top(post_processor=None, decoder=None),
        top(post_processor={"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}),
        top(truncation={"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}),
        top(padding={"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_id": 0, "pad_token": "!"}),
        model(dropout=None, unk_token=None, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False),
        model(ignore_merges=True),
        model(byte_fallback=True),
        lambda spec: spec["model"].update(merges=[merge.split(" ") for merge in spec["model"]["merges"]]),
    ],
)  # fmt: skip
def test_what_the_family_uses_loads(change: Change) -> None:
    ours = bpe_of(changed(change))
    assert 0 < len(ours.encode("The water, and 42 more words.")) < 30


def test_the_demos_own() -> None:
    text = (DEMO / "tokenizer.json").read_text(encoding="utf-8")
    assert LibraryBpe(text).encode("Hello")


@pytest.mark.shared
@pytest.mark.slow
def test_the_real_one(tmp_path: Path) -> None:
    tiny_tokenizer.link_real_tokenizer(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    assert LibraryBpe(text).encode("Hello") == [9419]


def test_dropout_is_off() -> None:
    plain, other = bpe_of(changed(model())), bpe_of(changed(model(dropout=0.5)))
    text = "the water and the other words of this text " * 4
    assert [other.encode(text) for _ in range(5)] == [plain.encode(text)] * 5


class PanicException(BaseException):
    """What the library raises where its code panics: no Exception."""


def test_a_panic_of_the_library_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(_: str) -> None:
        raise PanicException("index out of bounds")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenizers.Tokenizer.from_str", panic, raising=False)
        patch.setattr("edgeq.text.bpe.tokenizers.Tokenizer", type("Broken", (), {"from_str": panic}))
        with pytest.raises(ModelError, match=re.escape("is not a tokenizer: index out of bounds")):
            bpe_of(changed(model()))
    ours = bpe_of(changed(model()))
    monkeypatch.setattr("edgeq.text.bpe.normalized", lambda text, _: panic(text))
    with pytest.raises(ModelError, match="cannot encode this text: index out of bounds"):
        ours.encode("x")
