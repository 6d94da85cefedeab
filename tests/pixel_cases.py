"""Pictures that tests and tools/make_pixel_fixtures.py make alike, from seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["IMAGES", "SETTINGS", "VIDEOS", "digest", "picture", "pixels"]

SETTINGS: Mapping[str, dict[str, Any]] = {
    "family": {
        "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    },
    "small, other mean and std": {
        "size": {"shortest_edge": 1_024, "longest_edge": 20_000},
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "not normalized": {
        "size": {"shortest_edge": 1_024, "longest_edge": 50_000}, "do_normalize": False, "rescale_factor": 1 / 128,
    },
    "not rescaled": {
        "size": {"shortest_edge": 1_024, "longest_edge": 50_000}, "do_rescale": False, "image_mean": [100.0, 0.5, 3.0],
        "image_std": [2.0, 50.0, 0.1],
    },
}  # fmt: skip
"""Of image processors and of video processors; patches are 16 x 16, two frames, merged 2 x 2."""

VIDEOS: Mapping[str, tuple[int, int, int, float | None, bool]] = {
    "30 of 24 fps": (30, 40, 56, 24, True),
    "9 without a rate": (9, 33, 70, None, True),
    "5 of 1 fps": (5, 64, 64, 1, True),
    "3 as they are": (3, 50, 20, None, False),
    "2 small": (2, 10, 25, 2, False),
}
"""Frames, height, width, frames in a second, and whether some are chosen."""


def pixels(seed: int, h: int, w: int, channels: int = 3) -> NDArray[np.uint8]:
    """Noise; every fourth seed's is black and white, and others are smooth in the main."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (h, w, channels), dtype=np.uint8)
    if seed % 4 == 0:
        return ((x > 127) * 255).astype(np.uint8)
    if seed % 4 == 1:
        ramp = np.arange(h)[:, None, None] * 3 + np.arange(w)[:, None] * 2
        return ((ramp + x // 16) % 256).astype(np.uint8)
    return x


def _palette() -> Image.Image:
    image = Image.fromarray(pixels(3, 50, 44)[:, :, 0] % 16, "P")
    image.putpalette(pixels(2, 16, 1).tobytes())
    return image


def _transparent_palette() -> Image.Image:
    image = _palette()
    image.info["transparency"] = bytes(range(0, 256, 16))
    return image


def _colour_key() -> Image.Image:
    x = pixels(5, 40, 60)
    x[10:30, 20:40] = (1, 2, 3)
    image = Image.fromarray(x)
    image.info["transparency"] = (1, 2, 3)
    return image


IMAGES: Mapping[str, Callable[[], Image.Image]] = {
    "RGB": lambda: Image.fromarray(pixels(2, 64, 96)),
    "tall RGB": lambda: Image.fromarray(pixels(1, 300, 41)),
    "as large as it becomes": lambda: Image.fromarray(pixels(3, 256, 288)),
    "tiny": lambda: Image.fromarray(pixels(4, 3, 5)),
    "RGBA": lambda: Image.fromarray(pixels(6, 70, 60, 4)),
    "grey and alpha": lambda: Image.fromarray(pixels(7, 33, 47, 2)),
    "grey": lambda: Image.fromarray(pixels(8, 33, 90)[:, :, 0]),
    "1 bit": lambda: Image.fromarray(pixels(9, 90, 33)[:, :, 0]).convert("1"),
    "CMYK": lambda: Image.fromarray(pixels(10, 52, 52, 4), "CMYK"),
    "palette": _palette,
    "palette with alpha": _transparent_palette,
    "colour key": _colour_key,
}


def picture(name: str) -> Image.Image:
    """The image of that name."""
    return IMAGES[name]()


def digest(x: NDArray[Any]) -> str:
    """Of an array's values and type."""
    return blake2b(np.ascontiguousarray(x).tobytes() + str(x.dtype).encode(), digest_size=12).hexdigest()
