"""What every kind of checkpoint offers, whatever file it came from."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgeq.checkpoint.generation import Recommended
from edgeq.config import ModelConfig
from edgeq.errors import ModelError
from edgeq.formats.affine import dequantize
from edgeq.formats.bf16 import Array, Float32, all_finite, to_float32
from edgeq.processor import ProcessorConfig, parse_processor
from edgeq.weights import Matrix, Part, QMatrix, Role, TensorSpec, text_tensors

if TYPE_CHECKING:
    from edgeq.text.template import ChatTemplate
    from edgeq.text.template_files import Templates
    from edgeq.text.tokenizer import Tokenizer

__all__ = ["PARTS", "Checkpoint", "Storage", "hub_to_neutral", "matrix_rows", "without"]

PARTS = {Part.TEXT: "language model", Part.MTP: "MTP head", Part.VISION: "vision tower"}
"""What parts are called."""
_DROPS = {Part.MTP: "`--no-mtp` (mtp=False in Python)", Part.VISION: "`--no-vision` (vision='none' in Python)"}
_PAGE, _SAMPLES = 4096, 64  # of a fingerprint


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
    recommended = Recommended()  # sampling, by the checkpoint itself
    left_out: Mapping[Part, str] = MappingProxyType({})  # parts that are there, but not fit to be used, and why
    _templates: Templates | None = None

    @property
    def sampling(self) -> Mapping[str, float]:
        """The sampling that the checkpoint recommends, as fields of GenerationSettings."""
        return self.recommended.values

    @abstractmethod
    def matrix(self, name: str) -> Matrix[Array]:
        """A matrix [out, in] as stored, without copying where the format allows it; of the patch embedding,
        [hidden, colours * frames * height * width]."""

    def rows(self, name: str, rows: slice | Array) -> Float32:
        """Some rows of a matrix as float32; nothing of it is kept."""
        return matrix_rows(self.matrix(name), rows)

    @abstractmethod
    def dense(self, name: str) -> Float32:
        """A tensor, whole and in the neutral convention (see `edgeq.weights.trees`). ModelError for NaN or infinity."""

    @abstractmethod
    def storage(self) -> Iterator[tuple[TensorSpec, Storage]]:
        """Every tensor that the checkpoint holds."""

    @abstractmethod
    def memory_nbytes(self, spec: TensorSpec) -> int:
        """Bytes that a tensor takes in memory as `matrix` gives it, mapped or not."""

    def is_mapped(self, spec: TensorSpec) -> bool:  # noqa: ARG002
        """Whether `matrix` gives the mapped file's own memory, whose pages can be let go and come again."""
        return False

    @abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer; None if it has none."""

    @abstractmethod
    def read_templates(self) -> Templates:
        """The chat templates by name, and what stands in the place of one; raises nothing."""

    @property
    def templates(self) -> Templates:
        """The chat templates; others may be put in their place."""
        if self._templates is None:
            self._templates = self.read_templates()
        return self._templates

    @templates.setter
    def templates(self, templates: Templates) -> None:
        self._templates = templates

    def template(self, tokenizer: Tokenizer | None = None, *, tools: bool = False) -> ChatTemplate | None:
        """The chat template for conversations with or without tools; None if there is none. ModelError for one that
        cannot be used. tokenizer: the checkpoint's, if it has been read already; templates may name its special tokens.
        """
        from edgeq.text.template import ChatTemplate

        named = self.templates.pick(tools=tools)
        if named is None:
            return None
        tokenizer = tokenizer or self.tokenizer()
        return ChatTemplate(named.source, named.where, tokenizer.special_tokens if tokenizer else {})

    @abstractmethod
    def tokenizer_files(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The contents of tokenizer.json and tokenizer_config.json, stored so or not; None if there is no tokenizer."""

    @abstractmethod
    def processor_values(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """How images, and how videos, become patches: what preprocessor_config.json and video_preprocessor_config.json
        say, stored so or not; empty where nothing is said."""

    def processor(self) -> ProcessorConfig | None:
        """How pictures become patches; None for a model that does not see. ModelError where the files say what edgeq
        does not do: that is found when a picture comes, and stops no text."""
        vision = self.config.vision
        return parse_processor(*self.processor_values(), vision) if vision else None

    @abstractmethod
    def drop_pages(self) -> None:
        """Let the system forget the pages read so far (they count as this process's memory until it does)."""

    @abstractmethod
    def weight_files(self) -> list[Path]:
        """The files that hold the tensors."""

    def leave_out(self, part: Part, why: str) -> None:
        """Go on without a part: half of a model is no reason to refuse the other. The first reason counts, and is
        said."""
        if part not in self.left_out:
            self.left_out = {**self.left_out, part: why}
            blind = " and does not see" if part is Part.VISION else ""
            warnings.warn(f"{self.path}: its {PARTS[part]}: {why}; the model runs without it{blind}", stacklevel=4)

    def check_nothing_lost(self, dropped: Container[Part]) -> None:
        """ModelError if a part is left out that is not among those that may be dropped: for what writes the model."""
        for part, why in self.left_out.items():
            if part not in dropped:
                raise ModelError(
                    f"{self.path}: its {PARTS[part]} would be lost: {why}",
                    hint=f"mend it, or leave it out with {_DROPS[part]}",
                )

    def lacks_tower(self) -> str:
        """Why it does not see, in a few words: for a checkpoint without vision tower."""
        if why := self.left_out.get(Part.VISION):
            return f"its vision tower is not fit for use: {why}"
        return "it has no vision tower"

    def check_whole(self) -> None:  # noqa: B027  a checkpoint without mapped files is whole
        """ModelError if a mapped file has been cut short since it was opened, or could not be read."""

    def fingerprint(self) -> str:
        """What tells this model from another: the hash of its configuration and of pages all over its files."""
        return sha256((repr(self.config) + self.sampled()).encode()).hexdigest()[:32]

    def sampled(self) -> str:
        """The hash of pages all over its files: what tells these weights from others.

        A file is not read for it: its length, its first page, where the header begins, and 63 others are taken.
        """
        digest = sha256()
        for path in self.weight_files():
            size = path.stat().st_size
            digest.update(size.to_bytes(8, "little"))
            with path.open("rb", buffering=0) as file:  # not mapped: what is mapped counts as this process's memory
                for start in range(0, size, max(_PAGE, size // _SAMPLES)):
                    file.seek(start)
                    digest.update(file.read(_PAGE))
        return digest.hexdigest()[:32]

    def find_non_finite(self) -> str | None:
        """The first matrix of the language model with NaN or infinity in its weights or scales; reads all of them."""
        for spec in text_tensors(self.config.text):
            if len(spec.shape) != 2:
                continue
            matrix = self.matrix(spec.name)
            if not all(map(all_finite, matrix.factors if isinstance(matrix, QMatrix) else (matrix,))):
                return spec.name
        return None


def matrix_rows(w: Matrix[Array], rows: slice | Array) -> Float32:
    """Some rows of a matrix as float32 [rows, in]."""
    if isinstance(w, QMatrix):
        return dequantize(w.map(lambda x: x[rows]))
    return to_float32(w[rows])


def without(config: ModelConfig, parts: Iterable[Part]) -> ModelConfig:
    """The configuration of a model that has lost its MTP head, or its vision tower."""
    for part in parts:
        if part is Part.MTP:
            config = replace(config, text=replace(config.text, mtp_num_hidden_layers=0))
        if part is Part.VISION:
            config = replace(config, vision=None)
    return config


def hub_to_neutral(x: Float32, role: Role) -> Float32:
    """A tensor in the hub's convention as `edgeq.weights.trees` has it."""
    match role:
        case Role.NORM:
            return 1 + x
        case Role.CONV:
            return x.reshape(x.shape[0], -1)
        case Role.DECAY:
            return -np.exp(x)
        case _:
            return np.array(x, order="C")
