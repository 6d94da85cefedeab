"""The checkpoint's own chat template: messages to prompt text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Self

import jinja2

from edgeq.config import read_json
from edgeq.errors import ModelError
from edgeq.inputs import read_text
from edgeq.printable import one_line
from edgeq.text.sandbox import MAX_OUTPUT, Sandbox

__all__ = ["ChatTemplate", "Content", "Message"]

Content = str | Sequence[Mapping[str, Any]]
"""What a message says: text, or parts such as {"type": "text", "text": ...} and {"type": "image"}."""

Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": Content, ...} as OpenAI's interface writes it."""


class ChatTemplate:
    """A Jinja chat template, run in a sandbox: whatever is wrong with it ends as a ModelError."""

    def __init__(self, source: str, name: str = "chat_template.jinja") -> None:
        self.source = source
        self.name = name
        self._sandbox = Sandbox()
        self._lock = Lock()  # one tank of fuel, one render at a time
        try:
            source.encode()  # lone surrogates are how protected text is told from the template's
            self._template = self._sandbox.compile_template(source)
        except Exception as error:
            raise ModelError(f"{name} is not a usable chat template: {_one_line(error)}") from None

    @classmethod
    def from_folder(cls, path: Path) -> Self:
        """`chat_template.jinja` in `path`, else the `chat_template` of its tokenizer_config.json."""
        file = path / "chat_template.jinja"
        try:
            return cls(read_text(file))
        except FileNotFoundError:
            pass
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{file} cannot be read: {one_line(error)}") from None
        source = read_json(path / "tokenizer_config.json").get("chat_template")
        if not isinstance(source, str):
            raise ModelError(
                f"{path} has no chat template, neither chat_template.jinja nor in tokenizer_config.json",
                hint="`edgeq generate` completes plain text without one",
            )
        return cls(source, "tokenizer_config.json: chat_template")

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        enable_thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt text of `messages`; `enable_thinking=None` leaves thinking to the template's default."""
        if enable_thinking is not None:
            kwargs["enable_thinking"] = enable_thinking
        variables = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt, **kwargs}
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
        reply = {"role": "assistant", "reasoning_content": "THINKING", "content": "ANSWER"}
        text = self.render([{"role": "user", "content": "?"}, reply], add_generation_prompt=False)
        between, found, _ = text.partition("THINKING")[2].partition("ANSWER")
        return between if found else ""


def _one_line(error: Exception) -> str:
    """The message of an error raised by or for a template, short enough for a prompt."""
    line = getattr(error, "lineno", None) if isinstance(error, jinja2.TemplateSyntaxError) else None
    return f"line {line}: {one_line(error)}" if line else one_line(error)
