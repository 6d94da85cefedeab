"""Tools and structured output on the command line: what is shown, asked, run and refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from command import Run, leave_home, runner

import edgeq
from edgeq.cli.answers import read_biases, read_shape
from edgeq.cli.options import DisplayOptions
from edgeq.cli.reply import show_reply
from edgeq.cli.tools import MOST_OUTPUT, ToolRunner, call_line, follow, read_tools
from edgeq.errors import EdgeqError, UsageError
from edgeq.session.reply import Reply
from edgeq.text.tool_calls import ToolCall

QUESTION = "What is the temperature in the kitchen?"
TEMPERATURE = {
    "name": "get_temperature",
    "description": "The temperature in a room.",
    "parameters": {"type": "object", "properties": {"room": {"type": "string"}}, "required": ["room"]},
}
CALL = ToolCall("call_1", "get_temperature", {"room": "kitchen"})


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    leave_home(tmp_path, monkeypatch)
    return runner(capsys, monkeypatch)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([{"type": "function", "function": TEMPERATURE}]))
    return file


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], str]:
    """A command that runs some Python, with `call` (the object on stdin) and `name` (its argument) at hand."""

    def write(code: str) -> str:
        file = tmp_path / "a tool.py"
        start = "import json, os, sys, time\nname, call = sys.argv[-1], json.loads(sys.stdin.read())\n"
        file.write_text(start + dedent(code))
        return f"'{sys.executable}' -I '{file}'"

    return write


def running(command: str, **options: Any) -> ToolRunner:
    return ToolRunner(command, **{"ask": False, "rounds": 3, "timeout": 30, **options})


class TestFiles:
    @pytest.mark.parametrize(
        "written", [[TEMPERATURE], {"tools": [TEMPERATURE]}, [{"type": "function", "function": TEMPERATURE}]]
    )
    def test_forms(self, tmp_path: Path, written: Any) -> None:
        (tmp_path / "t").write_text(json.dumps(written))
        assert read_tools(tmp_path / "t") == [{"type": "function", "function": TEMPERATURE}]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[{]", "is not JSON"), ("[" * 100_000, "is not JSON"), ("[]", "must be a list of functions"),
            ("{}", "must be a list of functions, got {}"), ('"x"', "must be a list of functions"),
            ('[{"name": "a"}, {"type": "function"}]', "tool 2 must be an object with a name"),
            ('[{"function": {"name": 3}}]', "tool 1 must be"), ("[[1]]", "tool 1 must be"),
        ],
    )  # fmt: skip
    def test_what_is_none(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "t").write_text(text)
        with pytest.raises(UsageError, match=message):
            read_tools(tmp_path / "t")

    def test_shapes(self, tmp_path: Path) -> None:
        (tmp_path / "person.json").write_text('{"type": "string"}')
        assert read_shape("schema", str(tmp_path / "person.json")) == '{"type": "string"}'
        for given in ('{"const": 1}', ' {"a":\n1}'):
            assert read_shape("schema", given) == given
        for given in ('root ::= "a"', "start: /a/", "start: a\na: /b/", 'expr-2 ::= "x"\nroot ::= expr-2'):
            assert read_shape("grammar", given) == given
        with pytest.raises(UsageError, match="not found"):
            read_shape("grammar", str(tmp_path / "missing.gbnf"))

    def test_biases(self) -> None:
        assert read_biases(["15=2", "16=-3.5", "17-1", "18+4."]) == {15: 2.0, 16: -3.5, 17: -1.0, 18: 4.0}
        for wrong in ("x=1", "15", "15=", "-1=3", "1=2=3", "²=1"):
            with pytest.raises(UsageError, match="logit bias must be"):
                read_biases([wrong])


class TestProgram:
    def test_it_is_given_the_call(self, program: Callable[[str], str]) -> None:
        command = program("print(json.dumps([name, call]))")
        assert json.loads(running(command).result(CALL)) == ["get_temperature", CALL._asdict()]

    def test_what_it_prints_is_the_result(self, program: Callable[[str], str]) -> None:
        tool = running(program("sys.stdout.buffer.write('21 °C\\n\\n'.encode() + bytes([255, 10]))"))
        assert tool.result(CALL) == "21 °C\n\n\ufffd"
        assert tool.runs == [{**CALL._asdict(), "result": "21 °C\n\n\ufffd"}]

    def test_failure_is_told(self, program: Callable[[str], str]) -> None:
        told = json.loads(
            running(program("print('x' * 5000 + 'no sensor', file=sys.stderr); sys.exit(3)")).result(CALL)
        )
        assert told["error"] == "exit status 3"
        assert told["stderr"].endswith("xno sensor")
        assert len(told["stderr"]) == 1000

    def test_output_is_bounded(self, program: Callable[[str], str]) -> None:
        result = running(program("for _ in range(300): sys.stdout.write('a' * 10_000)")).result(CALL)
        assert result == "a" * MOST_OUTPUT + f"\n[{3_000_000 - MOST_OUTPUT} more bytes]"

    def test_time_is_bounded_children_included(self, program: Callable[[str], str], tmp_path: Path) -> None:
        code = f"""
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
        time.sleep(60)
        """
        told = json.loads(running(program(code), timeout=0.7).result(CALL))
        assert told == {"error": "no result within 0.7 seconds"}
        if (pid := tmp_path / "pid").exists():  # a busy machine may not have come so far, nor have ended it at once
            wait_until(lambda: not alive(int(pid.read_text())))

    def test_it_need_not_read(self, tmp_path: Path) -> None:
        call = ToolCall("x", "f", {"a": "b" * 1_000_000})
        assert running(f"'{sys.executable}' -c 'print(1)'").result(call) == "1"

    def test_what_cannot_be_run(self, tmp_path: Path) -> None:
        broken = tmp_path / "broken"
        broken.write_text("#!/nowhere/at/all\n")
        broken.chmod(0o755)
        with pytest.raises(EdgeqError, match="cannot be run"):
            running(str(broken)).result(CALL)
        for command, message in (("", "was not found"), ("no-such-program x", "'no-such-program' was not found"),
                                 ("a 'b", "no closing quotation"), (str(tmp_path), "was not found")):  # fmt: skip
            with pytest.raises(UsageError, match=message):
                running(command)

    def test_a_call_is_shown_whole_and_safe(self) -> None:
        call = ToolCall("x", "f\x1b[2J", {"a": "\x1b]0;" + "b" * 5000 + "\n\u202e"})
        line = call_line(call)
        assert line.isprintable()
        assert "b" * 5000 in line


def alive(pid: int) -> bool:
    """Whether a process is more than a corpse that nobody has buried."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(done.stdout.strip()) and not done.stdout.startswith("Z")


