"""What was measured of this machine, kept in the user's cache.

`edgeq doctor` and `edgeq fit` measure (`edgeq.machine.measure`), which takes seconds; whatever runs a model reads only
the numbers of threads, so nothing here imports NumPy. A file is kept for each kind of machine, because homes are shared
and cards move from one board to another. A file that is damaged, or of another version, counts as none.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from edgeq.inputs import cache_home, read_text

__all__ = ["BUSY", "Facts", "facts_file", "keep_facts", "kept_facts", "machine_name"]

_VERSION = 2
_LIMIT = 1 << 16  # bytes of the file
_MAX_THREADS = 1024
_FASTEST = 1e18  # of any rate; more is a damaged file
BUSY = 0.25  # processors that other programs keep busy, above which measurements are not this machine's


@dataclass(frozen=True, slots=True)
class Facts:
    """Rates are per second, with as many threads as `prompt_threads` or `generation_threads` say.

    isa: the kernels that were measured. load: processors that other programs kept busy meanwhile, on average.
    stream: bytes that a plain read of memory gets, by the number of threads.
    weights: bytes of weights that one token's products read, by the bits of their codes (16: bfloat16).
    products: multiply-adds of the same kernels with many tokens: the integer rate, but for 16 bits.
    attention, prompt_attention: multiply-adds, by the type of the keys and values; one token, and many. Those of one
    token come from memory.
    delta, prompt_delta: entries of DeltaNet's state that are updated; one token's, from memory, and many.
    layers, tokens: what one token takes beside all that, by layers, and whatever the model.
    values: numbers between the products that many tokens' norms, gates and convolutions work through.
    pages: bytes of a mapped file that come from the page cache.
    """

    isa: str
    measured: str  # date and time, ISO 8601
    load: float
    prompt_threads: int
    generation_threads: int
    stream: Mapping[str, float]
    weights: Mapping[str, float]
    products: Mapping[str, float]
    attention: Mapping[str, float]
    prompt_attention: Mapping[str, float]
    delta: float
    prompt_delta: float
    layers: float
    tokens: float
    values: float
    pages: float

    @property
    def busy(self) -> bool:
        """Whether other programs took so much that the rates are lower than this machine's."""
        return self.load > BUSY


def machine_name() -> str:
    """What kind of machine this is, in a few words: the board or the processor, and its cores."""
    return f"{_model()}, {os.cpu_count() or 1} cores"


def _model() -> str:
    for path in ("/proc/device-tree/model", "/sys/firmware/devicetree/base/model"):
        with suppress(OSError, ValueError):
            if name := read_text(Path(path), _LIMIT).strip("\0\n "):
                return name
    with suppress(OSError, ValueError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return (_apple_chip() if sys.platform == "darwin" else "") or platform.processor() or platform.machine()


def _apple_chip() -> str:
    """The processor's name, as sysctl has it."""
    import ctypes

    text, size = ctypes.create_string_buffer(256), ctypes.c_size_t(256)
    try:
        ctypes.CDLL(None).sysctlbyname(b"machdep.cpu.brand_string", text, ctypes.byref(size), None, 0)
    except (OSError, AttributeError):
        return ""
    return text.value.decode("utf-8", "replace")


def facts_file(isa: str) -> Path:
    """Where the facts of this kind of machine are, or would be: by its name, the cores that this process may use, its
    memory in GB, and the instruction set whose kernels run."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    key = f"{machine_name()} {cores} {memory >> 30} {isa}"
    return cache_home() / "edgeq" / "machines" / f"{sha256(key.encode()).hexdigest()[:16]}-{_VERSION}.json"


def kept_facts(isa: str) -> Facts | None:
    """What was measured of this kind of machine; None if nothing was."""
    try:
        return _parsed(json.loads(read_text(facts_file(isa), _LIMIT)), isa)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def keep_facts(facts: Facts) -> Path | None:
    """Write them where `kept_facts` finds them; None where the cache cannot be written."""
    from edgeq.errors import EdgeqError
    from edgeq.files import new_file

    path = facts_file(facts.isa)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with new_file(path, may_replace=lambda _: None, alone=False) as partial:
            partial.write_text(json.dumps({"machine": machine_name(), **asdict(facts)}, indent=1) + "\n")
    except (OSError, EdgeqError):
        return None
    return path


def _parsed(values: Any, isa: str) -> Facts:
    """Facts from a file; ValueError, TypeError or KeyError for anything else."""
    given = {field.name: values[field.name] for field in fields(Facts)}
    facts = Facts(**given)
    counts = (facts.prompt_threads, facts.generation_threads)
    if facts.isa != isa or not all(type(n) is int and 1 <= n <= _MAX_THREADS for n in counts):
        raise ValueError
    if not (isinstance(facts.load, int | float) and facts.load >= 0):
        raise ValueError
    rates = [facts.delta, facts.prompt_delta, facts.layers, facts.tokens, facts.values, facts.pages]
    for table in (facts.stream, facts.weights, facts.products, facts.attention, facts.prompt_attention):
        if not table:
            raise ValueError
        rates += table.values()
    if not all(isinstance(rate, int | float) and math.isfinite(rate) and 0 < rate < _FASTEST for rate in rates):
        raise ValueError
    return facts
