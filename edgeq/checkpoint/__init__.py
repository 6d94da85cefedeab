"""Readers: whatever is on disk becomes a `Checkpoint` with neutral names and conventions."""

from __future__ import annotations

from pathlib import Path

from edgeq.checkpoint.base import Checkpoint, Storage
from edgeq.checkpoint.folder import FolderCheckpoint
from edgeq.errors import UsageError
from edgeq.identify import identify

__all__ = ["Checkpoint", "FolderCheckpoint", "Storage", "open_checkpoint"]


def open_checkpoint(path: Path, mmproj: Path | None = None) -> Checkpoint:
    """Open a checkpoint folder, a GGUF file or one of ollama's manifests, and check everything about it but the values.

    mmproj: the vision tower of a GGUF file; without it, one in the file or in its folder is found.
    """
    source = identify(path)
    if source.kind == "folder":
        if mmproj is not None:
            raise UsageError(f"{path} is no GGUF file, so it has no mmproj file", hint="leave out the mmproj")
        return FolderCheckpoint(source.path)
    # Both know two dozen formats; a folder need not wait for them.
    if source.kind == "ollama":
        from edgeq.checkpoint.ollama import open_ollama

        return open_ollama(source.path, mmproj)
    from edgeq.checkpoint.gguf import GGUFCheckpoint

    return GGUFCheckpoint(source.path, mmproj)
