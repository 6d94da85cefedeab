"""The loop guard: every cycle is caught, and nothing that people ask for is."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.generate import LoopGuard
from edgeq.generate.loop_guard import MAX_PERIOD, MIN_COPIES, MIN_TOKENS, MIN_TOKENS_MONOTONOUS, VARIED


def first_alarm(ids: Sequence[int]) -> int | None:
    """How many tokens the guard saw when it gave its first alarm; None if it never did."""
    guard = LoopGuard()
    return next((n for n, token in enumerate(ids, 1) if guard.observe(token)), None)


def is_loop(ids: Sequence[int]) -> bool:
    """The definition: `ids` ends in a cycle repeated often and long enough. The shortest period decides."""
    for period in range(1, min(MAX_PERIOD, len(ids)) + 1):
        length = period
        while length < len(ids) and ids[-1 - length] == ids[-1 - length + period]:
            length += 1
        if length >= max(MIN_COPIES * period, MIN_TOKENS):
            return len(set(ids[-period:])) >= VARIED or length >= MIN_TOKENS_MONOTONOUS
    return False


@pytest.mark.parametrize("period", [1, 2, 3, 11, 12, 16, 17, 40, 85, 86, 100, 127, 128])
def test_every_cycle_is_caught_as_soon_as_it_is_long_enough(period: int) -> None:
    text = list(range(1000, 1300))
    cycle = list(range(period))
    needed = max(MIN_COPIES * period, MIN_TOKENS if period >= VARIED else MIN_TOKENS_MONOTONOUS)
    assert first_alarm(text + cycle * 1100) == len(text) + needed


def test_a_longer_period_than_looked_for_is_let_through() -> None:
    assert first_alarm(list(range(MAX_PERIOD + 1)) * 20) is None


def test_two_copies_are_fine_whatever_their_length() -> None:
    paragraph = list(range(MAX_PERIOD))
    assert first_alarm([*paragraph, *paragraph, 999, *paragraph, *paragraph]) is None


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    period=st.integers(1, 140),
    distinct=st.integers(1, 40),
    length=st.integers(200, 1200),
)
def test_the_vectors_do_what_the_definition_says(seed: int, period: int, distinct: int, length: int) -> None:
    random = np.random.default_rng(seed)
    cycle = random.integers(0, distinct, period).tolist()
    ids = [*random.integers(0, distinct, 30).tolist(), *(cycle * (length // period + 1))[:length], 77, 78]
    alarm = first_alarm(ids)
    quiet = (alarm or len(ids) + 1) - 1
    assert not any(is_loop(ids[:n]) for n in (quiet, quiet - 1, quiet - 2, *random.integers(1, quiet, 5)))
    assert alarm is None or is_loop(ids[:alarm])


LOOPS = {
    "word": "the " * 1200,
    "phrase": "I am sorry, " * 400,
    "bangs": "! " * 1200,
    "sentence": "Wait, let me check that again. The answer should be 42, so I need to verify it. " * 30,
    "paragraph": "Let me reconsider the question. The user asks for a name. I do not know the name. Perhaps the user "
    "wants me to guess.\n\n" * 20,
    "code": "    if x == 0:\n        return x\n" * 150,
}

ZEROS = "[\n" + "    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],\n" * 10 + "]\n"
VERSES = [
    "Ten green bottles hanging on the wall,\nTen green bottles hanging on the wall,\n",
    "And if one green bottle should accidentally fall,\n",
]
NUMBERS = ["Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten"]

HONEST = {
    "rulers": ("-" * 100 + "\n" + "=" * 100 + "\n" + "| Name | Value |\n|" + "-" * 60 + "|" + "-" * 60 + "|\n") * 2,
    "numbers": ", ".join(str(n) for n in range(2000)),
    "numbered list": "\n".join(f"{n}. Step {n}: press the button and wait." for n in range(1, 300)),
    "table": "\n".join(f"| {n} | {'yes' if n % 3 else 'no'} | {n * n % 7} | ok |" for n in range(300)),
    "table with equal rows": "| item | count |\n|------|-------|\n" + "| none | 0 |\n" * 20,
    "grid of zeros": ZEROS,
    "equal rows": "[" + "[4, 4, 4, 5, 6, 6, 6],\n " * 16 + "]",
    "empty board": ("+---" * 8 + "+\n" + "|   " * 8 + "|\n") * 6,
    "blank lines": "a\n" + "\n" * 60 + "b" + " " * 200 + "c",
    "indentation": "\n".join(" " * 4 * (n % 30) + f"level_{n}()" for n in range(200)),
    "poem": "".join(
        line.replace("Ten", NUMBERS[n]).replace("one", "just one") for n in range(10, 0, -1) for line in VERSES
    ),
    "chorus": "Na na na, hey hey, goodbye!\n" * 6,
    "html": "<tr>" + "<td></td>" * 8 + "</tr>\n",
    "json": ",\n".join(f'{{"id": {n}, "name": "item", "tags": [], "price": 0.0}}' for n in range(100)),
    "lookup table": ",\n".join(", ".join(str(n) if 2 < n < 7 else "255" for _ in range(16)) for n in range(16)),
    "hex": ", ".join(["0x00"] * 40 + [f"0x{n * 37 % 256:02x}" for n in range(400)]),
    "csv": "\n".join(f"2024-01-{1 + n % 28:02d},0,0,0,{n % 13}" for n in range(300)),
    "boilerplate": "\n".join(f"    self.assertEqual(f({n}), {n})" for n in range(200)),
    "binary": " ".join(f"{n:08b}" for n in range(256)),
    "a long number": str(3**2000),
    "code": textwrap.dedent(inspect.getsource(np.lib._function_base_impl)),
    "more code": inspect.getsource(inspect) + inspect.getsource(textwrap) + inspect.getsource(re),
}


def by_characters(text: str) -> list[int]:
    return [ord(character) for character in text]


def by_bytes(text: str) -> list[int]:
    return list(text.encode())


def by_words(text: str) -> list[int]:
    """Roughly as a tokenizer cuts: words with the space before, single digits, runs of punctuation and of blanks."""
    words = re.findall(r" ?[^\W\d_]+|\d| ?[^\w\s]+|_+|\s+", text)
    numbers = dict[str, int]()
    return [numbers.setdefault(word, len(numbers)) for word in words]


@pytest.mark.parametrize("cut", [by_characters, by_words])
@pytest.mark.parametrize("name", LOOPS)
def test_loops_of_text_are_caught(name: str, cut: Callable[[str], list[int]]) -> None:
    assert first_alarm(cut("Some text before it, which is different." + LOOPS[name])) is not None


@pytest.mark.parametrize("cut", [by_characters, by_bytes, by_words])
@pytest.mark.parametrize("name", HONEST)
def test_no_false_alarm(name: str, cut: Callable[[str], list[int]]) -> None:
    ids = cut(HONEST[name])[:60_000]
    assert first_alarm(ids) is None
