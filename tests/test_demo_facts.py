"""What the demo model knows by heart (tools/demo/facts.toml) is consistent."""

from __future__ import annotations

import re

import pytest
from demo import facts


@pytest.mark.parametrize("fact", facts.ABOUT + facts.SMALL_TALK, ids=lambda fact: fact.questions[0])
def test_answers_contain_their_keywords(fact: facts.Fact) -> None:
    assert fact.keyword == fact.keyword.lower()
    assert fact.keyword in fact.answer.lower()


def test_a_question_has_one_answer() -> None:
    questions = [question for fact in facts.ABOUT + facts.SMALL_TALK for question in fact.questions]
    assert len(set(questions)) == len(questions)


def test_every_slot_of_a_question_can_be_filled() -> None:
    slots = {slot for question in facts.UNKNOWN_QUESTIONS for slot in re.findall(r"{(\w+)}", question)}
    assert slots == set(facts.UNKNOWN_SLOTS)
    assert all(facts.UNKNOWN_SLOTS.values())


@pytest.mark.parametrize("name", ["ANIMALS", "CITIES", "COLOURS", "FOODS", "JOBS", "NAMES", "WORDS"])
def test_lists_of_words_have_no_doubles(name: str) -> None:
    words = getattr(facts, name)
    assert len(set(words)) == len(words)
