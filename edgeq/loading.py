"""A checkpoint's weights on a backend, part by part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from edgeq.backends.ops import ArrayLike, Ops
from edgeq.checkpoint import Checkpoint
from edgeq.errors import ModelError
from edgeq.formats.bf16 import Array, all_finite
from edgeq.formats.mapped import is_mapped
from edgeq.weights import (
    Matrix,
    MTPWeights,
    Part,
    QMatrix,
    Role,
    TensorSpec,
    TextWeights,
    VisionWeights,
    declare_mtp,
    declare_text,
    declare_vision,
    map_tree,
)

__all__ = ["LoadedWeights"]

A = TypeVar("A", bound=ArrayLike)
M = TypeVar("M")
W = TypeVar("W", bound=Matrix[Any])


class LoadedWeights(Generic[A, M]):
    """The weights of a checkpoint on a backend: a part is loaded when it is first asked for, until it is let go.

    Raises ModelError for NaN or infinity where a kernel would hide it. Elsewhere it shows in the logits.
    """

    def __init__(self, checkpoint: Checkpoint, ops: Ops[A, M]) -> None:
        self.checkpoint, self.ops = checkpoint, ops
        self.parts = frozenset(spec.part for spec, _ in checkpoint.storage())
        self._trees: dict[Part, Any] = {}
        self._nbytes: dict[Part, dict[bool, int]] = {}  # of every part, mapped and not

    def nbytes(self, *parts: Part, mapped: bool) -> int:
        """Bytes of the weights loaded, of some parts: those used where the file is mapped, or those that are copies."""
        return sum(self._nbytes[part][mapped] for part in parts if part in self._nbytes)

    @property
    def text(self) -> TextWeights[A, M]:
        """The language model."""
        c = self.checkpoint.config.text
        tree: TextWeights[A, M] = self._tree(Part.TEXT, lambda: declare_text(c), lambda w: self.ops.ready(w, c))
        return tree

    @property
    def mtp(self) -> MTPWeights[A, M] | None:
        """The multi-token-prediction head; None for a checkpoint without one."""
        c = self.checkpoint.config.text
        tree: MTPWeights[A, M] | None = self._tree(Part.MTP, lambda: declare_mtp(c))
        return tree

    @property
    def vision(self) -> VisionWeights[A, M] | None:
        """The vision tower; None for a checkpoint without one."""
        v = self.checkpoint.config.vision
        tree: VisionWeights[A, M] | None = self._tree(Part.VISION, lambda: declare_vision(v) if v else None)
        return tree

    def release(self, part: Part) -> None:
        """Let a part go: its memory is free once nobody else holds its weights. It is loaded again when asked for."""
        self._trees.pop(part, None)
        self._nbytes.pop(part, None)

    def _tree(self, part: Part, declare: Callable[[], Any], ready: Callable[[Any], Any] = lambda tree: tree) -> Any:
        if part not in self._trees and part in self.parts:
            self._nbytes[part] = {True: 0, False: 0}
            self._trees[part] = ready(map_tree(self._leaf, declare()))
            self.checkpoint.drop_pages()  # where the backend has copies of its own, the file's pages need not stay
        return self._trees.get(part)

    def _leaf(self, spec: TensorSpec) -> A | M:
        if not spec.is_matrix:
            return self.ops.vector(self._counted(spec, self.checkpoint.dense(spec.name)))
        return self.ops.matrix(self._counted(spec, self._checked(spec)))

    def _counted(self, spec: TensorSpec, weight: W) -> W:
        for x in weight.arrays if isinstance(weight, QMatrix) else [weight]:
            self._nbytes[spec.part][self.ops.maps_files and is_mapped(x)] += x.nbytes
        return weight

    def _checked(self, spec: TensorSpec) -> Matrix[Array]:
        """A matrix, if nothing in it is NaN or infinite that would not show in the logits.

        Integer kernels turn NaN in scales or biases into numbers; a gate saturates; a key that is not a number never
        wins the softmax. All that is a tenth of a file at most.
        """
        matrix, where = self.checkpoint.matrix(spec.name), f"{self.checkpoint.path}: {spec.name}"
        if isinstance(matrix, QMatrix):
            if not all(map(all_finite, matrix.factors)):
                raise ModelError(f"{where} has NaN or infinity in its scales", hint="download or quantize it again")
        elif (spec.role is Role.GATE or spec.name.endswith("k_proj.weight")) and not all_finite(matrix):
            raise ModelError(f"{where} holds NaN or infinity", hint="download or quantize it again")
        return matrix
