"""Matrices that other tools have quantized: what a checkpoint folder's tensors and its configuration say of them.

The tensors decide. Their names and types tell the format, their shapes the bits and the groups, `g_idx` the order of
columns, whatever the patterns of `dynamic`, `extra_config`, `ignore` or `modules_to_not_convert` say of a module. The
configuration has to name what shapes leave open: which of two formats it is that have the same names, whether zero
points are stored less 1, and what a group's size is where the last one is cut short.

What is not read is named: see `what_it_is`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.config import read_json
from edgeq.errors import ModelError
from edgeq.formats.bf16 import Array
from edgeq.formats.packed import (
    AWQ,
    FLOAT8,
    GPTQ,
    AWQRows,
    CompressedTensors,
    Float8,
    Grouped,
    Indices,
    Int8,
    Microscaled,
    Packed,
)
from edgeq.formats.safetensors import TensorInfo
from edgeq.inputs import exists
from edgeq.printable import brief
from edgeq.weights import TensorSpec

__all__ = ["Packing", "Unfit", "weight_name", "without_quantization"]

_KEYS = ("quantization_config", "compression_config")
_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")  # where older exports say it
_FLOATS = ("F16", "BF16", "F32")
_BLOCK = (128, 128)  # of FP8 weights, rows and columns
_POWERS = ("U8", "F8_E8M0")
_WORDS = ("I32", "U32")
_DECIDING = ("quant_method", "checkpoint_format", "version", "packing_format")
_IN_PLACE_OF_WEIGHT = (".qweight", ".weight_packed")
_SHOW_QUANTIZATION = (*_IN_PLACE_OF_WEIGHT, ".weight_scale", ".weight_scale_inv")
_FLOAT8_SCALES = ("weight_scale_inv", "weight_scale", "scale")
_PARTS = {
    "qweight": ("qweight", "qzeros", "scales", "g_idx"),
    "weight_packed": ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    "weight": ("weight", *_FLOAT8_SCALES, "weight_zero_point"),
}
_OF_ACTIVATIONS = (  # for kernels that compute in 8 bits
    "input_scale", "input_zero_point", "input_scale_ub", "activation_scale", "act_scale", "output_scale",
    "output_zero_point", "input_global_scale", "k_scale", "v_scale",
)  # fmt: skip

_BY_NAME = (  # ends of names that only one format has
    (".bitsandbytes__nf4", "bitsandbytes NF4"),
    (".bitsandbytes__fp4", "bitsandbytes FP4"),
    (".SCB", "bitsandbytes 8-bit"),
    (".weight.absmax", "bitsandbytes 4-bit"),
    (".weight_scale_2", "NVFP4"),
    (".weight_global_scale", "NVFP4"),
    (".W_q", "HQQ"),
    (".q_invperm", "EXL2"),
    (".q_scale_max", "EXL2"),
    (".trellis", "EXL3"),
    (".codebooks", "AQLM"),
    (".Qidxs", "QuIP#"),
    (".centroids.weight", "VPTQ"),
    (".pairs", "ParoQuant"),
    (".B_24", "Marlin 2:4"),
    (".workspace", "Marlin"),
    (".bitmask", "sparse compressed-tensors"),
    (".weight._data", "Quanto"),
    (".weight_qdata", "torchao"),
)
_METHODS = {
    "bitsandbytes": "bitsandbytes",
    "hqq": "HQQ",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "quip": "QuIP#",
    "eetq": "EETQ",
    "higgs": "HIGGS",
    "quanto": "Quanto",
    "torchao": "torchao",
    "mxfp4": "MXFP4",
    "bitnet": "BitNet",
    "spqr": "SpQR",
    "paroquant": "ParoQuant",
    "qqq": "QQQ",
}
_READ = ("gptq", "awq", "auto-round", "compressed-tensors", "fp8", "fbgemm-fp8", "modelopt")
_READ_KINDS = (
    "FP8",
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed",
    "mxfp4",
    "mxfp8",
    "dense",
)
_HINT = "use the unquantized model, a GGUF file, or one quantized for MLX or as GPTQ, AWQ or compressed-tensors W4A16"


class Unfit(Exception):
    """What is wrong with one matrix, for the list of a checkpoint's problems."""


