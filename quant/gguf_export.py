"""Export to GGUF: a checkpoint as the file that llama.cpp and everything built on it runs.

Tensors are read, converted and written in blocks of rows, so memory stays small whatever the model's size. The file
appears complete or not at all. Names and conventions are in `edgeq.checkpoint.gguf_layout`; the header is written, and
weights are quantized, by the `gguf` package.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType, quants, size_label

from edgeq.checkpoint import Checkpoint
from edgeq.checkpoint.gguf_layout import (
    ARCH,
    VISION_ARCH,
    file_names,
    file_shape,
    head_order,
    sampling_metadata,
    text_metadata,
    vision_metadata,
)
from edgeq.checkpoint.gguf_tokenizer import tokenizer_metadata
from edgeq.config import TextConfig
from edgeq.errors import ModelError, UsageError
from edgeq.files import new_file
from edgeq.files.pieces import PieceWriter
from edgeq.formats.bf16 import Array, Float32, from_float32
from edgeq.formats.ggml import TYPES, GGMLType
from edgeq.formats.mapped import reading_on
from edgeq.inputs import check_output
from edgeq.printable import printable
from edgeq.quality.gate import GateResult, check
from edgeq.quant.calibrate.export import calibrated_blocks
from edgeq.quant.calibrate.kquant import MENU
from edgeq.quant.calibrate.request import CalibrationRequest
from edgeq.quant.calibrate.run import Calibration
from edgeq.quant.kquants import KQUANTS, encode
from edgeq.quant.target import FileTarget, files_of
from edgeq.session.language import Language
from edgeq.text.template_files import DEFAULT
from edgeq.weights import Part, Role, TensorSpec

__all__ = ["EXPORT_TYPES", "ExportReport", "check_target", "export_gguf", "export_mmproj"]

EXPORT_TYPES: Mapping[str, LlamaFileType] = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q5_1": LlamaFileType.MOSTLY_Q5_1,
    "q5_0": LlamaFileType.MOSTLY_Q5_0,
    "q4_1": LlamaFileType.MOSTLY_Q4_1,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
    "q5_k_m": LlamaFileType.MOSTLY_Q5_K_M,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
}
"""What `export_gguf` can write, and what a file says it is mostly made of."""

_BY_NAME = {t.name: t for t in TYPES.values()}
_MIXES = {"q4_k_m": ("Q4_K", "Q5_K"), "q5_k_m": ("Q5_K", "Q6_K"), "q6_k": ("Q6_K", "Q6_K")}
"""K-quants: the type of most matrices, and that of those that matter more than others (`_LIFTED`)."""
_LIFTED = re.compile(r"\.(out_proj|v_proj|down_proj)\.weight$")
_INSTEAD = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What rows that are no multiple of 256 are stored as, as llama.cpp's own tool does."""
_ALIGNMENT = 32
_TINY = 1e-30  # no type but F32 and BF16 can tell less from 0, and the reciprocal of a scale would overflow
_DROP_EVERY = 1 << 25  # weights after which the source's pages are let go
_BLOCK = 1 << 20  # weights that are float32 at a time
_HEADER = 32 << 20  # bytes of vocabulary and names, or a little more
_MATRICES = (Role.LINEAR, Role.EMBEDDING, Role.GATE)

Progress = Callable[[int, int, str], None]
"""Called with the weights done, all weights, and the tensor at hand."""

Gate = Callable[[Path], GateResult]
"""Judges a file before it gets its name."""


class ExportReport(NamedTuple):
    """What was written: a file, its size, and how many tensors are of which type; `notes` says what is not as asked,
    `gate` what a calibrated model was found to be."""

    path: Path
    nbytes: int
    types: Mapping[str, int]
    notes: tuple[str, ...]
    gate: GateResult | None = None


