#!/usr/bin/env python3
"""Feed changed files to everything in edgeq that reads a stranger's file.

    python tools/fuzz.py --count 1000000 --cuts 1000         # all targets; about an hour on one core
    python tools/fuzz.py --target template --count 20000 --seed 7
    python tools/fuzz.py --target gguf --seed 7 --only 4711 --write x.gguf      # the input that was told, for a test

An input is a file cut short, or one changed at random (tools/fuzz_mutators.py); both follow from the seed and the
input's number. It may be read or refused with an EdgeqError of one printable message. Anything else is a fault: another
exception, a crash of the process, 5 seconds, or memory beyond what the file justifies.
"""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")]

from fuzz_mutators import cut  # noqa: E402
from fuzz_targets import Target, targets  # noqa: E402

from edgeq.errors import EdgeqError  # noqa: E402

__all__ = ["Fault", "fuzz", "fuzz_all"]

SECONDS = 5
GROWTH, GROWTH_PER_BYTE = 48 << 20, 64  # bytes of peak memory that an input may add
ADDRESS_SPACE = 3 << 30  # bytes that the process may add to what it has; what asks for more is a MemoryError


class Fault(NamedTuple):
    """An input that was neither read nor refused properly."""

    target: str
    number: int
    what: str

    def __str__(self) -> str:
        return f"{self.target} {self.number}: {self.what}"


class HangError(BaseException):
    """An input took too long."""


def content(target: Target, seed: int, number: int, cuts: int) -> bytes:
    """The input of this number: first the truncations, then the mutations."""
    if number < cuts:
        return cut(target.seed, number, cuts)
    return target.mutator(Random(f"{target.name} {seed} {number}"), target.seed)


def fuzz(
    target: Target, seed: int, numbers: range, cuts: int, done: Callable[[int], None] = lambda _: None
) -> tuple[Counter[str], list[Fault]]:
    """Run some inputs of a target; how many were read and refused, and the faults. `done` is told each number."""
    results, faults = Counter[str](), list[Fault]()
    target.path.write_bytes(target.seed)
    if (unchanged := _outcome(target)) != "read":
        faults.append(Fault(target.name, -1, f"the seed itself is {unchanged}"))
    for number in numbers:
        data = content(target, seed, number, cuts)
        target.path.write_bytes(data)
        before = peak()
        outcome = _outcome(target)
        grown = peak() - before
        if grown > GROWTH + GROWTH_PER_BYTE * len(data):
            outcome = f"{grown >> 20} MB of memory for a file of {len(data):,} bytes"
        if outcome in ("read", "refused"):
            results[outcome] += 1
        else:
            faults.append(Fault(target.name, number, outcome))
        done(number)
    target.path.write_bytes(target.seed)
    return results, faults


def peak() -> int:
    """The process's peak resident memory so far, bytes."""
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage << 10


def _outcome(target: Target) -> str:
    try:
        with _time_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what is left out is said
            target.run(target.path)
    except EdgeqError as error:
        told = error.message.replace("\n  ", "") + (error.hint or "")
        return "refused" if told.isprintable() or not _has_controls(told) else f"an unprintable message: {told!r}"
    except HangError:
        return f"more than {SECONDS} seconds"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]!r}"
    return "read"


def _has_controls(text: str) -> bool:
    return any(ord(char) < 32 or 0x7F <= ord(char) < 0xA0 or 0xD800 <= ord(char) < 0xE000 for char in text)


@contextmanager
def _time_limit() -> Iterator[None]:
    """HangError after SECONDS; where native code does not come back, the process ends with a traceback."""

    def late(*_: Any) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(4 * SECONDS, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


# --- many, in processes that may die ---------------------------------------------------------------------------------


def fuzz_all(names: list[str], seed: int, count: int, cuts: int) -> list[Fault]:
    """`count` mutations, shared out among the targets, and `cuts` truncations of each; prints sums, returns faults."""
    found: list[Fault] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
        folder = Path(place)
        chosen = [target for target in targets(folder) if not names or target.name in names]
        total = sum(target.share for target in chosen)
        for target in chosen:
            found += _in_processes(target, seed, cuts + count * target.share // total, cuts)
    return found


def _in_processes(target: Target, seed: int, count: int, cuts: int) -> list[Fault]:
    """Run a target; a process that dies is told with the input it died of, and the next one goes on behind it."""
    started, results, faults, first = monotonic(), Counter[str](), list[Fault](), 0
    context = multiprocessing.get_context("fork")
    while first < count:
        last = context.Value("q", first - 1)
        queue = context.SimpleQueue()
        process = context.Process(target=_work, args=(target, seed, range(first, count), cuts, last, queue))
        process.start()
        process.join()
        if process.exitcode == 0:
            counted, found = queue.get()
            results += counted
            faults += found
            break
        died = last.value + 1
        results["before a crash"] += died - first
        faults.append(Fault(target.name, died, f"the process ended with {process.exitcode}"))
        first = died + 1
    sums = ", ".join(f"{number:,} {what}" for what, number in sorted(results.items()))
    print(
        f"{target.name:18} {count - cuts:>9,} mutations, {cuts:>6,} cuts: {sums}; {len(faults)} faults; "
        f"{monotonic() - started:,.0f} s",
        flush=True,
    )
    for fault in faults:
        print(f"  {fault}", flush=True)
    return faults


def _work(target: Target, seed: int, numbers: range, cuts: int, last: Any, queue: Any) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    limit = pages * os.sysconf("SC_PAGE_SIZE") + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def done(number: int) -> None:
        last.value = number

    queue.put(fuzz(target, seed, numbers, cuts, done))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", default=[], help="only this target; repeatable")
    parser.add_argument("--count", type=int, default=100_000, help="mutated files in all")
    parser.add_argument(
        "--cuts", type=int, default=200, help="truncated files of each target; part of what an input's number means"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="run this one input of --target, and show what it does")
    parser.add_argument("--write", type=Path, help="where to write the input of --only")
    arguments = parser.parse_args()
    if arguments.only is None:
        sys.exit(1 if fuzz_all(arguments.target, arguments.seed, arguments.count, arguments.cuts) else 0)
    with tempfile.TemporaryDirectory() as folder:
        target = next(t for t in targets(Path(folder)) if t.name == arguments.target[0])
        data = content(target, arguments.seed, arguments.only, arguments.cuts)
        if arguments.write:
            arguments.write.write_bytes(data)
        target.path.write_bytes(data)
        target.run(target.path)


if __name__ == "__main__":
    main()
