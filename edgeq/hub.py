"""From what a user calls a model to a path on this machine.

A model is a folder, a .gguf file, `demo`, a Hugging Face ID ("Qwen/Qwen3.5-2B", "Qwen/Qwen3.5-2B@revision"), a GGUF
file on the hub ("OWNER/NAME:Q4_K_M", "OWNER/NAME/FILE.gguf"), a model of ollama's ("ollama:qwen3.5:2b") or one of a few
short names ("qwen3.5:2b"). Hub files go through `huggingface_hub`: the standard cache, so nothing is stored twice,
with its resume, its progress bars and its environment (HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE, HF_HUB_DISABLE_PROGRESS_BARS).

Whatever goes wrong in a download is a NetworkError, but for a full disk, which is a MemoryBudgetError. What the server
says is checked before a name of it reaches the file system (see `edgeq.hub_guard`).
"""

from __future__ import annotations

import errno
import re
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

from edgeq.config import read_json
from edgeq.errors import EdgeqError, MemoryBudgetError, ModelError, NetworkError, UsageError
from edgeq.foreign import translated
from edgeq.formats.gguf import first_part
from edgeq.identify import identify
from edgeq.inputs import exists, expand_user, is_file, is_link
from edgeq.ollama import find_manifest
from edgeq.printable import first_of, one_line

__all__ = ["DEMO", "find_adapter", "find_here", "find_model", "hub_config"]

DEMO = Path(__file__).parent / "demo"

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
_QUANTIZATION = re.compile(r"(UD-)?(I?Q\d\w*|BF16|F16|F32|MXFP4\w*)(?=[-.])", re.IGNORECASE)
_OLLAMA = "ollama:"
_WANTED = ["*.json", "*.safetensors", "*.jinja"]
_RESUME = "try again: the download resumes, files that are complete are kept"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_TOWERS = ("f16", "bf16", "f32", "q8_0")  # of several vision towers the first of these
_SHOWN = 20  # files listed before "and N more"


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
    with translated(lambda error: _failure(found.repo, found.revision, error)):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        from edgeq.hub_guard import guard_client

        guard_client()
        try:
            path = hf_hub_download(found.repo, "config.json", revision=found.revision)
        except EntryNotFoundError as error:
            if isinstance(error, FileNotFoundError):  # neither in the cache nor to be had: the network's fault
                raise
            return None
    return read_json(Path(path))


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
    with translated(lambda error: _failure(name.repo, name.revision, error)):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = Path(
                snapshot_download(name.repo, revision=name.revision, local_files_only=True, allow_patterns=[])
            )
        except LocalEntryNotFoundError:
            return None
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if is_file(path))
    try:
        if not (name.tag or name.file) and any(file.endswith(".safetensors") for file in names):
            return identify(folder).path
        return identify(folder / _choose(name.repo, names, name.tag, name.file)).path
    except EdgeqError:
        return None


def find_adapter(adapter: str | Path) -> Path:
    """The folder or file of a LoRA adapter; downloads it if it is on the hub and not in the cache. Errors as above."""
    name = str(adapter)
    path = expand_user(Path(name))
    if name and exists(path):
        return path
    if (hub := _HUB_ID.fullmatch(name)) and not hub["tag"]:
        file = hub["file"] or ""
        return _download(hub["repo"], hub["revision"], [escape(file)] if file else _WANTED) / file
    raise UsageError(
        f"adapter not found: {name} (not a local path or a Hugging Face ID)",
        hint="give the folder of an adapter of PEFT or mlx-lm, a .gguf file, or a Hugging Face ID",
    )


def _from_hub(repo: str, revision: str | None, tag: str | None, file: str | None) -> Path:
    if tag or file:
        return _download_gguf(repo, revision, tag, file)
    folder = _download(repo, revision, _WANTED)
    if any(folder.rglob("*.safetensors")):
        return identify(folder).path
    return _download_gguf(repo, revision, None, None)