def wait_until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


class Terminal:
    """Stands in for a terminal at which a person answers."""

    def __init__(self, answers: list[str]) -> None:
        self._answers: Iterator[str] = iter(answers)

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise OSError("no file")

    def readline(self) -> str:
        return next(self._answers, "")


class TestAsking:
    @pytest.mark.parametrize(
        ("answers", "ran"), [(["y\n", "n\n"], [True, False]), (["a\n"], [True, True]), (["\n", "yes\n"], [False, True]),
                             ([], [False, False]), (["what\n", "Y\n"], [False, True])]
    )  # fmt: skip
    def test_nothing_runs_that_was_not_allowed(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answers: list[str], ran: list[bool]
    ) -> None:
        monkeypatch.setattr(sys, "stdin", Terminal(answers))
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        tool = running(f"'{sys.executable}' -c 'print(1)'", ask=True)
        assert [tool.result(CALL) == "1" for _ in ran] == ran
        assert all(run["result"] == "1" or "not allow" in run["result"] for run in tool.runs)
        err = capsys.readouterr().err
        assert 'get_temperature({"room": "kitchen"})' in err
        assert "get_temperature? [y/N/a" in err

    def test_without_a_terminal_nothing_is_run(self, run: Run, tools: Path) -> None:
        done = run("chat", "demo", "--tools", tools, "--tools-run", sys.executable, "-p", QUESTION)
        assert done.code == 2
        assert "not a terminal" in done.err
        assert "--yes" in done.err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [(["--yes"], "--tools-run, which is not given"), (["--tools-run", "true"], "--tools-run needs --tools")],
    )
    def test_options_that_say_nothing(self, run: Run, arguments: list[str], message: str) -> None:
        done = run("chat", "demo", *arguments, "-p", "x")
        assert done.code == 2
        assert message in done.err


