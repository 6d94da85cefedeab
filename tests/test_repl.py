"""The conversation at a real terminal: nothing typed is lost, nothing said is taken for a command."""

from __future__ import annotations

import base64
import json
import os
import re
import resource
import signal
import termios
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import sleep

import pytest

pytest.importorskip("pty")

from terminal import Terminal

from edgeq.generate import Token
from edgeq.session.reply import Piece, Reply

ANSWERED = "peak memory[^\n]*\n"
PROMPT = ">>>"


def slowly() -> None:
    """Make the model talk at ten tokens a second."""
    push = Reply.push

    def slow(reply: Reply, token: Token) -> list[Piece]:
        sleep(0.1)
        return push(reply, token)

    Reply.push = slow  # type: ignore[assignment, method-assign]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def start(home: Path) -> Callable[..., Terminal]:
    """Opens a conversation with the demo model, of short replies that are the same each time."""

    def opened(*arguments: str, **settings: object) -> Terminal:
        environment: dict[str, object] = {"XDG_STATE_HOME": str(home), "XDG_CONFIG_HOME": str(home), "SSH_TTY": "/dev"}
        given = ("chat", "demo", "--seed", "1", "--max-tokens", "3", *arguments)
        return Terminal(*given, **environment | settings)  # type: ignore[arg-type]

    return opened


@pytest.fixture(scope="module")
def terminal(start: Callable[..., Terminal]) -> Iterator[Terminal]:
    """One conversation for all that fits into it: each test leaves it at the prompt."""
    with start() as opened:
        opened.expect("leaves.*\n")
        yield opened


@pytest.fixture
def talk(terminal: Terminal) -> Terminal:
    terminal.line("/clear")
    terminal.expect("conversation cleared\n")
    return terminal


def said(terminal: Terminal) -> str:
    """What the last message was, once it is answered."""
    terminal.expect(ANSWERED)
    terminal.line("/undo")
    return terminal.expect("undone: [^\n]*\n").removeprefix("undone: ").removesuffix("\n")


def copied(terminal: Terminal) -> str:
    """The last answer, as /copy has it."""
    terminal.line("/copy")
    terminal.expect("asked the terminal to copy")
    return base64.b64decode(re.findall("\x1b]52;c;([A-Za-z0-9+/=]+)\x07", terminal.output)[-1]).decode()


