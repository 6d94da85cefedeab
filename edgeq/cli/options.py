"""Options that several commands share, and where their values come from.

Every option can also be set by an environment variable (EDGEQ_ and its name) and in a configuration file,
~/.config/edgeq/config.toml ($XDG_CONFIG_HOME is respected; EDGEQ_CONFIG names another file): options at the top hold
for every command, those in a table named after a command for that one. Command line over environment over file over
default; `edgeq info --config` shows which won.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeq.errors import UsageError

__all__ = [
    "ALIASES",
    "BENCH_ALIASES",
    "BackendOption",
    "ContextOption",
    "FrequencyPenaltyOption",
    "KvBitsOption",
    "LoopGuardOption",
    "MaxTokensOption",
    "MinPOption",
    "ModelArgument",
    "PresencePenaltyOption",
    "RepetitionPenaltyOption",
    "SeedOption",
    "StopOption",
    "TemperatureOption",
    "ThreadsOption",
    "TopKOption",
    "TopPOption",
    "config_file",
    "read_config_file",
]

# What people's fingers know from other engines; understood, not documented.
ALIASES = {
    "-m": "--model",
    "--prompt-file": "--file",
    "-sys": "--system",
    "--system-prompt": "--system",
    "--temperature": "--temp",
    "-n": "--max-tokens",
    "--predict": "--max-tokens",
    "--n-predict": "--max-tokens",
    "--num-predict": "--max-tokens",
    "-c": "--context",
    "--ctx-size": "--context",
    "--ctx": "--context",
    "-t": "--threads",
    "-s": "--seed",
    "--reasoning-budget": "--thinking-budget",
    "--nothink": "--no-think",
    "--repeat-penalty": "--repetition-penalty",
    "-q": "--quantize",
    "--q-bits": "--bits",
    "--q-group-size": "--group-size",
}
BENCH_ALIASES = {"-pg": "--pg"}  # `edgeq bench` has llama-bench's letters, which mean other things elsewhere


def config_file() -> Path:
    """Where the configuration file is, or would be."""
    if named := os.environ.get("EDGEQ_CONFIG"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "edgeq" / "config.toml"


def read_config_file(options_of_commands: Callable[[], dict[str, set[str]]]) -> dict[str, dict[str, Any]]:
    """The file's values by command; none without a file. Options that no command has are an error."""
    path = config_file()
    if not path.exists():
        return {}
    import tomllib

    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    commands = options_of_commands()
    shared = {key: value for key, value in values.items() if not isinstance(value, dict)}
    known = set().union(*commands.values())
    for key in shared:
        if key.replace("-", "_") not in known:
            raise UsageError(f"{path}: there is no option {key!r}")
    result = {}
    for command, options in commands.items():
        own = values.get(command, {})
        merged = {key.replace("-", "_"): value for key, value in {**shared, **own}.items()}
        if unknown := {key.replace("-", "_") for key in own} - options:
            raise UsageError(f"{path}: [{command}] has no option {min(unknown)!r}")
        result[command] = {key: value for key, value in merged.items() if key in options}
    return result


def _env(name: str) -> str:
    return f"EDGEQ_{name}"


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        envvar=_env("MODEL"),
        show_envvar=False,
        help="A checkpoint folder, a .gguf file, a hub id (Qwen/Qwen3.5-2B), or demo.",
    ),
]
BackendOption = Annotated[
    str, typer.Option("--backend", envvar=_env("BACKEND"), show_envvar=False, help="auto, numpy, cpu or mlx.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        envvar=_env("THREADS"),
        show_envvar=False,
        show_default="the backend's choice",
        min=1,
        help="Threads of the backend.",
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--context",
        envvar=_env("CONTEXT"),
        show_envvar=False,
        show_default="what the model was made for",
        help="Most tokens of the conversation.",
    ),
]
KvBitsOption = Annotated[
    int | None,
    typer.Option(
        "--kv-bits",
        envvar=_env("KV_BITS"),
        show_envvar=False,
        show_default="the backend's choice, 16 on a CPU",
        help="Bits of each key and value in memory: 16, 8 or 4.",
    ),
]


def _sampling(flag: str, help_text: str) -> Any:
    variable = _env(flag.strip("-").replace("-", "_").upper())
    return typer.Option(flag, envvar=variable, show_envvar=False, show_default=False, help=help_text)


MaxTokensOption = Annotated[int | None, _sampling("--max-tokens", "Longest answer in tokens, thinking apart.")]
TemperatureOption = Annotated[float | None, _sampling("--temp", "Randomness; 0 takes the likeliest token always.")]
TopKOption = Annotated[int | None, _sampling("--top-k", "Draw from the k likeliest tokens; 0 is off.")]
TopPOption = Annotated[float | None, _sampling("--top-p", "Draw from the likeliest tokens of this total probability.")]
MinPOption = Annotated[float | None, _sampling("--min-p", "Drop tokens less likely than this times the likeliest.")]
PresencePenaltyOption = Annotated[
    float | None, _sampling("--presence-penalty", "Against tokens already in the reply; the prompt does not count.")
]
FrequencyPenaltyOption = Annotated[
    float | None, _sampling("--frequency-penalty", "The same, for every time a token occurred in the reply.")
]
RepetitionPenaltyOption = Annotated[
    float | None, _sampling("--repetition-penalty", "Against tokens of prompt and reply; 1 is off.")
]
SeedOption = Annotated[int | None, _sampling("--seed", "The same seed gives the same reply.")]
StopOption = Annotated[list[str] | None, _sampling("--stop", "End the answer before this text; may be repeated.")]
LoopGuardOption = Annotated[
    bool | None,
    typer.Option(
        "--loop-guard/--no-loop-guard",
        envvar=_env("LOOP_GUARD"),
        show_envvar=False,
        show_default=False,
        help="End thinking, or the reply, that goes round in circles (default: on).",
    ),
]
