"""From what a user calls a model to a path on this machine.

A model is a folder, a .gguf file, `demo`, a Hugging Face ID ("Qwen/Qwen3.5-2B", "Qwen/Qwen3.5-2B@revision") or one of a
few short names ("qwen3.5:2b"). Hub files go through `huggingface_hub`: the standard cache, so nothing is stored twice,
with its resume, its progress bars and its environment (HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE, HF_HUB_DISABLE_PROGRESS_BARS).
"""

from __future__ import annotations

import re
from pathlib import Path

from edgeq.errors import NetworkError, UsageError

__all__ = ["DEMO", "find_model"]

DEMO = Path(__file__).parent / "demo"

_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
_SHORT = re.compile(r"qwen3\.5[:-](?P<size>0\.8b|2b|4b)(?P<base>-base)?", re.IGNORECASE)
_WANTED = ["*.json", "*.safetensors", "*.jinja"]


def find_model(model: str | Path) -> Path:
    """The folder or file that `model` stands for; downloads it if it is on the hub and not in the cache.

    Raises UsageError for a name that can be nothing, NetworkError if a download is needed and fails.
    """
    name = str(model)
    path = Path(name).expanduser()
    if name and path.exists():
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
    from huggingface_hub import errors, snapshot_download  # half a second to import: only when it is needed

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_WANTED))
    except errors.GatedRepoError:
        problem, hint = "needs permission", f"accept its terms at huggingface.co/{repo} and set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        problem, hint = (
            "is not on the Hugging Face Hub, or is private",
            "check the spelling; set HF_TOKEN for a private model",
        )
    except errors.RevisionNotFoundError:
        problem, hint = f"has no revision {revision!r}", "check the revision, or leave it out"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        problem = "is not in the local cache, and the Hugging Face Hub cannot be reached"
        hint = "check the connection and HF_HUB_OFFLINE, or give a local folder"
    except errors.HfHubHTTPError as error:
        problem, hint = (
            f"cannot be downloaded: the Hugging Face Hub answered {error.response.status_code}",
            "try again later",
        )
    except (OSError, ValueError, RuntimeError) as error:
        problem, hint = f"cannot be downloaded: {error}", "try again; the download resumes where it stopped"
    raise NetworkError(f"{repo} {problem}", hint=f"{hint} ({repo} is not a local folder either)")
