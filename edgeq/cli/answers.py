"""What an answer is to fit, as the command line gives it: a schema or a grammar in a file or as it is, biases."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from edgeq.cli.console import warn
from edgeq.cli.prompt import file_text
from edgeq.errors import UsageError
from edgeq.generate import StopReason
from edgeq.printable import brief
from edgeq.session.reply import Reply

__all__ = ["read_biases", "read_shape", "warn_of_a_cut"]

_ITSELF = {"schema": re.compile(r"\s*[{\[]"), "grammar": re.compile(r"\s*[\w-]+\s*(::=|:\s)|.*\n", re.DOTALL)}
_BIAS = re.compile(r"(\d{1,9})(?:=|(?=[-+]))([-+]?\d+(?:\.\d*)?)", re.ASCII)


def read_shape(kind: str, given: str | None) -> str | None:
    """The text of a schema or a grammar: what is given where it reads as one, else that of a file."""
    if given is None or _ITSELF[kind].match(given):
        return given
    return file_text(Path(given))


def warn_of_a_cut(reply: Reply, given: Mapping[str, object]) -> None:
    """Say so if a reply ended where it does not fit what was `given`."""
    shape = next((kind for kind in ("schema", "regex", "grammar") if kind in given), None)
    if shape and reply.finish.reason not in (StopReason.COMPLETE, StopReason.STOP_TOKEN):
        warn(f"the answer was cut off, so it does not fit the {shape}")


def read_biases(given: Iterable[str]) -> dict[int, float]:
    """Biases by token id: each as ID=BIAS, or ID+BIAS and ID-BIAS as llama.cpp has it."""
    biases = {}
    for text in given:
        found = _BIAS.fullmatch(text)
        if found is None:
            raise UsageError(f"a logit bias must be a token's id and a number, got {brief(text)}", hint="as in 42=-5")
        biases[int(found[1])] = float(found[2])
    return biases