def weight_name(file_name: str) -> str:
    """The name that a tensor's weight would have unquantized: `a.weight` for `a.qweight` and `a.weight_packed`."""
    for end in _IN_PLACE_OF_WEIGHT:
        if file_name.endswith(end):
            return file_name.removesuffix(end) + ".weight"
    return file_name


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without what it says of a quantization."""
    kept = {key: value for key, value in config.items() if key not in _KEYS}
    if isinstance(text := config.get("text_config"), Mapping):
        kept["text_config"] = {key: value for key, value in text.items() if key not in _KEYS}
    return kept


class Packing:
    """The quantized matrices of a folder, by their files' names."""

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorInfo],
        array: Callable[[str], Array],
    ) -> None:
        self._path, self._tensors, self._array = path, tensors, array
        beside = any(name.endswith(_SHOW_QUANTIZATION) for name in tensors)
        files = [path / name for name in _FILES if beside and exists(path / name)]
        self.files = [path / "config.json", *files]
        said = _said(config, files)
        self.block, self._where = _one_block(path, said), said[0][0] if said else "config.json"
        method = self.block.get("quant_method")
        self.method = str(method).lower().replace("_", "-").removeprefix("intel/") if method is not None else None
        self._numbers = {key: set(_mentioned(self.block, keys)) for key, keys in _SAID.items()}
        self.labels_of: dict[str, str] = {}  # "GPTQ 4-bit g128", by the matrices' neutral names

    # --- what it is --------------------------------------------------------------------------------------------------

    def what_it_is(self) -> str | None:
        """The name of a quantization that edgeq does not read; None if the tensors show none."""
        for end, kind in _BY_NAME:
            if any(name.endswith(end) for name in self._tensors):
                return kind
        for name, info in self._tensors.items():
            if name.endswith(".weight_packed") and info.dtype == "U8":
                scale = self._tensors.get(name.removesuffix("packed") + "scale")
                if scale is None or scale.dtype not in _POWERS:
                    return "NVFP4"
            if info.dtype == "F4":
                return "4-bit floats"
            if info.dtype.startswith("F6_"):
                return "6-bit floats"
            if info.dtype.endswith("FNUZ"):
                return f"FP8 of the kind {info.dtype}"
        return None

    def unread_method(self) -> str | None:
        """The method that the configuration names, if it is none that edgeq reads."""
        if self.method in (None, *_READ):
            kind = self.block.get({"compressed-tensors": "format", "modelopt": "quant_algo"}.get(self.method or "", ""))
            unread = isinstance(kind, str) and not kind.startswith(_READ_KINDS)
            return f"{self.method} {brief(kind)}" if unread else None
        return _METHODS.get(str(self.method), brief(self.method))

    def refuse(self, kind: str) -> ModelError:
        """The error for what edgeq does not read."""
        return ModelError(f"{self._path} is quantized as {kind}, which edgeq does not read", hint=_HINT)

    # --- one matrix --------------------------------------------------------------------------------------------------

    def open(self, spec: TensorSpec, file_name: str) -> Packed | None:
        """The quantized matrix whose weight is stored as `file_name`; None if it is not quantized so. Raises Unfit."""
        module, _, part = file_name.rpartition(".")
        info = self._tensors[file_name]
        if part not in _PARTS or (part == "weight" and info.dtype not in (*FLOAT8, "I8")):
            return None
        if len(spec.shape) != 2:
            raise Unfit(f"{file_name} is quantized, which edgeq reads for matrices only")
        matrix, label = self._opened(_Module(spec, module, self._tensors, self._array), part)
        self.labels_of[spec.name] = label
        return matrix

    def parts(self, file_name: str) -> set[str]:
        """The tensors that belong to a quantized matrix, those included that only concern activations, and a bias that
        is nothing but zeros."""
        module, _, part = file_name.rpartition(".")
        names = {f"{module}.{part}" for part in (*_PARTS[part], *_OF_ACTIVATIONS)}
        bias = f"{module}.bias"
        if bias in self._tensors and not self._array(bias).any():
            names.add(bias)
        return names

    def leftovers(self, file_name: str) -> set[str]:
        """What quantizing has left beside a weight that was saved as it is, in compressed-tensors' format "dense"."""
        module, _, part = file_name.rpartition(".")
        if part != "weight" or self.method != "compressed-tensors" or self.block.get("format") != "dense":
            return set()
        return {f"{module}.{part}" for part in (*_PARTS["weight_packed"][1:], *_OF_ACTIVATIONS)}

    def _opened(self, m: _Module, part: str) -> tuple[Packed, str]:
        if part == "qweight":
            layout = self._layout(m)
            return self._awq(m, layout) if layout in ("gemm", "gemv") else self._gptq(m, int(layout == "gptq"))
        if part == "weight_packed":
            return self._compressed(m)
        return self._int8(m) if m.info("weight").dtype == "I8" else self._float8(m)

    def _layout(self, m: _Module) -> str:
        """How qweight is packed: "gptq" (its first version), "gptq_v2", "gemm" or "gemv"."""
        block, found = self.block, ""
        match self.method:
            case "gptq":
                key = "checkpoint_format" if "checkpoint_format" in block else "format"
                found = str(block.get(key, "gptq")).lower()
                if found in ("gptq", "gptq_v2") and not block.get("is_marlin_format"):
                    return found
            case "awq":
                key = next((key for key in ("version", "checkpoint_format", "format") if key in block), "version")
                found = str(block.get(key, "gemm")).lower()
                if found in ("gemm", "gemv"):
                    return found
            case "auto-round":
                key = "packing_format" if "packing_format" in block else "backend"
                found = str(block.get(key, "")).lower()
                if not str(block.get("data_type", "int")).startswith("int"):
                    key, found = "data_type", str(block["data_type"])
                elif block.get("rotation_config"):
                    key, found = "rotation_config", str(block["rotation_config"])
                elif "awq" in found:
                    return "gemm"
                elif "gptq" in found and "gptqmodel" not in found:
                    return "gptq"
                elif found.startswith("auto_round"):
                    return "gptq_v2"
            case None:
                raise ModelError(
                    f"{self._path}: {self._where} says nothing of how {m.name}.qweight is packed",
                    hint="download all files of the model again, config.json and quantize_config.json too",
                )
            case _:
                raise self.refuse(self.unread_method() or f"{self.method}, with {m.name}.qweight")
        raise ModelError(f"{self._path}: {self._where} has {key} {brief(found)}, which edgeq does not read", hint=_HINT)

    def _gptq(self, m: _Module, offset: int) -> tuple[Packed, str]:
        rows = m.info("qweight").shape[0] if m.info("qweight").shape else 0
        possible = (
            (2, 3, 4, 5, 6, 8) if self.method == "auto-round" else (2, 3, 4, 8)
        )  # GPTQ has other layouts for 5, 6
        bits = self._bits(m, "qweight", 32 * rows, m.width, possible)
        codes = m.array("qweight", (m.width * bits // 32, m.out), _WORDS)
        scales = m.array("scales", (None, m.out), _FLOATS)
        zeros = m.array("qzeros", (len(scales), -(-m.out * bits // 32)), _WORDS)
        groups, size = self._groups(m, len(scales), "g_idx")
        matrix = GPTQ(codes.view(np.uint32), zeros.view(np.uint32), scales, bits, groups, offset)
        return matrix, self._label("AutoRound" if self.method == "auto-round" else "GPTQ", matrix, size)

    def _awq(self, m: _Module, layout: str) -> tuple[Packed, str]:
        self._bits(m, "qweight", 4, 1, (4,))
        name = "AutoRound" if self.method == "auto-round" else "AWQ"
        matrix: Grouped
        if layout == "gemm":
            codes = m.array("qweight", (m.width, m.out // 8), _WORDS)
            scales = m.array("scales", (None, m.out), _FLOATS)
            zeros = m.array("qzeros", (len(scales), m.out // 8), _WORDS)
            groups, size = self._groups(m, len(scales), None)
            matrix = AWQ(codes.view(np.uint32), zeros.view(np.uint32), scales, groups)
            return matrix, self._label(name, matrix, size)
        codes = m.array("qweight", (m.out, m.width // 8), _WORDS)
        scales = m.array("scales", (m.out, None), _FLOATS)
        sizes = {size if size > 0 else m.width for size in self._numbers["group"]}
        if len(sizes) != 1 or m.width % (size := sizes.pop()) or scales.shape[1] < m.width // size:
            raise Unfit(f"{m.name}.scales is {list(scales.shape)}, which no group_size of {self._where} makes")
        zeros = m.array("qzeros", (m.out, scales.shape[1] // 8), _WORDS)
        matrix = AWQRows(codes.view(np.uint32), zeros.view(np.uint32), scales, _columns(m.width, size))
        return matrix, self._label(name, matrix, size)

    def _compressed(self, m: _Module) -> tuple[Packed, str]:
        self._check_compressed()
        packed = m.info("weight_packed")
        if packed.dtype == "U8":
            codes = m.array("weight_packed", (m.out, m.width // 2), ("U8",))
            return Microscaled(codes, m.array("weight_scale", (m.out, m.width // 32), _POWERS), "mxfp4"), "MXFP4"
        columns = packed.shape[1] if len(packed.shape) == 2 else 0
        bits = self._bits(m, "weight_packed", 32 * columns, m.width, (2, 3, 4, 5, 6, 8))
        codes = m.array("weight_packed", (m.out, m.width * bits // 32), _WORDS)
        if m.has("weight_shape") and (shape := m.plain("weight_shape").tolist()) != [m.out, m.width]:
            raise Unfit(f"{m.name}.weight_shape says {shape}, expected {[m.out, m.width]}")
        scales = m.scales("weight_scale")
        zeros: Array | None = None
        if m.has("weight_zero_point") and m.info("weight_zero_point").dtype == "I8":  # early versions do not pack them
            zeros = m.array("weight_zero_point", scales.shape, ("I8",))
        elif m.has("weight_zero_point"):
            shape = (-(-m.out * bits // 32), scales.shape[1])
            zeros = m.array("weight_zero_point", shape, _WORDS).view(np.uint32)
        groups, size = self._groups(m, scales.shape[1], "weight_g_idx")
        matrix = CompressedTensors(codes.view(np.uint32), zeros, scales, bits, groups)
        return matrix, self._label("compressed-tensors", matrix, size)

    def _int8(self, m: _Module) -> tuple[Packed, str]:
        if self.method != "compressed-tensors":
            raise Unfit(f"{m.name}.weight is I8, which edgeq reads from compressed-tensors only")
        self._check_compressed()
        values, scales = m.array("weight", (m.out, m.width), ("I8",)), m.scales("weight_scale")
        offsets = m.scales("weight_zero_point", ("I8",)) if m.has("weight_zero_point") else None
        if offsets is not None and offsets.shape != scales.shape:
            raise Unfit(f"{m.name} has zero points {list(offsets.shape)} and scales {list(scales.shape)}")
        groups, size = self._groups(m, scales.shape[1], None)
        matrix = Int8(values, offsets, scales, groups)
        return matrix, self._label("compressed-tensors", matrix, size)

    def _float8(self, m: _Module) -> tuple[Packed, str]:
        if self.method == "compressed-tensors":
            self._check_compressed()
        codes = m.array("weight", (m.out, m.width), FLOAT8)
        part = next((part for part in _FLOAT8_SCALES if m.has(part)), None)
        if part is None:
            raise Unfit(f"{m.name}.weight is {m.info('weight').dtype} without {m.name}.weight_scale")
        scales = _as_table(m.array(part, None, (*_FLOATS, *_POWERS)))
        if scales.dtype == np.uint8 and scales.shape == (m.out, m.width // 32) and m.info("weight").dtype == "F8_E4M3":
            return Microscaled(codes, scales, "mxfp8"), "MXFP8"
        counts = len(scales), scales.size // len(scales)
        block = self._block_of(m, counts, part)
        kinds = {(1, 1): "per tensor", (m.out, 1): "per channel"}
        kind = kinds.get(counts, f"blocks of {block[0]} x {block[1]}")
        return Float8(codes, scales, block, m.info("weight").dtype), f"FP8 {kind}"

    def _block_of(self, m: _Module, counts: tuple[int, ...], part: str) -> tuple[int, int]:
        """Rows and columns of one scale, where there are `counts` of them."""
        if counts in ((1, 1), (m.out, 1)):
            return m.out // counts[0], m.width
        rows, columns = counts
        said = [*_blocks(self.block), *((1, size) for size in self._numbers["group"] if size > 0)]
        even = [(m.out // rows, m.width // columns)] if m.out % rows == 0 and m.width % columns == 0 else []
        for a, b in said or [_BLOCK, *even]:  # where nothing is said, what transformers takes
            if (-(-m.out // a), -(-m.width // b)) == counts:
                return a, b
        raise Unfit(f"{m.name}.{part} is {list(counts)}, which no block size of {self._where} makes")

    # --- what the configuration has to say ---------------------------------------------------------------------------

    def _bits(self, m: _Module, part: str, found: int, per: int, possible: tuple[int, ...]) -> int:
        """Bits of a code, `found` / `per`."""
        bits, rest = divmod(found, per)
        said = self._numbers["bits"]
        if rest or bits not in possible or (said and bits not in said):
            shape = list(m.info(part).shape)
            expected = " or ".join(map(str, sorted(said) or possible))
            raise Unfit(f"{m.name}.{part} is {shape}, which is not {[m.out, m.width]} at {expected} bits")
        return bits

    def _groups(self, m: _Module, count: int, order: str | None) -> tuple[Indices, int]:
        """The group of every column, and how many columns a group has."""
        sizes = {min(size, m.width) if size > 0 else m.width for size in self._numbers["group"]}
        fitting = {size for size in sizes if -(-m.width // size) == count}
        if count == 1:
            fitting = {m.width}
        if order is not None and m.has(order):
            groups = m.array(order, (m.width,), ("I32", "I64")).astype(np.intp)
            unused = len(groups) > 0 and (groups == groups[0]).all() and (count > 1 or groups[0] == -1)
            if not unused and (groups.min() < 0 or groups.max() >= count):
                raise Unfit(f"{m.name}.{order} has groups {groups.min()} to {groups.max()}, expected 0 to {count - 1}")
            if not unused:
                regular = next((size for size in fitting if np.array_equal(groups, _columns(m.width, size))), None)
                return (groups, -(-m.width // count)) if regular is None else (_columns(m.width, regular), regular)
        if len(fitting) != 1:
            fitting &= {m.width // count} if count and m.width % count == 0 else set()
        if not fitting:
            said = ", ".join(map(str, sorted(self._numbers["group"]))) or "none"
            raise Unfit(f"{m.name} has {count} groups in rows of {m.width}; {self._where} has group_size {said}")
        (size,) = fitting
        return _columns(m.width, size), size

    def _check_compressed(self) -> None:
        """ModelError for what changes the arithmetic and is not in the tensors of the matrix."""
        sparsity, transforms = self.block.get("sparsity_config"), self.block.get("transform_config")
        if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
            raise self.refuse(f"sparse compressed-tensors ({brief(sparsity.get('format'))})")
        if isinstance(transforms, Mapping) and transforms.get("config_groups"):
            raise ModelError(
                f"{self._path}: {self._where} has transform_config: its activations are to be rotated, which edgeq "
                "does not do",
                hint="use a checkpoint without transforms",
            )

    def _label(self, method: str, matrix: Grouped, size: int) -> str:
        width = len(matrix.groups)
        if size >= width:  # one group: of the size that is said, which may be more than there is
            size = min((said for said in self._numbers["group"] if said >= width), default=-1)
        groups = f"g{size}" if size > 0 else "per channel"
        in_order = matrix.run or (np.diff(matrix.groups) >= 0).all()
        return f"{method} {matrix.bits}-bit {groups}" + ("" if in_order else ", columns in act order")


class _Module:
    """The tensors of one module."""

    def __init__(
        self, spec: TensorSpec, name: str, tensors: Mapping[str, TensorInfo], array: Callable[[str], Array]
    ) -> None:
        self.name, self._tensors, self.plain_array = name, tensors, array
        self.out, self.width = spec.shape

    def has(self, part: str) -> bool:
        return f"{self.name}.{part}" in self._tensors

    def info(self, part: str) -> TensorInfo:
        if not self.has(part):
            raise Unfit(f"missing {self.name}.{part}")
        return self._tensors[f"{self.name}.{part}"]

    def plain(self, part: str) -> Array:
        return self.plain_array(f"{self.name}.{part}")

    def array(self, part: str, shape: tuple[int | None, ...] | None, dtypes: tuple[str, ...]) -> Array:
        """A part that has to be of this shape (None: any number but 0) and of one of these types."""
        info = self.info(part)
        if info.dtype not in dtypes:
            raise Unfit(f"{self.name}.{part} is {info.dtype}, expected {', '.join(dtypes)}")
        fits = shape is None or (
            len(info.shape) == len(shape)
            and all(
                have == want if want is not None else have > 0 for have, want in zip(info.shape, shape, strict=True)
            )
        )
        if not fits or 0 in info.shape:
            expected = ["any" if n is None else n for n in shape or ()]
            raise Unfit(f"{self.name}.{part} is {list(info.shape)}, expected {expected}")
        return self.plain(part)

    def scales(self, part: str, dtypes: tuple[str, ...] = _FLOATS) -> Array:
        """Scales, or zero points, [out, groups] of a matrix that may also have one for a row or for all of it."""
        x = self.array(part, None, dtypes)
        x = _as_table(x)
        if len(x) not in (1, self.out) or (len(x) == 1 and x.size > 1):
            raise Unfit(f"{self.name}.{part} is {list(self.info(part).shape)}, expected {[self.out, 'groups']}")
        return np.broadcast_to(x, (self.out, x.size // len(x)))


def _as_table(x: Array) -> Array:
    """Scales for blocks, rows or all of a matrix, in two dimensions."""
    return x if x.ndim == 2 else x.reshape(-1, 1)


@cache
def _columns(width: int, size: int) -> Indices:
    """The group of every column, where groups are `size` columns in turn."""
    groups: Indices = np.arange(width) // size
    groups.flags.writeable = False
    return groups


def _said(config: Mapping[str, Any], files: list[Path]) -> Sequence[tuple[str, Mapping[str, Any]]]:
    """What is said of the quantization, and where: config.json first."""
    text = config.get("text_config")
    sections = (config, text if isinstance(text, Mapping) else {})
    blocks = ((f"config.json's {key}", section.get(key)) for section in sections for key in _KEYS)
    said = [(where, _set(block)) for where, block in blocks if isinstance(block, Mapping) and block][:1]
    for path in files:
        values = read_json(path)
        inner = values.get("quantization")  # of hf_quant_config.json
        said.append((path.name, _set(inner if isinstance(inner, Mapping) else values)))
    return said


def _set(block: Mapping[str, Any]) -> dict[str, Any]:
    """What has a value: null is for what is not set."""
    return {key: value for key, value in block.items() if value is not None}


def _one_block(path: Path, said: list[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """All that is said; ModelError where it contradicts itself in what decides the values."""
    block: dict[str, Any] = {}
    for where, values in reversed(said):
        for key in _DECIDING:
            ours, other = str(values.get(key)).lower(), str(block.get(key)).lower()
            if key in values and key in block and ours != other:
                raise ModelError(
                    f"{path}: {where} and {said[-1][0]} differ in {key}: {brief(values[key])} and {brief(block[key])}",
                    hint="download both again, or move the one away that is not of these weights",
                )
        block |= values
    if said and said[-1][0] in _FILES:  # which may leave out what they are
        method = "awq" if "w_bit" in block else "modelopt" if "quant_algo" in block else "gptq"
        block.setdefault("quant_method", method)
    return block


_SAID = {"bits": ("bits", "w_bit", "num_bits"), "group": ("group_size", "q_group_size")}


def _mentioned(block: object, keys: tuple[str, ...]) -> Iterator[int]:
    """The numbers that stand under some keys, wherever in it."""
    todo = [block]
    while todo:
        match todo.pop():
            case Mapping() as values:
                found = (values[key] for key in keys if key in values)
                yield from (n for n in found if type(n) is int and (n > 0 or n == -1))
                todo.extend(values.values())
            case list() as values:
                todo.extend(values)


def _blocks(block: object) -> Iterator[tuple[int, int]]:
    """The sizes of blocks that stand anywhere in it."""
    todo = [block]
    while todo:
        match todo.pop():
            case Mapping() as values:
                for key in ("weight_block_size", "block_structure", "block_size"):
                    match values.get(key):
                        case [int(rows), int(columns)] if rows > 0 and columns > 0:
                            yield rows, columns
                todo.extend(values.values())
            case list() as values:
                todo.extend(values)
