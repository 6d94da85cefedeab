#!/usr/bin/env python3
"""An offline assistant for a small board: it talks, reads the board through tools, looks at pictures, and remembers.

    assistant.py MODEL                              talk to it on the terminal
    assistant.py MODEL --ask "How hot is it?"       one question
    assistant.py MODEL --look [FILE]                describe a picture, or what the camera sees
    assistant.py MODEL --read meter [FILE]          read a meter or a receipt: JSON by a schema
    assistant.py MODEL --watch FOLDER               answer what is put into a folder: pictures, and questions (*.txt)
    assistant.py demo --once                        show each of these once, with the built-in model, in seconds

MODEL is whatever edgeq.load takes. With --memory the whole process keeps to that size. With --session FILE, or with
--sessions FOLDER for one of each model, the conversation goes on where it was, whatever ended the program.
A crash loses at most the turn in progress.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from hashlib import sha256
from io import TextIOWrapper
from itertools import count
from pathlib import Path
from typing import Any

from board_tools import Board, Pins

import edgeq
from edgeq.errors import EdgeqError, UsageError
from edgeq.files import new_file
from edgeq.files.lock import Lock
from edgeq.machine.programs import ask_program
from edgeq.session.identity import model_identity

SYSTEM = (
    "You are a helpful assistant on a small board without a network. Answer briefly. Use the tools to read the board."
)
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
ROUNDS = 4  # of tool calls for a question
SCHEMAS = Path(__file__).resolve().parent / "schemas"
DESCRIBE = "Describe the picture."
HELP = """\
/look [FILE]          describe a picture, or what the camera sees; then ask about it
/read KIND [FILE]     read a meter, a receipt, or whatever a schema (FILE.json) says: JSON
/board                what the board's sensors say
/new                  begin anew
/quit                 leave; the conversation is kept"""


class Assistant:
    """A model, a board and one conversation, which is saved after every turn."""

    def __init__(self, model: edgeq.Model, board: Board, session: Path | None = None, *, new: bool = False) -> None:
        self.model, self.board, self._session = model, board, session
        if session is not None and session.exists() and not new:
            try:
                self.chat = edgeq.load_session(session, model)
            except EdgeqError as error:
                error.hint = f"{error.hint}; or begin anew with --new" if error.hint else "begin anew with --new"
                raise
            tell(f"going on with {session}: {number(len(self.chat.turns), 'turn')}")
            if (told := self.tools) != (now := self._options()["tools"]):
                tell(
                    f"it keeps the tools that it began with, {names(told)}; a new one has {names(now)}: --new, or /new"
                )
        else:
            self.begin()

    def begin(self) -> None:
        """Begin a new conversation; the old one's file is replaced after the first turn."""
        self.chat = self.model.chat(thinking=False, overflow="shift", **self._options())

    def _options(self) -> dict[str, Any]:
        """What a new conversation begins with."""
        if self.model.vocab_size < 10_000:  # the demo model was taught no system prompt, and mixes up more tools
            return {"tools": self.board.tools[:2], "temperature": 0.0}
        return {"tools": self.board.tools, "system": SYSTEM}

    @property
    def tools(self) -> list[Mapping[str, Any]]:
        """The tools that the model was told of when the conversation began."""
        return list(self.chat.snapshot().settings.tools or ())

    def check_switch(self) -> None:
        """UsageError unless the model was told of the pins that it may switch."""
        for tool in self.board.tools:
            if tool["function"]["name"] != "set_pin" or tool in self.tools:
                continue
            if tool in self._options()["tools"]:
                raise UsageError(f"--switch: the conversation began with {names(self.tools)}", hint="add --new")
            raise UsageError("--switch: the demo model switches no pins", hint="give another MODEL")

    def ask(self, text: str, *pictures: Path | bytes) -> str:
        """Say something, answer the tool calls that come, and save; the answer, which was printed as it came."""
        reply = self.chat.send(text, images=pictures)
        answer = spoken(reply)
        rounds = 0
        while reply.tool_calls:
            if (rounds := rounds + 1) > ROUNDS:
                tell(f"stopped after {ROUNDS} rounds of tool calls")
                break
            results = []
            for call in reply.tool_calls:
                results.append(self.board.call(call.name, call.arguments))
                tell(f"{call.name}({json.dumps(call.arguments, ensure_ascii=False)}) -> {results[-1]}")
            reply = self.chat.send_tool_results(*results)
            answer = spoken(reply)
        if self._session is not None:
            self.chat.save(self._session)
        return answer

    def read(self, kind: str, picture: Path | bytes) -> Any:
        """What a picture says, by a schema: "meter", "receipt" or a file. The conversation does not grow by it."""
        schema = schema_of(kind)
        task = schema.get("title") or "Read the picture. Answer in JSON."
        chat = self.model.chat(thinking=False, schema=schema, temperature=0.0, presence_penalty=0.0)
        reply = chat.send(task, images=[picture])
        for _ in reply:
            pass
        try:
            return json.loads(reply.text)
        except ValueError:
            raise UsageError(
                f"the {kind} could not be read: the answer was cut off after {len(reply.ids)} tokens",
                hint="bound what the schema lets grow (maxLength, maxItems), or give a longer --context",
            ) from None


