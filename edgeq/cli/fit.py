"""`edgeq fit`: what a model takes, and how fast it will be, before it is here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from edgeq.cli.console import measuring_bar, say, show, show_json
from edgeq.cli.options import BackendOption, KvBitsOption, MemoryOption, ModelArgument, option
from edgeq.errors import MemoryBudgetError, UsageError
from edgeq.memory.budget import SPARE, megabytes
from edgeq.memory.ceiling import Ceiling, available_memory, ceiling
from edgeq.printable import brief, printable

if TYPE_CHECKING:
    from edgeq.backends.ops import Ops
    from edgeq.fit import Fit, Target, Wanted
    from edgeq.machine.facts import Facts

__all__ = ["fit"]

_SIZE = re.compile(r"(\d{1,6})\s*[xX]\s*(\d{1,6})")
_MOST_PARALLEL = 1024
_NAMES = {
    "weights": "weights", "kv": "KV cache", "states": "DeltaNet states", "checkpoints": "kept states",
    "vision": "pictures and video", "scratch": "scratch memory", "runtime": "Python and libraries", "total": "total",
}  # fmt: skip


def fit(
    model: ModelArgument,
    memory: MemoryOption = None,
    context: Annotated[
        int | None,
        option(
            "--context",
            "-c",
            "--ctx-size",
            metavar="N",
            default="a chat's under a ceiling, else 4096",
            minimum=1,
            help="Tokens of context.",
        ),
    ] = None,
    bits: Annotated[
        int | None,
        option(
            "--bits",
            metavar="N",
            default="the checkpoint's own, or a table of 4, 8 and 16",
            env=False,
            help="Bits of the weights as `edgeq quantize` makes them: 2, 3, 4, 5, 6, 8; 16 is bfloat16.",
        ),
    ] = None,
    kv_bits: KvBitsOption = None,
    image: Annotated[
        list[str] | None,
        option("--image", metavar="WxH", default="none", env=False, help="An image of W x H pixels; repeatable."),
    ] = None,
    video: Annotated[
        list[float] | None,
        option("--video", metavar="SECONDS", default="none", env=False, help="A video so long; repeatable."),
    ] = None,
    parallel: Annotated[
        int, option("--parallel", metavar="N", minimum=1, env=False, help="Conversations at a time.")
    ] = 1,
    backend: BackendOption = "auto",
    machine: Annotated[
        str | None,
        option(
            "--machine",
            metavar="NAME",
            default="this one, measured",
            env=False,
            help="Speeds of another machine, computed from published figures: pi5, pi4, m1, m4.",
        ),
    ] = None,
    no_measure: Annotated[
        bool, option("--no-measure", env=False, help="Do not measure a machine that has not been measured yet.")
    ] = False,
    as_json: Annotated[bool, option("--json", env=False, help="Print one JSON object.")] = False,
) -> None:
    """Show what a model takes, what fits, and how fast it will be.

    \b
    edgeq fit qwen3.5:4b
    edgeq fit qwen3.5:2b --bits 4 --memory 2G --context 32768
    edgeq fit q2b --image 1920x1080 --json

    Nothing is loaded, and of a model that is not here nothing but its configuration is downloaded. Speeds come from
    what `edgeq doctor` measured of this machine; they are measured now where it has not run yet.

    Exit code 3 if the context does not fit --memory, EDGEQ_MEMORY or the control group's limit.
    """
    from edgeq.fit import find_target, table

    if parallel > _MOST_PARALLEL:
        raise UsageError(f"--parallel {parallel}: expected 1 to {_MOST_PARALLEL} conversations", hint="--parallel 64")
    pictures = [_size(text) for text in image or ()], [_seconds(n) for n in video or ()]
    question = _Question(bits, kv_bits, *pictures, parallel, backend, machine)
    target = find_target(model, bits)
    memory_of = _memory(memory, machine)
    wanted = question.wanted(target, memory_of, measure=not no_measure)
    first = wanted.of(target.variants[0], context)
    if first.picture_tokens > first.context:
        raise _too_short(first)
    rows = table(target, wanted)
    boards = _boards(wanted, target, context, machine) if memory_of.nbytes is None else []
    answer = _Answer(target, wanted, memory_of, machine, first, rows, boards)
    if as_json:
        show_json(answer.record(), indent=2)
    else:
        answer.print()
    if wanted.ceiling is not None and not first.fits:
        raise wanted.refusal(target.variants[0], context)
    if memory_of.bound is not None and not first.fits:
        raise _does_not_fit(first, memory_of)


# --- the question ----------------------------------------------------------------------------------------------------


class _Memory(NamedTuple):
    """Bytes that there are, and where they come from; `bound` is a ceiling that a chat would keep, or refuse to."""

    nbytes: int | None
    origin: str
    bound: Ceiling | None = None


def _memory(asked: str | None, machine: str | None) -> _Memory:
    bound = ceiling(asked)
    if bound is not None and (bound.asked or machine is None):
        return _Memory(bound.nbytes, bound.origin, bound)
    if machine is not None:  # this machine's limit, and its free memory, are not the board's
        return _Memory(None, f"not known of {machine}")
    return _Memory(available_memory(), "free memory")


class _Question(NamedTuple):
    """What is asked for, as it was given."""

    bits: int | None
    kv_bits: int | None
    images: Sequence[tuple[int, int]]
    videos: Sequence[float]
    parallel: int
    backend: str
    machine: str | None

    def wanted(self, target: Target, memory: _Memory, *, measure: bool) -> Wanted:
        """The same for the arithmetic, with what the process takes (first, for measuring takes more) and the facts."""
        from edgeq.api import check_kv_bits
        from edgeq.cli.memory import used_by_a_chat
        from edgeq.fit import Wanted

        check_kv_bits(self.kv_bits)
        ops = self.ops(self.kv_bits)
        wanted = Wanted(self.ops, self.kv_bits, self.images, self.videos, self.parallel, free=memory.nbytes)
        if memory.bound is not None and ops.keeps_ceiling:
            used = used_by_a_chat(self.ops, self.kv_bits, target.checkpoint)
            wanted = replace(wanted, ceiling=memory.bound, used=used)
        facts = self.facts(ops, measure=measure)
        return replace(wanted, facts=facts, reread=_reread(facts, target, self.machine) if facts else None)

    def ops(self, kv_bits: int | None) -> Ops[Any, Any]:
        from edgeq.api import KV_DTYPES
        from edgeq.backends import select

        return select(None if self.backend == "auto" else self.backend, kv_dtype=kv_bits and KV_DTYPES[kv_bits])

    def facts(self, ops: Ops[Any, Any], *, measure: bool) -> Facts | None:
        """What is known of the machine whose speeds are wanted; measured, and kept, if nothing is known of this one."""
        from edgeq.machine.boards import board_facts

        if self.machine is not None:
            return board_facts(self.machine)
        if ops.name != "cpu":
            return None
        from edgeq.backends.cpu.ops import instruction_set
        from edgeq.machine.facts import keep_facts, kept_facts

        facts = kept_facts(instruction_set())
        if facts is None and measure:
            from edgeq.machine.measure import measure_machine

            with measuring_bar() as bar:
                facts = measure_machine(bar)
            keep_facts(facts)
        return facts


def _size(text: str) -> tuple[int, int]:
    """Width and height."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or not (width := int(found[1])) or not (height := int(found[2])):
        raise UsageError(f"--image {brief(text)}: expected WIDTHxHEIGHT in pixels", hint="as in --image 1920x1080")
    return width, height


