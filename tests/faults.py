"""A program that lets every way of writing go wrong at every step. Run by tests/test_faults.py under faults.c.

    LD_PRELOAD=faults.so FAULTS_FOLDER=WORK python faults.py SOURCE WORK ROUNDS SEED

Each round forks, so that what is killed is a process, and then holds what is on disk against the promise: the old
result alive and whole, or the new one whole; nothing else after the next run. ROUNDS of 0 tries every step in every
way; else as many at random. Prints what happened how often, as JSON, and fails at the first broken promise.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from edgeq.checkpoint import open_checkpoint
from edgeq.errors import EdgeqError
from edgeq.files import find_leftovers, new_file
from edgeq.quant import quantize, verify
from edgeq.quant.gguf_export import export_gguf
from edgeq.text import bpe

DONE, REFUSED, BROKEN = 0, 10, 11
FAIL, SHORT, KILL, STAY = 1, 2, 3, 4
WAYS = (
    ("ENOSPC", FAIL, errno.ENOSPC),
    ("EIO", FAIL, errno.EIO),
    ("EINTR", FAIL, errno.EINTR),
    ("short write", SHORT, 0),
    ("kill", KILL, 0),
    ("ENOSPC from then on", STAY, errno.ENOSPC),
    ("EIO from then on", STAY, errno.EIO),
)
OLD_SYSTEM = bool(os.environ.get("FAULTS_OLD_SYSTEM"))  # one that cannot exchange two names

library = ctypes.CDLL(None)


class Case(NamedTuple):
    """Something that writes `out`. `state` is "new", "old", or None where there is nothing; anything else is broken."""

    name: str
    out: Path
    before: Callable[[], None]
    write: Callable[[], None]
    state: Callable[[], str | None]


def cases(source: Path, work: Path) -> list[Case]:
    checkpoint, spec = open_checkpoint(source), (source / "tokenizer.json").read_text()
    folder, file, report = work / "model", work / "model.gguf", work / "report.json"
    table = work / "edgeq" / "tokenizers" / "x"

    def nothing() -> None:
        pass

    def old_folder() -> None:
        quantize(source, folder, bits=8, threads=1, recipe=None)

    def old_file() -> None:
        file.write_bytes(b"GGUF of old")

    def old_report() -> None:
        report.write_bytes(b"GGUF of old")

    def folder_state() -> str | None:
        if not folder.exists():
            return None
        verify(folder)
        return {4: "new", 8: "old"}[json.loads((folder / "edgeq.json").read_text())["recipe"]["bits"]]

    def write_report() -> None:
        with new_file(report, may_replace=lambda _: None) as path:
            path.write_text("new" * 10_000)

    export_gguf(checkpoint, work / "reference.gguf", "q8_0")
    reference = (work / "reference.gguf").read_bytes()

    def text_state(path: Path, new: bytes) -> str | None:
        return {new: "new", b"GGUF of old": "old"}[path.read_bytes()] if path.exists() else None

    def write_table() -> None:
        if not bpe.write_table(json.loads(spec), table):
            raise AssertionError("no table")

    table.parent.mkdir(parents=True, mode=0o700)
    write_table()
    made = table.read_bytes()
    return [
        Case("folder", folder, nothing, lambda: _quantize(source, folder), folder_state),
        Case("folder replaced", folder, old_folder, lambda: _quantize(source, folder), folder_state),
        Case("GGUF", file, nothing, lambda: _export(checkpoint, file), lambda: text_state(file, reference)),
        Case("GGUF replaced", file, old_file, lambda: _export(checkpoint, file), lambda: text_state(file, reference)),
        Case(
            "report",
            report,
            old_report,
            write_report,
            lambda: text_state(report, b"new" * 10_000),
        ),
        Case("tokenizer table", table, nothing, write_table, lambda: text_state(table, made)),
    ]


def _quantize(source: Path, out: Path) -> None:
    quantize(source, out, threads=1, force=True)


def _export(checkpoint: object, out: Path) -> None:
    export_gguf(checkpoint, out, "q8_0", force=True)  # type: ignore[arg-type]


def in_child(case: Case, step: int, what: int, number: int) -> tuple[int, int]:
    """Exit code (negative: a signal) of writing in a process of its own, and its steps."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        code = BROKEN
        try:
            library.faults_arm(step, what, number)
            case.write()
            code = DONE
        except EdgeqError:
            code = REFUSED
        except BaseException:
            import traceback

            traceback.print_exc()
        steps = library.faults_steps()
        library.faults_arm(-1, 0, 0)
        os.write(writer, str(steps).encode())
        os._exit(code)
    os.close(writer)
    steps = int(os.read(reader, 64) or b"0")
    os.close(reader)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), steps


def clear(case: Case) -> None:
    for path in case.out.parent.iterdir():
        if path.name == case.out.name or path.name.startswith(f".{case.out.name}."):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def attempt(case: Case, step: int, name: str, what: int, number: int) -> str:
    """One round; what came of it, AssertionError for a broken promise."""
    clear(case)
    case.before()
    before = case.state()
    code, _ = in_child(case, step, what, number)
    where = f"{case.name}, {name} at step {step}: exit {code}"
    assert code in ((-9,) if what == KILL else (DONE,) if what == SHORT else (DONE, REFUSED)), where
    if OLD_SYSTEM:
        for leftover in find_leftovers(case.out.parent, case.out.name):
            leftover.remove()
    state = case.state()
    assert state in (before, "new"), f"{where}: {before} became {state}"
    assert state == "new" or code != DONE, where
    again, _ = in_child(case, -1, 0, 0)
    assert again == DONE, f"{where}: the next run ends with {again}"
    assert case.state() == "new", where
    left = [path.name for path in case.out.parent.iterdir() if path.name.startswith(".")]
    assert not left, f"{where}: {left} after the next run"
    return f"{name}: " + ("new" if state == "new" else "old" if before else "nothing")


def rounds(steps: list[int], count: int, seed: int) -> Iterator[tuple[int, int, int]]:
    """Case, step and way of every round."""
    if not count:
        yield from ((c, s, w) for c, n in enumerate(steps) for s in range(n) for w in range(len(WAYS)))
        return
    pick = random.Random(seed)
    for _ in range(count):
        c = pick.randrange(len(steps))
        yield c, pick.randrange(steps[c]), pick.randrange(len(WAYS))


def main() -> None:
    source, work, count, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    tried = cases(source, work)
    steps = []
    for case in tried:
        clear(case)
        case.before()
        code, n = in_child(case, -1, 0, 0)
        assert code == DONE, case.name
        steps.append(n)
    seen: dict[str, Counter[str]] = {case.name: Counter() for case in tried}
    for c, s, w in rounds(steps, count, seed):
        name, what, number = WAYS[w]
        seen[tried[c].name][attempt(tried[c], s, name, what, number)] += 1
    sys.stdout.write(json.dumps({"steps": dict(zip(seen, steps, strict=True)), "seen": seen}, indent=1))


if __name__ == "__main__":
    main()
