"""Where a result may go: what `--force` replaces, and what nothing replaces.

Never replaced are the files that a run reads, by whatever name or link, and single files of any other model; what is no
plain file or folder (devices, pipes, sockets, symbolic links: name what a link points to); and folders that hold
anything but a model. Two results of one run have two names, which differ in more than case.
"""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from edgeq.errors import UsageError
from edgeq.files.publish import MayReplace, check_free, real_place
from edgeq.printable import one_line
from edgeq.text.template_files import FOLDER

__all__ = ["MODEL_FILES", "FileTarget", "FolderTarget", "files_of"]

_WEIGHTS = "model*.safetensors"
MODEL_FILES = (
    "config.json",
    _WEIGHTS,
    "model.safetensors.index.json",
    "edgeq.json",
    "generation_config.json",
    "*token*.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "README.md",
    ".gitattributes",
    ".DS_Store",
)
"""What a folder may hold that `--force` replaces, besides which it needs config.json and weights."""

_KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISREG, "a file"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
)

_Identity = tuple[int, int]  # of a file, whatever its names: device and inode


class FolderTarget:
    """The folder `out`, made from `source` (a folder or a file), which reads `inputs`."""

    def __init__(self, out: Path, source: Path, inputs: Iterable[Path], *, force: bool) -> None:
        self.out, self._source, self._inputs = out, source, _identities(inputs)
        self.may_replace: MayReplace | None = self._check_model_folder if force else None

    def check(self) -> None:
        """UsageError if the run is going to be refused its output."""
        place = _place(self.out)
        _check_kind(self.out, place, stat.S_ISDIR, "a folder")
        if place.is_dir() and os.path.ismount(place):
            raise UsageError(f"{self.out} is a mount point, which cannot be replaced", hint="choose a folder inside it")
        if _within(place, self._source) or _within(self._source, place):
            raise UsageError(
                f"the output {self.out} and the source {self._source} overlap", hint="choose a folder elsewhere"
            )
        if place.is_dir() and _within(Path.cwd(), place):
            raise UsageError(f"{self.out} is the current folder, or holds it", hint="choose a folder inside it")
        check_free(self.out, place, self.may_replace)

    def _check_model_folder(self, path: Path) -> None:
        _check_kind(self.out, path, stat.S_ISDIR, "a folder")
        with os.scandir(path) as entries:
            files = {e.name: e for e in entries}
        strange = sorted(n for n, e in files.items() if not (_known_file(e) or _is_folder_of_templates(e)))
        problem = f"it holds {strange[0]}" if strange else _missing(files)
        if problem:
            raise UsageError(
                f"{self.out} is not a model folder, so it is not overwritten: {problem}",
                hint="choose another name, or move away what is there",
            )
        if self._inputs & _identities([*(path / name for name in files), *(path / FOLDER).glob("*")]):
            raise UsageError(f"{self.out} holds files of the source", hint="choose another name")


class FileTarget:
    """The file `out`, made from `source`, which reads `inputs`; `outputs` are what else the run writes."""

    def __init__(
        self, out: Path, source: Path, inputs: Iterable[Path], outputs: Iterable[Path] = (), *, force: bool
    ) -> None:
        self.out, self._source, self._inputs, self._outputs = out, source, _identities(inputs), tuple(outputs)
        self.may_replace: MayReplace | None = self._check_file if force else None

    def check(self) -> None:
        """UsageError if the run is going to be refused its output."""
        place = _place(self.out)
        for other in self._outputs:
            _check_apart(self.out, other)
        if os.path.lexists(place):
            self._check_file(place)
        if place.suffix.lower() != ".gguf" and _within(place, self._source):
            raise UsageError(f"{self.out} would be part of the source {self._source}", hint="write it elsewhere")
        if _known(place.name) and _holds_model(place.parent):
            raise UsageError(f"{self.out} would be part of the model in {place.parent}", hint="choose another name")
        check_free(self.out, place, self.may_replace)

    def _check_file(self, path: Path) -> None:
        _check_kind(self.out, path, stat.S_ISREG, "a file")
        if _identities([path]) & self._inputs:
            what = "the source" if _same_place(path, self._source) else "a file of the source"
            raise UsageError(f"{self.out} is {what}", hint="choose another name")