class TestText:
    @pytest.mark.parametrize(
        ("keys", "expected"),
        [
            ("//clear", "/clear"),
            ("//", "/"),
            ("/etc/hosts is what?", "/etc/hosts is what?"),
            ("one\x1b\rtwo", r"one\ntwo"),  # Alt-Enter
            ("/exit\x1b\rnow", r"/exit\nnow"),
            ("e\u0301 日本 👩‍👩‍👧", "e\u0301 日本 👩‍👩‍👧".replace("\u200d", r"\u200d")),
            ("it's 5 o'clock \\ \"so", "it's 5 o'clock \\ \"so"),
        ],
    )
    def test_typed(self, talk: Terminal, keys: str, expected: str) -> None:
        talk.line(keys)
        assert said(talk) == expected

    @pytest.mark.parametrize(
        "text",
        [
            "/exit", "/clear please", "/help", "//two", '"""doc"""', '"""', "/etc/passwd", "/nope",
            "one\n/exit\nthree", "/exit\n/exit", '"""\nx\n"""', "x" * 300,
        ],
    )  # fmt: skip
    def test_pasted(self, talk: Terminal, text: str) -> None:
        talk.paste(text.replace("\n", "\r"))
        talk.send("\r")
        shown = text.replace("\n", r"\n")
        assert said(talk) == (shown if len(text) < 200 else f"{text[:100]} ... {text[-100:]}")

    def test_pasted_behind_a_typed_command(self, talk: Terminal, tmp_path: Path) -> None:
        (tmp_path / "a file.txt").write_text("content\n\n")
        talk.send("/read ")
        talk.paste(str(tmp_path / "a file.txt"))
        talk.send("\r")
        talk.expect("a file.txt: 8 characters, sent with the next message\n")
        talk.line("look")
        assert said(talk) == r"look\n\ncontent\n"

    @pytest.mark.parametrize(
        ("lines", "expected"),
        [
            (['"""', "/exit", "  two ", '"""'], r"/exit\n  two "),
            (['"""/clear"""'], "/clear"),
            (['"""//one', 'two"""'], r"//one\ntwo"),
            (['"""one', "\x04"], "one"),  # Ctrl-D ends the message, not the conversation
        ],
    )
    def test_fenced(self, talk: Terminal, lines: list[str], expected: str) -> None:
        talk.send("".join(line if line == "\x04" else f"{line}\r" for line in lines))
        assert said(talk) == expected

    def test_a_fence_takes_pasted_fences_in(self, talk: Terminal) -> None:
        talk.line('"""')
        talk.paste('def f():\r    """Docstring."""')
        talk.line("")
        talk.line('"""')
        assert said(talk) == r'def f():\n    """Docstring."""'

    @pytest.mark.parametrize("text", ["/exit", "//two", " /exit", '"""doc"""', "/system x\ny", '"""\nx\n"""'])
    def test_what_was_text_stays_text_when_it_comes_back(self, talk: Terminal, text: str) -> None:
        talk.paste(text.replace("\n", "\r"))
        talk.send("\r")
        assert said(talk) == text.replace("\n", r"\n")
        talk.send("\x1b[A" * (2 + text.count("\n")) + "\r")  # behind /undo, line by line
        assert said(talk) == text.replace("\n", r"\n")

    def test_a_byte_that_is_no_text(self, talk: Terminal) -> None:
        talk.send(b"caf\xe9 au lait\r")
        assert said(talk) == "caf\ufffd au lait"

    def test_typed_and_pasted_while_the_model_talks(self, talk: Terminal) -> None:
        talk.send("first\r\x1b[200~/exit\x1b[201~\rthird\r")
        for _ in range(3):
            talk.expect(ANSWERED)
        for expected in ("third",):
            talk.line("/undo")
            talk.expect(f"undone: {expected}\n")

    def test_echo_sleeps_while_the_model_talks(self, start: Callable[..., Terminal]) -> None:
        with start("--max-tokens", "400", prepare=slowly) as talk:
            talk.expect(PROMPT)
            talk.line("Tell me a story.")
            talk.expect("story[.]\n[^\n>]+ ")
            assert not talk.modes() & termios.ECHO
            talk.send("unseen\x15")
            talk.send("\x03")
            assert "unseen" not in talk.expect("(?s).*interrupted")
            talk.line("/exit")
            assert talk.leave() == 0


