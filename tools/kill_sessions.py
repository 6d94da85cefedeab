#!/usr/bin/env python3
"""Kill a program that talks and saves its session, at random moments: what is in the file each time?

    python tools/kill_sessions.py [MODEL] --kills 100

Every turn that the program had told of must be there, and one more at most; the file must be whole.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random
from time import sleep

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import edgeq  # noqa: E402
from edgeq.api import Model  # noqa: E402
from edgeq.errors import EdgeqError  # noqa: E402
from edgeq.session.files import SavedSession  # noqa: E402

__all__ = ["Counts", "killed"]

TALKS = """
import sys, edgeq
from pathlib import Path
path, model = Path(sys.argv[1]), edgeq.load(sys.argv[2], backend=sys.argv[3], context=4096)
chat = edgeq.load_session(path, model) if path.exists() else model.chat(max_tokens=4, temperature=0, overflow="shift")
print("ready", flush=True)
while True:
    for _ in chat.send(f"number {len(chat.turns) + chat.forgotten}"):
        pass
    chat.save(path)
    print(len(chat.turns) + chat.forgotten, flush=True)
"""


class Counts:
    """What was found: kills, turns in the end, and kills after which the last turn was there without being told of."""

    def __init__(self) -> None:
        self.kills = self.turns = self.untold = 0


def killed(
    model: Model, path: Path, kills: int, rng: Random, seconds: float = 0.5, counts: Counts | None = None
) -> Counts:  # fmt: skip
    """Kill so many times, within so many seconds, and count on. AssertionError or EdgeqError for a wrong file."""
    counts, source = counts or Counts(), model.source
    assert source is not None
    for _ in range(kills):
        arguments = [sys.executable, "-c", TALKS, str(path), source["model"], model.ops.name]
        program = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        sleep(rng.random() * seconds)
        program.send_signal(signal.SIGKILL)
        lines = program.stdout.read().splitlines()
        program.wait()
        program.stdout.close()
        counts.kills += 1
        told = max([counts.turns, *(int(line) for line in lines)])
        if not path.exists():
            assert told == 0, f"{told} turns are gone"
            continue
        saved = SavedSession(path)
        saved.check()
        chat = edgeq.load_session(path, model)
        turns = len(chat.turns) + chat.forgotten
        assert told <= turns <= told + 1, f"{turns} turns, and {told} were told of"
        counts.untold += turns > told
        counts.turns = turns
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    model = edgeq.load(arguments.model, context=4096)
    with tempfile.TemporaryDirectory() as folder:
        try:
            path, rng, counts = Path(folder) / "talk.eqs", Random(arguments.seed), Counts()
            for done in range(0, arguments.kills, 10):
                killed(model, path, min(10, arguments.kills - done), rng, counts=counts)
                print(f"{counts.kills} kills: {counts.turns} turns", file=sys.stderr, flush=True)
        except (AssertionError, EdgeqError) as error:
            sys.exit(f"wrong: {error}")
    print(f"{counts.kills} kills: {counts.turns} turns, none lost; {counts.untold} were saved and not yet told of")


if __name__ == "__main__":
    main()
