"""The operations that calibration runs the model on: float32, and every product is told of before it is made.

The model is the one that edgeq runs: its layers' own bodies, on a backend's small operations. Only matrices differ. One
is a `Weight`, which gives its rows in float32, and before inputs are multiplied by some matrices, `on_input` hears of
them. So a listener may record what a matrix is multiplied by, and it may also settle the matrix then and there: the
product is made with what it is afterwards. A block is quantized in one pass of its own body, each matrix knowing what
those before it became.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from edgeq.backends.base import BaseOps
from edgeq.backends.numpy import ArrayOps
from edgeq.formats.bf16 import Array, Float32
from edgeq.quant.calibrate.blas import in_threads
from edgeq.weights import Matrix

__all__ = ["Listener", "TappedOps", "Weight", "row_blocks", "tapped_ops"]

_TILE = 1 << 22  # weights of a product at a time: 16 MB
_TOKENS = 512  # that a thread multiplies at a time


class Weight(Protocol):
    """A matrix by its rows."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    def rows(self, rows: slice | Array, /) -> Float32: ...


Listener = Callable[[Float32, Sequence[Any]], None]
"""Hears of inputs [T, in] and the matrices that they are about to be multiplied by."""


def row_blocks(shape: tuple[int, ...], weights: int = _TILE, multiple: int = 1) -> Iterator[slice]:
    """Row ranges of a matrix of at most `weights` weights, each but the last a multiple of `multiple` rows (which come
    first)."""
    step = max(1, weights // shape[1] // multiple) * multiple
    return (slice(row, min(row + step, shape[0])) for row in range(0, shape[0], step))


class TappedOps(ArrayOps[Weight]):
    """Float32 products of `Weight`s, told of to `on_input`; the larger pieces are the model's own bodies, whatever a
    class beside it in the inheritance has fused."""

    name = "calibration"
    on_input: Listener | None = None
    workers: int = 1
    """Threads that products are made on, each with a BLAS of one thread."""

    mlp = BaseOps.mlp
    delta_net = BaseOps.delta_net
    gated_attention = BaseOps.gated_attention
    decoder_layers = BaseOps.decoder_layers
    decoder = BaseOps.decoder

    def matrix(self, w: Matrix[Array]) -> Weight:  # noqa: ARG002
        raise AssertionError("matrices are made by whoever calibrates")

    def embed(self, table: Weight, ids: Array) -> Array:
        return table.rows(ids)

    def linears(self, x: Array, ws: Sequence[Weight]) -> tuple[Array, ...]:
        if self.on_input is not None:
            self.on_input(x, ws)
        return tuple(self._product(x, w) for w in ws)

    def linear(self, x: Array, w: Weight) -> Array:
        (y,) = self.linears(x, (w,))
        return y

    def rows(self, w: Weight, rows: slice | Array) -> Weight:  # noqa: ARG002
        raise AssertionError("calibration has no use for a part of a matrix")

    def _product(self, x: Float32, w: Weight) -> Float32:
        """In pieces that do not depend on the number of threads."""
        y = np.empty((len(x), w.shape[0]), np.float32)
        tokens = [slice(start, start + _TOKENS) for start in range(0, len(x), _TOKENS)]
        for rows in row_blocks(w.shape):
            part = w.rows(rows).T

            def multiply(some: slice, rows: slice = rows, part: Float32 = part) -> None:
                with np.errstate(over="ignore", invalid="ignore"):  # seen, and told, behind the block
                    np.matmul(x[some], part, out=y[some, rows])

            in_threads(multiply, tokens, self.workers)
        return y


def tapped_ops(threads: int) -> TappedOps:
    """On the native backend's small operations where it is built, else on NumPy's. Keys and values stay float32."""
    try:
        from edgeq.backends.cpu import CpuOps
    except ImportError:
        ops = TappedOps("f32")
        ops.workers = threads
        return ops

    class Native(TappedOps, CpuOps):  # type: ignore[misc]  # its matrices are not the kernels'
        """Matrices and bodies from the first, small operations from the second."""

    native = Native(threads, "f32")
    native.workers = threads
    return native
