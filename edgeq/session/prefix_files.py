"""Kept prefixes on disk: a folder that several processes, and later ones, share.

A prefix is two files. NAME.kv has its token ids and its keys and values from where another one, its parent, ends;
NAME.state the DeltaNet states and the ends of the convolutions. Those are the larger part for a turn of a conversation,
and may go without what builds on the keys and values. NAME tells the model (weights, configuration, backend and type of
keys and values) and the prefix: its ids, its pictures, and how it was run. What an MTP head remembers is left out: it
joins anew.

A file appears whole, by a rename, and is never written again. Nothing waits for the disk: a file that a power cut has
left in pieces, or anything else has damaged, does not have the checksums that it claims, and is removed. Keys and
values are used where the file is mapped, if the backend can.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from time import time
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from edgeq.engine import Engine, Ids
from edgeq.errors import EdgeqError, UsageError
from edgeq.formats.bf16 import Array
from edgeq.formats.safetensors import SafetensorsFile, SafetensorsWriter, dtype_name
from edgeq.inputs import exists, expand_user
from edgeq.printable import brief
from edgeq.session.cuts import Said
from edgeq.state import BLOCK, KVCache, State
from edgeq.state_io import state_from_stored, stored_arrays

__all__ = ["Filed", "Line", "PrefixFolder", "Shown", "default_folder", "folder_size", "split_folder"]

FORMAT = "edgeq prefix 1"
PARTIAL = ".partial"  # what a file's name ends in while it is written
ABANDONED = 3600  # seconds after which nobody writes to it any more
_ODD = (KeyError, ValueError, TypeError, IndexError, RecursionError, OverflowError, AttributeError)

MOST = 4_000_000_000  # bytes of a folder, or half of what is free on its disk
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE | re.ASCII)

Shown = tuple[int, int, int, int, str, int]
"""What tells apart what stands in a picture's place: its first token, that one's position, rows, columns, digest,
frame."""

Line = tuple[tuple[int, str], ...]
"""The files in which a state's keys and values are, in order: after how many tokens each ends, and its name."""


class Filed(NamedTuple):
    """A prefix in the folder: how long it is, the keys that it is found by from its parent's end on, and what it shows
    and how it was run."""

    name: str
    line: Line
    keys: Ids
    shown: tuple[Shown, ...]
    spoken: Said
    has_state: bool

    @property
    def stop(self) -> int:
        return self.line[-1][0]


