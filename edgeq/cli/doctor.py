"""`edgeq doctor`: what this installation runs on, how fast it is, what to do about it, and what killed runs left."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from edgeq.backends import Backend, available, choose
from edgeq.cli.config_file import config_file
from edgeq.cli.console import measuring_bar, show, show_json
from edgeq.cli.facts import description, lines, versions
from edgeq.errors import EdgeqError, NetworkError, UsageError
from edgeq.files import Leftover, find_leftovers
from edgeq.hub import find_here
from edgeq.inputs import cache_home, expand_user, is_folder
from edgeq.machine import system
from edgeq.machine.facts import Facts, keep_facts, kept_facts, machine_name
from edgeq.memory.ceiling import available_memory, ceiling, machine_memory
from edgeq.printable import printable
from edgeq.shortage import limits
from edgeq.text.table_cache import cache_folder, cache_problem, stale_tables

if TYPE_CHECKING:
    from edgeq.backends.ops import Ops
    from edgeq.checkpoint import Checkpoint

__all__ = ["doctor"]

_PACKAGES = ("numpy", "tokenizers", "safetensors", "gguf", "huggingface_hub", "mlx")
_VARIABLES = ("EDGEQ_", "HF_", "XDG_CACHE_HOME", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
_SECRET = ("TOKEN", "KEY", "SECRET")

_HOT = 80  # degrees Celsius, from which on boards slow down
_SLOW = 150e6  # bytes a second of a medium, below which waiting for a model is long
_SHORT = 5.0  # seconds that reading a model may take
_SMALL = 4e9  # bytes of memory with which swapping is likely


class Finding(NamedTuple):
    """Something that could be better, and what to do about it."""

    found: str
    do: str


def doctor(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [FOLDER...]",
            show_default="the current folder",
            help="A model that is here, and folders with results.",
        ),
    ] = None,
    measure: Annotated[
        bool | None,
        typer.Option(
            "--measure/--no-measure",
            show_default="if it has not been done",
            help="Measure this machine again, or not at all.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what this machine does, and what to change.

    \b
    edgeq doctor
    edgeq doctor q2b
    edgeq doctor ~/models --json

    Versions, backends and instruction sets; rates of memory and arithmetic and the numbers of threads that are best,
    measured once and kept for `edgeq fit` and for every run; memory and its limits, temperature, places, environment.
    With MODEL: what it lies on, how fast that is, and whether it fits. Then unfinished results in each FOLDER (not
    below it), and in the tokenizer cache; and what to do about all that.
    """  # fmt: skip
    models, folders = _sorted(names or [])
    measured = _measured(measure)
    looked_at = {f"model {name}": _model(path, checkpoint, measured) for name, path, checkpoint in models}
    facts: dict[str, Any] = {
        **versions(),
        "packages": _packages(),
        "backends": _backends(),
        "processor": _processor(),
        "measured": _rates(measured),
        "memory": _memory(),
        **{name: told for name, (told, _) in looked_at.items()},
        "places": _places(),
        "environment": _environment(),
        "left behind": _left_behind(folders),
    }
    found = [*_findings(measured), *(finding for _, findings in looked_at.values() for finding in findings)]
    found += [Finding(f"{path}: {what}", "edgeq clean") for path, what in facts["left behind"].items() if _dead(what)]
    if as_json:
        show_json(facts | {"findings": [finding._asdict() for finding in found]}, indent=2)
        return
    show("\n".join(lines(facts)))
    show("what to do" if found else "nothing to do")
    for finding in found:
        show(f"  {printable(finding.found)}\n    {printable(finding.do)}")


def _sorted(names: list[str]) -> tuple[list[tuple[str, Path, Checkpoint]], list[Path]]:
    """The models among what was named, opened, and the folders: a model's folder is both."""
    from edgeq.checkpoint import open_checkpoint

    models, folders = list[tuple[str, Path, "Checkpoint"]](), list[Path]()
    for name in names:
        path = expand_user(Path(name))
        if is_folder(path):
            folders.append(path)
            if not _holds_model(path):
                continue
        try:
            here = find_here(name)
        except NetworkError:
            here = None
        except UsageError:  # no name of a model: a folder that is not there
            folders.append(path)
            continue
        if here is None:
            raise UsageError(f"{name} is not on this machine", hint=f"`edgeq fit {name}` says what it will take")
        models.append((name, here, open_checkpoint(here)))
    return models, folders or [Path()]


