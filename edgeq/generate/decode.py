"""Decoding: told the logits, it says which token comes next, by the settings and the rules of a reply.

It knows nothing of the model. Whoever drives it asks for what the model has not seen (`unseen`), runs that, and hands
in the logits (`take`). The bookkeeping is one list, the prompt and every token said so far; how much of it the model
has seen, the driver's context knows. So nothing is fed twice, the last token of a reply is not fed at all, and leaving
at any point (Ctrl-C, an exception, `break`) leaves nothing to repair.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import MemoryBudgetError, UsageError
from edgeq.generate.constraint import Constraint
from edgeq.generate.logprobs import Logprobs
from edgeq.generate.loop_guard import LoopGuard
from edgeq.generate.sampling import Sampler
from edgeq.generate.speculate import Tally
from edgeq.generate.stop import StopReason

__all__ = ["THINKING_CUT", "Decoding", "Finish", "ThinkTokens", "Token"]

THINKING_CUT = "\n\nThat is enough thought; I can answer now.\n"
"""What the model is made to say when its thinking is cut short, before `</think>`."""


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
    logprobs: Logprobs | None = None
    """If they were asked for, and the model was asked for the token."""
    only: bool = False
    """The only one that the constraint allowed, whatever the model thought of it."""


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
    """One reply to `prompt_ids`, which has room for `room` tokens, the prompt's included.

        decoding = Decoding(prompt_ids, sampler, room=4096, eos_ids={248044, 248046})
        while not decoding.finished:
            token = decoding.forced() or decoding.take(logits_after(decoding.unseen(seen)))
            ...                                            # leaving early is fine
        decoding.finish, decoding.reply_ids

    **Ends** with the first of `eos_ids` in the answer, `max_tokens` of the answer, `max_total_tokens` of thinking and
    answer together, a loop in the answer, or a full context (see `Finish.reason`); or when nobody goes on
    (INTERRUPTED), or calls `stop` with a reason that only the caller can know, such as a stop string in the text.

    `tally` counts what whoever drives it has drafted.

    **A constraint** holds for the answer: its mask is laid over what the model says, and the reply ends (COMPLETE)
    where nothing may follow. Behind a thinking block comes the blank line that the model would say itself.

    **Thinking** (if `think` is given) has rules of its own. A stop token inside it is dropped and taken for
    `</think>`; the `thinking_budget`, or a loop, closes it with `think.cut` and `</think>`. The answer follows. Should
    the model begin to think again, what is left of the budget holds for that, too, and `max_tokens` counts it as
    answer. `starts_in_thinking`: the prompt ends inside a block.

    **Going on** with a reply that ended early is a new one with the same prompt, and in `begun` what was said before:
    penalties and the thinking budget count it, the other limits and the loop guard begin anew.

    Raises UsageError for an empty prompt, MemoryBudgetError for one that leaves no room for a reply, before any work.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        sampler: Sampler,
        *,
        room: int,
        eos_ids: Collection[int],
        think: ThinkTokens | None = None,
        starts_in_thinking: bool = False,
        begun: Sequence[Token] = (),
        constraint: Constraint | None = None,
    ) -> None:
        assert think is not None or not starts_in_thinking, "thinking without its tokens cannot end"
        _check_prompt(len(prompt_ids) + len(begun), room)
        sampler.observe_prompt(prompt_ids)
        self._sampler = sampler
        self._settings = sampler.settings
        self._eos_ids = frozenset(eos_ids)
        self._think = think
        self._constraint = constraint
        self.constrained = 0
        """Tokens that were the only ones that the constraint allowed."""
        self._guard = LoopGuard() if sampler.settings.loop_guard else None
        self._capacity = room
        self._ids = list(prompt_ids)
        self._forced: deque[int] = deque()  # decided, but not yet said
        self._thinking = starts_in_thinking
        self._answering = False  # the answer has begun
        self._again = False  # the latest block came after that
        self._budget_used = 0  # tokens of all blocks, those of `begun` included
        self._late = 0  # tokens of blocks after the answer began
        self._said = list(begun)
        self._go_on_from(begun)
        self._prompt_length = len(self._ids)
        self._looping = False
        self._thinking_tokens = 0
        self._answer_tokens = 0
        self._thinking_cut: StopReason | None = None
        self._reason: StopReason | None = None
        self.tally = Tally()
        self._enforce_thinking_limit()

    def _go_on_from(self, begun: Sequence[Token]) -> None:
        """Count what was said before, and complete what was put in behind a `</think>` but not to its end."""
        for token in begun:
            if not token.forced:
                self._sampler.accept(token.id)
                self._budget_used += token.thinking
                if self._constraint is not None and not token.thinking:
                    self._constraint.accept(token.id)
            self._enter(token.id)
            self._ids.append(token.id)
        if not begun or self._think is None or self._thinking:
            return
        if begun[-1].forced or (self._constraint is not None and begun[-1].id == self._think.close):
            self._forced.extend(self._think.after[self._ids[::-1].index(self._think.close) :])

    @property
    def finished(self) -> bool:
        """Whether the reply has ended."""
        return self._reason is not None

    def forced(self) -> Token | None:
        """The next token, if it is decided already and needs no logits."""
        return self._append(self._forced.popleft(), forced=True) if self._forced else None

    def take(self, logits: NDArray[np.float32]) -> Token | None:
        """The next token, chosen by the logits float32 [rows] after everything that was said; None where the choice
        ends the reply or only decides what is said by force.
        """
        assert not self._forced, "what is forced comes first"
        allowed = self._constraint.allowed() if self._constraint and not self._thinking else None
        token = self._sampler.sample(logits, allowed)
        if self._thinking and token in self._eos_ids:
            self._close_thinking(StopReason.STOP_TOKEN)
            return self.forced()
        taken = self._accept(token)
        if allowed is not None:
            taken = self._constrain(taken, allowed)
        self._enforce_thinking_limit()
        if (most := self._settings.logprobs) is not None:
            taken = taken._replace(logprobs=self._sampler.logprobs(logits, token, most))
        return taken

    def _constrain(self, taken: Token, allowed: NDArray[np.bool_]) -> Token:
        """Go on in the constraint behind a token that it allowed."""
        assert self._constraint is not None
        only = int(np.count_nonzero(allowed)) == 1
        self.constrained += only
        if taken.id not in self._eos_ids:
            self._constraint.accept(taken.id)
            if self._constraint.complete:  # whatever else would have ended it here
                self._reason = StopReason.COMPLETE
        return taken._replace(only=only)

    @property
    def said(self) -> tuple[Token, ...]:
        """The reply so far, and before it what it was `begun` with."""
        return tuple(self._said)

    @property
    def reply_ids(self) -> tuple[int, ...]:
        """Ids of the reply so far."""
        return tuple(self._ids[self._prompt_length :])

    def unseen(self, seen: int) -> tuple[int, ...]:
        """Ids of prompt and reply after the first `seen`: what the model is fed next, or a next turn begins with."""
        return tuple(self._ids[seen:])

    @property
    def remaining(self) -> int:
        """Tokens that it can still say at most, as far as is known: drafts beyond them would be for nothing."""
        settings, said = self._settings, self._thinking_tokens + self._answer_tokens
        ends = [(settings.max_total_tokens, said)]
        if self._thinking:
            ends.append((settings.thinking_budget, self._budget_used))
        if self._again or not self._thinking:
            ends.append((settings.max_tokens, self._answer_tokens + self._late))
        return min([self._room, *(limit - done for limit, done in ends if limit is not None)])

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

    def move(self, prompt_ids: Sequence[int]) -> None:
        """Go on after another prompt, which leaves more room: the reply so far stays, not ended by its lack."""
        said = [token.id for token in self._said]
        own = len(self._ids) - self._prompt_length
        self._ids = [*prompt_ids, *said]
        self._prompt_length = len(self._ids) - own
        if self._reason is StopReason.CONTEXT_FULL:
            self._reason = None
            self._enforce_thinking_limit()

    def stop(self, reason: StopReason) -> None:
        """End the reply after the last token."""
        self._reason = reason

    def _enforce_thinking_limit(self) -> None:
        """Close the thinking block if it may not go on."""
        if not self._thinking or self.finished:
            return
        budget = self._settings.thinking_budget
        if budget is not None and self._budget_used >= budget:
            self._close_thinking(StopReason.LENGTH)
        elif self._looping:
            self._close_thinking(StopReason.LOOP)

    def _close_thinking(self, why: StopReason) -> None:
        """Close the thinking block by force, if an answer would fit behind it."""
        assert self._think is not None
        said = () if why is StopReason.STOP_TOKEN or self._answering else self._think.cut
        forced = (*said, self._think.close, *self._think.after)
        if len(forced) >= self._room:
            self._reason = StopReason.CONTEXT_FULL
            return
        self._thinking_cut = why
        self._forced.extend(forced[self._forced_last() :])

    def _forced_last(self) -> int:
        """Tokens at the end of the reply that were put in by force: an end of thinking that was left in its middle."""
        return next((n for n, token in enumerate(reversed(self._said)) if not token.forced), len(self._said))

    def _accept(self, token: int) -> Token:
        """Put a sampled token into the reply, and decide whether it was the last."""
        self._sampler.accept(token)
        taken = self._append(token)
        if taken.thinking:
            self._thinking_tokens += 1
            self._budget_used += 1
            self._late += self._again
            if self._constraint and self._think and not self._thinking and len(self._think.after) < self._room:
                self._forced.extend(self._think.after)
        else:
            self._answer_tokens += 1
        self._reason = self._end(taken)
        return taken

    def _end(self, last: Token) -> StopReason | None:
        """Why the reply ends with `last`, if it does."""
        settings, answer = self._settings, self._answer_tokens + self._late
        if not last.thinking and last.id in self._eos_ids:
            return StopReason.STOP_TOKEN
        if not last.thinking and self._looping:
            return StopReason.LOOP
        if answer == settings.max_tokens or self._thinking_tokens + self._answer_tokens == settings.max_total_tokens:
            return StopReason.LENGTH
        return None if self._room else StopReason.CONTEXT_FULL

    def _append(self, token: int, *, forced: bool = False) -> Token:
        """Add `token` to the ids."""
        taken = Token(token, forced, self._enter(token))
        self._ids.append(token)
        self._said.append(taken)
        self._looping = self._guard is not None and self._guard.observe(token)
        return taken

    def _enter(self, token: int) -> bool:
        """Whether `token` is thinking, whose blocks are entered and left with their tokens."""
        if self._think is not None and token == self._think.open and not self._thinking:
            self._thinking, self._again = True, self._answering
        thinking = self._thinking
        if not thinking or (self._think is not None and token == self._think.close):
            self._thinking, self._answering = False, True
        return thinking

    @property
    def _room(self) -> int:
        """Tokens that the context can still take, those pending counted as taken."""
        return self._capacity - len(self._ids)


def _check_prompt(length: int, room: int) -> None:
    """Raise unless a prompt of `length` tokens can be fed and leaves room for a token of reply."""
    if not length:
        raise UsageError("the prompt is empty: there is nothing to continue")
    if length >= room:
        raise MemoryBudgetError(
            f"the prompt ({length} tokens) leaves no room for a reply: {room} tokens fit into the context",
            hint="shorten the prompt, start a new conversation or use a larger context",
        )
