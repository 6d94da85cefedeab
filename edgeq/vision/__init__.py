"""Pictures and video as the vision tower takes them.

    pixel_values, grid = edgeq.vision.preprocess("photo.jpg", model.config)
    pixel_values, grid = edgeq.vision.preprocess_video(frames, model.config, fps=30)

What is here is imported when first used, and Pillow when the first image is opened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeq.processor import FAMILY, PixelConfig, ProcessorConfig
    from edgeq.vision.images import OpenImage, open_image
    from edgeq.vision.patches import Patches
    from edgeq.vision.reading import frames_of, preprocess, preprocess_video, read_image, read_video
    from edgeq.vision.settings import processor_of
    from edgeq.vision.sizes import image_size, sample_frames, tokens_of, video_size
    from edgeq.vision.video import OpenVideo, open_video
    from edgeq.vision.visual import Visual

_LAZY = {
    "FAMILY": "edgeq.processor",
    "OpenImage": "edgeq.vision.images",
    "OpenVideo": "edgeq.vision.video",
    "Patches": "edgeq.vision.patches",
    "PixelConfig": "edgeq.processor",
    "ProcessorConfig": "edgeq.processor",
    "Visual": "edgeq.vision.visual",
    "frames_of": "edgeq.vision.reading",
    "image_size": "edgeq.vision.sizes",
    "open_image": "edgeq.vision.images",
    "open_video": "edgeq.vision.video",
    "preprocess": "edgeq.vision.reading",
    "preprocess_video": "edgeq.vision.reading",
    "processor_of": "edgeq.vision.settings",
    "read_image": "edgeq.vision.reading",
    "read_video": "edgeq.vision.reading",
    "sample_frames": "edgeq.vision.sizes",
    "tokens_of": "edgeq.vision.sizes",
    "video_size": "edgeq.vision.sizes",
}

__all__ = [
    "FAMILY",
    "OpenImage",
    "OpenVideo",
    "Patches",
    "PixelConfig",
    "ProcessorConfig",
    "Visual",
    "frames_of",
    "image_size",
    "open_image",
    "open_video",
    "preprocess",
    "preprocess_video",
    "processor_of",
    "read_image",
    "read_video",
    "sample_frames",
    "tokens_of",
    "video_size",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _LAZY:
        raise AttributeError(f"module 'edgeq.vision' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
