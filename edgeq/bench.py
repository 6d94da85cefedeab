"""How fast a model runs on this machine, beside how fast its memory can be read.

Tests are llama-bench's: `pp512` runs a prompt of 512 tokens, `tg128` then generates 128 tokens one at a time,
`pp512+tg128` does both and counts all tokens; `@ d4096` begins behind 4,096 tokens. Token ids are random, logits are
computed as for a reply, nothing is sampled. A run that is not counted goes first. With drafts the model says its own
tokens instead, sampled with the settings of a completion, after a text.

Generation reads every weight once per token, so its limit is the memory. `token_nbytes` counts what a token has to
read, and `read_rate` measures what the machine can; their quotient says how much is left to gain.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from statistics import fmean, stdev
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from edgeq.api import Model
from edgeq.errors import UsageError
from edgeq.generate import Decoding, GenerationSettings, Tally
from edgeq.machine.stream import read_rate
from edgeq.session.context import Context
from edgeq.state import State
from edgeq.weights import Part, Role

__all__ = ["Result", "Test", "measure", "model_size", "read_rate", "run_test", "token_nbytes"]

TEXT = """The harbour was quiet before sunrise. Gulls sat on the wall, and the boats that had come in at night lay low
in the water. Anna counted the crates, wrote the figures into her book and compared them with the list from the office:
forty of herring, twelve of cod, three of something that nobody had ordered. She closed the book. "It will have to do,"
she said, and went to find the driver, who was asleep in his van with the radio on.

def total(crates):
    weight = 0
    for crate in crates:
        if crate.kind in ("herring", "cod"):
            weight += crate.weight
    return weight

"""
"""What a model goes on from where its tokens are drafted: prose and code."""


class Test(NamedTuple):
    """Tokens of a prompt, tokens generated after it, and tokens in the context before both; how tokens are drafted."""

    prompt: int
    generate: int
    depth: int = 0
    draft: str | int = "off"

    @property
    def name(self) -> str:
        parts = [f"{kind}{tokens}" for kind, tokens in (("pp", self.prompt), ("tg", self.generate)) if tokens]
        drafts = f", {self.draft}" if self.draft != "off" else ""
        return "+".join(parts) + (f" @ d{self.depth}" if self.depth else "") + drafts

    @property
    def tokens(self) -> int:
        return self.prompt + self.generate


class Result(NamedTuple):
    """Seconds of every repetition; for pure generation also the bytes a token reads and the memory's rate; with drafts
    what they came to in all."""

    test: Test
    threads: int | None
    seconds: tuple[float, ...]
    token_nbytes: float | None = None
    read_rate: float | None = None
    tally: Tally | None = None

    @property
    def rates(self) -> list[float]:
        """Tokens per second of every repetition."""
        return [self.test.tokens / seconds for seconds in self.seconds]

    @property
    def tok_per_s(self) -> float:
        return fmean(self.rates)

    @property
    def deviation(self) -> float:
        """Standard deviation of tokens per second; 0 for a single repetition."""
        return stdev(self.rates) if len(self.rates) > 1 else 0.0

    @property
    def gb_per_s(self) -> float | None:
        """Bytes read per second, 10^9."""
        return self.tok_per_s * self.token_nbytes / 1e9 if self.token_nbytes else None

    @property
    def share(self) -> float | None:
        """That rate as a part of the memory's."""
        return self.gb_per_s / self.read_rate if self.gb_per_s and self.read_rate else None


def measure(model: Model, tests: Sequence[Test], *, repetitions: int) -> Iterator[Result]:
    """Run the tests in order."""
    for test in tests:
        if test.depth + test.tokens > model.context_limit:
            raise UsageError(f"{test.name} does not fit the context of {model.context_limit} tokens")
    states: dict[int, State[Any]] = {}
    for test in tests:
        if test.draft != "off" and test.generate:
            yield _drafting(model, test, repetitions)
            continue
        if test.depth not in states:
            states = {test.depth: _state_behind(model, test.depth)}
        yield run_test(model, test, states[test.depth], repetitions=repetitions)


