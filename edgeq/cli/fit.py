"""`edgeq fit`: what a model takes, and how fast it will be, before it is here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from edgeq.cli.console import measuring_bar, say, show, show_json
from edgeq.cli.options import BackendOption, KvBitsOption, MemoryOption, ModelArgument, option
from edgeq.errors import MemoryBudgetError, UsageError
from edgeq.memory.budget import SPARE
from edgeq.memory.ceiling import available_memory, ceiling
from edgeq.printable import brief, printable

if TYPE_CHECKING:
    from edgeq.backends.ops import Ops
    from edgeq.fit import Fit, Target
    from edgeq.machine.facts import Facts

__all__ = ["fit"]

_SIZE = re.compile(r"(\d{1,6})\s*[xX]\s*(\d{1,6})")
_NAMES = {
    "weights": "weights", "kv": "KV cache", "states": "DeltaNet states", "checkpoints": "kept states",
    "vision": "pictures and video", "scratch": "scratch memory", "runtime": "Python and libraries", "total": "total",
}  # fmt: skip
_SHOWN = 4096  # tokens of context where none are given


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
            default="4096, or the most that fits",
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
            help="Speeds of another machine, computed from published figures: pi5 or pi4.",
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
    from edgeq.api import KV_DTYPES, check_kv_bits
    from edgeq.backends import select
    from edgeq.fit import Wanted, find_target, picture_grids, table

    check_kv_bits(kv_bits)
    sizes, seconds = [_size(text) for text in image or ()], [_seconds(n) for n in video or ()]
    bound = ceiling(memory)
    target = find_target(model, bits)
    facts = _facts(backend, machine, measure=not no_measure)
    ops = select(None if backend == "auto" else backend, kv_dtype=KV_DTYPES[kv_bits] if kv_bits else None)
    if ops.name != "cpu":
        facts = None
    grids, tokens = picture_grids(target.variants[0].model.config, sizes, seconds)
    if machine is not None and bound is not None and not bound.asked:
        bound = None  # this machine's, as its free memory is
    here = (available_memory(), "free memory") if machine is None else (None, f"not known of {machine}")
    room, origin = (bound.nbytes, bound.origin) if bound else here
    wanted = Wanted(grids, parallel, room)
    longest = target.variants[0].model.config.text.longest_context
    shown = min(context or _SHOWN, longest) if context is None else context
    first = wanted.of(target.variants[0], ops, facts, shown)
    if context is None and not first.fits and first.largest:
        first = wanted.of(target.variants[0], ops, facts, first.largest)
    rows = table(target, ops, facts, wanted)
    if as_json:
        show_json(_record(target, first, rows, ops, facts, room, origin, tokens, parallel, machine), indent=2)
    else:
        _print(target, first, rows, ops, room, origin, tokens, parallel)
        _print_speed(first, ops, facts, machine)
    if bound is not None and not first.fits:
        raise _does_not_fit(first, bound.nbytes, origin)


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


def _facts(backend: str, machine: str | None, *, measure: bool) -> Facts | None:
    """What is known of the machine whose speeds are wanted; measured, and kept, if nothing is known of this one."""
    from edgeq.machine.boards import board_facts

    if machine is not None:
        return board_facts(machine)
    from edgeq.backends import choose

    if choose(None if backend == "auto" else backend).name != "cpu":
        return None
    from edgeq.backends.cpu import ops
    from edgeq.machine.facts import keep_facts, kept_facts

    facts = kept_facts(ops.instruction_set())
    if facts is None and measure:
        from edgeq.machine.measure import measure_machine

        with measuring_bar() as bar:
            facts = measure_machine(bar)
        keep_facts(facts)
    return facts


def _record(
    target: Target, first: Fit, rows: Sequence[Fit], ops: Ops[Any, Any], facts: Facts | None, room: int | None,
    origin: str, tokens: int, parallel: int, machine: str | None,
) -> dict[str, Any]:  # fmt: skip
    measured = None if facts is None else f"computed for {machine}" if machine else facts.measured
    return {
        "model": target.name,
        "path": None if target.here is None else str(target.here),
        **first.as_json(),
        "kv_dtype": ops.kv_dtype,
        "backend": ops.name,
        "parallel": parallel,
        "picture_tokens": tokens,
        "memory": room,
        "memory_from": origin,
        "measured": measured,
        "table": [row.as_json() for row in rows],
    }


# --- output for people -----------------------------------------------------------------------------------------------


def _print(
    target: Target, first: Fit, rows: Sequence[Fit], ops: Ops[Any, Any], room: int | None, origin: str, tokens: int,
    parallel: int,
) -> None:  # fmt: skip
    sequences = f", {parallel} conversations" if parallel > 1 else ""
    pictures = f", {tokens:,} of them pictures" if tokens else ""
    show(f"{printable(target.name)}, {_bits(first.bits)}, KV cache {ops.kv_dtype}, {ops.name} backend")
    show(f"{first.context:,} tokens of context{pictures}{sequences}{_yarn(first)}\n")
    values = {**first.plan._asdict(), "total": first.plan.total}
    for key, name in _NAMES.items():
        if values[key] or key != "vision":
            show(f"  {name:<22}{values[key] / 1e6:>12,.1f} MB")
    if room is not None:
        state = "fits" if first.fits else "does not fit"
        show(f"\n{state} {room / 1e6:,.0f} MB ({origin}); largest context that fits: {first.largest:,} tokens")
    show("")
    show(f"{'bits':>6}{'context':>12}{'total, MB':>12}{'fits':>6}{'prompt, tokens/s':>18}{'generation':>12}")
    for row in rows:
        prompt, generated = (f"{rate:,.1f}" for rate in row.speed) if row.speed else ("?", "?")
        total, fits = f"{row.plan.total / 1e6:,.0f}", "yes" if row.fits else "no"
        context = f"{row.context:,}" + ("*" if row.yarn else "")
        show(f"{row.bits:>6g}{context:>12}{total:>12}{fits:>6}{prompt:>18}{generated:>12}")
    if any(row.yarn for row in rows):
        show("* with --rope-scaling yarn:4")


def _bits(bits: float) -> str:
    return "bfloat16" if bits == 16 else f"{bits:g} bits"


def _yarn(fit: Fit) -> str:
    return f", with --rope-scaling yarn:{fit.yarn}" if fit.yarn else ""


def _print_speed(first: Fit, ops: Ops[Any, Any], facts: Facts | None, machine: str | None) -> None:
    if first.speed is None or facts is None:
        why = "this machine has not been measured: run `edgeq doctor`" if ops.name == "cpu" else (
            f"they are computed for the native cpu backend, and {ops.name} runs here"
        )  # fmt: skip
        say(f"speeds are unknown: {why}")
        return
    where = f"computed for {machine}" if machine else f"from what was measured here, {facts.measured[:10]}"
    say(
        f"speeds: a prompt that fills the context, and generation at its end; {where}",
        faint=True,
    )


def _does_not_fit(first: Fit, room: int, origin: str) -> MemoryBudgetError:
    need = first.plan.total - first.plan.checkpoints + SPARE
    fewer = "fewer bits (--bits, --kv-bits)" if first.bits == 16 else "fewer bits of keys and values (--kv-bits)"
    hint = (
        f"--context {first.largest} fits"
        if first.largest
        else f"allow {need / 1e6:,.0f} MB, or take {fewer} or a smaller model"
    )
    return MemoryBudgetError(
        f"{first.context:,} tokens of context take {need / 1e6:,.0f} MB, and {origin} allows {room / 1e6:,.0f}",
        hint=hint,
    )
