"""A checkpoint with adapters: a checkpoint like any other, whose tensors are merged when somebody asks for them.

A merged tensor is computed in float32 and rounded once, to the type that the base stores it in. Matrices that the base
has quantized are merged with their exact values and kept in 16 bits: quantized again, they would lose about as much
as an adapter changes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeq.adapters.changes import Adapter, Change, LowRank, Whole
from edgeq.adapters.reading import Given, read_adapter
from edgeq.adapters.tensors import FLOATS
from edgeq.checkpoint.base import PARTS, Checkpoint, Storage, hub_to_neutral, matrix_rows
from edgeq.config import ModelConfig
from edgeq.errors import ModelError, UsageError
from edgeq.formats.bf16 import Array, Float32, all_finite, round_to, to_float32
from edgeq.formats.blocks import each_block
from edgeq.formats.safetensors import DTYPES, dtype_name
from edgeq.inputs import is_folder
from edgeq.printable import first_of
from edgeq.weights import Matrix, Part, Role, TensorSpec, all_tensors

if TYPE_CHECKING:
    from edgeq.text.template import ChatTemplate
    from edgeq.text.template_files import Templates
    from edgeq.text.tokenizer import Tokenizer

__all__ = ["AdaptedCheckpoint", "adapted"]

_HEAD, _TABLE = "lm_head.weight", "embed_tokens.weight"
_LOW_RANK = (Role.LINEAR, Role.GATE, Role.EMBEDDING)  # what a product can be added to
_SIZE = re.compile(r"qwen3\.5-(0\.8b|2b|4b)(-base)?", re.IGNORECASE)


def adapted(checkpoint: Checkpoint, given: Sequence[Given]) -> Checkpoint:
    """The checkpoint with the adapters merged into it, one after another; itself where there are none.

    Raises ModelError for adapters that are damaged, of another kind, or of another base.
    """
    return AdaptedCheckpoint(checkpoint, given) if given else checkpoint


class AdaptedCheckpoint(Checkpoint):
    """`base` with adapters."""

    def __init__(self, base: Checkpoint, given: Sequence[Given]) -> None:
        self.base = base
        self.path, self.recommended, self.eos_token_ids = base.path, base.recommended, base.eos_token_ids
        self.left_out, self._compared = base.left_out, False
        specs = {spec.name: spec for spec in all_tensors(_untied(base.config))}
        self.adapters = [
            _checked(read_adapter(path, base.config.text, list(specs.values())), specs, base).scaled(scale)
            for path, scale in given
        ]
        self._held = {spec.name: storage for spec, storage in base.storage()}
        self._changes, left = _joined(self.adapters), set[Part]()
        text = base.config.text
        self.config = base.config
        if text.tie_word_embeddings:
            self._changes = _with_tied_head(self.adapters, self._changes)
            if _same(self._changes.get(_HEAD, ()), self._changes.get(_TABLE, ())):
                self._changes.pop(_HEAD, None)
            else:
                self.config = _untied(base.config)
                self._held[_HEAD] = self._held[_TABLE]
        for name in [name for name in self._changes if name not in self._held]:
            left.add(Part.VISION if name.startswith("visual.") else Part.MTP)  # the text is always whole
            del self._changes[name]
        for part in sorted(left, key=lambda part: part.value):
            warnings.warn(f"{base.path} has no {PARTS[part]}: what the adapter changes in it is left out", stacklevel=4)
        self._specs = {spec.name: spec for spec in all_tensors(self.config) if spec.name in self._held}
        self.format = f"{base.format} + {', '.join(adapter.kind for adapter in self.adapters)}"
        self._say_what_grows()

    # --- tensors -----------------------------------------------------------------------------------------------------

    def matrix(self, name: str) -> Matrix[Array]:
        changes = self._changes.get(name)
        if changes is None:
            return self.base.matrix(self.source(name))
        spec = self._specs[name]
        shape = (spec.shape[0], prod(spec.shape[1:]))
        if isinstance(changes[-1], Whole):
            return changes[-1].values.reshape(shape)
        stored, dtype = self.base.matrix(self.source(name)), self._dtype(name)
        merged = np.empty(shape, dtype)

        def merge(rows: slice) -> None:
            merged[rows] = self._merged(name, matrix_rows(stored, rows), rows, dtype)

        each_block(shape, merge)
        self.base.drop_pages()
        return merged

    def rows(self, name: str, rows: slice | Array) -> Float32:
        if name not in self._changes:
            return self.base.rows(self.source(name), rows)
        w, dtype = self.base.rows(self.source(name), rows), self._dtype(name)
        return to_float32(self._merged(name, w, rows, dtype))

    def dense(self, name: str) -> Float32:
        changes = self._changes.get(name)
        if changes is None:
            return self.base.dense(self.source(name))
        if isinstance(changes[-1], Whole):
            return hub_to_neutral(to_float32(changes[-1].values), self._specs[name].role)
        return self.rows(name, slice(None))

    def merged_rows(self, name: str, w: Float32, rows: slice) -> Array:
        """Some rows of a tensor in the hub's convention, `w` in the base, as they are stored with the adapters."""
        return self._merged(name, w, rows, self._dtype(name))

    def _merged(self, name: str, w: Float32, rows: slice | Array, dtype: np.dtype[Any]) -> Array:
        with np.errstate(all="ignore"):  # told below, with the tensor's name
            for change in self._changes[name]:
                w = change.applied(w, rows, dtype)
            merged = round_to(w, dtype)
        if not all_finite(merged):
            raise ModelError(
                f"{self.path}: {name} is no longer finite with {self._changing(name).path}",
                hint="download or save the adapter again, or use a smaller scale",
            )
        return merged

    def source(self, name: str) -> str:
        """The base's tensor that one is made from: a head that is no longer tied has been the embedding."""
        return _TABLE if name == _HEAD and self.base.config.text.tie_word_embeddings else name

    def _changing(self, name: str) -> Adapter:
        return next(a for a in reversed(self.adapters) if name in a.changes or (name == _HEAD and _TABLE in a.changes))

    # --- storage -----------------------------------------------------------------------------------------------------

    def storage(self) -> Iterator[tuple[TensorSpec, Storage]]:
        for name, spec in self._specs.items():
            changed, held = name in self._changes, self._held[name]
            dtype = self._dtype(name) if changed else None
            yield spec, Storage(dtype_name(dtype), spec.size * dtype.itemsize) if dtype is not None else held

    def memory_nbytes(self, spec: TensorSpec) -> int:
        if spec.name in self._changes:
            return spec.size * self._dtype(spec.name).itemsize
        source = self.source(spec.name)
        return self.base.memory_nbytes(spec if source == spec.name else replace(spec, name=source))

    def is_mapped(self, spec: TensorSpec) -> bool:
        source = self.source(spec.name)
        return spec.name not in self._changes and self.base.is_mapped(
            spec if source == spec.name else replace(spec, name=source)
        )

    def changed(self, name: str) -> np.dtype[Any] | None:
        """The type in which a changed tensor is kept; None for one that is the base's."""
        return self._dtype(name) if name in self._changes else None

    def _dtype(self, name: str) -> np.dtype[Any]:
        """Of a changed tensor: the base's, 16 bits where that is quantized; that of a tensor trained as a whole."""
        last = self._changes[name][-1]
        if isinstance(last, Whole):
            return last.values.dtype
        return DTYPES[kind if (kind := self._held[name].type) in FLOATS else "BF16"]

    def _say_what_grows(self) -> None:
        """One line where quantized matrices become 16-bit ones."""
        grown = [n for n in self._changes if n in self._specs and self._held[n].type not in FLOATS]
        if not grown:
            return
        before = sum(self._held[name].nbytes for name in grown)
        after = sum(self._specs[name].size * self._dtype(name).itemsize for name in grown)
        warnings.warn(
            f"{self.path} is quantized: matrices that the adapter changes ({len(grown)}) are held in 16 bits, "
            f"{after / 1e6:,.0f} MB instead of {before / 1e6:,.0f} (smaller: quantize the original with the adapter)",
            stacklevel=5,
        )

    # --- the rest is the base's --------------------------------------------------------------------------------------

    def tokenizer(self) -> Tokenizer | None:
        return self.base.tokenizer()

    def read_templates(self) -> Templates:
        return self.base.templates

    def template(self, tokenizer: Tokenizer | None = None, *, tools: bool = False) -> ChatTemplate | None:
        self.compare_templates()
        return super().template(tokenizer, tools=tools)

    def compare_templates(self) -> None:
        """A warning, once, where an adapter was saved with another chat template, and nobody has chosen one."""
        from edgeq.text.template_files import DEFAULT, read_templates

        ours = self.templates.found.get(DEFAULT)
        folders = [] if self._compared or self.templates.asked_for else [a.path for a in self.adapters]
        self._compared = True
        for folder in filter(is_folder, folders):
            own = read_templates(folder).found.get(DEFAULT)
            if own is not None and (ours is None or own.source.strip() != ours.source.strip()):
                warnings.warn(
                    f"{folder}: its {own.where} is another chat template than the model's, and is not used: for it, "
                    "add `--chat-template FILE` (chat_template= in Python)",
                    stacklevel=4,
                )

    def tokenizer_files(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        return self.base.tokenizer_files()

    def processor_values(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.base.processor_values()

    def lacks_tower(self) -> str:
        return self.base.lacks_tower()

    def weight_files(self) -> list[Path]:
        return [*self.base.weight_files(), *(file.path for a in self.adapters for file in a.files)]

    def check_whole(self) -> None:
        self.base.check_whole()
        for adapter in self.adapters:
            for file in adapter.files:
                file.check_whole()

    def drop_pages(self) -> None:
        self.base.drop_pages()
        for adapter in self.adapters:
            for file in adapter.files:
                file.drop_pages()

    def sampled(self) -> str:
        """Of the base, the adapters' files, and what else decides how they are merged."""
        settings = repr([(a.kind, a.scale, _scales(a)) for a in self.adapters])
        return sha256((super().sampled() + settings).encode()).hexdigest()[:32]


def _scales(adapter: Adapter) -> list[float]:
    return [change.scale for each in adapter.changes.values() for change in each if isinstance(change, LowRank)]


def _untied(config: ModelConfig) -> ModelConfig:
    return replace(config, text=replace(config.text, tie_word_embeddings=False))


def _joined(adapters: Sequence[Adapter]) -> dict[str, tuple[Change, ...]]:
    changes = dict[str, tuple[Change, ...]]()
    for adapter in adapters:
        for name, each in adapter.changes.items():
            both = (*changes.get(name, ()), *each)
            if len(both) > len(each) and not all(isinstance(c, LowRank) and c.lengths is None for c in both):
                raise UsageError(
                    f"{adapter.path} and another adapter change {name}, and not both by adding to it",
                    hint="give one of them, or merge them where they were trained",
                )
            changes[name] = both
    return changes


def _with_tied_head(
    adapters: Sequence[Adapter], changes: dict[str, tuple[Change, ...]]
) -> dict[str, tuple[Change, ...]]:
    """With a tied head's changes: its own, and those of the embedding from adapters for which they are one."""
    head = [
        change
        for adapter in adapters
        for change in adapter.changes.get(_HEAD, adapter.changes.get(_TABLE, ()) if adapter.ties else ())
    ]
    return changes | ({_HEAD: tuple(head)} if head else {})


def _same(one: Sequence[Change], other: Sequence[Change]) -> bool:
    """Whether two tensors that were one are changed alike."""

    def alike(a: Change, b: Change) -> bool:
        if isinstance(a, Whole) and isinstance(b, Whole):
            return a.values.dtype == b.values.dtype and np.array_equal(a.values, b.values)
        return a is b

    return len(one) == len(other) and all(map(alike, one, other))


# --- whether an adapter fits -----------------------------------------------------------------------------------------


def _checked(adapter: Adapter, specs: dict[str, TensorSpec], base: Checkpoint) -> Adapter:
    """The adapter, if every tensor of it has its place in the model."""
    problems = [
        problem
        for name, each in adapter.changes.items()
        for change in each
        if (problem := _problem(name, change, specs.get(name), base.config))
    ]
    if not adapter.changes:
        raise ModelError(f"{adapter.path} holds no tensors", hint="download or save the adapter again")
    if problems:
        first = next(iter(adapter.origin.values()))
        trained = f"it was trained on {adapter.base}: give that model" if adapter.base else "give the model it is for"
        if resized := next(filter(None, (_resized(adapter, name, specs) for name in (_TABLE, _HEAD))), None):
            trained = (
                f"merge it where it was trained, into its base resized to {resized:,} tokens (with PEFT: "
                "resize_token_embeddings, then merge_and_unload), and give the merged folder with its tokenizer"
            )
        raise ModelError(
            f"{adapter.path} does not fit {base.path} (a name in it: {first}):",
            details=first_of(problems), hint=trained,
        )  # fmt: skip
    _compare_names(adapter, base)
    return adapter


def _resized(adapter: Adapter, name: str, specs: dict[str, TensorSpec]) -> int | None:
    """The rows of an embedding or head that was given others than the base has, None for one that was not."""
    for change in adapter.changes.get(name, ()):
        shape = change.values.shape if isinstance(change, Whole) else (len(change.b), change.a.shape[1])
        if shape[0] != specs[name].shape[0] and shape[1:] == specs[name].shape[1:]:
            return int(shape[0])
    return None


def _problem(name: str, change: Change, spec: TensorSpec | None, config: ModelConfig) -> str | None:
    if spec is None:
        if (name.startswith("visual.") and config.vision is None) or name.startswith("mtp."):
            return None  # a part that this base was made without
        return f"unexpected {name}"
    if isinstance(change, Whole):
        shape = change.values.shape
        extended = name in (_HEAD, _TABLE) and shape[1:] == spec.shape[1:]
        why = ": a row for every token of another tokenizer" if extended else ""
        return None if shape == spec.shape else f"{name} is {list(shape)}, expected {list(spec.shape)}{why}"
    if spec.role not in _LOW_RANK:
        return f"{name} is no matrix that edgeq adapts"
    shape = (len(change.b), change.a.shape[1])
    return None if shape == spec.shape else f"{name} is changed as {list(shape)}, expected {list(spec.shape)}"


def _compare_names(adapter: Adapter, base: Checkpoint) -> None:
    """A warning where the names say that the adapter is of another model of the same size: base and chat."""
    theirs = _SIZE.search(adapter.base or "")
    *_, cached = ["", *(part for part in base.path.absolute().parts if part.startswith("models--"))]
    names = (base.config.name or "", cached, base.path.absolute().name)
    ours = next((found for name in names if (found := _SIZE.search(name))), None)
    if theirs and ours and theirs[0].lower() != ours[0].lower():
        warnings.warn(f"{adapter.path} was trained on {adapter.base}, and this is {ours[0]}", stacklevel=5)
