"""Video as the vision tower takes it: frames, times and values equal to transformers'; files by either reader."""

from __future__ import annotations

import gzip
import json
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pixel_cases import SETTINGS, VIDEOS, digest, picture, pixels

from edgeq import vision
from edgeq.errors import MediaError, UsageError
from edgeq.processor import parse_processor
from edgeq.vision import video
from edgeq.vision.resize import Rows
from edgeq.vision.video import OpenVideo

FOUND: dict[str, Any] = json.loads(gzip.decompress((Path(__file__).parent / "data" / "pixels.json.gz").read_bytes()))
CLIP = Path(__file__).parent / "data" / "clip.mp4"  # 25 frames of 64 x 48 at 12.5 fps, each of one shade of grey


def frames(name: str) -> list[Any]:
    count, h, w, *_ = VIDEOS[name]
    return [pixels(i, h, w) for i in range(count)]


class TestSizesAndFrames:
    def test_sizes_of_the_real_processor(self) -> None:
        for n, h, w, most, size in FOUND["video_sizes"]:
            config = parse_processor({}, {"size": {"shortest_edge": 4_096, "longest_edge": most}})
            try:
                found = list(vision.video_size(n, h, w, config))
            except MediaError:
                found = None
            assert found == size, (n, h, w, most)

    def test_frames_and_times_of_the_real_processor(self) -> None:
        for total, fps, indices, seconds in FOUND["samplings"]:
            assert vision.sample_frames(total, fps) == (indices, seconds)

    def test_an_empty_file_is_said_to_be_empty(self) -> None:
        with pytest.raises(MediaError, match="video is empty"):
            vision.preprocess_video(b"")

    def test_one_frame_counts_twice(self) -> None:
        assert vision.sample_frames(1, 24) == ([0], [0.0])
        assert vision.video_size(1, 64, 96) == vision.video_size(2, 64, 96) == (64, 96)
        values, grid = vision.preprocess_video([pixels(2, 64, 96)])
        assert grid == (1, 4, 6)
        assert np.array_equal(values, vision.preprocess_video([pixels(2, 64, 96)] * 2, sample=False)[0])

    def test_other_rates_and_bounds(self) -> None:
        assert vision.sample_frames(300, 30, rate=1)[0] == [0, 33, 66, 100, 133, 166, 199, 233, 266, 299]
        assert vision.sample_frames(300, 30, max_frames=3)[0] == [0, 150, 299]
        assert len(vision.sample_frames(10**6, 30)[0]) == 768
        assert vision.sample_frames(3, 5e-324)[0] == [0, 1, 2]
        assert vision.sample_frames(48, None) == vision.sample_frames(48, 24)
        tokens = 4 * np.prod(vision.video_size(8, 720, 1280, video_tokens=400)) // 1024
        assert 300 < tokens <= 400
        for wrong in ({"rate": 0.0}, {"rate": float("nan")}, {"max_frames": 0}):
            with pytest.raises(UsageError):
                vision.sample_frames(10, 24, **wrong)
        with pytest.raises(MediaError, match="without frames"):
            vision.sample_frames(0, 24)

    def test_a_cap_of_each_frame(self) -> None:
        """`cap_pixels_per_frame`, which is off in the family's files: a clip of 1 s in 4K, 12,064 tokens or 1,440."""
        config = parse_processor({}, {"cap_pixels_per_frame": True})
        sizes = [vision.video_size(4, 2160, 3840, c) for c in (None, config)]
        assert [h * w * 2 // 1024 for h, w in sizes] == [12_064, 1_440]


class TestValues:
    @pytest.mark.parametrize("which", SETTINGS)
    @pytest.mark.parametrize("name", VIDEOS)
    def test_those_of_transformers_to_the_bit(self, name: str, which: str) -> None:
        *_, fps, sample = VIDEOS[name]
        values, grid = vision.preprocess_video(frames(name), SETTINGS[which], fps=fps, sample=sample)
        expected, expected_digest = FOUND["videos"][name][which]
        assert list(grid) == expected
        assert digest(values) == expected_digest

    def test_a_visual(self) -> None:
        visual = vision.read_video(frames("5 of 1 fps"), fps=1, name="x")
        assert (visual.kind, visual.name, visual.size, visual.taken) == ("video", "x", (64, 64), 5)
        assert visual.timestamps == (0.5, 2.5, 4.0)
        assert visual.grid == (3, 4, 4)
        again = vision.read_video(np.stack(frames("5 of 1 fps")), fps=1)
        assert again.digest == visual.digest
        assert again.digest != vision.read_video(frames("5 of 1 fps")[:4], fps=1).digest

    def test_frames_of_two_sizes(self) -> None:
        with pytest.raises(MediaError, match="frame 2 of video is 96 x 64, expected 60 x 64 as the first"):
            vision.preprocess_video([pixels(1, 64, 60), pixels(1, 64, 96)])
        with pytest.raises(MediaError, match="no frames"):
            vision.preprocess_video([])


class TestImagesAsVideo:
    def test_a_folder(self, tmp_path: Path) -> None:
        for i in (0, 2, 10, 9, 1):
            Image.fromarray(pixels(i, 64, 64)).save(tmp_path / f"frame{i}.png")
        (tmp_path / "notes.txt").write_text("x")
        expected = vision.preprocess_video([pixels(i, 64, 64) for i in (0, 1, 2, 9, 10)], fps=1)
        values, grid = vision.preprocess_video(str(tmp_path), fps=1)
        assert grid == expected[1]
        assert np.array_equal(values, expected[0])
        (tmp_path / "empty").mkdir()
        with pytest.raises(MediaError, match="has no frames"):
            vision.preprocess_video(tmp_path / "empty")

    @pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
    def test_animations(self, kind: str) -> None:
        shades = [Image.new("RGB", (64, 48), (i * 20, 0, 255 - i * 20)) for i in range(10)]
        file = BytesIO()
        options = {"lossless": True} if kind == "WEBP" else {}
        shades[0].save(file, kind, save_all=True, append_images=shades[1:], duration=200, **options)
        with vision.open_video(file.getvalue()) as opened:
            assert (opened.total, opened.fps, opened.size) == (10, 5.0, (48, 64))
            indices, _ = vision.frames_of(opened)
            assert indices == [0, 3, 6, 9]
            seen = [frame.rows(0, 48)[0, 0].tolist() for frame in opened.frames(indices)]
        assert seen == [[i * 20, 0, 255 - i * 20] for i in indices]

    def test_an_animation_without_delays_has_ten_frames_a_second(self) -> None:
        file = BytesIO()
        shades = [Image.new("L", (40, 40), i) for i in range(6)]
        shades[0].save(file, "GIF", save_all=True, append_images=shades[1:])
        with vision.open_video(file.getvalue()) as opened:
            assert opened.fps == pytest.approx(10)

    def test_a_still_image(self, tmp_path: Path) -> None:
        picture("RGB").save(tmp_path / "x.png")
        assert vision.read_video(tmp_path / "x.png").grid == vision.read_video([picture("RGB")]).grid == (1, 4, 6)
        assert vision.read_video(picture("RGB")).timestamps == (0.0,)

    def test_an_animation_too_large(self) -> None:
        file = BytesIO()
        Image.new("L", (2000, 2000)).save(file, "GIF")
        with pytest.raises(MediaError, match="2000 x 2000 pixels, too many to decode within 20 MB"):
            vision.read_video(file.getvalue(), memory=20_000_000)


READERS = [
    pytest.param(video._FFmpeg, marks=pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs ffmpeg")),
    pytest.param(video._PyAV, id="PyAV"),
]


@pytest.mark.parametrize("reader", READERS)
class TestFiles:
    @pytest.fixture(autouse=True)
    def with_it(self, reader: type[OpenVideo], monkeypatch: pytest.MonkeyPatch) -> None:
        if reader is video._PyAV:
            pytest.importorskip("av")
        monkeypatch.setattr(video, "_file_reader", lambda: reader)

    def shades(self, opened: OpenVideo, indices: Sequence[int]) -> list[int]:
        return [round(float(frame.rows(0, opened.size[0]).mean())) for frame in opened.frames(indices)]

    def test_frames(self) -> None:
        with vision.open_video(CLIP) as opened:
            assert (opened.total, opened.fps, opened.size) == (25, 12.5, (48, 64))
            assert self.shades(opened, [0, 6, 12, 24]) == pytest.approx([0, 60, 120, 240], abs=4)
            assert self.shades(opened, range(25)) == pytest.approx(range(0, 250, 10), abs=4)

    def test_a_trimmed_video(self) -> None:
        """Its first 10 frames are in the file, and an edit list leaves them out."""
        with vision.open_video(CLIP.with_stem("clip_trimmed")) as opened:
            assert (opened.total, opened.fps) == (15, 12.5)
            assert self.shades(opened, [0, 14]) == pytest.approx([100, 240], abs=4)

    def test_by_path_and_by_content(self) -> None:
        one, two = vision.read_video(CLIP), vision.read_video(CLIP.read_bytes())
        assert one.digest == two.digest
        assert one.taken == 4
        assert one.timestamps == pytest.approx((0.32, 1.6))

    def test_more_frames_than_can_be_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(video, "_MOST_CHOSEN", 3)
        with vision.open_video(CLIP) as opened:
            assert self.shades(opened, [1, 3, 5, 20]) == pytest.approx([10, 30, 50, 200], abs=4)

    def test_many_frames(self) -> None:
        """More than there are; the last one stands for those that do not come."""
        with vision.open_video(CLIP) as opened:
            assert self.shades(opened, range(2000))[20:40] == pytest.approx([*range(200, 250, 10), *[240] * 15], abs=4)

    def test_cut_short(self) -> None:
        data = CLIP.read_bytes()
        for length in range(0, len(data), 500):
            with pytest.raises(MediaError) as caught:
                vision.read_video(data[: min(length, len(data) // 2)])
            assert caught.value.exit_code == 4

    def test_no_video(self, tmp_path: Path) -> None:
        for content in (b"", b"x" * 1000, b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(28)):
            (tmp_path / "x").write_bytes(content)
            with pytest.raises(MediaError):
                vision.read_video(tmp_path / "x")

    def test_frames_too_large(self) -> None:
        with pytest.raises(MediaError, match="64 x 48 pixels, too many"):
            vision.read_video(CLIP, memory=9_000)


def test_what_reads_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MediaError, match="needs ffmpeg or PyAV"):
        vision.read_video(CLIP)
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(MediaError, match=r"has no video in it \(ffmpeg: broken\)"):
        vision.read_video(CLIP)


def test_frames_are_resized_as_they_come() -> None:
    """Never two of them in full size."""
    alive = 0

    class Frame:
        size = (640, 480)

        def rows(self, first: int, last: int) -> Any:
            return np.zeros((last - first, 480, 3), np.uint8)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    class Video(OpenVideo):
        name, total, fps, size = "x", 60, 2.0, (640, 480)

        def frames(self, indices: Sequence[int]) -> Iterator[Rows]:
            nonlocal alive
            for _ in indices:
                alive += 1
                assert alive <= 2  # this one, and the one that the loop still holds
                yield Frame()

    assert vision.read_video(Video(), video_tokens=500).taken == 60
