"""Images as the vision tower takes them: sizes, resizing and values equal to transformers' and torch's, to the bit."""

from __future__ import annotations

import base64
import gzip
import json
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin
from pixel_cases import IMAGES, SETTINGS, digest, picture, pixels
from process import run_python

import edgeq
from edgeq import vision
from edgeq.config import ModelConfig, parse_config, read_config
from edgeq.errors import EdgeqError, MediaError, ModelError, UsageError
from edgeq.processor import FAMILY, ProcessorConfig, parse_processor
from edgeq.testing import config_values, write_checkpoint
from edgeq.vision.images import ArrayRows, open_image
from edgeq.vision.patches import Patches
from edgeq.vision.resize import resize, weights
from edgeq.vision.settings import processor_of

FOUND: dict[str, Any] = json.loads(gzip.decompress((Path(__file__).parent / "data" / "pixels.json.gz").read_bytes()))


def size_or_none(of: Any, *arguments: Any, **limits: Any) -> list[int] | None:
    try:
        return list(of(*arguments, **limits))
    except MediaError:
        return None


def png(image: Image.Image, **options: Any) -> bytes:
    return encoded(image, "PNG", **options)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rgb(source: Any, **options: Any) -> np.ndarray[Any, Any]:
    """What is seen of an image in its own size."""
    with open_image(source, **options) as image:
        return image.decoded().rows(0, image.size[0])


class TestSizes:
    def test_those_of_the_real_processor(self) -> None:
        for h, w, least, most, size in FOUND["sizes"]:
            config = parse_processor({"size": {"shortest_edge": least, "longest_edge": most}}, {})
            assert size_or_none(vision.image_size, h, w, config) == size, (h, w, least, most)

    def test_the_table_of_the_documents(self) -> None:
        sizes = {(1, 1): (256, 256), (720, 1280): (704, 1280), (3508, 2480): (3520, 2496), (20, 2000): (32, 2560)}
        assert {size: vision.image_size(*size) for size in sizes} == sizes
        assert vision.image_size(4000, 6000) == (3328, 4992)

    def test_no_side_is_more_than_200_times_longer(self) -> None:
        assert vision.image_size(5, 1000) == (32, 3648)
        with pytest.raises(MediaError, match="1001 x 5 pixels, expected no side more than 200 times longer"):
            vision.image_size(5, 1001)
        with pytest.raises(MediaError, match="0 x 5 pixels"):
            vision.image_size(5, 0)

    @given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 5000))
    @settings(max_examples=200, deadline=None)
    def test_a_number_of_tokens_is_kept_to(self, h: int, w: int, tokens: int) -> None:
        ratio = max(h, w) / min(h, w)
        if ratio <= 200:
            height, width = vision.image_size(h, w, image_tokens=tokens)
            assert not height % 32
            assert not width % 32
            assert height * width // 1024 <= max(tokens, ratio)

    def test_limits_in_the_place_of_the_checkpoints(self) -> None:
        assert vision.image_size(3000, 4000, max_pixels=1_000_000) == vision.image_size(3000, 4000, image_tokens=976)
        assert vision.image_size(10, 10, min_pixels=1_000_000) == (1024, 1024)
        assert vision.image_size(600, 600, max_pixels=1024) == (32, 32)
        with pytest.raises(UsageError, match="min_pixels is 5000, expected at most the maximum of 4000 pixels"):
            vision.image_size(10, 10, min_pixels=5000, max_pixels=4000)
        with pytest.raises(UsageError, match="min_pixels is 5000, expected at most the maximum of 2048 pixels"):
            vision.image_size(10, 10, min_pixels=5000, image_tokens=2)
        with pytest.raises(UsageError, match="the number of tokens is 0"):
            vision.image_size(10, 10, image_tokens=0)


