"""Conversations in files: given ones to go on with, and what is written of one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeq.cli.outputs import check_outputs
from edgeq.cli.prompt import file_text, piped_text
from edgeq.errors import UsageError
from edgeq.files.publish import new_file
from edgeq.inputs import exists, is_file
from edgeq.printable import one_line
from edgeq.session.chat import Chat
from edgeq.vision.visual import Visual

__all__ = ["read_messages", "save"]

_MARKDOWN = (".md", ".markdown")


def read_messages(file: Path) -> list[dict[str, Any]]:
    """The messages in a JSON file, or for - in what is piped in: a list, or an object whose "messages" is one.

    UsageError for a file that is no such thing; what the messages say is checked by whoever takes them.
    """
    text = (piped_text() or "") if str(file) == "-" else file_text(file)
    name = "stdin" if str(file) == "-" else str(file)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is not JSON: {one_line(error)}", hint="give a list of messages") from None
    if isinstance(found, Mapping) and "messages" in found:
        if others := found.keys() - {"messages"}:
            raise UsageError(
                f"{name} has {min(others)!r} beside the messages, which is not read",
                hint='leave it out, and give it as an option of edgeq; expected a list, or {"messages": [...]}',
            )
        found = found["messages"]
    if not isinstance(found, list) or not found or not all(isinstance(message, dict) for message in found):
        raise UsageError(f"{name} has no list of messages", hint='expected [{"role": "user", "content": "..."}, ...]')
    return found


def save(chat: Chat, path: Path) -> None:
    """Write a conversation to a file: as Markdown, as messages that `read_messages` takes (.json), or as a session
    (.eqs)."""
    check_outputs(path)
    if path.suffix.lower() == ".eqs":
        chat.save(path)
        return
    if path.suffix.lower() in _MARKDOWN:
        text = chat.transcript()
    elif path.suffix.lower() == ".json":
        text = json.dumps(list(map(_storable, chat.messages)), ensure_ascii=False, indent=2) + "\n"
    else:
        raise UsageError(
            f"{path.name} ends in neither .md, .json nor .eqs",
            hint="as in /save chat.md, /save chat.json, /save chat.eqs",
        )
    with new_file(path, may_replace=_check_file) as out:
        out.write_bytes(text.encode("utf-8", "replace"))


def _check_file(path: Path) -> None:
    if not is_file(path):
        raise UsageError(f"{path} is not a file", hint="give another name")


def _storable(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with the paths of its pictures in their places."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    parts = []
    for part in content:
        kind = part.get("type")
        visual = part.get(kind) if kind in ("image", "video") else None
        if isinstance(visual, Visual):
            if visual.name == kind or not exists(Path(visual.name)):
                raise UsageError(
                    f"the picture {visual.name} is in no file that messages could name",
                    hint="write the conversation as Markdown, as in /save chat.md",
                )
            part = {**part, kind: str(Path(visual.name).absolute())}
        parts.append(part)
    return {**message, "content": parts}