class TestCommands:
    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("/clear please", "/clear takes nothing behind it, got please"),
            ("/exit now", "/exit takes nothing behind it, got now"),
            ("/nope", "unknown command /nope"),
            ("/copy", "nothing to copy: no answer yet"),
            ("/undo x", "/undo takes a number of questions, got x"),
            ("/undo 7", "/undo 7: the conversation has 1 question"),
            ("/save", "/save takes the name of a file"),
            ("/save chat", r"chat ends in neither .md, .json nor .eqs"),
            ("/read /no/such/file", "text file not found: /no/such/file"),
            ("/read /dev/stdin", "it is a device, expected a regular file"),
            ("/image /no/such.png", "/no/such.png cannot be opened"),
            ("/set temperature", "/set temperature takes a value"),
            ("/set nonsense 1", "nonsense"),
        ],
    )
    def test_what_is_no_complete_command_does_nothing(self, talk: Terminal, line: str, message: str) -> None:
        talk.line("before")
        talk.expect(ANSWERED)
        talk.line("/clear please" if line != "/copy" else "/clear")
        talk.expect("error: .*\n" if line != "/copy" else "cleared\n")
        talk.line(line)
        talk.expect(f"error: [^\n]*{re.escape(message)}")
        if line != "/copy":
            talk.line("/undo")
            talk.expect("undone: before\n")

    def test_think_sets_and_asks(self, talk: Terminal) -> None:
        talk.line("/think What is 2+2?")
        talk.expect("thinking is on\n")
        assert said(talk) == "What is 2+2?"
        talk.line("/nothink")
        talk.expect("thinking is off\n")

    def test_system_takes_the_line_as_it_is(self, talk: Terminal) -> None:
        text = r"""Say "it's" in C:\new\table  with 'care'"""
        talk.line(f"/system {text}")
        talk.expect("conversation cleared\n")
        talk.line("/show")
        talk.expect(f"system +{re.escape(text)}\n")
        talk.send("/system ")
        talk.paste("one\rtwo")
        talk.send("\r")
        talk.expect("conversation cleared\n")
        talk.line("/show")
        talk.expect("system +one\ntwo\n")
        talk.line("/system")
        talk.expect("conversation cleared\n")
        talk.line("/show")
        talk.expect("system +None\n")

    def test_context(self, talk: Terminal) -> None:
        talk.line("/ctx")
        talk.expect(r"0% of the context window is used: 0 of [\d,]+ tokens, [\d,]+ free; 0 turns, overflow: stop\n")

    def test_undo_and_edit(self, talk: Terminal) -> None:
        for word in ("one", "two", "three"):
            talk.line(word)
            talk.expect(ANSWERED)
        talk.line("/undo 2")
        talk.expect("undone: two\nundone: three\n")
        talk.line("/edit /four")
        assert said(talk) == "/four"
        talk.line("five")
        talk.expect(ANSWERED)
        talk.line("/edit")
        talk.expect("edit: five")
        talk.line(" or six")
        assert said(talk) == "five or six"
        talk.line("/undo")
        talk.expect("error: nothing to undo")
        talk.line("/edit")
        talk.expect("error: nothing to edit")

    def test_ctrl_d_at_a_question_is_no(self, talk: Terminal, tmp_path: Path) -> None:
        talk.line("hello")
        talk.expect(ANSWERED)
        (tmp_path / "chat.md").write_text("mine")
        talk.line(f"/save '{tmp_path / 'chat.md'}'")
        talk.expect("overwrite chat.md")
        talk.send("\x04")
        talk.expect("nothing was written\n")
        talk.line("/edit")
        talk.expect("edit: hello")
        talk.send("\x15\x04")
        talk.expect("error: nothing was changed")

    def test_what_does_not_fit_keeps_its_files(self, talk: Terminal, tmp_path: Path) -> None:
        (tmp_path / "long.txt").write_text("seven words " * 40_000)
        talk.line(f"/read {tmp_path / 'long.txt'}")
        talk.expect("480,000 characters|479,999 characters")
        for _ in range(2):
            talk.line("look")
            talk.expect("error: the prompt [^\n]*leaves no room")
        talk.line("/read")
        talk.expect("no text file is attached\n")
        talk.line("look")
        assert said(talk) == "look"

    def test_regen(self, talk: Terminal) -> None:
        talk.line("Tell me something.")
        talk.expect(ANSWERED)
        talk.line("/regen")
        assert said(talk) == "Tell me something."

    def test_continue(self, talk: Terminal) -> None:
        talk.line("Tell me about edgeq.")
        talk.expect("stopped at --max-tokens")
        talk.line("/continue")
        talk.expect("stopped at --max-tokens")
        assert len(copied(talk)) > 15

    def test_save(self, talk: Terminal, tmp_path: Path) -> None:
        talk.line("/save nothing.md")
        talk.expect("error: nothing to save")
        talk.line("Tell me about edgeq.")
        talk.expect(ANSWERED)
        for name in ("my chat.md", "chat.json"):
            talk.line(f"/save {tmp_path / name}")
            talk.expect("is written")
        transcript = (tmp_path / "my chat.md").read_text()
        assert transcript.startswith("## User\n\nTell me about edgeq.\n\n## Assistant\n\n")
        assert [message["role"] for message in json.loads((tmp_path / "chat.json").read_text())] == [
            "user",
            "assistant",
        ]
        (tmp_path / "chat.json").write_text("mine")
        talk.line(f"/save {tmp_path / 'chat.json'}")
        talk.expect("overwrite chat.json")
        talk.line("")
        talk.expect("nothing was written\n")
        assert (tmp_path / "chat.json").read_text() == "mine"
        talk.line(f"/save {tmp_path}")
        talk.expect("error: ")

    def test_a_session(self, start: Callable[..., Terminal], tmp_path: Path) -> None:
        """It is there after every turn, even if the program is killed."""
        session, other = tmp_path / "trip.eqs", tmp_path / "other.eqs"
        with start("--session", str(session)) as first:
            first.expect("leaves.*\n")
            for text in ("one", "two"):
                first.line(text)
                first.expect(ANSWERED)
            first.line(f"/save {other}")
            first.expect("/load and --session go on with it")
            first.line("three")
            first.expect(ANSWERED)
            first.line("/undo")
            first.expect("undone: three")
            first.line("four")
            first.expect(ANSWERED)
            first.line("/ctx")  # the next line is read when the turn is saved
            first.expect("3 turns, overflow")
        with start("--session", str(session)) as second:
            second.expect("going on with a conversation of 3 turns")
            second.line("/undo")
            second.expect("undone: four")
            second.line(f"/load {other}")
            second.expect("2 turns; ")
            second.line("/load nothing.eqs")
            second.expect("error: .*nothing.eqs does not exist")
            second.line("/undo 2")
            second.expect("undone: one")

    def test_loading_asks(self, talk: Terminal, tmp_path: Path) -> None:
        talk.line("one")
        talk.expect(ANSWERED)
        talk.line(f"/save {tmp_path / 'a.eqs'}")
        talk.expect("is written")
        talk.line("two")
        talk.expect(ANSWERED)
        talk.line(f"/load {tmp_path / 'a.eqs'}")
        talk.expect("leave this conversation, which is not saved")
        talk.line("y")
        talk.expect("1 turn; ")
        talk.line(f"/load {tmp_path / 'a.eqs'}")
        talk.expect("1 turn; ")

    def test_help_lists_every_command(self, talk: Terminal) -> None:
        talk.line("/help")
        shown = talk.expect("(?s)/help.*a paste is never a command\n")
        for name in ("/exit", "/undo", "/regen", "/think", "/set", "/read", "/copy", "/ctx", "//"):
            assert f"\n{name}" in shown


