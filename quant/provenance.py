"""edgeq.json: where a quantized checkpoint comes from, and what its files must be."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgeq.config import read_json
from edgeq.errors import ModelError
from edgeq.inputs import is_file, open_file
from edgeq.printable import printable
from edgeq.version import __version__

__all__ = ["RECORD", "Source", "hash_files", "provenance", "verify"]

RECORD = "edgeq.json"
_CHUNK = 1 << 22
_CACHED = re.compile(r"models--(.+)[/\\]snapshots[/\\]([0-9a-f]{40})$")

Hashes = dict[str, dict[str, Any]]


class Source:
    """What a source folder is called: Hugging Face ID and revision if it is in the hub's cache, else its own name."""

    def __init__(self, folder: Path, revision: str | None = None) -> None:
        cached = _CACHED.search(str(folder.absolute()))
        self.name = printable(cached[1].replace("--", "/") if cached else folder.absolute().name)
        self.revision = revision or (cached[2] if cached else None)


def hash_files(files: Iterable[Path], folder: Path | None = None, stop: Callable[[], bool] = lambda: False) -> Hashes:
    """Size and sha256 of every file by name, or by its path in `folder`; gives up (and returns what it has) once
    `stop` says so.

    ModelError for a file that cannot be read.
    """
    hashes: Hashes = {}
    for path in files:
        digest, nbytes = hashlib.sha256(), 0
        for chunk in _chunks(path):
            if stop():
                return hashes
            digest.update(chunk)
            nbytes += len(chunk)
        name = path.relative_to(folder).as_posix() if folder else path.name
        hashes[name] = {"bytes": nbytes, "sha256": digest.hexdigest()}
    return hashes


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with open_file(path) as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None


def provenance(source: Source, inputs: Hashes, outputs: Hashes, recipe: dict[str, Any]) -> dict[str, Any]:
    """The record."""
    return {
        "edgeq": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": {"name": source.name, "revision": source.revision, "files": inputs},
        "recipe": recipe,
        "files": outputs,
    }


def verify(folder: Path) -> Hashes:
    """Compare a folder with its record and return the files in it; ModelError names every file that differs."""
    record = read_json(folder / RECORD)
    files = record.get("files")
    if not isinstance(files, dict) or not all(_is_entry(name, entry) for name, entry in files.items()):
        raise ModelError(f"{folder / RECORD} is not a record of files", hint="quantize the model again")
    problems = [problem for name, entry in files.items() if (problem := _difference(folder / name, entry))]
    if problems:
        raise ModelError(
            f"{folder} does not match its provenance record: {'; '.join(problems)}",
            hint="copy the folder again, or quantize the model again",
        )
    return files


def _is_entry(name: str, entry: object) -> bool:
    parts = name.split("/")  # a file of the folder, or of a folder in it
    if len(parts) > 2 or any(part in ("..", "") or Path(part).name != part for part in parts):
        return False
    if not isinstance(entry, dict):
        return False
    return type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)


def _difference(path: Path, entry: dict[str, Any]) -> str | None:
    if not is_file(path):
        return f"{path.name} is missing"
    nbytes = path.stat().st_size
    if nbytes != entry["bytes"]:
        return f"{path.name} has {nbytes:,} bytes, expected {entry['bytes']:,}"
    found = hash_files([path])[path.name]["sha256"]
    return None if found == entry["sha256"] else f"{path.name} has other contents"