class _Tensor(NamedTuple):
    """A tensor to write: `blocks` yields its values, some rows at a time, or what is stored of them if `encoded`."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    blocks: Callable[[], Iterator[Array]]
    encoded: bool = False

    @property
    def row_nbytes(self) -> int:
        return self.shape[-1] // self.type.block * self.type.nbytes

    @property
    def nbytes(self) -> int:
        return prod(self.shape[:-1]) * self.row_nbytes


def check_target(checkpoint: Checkpoint, out: Path, force: bool, others: Iterable[Path] = ()) -> None:
    """UsageError where writing `out` would destroy something that nobody asked to replace."""
    _target(checkpoint, out, force, others).check()


def _target(checkpoint: Checkpoint, out: Path, force: bool, others: Iterable[Path] = ()) -> FileTarget:
    inputs = [*checkpoint.weight_files(), *files_of(checkpoint.path)]
    return FileTarget(out, checkpoint.path, inputs, others, force=force)


def export_gguf(
    checkpoint: Checkpoint, out: Path, kind: str, *, mtp: bool = True, force: bool = False,
    progress: Progress | None = None, calibration: CalibrationRequest | None = None, threads: int | None = None,
) -> ExportReport:  # fmt: skip
    """Write the language model and, if `mtp`, its MTP head, with tokenizer and chat template.

    `kind` is one of EXPORT_TYPES and holds for the matrices; vectors are float32. With fewer than 8 bits, the
    embedding (which is also the head) and DeltaNet's small a and b projections stay at Q8_0; in the mixtures of
    K-quants the embedding is Q6_K. A matrix whose rows are no multiple of the type's block becomes another that fits
    them; such exceptions are in the report's notes.

    With a `calibration` the matrices of K-quants are rounded for what they are multiplied by on a text, and, unless it
    keeps bits, those of each are chosen, for its target or the mixture's size: Q4_K, Q5_K, Q6_K or Q8_0. A file found
    damaged by it (QualityError) is not published.
    """
    check_output(out)
    if calibration is not None and kind not in _MIXES:
        raise UsageError(f"calibration is for K-quants, not for {kind}", hint=f"use one of {', '.join(_MIXES)}")
    c = checkpoint.config.text
    if c.linear_key_head_dim != c.linear_value_head_dim:
        raise ModelError("this model cannot be exported: llama.cpp needs DeltaNet keys and values of one width")
    wanted_parts = {Part.TEXT, Part.MTP} if mtp else {Part.TEXT}
    specs = [spec for spec, _ in checkpoint.storage() if spec.part in wanted_parts]
    types, notes = dict[str, GGMLType](), []
    for spec in specs:
        wanted = _wanted_type(spec, kind)
        types[spec.name] = stored = _fitting(wanted, file_shape(spec)[-1])
        if stored != wanted:
            (name,) = file_names(spec.name, len(c.layer_types))
            notes.append(f"{name} is {stored.name}: rows of {spec.shape[-1]} do not fit {wanted.name}")
        if (size := _cuts_heads(spec, stored, c)) is not None:
            types[spec.name] = _BY_NAME["F16"]
            (name,) = file_names(spec.name, len(c.layer_types))
            notes.append(f"{name} is F16: groups of {size} cut heads of {c.linear_value_head_dim}")
    with ExitStack() as stack:
        values, gate = _Values(checkpoint), None
        if calibration is not None:
            _target(checkpoint, out, force).check()
            work = calibrated_blocks(checkpoint, out, specs, types, calibration, threads, progress)
            calibrated = stack.enter_context(work)
            values = _Calibrated(checkpoint, calibrated)
            types |= values.types
            gate = partial(_gate, checkpoint, out, calibrated, threads)
        return _write_model(checkpoint, out, kind, specs, types, values, notes, force, progress, gate)


def _gate(checkpoint: Checkpoint, out: Path, calibrated: Calibration, threads: int | None, path: Path) -> GateResult:
    """What the file `path`, which is to become `out`, is found to be; QualityError if it is damaged."""
    result = check(checkpoint, path, calibrated.windows.held_out, out=out, threads=threads)
    result.need()
    return result


def _write_model(
    checkpoint: Checkpoint, out: Path, kind: str, specs: Sequence[TensorSpec], types: Mapping[str, GGMLType],
    values: _Values, notes: list[str], force: bool, progress: Progress | None, gate: Gate | None,
) -> ExportReport:  # fmt: skip
    c = checkpoint.config.text
    tensors = []
    for spec in specs:
        (name,) = file_names(spec.name, len(c.layer_types))
        blocks = partial(values.blocks, spec)
        tensors.append(_Tensor(name, file_shape(spec), types[spec.name], blocks, values.encoded(spec)))
    shape = text_metadata(c, mtp=any(spec.part is Part.MTP for spec in specs))
    metadata = {
        **_general(checkpoint, specs, "model", kind),
        **sampling_metadata(checkpoint.sampling),
        **{f"{ARCH}.{key}": value for key, value in shape.items()},
        **_tokenizer(checkpoint, notes),
    }
    return _write(out, checkpoint, ARCH, metadata, tensors, tuple(notes), force, progress, gate)


def export_mmproj(
    checkpoint: Checkpoint, out: Path, kind: str, *, force: bool = False, progress: Progress | None = None
) -> ExportReport:
    """Write the vision tower: matrices f32 or bf16 if `kind` says so, else f16."""
    check_output(out)
    vision = checkpoint.config.vision
    specs = [spec for spec, _ in checkpoint.storage() if spec.part is Part.VISION]
    if vision is None or not specs:
        why = checkpoint.left_out.get(Part.VISION)
        raise UsageError(
            f"{checkpoint.path} has no vision tower to export{f': {why}' if why else ''}",
            hint="export the model without a vision tower",
        )
    kind = kind if kind in ("f32", "bf16") else "f16"
    tensors = []
    for spec in specs:
        names = file_names(spec.name, 0)
        for half, name in enumerate(names):
            values = partial(_vision_blocks, checkpoint, spec.name, half if len(names) > 1 else None)
            tensors.append(_Tensor(name, file_shape(spec), _vision_type(spec, kind), values))
    metadata = {
        **_general(checkpoint, specs, "mmproj", kind),
        **vision_metadata(vision, checkpoint.processor_values()[0]),
    }
    return _write(out, checkpoint, VISION_ARCH, metadata, tensors, (), force, progress)


# --- what is written -------------------------------------------------------------------------------------------------


def _wanted_type(spec: TensorSpec, kind: str) -> GGMLType:
    if spec.role not in _MATRICES:
        return _BY_NAME["F32"]
    if kind in _MIXES:
        most, lifted = _MIXES[kind]
        if spec.role is not Role.LINEAR:
            return _BY_NAME["Q8_0" if spec.role is Role.GATE else "Q6_K"]
        return _BY_NAME[lifted if _LIFTED.search(spec.name) else most]
    if kind.startswith(("q4", "q5")) and spec.role in (Role.EMBEDDING, Role.GATE):
        return _BY_NAME["Q8_0"]
    return _BY_NAME[kind.upper()]


def _fitting(wanted: GGMLType, width: int) -> GGMLType:
    """The type that rows of `width` weights are stored as."""
    if width % wanted.block == 0:
        return wanted
    return _fitting(_BY_NAME[_INSTEAD.get(wanted.name, "F16")], width)


def _cuts_heads(spec: TensorSpec, kind: GGMLType, c: TextConfig) -> int | None:
    """The size of groups that share a scale, where some hold columns of two heads that the file orders anew: what is
    stored so cannot be put back in the model's order."""
    order = head_order(spec.name, c)
    cut = order is not None and order.axis == 1 and kind.coding and c.linear_value_head_dim % kind.coding.group_size
    return kind.coding.group_size if cut and kind.coding else None


