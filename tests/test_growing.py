"""Files that grow: whatever a writer was doing when it was stopped, they hold what was before or all that is new."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.errors import ModelError
from edgeq.formats.growing import GrowingFile, GrownFile
from edgeq.formats.safetensors import SafetensorsFile

Content = dict[str, bytes]


class KilledError(BaseException):
    """The process ends here."""


def make(path: Path, content: Content) -> None:
    file = GrowingFile.create(path, 8)
    change(file, content, {})
    file.close()


def change(file: GrowingFile, new: Content, old: Content) -> None:
    """Make a file hold `new` in place of `old`."""
    file.drop(name for name in old if new.get(name) != old[name])
    for name, data in new.items():
        if old.get(name) != data:
            file.add(name, "U8", (len(data),), [data])
    file.commit({"n": str(len(new))})


def content(path: Path) -> Content:
    file = GrownFile(path)
    assert file.metadata == {"n": str(sum(not name.startswith("unused.") for name in file.tensors))}
    return {name: file.array(name).tobytes() for name in file.tensors if not name.startswith("unused.")}


ONE: Content = {"a": b"x" * 70, "b": b"y" * 3000, "c": b""}
TWO: Content = {"a": b"x" * 70, "b": b"z" * 100, "d": b"w" * 5}


def test_it_is_a_safetensors_file_at_rest(tmp_path: Path) -> None:
    make(tmp_path / "f", ONE)
    file = GrowingFile.open(tmp_path / "f")
    change(file, TWO, ONE)
    assert file.unused == 3000
    file.close()
    assert content(tmp_path / "f") == TWO
    plain = SafetensorsFile(tmp_path / "f")
    assert {name for name in plain.tensors if not name.startswith("unused.")} == TWO.keys()
    assert plain.array("unused.0").nbytes == 3000


def test_what_is_mapped_is_not_written_over(tmp_path: Path) -> None:
    make(tmp_path / "f", ONE)
    before = GrownFile(tmp_path / "f").array("b")
    file = GrowingFile.open(tmp_path / "f")
    change(file, TWO, ONE)
    file.close()
    assert before.tobytes() == ONE["b"]


@pytest.mark.parametrize("part", [0, 1, 57, 4096])
def test_stopped_at_any_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    """Of the write that it was stopped in, so many bytes were done. The next writer goes on from there."""
    real_write, real_cut, seen = os.pwrite, os.ftruncate, set[bool]()
    for limit in range(100):
        path, left = tmp_path / f"f{limit}", iter(range(limit))

        def write(file: int, data: Any, at: int, left: Any = left) -> int:
            if next(left, None) is None:
                real_write(file, data[:part], at)
                raise KilledError
            return real_write(file, data, at)

        def cut(file: int, size: int, left: Any = left) -> None:
            if next(left, None) is None:
                raise KilledError
            real_cut(file, size)

        make(path, ONE)
        file = GrowingFile.open(path)
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", write)
            patched.setattr(os, "ftruncate", cut)
            try:
                change(file, TWO, ONE)
                done = True
            except KilledError:
                done = False
        file.close()
        found = content(path)
        assert found in ([TWO] if done else [ONE, TWO])
        seen.add(found == TWO)
        again = GrowingFile.open(path)
        three = {**found, "e": b"v" * 900}
        change(again, three, found)
        again.close()
        assert content(path) == three
        SafetensorsFile(path)
        if done:
            break
    assert done
    assert seen == {False, True}


def test_an_error_leaves_it_as_it_was(tmp_path: Path) -> None:
    make(tmp_path / "f", ONE)
    file, size = GrowingFile.open(tmp_path / "f"), (tmp_path / "f").stat().st_size
    file.drop(["a"])
    file.add("e", "U8", (9000,), [bytes(9000)])
    file.roll_back()
    assert (tmp_path / "f").stat().st_size == size
    change(file, TWO, ONE)
    file.close()
    assert content(tmp_path / "f") == TWO


@settings(max_examples=20, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from("abcdef"), st.binary(max_size=300)), min_size=1, max_size=8))
def test_any_changes(tmp_path_factory: pytest.TempPathFactory, contents: list[Content]) -> None:
    path = tmp_path_factory.mktemp("grow") / "f"
    make(path, contents[0])
    file = GrowingFile.open(path)
    for old, new in pairwise(contents):
        change(file, new, old)
        assert content(path) == new
        SafetensorsFile(path)
    file.close()


def test_cut_short(tmp_path: Path) -> None:
    make(tmp_path / "f", ONE)
    data = (tmp_path / "f").read_bytes()
    for size in (1, 100, len(data) - 1):
        (tmp_path / "g").write_bytes(data[:size])
        with pytest.raises(ModelError, match="is damaged"):
            GrownFile(tmp_path / "g")
