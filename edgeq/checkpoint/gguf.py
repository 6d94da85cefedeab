"""GGUF checkpoints: a model file of llama.cpp's or ollama's, with its vision tower beside it if there is one.

Plain floats are views of the mapped file. Quantized matrices become `QMatrix` when they are fetched, exactly (see
`edgeq.formats.ggml`): their codes are put in order in blocks of rows, and only the result stays in memory. What that
costs over the file is in docs/reference/gguf.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgeq.checkpoint.base import Checkpoint, Storage, without
from edgeq.checkpoint.gguf_layout import (
    ARCH,
    HeadOrder,
    file_names,
    file_shape,
    head_order,
    names_in,
    recommended_sampling,
    text_values,
)
from edgeq.checkpoint.gguf_tokenizer import token_ids, tokenizer_spec
from edgeq.checkpoint.gguf_vision import Tower, find_tower, is_vision
from edgeq.config import parse_config
from edgeq.errors import ModelError
from edgeq.formats.affine import dequantize_unpacked, one_level, pack
from edgeq.formats.bf16 import Array, Float32, to_float32
from edgeq.formats.blocks import each_block
from edgeq.formats.ggml import Coding, decode, finite
from edgeq.formats.gguf import GGUFFile, SplitGGUF, TensorInfo, open_gguf
from edgeq.formats.qmatrix import TwoLevel
from edgeq.identify import check_model
from edgeq.printable import first_of
from edgeq.weights import Matrix, Part, QMatrix, Role, TensorSpec, mtp_tensors, text_tensors, vision_tensors

if TYPE_CHECKING:
    from edgeq.text.template_files import Templates
    from edgeq.text.tokenizer import Tokenizer

__all__ = ["GGUFCheckpoint"]

_UNIT = 128  # weights that a unit of scales is for where heads move; elsewhere the file's 256
_MATRICES = (Role.LINEAR, Role.EMBEDDING, Role.GATE)


class _Tensor(NamedTuple):
    """Where a tensor of the table is stored: under one name, or in parts."""

    spec: TensorSpec
    file: GGUFFile
    names: tuple[str, ...]

    @property
    def infos(self) -> list[TensorInfo]:
        return [self.file.tensors[name] for name in self.names]

    def blocks(self) -> Array:
        """Values as they are shaped, or a matrix's blocks [out, blocks of a row]: a view of the mapped file, unless it
        has the tensor in parts."""
        parts = [self._view(name) for name in self.names]
        if self.spec.role is Role.PATCH:
            return np.stack(parts, axis=2) if len(parts) > 1 else parts[0].reshape(self.spec.shape)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _view(self, name: str) -> Array:
        info = self.file.tensors[name]
        blocks = info.shape[-1] // info.type.block
        return self.file.data(name).view(info.type.layout).reshape(*info.shape[:-1], blocks)


class GGUFCheckpoint(Checkpoint):
    """A .gguf file of architecture qwen35, and its vision tower: `mmproj`, or what is in it, in the files `towers` or
    beside it."""

    def __init__(self, path: Path, mmproj: Path | None = None, towers: Sequence[Path] = ()) -> None:
        self.path = path
        self.file = open_gguf(path, check_model)
        self.config_values = text_values(self.file)
        tower = find_tower(self.file, mmproj, towers)
        self.tower = tower if isinstance(tower, Tower) else None
        if isinstance(tower, str):
            self.leave_out(Part.VISION, tower)
        if self.tower:
            self.config_values |= {"vision_config": self.tower.values} | _image_tokens(self.file)
        self.config = replace(parse_config(self.config_values, path.name), read_processor=self.processor)
        self.tensors = self._match_table()
        self.config = without(self.config, self.left_out)
        self.eos_token_ids = self.config.text.eos_token_ids
        self.recommended = recommended_sampling(self.file)
        self.format = f"GGUF, {' + '.join(self._types())}"

    # --- tensors -----------------------------------------------------------------------------------------------------

    def matrix(self, name: str) -> Matrix[Array]:
        tensor = self.tensors[name]
        coding = tensor.infos[0].type.coding
        if coding is not None:
            return self._quantized(tensor, coding)
        if tensor.spec.role is Role.PATCH:
            return tensor.blocks().reshape(tensor.spec.shape[0], -1)
        order = self._order(name)
        return tensor.blocks() if order is None else order.from_file(tensor.blocks())

    def rows(self, name: str, rows: slice | Array) -> Float32:
        tensor = self.tensors[name]
        coding, order = tensor.infos[0].type.coding, self._order(name)
        if coding is None:
            x = to_float32(tensor.blocks()[_in_file(rows, order)])
            return x if order is None or order.axis == 0 else order.from_file(x)
        return dequantize_unpacked(self._decode(tensor, coding, rows))

    def dense(self, name: str) -> Float32:
        tensor, order = self.tensors[name], self._order(name)
        if tensor.infos[0].type.coding is not None:
            return self.rows(name, slice(None))
        x = to_float32(tensor.blocks())
        if not np.isfinite(x).all():
            raise self._damaged(tensor)
        x = np.array(x) if order is None else order.from_file(x)
        return x + 1 if self._lacks_one(tensor, x) else x

    def storage(self) -> Iterator[tuple[TensorSpec, Storage]]:
        for tensor in self.tensors.values():
            infos = tensor.infos
            yield tensor.spec, Storage(infos[0].type.name, sum(info.nbytes for info in infos))

    def memory_nbytes(self, spec: TensorSpec) -> int:
        infos = self.tensors[spec.name].infos
        return sum(info.nbytes // info.type.nbytes * info.type.memory_nbytes for info in infos)

    def is_mapped(self, spec: TensorSpec) -> bool:
        tensor = self.tensors[spec.name]
        return len(tensor.infos) == 1 and tensor.infos[0].type.coding is None and self._order(spec.name) is None

    def tokenizer(self) -> Tokenizer | None:
        from edgeq.text.tokenizer import Tokenizer

        files = self.tokenizer_files()
        return Tokenizer.from_spec(json.dumps(files[0], ensure_ascii=False), files[1]) if files else None

    def read_templates(self) -> Templates:
        from edgeq.text.template_files import DEFAULT, Templates, templates_in

        key, problems = "tokenizer.chat_template", list[str]()
        given = {name: self.file.value(name) for name in (key, *self.file.beginning(f"{key}.")) if name in self.file}
        named = {name.removeprefix(key).removeprefix(".") or DEFAULT: value for name, value in given.items()}
        return Templates(str(self.path), dict(templates_in(named, key, problems)), tuple(problems))

    def tokenizer_files(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        return tokenizer_spec(self.file)

    def weight_files(self) -> list[Path]:
        model = self.file.paths if isinstance(self.file, SplitGGUF) else [self.file.path]
        return model + [file.path for file in self._files[1:]]

    def check_whole(self) -> None:
        for file in self._files:
            file.check_whole()

    def drop_pages(self) -> None:
        for file in self._files:
            file.drop_pages()

    def processor_values(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return (self.tower.processor if self.tower else {}), {}

    @property
    def _files(self) -> list[GGUFFile]:
        """The model's, and the tower's if it has one of its own."""
        return [self.file] + ([self.tower.file] if self.tower and self.tower.file is not self.file else [])

    def folder_files(self) -> dict[str, str]:
        """What a checkpoint folder has beside its weights, by file name: configuration, tokenizer, chat template."""
        from edgeq.text.template_files import place

        files = {"config.json": json.dumps(self.config_values, indent=2)}
        stops = {"eos_token_id": list(self.eos_token_ids)} if len(self.eos_token_ids) > 1 else {}
        if generation := {**stops, **self.sampling}:
            files["generation_config.json"] = json.dumps(generation, indent=2)
        if tokenizer := self.tokenizer_files():
            files["tokenizer.json"] = json.dumps(tokenizer[0], ensure_ascii=False)
            files["tokenizer_config.json"] = json.dumps(tokenizer[1], ensure_ascii=False, indent=2)
        if self.tower:
            files["preprocessor_config.json"] = json.dumps(self.tower.processor, indent=2)
        for name, template in self.templates.found.items():
            files[place(name)] = template.source
        return files

    def _order(self, name: str) -> HeadOrder | None:
        tiled = self.file.get(f"{ARCH}.ssm.v_head_reordered", bool, True)  # ollama's key
        return head_order(name, self.config.text) if tiled else None

    def _lacks_one(self, tensor: _Tensor, x: Float32) -> bool:
        """Whether a norm is stored without the 1 that GGUF adds: of ollama's `mtp.*` some are.

        Those of the head itself never have it; those of its layer have it or not, by the version of the converter, and
        nothing says which: they are compared with the language model's. Wrong ones would cost drafts, not tokens.
        """
        if tensor.spec.role is not Role.NORM or not tensor.names[0].startswith("mtp."):
            return False
        role = tensor.spec.name.removeprefix("mtp.layers.0.")
        alike = [t for name, t in self.tensors.items() if name.endswith(role) and t.spec.part is Part.TEXT]
        if role == tensor.spec.name or not alike:
            return True
        means = [to_float32(t.blocks()).mean(dtype=np.float64) for t in alike]
        return bool(x.mean(dtype=np.float64) < np.mean(means) - 0.5)

    def _quantized(self, tensor: _Tensor, coding: Coding) -> QMatrix[Array]:
        """Decode a matrix, some rows at a time, into the layout of `QMatrix`."""
        out, _ = tensor.spec.shape

        def packed(rows: slice) -> QMatrix[Array]:
            w = self._decode(tensor, coding, rows)
            return w.replaced(codes=pack(w.codes, w.bits))

        whole = packed(slice(0, 1)).map(lambda x: np.empty((out, x.shape[1]), x.dtype))

        def convert(rows: slice) -> None:
            for target, part in zip(whole.arrays, packed(rows).arrays, strict=True):
                target[rows] = part

        each_block(tensor.spec.shape, convert)
        tensor.file.drop_pages()
        return whole

    def _decode(self, tensor: _Tensor, coding: Coding, rows: slice | Array) -> QMatrix[Array]:
        """Some rows of a quantized matrix, codes not packed yet: uint8 [rows, in]."""
        order = self._order(tensor.spec.name)
        part = tensor.blocks()[_in_file(rows, order)]
        w = decode(part.reshape(-1), coding)
        if not finite(w):
            raise self._damaged(tensor)
        w = w.map(lambda x: x.reshape(len(part), -1))
        if order is None or order.axis == 0:
            return w
        if isinstance(w.scales, TwoLevel) and self.config.text.linear_value_head_dim % _UNIT:
            w = one_level(w)
        return w.map(lambda x: _reordered(x, order))

    def _damaged(self, tensor: _Tensor) -> ModelError:
        return ModelError(
            f"{tensor.file.path}: {tensor.names[0]} holds NaN or infinity",
            hint="download or copy the file again",
        )

    # --- opening -----------------------------------------------------------------------------------------------------

    def _types(self) -> list[str]:
        """The types of the matrices, the most used first."""
        sizes: dict[str, int] = {}
        for spec, storage in self.storage():
            if spec.role in _MATRICES and spec.part is not Part.VISION:
                sizes[storage.type] = sizes.get(storage.type, 0) + storage.nbytes
        return sorted(sizes, key=lambda name: -sizes[name])

    def _match_table(self) -> dict[str, _Tensor]:
        """Find every tensor of the table, and report everything that does not fit the language model in one message; an
        MTP head that does not fit is left out."""
        layers = len(self.config.text.layer_types)
        problems_of: dict[Part, list[str]] = {Part.TEXT: [], Part.MTP: []}
        tensors, absent = dict[str, _Tensor](), list[TensorSpec]()
        known: set[str] = set()
        for spec in (*text_tensors(self.config.text), *mtp_tensors(self.config.text)):
            tensor = _Tensor(spec, self.file, names_in(self.file.tensors, spec.name, layers))
            if all(name in self.file.tensors for name in tensor.names):
                tensors[spec.name] = tensor
                known.update(tensor.names)
                problems_of[spec.part] += self._problems(tensor)
            else:
                absent.append(spec)
        required = {tensor.spec.part for tensor in tensors.values()} | {Part.TEXT}
        for spec in absent:
            if spec.part in required:
                names = " and ".join(file_names(spec.name, layers))
                problems_of[spec.part].append(f"missing {names} {list(spec.shape)}")
        of_head = ("mtp.", f"blk.{layers}.") if f"blk.{layers}.nextn.eh_proj.weight" in self.file.tensors else ("mtp.",)
        for name in self.file.tensors:
            if name not in known and not is_vision(name):
                problems_of[Part.MTP if name.startswith(of_head) else Part.TEXT].append(f"unexpected {name}")
        problems = problems_of[Part.TEXT]
        if problems:
            raise ModelError(
                f"{self.path} does not hold the tensors that its metadata describes:",
                details=first_of(problems),
                hint="download the file again, or convert the model again with a current llama.cpp",
            )
        if some := problems_of[Part.MTP]:
            self.leave_out(Part.MTP, some[0] + (f" (and {len(some) - 1} more)" if len(some) > 1 else ""))
            tensors = {name: tensor for name, tensor in tensors.items() if tensor.spec.part is Part.TEXT}
        if self.tower:  # whose tensors have been checked
            specs = vision_tensors(self.tower.config)
            tensors |= {spec.name: _Tensor(spec, self.tower.file, self.tower.names[spec.name]) for spec in specs}
        return tensors

    def _problems(self, tensor: _Tensor) -> Iterator[str]:
        """What is wrong with a tensor's shape or type."""
        spec, shape = tensor.spec, file_shape(tensor.spec)
        for name, info in zip(tensor.names, tensor.infos, strict=True):
            coding = info.type.coding
            if info.shape != shape:
                yield f"{name} is {list(info.shape)}, expected {list(shape)}"
            elif coding is not None and (len(shape) != 2 or spec.role not in _MATRICES):
                yield f"{name} is {info.type.name}, which edgeq supports for matrices only"
            elif coding is not None and shape[1] % 32:
                yield f"{name} is {info.type.name} in rows of {shape[1]}, expected a multiple of 32"
            elif coding is not None and spec.name.endswith("linear_attn.out_proj.weight"):
                width, order = self.config.text.linear_value_head_dim, self._order(spec.name)
                if order is not None and width % coding.group_size:
                    yield f"{name} is {info.type.name}, whose groups of {coding.group_size} cut heads of {width}"


def _reordered(x: Array, order: HeadOrder) -> Array:
    """Columns of codes, scales or units, each for some weights of a row, when the heads in it move."""
    width = len(order.positions) // x.shape[1]  # weights of a column
    part = min(width, _UNIT)
    return np.repeat(x, width // part, axis=1)[:, order.positions[::part] // part]


def _in_file(rows: slice | Array, order: HeadOrder | None) -> slice | Array:
    """Where the file has the rows that neutral ones are."""
    return order.positions[rows] if order is not None and order.axis == 0 else rows


def _image_tokens(model: GGUFFile) -> dict[str, int | None]:
    spellings = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return dict(zip(spellings, token_ids(model, spellings.values()), strict=True))
