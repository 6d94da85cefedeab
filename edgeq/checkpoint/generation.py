"""What a checkpoint recommends for generation: the ids that stop it, and sampling.

A value of the wrong type or out of range is an error that names file, key and range, as everywhere; null and keys that
edgeq does not know are passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeq.errors import ModelError
from edgeq.numbers import SAMPLING
from edgeq.printable import brief

__all__ = ["checked_sampling", "read_sampling", "read_stop_ids"]

_RECOMMENDED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # of generation_config.json
_MAX_STOP_IDS, _MAX_ID = 1 << 10, 1 << 31


def read_stop_ids(values: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """`eos_token_id` of a generation_config.json: an id or a list of ids."""
    stop = values.get("eos_token_id")
    ids = [] if stop is None else stop if isinstance(stop, list) else [stop]
    if len(ids) > _MAX_STOP_IDS or not all(type(i) is int and 0 <= i < _MAX_ID for i in ids):
        raise ModelError(f"{where}: eos_token_id is {brief(stop)}, expected an id or a list of ids")
    return tuple(ids)


def read_sampling(values: Mapping[str, Any], where: str) -> dict[str, float]:
    """The sampling that a generation_config.json recommends, as GenerationSettings names it."""
    sampling = {name: values[name] for name in _RECOMMENDED if values.get(name) is not None}
    if values.get("do_sample") is False:
        sampling["temperature"] = 0.0
    return checked_sampling(sampling, where)


def checked_sampling(sampling: dict[str, float], where: str) -> dict[str, float]:
    """`sampling` if each of its values is in range; ModelError names the one that is not."""
    for name, value in sampling.items():
        if not SAMPLING[name].holds(value):
            raise ModelError(
                f"{where}: {name} must be {SAMPLING[name].wanted(value)}, got {brief(value)}",
                hint=f"correct {name} in it, or take it out",
            )
    return sampling
