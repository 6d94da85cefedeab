"""Tiny checkpoints in the layouts of other quantizers, packed here from the formats' descriptions, bit by bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.formats.bf16 import Array, Float32, from_float32, round_to, to_float32
from edgeq.formats.safetensors import DTYPES, SafetensorsFile, SafetensorsWriter

Tensors = dict[str, tuple[str, Array]]  # type by safetensors' name, and values


def stream(codes: Array, bits: int) -> Array:
    """Codes [n, count] as words of 32 bits, each row one stream, lowest bit first."""
    each = (codes[..., None].astype(np.int64) >> np.arange(bits) & 1).astype(np.uint8)
    flat = each.reshape(len(codes), -1)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 32)))
    return np.packbits(flat, axis=1, bitorder="little").view(np.int32)


@dataclass
class Form:
    """How matrices are quantized and packed; `config` is config.json's quantization_config."""

    kind: str  # "gptq", "gptq_v2", "gemm", "gemv", "pack", "int8", "float8", "mxfp8", "mxfp4"
    bits: int = 4
    group: int = 32  # -1: one for a row
    sym: bool = False
    order: bool = False
    scales: str = "F16"
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> dict[str, Any]:
        """What the format's own tool writes to config.json."""
        if self.kind.startswith("gptq"):
            own = {"quant_method": "gptq", "checkpoint_format": self.kind, "desc_act": self.order, "sym": self.sym}
        elif self.kind.startswith("gem"):
            own = {"quant_method": "awq", "version": self.kind, "zero_point": True}
        elif self.kind == "float8":
            return {"quant_method": "fp8", "weight_block_size": [48, self.group], "fmt": "e4m3", **self.config}
        else:
            number = "float" if self.kind.startswith("mxfp") else "int"
            weights = {"num_bits": self.bits, "type": number, "symmetric": self.sym, "group_size": self.group}
            groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
            names = {"pack": "pack-quantized", "int8": "int-quantized", "mxfp8": "mxfp8-quantized"}
            names["mxfp4"] = "mxfp4-pack-quantized"
            return {
                "quant_method": "compressed-tensors",
                "format": names[self.kind],
                "config_groups": groups,
                **self.config,
            }
        return {"bits": self.bits, "group_size": self.group, **own, **self.config}

    def pack(self, shape: tuple[int, int], rng: np.random.Generator) -> tuple[Tensors, Float32]:
        """The tensors of a random matrix, and its weights."""
        out, width = shape
        size = width if self.group == -1 else self.group
        count = -(-width // size)
        scales = to_float32(round_to(rng.uniform(1e-3, 2e-2, (out, count)).astype(np.float32), DTYPES[self.scales]))
        stored = (self.scales, round_to(scales, DTYPES[self.scales]))
        columns = np.arange(width) // size
        if self.kind in ("float8", "mxfp8", "mxfp4"):
            return self._float8(shape, rng)
        if self.order:
            columns = rng.permutation(columns)
        codes = rng.integers(0, 1 << self.bits, shape)
        zeros = rng.integers(1, 1 << self.bits, (out, count))
        if self.sym:
            zeros[:] = 1 << (self.bits - 1)
        weights = (codes - zeros[:, columns]).astype(np.float32) * scales[:, columns]
        transposed = (self.scales, stored[1].T)
        match self.kind:
            case "gptq" | "gptq_v2":
                offset = int(self.kind == "gptq")
                parts: Tensors = {
                    "qweight": ("I32", stream(codes, self.bits).T),
                    "qzeros": ("I32", stream(zeros.T - offset, self.bits)),
                    "scales": transposed,
                    "g_idx": ("I32", columns.astype(np.int32)),
                }
            case "gemm":
                order = np.arange(out).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)
                parts = {
                    "qweight": ("I32", stream(codes.T[:, order], 4)),
                    "qzeros": ("I32", stream(zeros.T[:, order], 4)),
                    "scales": transposed,
                }
            case "gemv":
                wide = -(-count // 8) * 8
                padded = np.pad(stored[1], ((0, 0), (0, wide - count)))
                parts = {
                    "qweight": ("I32", stream(codes, 4)),
                    "qzeros": ("I32", stream(np.pad(zeros, ((0, 0), (0, wide - count))), 4)),
                    "scales": (self.scales, padded),
                }
            case "pack":
                parts = {
                    "weight_packed": ("I32", stream(codes, self.bits)),
                    "weight_scale": stored,
                    "weight_shape": ("I64", np.array(shape)),
                }
                if not self.sym:
                    parts["weight_zero_point"] = ("I32", stream(zeros.T, self.bits).T)
                if self.order:
                    parts["weight_g_idx"] = ("I32", columns.astype(np.int32))
            case "int8":
                parts = {"weight": ("I8", (codes - 128).astype(np.int8)), "weight_scale": stored}
                if not self.sym:
                    parts["weight_zero_point"] = ("I8", (zeros - 128).astype(np.int8))
        return parts, weights

    def _float8(self, shape: tuple[int, int], rng: np.random.Generator) -> tuple[Tensors, Float32]:
        out, width = shape
        codes = rng.integers(0, 126, shape) | rng.integers(0, 2, shape) << 7
        exponent, fraction, sign = codes >> 3 & 15, codes & 7, 1 - 2 * (codes >> 7)
        values = sign * np.where(exponent > 0, (8 + fraction) * 2.0 ** (exponent - 10), fraction * 2.0**-9)
        block = 48 if self.kind == "float8" else 1
        count = (-(-out // block), -(-width // self.group))
        if self.kind == "float8":
            stored = round_to(rng.uniform(1e-4, 1e-3, count).astype(np.float32), DTYPES[self.scales])
            grid, scales = to_float32(stored), ("weight_scale_inv", (self.scales, stored))
        else:
            powers = rng.integers(113, 118, count).astype(np.uint8)
            grid, scales = np.float32(2) ** (powers.astype(np.float32) - 127), ("weight_scale", ("U8", powers))
        stored_codes = ("weight", ("F8_E4M3", codes.astype(np.uint8)))
        if self.kind == "mxfp4":
            codes &= 15
            values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])[codes]
            stored_codes = ("weight_packed", ("U8", (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)))
        parts: Tensors = dict([stored_codes, scales])
        return parts, values.astype(np.float32) * grid[np.arange(out) // block][:, np.arange(width) // self.group]


def linear(name: str) -> bool:
    """What quantizers take by default: the matrices of the layers without DeltaNet's a and b."""
    return ".layers." in name and name.endswith(("_proj.weight", ".in_proj_qkv.weight", ".in_proj_z.weight"))


def read_tensors(folder: Path) -> Tensors:
    file = SafetensorsFile(folder / "model.safetensors")
    return {name: (info.dtype, np.array(file.array(name))) for name, info in file.tensors.items()}


def write_tensors(path: Path, tensors: Tensors) -> None:
    with SafetensorsWriter(path, {name: (dtype, x.shape) for name, (dtype, x) in tensors.items()}) as file:
        for name, (_, x) in tensors.items():
            file.write(name, x)


def pack_folder(
    source: Path, out: Path, form: Form, chosen: Callable[[str], bool] = linear, seed: int = 1
) -> dict[str, Float32]:
    """The checkpoint with chosen matrices replaced by random quantized ones, whose weights are returned by their names
    in `source`."""
    rng = np.random.default_rng(seed)
    tensors, weights = read_tensors(source), dict[str, Float32]()
    for name in [name for name in tensors if chosen(name)]:
        _, old = tensors.pop(name)
        parts, weights[name] = form.pack(old.shape, rng)
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{part}": value for part, value in parts.items()}
    copy_beside(source, out, quantization_config=form.method)
    write_tensors(out / "model.safetensors", tensors)
    return weights


def twin(source: Path, out: Path, weights: dict[str, Float32], dtype: str = "F32") -> None:
    """The same checkpoint unquantized."""
    tensors = read_tensors(source) | {
        name: (dtype, from_float32(x) if dtype == "BF16" else x) for name, x in weights.items()
    }
    copy_beside(source, out)
    write_tensors(out / "model.safetensors", tensors)


def copy_beside(source: Path, out: Path, **config: Any) -> None:
    """All files but the weights, with other fields in config.json."""
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.name != "config.json":
            (out / path.name).write_bytes(path.read_bytes())
    values = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(values | config))
