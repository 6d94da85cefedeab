"""Safetensors files, memory-mapped for reading and streamed for writing.

A file is a little-endian uint64 n, n bytes of JSON (name -> dtype, shape, data_offsets), then the data
(https://github.com/huggingface/safetensors, "Format"). The header of a file from somewhere else is not to be
trusted: it is checked completely before any tensor is looked at. Nothing is copied: an array is a read-only view
of the mapped file, so weights that are not touched cost no memory and clean pages can be dropped by the system.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from edgeq.errors import ModelError
from edgeq.files.pieces import PieceWriter
from edgeq.formats.bf16 import Array
from edgeq.formats.mapped import check_whole, drop_pages, map_file
from edgeq.printable import brief

__all__ = ["DTYPES", "SafetensorsFile", "SafetensorsWriter", "TensorInfo", "dtype_name"]

DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # bit patterns, see edgeq.formats.bf16
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
    # What no tensor of edgeq's own has:
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U64": np.dtype("<u8"),
    "C64": np.dtype("<c8"),
}
_BITS: Mapping[str, int] = {  # of all that a valid file may hold: those without a NumPy type are given as bytes
    **{name: 8 * dtype.itemsize for name, dtype in DTYPES.items()},
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the reference implementation
_MAX_DIMS = 8


class TensorInfo(NamedTuple):
    """A tensor's place in a file: `start` and `end` count bytes from the beginning of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The format's name of a NumPy dtype: "BF16" for uint16."""
    return next(name for name, known in DTYPES.items() if known == dtype)


class SafetensorsFile:
    """A mapped file: `tensors` says what is in it, `array` gives one tensor, `metadata` the free-form strings.

    data_start: bytes before the data.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mapped = map_file(path)
        header, self.data_start = self._read_header()
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.tensors = {name: self._tensor_info(name, entry) for name, entry in header.items()}
        self._check_layout()

    def array(self, name: str) -> Array:
        """A read-only view of a tensor; bfloat16 comes as uint16, 8-bit floats as uint8, what is smaller as a row of
        bytes. ModelError if the file has been cut short."""
        self.check_whole()
        info = self.tensors[name]
        begin = self.data_start + info.start
        data = np.frombuffer(self.mapped, np.uint8, count=info.end - info.start, offset=begin)
        return data.view(DTYPES[info.dtype]).reshape(info.shape) if info.dtype in DTYPES else data

    def check_whole(self) -> None:
        """ModelError if the file has been cut short since it was opened, or could not be read."""
        check_whole(self.mapped, self.path)

    def drop_pages(self) -> None:
        """Tell the system that the pages read so far are not needed in memory; they stay readable."""
        drop_pages(self.mapped)

    def _error(self, problem: str) -> ModelError:
        return ModelError(
            f"{self.path} is not a valid safetensors file: {problem}",
            hint="download or copy the file again",
        )

    def _read_header(self) -> tuple[dict[str, Any], int]:
        size = len(self.mapped)
        if size < 8:
            raise self._error(f"{size} bytes, too short for a header")
        length = int.from_bytes(self.mapped[:8], "little")
        if length > min(size - 8, _HEADER_LIMIT):
            raise self._error(f"the header claims {length:,} bytes, the file has {size:,}")
        return self._parsed(self._header_bytes(length)), 8 + length

    def _header_bytes(self, length: int) -> bytes:
        return self.mapped[8 : 8 + length]

    def _parsed(self, blob: bytes) -> dict[str, Any]:
        try:
            header = json.loads(blob, object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            raise self._error(f"the header is not JSON ({error})") from None
        if not isinstance(header, dict):
            raise self._error("the header is not a JSON object")
        metadata = header.get("__metadata__")
        metadata = {} if metadata is None else metadata  # null: MLX, where nothing is to be said
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._error("__metadata__ is not an object of strings")
        return header

    def _tensor_info(self, name: str, entry: object) -> TensorInfo:
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise self._error(f"tensor {name!r} lacks dtype, shape or data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise self._error(f"tensor {name!r} has dtype {brief(dtype)}, expected one of {', '.join(_BITS)}")
        if not _sizes(shape) or len(shape) > _MAX_DIMS:
            raise self._error(f"tensor {name!r} has shape {brief(shape)}")
        if not _sizes(offsets) or len(offsets) != 2:
            raise self._error(f"tensor {name!r} has data_offsets {brief(offsets)}")
        nbits = prod(shape) * _BITS[dtype]
        if 8 * (offsets[1] - offsets[0]) != nbits:
            raise self._error(f"tensor {name!r} {dtype} {shape} needs {nbits // 8:,} bytes, its offsets are {offsets}")
        return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])

    def _check_layout(self) -> None:
        """The tensors must fill the data exactly: no overlap, no hole, nothing beyond the end."""
        end = 0
        for name, info in sorted(self.tensors.items(), key=lambda item: (item[1].start, item[1].end)):
            if info.start != end:
                kind = "overlaps the tensor before it" if info.start < end else "leaves a hole before it"
                raise self._error(f"tensor {name!r} {kind}")
            end = info.end
        self._check_end(end, len(self.mapped) - self.data_start)

    def _check_end(self, end: int, have: int) -> None:
        if end != have:
            raise self._error(f"the tensors need {end:,} bytes, the file holds {have:,}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 48 for v in values)


class SafetensorsWriter:
    """Writes a file tensor by tensor, in the order of `entries`, so that nothing large is ever held.

        with SafetensorsWriter(path, {"a": ("BF16", (2, 3))}, {"format": "pt"}) as file:
            file.write("a", block)  # as many blocks as it takes, in order

    The data starts at a multiple of 64 bytes and entries should come widest dtype first, so that every tensor is
    aligned. Leaving the context without error makes the bytes durable (fsync) unless they need not be. It can be mapped
    with large pages.
    """

    def __init__(
        self, path: Path, entries: Mapping[str, tuple[str, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None, *, durable: bool = True,
    ) -> None:  # fmt: skip
        self._durable = durable
        self._ends: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name, (dtype, shape) in entries.items():
            start, end = end, end + prod(shape) * DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
            self._ends[name] = end
        blob = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        blob += b" " * (-(len(blob) + 8) % 64)
        self._written = 0
        self._file = PieceWriter(path)
        try:
            self._file.write(len(blob).to_bytes(8, "little") + blob)
        except BaseException:
            self._abandon()
            raise

    def write(self, name: str, block: Array) -> None:
        """Append the next rows of tensor `name`."""
        data = np.ascontiguousarray(block)
        self._written += data.nbytes
        assert self._written <= self._ends[name], f"{name}: more data than declared"
        self._file.write(data.data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            self._abandon()
            return
        try:
            assert self._written == max(self._ends.values(), default=0), "less data than declared"
            (self._file.sync if self._durable else self._file.flush)()
        finally:
            self._abandon()

    def _abandon(self) -> None:
        with suppress(OSError):  # after an error that says more
            self._file.close()
