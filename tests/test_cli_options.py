"""The table of options: one definition for every command, and help that a newcomer can read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

import edgeq
from edgeq.cli import COMMANDS, app
from edgeq.cli.config_file import read_config_file
from edgeq.cli.help import Command, parameters, spellings
from edgeq.cli.options import (
    AnswerOptions,
    ChatDisplayOptions,
    ModelOptions,
    PromptOptions,
    SamplingOptions,
    command,
    option,
)
from edgeq.cli.settings import set_display, set_option
from edgeq.errors import UsageError
from edgeq.generate import GenerationSettings
from edgeq.session.chat import Chat

GROUP: Any = typer.main.get_command(app)


def options_of(name: str) -> dict[str, Any]:
    return {p.name: p for p in GROUP.commands[name].params if p.param_type_name == "option"}


def help_of(name: str) -> str:
    command = GROUP.commands[name]
    text: str = command.get_help(typer.Context(command, info_name=name, max_content_width=100, terminal_width=100))
    return text


@pytest.mark.parametrize("name", COMMANDS)
class TestHelp:
    def test_summary_is_whole_in_the_list_of_commands(self, name: str) -> None:
        summary = GROUP.commands[name].get_short_help_str(200)
        assert len(summary) <= 60
        assert summary.endswith(".")
        assert summary[0].isupper()

    def test_metavars_can_be_read(self, name: str) -> None:
        for line in help_of(name).splitlines():
            assert not re.search(r"[{}<>]|\[\[|range|list\[", line), line

    def test_every_option_says_what_it_takes(self, name: str) -> None:
        for parameter in options_of(name).values():
            assert parameter.hidden or parameter.is_flag or parameter.metavar, parameter.name
            assert parameter.hidden or parameter.help.split("\n")[0][-1] in ".:", parameter.name
            assert "\n" in (parameter.help or "") or len(parameter.help or "") <= 140, parameter.name

    def test_examples_are_not_broken(self, name: str) -> None:
        """A command in a help text stands on a line of its own."""
        command = GROUP.commands[name]
        shown = help_of(name)
        for line in command.help.splitlines():
            if line.strip().startswith("edgeq "):
                assert f"\n  {line.strip()}\n" in shown


class TestDefaults:
    def test_chat_shows_where_they_come_from(self) -> None:
        shown = help_of("chat")
        for text in (
            "[default: recommended]",
            "[default: the model's maximum]",
            "[default: on]",
            "[default: no limit]",
        ):
            assert text in shown

    def test_generate_shows_values(self) -> None:
        shown = " ".join(help_of("generate").split())
        for text in ("excluding thinking. [default: 256]", "0 is greedy. [default: 0.7]", "[default: 20]"):
            assert text in shown


class TestGroups:
    def test_chat_and_generate_share_theirs(self) -> None:
        chat, generate = options_of("chat"), options_of("generate")
        shared = [field.name for group in (SamplingOptions, ModelOptions) for field in group_fields(group)]
        for name in set(shared) - {"model"}:
            assert spellings(chat[name]) == spellings(generate[name])
            assert chat[name].help == generate[name].help
            assert chat[name].envvar == generate[name].envvar

    def test_a_command_gets_the_group_as_one_object(self) -> None:
        seen: list[Any] = []

        @command
        def work(
            *, sampling: SamplingOptions, loud: Annotated[bool, option("--loud", help="Be loud.")] = False
        ) -> None:
            seen.extend((sampling, loud))

        run_alone(work, "--temp", "0.5", "--stop", "a", "--stop", "b", "--loud")
        assert seen == [SamplingOptions(temp=0.5, stop=["a", "b"]), True]
        assert seen[0].given() == {"temperature": 0.5, "stop": ("a", "b")}

    def test_defaults_from_an_instance(self) -> None:
        seen: list[Any] = []
        defaults = SamplingOptions.of(GenerationSettings(max_tokens=7, stop=("x",)))

        @command
        def work(*, sampling: SamplingOptions = defaults) -> None:
            seen.append(sampling)

        run_alone(work)
        run_alone(work, "--max-tokens", "8")
        assert [GenerationSettings(**sampling.given()) for sampling in seen] == [
            GenerationSettings(max_tokens=7, stop=("x",)),
            GenerationSettings(max_tokens=8, stop=("x",)),
        ]

    def test_a_bad_value_is_told_before_a_model_is_loaded(self) -> None:
        with pytest.raises(UsageError, match="temperature"):
            SamplingOptions(temp=-1.0).given()

    def test_every_setting_of_generation_has_an_option(self) -> None:
        names = {field.name for field in group_fields(GenerationSettings)} - {"thinking_budget"}
        given = SamplingOptions.of(GenerationSettings(max_tokens=1, max_total_tokens=1, seed=1, stop=("x",))).given()
        others = {field.name for field in group_fields(AnswerOptions)}
        assert given.keys() | others == names
        assert not given.keys() & others


class TestNames:
    """Other names are the parser's: every one of them is the option, wherever and however it is written."""

    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_name_sets_something(self, name: str) -> None:
        command = GROUP.commands[name]
        parser = command.make_parser(typer.Context(command, info_name=name))
        for own in options_of(name).values():
            for spelled in [*own.opts, *own.secondary_opts]:
                value = [] if own.is_flag or own.count else ["--temperature"]
                values, rest, order = parser.parse_args([spelled, *value])
                assert [p.name for p in order if p is own] == [own.name]
                assert values[own.name] in ("--temperature", ["--temperature"], True, False, 1)
                assert not rest

    def test_values_that_look_like_names(self) -> None:
        seen: list[Any] = []

        @command
        def work(*, prompt: PromptOptions, sampling: SamplingOptions) -> None:
            seen.append((prompt.prompt, sampling.given()))

        run_alone(work, "--temperature=0", "-p", "--temperature", "--repeat-penalty", "1.5")
        run_alone(work, "-n", "5", "-p", "--", "--num-predict=6")
        run_alone(work, "-p--stop", "--stop=--", "--stop", "-p", "--")
        assert seen == [
            ("--temperature", {"temperature": 0.0, "repetition_penalty": 1.5}),
            ("--", {"max_tokens": 6}),
            ("--stop", {"stop": ("--", "-p")}),
        ]
        with pytest.raises(Exception, match="--temp 0"):  # nothing is an option behind --
            run_alone(work, "-p", "x", "--", "--temp", "0")


