"""Downloads into the standard cache of `huggingface_hub`, and what is there already.

Whatever goes wrong is a NetworkError, but for a full disk, which is a MemoryBudgetError. What the server says is
checked before a name of it reaches the file system (`edgeq.hub.guard`). The library is imported when it is needed,
because that takes half a second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeq.config import read_json
from edgeq.foreign import translated
from edgeq.hub.failures import failure
from edgeq.inputs import is_file

__all__ = ["cached_folder", "download", "download_config", "files_in", "listing"]


def download(repo: str, revision: str | None, wanted: list[str]) -> Path:
    """The folder in the cache with a repository's files that match the patterns in `wanted`."""
    with translated(lambda error: failure(repo, revision, error)):
        from huggingface_hub import snapshot_download

        from edgeq.hub.guard import guard_client

        guard_client()
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))


def download_config(repo: str, revision: str | None) -> dict[str, Any] | None:
    """A repository's config.json; None if it has none."""
    with translated(lambda error: failure(repo, revision, error)):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        from edgeq.hub.guard import guard_client

        guard_client()
        try:
            path = hf_hub_download(repo, "config.json", revision=revision)
        except EntryNotFoundError as error:
            if isinstance(error, FileNotFoundError):  # neither in the cache nor to be had: the network's fault
                raise
            return None
    return read_json(Path(path))


def listing(repo: str, revision: str | None, asked: str | None) -> list[str]:
    """The names of a repository's files; of those in the cache, if the hub does not say. asked: what was named, for the
    error."""
    with translated(lambda error: failure(repo, revision, error, asked)):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RevisionNotFoundError

        from edgeq.hub.guard import guard_client

        guard_client()
        try:
            return sorted(file.rfilename for file in HfApi().model_info(repo, revision=revision).siblings or [])
        except RevisionNotFoundError:
            raise
        except Exception:  # as the library: whatever is wrong with the hub, a copy in the cache will do
            if (folder := cached_folder(repo, revision)) is None:
                raise
    return files_in(folder)


def cached_folder(repo: str, revision: str | None) -> Path | None:
    """Where the cache has files of a repository; None if it has none. Nothing is downloaded."""
    with translated(lambda error: failure(repo, revision, error)):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:  # no pattern: none of its files is needed, the folder is all that is asked for
            return Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[]))
        except LocalEntryNotFoundError:
            return None


def files_in(folder: Path) -> list[str]:
    """The names of all files in a folder and those in it, sorted, with / between."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if is_file(path))
