"""Tensors of adapters' files, checked as far as that goes without the base."""

from __future__ import annotations

import numpy as np

from edgeq.adapters.changes import LowRank
from edgeq.errors import ModelError
from edgeq.formats.bf16 import Array, all_finite
from edgeq.formats.gguf import GGUFFile
from edgeq.formats.names import neutral_name
from edgeq.formats.safetensors import SafetensorsFile

__all__ = ["FLOATS", "LONGEST_NAME", "checked", "low_rank", "neutral"]

FLOATS = ("F32", "F16", "BF16")
LONGEST_NAME = 512  # characters; names are matched against patterns


def neutral(name: str) -> str:
    """The neutral name of a tensor; one of no known layout as it is."""
    return neutral_name(name) or name


def checked(file: SafetensorsFile, name: str, types: tuple[str, ...]) -> Array:
    """A tensor; ModelError if it is of another type, or not made of numbers."""
    info = file.tensors[name]
    if info.dtype not in types:
        raise ModelError(
            f"{file.path}: {name} is {info.dtype}, expected {', '.join(types)}",
            hint="save the adapter again, in floats",
        )
    x = file.array(name)
    if not all_finite(np.atleast_1d(x)):
        raise ModelError(f"{file.path}: {name} holds NaN or infinity", hint="download or save the adapter again")
    return x


def low_rank(
    file: SafetensorsFile | GGUFFile, name: str, a: Array, b: Array, scale: float, lengths: Array | None = None, *,
    as_stored: bool = False,
) -> LowRank:  # fmt: skip
    """The change that a [rank, in] and b [out, rank] make; ModelError where they do not belong together."""
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise ModelError(
            f"{file.path}: {name} is {list(a.shape)}, its counterpart {list(b.shape)}: no product of low rank",
            hint="download or save the adapter again",
        )
    if lengths is not None and lengths.shape != b.shape[:1]:
        raise ModelError(
            f"{file.path}: {name}: {list(lengths.shape)} lengths of rows, expected {[len(b)]}",
            hint="take both files from one adapter",
        )
    return LowRank(a, b, scale, lengths, as_stored)
