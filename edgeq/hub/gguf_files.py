"""Which of a repository's GGUF files is meant, by their names alone."""

from __future__ import annotations

import re
from pathlib import Path

from edgeq.errors import ModelError, UsageError
from edgeq.formats.gguf import first_part
from edgeq.printable import first_of

__all__ = ["choose", "choose_tower"]

_QUANTIZATION = re.compile(r"(UD-)?(I?Q\d\w*|BF16|F16|F32|MXFP4\w*)(?=[-.])", re.IGNORECASE)
_TOWERS = ("f16", "bf16", "f32", "q8_0")  # of several vision towers the first of these
_SHOWN = 20  # files listed before "and N more"


def choose(repo: str, names: list[str], tag: str | None, file: str | None) -> str:
    """The model among a repository's GGUF files that is meant: by name, by quantization, or because it is alone."""
    if file is not None:
        if file not in names:
            raise UsageError(
                f"{repo} holds no {file}", details=first_of(_models(names), _SHOWN), hint="name one of its files"
            )
        return first_part(Path(file)).as_posix()
    models = _models(names)
    fits = models if tag is None else _tagged(models, tag)
    if len(fits) == 1:
        return fits[0]
    if not models:
        raise _nothing_for_edgeq(repo, names)
    if fits:
        problem = f"holds {len(fits)} GGUF models" + (f" of {tag}" if tag else "")
    else:
        problem = f"holds no GGUF model of {tag}, but"
    example = fits[0] if fits else models[0]
    raise UsageError(
        f"{repo} {problem}:",
        details=first_of(fits or models, _SHOWN),
        hint=f"name one by its quantization, as {repo}:{_quantization(example)}, or by its file, as {repo}/{example}",
    )


def choose_tower(names: list[str]) -> str | None:
    """The vision tower among a repository's GGUF files, in the best of its types; None where there is none."""
    towers = [name for name in names if "mmproj" in name.lower() and name.lower().endswith(".gguf")]

    def rank(name: str) -> int:
        return next((i for i, kind in enumerate(_TOWERS) if re.search(rf"(?<![a-z0-9]){kind}", name.lower())), 9)

    return min(towers, key=lambda name: (rank(name), name), default=None)


def _models(names: list[str]) -> list[str]:
    """The GGUF files that are models, by their names: of split ones the first part."""
    files = [name for name in names if name.lower().endswith(".gguf") and first_part(Path(name)) == Path(name)]
    files = [name for name in files if "mmproj" not in name.lower()]
    return [name for name in files if "imatrix" not in name.lower() or _QUANTIZATION.search(name)]


def _tagged(models: list[str], tag: str) -> list[str]:
    """The models whose names have a quantization in them: Q4_K_M, not Q4_K_M_L; UD-Q4_K_M only if there is no other."""
    exact = re.compile(rf"(?<![A-Za-z0-9]){re.escape(tag)}(?![A-Za-z0-9_])", re.IGNORECASE)
    found = [name for name in models if exact.search(name.rsplit("/", 1)[-1])]
    plain = [name for name in found if not re.search(rf"UD-{re.escape(tag)}", name, re.IGNORECASE)]
    return plain or found


def _quantization(name: str) -> str:
    """What a GGUF file's name says of its quantization."""
    found = _QUANTIZATION.search(name)
    return found[0] if found else "Q4_K_M"


def _nothing_for_edgeq(repo: str, names: list[str]) -> ModelError:
    """What a repository holds that has neither safetensors nor GGUF files."""
    if "adapter_config.json" in names:
        what = "an adapter, not a model"
    elif others := [name for name in names if name.lower().endswith((".bin", ".pth", ".pt"))]:
        what = f"PyTorch weights ({others[0]}), which edgeq does not read"
    elif others := [name for name in names if name.lower().endswith(".onnx")]:
        what = f"an ONNX model ({others[0]}), which edgeq does not read"
    else:
        what = "neither safetensors nor GGUF files"
    return ModelError(f"{repo} holds {what}", hint="choose another repository of the model on huggingface.co")
