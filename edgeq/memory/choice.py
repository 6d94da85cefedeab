"""What a model runs with under a ceiling: context, KV bits, chunk, which weights stay resident, how large pictures are.

What was asked for is kept, or refused with what would fit instead. What was not is chosen, in this order:

* keys and values as the backend has them where GOOD_CONTEXT tokens fit, else in 8 bits where they fit so, else the same
  with LEAST_CONTEXT (those asked for instead of both), and never in fewer bits;
* all weights resident, and the most tokens of context that then fit;
* where not LEAST_CONTEXT tokens (or not those asked for) do, prompts in smaller chunks;
* where that is not enough, part of the weights resident and the rest read anew in every pass
  (`edgeq.loading.LoadedWeights`).

Kept states and features of pictures are not counted: they take what is free, and are the first to give way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any, NamedTuple
from warnings import warn

from edgeq.backends.ops import Ops
from edgeq.config import TextConfig
from edgeq.errors import MemoryBudgetError
from edgeq.formats.mapped import Pages
from edgeq.memory.budget import SPARE, Budget, megabytes
from edgeq.memory.ceiling import Ceiling, available_memory, cache_room
from edgeq.memory.plan import (
    PAGE,
    SMALLEST_CHUNK,
    Plan,
    Planned,
    largest_context,
    part_nbytes,
    plan_memory,
    prefill_chunk,
)
from edgeq.vision.visual import Grid
from edgeq.weights import Part, TensorSpec

__all__ = [
    "IMPORTED_LATER", "Asked", "Choice", "choose_settings", "find_settings", "least_ceiling",
    "least_plan", "most_context", "refusal", "taken", "tell", "warn_of_swapping",
]  # fmt: skip

GOOD_CONTEXT, LEAST_CONTEXT = 16_384, 4096  # tokens
WINDOW = 32 << 20
"""Bytes of weights that are resident while they are read anew, and at least the largest layer."""

EDGES = 4 << 20  # bytes of pages around what is read anew
IMPORTED_LATER = 12 << 20
"""Bytes that a process still takes after a model is loaded: templates' library, images'."""

STEP = 4 << 20  # bytes: what is chosen does not hang on a few pages more or less

MakeOps = Callable[[int | None], Ops[Any, Any]]
"""The backend's operations with keys and values of so many bits; None is as many as it likes."""


class Asked(NamedTuple):
    """What somebody wants, whatever it takes; None leaves it to the plan. grids: of pictures that it is to hold beside
    all else. sequences: at a time."""

    context: int | None = None
    kv_bits: int | None = None
    grids: Sequence[Grid] = ()
    sequences: int = 1


class Choice(NamedTuple):
    """What a model runs with.

    plan: what it takes at its peak; where weights are read anew, `weights` are those resident at a time.
    streamed: bytes of the language model's mapped weights that are read anew in every pass.
    resident: bytes of them that stay; None where all do. resident_at_a_time: with those that are being read anew.
    cached: whether the system's page cache has room for those; if not, they come from the disk.
    drafts: whether there is room for the MTP head as well. picture_tokens: of the largest picture, 0 if there is no
    room for the tower.
    """

    ceiling: Ceiling
    ops: Ops[Any, Any]
    kv_bits: int | None
    context: int
    chunk: int
    plan: Plan
    drafts: bool
    picture_tokens: int
    streamed: int = 0
    resident: int | None = None
    resident_at_a_time: int = 0
    cached: bool = True


