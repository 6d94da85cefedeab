"""What tensors are called: edgeq's neutral names, the hub's, and those of MLX's files.

A neutral name is the hub's without `model.language_model.`, and with `visual.` for `model.visual.`: `layers.0.mlp.
up_proj.weight`, `lm_head.weight`, `mtp.fc.weight`, `visual.pos_embed.weight`.
"""

from __future__ import annotations

__all__ = ["hub_name", "mlx_module", "neutral_module", "neutral_name"]

_PREFIXES = (  # of names in files, and what stands for them in neutral names; the first that matches counts
    ("model.language_model.", ""),
    ("model.visual.", "visual."),
    ("language_model.model.", ""),
    ("language_model.mtp.", "mtp."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.", "visual."),
    ("mtp.", "mtp."),
    ("lm_head.", "lm_head."),
    ("model.", ""),
)
_TOP_LEVEL = ("mtp.", "lm_head")  # beside the language model, not in it


def neutral_name(file_name: str) -> str | None:
    """The neutral name of a tensor in a safetensors file; None for a name of no known layout."""
    for prefix, neutral in _PREFIXES:
        if file_name.startswith(prefix):
            return neutral + file_name[len(prefix) :]
    return None


def neutral_module(path: str) -> str:
    """The neutral name of a module, as config.json's `quantization` has them; a path of no known layout as it is."""
    return (neutral_name(f"{path}.") or f"{path}.")[:-1]


def hub_name(name: str) -> str:
    """A tensor's name in the hub's multimodal layout."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name if name.startswith(_TOP_LEVEL) else f"model.language_model.{name}"


def mlx_module(name: str) -> str:
    """The path of a tensor's module in mlx-lm's model, where it looks for the module's quantization."""
    module = name.removesuffix(".weight")
    return f"language_model.{module}" if module.startswith(_TOP_LEVEL) else f"language_model.model.{module}"
