"""The decode loop, driven with a model that says what the test wrote down."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.errors import MemoryBudgetError, ModelError, UsageError
from edgeq.formats.bf16 import Float32
from edgeq.generate import Decoding, GenerationSettings, Sampler, StopReason, ThinkTokens, Token

VOCAB = 64
EOS, EOT, OPEN, CLOSE, BLANK = 60, 61, 62, 63, 59
THINK = ThinkTokens(open=OPEN, close=CLOSE, cut=(50, 51, 52), after=(BLANK,))
GREEDY = GenerationSettings(temperature=0)


class FakeEngine:
    """Says `script[n]` after the n-th feed, whatever it was fed; after its end, distinct ordinary tokens.

    Keeps all that it was fed in `context`, so that a test sees what the model saw. With `interrupt_after=n` the n-th
    feed takes in only its first `chunk` tokens and is interrupted.
    """

    def __init__(
        self,
        script: Iterable[int] = (),
        context_limit: int = 10_000,
        interrupt_after: int | None = None,
        chunk: int = 0,
    ) -> None:
        self.script = list(script)
        self.context_limit = context_limit
        self.context: list[int] = []
        self.feeds: list[tuple[int, ...]] = []
        self.interrupt_after, self.chunk = interrupt_after, chunk

    @property
    def position(self) -> int:
        return len(self.context)

    def feed(self, ids: Sequence[int]) -> Float32:
        assert len(ids) > 0
        assert self.position + len(ids) <= self.context_limit
        self.feeds.append(tuple(ids))
        if len(self.feeds) == self.interrupt_after:
            self.context += ids[: self.chunk]
            raise KeyboardInterrupt
        self.context += ids
        n = len(self.feeds) - 1
        logits = np.zeros(VOCAB, dtype=np.float32)
        logits[self.script[n] if n < len(self.script) else (n * n + n // 7) % 50] = 1
        return logits


class Driven:
    """A reply and what drives it: feed what is unseen, hand in the logits."""

    def __init__(self, engine: FakeEngine, decoding: Decoding) -> None:
        self.engine, self.decoding, self.start = engine, decoding, engine.position

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoding, name)

    @property
    def pending(self) -> tuple[int, ...]:
        return self.decoding.unseen(self.engine.position - self.start)

    def __iter__(self) -> Iterator[Token]:
        while not self.decoding.finished:
            token = self.decoding.forced()
            if token is None:
                token = self.decoding.take(self.engine.feed(self.pending))
            if token is not None:
                yield token


def decode(
    engine: FakeEngine, prompt: Sequence[int] = (1, 2, 3), options: GenerationSettings = GREEDY, **more: Any
) -> Driven:
    room = engine.context_limit - engine.position
    return Driven(engine, Decoding(prompt, Sampler(options, vocab_size=VOCAB), room=room, eos_ids={EOS, EOT}, **more))


def ids_of(tokens: Iterable[Token]) -> list[int]:
    return [token.id for token in tokens]


def assert_consistent(reply: Driven, engine: FakeEngine, prompt: Sequence[int], tokens: list[Token]) -> None:
    """The context is prompt and reply, in order, once each, less what is pending."""
    assert engine.context + list(reply.pending) == [*prompt, *ids_of(tokens)]
    assert list(reply.reply_ids) == ids_of(tokens)


@pytest.mark.parametrize("stop", [EOS, EOT])
def test_every_stop_id_ends_the_answer(stop: int) -> None:
    engine = FakeEngine([7, 8, 9, stop])
    reply = decode(engine)
    assert list(reply) == [Token(7), Token(8), Token(9), Token(stop)]
    assert reply.finish == (StopReason.STOP_TOKEN, 0, 4, None, False)
    assert engine.feeds == [(1, 2, 3), (7,), (8,), (9,)]
    assert reply.pending == (stop,)


def test_max_tokens_of_the_answer() -> None:
    engine = FakeEngine([7, 8, 9, 10])
    reply = decode(engine, options=GREEDY.replace(max_tokens=3))
    assert ids_of(reply) == [7, 8, 9]
    assert reply.finish.reason is StopReason.LENGTH
    assert reply.pending == (9,)


def test_a_stop_token_that_is_the_last_allowed_is_a_stop() -> None:
    reply = decode(FakeEngine([7, EOS]), options=GREEDY.replace(max_tokens=2))
    assert ids_of(reply) == [7, EOS]
    assert reply.finish.reason is StopReason.STOP_TOKEN


def test_the_next_turn_starts_with_what_is_pending() -> None:
    engine = FakeEngine([7, EOS, 8, EOS])
    first = decode(engine)
    assert ids_of(first) == [7, EOS]
    second = decode(engine, prompt=[*first.pending, 20, 21])
    assert ids_of(second) == [8, EOS]
    assert engine.context == [1, 2, 3, 7, EOS, 20, 21, 8]
    assert engine.feeds == [(1, 2, 3), (7,), (EOS, 20, 21), (8,)]


def test_thinking_that_ends_by_itself() -> None:
    engine = FakeEngine([10, 11, CLOSE, BLANK, 12, EOS])
    reply = decode(engine, think=THINK, starts_in_thinking=True, options=GREEDY.replace(max_tokens=3))
    thinking = [Token(id, thinking=True) for id in (10, 11, CLOSE)]
    assert list(reply) == [*thinking, Token(BLANK), Token(12), Token(EOS)]
    assert reply.finish == (StopReason.STOP_TOKEN, 3, 3, None, False)


def test_the_model_may_open_the_block_itself_and_again() -> None:
    engine = FakeEngine([OPEN, 10, CLOSE, 12, OPEN, 13, EOS, 14, EOS])
    reply = decode(engine, think=THINK)
    assert [token.id for token in reply] == [OPEN, 10, CLOSE, 12, OPEN, 13, CLOSE, BLANK, 14, EOS]
    assert reply.finish == (StopReason.STOP_TOKEN, 5, 3, StopReason.STOP_TOKEN, False)


def test_a_block_after_the_answer_began_is_bounded() -> None:
    endless = [OPEN, 10, CLOSE, 12, OPEN, *range(20, 50)]
    left = decode(FakeEngine(endless), options=GREEDY.replace(thinking_budget=6, max_tokens=8), think=THINK)
    assert ids_of(left) == [OPEN, 10, CLOSE, 12, OPEN, 20, 21, CLOSE, BLANK, 22, 23, 24, 25]
    assert left.finish == (StopReason.LENGTH, 6, 5, StopReason.LENGTH, False)
    within = decode(FakeEngine(endless), options=GREEDY.replace(max_tokens=4), think=THINK)
    assert ids_of(within) == [OPEN, 10, CLOSE, 12, OPEN, 20, 21]
    assert within.finish == (StopReason.LENGTH, 6, 1, None, True)
    spent = decode(FakeEngine(endless), options=GREEDY.replace(thinking_budget=3, max_tokens=3), think=THINK)
    assert ids_of(spent) == [OPEN, 10, CLOSE, 12, OPEN, CLOSE, BLANK, 20]


@pytest.mark.parametrize("total", range(1, 9))
def test_thinking_and_answer_together(total: int) -> None:
    options = GREEDY.replace(max_total_tokens=total, thinking_budget=4)
    reply = decode(FakeEngine([10, 11, CLOSE, 12, 13, 14]), options=options, think=THINK, starts_in_thinking=True)
    assert ids_of(reply) == [10, 11, CLOSE, 12, 13, 14, 36, 0][:total]
    assert reply.finish == (StopReason.LENGTH, min(total, 3), max(0, total - 3), None, total < 3)


@pytest.mark.parametrize("cut", range(15))
def test_going_on(cut: int) -> None:
    """Left anywhere and gone on with, penalties, draws and the thinking budget included: as if it had not been left."""
    rng = np.random.default_rng(3)
    table = rng.normal(size=(VOCAB, VOCAB)).astype(np.float32)
    options = GenerationSettings(
        temperature=1.0, seed=5, presence_penalty=1.5, frequency_penalty=0.5, repetition_penalty=1.2,
        thinking_budget=6, max_total_tokens=15,
    )  # fmt: skip

    def run(take: int, said: tuple[Token, ...] = (), drawn: int = 0) -> tuple[tuple[Token, ...], int]:
        sampler = Sampler(options, vocab_size=VOCAB, drawn=drawn)
        decoding = Decoding([1, 2], sampler, room=90, eos_ids=(), think=THINK, starts_in_thinking=True, begun=said)
        while not decoding.finished and len(decoding.reply_ids) < take:
            if decoding.forced() is None:
                decoding.take(table[decoding.unseen(0)[-1]])
        return decoding.said, sampler.drawn

    assert run(15 - cut, *run(cut)) == run(15)


def test_without_thinking_its_tokens_mean_nothing() -> None:
    reply = decode(FakeEngine([OPEN, 10, EOS]))
    assert list(reply) == [Token(OPEN), Token(10), Token(EOS)]


@pytest.mark.parametrize("stop", [EOS, EOT])
def test_a_stop_token_inside_thinking_closes_it(stop: int) -> None:
    engine = FakeEngine([10, stop, 12, EOS])
    reply = decode(engine, think=THINK, starts_in_thinking=True)
    tokens = list(reply)
    assert tokens == [
        Token(10, thinking=True),
        Token(CLOSE, forced=True, thinking=True),
        Token(BLANK, forced=True),
        Token(12),
        Token(EOS),
    ]
    assert reply.finish == (StopReason.STOP_TOKEN, 1, 2, StopReason.STOP_TOKEN, False)
    assert engine.feeds == [(1, 2, 3), (10,), (CLOSE, BLANK), (12,)]
    assert_consistent(reply, engine, (1, 2, 3), tokens)


def test_a_stop_token_that_was_dropped_is_not_penalised() -> None:
    engine = FakeEngine([EOS, EOS])
    options = GREEDY.replace(presence_penalty=2.0)
    assert ids_of(decode(engine, options=options, think=THINK, starts_in_thinking=True)) == [CLOSE, BLANK, EOS]


@pytest.mark.parametrize("budget", [0, 1, 3])
def test_the_thinking_budget_closes_thinking_and_the_answer_follows(budget: int) -> None:
    thoughts = [10, 11, 12, 13, 14][:budget]
    engine = FakeEngine([*thoughts, 30, 31, 32, 33])
    options = GREEDY.replace(thinking_budget=budget, max_tokens=2)
    reply = decode(engine, options=options, think=THINK, starts_in_thinking=True)
    tokens = list(reply)
    assert tokens == [
        *(Token(id, thinking=True) for id in thoughts),
        *(Token(id, forced=True, thinking=True) for id in (50, 51, 52, CLOSE)),
        Token(BLANK, forced=True),
        Token(30),
        Token(31),
    ]
    assert reply.finish == (StopReason.LENGTH, budget, 2, StopReason.LENGTH, False)
    assert_consistent(reply, engine, (1, 2, 3), tokens)


def test_thinking_that_ends_within_its_budget_is_left_alone() -> None:
    reply = decode(
        FakeEngine([10, CLOSE, 30, EOS]),
        options=GREEDY.replace(thinking_budget=2),
        think=THINK,
        starts_in_thinking=True,
    )
    assert ids_of(reply) == [10, CLOSE, 30, EOS]
    assert reply.finish.thinking_cut is None


CYCLE = list(range(10, 26))  # varied enough for an alarm after 256 tokens


def test_a_loop_in_thinking_closes_thinking() -> None:
    engine = FakeEngine([*(CYCLE * 16)[:256], 30, EOS])
    reply = decode(engine, think=THINK, starts_in_thinking=True)
    tokens = list(reply)
    assert [token.id for token in tokens if token.forced] == [50, 51, 52, CLOSE, BLANK]
    assert ids_of(tokens[-2:]) == [30, EOS]
    assert reply.finish == (StopReason.STOP_TOKEN, 256, 2, StopReason.LOOP, False)
    assert_consistent(reply, engine, (1, 2, 3), tokens)


def test_an_answer_that_goes_on_where_the_loop_was_cut_is_no_loop() -> None:
    engine = FakeEngine([*(CYCLE * 16)[:256], *(CYCLE * 17)[256:264], EOS])
    reply = decode(engine, think=THINK, starts_in_thinking=True)
    assert sum(1 for _ in reply) == 256 + 5 + 9
    assert reply.finish.reason is StopReason.STOP_TOKEN


def test_a_loop_in_the_answer_ends_it() -> None:
    engine = FakeEngine(CYCLE * 100)
    reply = decode(engine)
    assert len(list(reply)) == 256
    assert reply.finish == (StopReason.LOOP, 0, 256, None, False)


def test_the_loop_guard_can_be_switched_off() -> None:
    reply = decode(FakeEngine(CYCLE * 100), options=GREEDY.replace(loop_guard=False, max_tokens=900))
    assert len(list(reply)) == 900
    assert reply.finish.reason is StopReason.LENGTH


def test_the_context_is_filled_and_not_a_token_more() -> None:
    engine = FakeEngine(context_limit=10)
    reply = decode(engine)
    assert len(list(reply)) == 7
    assert reply.finish.reason is StopReason.CONTEXT_FULL
    assert engine.position + len(reply.pending) == 10


@pytest.mark.parametrize(("limit", "answered"), [(3 + 4 + 5, 0), (3 + 4 + 5 + 1, 1)])
def test_thinking_is_closed_only_if_an_answer_fits_behind_it(limit: int, answered: int) -> None:
    engine = FakeEngine([10, 11, 12, 13, 30], context_limit=limit)
    options = GREEDY.replace(thinking_budget=4)
    reply = decode(engine, options=options, think=THINK, starts_in_thinking=True)
    tokens = list(reply)
    assert len(tokens) == (4 + 5 + 1 if answered else 4)
    expected = StopReason.LENGTH if answered else None
    assert reply.finish == (StopReason.CONTEXT_FULL, 4, answered, expected, not answered)
    assert_consistent(reply, engine, (1, 2, 3), tokens)


def test_thinking_may_fill_the_context_too() -> None:
    reply = decode(FakeEngine(context_limit=9), think=THINK, starts_in_thinking=True)
    assert len(list(reply)) == 6
    assert reply.finish == (StopReason.CONTEXT_FULL, 6, 0, None, True)


@pytest.mark.parametrize("length", [10, 11, 500])
def test_a_prompt_that_leaves_no_room_is_refused_before_any_work(length: int) -> None:
    engine = FakeEngine(context_limit=12)
    engine.context = [5, 5]
    with pytest.raises(MemoryBudgetError, match=rf"prompt \({length} tokens\) leaves no room.*: 10 tokens"):
        decode(engine, prompt=[1] * length)
    assert engine.feeds == []


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        decode(FakeEngine(), prompt=())


@pytest.mark.parametrize("leave_after", range(1, 9))
def test_leaving_at_any_token_leaves_a_consistent_state(leave_after: int) -> None:
    engine = FakeEngine([10, 11, EOS, 12, 13, 14])
    reply = decode(engine, think=THINK, starts_in_thinking=True)
    tokens = list[Token]()
    for token in reply:
        tokens.append(token)
        if len(tokens) == leave_after:
            break
    assert reply.finish.reason is StopReason.INTERRUPTED
    assert reply.finish.in_thinking == (leave_after < 3)
    assert_consistent(reply, engine, (1, 2, 3), tokens)

    following = decode(engine, prompt=[*reply.pending, 40])
    next(iter(following))
    assert engine.context == [1, 2, 3, *ids_of(tokens), 40]


@pytest.mark.parametrize(("interrupt_after", "chunk"), [(1, 0), (1, 2), (3, 0)])
def test_ctrl_c_while_the_model_works(interrupt_after: int, chunk: int) -> None:
    engine = FakeEngine([10, 11, 12], interrupt_after=interrupt_after, chunk=chunk)
    reply = decode(engine)
    tokens = list[Token]()
    with pytest.raises(KeyboardInterrupt):
        tokens.extend(reply)  # keeps what came before the interruption
    assert reply.finish.reason is StopReason.INTERRUPTED
    assert_consistent(reply, engine, (1, 2, 3), tokens)


def test_a_stop_string_ends_the_reply_from_outside() -> None:
    engine = FakeEngine([10, 11, 12])
    reply = decode(engine)
    tokens = list[Token]()
    for token in reply:
        tokens.append(token)
        if token.id == 11:
            reply.stop(StopReason.STOP_STRING)
    assert ids_of(tokens) == [10, 11]
    assert reply.finish.reason is StopReason.STOP_STRING
    assert reply.pending == (11,)


def test_broken_logits_come_through_as_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine([10])
    monkeypatch.setattr(engine, "feed", lambda ids: np.full(VOCAB, np.nan, np.float32))
    with pytest.raises(ModelError, match="not finite"):
        list(decode(engine))


def test_the_prompt_counts_for_repetition_only(monkeypatch: pytest.MonkeyPatch) -> None:
    options = GREEDY.replace(repetition_penalty=2.0, presence_penalty=2.0, max_tokens=1)
    engine = FakeEngine()
    monkeypatch.setattr(engine, "feed", lambda ids: np.arange(VOCAB, dtype=np.float32) / 10)
    assert ids_of(decode(engine, prompt=[VOCAB - 1, 3], options=options)) == [VOCAB - 2]


@settings(max_examples=200, deadline=None)
@given(
    script=st.lists(st.sampled_from([10, 11, 12, EOS, EOT, OPEN, CLOSE, BLANK]), max_size=40),
    prompt=st.lists(st.integers(0, 49), min_size=1, max_size=5),
    context_limit=st.integers(6, 60),
    max_tokens=st.none() | st.integers(1, 20),
    budget=st.none() | st.integers(0, 10),
    total=st.none() | st.integers(1, 20),
    starts_in_thinking=st.booleans(),
    leave_after=st.integers(0, 60),
)
def test_invariants_of_any_reply(
    script: list[int], prompt: list[int], context_limit: int, max_tokens: int | None, budget: int | None,
    total: int | None, starts_in_thinking: bool, leave_after: int,
) -> None:  # fmt: skip
    engine = FakeEngine(script, context_limit)
    options = GREEDY.replace(max_tokens=max_tokens, thinking_budget=budget, max_total_tokens=total)
    reply = decode(engine, prompt, options, think=THINK, starts_in_thinking=starts_in_thinking)
    tokens = list[Token]()
    for token in itertools.islice(reply, leave_after):
        tokens.append(token)
        assert_consistent(reply, engine, prompt, tokens)
        assert len(prompt) + len(tokens) <= context_limit

    sampled = [token for token in tokens if not token.forced]
    answer = [token for token in sampled if not token.thinking]
    assert all(token.id not in (EOS, EOT) for token in answer[:-1])
    assert all(token.id not in (EOS, EOT) for token in tokens if token.thinking)
    assert len(answer) <= (max_tokens or len(answer))
    assert len(sampled) <= (total or len(sampled))
    begun = next((i for i, token in enumerate(tokens) if not token.thinking), len(tokens))
    late = [token for token in tokens[begun:] if not token.forced]
    assert len(late) <= (max_tokens or len(late))
    opened = sum(token.id == OPEN for token in sampled)
    assert len(sampled) - len(answer) <= (budget if budget is not None else len(sampled)) + opened
    assert reply.finish.answer_tokens == len(answer)
    assert reply.finish.thinking_tokens == len(sampled) - len(answer)
    last = tokens[-1] if tokens else Token(0, thinking=starts_in_thinking)
    assert reply.finish.in_thinking == (last.thinking and last.id != CLOSE)
