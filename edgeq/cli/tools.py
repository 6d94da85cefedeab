"""Tools at the terminal: what the model may call, and a program of the user's choice that answers its calls.

The program is run once for a call, without a shell: COMMAND's words, then the function's name. On its stdin is the
call, one line of JSON: {"id": ..., "name": ..., "arguments": {...}}. What it prints is the result. The model is told if
it fails, takes too long, or was not allowed.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import IO, TYPE_CHECKING, Any

from edgeq.cli.console import error_line, say, show
from edgeq.cli.prompt import file_text
from edgeq.errors import EdgeqError, MemoryBudgetError, UsageError
from edgeq.printable import brief, one_line, printable

if TYPE_CHECKING:
    from edgeq.session.chat import Chat
    from edgeq.session.reply import Reply
    from edgeq.text.tool_calls import ToolCall

__all__ = ["ToolRunner", "call_line", "follow", "read_tools", "show_calls"]

MOST_OUTPUT = 1 << 16
"""Bytes of a result that the model is given; the rest is read and forgotten."""

_SHOWN = 200  # characters of a result on the terminal


def read_tools(file: Path) -> list[dict[str, Any]]:
    """The functions in a JSON file, in OpenAI's form: a list, or an object whose "tools" are one; each a
    {"type": "function", "function": {"name": ...}}, or the inner object by itself.
    """
    try:
        given = json.loads(file_text(file))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not JSON: {one_line(error)}") from None
    tools = given.get("tools") if isinstance(given, dict) and "tools" in given else given
    if not isinstance(tools, list) or not tools:
        raise UsageError(
            f"{file}: tools must be a list of functions, got {brief(tools)}",
            hint='expected [{"type": "function", "function": {"name": "...", "parameters": {...}}}, ...]',
        )
    return [_tool(tool, f"{file}: tool {n}") for n, tool in enumerate(tools, 1)]


def _tool(tool: Any, where: str) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise UsageError(f"{where} must be an object with a name, got {brief(tool)}")
    return tool if function is not tool else {"type": "function", "function": tool}


def call_line(call: ToolCall) -> str:
    """A call for a person: get_weather({"city": "Rome"}), whole, and safe to show."""
    return printable(f"{call.name}({json.dumps(call.arguments, ensure_ascii=False)})", longest=None)


def show_calls(reply: Reply) -> None:
    """Print the calls that nobody answers, which are the reply's result, to stdout."""
    for call in reply.tool_calls:
        show(call_line(call))


def follow(chat: Chat, reply: Reply, show: Callable[[Reply], bool], runner: ToolRunner | None) -> tuple[Reply, bool]:
    """Show a reply; while it calls functions, run them, if something does, and show the reply to their results.

    `show` generates a reply, and says whether it was heard to its end. Returns the last reply and that. What looks like
    a call and is none is told on stderr.
    """
    rounds = 0
    while True:
        finished = show(reply)
        for malformed in reply.malformed_calls:
            say(f"not a tool call: {printable(malformed.reason)}", faint=True)
        if runner is None or not finished or not reply.tool_calls:
            return reply, finished
        if rounds == runner.rounds:
            say(f"stopped after {rounds} rounds of tool calls", faint=True)
            return reply, finished
        rounds += 1
        results = [runner.result(call) for call in reply.tool_calls]
        try:
            reply = chat.send_tool_results(*results)
        except MemoryBudgetError as error:  # nothing was said yet
            say(error_line(error))
            reply = chat.send_tool_results(*[_error("the result is too long for the context")] * len(results))


