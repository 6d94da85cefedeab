"""The tokenizer tables in the user's cache: which ones are to be trusted, and how they are kept.

A table decides which ids a text becomes, so one that somebody else could have written is not read. The cache's folders
and files have to be this user's, no links, and writable by nobody else, as `ssh` wants its keys; what they lie in must
not be writable by everybody either, unless only the owner of an entry may replace it (the sticky bit, as in /tmp).
Against damage, a table holds a digest of its content. Whatever is odd is made anew, or done without.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.safetensors import SafetensorsFile, SafetensorsWriter, dtype_name
from edgeq.inputs import cache_home

__all__ = ["cache_folder", "cache_problem", "open_table", "save_table", "stale_tables", "table_path"]

_VERSION = 2  # of the table's layout, part of its name
_TABLES = {"pairs": np.int64, "ranks": np.uint32, "products": np.uint32, "ends": np.uint32, "spellings": np.uint8}
_PIECE = 1 << 16  # bytes of spellings that are decoded at a time
_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class UntrustedTableError(Exception):
    """A table that is not to be used; says why."""


def cache_folder() -> Path:
    """Where the tables are, or would be."""
    return cache_home() / "edgeq" / "tokenizers"


def table_path(digest: str) -> Path:
    """Where the table for a tokenizer.json of this sha256 is, or would be."""
    return cache_folder() / f"{digest}-{_VERSION}.safetensors"


def cache_problem() -> str | None:
    """Why the cache is not used; None if it can be."""
    own = (cache_folder(), cache_folder().parent)
    for folder in own:
        if problem := _problem_of(folder, stat.S_ISDIR):
            return problem
    base = cache_home()
    for folder in (base, *base.resolve().parents):
        try:
            status = folder.stat()
        except FileNotFoundError:
            continue
        open_to_all = status.st_mode & stat.S_IWOTH
        if open_to_all and (folder == base or not status.st_mode & stat.S_ISVTX):
            return f"{folder} is writable by everybody"
    return None


def _problem_of(path: Path, is_right: Any) -> str | None:
    """Why something of the cache's own is not to be trusted; what does not exist is all right."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    if not is_right(status.st_mode):
        return f"{path} is not a plain file" if is_right is stat.S_ISREG else f"{path} is not a plain folder"
    if status.st_uid != os.geteuid():
        return f"{path} belongs to another user"
    if status.st_mode & _OTHERS:
        return f"{path} is writable by others"
    return None


def open_table(path: Path, source: str) -> SafetensorsFile:
    """A checked table for a tokenizer.json of sha256 `source`. Raises if it is not there or odd in any way."""
    if problem := cache_problem() or _problem_of(path, stat.S_ISREG):
        raise UntrustedTableError(problem)
    file = SafetensorsFile(path)
    if file.metadata.get("source") != source:
        raise UntrustedTableError(f"{path} is of another tokenizer")
    _check_table(file)
    return file


def save_table(path: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write a table that nobody but this user can change."""
    from edgeq.files import new_file  # what publishes files is not needed to read one

    for folder in reversed([folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]):
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    entries = {name: (dtype_name(array.dtype), array.shape) for name, array in arrays.items()}
    digest = _digest(arrays, metadata)
    with new_file(path, may_replace=lambda _: None, alone=False) as partial:
        with SafetensorsWriter(partial, entries, {**metadata, "digest": digest}) as file:
            for name, array in arrays.items():
                file.write(name, array)
        partial.chmod(0o600)


def _digest(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256()  # of the two that are safe the one with instructions of its own
    for key, value in sorted(metadata.items()):
        digest.update(f"{key} {len(value)} {value}".encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _check_table(file: SafetensorsFile) -> None:
    """UntrustedTableError unless a table is as it was written, and every number in it within range."""
    if {name: info.dtype for name, info in file.tensors.items()} != {
        name: dtype_name(np.dtype(dtype)) for name, dtype in _TABLES.items()
    } or any(len(info.shape) != 1 for info in file.tensors.values()):
        raise UntrustedTableError(f"{file.path} has not the tables it should have")
    arrays = {name: file.array(name) for name in _TABLES}
    metadata = {key: value for key, value in file.metadata.items() if key != "digest"}
    if _digest(arrays, metadata) != file.metadata.get("digest"):
        raise UntrustedTableError(f"{file.path} is not as it was written")
    if not all(_in_range(arrays)) or not _bytes_in_range(file.metadata["bytes"], len(arrays["ends"])):
        raise UntrustedTableError(f"{file.path} holds numbers out of range")
    file.drop_pages()  # all was read once; what is looked at comes back


def _in_range(arrays: Mapping[str, NDArray[Any]]) -> Iterator[bool]:
    pairs, ranks, products, ends, spellings = (arrays[name] for name in _TABLES)
    tokens = len(ends)
    yield len(pairs) == len(ranks) == len(products)
    yield bool((pairs[1:] > pairs[:-1]).all())  # so the first is the least, and the last has the largest left half
    yield not len(pairs) or (int(pairs[0]) >= 0 and int(pairs[-1]) >> 32 < tokens)
    right = pairs.view(np.uint32)[0 if sys.byteorder == "little" else 1 :: 2]
    yield all(
        int(x.max(initial=0)) < n for x, n in ((right, tokens), (ranks, len(pairs)), (products, tokens)) if len(x)
    )
    yield bool((ends[1:] >= ends[:-1]).all()) and (int(ends[-1]) if tokens else 0) == len(spellings)
    starts = spellings[ends[ends < len(spellings)]]
    yield bool((starts & 0xC0 != 0x80).all()) and _is_utf8(spellings)  # no token ends within a character


def _is_utf8(data: NDArray[np.uint8]) -> bool:
    """Whether it is text; a piece at a time, since the whole as a string takes megabytes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(data), _PIECE):
            decoder.decode(data[start : start + _PIECE].tobytes())
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _bytes_in_range(text: str, tokens: int) -> bool:
    ids = json.loads(text)
    return len(ids) == 256 and all(len(char) == 1 and type(i) is int and 0 <= i < tokens for char, i in ids.items())


def stale_tables() -> list[Path]:
    """Files in the cache that no run of this version will read: of other versions, damaged, or not to be trusted."""
    with suppress(OSError):
        return [path for path in sorted(cache_folder().iterdir()) if not path.name.startswith(".") and _is_stale(path)]
    return []


def _is_stale(path: Path) -> bool:
    source, _, version = path.name.removesuffix(".safetensors").partition("-")
    if version != str(_VERSION) or _problem_of(path, stat.S_ISREG):
        return True
    try:
        file = SafetensorsFile(path)
        _check_table(file)
    except Exception:  # of whatever kind: a run would not read it either
        return True
    return file.metadata.get("source") != source