def session_of(model: edgeq.Model, folder: Path) -> Path:
    """The file of a model's conversation: no other model can go on with it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"conversations cannot be kept in {folder}: {error.strerror}", hint="give a folder of your own"
        ) from None
    given = model.source["model"] if model.source else model.checkpoint.path
    name = re.sub(r"[^\w.-]+", "-", Path(given).name)
    identity = json.dumps(model_identity(model.checkpoint, model.language), sort_keys=True)
    return folder / f"{name}-{sha256(identity.encode()).hexdigest()[:8]}.eqs"


@contextmanager
def held(session: Path | None) -> Iterator[None]:
    """Keep a second assistant away from a conversation: the turns of the one would replace the other's."""
    lock = None
    if session is not None:
        file = session.with_name(f".{session.name}.lock")
        with suppress(OSError):  # where nothing can be written, saving says so
            session.parent.mkdir(parents=True, exist_ok=True)
            lock = Lock(file)
    if session is None or lock is None:
        yield
        return
    with closing(lock):
        if lock.state == "taken":
            raise UsageError(
                f"another assistant is in the conversation {session}",
                hint="end that one, or have another conversation with --session FILE",
            )
        try:
            yield
        finally:
            with suppress(OSError):
                file.unlink()


def spoken(reply: edgeq.Reply) -> str:
    """Print an answer as it comes. Ctrl-C ends it; what was said stays in the conversation."""
    try:
        for piece in reply:
            if piece.channel == "answer":
                print(shown(piece.text), end="", flush=True)
    except KeyboardInterrupt:
        reply.close()
        tell("stopped")
    if reply.text:
        print(flush=True)
    return reply.text


def shown(text: str) -> str:
    """Text without what a terminal would act on."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def tell(text: str) -> None:
    print(f"[{shown(text)}]", file=sys.stderr, flush=True)


def names(tools: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(tool["function"]["name"] for tool in tools) or "none"


def number(of: int, what: str) -> str:
    return f"{of} {what}{'' if of == 1 else 's'}"


def schema_of(kind: str) -> dict[str, Any]:
    """The schema of a kind that comes along, or of a file."""
    file = SCHEMAS / f"{kind}.json" if kind in kinds() else Path(kind)
    try:
        schema = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"there is no schema {kind}: {error.strerror}", hint=f"choose {', '.join(kinds())}, or give a JSON file"
        ) from None
    except ValueError as error:
        raise UsageError(f"{file} is not JSON: {error}", hint="it must be a JSON schema") from None
    if not isinstance(schema, dict):
        raise UsageError(f"{file} must be a JSON schema, an object, got {type(schema).__name__}")
    if not isinstance(schema.get("title", ""), str):
        raise UsageError(f"{file}: title must be text, got {schema['title']!r}", hint="it is what the model is told")
    return schema


def kinds() -> list[str]:
    return sorted(file.stem for file in SCHEMAS.glob("*.json"))


# --- pictures ---------------------------------------------------------------------------------------------------------


@contextmanager
def picture_of(name: str | None) -> Iterator[Path]:
    """A file, edgeq's own picture ("demo"), or without a name a photo that the camera takes now."""
    if name is None or name == "camera":
        with tempfile.TemporaryDirectory() as folder:
            yield photo(Path(folder) / "photo.jpg")
    elif name == "demo":
        yield Path(edgeq.__file__).parent / "demo" / "picture.png"
    else:
        yield Path(name).expanduser()


