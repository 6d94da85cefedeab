"""The table of options that commands share, in groups.

A group is a frozen dataclass whose fields are options. A command takes groups as parameters, and `command` makes their
fields its options:

    @command
    def chat(*, sampling: SamplingOptions, model: ModelOptions) -> None:
        model.load().chat(**sampling.given())

The first long name of an option is its own: help shows it, and its environment variable is called after it. The names
behind it are those of llama.cpp, ollama and mlx-lm.
"""

from __future__ import annotations

from edgeq.cli.options.conversation import ConversationOptions, PrefixOptions, ToolOptions
from edgeq.cli.options.groups import command, option
from edgeq.cli.options.model import (
    MODEL_HELP,
    AdapterOption,
    BackendOption,
    ContextOption,
    DraftOption,
    KvBitsOption,
    MemoryOption,
    ModelArgument,
    ModelOptions,
    OptionalModelArgument,
    ThreadsOption,
    chat_template_option,
)
from edgeq.cli.options.prompt import PromptArgument, PromptOptions, VisualOptions
from edgeq.cli.options.reply import AnswerOptions, ChatDisplayOptions, DisplayOptions, JsonOptions, SamplingOptions

__all__ = [
    "MODEL_HELP",
    "AdapterOption",
    "AnswerOptions",
    "BackendOption",
    "ChatDisplayOptions",
    "ContextOption",
    "ConversationOptions",
    "DisplayOptions",
    "DraftOption",
    "JsonOptions",
    "KvBitsOption",
    "MemoryOption",
    "ModelArgument",
    "ModelOptions",
    "OptionalModelArgument",
    "PrefixOptions",
    "PromptArgument",
    "PromptOptions",
    "SamplingOptions",
    "ThreadsOption",
    "ToolOptions",
    "VisualOptions",
    "chat_template_option",
    "command",
    "option",
]