class TestChat:
    def test_calls_are_shown(self, run: Run, tools: Path) -> None:
        done = run("chat", "demo", "--tools", tools, "-p", QUESTION, "--temp", "0")
        assert done.code == 0
        name, _, arguments = done.out.strip().rstrip(")").partition("(")
        assert name == "get_temperature"
        assert list(json.loads(arguments)) == ["room"]
        assert "<tool_call>" not in done.out + done.err

    def test_a_beginning_before_a_call_alone_is_a_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        chat = edgeq.load("demo").chat(tools=[{"type": "function", "function": TEMPERATURE}], temperature=0.0)
        reply = chat.send(QUESTION)
        show_reply(reply, chat.model.engine.ops, DisplayOptions(quiet=True), before="Look:")
        assert reply.tool_calls
        assert not reply.text
        assert capsys.readouterr().out == "Look:\n"

    def test_a_program_answers_them(self, run: Run, tools: Path, program: Callable[[str], str]) -> None:
        command = program("print(json.dumps({'sky': 'sunny', 'degrees': 21}))")
        asked = ("chat", "demo", "--tools", tools, "--tools-run", command, "--yes", "-p", QUESTION, "--temp", "0")
        done = run(*asked)
        assert done.code == 0
        assert "21 degrees" in done.out
        assert done.out.count("\n") == 1
        assert "get_temperature(" in done.err
        found = json.loads(run(*asked, "--json").out)
        assert found["text"] == done.out.strip()
        assert [(ran["name"], ran["result"]) for ran in found["tool_runs"]] == [
            ("get_temperature", '{"sky": "sunny", "degrees": 21}')
        ]

    def test_a_result_that_does_not_fit_is_told(self, run: Run, tools: Path, program: Callable[[str], str]) -> None:
        command = program("print('y ' * 400)")
        done = run("chat", "demo", "--tools", tools, "--tools-run", command, "--yes", "-p", QUESTION, "--temp", "0",
                   "--context", "500", "--json")  # fmt: skip
        assert done.code == 0
        assert "leaves no room for a reply" in done.err
        assert json.loads(done.out)["text"]

    def test_json_has_the_calls(self, run: Run, tools: Path) -> None:
        found = json.loads(run("chat", "demo", "--tools", tools, "-p", QUESTION, "--temp", "0", "--json").out)
        (call,) = found["tool_calls"]
        assert (call["type"], call["function"]["name"]) == ("function", "get_temperature")
        assert list(json.loads(call["function"]["arguments"])) == ["room"]
        assert found["text"] == ""

    def test_rounds_are_bounded(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Whatever it is told, a stubborn model calls again."""
        chat = edgeq.load("demo").chat(tools=[{"type": "function", "function": TEMPERATURE}], temperature=0.0)
        stubborn, results = chat.send(QUESTION), list[str]()

        def again(*given: Any) -> Reply:
            results.extend(given)
            return chat.regenerate() if results else stubborn

        def show(reply: Reply) -> bool:
            return bool([*reply])

        class Told:
            def __getattr__(self, name: str) -> Any:
                return again

        tool = running(f"'{sys.executable}' -c 'print(1)'", rounds=2)
        reply, finished = follow(Told(), stubborn, show, tool)  # type: ignore[arg-type]
        assert results == ["1", "1"]
        assert finished
        assert reply.tool_calls
        assert "stopped after 2 rounds of tool calls" in capsys.readouterr().err

    def test_structured_output(self, run: Run, tmp_path: Path) -> None:
        pytest.importorskip("llguidance")
        (tmp_path / "s.json").write_text('{"enum": ["yes", "no"]}')
        assert run("chat", "demo", "--schema", tmp_path / "s.json", "-p", "Who are you?").out.strip() in (
            '"yes"',
            '"no"',
        )
        assert run("generate", "demo", "--regex", "[ab]{3}", "-p", "x").out.strip().strip("ab") == ""
        cut = run("generate", "demo", "--regex", "[ab]{30}", "-p", "x", "--max-tokens", "2")
        assert "warning: the answer was cut off, so it does not fit the regex" in cut.err
        done = run("chat", "demo", "--grammar", 'root ::= "a" | "b"', "-p", "x", "--json", "--logprobs", "1")
        found = json.loads(done.out)
        assert found["text"] in ("a", "b")
        assert [entry["id"] for entry in found["logprobs"]] == found["ids"]
        assert bytes(found["logprobs"][0]["bytes"]).decode() == found["text"]
        assert len(found["logprobs"][0]["top_logprobs"]) == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--logprobs", "2"], "add --json"), (["--stream"], "add --json"),
            (["--regex", "(a"], "unclosed group"), (["--schema", "{"], "not JSON"),
            (["--regex", "a", "--grammar", 'root ::= "b"'], "cannot be combined"), (["-l", "a=1"], "logit bias"),
            (["--logit-bias", "1=1000"], "from -100 to 100"), (["--schema", '{"not": {}}'], '"not"'),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("command", ["chat", "generate"])
    def test_refused_before_a_model_is_loaded(
        self, run: Run, tmp_path: Path, command: str, arguments: list[str], message: str
    ) -> None:
        pytest.importorskip("llguidance")
        done = run(command, tmp_path / "no model", *arguments, "-p", "x")
        assert done.code == 2
        assert message in done.err


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
class TestTerminal:
    @pytest.fixture
    def arguments(self, tools: Path, program: Callable[[str], str]) -> list[str]:
        command = program("print(json.dumps({'sky': 'sunny', 'degrees': 21}))")
        return ["chat", "demo", "--tools", str(tools), "--tools-run", command, "--temp", "0", "--max-tokens", "60"]

    def test_asked_at_the_prompt(self, arguments: list[str], tmp_path: Path) -> None:
        from terminal import Terminal

        with Terminal(*arguments, XDG_STATE_HOME=str(tmp_path), XDG_CONFIG_HOME=str(tmp_path)) as talk:
            talk.expect("leaves.*\n")
            talk.line(QUESTION)
            talk.expect(r"get_temperature\(.*\)\n")
            talk.expect(r"\[y/N/a\(lways\)\]")
            talk.line("y")
            talk.expect(r"-> \{.*21\}")
            talk.expect("21 degrees")
            talk.expect(">>>")
            talk.line("/undo 1")
            talk.expect("undone: .*kitchen")
            talk.line(QUESTION)
            talk.expect(r"\[y/N/a\(lways\)\]")
            talk.send("\x04")  # Ctrl-D is no
            talk.expect("did not allow")
            talk.expect(">>>")
            talk.line("/exit")
            assert talk.leave() == 0

    def test_asked_for_one_answer(self, arguments: list[str]) -> None:
        from terminal import Terminal

        with Terminal(*arguments, "-p", QUESTION) as talk:
            talk.expect(r"\[y/N/a\(lways\)\]")
            talk.line("a")
            talk.expect("21 degrees")
            assert talk.leave() == 0
