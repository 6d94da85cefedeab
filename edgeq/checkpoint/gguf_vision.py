"""The vision tower of a GGUF model: in a file of its own beside the model ("mmproj"), or in the model's own file.

Two layouts are understood. llama.cpp's has its own names for tensors and the patch embedding in a half for each frame;
its hyperparameters are `clip.vision.*`. ollama's keeps the hub's names in part and queries, keys and values apart; its
hyperparameters are `qwen35.vision.*`, and not all are there. So what shapes tell is taken from shapes.

A tower that does not fit is no reason not to read the text: it is left out with a warning, unless it was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

from edgeq.checkpoint.gguf_layout import ARCH, PROJECTOR, VISION_ARCH, file_names, shortest
from edgeq.config import VisionConfig, parse_vision_config
from edgeq.errors import ModelError
from edgeq.formats.gguf import GGUFFile, peek
from edgeq.identify import gguf_kind
from edgeq.inputs import exists
from edgeq.weights import Role, TensorSpec, vision_tensors

__all__ = ["Tower", "find_tower", "is_vision"]

_PREFIXES = ("clip.vision.", f"{ARCH}.vision.")
_FIXED = {"attention.layer_norm_epsilon": 1e-6, "rope.freq_base": 10000.0}  # what the architecture has
_OLLAMA = {  # what the hub's names become there, in this order
    "patch_embed.proj.": "patch_embed.",
    "blocks.": "blk.",
    "attn.qkv.": "attn_qkv.",
    "attn.proj.": "attn_out.",
}
_QUANTIZABLE = (Role.LINEAR, Role.POSITION)


class Tower(NamedTuple):
    """A vision tower that fits the model.

    config, values: what it is, the latter as `vision_config` has it. names: where its tensors are by neutral name, some
    in parts. processor: the fields of preprocessor_config.json that the file knows.
    """

    file: GGUFFile
    config: VisionConfig
    values: dict[str, Any]
    names: dict[str, tuple[str, ...]]
    processor: dict[str, Any]


def is_vision(name: str) -> bool:
    """Whether a tensor of a model's file belongs to a tower."""
    return name.startswith(("v.", "mm."))


def find_tower(model: GGUFFile, given: Path | None, named: Sequence[Path] = ()) -> Tower | str | None:
    """The tower in `given`; without it the first that fits, of the files `named`, the model's own and the mmproj files
    in its folder.

    ModelError for one given that does not fit. If those found do not, what is wrong with the first, in words.
    """
    hidden_size = model.get(f"{ARCH}.embedding_length", int)
    if given is not None:
        if not exists(given):
            raise ModelError(f"{given} does not exist", hint="give the mmproj file of this model")
        return _read(GGUFFile(given), hidden_size)
    problem = None
    own = [model.path] if any(map(is_vision, model.tensors)) else []
    for path in [*named, *own, *_beside(model.path)]:
        try:
            return _read(model if path == model.path else GGUFFile(path), hidden_size)
        except ModelError as error:
            problem = problem or error
    return None if problem is None else problem.message


def _beside(path: Path) -> list[Path]:
    """The vision towers in a model's folder, by name or content, those first whose names begin most like the model's.

    Of a repository in the hub's cache also those at its top: quantizations have folders there.
    """

    def plain(other: Path) -> str:
        return other.stem.lower().replace("mmproj", "").strip("-_.")

    def shared(other: Path) -> int:
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(plain(other), plain(path), strict=False))
        return sum(1 for _ in alike)

    folders = [path.parent, *(top for top in path.parents if top.parent.name == "snapshots")]
    files = {file for folder in folders for file in folder.glob("*.[gG][gG][uU][fF]") if file != path}
    towers = [file for file in files if "mmproj" in file.name.lower() or gguf_kind(peek(file)) == "mmproj"]
    return sorted(towers, key=lambda other: (-shared(other), other.name))


def _read(file: GGUFFile, hidden_size: int) -> Tower:
    """The tower in a file; ModelError if it is another kind of tower, or of another model."""
    arch = file.get("general.architecture", str)
    if arch not in (VISION_ARCH, ARCH):
        raise ModelError(f"{file.path} is of architecture {arch!r}, not a vision tower (mmproj)")
    values = _values(file)
    config = parse_vision_config(values, hidden_size, str(file.path))
    names = {spec.name: _names(spec.name, file) for spec in vision_tensors(config)}
    problems = [problem for spec in vision_tensors(config) for problem in _problems(spec, names[spec.name], file)]
    known = {name for parts in names.values() for name in parts}
    problems += [f"unexpected {n}" for n in file.tensors if n not in known and (is_vision(n) or arch == VISION_ARCH)]
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ModelError(f"{file.path} does not hold Qwen3.5's vision tower: {problems[0]}{more}")
    return Tower(file, config, values, names, _processor(file, config))


# --- tensors ---------------------------------------------------------------------------------------------------------


def _names(name: str, file: GGUFFile) -> tuple[str, ...]:
    """A neutral tensor's name, or names, in this file; llama.cpp's if it is not there."""
    theirs = file_names(name, 0)
    plain = name.removeprefix("visual.")
    for hub, ollama in _OLLAMA.items():
        plain = plain.replace(hub, ollama)
    choices = [theirs, (f"v.{plain}",)]
    if ".attn.qkv." in name:
        choices.append(tuple(f"v.{plain}".replace("attn_qkv", part) for part in ("attn_q", "attn_k", "attn_v")))
    return next((choice for choice in choices if all(part in file.tensors for part in choice)), theirs)


