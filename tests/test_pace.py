"""How many tokens are drafted: a machine and a text that are made up, so that no test depends on a clock."""

from __future__ import annotations

import numpy as np
import pytest

from edgeq.pace import Pace

PASSES = (1.0, 1.12, 1.25, 1.35, 1.5)  # of 1 to 5 rows, in plain ones
HEAD, DRAFT = 0.03, 0.08  # making drafts, and each of them


def speed(chance: float, tokens: int, *, noise: float = 0.05, seed: int = 0, pace: Pace | None = None) -> float:
    """Tokens a second against plain passes, where each draft is right with `chance`."""
    rng, pace = np.random.default_rng(seed), pace or Pace()
    said = spent = 0.0
    while said < tokens:
        source, drafts = pace.choose({"mtp": 4})
        assert (source == "mtp") == (drafts > 0)
        cost = PASSES[drafts] + (HEAD + DRAFT * drafts if drafts else 0)
        right = int(np.argmin([*(rng.random(drafts) < chance), False]))
        pace.record(source, drafts, 0.01 * cost * float(rng.uniform(1 - noise, 1 + noise)), right)
        said, spent = said + 1 + right, spent + cost
    return said / spent


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("chance", "tokens", "least"), [
    (1.0, 64, 1.8), (0.9, 64, 1.4), (0.9, 1000, 1.95), (0.7, 1000, 1.3), (0.5, 1000, 1.05), (0.3, 1000, 0.985),
    (0.1, 1000, 0.985), (0.0, 64, 0.97), (0.0, 128, 0.98), (0.0, 1000, 0.99),
])  # fmt: skip
def test_what_is_gained_and_what_is_lost(chance: float, tokens: int, least: float, seed: int) -> None:
    assert speed(chance, tokens, seed=seed) >= least


def test_a_text_that_changes_is_followed() -> None:
    pace = Pace()
    for seed in range(3):
        assert speed(0.0, 400, seed=seed, pace=pace) >= 0.96  # what the good text has saved up is spent here
        assert speed(0.95, 400, seed=seed, pace=pace) >= 1.5


def test_where_several_rows_cost_as_much_as_several_passes_nothing_is_drafted() -> None:
    pace, drafted = Pace(), 0
    for _ in range(300):
        source, drafts = pace.choose({"mtp": 4, "ngram": 7})
        pace.record(source, drafts, 0.01 * (1 + 1.2 * drafts), drafts)
        drafted += drafts
    assert drafted <= 20


def test_the_better_source_is_taken() -> None:
    pace, chosen = Pace(), {"mtp": 0, "ngram": 0}
    for _ in range(200):
        source, drafts = pace.choose({"mtp": 4, "ngram": 7})
        if source:
            chosen[source] += 1
        pace.record(source, drafts, 0.01 * (1 + 0.1 * drafts), drafts if source == "ngram" else 0)
    assert chosen["ngram"] > 150
    assert chosen["mtp"] < 10


def test_the_machine_may_become_slower() -> None:
    pace = Pace()
    for scale in (1.0, 3.0, 0.5):
        said = spent = 0.0
        for _ in range(300):
            source, drafts = pace.choose({"mtp": 4})
            cost = scale * (PASSES[drafts] + DRAFT * drafts)
            pace.record(source, drafts, 0.01 * cost, drafts)
            said, spent = said + 1 + drafts, spent + cost
        assert said / spent * scale >= 2


def test_nothing_is_chosen_where_there_is_nothing() -> None:
    pace = Pace()
    for _ in range(5):
        assert pace.choose({}) == ("", 0)
        assert pace.choose({"ngram": 0}) == ("", 0)
        pace.record("", 0, 0.01, 0)


def test_plain_passes_are_told_ahead_where_nothing_can_be_afforded() -> None:
    pace, rested = Pace(), 0
    assert pace.rest({"mtp"}) == 1  # a pass has to be timed first
    for _ in range(400):
        if rest := pace.rest({"mtp"}):
            assert rest <= 16
            assert pace.choose({"mtp": 4}) == ("", 0)
            pace.record("", 0, 0.01, 0)
            pace.rested(rest - 1)
            rested += rest - 1
        else:
            source, drafts = pace.choose({"mtp": 4})
            pace.record(source, drafts, 0.01 * (1 + 0.4 * drafts), 0)
    assert rested > 2000  # of five or six thousand passes, of which a look pays for some sixty
    assert Pace().rest(()) == 1


def test_what_was_asked_for_is_not_paid_out_of_the_allowance() -> None:
    pace = Pace()
    for _ in range(50):
        pace.record("", 0, 0.01, 0)
        pace.record("mtp", 4, 0.02, 0, chosen=False)
    assert pace.acceptance("mtp", 0) < 0.1
    assert pace.cost("mtp", 4) == pytest.approx(2, rel=0.2)
    assert pace.choose({"mtp": 4}) == ("mtp", 1)  # a look whether it is still so bad
