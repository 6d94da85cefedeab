"""The session that a conversation goes on in: the file of `--session`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeq.errors import UsageError
from edgeq.inputs import exists, expand_user
from edgeq.session.documents import with_documents
from edgeq.session.files import SavedSession, SessionFile

if TYPE_CHECKING:
    from edgeq.api import Model
    from edgeq.session.chat import Chat

__all__ = ["Session", "opened_session"]

_FIXED = {
    "system": "a system prompt (or documents)",
    "tools": "tools",
    "template_kwargs": "variables for the chat template",
}


@contextmanager
def opened_session(path: Path | None) -> Iterator[Session | None]:
    """The session in a file, if one is named, which no other process saves to meanwhile."""
    session = None if path is None else Session(path)
    try:
        yield session
    finally:
        if session is not None:
            session.file.close()


class Session:
    """A session file that this process keeps, and saves a conversation to. saved: what was in it; None for a new one.

    Raises UsageError where another process has it, ModelError where it cannot be gone on with.
    """

    def __init__(self, path: Path) -> None:
        self.path = expand_user(path).absolute()
        self.file = SessionFile(self.path, hold=True)
        self.saved: SavedSession | None = self.file.read() if exists(self.path) else None

    def load_options(self, backend: str | None) -> dict[str, Any]:
        """What its model was loaded with, as far as it holds on a `backend` that is asked for; nothing of a new
        session."""
        return {} if self.saved is None else self.saved.load_options(backend)

    def chat(self, model: Model, given: Mapping[str, Any], told: Callable[[str], bool], **calls: Any) -> Chat:
        """The conversation in it, or a new one. given: arguments for `Model.chat`; told: whether one of them was asked
        for, and is not the default; calls: `on_prefill`, `on_look`.

        Raises UsageError for what a conversation that has begun cannot change.
        """
        from edgeq.session.chat import Chat

        if self.saved is None:
            return model.chat(**given, **calls)
        now = self.saved.settings
        fixed = {"system": self.saved.system, "tools": now.tools, "template_kwargs": now.template_kwargs}
        rest = dict(given)
        rest["system"] = with_documents(rest.pop("documents", ()), rest.get("system"))
        for name, what in _FIXED.items():
            asked = rest.pop(name, None)
            if asked is not None and asked != fixed[name]:
                raise UsageError(
                    f"{self.path} is a conversation that has begun, with {'other' if fixed[name] else 'no'} "
                    f"{what.removeprefix('a ')}",
                    hint="begin another session, or leave the option out",
                )
        if rest.pop("messages", ()):
            raise UsageError(f"{self.path} is a conversation that has begun", hint="leave --messages out")
        visuals, overflow = rest.pop("visual_settings", None), rest.pop("overflow", None)
        thinking, draft = rest.pop("thinking", None), rest.pop("draft", None)
        changes: dict[str, Any] = {"options": {**now.options, **{n: v for n, v in rest.items() if v is not None}}}
        if visuals is not None:
            asked = {name: value for name, value in asdict(visuals).items() if told(name)}
            changes["visual_settings"] = now.visual_settings.replace(**asked)
        for name, value in {"thinking": thinking, "draft": draft, "overflow": overflow}.items():
            if value is not None and (name == "thinking" or told(name)):
                changes[name] = value
        return Chat.restored(model, self.file, saved=self.saved, **changes, **calls)

    def save(self, chat: Chat) -> None:
        """Write the conversation, as far as it has come."""
        self.file.save(chat)
