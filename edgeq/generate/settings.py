"""Generation settings and model-card presets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from dataclasses import replace as dataclass_replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgeq.errors import UsageError
from edgeq.numbers import SAMPLING, Range
from edgeq.printable import brief, one_line

if TYPE_CHECKING:
    from edgeq.text.grammar import Shape

__all__ = ["GenerationSettings", "preset"]

_OPTIONAL = ("seed", "max_tokens", "thinking_budget", "max_total_tokens", "logprobs")
_BIAS = Range(-100, 100)  # as OpenAI's interface has it


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How the next token is chosen, and when to stop.

    The defaults are those of a raw completion: livelier than greedy, calmer than the distribution itself, and no
    penalty, because a prompt to complete (code, a list, a table) repeats itself for good reason. Chats start from
    `preset`.
    """

    temperature: float = 0.7
    """Divides the logits; 0 is greedy: the most likely token, the lowest id of equals."""
    top_k: int = 20
    """Sample from the k most likely tokens (and those that tie with the last of them); 0 disables."""
    top_p: float = 0.95
    """Sample from the most likely tokens that together reach this probability; 1 disables."""
    min_p: float = 0.0
    """Drop tokens less likely than this times the most likely one; 0 disables."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of a token that is already in this reply; ignores the prompt."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence of the token in this reply; ignores the prompt."""
    repetition_penalty: float = 1.0
    """Logits of tokens in the prompt or the reply are divided by it if positive, multiplied if negative; 1 disables."""
    seed: int | None = None
    """The same seed, settings and logits give the same tokens; None draws a fresh one."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of it."""
    max_tokens: int | None = None
    """Maximum tokens to generate, excluding thinking; None is until the context is full."""
    thinking_budget: int | None = None
    """Maximum thinking tokens; then the answer starts; None is no limit."""
    max_total_tokens: int | None = None
    """Maximum tokens to generate, thinking and answer together; None is until the context is full."""
    loop_guard: bool = True
    """End thinking, or else the reply, when the output repeats itself."""
    logprobs: int | None = None
    """Tell the log probability of every token, and those of so many of the most likely ones."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of tokens, by id, before everything else; -100 to 100."""
    schema: Any = None
    """JSON schema that the answer fits: an object, its JSON text, or a class of pydantic."""
    regex: str | None = None
    """Regular expression that the whole answer matches."""
    grammar: str | None = None
    """Grammar, in Lark's notation or GBNF, that the whole answer follows."""

    def __post_init__(self) -> None:
        for field in fields(self):  # NumPy's numbers are numbers, and one stop string, or a list, is meant as well
            value = getattr(self, field.name)
            if isinstance(value, np.generic):
                object.__setattr__(self, field.name, value.item())
        stop: Any = self.stop
        stop = (stop,) if isinstance(stop, str) else stop
        if not isinstance(stop, tuple | list) or not all(isinstance(text, str) and text for text in stop):
            raise UsageError(f"stop must be non-empty strings, got {brief(self.stop)}")
        object.__setattr__(self, "stop", tuple(stop))
        if not isinstance(self.loop_guard, bool):
            raise UsageError(f"loop_guard must be True or False, got {brief(self.loop_guard)}")
        for option, allowed in SAMPLING.items():
            value = getattr(self, option)
            if not (allowed.holds(value) or (value is None and option in _OPTIONAL)):
                raise UsageError(f"{option} must be {allowed.wanted(value)}, got {brief(value)}")
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        if self.schema is not None:
            object.__setattr__(self, "schema", _schema_text(self.schema))
        for option in ("regex", "grammar"):
            if not isinstance(getattr(self, option), str | None):
                raise UsageError(f"{option} must be text, got {brief(getattr(self, option))}")
        if len(self._shapes) > 1:
            raise UsageError(f"{' and '.join(dict(self._shapes))} cannot be combined", hint="give one of them")

    @property
    def shape(self) -> Shape | None:
        """What an answer is to fit, if anything."""
        return next(iter(self._shapes), None)

    @property
    def _shapes(self) -> list[Shape]:
        kinds: tuple[Literal["schema", "regex", "grammar"], ...] = ("schema", "regex", "grammar")
        return [(kind, text) for kind in kinds if (text := getattr(self, kind)) is not None]

    def replace(self, **given: Any) -> GenerationSettings:
        """These settings with those of `given` that are not None: what was asked for goes over a preset."""
        names = [field.name for field in fields(self)]
        for option in given:
            if option not in names:
                raise UsageError(f"unknown generation option {option!r}", hint=f"use one of {', '.join(names)}")
        return dataclass_replace(self, **{option: value for option, value in given.items() if value is not None})


def _checked_bias(bias: object) -> dict[int, float]:
    """`bias` by id; ids may also be written as text, as the keys of JSON objects are."""
    if not isinstance(bias, Mapping):
        raise UsageError(f"logit_bias must be an object of token ids and numbers, got {brief(bias)}")
    checked = {}
    for key, value in bias.items():
        key, value = (x.item() if isinstance(x, np.generic) else x for x in (key, value))
        token = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10 else key
        if type(token) is not int or token < 0 or not _BIAS.holds(value):
            raise UsageError(f"logit_bias must be token ids with numbers {_BIAS}, got {brief(key)}: {brief(value)}")
        checked[token] = float(value)
    return checked


def _schema_text(schema: Any) -> str:
    """A JSON schema as JSON text."""
    if isinstance(schema, type) and hasattr(schema, "model_json_schema"):  # pydantic
        schema = schema.model_json_schema()
    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"the schema is not JSON: {one_line(error)}") from None
    if not isinstance(schema, Mapping | bool):
        raise UsageError(f"a JSON schema must be an object, got {brief(schema)}")
    return text


def preset(thinking: bool, vision: bool = False, *, large: bool = False) -> GenerationSettings:
    """What the Qwen3.5 model cards recommend for chats ("Best Practices", sampling parameters).

    | mode, input              | temperature | top_p | presence_penalty |
    |--------------------------|-------------|-------|------------------|
    | thinking, text           | 1.0         | 0.95  | 1.5              |
    | thinking, vision         | 0.6         | 0.95  | 0                |
    | not thinking, text       | 1.0         | 1.0   | 2.0              |
    | not thinking, vision     | 0.7         | 0.8   | 1.5              |

    All with top_k 20, min_p 0 and no repetition penalty. The table is that of the cards of 0.8B and 2B. The 4B's
    (`large`) has the same rows for thinking, and without it 0.7, 0.8 and 1.5 for text as well; that card contradicts
    itself and is known second-hand only.
    """
    if not isinstance(thinking, bool):
        raise UsageError(f"thinking must be True or False, got {brief(thinking)}")
    temperature, top_p, presence_penalty = {
        (True, False): (1.0, 0.95, 1.5),
        (True, True): (0.6, 0.95, 0.0),
        (False, False): (0.7, 0.8, 1.5) if large else (1.0, 1.0, 2.0),
        (False, True): (0.7, 0.8, 1.5),
    }[thinking, vision]
    return GenerationSettings(temperature=temperature, top_p=top_p, presence_penalty=presence_penalty)
