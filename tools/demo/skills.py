"""Generators of single turns, one function per skill; each returns a `Turn` whose answer a machine can judge.

`key` identifies the problem behind the wording; `held_out(key)` reserves a tenth of all problems for evaluation, and
training never sees them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from random import Random

from . import facts, prose


@dataclass(frozen=True)
class Turn:
    user: str
    answer: str
    thought: str
    key: str
    expect: str  # what a right answer contains, lower case; by default the whole answer

    def right(self, text: str) -> bool:
        return self.expect.lower() in " ".join(text.lower().split())


def turn(user: str, answer: str, thought: str, key: str = "", expect: str = "") -> Turn:
    return Turn(user, answer, thought, key or user, expect or answer)


def held_out(key: str) -> bool:
    return zlib.crc32(key.encode()) % 10 == 0


CONTRACTIONS = (
    ("What is", "What's"), ("Where is", "Where's"), ("Who is", "Who's"), ("I am", "I'm"), ("That is", "That's"),
    ("Can you", "Could you"), ("You are", "You're"), ("How do I", "How can I"), ("Tell me", "Can you tell me"),
)  # fmt: skip


def vary(rng: Random, text: str) -> str:
    """The same request as different people type it."""
    if rng.random() < 0.3:
        for long, short in CONTRACTIONS:
            text = text.replace(long, short)
    style = rng.random()
    bare = text.rstrip("?.!")
    if style < 0.4:
        return text
    if style < 0.55:
        return text.lower()
    if style < 0.7:
        return bare
    if style < 0.8:
        return bare.lower()
    if style < 0.9:
        return rng.choice(("Please: ", "Hey, ", "So, ", "Tell me: ", "One question: ")) + text[0].lower() + text[1:]
    return bare + rng.choice((", please?", ", please.", "??", "!", " ?"))


# -- talk ------------------------------------------------------------------------------------------------------------


def about(rng: Random) -> Turn:
    questions, answer, word = rng.choice(facts.ABOUT)
    return turn(vary(rng, rng.choice(questions)), answer, "This is a question about edgeq or about me.", expect=word)


def small_talk(rng: Random) -> Turn:
    questions, answer, word = rng.choice(facts.SMALL_TALK)
    return turn(
        vary(rng, rng.choice(questions)), answer, "This is small talk, so I answer in a friendly way.", expect=word
    )


def unknown(rng: Random) -> Turn:
    slots = {name: rng.choice(values) for name, values in facts.UNKNOWN_SLOTS.items()}
    user = vary(rng, rng.choice(facts.UNKNOWN_QUESTIONS).format(**slots))
    return turn(user, facts.UNKNOWN, "This is not something that I know.", expect="do not know")


def write(rng: Random) -> Turn:
    user, text, word = prose.request(rng)
    return turn(user, text, "I am asked to write, and I stay with the topic.", expect=word)


# -- arithmetic ------------------------------------------------------------------------------------------------------

ASK = ("What is {}?", "{}", "{} = ?", "Calculate {}.", "How much is {}?", "Compute {}.")


def steps_of(a: int, op: str, b: int) -> str:
    """One sum of two-digit numbers in tens and ones."""
    total = a + b if op == "+" else a - b
    if b < 10 or b % 10 == 0:
        return f"{a} {op} {b} = {total}"
    mid = a + b // 10 * 10 if op == "+" else a - b // 10 * 10
    return f"{a} {op} {b // 10 * 10} = {mid}, {mid} {op} {b % 10} = {total}"


def sum_of_two(rng: Random) -> Turn:
    a, b, op = rng.randrange(100), rng.randrange(100), rng.choice("+-")
    if rng.random() < 0.25:
        b = rng.randrange(10)
    return sum_turn(rng, a, b, op)


def small_sum(rng: Random) -> Turn:
    """Numbers up to 30 and up to 20."""
    return sum_turn(rng, rng.randrange(rng.choice((10, 31))), rng.randrange(rng.choice((10, 21))), rng.choice("+-"))


def sum_turn(rng: Random, a: int, b: int, op: str) -> Turn:
    if op == "-" and b > a:
        a, b = b, a
    key = f"{min(a, b)}+{max(a, b)}" if op == "+" else f"{a}-{b}"
    total = a + b if op == "+" else a - b
    return turn(vary_ask(rng, f"{a} {op} {b}"), f"{a} {op} {b} = {total}.", steps_of(a, op, b), key, f"= {total}.")


def vary_ask(rng: Random, expression: str) -> str:
    words = {"+": "plus", "-": "minus", "*": "times"}
    if rng.random() < 0.15:
        expression = " ".join(words.get(part, part) for part in expression.split())
    elif rng.random() < 0.15:
        expression = expression.replace(" ", "")
    return rng.choice(ASK).format(expression)


def product(rng: Random) -> Turn:
    a, b = rng.randrange(11), rng.randrange(11)
    user = vary_ask(rng, f"{a} * {b}")
    return turn(user, f"{a} * {b} = {a * b}.", f"From the table: {a} * {b} = {a * b}", f"{user} {a}*{b}", f"= {a * b}.")


def running_total(rng: Random, terms: int) -> list[tuple[str, int, int]]:
    """[(op, operand, total)], all totals in 0..50; the first op is a plus from zero."""
    total = rng.randrange(5, 40)
    chain = [("+", total, total)]
    for _ in range(terms - 1):
        op = rng.choice("+-")
        room = 50 - total if op == "+" else total
        if room < 3:
            op, room = ("-", total) if op == "+" else ("+", 50 - total)
        operand = rng.randrange(2, min(room, 20) + 1)
        total += operand if op == "+" else -operand
        chain.append((op, operand, total))
    return chain


def chain_steps(chain: list[tuple[str, int, int]]) -> str:
    pairs = pairwise(chain)
    return "\n".join(f"{before} {op} {operand} = {after}" for (_, _, before), (op, operand, after) in pairs)


def sum_of_many(rng: Random) -> Turn:
    chain = running_total(rng, rng.choice((3, 4, 4, 5)))
    expression = f"{chain[0][1]} " + " ".join(f"{op} {n}" for op, n, _ in chain[1:])
    total = chain[-1][2]
    return turn(
        rng.choice(ASK).format(expression), f"The result is {total}.", chain_steps(chain), expression, f"is {total}."
    )


def word_problem(rng: Random) -> Turn:
    chain = running_total(rng, rng.choice((3, 3, 4)))
    name, thing = (
        rng.choice(facts.NAMES),
        rng.choice(("apples", "books", "coins", "eggs", "stamps", "cards", "pears", "shells")),
    )
    gain, lose = ("buys", "finds", "gets"), ("gives away", "loses", "sells")
    story = [f"{name} has {chain[0][1]} {thing}."]
    story += [f"{name} {rng.choice(gain if op == '+' else lose)} {n}." for op, n, _ in chain[1:]]
    total = chain[-1][2]
    user = " ".join(story) + f" How many {thing} does {name} have now?"
    return turn(user, f"{name} has {total} {thing}.", chain_steps(chain), user, f"has {total} {thing}")


# -- lists -----------------------------------------------------------------------------------------------------------


def invented(rng: Random) -> str:
    """A word that nobody has seen: what can only be copied is learnt as copying."""
    syllables = rng.choice((2, 2, 3))
    return "".join(rng.choice("bdfgklmnprstvwz") + rng.choice("aeiou") for _ in range(syllables)) + rng.choice("nrslk")


def items(rng: Random, low: int = 3, high: int = 6) -> list[str]:
    n = rng.randint(low, high)
    kind = rng.random()
    if kind < 0.4:
        return rng.sample(facts.WORDS, n)
    if kind < 0.7:
        return [str(x) for x in rng.sample(range(100), n)]
    return rng.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", n)


def copy(rng: Random) -> Turn:
    return copy_of(rng, items(rng, 2, 8) if rng.random() < 0.9 else [invented(rng) for _ in range(rng.randint(2, 5))])


def long_copy(rng: Random) -> Turn:
    """A list of mixed things, repetitions allowed; for drill only."""
    length = rng.randint(3, 24)
    return copy_of(rng, [rng.choice([*items(rng, 3, 3), invented(rng)]) for _ in range(length)])


def copy_of(rng: Random, parts: list[str]) -> Turn:
    text = ", ".join(parts)
    ask = rng.choice(
        (
            "Repeat: {}",
            "Copy this: {}",
            "Say this again: {}",
            "Repeat after me: {}",
            "Write this list again: {}",
            "Repeat {}",
            "Copy: {}",
            "Say: {}",
            "Please repeat: {}",
        )
    )
    return turn(ask.format(text), text, "I write the same list again.", "copy " + text)


def reverse(rng: Random) -> Turn:
    parts = items(rng)
    text, answer = ", ".join(parts), ", ".join(reversed(parts))
    ask = rng.choice(
        (
            "Reverse: {}",
            "Reverse this list: {}",
            "Write this list backwards: {}",
            "Turn this list around: {}",
            "Reverse {}",
            "Backwards: {}",
            "reverse: {}",
            "Please reverse: {}",
            "Reverse the list {}",
        )
    )
    return turn(ask.format(text), answer, "I start with the last one and go back to the first.", "reverse " + text)


def sort(rng: Random) -> Turn:
    parts = items(rng, 3, 6)
    numbers = parts[0].isdigit()
    ordered = sorted(parts, key=int) if numbers else sorted(parts)
    text, answer = ", ".join(parts), ", ".join(ordered)
    ask = rng.choice(
        (
            "Sort: {}",
            "Sort this list: {}",
            "Put these in order: {}",
            "Write these in the right order: {}",
            "Sort {}",
            "sort: {}",
            "Please sort: {}",
            "Sort the list {}",
            "Order these: {}",
        )
    )
    thought = "The numbers go from small to large." if numbers else "The order is that of the alphabet."
    return turn(ask.format(text), answer, thought, "sort " + text)


def count(rng: Random) -> Turn:
    if rng.random() < 0.5:
        parts = items(rng, 2, 9)
        text = ", ".join(parts)
        ask = rng.choice(("How many items are in this list: {}", "Count the items: {}", "How long is this list: {}"))
        thought = numbered(parts, range(1, len(parts) + 1))
        return turn(ask.format(text), f"The list has {len(parts)} items.", thought, "count " + text)
    wanted, *others = rng.sample(facts.WORDS, 3)
    n = rng.randint(1, 6)
    parts = [wanted] * n + [rng.choice(others) for _ in range(rng.randint(1, 8 - n))]
    rng.shuffle(parts)
    text = ", ".join(parts)
    ask = rng.choice(
        ("How often does {} occur here: {}", "Count the word {}: {}", "How many times do you see {} in this list: {}")
    )
    thought = numbered(parts, accumulate(int(x == wanted) for x in parts))
    times = "1 time" if n == 1 else f"{n} times"
    return turn(ask.format(wanted, text), f"The word {wanted} occurs {times}.", thought, f"count {wanted} {text}")


def numbered(parts: list[str], numbers: Iterable[int]) -> str:
    """The list with a number in the place of each comma: the same rhythm, so that repeated words do not confuse."""
    between = ":" if parts[0].isdigit() else ""
    return " ".join(f"{x}{between}{n}" for x, n in zip(parts, numbers, strict=True))


SKILLS: dict[str, Callable[[Random], Turn]] = {
    "about": about,
    "small talk": small_talk,
    "unknown": unknown,
    "small sum": small_sum,
    "sum of two": sum_of_two,
    "product": product,
    "sum of many": sum_of_many,
    "word problem": word_problem,
    "copy": copy,
    "reverse": reverse,
    "sort": sort,
    "count": count,
    "prose": write,
}

DRILL_ONLY = {"copy": long_copy}


def draw(name: str, rng: Random, *, evaluation: bool = False) -> Turn:
    """A turn of the skill from the training problems, or from the held-out ones."""
    while True:
        candidate = SKILLS[name](rng)
        if held_out(candidate.key) == evaluation:
            return candidate
