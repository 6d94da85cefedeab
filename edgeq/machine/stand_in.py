"""A model of any shape, whose weights are whatever lies in some memory: for how long a token takes, not what it says.

The engine runs it as it runs every other, so its time holds what no single kernel's has: waiting for other threads
between small matrices, norms and gates, and everything that is done in Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.checkpoint import Checkpoint, Storage
from edgeq.config import ModelConfig, TextConfig
from edgeq.formats.bf16 import Array, Float32
from edgeq.formats.qmatrix import QMatrix
from edgeq.text.template_files import Templates
from edgeq.weights import Matrix, Role, TensorSpec, text_tensors

__all__ = ["StandIn"]

_BITS, _GROUP = 4, 64
_SCALE = 0x3C00  # bfloat16: 0.0078


class StandIn(Checkpoint):
    """A language model in 4 bits and groups of 64, its gates in bfloat16, that takes its codes from `pool` (uint32):
    one matrix after the other, and from the beginning again where it ends. The pool holds the largest matrix."""

    path, format, eos_token_ids = Path("stand-in"), "stand-in", ()

    def __init__(self, c: TextConfig, pool: NDArray[np.uint32]) -> None:
        self.config = ModelConfig(c)
        self._pool, self._specs, self._next = pool, {spec.name: spec for spec in text_tensors(c)}, 0
        self._factors: dict[tuple[int, tuple[int, ...]], Array] = {}  # by where the codes begin, and how many there are

    def matrix(self, name: str) -> Matrix[Array]:
        """The codes that are next."""
        rows, columns = (spec := self._specs[name]).shape
        if spec.role is Role.GATE:
            return np.full((rows, columns), _SCALE, np.uint16)
        words = rows * columns * _BITS // 32
        start = self._next if self._next + words <= self._pool.size else 0
        self._next = start + words
        codes = self._pool[start : start + words].reshape(rows, -1)
        shape = rows, columns // _GROUP
        factors = self._factors.setdefault((start, shape), np.full((2, *shape), _SCALE, np.uint16))
        return QMatrix(codes, factors[0], factors[1], _BITS, _GROUP)

    def dense(self, name: str) -> Float32:
        """Small numbers, negative ones for decays."""
        first, *others = (spec := self._specs[name]).shape
        shape = (first, prod(others)) if others else (first,)
        return np.full(shape, -0.1 if spec.role is Role.DECAY else 0.1, np.float32)

    def storage(self) -> Iterator[tuple[TensorSpec, Storage]]:
        """Every tensor of the language model."""
        for spec in self._specs.values():
            yield spec, Storage("4-bit g64", self.memory_nbytes(spec))

    def memory_nbytes(self, spec: TensorSpec) -> int:
        """Codes and factors of a matrix."""
        return self.nbytes(spec)

    @staticmethod
    def nbytes(spec: TensorSpec) -> int:
        """The same, of any shape."""
        if spec.is_matrix and spec.role is not Role.GATE:
            return spec.size * _BITS // 8 + 4 * spec.size // _GROUP
        return spec.size * (2 if spec.is_matrix else 4)

    def tokenizer(self) -> None:
        """It says nothing."""

    def read_templates(self) -> Templates:
        """None."""
        return Templates()

    def tokenizer_files(self) -> None:
        """None."""

    def processor_values(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """It does not see."""
        return {}, {}

    def drop_pages(self) -> None:
        """There is no file."""

    def weight_files(self) -> list[Path]:
        """None."""
        return []