def _holds_model(folder: Path) -> bool:
    try:
        return any(path.name == "config.json" or path.suffix.lower() == ".gguf" for path in folder.iterdir())
    except OSError:
        return False


def _packages() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _described(backend: Backend) -> str:
    try:
        return description(backend)
    except EdgeqError as error:  # such as an instruction set that this machine does not have
        return f"not available: {error.message}"


def _backends() -> dict[str, str]:
    """Every backend, and the one that runs by default."""
    found = {backend.name: _described(backend) for backend in available()}
    try:
        chosen = choose()
        found["chosen"] = f"{chosen.name} ({chosen.reason})"
    except EdgeqError as error:
        found["chosen"] = f"none: {error.message}"
    return found


# --- the machine -----------------------------------------------------------------------------------------------------


def _isa() -> tuple[str, list[str]] | None:
    """The instruction set whose kernels run, and all that run here; None without native kernels."""
    try:
        from edgeq.backends.cpu import _native
        from edgeq.backends.cpu.ops import instruction_set

        return instruction_set(), _native.isas()
    except (ImportError, EdgeqError):
        return None


def _measured(measure: bool | None) -> Facts | None:
    """What is known of this machine: as kept, or measured now and kept. None where there is nothing to measure."""
    found = _isa()
    if found is None:
        return None
    facts = None if measure else kept_facts(found[0])
    if facts is None and measure is not False:
        from edgeq.machine.measure import measure_machine

        with measuring_bar() as bar:
            facts = measure_machine(bar)
        keep_facts(facts)
    return facts


def _processor() -> dict[str, str]:
    found = {"machine": machine_name()}
    if isas := _isa():
        found["instruction sets"] = f"{isas[0]} runs, of {', '.join(isas[1])}"
    if speeds := system.core_speeds():
        found["highest clock"] = ", ".join(f"{count} cores of {clock}" for clock, count in speeds.items())
    if governors := system.governors():
        found["governor"] = ", ".join(governors)
    for name, degrees in system.temperatures().items():
        found[f"temperature, {name}"] = f"{degrees:.0f} degrees Celsius"
    if (slowed := system.throttling()) is not None:
        found["throttling"] = "; ".join(slowed) or "none"
    return found


def _rates(facts: Facts | None) -> dict[str, Any]:
    """What was measured: of the numbers behind `edgeq fit` those that people compare."""
    if facts is None:
        return {"rates": "not measured: run `edgeq doctor --measure` on the native cpu backend"}
    stream = {threads: f"{rate / 1e9:.1f} GB/s" for threads, rate in facts.stream.items()}
    return {
        "when": facts.measured,
        "beside it": f"other programs kept {facts.load:.1f} processors busy" if facts.busy else "next to nothing ran",
        "reading memory": ", ".join(f"{rate} with {threads}" for threads, rate in stream.items()) + " threads",
        "reading 4-bit weights": f"{facts.weights['4'] / 1e9:.1f} GB/s",
        "integer rate": f"{facts.products['4'] / 1e9:,.0f} billion multiply-adds/s",
        "threads for prompts": facts.prompt_threads,
        "threads for generation": facts.generation_threads,
    }


def _memory() -> dict[str, str]:
    found = {"RAM": _gigabytes(machine_memory()), "available": _gigabytes(available_memory())}
    if bound := ceiling():
        found["limit"] = f"{_gigabytes(bound.nbytes)} ({bound.origin})"
    for swap in system.swaps():
        medium = "" if swap.compressed else f", {_medium(Path(swap.place))}"
        found[f"swap {swap.place}"] = f"{_gigabytes(swap.nbytes)}, {_gigabytes(swap.used)} used{medium}"
    if (pages := system.huge_pages()) is not None:
        found["huge pages"] = pages
    found |= {f"{name} limit": _gigabytes(limit) for name, limit in limits().items()}
    return {name: value for name, value in found.items() if value}