class TestSeveralTexts:
    """EDGEQ_STOP, and `stop` in a configuration file: a JSON list, or one text as it is."""

    @pytest.mark.parametrize(
        ("text", "stop"),
        [
            ("\n\nUser: ", ["\n\nUser: "]), ('["\\n\\n", "User:", " "]', ["\n\n", "User:", " "]),
            ("[1]", ["[1]"]), ("[a b]", ["[a b]"]),
            ('"quoted"', ['"quoted"']), ('{"a": 1}', ['{"a": 1}']),
        ],
    )  # fmt: skip
    def test_from_the_environment(self, monkeypatch: pytest.MonkeyPatch, text: str, stop: list[str]) -> None:
        seen: list[Any] = []

        @command
        def work(*, sampling: SamplingOptions) -> None:
            seen.append(sampling.stop)

        monkeypatch.setenv("EDGEQ_STOP", text)
        run_alone(work)
        run_alone(work, "--stop", "x y")
        assert seen == [stop, ["x y"]]

    @pytest.mark.parametrize("line", ["stop = 'a b\\n'", "stop = ['a b\\n']", "[chat]\nstop = 'a b\\n'"])
    def test_from_the_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
        (tmp_path / "config.toml").write_text(line)
        monkeypatch.setenv("EDGEQ_CONFIG", str(tmp_path / "config.toml"))
        values = read_config_file(lambda: {name: parameters(command) for name, command in GROUP.commands.items()})
        assert values["chat"] == {"stop": ["a b\\n"]}

    def test_objects_and_what_is_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EDGEQ_CONFIG", str(tmp_path / "config.toml"))
        commands = {"chat": parameters(GROUP.commands["chat"])}
        (tmp_path / "config.toml").write_text("[chat.chat-template-kwargs]\nenable_thinking = true\n")
        assert read_config_file(lambda: commands) == {"chat": {"chat_template_kwargs": '{"enable_thinking": true}'}}
        for line in ("system = ['a']", "temp = true", "seed = [1, 2]"):
            (tmp_path / "config.toml").write_text(f"[chat]\n{line}\n")
            with pytest.raises(UsageError, match=f"{line.split()[0]} is .*, expected one value"):
                read_config_file(lambda: commands)

    def test_other_names_in_the_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EDGEQ_CONFIG", str(tmp_path / "config.toml"))
        commands = {name: parameters(GROUP.commands[name]) for name in ("chat", "generate")}
        (tmp_path / "config.toml").write_text("temp = 0.1\n[chat]\ntemperature = 0.2\nnum-predict = 5\n")
        assert read_config_file(lambda: commands) == {"chat": {"temp": 0.2, "max_tokens": 5}, "generate": {"temp": 0.1}}
        (tmp_path / "config.toml").write_text("[chat]\ntemperature = 0.2\ntemp = 0.1\n")
        with pytest.raises(UsageError, match="temperature and temp are the same option"):
            read_config_file(lambda: commands)


@pytest.fixture(scope="module")
def chat(chat_folder: Path) -> Chat:
    return edgeq.load(chat_folder, backend="numpy").chat()