class TestContext:
    def test_a_warning_and_shifting(self, start: Callable[..., Terminal]) -> None:
        with start("--context", "70", "--overflow", "shift", "--max-tokens", "4") as talk:
            talk.expect(PROMPT)
            for word in ("one", "two", "three", "four", "five"):
                talk.line(word)
                talk.expect(ANSWERED)
            talk.send("\x04")
            assert talk.leave() == 0
        nearly = "warning: ([89][0-9]%) of the context window is used: [0-9]+ of 70 tokens; the oldest turns go next\n"
        found = re.search(nearly, talk.text)
        assert found
        assert f"\n{found[1]} >>>" in talk.text[found.end() - 1 :]
        assert re.search("warning: the oldest (turn was|[0-9]+ turns were) forgotten", talk.text[found.end() :])

    def test_stopping(self, start: Callable[..., Terminal]) -> None:
        with start("--context", "32", "--max-tokens", "4") as talk:
            talk.expect(PROMPT)
            talk.line("one and a few words more, and more")
            talk.expect("/undo and /clear make room\n")
            talk.line("two and a few words more, and more")
            talk.expect("error: the prompt ")
            talk.line("/ctx")
            talk.expect("1 turn, overflow: stop\n")

    def test_a_history_goes_on(self, start: Callable[..., Terminal], tmp_path: Path) -> None:
        said_before = [{"role": "user", "content": "My name is Ada."}, {"role": "assistant", "content": "Hello, Ada."}]
        (tmp_path / "chat.json").write_text(json.dumps(said_before))
        with start("--messages", str(tmp_path / "chat.json")) as talk:
            talk.expect(PROMPT)
            assert copied(talk) == "Hello, Ada."
            talk.line("/undo")
            talk.expect("undone: My name is Ada.\n")


