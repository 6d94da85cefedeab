"""A conversation as a JSON document and arrays of tokens, for session files (docs/reference/sessions.md).

Texts are as they were said, and are protected anew when they are read; ids are as they were generated or rendered.
Pictures are named by their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgeq.errors import UsageError
from edgeq.formats.bf16 import Array
from edgeq.generate import Finish, GenerationSettings, Logprobs, StopReason, Token
from edgeq.printable import brief
from edgeq.session import turns as turns_of
from edgeq.session.places import Place
from edgeq.session.sight import Sight
from edgeq.session.snapshot import Settings, Snapshot
from edgeq.session.turns import Said, Turn
from edgeq.session.visual_settings import VisualSettings
from edgeq.text.conversation import Conversation, Entry, Generated
from edgeq.text.messages import checked_messages
from edgeq.text.visuals import Outline
from edgeq.vision.visual import Kind, Visual

if TYPE_CHECKING:
    from edgeq.formats.bf16 import Float32

__all__ = ["Document", "read_document", "read_pictures", "read_settings", "written_document"]

_FORCED, _THINKING, _ONLY = 1, 2, 4  # flags of a reply's token


class Document(NamedTuple):
    """What a conversation says.

    values: JSON. ids: of what will not change, int32. tokens, flags: of replies, int32 and uint8, which `values` share
    out. visuals: its pictures.
    """

    values: dict[str, Any]
    ids: Array
    tokens: Array
    flags: Array
    visuals: list[Visual]


class _NoPixels:
    """Patches that a session file does not have: it has what the model saw of them."""

    shape = (0, 0)
    dtype = np.dtype(np.float32)

    def __getitem__(self, rows: slice, /) -> Float32:
        raise UsageError(
            "a session file keeps what the model saw of a picture, not its pixels", hint="give the picture's file again"
        )


def written_document(snapshot: Snapshot) -> Document:
    """A snapshot, but for the states."""
    visuals = {id(v): v for said in _all_said(snapshot) for v in said.visuals}
    visuals |= {id(v): v for turn in snapshot.turns for v in turn.shown}
    numbers = {key: i for i, key in enumerate(visuals)}
    ids, tokens = list[int](), [token for turn in snapshot.turns for token in turn.tokens]
    system = None if snapshot.system is None else _message(snapshot.system.message, numbers)
    values = {
        "settings": _settings(snapshot.settings),
        "system": system,
        "turns": [
            _turn(turn, after, ids, numbers) for turn, after in zip(snapshot.turns, _after(snapshot), strict=True)
        ],
        "forgotten": snapshot.forgotten,
        "pictures": [_picture(visual) for visual in visuals.values()],
        "places": [
            [p.start, p.position, p.height, p.width, numbers[id(p.visual)], p.frame] for p in snapshot.places
        ],
    }  # fmt: skip
    flags = [_FORCED * t.forced + _THINKING * t.thinking + _ONLY * t.only for t in tokens]
    return Document(
        values, np.array(ids, np.int32), np.array([token.id for token in tokens], np.int32), np.array(flags, np.uint8),
        list(visuals.values()),
    )  # fmt: skip


def read_document(document: Document, conversation: Conversation, sight: Sight) -> Snapshot:
    """The snapshot that a document was made of, without the states; `conversation`: of the same template and tools.

    Raises whatever a document that was not written so leads to: KeyError, TypeError, ValueError, UsageError.
    """
    values, ids, tokens = document.values, iter(document.ids.tolist()), _tokens(document)
    visuals = document.visuals

    def said(message: Mapping[str, Any]) -> Said:
        (checked,) = checked_messages([_with_pictures(message, visuals)])
        return turns_of.said(checked, sight, VisualSettings())

    def entry(said: Said) -> Entry:
        return conversation.entry(said.rendered, [Outline.of(visual) for visual in said.visuals])

    entries, turns = list[Entry](), list[Turn]()
    system = None if values["system"] is None else said(values["system"])
    if system is not None:
        entries.append(entry(system))
    for turn in values["turns"]:
        mark, messages = len(entries), tuple(said(message) for message in turn["messages"])
        entries += map(entry, messages)
        asked, reply = len(entries), turn["reply"]
        given = None if reply is None else said(reply)
        base = None if turn["base"] is None else said(turn["base"]).message
        for after in turn["after"]:
            if after == "reply" and given is not None:
                entries.append(entry(given))
            elif after == "base" and base is not None:
                entries.append(conversation.entry(base, open=True))
            else:
                prompt, generated = (_some(ids, count) for count in after)
                entries.append(Generated(prompt, generated))
        turns.append(Turn(
            messages, mark, asked, None if given is None else given.message, _read_finish(turn["finish"]),
            _count(turn["attempt"]), bool(turn["thinking"]), _text(turn["prefix"]), base,
            _with_logprobs(_some(tokens, turn["tokens"]), turn["logprobs"]), _count(turn["drawn"]),
            tuple(visuals[i] for i in turn["shown"]),
        ))  # fmt: skip
    if next(ids, None) is not None or next(tokens, None) is not None:
        raise ValueError("there are more tokens than the turns have")
    places = [
        Place(_count(start), _count(position), _count(height), _count(width), visuals[_count(number)], _count(frame))
        for start, position, height, width, number, frame in values["places"]
    ]
    return Snapshot(read_settings(values["settings"]), system, turns, entries, places, _count(values["forgotten"]), ())


def _all_said(snapshot: Snapshot) -> Iterator[Said]:
    if snapshot.system is not None:
        yield snapshot.system
    for turn in snapshot.turns:
        yield from turn.said


def _after(snapshot: Snapshot) -> Iterator[Sequence[Entry]]:
    """The entries of each turn behind what was said."""
    stops = [*(turn.mark for turn in snapshot.turns[1:]), len(snapshot.entries)]
    for turn, stop in zip(snapshot.turns, stops, strict=False):
        assert turn.asked - turn.mark == len(turn.said), "each message of a turn has its entry"
        yield snapshot.entries[turn.asked : stop]


def _turn(turn: Turn, after: Sequence[Entry], ids: list[int], numbers: Mapping[int, int]) -> dict[str, Any]:
    kinds = list[Any]()
    for entry in after:
        if isinstance(entry, Generated):
            kinds.append([len(entry.prompt), len(entry.ids)])
            ids += [*entry.prompt, *entry.ids]
        else:
            kinds.append("base" if entry.open else "reply")
    return {
        "messages": [_message(said.message, numbers) for said in turn.said],
        "reply": None if turn.reply is None else _message(turn.reply, numbers),
        "after": kinds,
        "finish": None if turn.finish is None else _finish(turn.finish),
        "attempt": turn.attempt,
        "thinking": turn.thinking,
        "prefix": turn.prefix,
        "base": None if turn.base is None else _message(turn.base, numbers),
        "tokens": len(turn.tokens),
        "logprobs": [
            [i, token.logprobs.logprob, token.logprobs.top] for i, token in enumerate(turn.tokens) if token.logprobs
        ],
        "drawn": turn.drawn,
        "shown": [numbers[id(visual)] for visual in turn.shown],
    }  # fmt: skip


# --- messages and pictures -------------------------------------------------------------------------------------------


def _message(message: Mapping[str, Any], numbers: Mapping[int, int]) -> dict[str, Any]:
    """A message with numbers in the place of its pictures."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    parts = [
        {**part, kind: {"picture": numbers[id(part[kind])]}}
        if (kind := part.get("type")) in ("image", "video") and isinstance(part.get(kind), Visual) else part
        for part in content
    ]  # fmt: skip
    return {**message, "content": parts}


