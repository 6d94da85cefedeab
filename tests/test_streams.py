"""What a shell hands to a command: streams that are closed, full, silent, or not UTF-8."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from command import Run, leave_home, runner
from process import ROOT

import edgeq
from edgeq.cli import prompt
from edgeq.errors import UsageError
from edgeq.session.reply import Reply

pytestmark = pytest.mark.skipif(os.name != "posix", reason="a POSIX shell")


@pytest.fixture(autouse=True)
def quiet_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_home(tmp_path, monkeypatch)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(capsys, monkeypatch)


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A line of shell in which $edgeq is a command that answers shortly."""
    paths = [path for path in sys.path if path and Path(path) != ROOT]
    return subprocess.run(
        ["bash", "-c", line],
        env={
            **os.environ, "PYTHONPATH": os.pathsep.join([*paths, str(ROOT)]), "EDGEQ_MAX_TOKENS": "3",
            "EDGEQ_SEED": "1", "edgeq": f"{sys.executable} -P -m edgeq", **environment,
        },
        stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False,
    )  # fmt: skip


class Source:
    """stdin as a pipe has it."""

    encoding = "utf-8"
    closed = False

    def __init__(self, data: bytes, encoding: str = "utf-8") -> None:
        import io

        self.buffer, self.encoding = io.BytesIO(data), encoding

    def isatty(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("line", "code", "out", "err"),
    [
        ("$edgeq chat demo hello 0>/dev/null", 0, True, b"peak memory"),  # as nohup has it
        ("$edgeq chat demo hello 2>&-", 0, True, b""),
        ("$edgeq chat demo hello <&- >&- 2>&-", 0, False, b""),
        ("$edgeq chat demo hello >/dev/full", 1, False, b"No space left on device"),
    ],
)
def test_streams_that_are_closed_or_full(line: str, code: int, out: bool, err: bytes) -> None:
    done = shell(line)
    assert done.returncode == code, done.stderr
    assert bool(done.stdout.strip()) == out
    assert err in done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


def test_a_reader_that_leaves() -> None:
    done = shell("$edgeq chat demo hello 2>&1 | true; echo ${PIPESTATUS[0]}")
    assert done.stdout.strip() in (b"1", b"0")
    assert done.stderr == b""


def test_an_encoding_that_is_not_unicode() -> None:
    done = shell("printf 'caf\\xe9' | $edgeq chat demo --json -p 'na\u00efve'", PYTHONIOENCODING="latin-1")
    assert done.returncode == 0
    assert b"warning" not in done.stderr, "in this encoding the byte is a letter"
    json.loads(done.stdout)


