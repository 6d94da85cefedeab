"""A conversation: what it begins with, the tools in it, and what is kept of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from edgeq.cli.options.groups import option
from edgeq.cli.options.model import chat_template_option
from edgeq.errors import UsageError
from edgeq.printable import brief, one_line

if TYPE_CHECKING:
    from edgeq.api import Model
    from edgeq.cli.tools import ToolRunner

__all__ = ["ConversationOptions", "PrefixOptions", "ToolOptions"]

_KWARGS_EXAMPLE = """--chat-template-kwargs '{"enable_thinking": true}'"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationOptions:
    """How the model is to behave in a conversation."""

    title: ClassVar[str] = "Conversation"

    system: Annotated[
        str | None, option("--system", "-sys", "--system-prompt", metavar="TEXT", default="none", help="System prompt.")
    ] = None
    system_file: Annotated[
        Path | None,
        option(
            "--system-file", "-sysf", "--system-prompt-file", metavar="FILE", default="none", env=False,
            help="Read the system prompt from a text file.",
        ),
    ] = None  # fmt: skip
    messages: Annotated[
        Path | None,
        option(
            "--messages", metavar="FILE", default="none", env=False,
            help="Go on with the messages in a JSON file, as OpenAI's interfaces have them; - reads stdin.",
        ),
    ] = None  # fmt: skip
    document: Annotated[
        list[Path] | None,
        option(
            "--document", metavar="FILE", default="none", env=False,
            help="Talk about a text file, which is read once and kept; repeatable.",
        ),
    ] = None  # fmt: skip
    session: Annotated[
        Path | None,
        option(
            "--session", metavar="FILE", default="none", env=False,
            help="Go on with the conversation in this file, or begin one there; it is saved after every turn.",
        ),
    ] = None  # fmt: skip
    assistant_prefix: Annotated[
        str | None,
        option(
            "--assistant-prefix", metavar="TEXT", default="none", env=False,
            help="Begin the answer with this text, without thinking (single prompt only).",
        ),
    ] = None  # fmt: skip
    overflow: Annotated[
        str,
        option(
            "--overflow", metavar="HOW",
            help="When the context window is full: stop, or shift, which forgets the oldest turns.",
        ),
    ] = "stop"  # fmt: skip
    think: Annotated[
        bool | None,
        option(
            "--think/--no-think", " /--nothink", default="the chat template's choice", help="Think before answering."
        ),
    ] = None
    thinking_budget: Annotated[
        int | None,
        option(
            "--thinking-budget", "--reasoning-budget", metavar="N", default="no limit",
            help="Maximum thinking tokens; then the answer starts.",
        ),
    ] = None  # fmt: skip

    chat_template: Annotated[str | None, chat_template_option(env=True)] = None
    chat_template_kwargs: Annotated[
        str | None,
        option(
            "--chat-template-kwargs", metavar="JSON", default="none",
            help="Variables for the chat template, as a JSON object.",
        ),
    ] = None  # fmt: skip

    def given(self) -> dict[str, Any]:
        """Arguments for `Model.chat`."""
        from edgeq.cli.prompt import file_text, without_last_newline

        system = self.system
        if self.system_file is not None:
            if system is not None:
                raise UsageError("two system prompts given, with --system and --system-file", hint="give one")
            system = without_last_newline(file_text(self.system_file, lenient=True))
        if self.overflow not in ("stop", "shift"):
            raise UsageError(f"--overflow is stop or shift, got {self.overflow}")
        kwargs = self._template_kwargs()
        return {
            "documents": self.documents(),
            "overflow": self.overflow,
            "system": system,
            "thinking": self.think,
            "thinking_budget": self.thinking_budget,
            **({"template_kwargs": kwargs} if kwargs else {}),
        }

    def documents(self) -> list[tuple[str, str]]:
        """The documents by name, as `Model.chat` takes them."""
        from edgeq.cli.prompt import file_text

        return [(file.name, file_text(file, lenient=True)) for file in self.document or ()]

    def _template_kwargs(self) -> dict[str, Any]:
        try:
            kwargs = json.loads(self.chat_template_kwargs or "{}")
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"--chat-template-kwargs is not JSON: {one_line(error)}", hint=f"as in {_KWARGS_EXAMPLE}"
            ) from None
        if not isinstance(kwargs, dict):
            raise UsageError(
                f"--chat-template-kwargs is {brief(kwargs)}, expected an object", hint=f"as in {_KWARGS_EXAMPLE}"
            )
        from edgeq.text.messages import check_kwargs

        check_kwargs(kwargs)  # before a model is downloaded and loaded for nothing
        return kwargs


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixOptions:
    """What is kept of what was read, for later."""

    title: ClassVar[str] = "Prefixes"

    cache_dir: Annotated[
        str | None,
        option(
            "--cache-dir", metavar="FOLDER[:SIZE]", default="memory only",
            help="Keep what was read in FOLDER too, so that no later run reads it again.",
        ),
    ] = None  # fmt: skip
    cache_size: Annotated[
        str | None,
        option(
            "--cache-size", metavar="SIZE", default="4G, or half of what is free on the disk",
            help="Maximum size of the folder, as in 500M or 4G; alone, of the one in the user's cache.",
        ),
    ] = None  # fmt: skip

    def use(self, model: Model, *, once: bool, default: bool = False) -> None:
        """Let a model keep its prefixes as is asked for; nothing in memory where it is asked only `once`. default: on
        disk in any case.
        """
        from edgeq.session.prefix_files import default_folder, split_folder

        folder, size = (default_folder(), None) if self.cache_dir is None else split_folder(self.cache_dir)
        if size is not None and self.cache_size is not None:
            raise UsageError("two sizes given, with --cache-dir and --cache-size", hint="give one")
        if default or self.cache_dir is not None or self.cache_size is not None:
            model.keep_prefixes(folder, self.cache_size or size)
        elif once:
            model.prefixes.limit = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolOptions:
    """Functions that the model may call, and what runs them."""

    title: ClassVar[str] = "Tools"

    tools: Annotated[
        Path | None,
        option(
            "--tools", metavar="FILE", default="none", env=False,
            help="JSON file with the functions that the model may call, as in OpenAI's interface.",
        ),
    ] = None  # fmt: skip
    tools_run: Annotated[
        str | None,
        option(
            "--tools-run", metavar="COMMAND", default="none", env=False,
            help="Run COMMAND NAME for each call, with the call as JSON on its stdin; what it prints is the result.",
        ),
    ] = None  # fmt: skip
    yes: Annotated[bool, option("--yes", "-y", env=False, help="Run it without asking.")] = False
    tool_rounds: Annotated[
        int, option("--tool-rounds", metavar="N", minimum=1, help="Maximum rounds of calls for a question.")
    ] = 8
    tool_timeout: Annotated[
        int, option("--tool-timeout", metavar="SECONDS", minimum=1, help="Time limit of a call.")
    ] = 60

    def given(self) -> dict[str, Any]:
        """Arguments for `Model.chat`."""
        from edgeq.cli.tools import read_tools

        return {"tools": read_tools(self.tools)} if self.tools else {}

    def runner(self) -> ToolRunner | None:
        """What runs the calls; None if nothing does. UsageError for what cannot be run, or not be asked for."""
        from edgeq.cli.tools import ToolRunner

        if self.tools_run is None:
            if self.yes:
                raise UsageError("--yes is about --tools-run, which is not given")
            return None
        if self.tools is None:
            raise UsageError("--tools-run needs --tools, the functions that the model may call")
        return ToolRunner(self.tools_run, ask=not self.yes, rounds=self.tool_rounds, timeout=self.tool_timeout)
