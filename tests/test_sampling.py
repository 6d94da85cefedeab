"""Settings and the sampler, against a slow and plain definition of what it should draw from."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.errors import ModelError, UsageError
from edgeq.formats.bf16 import Float32
from edgeq.generate import GenerationSettings, Sampler, preset

NEUTRAL = GenerationSettings(temperature=1.0, top_k=0, top_p=1.0, seed=0)


def reference_distribution(
    logits: Float32, options: GenerationSettings, vocab_size: int, masked: Collection[int] = (),
    prompt: Collection[int] = (), generated: Collection[int] = (),
) -> dict[int, float]:  # fmt: skip
    """{id: probability}, by sorting everything and going through the steps one token at a time."""
    scores = {}
    for token in range(vocab_size):
        score = float(logits[token])
        if token in prompt or token in generated:
            score = score / options.repetition_penalty if score > 0 else score * options.repetition_penalty
        count = list(generated).count(token)
        score -= options.presence_penalty * (count > 0) + options.frequency_penalty * count
        if token not in masked:
            scores[token] = score / options.temperature
    kept = sorted(scores, key=lambda token: (-scores[token], token))
    if options.top_k:
        last = scores[kept[min(options.top_k, len(kept)) - 1]]
        kept = [token for token in kept if scores[token] >= last]
    kept_by_top_p, total = [], 0.0
    for token, probability in softmax(scores, kept).items():
        if total < options.top_p or options.top_p == 1:
            kept_by_top_p.append(token)
        total += probability
    probabilities = softmax(scores, kept_by_top_p)
    most = max(probabilities.values())
    return softmax(scores, [token for token in kept_by_top_p if probabilities[token] >= options.min_p * most])


def softmax(scores: dict[int, float], tokens: list[int]) -> dict[int, float]:
    most = max(scores[token] for token in tokens)
    powers = {token: np.exp(scores[token] - most) for token in tokens}
    return {token: power / sum(powers.values()) for token, power in powers.items()}


def logits_of(seed: int, rows: int, scale: float = 3.0) -> Float32:
    return (np.random.default_rng(seed).normal(size=rows) * scale).astype(np.float32)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocab_size=st.integers(2, 700),
    padding=st.integers(0, 9),
    temperature=st.sampled_from([0.05, 0.6, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 20, 300, 1000]),
    top_p=st.sampled_from([0.01, 0.3, 0.8, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    penalties=st.sampled_from([(0.0, 0.0, 1.0), (1.5, 0.0, 1.0), (0.5, 0.25, 1.0), (-1.0, 0.5, 1.3)]),
)
def test_distribution_is_the_slow_definition(
    seed: int,
    vocab_size: int,
    padding: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalties: tuple[float, float, float],
) -> None:
    presence, frequency, repetition = penalties
    options = GenerationSettings(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, presence_penalty=presence,
        frequency_penalty=frequency, repetition_penalty=repetition,
    )  # fmt: skip
    random = np.random.default_rng(seed)
    prompt, generated = random.integers(0, vocab_size, 6).tolist(), random.integers(0, vocab_size, 8).tolist()
    masked = random.choice(vocab_size, size=min(3, vocab_size - 1), replace=False).tolist()
    allowed = ~np.isin(np.arange(vocab_size), masked)
    logits = logits_of(seed, vocab_size + padding)

    sampler = Sampler(options, vocab_size=vocab_size)
    sampler.observe_prompt(prompt)
    for token in generated:
        sampler.accept(token)
    ids, probabilities = sampler.distribution(logits, allowed)

    expected = reference_distribution(logits, options, vocab_size, masked, prompt, generated)
    expected = {token: p for token, p in expected.items() if p > 0}
    assert ids.tolist() == sorted(expected)
    # float32 penalties: an error of 2^-24 * |logit| / temperature in the exponent
    np.testing.assert_allclose(probabilities, [expected[token] for token in ids.tolist()], rtol=1e-4)
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)
    assert sampler.sample(logits, allowed) in expected


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_draws_follow_the_distribution(top_p: float) -> None:
    draws, vocab_size = 20_000, 40
    sampler = Sampler(NEUTRAL.replace(seed=11, top_k=12, top_p=top_p, temperature=0.8), vocab_size=vocab_size)
    logits = logits_of(5, vocab_size, scale=1.0)
    ids, probabilities = sampler.distribution(logits)
    counts = np.bincount([sampler.sample(logits) for _ in range(draws)], minlength=vocab_size)
    assert counts[ids].sum() == draws
    chi_square = ((counts[ids] - draws * probabilities) ** 2 / (draws * probabilities)).sum()
    assert chi_square < 31.3  # the 99.9th percentile for 11 degrees of freedom; the seed is fixed


def test_the_same_seed_draws_the_same_tokens() -> None:
    logits = logits_of(1, 1000, scale=1.0)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(dataclasses.replace(NEUTRAL, seed=seed), vocab_size=1000)
        return [sampler.sample(logits) for _ in range(50)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


@given(seed=st.integers(0, 2**32), vocab_size=st.integers(1, 600))
@settings(max_examples=50, deadline=None)
def test_greedy_is_argmax_and_the_lowest_id_wins_ties(seed: int, vocab_size: int) -> None:
    logits = np.random.default_rng(seed).integers(-3, 3, vocab_size + 5).astype(np.float32)
    sampler = Sampler(GenerationSettings(temperature=0), vocab_size=vocab_size)
    assert sampler.sample(logits) == int(np.argmax(logits[:vocab_size]))
    assert sampler.distribution(logits)[0].tolist() == [int(np.argmax(logits[:vocab_size]))]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_padding_rows_and_masked_tokens_are_never_drawn(temperature: float) -> None:
    logits = np.full(300, -10, dtype=np.float32)
    logits[[3, 4, 290, 299]] = [20, 10, 30, np.nan]  # the last two lie in the padding
    sampler = Sampler(NEUTRAL.replace(temperature=temperature), vocab_size=280)
    allowed = np.arange(280) != 3
    assert {sampler.sample(logits, allowed) for _ in range(200)} == {4}


def test_top_k_keeps_what_ties_with_the_last() -> None:
    sampler = Sampler(NEUTRAL.replace(top_k=2), vocab_size=5)
    assert sampler.distribution(np.array([1, 5, 3, 3, 0], dtype=np.float32))[0].tolist() == [1, 2, 3]


def test_presence_and_frequency_count_this_reply_only() -> None:
    logits = np.zeros(8, dtype=np.float32)
    sampler = Sampler(NEUTRAL.replace(presence_penalty=1.0, frequency_penalty=0.5), vocab_size=8)

    def penalties() -> list[float]:
        _, probabilities = sampler.distribution(logits)
        return [round(float(x), 4) for x in np.log(probabilities / probabilities[0])]

    sampler.observe_prompt([1, 2, 3])
    assert penalties() == [0] * 8
    for token in (3, 4, 4):
        sampler.accept(token)
    assert penalties() == [0, 0, 0, -1.5, -2, 0, 0, 0]
    sampler.observe_prompt([4])
    assert penalties() == [0] * 8


def test_repetition_counts_prompt_and_reply() -> None:
    sampler = Sampler(NEUTRAL.replace(temperature=0, repetition_penalty=2.0), vocab_size=4)
    sampler.observe_prompt([0, -1, 999])  # ids outside the vocabulary (image placeholders) have nothing to penalise
    assert sampler.sample(np.array([3, 2, -9, -9], dtype=np.float32)) == 1
    sampler.accept(1)
    assert sampler.sample(np.array([-5, -4, -9, -9], dtype=np.float32)) == 1
    assert sampler.sample(np.array([-5, -4, -7, -9], dtype=np.float32)) == 2


def test_penalties_hold_at_temperature_zero() -> None:
    sampler = Sampler(GenerationSettings(temperature=0, presence_penalty=1.5), vocab_size=3)
    logits = np.array([2, 1, 0], dtype=np.float32)
    sampler.accept(sampler.sample(logits))
    assert sampler.sample(logits) == 1


def test_logits_are_left_alone() -> None:
    logits = logits_of(0, 300)
    before = logits.copy()
    sampler = Sampler(NEUTRAL.replace(repetition_penalty=1.5, presence_penalty=1.0), vocab_size=300)
    sampler.observe_prompt(range(50))
    for _ in range(5):
        sampler.accept(sampler.sample(logits))
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_are_an_error(bad: float, temperature: float) -> None:
    logits = logits_of(0, 500)
    logits[123] = bad
    with pytest.raises(ModelError, match=r"not finite \(token 123 has -?(nan|inf)\)"):
        Sampler(NEUTRAL.replace(temperature=temperature), vocab_size=400).sample(logits)


def test_too_few_logits_are_an_error() -> None:
    with pytest.raises(ModelError, match="vocabulary of 400"):
        Sampler(NEUTRAL, vocab_size=400).sample(logits_of(0, 399))


@pytest.mark.parametrize("temperature", [1e-300, 10.0])
def test_extreme_numbers_still_draw(temperature: float) -> None:
    logits = np.array([3e38, -3e38, 0, 3e38], dtype=np.float32)
    assert Sampler(NEUTRAL.replace(temperature=temperature), vocab_size=4).sample(logits) in (0, 3)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("temperature", -0.1, "from 0 to 10"),
        ("temperature", float("nan"), "from 0 to 10"),
        ("temperature", "hot", "from 0 to 10"),
        ("temperature", True, "from 0 to 10"),
        ("top_k", -1, "whole number of at least 0"),
        ("top_k", 2.5, "whole number of at least 0"),
        ("top_p", 0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
        ("min_p", 1.5, "from 0 to 1"),
        ("presence_penalty", 3, "from -2 to 2"),
        ("frequency_penalty", -2.5, "from -2 to 2"),
        ("repetition_penalty", 0, "from 0.1 to 10"),
        ("seed", -1, "whole number of at least 0"),
        ("max_tokens", 0, "whole number of at least 1"),
        ("thinking_budget", -1, "whole number of at least 0"),
        ("stop", "", "non-empty strings"),
        ("stop", ("a", ""), "non-empty strings"),
        ("stop", 5, "non-empty strings"),
        ("stop", ["a", 5], "non-empty strings"),
        ("max_total_tokens", 0, "whole number of at least 1"),
    ],
)
def test_settings_out_of_range_name_option_value_and_range(option: str, value: Any, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        GenerationSettings(**{option: value})
    assert caught.value.message.startswith(f"{option} must be ")
    assert expected in caught.value.message
    assert caught.value.message.endswith(f", got {value!r}")


def test_replace_overrides_with_what_was_given() -> None:
    base = preset(thinking=True)
    assert base.replace(temperature=None, top_k=None) == base
    assert base.replace(temperature=0, seed=3) == dataclasses.replace(base, temperature=0, seed=3)
    with pytest.raises(UsageError, match="unknown generation option 'temprature'"):
        base.replace(temprature=1)


def test_presets_are_those_of_the_cards() -> None:
    chosen = {(t, v): preset(t, v) for t in (False, True) for v in (False, True)}
    assert [(s.temperature, s.top_p, s.presence_penalty) for s in chosen.values()] == [
        (1.0, 1.0, 2.0), (0.7, 0.8, 1.5), (1.0, 0.95, 1.5), (0.6, 0.95, 0.0),
    ]  # fmt: skip
    assert all((s.top_k, s.min_p, s.repetition_penalty) == (20, 0, 1) for s in chosen.values())


def test_what_is_meant_as_well() -> None:
    numbers: dict[str, Any] = {"temperature": np.float32(0.5), "max_tokens": np.int64(7), "loop_guard": np.bool_(False)}
    given = GenerationSettings(**numbers, stop="x")  # type: ignore[arg-type]
    assert given == GenerationSettings(temperature=0.5, max_tokens=7, loop_guard=False, stop=("x",))
    assert GenerationSettings(stop=["a", "bc"]).stop == ("a", "bc")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"temperature must be from 0 to 10, got 11\.0"):
        GenerationSettings().replace(temperature=np.float64(11))
