"""Checkpoint folders: the hub's safetensors, edgeq's own output, and what mlx-lm and mlx-vlm write.

Three things differ between them, and none is guessed from values:

* names: by their prefixes (`edgeq.formats.names`);
* conventions: MLX files store norms with the 1 already added, the convolution as [C, width, 1] and the patch
  embedding channels-last. The convolution's axes tell which: that is mlx-lm's own rule for these files.
* storage: a matrix is quantized as MLX does it if `scales` lie beside it; bits and group size are in config.json's
  `quantization`, by module where a module differs, and must agree with the shapes. So is the mode (affine, mxfp4,
  nvfp4, mxfp8). What other tools have quantized shows in the tensors too (`edgeq.checkpoint.packing`).
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from edgeq.checkpoint.base import Checkpoint, Storage, hub_to_neutral, without
from edgeq.checkpoint.generation import read_sampling, read_stop_ids
from edgeq.checkpoint.packing import Packing, Unfit, weight_name
from edgeq.config import ModelConfig, parse_config, read_json
from edgeq.errors import ModelError
from edgeq.formats.affine import BITS, GROUP_SIZES
from edgeq.formats.bf16 import Array, Float32, to_float32
from edgeq.formats.names import neutral_module, neutral_name
from edgeq.formats.packed import Packed
from edgeq.formats.qmatrix import MLX_MODES, MODES, Mode
from edgeq.formats.safetensors import SafetensorsFile, TensorInfo
from edgeq.inputs import TOKENIZER_LIMIT, exists
from edgeq.printable import brief, first_of
from edgeq.vision.settings import processor_values
from edgeq.weights import Matrix, Part, QMatrix, Role, TensorSpec, all_tensors, mtp_tensors

if TYPE_CHECKING:
    from edgeq.text.template_files import Templates
    from edgeq.text.tokenizer import Tokenizer

__all__ = ["FolderCheckpoint", "Quantization", "QuantizationTable", "part_of", "values_without"]

_FLOATS = ("F32", "F16", "BF16")
_COMPARED = 1 << 20  # weights at a time
_PREFIXES = {Part.MTP: "mtp.", Part.VISION: "visual."}  # of neutral names
# What old versions of transformers, and servers with a quantized KV cache, store beside the weights.
_BUFFERS = (
    ".inv_freq", ".original_inv_freq", ".cos_cached", ".sin_cached", ".position_ids", ".k_scale", ".v_scale",
    ".q_scale", ".kv_scale", ".prob_scale",
)  # fmt: skip
_OTHER_HEADS = ("score.", "classifier.", "v_head.", "value_head.", "medusa_head.")  # of classifiers, and of trainers
_UNMERGED = re.compile(r"\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)\b")

Layout = Literal["hub", "mlx"]


class Quantization(NamedTuple):
    """Bits per code, weights per scale, and MLX's mode, of one matrix."""

    bits: int
    group_size: int
    mode: Mode = "affine"

    @property
    def parts(self) -> tuple[str, ...]:
        """The tensors that make it up, by the ends of their names."""
        return ("weight", "scales", "biases") if self.mode == "affine" else ("weight", "scales")

    def __str__(self) -> str:
        return f"{self.bits}-bit g{self.group_size}" if self.mode == "affine" else self.mode


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Where a tensor of the table is stored; `quantization` if it is a triple of codes, scales and biases, `packed` if
    another tool has quantized it."""

    spec: TensorSpec
    file_name: str
    quantization: Quantization | None = None
    packed: Packed | None = None


class FolderCheckpoint(Checkpoint):
    """A folder with config.json and safetensors files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        values = read_json(path / "config.json")
        self.config = replace(self._parsed(values), read_processor=self.processor)
        self.files = self._opened(_weight_files(path))
        self._where = _by_tensor(self.files)
        if exists(path / "adapter_config.json") and any(path.glob("adapter*.safetensors")):
            warnings.warn(
                f"{path} holds an adapter beside the model, which is used if it is given: `--adapter {path}` "
                "(adapter= in Python)",
                stacklevel=3,
            )
        self._packing = Packing(path, values, {name: self._info(name) for name in self._where}, self._array)
        if kind := self._packing.what_it_is():
            raise self._packing.refuse(kind)
        self.config = self._config_of_tensors()
        self.layout: Layout = self._find_layout()
        self.quantization = QuantizationTable(values)
        self.tensors = self._match_table()
        self.config = without(self.config, self.left_out)
        file = path / "generation_config.json"  # the hub's small models do not have it
        generation = _read_recommendations(file) if exists(file) else {}
        self.eos_token_ids = self.config.text.eos_token_ids + read_stop_ids(generation, str(file))
        self.recommended = read_sampling(generation, str(file))
        self.format = {"hub": "safetensors", "mlx": "MLX safetensors"}[self.layout]
        if any(t.quantization for t in self.tensors.values()):
            self.format += ", group-quantized"
        elif self._packing.labels_of:
            ((label, _),) = Counter(self._packing.labels_of.values()).most_common(1)
            self.format += f", {label}"
            self.drop_pages()  # those of the orders of columns, with all that lies beside them
        elif self._packing.method not in (None, "affine"):
            warnings.warn(
                f"{path}: its tensors are not quantized, although its configuration says {self._packing.method}: "
                "they are used as they are",
                stacklevel=2,
            )
        self._told = False

    # --- tensors -----------------------------------------------------------------------------------------------------

    def raw(self, name: str) -> Array:
        """An unquantized tensor exactly as stored: a view of the mapped file."""
        return self._array(self.tensors[name].file_name)

    def file_name(self, name: str) -> str:
        """The name of a tensor in its file."""
        return self.tensors[name].file_name

    def matrix(self, name: str) -> Matrix[Array]:
        tensor = self.tensors[name]
        if tensor.spec.role is Role.PATCH:
            patches = self._array(tensor.file_name)
            return self._channels_first(patches).reshape(len(patches), -1)
        if tensor.packed is not None:
            self._tell(tensor)
            self.check_whole()
            matrix = tensor.packed.matrix()
            self._where[tensor.file_name].drop_pages()  # most are copies, which are what takes memory from now on
            return matrix
        if tensor.quantization is None:
            return self._array(tensor.file_name)
        module = tensor.file_name.removesuffix(".weight")
        codes, scales, *biases = (self._array(f"{module}.{part}") for part in tensor.quantization.parts)
        return QMatrix(codes, scales, biases[0] if biases else 0, *tensor.quantization)

    def rows(self, name: str, rows: slice | Array) -> Float32:
        if (packed := self.tensors[name].packed) is None:
            return super().rows(name, rows)
        self.check_whole()
        return packed.rows(rows)

    def dense(self, name: str) -> Float32:
        tensor = self.tensors[name]
        stored = tensor.quantization is None and tensor.packed is None
        x = to_float32(self.raw(name)) if stored else self.rows(name, slice(None))
        if not np.isfinite(x).all():
            raise ModelError(
                f"{self.path}: {self.file_name(name)} holds NaN or infinity", hint="download or copy the file again"
            )
        role = tensor.spec.role
        if role is Role.PATCH:
            x = self._channels_first(x)
        return x if role is Role.NORM and self.layout == "mlx" else hub_to_neutral(x, role)

    def _channels_first(self, patches: Array) -> Array:
        return np.moveaxis(patches, -1, 1) if self.layout == "mlx" else patches

    def _tell(self, tensor: _Tensor) -> None:
        """Say once that there are matrices which take more memory than their file."""
        if self._told or tensor.packed is None or not tensor.packed.is_widened:
            return
        self._told = True
        warnings.warn(
            f"{self.path}: {self._packing.labels_of[tensor.spec.name]}: such matrices take 16 bits a weight in memory; "
            "`edgeq quantize` makes less of them",
            stacklevel=3,
        )

    def storage(self) -> Iterator[tuple[TensorSpec, Storage]]:
        return ((tensor.spec, self._stored(tensor)) for tensor in self.tensors.values())

    def _stored(self, tensor: _Tensor) -> Storage:
        if tensor.packed is not None:
            there = self._packing.parts(tensor.file_name) & self._where.keys()
            nbytes = sum(info.end - info.start for info in map(self._info, there))
            return Storage(self._packing.labels_of[tensor.spec.name], nbytes)
        if tensor.quantization is None:
            info = self._info(tensor.file_name)
            return Storage(info.dtype, info.end - info.start)
        module = tensor.file_name.removesuffix(".weight")
        parts = [self._info(f"{module}.{part}") for part in tensor.quantization.parts]
        return Storage(str(tensor.quantization), sum(info.end - info.start for info in parts))

    def memory_nbytes(self, spec: TensorSpec) -> int:
        tensor = self.tensors[spec.name]
        return self._stored(tensor).nbytes if tensor.packed is None else tensor.packed.memory_nbytes

    def is_mapped(self, spec: TensorSpec) -> bool:
        return self.tensors[spec.name].packed is None and spec.role is not Role.PATCH

    def tokenizer(self) -> Tokenizer | None:
        from edgeq.text.tokenizer import Tokenizer

        return Tokenizer.from_folder(self.path) if exists(self.path / "tokenizer.json") else None

    def read_templates(self) -> Templates:
        from edgeq.text.template_files import read_templates

        return read_templates(self.path)

    def tokenizer_files(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        from edgeq.text.components import checked_components

        if not exists(self.path / "tokenizer.json"):
            return None
        file = self.path / "tokenizer.json"
        spec = checked_components(read_json(file, TOKENIZER_LIMIT), str(file))
        config = self.path / "tokenizer_config.json"
        return spec, read_json(config) if exists(config) else {}

    def processor_values(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return processor_values(self.path)

    def lacks_tower(self) -> str:
        record = self.path / "edgeq.json"  # see edgeq.quant.provenance
        recipe = read_json(record).get("recipe") if exists(record) else None
        if isinstance(recipe, dict) and recipe.get("vision") == "none":
            return "it was quantized without its vision tower (--vision none)"
        return super().lacks_tower()

    @property
    def config_files(self) -> list[Path]:
        """The files that say how the tensors are to be read."""
        return self._packing.files

    def weight_files(self) -> list[Path]:
        return [file.path for file in self.files]

    def check_whole(self) -> None:
        for file in self.files:
            file.check_whole()

    def drop_pages(self) -> None:
        for file in self.files:
            file.drop_pages()

    def _array(self, file_name: str) -> Array:
        return self._where[file_name].array(file_name)

    def _info(self, file_name: str) -> TensorInfo:
        return self._where[file_name].tensors[file_name]

    # --- opening -----------------------------------------------------------------------------------------------------

    def _parsed(self, values: Mapping[str, Any]) -> ModelConfig:
        """The configuration; without the parts that it describes as nothing that edgeq knows, if the text stands."""
        problem: ModelError | None = None
        for parts in ((), (Part.VISION,), (Part.MTP,), (Part.MTP, Part.VISION)):
            try:
                config = parse_config(values_without(values, parts))
            except ModelError as error:
                problem = problem or error
                continue
            for part in parts:
                assert problem is not None
                self.leave_out(part, problem.message)
            return config
        assert problem is not None
        raise problem

    def _opened(self, files: Mapping[Path, Set[Part]]) -> tuple[SafetensorsFile, ...]:
        """The files, without those that cannot be read if they hold nothing of the language model."""
        opened = []
        for path, parts in files.items():
            try:
                opened.append(SafetensorsFile(path))
            except ModelError as error:
                if Part.TEXT in parts:
                    raise
                for part in sorted(parts, key=lambda part: part.value):
                    self.leave_out(part, error.message)
        return tuple(opened)

    def _config_of_tensors(self) -> ModelConfig:
        """The configuration with what the tensors know better: fine-tunes store a head of their own and keep the flag
        that ties it to the embedding, and tools drop the line that counts MTP layers."""
        found = {neutral_name(weight_name(name)) for name in self._where}
        text = self.config.text
        both = found >= {"lm_head.weight", "embed_tokens.weight"}
        if text.tie_word_embeddings and both and not self._same("lm_head", "embed_tokens"):
            warnings.warn(
                f"{self.path}: its lm_head is not its embedding, although config.json ties them: the lm_head is used",
                stacklevel=2,
            )
            text = replace(text, tie_word_embeddings=False)
        spare = text.mtp_num_hidden_layers == 0 and Part.MTP not in self.left_out
        if spare and any(name and name.startswith("mtp.") for name in found):
            with_mtp = replace(text, mtp_num_hidden_layers=1)
            if {spec.name for spec in mtp_tensors(with_mtp)} <= found:
                text = with_mtp
            else:
                self.leave_out(Part.MTP, "some of its tensors are missing")
        if self.config.vision is None and any(name and name.startswith("visual.") for name in found):
            self.leave_out(Part.VISION, "config.json does not describe it (vision_config)")
        return replace(self.config, text=text)

    def _same(self, one: str, other: str) -> bool:
        """Whether two modules are stored as the same bytes."""
        files = {neutral_name(weight_name(name)): name for name in self._where}
        for part in ("weight", "scales", "biases", "qzeros", "weight_scale", "weight_scale_inv", "weight_zero_point"):
            a, b = (files.get(f"{module}.{part}") for module in (one, other))
            if (a is None) != (b is None) or (a and b and not _same(self._where[a], a, self._where[b], b)):
                return False
        return True

    def _find_layout(self) -> Layout:
        """mlx-lm's rule: its files have the convolution's channel axis last but one. Without one, the file's mark."""
        shapes = {self._info(name).shape[1:2] for name in self._where if name.endswith("conv1d.weight")}
        if len(shapes) > 1:
            raise ModelError(
                f"{self.path} mixes the hub's and MLX's layout of conv1d.weight",
                hint="convert the model again with one tool",
            )
        if shapes:
            return "hub" if shapes == {(1,)} else "mlx"
        return "mlx" if any(file.metadata.get("format") == "mlx" for file in self.files) else "hub"

    def _match_table(self) -> dict[str, _Tensor]:
        """Find every tensor of the table, and report everything that does not fit the language model in one message;
        another part that does not fit is left out."""
        found: dict[str, str] = {}
        problems_of: dict[Part, list[str]] = {part: [] for part in Part}
        for file_name in self._where:
            name = neutral_name(weight_name(file_name))
            if name in found:
                problems_of[part_of(file_name)].append(f"{file_name} and {found[name]} are the same tensor")
            elif name is not None:
                found[name] = file_name
        if self.config.text.tie_word_embeddings and "lm_head.weight" in found:
            found.setdefault("embed_tokens.weight", found["lm_head.weight"])  # save_model keeps one of them
        tensors, absent = {}, []
        for spec in all_tensors(self.config):
            if spec.name in found:
                tensors[spec.name] = self._check_tensor(spec, found[spec.name], problems_of[spec.part])
            else:
                absent.append(spec)
        for spec in self._required(absent, tensors):
            problems_of[spec.part].append(f"missing {spec.name} {list(spec.shape)}")
        for name in self._unexpected(tensors):
            problems_of[part_of(name)].append(f"unexpected {name}")
        problems = problems_of[Part.TEXT]
        if problems and (method := self._packing.unread_method()):
            raise self._packing.refuse(method)
        if problems and (fused := next((name for name in self._where if _is_fused(name)), None)):
            raise ModelError(
                f"{self.path} holds {fused}: projections that are fused, as some servers keep them",
                hint="use a checkpoint with the model's own: in_proj_qkv, in_proj_z, in_proj_b, in_proj_a, q_proj",
            )
        if problems and (unmerged := next(filter(_UNMERGED.search, self._where), None)):
            raise ModelError(
                f"{self.path} holds an adapter that is not merged into its weights ({unmerged})",
                hint="merge it with PEFT's merge_and_unload where it was trained, and save the model again",
            )
        if shown := next((problem for problem in problems if problem.startswith("unexpected")), None):
            problems.remove(shown)
            problems.insert(0, shown)  # a name as the file has it, however many are missing
        if problems:
            raise ModelError(
                f"{self.path} does not hold the tensors that its config.json describes:",
                details=first_of(problems),
                hint="download config.json and the weights again, from one model",
            )
        for part, some in problems_of.items():
            if some:
                self.leave_out(part, some[0] + (f" (and {len(some) - 1} more)" if len(some) > 1 else ""))
        return {name: tensor for name, tensor in tensors.items() if tensor.spec.part not in self.left_out}

    def _required(self, absent: list[TensorSpec], present: Mapping[str, _Tensor]) -> list[TensorSpec]:
        """The language model must be whole; the MTP head and the vision tower may be left out, but not in part."""
        parts = {tensor.spec.part for tensor in present.values()} | {Part.TEXT}
        return [spec for spec in absent if spec.part in parts]

    def _unexpected(self, tensors: Mapping[str, _Tensor]) -> list[str]:
        known, packing = set[str](), self._packing
        for tensor in tensors.values():
            if packing.holds(tensor.file_name):  # whether it can be used or not
                known |= packing.parts(tensor.file_name)
                continue
            module = tensor.file_name.removesuffix(".weight")
            parts = tensor.quantization.parts if tensor.quantization else ()
            known |= {f"{module}.{part}" for part in parts} or {tensor.file_name, *packing.leftovers(tensor.file_name)}
        spare = tuple(_PREFIXES[part] for part in self.left_out)  # of what is left out it has been said
        if self.config.text.tie_word_embeddings:
            spare = (*spare, "lm_head.")  # a stored copy of the tied head
        unexpected = [n for n in self._where if n not in known and not (neutral_name(n) or n).startswith(spare)]
        buffers = [name for name in unexpected if name.endswith(_BUFFERS)]
        heads = [name for name in unexpected if (neutral_name(name) or name).startswith(_OTHER_HEADS)]
        for names, what in ((buffers, "no weight"), (heads, "of a head that writes no text")):
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                warnings.warn(f"{self.path}: {names[0]}{more} is {what}, and is not used", stacklevel=4)
        return [name for name in unexpected if name not in buffers and name not in heads]

    def _check_tensor(self, spec: TensorSpec, file_name: str, problems: list[str]) -> _Tensor:
        try:
            if packed := self._packing.open(spec, file_name):
                return _Tensor(spec, file_name, packed=packed)
        except Unfit as unfit:
            problems.append(str(unfit))
            return _Tensor(spec, file_name)
        module = file_name.removesuffix(".weight")
        if f"{module}.scales" in self._where:
            quantization = self.quantization.of(spec.name)
            problem = self._triple_problem(spec, module, quantization)
            if problem:
                problems.append(problem)
            return _Tensor(spec, file_name, quantization)
        info = self._info(file_name)
        if info.shape != (shape := _file_shape(spec, self.layout)):
            problems.append(f"{file_name} is {list(info.shape)}, expected {list(shape)}")
        elif info.dtype not in _FLOATS:
            problems.append(f"{file_name} is {info.dtype}, expected {', '.join(_FLOATS)} or a quantized triple")
        return _Tensor(spec, file_name)

    def _triple_problem(self, spec: TensorSpec, module: str, quantization: Quantization | None) -> str | None:
        """What is wrong with a quantized matrix, if anything."""
        if quantization is None:
            return f"{module} has scales, but config.json says nothing of its quantization"
        if len(spec.shape) != 2:
            return f"{module} is quantized, which edgeq supports for matrices only"
        (out, width), (bits, group, mode) = spec.shape, quantization
        shapes = {"weight": (out, width * bits // 32), "scales": (out, width // group), "biases": (out, width // group)}
        dtypes = {"weight": ("U32",), "scales": _FLOATS if mode == "affine" else ("U8",), "biases": _FLOATS}
        for part in quantization.parts:
            if f"{module}.{part}" not in self._where:
                return f"{module} has scales but no {part}, which mode {mode} has"
            info, shape = self._info(f"{module}.{part}"), shapes[part]
            if width % group or info.shape != shape:
                return (
                    f"{module}.{part} is {list(info.shape)}, expected {list(shape)} at {bits} bits, groups of {group}"
                )
            if info.dtype not in dtypes[part]:
                return f"{module}.{part} is {info.dtype}, expected {', '.join(dtypes[part])} in mode {mode}"
        return None


class QuantizationTable:
    """config.json's `quantization`: the default and the modules that differ."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        block = values.get("quantization", values.get("quantization_config"))
        if block is not None and not isinstance(block, Mapping):
            raise ModelError(f"config.json: quantization is {brief(block)}, expected an object")
        self._block: Mapping[str, Any] = block or {}
        self._method = self._block.get("quant_method", "affine")
        if self._method != "affine":  # what another tool says of its own
            self._block = {}
        self._default = self._entry("quantization", self._block) if self._block else None
        self._modules = {
            neutral_module(path): self._entry(f"quantization.{path}", entry)
            for path, entry in self._block.items()
            if isinstance(entry, Mapping)
        }

    def of(self, name: str) -> Quantization | None:
        """Bits and group size of a quantized matrix, by its neutral name."""
        if self._method != "affine":
            raise ModelError(
                f"config.json has quant_method {brief(self._method)}, but the tensors are quantized for MLX",
                hint="download config.json and the weights again, from one model",
            )
        return self._modules.get(name.removesuffix(".weight"), self._default)

    def named(self, name: str) -> Quantization | None:
        """What is said of a matrix by name, without the default."""
        return self._modules.get(name.removesuffix(".weight"))

    def _entry(self, where: str, entry: Mapping[str, Any]) -> Quantization:
        mode = entry.get("mode", "affine")
        if mode in MLX_MODES:
            return self._table_entry(where, entry, mode)
        if mode != "affine":
            modes = ", ".join(("affine", *MLX_MODES))
            raise ModelError(
                f"config.json: {where}.mode is {brief(mode)}, expected one of {modes}",
                hint="quantize the model again in one of these modes",
            )
        bits, group = entry.get("bits"), entry.get("group_size", self._block.get("group_size"))
        if not (type(bits) is int and bits in BITS and type(group) is int and group in GROUP_SIZES):
            raise ModelError(
                f"config.json: {where} has bits {brief(bits)} and group_size {brief(group)}, "
                f"expected bits of {BITS} and group_size of {GROUP_SIZES}"
            )
        return Quantization(bits, group)

    def _table_entry(self, where: str, entry: Mapping[str, Any], mode: Mode) -> Quantization:
        """Of a mode that has one size; what is not said is that."""
        for key, size in zip(("bits", "group_size"), MODES[mode], strict=True):
            found = entry.get(key)
            if found is not None and (type(found) is not int or found != size):
                raise ModelError(
                    f"config.json: {where} has {key} {brief(found)} in mode {mode}, expected {size}",
                    hint="download config.json again",
                )
        return Quantization(*MODES[mode], mode)


def _read_recommendations(file: Path) -> Mapping[str, Any]:
    """The fields of a generation_config.json; a warning, and none, for a file that holds none: nothing in it is worth
    refusing the weights."""
    try:
        return read_json(file)
    except ModelError as error:
        warnings.warn(f"{error.message}: nothing that it recommends is used", stacklevel=2)
        return {}


def values_without(values: Mapping[str, Any], parts: Container[Part]) -> Mapping[str, Any]:
    """The fields of a config.json without those of some parts."""
    if Part.VISION in parts:
        values = {key: value for key, value in values.items() if key not in _OF_VISION}
    if Part.MTP in parts:
        sections = {key: _without_mtp(value) for key, value in values.items() if isinstance(value, Mapping)}
        values = _without_mtp({**values, **sections})
    return values


def _without_mtp(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not key.startswith("mtp_")}


_OF_VISION = ("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def _file_shape(spec: TensorSpec, layout: Layout) -> tuple[int, ...]:
    """A tensor's shape in the file: MLX moves the channels of convolutions to the end."""
    if layout == "mlx" and spec.role in (Role.CONV, Role.PATCH):
        return (spec.shape[0], *spec.shape[2:], spec.shape[1])
    return spec.shape


def _is_fused(name: str) -> bool:
    return any(f".{fused}." in name for fused in ("in_proj_qkvz", "in_proj_ba", "qkv_proj", "gate_up_proj"))


def _by_tensor(files: Iterable[SafetensorsFile]) -> dict[str, SafetensorsFile]:
    """The file that holds each tensor; ModelError for one that two hold, for nothing says which is the model's."""
    where: dict[str, SafetensorsFile] = {}
    for file in files:
        for name in file.tensors:
            if name in where:
                raise ModelError(
                    f"{where[name].path} and {file.path.name} both hold {name}",
                    hint="move the file away that is not of this model",
                )
            where[name] = file
    return where


def _same_tensors(one: Path, others: Sequence[Path]) -> bool:
    """Whether a file holds the very tensors that some others hold together."""
    file, where = SafetensorsFile(one), _by_tensor(SafetensorsFile(path) for path in others)
    return file.tensors.keys() == where.keys() and all(_same(file, name, where[name], name) for name in where)


def _same(file: SafetensorsFile, name: str, other: SafetensorsFile, other_name: str) -> bool:
    """Whether two tensors are the same, byte for byte."""
    a, b = file.tensors[name], other.tensors[other_name]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    x, y = file.array(name).reshape(-1), other.array(other_name).reshape(-1)
    pieces = (slice(i, i + _COMPARED) for i in range(0, x.size, _COMPARED))
    same = all(np.array_equal(x[piece].view(np.uint8), y[piece].view(np.uint8)) for piece in pieces)
    file.drop_pages()
    other.drop_pages()
    return same


def part_of(file_name: str) -> Part:
    """The part that a tensor belongs to, by its name."""
    name = neutral_name(file_name) or file_name
    return next((part for part, prefix in _PREFIXES.items() if name.startswith(prefix)), Part.TEXT)


def _weight_files(path: Path) -> dict[Path, set[Part]]:
    """The index names the files, and says which parts are in them; without one they are the folder's
    model*.safetensors, as everywhere in this field, and may hold anything."""
    index = path / "model.safetensors.index.json"
    if not exists(index):
        files = sorted(path.glob("model*.safetensors"))
        if not files:
            raise ModelError(
                f"{path} holds no model*.safetensors files", hint="give the folder of a complete checkpoint"
            )
        return {file: set(Part) for file in files}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ModelError(f"{index}: weight_map is not an object of file names", hint="download the index again")
    names = sorted(set(weight_map.values()))
    for name in names:
        place = Path(name)
        if place.is_absolute() or ".." in place.parts or not place.parts:
            raise ModelError(f"{index} names {name!r}, which is outside of the folder", hint="download the index again")
    parts: dict[str, set[Part]] = {name: set() for name in names}
    for tensor, name in weight_map.items():
        parts[name].add(part_of(tensor))
    absent = [name for name in names if not exists(path / name) and Part.TEXT in parts[name]]
    if (single := path / "model.safetensors").name not in names and exists(single):
        if not absent and not _same_tensors(single, [path / name for name in names if exists(path / name)]):
            raise ModelError(
                f"{single} and {index.name} are two models",
                hint=f"move one of them away: {single.name}, or {index.name} with the files that it names",
            )
        if absent:
            warnings.warn(
                f"{path} lacks {brief(absent[0])}, which {index.name} names: {single.name} is used", stacklevel=2
            )
        return {single: set(Part)}
    if absent:
        raise ModelError(f"{path} lacks {', '.join(absent)}", hint="download the missing files")
    return {path / name: parts[name] for name in names}