def photo(file: Path) -> Path:
    """Take a picture with the Raspberry Pi's camera."""
    camera = next(filter(None, map(shutil.which, ("rpicam-still", "libcamera-still"))), None)
    if camera is None:
        raise UsageError(
            "there is no camera: rpicam-still was not found",
            hint="name a file, or on a Raspberry Pi: sudo apt install rpicam-apps-lite",
        )
    size = ["--width", "1296", "--height", "972"]
    try:
        took = ask_program(camera, "-n", "-t", "500", *size, "-o", str(file), seconds=30)
    except OSError as error:
        raise UsageError(f"the camera took no picture: {error}", hint="try `rpicam-hello`") from None
    if took.code or not file.exists():
        said = took.errors.strip().splitlines() or [f"exit status {took.code}"]
        raise UsageError(f"the camera took no picture: {said[-1]}", hint="try `rpicam-hello`")
    return file


# --- the ways to use it -----------------------------------------------------------------------------------------------


def talk(assistant: Assistant) -> None:
    """A conversation on the terminal, or with whatever writes lines to stdin."""
    if sys.stdin.isatty():
        tell("/help lists what there is besides talking; Ctrl-D leaves")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        if line == "/quit":
            return
        try:
            obey(assistant, line)
        except EdgeqError as error:
            tell(one_line(error))


def obey(assistant: Assistant, line: str) -> None:
    """One line of the user's."""
    command, *words = line.split(maxsplit=2) if line.startswith("/") else [""]
    if command == "/look":
        with picture_of(line.partition(" ")[2].strip() or None) as picture:
            assistant.ask(DESCRIBE, picture)
    elif command == "/read":
        if not words:
            raise UsageError("/read needs to know what", hint=f"/read {'|'.join(kinds())} [FILE]")
        read_out(assistant, *words)
    elif command == "/board":
        print(assistant.board.call("read_board", {}))
    elif command == "/new":
        assistant.begin()
    elif command:
        print(HELP)
    elif line:
        assistant.ask(line)


def read_out(assistant: Assistant, kind: str, name: str | None = None) -> None:
    """Print what a picture says, as JSON."""
    schema_of(kind)  # what is wrong with it is told before the camera is asked
    with picture_of(name) as picture:
        print(json.dumps(assistant.read(kind, picture), ensure_ascii=False))