def _seconds(seconds: float) -> float:
    if not 0 < seconds <= 1e6:
        raise UsageError(f"--video {seconds:g}: expected seconds above 0", hint="as in --video 60")
    return seconds


def _reread(facts: Facts, target: Target, machine: str | None) -> float | None:
    """Bytes a second at which weights come that do not stay: from the page cache where there is room for them, else
    from their medium; None for a medium that is not known."""
    from edgeq.machine.system import medium_rate
    from edgeq.memory.pages import turn_rate
    from edgeq.memory.plan import part_nbytes
    from edgeq.weights import Part

    free, nbytes = available_memory(), part_nbytes(target.variants[0].model, Part.TEXT)
    cached = machine is not None or free is None or nbytes <= free
    if target.checkpoint is None or machine is not None:
        return facts.pages if cached else None
    files = sorted(target.checkpoint.weight_files(), key=lambda path: path.stat().st_size)
    return turn_rate(files[-1]) if cached else medium_rate(files)


def _boards(wanted: Wanted, target: Target, context: int | None, machine: str | None) -> list[tuple[str, int, Fit]]:
    """What fits a board, by the memory that it is sold with: its name, bytes, and the fit."""
    from edgeq.machine.boards import find_board

    if machine is None:
        return []
    sold = find_board(machine).memory()
    return [
        (name, nbytes, replace(wanted, free=nbytes).of(target.variants[0], context)) for name, nbytes in sold.items()
    ]


def _too_short(first: Fit) -> UsageError:
    return UsageError(
        f"the pictures are {first.picture_tokens:,} tokens, and the context is {first.context:,}",
        hint=f"--context {first.picture_tokens + 256}, or fewer or smaller pictures",
    )


def _does_not_fit(first: Fit, memory: _Memory) -> MemoryBudgetError:
    """On a backend that is held to no ceiling, so that nothing chooses what would fit."""
    return MemoryBudgetError(
        f"{first.context:,} tokens of context take {megabytes(first.plan.total)}, and {memory.origin} allows "
        f"{megabytes(memory.nbytes or 0)}",
        hint=f"--context {first.largest} fits" if first.largest else "fewer bits (--bits, --kv-bits), a smaller model",
    )


# --- the answer ------------------------------------------------------------------------------------------------------


