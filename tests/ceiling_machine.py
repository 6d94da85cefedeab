"""Random sequences of actions under a ceiling: the resident set's peak stays below it, and no conversation is lost.

    python tests/ceiling_machine.py [SEQUENCES]

A process of its own, whose peak the system is asked to forget before each sequence (/proc/self/clear_refs).
"""

from __future__ import annotations

import gc
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgeq
from edgeq.errors import MemoryBudgetError
from edgeq.memory.budget import Budget
from edgeq.memory.resident import peak_resident, release_unused
from edgeq.session.context import Context
from edgeq.state import State
from edgeq.state_io import state_from_stored, stored_arrays
from edgeq.testing import config_values, write_checkpoint

ROOM = 75_000_000  # bytes above what the process takes already

# A page of keys and values takes 6 MB, so that a few thousand tokens fill the room.
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 4, "full_attention_interval": 2, "num_attention_heads": 12, "num_key_value_heads": 12,
    "head_dim": 256, "max_position_embeddings": 1 << 15,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
    },
}  # fmt: skip

ACTIONS = ("begin", "send", "send", "branch", "undo", "drop", "store", "load", "check", "model", "drop model")
Action = tuple[str, int, int]
"""What to do, to which of those that there are (modulo their number), and how many tokens, 1 to 1,200."""


class Kept(NamedTuple):
    """A conversation as it stands: its model, state and ids."""

    model: int
    state: State[Any]
    ids: tuple[int, ...]


class Machine:
    """Conversations of one model, or two, that grow, branch, are taken back, stored, loaded and dropped."""

    done: ClassVar[Counter[str]] = Counter()

    def __init__(self, folder: Path) -> None:
        gc.collect()
        release_unused()
        self._folder, self.ceiling = folder, Budget.process() + ROOM
        self.models = [self._load()]
        self.talks = list[Kept]()
        self.stored = list[tuple[int, dict[str, Any], tuple[int, ...]]]()
        Path("/proc/self/clear_refs").write_text("5")

    def _load(self) -> edgeq.Model:
        return edgeq.load(self._folder, backend="cpu", memory=self.ceiling, kv_bits=16)

    def act(self, action: Action) -> None:
        """Do it, if there is something to do it to; a refusal leaves everything as it was."""
        name, which, tokens = action
        try:
            self.done[name] += self._act(name, which, tokens)
        except MemoryBudgetError:
            self.done["refused"] += 1
        peak = peak_resident()
        assert peak is not None
        assert peak <= self.ceiling, f"{name}: {(peak - self.ceiling) / 1e6:.2f} MB above, {len(self.talks)} talks"

    def _act(self, name: str, which: int, tokens: int) -> bool:
        of = which % max(1, len(self.stored if name == "load" else self.talks))
        match name:
            case "begin":
                self._run(which % len(self.models), None, (), tokens)
            case "send" if self.talks:
                self._run(*self.talks[of], tokens)
                del self.talks[of]
            case "branch" if self.talks:
                self._run(*self.talks[of], tokens % 64 + 1)
            case "undo" if self.talks:
                model, state, ids = self.talks[of]
                self.talks = [
                    kept for kept in self.talks if kept.model != model or kept.ids[: len(ids)] != ids or kept.ids == ids
                ]
            case "drop" if self.talks:
                del self.talks[of]
            case "store" if self.talks and len(self.stored) < 2:
                model, state, ids = self.talks[of]
                engine = self.models[model].engine
                engine.budget.claim(2 * engine.ops.kv_nbytes(engine.config, len(ids)), "a copy of a state")
                self.stored.append((model, stored_arrays(engine.ops, state), ids))
            case "load" if self.stored:
                model, arrays, ids = self.stored[of]
                engine = self.models[model].engine
                engine.budget.claim(2 * sum(x.nbytes for x in arrays.values()), "a stored state")
                state = state_from_stored(engine.ops, engine.config, arrays)
                self.talks.append(Kept(model, state._replace(origin=engine.fingerprint), ids))
            case "check" if self.talks:
                self._check(self.talks[of])
            case "model" if len(self.models) < 2:
                self.models.append(self._load())
            case "drop model" if len(self.models) == 2:
                self.talks = [kept for kept in self.talks if not kept.model]
                self.stored = [stored for stored in self.stored if not stored[0]]
                self.models.pop()
            case _:
                return False
        return True

    def _run(self, model: int, state: State[Any] | None, ids: tuple[int, ...], tokens: int) -> None:
        more = [(len(ids) * 7 + i) % 90 + 1 for i in range(tokens)]
        context = Context(self.models[model].engine, state)
        context.feed(more)
        self.talks.append(Kept(model, context.state, (*ids, *more)))

    def _check(self, kept: Kept) -> None:
        """It goes on as the same tokens from an empty state do, whatever has been refused meanwhile."""
        if len(kept.ids) <= 64:
            engine = self.models[kept.model].engine
            found, expected = Context(engine, kept.state).feed([7])[-1], Context(engine).feed([*kept.ids, 7])[-1]
            assert np.allclose(found, expected, atol=1e-3), len(kept.ids)  # other calls, other sums


def main(sequences: int) -> None:
    """So many of them, and what was done."""

    @settings(
        max_examples=sequences, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False
    )
    @given(
        st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 7), st.integers(1, 1200)), min_size=4, max_size=20)
    )
    def check(actions: list[Action]) -> None:
        machine = Machine(folder)
        for action in actions:
            machine.act(action)

    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "model"
        write_checkpoint(folder, config_values(**SHAPE))
        warm = edgeq.load(folder, backend="cpu")
        Context(warm.engine).feed([5] * 600)
        del warm
        check()
    sys.stdout.write(f"{sequences} sequences: {dict(Machine.done)}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
