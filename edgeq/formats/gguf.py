"""GGUF files, memory-mapped: the container, whatever the model in it.

A file is the magic, a version, the numbers of tensors and of metadata entries, the entries, the tensors' names,
shapes, types and offsets, then, aligned, their data (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

Why not the reader of the `gguf` package: it makes one NumPy array per array element, so a vocabulary of 248,320
tokens costs 13 seconds and 740 MB (here: 0.1 seconds), and it believes every count in the file, so that one of 57
bytes takes all the memory there is. Here every count is held against the bytes that are left before anything is done
with it, arrays stay in the file until they are asked for, and all tensors must lie inside the file without overlap.

Large models come in parts, NAME-00001-of-0000N.gguf, each a file of its own: the first has the metadata, all have some
of the tensors (llama.cpp's `gguf-split`). `open_gguf` makes one file of them.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from edgeq.errors import ModelError
from edgeq.formats.bf16 import Array
from edgeq.formats.ggml import TYPES, GGMLType, type_name
from edgeq.formats.mapped import check_whole, drop_pages, map_file
from edgeq.inputs import is_file, open_file
from edgeq.printable import brief

__all__ = ["GGUFFile", "SplitGGUF", "TensorInfo", "first_part", "is_gguf", "open_gguf", "peek"]

# Limits that no model of the family comes near: beyond them a file is damaged or hostile.
_MAX_ENTRIES = 1 << 16
_MAX_NAME = 1 << 16  # bytes
_MAX_STRINGS = 1 << 22  # elements of string arrays, which have to be walked one by one
_MAX_DIMS = 4
_MAX_ALIGNMENT = 1 << 16
_PEEKED = 1 << 16  # bytes of a file that `peek` reads
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_SCALARS: Mapping[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_STRING, _ARRAY = 8, 9

T = TypeVar("T", int, float, bool, str)


class TensorInfo(NamedTuple):
    """A tensor's place: `shape` in NumPy's order (GGUF's is reversed), `start` from the beginning of the file."""

    type: GGMLType
    shape: tuple[int, ...]
    start: int
    nbytes: int


class _Strings(NamedTuple):
    """An array of strings, still in the file."""

    start: int
    length: int


class GGUFFile:
    """A mapped file: `metadata` typed by `get`, `array` and `strings`; `tensors`, and their bytes from `data`."""

    def __init__(self, path: Path, check: Callable[[GGUFFile], object] | None = None) -> None:
        """`check` is called when the metadata is there, before the tensors' entries are read."""
        self.path = path
        self.mapped = map_file(path)
        cursor = _Cursor(self.mapped, path)
        tensors, entries = _read_preamble(cursor)
        self._values: dict[str, Any] = {}
        for _ in range(entries):
            _read_entry(cursor, self._values)
        if check is not None:
            check(self)
        self.alignment = self._alignment()
        infos = [self._read_tensor(cursor) for _ in range(tensors)]
        self.tensors = self._place(infos, -(-cursor.at // self.alignment) * self.alignment)

    # --- metadata ----------------------------------------------------------------------------------------------------

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def beginning(self, prefix: str) -> list[str]:
        """The keys that begin so, in the file's order."""
        return [key for key in self._values if key.startswith(prefix)]

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """A single value; ModelError if it is missing without a default, or not of this kind."""
        value = self._values.get(key, default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            found = _described(value)
            raise ModelError(f"{self.path}: metadata {key} is {found}, expected a value of type {kind.__name__}")
        return value

    def value(self, key: str) -> object:
        """A single value of whatever kind; None if it is missing or an array."""
        value = self._values.get(key)
        return None if isinstance(value, np.ndarray | _Strings) else value

    @property
    def single_values(self) -> dict[str, Any]:
        """The metadata but its lists."""
        return _single(self._values)

    def array(self, key: str) -> Array:
        """An array of numbers; ModelError if it is missing or holds something else."""
        value = self._values.get(key)
        if not isinstance(value, np.ndarray):
            raise self._not_a("array of numbers", key)
        return value

    def has_list(self, key: str) -> bool:
        """Whether the metadata has an array of numbers under this key."""
        return isinstance(self._values.get(key), np.ndarray)

    def integers(self, key: str) -> list[int]:
        """An array of whole numbers, or of true and false; ModelError if it is missing or holds something else."""
        values = self.array(key)
        if values.dtype.kind not in "iub":
            raise self._not_a("array of whole numbers", key)
        return [int(value) for value in values]

    def strings(self, key: str) -> list[str]:
        """An array of strings; ModelError if it is missing or holds something else."""
        value = self._values.get(key)
        if not isinstance(value, _Strings):
            raise self._not_a("array of strings", key)
        at, strings = value.start, []
        try:
            for _ in range(value.length):  # lengths were checked when the file was opened
                start = at + 8
                at = start + _U64.unpack_from(self.mapped, at)[0]
                strings.append(str(self.mapped[start:at], "utf-8"))
        except UnicodeDecodeError:
            raise self.error(f"metadata {key!r} at byte {at:,} is not UTF-8") from None
        return strings

    def _not_a(self, kind: str, key: str) -> ModelError:
        found = f"not an {kind}" if key in self._values else "missing"
        return ModelError(f"{self.path}: metadata {key} is {found}")

    # --- tensors -----------------------------------------------------------------------------------------------------

    def data(self, name: str) -> Array:
        """A tensor's bytes: a read-only uint8 view of the mapped file. ModelError if it has been cut short."""
        self.check_whole()
        info = self.tensors[name]
        return np.frombuffer(self.mapped, np.uint8, count=info.nbytes, offset=info.start)

    def check_whole(self) -> None:
        """ModelError if the file has been cut short since it was opened, or could not be read."""
        check_whole(self.mapped, self.path)

    def drop_pages(self) -> None:
        """Tell the system that the pages read so far are not needed in memory; they stay readable."""
        drop_pages(self.mapped)

    # --- reading -----------------------------------------------------------------------------------------------------

    def error(self, problem: str) -> ModelError:
        return _invalid(self.path, problem)

    def _alignment(self) -> int:
        alignment = self.get("general.alignment", int, 32)
        if not 8 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.error(f"general.alignment is {alignment}, expected a power of two from 8 to {_MAX_ALIGNMENT}")
        return alignment

    def _read_tensor(self, cursor: _Cursor) -> tuple[str, TensorInfo]:
        """A tensor's entry; its `start` still counts from the beginning of the data."""
        name = cursor.name()
        dims = cursor.u32()
        if not 1 <= dims <= _MAX_DIMS:
            raise self.error(f"tensor {name!r} has {dims} dimensions")
        shape = tuple(cursor.u64() for _ in range(dims))[::-1]
        type_id, offset = cursor.u32(), cursor.u64()
        if type_id not in TYPES:
            raise ModelError(
                f"{self.path}: tensor {name!r} is of type {type_name(type_id)}, which edgeq does not read",
                hint=f"use another quantization of the model: {', '.join(t.name for t in TYPES.values())}",
            )
        kind = TYPES[type_id]
        if 0 in shape or shape[-1] % kind.block or prod(shape) // kind.block * kind.nbytes > len(self.mapped):
            raise self.error(f"tensor {name!r} {kind.name} has shape {list(shape)}")
        if offset % self.alignment:
            raise self.error(f"tensor {name!r} is at offset {offset}, not a multiple of {self.alignment}")
        return name, TensorInfo(kind, shape, offset, prod(shape) // kind.block * kind.nbytes)

    def _place(self, infos: list[tuple[str, TensorInfo]], data: int) -> dict[str, TensorInfo]:
        """Turn offsets into positions; no two tensors may overlap, and none may lie beyond the end."""
        end, before = 0, "the header"
        for name, info in sorted(infos, key=lambda item: item[1].start):
            if info.start < end:
                raise self.error(f"tensor {name!r} overlaps {before!r}")
            end, before = info.start + info.nbytes, name
        if data + end > len(self.mapped):
            raise self.error(f"the tensors end at byte {data + end:,}, the file at {len(self.mapped):,}")
        tensors = {name: info._replace(start=data + info.start) for name, info in infos}
        if len(tensors) != len(infos):
            raise self.error("a tensor's name occurs twice")
        return tensors


class SplitGGUF(GGUFFile):
    """The parts of a split model as one file: the first part's metadata, the tensors of all."""

    def __init__(self, parts: Sequence[GGUFFile]) -> None:
        """ModelError for a part that is none, or of another model."""
        first = parts[0]
        self.path, self.mapped, self.alignment, self._values = first.path, first.mapped, first.alignment, first._values
        self.parts = tuple(parts)
        self._where: dict[str, GGUFFile] = {}
        for number, part in enumerate(parts):
            self._add(number, part)
        self.tensors = {name: part.tensors[name] for name, part in self._where.items()}
        if len(self.tensors) != (count := self.get("split.tensors.count", int, len(self.tensors))):
            raise ModelError(
                f"{self.path}: its {len(parts)} parts hold {len(self.tensors)} tensors, expected {count}",
                hint="download all parts again, from one place",
            )

    def _add(self, number: int, part: GGUFFile) -> None:
        known = part.get("split.no", int, -1), part.get("split.count", int, -1)
        twice = next((name for name in part.tensors if name in self._where), None)
        if known != (number, len(self.parts)):
            problem = f"says that it is part {known[0] + 1} of {known[1]}" if known[1] > 0 else "is no part of a split"
        elif twice is not None:
            problem = f"holds {twice}, as {self._where[twice].path.name} does"
        else:
            self._where |= dict.fromkeys(part.tensors, part)
            return
        raise ModelError(
            f"{part.path} is not part {number + 1} of {len(self.parts)} of this model: it {problem}",
            hint="download the parts again, from one place",
        )

    def data(self, name: str) -> Array:
        return self._where[name].data(name)

    def check_whole(self) -> None:
        for part in self.parts:
            part.check_whole()

    def drop_pages(self) -> None:
        for part in self.parts:
            part.drop_pages()

    @property
    def paths(self) -> list[Path]:
        return [part.path for part in self.parts]


def open_gguf(path: Path, check: Callable[[GGUFFile], object] | None = None) -> GGUFFile:
    """Open a file, with all its parts if it is the first of several.

    check: called with the metadata of `path`, before tensors are read. ModelError for a part that is missing.
    """
    first = GGUFFile(path, check)
    count = first.get("split.count", int, 1)
    if count <= 1:
        return first
    named = _PART.fullmatch(path.name)
    if named is None or int(named["count"]) != count or int(named["number"]) != 1:
        raise ModelError(
            f"{path} is the first of {count} parts of a model, and its name does not tell the others'",
            hint=f"name the parts {path.stem}-00001-of-{count:05d}.gguf and so on, as they were downloaded",
        )
    others = [path.with_name(f"{named['stem']}-{n:05d}-of-{named['count']}{path.suffix}") for n in range(2, count + 1)]
    absent = [other for other in others if not is_file(other)]
    if absent:
        missing = f"{absent[0].name} is" if len(absent) == 1 else f"{absent[0].name} and {len(absent) - 1} more are"
        raise ModelError(
            f"{path} is the first of {count} parts, and {missing} missing beside it",
            hint="download all parts into one folder",
        )
    return SplitGGUF([first, *map(GGUFFile, others)])


def first_part(path: Path) -> Path:
    """The first part of the model that a file is a later part of, by its name; any other path as it is."""
    named = _PART.fullmatch(path.name)
    if named is None or int(named["number"]) < 2:
        return path
    return path.with_name(f"{named['stem']}-{1:05d}-of-{named['count']}{path.suffix}")


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do, whatever it is called."""
    try:
        with open_file(path) as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def peek(path: Path) -> dict[str, Any]:
    """The single values in the first pages of a file's metadata: what it is, without reading all of it.

    What cannot be read is left out; of a file that is no GGUF, that is everything.
    """
    values: dict[str, Any] = {}
    try:
        with open_file(path) as file:
            cursor = _Cursor(file.read(_PEEKED), path)
        for _ in range(_read_preamble(cursor)[1]):
            _read_entry(cursor, values)
    except (OSError, ModelError):
        pass
    return _single(values)


def _single(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not isinstance(value, np.ndarray | _Strings)}


def _invalid(path: Path, problem: str) -> ModelError:
    return ModelError(f"{path} is not a valid GGUF file: {problem}", hint="download or copy the file again")


def _described(value: object) -> str:
    """A value of the metadata, for a message."""
    if value is None:
        return "missing"
    if isinstance(value, (np.ndarray, _Strings)):
        length = value.length if isinstance(value, _Strings) else len(value)
        return f"a list of {length:,} {'strings' if isinstance(value, _Strings) else 'numbers'}"
    return brief(value)


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    """The numbers of tensors and of metadata entries."""
    if cursor.mapped[:4] != b"GGUF":
        raise _invalid(cursor.path, "it does not begin with 'GGUF'")
    cursor.at = 4
    version = cursor.u32()
    if version not in (2, 3):
        if version & 0xFFFF == 0:
            raise ModelError(f"{cursor.path} is a big-endian GGUF file", hint="use a little-endian file")
        raise ModelError(
            f"{cursor.path} is GGUF version {version}; edgeq reads versions 2 and 3",
            hint="convert the model again with a current llama.cpp",
        )
    tensors, entries = cursor.u64(), cursor.u64()
    for count, what in ((tensors, "tensors"), (entries, "metadata entries")):
        if count > _MAX_ENTRIES:
            raise _invalid(cursor.path, f"it claims {count:,} {what}")
    return tensors, entries


def _read_entry(cursor: _Cursor, values: dict[str, Any]) -> None:
    key = cursor.name()
    if key in values:
        raise _invalid(cursor.path, f"metadata {key!r} occurs twice")
    values[key] = cursor.value(key, cursor.u32())


class _Cursor:
    """Reads the header front to back; every step is checked against the end of the file."""

    def __init__(self, mapped: mmap.mmap | bytes, path: Path) -> None:
        self.mapped, self.path, self.at = mapped, path, 0
        self._strings_left = _MAX_STRINGS

    def take(self, nbytes: int) -> int:
        """The position before the next `nbytes` bytes, which are passed over."""
        start, self.at = self.at, self.at + nbytes
        if self.at > len(self.mapped):
            size = len(self.mapped)
            raise _invalid(self.path, f"{nbytes:,} bytes are expected at byte {start:,}, the file has {size:,}")
        return start

    def u32(self) -> int:
        return int(_U32.unpack_from(self.mapped, self.take(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack_from(self.mapped, self.take(8))[0])

    def string(self, what: str) -> str:
        length = self.u64()
        start = self.take(length)
        try:
            return str(self.mapped[start : self.at], "utf-8")
        except UnicodeDecodeError:
            raise _invalid(self.path, f"{what} at byte {start:,} is not UTF-8") from None

    def name(self) -> str:
        """A metadata key or a tensor's name."""
        start = self.at
        name = self.string("a name")
        if not 0 < len(name) < _MAX_NAME:
            raise _invalid(self.path, f"a name of {len(name):,} characters at byte {start:,}")
        return name

    def value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self.string(f"metadata {key!r}")
        if kind == _ARRAY:
            return self._array(key, self.u32(), self.u64())
        return self._numbers(key, kind, 1)[0].item()

    def _array(self, key: str, kind: int, count: int) -> Array | _Strings:
        if kind != _STRING:
            return self._numbers(key, kind, count)
        self._strings_left -= count
        if self._strings_left < 0 or 8 * count > len(self.mapped) - self.at:
            raise _invalid(self.path, f"metadata {key!r} claims {count:,} strings")
        start, at, size, unpack = self.at, self.at, len(self.mapped), _U64.unpack_from
        for _ in range(count):  # the hot loop of opening a file: half a million strings in a real vocabulary
            if at + 8 > size:
                break
            at += 8 + unpack(self.mapped, at)[0]
        self.take(at - start if at <= size else size + 1)
        return _Strings(start, count)

    def _numbers(self, key: str, kind: int, count: int) -> Array:
        dtype = _SCALARS.get(kind)
        if dtype is None:
            raise _invalid(self.path, f"metadata {key!r} is of type {kind}")
        start = self.take(count * dtype.itemsize)
        values: Array = np.frombuffer(self.mapped, dtype, count=count, offset=start)
        if dtype == np.bool_ and (values.view(np.uint8) > 1).any():
            raise _invalid(self.path, f"metadata {key!r} holds a byte that is neither true nor false")
        return values