def watch(assistant: Assistant, folder: Path, kind: str | None, *, looks: int | None = None, pause: float = 1) -> None:
    """Answer what is put into a folder: NAME gets NAME.answer.txt, or NAME.answer.json where a kind is to be read.

    A file that is the same at two looks, `pause` seconds apart, is whole. looks: how many there are; None never ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be watched: {error.strerror}", hint="give a folder of your own") from None
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{folder} cannot be written to", hint="answers go there: give a folder of your own")
    if kind is not None:
        schema_of(kind)
    tell(f"watching {folder} for pictures and questions (*.txt)")
    before, tried = dict[Path, Version](), dict[Path, Version]()
    for look in count() if looks is None else range(looks):
        if look:
            time.sleep(pause)
        now = unanswered(folder)
        for file, version in now.items():
            if before.get(file) == version and tried.get(file) != version:
                tried[file] = version  # where there is no room for an answer, say: it is not asked again and again
                answer_file(assistant, file, version, kind)
        before = now


Version = tuple[int, int]
"""When a file was written, in nanoseconds by the clock of whoever wrote it, and its size."""


def unanswered(folder: Path) -> dict[Path, Version]:
    """The files that have no answer, the oldest first.

    An answer has the time of what it answers: a Raspberry Pi has no clock while it is off, so later may be earlier.
    """
    found = dict[Path, Version]()
    try:
        files = list(folder.iterdir())
    except OSError as error:
        raise UsageError(f"{folder} cannot be read: {error.strerror}", hint="give a folder of your own") from None
    for file in files:
        if file.suffix.lower() not in (*PICTURES, ".txt") or ".answer." in file.name or file.name.startswith("."):
            continue
        with suppress(OSError):  # gone already
            written, answers = file.stat(), [answer_of(file, end) for end in ("txt", "json")]
            answered = [answer.stat().st_mtime_ns for answer in answers if answer.exists()]
            if file.is_file() and written.st_mtime_ns not in answered:
                found[file] = written.st_mtime_ns, written.st_size
    return dict(sorted(found.items(), key=lambda item: item[1]))


def answer_of(file: Path, end: str) -> Path:
    return file.with_name(f"{file.name}.answer.{end}")


def answer_file(assistant: Assistant, file: Path, version: Version, kind: str | None) -> None:
    """Answer one file, or say why that is not possible."""
    tell(file.name)
    try:
        end, text = answer_to(assistant, file, kind)
    except (EdgeqError, OSError) as error:
        end, text = "txt", one_line(error)
        tell(text)
    try:
        write(answer_of(file, end), text, version)
    except EdgeqError as error:
        tell(one_line(error))


def answer_to(assistant: Assistant, file: Path, kind: str | None) -> tuple[str, str]:
    """The answer to a file, and how its name ends: a question is asked in the conversation, a picture in one of its
    own."""
    if file.suffix.lower() == ".txt":
        question = file.read_text(encoding="utf-8", errors="replace").strip()
        return "txt", assistant.ask(question) if question else ""
    if kind is None:
        return "txt", spoken(assistant.model.chat(thinking=False).send(DESCRIBE, images=[file]))
    return "json", json.dumps(assistant.read(kind, file), ensure_ascii=False)


def write(file: Path, text: str, version: Version) -> None:
    """Write an answer, with the time of what it answers."""
    with new_file(file, may_replace=lambda _: None) as new:
        new.write_text(text + "\n", encoding="utf-8")
        os.utime(new, ns=(version[0], version[0]))


def once(model: edgeq.Model, board: Board) -> None:
    """Each part once, in a conversation of its own; what this machine does not have is said in a line."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "once.eqs"
        print(f"board    {board.call('read_board', {})}")
        print(f"pin 17   {board.call('read_pin', {'pin': 17})}")
        assistant = Assistant(model, board, kept)
        assistant.check_switch()
        for question in ("What is 12 + 30?", "What time is it in Rome?"):
            print(f"question {question}")
            assistant.ask(question)
        with picture_of("demo") as picture:
            print("picture  How many figures are there?")
            assistant.ask("How many figures are there?", picture)
            print("schema   meter", flush=True)
            print(json.dumps(assistant.read("meter", picture)))
        said = assistant.chat.transcript()
        del assistant  # as if the program had ended
        again = Assistant(model, board, kept).chat
        if again.transcript() != said:
            raise EdgeqError(f"the conversation in {kept} is not the one that was saved", hint="report this")
        print(f"session  {number(len(again.turns), 'turn')}, the same after a restart")
    try:
        with picture_of("camera"):
            print("camera   took a picture")
    except EdgeqError as error:
        print(f"camera   {one_line(error)}")


