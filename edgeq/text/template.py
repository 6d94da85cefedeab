"""The checkpoint's own chat template: messages to prompt text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Self

import jinja2

from edgeq.config import read_json
from edgeq.errors import ModelError
from edgeq.inputs import exists
from edgeq.printable import one_line
from edgeq.text.sandbox import MAX_OUTPUT, Sandbox
from edgeq.text.template_files import ANOTHER_TEMPLATE, read_templates
from edgeq.text.tokenizer import special_tokens

__all__ = ["ChatTemplate", "Content", "Message"]

Content = str | Sequence[Mapping[str, Any]]
"""What a message says: text, or parts such as {"type": "text", "text": ...} and {"type": "image"}."""

Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": Content, ...} as OpenAI's interface writes it."""


class ChatTemplate:
    """A Jinja chat template, run in a sandbox: whatever is wrong with it ends as a ModelError.

    variables: what it sees besides the messages, such as the special tokens by name.
    """

    def __init__(
        self, source: str, name: str = "chat_template.jinja", variables: Mapping[str, Any] | None = None
    ) -> None:  # fmt: skip
        self.source = source
        self.name = name
        self.variables: Mapping[str, Any] = variables or {}
        self._sandbox = Sandbox()
        self._lock = Lock()  # one tank of fuel, one render at a time
        try:
            source.encode()  # lone surrogates are how protected text is told from the template's
            self._template = self._sandbox.compile_template(source)
        except Exception as error:
            raise ModelError(
                f"{name} is not a usable chat template: {_one_line(error)}", hint=ANOTHER_TEMPLATE
            ) from None

    @classmethod
    def from_folder(cls, path: Path) -> Self:
        """The default template of a checkpoint folder (see `edgeq.text.template_files`)."""
        named, config = read_templates(path).pick(), path / "tokenizer_config.json"
        if named is None:
            raise ModelError(
                f"{path} has no chat template, neither chat_template.jinja nor in tokenizer_config.json",
                hint="`edgeq generate` completes plain text without one",
            )
        return cls(named.source, named.where, special_tokens(read_json(config)) if exists(config) else {})

    def bound(self, variables: Mapping[str, Any]) -> Self:
        """The same template with more variables, or others in their place."""
        other = copy(self)
        other.variables = {**self.variables, **variables}
        for name in ("thinking_default", "thinking_close", "reply_close"):
            vars(other).pop(name, None)
        return other

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        enable_thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt text of `messages`; `enable_thinking=None` leaves thinking to the template's default.

        As in transformers' `apply_chat_template`, fields that are None are as if they were not there, and thinking may
        stand under `reasoning_content`, `reasoning` or `thinking`.
        """
        if enable_thinking is not None:
            kwargs["enable_thinking"] = enable_thinking
        variables = {
            "documents": None, **self.variables, **kwargs, "messages": [_as_templates_expect(m) for m in messages],
            "tools": tools, "add_generation_prompt": add_generation_prompt,
        }  # fmt: skip
        try:
            with self._lock:
                self._sandbox.refuel()
                text = self._template.render(variables)
        except Exception as error:
            raise ModelError(f"{self.name} cannot render these messages: {_one_line(error)}") from None
        if len(text) > MAX_OUTPUT:
            raise ModelError(f"{self.name} makes {len(text)} characters, expected at most {MAX_OUTPUT}")
        return text

    @cached_property
    def thinking_default(self) -> bool:
        """Whether the model thinks if nothing is said about it: the setting that renders like the default."""
        default, on, off = (
            self.render([{"role": "user", "content": "?"}], add_generation_prompt=True, enable_thinking=setting)
            for setting in (None, True, False)
        )
        return default == on != off

    @cached_property
    def thinking_close(self) -> str:
        r"""What stands between the thinking and the answer of a reply (`\n</think>\n\n`); "" if nothing does."""
        between, found, _ = self._finished.partition("THINKING")[2].partition("ANSWER")
        return between if found else ""

    @cached_property
    def reply_close(self) -> str:
        r"""What ends a finished reply (`<|im_end|>\n`)."""
        return self._finished.rpartition("ANSWER")[2]

    @property
    def _finished(self) -> str:
        reply = {"role": "assistant", "reasoning_content": "THINKING", "content": "ANSWER"}
        return self.render([{"role": "user", "content": "?"}, reply], add_generation_prompt=False)


def _as_templates_expect(message: Message) -> dict[str, Any]:
    fields = {key: value for key, value in message.items() if value is not None}
    thoughts = [fields[key] for key in ("reasoning_content", "thinking", "reasoning") if key in fields]
    return {"thinking": thoughts[0], **fields, "reasoning_content": thoughts[0]} if thoughts else fields


def _one_line(error: Exception) -> str:
    """The message of an error raised by or for a template, short enough for a prompt."""
    line = getattr(error, "lineno", None) if isinstance(error, jinja2.TemplateSyntaxError) else None
    return f"line {line}: {one_line(error)}" if line else one_line(error)
