"""Finding out what an adapter is, and reading it.

An adapter is a folder with adapter_config.json and weights, as PEFT and mlx-lm write it, a .safetensors file in such a
folder (mlx-lm keeps one for every so many steps), a .gguf file of llama.cpp's, or a Hugging Face ID of one of these.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from pathlib import Path
from typing import NamedTuple

from edgeq.adapters.changes import Adapter
from edgeq.adapters.gguf import read_gguf
from edgeq.adapters.mlx import read_mlx
from edgeq.adapters.peft import read_peft
from edgeq.config import TextConfig, read_json
from edgeq.errors import ModelError, UsageError
from edgeq.formats.gguf import is_gguf
from edgeq.hub import find_adapter
from edgeq.identify import check_download
from edgeq.inputs import exists, expand_user, is_file, is_folder
from edgeq.printable import brief
from edgeq.weights import TensorSpec

__all__ = ["CONFIG", "Given", "given_adapters", "read_adapter", "read_folder"]

CONFIG = "adapter_config.json"
_PEFT_WEIGHTS, _MLX_WEIGHTS = "adapter_model.safetensors", "adapters.safetensors"
_LARGEST = 1000.0  # scale
_PICKLE = "adapter_model.bin"


class Given(NamedTuple):
    """An adapter as a user names it: where it is, and how strong it is to be."""

    path: Path
    scale: float


def given_adapters(adapters: str | Path | Iterable[str | Path] | None) -> list[Given]:
    """One adapter or several, each a path or a Hugging Face ID, with `:SCALE` behind it or not; downloads those that
    are on the hub and not in the cache. UsageError for what can be none.
    """
    if adapters is None:
        return []
    return [_given(str(one)) for one in ([adapters] if isinstance(adapters, str | Path) else adapters)]


def _given(text: str) -> Given:
    name, colon, number = text.rpartition(":")
    if not colon or exists(expand_user(Path(text))):
        return Given(find_adapter(text), 1.0)
    try:
        scale = float(number)
    except ValueError:
        return Given(find_adapter(text), 1.0)
    if not (isfinite(scale) and abs(scale) <= _LARGEST):
        raise UsageError(
            f"an adapter's scale is a number from -{_LARGEST:g} to {_LARGEST:g}, got {brief(number)}",
            hint="give the adapter alone for its own scale, or for example PATH:0.5",
        )
    return Given(find_adapter(name), scale)


def read_adapter(path: Path, c: TextConfig, specs: list[TensorSpec]) -> Adapter:
    """The adapter at `path`, for a model whose tensors are `specs`; ModelError for what is none."""
    if is_file(path) and is_gguf(path):
        return read_gguf(path, c, specs)
    return read_folder(path)


def read_folder(path: Path) -> Adapter:
    """The adapter of PEFT or mlx-lm in a folder, or in a file of one; ModelError for what is none."""
    path = path.parent if path.name == CONFIG else path
    folder = path if is_folder(path) else path.parent
    config = folder / CONFIG
    if not exists(config):
        inside = sorted(found.parent for found in folder.glob(f"*/{CONFIG}")) if is_folder(path) else []
        raise ModelError(
            f"{path} is not an adapter: {CONFIG} is missing",
            hint=f"give {inside[-1]}"
            if inside
            else "give the folder of a LoRA adapter of PEFT or mlx-lm, or a .gguf file",
        )
    values = read_json(config)
    is_peft = "peft_type" in values
    weights = path if is_file(path) else folder / (_PEFT_WEIGHTS if is_peft else _MLX_WEIGHTS)
    if weights.suffix != ".safetensors" or not exists(weights):
        if exists(folder / _PICKLE):
            raise ModelError(
                f"{folder / _PICKLE} is a pickle of PyTorch, which can run code when it is read",
                hint="save the adapter again with a current PEFT, which writes safetensors",
            )
        raise ModelError(f"{path} is not a whole adapter: {weights.name} is missing", hint="download the missing file")
    check_download(weights)
    return read_peft(config, values, weights) if is_peft else read_mlx(config, values, weights)