def _vision_type(spec: TensorSpec, kind: str) -> GGMLType:
    """Vectors and positions are F32; llama.cpp convolves the patches in F16 or F32."""
    if len(spec.shape) == 1 or spec.role is Role.POSITION:
        return _BY_NAME["F32"]
    if spec.role is Role.PATCH and kind == "bf16":
        return _BY_NAME["F32"]
    return _BY_NAME[kind.upper()]


def _general(checkpoint: Checkpoint, specs: Sequence[TensorSpec], kind: str, storage: str) -> dict[str, Any]:
    weights = sum(spec.size for spec in specs)
    return {
        "general.type": kind,
        "general.name": printable(checkpoint.path.resolve().name.removesuffix(".gguf")),
        "general.size_label": size_label(weights, weights, 0, 0),
        "general.file_type": int(EXPORT_TYPES[storage]),
        "general.quantization_version": 2,
    }


def _tokenizer(checkpoint: Checkpoint, notes: list[str]) -> dict[str, Any]:
    rows = checkpoint.config.text.vocab_size
    files = checkpoint.tokenizer_files()
    if files is None:
        notes.append("the checkpoint has no tokenizer: the file takes and gives token ids only")
        return {"tokenizer.ggml.model": "none", f"{ARCH}.vocab_size": rows}
    language = Language(checkpoint)  # raises for files that contradict each other
    entries = tokenizer_metadata(*files, rows)
    entries |= _further_ends(language, entries)
    templates = {f"tokenizer.{key}": value for key, value in _templates(checkpoint, notes).items()}
    return {f"tokenizer.ggml.{key}": value for key, value in entries.items()} | templates


