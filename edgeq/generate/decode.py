"""The decode loop: feed, sample, apply the rules, yield; and again.

It is driven by an `Engine`, which is all it knows of the model. The bookkeeping is one list, the prompt and every token
yielded so far; the engine's position says how much of it the model has seen. What it has not seen is fed when the next
logits are needed and not before, so nothing is fed twice, the last token of a reply is not fed at all, and leaving the
loop at any point (Ctrl-C, an exception, `break`) leaves nothing to repair.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import MemoryBudgetError, UsageError
from edgeq.generate.loop_guard import LoopGuard
from edgeq.generate.sampling import Sampler
from edgeq.generate.stop import StopReason

__all__ = ["THINKING_CUT", "Decoding", "Engine", "Finish", "ThinkTokens", "Token"]

THINKING_CUT = "\n\nThat is enough thought; I can answer now.\n"
"""What the model is made to say when its thinking is cut short, before `</think>`."""


class Engine(Protocol):
    """A model with a context that grows."""

    @property
    def position(self) -> int:
        """Tokens in the context. After a `feed` that was interrupted, those that got in: a prefix of what was fed."""

    @property
    def context_limit(self) -> int:
        """Tokens that the context can hold."""

    def feed(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append `ids` (at least one) to the context; return the logits of the last, float32 [rows]."""


class ThinkTokens(NamedTuple):
    """The ids around a thinking block."""

    open: int
    """`<think>`"""
    close: int
    """`</think>`"""
    cut: tuple[int, ...]
    """Said before a forced close: `THINKING_CUT`, or whatever suits."""
    after: tuple[int, ...]
    """Said after a forced close, as the model does after its own: a blank line."""


class Token(NamedTuple):
    """A token of the reply. The stop token comes too, as the last."""

    id: int
    forced: bool = False
    """Put in the model's mouth rather than sampled."""
    thinking: bool = False
    """Inside the thinking block, whose `<think>` and `</think>` belong to it."""


class Finish(NamedTuple):
    """How a reply ended. Token counts are of sampled tokens, the stop token included."""

    reason: StopReason
    thinking_tokens: int
    answer_tokens: int
    thinking_cut: StopReason | None
    """Why thinking was closed by force: budget (LENGTH), LOOP, or a STOP_TOKEN in it; None if it was not."""
    in_thinking: bool
    """It ended inside the thinking block, which a chat has to close."""


