"""How large pictures become in a prompt, and how many frames of a video are taken."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from edgeq.errors import UsageError
from edgeq.numbers import Range
from edgeq.printable import brief

__all__ = ["CHAT_VISUALS", "VisualSettings", "fitting_visuals"]

_RANGES = {
    "image_tokens": Range(1, 1 << 20, whole=True), "video_tokens": Range(1, 1 << 20, whole=True),
    "min_pixels": Range(1, 1 << 40, whole=True), "max_pixels": Range(1, 1 << 40, whole=True),
    "fps": Range(1e-6, 1000), "max_frames": Range(1, 1 << 20, whole=True),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class VisualSettings:
    """How large pictures become, and how many frames of a video are taken; None is what the checkpoint says."""

    image_tokens: int | None = None
    """Most tokens of an image; the checkpoint's own limit holds where it is lower."""
    video_tokens: int | None = None
    """Most tokens of all frames of a video, likewise."""
    min_pixels: int | None = None
    """Smaller images, or videos with fewer pixels in all frames, are enlarged; in the place of the checkpoint's."""
    max_pixels: int | None = None
    """Larger ones are reduced; in the place of the checkpoint's limit and of the two above."""
    fps: float | None = None
    """Frames that are taken of each second of a video; of a list or a folder of frames, how many make a second."""
    max_frames: int | None = None
    """Most frames that are taken of a video; the checkpoint's own limit holds where it is lower."""
    outer_vision_tokens: bool = True
    """Whether `<|vision_start|>` and `<|vision_end|>` stay around a video's frames, as in transformers 5.23."""

    def __post_init__(self) -> None:
        for name, allowed in _RANGES.items():
            value = getattr(self, name)
            if not (value is None or allowed.holds(value)):
                raise UsageError(f"{name} must be {allowed.wanted(value)}, got {brief(value)}")

    def replace(self, **given: Any) -> VisualSettings:
        """These settings with those of `given` that are not None."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})


CHAT_VISUALS = VisualSettings(image_tokens=1024, video_tokens=2048, max_frames=64)
"""What conversations begin with. The checkpoints' own limits are 16,384 tokens for an image and 12,288 for a video:
minutes of work on a small machine, and hundreds of megabytes of keys and values."""


def fitting_visuals(tokens: int) -> VisualSettings:
    """The same where the vision tower has room for a picture of so many tokens."""
    most = CHAT_VISUALS.image_tokens or tokens
    if tokens >= most:
        return CHAT_VISUALS
    return CHAT_VISUALS.replace(
        image_tokens=max(16, tokens), video_tokens=max(32, 2 * tokens), max_frames=max(4, 64 * tokens // most)
    )
