"""What can go wrong, told to the person at the prompt.

    EdgeqError                  1  anything that failed while running
    ├── UsageError              2  the request itself makes no sense
    ├── MemoryBudgetError       3  it does not fit: memory, address space or the disk
    ├── ModelError              4  a model file is damaged, incomplete or of an unknown kind
    ├── MediaError              4  so is an image or a video, or it is too large to be opened
    ├── NetworkError            5  a download failed, or is not allowed offline
    └── QualityError            6  a quantized result fails its check

The number is the exit code of the command line; 129, 130 and 143 mean hung up, interrupted (Ctrl-C) and terminated.
A message names the thing, what was found and what was expected; `hint` is the next step. Whatever names from files are
in it, it is safe to show: control characters are written as escapes (see `edgeq.printable`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from edgeq.printable import printable

__all__ = [
    "EdgeqError",
    "MediaError",
    "MemoryBudgetError",
    "ModelError",
    "NetworkError",
    "QualityError",
    "UsageError",
]


class EdgeqError(Exception):
    """Root of every error edgeq raises on purpose. `details` follow the message, each on a line of its own."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None, details: Sequence[str] = ()) -> None:
        self.message = "\n  ".join(map(printable, (message, *details)))
        self.hint = None if hint is None else printable(hint)
        super().__init__(self.message)


class UsageError(EdgeqError):
    """The request makes no sense: a bad option, an impossible combination, an unknown name."""

    exit_code = 2


class MemoryBudgetError(EdgeqError):
    """The request does not fit: the context, the file or the memory that it would need."""

    exit_code = 3


class ModelError(EdgeqError):
    """A model is damaged, incomplete, inconsistent or not supported."""

    exit_code = 4


class MediaError(EdgeqError):
    """An image or a video is damaged, incomplete, of an unknown kind, or larger than may be opened."""

    exit_code = 4


class NetworkError(EdgeqError):
    """A download failed, or was needed while offline."""

    exit_code = 5


class QualityError(EdgeqError):
    """A quantized result fails the check that it was asked to pass."""

    exit_code = 6
