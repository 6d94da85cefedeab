"""Readers: whatever is on disk becomes a `Checkpoint` with neutral names and conventions."""

from __future__ import annotations

from pathlib import Path

from edgeq.checkpoint.base import Checkpoint, Storage
from edgeq.checkpoint.folder import FolderCheckpoint
from edgeq.errors import ModelError
from edgeq.inputs import is_file, is_folder

__all__ = ["Checkpoint", "FolderCheckpoint", "Storage", "open_checkpoint"]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint folder or a GGUF file and check everything about it but the values."""
    if is_folder(path):
        return FolderCheckpoint(path)
    if is_file(path) and path.suffix.lower() == ".gguf":
        from edgeq.checkpoint.gguf import GGUFCheckpoint  # knows two dozen formats; a folder need not wait for it

        return GGUFCheckpoint(path)
    raise ModelError(
        f"{path} is neither a checkpoint folder nor a .gguf file",
        hint="give a folder with config.json and safetensors files, or a .gguf file",
    )
