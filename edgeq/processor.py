"""How pictures become patches: the settings of a checkpoint's image and video processors.

They are in preprocessor_config.json and video_preprocessor_config.json, or both in processor_config.json; where those
say nothing, the family's own hold. A setting that changes the result is used, or refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from edgeq.errors import ModelError
from edgeq.numbers import number, whole_number
from edgeq.printable import brief

__all__ = ["FAMILY", "PixelConfig", "ProcessorConfig", "parse_processor"]

_MAX_PIXELS = 1 << 40
_MAX_FRAMES = 1 << 20
_MAX_PATCH = 1 << 8
_BICUBIC = 3  # Pillow's number for it
_HINT = "download the processor files of a Qwen3.5 checkpoint again"

# Settings of a processor that edgeq does one way only: the value, and what it stands for.
_FIXED: Mapping[str, tuple[object, ...]] = {
    "do_resize": (True,),
    "do_convert_rgb": (True, None),
    "do_center_crop": (False, None),
    "do_pad": (False, None),
    "resample": (_BICUBIC, "bicubic"),
    "num_frames": (None,),  # a number of frames in the place of a rate
}


class _Tower(Protocol):
    """What the vision tower takes: the part of a `VisionConfig` that must agree with the processor's files."""

    @property
    def patch_size(self) -> int: ...
    @property
    def temporal_patch_size(self) -> int: ...
    @property
    def spatial_merge_size(self) -> int: ...


@dataclass(frozen=True, slots=True)
class PixelConfig:
    """Sizes and values of a picture's pixels.

    An image has from `min_pixels` to `max_pixels` after it is resized, a video in all of its frames together. A value
    v from 0 to 255 becomes (v * rescale_factor - mean) / std, where both steps are done.
    """

    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    do_rescale: bool = True
    do_normalize: bool = True


@dataclass(frozen=True, slots=True)
class ProcessorConfig:
    """Everything that decides which patches an image or a video becomes."""

    image: PixelConfig = PixelConfig(65_536, 16_777_216)
    video: PixelConfig = PixelConfig(4_096, 25_165_824)
    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    fps: float = 2
    """Frames that are taken of each second of a video."""
    min_frames: int = 4
    max_frames: int = 768
    do_sample_frames: bool = True
    cap_pixels_per_frame: bool = False
    """Whether a frame of a video has at most `max_video_tokens` tokens, however short the video is."""
    max_video_tokens: int = 768

    @property
    def factor(self) -> int:
        """Pixels on a side of the square that becomes a token; heights and widths are its multiples."""
        return self.patch_size * self.merge_size

    @property
    def patch_values(self) -> int:
        """Values of a patch: channels, frames, rows, columns."""
        return 3 * self.temporal_patch_size * self.patch_size**2


FAMILY = ProcessorConfig()
"""What the files of Qwen3.5 0.8B, 2B and 4B say."""


def parse_processor(image: Mapping[str, Any], video: Mapping[str, Any], tower: _Tower | None = None) -> ProcessorConfig:
    """Settings from the contents of preprocessor_config.json and video_preprocessor_config.json.

    Both may be empty. Without a file for video, the one for images holds for video as well, as in transformers. With
    `tower`, patches must be those that it takes. Raises ModelError that names the setting.
    """
    files = _File(image, "preprocessor_config.json"), _File(video, "video_preprocessor_config.json")
    own = files[1] if video else files[0]
    sizes = {
        "patch_size": "patch_size",
        "temporal_patch_size": "temporal_patch_size",
        "merge_size": "spatial_merge_size",
    }
    patch, temporal, merge = (
        _agreed(files, key, None if tower is None else getattr(tower, name)) for key, name in sizes.items()
    )
    return ProcessorConfig(
        image=files[0].pixels(FAMILY.image),
        video=own.pixels(FAMILY.video),
        patch_size=patch,
        temporal_patch_size=temporal,
        merge_size=merge,
        fps=own.number("fps", 0, 1000, FAMILY.fps),
        min_frames=own.whole("min_frames", 1, _MAX_FRAMES, FAMILY.min_frames),
        max_frames=own.whole("max_frames", 1, _MAX_FRAMES, FAMILY.max_frames),
        do_sample_frames=own.flag("do_sample_frames", True),
        cap_pixels_per_frame=own.flag("cap_pixels_per_frame", False),
        max_video_tokens=own.whole("max_video_tokens", 1, _MAX_FRAMES, FAMILY.max_video_tokens),
    )


