"""LoRA adapters in GGUF, as llama.cpp's convert_lora_to_gguf writes them: `NAME.lora_a` and `NAME.lora_b` beside the
metadata `adapter.lora.alpha`. DeltaNet's value heads lie in llama.cpp's order.
"""

from __future__ import annotations

from pathlib import Path

from edgeq.adapters.changes import Adapter, Change
from edgeq.adapters.tensors import FLOATS, low_rank
from edgeq.checkpoint.gguf_layout import ARCH, file_names, head_order
from edgeq.config import TextConfig
from edgeq.errors import ModelError
from edgeq.formats.bf16 import Array, all_finite
from edgeq.formats.gguf import GGUFFile
from edgeq.identify import gguf_kind
from edgeq.weights import TensorSpec

__all__ = ["read_gguf"]

_PARTS = (".lora_a", ".lora_b")


def read_gguf(path: Path, c: TextConfig, specs: list[TensorSpec]) -> Adapter:
    """An adapter in a GGUF file for a model whose tensors are `specs`; ModelError for what is none or of another."""
    file = GGUFFile(path)
    if (kind := gguf_kind(file.single_values)) != "adapter":
        what = "a model" if kind in ("model", "part", "other") else f"a GGUF file of the kind {kind}"
        raise ModelError(f"{path} is {what}, not an adapter", hint="name the folder of an adapter, or its .gguf file")
    for key, expected in (("general.architecture", ARCH), ("adapter.type", "lora")):
        if (found := file.get(key, str)) != expected:
            raise ModelError(f"{path}: {key} is {found!r}, expected {expected!r}", hint="use an adapter of this model")
    if "adapter.alora.invocation_tokens" in file:
        raise ModelError(f"{path}: edgeq does not support adapters that tokens invoke (aLoRA)", hint="use a LoRA")
    alpha = file.get("adapter.lora.alpha", float)
    names = {file_names(spec.name, len(c.layer_types))[0]: spec for spec in specs}
    changes, origin = dict[str, tuple[Change, ...]](), dict[str, str]()
    for name in file.tensors:
        stem, part = name[: -len(_PARTS[0])], name[-len(_PARTS[0]) :]
        pair = [stem + part for part in _PARTS]
        if part not in _PARTS or stem not in names or not all(n in file.tensors for n in pair):
            raise ModelError(
                f"{path}: {name} changes no tensor of this model", hint="use an adapter of this model, whole"
            )
        spec = names[stem]
        a, b = (_array(file, n) for n in pair)
        if stem == "token_embd.weight":  # is looked up in: [rows, rank] and [columns, rank]
            a, b = b.T, a
        change = low_rank(file, name, a, b, alpha / a.shape[0] if alpha else 1.0)
        if (order := head_order(spec.name, c)) is not None and len(order.positions) in (len(b), a.shape[1]):
            a, b = (a, order.from_file(b)) if order.axis == 0 else (order.from_file(a), b)
            change = low_rank(file, name, a, b, change.scale)
        changes[spec.name], origin[spec.name] = (change,), name
    keys = (f"general.base_model.0.{key}" for key in ("repo_url", "name"))
    base = next((value for key in keys if (value := file.get(key, str, ""))), None)
    base = base.removeprefix("https://huggingface.co/") if base else None
    return Adapter(path, "GGUF LoRA", base, changes, origin, (file,))


def _array(file: GGUFFile, name: str) -> Array:
    info = file.tensors[name]
    if info.type.name not in FLOATS:
        raise ModelError(
            f"{file.path}: {name} is {info.type.name}, expected {', '.join(FLOATS)}",
            hint="convert the adapter again, with `convert_lora_to_gguf.py --outtype f16` of llama.cpp",
        )
    x: Array = file.data(name).view(info.type.layout).reshape(info.shape)
    if x.ndim != 2 or not all_finite(x):
        raise ModelError(f"{file.path}: {name} is no matrix of numbers", hint="download or convert the adapter again")
    return x
