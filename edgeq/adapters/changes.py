"""What an adapter does to a tensor.

LoRA (Hu et al., arXiv:2106.09685) adds a product of two narrow matrices; DoRA (Liu et al., arXiv:2402.09353) then gives
every row a length that it has learned. Beside them, adapters hold tensors that were trained as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from edgeq.errors import UsageError
from edgeq.formats.bf16 import Array, Float32, round_to, to_float32
from edgeq.formats.gguf import GGUFFile
from edgeq.formats.safetensors import SafetensorsFile

__all__ = ["Adapter", "Change", "LowRank", "Whole"]


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """W + scale * b @ a, and then, with `lengths`, rows of W of those lengths.

    a: [rank, in]; b: [out, rank]; lengths: [out]; float32, float16 or bfloat16.
    as_stored: the product is rounded to the type of the weights before it is added, as mlx-lm does.
    """

    a: Array
    b: Array
    scale: float
    lengths: Array | None = None
    as_stored: bool = False

    def applied(self, w: Float32, rows: slice | Array, dtype: np.dtype[Any]) -> Float32:
        """Some rows of the matrix, changed: `w` float32 [rows, in], stored as `dtype`."""
        changed = to_float32(self.b[rows]) @ to_float32(self.a)
        changed *= np.float32(self.scale)
        if self.as_stored:
            changed = np.array(to_float32(round_to(changed, dtype)))
        changed += w
        if self.lengths is None:
            return np.asarray(changed)
        w = changed
        norms = np.sqrt(np.einsum("ij,ij->i", w, w))
        return np.asarray(w * (to_float32(self.lengths[rows]) / norms)[:, None])


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """A tensor in the place of the base's: `values` in the shape and convention of the hub, of any float type."""

    values: Array

    def applied(self, w: Float32, rows: slice | Array, dtype: np.dtype[Any]) -> Float32:
        """Some rows of it."""
        del w, dtype
        return to_float32(self.values[rows])


Change: TypeAlias = LowRank | Whole


def _scalable(changes: Sequence[Change]) -> bool:
    """Whether a tensor's changes are a product that is added, to the base's own tensor or one that comes with it."""
    last = changes[-1]
    return isinstance(last, LowRank) and last.lengths is None


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that has been opened and checked, but for what only its base can tell.

    kind: in a few words, for people. base: what it was trained on, where it says so. changes: by neutral name of the
    tensor. ties: a change of the embedding is one of the head that is tied to it. scale: by which it is multiplied, on
    top of its own. origin: the names in the file, by neutral name.
    """

    path: Path
    kind: str
    base: str | None
    changes: dict[str, tuple[Change, ...]]
    origin: dict[str, str]
    files: tuple[SafetensorsFile | GGUFFile, ...]
    ties: bool = False
    scale: float = 1.0

    def scaled(self, scale: float) -> Adapter:
        """The same adapter, as strong as `scale` says; UsageError for one that cannot be weaker or stronger."""
        fixed = next((name for name, each in self.changes.items() if not _scalable(each)), None)
        if scale != 1 and fixed is not None:
            raise UsageError(
                f"{self.path} cannot be scaled: it has more than a product of low rank for {fixed}",
                hint="leave out the scale",
            )
        changes = {
            name: tuple(replace(c, scale=c.scale * scale) if isinstance(c, LowRank) else c for c in each)
            for name, each in self.changes.items()
        }
        return replace(self, changes=changes, scale=self.scale * scale)

    @property
    def ranks(self) -> list[int]:
        """The ranks that occur."""
        return sorted({len(c.a) for each in self.changes.values() for c in each if isinstance(c, LowRank)})