def _with_pictures(message: Mapping[str, Any], visuals: Sequence[Visual]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    parts = [
        {**part, kind: visuals[_count(part[kind]["picture"])]}
        if (kind := part.get("type")) in ("image", "video") and isinstance(part.get(kind), Mapping) else part
        for part in content
    ]  # fmt: skip
    return {**message, "content": parts}


def _picture(visual: Visual) -> dict[str, Any]:
    return {
        "kind": visual.kind, "grid": visual.grid, "square": visual.square, "digest": visual.digest.hex(),
        "timestamps": visual.timestamps, "name": visual.name, "size": visual.size, "taken": visual.taken,
    }  # fmt: skip


def read_pictures(values: Mapping[str, Any]) -> list[Visual]:
    """The pictures of a document, without their pixels."""
    found = list[Visual]()
    for picture in values["pictures"]:
        kind: Kind = "image" if picture["kind"] == "image" else "video"
        frames, rows, columns = map(_count, picture["grid"])
        square, size = _count(picture["square"]), picture["size"]
        if not (frames and rows and columns and square) or rows % square or columns % square:
            raise ValueError(f"the grid of a picture is {brief(picture['grid'])}")
        found.append(Visual(
            kind, (frames, rows, columns), square, _NoPixels(), bytes.fromhex(picture["digest"]),
            tuple(map(float, picture["timestamps"])), _text(picture["name"]),
            None if size is None else (_count(size[0]), _count(size[1])), _count(picture["taken"]),
        ))  # fmt: skip
    return found


# --- replies ---------------------------------------------------------------------------------------------------------


def _finish(finish: Finish) -> list[Any]:
    cut = finish.thinking_cut
    return [
        finish.reason.value, finish.thinking_tokens, finish.answer_tokens, None if cut is None else cut.value,
        finish.in_thinking,
    ]  # fmt: skip


def _read_finish(values: Any) -> Finish | None:
    if values is None:
        return None
    reason, thinking, answer, cut, inside = values
    return Finish(
        StopReason(reason), _count(thinking), _count(answer), None if cut is None else StopReason(cut), bool(inside)
    )


def _tokens(document: Document) -> Iterator[Token]:
    for token, flags in zip(document.tokens.tolist(), document.flags.tolist(), strict=True):
        yield Token(token, bool(flags & _FORCED), bool(flags & _THINKING), None, bool(flags & _ONLY))


def _with_logprobs(tokens: tuple[Token, ...], values: Iterable[Any]) -> tuple[Token, ...]:
    found = list(tokens)
    for i, logprob, top in values:
        pairs = tuple((_count(token), float(value)) for token, value in top)
        found[_count(i)] = found[_count(i)]._replace(logprobs=Logprobs(float(logprob), pairs))
    return tuple(found)


# --- settings --------------------------------------------------------------------------------------------------------


def _settings(settings: Settings) -> dict[str, Any]:
    chosen = GenerationSettings().replace(**settings.options)  # as they are checked and written
    return {
        "thinking": settings.thinking,
        "settings": None if settings.settings is None else _fields(settings.settings),
        "options": {n: getattr(chosen, n) for n, value in settings.options.items() if value is not None},
        "tools": settings.tools,
        "template_kwargs": settings.template_kwargs,
        "visual_settings": asdict(settings.visual_settings),
        "draft": settings.draft,
        "overflow": settings.overflow,
    }  # fmt: skip


def _fields(settings: GenerationSettings) -> dict[str, Any]:
    return {field.name: getattr(settings, field.name) for field in fields(settings)}


def read_settings(values: Mapping[str, Any]) -> Settings:
    """The settings of a document."""
    own, options = values["settings"], dict(values["options"])
    GenerationSettings().replace(**options)
    return Settings(
        bool(values["thinking"]), None if own is None else GenerationSettings(**own), options, values["tools"],
        values["template_kwargs"], VisualSettings(**values["visual_settings"]), values["draft"], values["overflow"],
    )  # fmt: skip


# --- values ----------------------------------------------------------------------------------------------------------


def _some(values: Iterator[Any], count: Any) -> tuple[Any, ...]:
    """The next `count` of them."""
    found = tuple(value for _, value in zip(range(_count(count)), values, strict=False))
    if len(found) != count:
        raise ValueError("there are fewer tokens than the turns have")
    return found


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise TypeError(f"{brief(value)} is no number of anything")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{brief(value)} is no text")
    return value
