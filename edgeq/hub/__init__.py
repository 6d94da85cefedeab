"""From what a user calls a model to a path on this machine.

A model is a folder, a .gguf file, `demo`, a Hugging Face ID ("Qwen/Qwen3.5-2B", "Qwen/Qwen3.5-2B@revision"), a GGUF
file on the hub ("OWNER/NAME:Q4_K_M", "OWNER/NAME/FILE.gguf"), a model of ollama's ("ollama:qwen3.5:2b") or one of a few
short names ("qwen3.5:2b"). Hub files go through `huggingface_hub`: the standard cache, so nothing is stored twice,
with its resume, its progress bars and its environment (HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE, HF_HUB_DISABLE_PROGRESS_BARS).
"""

from __future__ import annotations

import re
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

from edgeq.errors import EdgeqError, UsageError
from edgeq.formats.gguf import first_part
from edgeq.hub.download import cached_folder, download, download_config, files_in, listing
from edgeq.hub.gguf_files import choose, choose_tower
from edgeq.hub.ollama import find_manifest
from edgeq.identify import identify
from edgeq.inputs import exists, expand_user, is_link

__all__ = ["DEMO", "find_adapter", "find_here", "find_model", "hub_config"]

DEMO = Path(__file__).parents[1] / "demo"

_SITE = r"((https?://)?(hf\.co|huggingface\.co)/)"
_HUB_ID = re.compile(
    rf"{_SITE}?(?P<repo>\w[\w.-]*/\w[\w.-]*)"
    r"(/(?P<file>(?!.*\.\.)\w[\w ./+-]*\.gguf)|:(?P<tag>\w[\w.-]*))?(@(?P<revision>(?!.*\.\.)\w[\w./-]*))?",
    re.ASCII | re.IGNORECASE,
)
_PAGE = re.compile(  # an address as a browser has it
    rf"{_SITE}(?P<repo>[^/?]+/[^/?]+)(/(resolve|blob|tree)/(?P<revision>[^/?]+)/?(?P<file>[^?]*))?/?(\?.*)?",
    re.IGNORECASE,
)
_SHORT = re.compile(r"qwen3\.5[:-](?P<size>0\.8b|2b|4b)(?P<base>-base)?", re.IGNORECASE)
_OLLAMA = "ollama:"
_WANTED = ["*.json", "*.safetensors", "*.jinja"]


def find_model(model: str | Path) -> Path:
    """The folder or file that `model` stands for; downloads it if it is on the hub and not in the cache.

    Raises UsageError for a name that can be nothing, or several things; NetworkError if a download is needed and fails;
    ModelError for something that edgeq does not open (see `edgeq.identify`).
    """
    found = _local_or_hub(model)
    return found if isinstance(found, Path) else _from_hub(*found)


def find_here(model: str | Path) -> Path | None:
    """The folder or file that `model` stands for, if it is on this machine; nothing is downloaded. Raises as
    `find_model` does, but for the network."""
    found = _local_or_hub(model)
    return found if isinstance(found, Path) else _cached(found)


def hub_config(model: str | Path) -> dict[str, Any] | None:
    """The config.json of a model on the hub, which is all that is downloaded of it; None for a GGUF file, which has
    none. Raises UsageError and NetworkError as `find_model` does."""
    found = _local_or_hub(model)
    if isinstance(found, Path) or found.tag or found.file:
        return None
    return download_config(found.repo, found.revision)


def find_adapter(adapter: str | Path) -> Path:
    """The folder or file of a LoRA adapter; downloads it if it is on the hub and not in the cache. Errors as above."""
    name = str(adapter)
    path = expand_user(Path(name))
    if name and exists(path):
        return path
    if (hub := _HUB_ID.fullmatch(name)) and not hub["tag"]:
        file = hub["file"] or ""
        return download(hub["repo"], hub["revision"], [escape(file)] if file else _WANTED) / file
    raise UsageError(
        f"adapter not found: {name} (not a local path or a Hugging Face ID)",
        hint="give the folder of an adapter of PEFT or mlx-lm, a .gguf file, or a Hugging Face ID",
    )


class _HubName(NamedTuple):
    """A model on the hub: a repository, and perhaps a revision, a quantization or a file of it."""

    repo: str
    revision: str | None
    tag: str | None
    file: str | None


def _local_or_hub(model: str | Path) -> Path | _HubName:
    """What a name stands for: a path that is here, or a place on the hub."""
    name = str(model)
    path = expand_user(Path(name))
    if name and (exists(path) or is_link(path)):
        return identify(path).path
    if name == "demo":
        if not DEMO.exists():
            raise UsageError("the demo model is not part of this installation", hint="reinstall edgeq")
        return DEMO
    if name.startswith(_OLLAMA):
        return find_manifest(name.removeprefix(_OLLAMA))
    if short := _SHORT.fullmatch(name):
        name = f"Qwen/Qwen3.5-{short['size'].upper()}" + ("-Base" if short["base"] else "")
    if page := _PAGE.fullmatch(name):
        file = page["file"] if (page["file"] or "").lower().endswith(".gguf") else ""
        name = "/".join(filter(None, (page["repo"], file))) + (f"@{page['revision']}" if page["revision"] else "")
    if hub := _HUB_ID.fullmatch(name):
        return _HubName(hub["repo"], hub["revision"], hub["tag"], hub["file"])
    raise UsageError(
        f"model not found: {name} (not a local path or a Hugging Face ID)",
        hint="give a checkpoint folder, a .gguf file, a Hugging Face ID (Qwen/Qwen3.5-2B, OWNER/NAME:Q4_K_M), a short "
        "name (qwen3.5:2b), ollama:NAME or demo",
    )


def _cached(name: _HubName) -> Path | None:
    """A model in the hub's cache; None if it is not there, or not whole."""
    if (folder := cached_folder(name.repo, name.revision)) is None:
        return None
    names = files_in(folder)
    try:
        if not (name.tag or name.file) and any(file.endswith(".safetensors") for file in names):
            return identify(folder).path
        return identify(folder / choose(name.repo, names, name.tag, name.file)).path
    except EdgeqError:
        return None


def _from_hub(repo: str, revision: str | None, tag: str | None, file: str | None) -> Path:
    if tag or file:
        return _download_gguf(repo, revision, tag, file)
    folder = download(repo, revision, _WANTED)
    if any(folder.rglob("*.safetensors")):
        return identify(folder).path
    return _download_gguf(repo, revision, None, None)


def _download_gguf(repo: str, revision: str | None, tag: str | None, file: str | None) -> Path:
    """The GGUF file that is meant, with all its parts and the vision tower beside it."""
    names = listing(repo, revision, f"{repo}/{file}" if file else None)
    chosen = choose(repo, names, tag, file)
    wanted = [name for name in names if first_part(Path(name)) == Path(chosen)]
    tower = choose_tower(names)
    folder = download(repo, revision, [escape(name) for name in [*wanted, *([tower] if tower else [])]])
    return identify(folder / chosen).path