def part_shape(spec: TensorSpec, parts: int) -> tuple[int, ...]:
    """The shape in the file of each of the parts that a tensor is in."""
    if spec.role is Role.PATCH:
        hidden, colours, frames, *size = spec.shape
        return (hidden, colours, *size) if parts > 1 else (hidden * colours, frames, *size)
    return (spec.shape[0] // parts, *spec.shape[1:])


def _problems(spec: TensorSpec, names: tuple[str, ...], file: GGUFFile) -> Iterator[str]:
    shape = part_shape(spec, len(names))
    for name in names:
        info = file.tensors.get(name)
        if info is None:
            yield f"missing {name} {list(shape)}"
        elif info.shape != shape:
            yield f"{name} is {list(info.shape)}, expected {list(shape)}"
        elif info.type.coding is not None and spec.role not in _QUANTIZABLE:
            yield f"{name} is {info.type.name}, which edgeq supports for matrices only"
        elif info.type.coding is not None and shape[1] % 32:
            yield f"{name} is {info.type.name} in rows of {shape[1]}, expected a multiple of 32"
        elif info.type != file.tensors[names[0]].type:
            yield f"{name} is {info.type.name}, {names[0]} {file.tensors[names[0]].type.name}"


# --- hyperparameters -------------------------------------------------------------------------------------------------


def _values(file: GGUFFile) -> dict[str, Any]:
    """The fields of `vision_config`; ModelError for a tower of another architecture."""
    for key in ("clip.projector_type", "clip.vision.projector_type"):
        if (kind := file.get(key, str, PROJECTOR)) != PROJECTOR:
            raise ModelError(f"{file.path}: {key} is {kind!r}, expected {PROJECTOR!r}")
    for key, value in _FIXED.items():
        if (found := shortest(_get(file, key, float, value))) != value:
            raise ModelError(f"{file.path}: {key} of the vision tower is {found}, expected {value}")
    for key in ("is_deepstack_layers", "deepstack_visual_indexes"):
        for prefix in _PREFIXES:
            flags = file.integers(prefix + key) if prefix + key in file else []
            if any(flags) if key.startswith("is_") else flags:
                raise ModelError(f"{file.path}: {prefix}{key} is not empty; edgeq has no deepstack")

    def shape(name: str) -> tuple[int, ...]:
        names = _names(f"visual.{name}", file)
        if names[0] not in file.tensors:
            raise ModelError(f"{file.path} holds no {names[0]}")
        first = file.tensors[names[0]].shape
        return (first[0] * len(names), *first[1:]) if len(names) == 3 else first

    positions, hidden = shape("pos_embed.weight")
    patch = shape("patch_embed.proj.weight")[-1]
    merged = shape("merger.linear_fc1.weight")[0]
    blocks = {name.split(".")[2] for name in file.tensors if name.startswith("v.blk.")}
    return {
        "model_type": "qwen3_5",
        "depth": _get(file, "block_count", int, len(blocks)),
        "hidden_size": _get(file, "embedding_length", int, hidden),
        "intermediate_size": _get(file, "feed_forward_length", int, shape("blocks.0.mlp.linear_fc1.weight")[0]),
        "num_heads": _get(file, "attention.head_count", int),
        "in_channels": _get(file, "num_channels", int, 3),
        "patch_size": _get(file, "patch_size", int, patch),
        "temporal_patch_size": _get(file, "temporal_patch_size", int, 2),
        "spatial_merge_size": _get(file, "spatial_merge_size", int, isqrt(merged // max(hidden, 1))),
        "num_position_embeddings": positions,
        "out_hidden_size": _get(file, "projection_dim", int, shape("merger.linear_fc2.weight")[0]),
        "hidden_act": "gelu_pytorch_tanh",
        "deepstack_visual_indexes": [],
    }


def _get(file: GGUFFile, key: str, kind: type[Any], default: Any = None) -> Any:
    """A hyperparameter under whatever prefix it is there, or `default`."""
    prefix = next((prefix for prefix in _PREFIXES if prefix + key in file), _PREFIXES[0])
    return file.get(prefix + key, kind, default)


def _processor(file: GGUFFile, c: VisionConfig) -> dict[str, Any]:
    """How pictures become patches, as preprocessor_config.json has it; what the file does not say is left out."""
    values: dict[str, Any] = {
        "patch_size": c.patch_size,
        "temporal_patch_size": c.temporal_patch_size,
        "merge_size": c.spatial_merge_size,
    }
    for key in ("image_mean", "image_std"):
        for prefix in _PREFIXES:
            if prefix + key in file:
                values[key] = [shortest(float(x)) for x in file.array(prefix + key)]
    edges = {
        "shortest_edge": ("clip.vision.image_min_pixels", f"{ARCH}.vision.shortest_edge"),
        "longest_edge": ("clip.vision.image_max_pixels", f"{ARCH}.vision.longest_edge"),
    }
    size = {edge: file.get(key, int) for edge, keys in edges.items() for key in keys if key in file}
    return values | ({"size": size} if size else {})
