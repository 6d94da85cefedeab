"""What is said in a turn: text, or a list of parts of which some are pictures.

Parts are written as OpenAI's interfaces do (`image_url`, `input_image`, `video_url`) or as the family's chat templates
and transformers do (`image`, `video`). What a part is not understood to say is refused by its name.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from edgeq.errors import UsageError
from edgeq.printable import brief
from edgeq.vision.visual import Kind

if TYPE_CHECKING:
    from edgeq.text.template import Content

__all__ = ["Source", "sources_of", "text_of"]

_TEXTS = ("text", "input_text", "output_text")
_KINDS: dict[str, Kind] = {
    "image": "image", "image_url": "image", "input_image": "image",
    "video": "video", "video_url": "video", "input_video": "video",
}  # fmt: skip
_KEYS = {"image": ("image", "image_url", "url", "path", "base64"), "video": ("video", "video_url", "url", "path")}
_SETTINGS = {
    "image": ("min_pixels", "max_pixels"), "video": ("min_pixels", "max_pixels", "fps", "max_frames"),
}  # fmt: skip


class Source(NamedTuple):
    """Where a picture of a message comes from, and what was asked of it."""

    kind: Kind
    what: Any
    """A path, bytes, a data URL, a PIL image, an array; frames of a video."""
    settings: Mapping[str, Any] = MappingProxyType({})
    """Fields of VisualSettings."""


def sources_of(
    content: Content | None, images: Sequence[Any] = (), videos: Sequence[Any] = (), *, role: str = "user"
) -> tuple[Content | None, list[Source]]:
    """A message's content as a chat template takes it, and where its pictures come from, in order.

    images, videos: fill the parts that name no source, or else come before the text. Raises UsageError for parts that
    are neither text nor picture, and for pictures where a message of this `role` cannot have them.
    """
    for name, pictures in (("images", images), ("videos", videos)):
        if not isinstance(pictures, list | tuple):
            raise UsageError(f"{name} must be a list, got {type(pictures).__name__}", hint="put one into a list, too")
    given: dict[Kind, Iterator[Any]] = {"image": iter(images), "video": iter(videos)}
    parts = list(content) if isinstance(content, list | tuple) else None
    for part in parts or []:
        if not isinstance(part, Mapping):
            raise UsageError(f"a part of the message is {brief(part)}", hint='write {"type": "text", "text": ...}')
    places = [_kind(part) for part in parts or [] if _is_place(part)]
    if (images or videos) and not places:
        text = [{"type": "text", "text": content}] if isinstance(content, str) else parts
        if text is None:
            raise UsageError(f"a message must be text or a list of parts, got {brief(content)}")
        before: list[dict[str, Any]] = [{"type": "image"}] * len(images) + [{"type": "video"}] * len(videos)
        parts = [*before, *text]
    elif (places.count("image"), places.count("video")) != (len(images), len(videos)):
        raise UsageError(
            f"the message has {len(places)} parts without a picture of their own, got {len(images) + len(videos)} "
            "pictures for them",
            hint="give every part its picture, or as many in images= and videos=",
        )
    if parts is None:
        return content, []
    read, sources = list[Any](), list[Source]()
    for part in parts:
        kind = _kind(part)
        if kind is None:
            if not _is_text(part):
                raise UsageError(f"a part of the message has the text {brief(part.get('text'))}", hint="give a string")
            read.append({"type": "text", "text": part["text"]} if _is_text(part) else part)
            continue
        if role == "system":
            raise UsageError("a system message cannot have pictures", hint="put them into a user's message")
        read.append({"type": kind})
        sources.append(
            Source(kind, next(given[kind]), _settings(part, kind)) if _is_place(part) else _source(part, kind)
        )
    return read, sources


def text_of(content: Content) -> str:
    """The text in it."""
    if isinstance(content, str):
        return content
    return " ".join(str(part["text"]) for part in content if "text" in part)


def _kind(part: Mapping[str, Any]) -> Kind | None:
    """The kind of picture that a part is; None for text, UsageError for what is neither."""
    named = part.get("type")
    if isinstance(named, str) and named in _KINDS:
        return _KINDS[named]
    if named is None or named in _TEXTS:
        kinds = {_KINDS[key] for key in part if key in _KINDS}
        if named is None and len(kinds) == 1 and "text" not in part:
            return kinds.pop()
        if not kinds:
            return None
        raise UsageError("a part of the message is text and picture at once", hint="make two parts of it")
    raise UsageError(f"a part of the message is of type {brief(named)}", hint="use text, image or video")


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def _is_place(part: Mapping[str, Any]) -> bool:
    """Whether a part is a picture that does not say which."""
    return (kind := _kind(part)) is not None and not any(key in part for key in _KEYS[kind])


def _source(part: Mapping[str, Any], kind: Kind) -> Source:
    (key, *others) = [key for key in _KEYS[kind] if key in part]
    if others:
        raise UsageError(f"a part of the message has both {key} and {others[0]}", hint="give one of them")
    what, settings = part[key], {name: value for name, value in part.items() if name != key}
    if key.endswith("_url") and isinstance(what, Mapping):
        settings |= {name: value for name, value in what.items() if name != "url"}
        what = what.get("url")
    if key == "base64":
        what = _decoded(what)
    return Source(kind, what, _settings(settings, kind))


def _settings(part: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """What is asked of a picture by the part that has it or is its place; UsageError for what is not understood."""
    settings = {name: value for name, value in part.items() if name != "type"}
    if settings.get("detail", "auto") == "auto":  # OpenAI's; other values ask for sizes that edgeq names otherwise
        settings.pop("detail", None)
    if unknown := [name for name in settings if name not in _SETTINGS[kind]]:
        raise UsageError(
            f"a part of the message has {brief(unknown[0])}, which a part of type {kind} does not take",
            hint=f"it takes {', '.join(_SETTINGS[kind])}",
        )
    return settings


def _decoded(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise UsageError("the base64 of a part of the message cannot be decoded", hint="send it whole") from None