def run_test(model: Model, test: Test, state: State[Any], *, repetitions: int) -> Result:
    """One test from `state`, which holds `test.depth` tokens. The memory is probed right before and after, but not
    under a ceiling: the probe takes more memory than a small model does."""
    threads = model.ops.threads
    ids = _random_ids(model, test.tokens)
    _seconds(model, ids[: test.prompt + 1], min(1, test.generate), state)  # not counted
    if test.prompt:
        return Result(test, threads, tuple(_seconds(model, ids, test.generate, state) for _ in range(repetitions)))
    probes = model.engine.budget.ceiling is None
    before = read_rate(threads) if probes else None
    seconds = tuple(_seconds(model, ids, test.generate, state) for _ in range(repetitions))
    rate = max(before, read_rate(threads)) if before is not None else None
    return Result(test, threads, seconds, token_nbytes(model, test.depth + test.generate / 2), rate)


def _drafting(model: Model, test: Test, repetitions: int) -> Result:
    """A test whose tokens the model says itself, after `TEXT`: drafts of random tokens would be none."""
    _say(model, test._replace(generate=1), 0)  # not counted
    runs = [_say(model, test, seed) for seed in range(repetitions)]
    total = Tally(*(sum(counts) for counts in zip(*(astuple(tally) for _, tally in runs), strict=True)))
    return Result(test, model.ops.threads, tuple(seconds for seconds, _ in runs), tally=total)


def _say(model: Model, test: Test, seed: int) -> tuple[float, Tally]:
    """Time of the test's prompt and generation, and its drafts. A test without prompt begins with the second token."""
    context = Context(model.engine, speculation=model.language.speculation(model.engine, test.draft))
    settings = GenerationSettings(seed=seed, max_tokens=test.generate + (not test.prompt), loop_guard=False)
    ids = _text_ids(model, test.depth + test.prompt or 1)
    start = test.depth if test.prompt else len(ids) - 1
    if start:
        context.feed(ids[:start], rows=0)
    decoding = Decoding(ids[start:], model.language.sampler(settings), room=context.room, eos_ids=())
    tokens, started = context.tokens(decoding), perf_counter()
    if not test.prompt:
        next(tokens)
        started = perf_counter()
    deque(tokens, maxlen=0)
    return perf_counter() - started, decoding.tally


def _text_ids(model: Model, count: int) -> list[int]:
    """The last `count` tokens of `TEXT` over and over; random ones for a model without tokenizer."""
    if model.tokenizer is None:
        return _random_ids(model, count)
    once = model.tokenizer.encode(TEXT)
    return (once * -(-count // len(once)))[-count:]


def _seconds(model: Model, ids: Sequence[int], generate: int, state: State[Any]) -> float:
    """Time of running `ids` behind `state`, the last `generate` of them one at a time."""
    started = perf_counter()
    prompt = len(ids) - generate
    if prompt:
        _, state = model.forward(ids[:prompt], state)
    for token in ids[prompt:]:
        _, state = model.forward([token], state)
    return perf_counter() - started


def _random_ids(model: Model, count: int) -> list[int]:
    ids: list[int] = np.random.default_rng(0).integers(0, model.vocab_size, count).tolist()
    return ids


def _state_behind(model: Model, tokens: int) -> State[Any]:
    """A state after `tokens` random tokens."""
    state = model.state()
    return model.advance(_random_ids(model, tokens), state) if tokens else state


# --- what a token reads ----------------------------------------------------------------------------------------------


def model_size(model: Model) -> tuple[int, int]:
    """Weights of the language model, and the bytes that hold them."""
    stored = [(spec.size, s.nbytes) for spec, s in model.checkpoint.storage() if spec.part is Part.TEXT]
    return sum(size for size, _ in stored), sum(nbytes for _, nbytes in stored)


def token_nbytes(model: Model, position: float) -> float:
    """Bytes that generating a token must read or write, with `position` tokens before it.

    Every weight of the language model (an embedding that is not also the head counts one row), the DeltaNet states
    read and written, and the keys and values so far. Activations, which stay in the caches, do not count.
    """
    weights = model_size(model)[1]
    if not model.config.text.tie_word_embeddings:
        table = next(s for spec, s in model.checkpoint.storage() if spec.role is Role.EMBEDDING)
        weights -= table.nbytes * (model.vocab_size - 1) // model.vocab_size
    c, many = model.config.text, 4096  # tokens, because caches come in pages
    states = 2 * model.ops.state_nbytes(c)
    return weights + states + position * model.ops.kv_nbytes(c, many) / many