def files_of(source: Path) -> list[Path]:
    """What a run may read of a checkpoint: the file, or all files of the folder but exports that lie there."""
    if not source.is_dir():
        return [source]
    files = [*source.iterdir(), *(source / FOLDER).glob("*.jinja")]
    return [path for path in files if path.is_file() and path.suffix.lower() != ".gguf"]


def _check_apart(out: Path, other: Path) -> None:
    """UsageError if one of two results would be, or lie in, the other."""
    if _same_place(real_place(out), real_place(other)):
        raise UsageError(f"{out} and {other} are the same", hint="give each result a name of its own")
    for inner, outer in ((out, other), (other, out)):
        if _within(real_place(inner), outer):
            raise UsageError(f"{inner} lies in {outer}, which is written too", hint="write it elsewhere")


def _place(out: Path) -> Path:
    """Where `out` is or will be; UsageError if nothing can be there, such as below a file or behind a loop of links."""
    try:
        place = real_place(out)
        with suppress(FileNotFoundError):
            place.lstat()
    except (OSError, RuntimeError) as error:  # the latter is Python's word for a loop
        problem = getattr(error, "strerror", None) or one_line(error)
        raise UsageError(f"{out} cannot be written: {problem}", hint="choose another name") from None
    return place


def _check_kind(out: Path, path: Path, right: object, wanted: str) -> None:
    """UsageError if there is something at `path` of another kind than `wanted`."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    kind = next(((is_it, name) for is_it, name in _KINDS if is_it(mode)), (None, "a device"))
    if kind[0] is right:
        return
    if stat.S_ISLNK(mode):
        raise UsageError(f"{out} is a symbolic link", hint=f"name what it points to: {path.readlink()}")
    raise UsageError(f"{out} exists and is {kind[1]}, not {wanted}", hint="choose another name")


def _known_file(entry: os.DirEntry[str]) -> bool:
    return _known(entry.name) and entry.is_file(follow_symlinks=False)


def _is_folder_of_templates(entry: os.DirEntry[str]) -> bool:
    if entry.name != FOLDER or not entry.is_dir(follow_symlinks=False):
        return False
    with os.scandir(entry.path) as entries:
        return all(e.name.endswith(".jinja") and e.is_file(follow_symlinks=False) for e in entries)


def _known(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in MODEL_FILES)


def _holds_model(folder: Path) -> bool:
    """Whether a folder has what a model needs, whatever else is in it."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:
        return False
    return bool(names) and _missing(names) is None


def _missing(names: Iterable[str]) -> str | None:
    """What a folder lacks to be a model's; an empty one lacks nothing, for nothing is lost with it."""
    names = list(names)
    if names and "config.json" not in names:
        return "it has no config.json"
    if names and not any(fnmatchcase(name, _WEIGHTS) for name in names):
        return f"it has no {_WEIGHTS}"
    return None


def _identities(paths: Iterable[Path]) -> frozenset[_Identity]:
    """Which files these are; links and hard links are the file they lead to."""
    found = set()
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            continue
        found.add((status.st_dev, status.st_ino))
    return frozenset(found)


def _within(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or lies in it, by whatever names."""
    place, owner = path.resolve(), real_place(folder)
    return owner in (place, *place.parents) or bool(_identities([folder]) & _identities([place, *place.parents]))


def _same_place(one: Path, other: Path) -> bool:
    """Whether two names are, or somewhere might be, the same: many file systems ignore case and Unicode's forms."""
    if _identities([one]) & _identities([other]):
        return True
    parents = one.parent.resolve() == other.parent.resolve() or _identities([one.parent]) & _identities([other.parent])
    return bool(parents) and _folded(one.name) == _folded(other.name)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
