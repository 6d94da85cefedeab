"""A long text is encoded in pieces, and gives the ids of the whole."""

from __future__ import annotations

import itertools
import json
import random
import unicodedata
from pathlib import Path
from typing import Literal

import pytest
import tiny_tokenizer
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.errors import MemoryBudgetError
from edgeq.text import pieces
from edgeq.text.bpe import LibraryBpe
from edgeq.text.components import PATTERNS
from edgeq.text.tokenizer import Tokenizer

# What decides where words end, and where it is easily got wrong: contractions cut in two, white space of every kind,
# line ends after punctuation, digits, marks, letters of many scripts, joined emoji, Hangul in parts, long runs.
BITS = [
    "a", "the", " the", "Ab", "é", "e\u0301", "ß", "ſ", "'", "'s", "'re", "'LL", "'l", "l", "r",
    "e", "v", "1", "42", "٣", "½", " ", "  ", "\t", "\u00a0", "\u3000", "\u2028", "\u0085",
    "\n", "\r\n", "\n\n", ".", "!?", "...", "->", "(", "\x00", "\x1f", "\x7f", "中", "文字", "日本",
    "テ", "て\u3099", "한", "\u1112\u1161\u11ab", "ا", "ل\u064e", "ש", "\u05b0", "हि", "न\u093c",
    "ไ", "ท\u0e33", "த", "\u0bbe", "😀", "👩\u200d👩", "🇩🇪", "\u0301", "\u0300\u0316", "ﬁ",
    "\ufdfa", "Å", "\ufffd", "\U00020000", "xxxxxxxxxxxxxxx", "           ", "!!!!!!!!!!!!",
    "\n \n \n", " \n", "\u0f71\u0f72",
]  # fmt: skip

TEXTS = st.one_of(st.text(max_size=80), st.lists(st.sampled_from(BITS), max_size=60).map("".join))


def splitter(name: str) -> tokenizers.pre_tokenizers.PreTokenizer:
    if name == "gpt2":
        return tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERNS[name]), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return tokenizers.pre_tokenizers.Sequence([split, byte_level])


def words_in_pieces(text: str, by: tokenizers.pre_tokenizers.PreTokenizer) -> list[str]:
    cut = list(pieces.pieces(text, by))
    assert "".join(piece for piece, _ in cut) == text
    return [word for _, words in cut for word in words]


def random_text(seed: int, length: int) -> str:
    return "".join(random.Random(seed).choices(BITS, k=length))


@pytest.mark.parametrize("name", [*PATTERNS, "gpt2"])
class TestWords:
    @settings(max_examples=150, deadline=None)
    @given(text=TEXTS, piece=st.integers(1, 40))
    def test_of_any_text(self, name: str, text: str, piece: int) -> None:
        text, by = text.encode("utf-8", "replace").decode(), splitter(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces, "PIECE", piece)
            assert words_in_pieces(text, by) == [word for word, _ in by.pre_tokenize_str(text)]

    def test_with_boundaries_everywhere(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        text, by = random_text(1, 400), splitter(name)
        whole = [word for word, _ in by.pre_tokenize_str(text)]
        for piece in range(9, 200):
            monkeypatch.setattr(pieces, "PIECE", piece)
            assert words_in_pieces(text, by) == whole

    def test_of_every_pair_and_triple_at_a_boundary(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        by = splitter(name)
        monkeypatch.setattr(pieces, "PIECE", 12)
        rng = random.Random(2)
        for middle in itertools.chain(itertools.permutations(BITS, 2), (rng.choices(BITS, k=3) for _ in range(1500))):
            text = "wordword" + "".join(middle) + "more words here"
            assert words_in_pieces(text, by) == [word for word, _ in by.pre_tokenize_str(text)], middle


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
class TestNormalizing:
    @settings(max_examples=150, deadline=None)
    @given(text=TEXTS, piece=st.integers(1, 20))
    def test_of_any_text(self, form: str, text: str, piece: int) -> None:
        text, normalizer = text.encode("utf-8", "replace").decode(), getattr(tokenizers.normalizers, form)()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces, "PIECE", piece)
            assert pieces.normalized(text, normalizer) == normalizer.normalize_str(text)

    def test_a_text_is_cut_only_where_nothing_joins(self, form: Literal["NFC", "NFD", "NFKC", "NFKD"]) -> None:
        """Behind whatever character, one before which a text is cut stays as it is, and leaves the other alone."""
        before = [c for c in map(chr, range(0x80, 0x3400)) if unicodedata.category(c)[0] in "LMN"]
        for c in "a0 \n~か゛ㄱ中一한가":
            if pieces._BEGINS.match(c):
                alone = unicodedata.normalize(form, c)
                wrong = [
                    b for b in before if unicodedata.normalize(form, b + c) != unicodedata.normalize(form, b) + alone
                ]
                assert not wrong


def test_all_of_ascii_is_normalized_already() -> None:
    text = "".join(map(chr, range(128)))
    assert all(unicodedata.normalize(form, text) == text for form in ("NFC", "NFD", "NFKC", "NFKD"))


class TestIds:
    @pytest.mark.parametrize("piece", [16, 33, 64, 257])
    def test_are_those_of_the_whole(self, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
        spec = json.dumps(tiny_tokenizer.tokenizer_spec())
        whole = tokenizers.Tokenizer.from_str(spec)
        whole.encode_special_tokens = True
        monkeypatch.setattr(pieces, "PIECE", piece)
        ours = LibraryBpe(spec)
        for seed in range(20):
            text = random_text(seed, 300)
            assert ours.encode(text) == whole.encode(text, add_special_tokens=False).ids

    @pytest.mark.shared
    @pytest.mark.slow
    def test_of_the_real_tokenizer(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tiny_tokenizer.link_real_tokenizer(tmp_path)
        whole = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        whole.encode_special_tokens = True
        ours = Tokenizer.from_folder(tmp_path)
        for piece in (16, 100, 1000):
            monkeypatch.setattr(pieces, "PIECE", piece)
            for seed in range(40):
                text = random_text(seed, 1000)
                assert ours.encode(text) == whole.encode(text, add_special_tokens=False).ids

    def test_of_a_text_of_many_pieces(self) -> None:
        ours = LibraryBpe(json.dumps(tiny_tokenizer.tokenizer_spec()))
        assert ours.encode("The water. " * 30_000) == ours.encode("The water. ") * 30_000


class TestBounds:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pieces, "PIECE", 64)
        monkeypatch.setattr(pieces, "LONGEST_WORD", 1024)

    @pytest.mark.parametrize("char", [" ", "a", "!", "\n", "\u0301", "\u1161"])
    def test_a_word_without_end_is_refused(self, char: str) -> None:
        ours = LibraryBpe(json.dumps(tiny_tokenizer.tokenizer_spec()))
        assert len(ours.encode(char * 500)) > 0
        with pytest.raises(MemoryBudgetError, match="a word, or a run of spaces, of more than 1,024") as caught:
            ours.encode(char * 100_000)
        assert caught.value.exit_code == 3

    def test_a_text_without_end_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pieces, "MAX_TEXT", 1000)
        tokenizer = Tokenizer.from_spec(json.dumps(tiny_tokenizer.tokenizer_spec()), tiny_tokenizer.tokenizer_config())
        tokenizer.encode("word " * 200)
        for control in (False, True):
            with pytest.raises(MemoryBudgetError, match="more than 1,000 characters"):
                tokenizer.encode("x" + "word " * 200, control=control)