class PrefixFolder:
    """The prefixes of a model in a folder, which has at most `limit` bytes, those of other models included.

    Raises UsageError for what cannot be a folder to write to.
    """

    def __init__(self, folder: Path, engine: Engine[Any, Any], limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._engine = engine
        self._model = blake2b(f"{FORMAT} {engine.fingerprint}".encode(), digest_size=8).hexdigest()
        self._known: dict[str, Filed] = {}
        self._seen = -1  # when the folder was changed last
        self._told = False  # that there is no room
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UsageError(
                f"{folder} cannot be used for prefixes: {error.strerror}", hint="give a folder that can be written to"
            ) from None

    # --- what there is -----------------------------------------------------------------------------------------------

    def look(self) -> Mapping[str, Filed] | None:
        """The prefixes in the folder by name, parents before those that build on them; None where it is as it was."""
        try:
            changed = self.folder.stat().st_mtime_ns
        except OSError:
            changed, self._known = -1, {}
        if changed == self._seen:
            return None
        self._seen, known = changed, dict[str, Filed]()
        names = {path.name for path in self._files(f"{self._model}-")}
        waiting = [name.removesuffix(".kv") for name in names if name.endswith(".kv")]
        parents = dict[str, str]()
        for name in waiting:
            filed = self._known.get(name) or self._opened(name)
            if filed is not None:
                known[name] = filed._replace(has_state=f"{name}.state" in names)
                parents[name] = filed.line[-2][1] if len(filed.line) > 1 else ""
        whole = dict[str, Filed]()
        for name in sorted(known, key=lambda name: len(known[name].line)):
            if not parents[name] or parents[name] in whole:
                whole[name] = known[name]
        self._known = whole
        return whole

    def _opened(self, name: str) -> Filed | None:
        """What a file says of a prefix; None where there is none."""
        found = self._load(f"{name}.kv", only=("keys",))
        if found is None:
            return None
        about, arrays = found
        try:
            line = tuple((int(stop), str(each)) for stop, each in about["line"])
            shown = tuple((*map(int, place[:4]), str(place[4]), int(place[5])) for place in about["shown"])
            spoken = tuple((int(first), int(last)) for first, last in about["spoken"])
            keys = np.array(arrays["keys"])
            if keys.dtype != np.int32 or line[-1] != (len(keys) + (line[-2][0] if len(line) > 1 else 0), name):
                raise ValueError("its keys are not those of its line")
        except _ODD:
            self._remove(f"{name}.kv")
            return None
        return Filed(name, line, keys, shown, spoken, has_state=False)  # type: ignore[arg-type]

    def read(self, filed: Filed) -> State[Any] | None:
        """The state of a prefix; None where it is not there any more, or damaged."""
        ops, c, base = self._engine.ops, self._engine.config, None
        for stop, name in filed.line:
            found, last = self._load(f"{name}.kv"), name == filed.name
            if found is None:
                return None
            arrays = found[1]
            try:
                if not last:
                    base = self._with_caches(arrays, stop, base)
                    continue
                if (rest := self._load(f"{name}.state")) is None:
                    return None
                state = state_from_stored(ops, c, {**arrays, **rest[1]}, base)
            except (EdgeqError, *_ODD):
                self._remove(f"{name}.kv")
                return None
            if state.length != stop:
                self._remove(f"{name}.state")
                return None
            with suppress(OSError):
                os.utime(self.folder / f"{name}.state")
            return state._replace(origin=self._engine.fingerprint)
        return None

    def _with_caches(self, arrays: Mapping[str, Array], stop: int, base: State[Any] | None) -> State[Any]:
        """A state of which only the keys and values are known."""
        ops, c, skipped = self._engine.ops, self._engine.config, int(arrays["skipped"])
        shape, dtype = ops.block_like(c.num_key_value_heads, c.head_dim)
        layers = list[Any]()
        for i, kind in enumerate(c.layer_types):
            if kind != "full_attention":
                layers.append(None)
                continue
            before, blocks = base.layers[i] if base else None, arrays[f"layers.{i}.kv"]
            assert before is None or isinstance(before, KVCache)
            count = -(-stop // BLOCK) - skipped
            if skipped * BLOCK > (before.length if before else 0) or count < 0:
                raise ValueError("tokens are missing")
            if count and (blocks.shape != (count, *shape) or blocks.dtype != dtype):
                raise ValueError("it has other keys and values")
            layers.append(
                ops.stored_cache(
                    list(blocks[:count]), stop, c.num_key_value_heads, c.head_dim, before if skipped else None
                )
            )
        return State(tuple(layers), stop, stop)

    def _load(self, name: str, only: tuple[str, ...] = ()) -> tuple[dict[str, Any], dict[str, Array]] | None:
        """What a file says, and its tensors, or some of them, as it claims to have them; None for one that is not
        there, or another model's. What is damaged is removed."""
        try:
            file = SafetensorsFile(self.folder / name)
            if file.metadata.get("model") != self._engine.fingerprint or file.metadata.get("format") != FORMAT:
                return None
            about, sums = json.loads(file.metadata["about"]), json.loads(file.metadata["sums"])
            arrays = {tensor: file.array(tensor) for tensor in only or file.tensors}
            if any(crc32(_bytes(array)) != sums[tensor] for tensor, array in arrays.items()):
                raise ValueError("its checksums are others")
            file.check_whole()
            return about, arrays
        except (EdgeqError, *_ODD):
            if (self.folder / name).exists():  # else somebody has made room
                self._remove(name)
            return None

    # --- what is written ---------------------------------------------------------------------------------------------

    def write(
        self, keys: Ids, state: State[Any], shown: tuple[Shown, ...], spoken: Said, line: Line, *, named: str = ""
    ) -> Line:
        """Put a prefix into the folder, unless it is there; the files that have its keys and values.

        keys: of all of it. line: the files that its state is known to have grown out of. named: what people call it;
        others make room first. Nothing is raised where there is no room: what cannot be written is done without, and a
        warning says so once.
        """
        name = self._name(keys, shown, spoken)
        if (there := self._whole(name)) is not None and there.has_state and (self.folder / f"{name}.state").exists():
            with suppress(OSError):
                os.utime(self.folder / f"{name}.state")
            return there.line
        line = next((line[:i] for i in range(len(line), 0, -1) if self._whole(line[i - 1][1])), ())
        start = line[-1][0] if line else 0
        arrays = stored_arrays(self._engine.ops, state._replace(draft=None), start)
        caches = {tensor: arrays.pop(tensor) for tensor in list(arrays) if tensor.endswith(".kv")}
        caches |= {"keys": np.array(keys[start:], np.int32), "skipped": arrays["skipped"]}
        line = (*line, (len(keys), name))
        about = {"line": line, "shown": shown, "spoken": spoken, "named": named}
        try:
            nbytes = len(json.dumps(about)) + 256 * (len(caches) + len(arrays) + 8)
            nbytes += sum(array.nbytes for array in (*caches.values(), *arrays.values()))
            if not self._makes_room(nbytes):
                self._do_without(f"may take {self.limit / 1e6:,.1f} MB, and what was read takes {nbytes / 1e6:,.1f} MB")
                return line[:-1]
            for part, tensors in ((".kv", caches), (".state", arrays)):
                self._put(f"{name}{part}", tensors, about if part == ".kv" else {})
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            self._do_without("is on a full disk" if full else f"cannot be written to ({error.strerror})")
            return ()
        self._known = {**self._known, name: Filed(name, line, keys[start:], shown, spoken, has_state=True)}
        self._seen = -1
        return line

    def _do_without(self, why: str) -> None:
        """Say, once, that something is not kept on disk."""
        if not self._told:
            self._told = True
            warnings.warn(f"{self.folder} {why}: a later run reads it again", stacklevel=3)

    def _whole(self, name: str) -> Filed | None:
        """A prefix whose keys and values are all there still."""
        filed = self._known.get(name)
        if filed is None or not all((self.folder / f"{each}.kv").exists() for _, each in filed.line):
            return None
        return filed

    def _name(self, keys: Ids, shown: tuple[Shown, ...], spoken: Said) -> str:
        digest = blake2b(np.ascontiguousarray(keys, np.int32).data, digest_size=16)
        digest.update(json.dumps([shown, spoken]).encode())
        return f"{self._model}-{digest.hexdigest()}"

    def _put(self, name: str, arrays: Mapping[str, Array], about: Mapping[str, Any]) -> None:
        entries = {tensor: (dtype_name(array.dtype), array.shape) for tensor, array in _widest_first(arrays)}
        sums = {tensor: crc32(_bytes(array)) for tensor, array in arrays.items()}
        metadata = {
            "format": FORMAT, "model": self._engine.fingerprint, "about": json.dumps(about), "sums": json.dumps(sums),
        }  # fmt: skip
        descriptor, partial = tempfile.mkstemp(prefix=".", suffix=PARTIAL, dir=self.folder)
        os.close(descriptor)
        try:
            with SafetensorsWriter(Path(partial), entries, metadata, durable=False) as file:
                for tensor, _ in entries.items():
                    file.write(tensor, arrays[tensor])
            Path(partial).replace(self.folder / name)
        except BaseException:
            with suppress(OSError):
                Path(partial).unlink()
            raise

    # --- what goes ---------------------------------------------------------------------------------------------------

    def _makes_room(self, nbytes: int) -> bool:
        """Let go of what was used longest ago, what has a name last, until so many bytes more are within the limit;
        whether they are."""
        if nbytes > self.limit:
            return False
        now, files = time(), dict[str, os.stat_result]()
        for path in self._files("."):
            with suppress(OSError):
                if path.name.endswith(PARTIAL) and path.stat().st_mtime < now - ABANDONED:
                    path.unlink()
        for path in self._files():
            with suppress(OSError):
                files[path.name] = path.stat()
        total = sum(status.st_size for status in files.values())
        if total + nbytes <= self.limit:
            return True
        lines = {name.removesuffix(".kv"): self._line(name) for name in files if name.endswith(".kv")}
        states = [name for name in files if name.endswith(".state")]
        states.sort(key=lambda name: (bool(lines.get(name.removesuffix(".state"), ((), ""))[1]), files[name].st_mtime))
        while total + nbytes > self.limit and (states or files):
            if states:
                gone = states.pop(0)
                self._remove(gone)
                total -= files.pop(gone).st_size
            needed = {each for name in states for each in lines.get(name.removesuffix(".state"), ((), ""))[0]}
            for name in [name for name in files if name.endswith(".kv") and name.removesuffix(".kv") not in needed]:
                self._remove(name)
                total -= files.pop(name).st_size
            if not states and not any(name.endswith(".kv") for name in files):
                break
        return total + nbytes <= self.limit

    def _line(self, name: str) -> tuple[tuple[str, ...], str]:
        """The names of the files that a prefix of any model needs, and what people call it."""
        own = self._known.get(name.removesuffix(".kv"))
        try:
            about = json.loads(SafetensorsFile(self.folder / name).metadata["about"])
            return tuple(str(each) for _, each in about["line"]), str(about["named"])
        except (EdgeqError, *_ODD):
            return tuple(each for _, each in own.line) if own else (), ""

    def _files(self, begins: str = "") -> Iterator[Path]:
        """The folder's files of the names that it gives, or of those that begin in a certain way."""
        with suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                ours = entry.name.endswith((".kv", ".state")) or entry.name.endswith(PARTIAL)
                if ours and entry.name.startswith(begins) and (begins or not entry.name.startswith(".")):
                    yield Path(entry.path)

    def _remove(self, name: str) -> None:
        with suppress(OSError):
            (self.folder / name).unlink()


def _bytes(array: Array) -> memoryview | bytes:
    return np.ascontiguousarray(array).data if array.size else b""


def _widest_first(arrays: Mapping[str, Array]) -> list[tuple[str, Array]]:
    return sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize)


def default_folder() -> Path:
    """Where prefixes are kept if nobody says where."""
    return expand_user(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "edgeq" / "prefixes"


def split_folder(given: str) -> tuple[Path, str | None]:
    """A folder as the command line has it, FOLDER or FOLDER:SIZE. UsageError for a name that ends in what is no size,
    unless there is such a folder, or a slash makes it one."""
    folder, colon, size = given.rpartition(":")
    if colon and folder and _SIZE.fullmatch(size):
        return expand_user(Path(folder)), size
    if colon and "/" not in size and not exists(expand_user(Path(given))):
        raise UsageError(
            f"a folder for prefixes is FOLDER or FOLDER:SIZE, such as cache:4G, got {brief(given)}",
            hint="give a size behind the colon, or a slash behind a name that has a colon",
        )
    return expand_user(Path(given)), None


def folder_size(folder: Path, size: int | str | None) -> int:
    """Bytes that a folder of prefixes may have. G and GB are 10^9 bytes, GiB 2^30; UsageError for what is no size."""
    if size is None:
        place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        return min(MOST, shutil.disk_usage(place).free // 2)
    found = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    nbytes = size if isinstance(size, int) and not isinstance(size, bool) else 0
    if found:
        nbytes = int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))
    if not 1 <= nbytes < 1 << 62:
        raise UsageError(
            f"the size of the folder for prefixes must be a number of bytes such as 4G, got {brief(size)}",
            hint="4G are 4,000,000,000 bytes",
        )
    return nbytes