class _File:
    """Typed access to a processor's file; every error names the file and the key."""

    def __init__(self, values: Mapping[str, Any], name: str) -> None:
        self.values, self.name = values, name
        for key, allowed in _FIXED.items():
            if key in values and not any(type(values[key]) is type(a) and values[key] == a for a in allowed):
                raise self.error(key, f"{allowed[0]!r}, the only one that edgeq implements")

    def error(self, key: str, expected: str) -> ModelError:
        return ModelError(f"{self.name}: {key} is {brief(self.values.get(key))}, expected {expected}", hint=_HINT)

    def whole(self, key: str, low: int, high: int, default: int) -> int:
        value = self.values.get(key)
        return default if value is None else whole_number(value, f"{self.name}: {key}", low, high, hint=_HINT)

    def number(self, key: str, low: float, high: float, default: float) -> float:
        value = self.values.get(key)
        return default if value is None else number(value, f"{self.name}: {key}", low, high, above=True, hint=_HINT)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is not None and type(value) is not bool:
            raise self.error(key, "true or false")
        return default if value is None else value

    def channels(self, key: str, low: float, high: float, default: tuple[float, ...]) -> tuple[float, ...]:
        """One number for each channel, or one for all of them."""
        value = self.values.get(key)
        if value is None:
            return default
        given = value if isinstance(value, list | tuple) else [value] * 3
        if len(given) != 3:
            raise self.error(key, "three numbers, one for each of red, green and blue")
        return tuple(number(n, f"{self.name}: {key}", low, high, hint=_HINT) for n in given)

    def pixels(self, default: PixelConfig) -> PixelConfig:
        least, most = self._limits(default)
        std = self.channels("image_std", -1e6, 1e6, default.std)
        if not all(std):
            raise self.error("image_std", "numbers other than 0")
        return PixelConfig(
            min_pixels=least,
            max_pixels=most,
            mean=self.channels("image_mean", -1e6, 1e6, default.mean),
            std=std,
            rescale_factor=self.number("rescale_factor", 0, 1e6, default.rescale_factor),
            do_rescale=self.flag("do_rescale", True),
            do_normalize=self.flag("do_normalize", True),
        )

    def _limits(self, default: PixelConfig) -> tuple[int, int]:
        """Two spellings: size.shortest_edge and longest_edge, which are numbers of pixels despite their names, and
        min_pixels and max_pixels, which go first, as in transformers."""
        size = self.values.get("size")
        if size is not None and not isinstance(size, Mapping):
            raise self.error("size", "an object with shortest_edge and longest_edge")
        edges = _File(size or {}, f"{self.name}: size")
        if unknown := [key for key in edges.values if key not in ("shortest_edge", "longest_edge")]:
            raise ModelError(
                f"{self.name}: size has {brief(unknown[0])}, expected shortest_edge and longest_edge only", hint=_HINT
            )
        least = edges.whole("shortest_edge", 1, _MAX_PIXELS, default.min_pixels)
        most = edges.whole("longest_edge", 1, _MAX_PIXELS, default.max_pixels)
        least = self.whole("min_pixels", 1, _MAX_PIXELS, least)
        most = self.whole("max_pixels", 1, _MAX_PIXELS, most)
        if least > most:
            raise ModelError(f"{self.name}: at least {least} pixels and at most {most}, expected a range", hint=_HINT)
        return least, most


def _agreed(files: tuple[_File, ...], key: str, tower: int | None) -> int:
    """A size that the files and the tower must have in common."""
    default: int = getattr(FAMILY, key)
    found = [file.whole(key, 1, _MAX_PATCH, default if tower is None else tower) for file in files if file.values]
    expected = tower if tower is not None else next(iter(found), default)
    for file in files:
        if file.whole(key, 1, _MAX_PATCH, expected) != expected:
            raise file.error(key, f"{expected} as in {'the vision tower' if tower else 'the file for images'}")
    return expected
