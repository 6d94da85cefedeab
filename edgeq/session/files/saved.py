"""What is in a session file, and the conversation that it goes on with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.backends import choose
from edgeq.errors import MemoryBudgetError, ModelError, UsageError
from edgeq.printable import brief
from edgeq.session.document import Document, read_document, read_pictures, read_settings
from edgeq.session.files.checked import CheckedFile, number
from edgeq.session.files.known import (
    FORMAT,
    SMALL,
    VERSION,
    Handle,
    Known,
    Row,
    cache_groups,
    picture_name,
    row_key,
)
from edgeq.session.files.states import StateReader
from edgeq.session.identity import model_identity
from edgeq.session.prefixes import Prefix
from edgeq.session.snapshot import Settings, Snapshot
from edgeq.session.speaker import Speaker
from edgeq.state import BLOCK, State
from edgeq.text.conversation import Conversation

__all__ = ["SavedSession"]

_IDENTITY = {"weights": "weights", "config": "settings in config.json", "tokenizer": "tokens"}


class SavedSession:
    """What is in a session file. Raises UsageError where there is none, ModelError for one that is damaged, or of
    another version.

    values: the document. tokens: of the conversation. serial: how often it was saved. stamp: what changes when somebody
    else writes to the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = CheckedFile(path)
        self.stamp, self.values = self._file.stamp, self._file.values
        with self._file.believed():
            self._model: dict[str, Any] = dict(self.values["model"])
            self.serial: int = int(self.values["serial"])
            self.tokens = len(self._file.small("ids"))
            self._document()

    @property
    def settings(self) -> Settings:
        """How the conversation goes on."""
        with self._file.believed():
            return read_settings(self.values["conversation"]["settings"])

    @property
    def system(self) -> Any:
        """The system prompt; None without one."""
        message = self.values["conversation"].get("system")
        return message.get("content") if isinstance(message, dict) else None

    def load_options(self, backend: str | None = None) -> dict[str, Any]:
        """Arguments of `edgeq.load` for its model. UsageError where it does not say.

        backend: the one that is asked for in place of its own. KV bits go with the backend that they were chosen for.
        """
        with self._file.believed(usage=False):
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

    def facts(self) -> dict[str, Any]:
        """What is worth telling of it."""
        with self._file.believed():
            return self._facts()

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
            "size": f"{self._file.nbytes / 1e6:,.1f} MB, {self._file.unused_nbytes / 1e6:,.1f} MB of it unused",
        }

    def check(self) -> None:
        """ModelError unless everything in the file is as it was written; reads all of it."""
        self._file.check()

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

    def restored(self, model: Speaker) -> tuple[Snapshot, Known | None]:
        """The conversation, and what the file has of it, where that can be added to."""
        self.check_model(model)
        with self._file.believed():
            return self._restored(model)

    def _restored(self, model: Speaker) -> tuple[Snapshot, Known | None]:
        engine, document = model.engine, self._document()
        if self.tokens > engine.context_limit:
            raise MemoryBudgetError(
                f"{self.path} has {self.tokens:,} tokens, the context is {engine.context_limit:,}",
                hint="load the model with a larger context",
            )
        for visual in document.visuals:
            features = self._file.array(picture_name(visual), (visual.tokens, engine.config.hidden_size))
            model.sight.remember(visual, features)
        conversation = self._conversation(model)
        snapshot = read_document(document, conversation, model.sight)
        conversation.restore(snapshot.entries)
        records = self.values["states"]
        read = [
            (record, *found)
            for record, found in zip(records, StateReader(self._file, engine).read(records), strict=True)
            if found is not None
        ]
        ids = np.array(conversation.ids, np.int32)
        prefixes = [
            Prefix(
                ids[: state.length], tuple(p for p in snapshot.places if p.start < state.length), state, logits,
                tuple((number(start), number(stop)) for start, stop in record["spoken"]),
            )
            for record, state, logits in read
        ]  # fmt: skip
        if any(len(prefix.ids) != prefix.state.length for prefix in prefixes):
            raise ValueError("a state is of more tokens than there are")
        known = self._known([(record, state) for record, state, _ in read]) if self._file.is_of(engine.ops) else None
        return snapshot._replace(prefixes=prefixes), known

    def _conversation(self, model: Speaker) -> Conversation:
        """A conversation as this one is held, with nothing said yet."""
        settings, language = read_settings(self.values["conversation"]["settings"]), model.language
        template = language.need_template(tools=bool(settings.tools), kwargs=settings.template_kwargs)
        return Conversation(
            language.need_tokenizer(), template, tools=settings.tools, enable_thinking=settings.thinking,
            spelling=language.spelling, outer_vision_tokens=settings.visual_settings.outer_vision_tokens,
        )  # fmt: skip

    def _known(self, read: Sequence[tuple[dict[str, Any], State[Any]]]) -> Known:
        """What stands for what is in the file."""
        known = Known({}, [], dict(self._file.checksums))
        for record, state in read:
            known.states.append((Handle.of(state), record))
            for group, caches in cache_groups(state).items():
                length, runs = record[group]
                places = [(segment, first + i) for segment, first, count in runs for i in range(count)]
                for i, (segment, index) in enumerate(places):
                    marks, tokens = tuple(cache.mark(i) for cache in caches), min(BLOCK, length - i * BLOCK)
                    key = row_key(caches, i)
                    if key not in known.rows or known.rows[key].tokens < tokens:
                        known.rows[key] = Row(marks, segment, index, tokens)
        return known

    def _document(self) -> Document:
        talk = self.values["conversation"]
        ids, tokens, flags = (self._file.small(name) for name in SMALL)
        return Document(talk, ids, tokens, flags, read_pictures(talk))
