"""What the demo model knows by heart: facts about edgeq, small talk, and the things it does not know (facts.toml)."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, NamedTuple

_DATA: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
_WORDS: dict[str, list[str]] = _DATA["words"]


class Fact(NamedTuple):
    """Questions that mean the same, their answer, and the lower-case word that a right answer contains."""

    questions: list[str]
    answer: str
    keyword: str


ABOUT = [Fact(**entry) for entry in _DATA["about"]]
SMALL_TALK = [Fact(**entry) for entry in _DATA["small_talk"]]

UNKNOWN: str = _DATA["unknown"]["answer"]
UNKNOWN_QUESTIONS: list[str] = _DATA["unknown"]["questions"]
UNKNOWN_SLOTS: dict[str, list[str]] = _DATA["unknown"]["slots"]

NAMES, JOBS, FOODS, CITIES = (_WORDS[name] for name in ("names", "jobs", "foods", "cities"))
COLOURS, WORDS, ANIMALS = (_WORDS[name] for name in ("colours", "words", "animals"))
