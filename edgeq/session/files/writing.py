"""Bringing a session file up to date with a conversation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any
from zlib import crc32

import numpy as np

from edgeq.errors import UsageError
from edgeq.formats.bf16 import Array
from edgeq.formats.growing import GrowingFile
from edgeq.formats.safetensors import dtype_name
from edgeq.printable import one_line
from edgeq.session.document import written_document
from edgeq.session.files.known import (
    FORMAT,
    SMALL,
    VERSION,
    Handle,
    Known,
    Row,
    cache_groups,
    owner,
    picture_name,
    row_key,
)
from edgeq.session.identity import model_identity
from edgeq.session.places import Place
from edgeq.session.prefixes import Prefix
from edgeq.session.snapshot import Snapshot
from edgeq.session.speaker import Speaker
from edgeq.state import BLOCK, DeltaState, KVCache, State, joined
from edgeq.version import __version__
from edgeq.vision.visual import Visual

__all__ = ["about", "dead_nbytes", "needed_nbytes", "update"]

KEPT = 1 << 27  # bytes of DeltaNet states that are written beside the one where the conversation stands


def about(model: Speaker) -> dict[str, Any]:
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


def update(
    file: GrowingFile, snapshot: Snapshot, model: Speaker, values: dict[str, Any], known: Known, serial: int
) -> None:  # fmt: skip
    """Write to a file what it has not of a conversation, and commit it.

    values: what `about` says. known: what the file has; afterwards, what it has then. serial: of this save; names of
    arrays that are new have it.
    """
    writer, document = _Writer(file, known, model, serial), written_document(snapshot)
    prefixes = _chosen(snapshot.prefixes, model)
    writer.put_rows(prefixes)
    states = [writer.put_state(prefix, f"state.{serial}.{i}") for i, prefix in enumerate(prefixes)]
    writer.put_pictures(document.visuals)
    writer.drop_all_but(states, document.visuals)
    for name in SMALL:
        writer.put(name, getattr(document, name))
    writer.commit(
        values | {"serial": serial, "states": states, "checksums": known.checksums, "conversation": document.values}
    )


def needed_nbytes(snapshot: Snapshot, model: Speaker) -> int:
    """About what a new file takes."""
    c, ops = model.engine.config, model.engine.ops
    longest = max((len(prefix.ids) for prefix in snapshot.prefixes), default=0)
    return ops.kv_nbytes(c, longest) + ops.state_nbytes(c) * len(_chosen(snapshot.prefixes, model))


def dead_nbytes(file: GrowingFile, known: Known) -> int:
    """Bytes of rows that nobody needs, in segments that others are in."""
    live = dict[str, int]()
    for row in known.rows.values():
        live[row.segment] = live.get(row.segment, 0) + 1
    return sum(
        file.nbytes_of(name) * (len(sums) - live.get(name, 0)) // len(sums)
        for name, sums in known.checksums.items() if isinstance(sums, list)
    )  # fmt: skip


def _chosen(prefixes: Sequence[Prefix], model: Speaker) -> list[Prefix]:
    """Those that are worth their bytes: where it stands; the end of a prompt, for another reply to it; and the latest
    of the others, to undo and to edit."""
    here, others = [p for p in prefixes[:1] if len(p.ids)], [p for p in prefixes[1:] if len(p.ids)]
    others.sort(key=lambda prefix: (prefix.logits is None, -len(prefix.ids)))
    return here + others[: max(2, KEPT // max(1, model.engine.ops.state_nbytes(model.engine.config)))]


class _Writer:
    """Adds to a file what it has not, and keeps what is known of the file in step."""

    def __init__(self, file: GrowingFile, known: Known, model: Speaker, serial: int) -> None:
        self._file, self._known, self._serial = file, known, serial
        self._ops, self._sight = model.engine.ops, model.sight

    def put(self, name: str, array: Array) -> None:
        """Write an array, in place of an earlier one of the name."""
        self._file.drop([name])
        data = np.ascontiguousarray(array)
        self._known.checksums[name] = crc32(data.data if data.size else b"")
        self._file.add(name, dtype_name(data.dtype), data.shape, [data.data] if data.size else [])

    def put_rows(self, prefixes: Sequence[Prefix]) -> None:
        """Write the keys and values that the file has not."""
        known, live = self._known, dict[tuple[int, ...], Row]()
        new: dict[str, list[tuple[Sequence[KVCache[Any]], int]]] = {"kv": [], "draft": []}
        for prefix in sorted(prefixes, key=lambda prefix: -prefix.state.length):  # whoever has most of a block first
            for group, caches in cache_groups(prefix.state).items():
                length = caches[0].length if caches else 0
                for i in range(-(-length // BLOCK)):
                    key, tokens = row_key(caches, i), min(BLOCK, length - i * BLOCK)
                    row = live.get(key) or known.rows.get(key)
                    if row is None or row.tokens < tokens:
                        marks = tuple(cache.mark(i) for cache in caches)
                        row = Row(marks, self._segment(group), len(new[group]), tokens)
                        new[group].append((caches, i))
                    live[key] = row
        for group, rows in new.items():
            if rows:
                self._put_segment(self._segment(group), rows)
        known.rows.clear()
        known.rows.update(live)

    def put_state(self, prefix: Prefix, name: str) -> dict[str, Any]:
        """Write a state under `name`, if the file has not got it; what the document says of it. Its rows are there."""
        state, known = prefix.state, self._known
        found = next((record for handle, record in known.states if handle.means(state)), None)
        if found is None:
            self._put_layers(state, name)
            found = {"name": name, "logits": False}
        if prefix.logits is not None and not found["logits"]:
            self.put(f"{found['name']}.logits", prefix.logits)
        record = {
            "name": found["name"],
            "logits": found["logits"] or prefix.logits is not None,
            "length": state.length,
            "next_position": state.next_position,
            "spoken": prefix.spoken,
        }
        for group, caches in cache_groups(state).items():
            rows = [known.rows[row_key(caches, i)] for i in range(caches[0].blocks if caches else 0)]
            record[group] = [caches[0].length if caches else state.length, _runs(rows)]
        known.states[:] = [entry for entry in known.states if not entry[0].means(state)]
        known.states.append((Handle.of(state), record))
        return record

    def put_pictures(self, visuals: Sequence[Visual]) -> None:
        """Write what the model saw of pictures, where the file has it not."""
        for visual in visuals:
            if picture_name(visual) not in self._known.checksums:
                places = [Place(0, 0, visual.height, visual.width, visual, frame) for frame in range(visual.frames)]
                features = [self._ops.numpy(each) for each in self._sight.look(places)]
                self.put(picture_name(visual), np.concatenate(features))

    def drop_all_but(self, states: Sequence[dict[str, Any]], visuals: Sequence[Visual]) -> None:
        """Give up the arrays of other states and pictures, and segments in which nobody has a row."""
        known, kept = self._known, {state["name"] for state in states}
        known.states[:] = [entry for entry in known.states if entry[1]["name"] in kept]
        live = {row.segment for row in known.rows.values()} | kept | {picture_name(visual) for visual in visuals}
        gone = [name for name in known.checksums if owner(name) not in live]
        for name in gone:
            del known.checksums[name]
        self._file.drop(gone)

    def commit(self, values: dict[str, Any]) -> None:
        """Write the document, which ends a save."""
        try:
            text = json.dumps(values, separators=(",", ":")).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(
                f"the conversation cannot be written as JSON: {one_line(error)}", hint="give tools and options as JSON"
            ) from None
        text += b" " * (-(self._file.nbytes + len(text)) % 64)  # so that what comes next is aligned
        self._file.drop(["session"])
        self._file.add("session", "U8", (len(text),), [text])
        self._file.commit({"format": FORMAT, "version": str(VERSION), "checksum": f"{crc32(text):08x}"})

    def _segment(self, group: str) -> str:
        return f"{group}.{self._serial}"

    def _put_segment(self, name: str, rows: Sequence[tuple[Sequence[KVCache[Any]], int]]) -> None:
        """Write rows, each the block of a place in every layer's cache: [rows, layers, ...] as the backend keeps it."""
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
        self._file.add(name, dtype_name(like.dtype), (len(rows), len(caches), *like.shape), pieces())
        self._known.checksums[name] = checksums

    def _put_layers(self, state: State[Any], name: str) -> None:
        """Write what a state has besides keys and values."""
        deltas = [layer for layer in state.layers if isinstance(layer, DeltaState)]
        if deltas:
            self._put_each(f"{name}.conv", [delta.conv for delta in deltas])
            self._put_each(f"{name}.matrix", [delta.matrix for delta in deltas])
        if state.draft is not None and state.draft.unread:
            unread = joined(self._ops, state.draft)
            self.put(f"{name}.vectors", self._ops.numpy(unread.vectors))
            self.put(f"{name}.hidden", self._ops.numpy(unread.hidden))
            self.put(f"{name}.positions", unread.positions)

    def _put_each(self, name: str, parts: Sequence[Any]) -> None:
        """Write float32 [parts, ...], of which only one is in memory a second time."""
        checksums = self._known.checksums
        checksums[name] = 0

        def pieces() -> Iterator[memoryview]:
            for part in parts:
                data = np.ascontiguousarray(self._ops.numpy(part)).data
                checksums[name] = crc32(data, checksums[name])
                yield data

        self._file.drop([name])
        self._file.add(name, "F32", (len(parts), *parts[0].shape), pieces())


def _runs(rows: Sequence[Row]) -> list[list[Any]]:
    """Rows as [segment, first, count]."""
    runs = list[list[Any]]()
    for row in rows:
        if runs and runs[-1][0] == row.segment and runs[-1][1] + runs[-1][2] == row.place:
            runs[-1][2] += 1
        else:
            runs.append([row.segment, row.place, 1])
    return runs
