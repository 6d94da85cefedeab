"""Adapters of mlx-lm: adapter_config.json and adapters.safetensors, as `mlx_lm.lora` writes them.

Its matrices are transposed, lora_a [in, rank] and lora_b [rank, out], and its scale is used as it is. The configuration
holds everything that the training was told, of which only `fine_tune_type` and `lora_parameters` concern the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.adapters.changes import Adapter, Change, Whole
from edgeq.adapters.tensors import FLOATS, LONGEST_NAME, checked, low_rank, neutral
from edgeq.errors import ModelError
from edgeq.formats.bf16 import Array, to_float32
from edgeq.formats.safetensors import SafetensorsFile
from edgeq.numbers import number, whole_number
from edgeq.printable import brief

__all__ = ["read_mlx"]

_KINDS = ("lora", "dora", "full")
_LEAVES = ("lora_a", "lora_b", "m")
_FUSE = "fuse it into its base with mlx_lm.fuse, and give the fused folder"
_ZERO_CENTRED = ("layernorm.weight", ".q_norm.weight", ".k_norm.weight", "pre_fc_norm_hidden.weight")


def read_mlx(config: Path, values: Mapping[str, Any], weights: Path) -> Adapter:
    """An adapter of mlx-lm's; ModelError for what is none."""
    kind = values.get("fine_tune_type", "lora")
    if kind not in _KINDS:
        raise ModelError(f"{config}: fine_tune_type is {brief(kind)}, expected {', '.join(_KINDS)}", hint=_FUSE)
    file = SafetensorsFile(weights)
    changes, origin = _whole(file) if kind == "full" else _low_rank(file, config, values, dora=kind == "dora")
    base = values.get("model")
    names = {"lora": "MLX LoRA", "dora": "MLX LoRA with DoRA", "full": "MLX fine-tune of whole tensors"}
    return Adapter(
        weights.parent, names[kind], base if isinstance(base, str) and base else None, changes, origin, (file,),
        ties=True,  # its embedding multiplies as a head with the adapter, too
    )  # fmt: skip


def _low_rank(
    file: SafetensorsFile, config: Path, values: Mapping[str, Any], *, dora: bool
) -> tuple[dict[str, tuple[Change, ...]], dict[str, str]]:
    parameters = values.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise ModelError(f"{config}: lora_parameters is {brief(parameters)}, expected an object", hint=_FUSE)
    rank = whole_number(parameters.get("rank"), f"{config}: lora_parameters.rank", 1, 1 << 16, hint=_FUSE)
    scale = number(parameters.get("scale"), f"{config}: lora_parameters.scale", -1e6, 1e6, hint=_FUSE)
    alpha = parameters.get("alpha")
    if alpha is not None and alpha != rank:  # versions before 0.20 multiplied by alpha / rank, later ones do not
        raise ModelError(
            f"{config}: lora_parameters.alpha is {brief(alpha)}, which mlx-lm's versions use in two ways",
            hint="remove it, and multiply scale by alpha / rank if it was used",
        )
    pieces = dict[str, dict[str, str]]()
    for name in file.tensors:
        module, _, leaf = name.rpartition(".")
        if leaf not in _LEAVES or len(name) > LONGEST_NAME:
            raise ModelError(f"{file.path}: edgeq does not know what {name} does to a model", hint=_FUSE)
        pieces.setdefault(module, {})[leaf] = name
    changes, origin = dict[str, tuple[Change, ...]](), dict[str, str]()
    for module, names in pieces.items():
        missing = [leaf for leaf in _LEAVES if leaf not in names and (dora or leaf != "m")]
        if missing or ("m" in names and not dora):
            problem = f"has no {missing[0]}" if missing else f"has lengths of rows, which a {_KINDS[0]} has not"
            raise ModelError(f"{file.path}: {module} {problem}", hint="take both files from one adapter")
        a, b = (checked(file, names[leaf], FLOATS).T for leaf in ("lora_a", "lora_b"))
        lengths = checked(file, names["m"], FLOATS) if dora else None
        tensor = neutral(f"{module}.weight")
        if tensor == "embed_tokens.weight":  # lora_a [rows, rank], lora_b [rank, columns]
            a, b = b.T, a.T
        change = low_rank(file, names["lora_a"], a, b, scale, lengths, as_stored=not dora)
        if len(change.a) != rank:
            raise ModelError(
                f"{file.path}: {module} is of rank {len(change.a)}, {config.name} says {rank}",
                hint="take both files from one adapter",
            )
        if tensor in changes:
            raise ModelError(f"{file.path}: {module} is there twice under two names", hint=_FUSE)
        changes[tensor], origin[tensor] = (change,), names["lora_a"]
    return changes, origin


def _whole(file: SafetensorsFile) -> tuple[dict[str, tuple[Change, ...]], dict[str, str]]:
    changes, origin = dict[str, tuple[Change, ...]](), dict[str, str]()
    for name in file.tensors:
        tensor = neutral(name)
        if tensor in changes:
            raise ModelError(f"{file.path}: {name} and {origin[tensor]} are the same tensor", hint=_FUSE)
        changes[tensor], origin[tensor] = (Whole(_hub(tensor, checked(file, name, FLOATS))),), name
    return changes, origin


def _hub(tensor: str, x: Array) -> Array:
    """A tensor in the hub's convention: norms without the 1 that MLX adds, the convolution's channels in the middle."""
    if tensor == "norm.weight" or tensor.endswith(_ZERO_CENTRED):
        return to_float32(x) - np.float32(1)
    return np.moveaxis(x, -1, 1) if tensor.endswith("conv1d.weight") and x.ndim == 3 else x
