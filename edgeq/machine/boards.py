"""Facts of boards that were not measured with edgeq, from published figures: for expectations, and marked as computed.

Raspberry Pi 5: reading memory alone gives 9.3, 13.2 and 11.6 GB/s with 1, 2 and 4 threads, and a model of half a
gigabyte generates at 9.8 to 10.6 GB/s (ggml-org/llama.cpp, issue 26484). Its four cores came to 74 to 78 thousand
million integer multiply-adds a second with prompts of a 700M and a 350M model at 6 bits (issue 19360).

Raspberry Pi 4: copying gives 5.5 GB/s (sci-pi.org.uk/bench/stream.html), reading is taken for 4.5. A prompt of a 1.1B
model at 8 bits came to 11 thousand million (10 tokens/s of llamafile 0.7, justine.lol).

Arithmetic in float32 is taken for 0.4 of the peak: two multiply-adds of four numbers a cycle (A76), one (A72).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from edgeq.errors import UsageError
from edgeq.machine.facts import Facts

__all__ = ["BOARDS", "board_facts"]


class _Board(NamedTuple):
    """stream: GB/s by threads. weights: GB/s of generation, and with how many threads. integers, floats: 10^9
    multiply-adds a second of all cores."""

    stream: Mapping[str, float]
    weights: float
    generation_threads: int
    integers: float
    floats: float


BOARDS: Mapping[str, _Board] = {
    "pi5": _Board({"1": 9.26, "2": 13.23, "4": 11.59}, 10.2, 2, 75, 30),
    "pi4": _Board({"4": 4.5}, 4.2, 4, 11, 11),
}
_CORES = 4


def board_facts(name: str) -> Facts:
    """What is expected of a board of `BOARDS`; UsageError for another name."""
    board = BOARDS.get(name.lower())
    if board is None:
        raise UsageError(f"unknown machine {name!r}", hint=f"use one of {', '.join(BOARDS)}, or leave it out for this")
    floats = 1e9 * board.floats
    one = floats * board.generation_threads / _CORES
    return Facts(
        isa="computed", measured="computed",
        load=0.0, prompt_threads=_CORES, generation_threads=board.generation_threads,
        stream={threads: 1e9 * rate for threads, rate in board.stream.items()},
        weights=dict.fromkeys(("4", "6", "8", "16"), 1e9 * board.weights),
        products={**dict.fromkeys(("4", "6", "8"), 1e9 * board.integers), "16": floats},
        attention=dict.fromkeys(("f16", "int8", "int4"), one),
        prompt_attention=dict.fromkeys(("f16", "int8", "int4"), floats),
        delta=one / 4, prompt_delta=floats / 4, values=floats / 16,
    )  # fmt: skip
