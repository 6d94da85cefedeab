"""The assistant of tools/pi: a board of files, mock pins, a camera of shell, and the demo model."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import assistant
import pytest
from board_tools import Board, Pins

import edgeq
from edgeq.errors import EdgeqError, UsageError
from edgeq.machine import system
from edgeq.machine.programs import ask_program

TOOLS = Path(__file__).parent.parent / "tools"
DEMO_PICTURE = Path(edgeq.__file__).parent / "demo" / "picture.png"


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def program(path: Path, script: str) -> Path:
    put(path, f"#!/bin/sh\n{script}\n").chmod(0o755)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A Raspberry Pi's /proc and /sys."""
    put(tmp_path / "proc/loadavg", "1.00 0.5 0.1 1/200 1234\n")
    put(tmp_path / "proc/meminfo", "MemTotal:        4000000 kB\nMemFree: 100 kB\nMemAvailable:    1000000 kB\n")
    put(tmp_path / "sys/class/thermal/thermal_zone0/type", "cpu-thermal\n")
    put(tmp_path / "sys/class/thermal/thermal_zone0/temp", "61234\n")
    put(tmp_path / "sys/class/thermal/thermal_zone1/type", "wifi\n")
    put(tmp_path / "sys/class/thermal/thermal_zone1/temp", "70000\n")
    return tmp_path


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs, all there are besides the shell's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "cat", "cp", "true"):
        folder.joinpath(name).symlink_to(shutil.which(name) or "/bin/sh")
    monkeypatch.setenv("PATH", str(folder))
    return folder


