"""The command line: streams, exit codes, one clear line for every error, and the conversation at the prompt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import Result, Run, leave_home, runner
from process import run_python
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

import edgeq
from edgeq.cli import main
from edgeq.cli.elsewhere import COMMANDS, FLAGS
from edgeq.cli.messages import save
from edgeq.cli.repl import Repl
from edgeq.session.reply import Reply


@pytest.fixture(autouse=True)
def quiet_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_home(tmp_path, monkeypatch)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(capsys, monkeypatch)


FIXED = ("--seed", "0", "--max-tokens", "6")


class TestOutputs:
    """A folder that an output needs and that does not exist is made, and told of before the work."""

    @pytest.mark.parametrize(
        "arguments",
        [
            ["quantize", "MODEL", "--out", "OUT"],
            ["quantize", "MODEL", "--out", "q", "--report", "OUT.json"],
            ["export", "MODEL", "--out", "OUT.gguf"],
            ["chat", "MODEL", "--session", "OUT.eqs", "-p", "Hi", "-n", "1"],
        ],
    )
    def test_a_folder_is_made_and_told_of(
        self, run: Run, chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        note = "note: the folder new does not exist and will be made\n"
        names = {"MODEL": str(chat_folder)}
        first = run(*(names.get(argument, argument).replace("OUT", "new/out") for argument in arguments))
        assert (first.code, first.err.count(note)) == (0, 1)
        assert list((tmp_path / "new").glob("out*"))
        names |= {"q": "q2"}
        again = run(*(names.get(argument, argument).replace("OUT", "new/other") for argument in arguments))
        assert (again.code, note in again.err) == (0, False)

    def test_nothing_is_made_where_nothing_is_written(self, run: Run, chat_folder: Path, tmp_path: Path) -> None:
        done = run("quantize", chat_folder, "--out", tmp_path / "new/out", "--dry-run")
        assert (done.code, done.err) == (0, "")
        done = run("chat", "nowhere", "--session", tmp_path / "new/x.eqs", "-p", "Hi")
        assert done.code != 0
        assert not (tmp_path / "new").exists()

    def test_a_saved_conversation(self, chat_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        chat = edgeq.load(chat_folder, backend="numpy").chat()
        save(chat, tmp_path / "new/chat.md")
        assert f"the folder {tmp_path / 'new'} does not exist" in capsys.readouterr().err
        assert (tmp_path / "new/chat.md").exists()


class TestStreams:
    def test_the_answer_is_all_of_stdout(self, run: Run, chat_folder: Path) -> None:
        result = run("chat", chat_folder, "-p", "hello", *FIXED)
        assert result.code == 0
        expected = edgeq.load(chat_folder, backend="numpy").chat(seed=0, max_tokens=6).send("hello")
        assert result.out == "".join(piece.text for piece in expected) + "\n"
        figures = result.err.strip().splitlines()
        assert len(figures) == 1
        assert "(0 cached," in figures[0]
        assert "tokens/s" in figures[0]
        assert "peak memory" in figures[0]

    def test_thinking_goes_to_stderr(self, run: Run, chat_folder: Path) -> None:
        result = run("chat", chat_folder, "-p", "hello", "--think", "--thinking-budget", "8", "--seed", "1", "--json")
        reply = json.loads(result.out)
        again = run("chat", chat_folder, "-p", "hello", "--think", "--thinking-budget", "8", "--seed", "1")
        assert again.out == reply["text"] + "\n"
        assert reply["thinking"][:10] in again.err

    def test_json(self, run: Run, chat_folder: Path) -> None:
        reply = json.loads(run("generate", chat_folder, "-p", "abc", "--json", *FIXED).out)
        assert reply.keys() == {"text", "thinking", "ids", "finish_reason", "thinking_cut", "usage"}
        assert len(reply["ids"]) == reply["usage"]["answer_tokens"] == 6
        assert reply["finish_reason"] == "length"

    def test_drafts(self, run: Run, chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = json.loads(run("generate", chat_folder, "-p", "abc", "--json", "--draft", "off", *FIXED).out)
        assert plain["usage"]["passes"] == plain["usage"]["drafted_tokens"] == 0
        drafted = run("generate", chat_folder, "-p", "abc", "--json", "--spec-type", "2", *FIXED)
        reply = json.loads(drafted.out)
        assert reply["ids"] == plain["ids"]
        assert reply["usage"]["drafted_tokens"] > 0
        assert reply["usage"]["tokens_per_pass"] >= 1
        assert f"of {reply['usage']['drafted_tokens']} drafts accepted, " in drafted.err
        monkeypatch.setenv("EDGEQ_DRAFT", "2")
        assert json.loads(run("generate", chat_folder, "-p", "abc", "--json", *FIXED).out)["ids"] == plain["ids"]
        refused = run("chat", "no-such-model", "-p", "abc", "--draft", "nine")
        assert refused.code == 2
        assert "auto, off, mtp, ngram" in refused.err

    def test_stdin_joins_the_prompt(self, run: Run, chat_folder: Path) -> None:
        both = run("chat", chat_folder, "-p", "why?", *FIXED, stdin="the log\n")
        once = run("chat", chat_folder, "-p", "why?\n\nthe log", *FIXED)
        assert both.out == once.out
        piped = run("chat", chat_folder, *FIXED, stdin="hello")
        dash = run("chat", chat_folder, "-p", "-", *FIXED, stdin="hello")
        assert piped.out == dash.out == run("chat", chat_folder, "-p", "hello", *FIXED, stdin="").out

    def test_aliases(self, run: Run, chat_folder: Path) -> None:
        one = run("chat", chat_folder, "-p", "x", "-n", "5", "-s", "0", "--temperature", "0.5", "-sys", "y", "-c", "99")
        two = run(
            "chat", chat_folder, "-p", "x", *("--max-tokens 5 --seed 0 --temp 0.5 --system y --context 99".split())
        )
        assert one.code == two.code == 0
        assert one.out == two.out

    @pytest.mark.parametrize(
        "arguments",
        [
            "-hf {model} -p x --n-predict 5 -s 0 --temperature=0.5",
            "-m {model} -p x --n-predict 5 -s 0 --temperature=0.5",
            "{model} -p x --num-predict=5 --seed=0 --temp=0.5 --ctx-size 99 --nothink",
            "--model {model} -f {file} -n5 -s0 --temperature 0.5 --repeat-penalty 1",
            "{model} --prompt-file={file} --max-tokens=5 --seed 0 --temp .5 --reasoning-budget 4",
        ],
    )
    def test_what_fingers_know_from_other_engines(
        self, run: Run, chat_folder: Path, tmp_path: Path, arguments: str
    ) -> None:
        (tmp_path / "prompt.txt").write_text("x\n")
        given = [part.format(model=chat_folder, file=tmp_path / "prompt.txt") for part in arguments.split()]
        plain = run("chat", chat_folder, "-p", "x", "--max-tokens", "5", "--seed", "0", "--temp", "0.5")
        assert plain.code == 0
        assert run("chat", *given).out == plain.out

    def test_a_prompt_that_looks_like_an_option(self, run: Run, chat_folder: Path) -> None:
        """The other engines' names are replaced nowhere but where an option is expected."""
        reply = json.loads(run("chat", chat_folder, "--prompt=-n", "--json", *FIXED).out)
        assert reply["usage"]["prompt_tokens"] == len(edgeq_ids(chat_folder, "-n"))


