"""What the quantizer reads from: checkpoint folders and GGUF files, both in the hub's names and conventions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence, Set
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from edgeq.adapters import CONFIG, AdaptedCheckpoint, Given
from edgeq.checkpoint import Checkpoint, FolderCheckpoint, open_checkpoint
from edgeq.checkpoint.folder import values_without
from edgeq.checkpoint.gguf import GGUFCheckpoint
from edgeq.checkpoint.packing import weight_name, without_quantization
from edgeq.config import ModelConfig, read_json
from edgeq.errors import ModelError, UsageError
from edgeq.formats.affine import GROUP_SIZES
from edgeq.formats.bf16 import Array, Float32, from_float32, round_to, to_float32
from edgeq.formats.names import hub_name, is_usual, neutral_name
from edgeq.formats.packed import Grouped, Packed
from edgeq.formats.safetensors import DTYPES, dtype_name
from edgeq.inputs import exists, open_file
from edgeq.text.template_files import DEFAULT, FOLDER, place
from edgeq.weights import Part, Role, TensorSpec

__all__ = ["Stored", "WeightSource", "coarse_warning", "open_source", "source_of"]

_COPIED = (  # what belongs to a model besides weights and config.json
    "*token*.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    f"{FOLDER}/*.jinja",
    "generation_config.json",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
)
_FINE = ("F32", "F16", "BF16", "Q8_0")


class Stored(NamedTuple):
    """A tensor as it would be kept: its type by safetensors' name, its shape."""

    dtype: str
    shape: tuple[int, ...]


class WeightSource(ABC):
    """A checkpoint to be quantized; what is quantized in it is dequantized as it is read, or kept (`groups`)."""

    path: Path
    checkpoint: Checkpoint  # the same tensors as the model has them
    config: ModelConfig
    files: list[Path]  # everything that decides the result
    tensors: list[tuple[TensorSpec, str]]  # and their names in the output
    centred: bool = True  # whether norms are stored as their gain less 1
    scale_type: str  # the 16-bit type of the weights: mlx computes in the widest type of what it multiplies
    warnings: tuple[str, ...] = ()
    adapters: Sequence[Mapping[str, Any]] = ()  # what has been merged into it, for the record
    packed: Mapping[str, Packed] = MappingProxyType({})  # what other tools have quantized, by neutral names

    def groups(self, name: str) -> Grouped | None:
        """A matrix in groups of integer codes that the output can have as they are; None for any other."""
        packed = self.packed.get(name)
        return packed if isinstance(packed, Grouped) and packed.run in GROUP_SIZES else None

    @property
    def in_groups(self) -> bool:
        """Whether there are such matrices."""
        return any(self.groups(spec.name) for spec, _ in self.tensors)

    @abstractmethod
    def stored(self, name: str) -> Stored:
        """A tensor as the output has it if it is kept."""

    @abstractmethod
    def rows(self, name: str, rows: slice) -> Array:
        """Some rows of a tensor, in the hub's convention, of any float type: [rows, everything else]."""

    @abstractmethod
    def config_values(self) -> dict[str, Any]:
        """The fields of config.json."""

    @abstractmethod
    def write_side_files(self, folder: Path) -> None:
        """Write what belongs to a model besides weights and config.json."""

    @abstractmethod
    def check_whole(self) -> None:
        """ModelError if a file has been cut short since it was opened, or could not be read."""

    @abstractmethod
    def drop_pages(self) -> None:
        """Let the system forget the pages read so far."""


def open_source(
    path: Path, adapters: Sequence[Given] = (), dropped: Set[Part] = frozenset(),
    chat_template: str | Path | None = None,
) -> WeightSource:  # fmt: skip
    """Open what is to be quantized, with adapters, and with another default for its chat template if one is given;
    UsageError if all that is quantized of it is in MLX's affine groups already, ModelError if a part of it is not fit
    for use and not among those that the result is not to have."""
    checkpoint = open_checkpoint(path)
    checkpoint.check_nothing_lost(dropped)
    if chat_template is not None:
        checkpoint.templates = checkpoint.templates.choose(chat_template)
        checkpoint.template()  # what is asked for has to be usable
    source = _source(checkpoint, path)
    return _AdaptedSource(source, AdaptedCheckpoint(checkpoint, adapters)) if adapters else source


def source_of(checkpoint: Checkpoint) -> WeightSource:
    """An open checkpoint, with adapters or not, as what is to be quantized; as `open_source`."""
    if isinstance(checkpoint, AdaptedCheckpoint):
        return _AdaptedSource(_source(checkpoint.base, checkpoint.base.path), checkpoint)
    return _source(checkpoint, checkpoint.path)


