"""The BPE table gives what the `tokenizers` library gives; where it cannot, the library works."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from edgeq.errors import ModelError
from edgeq.formats.safetensors import SafetensorsFile
from edgeq.text import bpe
from edgeq.text.bpe import LibraryBpe, TableBpe, bpe_of, load_bpe, write_table


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    return tiny_tokenizer.tokenizer_spec()


@pytest.fixture(scope="module")
def library(spec: dict[str, Any]) -> LibraryBpe:
    return LibraryBpe(json.dumps(spec))


@pytest.fixture(scope="module")
def table(spec: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> TableBpe:
    path = tmp_path_factory.mktemp("tables") / "table"
    assert write_table(spec, path)
    return TableBpe(SafetensorsFile(path))


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of the test's own, and no file too small for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bpe, "WORTH_A_TABLE", 0)
    return tmp_path / "cache" / "edgeq" / "tokenizers"


PIECES = st.sampled_from(["a", "b", "th", "the ", " the", " water", "  ", "\n", "'s", "0", "é", "e\u0301", "中", "😀"])


@given(text=st.one_of(st.text(), st.lists(PIECES, max_size=60).map("".join)))
def test_same_ids(table: TableBpe, library: LibraryBpe, text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    assert table.encode(text) == library.encode(text)


def test_words_too_long_to_remember(table: TableBpe, library: LibraryBpe) -> None:
    for text in ("the" * 2000, " " * 3000, "aab" * 1000):
        assert table.encode(text) == library.encode(text)


def test_same_tokens(table: TableBpe, library: LibraryBpe) -> None:
    assert table.size == library.size
    assert table.added == library.added
    tokens = [table.token(i) for i in range(table.size + len(table.added) + 2)]
    assert tokens == [library.token(i) for i in range(len(tokens))]
    assert tokens[-1] is tokens[-2] is None
    known = str(tokens[-3])
    assert [table.token_id(token) for token in ("a", known, "no such token")] == [
        library.token_id(token) for token in ("a", known, "no such token")
    ]


@pytest.mark.shared
@pytest.mark.slow
def test_the_real_tokenizer(tmp_path: Path, cache: Path) -> None:
    tiny_tokenizer.link_real_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    table, library = load_bpe(file), LibraryBpe(file.read_text())
    assert isinstance(table, TableBpe)
    assert (table.size, table.added) == (library.size, library.added)
    assert all(table.token(i) == library.token(i) for i in range(table.size + 40))
    letters = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)

    @given(st.one_of(letters, st.text("abcdehilnorst ,.\n", max_size=200)))
    def check(text: str) -> None:
        assert table.encode(text) == library.encode(text)

    check()


class TestCache:
    def test_it_is_made_once(self, spec: dict[str, Any], tmp_path: Path, cache: Path) -> None:
        file = tmp_path / "tokenizer.json"
        file.write_text(json.dumps(spec))
        assert isinstance(load_bpe(file), TableBpe)
        (made,) = cache.iterdir()
        before = made.stat()
        assert isinstance(load_bpe(file), TableBpe)
        assert isinstance(bpe_of(file.read_text()), TableBpe)
        assert made.stat() == before or made.stat().st_mtime_ns == before.st_mtime_ns
        assert len(list(cache.iterdir())) == 1

    def test_another_file_is_another_table(self, spec: dict[str, Any], cache: Path) -> None:
        bpe_of(json.dumps(spec))
        bpe_of(json.dumps(spec, indent=1))
        assert len(list(cache.iterdir())) == 2

    def test_a_damaged_table_is_made_again(self, spec: dict[str, Any], cache: Path) -> None:
        bpe_of(json.dumps(spec))
        (made,) = cache.iterdir()
        whole = made.read_bytes()
        made.write_bytes(whole[:-1])
        assert isinstance(bpe_of(json.dumps(spec)), TableBpe)
        assert made.read_bytes() == whole

    def test_no_place_for_tables(self, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert isinstance(bpe_of(json.dumps(spec)), LibraryBpe)

    def test_small_files_are_left_to_the_library(
        self, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch, cache: Path
    ) -> None:
        monkeypatch.setattr(bpe, "WORTH_A_TABLE", 1 << 20)
        assert isinstance(bpe_of(json.dumps(spec)), LibraryBpe)
        assert not cache.exists()


def _model(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda spec: spec["model"].update(fields)


def _added(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda spec: spec["added_tokens"][0].update(fields)


class TestWhatTheTableHasNoRoomFor:
    @pytest.mark.parametrize(
        "change",
        [
            _model(ignore_merges=True),
            _model(dropout=0.1),
            _model(byte_fallback=True),
            _added(lstrip=True),
            _added(id=5000),
            lambda spec: spec["model"]["merges"].append(spec["model"]["merges"][0]),
            lambda spec: spec["model"]["vocab"].update({"a": spec["model"]["vocab"]["b"]}),
        ],
    )
    def test_is_left_to_the_library(self, spec: dict[str, Any], change: Callable[[Any], None], cache: Path) -> None:
        changed = json.loads(json.dumps(spec))
        change(changed)
        assert isinstance(bpe_of(json.dumps(changed)), LibraryBpe)
        assert not cache.exists() or not list(cache.iterdir())

    def test_a_tokenizer_that_is_none(self, tmp_path: Path, cache: Path) -> None:
        with pytest.raises(ModelError, match="is not a tokenizer"):
            bpe_of('{"model": {"type": "BPE"}}')
        (tmp_path / "tokenizer.json").write_bytes(b"\xff{")
        with pytest.raises(ModelError, match="cannot be read"):
            load_bpe(tmp_path / "tokenizer.json")