def _gigabytes(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 1e9:.1f} GB"


def _medium(path: Path) -> str:
    medium = system.medium_of(path)
    return "unknown medium" if medium is None else f"{medium.kind} ({medium.device})"


# --- a model ---------------------------------------------------------------------------------------------------------


def _model(path: Path, checkpoint: Checkpoint, facts: Facts | None) -> tuple[dict[str, str], list[Finding]]:
    """What it lies on and what it will do, and what to do about that."""
    from edgeq.api import KV_DTYPES
    from edgeq.backends import select
    from edgeq.cli.memory import used_by_a_chat
    from edgeq.fit import Variant, Wanted

    files, findings = checkpoint.weight_files(), list[Finding]()
    nbytes, rate = sum(file.stat().st_size for file in files), system.medium_rate(files)
    told = {"path": str(path), "format": checkpoint.format, "medium": _medium(files[0])}
    if rate:
        told["read rate"] = f"{rate / 1e6:,.0f} MB/s: all {nbytes / 1e6:,.0f} MB in {nbytes / rate:.1f} s"
    if rate and rate < _SLOW and nbytes / rate > _SHORT:
        findings.append(Finding(
            f"{path} is read at {rate / 1e6:,.0f} MB/s: {nbytes / rate:.0f} s until it is in memory",
            "move it to an SSD or NVMe drive; once it is in memory the medium does not matter",
        ))  # fmt: skip
    bound, context = ceiling(), min(4096, checkpoint.config.text.longest_context)
    room = bound.nbytes if bound else available_memory()

    def make_ops(kv_bits: int | None) -> Ops[Any, Any]:
        return select(kv_dtype=kv_bits and KV_DTYPES[kv_bits])

    try:
        ops = make_ops(None)
    except EdgeqError:  # said elsewhere
        return told, findings
    wanted = Wanted(make_ops, free=room, facts=facts if ops.name == "cpu" else None)
    if bound is not None and ops.keeps_ceiling:
        wanted = replace(wanted, ceiling=bound, used=used_by_a_chat(make_ops, None, checkpoint))
    fit = replace(wanted, reread=rate or None).of(Variant(checkpoint, 0), context)
    told["memory"] = f"{fit.plan.total / 1e6:,.0f} MB with {context:,} tokens of context"
    if room is not None:
        told["largest context"] = f"{fit.largest:,} tokens in {room / 1e6:,.0f} MB"
    if fit.speed:
        told["expected"] = f"{fit.speed.prompt:,.1f} tokens/s of prompt, {fit.speed.generated:,.1f} generated"
    if not fit.fits and room is not None:
        findings.append(Finding(
            f"{path} takes {fit.plan.total / 1e6:,.0f} MB with {context:,} tokens, and there are {room / 1e6:,.0f}",
            f"edgeq fit {path}: fewer bits, --kv-bits 8, a shorter --context or a smaller model; or close programs",
        ))  # fmt: skip
    return told, findings


# --- places ----------------------------------------------------------------------------------------------------------


def _places() -> dict[str, str]:
    config, cache = config_file(), cache_folder()
    problem = cache_problem()
    here = shutil.disk_usage(Path())
    return {
        "configuration": f"{config}{'' if config.exists() else ' (none)'}",
        "tokenizer cache": f"{cache}" + (f" (not used: {problem})" if problem else _size(cache)),
        "measurements": f"{cache_home() / 'edgeq' / 'machines'}",
        "Hugging Face cache": f"{(hub := _hub_cache())}{_size(hub)}",
        "disk here": f"{here.free / 1e9:.1f} of {here.total / 1e9:.1f} GB free, {_medium(Path())}",
    }


def _hub_cache() -> Path:
    """Where huggingface_hub keeps models, without the half second that importing it takes."""
    home = os.environ.get("HF_HOME") or cache_home() / "huggingface"
    return expand_user(Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub"))


def _size(folder: Path) -> str:
    """What a folder holds, links not followed, as an appendix to its name."""
    total = 0
    for where, _, files in os.walk(folder, onerror=lambda _: None):
        for name in files:
            try:
                total += (Path(where) / name).lstat().st_size
            except OSError:
                continue
    return f", {total / 1e6:,.1f} MB" if total else " (empty)"


def _environment() -> dict[str, str]:
    """The variables that change what edgeq does; secrets only by name."""
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)}
    return {name: "(set)" if any(word in name for word in _SECRET) else value for name, value in found.items()}