class TestPipedText:
    @pytest.mark.parametrize(
        ("data", "text"),
        [
            (b"x\n\n", "x\n"), (b"x", "x"), (b"\n\nx\n", "\n\nx"), (b"x\r\n", "x"), (b" x \n", " x "),
            (b"\xef\xbb\xbfx\n", "x"), ("x\n".encode("utf-16"), "x"), ("日\ufffd".encode(), "日\ufffd"),
        ],
    )  # fmt: skip
    def test_it_stays_as_it_is(self, monkeypatch: pytest.MonkeyPatch, data: bytes, text: str) -> None:
        monkeypatch.setattr(sys, "stdin", Source(data))
        assert prompt.joined_prompt(None) == text
        monkeypatch.setattr(sys, "stdin", Source(data))
        assert prompt.joined_prompt("why?") == f"why?\n\n{text}"

    def test_bad_bytes(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(sys, "stdin", Source(b"line one \xff and two\n"))
        assert prompt.joined_prompt(None) == "line one \ufffd and two"
        assert "1 bad byte read as U+FFFD" in capsys.readouterr().err
        monkeypatch.setattr(sys, "stdin", Source(b"caf\xe9 au lait", "iso8859-1"))
        assert prompt.joined_prompt(None) == "café au lait"

    @pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", bytes(range(128, 256)), b"a\0b"])
    def test_what_is_no_text(self, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", Source(data))
        with pytest.raises(UsageError, match="stdin is not text but binary data"):
            prompt.joined_prompt(None)

    def test_files_are_read_the_same_way(self, tmp_path: Path) -> None:
        (tmp_path / "text").write_bytes(b"\n x\n\n")
        assert prompt.joined_prompt(None, tmp_path / "text") == "\n x\n"


class TestSilentPipe:
    """An open pipe that says nothing."""

    @pytest.fixture
    def pipe(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
        """stdin is one; its other end."""
        reading, writing = os.pipe()
        with os.fdopen(reading) as stdin, os.fdopen(writing, "w") as other:
            monkeypatch.setattr(sys, "stdin", stdin)
            yield other.fileno()

    def test_it_is_announced(self, pipe: int, monkeypatch: pytest.MonkeyPatch) -> None:
        said: list[str] = []

        def announce(text: str) -> None:
            said.append(text)
            os.write(pipe, b"there\n")
            os.dup2(os.open(os.devnull, os.O_WRONLY), pipe)  # nobody holds the pipe any more

        monkeypatch.setattr(prompt, "PATIENCE", 0.05)
        monkeypatch.setattr(prompt, "say", announce)
        assert prompt.joined_prompt("hello") == "hello\n\nthere"
        assert said == ["waiting for text on stdin; --no-stdin does not wait (Ctrl-C ends)"]

    @pytest.mark.usefixtures("pipe")
    def test_it_need_not_be_read(self, run: Run, chat_folder: Path) -> None:
        assert run("chat", chat_folder, "hello", "--no-stdin", "--max-tokens", "2").code == 0


def test_json_says_the_same_as_text(run: Run, chat_folder: Path) -> None:
    given = ("chat", chat_folder, "hello", "there", "--seed", "1", "--max-tokens", "12")
    *pieces, whole = map(json.loads, run(*given, "--json", "--stream").out.splitlines())
    assert run(*given).out == whole["text"] + "\n"
    assert "".join(piece["text"] for piece in pieces if piece["channel"] == "answer") == whole["text"]
    assert whole["done"] is True
    assert [piece["token"] for piece in pieces if piece["token"] is not None] == whole["ids"]


class TestInterrupted:
    """Ctrl-C in the middle of a reply: what there was is not lost."""

    @pytest.fixture(autouse=True)
    def interrupt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pieces = Reply.__iter__

        def interrupted(reply: Reply) -> Any:
            for count, piece in enumerate(pieces(reply)):
                if count == 3:
                    os.kill(os.getpid(), signal.SIGINT)
                yield piece

        monkeypatch.setattr(Reply, "__iter__", interrupted)

    @pytest.mark.parametrize("command", ["chat", "generate"])
    def test_json(self, run: Run, chat_folder: Path, command: str) -> None:
        given = (command, chat_folder, "-p", "x", "--json", "--seed", "0", "--max-tokens", "20")
        stopped = run(*given)
        assert stopped.code == 130
        reply = json.loads(stopped.out)
        assert reply["finish_reason"] == "interrupted"
        assert 0 < len(reply["ids"]) < 20
        *pieces, whole = map(json.loads, run(*given, "--stream").out.splitlines())
        assert whole["ids"] == reply["ids"]
        assert whole["done"] is True
        assert pieces

    @pytest.mark.parametrize("command", ["chat", "generate"])
    def test_text(self, run: Run, chat_folder: Path, command: str) -> None:
        stopped = run(command, chat_folder, "-p", "x", "--seed", "0", "--max-tokens", "20")
        assert stopped.code == 130
        assert stopped.out.strip()
        assert "interrupted" in stopped.err


class TestOptions:
    def test_the_prompt_behind_the_model(self, run: Run, chat_folder: Path) -> None:
        given = ("--seed", "0", "--max-tokens", "4", "--quiet")
        expected = run("chat", chat_folder, "-p", "hello there", *given)
        assert run("chat", chat_folder, "hello", "there", *given) == expected
        assert run("chat", *given, chat_folder, "hello there") == expected
        assert run("chat", *given, chat_folder, "--", "-5 + 3") == run("chat", chat_folder, "-p", "-5 + 3", *given)
        assert expected.err == ""
        assert run("generate", chat_folder, "hello there", *given) == run(
            "generate", chat_folder, "-p", "hello there", *given
        )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("x -p y", "two prompts given: x and y"),
            ("-p - --no-stdin", "--no-stdin is given, and - reads stdin"),
            ("--no-stdin", "no prompt given"),
            ("x --system a --system-file b", "two system prompts given"),
            ("x --system-file /no/such", "text file not found: /no/such"),
        ],
    )
    def test_what_contradicts_itself(self, run: Run, chat_folder: Path, arguments: str, message: str) -> None:
        result = run("chat", chat_folder, *arguments.split())
        assert result.code == 2
        assert message in result.err

    def test_a_system_prompt_from_a_file(self, run: Run, chat_folder: Path, tmp_path: Path) -> None:
        (tmp_path / "system.txt").write_text("Be brief.\n")
        given = ("chat", chat_folder, "x", "--seed", "0", "--max-tokens", "4", "--json")
        told = json.loads(run(*given, "--system", "Be brief.").out)
        read = json.loads(run(*given, "--system-file", tmp_path / "system.txt").out)
        assert read["ids"] == told["ids"]
        assert read["usage"]["prompt_tokens"] == told["usage"]["prompt_tokens"]

    def test_thinking_is_hidden(self, run: Run, chat_folder: Path) -> None:
        given = ("chat", chat_folder, "-p", "hello", "--think", "--thinking-budget", "8", "--seed", "1")
        shown, hidden = run(*given), run(*given, "--hide-thinking")
        assert hidden.out == shown.out
        assert len(hidden.err.strip().splitlines()) == 1, "the figures alone"
        *pieces, whole = map(json.loads, run(*given, "--json", "--stream", "--hide-thinking").out.splitlines())
        assert "thinking" not in whole
        assert {piece["channel"] for piece in pieces} == {"answer"}


class TestMessages:
    HISTORY: ClassVar[list[dict[str, str]]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "What now?"},
    ]
    GIVEN = ("--seed", "0", "--max-tokens", "4", "--json")

    def test_a_question_at_the_end_is_answered(self, run: Run, chat_folder: Path, tmp_path: Path) -> None:
        (tmp_path / "chat.json").write_text(json.dumps(self.HISTORY))
        expected = edgeq.load(chat_folder, backend="numpy").chat(messages=self.HISTORY, seed=0, max_tokens=4).answer()
        text = "".join(piece.text for piece in expected)
        given = ("chat", chat_folder, *self.GIVEN, "--messages")
        assert json.loads(run(*given, tmp_path / "chat.json").out)["text"] == text
        assert json.loads(run(*given, "-", stdin=json.dumps({"messages": self.HISTORY})).out)["text"] == text

    def test_a_prompt_goes_behind_an_answer(self, run: Run, chat_folder: Path, tmp_path: Path) -> None:
        (tmp_path / "chat.json").write_text(json.dumps(self.HISTORY[:3]))
        (tmp_path / "all.json").write_text(json.dumps(self.HISTORY))
        one = run("chat", chat_folder, "What now?", *self.GIVEN, "--messages", tmp_path / "chat.json")
        other = run("chat", chat_folder, *self.GIVEN, "--messages", tmp_path / "all.json")
        assert json.loads(one.out)["ids"] == json.loads(other.out)["ids"]
        assert run("chat", chat_folder, *self.GIVEN, "--messages", tmp_path / "chat.json").code == 2

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "is not JSON"), ("[]", "has no list of messages"), ('{"a": 1}', "has no list of messages"),
            ('{"messages": [], "temperature": 1}', "has 'temperature' beside the messages"), ('["x"]', "no list of"),
            ('[{"role": "user"}]', "a message must be text"), ('[{"content": "x"}]', "role"),
            ("[" * 9999, "is not JSON"),
        ],
    )  # fmt: skip
    def test_files_that_hold_none(
        self, run: Run, chat_folder: Path, tmp_path: Path, content: str, message: str
    ) -> None:
        (tmp_path / "chat.json").write_text(content)
        result = run("chat", chat_folder, "x", "--messages", tmp_path / "chat.json")
        assert result.code == 2
        assert message in result.err
        assert "Traceback" not in result.err

    def test_an_answer_that_has_begun(self, run: Run, chat_folder: Path) -> None:
        given = ("chat", chat_folder, "hello", "--seed", "0", "--max-tokens", "4", "--assistant-prefix", "Well, ")
        text = json.loads(run(*given, "--json").out)["text"]
        assert run(*given).out == f"Well, {text}\n"

    def test_what_is_forgotten_is_told(self, run: Run, chat_folder: Path, tmp_path: Path) -> None:
        turn = [{"role": "user", "content": "word " * 9}, {"role": "assistant", "content": "ok"}]
        (tmp_path / "chat.json").write_text(json.dumps(turn * 3))
        given = ("chat", chat_folder, "hello", *self.GIVEN, "--messages", tmp_path / "chat.json", "--context", "80")
        assert "leaves no room for a reply" in run(*given).err
        shifted = run(*given, "--overflow", "shift")
        assert shifted.code == 0
        assert "forgotten to make room: the context window was full" in shifted.err

    def test_overflow_has_two_ways(self, run: Run) -> None:
        result = run("chat", "no-such-model", "x", "--overflow", "grow")
        assert (result.code, "--overflow is stop or shift, got grow" in result.err) == (2, True)


def test_commands_print_through_what_makes_control_characters_visible() -> None:
    """Neither print nor typer.echo is used but in console.py."""
    for path in sorted((ROOT / "edgeq" / "cli").glob("*.py")):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        used = {func.id for func in calls if isinstance(func, ast.Name)} & {"print"}
        used |= {func.attr for func in calls if isinstance(func, ast.Attribute)} & {"echo", "secho"}
        assert path.name == "console.py" or not used, path.name
