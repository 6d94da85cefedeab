"""The working folder of a calibration, which the next run goes on from when this one is killed.

It stands beside the output, `.NAME.calibration`, and holds a lock, what the run was asked for, every matrix that is
solved, and the activations that the next block begins with. A run that was asked for anything else clears it. The error
that ends a run says where it is (as a note, PEP 678).

What is kept has a checksum with it, looked at when a run first reads what another wrote: what is damaged counts as not
there, and is made again.
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from edgeq.errors import ModelError, UsageError
from edgeq.files.lock import Lock
from edgeq.files.publish import real_place, told
from edgeq.formats.affine import dequantize
from edgeq.formats.bf16 import Array, Float32
from edgeq.formats.qmatrix import QMatrix
from edgeq.formats.safetensors import SafetensorsFile, SafetensorsWriter, dtype_name

__all__ = ["Solved", "SolvedMatrix", "Unfinished", "Workspace", "find_unfinished"]

_ASKED = "asked.json"
_KIND = ".calibration"
_OURS = (".safetensors", ".arrays", ".json", ".new")  # how names of files in it end, but for the lock's


class SolvedMatrix(Protocol):
    """A matrix as a format has it: a NamedTuple of arrays and of values for JSON, among them `error`, the squared error
    of its output per token, and `squares` and `squared_error`, of the weights that were rounded and of the
    difference."""

    @property
    def error(self) -> float: ...
    @property
    def squares(self) -> float: ...
    @property
    def squared_error(self) -> float: ...
    def rows(self, rows: slice | Array) -> Float32:
        """Some rows as float32 [rows, in]."""
        ...

    def stacked(self, below: Sequence[Self]) -> Self:
        """One matrix of these rows and those below."""
        ...

    def _asdict(self) -> dict[str, Any]: ...


class Solved(NamedTuple):
    """A matrix as it will be written: words uint32, scales and biases [out, groups], mapped from the working folder.

    error: the squared error of its output per token; squares, squared_error: of the weights that were rounded, and of
    the difference.
    """

    words: Array
    scales: Array
    biases: Array
    bits: int
    group_size: int
    error: float
    squares: float
    squared_error: float

    def rows(self, rows: slice | Array) -> Float32:
        """Some rows as float32 [rows, in]."""
        return dequantize(QMatrix(self.words[rows], self.scales[rows], self.biases[rows], self.bits, self.group_size))

    def stacked(self, below: Sequence[Solved]) -> Solved:
        """One matrix of these rows and those below."""
        parts = (self, *below)
        return self._replace(
            words=np.concatenate([part.words for part in parts]),
            scales=np.concatenate([part.scales for part in parts]),
            biases=np.concatenate([part.biases for part in parts]),
            error=sum(part.error for part in parts),
            squares=sum(part.squares for part in parts),
            squared_error=sum(part.squared_error for part in parts),
        )


class Workspace:
    """A working folder for the output `out` of a run that `asked` describes, as JSON takes it. Closing it keeps what is
    done, if anything is; `remove` does not. `form` is what a solved matrix is kept as: a NamedTuple of arrays and of
    values for JSON.

    UsageError where another run is at work in it.
    """

    def __init__(self, out: Path, asked: Mapping[str, Any], form: type[Any] = Solved) -> None:
        self._form = form
        self._whole = set[str]()  # files that this run has written or looked at
        place = real_place(out)
        self.folder = place.with_name(f".{place.name}{_KIND}")
        if self.folder.is_symlink():
            raise UsageError(f"{self.folder} is a link, expected a working folder", hint="remove it, or rename it")
        with told(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.folder / "lock")
        if self._lock.state == "taken":
            self._lock.close()
            raise UsageError(f"another run is calibrating {out}", hint="wait until it is done, or choose another name")
        text = json.dumps(asked, sort_keys=True)
        before = self._read_asked()
        if before != text:
            self._clear()
            if before is not None:
                differs = _difference(json.loads(before), asked)
                warnings.warn(f"{out}: an unfinished calibration differs in {differs}: starting anew", stacklevel=4)
            self._write(_ASKED, text.encode())
        self.resumed = before == text

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        nbytes = self._nbytes()
        if not nbytes:
            self.remove()
        elif error is not None:
            error.add_note(
                f"what is calibrated so far ({nbytes / 1e6:,.1f} MB) is kept in {self.folder}: the same command goes "
                f"on from it, `edgeq clean {quote(str(self.folder.parent))}` removes it"
            )
        self._lock.close()

    def _nbytes(self) -> int:
        """Bytes of what was made in it."""
        with suppress(OSError):
            return sum(path.stat().st_size for path in self.folder.iterdir() if path.name not in (_ASKED, "lock"))
        return 0

    def remove(self) -> None:
        """Remove it: what was made in it has been put to use, or is of no use."""
        _remove(self.folder)

    # --- matrices ----------------------------------------------------------------------------------------------------

    def solved(self, name: str) -> Any:
        """The matrix `name` in its form, if it has been solved, else None."""
        file = self._file(f"{name}.safetensors")
        if file is None:
            return None
        arrays = {key: file.array(key) for key in file.tensors}
        return self._form(**arrays, **{key: json.loads(value) for key, value in file.metadata.items()})

    def keep_solved(self, name: str, solved: SolvedMatrix) -> None:
        """Keep a matrix, which is of the form."""
        fields = solved._asdict()
        arrays = {key: value for key, value in fields.items() if isinstance(value, np.ndarray)}
        facts = {key: json.dumps(value) for key, value in fields.items() if key not in arrays}
        self._write_arrays(f"{name}.safetensors", arrays, facts)

    # --- anything else -----------------------------------------------------------------------------------------------

    def arrays(self, name: str) -> dict[str, Array] | None:
        """Arrays kept under `name`, mapped."""
        file = self._file(f"{name}.arrays")
        if file is None:
            return None
        return {key: file.array(key) for key in file.tensors}

    def keep_arrays(self, name: str, arrays: Mapping[str, Array]) -> None:
        """Keep arrays under `name`; what had the name before is replaced in one step."""
        self._write_arrays(f"{name}.arrays", arrays, {})

    def value(self, name: str) -> Any:
        """A value kept under `name`; None if there is none."""
        with suppress(OSError, ValueError, RecursionError):
            kept = json.loads((self.folder / f"{name}.json").read_bytes())
            if isinstance(kept, dict) and kept.get("sum") == _sum({}, kept.get("value")):
                return kept["value"]
        return None

    def keep_value(self, name: str, value: Any) -> None:
        """Keep a value as JSON."""
        self._write(f"{name}.json", json.dumps({"value": value, "sum": _sum({}, value)}).encode())

    def _file(self, name: str) -> SafetensorsFile | None:
        """A whole file, if there is one."""
        with suppress(OSError, ModelError):
            file = SafetensorsFile(self.folder / name)
            told = file.metadata.pop("sum", None)
            if name in self._whole or told == _sum({key: file.array(key) for key in file.tensors}, file.metadata):
                self._whole.add(name)
                return file
        return None

    def _write_arrays(self, file_name: str, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
        entries = {name: (dtype_name(x.dtype), x.shape) for name, x in arrays.items()}
        facts = {**metadata, "sum": _sum(arrays, metadata)}
        with self._new(file_name) as new, SafetensorsWriter(new, entries, facts) as file:
            for name, x in arrays.items():
                file.write(name, x)
        self._whole.add(file_name)

    def _write(self, name: str, data: bytes) -> None:
        with self._new(name) as new, new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _new(self, name: str) -> Iterator[Path]:
        """A file that gets the name `name` once it is whole."""
        new = self.folder / f"{name}.new"
        with told(self.folder):
            try:
                yield new
                new.replace(self.folder / name)
            finally:
                new.unlink(missing_ok=True)

    def _read_asked(self) -> str | None:
        with suppress(OSError, ValueError):
            text = (self.folder / _ASKED).read_text("utf-8")
            return text if isinstance(json.loads(text), dict) else None
        return None

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.suffix in _OURS:
                path.unlink()


class Unfinished(NamedTuple):
    """A working folder that nobody works in."""

    path: Path
    nbytes: int

    def remove(self) -> bool:
        """Remove it, if nobody has gone on with it; False if something remains."""
        lock = Lock(self.path / "lock")
        try:
            if lock.state == "mine":
                _remove(self.path)
        finally:
            lock.close()
        return not self.path.exists()


def find_unfinished(folder: Path) -> list[Unfinished]:
    """The working folders in a folder that killed runs have left."""
    found = []
    for path in sorted(folder.glob(f".*{_KIND}")):
        with suppress(OSError):
            lock = Lock(path / "lock", shared=True)
            if lock.state == "mine":
                found.append(Unfinished(path, sum(file.stat().st_size for file in path.iterdir())))
            lock.close()
    return found


def _remove(folder: Path) -> None:
    """Remove a working folder, its lock last, but nothing that is not its own."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.suffix in _OURS:
                path.unlink()
        (folder / "lock").unlink(missing_ok=True)
        folder.rmdir()


def _sum(arrays: Mapping[str, Array], facts: Any) -> str:
    """A checksum (CRC-32) of arrays by name and what else is kept with them, as JSON takes it."""
    shapes = [(name, dtype_name(x.dtype), x.shape) for name, x in sorted(arrays.items())]
    crc = zlib.crc32(json.dumps([shapes, facts], sort_keys=True).encode())
    for _, x in sorted(arrays.items()):
        crc = zlib.crc32(np.ascontiguousarray(x).data, crc)
    return f"{crc:08x}"


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs, by name; of the settings, which."""

    def names(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
        return [name for name in {**one, **other} if one.get(name) != other.get(name)]

    found = names(before, now)
    old, new = before.get("settings"), now.get("settings")
    if "settings" in found and isinstance(old, Mapping) and isinstance(new, Mapping):
        found[found.index("settings")] = f"settings ({', '.join(names(old, new))})"
    return ", ".join(found) or "its form"