class TestLeaving:
    def test_ctrl_d_and_exit(self, start: Callable[..., Terminal]) -> None:
        with start() as one, start() as other:
            one.expect(PROMPT)
            other.expect(PROMPT)
            one.send("\x04")
            other.line("/bye")
            assert (one.leave(), other.leave()) == (0, 0)

    def test_terminated_at_the_prompt_leaves_the_terminal_as_it_was(self, start: Callable[..., Terminal]) -> None:
        with start() as talk:
            talk.expect(PROMPT)
            os.kill(talk.pid, signal.SIGTERM)
            assert talk.leave() == 143
            assert talk.modes() & termios.ECHO
            assert talk.modes() & termios.ICANON


class TestStreams:
    def test_stdout_leads_elsewhere(self, start: Callable[..., Terminal], tmp_path: Path) -> None:
        """As with | tee: prompt and echo are on the terminal, answers alone in the file."""
        with (tmp_path / "out").open("w") as out, start(stdout=out) as talk:
            talk.expect(PROMPT)
            talk.line("hello")
            talk.expect(ANSWERED)
            talk.line("/exit")
            assert talk.leave() == 0
        answer = (tmp_path / "out").read_text()
        assert answer.strip()
        assert "hello" not in answer
        assert PROMPT not in answer
        assert "\x1b" not in answer
        assert "hello" in talk.text

    def test_both_lead_elsewhere(self, start: Callable[..., Terminal], tmp_path: Path) -> None:
        with (
            (tmp_path / "out").open("w") as out,
            (tmp_path / "err").open("w") as err,
            start(stdout=out, stderr=err) as talk,
        ):
            talk.expect(PROMPT)
            talk.line("hello")
            talk.line("/exit")
            assert talk.leave() == 0
        assert "peak memory" in (tmp_path / "err").read_text()
        assert "\x1b" not in (tmp_path / "err").read_text()

    @pytest.mark.parametrize("term", ["dumb"])
    def test_a_terminal_that_knows_nothing(self, start: Callable[..., Terminal], term: str) -> None:
        with start(TERM=term) as talk:
            talk.expect(PROMPT)
            talk.line("hello")
            assert said(talk) == "hello"
            talk.send('"""\rone\r\x04')
            assert said(talk) == "one"
            talk.send("caf\xe9\r".encode("latin-1"))
            assert said(talk) == "caf\ufffd"
            talk.line("hello")
            talk.expect(ANSWERED)
            talk.line("/edit")
            talk.expect("hint: /edit TEXT gives another")
            talk.line("/copy")
            talk.expect("error: .* cannot be copied")
            talk.send("\x03")
            talk.expect("Ctrl-C again")
            talk.send("\x04")
            assert talk.leave() == 0
        assert "\x1b" not in talk.output

    def test_quiet(self, start: Callable[..., Terminal]) -> None:
        with start("--quiet") as talk:
            talk.expect(PROMPT)
            talk.line("hello")
            talk.line("/exit")
            assert talk.leave() == 0
        assert "peak memory" not in talk.text
        assert "leaves" not in talk.text

    @pytest.mark.parametrize("columns", [30])
    def test_words_are_not_broken(self, start: Callable[..., Terminal], columns: int) -> None:
        with start("--max-tokens", "60", columns=columns) as talk:
            talk.expect(PROMPT)
            talk.line("Tell me about edgeq.")
            talk.expect("Tell me about edgeq.[ \n]*\n")
            shown = talk.expect("(?s).*?prompt").removesuffix("\nprompt")
        lines = shown.split("\n")
        assert len(lines) > 1
        assert all(len(line) <= columns for line in lines)
        assert not any(line.startswith(" ") for line in lines)


