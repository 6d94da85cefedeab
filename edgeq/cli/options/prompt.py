"""The prompt, and the pictures beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from edgeq.cli.options.groups import option
from edgeq.errors import UsageError

if TYPE_CHECKING:
    from edgeq.session.visual_settings import VisualSettings

__all__ = ["PromptArgument", "PromptOptions", "VisualOptions"]

PromptArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[PROMPT]", help="The prompt, in place of --prompt.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOptions:
    """Where the prompt comes from."""

    title: ClassVar[str] = "Options"

    prompt: Annotated[
        str | None, option("--prompt", "-p", metavar="TEXT", env=False, help="The prompt; - reads stdin.")
    ] = None
    file: Annotated[
        Path | None,
        option("--file", "-f", "--prompt-file", metavar="FILE", env=False, help="Read the prompt from a text file."),
    ] = None

    no_stdin: Annotated[
        bool, option("--no-stdin", env=False, help="Do not read stdin, even if it is a pipe that stays open.")
    ] = False

    @property
    def given(self) -> bool:
        return self.prompt is not None or self.file is not None or self.no_stdin

    def text(self, words: Sequence[str] | None = None, *, stdin: bool = True, needed: bool = True) -> str:
        """--prompt or `words` in its place, the file and, if `stdin` is not taken by something else, what was piped in,
        joined; UsageError if a prompt is `needed` and none given."""
        from edgeq.cli.prompt import joined_prompt

        if words and self.prompt is not None:
            raise UsageError(f"two prompts given: {' '.join(words)} and {self.prompt}", hint="give one")
        if self.no_stdin and (self.prompt == "-" or not stdin):
            raise UsageError("--no-stdin is given, and - reads stdin", hint="leave one of them out")
        prompt = " ".join(words) if words else self.prompt
        return joined_prompt(prompt, self.file, stdin=stdin and not self.no_stdin, needed=needed)


@dataclass(frozen=True, slots=True, kw_only=True)
class VisualOptions:
    """Pictures beside the prompt, and how large they become."""

    title: ClassVar[str] = "Pictures"

    image: Annotated[
        list[str] | None,
        option(
            "--image", metavar="FILE", default="none", env=False,
            help="Show an image: a file, data URL, - for stdin or demo; repeatable.",
        ),
    ] = None  # fmt: skip
    video: Annotated[
        list[str] | None,
        option(
            "--video", metavar="FILE", default="none", env=False,
            help="Show a video: a file or a folder of frames; repeatable.",
        ),
    ] = None  # fmt: skip
    image_tokens: Annotated[
        int | None,
        option(
            "--image-tokens", "--image-max-tokens", metavar="N", default="1024", minimum=1,
            help="Maximum tokens of an image; larger ones are reduced.",
        ),
    ] = None  # fmt: skip
    video_tokens: Annotated[
        int | None,
        option("--video-tokens", metavar="N", default="2048", minimum=1, help="Maximum tokens of a video."),
    ] = None
    min_pixels: Annotated[
        int | None,
        option(
            "--min-pixels", metavar="N", default="the checkpoint's", minimum=1,
            help="Enlarge images with fewer pixels, and videos with fewer in all frames.",
        ),
    ] = None  # fmt: skip
    max_pixels: Annotated[
        int | None,
        option(
            "--max-pixels", metavar="N", default="from the maximum of tokens", minimum=1,
            help="Reduce images with more pixels, and videos with more in all frames.",
        ),
    ] = None  # fmt: skip
    fps: Annotated[
        float | None,
        option(
            "--fps",
            metavar="X",
            default="the checkpoint's: 2",
            help="Frames to take of each second of a video; frames in a second of a folder's.",
        ),
    ] = None
    max_frames: Annotated[
        int | None,
        option("--max-frames", metavar="N", default="64", minimum=1, help="Maximum frames to take of a video."),
    ] = None
    outer_vision_tokens: Annotated[
        bool,
        option(
            "--outer-vision-tokens/--no-outer-vision-tokens", default="on",
            help="Keep the vision tokens around a whole video, as transformers does and vLLM does not.",
        ),
    ] = True  # fmt: skip

    def named(self) -> tuple[list[Any], list[Any]]:
        """The images and the videos; what `-` stands for is read from stdin."""
        from edgeq.cli.pictures import named

        return named(self.image), named(self.video)

    @property
    def takes_stdin(self) -> bool:
        """Whether one of them is `-`."""
        return "-" in [*(self.image or ()), *(self.video or ())]

    def settings(self, base: VisualSettings | None = None) -> VisualSettings:
        """Those of a conversation, or `base`, with what was asked for; UsageError for a value out of range."""
        from edgeq.session.visual_settings import CHAT_VISUALS

        given = {name: getattr(self, name) for name in (field.name for field in fields(CHAT_VISUALS))}
        return (base or CHAT_VISUALS).replace(**given)
