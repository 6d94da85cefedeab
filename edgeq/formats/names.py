"""What tensors are called: edgeq's neutral names, the hub's, and those of MLX's files.

A neutral name is the hub's without `model.language_model.`, and with `visual.` for `model.visual.`: `layers.0.mlp.
up_proj.weight`, `lm_head.weight`, `mtp.fc.weight`, `visual.pos_embed.weight`.
"""

from __future__ import annotations

import re

__all__ = ["hub_name", "is_usual", "mlx_module", "neutral_module", "neutral_name"]

# What stands before the names in files, in any number and order: `model.language_model.` (the hub),
# `language_model.model.` (MLX), and what training wraps a model in.
_WRAPPERS = {"model", "language_model", "base_model", "module"}
_ANYWHERE = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}  # around any module
_TOWER = {"visual", "vision_tower"}
_OUTERMOST = {"layers", "embed_tokens", "norm", "mtp", "lm_head"}
_USUAL = re.compile(
    r"(model\.language_model\.|language_model\.model\.|model\.)(layers|embed_tokens|norm)\."
    r"|(language_model\.)?(lm_head|mtp)\.|(model\.visual|vision_tower|visual)\."
)
_TOP_LEVEL = ("mtp.", "lm_head")  # beside the language model, not in it


def neutral_name(file_name: str) -> str | None:
    """The neutral name of a tensor in a safetensors file; None for a name of no known layout."""
    path = [part for part in file_name.split(".") if part not in _ANYWHERE]
    start = next((i for i, part in enumerate(path) if part not in _WRAPPERS), len(path))
    first, *rest = path[start:] or [""]
    if first in _TOWER:
        return ".".join(["visual", *rest])
    return ".".join([first, *rest]) if start or first in _OUTERMOST else None


def neutral_module(path: str) -> str:
    """The neutral name of a module, as config.json's `quantization` has them; a path of no known layout as it is."""
    return (neutral_name(f"{path}.") or f"{path}.")[:-1]


def is_usual(file_name: str) -> bool:
    """Whether transformers and mlx-lm know a tensor by this name: nothing of a training's wrappers is left in it."""
    return _USUAL.match(file_name) is not None and not _ANYWHERE & set(file_name.split("."))


def hub_name(name: str) -> str:
    """A tensor's name in the hub's multimodal layout."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name if name.startswith(_TOP_LEVEL) else f"model.language_model.{name}"


def mlx_module(name: str) -> str:
    """The path of a tensor's module in mlx-lm's, or mlx-vlm's, model, where they look for its quantization."""
    module = name.removesuffix(".weight")
    if module.startswith("visual."):
        return module.replace("visual.", "vision_tower.", 1)
    return f"language_model.{module}" if module.startswith(_TOP_LEVEL) else f"language_model.model.{module}"
