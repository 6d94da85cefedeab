"""The conversation at the prompt: what is typed is said, or is a command.

A command is one typed line that begins with a slash and is complete. Everything else is said as it is: a paste or a
text between fences, whatever it begins with, and a line whose first slash is doubled. A line that is nearly a command
is neither obeyed nor said, and the arrow up brings it back.

Ctrl-C while the model talks stops the reply; at the prompt it clears the line, and a second time leaves. Ctrl-D leaves.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from glob import glob
from pathlib import Path
from typing import NamedTuple

from edgeq.cli.clipboard import copy
from edgeq.cli.console import error_line, say, warn
from edgeq.cli.facts import lines
from edgeq.cli.keyboard import FENCE, Keyboard, Line
from edgeq.cli.memory import choice_facts, ledger_facts
from edgeq.cli.messages import save
from edgeq.cli.options import ChatDisplayOptions
from edgeq.cli.pictures import announce, by_kind, dropped, named
from edgeq.cli.prompt import file_text, without_last_newline
from edgeq.cli.reply import show_reply, usage_line
from edgeq.cli.session import Session
from edgeq.cli.settings import set_display, set_option
from edgeq.cli.tools import ToolRunner, follow, show_calls
from edgeq.errors import EdgeqError, UsageError
from edgeq.generate import GenerationSettings
from edgeq.inputs import expand_user, is_file
from edgeq.printable import printable
from edgeq.session.chat import Chat
from edgeq.session.parts import text_of
from edgeq.session.reply import Reply
from edgeq.vision.visual import Visual

__all__ = ["Repl"]

_NEARLY_FULL = 0.8  # of the context, from where on the user is told


class _Command(NamedTuple):
    """What a command does with the text behind its name, and how it is explained. `takes` is empty for none."""

    run: Callable[[str], None]
    help: str
    takes: str = ""


class Repl:
    """A conversation read from a terminal."""

    def __init__(
        self, chat: Chat, name: str, attached: Sequence[Visual] = (), display: ChatDisplayOptions | None = None,
        runner: ToolRunner | None = None, session: Session | None = None,
    ) -> None:  # fmt: skip
        self._chat, self._name, self._runner, self._session = chat, name, runner, session
        if runner is not None:
            runner.read = lambda question: self._keyboard.read(question, literal=True, remember=False).text
        self._display = display or ChatDisplayOptions()
        self._attached = list(attached)  # pictures that go with the next message
        self._read_files: list[str] = []  # texts that do
        self._last: Reply | None = None
        self._warned = False  # that the context is nearly full
        self._leaving = False  # once more Ctrl-C leaves
        self._kept = chat.turns  # when it was last written
        self._keyboard = Keyboard()
        self._commands = {
            "/help": _Command(lambda _: self._help(), "list the commands (also /?)"),
            "/exit": _Command(lambda _: self._exit(), "leave (also /bye, /quit, Ctrl-D)"),
            "/clear": _Command(lambda _: self._restart(self._chat.system), "clear the conversation (also /reset)"),
            "/undo": _Command(self._undo, "undo the last question and its answer, or the last N", "[N]"),
            "/edit": _Command(self._edit, "change the last question, and answer that", "[TEXT]"),
            "/regen": _Command(lambda _: self._answer(self._chat.regenerate()), "answer the last question again"),
            "/continue": _Command(
                lambda _: self._answer(self._chat.resume()), "go on with a reply that was stopped or cut"
            ),
            "/think": _Command(
                lambda text: self._think(True, text), "think before answering; with TEXT, ask that", "[TEXT]"
            ),
            "/nothink": _Command(
                lambda text: self._think(False, text), "answer without thinking; with TEXT, ask that", "[TEXT]"
            ),
            "/set": _Command(
                self._set, "change a setting, as in /set temperature 0.5; also wrap, markdown, quiet", "[NAME VALUE]"
            ),
            "/show": _Command(lambda _: self._show(), "show the current settings"),
            "/system": _Command(
                lambda text: self._restart(text if text.strip() else None),
                "set the system prompt, or none; clears the conversation",
                "[TEXT]",
            ),
            "/read": _Command(self._read_file, "send text files with the next message; without FILE, none", "[FILE]"),
            "/image": _Command(
                lambda text: self._attach(images=_files(text)), "show an image with the next message", "[FILE]"
            ),
            "/video": _Command(
                lambda text: self._attach(videos=_files(text)), "show a video with the next message", "[FILE]"
            ),
            "/save": _Command(
                self._save,
                "write the conversation: to go on with (.eqs), as Markdown (.md) or messages (.json)",
                "FILE",
            ),
            "/load": _Command(self._load, "go on with the conversation in a session file (.eqs)", "FILE"),
            "/copy": _Command(lambda _: self._copy(), "copy the last answer to the clipboard"),
            "/ctx": _Command(lambda _: self._context(), "how much of the context window is used (also /context)"),
            "/stats": _Command(lambda _: self._stats(), "statistics of the last reply"),
            "/memory": _Command(lambda _: self._memory(), "what the model takes: the plan, and what is held now"),
        }
        self._synonyms = {
            "/bye": "/exit", "/quit": "/exit", "/reset": "/clear", "/?": "/help", "/no_think": "/nothink",
            "/context": "/ctx", "/glob": "/read",
        }  # fmt: skip

    @property
    def names(self) -> set[str]:
        """What commands are called."""
        return {*self._commands, *self._synonyms}

    def run(self) -> None:
        """Read, answer, repeat, until the user leaves."""
        with self._keyboard:
            self._greet()
            announce(self._chat.model, self._attached)
            while True:
                try:
                    self._turn()
                except KeyboardInterrupt:
                    if self._leaving:
                        return
                    self._leaving = True
                    say("(press Ctrl-C again, or Ctrl-D, to leave)")
                except EOFError:
                    return

    def _turn(self) -> None:
        """Read a line and do what it says, or say why not."""
        try:
            line = self._read()
            self._leaving = False
            self._handle(line)
        except EdgeqError as error:
            say(error_line(error))

    def _read(self) -> Line:
        """A line, or everything between two lines of three quotes, which a Ctrl-D ends too."""
        line = self._keyboard.read(self._prompt())
        if not line.typed_start or not line.text.strip().startswith(FENCE):
            return line
        first = line.text.strip()[len(FENCE) :]
        lines = [line._replace(text=first, typed_end=line.typed_end and len(first) >= len(FENCE))]
        while not (lines[-1].typed_end and lines[-1].text.rstrip().endswith(FENCE)):
            try:
                lines.append(self._keyboard.read("... ", literal=True))
            except EOFError:
                lines.append(Line(FENCE))
        lines[-1] = Line(lines[-1].text.rstrip().removesuffix(FENCE))
        return Line("\n".join(line.text for line in lines).strip("\n"), typed_start=False)

    def _prompt(self) -> str:
        share = self._chat.context.share
        return f"{share:.0%} >>> " if share >= 0.01 else ">>> "

    def _handle(self, line: Line) -> None:
        if command := self._command(line):
            name, text = command
            if text.strip() and not self._commands[name].takes:
                raise UsageError(
                    f"{name} takes nothing behind it, got {printable(text.strip(), longest=40)}",
                    hint=f"/{name} ... sends such a line as text",
                )
            self._commands[name].run(text)
        else:
            text = line.text.removeprefix("/") if line.typed_start and line.text.startswith("//") else line.text
            self._say(self._without_dropped(text))

    def _command(self, line: Line) -> tuple[str, str] | None:
        """The command that a line is, and the text behind its name; None for a text, UsageError for an unknown one."""
        word = next(iter(line.text.split(maxsplit=1)), "")
        if not line.typed_start or not word.startswith("/") or "/" in word[1:]:
            return None
        name, text = self._synonyms.get(word, word), line.text.lstrip()[len(word) + 1 :]
        takes_lines = name in self._commands and self._commands[name].takes == "[TEXT]"
        if "\n" in line.text.strip() and not takes_lines:
            return None
        if name not in self._commands:
            raise UsageError(
                f"unknown command {printable(word, longest=40)}",
                hint="/help lists the commands; // begins a text with a slash",
            )
        return name, text

    def _say(self, text: str) -> None:
        """Send a message, with the files and the pictures that wait for it."""
        if not text.strip():
            return
        texts, attached, turns = self._read_files, self._attached, len(self._chat.turns)
        self._read_files, self._attached = [], []
        try:
            self._answer(self._chat.send("\n\n".join([text, *texts]), **by_kind(attached)))
        except EdgeqError:
            if len(self._chat.turns) == turns:  # nothing was said: they wait for the next try
                self._read_files, self._attached = texts, attached
            raise

    def _without_dropped(self, text: str) -> str:
        """A text without the paths of pictures that a terminal pasted into it, once the user wants them attached."""
        images, videos, rest = dropped(text)
        if not images + videos:
            return text
        names = ", ".join(path.name for path in (*images, *videos))
        if not self._agreed(f"attach {printable(names)}? [Y/n] ", default=True):
            return text
        self._attach([str(path) for path in images], [str(path) for path in videos])
        return rest

    def _agreed(self, question: str, *, default: bool) -> bool:
        try:
            answer = self._keyboard.read(question, literal=True, remember=False).text.strip().lower()
        except EOFError:
            return False
        return answer in ("y", "yes") or (default and not answer)

    def _answer(self, reply: Reply) -> None:
        ops = self._chat.model.engine.ops

        def show(reply: Reply) -> bool:
            whole = show_reply(reply, ops, self._display)
            self._keep()
            return whole

        self._last, _ = follow(self._chat, reply, show, self._runner)
        show_calls(self._last)
        if self._chat.context.share < _NEARLY_FULL:
            self._warned = False
        elif not self._warned:
            self._warned = True
            shifts = self._chat.overflow == "shift"
            warn(f"{self._used()}; " + ("the oldest turns go next" if shifts else "/undo and /clear make room"))

    def _keep(self) -> None:
        """Save the conversation to its session."""
        if self._session is not None:
            self._session.save(self._chat)
            self._kept = self._chat.turns

    def _used(self) -> str:
        context = self._chat.context
        return f"{context.share:.0%} of the context window is used: {context.used:,} of {context.limit:,} tokens"

    # --- commands ----------------------------------------------------------------------------------------------------

    def _greet(self) -> None:
        if self._display.quiet:
            return
        if turns := len(self._chat.turns):
            say(f"going on with a conversation of {turns} turn{'' if turns == 1 else 's'}")
        mode = "thinks before it answers" if self._chat.thinking else "answers without thinking"
        engine = self._chat.model.engine
        say(f"{printable(self._name)} on the {engine.ops.name} backend; it {mode}. /help lists commands, /exit leaves.")
        if engine.checkpoint.config.name == "edgeq/demo":
            say(
                "This is the built-in 8.7 MB demo: it shows that everything works, and knows very little.\n"
                "For a real model: edgeq chat Qwen/Qwen3.5-2B"
            )

    def _help(self) -> None:
        for name, command in self._commands.items():
            say(f"{f'{name} {command.takes}':17} {command.help}")
        say(f"{FENCE:17} starts and ends a message of several lines; Alt-Enter begins a line, too")
        say(f"{'//':17} begins a message with a slash; a paste is never a command")

    def _read_file(self, text: str) -> None:
        """Take the text of files along with the next message; without any, leave those behind that wait."""
        files = _files(text)
        if not files:
            self._read_files = []
            say("no text file is attached")
        for file in files:
            content = without_last_newline(file_text(expand_user(Path(file)), lenient=True, streams=False))
            self._read_files.append(content)
            say(f"{printable(Path(file).name)}: {len(content):,} characters, sent with the next message")

    def _attach(self, images: Sequence[str] = (), videos: Sequence[str] = ()) -> None:
        """Open pictures for the next message, and say what they will cost; without any, take back those attached."""
        if not images and not videos:
            self._attached = []
            say("no picture is attached")
            return
        opened = self._chat.open("", named(images), named(videos))
        self._attached += opened
        announce(self._chat.model, opened)
        if len(opened) == len(self._attached):
            say("attached to the next message")

    def _exit(self) -> None:
        raise EOFError

    def _restart(self, system: str | None) -> None:
        self._restart_with(self._chat.fresh(system=system))
        say("conversation cleared")

    def _restart_with(self, chat: Chat) -> None:
        self._chat, self._kept = chat, chat.turns
        self._last, self._attached, self._read_files, self._warned = None, [], [], False

    def _undo(self, text: str) -> None:
        """Take back a user's message, or some, with all that was said after it."""
        count = 1 if not text.strip() else int(text) if text.strip().isdecimal() else 0
        asked = [place for place, turn in enumerate(self._chat.turns) if turn.role == "user"]
        if count < 1:
            raise UsageError(f"/undo takes a number of questions, got {printable(text.strip(), longest=40)}")
        if count > len(asked):
            found = f"{len(asked)} question{'' if len(asked) == 1 else 's'}"
            raise UsageError("nothing to undo" if not asked else f"/undo {count}: the conversation has {found}")
        for turn in self._chat.undo(len(self._chat.turns) - asked[-count]):
            if turn.role == "user":
                say(f"undone: {printable(turn.text, longest=200)}")
        self._keep()

    def _edit(self, text: str) -> None:
        turn = next((turn for turn in reversed(self._chat.turns) if turn.role == "user"), None)
        if turn is None:
            raise UsageError("nothing to edit: no question yet")
        if not text.strip() and self._keyboard.edits:
            with suppress(EOFError):
                text = self._keyboard.read("edit: ", turn.text, literal=True).text
        if not text.strip():
            raise UsageError("nothing was changed: the new question is empty", hint="/edit TEXT gives another")
        self._answer(self._chat.edit(text))

    def _save(self, text: str) -> None:
        """Write the conversation to a file, after asking if there is one."""
        name = _unquoted(text.strip())
        if not name:
            raise UsageError("/save takes the name of a file", hint="as in /save chat.md")
        if not self._chat.turns:
            raise UsageError("nothing to save: nothing was said yet")
        path = expand_user(Path(name))
        if is_file(path) and not self._agreed(f"overwrite {printable(path.name)}? [y/N] ", default=False):
            say("nothing was written")
            return
        if self._session is not None and path.absolute() == self._session.path:
            self._session.save(self._chat)
        else:
            save(self._chat, path)
        if path.suffix.lower() == ".eqs":
            self._kept = self._chat.turns
        how = {".json": "--messages takes it", ".eqs": "/load and --session go on with it"}
        told = how.get(path.suffix.lower(), "a transcript, which cannot be loaded again")
        say(f"{printable(str(path))} is written: {told}")

    def _load(self, text: str) -> None:
        """Go on with another conversation, after asking if this one would be lost."""
        name = _unquoted(text.strip())
        if not name:
            raise UsageError("/load takes the name of a session file", hint="as in /load trip.eqs")
        lost = self._chat.turns and self._chat.turns != self._kept
        if lost and not self._agreed("leave this conversation, which is not saved? [y/N] ", default=False):
            return
        self._restart_with(self._chat.load(name))
        turns = len(self._chat.turns)
        say(f"{turns} turn{'' if turns == 1 else 's'}; {self._used()}")
        self._keep()

    def _think(self, thinking: bool, text: str) -> None:
        self._chat.thinking = thinking
        say("thinking is on" if thinking else "thinking is off")
        if text.strip():
            self._say(self._without_dropped(text))

    def _set(self, text: str) -> None:
        word, *rest = text.split(maxsplit=1) or [""]
        if not word:
            self._show()
        elif word == "system":  # as ollama has it
            self._restart(rest[0] if rest else None)
        elif shown := set_display(self._display, text):
            self._display, told = shown
            say(told)
        else:
            say(set_option(self._chat, text))

    def _show(self) -> None:
        settings = self._chat.settings
        for field in fields(GenerationSettings):
            say(f"{field.name:20} {getattr(settings, field.name)}")
        system = self._chat.system and printable(text_of(self._chat.system), keep="\n", longest=2000)
        say(f"{'thinking':20} {self._chat.thinking}\n{'system':20} {system}")

    def _copy(self) -> None:
        replies = [turn.reply for turn in self._chat.turns if turn.reply is not None]
        answer = text_of(replies[-1].get("content") or "") if replies else ""
        if not answer:
            raise UsageError("nothing to copy: no answer yet")
        say(copy(answer, self._keyboard.send))

    def _context(self) -> None:
        context, turns = self._chat.context, len(self._chat.turns)
        said = f"{turns} turn{'' if turns == 1 else 's'}"
        say(f"{self._used()}, {context.free:,} free; {said}, overflow: {self._chat.overflow}")

    def _memory(self) -> None:
        engine = self._chat.model.engine
        planned = choice_facts(engine.choice) if engine.choice is not None else {}
        say("\n".join(lines({**planned, **ledger_facts(engine)})))

    def _stats(self) -> None:
        if self._last is None:
            raise UsageError("no reply yet")
        say(usage_line(self._last, self._chat.model.engine.ops))
        say(f"context: {self._chat.context.used:,} of {self._chat.context.limit:,} tokens")


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # an apostrophe, not a quotation
        return text.split()


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _files(text: str) -> list[str]:
    """The files that a command names: one whose name has spaces, or several as a shell has them."""
    whole = text.strip()
    if whole and is_file(expand_user(Path(whole))):
        return [whole]
    found = [(sorted(glob(str(expand_user(Path(word))))) or [word]) for word in _words(text)]  # noqa: PTH207
    return [name for names in found for name in names]