class TestSettings:
    def checkpoint(self, path: Path, **files: Any) -> ModelConfig:
        write_checkpoint(path, config_values(vision=True))
        for name, values in files.items():
            (path / f"{name}.json").write_text(json.dumps(values))
        return edgeq.load(path, backend="numpy").config

    def test_the_familys_where_a_checkpoint_says_nothing(self, tmp_path: Path) -> None:
        config = self.checkpoint(tmp_path / "m")
        assert config.processor is not None
        assert config.processor.image == FAMILY.image
        assert config.processor.video == FAMILY.video
        assert processor_of(config) == processor_of(config.vision)

    def test_whatever_has_them(self, tmp_path: Path) -> None:
        file = {"size": {"shortest_edge": 1024, "longest_edge": 9999}, "image_mean": 0.25}
        config = self.checkpoint(tmp_path / "m", preprocessor_config=file)
        expected = config.processor
        assert expected is not None
        assert (expected.image.max_pixels, expected.image.mean) == (9999, (0.25,) * 3)
        assert expected.video == expected.image  # as in transformers, where video has no file of its own
        model = edgeq.load(tmp_path / "m", backend="numpy")
        for given_as in (config, expected, model, model.checkpoint, tmp_path / "m", str(tmp_path / "m"), model.config):
            assert processor_of(given_as).image == expected.image
        assert processor_of(file).image == expected.image
        assert processor_of({"image_processor": file}).image == expected.image
        assert processor_of(None) == FAMILY
        with pytest.raises(UsageError, match="no configuration"):
            processor_of(3)  # type: ignore[arg-type]

    def test_one_file_for_both_goes_first(self, tmp_path: Path) -> None:
        config = self.checkpoint(
            tmp_path / "m",
            processor_config={"image_processor": {"max_pixels": 100_000}, "video_processor": {"fps": 1}},
            preprocessor_config={"max_pixels": 200_000},
            video_preprocessor_config={"fps": 3},
        )
        assert config.processor is not None
        assert (config.processor.image.max_pixels, config.processor.fps) == (100_000, 1)

    def test_both_spellings_of_limits(self) -> None:
        size = {"size": {"shortest_edge": 5000, "longest_edge": 6000}}
        assert parse_processor(size, {}).image == parse_processor({"min_pixels": 5000, "max_pixels": 6000}, {}).image
        assert parse_processor(size | {"max_pixels": 7000}, {}).image.max_pixels == 7000

    @pytest.mark.parametrize(
        ("values", "told"),
        [
            ({"do_resize": False}, "do_resize is False, expected True, the only one"),
            ({"resample": 2}, "resample is 2, expected 3"),
            ({"do_center_crop": True}, "do_center_crop is True"),
            ({"do_pad": True}, "do_pad is True"),
            ({"do_convert_rgb": False}, "do_convert_rgb is False"),
            ({"num_frames": 8}, "num_frames is 8"),
            ({"image_mean": [0.5, 0.5]}, "image_mean is .*, expected three numbers"),
            ({"image_std": [1, 0, 1]}, "image_std is .*, expected numbers other than 0"),
            ({"image_std": [1, "x", 1]}, "image_std is 'x'"),
            ({"do_normalize": 1}, "do_normalize is 1, expected true or false"),
            ({"rescale_factor": float("nan")}, "rescale_factor is nan"),
            ({"size": 5}, "size is 5"),
            ({"size": {"height": 5}}, "size has 'height'"),
            ({"size": {"longest_edge": 5}}, "at least 65536 pixels and at most 5"),
            ({"min_pixels": True}, "min_pixels is True"),
            ({"patch_size": 14}, "patch_size is 14, expected 16 as in the vision tower"),
        ],
    )
    def test_what_is_not_implemented_is_refused_by_name(self, values: dict[str, Any], told: str) -> None:
        with pytest.raises(ModelError, match=told):
            parse_processor(values, {}, parse_config(config_values(vision=True) | {}).vision and FAMILY_TOWER)

    def test_a_text_only_checkpoint_reads_none(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "m", config_values(vision=False))
        (tmp_path / "m" / "preprocessor_config.json").write_text("{")
        assert edgeq.load(tmp_path / "m", backend="numpy").config.processor is None


class _Tower:
    patch_size, temporal_patch_size, spatial_merge_size = 16, 2, 2


FAMILY_TOWER = _Tower()