class _Answer(NamedTuple):
    target: Target
    wanted: Wanted
    memory: _Memory
    machine: str | None
    first: Fit
    rows: Sequence[Fit]
    boards: Sequence[tuple[str, int, Fit]]

    def record(self) -> dict[str, Any]:
        """For programs."""
        facts, first = self.wanted.facts, self.first
        measured = None if facts is None else f"computed for {self.machine}" if self.machine else facts.measured
        boards = [
            {"board": name, "memory": nbytes, "fits": fit.fits, "largest_context": fit.largest}
            for name, nbytes, fit in self.boards
        ]
        return {
            "model": self.target.name,
            "path": None if self.target.here is None else str(self.target.here),
            **first.as_json(),
            "backend": first.ops.name,
            "parallel": self.wanted.sequences,
            "memory": self.memory.nbytes,
            "memory_from": self.memory.origin,
            "measured": measured,
            "measured_under_load": bool(facts and facts.busy),
            **({"boards": boards} if boards else {}),
            "table": [row.as_json() for row in self.rows],
        }

    def print(self) -> None:
        """For people: the numbers on stdout, what they rest on on stderr."""
        self._plan()
        self._memory()
        self._table()
        self._speed()

    def _plan(self) -> None:
        first, sequences = self.first, self.wanted.sequences
        several = f", {sequences} conversations" if sequences > 1 else ""
        pictures = f", {first.picture_tokens:,} of them pictures" if first.picture_tokens else ""
        stored = f"{_bits(first.bits)}, KV cache {first.ops.kv_dtype}"
        show(f"{printable(self.target.name)}, {stored}, {first.ops.name} backend")
        show(f"{first.context:,} tokens of context{pictures}{several}{_yarn(first)}\n")
        values = {**first.plan._asdict(), "total": first.plan.total}
        for key, name in _NAMES.items():
            if values[key] or key != "vision":
                show(f"  {name:<22}{values[key] / 1e6:>12,.1f} MB")

    def _memory(self) -> None:
        first = self.first
        if self.memory.nbytes is not None:
            show(f"\n{_state(first)} {megabytes(self.memory.nbytes)} ({self.memory.origin}); {_largest(first)}")
        if first.streamed:
            show(
                f"{megabytes(first.streamed)} of the weights do not stay in memory: they are read anew for every "
                f"token, and for {first.chunk} tokens of a prompt"
            )
        for name, nbytes, fit in self.boards:
            room = f"the {megabytes(nbytes)} that a program may take"
            show(f"{self.machine} with {name}: {_state(fit)} {room}; {_largest(fit)}")

    def _table(self) -> None:
        show(f"\n{'bits':>6}{'context':>12}{'total, MB':>12}{'fits':>6}{'prompt, tokens/s':>18}{'generation':>12}")
        for row in self.rows:
            prompt, generated = (f"{rate:,.1f}" for rate in row.speed) if row.speed else ("?", "?")
            fits = self._fits(row)
            context = f"{row.context:,}" + ("*" if row.yarn else "")
            show(f"{row.bits:>6g}{context:>12}{row.plan.total / 1e6:>12,.0f}{fits:>6}{prompt:>18}{generated:>12}")
        if any(row.yarn for row in self.rows):
            show("* with --rope-scaling yarn:4")
        if any(row.streamed for row in self.rows):
            show("part: only part of the weights stays in memory, the rest is read anew for every token")
        if len(kinds := {row.ops.kv_dtype for row in self.rows}) > 1:
            show(f"keys and values are kept in {' or '.join(sorted(kinds))}, as they fit")

    def _fits(self, row: Fit) -> str:
        """Whether it does; of boards, the least memory with which it does."""
        if self.boards:
            needed = row.plan.total - row.plan.checkpoints + SPARE
            return next((name for name, nbytes, _ in self.boards if needed <= nbytes), "no")
        return "part" if row.streamed else "yes" if row.fits else "no"

    def _speed(self) -> None:
        facts, first = self.wanted.facts, self.first
        if facts is None:
            why = "this machine has not been measured: run `edgeq doctor`" if first.ops.name == "cpu" else (
                f"they are computed for the native cpu backend, and {first.ops.name} runs here"
            )  # fmt: skip
            say(f"speeds are unknown: {why}")
            return
        where = (
            f"computed for {self.machine}" if self.machine else f"from what was measured here, {facts.measured[:10]}"
        )
        say(f"speeds: a prompt that fills the context, and generation at its end; {where}", faint=True)
        if facts.busy:
            say(
                f"other programs kept {facts.load:.1f} processors busy while this machine was measured: it is faster; "
                f"`edgeq doctor --measure` measures again"
            )


def _bits(bits: float) -> str:
    return "bfloat16" if bits == 16 else f"{bits:g} bits"


def _yarn(fit: Fit) -> str:
    return f", with --rope-scaling yarn:{fit.yarn}" if fit.yarn else ""


def _state(fit: Fit) -> str:
    return "fits in part" if fit.streamed else "fits" if fit.fits else "does not fit"


def _largest(fit: Fit) -> str:
    return f"largest context that fits: {fit.largest:,} tokens"
