"""Boxes and points of answers: what is read, what is refused, what is drawn; paths dropped on a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edgeq.cli.boxes import Mark, check_drawing, draw_marks, find_marks
from edgeq.cli.pictures import dropped
from edgeq.errors import UsageError

BOX = {"bbox_2d": [100, 200, 300, 400], "label": "cat"}
POINT = {"point_2d": [500, 250.5], "label": "eye"}


class TestReading:
    @pytest.mark.parametrize(
        "text",
        [
            json.dumps([BOX, POINT]), f"```json\n{json.dumps([BOX, POINT], indent=4)}\n```",
            f"Here: {json.dumps(BOX)} and {json.dumps(POINT)}.", json.dumps({"objects": [BOX, {"parts": [POINT]}]}),
            json.dumps([BOX, POINT])[:-1] + ', {"bbox_2d": [1, 2', "{x} {" + json.dumps([BOX, POINT]),
        ],
    )  # fmt: skip
    def test_json_wherever_it_stands(self, text: str) -> None:
        assert find_marks(text) == ([Mark((100, 200, 300, 400), "cat"), Mark((500, 250.5), "eye")], [])

    def test_special_tokens(self) -> None:
        text = (
            "<|object_ref_start|>the cat<|object_ref_end|><|box_start|>(10,20),(30,40)<|box_end|> and "
            "<|box_start|>( 5.5, 6 )<|box_end|>"
        )
        assert find_marks(text) == ([Mark((10, 20, 30, 40), "the cat"), Mark((5.5, 6))], [])

    def test_corners_in_any_order(self) -> None:
        assert find_marks('{"bbox_2d": [300, 200, 100, 400]}') == ([Mark((100, 200, 300, 400))], [])

    @pytest.mark.parametrize(
        "text",
        [
            '{"bbox_2d": [1, 2, 3]}', '{"bbox_2d": [1, 2, 3, 1001]}', '{"bbox_2d": [1, 2, 3, -1]}', '{"point_2d": 5}',
            '{"point_2d": [1, 2, 3, 4]}', '{"bbox_2d": [1, 2]}', '{"bbox_2d": [1, 2, 3, "4"]}',
            '{"point_2d": [NaN, 1]}', '{"point_2d": [true, 1]}', '{"bbox_2d": null}',
            "<|box_start|>(1,2),(3,1e9)<|box_end|> <|box_start|>(1,2.3.4)<|box_end|>",
        ],
    )  # fmt: skip
    def test_what_looks_like_a_mark_and_is_none(self, text: str) -> None:
        marks, wrong = find_marks(text)
        assert not marks
        assert len(wrong) == 1

    @pytest.mark.parametrize(
        "text", ["", "There is a cat at [1, 2, 3, 4].", "{" * 5000, '{"a":' * 2000, "<|box_start|>"]
    )
    def test_text_without_marks(self, text: str) -> None:
        assert find_marks(text) == ([], [])

    @given(st.lists(st.lists(st.floats(0, 1000), min_size=2, max_size=2), max_size=5), st.text(max_size=9))
    def test_whatever_json_writes(self, points: Any, label: str) -> None:
        marks, wrong = find_marks(json.dumps([{"point_2d": point, "label": label} for point in points]))
        assert marks == [Mark(tuple(point), label) for point in points]
        assert not wrong


class TestDrawing:
    def test_on_the_picture_in_its_own_size(self, tmp_path: Path) -> None:
        picture = Image.new("RGBA", (400, 200), (255, 255, 255, 255))
        out = tmp_path / "out.png"
        draw_marks(picture, [Mark((250, 250, 750, 750), "ö\n☃"), Mark((900, 500))], out)
        drawn = np.asarray(Image.open(out))
        assert drawn.shape == (200, 400, 3)
        assert tuple(drawn[120, 100]) == tuple(drawn[149, 200]) == (0xE6, 0x19, 0x4B)  # left edge, bottom edge
        assert tuple(drawn[100, 360]) == (0x3C, 0xB4, 0x4B)
        assert tuple(drawn[10, 10]) == tuple(drawn[100, 250]) == (255, 255, 255)
        assert picture.getpixel((100, 120)) == (255, 255, 255, 255)
        draw_marks(picture, [], out)  # replaced
        assert (np.asarray(Image.open(out)) == 255).all()

    def test_only_where_a_picture_can_be_written(self, tmp_path: Path) -> None:
        for name in ("a.txt", "a", "a.tar.gz"):
            with pytest.raises(UsageError, match=r"does not end in \.png"):
                check_drawing(tmp_path / name)
        for name in ("a.png", "a.JPG", "a.webp"):
            check_drawing(tmp_path / name)
        (tmp_path / "folder.png").mkdir()
        with pytest.raises(UsageError, match="is not a file, so it is not overwritten"):
            draw_marks(Image.new("RGB", (9, 9)), [], tmp_path / "folder.png")
        (tmp_path / "link.png").symlink_to("elsewhere.png")
        for name in ("folder.png", "link.png"):
            with pytest.raises(UsageError, match="is not a file, so it is not overwritten"):
                check_drawing(tmp_path / name)


class TestDropped:
    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        for name in ("a.png", "my photo.JPG", "it's.webp", "clip.mp4", "notes.txt"):
            (tmp_path / name).write_bytes(b"")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        return tmp_path

    @pytest.mark.parametrize(
        ("line", "images", "videos", "rest"),
        [
            ("a.png", ["a.png"], [], ""), ("{}/a.png ", ["a.png"], [], ""),
            ("'{}/my photo.JPG'", ["my photo.JPG"], [], ""),
            (r"{}/my\ photo.JPG What is this?", ["my photo.JPG"], [], "What is this?"), ("~/a.png", ["a.png"], [], ""),
            ('What\'s  "this"? "{}/my photo.JPG"', ["my photo.JPG"], [], 'What\'s  "this"?'),
            (r"{}/it\'s.webp", ["it's.webp"], [], ""), ("\"{}/it's.webp\"", ["it's.webp"], [], ""),
            ("file://{}/my%20photo.JPG", ["my photo.JPG"], [], ""),
            ("clip.mp4 what happens", [], ["clip.mp4"], "what happens"),
            ("'{}/a.png' '{}/clip.mp4' both?", ["a.png"], ["clip.mp4"], "both?"),
        ],
    )  # fmt: skip
    def test_a_path_that_was_pasted(self, folder: Path, line: str, images: Any, videos: Any, rest: str) -> None:
        found = dropped(line.replace("{}", str(folder)))
        assert ([path.name for path in found[0]], [path.name for path in found[1]], found[2]) == (images, videos, rest)

    @pytest.mark.parametrize(
        "line", ["hello", "notes.txt", "missing.png", "is a.png here?", "", " ", "'", '"', "what's 'this", "\\", "file://"]
    )  # fmt: skip
    def test_other_lines_stay(self, folder: Path, line: str) -> None:
        assert dropped(line) == ([], [], line)
