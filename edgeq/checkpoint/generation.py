"""What a checkpoint recommends for generation: the ids that stop it, and sampling.

Recommendations are laid over the preset of a conversation's mode, and none of them is worth refusing a model. "Off" in
its spellings (null, -1, "off") and keys that edgeq does not know say nothing; a value that cannot be is left out, and
told once it would have been used: what the user chose instead need not be right in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeq.errors import ModelError
from edgeq.numbers import SAMPLING
from edgeq.printable import brief

__all__ = ["RECOMMENDED", "Recommended", "read_sampling", "read_stop_ids", "recommended"]

RECOMMENDED = (
    "temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"
)  # fmt: skip
"""The settings that a file may recommend, as GenerationSettings and generation_config.json name them."""

_OFF = ("", "off", "none", "null", "default", "disabled")
_MAX_STOP_IDS, _MAX_ID = 1 << 10, 1 << 31


@dataclass(frozen=True)
class Recommended:
    """values: what is in range, by field of GenerationSettings. left_out: what is wrong with the others."""

    where: str = ""
    values: Mapping[str, float] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


def read_stop_ids(values: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """`eos_token_id` of a generation_config.json: an id or a list of ids."""
    stop = values.get("eos_token_id")
    ids = [] if stop is None else stop if isinstance(stop, list) else [stop]
    if len(ids) > _MAX_STOP_IDS or not all(type(i) is int and 0 <= i < _MAX_ID for i in ids):
        raise ModelError(f"{where}: eos_token_id is {brief(stop)}, expected an id or a list of ids")
    return tuple(ids)


def read_sampling(values: Mapping[str, Any], where: str) -> Recommended:
    """The sampling that a generation_config.json recommends."""
    given = {name: values.get(name) for name in RECOMMENDED}
    if values.get("do_sample") is False:
        given["temperature"] = 0
    return recommended(given, where)


def recommended(given: Mapping[str, object], where: str, keys: Mapping[str, str] | None = None) -> Recommended:
    """`given` by setting, as the file `where` has it under `keys` (None: by the settings' names), judged."""
    values, left_out = dict[str, float](), dict[str, str]()
    for name, value in given.items():
        if _says_nothing(name, value):
            continue
        allowed = SAMPLING[name]
        if allowed.whole and type(value) is float and value.is_integer():  # 20.0
            value = int(value)
        if isinstance(value, int | float) and allowed.holds(value):
            values[name] = value
        else:
            left_out[name] = f"{(keys or {}).get(name, name)} must be {allowed.wanted(value)}, got {brief(value)}"
    return Recommended(where, values, left_out)


def _says_nothing(name: str, value: object) -> bool:
    """Whether a value is one of those with which people leave a setting off."""
    if isinstance(value, str):
        return value.strip().lower() in _OFF
    return value is None or value is False or (name == "top_k" and value == -1)