def _source(checkpoint: Checkpoint, path: Path) -> WeightSource:
    if isinstance(checkpoint, GGUFCheckpoint):
        return _GGUFSource(checkpoint)
    assert isinstance(checkpoint, FolderCheckpoint)
    modes = {t.quantization.mode for t in checkpoint.tensors.values() if t.quantization}
    if modes == {"affine"}:
        raise UsageError(f"{path} is quantized already", hint="quantize the original checkpoint instead")
    return _FolderSource(checkpoint)


class _AdaptedSource(WeightSource):
    """A source with adapters: tensors that they change are merged as they are read."""

    def __init__(self, base: WeightSource, checkpoint: AdaptedCheckpoint) -> None:
        self._base, self._checkpoint = base, checkpoint
        self.checkpoint = checkpoint
        checkpoint.compare_templates()
        self._specs = {spec.name: spec for spec, _ in checkpoint.storage()}
        self.path, self.config = base.path, checkpoint.config
        self.scale_type, self.warnings, self.centred = base.scale_type, base.warnings, base.centred
        own = [file for a in checkpoint.adapters if exists(file := a.path / CONFIG)]
        self.files = [*base.files, *own, *(file.path for a in checkpoint.adapters for file in a.files)]
        self.packed = {name: packed for name, packed in base.packed.items() if checkpoint.changed(name) is None}
        self.adapters = [{"name": a.path.name, "scale": a.scale} for a in checkpoint.adapters]
        names = {spec.name: name for spec, name in base.tensors}
        self.tensors = [
            (spec, names.get(spec.name) or hub_name(spec.name))  # a head that is no longer tied has no name yet
            for spec, _ in checkpoint.storage()
        ]

    def stored(self, name: str) -> Stored:
        base = self._base.stored(self._checkpoint.source(name))
        changed = self._checkpoint.changed(name)
        return base if changed is None else Stored(dtype_name(changed), base.shape)

    def rows(self, name: str, rows: slice) -> Array:
        x = self._base.rows(self._checkpoint.source(name), rows)
        changed = self._checkpoint.changed(name)
        if changed is None:
            return x
        merged, role = self._checkpoint.merged_rows(name, to_float32(x), rows), self._specs[name].role
        if not self.centred and role is Role.NORM:
            merged = round_to(1 + to_float32(merged), changed)
        if not self.centred and role is Role.PATCH:
            merged = np.moveaxis(merged, 1, -1)
        return merged.reshape(len(merged), -1)

    def config_values(self) -> dict[str, Any]:
        return self._base.config_values()

    def write_side_files(self, folder: Path) -> None:
        self._base.write_side_files(folder)

    def check_whole(self) -> None:
        self._base.check_whole()
        self._checkpoint.check_whole()

    def drop_pages(self) -> None:
        self._checkpoint.drop_pages()


class _FolderSource(WeightSource):
    def __init__(self, checkpoint: FolderCheckpoint) -> None:
        self.checkpoint = self._checkpoint = checkpoint
        self.path, self.config, self.centred = checkpoint.path, checkpoint.config, checkpoint.layout != "mlx"
        self._is_text_model = self.config.vision is None and "text_config" not in self.config_values()
        self.files = [*checkpoint.config_files, *(file.path for file in checkpoint.files)]
        self.tensors = [
            (t.spec, self._name(t.spec.name, weight_name(t.file_name))) for t in checkpoint.tensors.values()
        ]
        self.packed = {name: t.packed for name, t in checkpoint.tensors.items() if t.packed is not None}
        self._for_mlx = {name: t.quantization for name, t in checkpoint.tensors.items() if t.quantization}
        self.warnings = coarse_warning(self.path, {str(q) for q in self._for_mlx.values() if q.bits <= 6})
        self.scale_type = "F16" if self._float16("embed_tokens.weight") else "BF16"
        self._side_files = sorted({p for pattern in _COPIED for p in self.path.glob(pattern) if p.is_file()})

    def _float16(self, name: str) -> bool:
        packed = self.packed.get(name)
        if packed is None:
            return self._checkpoint.raw(name).dtype == np.float16
        return isinstance(packed, Grouped) and packed.scales(slice(0, 1)).dtype == np.float16

    def _name(self, name: str, file_name: str) -> str:
        """A tensor's name in the result: the source's, unless it is wrapped in what no other tool knows."""
        if is_usual(file_name) and neutral_name(file_name) == name:
            return file_name
        name = hub_name(name)
        return name.replace("model.language_model.", "model.") if self._is_text_model else name

    def stored(self, name: str) -> Stored:
        if packed := self.packed.get(name):
            return Stored(self.scale_type, packed.shape)
        if name in self._for_mlx:
            return Stored(self.scale_type, self._checkpoint.tensors[name].spec.shape)
        raw = self._checkpoint.raw(name)
        return Stored(dtype_name(raw.dtype), raw.shape)

    def rows(self, name: str, rows: slice) -> Array:
        if name in self.packed or name in self._for_mlx:
            return self._checkpoint.rows(name, rows)
        raw = self._checkpoint.raw(name)
        return raw.reshape(len(raw), -1)[rows]

    def config_values(self) -> dict[str, Any]:
        values = without_quantization(read_json(self.path / "config.json"))
        values.pop("quantization", None)
        return dict(values_without(values, self._checkpoint.left_out))

    def write_side_files(self, folder: Path) -> None:
        for path in self._side_files:
            _write(folder / path.relative_to(self.path), _read(path))
        templates = self._checkpoint.templates
        if templates.asked_for:  # and it is the only default: transformers may take either file
            _write(folder / place(DEFAULT), templates.found[DEFAULT].source.encode())
            for other in ("chat_template.json", f"{FOLDER}/{DEFAULT}.jinja"):
                (folder / other).unlink(missing_ok=True)

    def check_whole(self) -> None:
        self._checkpoint.check_whole()

    def drop_pages(self) -> None:
        self._checkpoint.drop_pages()


