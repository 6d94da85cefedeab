"""The command line. Each command parses and calls; the work is in the library.

Exit codes: 0 done, 1 failed while running, 2 usage, 3 does not fit, 4 bad model, 5 network, 6 quality check failed,
129 hung up, 130 interrupted, 143 terminated (see `edgeq.errors`).
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections import UserDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import edgeq
from edgeq.cli.config_file import read_config_file
from edgeq.cli.console import prepare_streams, report_error, report_notes, show, show_warning
from edgeq.cli.elsewhere import hint_for
from edgeq.cli.help import Command, parameters
from edgeq.errors import EdgeqError, UsageError
from edgeq.formats.mapped import guard_when_mapped
from edgeq.guard import guard_mapped_files
from edgeq.shortage import exit_on_shortage, is_shortage, prepare

__all__ = ["COMMANDS", "app", "main"]

COMMANDS = (
    "quantize",
    "export",
    "chat",
    "generate",
    "bench",
    "eval",
    "kld",
    "info",
    "fit",
    "doctor",
    "clean",
)  # each a function in a module of its name


class _CommandTable(UserDict[str, Any]):
    """The commands by name. Each is imported when it is wanted, so that none waits for another's libraries."""

    def __getitem__(self, name: str) -> Any:
        if self.data[name] is None:
            alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
            alone.command(name, cls=Command)(getattr(import_module(f"edgeq.cli.{name}"), name))
            self.data[name] = typer.main.get_command(alone)
        return self.data[name]


class _Commands(TyperGroup):
    """Runs a command and turns what went wrong into one line and an exit code."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _CommandTable(dict.fromkeys(COMMANDS))

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        ctx.meta[__name__] = tuple(args)
        if not args:  # then help is shown
            return super().parse_args(ctx, args)
        with _reported(ctx, debug=False):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _reported(ctx, debug=bool(ctx.params.get("debug"))):
            ctx.default_map = read_config_file(
                lambda: {name: parameters(command) for name, command in self.commands.items()}
            )
            return super().invoke(ctx)


@contextmanager
def _reported(ctx: Any, *, debug: bool) -> Iterator[None]:
    """What went wrong becomes one line on stderr, perhaps a hint and what it leaves behind, and an exit code."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        report_notes(interrupt)
        raise typer.Exit(130) from None
    except SystemExit as ended:  # by a signal
        report_notes(ended)
        raise
    except BrokenPipeError:  # the reader of our output has left: nothing more to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except (EdgeqError, OSError, _Misuse) as error:
        if debug or is_shortage(error):  # the latter is `main`'s, whatever it is called
            raise
        told = _as_edgeq_error(error, ctx)
        report_error(told)
        report_notes(error)
        raise typer.Exit(told.exit_code) from None


_Misuse: Any = typer.BadParameter.__mro__[1]  # click's UsageError, wherever typer has it from


def _as_edgeq_error(error: BaseException, ctx: Any) -> EdgeqError:
    if isinstance(error, _Misuse):
        command = " ".join(filter(None, (ctx.command_path, ctx.invoked_subcommand)))
        message = error.format_message().rstrip(".")
        known = "its options" if ctx.invoked_subcommand else "commands and options"
        hint = hint_for(ctx.meta[__name__]) or f"`{command} --help` lists {known}"
        return UsageError(message[:1].lower() + message[1:] + _not_typed(error), hint=hint)
    return error if isinstance(error, EdgeqError) else EdgeqError(str(error))


def _not_typed(error: Any) -> str:
    """Where a wrong value comes from, if not from the command line."""
    ctx, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    if ctx is None or parameter is None:
        return ""
    source = ctx.get_parameter_source(parameter.name)
    if source is None or source.name not in ("ENVIRONMENT", "DEFAULT_MAP"):
        return ""
    return f" (from {parameter.envvar if source.name == 'ENVIRONMENT' else 'the configuration file'})"


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(wanted: bool) -> None:
    if wanted:
        show(f"edgeq {edgeq.__version__}")
        raise typer.Exit


@app.callback()
def edgeq_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", envvar="EDGEQ_DEBUG", help="Show a traceback on errors.")] = False,
) -> None:
    """Quantize and run Qwen3.5 0.8B, 2B and 4B on laptops, Macs and Raspberry Pi."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits the process."""
    prepare_streams()
    with suppress(ValueError):  # outside the main thread Python allows no signal handlers
        for name in ("SIGTERM", "SIGHUP"):  # an exception, so that half-written files are removed
            _exit_on(getattr(signal, name, None))
    warnings.showwarning = show_warning
    given = list(sys.argv[1:] if arguments is None else arguments)
    with exit_on_shortage(debug="--debug" in given or bool(os.environ.get("EDGEQ_DEBUG"))):
        prepare()
        guard_when_mapped(guard_mapped_files)
        app(given, prog_name="edgeq")


def _exit_on(number: signal.Signals | None) -> None:
    if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
        signal.signal(number, lambda received, _: sys.exit(128 + received))