def _further_ends(language: Language, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens that end a text besides the tokenizer's own: all of them in ollama's list, and in llama.cpp's two places,
    the end of a turn and of a message, those that it does not know by name."""
    tokenizer = language.need_tokenizer()
    eos, turn, text = entries.get("eos_token_id"), *map(tokenizer.token_id, ("<|im_end|>", "<|endoftext|>"))
    further = [i for i in tokenizer.eos_token_ids if i not in (eos, text)]
    places = zip(("eot_token_id", "eom_token_id"), (i for i in further if i != turn), strict=False)
    return dict(places) | ({"eos_token_ids": list(tokenizer.eos_token_ids)} if further else {})


def _templates(checkpoint: Checkpoint, notes: list[str]) -> dict[str, Any]:
    """The chat templates as they are: the default, and others by name. What cannot be used is noted, not refused."""
    templates, entries = checkpoint.templates, dict[str, Any]()
    try:
        if checkpoint.template() is None:
            notes.append("the checkpoint has no chat template: chats will not work")
    except ModelError as error:
        notes.append(f"chats will not work: {error.message}")
    for name, template in templates.found.items():
        key = re.sub(r"[^A-Za-z0-9_]", "_", name)  # as converters spell them
        key = "chat_template" if name == DEFAULT else f"chat_template.{key}"
        if key in entries:
            notes.append(f"the chat template {printable(name)!r} is left out: another has its name in GGUF")
        else:
            entries[key] = template.source
    named = [key.removeprefix("chat_template.") for key in entries if key != "chat_template"]
    return entries | ({"chat_templates": named} if named else {})


class _Values:
    """The tensors of a checkpoint, in the file's order of heads."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def encoded(self, spec: TensorSpec) -> bool:  # noqa: ARG002
        """Whether `blocks` gives what is stored, and not yet values."""
        return False

    def blocks(self, spec: TensorSpec) -> Iterator[Array]:
        """A tensor, some rows at a time."""
        order = head_order(spec.name, self.checkpoint.config.text)
        if spec.role not in _MATRICES:
            x = self.dense(spec)
            yield x if order is None else order.to_file(x)
            return
        where = np.argsort(order.positions) if order is not None else None
        step = max(1, _BLOCK // spec.shape[1])
        for row in range(0, spec.shape[0], step):
            rows = slice(row, row + step)
            if order is None or where is None:
                yield self.rows(spec, rows)
            elif order.axis == 0:
                yield self.rows(spec, where[rows])
            else:
                yield self.rows(spec, rows)[:, where]

    def dense(self, spec: TensorSpec) -> Float32:
        """All of a tensor."""
        return self.checkpoint.dense(spec.name)

    def rows(self, spec: TensorSpec, rows: slice | Array) -> Array:
        """Some rows of a matrix."""
        return self.checkpoint.rows(spec.name, rows)


class _Calibrated(_Values):
    """The same with what calibration made of them."""

    def __init__(self, checkpoint: Checkpoint, calibrated: Calibration) -> None:
        super().__init__(checkpoint)
        self._calibrated = calibrated
        self.types = {name: MENU[spec] for name, spec in calibrated.specs.items()}

    def encoded(self, spec: TensorSpec) -> bool:
        return spec.name in self.types

    def blocks(self, spec: TensorSpec) -> Iterator[Array]:
        if not self.encoded(spec):
            yield from super().blocks(spec)
            return
        order, stored = head_order(spec.name, self.checkpoint.config.text), self._calibrated.solved(spec.name).blocks
        rows = np.argsort(order.positions) if order is not None and order.axis == 0 else np.arange(len(stored))
        step = max(1, _BLOCK // spec.shape[1])
        for row in range(0, len(rows), step):
            yield stored[rows[row : row + step]]

    def dense(self, spec: TensorSpec) -> Float32:
        found = self._calibrated.changed_value(spec)
        return self.checkpoint.dense(spec.name) if found is None else found

    def rows(self, spec: TensorSpec, rows: slice | Array) -> Array:
        found = self._calibrated.changed_value(spec)
        return self.checkpoint.rows(spec.name, rows) if found is None else found[rows]


def _vision_blocks(checkpoint: Checkpoint, name: str, half: int | None) -> Iterator[Float32]:
    x = checkpoint.dense(name)
    yield x if half is None else x[:, :, half]


def _encode(x: Float32, tensor: _Tensor) -> Array:
    """Values as they are stored; ModelError for what the type cannot hold."""
    limit = np.abs(x).max(initial=0)
    if not limit <= (65504 if tensor.type.name not in ("F32", "BF16") else np.finfo(np.float32).max):
        raise ModelError(
            f"{tensor.name} holds {limit}, which {tensor.type.name} cannot store",
            hint="export as bf16" if np.isfinite(limit) else "download or copy the checkpoint again",
        )
    if tensor.type.name in ("F32", "BF16"):
        return from_float32(x) if tensor.type.name == "BF16" else np.ascontiguousarray(x)
    x = np.ascontiguousarray(np.where(np.abs(x) < _TINY, np.float32(0), x))
    if tensor.type.name in KQUANTS:
        return encode(x, tensor.type)
    return np.asarray(quants.quantize(x, GGMLQuantizationType[tensor.type.name]))


# --- writing ---------------------------------------------------------------------------------------------------------


def _write(
    out: Path, checkpoint: Checkpoint, arch: str, metadata: Mapping[str, Any], tensors: Sequence[_Tensor],
    notes: tuple[str, ...], force: bool, progress: Progress | None, gate: Gate | None = None,
) -> ExportReport:  # fmt: skip
    target = _target(checkpoint, out, force)
    target.check()
    room = sum(t.nbytes + _ALIGNMENT for t in tensors) + _HEADER
    with reading_on(), new_file(out, room=room, may_replace=target.may_replace) as path:
        _write_header(path, arch, metadata, tensors)
        _write_data(path, checkpoint, tensors, progress)
        nbytes, found = path.stat().st_size, gate(path) if gate else None
    names = [t.type.name for t in tensors]
    return ExportReport(out, nbytes, {name: names.count(name) for name in dict.fromkeys(names)}, notes, found)


def _write_data(path: Path, checkpoint: Checkpoint, tensors: Sequence[_Tensor], progress: Progress | None) -> None:
    """Append the tensors, block by block."""
    total, done = sum(prod(t.shape) for t in tensors), 0
    with closing(PieceWriter(path, "ab")) as file:
        for tensor in tensors:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            end = file.tell() + tensor.nbytes
            for block in tensor.blocks():
                data = block if tensor.encoded else _encode(block, tensor)
                checkpoint.check_whole()
                file.write(np.ascontiguousarray(data).data)
                before, done = done, done + len(block) * prod(tensor.shape[1:])
                if before // _DROP_EVERY != done // _DROP_EVERY:
                    checkpoint.drop_pages()
                if progress:
                    progress(done, total, tensor.name)
            assert file.tell() == end, f"{tensor.name}: not as long as declared"
        file.write(bytes(-file.tell() % _ALIGNMENT))
        file.flush()


def _write_header(path: Path, arch: str, metadata: Mapping[str, Any], tensors: Sequence[_Tensor]) -> None:
    writer = GGUFWriter(path, arch)
    try:
        for key, value in metadata.items():
            writer.add_key_value(key, value, _value_type(value))
        for t in tensors:
            shape = t.shape if t.type.coding is None else (*t.shape[:-1], t.row_nbytes)
            dtype = np.dtype(np.uint8) if t.type.coding else np.dtype(np.float32)
            writer.add_tensor_info(t.name, shape, dtype, t.nbytes, GGMLQuantizationType[t.type.name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _value_type(value: object) -> GGUFValueType:
    match value:
        case bool():
            return GGUFValueType.BOOL
        case int():
            return GGUFValueType.UINT32
        case float():
            return GGUFValueType.FLOAT32
        case str():
            return GGUFValueType.STRING
        case _:
            return GGUFValueType.ARRAY
