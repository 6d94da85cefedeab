"""The command line. Each command parses and calls; the work is in the library.

Exit codes: 0 done, 1 failed while running, 2 usage, 3 does not fit, 4 bad model, 5 network, 6 quality check failed,
130 interrupted, 143 terminated (see `edgeq.errors`).
"""

from __future__ import annotations

import os
import signal
import sys
from collections import UserDict
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import edgeq
from edgeq.cli.console import report_error
from edgeq.cli.options import ALIASES, BENCH_ALIASES, read_config_file
from edgeq.errors import EdgeqError

__all__ = ["COMMANDS", "app", "main"]

COMMANDS = ("quantize", "export", "chat", "generate", "bench", "info")  # each a function in a module of its name


class _CommandTable(UserDict[str, Any]):
    """The commands by name. Each is imported when it is wanted, so that none waits for another's libraries."""

    def __getitem__(self, name: str) -> Any:
        if self.data[name] is None:
            alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
            alone.command(name)(getattr(import_module(f"edgeq.cli.{name}"), name))
            self.data[name] = typer.main.get_command(alone)
        return self.data[name]


class _Commands(TyperGroup):
    """Runs a command and turns what went wrong into one line and an exit code."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _CommandTable(dict.fromkeys(COMMANDS))

    def invoke(self, ctx: Any) -> Any:
        debug = bool(ctx.params.get("debug"))
        try:
            ctx.default_map = read_config_file(
                lambda: {name: {p.name for p in command.params if p.name} for name, command in self.commands.items()}
            )
            return super().invoke(ctx)
        except EdgeqError as error:
            if debug:
                raise
            report_error(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except MemoryError:
            print("error: out of memory\nhint: use a smaller model, fewer bits or a smaller --context", file=sys.stderr)
            raise typer.Exit(3) from None
        except BrokenPipeError:  # the reader of our output has left: nothing more to say
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except OSError as error:
            if debug:
                raise
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"edgeq {edgeq.__version__}")
        raise typer.Exit


@app.callback()
def edgeq_command(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", envvar="EDGEQ_DEBUG", help="Show a traceback on errors.")] = False,
) -> None:
    """Qwen3.5 0.8B, 2B and 4B on laptops, Apple Silicon and Raspberry Pi-class boards."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits the process."""
    with suppress(ValueError):  # not in the main thread: then signals are somebody else's
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that half-written files are removed
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = next((argument for argument in given if argument in COMMANDS), None)
    aliases = BENCH_ALIASES if command == "bench" else ALIASES
    app([aliases.get(argument, argument) for argument in given], prog_name="edgeq")
