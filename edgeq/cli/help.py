"""How `--help` looks: metavars as written in the table of options, sections, tables in a help text, plain defaults."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from textwrap import wrap
from typing import Any

from typer.core import TyperCommand

from edgeq.errors import UsageError
from edgeq.printable import brief

__all__ = ["Command", "parameters", "spellings", "texts"]

_TIED = "\xa0"  # a space at which no line is broken
_NAMES = 30  # columns of names; a longer name has its help on the next line


class Command(TyperCommand):
    """A command with help of its own making, the same with every version of typer, whose options of several texts read
    their variable as `texts` does.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for parameter in self.params:
            if getattr(parameter, "multiple", False) and parameter.envvar:
                vars(parameter)["value_from_envvar"] = partial(_texts_from_environment, parameter)

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """An option whose metavar is `[NAME]` may stand without a value, at the end or before another option: its value
        is "default" then."""
        alone = {
            name
            for parameter in self.params
            if parameter.param_type_name == "option" and str(parameter.metavar).startswith("[")
            for name in parameter.opts
        }
        given = list[str]()
        for word, following in pairwise([*args, "--"]):
            given += [word, "default"] if word in alone and following.startswith("-") else [word]
        return super().parse_args(ctx, given)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:  # noqa: ARG002  # click calls it with a context
        """`[OPTIONS] MODEL`, or `[OPTIONS] [MODEL]` where the command also does something without."""
        return ["[OPTIONS]", *(str(p.metavar) for p in self.params if p.param_type_name == "argument")]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, then every section of options."""
        sections: dict[str, list[str]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            if not getattr(parameter, "hidden", False):
                title = "Arguments" if parameter.param_type_name == "argument" else _section(parameter)
                sections.setdefault(title, []).extend(_rows(parameter, formatter.width))
        for title, rows in sections.items():
            if rows:
                formatter.write(f"\n{title}:\n" + "".join(f"  {row}".rstrip() + "\n" for row in rows))


def texts(value: str) -> list[str]:
    """The values of an option that can be given several times, out of one text: a JSON list of texts, or the text
    itself, whatever spaces and line breaks are in it.
    """
    try:
        listed = json.loads(value)
    except ValueError:
        return [value]
    if not isinstance(listed, list) or (listed and not any(isinstance(text, str) for text in listed)):
        return [value]  # such as [1], which may well end an answer
    if not all(isinstance(text, str) for text in listed):
        raise UsageError(f"a JSON list in the environment must hold texts, got {brief(listed)}")
    return listed


def _texts_from_environment(parameter: Any, ctx: Any) -> list[str] | None:
    value = parameter.resolve_envvar_value(ctx)
    return None if value is None else texts(value)


def spellings(option: Any) -> tuple[list[str], list[str]]:
    """The names of an option that help shows (one letter, then its own), and the others that it answers to."""
    own = next(name for name in option.opts if name.startswith("--"))
    shown = [*sorted((name for name in option.opts if len(name) == 2), key=str.lower), own]
    others = [name for name in [*option.opts, *option.secondary_opts[1:]] if name not in shown]
    return shown, others


def parameters(command: Any) -> dict[str, Any]:
    """A command's parameters by the names that a user knows: an option's long ones, with _ for -, or an argument's.

    Without those that take every word there is: they are for a line, not for a file of settings.
    """
    shown = [p for p in command.params if p.name and not getattr(p, "hidden", False) and p.nargs == 1]
    return {name: parameter for parameter in shown for name in _names(parameter)}


def _names(parameter: Any) -> list[str]:
    if parameter.param_type_name == "argument":
        return [str(parameter.name)]
    long = [name for name in parameter.opts if name.startswith("--")]
    return [name.removeprefix("--").replace("-", "_") for name in long]


def _section(option: Any) -> str:
    return getattr(option, "rich_help_panel", None) or "Options"


def _rows(parameter: Any, width: int) -> Iterator[str]:
    """The lines of a parameter: its name, and beside it the help, whose own line breaks stay."""
    name = _name(parameter)
    lines = [line for text in _text(parameter).split("\n") for line in wrap(text, width - _NAMES - 4) or [""]]
    if len(name) > _NAMES - 2:
        yield name
        name = ""
    for line in lines:
        yield f"{name:{_NAMES}}{line}".replace(_TIED, " ")
        name = ""


def _name(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.metavar).strip("[]")
    name = ", ".join(spellings(parameter)[0])
    if parameter.secondary_opts:
        return f"{name} / {parameter.secondary_opts[0]}"
    return name if parameter.is_flag or parameter.count else f"{name} {parameter.metavar}"


def _text(parameter: Any) -> str:
    """The help, and the default at the end of its first line."""
    first, *rest = (parameter.help or "").split("\n")
    if parameter.required and parameter.param_type_name == "option":
        first += " [required]"
    elif default := _default(parameter):
        first += " " + f"[default: {default}]".replace(" ", _TIED)
    return "\n".join([first, *rest])


def _default(parameter: Any) -> str:
    """What holds if the option is not given: a value, or words for where it comes from."""
    value, words = parameter.default, parameter.show_default
    if value is None or value == () or callable(value):
        return words if isinstance(words, str) else ""
    if isinstance(value, bool):
        return "on" if value else ""
    return f"{value:g}" if isinstance(value, float) else str(value)