class TestHistory:
    @pytest.mark.parametrize("kind", ["a folder", "a file above", "a device"])
    def test_one_that_cannot_be_used(self, start: Callable[..., Terminal], tmp_path: Path, kind: str) -> None:
        folder = tmp_path / "edgeq"
        if kind == "a file above":
            folder.write_text("")
        else:
            folder.mkdir()
        if kind == "a folder":
            (folder / "history").mkdir()
        elif kind == "a device":
            (folder / "history").symlink_to("/dev/full")
        with start(XDG_STATE_HOME=str(tmp_path)) as talk:
            talk.expect("warning: lines are not remembered: ")
            talk.line("hello")
            talk.expect(ANSWERED)
            talk.send("\x1b[A\r")  # it remembers, while it runs
            assert said(talk) == "hello"
            talk.send("\x04")
            assert talk.leave() == 0
        assert talk.text.count("not remembered") == 1
        assert "Traceback" not in talk.text

    def test_a_full_disk(self, start: Callable[..., Terminal], tmp_path: Path) -> None:
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (10, 10))
        with start(XDG_STATE_HOME=str(tmp_path), prepare=limit) as talk:
            talk.expect(PROMPT)
            for word in ("hello", "there"):
                talk.line(word)
                talk.expect(ANSWERED)
            talk.send("\x1b[A\r")
            assert said(talk) == "there"
            talk.send("\x04")
            assert talk.leave() == 0
        assert talk.text.count("warning: lines are not remembered: ") == 1
        assert "Traceback" not in talk.text

    def test_it_outlives_the_process(self, start: Callable[..., Terminal], tmp_path: Path) -> None:
        with start(XDG_STATE_HOME=str(tmp_path)) as talk:
            talk.expect(PROMPT)
            talk.send("\x1b[200~/exit\x1b[201~\r")
            talk.expect(ANSWERED)
            talk.send("\x04")
            talk.leave()
        assert (tmp_path / "edgeq" / "history").stat().st_mode & 0o077 == 0
        with start(XDG_STATE_HOME=str(tmp_path)) as talk:
            talk.expect(PROMPT)
            talk.send("\x1b[A\r")
            assert said(talk) == "/exit"


class TestClipboard:
    def test_a_program(self, start: Callable[..., Terminal], tmp_path: Path) -> None:
        for name, code in (("wl-copy", "exit 1"), ("xclip", f"cat > {tmp_path}/copied")):
            (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
            (tmp_path / name).chmod(0o755)
        path = f"{tmp_path}:/usr/bin:/bin"
        with start(PATH=path, WAYLAND_DISPLAY="w", DISPLAY=":0", SSH_TTY="", SSH_CONNECTION="", columns=20) as talk:
            talk.expect(PROMPT)
            talk.line("Tell me about edgeq.")
            talk.expect(ANSWERED)
            talk.line("/copy")
            talk.expect(r"copied \d+ characters with xclip")
            talk.line("/set seed 1")
            talk.send("\x04")
            talk.leave()
        assert "\n" not in (tmp_path / "copied").read_text().strip()

    def test_the_terminal_is_asked(self, start: Callable[..., Terminal]) -> None:
        with start(SSH_TTY="/dev/pts/0") as talk:
            talk.expect(PROMPT)
            talk.line("hello")
            talk.expect(ANSWERED)
            talk.line("/copy")
            talk.expect("asked the terminal to copy .* not every terminal obeys")
        assert re.search("\x1b]52;c;[A-Za-z0-9+/]+=*\x07", talk.output)