class ToolRunner:
    """Runs a program for each call.

    ask: whether to ask on the terminal before. rounds: of calls for one question. timeout: seconds for a call.
    `runs` are the calls run so far, with their results. `read` asks a question and returns the answer; it can be
    replaced by whatever else reads the terminal.
    """

    def __init__(self, command: str, *, ask: bool, rounds: int, timeout: float) -> None:
        try:
            self._words = shlex.split(command)
        except ValueError as error:
            raise UsageError(f"the command {brief(command)} cannot be read: {one_line(error).lower()}") from None
        if not self._words or shutil.which(self._words[0]) is None:
            raise UsageError(
                f"the program {brief(self._words[0] if self._words else command)} was not found",
                hint="give a path (./tool.py) or a program on PATH; it must be executable",
            )
        if ask and not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise UsageError(
                "programs are run for the model only after asking, and stdin and stderr are not a terminal",
                hint="add --yes to run them without asking",
            )
        self.rounds = rounds
        self._ask, self._timeout = ask, timeout
        self.runs: list[dict[str, Any]] = []
        self.read: Callable[[str], str] = _asked

    def result(self, call: ToolCall) -> str:
        """What the model is told."""
        say(call_line(call), faint=True)
        result = self._run(call) if self._allowed(call) else _error("the user did not allow this call")
        self.runs.append({**call._asdict(), "result": result})
        say(f"  -> {printable(result, longest=_SHOWN)}", faint=True)
        return result

    def _allowed(self, call: ToolCall) -> bool:
        if not self._ask:
            return True
        words = printable(shlex.join([*self._words, call.name]), longest=None)
        _forget_typed()
        try:
            answer = self.read(f"run {words}? [y/N/a(lways)] ").strip().lower()
        except EOFError:
            answer = ""
        self._ask = answer not in ("a", "always")
        return answer in ("y", "yes", "a", "always")

    def _run(self, call: ToolCall) -> str:
        given = json.dumps(call._asdict(), ensure_ascii=False).encode() + b"\n"
        try:
            process = subprocess.Popen(
                [*self._words, call.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True,  # so that it can be ended with all that it started
            )  # fmt: skip
        except (OSError, ValueError) as error:  # the latter: a NUL in the name
            raise EdgeqError(
                f"{self._words[0]} cannot be run: {one_line(error)}", hint="check its first line and its permissions"
            ) from None
        out, err = _Collected(process.stdout), _Collected(process.stderr)
        _written(process.stdin, given)
        try:
            status = process.wait(self._timeout)
        except subprocess.TimeoutExpired:
            _end(process)
            return _error(f"no result within {self._timeout} seconds")
        except BaseException:
            _end(process)
            raise
        if status:
            return _error(f"exit status {status}", stderr=err.text()[-1000:])
        return out.text()


def _asked(question: str) -> str:
    say(question, end="")
    return sys.stdin.readline()


def _forget_typed() -> None:
    """Drop what was typed before a question: it cannot be the answer."""
    with suppress(ImportError, OSError, ValueError):  # Windows, and a stdin that is none
        import termios

        with suppress(termios.error):
            termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)


class _Collected(Thread):
    """Reads a stream to its end, and keeps what fits."""

    def __init__(self, stream: IO[bytes] | None) -> None:
        super().__init__(daemon=True)
        assert stream is not None
        self._stream, self._kept, self._total = stream, bytearray(), 0
        self.start()

    def run(self) -> None:
        with suppress(OSError, ValueError), self._stream:
            while chunk := os.read(self._stream.fileno(), MOST_OUTPUT):
                self._total += len(chunk)
                self._kept += chunk[: MOST_OUTPUT - len(self._kept)]

    def text(self) -> str:
        """What was read, once the program has ended; what it started may hold the stream open."""
        self.join(1)
        text = self._kept.decode(errors="replace").rstrip("\n")
        cut = self._total - len(self._kept)
        return f"{text}\n[{cut} more bytes]" if cut else text


def _written(stream: IO[bytes] | None, given: bytes) -> None:
    """Write to a program that may not want to read."""

    def write() -> None:
        assert stream is not None
        with suppress(OSError), stream:
            stream.write(given)

    Thread(target=write, daemon=True).start()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program and what it started."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def _error(what: str, **more: str) -> str:
    return json.dumps({"error": what, **{key: text for key, text in more.items() if text}}, ensure_ascii=False)
