"""From what a user calls a model to a path on this machine.

A model is a folder, a .gguf file, `demo`, a Hugging Face ID ("Qwen/Qwen3.5-2B", "Qwen/Qwen3.5-2B@revision") or one of a
few short names ("qwen3.5:2b"). Hub files go through `huggingface_hub`: the standard cache, so nothing is stored twice,
with its resume, its progress bars and its environment (HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE, HF_HUB_DISABLE_PROGRESS_BARS).

Whatever goes wrong in a download is a NetworkError, but for a full disk, which is a MemoryBudgetError. What the server
says is checked before a name of it reaches the file system (see `edgeq.hub_guard`).
"""

from __future__ import annotations

import errno
import re
from pathlib import Path

from edgeq.errors import EdgeqError, MemoryBudgetError, NetworkError, UsageError
from edgeq.foreign import translated
from edgeq.inputs import exists, expand_user
from edgeq.printable import one_line

__all__ = ["DEMO", "find_model"]

DEMO = Path(__file__).parent / "demo"

_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>(?!.*\.\.)\w[\w./-]*))?", re.ASCII)
_SHORT = re.compile(r"qwen3\.5[:-](?P<size>0\.8b|2b|4b)(?P<base>-base)?", re.IGNORECASE)
_WANTED = ["*.json", "*.safetensors", "*.jinja"]
_RESUME = "try again: the download resumes, files that are complete are kept"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def find_model(model: str | Path) -> Path:
    """The folder or file that `model` stands for; downloads it if it is on the hub and not in the cache.

    Raises UsageError for a name that can be nothing, NetworkError if a download is needed and fails.
    """
    name = str(model)
    path = expand_user(Path(name))
    if name and exists(path):
        return path
    if name == "demo":
        if not DEMO.exists():
            raise UsageError("the demo model is not part of this installation", hint="reinstall edgeq")
        return DEMO
    if short := _SHORT.fullmatch(name):
        name = f"Qwen/Qwen3.5-{short['size'].upper()}" + ("-Base" if short["base"] else "")
    if hub := _HUB_ID.fullmatch(name):
        return _download(hub["repo"], hub["revision"])
    raise UsageError(
        f"model not found: {name} (not a local path or a Hugging Face ID)",
        hint="give a checkpoint folder, a .gguf file, a Hugging Face ID (Qwen/Qwen3.5-2B), a short name (qwen3.5:2b) "
        "or demo",
    )


def _download(repo: str, revision: str | None) -> Path:
    with translated(lambda error: _failure(repo, revision, error)):
        from huggingface_hub import snapshot_download  # half a second to import: only when it is needed

        from edgeq.hub_guard import guard_client

        guard_client()
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=_WANTED))
    if not exists(folder):
        raise NetworkError(f"{repo} holds no model files", hint="check the spelling of the id")
    return folder


def _failure(repo: str, revision: str | None, error: BaseException) -> EdgeqError:
    """What went wrong with a download, for the person at the prompt."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return MemoryBudgetError(
            f"{repo} does not fit the disk of the Hugging Face cache: {error.strerror}",
            hint=f"free some space, or name another folder with HF_HUB_CACHE; {_RESUME}",
        )
    problem, hint = _reason(repo, revision, error)
    return NetworkError(f"{repo} {problem}", hint=f"{hint} ({repo} is not a local folder either)")


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
