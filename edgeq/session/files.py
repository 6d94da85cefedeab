"""Session files: a conversation with its states, so that it goes on elsewhere and later as if it had never stopped.

The format is described in docs/reference/sessions.md. A file grows (`edgeq.formats.growing`): what a turn adds is its
keys and values, a state, and the conversation's text and ids. When it is read, states stay in the mapped file until
they are needed, and are held to their checksums before they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self
from zlib import crc32

import numpy as np

from edgeq.backends import choose
from edgeq.backends.numpy.kv_pages import page_arrays, page_nbytes
from edgeq.backends.ops import Ops
from edgeq.config import TextConfig
from edgeq.engine import Engine
from edgeq.errors import MemoryBudgetError, ModelError, UsageError
from edgeq.files.lock import Lock
from edgeq.files.publish import new_file, told
from edgeq.formats.bf16 import Array, to_float32
from edgeq.formats.growing import GrowingFile, GrownFile
from edgeq.formats.mapped import Pages
from edgeq.formats.safetensors import dtype_name
from edgeq.identify import is_session
from edgeq.inputs import exists, is_file
from edgeq.printable import brief, one_line
from edgeq.session.document import Document, read_document, read_pictures, read_settings, written_document
from edgeq.session.identity import model_identity
from edgeq.session.places import Place
from edgeq.session.prefixes import Prefix
from edgeq.session.snapshot import Settings, Snapshot
from edgeq.session.speaker import Speaker
from edgeq.state import BLOCK, DeltaState, DraftState, KVCache, Rows, State, joined
from edgeq.text.conversation import Conversation
from edgeq.version import __version__
from edgeq.vision.visual import Visual

__all__ = ["SavedSession", "SessionFile"]

FORMAT, VERSION = "edgeq session", 1
PIECE = 1 << 20  # bytes that are checked at a time
KEPT = 1 << 27  # bytes of DeltaNet states that are written beside the one where the conversation stands
WASTE = 1 << 26  # bytes of a file that may be of no use any more, or half of what is
_DAMAGED = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError, UsageError)
_IDENTITY = {"weights": "weights", "config": "settings in config.json", "tokenizer": "tokens"}
_SMALL = ("ids", "tokens", "flags", "session")


class Savable(Protocol):
    """A conversation: `edgeq.Chat`."""

    @property
    def model(self) -> Speaker: ...
    def snapshot(self) -> Snapshot: ...


class _Row(NamedTuple):
    """Where a file has the keys and values of BLOCK tokens of all layers.

    marks: what stands for them in memory, a layer each (`KVCache.mark`); tokens: so many of them were there.
    """

    marks: tuple[object, ...]
    segment: str
    place: int
    tokens: int


class _Handle(NamedTuple):
    """What stands for a state, whose own arrays need not be held for it: a cache, and what the MTP head remembers."""

    cache: object
    draft: object

    @classmethod
    def of(cls, state: State[Any]) -> Self:
        return cls(next((layer for layer in state.layers if isinstance(layer, KVCache)), state.layers), state.draft)

    def means(self, state: State[Any]) -> bool:
        other = self.of(state)
        return other.cache is self.cache and other.draft is self.draft


class _Known(NamedTuple):
    """What a file has: rows by what stands for them, states with what stands for each, and checksums."""

    rows: dict[tuple[int, ...], _Row]
    states: list[tuple[_Handle, dict[str, Any]]]
    checksums: dict[str, Any]

    def copy(self) -> _Known:
        return _Known(dict(self.rows), list(self.states), dict(self.checksums))


# --- writing ---------------------------------------------------------------------------------------------------------


class SessionFile:
    """A session file that a conversation is saved to, again and again; each time costs what is new.

    hold: keep other processes from writing to it as long as this is open. Raises UsageError if another one does.
    """

    def __init__(self, path: Path, *, hold: bool = False) -> None:
        self.path, self._hold = path, hold
        self._lock: Lock | None = None
        self._known: _Known | None = None  # of what is in the file
        self._left: tuple[int, ...] = ()  # how the file was left
        self._serial = 0
        if hold:
            self._take_lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others write to it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def read(self) -> SavedSession:
        """What is in the file."""
        return SavedSession(self.path)

    def restored(self, saved: SavedSession, model: Speaker) -> Snapshot:
        """The conversation in the file, which is then saved to it at the cost of what is new."""
        snapshot, self._known = saved.restored(model)
        self._left, self._serial = saved.stamp, saved.serial
        return snapshot

    def save(self, chat: Savable) -> None:
        """Write a conversation, whole: whatever happens, the file is as it was before or as it is after."""
        snapshot, model = chat.snapshot(), chat.model
        values = _about(model)
        with told(self.path):
            self._take_lock()
            try:
                if not self._appended(snapshot, model, values):
                    self._write_anew(snapshot, model, values)
                self._left = _stamp(self.path)
            finally:
                if not self._hold:
                    self.close()

    def _take_lock(self) -> None:
        if self._lock is not None or not exists(self.path):
            return
        _check_session(self.path)
        self._lock = _locked(self.path)

    def _appended(self, snapshot: Snapshot, model: Speaker, values: dict[str, Any]) -> bool:
        """Add to the file what is new; False where it has to be written anew."""
        if self._known is None or self._lock is None or _stamp(self.path) != self._left:
            return False
        file, known = GrowingFile.open(self.path), self._known.copy()
        try:
            if not file.has_room(64 + 8 * len(snapshot.prefixes) + len(snapshot.places)):
                return False
            waste = file.unused + _dead_nbytes(file, known)
            if waste > max(WASTE, (file.nbytes - waste) // 2):
                return False
            self._serial += 1
            try:
                _put(file, snapshot, model, values, known, self._serial)
            except BaseException:
                file.roll_back()
                raise
        finally:
            file.close()
        self._known = known
        return True

    def _write_anew(self, snapshot: Snapshot, model: Speaker, values: dict[str, Any]) -> None:
        known, mine = _Known({}, [], {}), self._lock

        def may_replace(path: Path) -> None:
            _check_session(path)
            if mine is None:  # it was not there a moment ago
                _locked(path).close()

        with new_file(self.path, room=_nbytes(snapshot, model), may_replace=may_replace) as out:
            file = GrowingFile.create(out, 64 + 8 * len(snapshot.prefixes) + len(snapshot.places))
            try:
                _put(file, snapshot, model, values, known, self._serial + 1)
            finally:
                file.close()
            lock = Lock(out)
        self._known, self._serial, self._lock = known, self._serial + 1, lock
        if mine is not None:
            mine.close()


def _locked(path: Path) -> Lock:
    lock = Lock(path)
    if lock.state == "taken":
        lock.close()
        raise UsageError(
            f"{path} is in use by another process, which saves its conversation to it",
            hint="end that one first, or choose another file",
        )
    return lock


def _check_session(path: Path) -> None:
    if not is_file(path) or not is_session(path):
        raise UsageError(f"{path} is there and is no session, so it is not replaced", hint="choose another name")


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when somebody else writes to a file."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _about(model: Speaker) -> dict[str, Any]:
    """What a file says of its maker."""
    checkpoint, ops = model.engine.checkpoint, model.engine.ops
    return {
        "edgeq": __version__,
        "model": {
            "name": checkpoint.config.name or checkpoint.path.name,
            "load": getattr(model, "source", None),
            **model_identity(checkpoint, model.language),
        },
        "backend": ops.name,
        "kv": ops.kv_dtype,
    }


def _put(
    file: GrowingFile, snapshot: Snapshot, model: Speaker, values: dict[str, Any], known: _Known, serial: int
) -> None:  # fmt: skip
    """Bring a file up to date with a conversation. known: what it has, and then what it has then."""
    ops, document = model.engine.ops, written_document(snapshot)
    prefixes = _chosen(snapshot.prefixes, ops, model.engine.config)
    _put_rows(file, prefixes, known, serial)
    states = [_put_state(file, ops, prefix, known, f"state.{serial}.{i}") for i, prefix in enumerate(prefixes)]
    _put_pictures(file, document.visuals, model, known)
    kept = {state["name"] for state in states}
    known.states[:] = [entry for entry in known.states if entry[1]["name"] in kept]
    live = {row.segment for row in known.rows.values()} | kept | {_picture(v) for v in document.visuals}
    gone = [name for name in known.checksums if _owner(name) not in live]
    for name in gone:
        del known.checksums[name]
    file.drop(gone)
    for name in _SMALL[:-1]:
        _add(file, known, name, getattr(document, name))
    values |= {"serial": serial, "states": states, "checksums": known.checksums, "conversation": document.values}
    try:
        text = json.dumps(values, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"the conversation cannot be written as JSON: {one_line(error)}", hint="give tools and options as JSON"
        ) from None
    text += b" " * (-(file.nbytes + len(text)) % 64)  # so that what comes next is aligned
    file.drop(["session"])
    file.add("session", "U8", (len(text),), [text])
    file.commit({"format": FORMAT, "version": str(VERSION), "checksum": f"{crc32(text):08x}"})


def _owner(name: str) -> str:
    """The state, segment or picture that a tensor is part of."""
    return ".".join(name.split(".")[:3]) if name.startswith("state.") else name


def _add(file: GrowingFile, known: _Known, name: str, array: Array) -> None:
    file.drop([name])
    data = np.ascontiguousarray(array)
    known.checksums[name] = crc32(data.data if data.size else b"")
    file.add(name, dtype_name(data.dtype), data.shape, [data.data] if data.size else [])


def _add_each(file: GrowingFile, known: _Known, name: str, parts: Sequence[Any], ops: Ops[Any, Any]) -> None:
    """Add [parts, ...], of which only one is in memory a second time."""
    known.checksums[name] = 0

    def pieces() -> Iterator[memoryview]:
        for part in parts:
            data = np.ascontiguousarray(ops.numpy(part)).data
            known.checksums[name] = crc32(data, known.checksums[name])
            yield data

    file.drop([name])
    file.add(name, "F32", (len(parts), *parts[0].shape), pieces())


def _chosen(prefixes: Sequence[Prefix], ops: Ops[Any, Any], c: TextConfig) -> list[Prefix]:
    """Those that are worth their bytes: where it stands; the end of a prompt, for another reply to it; and the latest
    of the others, to undo and to edit."""
    here, others = [p for p in prefixes[:1] if len(p.ids)], [p for p in prefixes[1:] if len(p.ids)]
    others.sort(key=lambda prefix: (prefix.logits is None, -len(prefix.ids)))
    return here + others[: max(2, KEPT // max(1, ops.state_nbytes(c)))]


def _groups(state: State[Any]) -> dict[str, list[KVCache[Any]]]:
    """What it holds of keys and values: of the model's layers, and of the MTP head."""
    caches = [layer for layer in state.layers if isinstance(layer, KVCache)]
    return {"kv": caches} if state.draft is None else {"kv": caches, "draft": [state.draft.cache]}


