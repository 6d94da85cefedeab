"""What every kind of checkpoint offers, whatever file it came from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from edgeq.config import ModelConfig
from edgeq.errors import ModelError
from edgeq.formats.affine import dequantize
from edgeq.formats.bf16 import Array, Float32, all_finite, to_float32
from edgeq.weights import Matrix, QMatrix, TensorSpec, TextWeights, text_tensors, text_weights

if TYPE_CHECKING:
    from edgeq.text.template import ChatTemplate
    from edgeq.text.tokenizer import Tokenizer

__all__ = ["Checkpoint", "Storage"]


_HIDING = (".in_proj_a.weight", ".in_proj_b.weight", ".k_proj.weight")  # see `Checkpoint.text_weights`


class Storage(NamedTuple):
    """How a tensor is stored: the type as people write it ("BF16", "4-bit g64", "Q4_K") and all its bytes."""

    type: str
    nbytes: int


class Checkpoint(ABC):
    """A model on disk, opened and checked. Tensors go by their neutral names (see `edgeq.weights`)."""

    path: Path
    config: ModelConfig
    format: str  # in a few words, for people
    eos_token_ids: tuple[int, ...]  # from the configuration files; the tokenizer knows its own
    sampling: Mapping[str, float] = MappingProxyType({})  # GenerationSettings that the checkpoint itself recommends

    @abstractmethod
    def matrix(self, name: str) -> Matrix[Array]:
        """A matrix [out, in] as stored, without copying where the format allows it."""

    def rows(self, name: str, rows: slice | Array) -> Float32:
        """Some rows of a matrix as float32; nothing of it is kept."""
        return _rows(self.matrix(name), rows)

    @abstractmethod
    def vector(self, name: str) -> Float32:
        """A small tensor in the neutral convention (see `edgeq.weights`), float32."""

    @abstractmethod
    def storage(self) -> Iterator[tuple[TensorSpec, Storage]]:
        """Every tensor that the checkpoint holds."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer; None if it has none."""

    @abstractmethod
    def template(self) -> ChatTemplate | None:
        """The checkpoint's chat template; None if it has none."""

    @abstractmethod
    def tokenizer_files(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The contents of tokenizer.json and tokenizer_config.json, stored so or not; None if there is no tokenizer."""

    @abstractmethod
    def drop_pages(self) -> None:
        """Let the system forget the pages read so far (they count as this process's memory until it does)."""

    def text_weights(self) -> TextWeights[Array]:
        """The language model's weights. Raises ModelError for NaN or infinity where a kernel would hide it.

        Integer kernels turn a NaN from scales or biases into numbers; a gate saturates; a key that is not a number
        never wins the softmax. All that is a tenth of the file at most. Elsewhere NaN shows in the logits.
        """
        return text_weights(self.config.text, self._checked_matrix, self.vector)

    def _checked_matrix(self, name: str) -> Matrix[Array]:
        matrix = self.matrix(name)
        if isinstance(matrix, QMatrix):
            if not all(map(all_finite, matrix.arrays[1:])):  # the first are codes
                raise ModelError(f"{self.path}: {name} has NaN or infinity in its scales", hint="the file is damaged")
        elif name.endswith(_HIDING) and not all_finite(matrix):
            raise ModelError(f"{self.path}: {name} holds NaN or infinity", hint="the file is damaged")
        return matrix

    def find_non_finite(self) -> str | None:
        """The first matrix of the language model with NaN or infinity in its weights or scales; reads all of them."""
        for spec in text_tensors(self.config.text):
            if len(spec.shape) != 2:
                continue
            matrix = self.matrix(spec.name)
            if not all(map(all_finite, matrix.arrays[1:] if isinstance(matrix, QMatrix) else (matrix,))):
                return spec.name
        return None


def _rows(w: Matrix[Array], rows: slice | Array) -> Float32:
    if isinstance(w, QMatrix):
        return dequantize(w.map(lambda x: x[rows]))
    return to_float32(w[rows])
