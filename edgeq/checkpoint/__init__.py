"""Readers: whatever is on disk becomes a `Checkpoint` with neutral names and conventions."""

from __future__ import annotations

from pathlib import Path

from edgeq.checkpoint.base import Checkpoint, Storage
from edgeq.checkpoint.folder import FolderCheckpoint
from edgeq.errors import ModelError, UsageError
from edgeq.inputs import is_file, is_folder

__all__ = ["Checkpoint", "FolderCheckpoint", "Storage", "open_checkpoint"]


def open_checkpoint(path: Path, mmproj: Path | None = None) -> Checkpoint:
    """Open a checkpoint folder or a GGUF file and check everything about it but the values.

    mmproj: the vision tower of a GGUF file; without it, one in the file or in its folder is found.
    """
    if mmproj is not None and not is_file(path):
        raise UsageError(f"{path} is no .gguf file, so it has no mmproj file", hint="leave out the mmproj")
    if is_folder(path):
        return FolderCheckpoint(path)
    if is_file(path) and path.suffix.lower() == ".gguf":
        from edgeq.checkpoint.gguf import GGUFCheckpoint  # knows two dozen formats; a folder need not wait for it

        return GGUFCheckpoint(path, mmproj)
    raise ModelError(
        f"{path} is neither a checkpoint folder nor a .gguf file",
        hint="give a folder with config.json and safetensors files, or a .gguf file",
    )