def _download(repo: str, revision: str | None, wanted: list[str]) -> Path:
    with translated(lambda error: _failure(repo, revision, error)):
        from huggingface_hub import snapshot_download  # half a second to import: only when it is needed

        from edgeq.hub_guard import guard_client

        guard_client()
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))


# --- GGUF files ------------------------------------------------------------------------------------------------------


def _download_gguf(repo: str, revision: str | None, tag: str | None, file: str | None) -> Path:
    """The GGUF file that is meant, with all its parts and the vision tower beside it."""
    names = _listing(repo, revision, f"{repo}/{file}" if file else None)
    chosen = _choose(repo, names, tag, file)
    wanted = [name for name in names if first_part(Path(name)) == Path(chosen)]
    tower = _choose_tower(names)
    folder = _download(repo, revision, [escape(name) for name in [*wanted, *([tower] if tower else [])]])
    return identify(folder / chosen).path


def _listing(repo: str, revision: str | None, asked: str | None) -> list[str]:
    """The names of a repository's files; of those in the cache, if the hub does not say."""
    with translated(lambda error: _failure(repo, revision, error, asked)):
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

        from edgeq.hub_guard import guard_client

        guard_client()
        try:
            return sorted(file.rfilename for file in HfApi().model_info(repo, revision=revision).siblings or [])
        except RevisionNotFoundError:
            raise
        except Exception as error:  # as the library: whatever is wrong with the hub, a copy in the cache will do
            try:  # none of its files is needed, so the folder is all that is asked for
                folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[]))
            except LocalEntryNotFoundError:
                raise error from None
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if is_file(path))


def _choose(repo: str, names: list[str], tag: str | None, file: str | None) -> str:
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


def _choose_tower(names: list[str]) -> str | None:
    towers = [name for name in names if "mmproj" in name.lower() and name.lower().endswith(".gguf")]

    def rank(name: str) -> int:
        return next((i for i, kind in enumerate(_TOWERS) if re.search(rf"(?<![a-z0-9]){kind}", name.lower())), 9)

    return min(towers, key=lambda name: (rank(name), name), default=None)


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


# --- failures --------------------------------------------------------------------------------------------------------


def _failure(repo: str, revision: str | None, error: BaseException, asked: str | None = None) -> EdgeqError:
    """What went wrong with a download, for the person at the prompt. asked: for a file, how it was named."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return MemoryBudgetError(
            f"{repo} does not fit the disk of the Hugging Face cache: {error.strerror}",
            hint=f"free some space, or name another folder with HF_HUB_CACHE; {_RESUME}",
        )
    problem, hint = _reason(repo, revision, error)
    local = f"{repo} is not a local folder either" if asked is None else f"{asked} is not a local file either"
    return NetworkError(f"{repo} {problem}", hint=f"{hint} ({local})")


def _reason(repo: str, revision: str | None, error: BaseException) -> tuple[str, str]:
    """The problem and the next step."""
    from huggingface_hub import errors

    match error:
        case errors.GatedRepoError():
            return "needs permission", f"accept its terms at huggingface.co/{repo} and set HF_TOKEN"
        case errors.RepositoryNotFoundError():
            return (
                "is not on the Hugging Face Hub, or is private",
                "check the spelling; set HF_TOKEN for a private model",
            )
        case errors.RevisionNotFoundError():
            return f"has no revision {revision!r}", "check the revision, or leave it out"
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled():
            offline = "check the connection and HF_HUB_OFFLINE, or give a local folder"
            return "is not in the local cache, and the Hugging Face Hub cannot be reached", offline
        case errors.HfHubHTTPError():
            status = getattr(error.response, "status_code", "no answer")
            return f"cannot be downloaded: the Hugging Face Hub answered {status}", f"wait a while; {_RESUME}"
        case ImportError():
            return f"cannot be downloaded: {one_line(error)}", "install what is missing, or unset the proxy variables"
        case PermissionError():
            return f"cannot be stored: {one_line(error)}", "make the folder writable, or name another with HF_HUB_CACHE"
    return f"cannot be downloaded: {type(error).__name__}: {one_line(error)}", _RESUME