class TestSet:
    """`/set` in a conversation."""

    @pytest.mark.parametrize(
        ("text", "told", "options"),
        [
            ("temperature 0.5", "temperature is 0.5", {"temperature": 0.5}),
            ("--temp=0.2", "temperature is 0.2", {"temperature": 0.2}),
            ("parameter num_predict 7", "max_tokens is 7", {"max_tokens": 7}),
            ("Top-K = 5", "top_k is 5", {"top_k": 5}),
            ('stop "a b" \'c\\n\' "\\n" User:', 'stop is "a b" "c\\\\n" "\\n" "User:"',
             {"stop": ("a b", "c\\n", "\n", "User:")}),
            ('stop ["q r", "="]', 'stop is "q r" "="', {"stop": ("q r", "=")}),
            ("stop don't", 'stop is "don\'t"', {"stop": ("don't",)}),
            ("stop =", 'stop is "="', {"stop": ("=",)}),
            ('stop "none"', 'stop is "none"', {"stop": ("none",)}),
            ("loop-guard off", "loop_guard is off", {"loop_guard": False}),
            ("no_loop_guard", "loop_guard is off", {"loop_guard": False}),
            ("reasoning-budget 4", "thinking_budget is 4", {"thinking_budget": 4}),
            ("regex [0-9]+ or so", "regex is [0-9]+ or so", {"regex": "[0-9]+ or so"}),
            ('json-schema {"const": 1}', 'schema is {"const": 1}', {"schema": '{"const": 1}'}),
            ("logit-bias 5=1 6-2", "logit_bias is {5: 1.0, 6: -2.0}", {"logit_bias": {5: 1.0, 6: -2.0}}),
        ],
    )  # fmt: skip
    def test_changes(self, chat: Chat, text: str, told: str, options: dict[str, Any]) -> None:
        chat.options = {}
        assert set_option(chat, text) == told
        assert chat.options == options
        (name,) = options
        assert set_option(chat, f"{name} none").startswith(f"{name} is ")
        assert chat.options == {}

    def test_an_answer_fits_one_thing(self, chat: Chat) -> None:
        chat.options = {"regex": "a", "seed": 1}
        set_option(chat, "schema {}")
        assert chat.options == {"schema": "{}", "seed": 1}
        set_option(chat, "regex none")
        assert chat.options == {"schema": "{}", "seed": 1}
        chat.options = {}

    def test_none_is_what_is_recommended(self, chat: Chat) -> None:
        chat.options = {"temperature": 0.1, "seed": 5}
        assert set_option(chat, "temp none") == "temperature is 1.0, as recommended"
        assert set_option(chat, "seed none") == "seed is none"

    def test_what_is_no_setting_of_generation(self, chat: Chat) -> None:
        assert [set_option(chat, text) for text in ("think", "nothink", "think on")] == [
            "thinking is on", "thinking is off", "thinking is on"
        ]  # fmt: skip
        assert chat.thinking is True
        assert set_option(chat, "image-max-tokens 5") == "image_tokens is 5"
        assert chat.visual_settings.image_tokens == 5
        assert set_option(chat, "image_tokens none") == "image_tokens is 1024"

    def test_how_replies_are_shown(self) -> None:
        display = ChatDisplayOptions()
        for text, told in (
            ("wrap off", "wrap is off"), ("--no-wrap", "wrap is off"), ("nowordwrap", "wrap is off"),
            ("wrap none", "wrap is on"), ("markdown", "markdown is on"), ("markdown off", "markdown is off"),
            ("--hide-thinking", "hide_thinking is on"), ("quiet", "quiet is on"), ("verbose", "quiet is off"),
        ):  # fmt: skip
            changed = set_display(display, text)
            assert changed is not None
            display, name = changed[0], told.partition(" ")[0]
            assert changed[1] == told
            assert getattr(display, name) is told.endswith("on")
        assert set_display(display, "temperature 1") is None
        with pytest.raises(UsageError, match="markdown must be on or off"):
            set_display(display, "markdown maybe")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "a name and a value"), ("temperature", "takes a value"),
            ("tool-rounds 3", "--tool-rounds holds from the start"),
            ("temperature hot", "from 0 to 10, got 'hot'"), ("top_k 1.5", "a whole number"),
            ("nonsense 3", "knows no nonsense"), ("context 5", "--context holds from"),
            ("ctx-size 5", "--context holds from"), ("system x", "system prompt"), ("seed -1", "at least 0"),
            ("stop [1]", "non-empty"), ('stop ""', "non-empty"), ("think maybe", "on or off"), ("fps 0", "fps must be"),
            ("temp 1 2", "got '1 2'"),
        ],
    )  # fmt: skip
    def test_what_cannot_be(self, chat: Chat, text: str, message: str) -> None:
        before = chat.options = {"seed": 1}
        with pytest.raises(UsageError, match=message):
            set_option(chat, text)
        assert chat.options is before

    def test_every_name_of_every_option(self, chat: Chat) -> None:
        """Each is a setting, or says where it belongs."""
        names = {field.name for group in (SamplingOptions, ModelOptions) for field in group_fields(group)} - {"stop"}
        for own in options_of("chat").values():
            for spelled in own.opts if own.name in names else ():
                with pytest.raises(UsageError) as caught:
                    set_option(chat, f"{spelled} bad")
                assert "knows no" not in caught.value.message


def group_fields(group: Any) -> Any:
    import dataclasses

    return dataclasses.fields(group)


def run_alone(function: Any, *arguments: str) -> None:
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    alone.command("work", cls=Command)(function)
    alone(list(arguments), standalone_mode=False)
