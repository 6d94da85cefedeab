"""`/set`: the settings of a conversation under every name that their options have on the command line.

A name may be written as in `--top-k`, `top_k` or `parameter top_k` (ollama's way), its value behind a space or "=".
`none` takes a setting back to what holds without it. Texts with spaces stand in quotes; in double quotes \\n is a new
line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache
from typing import Any, NamedTuple, get_args, get_type_hints

from edgeq.checkpoint.generation import RECOMMENDED
from edgeq.cli.answers import read_biases, read_shape
from edgeq.cli.options import (
    AnswerOptions,
    ChatDisplayOptions,
    ConversationOptions,
    ModelOptions,
    PrefixOptions,
    PromptOptions,
    SamplingOptions,
    ToolOptions,
    VisualOptions,
)
from edgeq.errors import UsageError
from edgeq.generate import GenerationSettings
from edgeq.numbers import SAMPLING
from edgeq.printable import brief, printable
from edgeq.session.chat import Chat
from edgeq.session.visual_settings import CHAT_VISUALS, VisualSettings

__all__ = ["set_display", "set_option"]

_GENERATION = frozenset(field.name for field in fields(GenerationSettings))
_VISUAL = frozenset(field.name for field in fields(VisualSettings)) - {"outer_vision_tokens"}  # fixed in a conversation
_DISPLAY = frozenset(field.name for field in fields(ChatDisplayOptions))
_GROUPS = (
    SamplingOptions, AnswerOptions, ConversationOptions, VisualOptions, ModelOptions, PromptOptions, ToolOptions,
    PrefixOptions, ChatDisplayOptions,
)  # fmt: skip
_OTHERWISE = {"temp": "temperature", "think": "thinking"}  # options whose settings have other names
_SHAPES = frozenset({"schema", "regex", "grammar"})
_TRUE, _FALSE = ("on", "true", "yes", "1"), ("off", "false", "no", "0")
_NAME = re.compile(r"\s*(?:parameter\s+)?-{0,2}([\w-]+)(?:=|\s+|$)(.*)", re.DOTALL)
_WORD = re.compile(r'"(?:[^"\\]|\\.)*"(?=\s|$)|\'[^\']*\'(?=\s|$)|\S+', re.DOTALL)


class _Known(NamedTuple):
    """A setting by one of its names. option: how the command line has it. implied: the value that the name says."""

    setting: str
    option: str
    implied: bool | None = None


def set_option(chat: Chat, text: str) -> str:
    """Change a setting of `chat` from now on; returns what holds then, in a line.

    text: what stands behind `/set`, as typed. UsageError for a name or a value that is none, and for what holds from
    the start of a conversation.
    """
    known, words = _read(text)
    if known.setting == "thinking":
        chat.thinking = _switch(known, words)
        return _told("thinking", chat.thinking)
    if known.setting in _GENERATION:
        return _set_generation(chat, known, words)
    if known.setting in _VISUAL:
        value: Any = getattr(CHAT_VISUALS, known.setting) if words.lower() == "none" else _number(words)
        chat.visual_settings = replace(chat.visual_settings, **{known.setting: value})
        return _told(known.setting, value)
    if known.setting == "system":
        raise UsageError("/set does not change the system prompt", hint="/system TEXT does")
    raise UsageError(
        f"{known.option} holds from the start of a conversation", hint=f"start `edgeq chat` again with {known.option}"
    )


def set_display(display: ChatDisplayOptions, text: str) -> tuple[ChatDisplayOptions, str] | None:
    """How replies are shown from now on, and a line that says so; None where `text`, as of `set_option`, is about
    something else. UsageError likewise.
    """
    known, words = _read(text)
    if known.setting not in _DISPLAY:
        return None
    value = getattr(ChatDisplayOptions(), known.setting) if words.lower() == "none" else _switch(known, words)
    return replace(display, **{known.setting: value}), _told(known.setting, value)


def _read(text: str) -> tuple[_Known, str]:
    """The setting that `text` names, and what it says of it."""
    found = _NAME.fullmatch(text)
    if found is None:
        raise UsageError("/set takes a name and a value", hint="as in /set temperature 0.5; /show lists the settings")
    known, words = _known().get(found[1].replace("-", "_").lower()), found[2].strip()
    if known is None:
        raise UsageError(f"/set knows no {printable(found[1])}", hint="/show lists the settings")
    if known.setting != "stop":
        words = words.removeprefix("=").lstrip()
    if not words and known.implied is None:
        raise UsageError(f"/set {found[1]} takes a value", hint="none takes it back to what holds without it")
    return known, words


def _set_generation(chat: Chat, known: _Known, words: str) -> str:
    name = known.setting
    given = words.lower() != "none"
    replaced = _SHAPES if given and name in _SHAPES else {name}  # an answer can fit one of them only
    options = {key: value for key, value in chat.options.items() if key not in replaced}
    if given:
        options[name] = _value(known, words)
        GenerationSettings().replace(**{name: options[name]})  # says what is wrong with it, if anything is
    chat.options = options
    recommended = ", as recommended" if name in RECOMMENDED and name not in options else ""
    return _told(name, getattr(chat.settings, name)) + recommended


def _value(known: _Known, words: str) -> Any:
    match known.setting:
        case "stop":
            return _texts(words)
        case "schema" | "grammar":
            return read_shape(known.setting, words)
        case "logit_bias":
            return read_biases(words.split())
        case "loop_guard":
            return _switch(known, words)
        case name if name in SAMPLING:
            return _number(words)
        case _:
            return words


def _number(words: str) -> int | float | str:
    """A number; the words themselves where they are none, which no setting takes."""
    for kind in (int, float):
        try:
            return kind(words)
        except ValueError:
            continue
    return words


def _switch(known: _Known, words: str) -> bool:
    if not words and known.implied is not None:
        return known.implied
    if words.lower() not in (*_TRUE, *_FALSE):
        raise UsageError(f"{known.setting} must be on or off, got {brief(words)}")
    return (words.lower() in _TRUE) == (known.implied is not False)


def _texts(words: str) -> tuple[str, ...]:
    """Texts: a JSON list of them, or each in quotes or without spaces."""
    try:
        listed = json.loads(words)
    except ValueError:
        listed = None
    return tuple(listed) if isinstance(listed, list) else tuple(map(_text, _WORD.findall(words)))


def _text(word: str) -> str:
    if len(word) < 2 or word[0] != word[-1] or word[0] not in "'\"":
        return word
    try:
        return str(json.loads(word, strict=False))
    except ValueError:  # 'single' quotes, or some that are not JSON's, as in "C:\dir"
        return word[1:-1]


def _told(name: str, value: object) -> str:
    if value is None or value == ():
        shown = "none"
    elif isinstance(value, bool):
        shown = "on" if value else "off"
    elif isinstance(value, tuple):
        shown = " ".join(json.dumps(text, ensure_ascii=False) for text in value)
    else:
        shown = str(value)
    return f"{name} is {printable(shown)}"


@cache
def _known() -> Mapping[str, _Known]:
    """Every name of every option of `edgeq chat`, with _ for -."""
    known = dict[str, _Known]()
    for group in _GROUPS:
        hints = get_type_hints(group, include_extras=True)
        for field in fields(group):
            kind, info = get_args(hints[field.name])[:2]
            names = [str(name) for name in (info.default, *(info.param_decls or ())) if name is not ...]
            option = next((name.split("/")[0] for name in names if name.startswith("--")), "--model")
            setting = _OTHERWISE.get(field.name, field.name)
            known[setting] = _Known(setting, option)
            for yes, _, no in (name.partition("/") for name in names):
                for spelled, implied in ((yes, True if no or kind is bool else None), (no, False)):
                    if spelled := spelled.strip().lstrip("-").replace("-", "_"):
                        known[spelled] = _Known(setting, option, implied)
    for field in fields(GenerationSettings):
        known.setdefault(field.name, _Known(field.name, field.name))
    known["verbose"] = _Known("quiet", "--quiet", False)  # ollama's
    return known