class TestResize:
    def test_torchs_to_the_bit(self) -> None:
        """240 sizes, a quarter of them of black and white noise."""
        wrong = [
            (h, w, height, width)
            for number, (h, w, height, width, expected) in enumerate(FOUND["resizes"])
            if digest(resize(ArrayRows(pixels(number, h, w)), (height, width))) != expected
        ]
        assert not wrong

    @given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 140), st.integers(1, 140), st.integers(0, 9))
    @settings(max_examples=60, deadline=None)
    def test_the_slow_twin(self, h: int, w: int, height: int, width: int, seed: int) -> None:
        """Sums of integers, pixel by pixel, as torch's own code has them."""

        def axis(x: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
            first, count, w, bits = weights(x.shape[0], size)
            half = (1 << bits) >> 1
            rows = [
                (np.tensordot(w[i, :n].astype(np.int64), x[f : f + n].astype(np.int64), 1) + half) >> bits
                for i, (f, n) in enumerate(zip(first, count, strict=True))
            ]
            return np.clip(np.stack(rows), 0, 255).astype(np.uint8)

        x = pixels(seed, h, w)
        across = axis(x.swapaxes(0, 1), width).swapaxes(0, 1)
        expected = axis(across, height).transpose(2, 0, 1)
        assert np.array_equal(resize(ArrayRows(x), (height, width)), expected)

    def test_no_more_rows_are_asked_for_than_a_strip_needs(self) -> None:
        asked = []

        class Watched(ArrayRows):
            def rows(self, first: int, last: int) -> Any:
                asked.append((first, last))
                return super().rows(first, last)

        resize(Watched(pixels(2, 1000, 40)), (512, 32))
        assert max(last - first for first, last in asked) < 140
        assert [first for first, _ in asked][1:] == [last for _, last in asked][:-1]  # and each of them once


class TestPatches:
    @pytest.mark.parametrize("which", SETTINGS)
    @pytest.mark.parametrize("name", IMAGES)
    def test_those_of_transformers_to_the_bit(self, name: str, which: str) -> None:
        values, grid = vision.preprocess(picture(name), SETTINGS[which])
        expected, expected_digest = FOUND["images"][name][which]
        assert list(grid) == expected
        assert values.dtype == np.float32
        assert digest(values) == expected_digest

    def test_rows_of_them(self) -> None:
        config = ProcessorConfig()
        frames = np.stack([pixels(i, 64, 96).transpose(2, 0, 1) for i in range(3)])
        patches = Patches(frames, config, config.video)
        whole = patches[:]
        assert whole.shape == patches.shape == (2 * 4 * 6, 1536)
        for rows in (slice(0, 5), slice(3, 29), slice(24, 48), slice(47, None), slice(5, 5), slice(-3, None)):
            assert np.array_equal(patches[rows], whole[rows])
        square = whole[2].reshape(3, 2, 16, 16)  # block order: the third patch lies below the first
        assert np.array_equal(square[:, 0] * 127.5 + 127.5, frames[0][:, 16:32, :16])
        odd = whole[24].reshape(3, 2, 16, 16)
        assert np.array_equal(odd[:, 0], odd[:, 1])

    def test_a_digest_tells_pixels_and_settings(self) -> None:
        one = vision.read_image(picture("RGB"))
        assert one.digest == vision.read_image(png(picture("RGB"))).digest
        others = [
            vision.read_image(picture("grey")),
            vision.read_image(picture("RGB"), {"image_mean": 0.4}),
            vision.read_image(picture("RGB"), image_tokens=30),
        ]
        assert len({one.digest, *(other.digest for other in others)}) == 4
        assert (one.kind, one.size, one.grid, one.pixel_values.shape) == ("image", (64, 96), (1, 14, 20), (280, 1536))


class TestOpening:
    def test_every_way(self, tmp_path: Path) -> None:
        image = picture("RGB")
        data, expected = png(image), np.asarray(image)
        path = tmp_path / "ä b.png"
        path.write_bytes(data)
        url = "data:image/png;base64," + base64.b64encode(data).decode()
        with path.open("rb") as file:
            for source in (data, bytearray(data), memoryview(data), path, str(path), url, BytesIO(data), file, image):
                assert np.array_equal(rgb(source), expected)
            assert not file.closed
        assert np.array_equal(rgb(expected), expected)
        image.load()  # is still open

    def test_arrays(self) -> None:
        grey = pixels(2, 20, 30, 1)
        assert np.array_equal(rgb(grey), np.repeat(grey, 3, axis=2))
        assert np.array_equal(rgb(grey[:, :, 0]), np.repeat(grey, 3, axis=2))
        alpha = pixels(2, 20, 30, 4)
        assert np.array_equal(rgb(alpha), rgb(Image.fromarray(alpha)))
        flipped = pixels(2, 20, 30)[::-1, ::2]
        assert np.array_equal(rgb(flipped), flipped)
        for wrong in (np.zeros((4, 4, 3)), np.zeros((3, 5, 7), np.uint8), np.zeros((4, 4, 3), np.uint16), grey[0, 0]):
            with pytest.raises(UsageError, match=r"an image as an array of .*, expected uint8 \[h, w\]"):
                vision.preprocess(wrong)

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
    def test_orientation(self, kind: str, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(Image.fromarray(pixels(1, 300, 41)), kind, exif=exif)
        shown = ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB")
        with open_image(data) as image:
            assert image.size == (shown.height, shown.width)
            parts = [image.decoded().rows(i, min(i + 7, image.size[0])) for i in range(0, image.size[0], 7)]
        assert np.array_equal(np.concatenate(parts), np.asarray(shown))

    def test_damaged_metadata_does_not_hide_an_image(self) -> None:
        data = encoded(picture("RGB"), "JPEG", exif=b"Exif\x00\x00garbage that is long enough to be read")
        assert rgb(data).shape == (64, 96, 3)

    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG"])
    def test_files_of_every_kind(self, kind: str) -> None:
        for name in ("RGB", "grey", "palette", "1 bit", "tiny"):
            source = picture(name)
            if kind in ("JPEG", "PPM") and name == "palette":
                source = source.convert("RGB")
            data = encoded(source, kind, **({"lossless": True} if kind == "WEBP" else {}))
            assert np.array_equal(rgb(data), np.asarray(Image.open(BytesIO(data)).convert("RGB"))), name

    def test_transparency_is_on_white(self) -> None:
        for name in ("RGBA", "grey and alpha", "palette with alpha", "colour key"):
            assert np.array_equal(rgb(png(picture(name))), rgb(picture(name))), name
        clear = Image.new("RGBA", (40, 40), (200, 0, 0, 0))
        assert (rgb(png(clear)) == 255).all()

    def test_grey_of_16_bits_is_scaled(self) -> None:
        x = np.arange(64 * 1024, dtype=np.uint16).reshape(256, 256)
        data = png(Image.fromarray(x))
        assert np.array_equal(rgb(data), np.repeat((x >> 8).astype(np.uint8)[:, :, None], 3, axis=2))
        keyed = Image.open(BytesIO(png(Image.fromarray(x), transparency=0x1234)))
        assert rgb(keyed)[0x12, 0x34].tolist() == [255] * 3
        assert np.array_equal(rgb(Image.fromarray(x.astype(np.int32), "I")), rgb(data))
        for mode, told in (("I", "32-bit"), ("F", "floating-point")):
            with pytest.raises(MediaError, match=f"{told} pixels"):
                vision.preprocess(Image.new(mode, (30, 30), 70_000))

    def test_the_first_frame_of_an_animation(self) -> None:
        frames = [Image.fromarray(pixels(i, 40, 40)).quantize(16) for i in (1, 2)]
        data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
        assert np.array_equal(rgb(data), np.asarray(frames[0].convert("RGB")))

    @pytest.mark.parametrize(
        "source",
        [b"", b"x" * 100, b"\x89PNG\r\n\x1a\n", b"%PDF-1.4", b"<svg/>", "data:image/png;base64,AAAA", "data:image/png"],
    )
    def test_what_is_no_image(self, source: Any) -> None:
        with pytest.raises(MediaError) as caught:
            vision.preprocess(source)
        assert caught.value.exit_code == 4

    @pytest.mark.parametrize("body", ["@@@@", "iVBORw0KGgo*", "iVB=Rw0K", "a"])
    def test_broken_base64_is_said_to_be_that(self, body: str) -> None:
        with pytest.raises(MediaError, match="no base64"):
            vision.preprocess(f"data:image/png;base64,{body}")

    def test_what_could_be_none(self, tmp_path: Path) -> None:
        for source in (3, None, object(), {}, "https://example.org/x.png", "file:///x.png", "s3://x/y.png"):
            with pytest.raises(UsageError):
                vision.preprocess(source)
        with (tmp_path / "t").open("w+") as file, pytest.raises(UsageError, match="open as text"):
            vision.preprocess(file)
        for path in (tmp_path, tmp_path / "absent", "a\0b"):
            with pytest.raises(MediaError, match="cannot be opened"):
                vision.preprocess(path)

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
    def test_files_cut_short(self, kind: str) -> None:
        data = encoded(Image.fromarray(pixels(1, 60, 90)), kind)
        for length in range(0, len(data) * 3 // 4, max(1, len(data) // 40)):
            with pytest.raises(EdgeqError):
                vision.preprocess(data[:length])


class TestBombs:
    """Refused by the header, before anything is allocated."""

    def bomb(self, width: int, height: int) -> bytes:
        def chunk(name: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        rows = zlib.compress(bytes(1 << 20))
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")

    def test_pillows_limit(self) -> None:
        with pytest.raises(MediaError, match=r"is refused by Pillow: .*decompression bomb"):
            vision.preprocess(self.bomb(60_000, 60_000))
        with pytest.raises(MediaError, match=r"12000 x 12000 pixels, .* Pillow's limit"):
            vision.preprocess(self.bomb(12_000, 12_000))

    def test_a_budget(self) -> None:
        with pytest.raises(MediaError, match="5000 x 5000 pixels, too many to decode within 50 MB"):
            vision.preprocess(self.bomb(5000, 5000), memory=50_000_000)

    def test_a_webp_whose_decoder_would_take_2_GB(self) -> None:
        head = b"RIFF\x20\x00\x00\x00WEBPVP8L\x13\x00\x00\x00\x2f" + struct.pack("<I", 0x0FFFFFFF)
        with pytest.raises(MediaError, match="16384 x 16384 pixels, too many"):
            vision.preprocess(head + bytes(20))

    def test_nothing_is_allocated(self, tmp_path: Path) -> None:
        (tmp_path / "bomb.png").write_bytes(self.bomb(60_000, 60_000))
        (tmp_path / "large.png").write_bytes(self.bomb(9_000, 9_000))
        script = """
import os, resource, sys
from edgeq import vision
from edgeq.errors import MediaError
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
os.chdir(sys.argv[1])
vision.preprocess("small.png")
before = peak()
for name, memory in (("bomb.png", None), ("large.png", 100_000_000)):
    try:
        vision.preprocess(name, memory=memory)
    except MediaError as error:
        print(error.exit_code, "\\n" in error.message)
print(peak() - before < 8_000_000)
"""
        (tmp_path / "small.png").write_bytes(png(picture("tiny")))
        done = run_python(script, str(tmp_path))
        assert done.stdout.split("\n")[:3] == ["4 False", "4 False", "True"]

    def test_a_jpeg_beyond_the_budget_is_decoded_smaller(self) -> None:
        data = encoded(Image.fromarray(pixels(1, 1200, 1600)), "JPEG", quality=90)
        whole, grid = vision.preprocess(data, image_tokens=100)
        reduced, same_grid = vision.preprocess(data, image_tokens=100, memory=4_000_000)
        assert grid == same_grid  # sizes follow from the header
        assert 0 < np.abs(whole - reduced).mean() * 127.5 < 4
        with pytest.raises(MediaError, match="1600 x 1200 pixels, too many to decode within 4 MB"):
            vision.preprocess(data, memory=4_000_000)  # for that, it would have to be enlarged again

    def test_text_of_a_png_that_unfolds(self) -> None:
        info = PngImagePlugin.PngInfo()
        info.add_text("k", "0" * (1 << 26), zip=True)
        with pytest.raises(MediaError):
            vision.preprocess(png(picture("tiny"), pnginfo=info))


def test_text_does_not_wait_for_pillow() -> None:
    done = run_python("import sys, edgeq, edgeq.api, edgeq.vision.visual\nprint('PIL' in sys.modules)")
    assert done.stdout.split() == ["False"]


def test_the_real_files() -> None:
    """The sizes and limits of the family are those of its files."""
    folder = Path(__file__).parent / "data" / "models"
    for config in sorted(folder.glob("*/config.json")):
        assert read_config(config).vision is None or processor_of(read_config(config)).factor == 32
