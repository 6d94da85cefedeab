"""What a caller puts into a conversation: checked to be what a template can render, and made safe to render.

Tools and messages are JSON: texts, numbers, lists and objects, of a depth and size that a template can be expected to
print. An object that holds itself, or one that holds the same list a billion times, is not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgeq.errors import UsageError
from edgeq.printable import brief
from edgeq.text.tokenizer import Tokenizer

__all__ = [
    "ROLES", "check_kwargs", "check_thinking", "checked_messages", "protected_kwargs", "protected_message",
    "protected_tools",
]  # fmt: skip

ROLES = ("system", "user", "assistant", "tool")
_MAX_DEPTH = 64
_MAX_VALUES = 1 << 18


def check_thinking(thinking: object) -> None:
    """UsageError unless `thinking` is True, False or None."""
    if thinking is not None and not isinstance(thinking, bool):
        raise UsageError(f"thinking must be True, False or None, got {brief(thinking)}")


def checked_messages(messages: object) -> list[dict[str, Any]]:
    """Messages of a history, as OpenAI's interfaces write them, in the form that chat templates take.

    The arguments of tool calls, which those interfaces write as a text of JSON, become objects. Raises UsageError for
    what is no message, for calls that are no calls and for results of calls that nobody made.
    """
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        raise UsageError(f"messages must be a list of objects, got {brief(messages)}", hint='"role" and "content" each')
    checked, calls = list[dict[str, Any]](), set[object]()
    for i, message in enumerate(messages):
        where, fields = f"message {i + 1}", dict(message)
        if not isinstance(fields.get("role"), str):
            raise UsageError(f"{where} has the role {brief(fields.get('role'))}", hint="name its role")
        if fields.get("function_call") is not None:
            raise UsageError(f"{where} has a function_call", hint="write it as one of tool_calls")
        if fields.get("tool_calls") is not None:
            fields["tool_calls"] = _checked_calls(fields["tool_calls"], where)
            calls |= {call["id"] for call in fields["tool_calls"] if "id" in call}
        answered = fields.get("tool_call_id") if fields["role"] == "tool" else None
        if answered is not None and calls and answered not in calls:
            raise UsageError(
                f"{where} has the result of the tool call {brief(answered)}, which no message before it made",
                hint="give it the id of one of the assistant's tool_calls",
            )
        checked.append(fields)
    return checked


def _checked_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects."""
    if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
        raise UsageError(f"{where} has the tool_calls {brief(calls)}", hint="give a list of objects")
    checked = list[dict[str, Any]]()
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UsageError(
                f"{where} has the tool call {brief(dict(call))}",
                hint='write {"function": {"name": ..., "arguments": ...}}',
            )
        arguments = function.get("arguments")
        try:
            found = json.loads(arguments or "{}") if isinstance(arguments, str | None) else arguments
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, Mapping):
            raise UsageError(
                f"{where} calls {brief(function['name'])} with the arguments {brief(arguments)}",
                hint="give an object, or the text of one in JSON",
            )
        function = {**function, "arguments": found}
        checked.append({**call, "function": function} if "function" in call else function)
    return checked


def _protected_content(content: object, tokenizer: Tokenizer) -> Any:
    """What a message says, text or a list of parts, with every text in it protected (see `Tokenizer.protect`)."""
    parts = content if isinstance(content, list | tuple) else None
    if not isinstance(content, str) and (parts is None or not all(isinstance(part, Mapping) for part in parts)):
        raise UsageError(f"a message must be text or a list of parts, got {brief(content)}")
    return _Protector(tokenizer, "the message").value(content)