def _key(caches: Sequence[KVCache[Any]], i: int) -> tuple[int, ...]:
    return tuple(id(cache.mark(i)) for cache in caches)


def _put_rows(file: GrowingFile, prefixes: Sequence[Prefix], known: _Known, serial: int) -> None:
    """Write the keys and values that a file has not."""
    live = dict[tuple[int, ...], _Row]()
    new: dict[str, list[tuple[Sequence[KVCache[Any]], int]]] = {"kv": [], "draft": []}
    for prefix in sorted(prefixes, key=lambda prefix: -prefix.state.length):  # whoever has most of a block first
        for group, caches in _groups(prefix.state).items():
            length = caches[0].length if caches else 0
            for i in range(-(-length // BLOCK)):
                key, tokens = _key(caches, i), min(BLOCK, length - i * BLOCK)
                row = live.get(key) or known.rows.get(key)
                if row is None or row.tokens < tokens:
                    marks = tuple(cache.mark(i) for cache in caches)
                    row = _Row(marks, f"{group}.{serial}", len(new[group]), tokens)
                    new[group].append((caches, i))
                live[key] = row
    for group, rows in new.items():
        if rows:
            _put_segment(file, known, f"{group}.{serial}", rows)
    known.rows.clear()
    known.rows.update(live)


def _put_segment(
    file: GrowingFile, known: _Known, name: str, rows: Sequence[tuple[Sequence[KVCache[Any]], int]]
) -> None:  # fmt: skip
    checksums = list[int]()

    def pieces() -> Iterator[memoryview]:
        for caches, i in rows:
            checksum = 0
            for cache in caches:
                block = np.ascontiguousarray(cache.block(i))
                checksum = crc32(block.data, checksum)
                yield block.data
            checksums.append(checksum)

    caches, i = rows[0]
    like = caches[0].block(i)
    file.add(name, dtype_name(like.dtype), (len(rows), len(caches), *like.shape), pieces())
    known.checksums[name] = checksums


def _put_state(
    file: GrowingFile, ops: Ops[Any, Any], prefix: Prefix, known: _Known, name: str
) -> dict[str, Any]:  # fmt: skip
    """Write a state, if the file has not got it; what the document says of it."""
    state = prefix.state
    found = next((record for handle, record in known.states if handle.means(state)), None)
    if found is None:
        deltas = [layer for layer in state.layers if isinstance(layer, DeltaState)]
        if deltas:
            _add_each(file, known, f"{name}.conv", [delta.conv for delta in deltas], ops)
            _add_each(file, known, f"{name}.matrix", [delta.matrix for delta in deltas], ops)
        if state.draft is not None and state.draft.unread:
            unread = joined(ops, state.draft)
            _add(file, known, f"{name}.vectors", ops.numpy(unread.vectors))
            _add(file, known, f"{name}.hidden", ops.numpy(unread.hidden))
            _add(file, known, f"{name}.positions", unread.positions)
        found = {"name": name, "logits": False}
    if prefix.logits is not None and not found["logits"]:
        _add(file, known, f"{found['name']}.logits", prefix.logits)
    record = {
        "name": found["name"],
        "logits": found["logits"] or prefix.logits is not None,
        "length": state.length,
        "next_position": state.next_position,
        "spoken": prefix.spoken,
    }  # fmt: skip
    for group, caches in _groups(state).items():
        rows = [known.rows[_key(caches, i)] for i in range(caches[0].blocks if caches else 0)]
        record[group] = [caches[0].length if caches else state.length, _runs(rows)]
    known.states[:] = [entry for entry in known.states if not entry[0].means(state)]
    known.states.append((_Handle.of(state), record))
    return record


def _runs(rows: Sequence[_Row]) -> list[list[Any]]:
    """Rows as [segment, first, count]."""
    runs = list[list[Any]]()
    for row in rows:
        if runs and runs[-1][0] == row.segment and runs[-1][1] + runs[-1][2] == row.place:
            runs[-1][2] += 1
        else:
            runs.append([row.segment, row.place, 1])
    return runs


def _picture(visual: Visual) -> str:
    return f"picture.{visual.digest.hex()}"


def _put_pictures(file: GrowingFile, visuals: Sequence[Visual], model: Speaker, known: _Known) -> None:
    """Write what the model saw of pictures, where the file has it not."""
    for visual in visuals:
        if _picture(visual) not in known.checksums:
            places = [Place(0, 0, visual.height, visual.width, visual, frame) for frame in range(visual.frames)]
            features = [model.engine.ops.numpy(each) for each in model.sight.look(places)]
            _add(file, known, _picture(visual), np.concatenate(features))


def _dead_nbytes(file: GrowingFile, known: _Known) -> int:
    """Bytes of rows that nobody needs, in segments that others are in."""
    live = dict[str, int]()
    for row in known.rows.values():
        live[row.segment] = live.get(row.segment, 0) + 1
    return sum(
        file.nbytes_of(name) * (len(sums) - live.get(name, 0)) // len(sums)
        for name, sums in known.checksums.items() if isinstance(sums, list)
    )  # fmt: skip


def _nbytes(snapshot: Snapshot, model: Speaker) -> int:
    """About what a file takes."""
    c, ops = model.engine.config, model.engine.ops
    longest = max((len(prefix.ids) for prefix in snapshot.prefixes), default=0)
    return ops.kv_nbytes(c, longest) + ops.state_nbytes(c) * len(_chosen(snapshot.prefixes, ops, c))


# --- reading ---------------------------------------------------------------------------------------------------------


class SavedSession:
    """What is in a session file. Raises ModelError for one that is damaged, or of another version.

    values: the document. stamp: what changes when somebody else writes to the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not exists(path):
            raise UsageError(
                f"{path} does not exist",
                hint="write one: chat.save(path) in Python, or `edgeq chat MODEL --session FILE`",
            )
        if not is_file(path) or not is_session(path):
            raise ModelError(
                f"{path} is not a session file",
                hint="name one that chat.save (Python) or `edgeq chat --session` has written",
            )
        self.stamp = _stamp(path)
        self._file = GrownFile(path)
        version = self._file.metadata.get("version")
        if version != str(VERSION):
            raise ModelError(
                f"{path} is a session of version {brief(version)}, expected {VERSION}",
                hint="use the edgeq that wrote it, or a newer one",
            )
        text = self._bytes("session")
        if f"{crc32(text):08x}" != self._file.metadata.get("checksum"):
            raise self.damaged("its document does not match its checksum")
        try:
            self.values: dict[str, Any] = json.loads(text)
            self._checksums: dict[str, Any] = dict(self.values["checksums"])
            self._model: dict[str, Any] = dict(self.values["model"])
            self.serial: int = int(self.values["serial"])
            self.tokens = len(self._small("ids"))
            self._document()
        except _DAMAGED as error:
            raise self.damaged(_problem(error)) from None

    def damaged(self, problem: str) -> ModelError:
        return ModelError(f"{self.path} is damaged: {problem}", hint="copy the file again, or use an earlier one")

    @property
    def settings(self) -> Settings:
        """How the conversation goes on."""
        try:
            return read_settings(self.values["conversation"]["settings"])
        except _DAMAGED as error:
            raise self.damaged(_problem(error)) from None

    @property
    def system(self) -> Any:
        """The system prompt; None without one."""
        message = self.values["conversation"].get("system")
        return message.get("content") if isinstance(message, dict) else None

    def load_options(self, backend: str | None = None) -> dict[str, Any]:
        """Arguments of `edgeq.load` for its model. UsageError where it does not say.

        backend: the one that is asked for in place of its own. KV bits go with the backend that they were chosen for.
        """
        try:
            options = self._model["load"]
            if options is None:
                raise UsageError(
                    f"{self.path} does not say where its model is: it was loaded in parts", hint="give the model, too"
                )
            known = {str(name): value for name, value in options.items() if value is not None}
            backend = backend or str(known.get("backend", "auto"))
            if choose(None if backend == "auto" else backend).name != self.values["backend"]:
                known.pop("kv_bits", None)
            return known
        except _DAMAGED[:-1] as error:
            raise self.damaged(_problem(error)) from None

    def facts(self) -> dict[str, Any]:
        """What is worth telling of it."""
        try:
            return self._facts()
        except _DAMAGED as error:
            raise self.damaged(_problem(error)) from None

    def _facts(self) -> dict[str, Any]:
        values, talk = self.values, self.values["conversation"]
        settings, turns, states = read_settings(talk["settings"]), talk["turns"], values["states"]
        asked: dict[str, Any] = next((turn["messages"][-1] for turn in turns if turn["messages"]), {})
        content = asked.get("content")
        opening = content if isinstance(content, str) else ""
        read = states[0]["length"] if states else 0
        return {
            "path": str(self.path),
            "format": f"{FORMAT}, version {VERSION}",
            "written by": f"edgeq {values['edgeq']}",
            "model": str(self._model["name"]),
            "model weights": str(self._model["weights"]),
            "loaded as": str((self._model["load"] or {}).get("model", "not said")),
            "backend": f"{values['backend']}, keys and values {values['kv']}",
            "turns": len(turns),
            "tokens": self.tokens,
            "tokens read": read,
            "begins with": " ".join(opening.split())[:80],
            "pictures": len(talk["pictures"]),
            "thinking": settings.thinking,
            "tools": len(settings.tools or ()),
            "states": f"{len(states)}, after {', '.join(str(state['length']) for state in states) or 'no'} tokens",
            "size": f"{len(self._file.mapped) / 1e6:,.1f} MB, {self._unused() / 1e6:,.1f} MB of it unused",
        }

    def _unused(self) -> int:
        return sum(info.end - info.start for name, info in self._file.tensors.items() if name.startswith("unused."))

    def check_model(self, model: Speaker) -> None:
        """ModelError for another model than the one it was made with."""
        checkpoint, theirs = model.engine.checkpoint, self._model
        ours = model_identity(checkpoint, model.language)
        if wrong := [_IDENTITY[name] for name, value in ours.items() if theirs.get(name) != value]:
            raise ModelError(
                f"{self.path} was made with another model than {checkpoint.path}: {brief(theirs.get('name'))}, "
                f"whose {' and '.join(wrong)} are different",
                hint="a session goes on only with the very model, adapters and context scaling that it was made with",
            )

    def restored(self, model: Speaker) -> tuple[Snapshot, _Known | None]:
        """The conversation, and what the file has of it, where that can be added to."""
        self.check_model(model)
        try:
            return self._restored(model)
        except _DAMAGED as error:
            raise self.damaged(_problem(error)) from None

    def _restored(self, model: Speaker) -> tuple[Snapshot, _Known | None]:
        engine, document = model.engine, self._document()
        settings = read_settings(self.values["conversation"]["settings"])
        if self.tokens > engine.context_limit:
            raise MemoryBudgetError(
                f"{self.path} has {self.tokens:,} tokens, the context is {engine.context_limit:,}",
                hint="load the model with a larger context",
            )
        for visual in document.visuals:
            model.sight.remember(visual, self._array(_picture(visual), (visual.tokens, engine.config.hidden_size)))
        language, tools = model.language, settings.tools
        template = language.need_template(tools=bool(tools), kwargs=settings.template_kwargs)
        conversation = Conversation(
            language.need_tokenizer(), template, tools=tools, enable_thinking=settings.thinking,
            spelling=language.spelling, outer_vision_tokens=settings.visual_settings.outer_vision_tokens,
        )  # fmt: skip
        snapshot = read_document(document, conversation, model.sight)
        conversation.restore(snapshot.entries)
        states, known = _States(self, engine).read(), None
        records = [record for record, found in zip(self.values["states"], states, strict=True) if found]
        read = [found for found in states if found]
        ids = np.array(conversation.ids, np.int32)
        prefixes = [
            Prefix(
                ids[: state.length], tuple(p for p in snapshot.places if p.start < state.length), state, logits,
                tuple((_number(start), _number(stop)) for start, stop in record["spoken"]),
            )
            for (state, logits), record in zip(read, records, strict=True)
        ]  # fmt: skip
        if any(len(prefix.ids) != prefix.state.length for prefix in prefixes):
            raise ValueError("a state is of more tokens than there are")
        if self._is_ours(engine):
            known = self._known([state for state, _ in read], records)
        return snapshot._replace(prefixes=prefixes), known

    def check(self) -> None:
        """ModelError unless everything in the file is as it was written; reads all of it."""
        for name, expected in self._checksums.items():
            try:
                found: Any = (
                    [_checksum(row) for row in self._rows(name)] if isinstance(expected, list) else self._sum(name)
                )
            except _DAMAGED as error:
                raise self.damaged(_problem(error)) from None
            if found != expected:
                raise self.damaged(f"{brief(name)} does not match its checksum")
        self._file.check_whole()

    def _is_ours(self, engine: Engine[Any, Any]) -> bool:
        return bool((self.values["backend"], self.values["kv"]) == (engine.ops.name, engine.ops.kv_dtype))

    def _known(self, states: Sequence[State[Any]], records: Sequence[dict[str, Any]]) -> _Known:
        """What stands for what is in the file."""
        known = _Known({}, [], dict(self._checksums))
        for state, record in zip(states, records, strict=True):
            known.states.append((_Handle.of(state), record))
            for group, caches in _groups(state).items():
                length, runs = record[group]
                places = [(segment, first + i) for segment, first, count in runs for i in range(count)]
                for i, (segment, index) in enumerate(places):
                    marks, tokens = tuple(cache.mark(i) for cache in caches), min(BLOCK, length - i * BLOCK)
                    key = _key(caches, i)
                    if key not in known.rows or known.rows[key].tokens < tokens:
                        known.rows[key] = _Row(marks, segment, index, tokens)
        return known

    def _document(self) -> Document:
        talk = self.values["conversation"]
        ids, tokens, flags = (self._small(name) for name in _SMALL[:-1])
        return Document(talk, ids, tokens, flags, read_pictures(talk))

    def _small(self, name: str) -> Array:
        """An array that is used at once."""
        array = self._array(name, None)
        if self._sum(name) != self._checksums.get(name):
            raise ValueError(f"{name} does not match its checksum")
        if array.ndim != 1 or array.dtype != (np.uint8 if name == "flags" else np.int32):
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}")
        return array

    def _array(self, name: str, shape: tuple[int, ...] | None) -> Array:
        if name not in self._file.tensors:
            raise ValueError(f"{name} is missing")
        if not isinstance(self._checksums.get(name), int | list):
            raise ValueError(f"{name} has no checksum")
        array = self._file.array(name)
        if not array.flags.aligned:  # as nobody writes it; what computes with it where it is may not
            raise ValueError(f"{name} does not begin where numbers of its type do")
        if shape is not None and (array.shape != shape or array.dtype != np.float32):
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, expected float32 {list(shape)}")
        return array

    def _bytes(self, name: str) -> bytes:
        if name not in self._file.tensors:
            raise self.damaged(f"{name} is missing")
        return self._file.array(name).tobytes()

    def _sum(self, name: str) -> int:
        array = self._array(name, None)
        return _checksum(array) if array.size else 0

    def _rows(self, name: str) -> Iterator[Array]:
        return iter(self._array(name, None))


def _checksum(array: Array) -> int:
    """Of an array in the mapped file, whose pages need not stay: those of a long session would be all of it."""
    data, found = array.reshape(-1).view(np.uint8), 0
    for start in range(0, len(data), PIECE):
        piece = data[start : start + PIECE]
        found = crc32(piece.data, found)
        Pages([piece]).let_go()
    return found


class _States:
    """Reads the states of a session for an engine. The longest comes first: the others share its keys and values."""

    def __init__(self, saved: SavedSession, engine: Engine[Any, Any]) -> None:
        self._saved, self._engine = saved, engine
        self._ops: Ops[Any, Any] = engine.ops
        self._config: TextConfig = engine.config
        self._read = dict[str, list[tuple[list[tuple[str, int]], list[KVCache[Any]]]]]()

    def read(self) -> list[tuple[State[Any], Array | None] | None]:
        """States and the logits after them, in the order of the document; None for what a ceiling leaves no room for,
        beside the first, where the conversation stands. MemoryBudgetError if that does not fit."""
        records = self._saved.values["states"]
        order = sorted(range(len(records)), key=lambda i: -_number(records[i]["length"]))
        found = {i: self._state(records[i]) for i in order if self._fits(records[i], needed=i == 0)}
        return [found.get(i) for i in range(len(records))]

    def _fits(self, record: Mapping[str, Any], *, needed: bool) -> bool:
        c, ops, budget, length = self._config, self._ops, self._engine.budget, _number(record["length"])
        nbytes = ops.state_nbytes(c) + (0 if self._read or not length else ops.kv_nbytes(c, length))
        if needed:
            budget.claim(nbytes, f"{length:,} tokens of {self._saved.path}")
        return needed or budget.fits(nbytes)

    def _state(self, record: Mapping[str, Any]) -> tuple[State[Any], Array | None]:
        c, ops, name = self._config, self._ops, str(record["name"])
        length, position = _number(record["length"]), _number(record["next_position"])
        if not 0 < position <= length <= c.longest_context:
            raise ValueError(f"{name} is of {length} tokens, and goes on at {position}")
        caches = iter(self._caches("kv", record, length, c.layer_types.count("full_attention")))
        n = c.layer_types.count("linear_attention")
        conv_shape = (n, c.linear_conv_kernel_dim - 1, c.conv_dim)
        matrix_shape = (n, c.linear_num_value_heads, c.linear_value_head_dim, c.linear_key_head_dim)
        array = self._saved._array
        pairs = iter(zip(array(f"{name}.conv", conv_shape), array(f"{name}.matrix", matrix_shape), strict=True))
        layers = tuple(
            next(caches) if kind == "full_attention" else DeltaState(*map(ops.array, next(pairs)))
            for kind in c.layer_types
        )
        state: State[Any] = State(layers, length, position, self._engine.fingerprint, self._draft(record, name, length))
        logits = array(f"{name}.logits", (c.vocab_size,)) if record["logits"] else None
        return state, logits

    def _draft(self, record: Mapping[str, Any], name: str, length: int) -> DraftState[Any] | None:
        c, ops, array = self._config, self._ops, self._saved._array
        if "draft" not in record or self._engine.head is None:
            return None
        read = _number(record["draft"][0])
        (cache,) = self._caches("draft", record, read, 1)
        if f"{name}.positions" not in self._saved._checksums:
            if read:
                raise ValueError(f"{name} has read {read} tokens, and lacks the last")
            return DraftState(cache)
        positions = array(f"{name}.positions", None)
        waiting = positions.shape[-1]
        if positions.shape != (3, waiting) or positions.dtype != np.int32 or read + waiting > length or not waiting:
            raise ValueError(f"{name}.positions is {positions.dtype} {list(positions.shape)}")
        if positions.min() < 0 or positions.max() >= c.longest_context:
            raise ValueError(f"{name}.positions are outside of the context window")
        vectors, hidden = (array(f"{name}.{part}", (waiting, c.hidden_size)) for part in ("vectors", "hidden"))
        return DraftState(cache, (Rows(ops.activations(vectors), ops.activations(hidden), positions.copy()),))

    def _caches(self, group: str, record: Mapping[str, Any], length: int, layers: int) -> list[KVCache[Any]]:
        """The caches of a state, a layer each."""
        tokens, runs = record[group]
        rows = [(str(segment), _number(first) + i) for segment, first, count in runs for i in range(_number(count))]
        if tokens != length or len(rows) != -(-length // BLOCK):
            raise ValueError(f"{group} of {length} tokens has {len(rows)} rows of {BLOCK}")
        for longer, caches in self._read.setdefault(group, []):
            if longer[: len(rows)] == rows and caches[0].length >= length:
                return [cache.truncated(length) for cache in caches]
        found = [self._block(row, layers) for row in rows]
        made = [self._cache([block[layer] for block in found], length) for layer in range(layers)]
        self._read[group].append((rows, made))
        return made

    def _block(self, row: tuple[str, int], layers: int) -> Array:
        """What a row of a segment holds, a layer each."""
        segment, index = row
        array = self._saved._array(segment, None)
        if array.ndim < 3 or array.shape[1] != layers or index >= len(array):
            raise ValueError(
                f"{segment} is {array.dtype} {list(array.shape)}, and has no row {index} of {layers} layers"
            )
        found: Array = array[index]
        return found

    def _cache(self, blocks: list[Array], length: int) -> KVCache[Any]:
        heads, dim = self._config.num_key_value_heads, self._config.head_dim
        values, ops = self._saved.values, self._ops
        if self._saved._is_ours(self._engine):
            shape, dtype = ops.block_like(heads, dim)
            if any(block.shape != shape or block.dtype != dtype for block in blocks):
                raise ValueError(f"the keys and values are not {dtype} {list(shape)}")
            return ops.stored_cache(blocks, length, heads, dim)
        none = np.zeros((0, heads, dim), np.float32)  # as an MTP head has that has not read
        both = [_unpacked(block, str(values["backend"]), str(values["kv"]), heads, dim) for block in blocks]
        keys, entries = (np.concatenate(side) for side in zip((none, none), *both, strict=True))
        return ops.kv_cache(keys[:length], entries[:length])


def _unpacked(block: Array, backend: str, kv: str, heads: int, dim: int) -> tuple[Array, Array]:
    """Keys and values, each float32 [BLOCK, heads, dim], of another backend's block, or another type's."""
    if backend == "cpu":
        if kv not in ("f16", "bf16", "f32", "int8", "int4") or block.shape != (page_nbytes(kv, heads, dim),):
            raise ValueError(f"the keys and values are not {brief(kv)} pages")
        return page_arrays(block, kv, heads, dim)
    if backend not in ("numpy", "mlx"):
        raise UsageError(f"its keys and values are those of another backend, {brief(backend)}")
    if block.shape != (2, heads, BLOCK, dim):
        raise ValueError(f"the keys and values are {list(block.shape)}")
    keys, values = to_float32(block).swapaxes(1, 2)
    return keys, values


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 40:
        raise TypeError(f"{brief(value)} is no number of anything")
    return value


def _problem(error: Exception) -> str:
    """What a document that nobody wrote so led to."""
    return f"its document lacks {error}" if isinstance(error, KeyError) else one_line(error)
