"""What went wrong with a download, for the person at the prompt."""

from __future__ import annotations

import errno

from edgeq.errors import EdgeqError, MemoryBudgetError, NetworkError
from edgeq.printable import one_line

__all__ = ["failure"]

_RESUME = "try again: the download resumes, files that are complete are kept"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def failure(repo: str, revision: str | None, error: BaseException, asked: str | None = None) -> EdgeqError:
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
