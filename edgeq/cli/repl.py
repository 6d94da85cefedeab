"""The conversation at the prompt: line editing, history, multi-line input, slash commands.

Ctrl-C while the model talks stops the reply; at the prompt it clears the line, and a second time leaves. Ctrl-D leaves.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from edgeq.cli.console import error_line
from edgeq.cli.pictures import announce, by_kind, dropped, named
from edgeq.cli.reply import show_reply, usage_line
from edgeq.errors import EdgeqError, UsageError
from edgeq.generate import GenerationSettings
from edgeq.inputs import expand_user
from edgeq.printable import printable
from edgeq.session.chat import Chat
from edgeq.session.reply import Reply
from edgeq.vision.visual import Visual

__all__ = ["Repl"]

_FENCE = '"""'


class Repl:
    """A conversation read from a terminal."""

    def __init__(self, chat: Chat, name: str, attached: Sequence[Visual] = ()) -> None:
        self._chat, self._name = chat, name
        self._attached = list(attached)  # pictures that go with the next message
        self._last: Reply | None = None
        self._commands: dict[str, tuple[Callable[[list[str]], None], str]] = {
            "/help": (self._help, "list the commands"),
            "/exit": (self._exit, "leave (also /bye, /quit, Ctrl-D)"),
            "/clear": (self._clear, "clear the conversation (also /reset)"),
            "/undo": (self._undo, "undo the last question and its answer"),
            "/regen": (self._regenerate, "answer the last question again"),
            "/think": (lambda _: self._think(True), "think before answering"),
            "/nothink": (lambda _: self._think(False), "answer without thinking"),
            "/set": (self._set, "/set temperature 0.5: change a setting"),
            "/show": (self._show, "show the current settings"),
            "/system": (self._system, "/system TEXT: set the system prompt; clears the conversation"),
            "/image": (lambda words: self._attach(images=words), "/image FILE: show an image with the next message"),
            "/video": (lambda words: self._attach(videos=words), "/video FILE: show a video with the next message"),
            "/stats": (self._stats, "statistics of the last reply"),
        }
        self._synonyms = {"/bye": "/exit", "/quit": "/exit", "/reset": "/clear", "/?": "/help", "/no_think": "/nothink"}

    def run(self) -> None:
        """Read, answer, repeat, until the user leaves."""
        self._greet()
        announce(self._chat.model, self._attached)
        session: PromptSession[str] = PromptSession(history=_history())
        leaving = False
        while True:
            try:
                line = self._read(session)
                leaving = False
                if line.strip():
                    self._handle(self._without_dropped(line, session))
            except KeyboardInterrupt:
                if leaving:
                    return
                leaving = True
                _say("(press Ctrl-C again, or Ctrl-D, to leave)")
            except EOFError:
                return
            except EdgeqError as error:
                _say(error_line(error))

    def _read(self, session: PromptSession[str]) -> str:
        """A line, or everything between two lines of three quotes."""
        line = session.prompt(">>> ")
        if not line.strip().startswith(_FENCE):
            return line
        lines = [line.strip()[len(_FENCE) :]]
        while not lines[-1].rstrip().endswith(_FENCE):
            lines.append(session.prompt("... "))
        lines[-1] = lines[-1].rstrip()[: -len(_FENCE)]
        return "\n".join(lines).strip("\n")

    def _handle(self, line: str) -> None:
        word = _first_word(line)
        command = self._command(line)
        if command is not None:
            command[0](_arguments(line))
        elif word.startswith("/") and "/" not in word[1:]:
            raise UsageError(f"unknown command {word}", hint="/help lists the commands")
        elif word:
            attached, self._attached = self._attached, []
            self._answer(self._chat.send(line, **by_kind(attached)))

    def _command(self, line: str) -> tuple[Callable[[list[str]], None], str] | None:
        word = _first_word(line)
        return self._commands.get(self._synonyms.get(word, word))

    def _without_dropped(self, line: str, session: PromptSession[str]) -> str:
        """A line without the paths of pictures that a terminal pasted into it, once the user wants them attached."""
        images, videos, rest = dropped(line)
        if self._command(line) is not None or not images + videos:
            return line
        names = ", ".join(path.name for path in (*images, *videos))
        answer = session.prompt(f"attach {printable(names)}? [Y/n] ").strip().lower()
        if answer not in ("", "y", "yes"):
            return line
        self._attach([str(path) for path in images], [str(path) for path in videos])
        return rest

    def _answer(self, reply: Reply) -> None:
        self._last = reply
        show_reply(reply, self._chat.model.engine.ops)

    # --- commands ----------------------------------------------------------------------------------------------------

    def _greet(self) -> None:
        mode = "thinks before it answers" if self._chat.thinking else "answers without thinking"
        engine = self._chat.model.engine
        _say(f"{self._name} on the {engine.ops.name} backend; it {mode}. /help lists commands, /exit leaves.")
        if engine.checkpoint.config.name == "edgeq/demo":
            _say(
                "This is the built-in 8.7 MB demo: it shows that everything works, and knows very little.\n"
                "For a real model: edgeq chat Qwen/Qwen3.5-2B"
            )

    def _help(self, _: list[str]) -> None:
        for name, (_run, text) in self._commands.items():
            _say(f"{name:10} {text}")
        _say(f"{_FENCE:10} starts and ends a message of several lines")

    def _attach(self, images: Sequence[str] = (), videos: Sequence[str] = ()) -> None:
        """Open pictures for the next message, and say what they will cost; without any, take back those attached."""
        if not images and not videos:
            self._attached = []
            _say("no picture is attached")
            return
        opened = self._chat.open("", named(images), named(videos))
        self._attached += opened
        announce(self._chat.model, opened)
        if len(opened) == len(self._attached):
            _say("attached to the next message")

    def _exit(self, _: list[str]) -> None:
        raise EOFError

    def _clear(self, _: list[str]) -> None:
        self._restart(self._chat.system)

    def _system(self, words: list[str]) -> None:
        self._restart(" ".join(words) or None)

    def _restart(self, system: str | None) -> None:
        self._chat = self._chat.fresh(system=system)
        self._last, self._attached = None, []
        _say("conversation cleared")

    def _undo(self, _: list[str]) -> None:
        _say(f"undone: {self._chat.undo()[0].text}")

    def _regenerate(self, _: list[str]) -> None:
        self._answer(self._chat.regenerate())

    def _think(self, thinking: bool) -> None:
        self._chat.thinking = thinking
        _say("thinking is on" if thinking else "thinking is off")

    def _set(self, words: list[str]) -> None:
        if len(words) != 2:
            raise UsageError("/set takes a name and a value", hint="/show lists the settings")
        name, value = words
        setting = {**self._chat.options, name: _value(value)}
        self._chat.settings.replace(**{name: setting[name]})  # says what is wrong with it, if anything is
        self._chat.options = setting

    def _show(self, _: list[str]) -> None:
        settings = self._chat.settings
        for field in fields(GenerationSettings):
            _say(f"{field.name:20} {getattr(settings, field.name)}")
        _say(f"{'thinking':20} {self._chat.thinking}\n{'system':20} {self._chat.system}")

    def _stats(self, _: list[str]) -> None:
        if self._last is None:
            raise UsageError("no reply yet")
        _say(usage_line(self._last, self._chat.model.engine.ops))
        _say(f"context: {len(self._chat.ids)} of {self._chat.model.engine.context_limit} tokens")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _first_word(line: str) -> str:
    return next(iter(line.split(maxsplit=1)), "")


def _arguments(line: str) -> list[str]:
    try:
        return shlex.split(line)[1:]
    except ValueError:  # an apostrophe, not a quotation
        return line.split()[1:]


def _value(text: str) -> Any:
    """A setting's value as the user wrote it."""
    known = {"true": True, "on": True, "false": False, "off": False}
    if text.lower() in known:
        return known[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return (text,)


def _history() -> History:
    """Lines of earlier conversations, in the user's state folder; off with EDGEQ_NOHISTORY."""
    if os.environ.get("EDGEQ_NOHISTORY"):
        return InMemoryHistory()
    folder = expand_user(Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state")) / "edgeq"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return InMemoryHistory()
    return _LenientHistory(str(folder / "history"))


class _LenientHistory(FileHistory):
    """A history that a full or broken disk takes lines from, but no conversation."""

    def load_history_strings(self) -> Iterable[str]:
        with suppress(OSError):
            return list(super().load_history_strings())
        return []

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)
