"""Options, and commands whose options come in groups."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, get_args, get_type_hints

import typer

__all__ = ["command", "option"]


def option(
    *names: str, help: str, metavar: str | None = None, default: str | None = None, minimum: int | None = None,
    env: bool = True,
) -> Any:  # fmt: skip
    """An option, with an environment variable if `env`; `default` says in words what holds without it."""
    own = next(name for name in names if name.startswith("--")).split("/")[0]
    variable = "EDGEQ_" + own.removeprefix("--").replace("-", "_").upper()
    return typer.Option(
        *names, help=help, metavar=metavar, show_default=default or True, envvar=variable if env else None,
        show_envvar=False, min=minimum,
    )  # fmt: skip


def command(function: Callable[..., None]) -> Callable[..., None]:
    """`function` for typer: instead of each parameter that is a group it has an option for every field of the group.

    The default of such a parameter, an instance of the group, holds the defaults of the options.
    """
    hints = get_type_hints(function, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in groups:
            parameters += _options(groups[parameter.name], parameter.default)
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))

    @wraps(function)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        function(**values)

    vars(run)["__signature__"] = inspect.Signature(parameters)
    return run


def _options(group: Any, given: Any) -> list[inspect.Parameter]:
    """The fields of a group as parameters, under its title; defaults from the instance `given` where there is one."""
    hints = get_type_hints(group, include_extras=True)
    parameters = []
    for field in fields(group):
        kind, info = get_args(hints[field.name])
        info = copy(info)
        info.rich_help_panel = group.title
        default = field.default if given is inspect.Parameter.empty else getattr(given, field.name)
        parameters.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
            )
        )
    return parameters