def protected_message(message: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """A message of a history, `{"role": ..., "content": ..., ...}`, with every text in it protected.

    An assistant's thinking within its content, `<think>...</think>answer`, is moved into a field of its own first, as
    the family's template does, which would not find it in protected text.
    """
    fields = dict(message)
    content, assistant = fields.pop("content", None), fields["role"] == "assistant"
    if assistant and isinstance(content, str) and "</think>" in content and fields.get("reasoning_content") is None:
        fields["reasoning_content"], content = _thought_and_answer(content)
    said = None if assistant and content is None else _protected_content(content, tokenizer)
    protected = _Protector(tokenizer, "the message").value(fields)
    if fields["role"] in ROLES:  # which templates compare; a token may be spelled like one
        protected["role"] = fields["role"]
    return {**protected, "content": said}


def _thought_and_answer(text: str) -> tuple[str, str]:
    """What stands in `text` before the first `</think>`, after a `<think>` if there is one, and behind the last."""
    thought = text.partition("</think>")[0].rstrip("\n").rpartition("<think>")[2]
    return thought.lstrip("\n"), text.rpartition("</think>")[2].lstrip("\n")


def protected_tools(tools: object, tokenizer: Tokenizer) -> Any:
    """Descriptions of tools, a list of objects or None, with every text in them protected."""
    if tools is not None and (
        isinstance(tools, str) or not isinstance(tools, Sequence) or not all(isinstance(t, Mapping) for t in tools)
    ):
        raise UsageError(f"tools must be a list of objects, got {brief(tools)}", hint="put a single one into a list")
    protected = _Protector(tokenizer, "tools").value(tools)
    _check_functions(tools or ())
    return protected


def _check_functions(tools: Any) -> None:
    """UsageError for tools that a model cannot call: without a name, or with another's."""
    names = list[Any]()
    for tool in tools:
        function = tool.get("function", tool)
        names.append(function.get("name") if isinstance(function, Mapping) else None)
        if not isinstance(names[-1], str) or not names[-1]:
            raise UsageError(
                f"a tool has no name: {brief(tool)}", hint='write {"type": "function", "function": {"name": ...}}'
            )
        if not isinstance(function.get("parameters", {}), Mapping | None):
            raise UsageError(
                f"the parameters of the tool {names[-1]} must be a JSON schema, got {brief(function['parameters'])}"
            )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"there are several tools of the name {twice[0]}", hint="name each of them differently")


def check_kwargs(kwargs: Mapping[str, Any]) -> None:
    """UsageError for what is no variable of a chat template, and for those that a conversation fills itself."""
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) and name.isidentifier() for name in kwargs):
        raise UsageError(f"template_kwargs must be an object of values by name, got {brief(kwargs)}")
    for name, instead in _TAKEN.items():
        if name in kwargs:
            raise UsageError(f"template_kwargs has {name!r}, which the conversation fills", hint=instead)
    check_thinking(kwargs.get("enable_thinking"))


def protected_kwargs(kwargs: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Variables for a chat template, with every text in them protected, but for special tokens in the place of the
    checkpoint's own (`eos_token`)."""
    check_kwargs(kwargs)
    protector = _Protector(tokenizer, "template_kwargs")
    own = tokenizer.special_tokens.keys() | {"bos_token", "eos_token", "pad_token", "unk_token"}
    return {n: value if n in own and isinstance(value, str) else protector.value(value) for n, value in kwargs.items()}


_TAKEN = {
    "messages": "give them as messages",
    "tools": "give them as tools",
    "add_generation_prompt": "leave it out: a reply is what follows",
}


class _Protector:
    """Copies a JSON value with its texts protected: no special token is recognised in them once they are rendered."""

    def __init__(self, tokenizer: Tokenizer, what: str) -> None:
        self._tokenizer, self._what = tokenizer, what
        self._left = _MAX_VALUES

    def value(self, value: Any, depth: int = 0) -> Any:
        self._left -= 1
        if depth > _MAX_DEPTH or self._left < 0:
            raise UsageError(
                f"{self._what} must be JSON of at most {_MAX_DEPTH} levels and {_MAX_VALUES:,} values",
                hint="check that nothing in it holds itself",
            )
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, str):
            return self._tokenizer.protect(value)
        if isinstance(value, Mapping):
            return {self._key(key): self.value(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item, depth + 1) for item in value]
        if value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
            return value
        raise UsageError(f"{self._what} must be JSON, got {brief(value)} in it")

    def _key(self, key: object) -> str:
        if not isinstance(key, str):
            raise UsageError(f"{self._what} must be JSON, got the key {brief(key)} in it")
        return self._tokenizer.protect(key)