def taken(more: int = 0) -> int:
    """Bytes that the process takes before the model is there, with what it imports later and `more`, in whole STEPs."""
    Budget.look()  # libraries of the backend and of the tokenizer, since the last look
    return -(-(Budget.process() + IMPORTED_LATER + more) // STEP) * STEP


def choose_settings(model: Planned, make_ops: MakeOps, ceiling: Ceiling, asked: Asked, used: int = 0) -> Choice:
    """What runs under the ceiling; MemoryBudgetError, with numbers and what would fit, where nothing does.

    used: bytes that the process takes already, if that is more than the backend says of itself.
    """
    choice = find_settings(model, make_ops, ceiling, asked, used)
    if choice is None:
        raise refusal(model, make_ops, ceiling, asked, used)
    return choice


def find_settings(model: Planned, make_ops: MakeOps, ceiling: Ceiling, asked: Asked, used: int = 0) -> Choice | None:
    """The same; None where nothing runs."""
    for choice in _choices(model, make_ops, ceiling, asked, used):
        plan = choice.plan._replace(runtime=max(choice.plan.runtime, used))
        room = cache_room(max(0, plan.total - used), plan.total) if choice.streamed else None
        return choice._replace(plan=plan, cached=room is None or room >= choice.streamed)
    return None


def most_context(model: Planned, make_ops: MakeOps, ceiling: Ceiling, asked: Asked, used: int = 0) -> int:
    """The largest context that runs with all weights resident, if it is asked for, or where none does with part of
    them; 0 where none does either."""
    options = _Options(model, list(_variants(model.config.text, make_ops, asked)), ceiling, used, asked)
    whole = max(options.most(ops, _chunks(model.config.text, ops)[-1]) for _, ops in options.variants)
    pages = model.config.text.longest_context // PAGE
    return whole or PAGE * _most(pages, lambda n: next(options.streamed(n * PAGE), None) is not None)


def _choices(model: Planned, make_ops: MakeOps, ceiling: Ceiling, asked: Asked, used: int) -> Iterator[Choice]:
    """What fits, the best first."""
    options = _Options(model, list(_variants(model.config.text, make_ops, asked)), ceiling, used, asked)
    if asked.context is not None:
        yield from options.whole(asked.context, exactly=True)
        yield from options.streamed(asked.context)
        return
    most = model.config.text.longest_context
    yield from options.whole(min(GOOD_CONTEXT, most), smaller_chunks=False)
    yield from options.whole(min(LEAST_CONTEXT, most))
    yield from options.streamed(min(LEAST_CONTEXT, most))
    yield from options.whole(1)
    for tokens in (2048, 1024, 512):
        yield from options.streamed(min(tokens, most))


class _Options(NamedTuple):
    """What there is to choose from: operations by KV bits, as good as they are; the ceiling, and what is used of it."""

    model: Planned
    variants: Sequence[tuple[int | None, Ops[Any, Any]]]
    ceiling: Ceiling
    used: int
    asked: Asked

    def plan(self, ops: Ops[Any, Any], context: int, chunk: int, *, drafts: bool = False) -> Plan:
        """With all weights."""
        return plan_memory(
            self.model, ops, context, chunk, self.asked.grids, sequences=self.asked.sequences, drafts=drafts
        )

    def most(self, ops: Ops[Any, Any], chunk: int, *, drafts: bool = False) -> int:
        """Tokens with which that fits."""
        return largest_context(
            self.model, ops, self.room(ops), chunk, self.asked.grids, sequences=self.asked.sequences, drafts=drafts
        )

    def room(self, ops: Ops[Any, Any]) -> int:
        """Bytes that a plan may take."""
        return self.ceiling.nbytes - SPARE - max(0, self.used - ops.process_nbytes)

    def whole(self, context: int, *, exactly: bool = False, smaller_chunks: bool = True) -> Iterator[Choice]:
        """With all weights resident, and at least so many tokens, or just these."""
        for bits, ops in self.variants:
            room = self.room(ops)
            for chunk in _chunks(self.model.config.text, ops)[: None if smaller_chunks else 1]:
                for drafts in (True, False):
                    tokens = context if exactly else self.most(ops, chunk, drafts=drafts)
                    plan = self.plan(ops, max(1, tokens), chunk, drafts=drafts)
                    if plan.total <= room and tokens >= context:
                        pictures = _picture_tokens(self.model, ops, plan, room)
                        yield Choice(self.ceiling, ops, bits, tokens, chunk, plan, drafts, pictures)

    def streamed(self, context: int) -> Iterator[Choice]:
        """With so many tokens, and as many of the weights resident as there is room for."""
        mapped = sum(
            self.model.memory_nbytes(spec)
            for spec, _ in self.model.storage()
            if spec.part is Part.TEXT and spec.is_matrix and self.model.is_mapped(spec)
        )
        window = max(WINDOW, _largest_layer(self.model)) + EDGES
        for bits, ops in self.variants:
            room = self.room(ops)
            for chunk in _chunks(self.model.config.text, ops) if ops.maps_files else ():
                plan = self.plan(ops, context, chunk)
                resident = room - (plan.total - mapped)
                if window <= resident < mapped:
                    plan, stays = plan._replace(weights=plan.weights - mapped + resident), resident - window
                    pictures = _picture_tokens(self.model, ops, plan, room)
                    yield Choice(
                        self.ceiling, ops, bits, context, chunk, plan, False, pictures, mapped - stays, stays, resident
                    )


def _variants(c: TextConfig, make_ops: MakeOps, asked: Asked) -> Iterator[tuple[int | None, Ops[Any, Any]]]:
    """The operations by KV bits: as asked for, or as the backend likes it and then, if they are fewer, 8."""
    own = make_ops(asked.kv_bits)
    yield asked.kv_bits, own
    if asked.kv_bits is None and own.kv_dtype not in ("int8", "int4"):
        try:
            fewer = make_ops(8)
        except Exception:
            return
        if fewer.kv_nbytes(c, PAGE) < own.kv_nbytes(c, PAGE):
            yield 8, fewer


def _chunks(c: TextConfig, ops: Ops[Any, Any]) -> Sequence[int]:
    chunks = [prefill_chunk(c, ops)]
    while chunks[-1] > SMALLEST_CHUNK:
        chunks.append(chunks[-1] // 2)
    return chunks


def _largest_layer(model: Planned) -> int:
    """Bytes of the matrices of the largest layer."""
    layers: dict[str, int] = {}
    for spec, _ in model.storage():
        if spec.part is Part.TEXT and spec.is_matrix and spec.name.startswith("layers."):
            layer = spec.name.split(".")[1]
            layers[layer] = layers.get(layer, 0) + model.memory_nbytes(spec)
    return max(layers.values(), default=0)


def _picture_tokens(model: Planned, ops: Ops[Any, Any], plan: Plan, room: int) -> int:
    """Tokens of the largest picture, in halves of what a checkpoint allows at most, that the tower has room for."""
    v = model.config.vision
    if v is None:
        return 0
    square = v.spatial_merge_size**2
    beside = plan.runtime + plan.states // 2 + plan.kv + part_nbytes(model, Part.VISION)
    tokens = 16_384
    while tokens >= 16:
        patches = tokens * square
        work = ops.vision_scratch_nbytes(v, patches) + 4 * patches * (v.patch_values + v.out_hidden_size)
        if beside + work <= room:
            return tokens
        tokens = tokens * 3 // 4
    return 0


# --- what is told -----------------------------------------------------------------------------------------------------


def tell(choice: Choice, asked: Asked, medium: Pages | None) -> None:
    """Warn of what somebody would not expect: fewer KV bits, and weights that are read anew, with how long that takes
    now: from the page cache if it holds all of them, else from the disk. medium: pages of some of these.
    """
    limit = choice.ceiling.origin
    if choice.kv_bits is not None and asked.kv_bits is None:
        warn(f"{limit}: keys and values are kept in {choice.kv_bits} bits, for {choice.context:,} tokens", stacklevel=3)
    if medium is not None and choice.streamed:
        medium.come()
        medium.let_go()
        started = perf_counter()
        medium.come()
        medium.let_go()
        seconds = (perf_counter() - started) * choice.streamed / max(1, medium.nbytes)
        whole = choice.plan.weights - choice.resident_at_a_time + choice.streamed + (choice.resident or 0)
        warn(
            f"{limit}: the weights take {megabytes(whole)}, of which {megabytes(choice.streamed)} are read anew for "
            f"each token, and for {choice.chunk} tokens of a prompt: {seconds:.2g} s more each time, as measured now "
            f"from the {'page cache' if choice.cached else 'disk'}",
            stacklevel=3,
        )


def warn_of_swapping(model: Planned, ops: Ops[Any, Any], context: int | None, used: int) -> None:
    """Warn where the memory that is free does not hold what is planned: the context asked for, or LEAST_CONTEXT."""
    free, most = available_memory(), model.config.text.longest_context
    tokens = min(context or LEAST_CONTEXT, most)
    total = plan_memory(model, ops, tokens).total
    if free is not None and total - used > free:
        warn(
            f"the model takes {megabytes(total)} with {tokens:,} tokens of context, and {megabytes(free)} are free: "
            f"the system would swap, or read weights again and again; --memory (memory= in Python) plans for less",
            stacklevel=3,
        )


# --- what would fit --------------------------------------------------------------------------------------------------


def refusal(model: Planned, make_ops: MakeOps, ceiling: Ceiling, asked: Asked, used: int = 0) -> MemoryBudgetError:
    """Numbers, and every remedy that works by itself."""

    def fits(nbytes: int, asked: Asked, model: Planned = model) -> bool:
        return next(_choices(model, make_ops, Ceiling(nbytes, ""), asked, used), None) is not None

    remedies, c = list[str](), model.config.text
    if asked.kv_bits != 8 and (asked.kv_bits or 0) > 8 and fits(ceiling.nbytes, asked._replace(kv_bits=8)):
        remedies.append("--kv-bits 8")
    elif asked.kv_bits != 4 and _has_bits(make_ops, 4) and fits(ceiling.nbytes, asked._replace(kv_bits=4)):
        remedies.append("--kv-bits 4")
    if asked.context:
        shorter = _most(asked.context // PAGE, lambda n: fits(ceiling.nbytes, asked._replace(context=n * PAGE)))
        if shorter:
            remedies.append(f"--context {shorter * PAGE}")
    small = _FourBits(model)
    if small.saves and fits(ceiling.nbytes, asked, small):
        remedies.append("4-bit weights (edgeq quantize)")
    need = least_ceiling(model, make_ops, asked, used)
    if need is not None:
        remedies.append(f"--memory {-(-need // 10**6)}M")
    tokens = asked.context or min(LEAST_CONTEXT, c.longest_context)
    plan = least_plan(model, make_ops, asked, used)
    plan = plan._replace(runtime=plan.runtime + SPARE)
    return MemoryBudgetError(
        f"the model does not fit: {megabytes(plan.total)} with a context of {tokens:,} tokens (weights "
        f"{megabytes(plan.weights)}, keys and values {megabytes(plan.kv)}, states {megabytes(plan.states)}, work "
        f"{megabytes(plan.scratch)}, the process {megabytes(plan.runtime)}), and {ceiling.origin} allows "
        f"{megabytes(ceiling.nbytes)}",
        hint=f"what would fit: {', or '.join(remedies)} (kv_bits=, context=, memory= in Python)"
        if remedies
        else "use a smaller model",
    )


def least_plan(model: Planned, make_ops: MakeOps, asked: Asked, used: int = 0) -> Plan:
    """What is asked for, or LEAST_CONTEXT, with all weights resident and in the smallest chunks."""
    tokens = asked.context or min(LEAST_CONTEXT, model.config.text.longest_context)
    options = _Options(model, (), Ceiling(0, ""), used, asked)
    plan = options.plan(make_ops(asked.kv_bits), tokens, SMALLEST_CHUNK)
    return plan._replace(runtime=max(plan.runtime, used))


def least_ceiling(model: Planned, make_ops: MakeOps, asked: Asked, used: int = 0) -> int | None:
    """The smallest ceiling, in whole MB, under which what is asked for runs; None where none does."""
    most = 1 << 17  # MB

    def fits(megabytes: int) -> bool:
        return next(_choices(model, make_ops, Ceiling(megabytes * 10**6, ""), asked, used), None) is not None

    if not fits(most):
        return None
    return 10**6 * (most - _most(most - 1, lambda saved: fits(most - saved)))


def _most(most: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to `most` that holds, of numbers of which all smaller ones hold, too; 0 if none does."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _has_bits(make_ops: MakeOps, bits: int) -> bool:
    try:
        make_ops(bits)
    except Exception:
        return False
    return True


class _FourBits:
    """The same model with its matrices quantized to 4 bits in groups of 64."""

    BITS = 4.7  # with what recipes keep in more

    def __init__(self, model: Planned) -> None:
        self.config, self.storage, self.is_mapped, self._model = model.config, model.storage, model.is_mapped, model
        whole = part_nbytes(model, Part.TEXT)
        self.saves = part_nbytes(self, Part.TEXT) < 0.9 * whole

    def memory_nbytes(self, spec: TensorSpec) -> int:
        return min(self._model.memory_nbytes(spec), int(spec.size * self.BITS / 8))