def _left_behind(folders: list[Path]) -> dict[str, str]:
    """What killed runs left near these folders, and in the cache; `edgeq clean` removes it."""
    found = {str(folder): "is not there" for folder in folders if not is_folder(folder)}
    for folder in dict.fromkeys([*folders, cache_folder()]):
        for leftover in find_leftovers(folder):
            found[str(leftover.path)] = _describe(leftover)
    for path in stale_tables():
        found[str(path)] = "tokenizer table that is not used any more"
    return found


def _describe(leftover: Leftover) -> str:
    state = {
        "dead": "unfinished result of a run that was killed; edgeq clean removes it",
        "alive": "a run is writing it",
        "unknown": "unfinished result; this file system cannot say whether a run is writing it",
    }
    return f"{leftover.nbytes / 1e6:,.1f} MB, {state[leftover.state]}"


def _dead(what: str) -> bool:
    return "was killed" in what or "not used any more" in what


# --- findings --------------------------------------------------------------------------------------------------------


def _findings(facts: Facts | None) -> Iterator[Finding]:
    yield from _of_backends()
    yield from _of_heat()
    yield from _of_memory()
    if facts is not None and facts.busy:
        yield Finding(
            f"other programs kept {facts.load:.1f} processors busy while this machine was measured: the rates are low",
            "edgeq doctor --measure, once they are done",
        )
    if problem := cache_problem():
        yield Finding(f"the tokenizer cache is not used: {problem}", "make its folders yours alone: chmod go-w")


def _of_backends() -> Iterator[Finding]:
    try:
        chosen = choose().name
    except EdgeqError as error:
        yield Finding(error.message, error.hint or "unset EDGEQ_BACKEND")
        return
    if chosen == "numpy":
        yield Finding(
            "models run on NumPy, many times slower than on native kernels",
            "install a wheel of edgeq for this machine; in a checkout run tools/build_native",
        )
    isas = _isa()
    if isas and os.environ.get("EDGEQ_ISA") and isas[0] != isas[1][-1]:
        yield Finding(f"EDGEQ_ISA={os.environ['EDGEQ_ISA']}, and {isas[1][-1]} would run", "unset EDGEQ_ISA")


def _of_heat() -> Iterator[Finding]:
    for name, degrees in system.temperatures().items():
        if degrees >= _HOT:
            yield Finding(
                f"{name} is at {degrees:.0f} degrees Celsius", "give it a heat sink or a fan, and air around it"
            )
    for text in system.throttling() or ():
        if "voltage" in text:
            yield Finding(text, "use the board's own power supply and a short cable (Raspberry Pi 5: 5 V, 5 A)")
        else:
            yield Finding(f"the processor: {text}", "cool it (heat sink, fan); it runs slower until it is cooler")
    if "powersave" in system.governors():
        yield Finding(
            "the clock's governor is powersave",
            "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor",
        )


def _of_memory() -> Iterator[Finding]:
    swaps, total = system.swaps(), machine_memory()
    for swap in swaps:
        medium = None if swap.compressed else system.medium_of(Path(swap.place))
        if medium is not None and medium.kind in ("SD card", "eMMC"):
            yield Finding(
                f"swap lies on {medium.kind} ({swap.place}), which it is slow on and wears out",
                "swap to compressed memory (zram-tools), and keep models below a ceiling: --memory, or --lock",
            )
        if swap.used > 0.25 * swap.nbytes > 0:
            yield Finding(
                f"{_gigabytes(swap.used)} are swapped out to {swap.place}", "close programs, or use a smaller model"
            )
    if not swaps and total is not None and total < _SMALL:
        yield Finding(
            "there is no swap: when memory runs out, the system ends a program",
            "give edgeq a ceiling (--memory), or add compressed swap (zram-tools)",
        )
    if system.huge_pages() == "never":
        yield Finding(
            "huge pages are off: reading weights costs up to a tenth more",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        )
