"""What a manifest of ollama's names: a GGUF file, its vision tower, and settings, each a blob by its digest.

What edgeq can use, it does: the model, the tower, recommended sampling. What would change the answers and cannot be
used is an error that names it (adapters) or a warning (a system prompt, a template of ollama's own kind).
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from edgeq.checkpoint.generation import RECOMMENDED, Recommended, read_sampling
from edgeq.checkpoint.gguf import GGUFCheckpoint
from edgeq.errors import ModelError
from edgeq.identify import identify
from edgeq.inputs import is_file, read_text
from edgeq.printable import brief

__all__ = ["open_ollama"]

_MEDIA = "application/vnd.ollama.image."
_SIZES = 1 << 22  # bytes of a manifest, and of a blob that is text
_SAMPLING = {"repeat_penalty": "repetition_penalty"}  # where ollama's parameters are called otherwise
_DIGEST = re.compile(r"sha256[:-][0-9a-fA-F]{64}")
_OWN = "{{ .Prompt }}"  # the template of models whose conversations ollama writes itself


class _Layer(NamedTuple):
    kind: str  # what follows application/vnd.ollama.image.
    blob: Path


def open_ollama(manifest: Path, mmproj: Path | None = None) -> GGUFCheckpoint:
    """Open the model that a manifest names; ModelError for a manifest or blob that edgeq cannot use."""
    layers = _layers(manifest, _manifest(manifest))
    model = _one(manifest, layers, "model")
    if any(layer.kind == "tensor" for layer in layers):
        raise _for_mlx(manifest)
    if model is not None and (adapters := [layer.blob for layer in layers if layer.kind == "adapter"]):
        options = " ".join(f"--adapter {blob}" for blob in adapters)
        raise ModelError(
            f"{manifest} is a model with an adapter, which edgeq wants to be named",
            hint=f"name both, as in `edgeq chat {model} {options}`",
        )
    if model is None:
        raise ModelError(f"{manifest} names no model file", hint="pull the model again with ollama")
    tower = _one(manifest, layers, "projector")
    if (source := identify(model)).kind != "gguf":
        raise ModelError(f"{model} is no GGUF file, but the model of {manifest}", hint="pull the model again")
    checkpoint = GGUFCheckpoint(source.path, mmproj, [tower] if tower else [])
    _use_parameters(manifest, checkpoint, layers)
    _tell_unused(manifest, layers, has_template=bool(checkpoint.templates.found))
    return checkpoint


def _manifest(path: Path) -> Mapping[str, Any]:
    """The manifest, of those in a list the first that is for GGUF files."""
    values = _object(path, path)
    listed = values.get("manifests")
    if not isinstance(listed, list):
        return values
    for entry in listed:
        if isinstance(entry, dict) and entry.get("runner") in ("ollama", "llamacpp"):
            digest = entry.get("digest")
            return entry if digest is None else _object(_blob(path, digest), path)
    raise _for_mlx(path)


def _for_mlx(manifest: Path) -> ModelError:
    return ModelError(
        f"{manifest} names safetensors for ollama's MLX runner, which edgeq does not read from there",
        hint="use the Hugging Face checkpoint that it was made from",
    )


def _object(path: Path, manifest: Path) -> dict[str, Any]:
    try:
        values = json.loads(read_text(path, _SIZES))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no JSON"
        raise ModelError(f"{path} cannot be read: {reason}", hint="pull the model again with ollama") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path} is no object, as {manifest} needs it", hint="pull the model again with ollama")
    return values


def _layers(path: Path, manifest: Mapping[str, Any]) -> list[_Layer]:
    layers = manifest.get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise ModelError(f"{path} is no manifest of ollama's: it has no layers", hint="pull the model again")
    kinds = [(str(layer.get("mediaType")), layer.get("digest")) for layer in layers]
    return [_Layer(kind.removeprefix(_MEDIA), _blob(path, digest)) for kind, digest in kinds if kind.startswith(_MEDIA)]


def _blob(manifest: Path, digest: object) -> Path:
    """The file that holds a blob, in the store that the manifest is in."""
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ModelError(f"{manifest} names a blob {brief(digest)}, expected a sha256", hint="pull the model again")
    absolute = manifest.absolute()
    store = next((p.parent for p in absolute.parents if p.name in ("manifests", "manifests-v2")), absolute.parent)
    blob = store / "blobs" / digest.replace(":", "-")
    if not is_file(blob):
        raise ModelError(f"{manifest} names {blob}, which is missing", hint="pull the model again with ollama")
    return blob


def _one(manifest: Path, layers: list[_Layer], kind: str) -> Path | None:
    blobs = [layer.blob for layer in layers if layer.kind == kind]
    if len(blobs) > 1:
        raise ModelError(
            f"{manifest} names {len(blobs)} files of the kind {kind}, expected one",
            hint="use the .gguf files that it was made from",
        )
    return blobs[0] if blobs else None


def _use_parameters(manifest: Path, checkpoint: GGUFCheckpoint, layers: list[_Layer]) -> None:
    """Take the sampling that the model's parameters recommend, and name those that edgeq has no place for."""
    for layer in layers:
        if layer.kind == "params":
            try:
                given = _object(layer.blob, layer.blob)
            except ModelError as error:
                _warn(manifest, f"its parameters are not used: {error.message}")
                continue
            values = {_SAMPLING.get(key, key): value for key, value in given.items()}
            file, own = checkpoint.recommended, read_sampling(values, str(layer.blob))
            checkpoint.recommended = Recommended(own.where, {**file.values, **own.values}, own.left_out)
            if unused := sorted(values.keys() - {*RECOMMENDED, "num_ctx"}):
                _warn(manifest, f"its parameters {', '.join(unused)} are not used: give them as options")


def _tell_unused(manifest: Path, layers: list[_Layer], *, has_template: bool) -> None:
    kinds = {layer.kind: layer.blob for layer in layers}
    if "system" in kinds:
        _warn(manifest, f"its system prompt is not used: it is in {kinds['system']}")
    if "messages" in kinds:
        _warn(manifest, f"the conversation that it begins with is not used: it is in {kinds['messages']}")
    if "draft" in kinds:
        _warn(manifest, "its draft model is not used: edgeq drafts with the model's own head")
    template = kinds.get("template") or kinds.get("prompt")
    if template is not None and not _is_own(template):
        instead = "the chat template in the GGUF file is used" if has_template else "it cannot chat without another"
        _warn(manifest, f"its template is written for ollama, in Go's language: {instead}")


def _is_own(template: Path) -> bool:
    """Whether a template leaves the conversation to ollama, which then writes it as the model's own does."""
    try:
        return read_text(template, _SIZES).strip() == _OWN
    except (OSError, UnicodeDecodeError):
        return False


def _warn(manifest: Path, what: str) -> None:
    warnings.warn(f"{manifest}: {what}", stacklevel=3)
