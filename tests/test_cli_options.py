"""The table of options: one definition for every command, and help that a newcomer can read."""

from __future__ import annotations

import re
from typing import Annotated, Any

import pytest
import typer

from edgeq.cli import COMMANDS, app
from edgeq.cli.help import Command, spellings
from edgeq.cli.options import ModelOptions, SamplingOptions, command, option
from edgeq.errors import UsageError
from edgeq.generate import GenerationSettings

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
        assert given.keys() == names


def group_fields(group: Any) -> Any:
    import dataclasses

    return dataclasses.fields(group)


def run_alone(function: Any, *arguments: str) -> None:
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    alone.command("work", cls=Command)(function)
    alone(list(arguments), standalone_mode=False)
