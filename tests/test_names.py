"""Names and paths of every kind: nothing hangs, nothing is shown raw, nothing ends in a traceback."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from process import run_python

from edgeq.checkpoint import open_checkpoint
from edgeq.cli import main
from edgeq.cli.console import for_terminal
from edgeq.errors import EdgeqError, ModelError, UsageError
from edgeq.formats.safetensors import SafetensorsFile
from edgeq.inputs import check_output, exists, expand_user, is_file, is_folder, open_file, read_text
from edgeq.printable import brief, one_line, printable
from edgeq.quant import quantize

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes and bytes in names are POSIX's")

ESC = "a\x1b[2Jb\nc\u202ed\x85e\udcfff"
SHOWN = "a\\x1b[2Jb\\nc\\u202ed\\x85e\\xfff"


def slow(*values: str) -> list[Any]:
    """More of the same kind, each in a process of its own, for the longer run."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def run(*arguments: str, **environment: Any) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    code = "import sys; sys.argv[0] = 'edgeq'; from edgeq.__main__ import main; main()"
    return run_python(code, *arguments, **environment)


def told(result: subprocess.CompletedProcess[str], code: int) -> str:
    """The error of a command that failed as it should: one line, and perhaps a hint."""
    assert result.returncode == code, (result.returncode, result.stderr)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("hint: ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


class TestShown:
    def test_control_characters_are_escapes(self) -> None:
        assert printable(ESC) == SHOWN
        assert printable(ESC, keep="\n") == SHOWN.replace("\\n", "\n")
        assert printable("Grüße, 世界 😀\u00a0x\u3000y") == "Grüße, 世界 😀\u00a0x\u3000y"

    def test_long_names_lose_their_middle(self) -> None:
        shown = printable("x" * 10**6 + " is the problem")
        assert len(shown) < 2100
        assert shown.endswith(" is the problem")

    def test_errors_are_printable_by_construction(self) -> None:
        error = ModelError(f"{ESC} is missing", hint=f"look at {ESC}", details=[ESC, "more"])
        assert error.message == f"{SHOWN} is missing\n  {SHOWN}\n  more"
        assert error.hint == f"look at {SHOWN}"
        assert str(error) == error.message

    def test_values_are_brief(self) -> None:
        deep: list[object] = []
        for _ in range(10_000):
            deep = [deep]
        for value in (
            10**400,
            10**4000,
            "x" * 10**6,
            deep,
            {"a": deep},
            [[1] * 10**5] * 100,
            float("nan"),
            b"x" * 10**6,
        ):
            assert len(brief(value)) < 300

    def test_what_others_say_is_one_line(self) -> None:
        assert one_line(ValueError("a\n  b\x1b[2J")) == "a b\\x1b[2J"
        assert one_line(KeyError()) == "KeyError"

    def test_a_terminal_is_not_steered_by_an_answer(self) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        assert for_terminal("a\x1b]0;t\x07\n\tb\r\n\x9b", Terminal()) == "a\\x1b]0;t\\x07\n\tb\n\\x9b"
        assert for_terminal("a\x1b\r", io.StringIO()) == "a\x1b\r"
        assert for_terminal("👩\u200d👩 \u200f", Terminal()) == "👩\u200d👩 \u200f"


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listening(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(path.name)
    finally:
        os.chdir(here)


def folder(path: Path) -> None:
    path.mkdir()


def looping(path: Path) -> None:
    path.symlink_to(path.name)


SPECIAL = [fifo, device, listening, folder, looping]


@pytest.mark.parametrize("make", SPECIAL)
class TestFilesThatAreNone:
    """Opening returns at once; a pipe nobody writes to would be waited for otherwise."""

    @pytest.fixture
    def model(self, chat_folder: Path, tmp_path: Path) -> Path:
        shutil.copytree(chat_folder, tmp_path / "model")
        for name in ("generation_config.json", "model.safetensors.index.json"):
            (tmp_path / "model" / name).unlink(missing_ok=True)
        return tmp_path / "model"

    def test_is_refused(self, make: Callable[[Path], None], tmp_path: Path) -> None:
        make(tmp_path / "x")
        assert not is_file(tmp_path / "x")
        for read in (open_file, read_text):
            with pytest.raises(OSError, match=r"expected a regular file|No such device|symbolic links"):
                read(tmp_path / "x")
        with pytest.raises(ModelError, match="cannot be read"):
            SafetensorsFile(tmp_path / "x")

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_in_a_model(self, make: Callable[[Path], None], model: Path, name: str) -> None:
        (model / name).unlink()
        make(model / name)
        with pytest.raises(ModelError, match=name.replace(".", r"\.")):
            open_checkpoint(model)

    def test_in_the_place_of_the_index(self, make: Callable[[Path], None], model: Path) -> None:
        make(model / "model.safetensors.index.json")
        if make is not looping:  # such a link leads nowhere: the file is absent
            with pytest.raises(ModelError, match="cannot be read"):
                open_checkpoint(model)

    def test_in_the_place_of_recommendations(self, make: Callable[[Path], None], model: Path) -> None:
        make(model / "generation_config.json")
        with (
            nullcontext() if make is looping else pytest.warns(UserWarning, match=r"generation_config\.json cannot be")
        ):
            open_checkpoint(model)

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
    def test_in_the_place_of_text_files(self, make: Callable[[Path], None], model: Path, name: str) -> None:
        (model / name).unlink()
        make(model / name)
        checkpoint = open_checkpoint(model)
        if make is not looping:
            with pytest.raises(ModelError, match="cannot be read"):
                checkpoint.tokenizer(), checkpoint.template()

    def test_as_gguf(self, make: Callable[[Path], None], tmp_path: Path) -> None:
        make(tmp_path / "x.gguf")
        with pytest.raises(ModelError):
            open_checkpoint(tmp_path / "x.gguf")

    def test_in_a_record(self, make: Callable[[Path], None], chat_folder: Path, tmp_path: Path) -> None:
        quantize(chat_folder, tmp_path / "q")
        (tmp_path / "q" / "chat_template.jinja").unlink()
        make(tmp_path / "q" / "chat_template.jinja")
        with pytest.raises(SystemExit):
            main(["info", str(tmp_path / "q"), "--verify"])

    def test_as_the_configuration_file(
        self, make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make(tmp_path / "config.toml")
        monkeypatch.setenv("EDGEQ_CONFIG", str(tmp_path / "config.toml"))
        with pytest.raises(SystemExit) as caught:
            main(["info"])
        assert caught.value.code in ((0, None) if make is looping else (2,))


class TestPrompts:
    def test_from_a_pipe_that_the_shell_made(self, tmp_path: Path) -> None:
        read, write = os.pipe()
        with os.fdopen(write, "w") as writer:
            writer.write("Hello")
        assert read_text(Path(f"/dev/fd/{read}"), streams=True) == "Hello"
        os.close(read)

    def test_from_a_pipe_that_nobody_writes_to(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "x")
        assert read_text(tmp_path / "x", streams=True) == ""

    def test_from_a_device_without_end(self) -> None:
        with pytest.raises(OSError, match="more than 1,000 bytes"):
            read_text(Path("/dev/zero"), 1000, streams=True)

    @pytest.mark.parametrize("name", ["nothing", "x" * 300, "a\0b", "."])
    def test_from_what_is_no_file(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            main(["generate", "demo", "-f", name])
        assert caught.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) <= 2

    def test_twelve_million_spaces(self) -> None:
        code = "import sys; sys.argv[0] = 'edgeq'; from edgeq.__main__ import main; main()"
        result = subprocess.run(
            [sys.executable, "-c", code, "generate", "demo", "--max-tokens", "1"],
            input=" " * 12_000_000,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "a run of spaces, of more than 262,144 characters" in told(result, 3)


class TestNamesOfModels:
    @pytest.mark.parametrize("name", ["x" * 300, "\udcff", "a\0b", "a\ud800b", "..", ".", "", "a/b", "x\n"])
    def test_in_a_weight_map(self, chat_folder: Path, tmp_path: Path, name: str) -> None:
        shutil.copytree(chat_folder, tmp_path / "model")
        index = {"weight_map": {"model.norm.weight": name}}
        (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
        with warnings.catch_warnings(record=True) as warned, suppress(ModelError):
            warnings.simplefilter("always")
            open_checkpoint(tmp_path / "model")  # beside it lies a whole model
        assert not any("\n" in str(warning.message) for warning in warned)
        (tmp_path / "model" / "model.safetensors").unlink()
        with pytest.raises(ModelError) as caught:
            open_checkpoint(tmp_path / "model")
        assert "\n" not in caught.value.message

    def test_of_tensors(self, tmp_path: Path) -> None:
        header = json.dumps(
            {ESC.replace("\udcff", ""): {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}
        ).encode()
        (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        with pytest.raises(ModelError) as caught:
            SafetensorsFile(tmp_path / "x")
        assert caught.value.message.isprintable()

    @pytest.mark.parametrize("name", ["x" * 300, "/" + "y/" * 5000, "a\0b", "\udcff", "no\ud800"])
    def test_the_system_refuses(self, name: str) -> None:
        path = Path(name)
        assert not exists(path)
        assert not is_file(path)
        assert not is_folder(path)
        for read in (open_file, read_text):
            with pytest.raises(OSError):  # noqa: PT011
                read(path)
        with pytest.raises(EdgeqError):
            open_checkpoint(path)

    def test_of_users_that_do_not_exist(self) -> None:
        assert expand_user(Path("~nosuchuser/x")) == Path("~nosuchuser/x")


class TestOutputs:
    @pytest.mark.parametrize("out", ["", ".", "..", "/", "a/..", "a\0b"])
    def test_that_are_no_names(
        self, out: str, chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UsageError, match="is no name for a new file or folder"):
            check_output(Path(out))
        with pytest.raises(UsageError, match="is no name for a new file or folder"):
            quantize(chat_folder, out)
        for command in (
            ["quantize", str(chat_folder), "-o", out],
            ["quantize", str(chat_folder), "-o", "q", "--report", out],
            ["export", str(chat_folder), "-o", out],
            ["export", str(chat_folder), "-o", "x.gguf", "--mmproj", out],
        ):
            with pytest.raises(SystemExit) as caught:
                main(command)
            assert caught.value.code == 2
        assert list(tmp_path.iterdir()) == []


class TestTheCommandLine:
    @pytest.fixture
    def odd(self, chat_folder: Path, tmp_path: Path) -> Path:
        """A model in a folder whose name is no UTF-8, with an escape sequence and a line end in it."""
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff\x1b[2J\nx"))
        shutil.copytree(chat_folder, path)
        return path

    @pytest.mark.parametrize("encoding", ["utf-8", "ascii", *slow("latin-1", "cp1252")])
    def test_any_path_in_any_encoding(self, odd: Path, encoding: str) -> None:
        result = run("info", str(odd), PYTHONIOENCODING=encoding)
        assert result.returncode == 0, result.stderr
        assert "m\\xff\\x1b[2J\\nx" in result.stdout
        result = run("info", str(odd), "--json", PYTHONIOENCODING=encoding)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["path"] == str(odd)

    def test_any_path_through_the_quantizer_and_back(self, odd: Path, tmp_path: Path) -> None:
        out = odd.with_name(odd.name + "q")
        quantize(odd, out)
        record = json.loads((out / "edgeq.json").read_text(encoding="utf-8"))
        assert record["source"]["name"] == "m\\xff\\x1b[2J\\nx"
        gguf = out.with_name(out.name + ".gguf")
        with pytest.raises(SystemExit) as caught:
            main(["export", str(out), "-o", str(gguf)])
        assert not caught.value.code
        assert open_checkpoint(gguf)

    @pytest.mark.parametrize("language", ["C", *slow("POSIX", "C.UTF-8", "nonsense")])
    def test_answers_in_any_language(self, language: str) -> None:
        for arguments in (["-p", "Grüße 世界"], ["-p", "x", "--json"]):
            result = run(
                "chat", "demo", "--max-tokens", "4", *arguments, LANG=language, LC_ALL=language, PYTHONUTF8="0"
            )
            assert result.returncode == 0, result.stderr

    def test_an_answer_that_ascii_cannot_spell(self, capsys: pytest.CaptureFixture[str]) -> None:
        code = (
            "from edgeq.cli.console import prepare_streams, show_json\n"
            "prepare_streams(); print('世界'); show_json({'a': '世界', 'b': '\\udcff'})"
        )
        result = run_python(code, PYTHONIOENCODING="ascii")
        text, data = result.stdout.splitlines()
        assert text == "\\u4e16\\u754c"
        assert json.loads(data) == {"a": "世界", "b": "\udcff"}

    @pytest.mark.parametrize("closed", ["<&- >&- 2>&-", *slow("<&-", ">&-", "2>&-")])
    def test_closed_streams(self, closed: str) -> None:
        root = Path(__file__).parent.parent
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
        command = f"{sys.executable} -m edgeq generate demo -p hi --max-tokens 2 {closed}"
        assert subprocess.run(["sh", "-c", command], env=environment, capture_output=True).returncode == 0

    @pytest.mark.parametrize(
        ("arguments", "environment"),
        [
            (["info", "~nosuchuser/model"], {}),
            (["info", "x" * 5000], {}),
            (["info", "m\x1b[2J\nx"], {}),
            (["chat", "demo", "--m\x1b[2J\nx"], {}),
            (["info"], {"EDGEQ_ISA": "foo"}),
            (["info", "--json"], {"EDGEQ_ISA": "foo\x1b[2J"}),
            (["generate", "demo", "-p", "x"], {"EDGEQ_ISA": "foo"}),
            (["info"], {"EDGEQ_CONFIG": "/"}),
        ],
    )
    def test_misuse_is_one_line(self, arguments: list[str], environment: dict[str, str]) -> None:
        assert told(run(*arguments, **environment), 2).isprintable()

    def test_doctor_and_clean(self, odd: Path, tmp_path: Path) -> None:
        (odd.parent / f".{odd.name}.partial-abcdefgh").mkdir()
        (odd.parent / f".{odd.name}.partial-abcdefgh" / "lock").touch()
        for arguments in (["doctor", "--no-measure", str(tmp_path)], ["clean", str(tmp_path)]):
            result = run(*arguments, EDGEQ_ISA="foo")
            assert result.returncode == 0, result.stderr
            assert "m\\xff\\x1b[2J\\nx.partial-abcdefgh" in result.stdout
            assert "\x1b" not in result.stdout
        assert "unknown instruction set 'foo'" in run("doctor", "--json", EDGEQ_ISA="foo").stdout

    @pytest.mark.parametrize("variable", ["EDGEQ_CONFIG", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME"])
    @pytest.mark.parametrize("value", ["~nosuchuser/x", *slow("x" * 5000, "~")])
    def test_folders_that_cannot_be(self, variable: str, value: str) -> None:
        result = run("generate", "demo", "-p", "x", "--max-tokens", "1", **{variable: value})
        assert result.returncode in (0, 2)
        assert "Traceback" not in result.stderr

    @pytest.mark.parametrize("module", ["typer", "numpy", *slow("edgeq.cli", "edgeq.cli.info", "edgeq.backends")])
    def test_ctrl_c_while_importing(self, module: str) -> None:
        code = (
            "import os, signal, sys\n"
            "class Interrupt:\n"
            "    def find_spec(self, name, *_):\n"
            f"        if name == {module!r}:\n"
            "            sys.meta_path.remove(self)\n"
            "            os.kill(os.getpid(), signal.SIGINT)\n"
            "sys.meta_path.insert(0, Interrupt())\n"
            "sys.argv = ['edgeq', 'info', 'demo']\n"
            "from edgeq.__main__ import main; main()\n"
        )
        result = run_python(code)
        assert result.returncode == 130
        assert result.stderr == ""