def edgeq_ids(folder: Path, prompt: str) -> list[int]:
    """The ids of a first turn."""
    chat = edgeq.load(folder, backend="numpy").chat()
    chat.send(prompt)
    return list(chat.ids)


class TestExitCodes:
    def check(self, result: Result, code: int, message: str) -> None:
        assert result.code == code
        assert result.out == ""
        assert "Traceback" not in result.err
        lines = result.err.strip().splitlines()
        assert message in lines[0]
        assert lines[0].startswith("error: ")
        assert all(line.startswith(("hint: ", "  ")) for line in lines[1:])

    def test_a_model_that_is_nothing(self, run: Run) -> None:
        self.check(run("chat", "nothing here", "-p", "x"), 2, "model not found: nothing here (not a local path")

    def test_no_prompt(self, run: Run, chat_folder: Path) -> None:
        self.check(run("generate", chat_folder), 2, "no prompt given")
        self.check(run("chat", chat_folder, stdin=""), 2, "no prompt given")

    def test_a_setting_out_of_range(self, run: Run, chat_folder: Path) -> None:
        self.check(run("chat", chat_folder, "-p", "x", "--temp", "-1"), 2, "temperature must be from 0 to 10, got -1")

    def test_bits_that_no_cache_has(self, run: Run, chat_folder: Path) -> None:
        for command in ("chat", "generate"):
            self.check(run(command, chat_folder, "-p", "x", "--kv-bits", "3"), 2, "cannot be kept in 3 bits")

    def test_a_prompt_that_does_not_fit(self, run: Run, chat_folder: Path) -> None:
        self.check(
            run("chat", chat_folder, "-p", "x" * 99, "--context", "30"), 3, "leaves no room for a reply: 30 tokens"
        )

    def test_a_damaged_model(self, run: Run, chat_folder: Path, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        shutil.copytree(chat_folder, folder)
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:-100])
        self.check(run("chat", folder, "-p", "x"), 4, "is not a valid safetensors file")
        (folder / "config.json").write_text("{")
        self.check(run("info", folder), 4, "config.json cannot be read as JSON")

    def test_a_model_without_template(self, run: Run, chat_folder: Path, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        shutil.copytree(chat_folder, folder)
        (folder / "chat_template.jinja").unlink()
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config.pop("chat_template", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        self.check(run("chat", folder, "-p", "x"), 4, "has no chat template")
        assert run("generate", folder, "-p", "x", *FIXED).code == 0

    def test_offline(self, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        self.check(run("chat", "Qwen/Not-Here", "-p", "x"), 5, "Qwen/Not-Here is not in the local cache")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--nope", "no such option: --nope"),
            ("nope", "no such command 'nope'"),
            ("chat --nope", "no such option: --nope"),
            ("chat demo --temp", "'--temp' requires an argument"),
            ("chat demo -p x --threads 0", "invalid value for '--threads'"),
            ("info --json=1", "'--json' does not take a value"),
            ("quantize", "missing argument 'MODEL'"),
            ("chat -p x", "no model given"),
            ("chat demo -m other -p x", "two models given: demo and other"),
        ],
    )
    def test_a_line_that_makes_no_sense(self, run: Run, arguments: str, message: str) -> None:
        self.check(run(*arguments.split()), 2, message)

    def test_a_wrong_value_that_was_not_typed(self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EDGEQ_TEMP", "hot")
        self.check(run("chat", "demo", "-p", "x"), 2, "(from EDGEQ_TEMP)")
        monkeypatch.delenv("EDGEQ_TEMP")
        (tmp_path / "config.toml").write_text('[chat]\ntemp = "hot"\n')
        monkeypatch.setenv("EDGEQ_CONFIG", str(tmp_path / "config.toml"))
        self.check(run("chat", "demo", "-p", "x"), 2, "(from the configuration file)")

    @pytest.mark.parametrize("command", COMMANDS)
    def test_commands_of_other_engines(self, run: Run, command: str) -> None:
        result = run(command, "demo")
        self.check(result, 2, f"no such command '{command}'")
        assert COMMANDS[command] in result.err

    @pytest.mark.parametrize(("command", "flag"), [(command, flag) for command in FLAGS for flag in FLAGS[command]])
    def test_flags_of_other_engines(self, run: Run, command: str, flag: str) -> None:
        """Each is one that edgeq does not understand, also where it begins like one that takes a value (-ngl)."""
        result = run(command, "demo", flag, "x")
        self.check(result, 2, "")
        assert result.err.endswith(f"hint: {FLAGS[command][flag]}\n")

    def test_ctrl_c(self, run: Run, chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(self: Reply) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Reply, "__next__", interrupted)
        monkeypatch.setattr(Reply, "__iter__", interrupted)
        result = run("chat", chat_folder, "-p", "x")
        assert result.code == 130
        assert "interrupted" in result.err

    def test_terminated_while_quantizing_leaves_nothing(self, chat_folder: Path, tmp_path: Path) -> None:
        code = (
            "import os, signal, sys\n"
            "from edgeq.quant import quantizer\n"
            "from edgeq.cli import main\n"
            "quantizer._write_json = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
            "main(sys.argv[1:])\n"
        )
        arguments = ["quantize", str(chat_folder), "-o", str(tmp_path / "out")]
        done = run_python(code, *arguments)
        assert done.returncode == 143
        assert not [path for path in tmp_path.iterdir() if "out" in path.name]

    def test_debug_shows_the_traceback(self, chat_folder: Path) -> None:
        with pytest.raises(edgeq.UsageError):
            main(["--debug", "chat", "nothing here", "-p", "x"])


class TestInfo:
    def test_a_model(self, run: Run, chat_folder: Path) -> None:
        facts = json.loads(run("info", chat_folder, "--json").out)
        assert facts["layers"] == "3 Gated DeltaNet, 1 gated attention"
        assert facts["MTP head"] == facts["vision tower"] == "yes"
        assert facts["chat template"] == "thinking is off by default"
        assert any("mlp.up_proj" in name for name in facts["tensors"])

    def test_the_installation(self, run: Run) -> None:
        result = run("info")
        assert result.code == 0
        assert "numpy" in result.out
        assert edgeq.__version__ in result.out

    def test_version_and_help(self, run: Run) -> None:
        assert run("--version").out == f"edgeq {edgeq.__version__}\n"
        for command in ("chat", "generate", "info", "quantize"):
            assert run(command, "--help").code == 0


class TestConfiguration:
    def test_line_over_environment_over_file_over_default(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "config.toml"
        monkeypatch.setenv("EDGEQ_CONFIG", str(file))
        file.write_text("temp = 0.1\nseed = 5\n[chat]\ntop-k = 3\n")
        monkeypatch.setenv("EDGEQ_TEMP", "0.2")
        facts = json.loads(run("info", "--config", "--json").out)
        assert facts["chat.temp"] == "0.2 (environment (EDGEQ_TEMP))"
        assert facts["chat.seed"] == facts["generate.seed"] == "5 (configuration file)"
        assert facts["chat.top_k"] == "3 (configuration file)"
        assert facts["generate.top_k"] == "20 (default)"

    def test_the_file_counts(
        self, run: Run, chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "config.toml"
        monkeypatch.setenv("EDGEQ_CONFIG", str(file))
        file.write_text("max-tokens = 3\n")
        reply = json.loads(run("generate", chat_folder, "-p", "x", "--json", "--ignore-eos").out)
        assert len(reply["ids"]) == 3

    def test_keys_are_the_names_that_help_shows(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("EDGEQ_CONFIG", str(tmp_path / "config.toml"))
        (tmp_path / "config.toml").write_text("[info]\njson = true\n[quantize]\ntype = ['*.down_proj=6']\n")
        assert "edgeq" in json.loads(run("info").out)
        planned = run("quantize", "demo", "--dry-run").out
        assert next(line for line in planned.splitlines() if "down_proj" in line).split()[5] == "6-bit"

    @pytest.mark.parametrize("content", ["nope = 1", "[chat]\nnope = 1", "[chatt]\ntemp = 1", "temp = ", "\xff"])
    def test_a_bad_file(self, run: Run, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "config.toml"
        monkeypatch.setenv("EDGEQ_CONFIG", str(file))
        file.write_bytes(content.encode("latin-1"))
        result = run("info")
        assert result.code == 2
        assert result.err.startswith(f"error: {file}")


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        yield keys


class TestRepl:
    def talk(self, folder: Path, keyboard: PipeInput, capsys: pytest.CaptureFixture[str], *lines: str) -> Result:
        chat = edgeq.load(folder, backend="numpy").chat(seed=0, max_tokens=4, temperature=0.0)
        keyboard.send_text("".join(f"{line}\r" for line in lines))
        Repl(chat, str(folder)).run()
        captured = capsys.readouterr()
        return Result(0, captured.out, captured.err)

    def test_a_conversation(self, chat_folder: Path, keyboard: PipeInput, capsys: pytest.CaptureFixture[str]) -> None:
        result = self.talk(chat_folder, keyboard, capsys, "hello", "again", "/stats", "/exit")
        assert result.out.count("\n") >= 2
        assert "cached" in result.err
        assert "context:" in result.err

    def test_several_lines(self, chat_folder: Path, keyboard: PipeInput, capsys: pytest.CaptureFixture[str]) -> None:
        several = self.talk(chat_folder, keyboard, capsys, '"""one', 'two"""', "/bye").out
        chat = edgeq.load(chat_folder, backend="numpy").chat(seed=0, max_tokens=4, temperature=0.0)
        assert several == "".join(piece.text for piece in chat.send("one\ntwo")) + "\n"

    def test_commands(self, chat_folder: Path, keyboard: PipeInput, capsys: pytest.CaptureFixture[str]) -> None:
        result = self.talk(
            chat_folder, keyboard, capsys, "/help", "/set max_tokens 2", "/set top_k many", "/set nope 1", "/show",
            "/think", "/nothink", "/undo", "/nope", "hi", "/regen", "/undo", "/system be brief", "/clear", "/quit",
        )  # fmt: skip
        for expected in (
            "/regen", "max_tokens           2", "top_k must be a whole number of at least 0, got 'many'",
            "/set knows no nope", "thinking is on", "thinking is off", "nothing to undo",
            "unknown command /nope", "undone: hi", "conversation cleared",
        ):  # fmt: skip
            assert expected in result.err, expected

    def test_ctrl_c_twice_leaves(
        self, chat_folder: Path, keyboard: PipeInput, capsys: pytest.CaptureFixture[str]
    ) -> None:
        keyboard.send_text("half a line\x03\x03")
        Repl(edgeq.load(chat_folder, backend="numpy").chat(), "x").run()
        assert "Ctrl-C again" in capsys.readouterr().err

    def test_a_history_that_cannot_be_kept(
        self, chat_folder: Path, keyboard: PipeInput, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "XDG_STATE_HOME/edgeq/history").mkdir(parents=True)  # reading and writing it fails, for root too
        assert "cached" in self.talk(chat_folder, keyboard, capsys, "hello", "again", "/exit").err

    def test_ctrl_d_leaves(self, chat_folder: Path, keyboard: PipeInput) -> None:
        keyboard.send_text("\x04")
        Repl(edgeq.load(chat_folder, backend="numpy").chat(), "x").run()

    def test_an_error_does_not_end_the_conversation(
        self, chat_folder: Path, keyboard: PipeInput, capsys: pytest.CaptureFixture[str]
    ) -> None:
        chat = edgeq.load(chat_folder, backend="numpy", context=60).chat(max_tokens=2)
        keyboard.send_text("x" * 200 + "\rok\r/exit\r")
        Repl(chat, "x").run()
        captured = capsys.readouterr()
        assert "error: the prompt (" in captured.err
        assert "generated 2 tokens" in captured.err or "generated 1 tokens" in captured.err