class Decoding:
    """One reply to `prompt_ids`, an iterable of `Token`s.

        reply = Decoding(engine, prompt_ids, sampler, eos_ids={248044, 248046})
        for token in reply:
            ...                                            # leaving early is fine
        reply.finish, reply.reply_ids, reply.pending

    **Ends** with the first of `eos_ids` in the answer, `max_tokens` of the answer, a loop in the answer, or a full
    context (see `Finish.reason`); or when the consumer stops asking (INTERRUPTED), or calls `stop` with a reason that
    only it can know, such as a stop string in the text.

    **Thinking** (if `think` is given) has rules of its own. A stop token inside it is dropped and taken for
    `</think>`; the `thinking_budget`, or a loop, closes it with `think.cut` and `</think>`. The answer follows. There
    is one block: after its end, or if `<think>` never comes, everything is answer. `starts_in_thinking`: the prompt
    ends inside the block.

    **State.** The engine's context is what it held before, the prompt and `reply_ids`, less `pending`: usually the last
    token, which no one needed the logits of. A next turn starts with `pending`.

    Raises UsageError for an empty prompt, MemoryBudgetError for one that leaves no room for a reply, before any work.
    """

    def __init__(
        self,
        engine: Engine,
        prompt_ids: Sequence[int],
        sampler: Sampler,
        *,
        eos_ids: Collection[int],
        think: ThinkTokens | None = None,
        starts_in_thinking: bool = False,
    ) -> None:
        assert think is not None or not starts_in_thinking, "thinking without its tokens cannot end"
        _check_prompt(engine, len(prompt_ids))
        sampler.observe_prompt(prompt_ids)
        self._engine = engine
        self._sampler = sampler
        self._settings = sampler.settings
        self._eos_ids = frozenset(eos_ids)
        self._think = think
        self._guard = LoopGuard() if sampler.settings.loop_guard else None
        self._start = engine.position
        self._prompt_length = len(prompt_ids)
        self._ids = list(prompt_ids)
        self._thinking = starts_in_thinking
        self._may_think = think is not None and not starts_in_thinking
        self._looping = False
        self._thinking_tokens = 0
        self._answer_tokens = 0
        self._thinking_cut: StopReason | None = None
        self._reason: StopReason | None = None

    def __iter__(self) -> Iterator[Token]:
        while self._reason is None:
            if (limit := self._thinking_limit()) is not None:
                yield from self._close_thinking(limit)
                continue
            token = self._sampler.sample(self._engine.feed(self.pending))
            if self._thinking and token in self._eos_ids:
                yield from self._close_thinking(StopReason.STOP_TOKEN)
            else:
                yield self._take(token)

    @property
    def reply_ids(self) -> tuple[int, ...]:
        """Ids of the reply so far: those yielded, and after Ctrl-C perhaps one that was just about to be."""
        return tuple(self._ids[self._prompt_length :])

    @property
    def pending(self) -> tuple[int, ...]:
        """Ids of the prompt and the reply that are not in the engine's context yet."""
        return tuple(self._ids[self._engine.position - self._start :])

    @property
    def finish(self) -> Finish:
        """How the reply ended; while it goes on, how it would have ended if it were left now."""
        return Finish(
            self._reason or StopReason.INTERRUPTED,
            self._thinking_tokens,
            self._answer_tokens,
            self._thinking_cut,
            self._thinking,
        )

    def stop(self, reason: StopReason) -> None:
        """End the reply after the last token yielded."""
        self._reason = reason

    def _thinking_limit(self) -> StopReason | None:
        """Why thinking has to be closed now, if it has."""
        if not self._thinking:
            return None
        budget = self._settings.thinking_budget
        if budget is not None and self._thinking_tokens >= budget:
            return StopReason.LENGTH
        return StopReason.LOOP if self._looping else None

    def _close_thinking(self, why: StopReason) -> Iterator[Token]:
        """Close the thinking block by force, if an answer would fit behind it."""
        assert self._think is not None
        said = () if why is StopReason.STOP_TOKEN else self._think.cut
        forced = (*said, self._think.close, *self._think.after)
        if len(forced) >= self._room:
            self._reason = StopReason.CONTEXT_FULL
            return
        self._thinking_cut = why
        for token in forced:
            yield self._append(token, forced=True)

    def _take(self, token: int) -> Token:
        """Put a sampled token into the reply, and decide whether it was the last."""
        self._sampler.accept(token)
        taken = self._append(token)
        if taken.thinking:
            self._thinking_tokens += 1
        else:
            self._answer_tokens += 1
            self._reason = self._answer_end(token)
        if self._reason is None and not self._room:
            self._reason = StopReason.CONTEXT_FULL
        return taken

    def _answer_end(self, token: int) -> StopReason | None:
        """Why the answer ends with `token`, its latest, if it does."""
        if token in self._eos_ids:
            return StopReason.STOP_TOKEN
        if self._looping:
            return StopReason.LOOP
        if self._answer_tokens == self._settings.max_tokens:
            return StopReason.LENGTH
        return None

    def _append(self, token: int, *, forced: bool = False) -> Token:
        """Add `token` to the ids, entering and leaving the thinking block with its tokens."""
        if self._may_think and self._think is not None and token == self._think.open:
            self._thinking, self._may_think = True, False
        taken = Token(token, forced, self._thinking)
        if self._think is not None and token == self._think.close:
            self._thinking = self._may_think = False
        self._ids.append(token)
        self._looping = self._guard is not None and self._guard.observe(token)
        return taken

    @property
    def _room(self) -> int:
        """Tokens that the context can still take, those pending counted as taken."""
        return self._engine.context_limit - self._start - len(self._ids)


def _check_prompt(engine: Engine, length: int) -> None:
    """Raise unless a prompt of `length` tokens can be fed and leaves room for a token of reply."""
    if not length:
        raise UsageError("the prompt is empty: there is nothing to continue")
    room = engine.context_limit - engine.position
    if length >= room:
        raise MemoryBudgetError(
            f"the prompt has {length} tokens, but the context of {engine.context_limit} has room for {room}"
            " with the reply",
            hint="shorten the prompt, start a new conversation or use a larger context",
        )
