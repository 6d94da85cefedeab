"""The BPE table gives what the `tokenizers` library gives; where it cannot, the library works."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from edgeq.cli import main
from edgeq.errors import ModelError
from edgeq.formats.safetensors import SafetensorsFile
from edgeq.text import bpe, table_cache
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

    def test_altered_numbers_are_found_out(self, spec: dict[str, Any], cache: Path, library: LibraryBpe) -> None:
        """Every table, at several places: whether the digest tells or not, the ids stay what they were."""
        bpe_of(json.dumps(spec))
        (made,) = cache.iterdir()
        whole = made.read_bytes()
        file = SafetensorsFile(made)
        for info in file.tensors.values():
            for at in (info.start, (info.start + info.end) // 2, info.end - 1):
                made.write_bytes(whole[: (n := file.data_start + at)] + bytes([whole[n] ^ 1]) + whole[n + 1 :])
                table = bpe_of(json.dumps(spec))
                assert isinstance(table, TableBpe)
                assert table.encode("the water in the well") == library.encode("the water in the well")
                assert made.read_bytes() == whole

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("pairs", lambda x: x[::-1]),
            ("pairs", lambda x: x | 1 << 62),
            ("pairs", lambda x: x.astype(np.uint32)),
            ("pairs", lambda x: x[:-1]),
            ("ranks", lambda x: x + np.uint32(len(x))),
            ("ranks", lambda x: x.astype(np.int64)),
            ("products", lambda x: x + np.uint32(1 << 20)),
            ("products", lambda x: x.reshape(-1, 1)),
            ("ends", lambda x: x[::-1]),
            ("ends", lambda x: x + np.uint32(1)),
            ("ends", lambda x: x[:-1]),
            ("spellings", lambda x: x | np.uint8(0x80)),
            ("spellings", lambda x: np.roll(x, 1)),
        ],
    )
    def test_numbers_out_of_range_even_with_a_digest(
        self, spec: dict[str, Any], cache: Path, name: str, change: Callable[[Any], Any]
    ) -> None:
        bpe_of(json.dumps(spec))
        (made,) = cache.iterdir()
        whole, file = made.read_bytes(), SafetensorsFile(made)
        arrays = {n: np.array(file.array(n)) for n in file.tensors}
        arrays[name] = np.ascontiguousarray(change(arrays[name]))
        metadata = {key: value for key, value in file.metadata.items() if key != "digest"}
        table_cache.save_table(made, arrays, metadata)
        assert made.read_bytes() != whole
        assert isinstance(bpe_of(json.dumps(spec)), TableBpe)
        assert made.read_bytes() == whole

    def test_bytes_out_of_range(self, spec: dict[str, Any], cache: Path) -> None:
        bpe_of(json.dumps(spec))
        (made,) = cache.iterdir()
        whole, file = made.read_bytes(), SafetensorsFile(made)
        arrays = {n: np.array(file.array(n)) for n in file.tensors}
        for ids in ('{"a": 1}', json.dumps({chr(i): 1 << 40 for i in range(256)}), "[]", "{", "null"):
            kept = {key: file.metadata[key] for key in ("rest", "source")}
            table_cache.save_table(made, arrays, {**kept, "bytes": ids})
            assert isinstance(bpe_of(json.dumps(spec)), TableBpe)
            assert made.read_bytes() == whole

    def test_the_table_of_another_tokenizer(self, spec: dict[str, Any], cache: Path) -> None:
        bpe_of(json.dumps(spec))
        (made,) = cache.iterdir()
        whole = made.read_bytes()
        bpe_of(json.dumps(spec, indent=1))
        (other,) = set(cache.iterdir()) - {made}
        made.write_bytes(other.read_bytes())
        assert isinstance(bpe_of(json.dumps(spec)), TableBpe)
        assert made.read_bytes() == whole

    def test_files_that_others_can_write_are_made_again(self, spec: dict[str, Any], cache: Path) -> None:
        bpe_of(json.dumps(spec))
        (made,) = cache.iterdir()
        assert made.stat().st_mode & 0o777 == 0o600
        assert cache.stat().st_mode & 0o777 == cache.parent.stat().st_mode & 0o777 == 0o700
        for mode in (0o620, 0o602, 0o666):
            made.chmod(mode)
            before = made.stat().st_ino
            assert isinstance(bpe_of(json.dumps(spec)), TableBpe)
            assert made.stat().st_ino != before
            assert made.stat().st_mode & 0o777 == 0o600

    def test_links_are_made_again(self, spec: dict[str, Any], cache: Path, tmp_path: Path) -> None:
        bpe_of(json.dumps(spec))
        (made,) = cache.iterdir()
        made.rename(tmp_path / "elsewhere")
        made.symlink_to(tmp_path / "elsewhere")
        assert isinstance(bpe_of(json.dumps(spec)), TableBpe)
        assert not made.is_symlink()
        assert (tmp_path / "elsewhere").exists()

    @pytest.mark.parametrize("level", [0, 1, 2])
    @pytest.mark.parametrize("mode", [0o777, 0o1777])
    def test_places_that_everybody_can_write_are_not_used(
        self, spec: dict[str, Any], cache: Path, level: int, mode: int
    ) -> None:
        assert isinstance(bpe_of(json.dumps(spec)), TableBpe)
        place = (cache, cache.parent, cache.parent.parent)[level]
        before = place.stat().st_mode
        place.chmod(mode)
        assert isinstance(bpe_of(json.dumps(spec)), LibraryBpe)
        assert str(place) in (table_cache.cache_problem() or "")
        place.chmod(before)
        assert isinstance(bpe_of(json.dumps(spec)), TableBpe)

    def test_a_folder_that_is_a_link_or_anothers(
        self, spec: dict[str, Any], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bpe_of(json.dumps(spec))
        cache.rename(tmp_path / "elsewhere")
        cache.symlink_to(tmp_path / "elsewhere")
        assert isinstance(bpe_of(json.dumps(spec)), LibraryBpe)
        cache.unlink()
        (tmp_path / "elsewhere").rename(cache)
        assert isinstance(bpe_of(json.dumps(spec)), TableBpe)
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        assert isinstance(bpe_of(json.dumps(spec)), LibraryBpe)

    def test_many_builders_at_once(self, spec: dict[str, Any], cache: Path, library: LibraryBpe) -> None:
        with ThreadPoolExecutor(6) as pool:
            tables = list(pool.map(lambda _: bpe_of(json.dumps(spec)), range(12)))
        assert all(isinstance(table, TableBpe) for table in tables)
        assert all(table.encode("the water") == library.encode("the water") for table in tables)
        assert len(list(cache.iterdir())) == 1

    def test_what_is_stale(self, spec: dict[str, Any], cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
        bpe_of(json.dumps(spec))
        (made,) = cache.iterdir()
        digest, version = made.name.split("-")
        (cache / f"{digest}-1.safetensors").write_bytes(made.read_bytes())
        (cache / f"{'0' * 64}-{version}").write_bytes(made.read_bytes())
        stale = table_cache.stale_tables()
        assert len(stale) == 2
        assert made not in stale
        with pytest.raises(SystemExit):
            main(["clean", "--yes", str(cache.parent)])
        assert "removed 2" in capsys.readouterr().err
        assert list(cache.iterdir()) == [made]

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
            _model(byte_fallback=True),
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