class _GGUFSource(WeightSource):
    """A GGUF file turned back into the hub's layout.

    Plain matrices are what the file holds. Norms lose the 1 that GGUF adds and A its exponential; where the result is
    exact in 16 bits, as it is for a file made from 16-bit weights, it is stored so. Quantized matrices that are kept
    become 16-bit floats.
    """

    def __init__(self, checkpoint: GGUFCheckpoint) -> None:
        self.checkpoint = self._checkpoint = checkpoint
        self.path, self.config = checkpoint.path, checkpoint.config
        self.files = checkpoint.weight_files()
        self.tensors = [(t.spec, hub_name(t.spec.name)) for t in checkpoint.tensors.values()]
        types = {spec.name: storage.type for spec, storage in checkpoint.storage()}
        self.scale_type = "F16" if types["embed_tokens.weight"] == "F16" else "BF16"
        self.warnings = coarse_warning(self.path, {kind for kind in types.values() if kind not in _FINE})
        self._vector = cache(self._hub_vector)

    def stored(self, name: str) -> Stored:
        spec = self._checkpoint.tensors[name].spec
        if not self._is_matrix(name):
            return Stored(dtype_name(self._vector(name).dtype), spec.shape)
        info = self._checkpoint.tensors[name].infos[0]
        return Stored(info.type.name if info.type.name in DTYPES else self.scale_type, spec.shape)

    def rows(self, name: str, rows: slice) -> Array:
        if self._is_matrix(name):
            return self._checkpoint.rows(name, rows)
        x = self._vector(name)
        return x.reshape(len(x), -1)[rows]

    def config_values(self) -> dict[str, Any]:
        return dict(self._checkpoint.config_values)

    def write_side_files(self, folder: Path) -> None:
        for name, text in self._checkpoint.folder_files().items():
            if name != "config.json":
                _write(folder / name, text.encode())

    def check_whole(self) -> None:
        self._checkpoint.check_whole()

    def drop_pages(self) -> None:
        self._checkpoint.drop_pages()

    def _is_matrix(self, name: str) -> bool:
        return len(self._checkpoint.tensors[name].spec.shape) == 2

    def _hub_vector(self, name: str) -> Array:
        """A tensor that is no matrix in the hub's convention: 16 bits if nothing is lost, else float32."""
        spec, x = self._checkpoint.tensors[name].spec, self._checkpoint.dense(name)
        match spec.role:
            case Role.NORM:
                return self._short(x - 1, lambda short: np.array_equal(1 + to_float32(short), x))
            case Role.DECAY:
                with np.errstate(divide="ignore"):  # the quantizer refuses infinities
                    return np.log(-x)
            case Role.GATED_NORM:
                return x
            case _:
                return self._short(x, lambda short: np.array_equal(to_float32(short), x)).reshape(spec.shape)

    def _short(self, x: Float32, exact: Any) -> Array:
        with np.errstate(over="ignore"):
            short: Array = x.astype(np.float16) if self.scale_type == "F16" else from_float32(x)
        return short if exact(short) else x


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)


def _read(path: Path) -> bytes:
    try:
        with open_file(path) as file:
            return file.read()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None


def coarse_warning(path: Path, coarse: Collection[str]) -> tuple[str, ...]:
    """What to say of a source whose matrices are of these types of few bits, if there are any."""
    if not coarse:
        return ()
    return (
        f"{path.name} holds {', '.join(sorted(coarse))}: quantizing again adds to their error; better take an original",
    )
