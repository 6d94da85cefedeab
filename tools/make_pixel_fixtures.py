#!/usr/bin/env python3
"""Write tests/data/pixels.json.gz: what transformers' processors and torch's resize make of pictures.

    python tools/make_pixel_fixtures.py     # needs torch, torchvision, transformers and pillow

Inputs are not stored: tests make them from the same seeds. Of outputs there are digests, for equality is asked for.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import transformers
from torchvision.transforms.v2 import functional
from transformers import Qwen2VLImageProcessor, Qwen3VLVideoProcessor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests")]

from pixel_cases import IMAGES, SETTINGS, VIDEOS, digest, picture, pixels  # noqa: E402

OUT = ROOT / "tests" / "data" / "pixels.json.gz"


def main() -> None:
    rng = Random(1)
    found = {
        "made_by": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "sizes": [image_size(rng) for _ in range(300)],
        "video_sizes": [video_size(rng) for _ in range(200)],
        "samplings": [sampling(rng) for _ in range(40)],
        "resizes": [resizing(rng, number) for number in range(240)],
        "images": {name: {which: image(name, which) for which in SETTINGS} for name in IMAGES},
        "videos": {name: {which: video(name, which) for which in SETTINGS} for name in VIDEOS},
    }
    with gzip.GzipFile(OUT, "wb", mtime=0) as file:
        file.write(json.dumps(found).encode())
    print(f"{OUT}: {OUT.stat().st_size:,} bytes")


def side(rng: Random) -> int:
    return int(2 ** rng.uniform(0, 13))


def image_size(rng: Random) -> list[Any]:
    h, w, least = side(rng), side(rng), rng.choice((65_536, 65_536, 4_096, 1_000_000))
    most = max(least, rng.choice((16_777_216, 1_048_576, 262_144)))
    try:
        size = transformers.models.qwen2_vl.image_processing_qwen2_vl.smart_resize(h, w, 32, least, most)
    except ValueError:
        size = None
    return [h, w, least, most, size]


def video_size(rng: Random) -> list[Any]:
    n, h, w = rng.choice((2, 3, 4, 5, 7, 20, 120, 768)), side(rng), side(rng)
    most = rng.choice((25_165_824, 25_165_824, 1_048_576))
    try:
        size = transformers.models.qwen3_vl.video_processing_qwen3_vl.smart_resize(n, h, w, 2, 32, 4_096, most)
    except (ValueError, ZeroDivisionError):
        size = None
    return [n, h, w, most, size]


def sampling(rng: Random) -> list[Any]:
    total, fps = int(2 ** rng.uniform(0, 11)), rng.choice((24, 25, 30, 30000 / 1001, 60, 8, 1, 0.5, 11.7))
    processor = Qwen3VLVideoProcessor()
    metadata = transformers.video_utils.VideoMetadata(total_num_frames=total, fps=fps)
    indices = processor.sample_frames(metadata).tolist()
    text = transformers.models.qwen3_vl.processing_qwen3_vl.Qwen3VLProcessor
    return [total, fps, indices, text._calculate_timestamps(None, list(indices), fps, 2)]


def resizing(rng: Random, number: int) -> list[Any]:
    """A size, another, and what torch makes of a picture; every fourth is black and white: the hardest."""
    h, w, height, width = (max(2, int(2 ** rng.uniform(1, 9))) for _ in range(4))
    if number % 3 == 0:
        height, width = max(2, h + rng.randrange(-20, 20)), max(2, w + rng.randrange(-20, 20))
    x = torch.from_numpy(pixels(number, h, w)).permute(2, 0, 1)
    bicubic = functional.InterpolationMode.BICUBIC
    y = functional.resize(x, [height, width], interpolation=bicubic, antialias=True)
    return [h, w, height, width, digest(np.ascontiguousarray(y.numpy()))]


def image(name: str, which: str) -> list[Any]:
    processor = Qwen2VLImageProcessor(patch_size=16, **SETTINGS[which])
    found = processor(images=[picture(name)], return_tensors="np")
    return [found["image_grid_thw"][0].tolist(), digest(found["pixel_values"])]


def video(name: str, which: str) -> list[Any]:
    processor = Qwen3VLVideoProcessor(**SETTINGS[which])
    count, h, w, fps, sample = VIDEOS[name]
    frames = np.stack([pixels(i, h, w) for i in range(count)])
    metadata = [{"total_num_frames": count, "fps": fps}]
    found = processor(videos=[frames], video_metadata=metadata, do_sample_frames=sample, return_tensors="np")
    return [found["video_grid_thw"][0].tolist(), digest(found["pixel_values_videos"])]


if __name__ == "__main__":
    main()