def read(board: Board, name: str = "read_board", **arguments: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(board.call(name, arguments))
    return found


# --- the board --------------------------------------------------------------------------------------------------------


def test_sensors(root: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor's zone counts, though another is hotter."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    said = read(Board(root=root, disk=root))
    assert said.pop("disk_free_gb") >= 0
    assert said == {"cpu_temperature_celsius": 61.2, "load_percent": 25, "memory_free_percent": 25}


@pytest.mark.parametrize(("bits", "throttled"), [("0", False), ("50000", False), ("50005", True)])
def test_throttling(root: Path, bits: str, throttled: bool) -> None:
    """What happened since the board was started does not count, only what is now."""
    put(root / "sys/devices/platform/soc/soc:firmware/get_throttled", bits)
    assert read(Board(root=root, disk=root))["throttled"] is throttled


@pytest.mark.skipif(system.firmware_bits() is not None, reason="a Raspberry Pi's kernel says it")
@pytest.mark.parametrize(
    ("script", "bits"),
    [
        ("echo throttled=0x50005", 0x50005),
        ("echo VCHI initialization failed; exit 1", None),
        ("printf '\\377\\376=\\0'", None),
        ("", None),
        (None, None),
    ],
)
def test_the_firmwares_program(path: Path, script: str | None, bits: int | None) -> None:
    if script is not None:
        program(path / "vcgencmd", script)
    assert system.firmware_bits() == bits


def test_a_program_that_never_ends(path: Path) -> None:
    """What it has started ends with it, though that holds its output open."""
    sleep = shutil.which("sleep", path=os.defpath)
    slow = program(path / "slow", f"{sleep} 60 & echo $! >{path}/pid; wait")
    with pytest.raises(TimeoutError, match="slow did not end"):
        ask_program(str(slow), seconds=0.5)
    if not (path / "pid").exists():  # the machine is busy: it was ended before it had started anything
        return
    child = Path(f"/proc/{(path / 'pid').read_text().strip()}/stat")
    for _ in range(100):
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.02)
    pytest.fail("what it had started lives on")


def test_sensors_that_are_not_there(root: Path, path: Path) -> None:
    put(root / "proc/loadavg", "\n")
    put(root / "proc/meminfo", "MemTotal: many kB\n")
    put(root / "sys/class/thermal/thermal_zone0/temp", "")
    (root / "sys/class/thermal/thermal_zone1/temp").unlink()
    program(path / "vcgencmd", "exit 1")
    assert list(read(Board(root=root, disk=root))) == ["disk_free_gb"]


def test_time() -> None:
    assert set(read(Board(), "get_time", city="Rome")) == {"time"}
    assert set(read(Board(), "get_time", city=" new york ")) == {"time"}
    assert "Springfield" in read(Board(), "get_time", city="Springfield")["note"]


def test_calls_that_are_wrong_are_said_in_a_line(root: Path) -> None:
    board = Board(root=root, disk=root / "nowhere")
    for name, arguments in (("rm", {}), ("get_time", {}), ("read_board", {"zone": 1}), ("read_pin", {"pin": 4})):
        error = read(board, name, **arguments)["error"]
        assert error
        assert "\n" not in error
    assert "nowhere" in read(board)["error"]


def test_pins() -> None:
    """A pin is as it was switched; only those that may be are."""
    board = Board(Pins(mock=True), [17, 27])
    assert [tool["function"]["name"] for tool in board.tools] == ["read_board", "get_time", "read_pin", "set_pin"]
    assert read(board, "read_pin", pin=17) == {"pin": 17, "on": False}
    assert read(board, "set_pin", pin=17, on=True) == {"pin": 17, "on": True}
    assert read(board, "read_pin", pin=17) == {"pin": 17, "on": True}
    assert read(board, "set_pin", pin=17, on=False) == {"pin": 17, "on": False}
    assert read(board, "read_pin", pin=17) == {"pin": 17, "on": False}
    assert "17, 27" in read(board, "set_pin", pin=4, on=True)["error"]
    assert read(board, "read_pin", pin=99)["error"]
    assert [tool["function"]["name"] for tool in Board(Pins(mock=True)).tools][-1] == "read_pin"


def test_pins_where_there_are_none(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPIOZERO_PIN_FACTORY", "native")
    monkeypatch.setattr("gpiozero.Device.pin_factory", None)
    args = assistant.options().parse_args(["demo"])
    board = assistant.board_of(args)
    assert "mock pins take their place" in capsys.readouterr().err
    assert read(board, "read_pin", pin=4) == {"pin": 4, "on": False}

    monkeypatch.setitem(sys.modules, "gpiozero", None)
    board = assistant.board_of(args)
    assert capsys.readouterr().err == "[no GPIO pins: gpiozero is not installed (pip install gpiozero)]\n"
    assert [tool["function"]["name"] for tool in board.tools] == ["read_board", "get_time"]
    with pytest.raises(UsageError, match="gpiozero"):
        assistant.board_of(assistant.options().parse_args(["demo", "--switch", "17"]))


@pytest.mark.parametrize("pin", ["99", "-1", "40"])
def test_a_pin_that_no_board_has_is_not_switched(pin: str) -> None:
    with pytest.raises(UsageError, match=f"--switch {pin}: this board has no such GPIO pin"):
        assistant.board_of(assistant.options().parse_args(["demo", "--mock-pins", "--switch", "17", "--switch", pin]))


# --- the assistant ----------------------------------------------------------------------------------------------------


def test_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it, with the demo model: it counts, calls a tool and answers from its result, sees, and remembers.
    What was kept of earlier conversations is as it was.
    """
    kept = put(tmp_path / "kept.eqs", "mine")
    sessions = ["--session", str(kept), "--sessions", str(tmp_path / "all")]
    assert assistant.main(["demo", "--once", "--mock-pins", *sessions]) == 0
    assert kept.read_text() == "mine"
    assert [*tmp_path.iterdir()] == [kept]
    out, err = capsys.readouterr()
    assert "12 + 30 = 42" in out
    assert 'get_time({"city": "Rome"})' in err
    assert "in Rome." in out
    assert "three figures" in out
    assert "session  4 turns, the same after a restart" in out
    meter = next(line for line in out.splitlines() if line.startswith("{"))
    assert set(json.loads(meter)) == {"kind", "reading", "unit"}


def test_the_conversation_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = ["--session", str(tmp_path / "talk.eqs")]
    assert assistant.main(["demo", *session, "--ask", "My cat is called Momo."]) == 0
    assert assistant.main(["demo", *session, "--ask", "What is my cat called?"]) == 0
    out, err = capsys.readouterr()
    assert "Momo" in out.splitlines()[-1]
    assert "1 turn" in err
    assert assistant.main(["demo", *session, "--new", "--ask", "Hello!"]) == 0
    assert "going on" not in capsys.readouterr().err
    assert len(edgeq.load_session(tmp_path / "talk.eqs", "demo").turns) == 1


def test_each_model_has_its_conversation(tmp_path: Path, helper: assistant.Assistant) -> None:
    """Neither another model nor the same name with other weights fails, or replaces a conversation."""
    sessions = tmp_path / "of/models"
    assert assistant.main(["demo", "--sessions", str(sessions), "--ask", "My name is Ada."]) == 0
    mine = assistant.session_of(helper.model, sessions)
    assert [*sessions.iterdir()] == [mine]

    shutil.copytree(DEMO_PICTURE.parent, tmp_path / "demo")
    with (tmp_path / "demo/model.safetensors").open("r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        weights.write(b"?")
    other = edgeq.load(tmp_path / "demo")
    theirs = assistant.session_of(other, sessions)
    assert theirs.name.startswith("demo-")
    assert theirs != mine
    assistant.Assistant(other, Board(), theirs)
    with pytest.raises(EdgeqError, match="made with another model") as refused:
        assistant.Assistant(other, Board(), mine)
    assert "--new" in str(refused.value.hint)


def test_switching_is_used_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo model knows no pins, and a conversation keeps the tools that it began with."""
    switch = ["--mock-pins", "--switch", "17"]
    assert assistant.main(["demo", *switch, "--ask", "Switch pin 17 on."]) == 2
    assert "the demo model switches no pins" in capsys.readouterr().err

    monkeypatch.setattr(assistant.Assistant, "_options", lambda self: {"tools": self.board.tools, "temperature": 0.0})
    session = ["--session", str(tmp_path / "talk.eqs"), "--ask", "What is 2 + 3?"]
    assert assistant.main(["demo", "--mock-pins", *session]) == 0
    assert assistant.main(["demo", *switch, *session]) == 2
    assert "the conversation began with read_board, get_time, read_pin (add --new)" in capsys.readouterr().err
    assert assistant.main(["demo", *switch, "--new", *session]) == 0
    assert assistant.main(["demo", *switch, *session]) == 0
    assert "it keeps the tools" not in capsys.readouterr().err
    assert assistant.main(["demo", "--mock-pins", *session]) == 0
    assert "it keeps the tools that it began with, read_board, get_time, read_pin, set_pin" in capsys.readouterr().err


def test_one_assistant_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two would take turns at replacing what the other has saved."""
    session = tmp_path / "new/talk.eqs"
    words = ["demo", "--session", str(session), "--ask", "Hello!"]
    with assistant.held(session):
        assert assistant.main(words) == 2
        assert "another assistant is in the conversation" in capsys.readouterr().err
        assert not session.exists()
    assert assistant.main(words) == 0
    assert [*session.parent.iterdir()] == [session]


def in_locale(script: str, *words: str | Path, given: bytes = b"", **variables: str) -> bytes:
    """What a script prints that has the assistant, in another environment."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, assistant\n{script}", *words], input=given, capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_characters_that_the_locale_has_not(tmp_path: Path) -> None:
    """They are shown as "?"; files are UTF-8 in any locale."""
    echo = 'assistant.Assistant.ask = lambda self, text: print(text, "\\N{GRINNING FACE}")\nassistant.main(["demo"])'
    assert in_locale(echo, given=b"caf\xe9\n", PYTHONIOENCODING="ascii") == b"caf? ?\n"

    question = put(tmp_path / "q.txt", "Ärger 😀")
    answer = """
assistant.Assistant.begin = lambda self: None
assistant.Assistant.ask = lambda self, text: text
assistant.watch(assistant.Assistant(None, None), assistant.Path(sys.argv[1]), None, looks=2, pause=0)
"""
    in_locale(answer, tmp_path, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert assistant.answer_of(question, "txt").read_text(encoding="utf-8") == "Ärger 😀\n"


def test_a_session_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = put(tmp_path / "talk.eqs", "not a session")
    assert assistant.main(["demo", "--session", str(session), "--ask", "Hello!"]) != 0
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert session.read_text() == "not a session"


@pytest.fixture(scope="module")
def helper() -> assistant.Assistant:
    return assistant.Assistant(edgeq.load("demo"), Board())


def said(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Lines that somebody types, the end after them."""
    typed = iter(lines)

    def read_line(_prompt: str = "") -> str:
        line = next(typed, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read_line)


def test_talking(
    helper: assistant.Assistant, path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that fails is said in a line, and the talk goes on."""
    helper.begin()
    said(
        monkeypatch, "", "/board", "/look", f"/look {DEMO_PICTURE}", "/look none.png", "/read", "/read letter",
        "/read meter demo", "/nonsense", "What is 2 + 3?", "/new", "/quit", "What is 1 + 1?",
    )  # fmt: skip
    assistant.talk(helper)
    out, err = capsys.readouterr()
    assert "disk_free_gb" in out
    assert "/look [FILE]" in out
    assert "2 + 3 = 5" in out
    assert "1 + 1" not in out
    errors = [line for line in err.splitlines() if line.startswith("[error: ")]
    for error, expected in zip(errors, ("rpicam-still", "none.png", "meter", "letter"), strict=True):
        assert expected in error
    assert not helper.chat.turns


def test_a_camera(
    helper: assistant.Assistant, path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    helper.begin()
    program(path / "rpicam-still", f'for file; do :; done; cp "{DEMO_PICTURE}" "$file"')
    assistant.obey(helper, "/look")
    assert capsys.readouterr().out
    assert len(helper.chat.visuals) == 1

    program(path / "rpicam-still", "echo starting >&2; echo 'no cameras available' >&2; exit 255")
    with pytest.raises(UsageError, match="no picture: no cameras available"):
        assistant.obey(helper, "/look")
    program(path / "rpicam-still", "true")
    with pytest.raises(UsageError, match="exit status 0"):
        assistant.obey(helper, "/look")


def look_twice(helper: assistant.Assistant, folder: Path, kind: str | None = None) -> None:
    assistant.watch(helper, folder, kind, looks=2, pause=0)


def test_a_watched_folder(helper: assistant.Assistant, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file is answered once, the oldest first; again when it was changed; what cannot be read says why."""
    helper.begin()
    folder = tmp_path / "inbox"
    shutil.copy(DEMO_PICTURE, put(folder / "a.png", ""))
    put(folder / "b.txt", "What is 2 + 3?\n")
    put(folder / "broken.jpg", "no picture")
    put(folder / "notes.md", "not for us")
    now = time.time()
    for age, name in enumerate(("broken.jpg", "b.txt", "a.png")):
        os.utime(folder / name, (now - 10 - age,) * 2)
    assert [file.name for file in assistant.unanswered(folder)] == ["a.png", "b.txt", "broken.jpg"]

    look_twice(helper, folder)
    assert (folder / "b.txt.answer.txt").read_text() == "2 + 3 = 5.\n"
    assert (folder / "a.png.answer.txt").read_text().strip()
    assert (folder / "broken.jpg.answer.txt").read_text().startswith("error: ")
    assert len(helper.chat.turns) == 1  # a picture is a conversation of its own
    assert assistant.unanswered(folder) == {}
    assert not list(folder.glob(".*"))

    os.utime(folder / "a.png", (now, now))
    (folder / "broken.jpg").unlink()
    look_twice(helper, folder, "meter")
    assert set(json.loads((folder / "a.png.answer.json").read_text())) == {"kind", "reading", "unit"}


def test_clocks_do_not_matter_in_a_watched_folder(
    helper: assistant.Assistant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file from tomorrow is answered, and once; so is one of yesterday in its place; one that grows waits."""
    asked = list[str]()

    def ask(_: object, text: str) -> str:
        asked.append(text)
        return text.upper()

    monkeypatch.setattr(assistant.Assistant, "ask", ask)
    question, answer, now = tmp_path / "q.txt", tmp_path / "q.txt.answer.txt", time.time()
    for text, day in (("tomorrow", 1), ("yesterday", -1)):
        os.utime(put(question, text), (now + 86400 * day,) * 2)
        for _ in range(2):
            look_twice(helper, tmp_path)
            assert answer.read_text() == f"{text.upper()}\n"
    assert asked == ["tomorrow", "yesterday"]

    lengths = iter(range(1, 10))
    monkeypatch.setattr(time, "sleep", lambda _: put(question, "x" * next(lengths)))
    assistant.watch(helper, tmp_path, None, looks=5)
    assert asked == ["tomorrow", "yesterday"]


def test_a_folder_without_room(
    helper: assistant.Assistant, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be answered is not asked again and again."""
    monkeypatch.setattr(assistant.Assistant, "ask", lambda self, text: (_ for _ in ()).throw(EdgeqError("no room")))

    def full(*_: Any) -> None:
        raise EdgeqError("the disk is full")

    monkeypatch.setattr(assistant, "write", full)
    put(tmp_path / "q.txt", "?")
    assistant.watch(helper, tmp_path, None, looks=6, pause=0)
    said = capsys.readouterr().err
    assert said.count("[q.txt]") == said.count("no room") == said.count("the disk is full") == 1


@pytest.mark.parametrize(
    ("schema", "words"), [("{", "not JSON"), ("[]", "an object"), ('{"not": {}}', "schema"), (None, "no schema")]
)
def test_schemas_that_are_none(helper: assistant.Assistant, tmp_path: Path, schema: str | None, words: str) -> None:
    file = tmp_path / "mine.json"
    if schema is not None:
        file.write_text(schema)
    with pytest.raises(EdgeqError, match=words):
        helper.read(str(file), DEMO_PICTURE)


def test_an_answer_that_is_cut_off_is_no_reading(helper: assistant.Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = helper.model.chat
    monkeypatch.setattr(helper.model, "chat", lambda **options: chat(max_tokens=4, **options))
    with pytest.raises(UsageError, match="cut off after"):
        helper.read("receipt", DEMO_PICTURE)


def test_wrong_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["no/such/model"],
        ["demo", "--read", "meter", "a", "b"],
        ["demo", "--watch", str(Path(__file__) / "x")],
        ["demo", "--watch", "/proc/self"],
        ["demo", "--watch", "in", "--read", "meter", "a"],
        ["demo", "--new"],
    ):
        assert assistant.main(words) != 0
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


# --- the installer ----------------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """tools/pi/start with an edgeq of shell that writes down what it was asked; {name: what it does}."""

    def run(*words: str, folder: str = "venv", **programs: str) -> subprocess.CompletedProcess[str]:
        log = tmp_path / "log"
        binaries = tmp_path / folder / "bin"
        scripts = {
            "edgeq": "true",
            "python": f'case $1 in -P) exec "{sys.executable}" "$@" ;; esac',
            "systemctl": "exit 1",
            "systemd-run": "exit 1",
        }
        for name, script in (scripts | programs).items():
            program(binaries / name.replace("_", "-"), f'echo "{name} $*" >>"{log}"\n{script}')
        log.write_text("")
        done = subprocess.run(
            ["sh", TOOLS / "pi/start", "--home", "home", *words], capture_output=True, text=True, cwd=tmp_path,
            env={"PATH": f"{binaries}:{os.environ['PATH']}", "VENV": str(binaries.parent), "HOME": str(tmp_path),
                 "PYTHONPATH": os.pathsep.join([str(Path(edgeq.__file__).parents[1]), *sys.path])},
        )  # fmt: skip
        return subprocess.CompletedProcess(log.read_text().splitlines(), done.returncode, done.stdout, done.stderr)

    return run


Start = Callable[..., subprocess.CompletedProcess[str]]


def test_start_picks_what_fits(start: Start, tmp_path: Path) -> None:
    """The largest that fits is quantized once, and runs within --memory."""
    done = start("--memory", "1.5G", "--", "--look", edgeq='case "$*" in "fit qwen3.5:4b"*) exit 3 ;; esac')
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "home/models/qwen3.5-2b-4bit"
    asked = [line for line in done.args if not line.startswith(("python -P", "systemd"))]
    assert asked[0] == "edgeq doctor"
    assert asked[1:3] == [
        f"edgeq fit qwen3.5:{size} --bits 4 --context 4096 --memory 1500000000" for size in ("4b", "2b")
    ]
    assert asked[3] == f"edgeq quantize qwen3.5:2b -o {folder} --bits 4"
    assert asked[4].startswith(
        f"python {TOOLS}/pi/assistant.py {folder} --memory 1500000000 --context 4096 --sessions "
    )
    assert asked[4].endswith("home/conversations --look")

    put(folder / "config.json", "{}")
    done = start("--memory", "1500MB", edgeq='case "$*" in "fit qwen3.5:4b"*) exit 3 ;; esac')
    assert not any("quantize" in line for line in done.args)


def test_start_picks_what_stays_in_memory(start: Start) -> None:
    """And not what is read from the card again for every token."""
    done = start("--memory", "1.5G", edgeq='case "$*" in "fit qwen3.5:4b"*) echo "fits in part 1,500 MB" ;; esac')
    assert done.returncode == 0, done.stderr
    assert any(line.startswith("edgeq quantize qwen3.5:2b") for line in done.args)


def test_start_without_a_network(start: Start) -> None:
    done = start(edgeq='case $1 in quantize) echo "error: no network" >&2; exit 5 ;; esac')
    assert done.returncode == 0
    assert "the built-in demo model takes its place" in done.stderr
    assert done.args[-1].startswith(f"python {TOOLS}/pi/assistant.py demo --memory ")


@pytest.mark.parametrize(
    ("words", "words_said", "code"),
    [
        (["--memory", "much"], "--memory must be a size such as 1.5G, or none, got much", 2),
        (["--memory"], "--memory needs a value", 2),
        (["--home", ""], "--home needs a value", 2),
        (["--home", "two\nlines"], "must be one line each", 2),
        (["--context", "abc"], "--context must be a number of tokens, got abc", 2),
        (["--fast"], "there is no option --fast", 2),
        (["--memory", "100M"], "no model fits 100000000 bytes with a context of 4096 tokens", 3),
    ],
)
def test_start_refuses(start: Start, words: list[str], words_said: str, code: int) -> None:
    done = start(*words, edgeq="case $1 in fit) exit 3 ;; esac")
    assert done.returncode == code
    assert words_said in done.stderr.splitlines()[-1]


def test_start_without_kernels(start: Start) -> None:
    """NumPy cannot keep to a limit: without a compiled module there is nothing to start."""
    done = start("--model", "demo", python="exit 1")
    assert done.returncode == 1
    said, _, command = done.stderr.splitlines()[-1].partition("says: ")
    assert "without its kernels" in said
    assert shlex.split(command)[1:4] == ["-m", "pip", "install"]
    assert done.args == ["python -P -c import edgeq.backends.cpu._native"]


def test_start_without_a_limit(start: Start) -> None:
    """The size is picked for the memory that is free."""
    done = start("--memory", "none", systemd_run="true")
    assert done.returncode == 0, done.stderr
    fit = next(line for line in done.args if line.startswith("edgeq fit"))
    assert int(fit.rpartition(" ")[2]) > 1_000_000
    assert " --memory none --context 4096 " in done.args[-1]
    assert not any(line.startswith("systemd_run") for line in done.args)
    assert "bound memory" not in done.stderr


def words_of_unit(unit: str) -> list[str]:
    """The words of ExecStart, as systemd.service(5) and systemd.syntax(7) read them."""
    command = next(line for line in unit.splitlines() if line.startswith("ExecStart=")).partition("=")[2]
    words = re.findall(r'"((?:[^"\\]|\\.)*)"|(\S+)', command)
    return [re.sub(r"\\(.)", r"\1", quoted or plain).replace("%%", "%").replace("$$", "$") for quoted, plain in words]


@pytest.mark.parametrize("odd", ["home", 'it\'s "50 %" & $HOME\\n|ä'])
def test_start_as_a_service(start: Start, tmp_path: Path, odd: str) -> None:
    """The unit's MemoryMax is --memory, in bytes; odd names and the assistant's options reach it as they are."""
    words = ["--home", odd, "--memory", "1GiB", "--model", "demo"]
    done = start("--service", *words, "--", "--read", "meter", folder=f"venv {odd}", systemctl="true", loginctl="true")
    assert done.returncode == 0, done.stderr
    unit = (tmp_path / ".config/systemd/user/edgeq-assistant.service").read_text()
    assert f"MemoryMax={1 << 30}\n" in unit
    assert words_of_unit(unit) == [
        "/usr/bin/env", f"{tmp_path}/venv {odd}/bin/python", "-u", str(TOOLS / "pi/assistant.py"), "demo",
        "--memory", str(1 << 30), "--context", "4096", "--sessions", f"{tmp_path}/{odd}/conversations/inbox",
        "--watch", f"{tmp_path}/{odd}/inbox", "--read", "meter",
    ]  # fmt: skip
    assert "@" not in unit.partition("[Unit]")[2]
    assert "systemctl --user restart edgeq-assistant" in done.args

    done = start("--service", *words)
    assert done.returncode == 1
    said, _, command = done.stderr.splitlines()[-1].partition("run: ")
    assert "there is no systemd" in said
    assert shlex.split(command)[1:6] == [str(TOOLS / "pi/assistant.py"), "demo", "--memory", str(1 << 30), "--context"]
    assert shlex.split(command)[-1] == f"{tmp_path}/{odd}/inbox"


def test_a_service_without_a_limit_or_with_options_that_are_none(start: Start, tmp_path: Path) -> None:
    unit = tmp_path / ".config/systemd/user/edgeq-assistant.service"
    done = start("--service", "--model", "demo", "--", "--ask", "Hello!", systemctl="true", loginctl="true")
    assert done.returncode == 2
    assert "not allowed with argument" in done.stderr.splitlines()[-1]
    assert not unit.exists()
    assert start("--service", "--model", "demo", "--memory", "none", systemctl="true", loginctl="true").returncode == 0
    assert "MemoryMax=infinity\n" in unit.read_text()
    assert words_of_unit(unit.read_text())[5:7] == ["--memory", "none"]


def test_uninstalling(tmp_path: Path) -> None:
    """The service and edgeq go; what the user has made stays, and where that is is said."""
    tools, home = tmp_path / "check out/tools/pi", tmp_path / "my home"
    shutil.copytree(TOOLS / "pi", tools)
    unit = put(tmp_path / ".config/systemd/user/edgeq-assistant.service", "")
    put(tools.parents[1] / ".venv/bin/edgeq", "")
    kept = put(home / "conversations/demo.eqs", "mine")
    log = tmp_path / "log"
    program(tmp_path / "bin/systemctl", f'echo "$*" >>"{log}"')
    done = subprocess.run(
        ["sh", tools / "start", "--uninstall", "--home", home], capture_output=True, text=True,
        env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert log.read_text().splitlines()[0] == "--user disable --quiet --now edgeq-assistant"
    assert not unit.exists()
    assert not (tools.parents[1] / ".venv").exists()
    assert kept.read_text() == "mine"
    assert f"rm -r '{home}' " in done.stderr


@pytest.mark.parametrize(
    ("programs", "words", "code"),
    [
        ({"getconf": "echo 32"}, "this system has 32 bits and edgeq needs 64", 2),
        (
            {"python3": "case $1 in --version) echo Python 3.10.12 ;; *) exit 1 ;; esac"},
            "3.11 or newer, Python 3.10.12",
            2,
        ),
        ({"PYTHON": "python9.9"}, "there is no python9.9", 2),
        ({"python3": 'case "$*" in *venv*) exit 1 ;; esac'}, "not installed: python3-venv", 1),
        ({"python3": "true", "flock": "exit 1"}, "another tools/pi/start is installing edgeq here", 1),
    ],
)
def test_machines_that_cannot_install(tmp_path: Path, programs: dict[str, str], words: str, code: int) -> None:
    """Nothing is changed, and one line says what to do."""
    shutil.copytree(TOOLS / "pi", tmp_path / "tools/pi")
    binaries = tmp_path / "bin"
    for name, script in ({"apt-get": "exit 100", "id": "echo 0"} | programs).items():
        program(binaries / name, script)
    done = subprocess.run(
        ["sh", tmp_path / "tools/pi/start"], capture_output=True, text=True,
        env={"PATH": f"{binaries}:/usr/bin:/bin", "HOME": str(tmp_path), "PYTHON": programs.get("PYTHON", "")},
    )  # fmt: skip
    assert done.returncode == code
    assert words in done.stderr.splitlines()[-1]
    assert not (tmp_path / ".venv").exists()


def test_start_under_the_systems_limit(start: Start) -> None:
    """Where the system can bound memory, it does."""
    done = start("--memory", "1G", "--model", "demo", systemd_run="true")
    try:
        bounds = "memory" in Path("/sys/fs/cgroup/cgroup.controllers").read_text().split()
    except OSError:
        bounds = False
    if bounds:
        assert done.args[-1].startswith("systemd_run --user --scope --quiet -p MemoryMax=1000000000 ")
    else:
        assert "edgeq keeps to --memory by itself" in done.stderr


def scripts() -> list[Path]:
    files = [file for folder in (TOOLS, TOOLS / "pi") for file in folder.iterdir() if file.is_file()]
    return sorted(file for file in files if file.read_bytes().startswith(b"#!/bin/sh"))


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_scripts_have_no_shell_mistakes() -> None:
    done = subprocess.run(["shellcheck", "-e", "SC2016", *scripts()], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_scripts_can_be_run() -> None:
    for script in [*scripts(), TOOLS / "pi/assistant.py"]:
        assert script.stat().st_mode & stat.S_IXUSR, script
