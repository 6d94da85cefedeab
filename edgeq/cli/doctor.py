"""`edgeq doctor`: what this installation runs on, and what killed runs have left behind."""

from __future__ import annotations

import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from edgeq.backends import Backend, available, choose
from edgeq.cli.config_file import config_file
from edgeq.cli.console import show, show_json
from edgeq.cli.facts import description, lines, versions
from edgeq.errors import EdgeqError
from edgeq.files import Leftover, find_leftovers
from edgeq.shortage import limits
from edgeq.text.table_cache import cache_folder, cache_problem, stale_tables

__all__ = ["doctor"]

_PACKAGES = ("numpy", "tokenizers", "safetensors", "gguf", "huggingface_hub", "mlx")
_VARIABLES = ("EDGEQ_", "HF_", "XDG_CACHE_HOME", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
_SECRET = ("TOKEN", "KEY", "SECRET")


def doctor(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FOLDER...]", help="Folders with results.", show_default="the current one"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the installation, and what killed runs left behind.

    \b
    edgeq doctor
    edgeq doctor ~/models --json

    Versions, backends and instruction set, memory and its limits, places and environment; then unfinished results in
    each FOLDER (not below it), and in the tokenizer cache.
    """
    facts = {
        **versions(),
        "packages": _packages(),
        "backends": _backends(),
        "memory": _memory(),
        "places": _places(),
        "environment": _environment(),
        "left behind": _left_behind(folders or [Path()]),
    }
    if as_json:
        show_json(facts, indent=2)
    else:
        show("\n".join(lines(facts)))


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


def _memory() -> dict[str, str]:
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    memory = {"RAM": f"{total / 1e9:.1f} GB"}
    if available := _meminfo("MemAvailable"):
        memory["available"] = f"{available / 1e9:.1f} GB"
    if limit := _container_limit():
        memory["container limit"] = f"{limit / 1e9:.1f} GB"
    return memory | {f"{name} limit": f"{limit / 1e9:.1f} GB" for name, limit in limits().items()}


def _meminfo(field: str) -> int | None:
    """A figure of Linux's /proc/meminfo, bytes."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)


def _container_limit() -> int | None:
    """Linux's cgroup limit, bytes."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < 1 << 60:
            return int(text)
    return None


def _places() -> dict[str, str]:
    config, cache = config_file(), cache_folder()
    problem = cache_problem()
    here = shutil.disk_usage(Path())
    return {
        "configuration": f"{config}{'' if config.exists() else ' (none)'}",
        "tokenizer cache": f"{cache}" + (f" (not used: {problem})" if problem else ""),
        "disk here": f"{here.free / 1e9:.1f} of {here.total / 1e9:.1f} GB free",
    }


def _environment() -> dict[str, str]:
    """The variables that change what edgeq does; secrets only by name."""
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)}
    return {name: "(set)" if any(word in name for word in _SECRET) else value for name, value in found.items()}


def _left_behind(folders: list[Path]) -> dict[str, str]:
    """What killed runs left near these folders, and in the cache; `edgeq clean` removes it."""
    found: dict[str, str] = {}
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