def one_line(error: EdgeqError | OSError) -> str:
    hint = error.hint if isinstance(error, EdgeqError) else None
    return f"error: {' '.join(str(error).split())}" + (f" ({hint})" if hint else "")


def board_of(args: argparse.Namespace) -> Board:
    """The board, with the pins that there are."""
    try:
        pins = Pins(mock=args.mock_pins)
    except ImportError:
        if args.switch or args.mock_pins:
            raise UsageError("GPIO pins need gpiozero, which is not installed", hint="pip install gpiozero") from None
        tell("no GPIO pins: gpiozero is not installed (pip install gpiozero)")
        return Board()
    if missing := [pin for pin in args.switch if pin not in pins]:
        raise UsageError(
            f"--switch {missing[0]}: this board has no such GPIO pin", hint="give a BCM number, such as 17 for GPIO17"
        )
    if pins.mock:
        tell("no GPIO pins here: mock pins take their place")
    return Board(pins, args.switch)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a folder, a .gguf file, a Hugging Face ID, or demo")
    parser.add_argument("--memory", metavar="SIZE", help="most that the process may take, such as 1.5G")
    parser.add_argument("--context", type=int, metavar="N", help="tokens that a conversation can have")
    parser.add_argument("--session", type=Path, metavar="FILE", help="keep the conversation in a file (.eqs)")
    parser.add_argument("--sessions", type=Path, metavar="FOLDER", help="keep one of each model in a folder")
    parser.add_argument("--new", action="store_true", help="begin anew; the conversation that was kept is replaced")
    parser.add_argument(
        "--switch", type=int, action="append", default=[], metavar="PIN", help="let it switch a GPIO pin"
    )
    parser.add_argument("--mock-pins", action="store_true", help="pretend to have GPIO pins")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--ask", metavar="TEXT", help="one question")
    way.add_argument("--look", nargs="?", const="camera", metavar="FILE", help="describe a picture, or the camera's")
    way.add_argument("--watch", type=Path, metavar="FOLDER", help="answer what is put into a folder")
    way.add_argument("--once", action="store_true", help="show each part once; no conversation is kept or changed")
    parser.add_argument(
        "--read",
        nargs="+",
        metavar=("KIND", "FILE"),
        help=f"read {', '.join(kinds())} or by a schema; with --watch KIND only",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    if args.read and (len(args.read) > 2 or args.ask is not None or args.look or args.once):
        raise UsageError("--read takes a kind and one file", hint="--read meter photo.jpg")
    if args.watch and args.read and len(args.read) > 1:
        raise UsageError("--watch with --read takes a kind and no file", hint="--watch FOLDER --read meter")
    if args.new and not (args.session or args.sessions):
        raise UsageError("--new needs a conversation that is kept", hint="give --session FILE, or leave --new out")
    board = board_of(args)
    model = edgeq.load(args.model, context=args.context, memory=args.memory)
    if args.once:
        once(model, board)
        return
    session = args.session or (session_of(model, args.sessions) if args.sessions else None)
    with held(session):
        serve(Assistant(model, board, session, new=args.new), args)


def serve(assistant: Assistant, args: argparse.Namespace) -> None:
    """Use the assistant in the way that was asked for."""
    assistant.check_switch()
    if args.watch:
        watch(assistant, args.watch, args.read[0] if args.read else None)
    elif args.read:
        read_out(assistant, *args.read)
    elif args.look:
        with picture_of(args.look) as picture:
            assistant.ask(DESCRIBE, picture)
    elif args.ask is not None:
        assistant.ask(args.ask)
    else:
        talk(assistant)


def main(argv: Sequence[str] | None = None) -> int:
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, TextIOWrapper):  # what the locale has no character for is no reason to end
            stream.reconfigure(errors="replace")
    try:
        run(options().parse_args(argv))
        sys.stdout.flush()
    except EdgeqError as error:
        print(one_line(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left: nothing more to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
