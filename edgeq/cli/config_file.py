"""Where the options' values come from: command line over environment over configuration file over default.

The environment variable of an option is EDGEQ_ and its name. The file is ~/.config/edgeq/config.toml
($XDG_CONFIG_HOME is respected; EDGEQ_CONFIG names another file): options at the top hold for every command, those in a
table named after a command for that one. `edgeq info --config` shows which won.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgeq.errors import UsageError
from edgeq.inputs import exists, expand_user, read_text
from edgeq.printable import one_line

__all__ = ["config_file", "read_config_file"]


def config_file() -> Path:
    """Where the configuration file is, or would be."""
    if named := os.environ.get("EDGEQ_CONFIG"):
        return expand_user(Path(named))
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return expand_user(Path(base)) / "edgeq" / "config.toml"


def read_config_file(options_of_commands: Callable[[], dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The file's values by command and parameter; none without a file. Options that no command has are an error.

    options_of_commands: for each command its parameters by the names of their options, with _ for -.
    """
    path = config_file()
    if not exists(path):
        return {}
    values, commands = _parsed(path), options_of_commands()
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    shared = {_name(key): value for key, value in values.items() if key not in tables}
    _check(f"{path}: unknown command", tables, set(commands))
    _check(f"{path}: unknown option", shared, set().union(*commands.values()))
    result = {}
    for command, options in commands.items():
        own = {_name(key): value for key, value in tables.get(command, {}).items()}
        _check(f"{path}: [{command}] has no option", own, set(options))
        held = {key: value for key, value in shared.items() if key in options}
        result[command] = _by_parameter(path, held, options) | _by_parameter(path, own, options)
    return result


def _by_parameter(path: Path, given: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Values by parameter, whichever of its option's names they stand under; what several texts are to be is a list."""
    found: dict[str, Any] = {}
    for key, value in given.items():
        parameter = options[key]
        if parameter.name in found:
            same = [name for name in given if options[name] is parameter]
            raise UsageError(f"{path}: {' and '.join(same)} are the same option", hint="keep one of them")
        found[parameter.name] = _as_given(value, parameter, f"{path}: {key}")
    return found


def _as_given(value: Any, parameter: Any, where: str) -> Any:
    """A value as the command line would have it: several texts in a list, an object as JSON."""
    if getattr(parameter, "multiple", False):
        return value if isinstance(value, list) else [value]
    if isinstance(value, list) or (isinstance(value, bool) and not getattr(parameter, "is_flag", False)):
        raise UsageError(f"{where} is {json.dumps(value, default=str)}, expected one value")
    return json.dumps(value) if isinstance(value, dict) else value


def _parsed(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {one_line(error)}") from None


def _name(key: str) -> str:
    return key.replace("-", "_")


def _check(problem: str, given: dict[str, Any], known: set[str]) -> None:
    if unknown := given.keys() - known:
        raise UsageError(f"{problem} {min(unknown)!r}", hint="`edgeq COMMAND --help` lists the options")
