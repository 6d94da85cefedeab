"""Facts of boards that were not measured with edgeq, from published figures: for expectations, and marked as computed.

Raspberry Pi 5: reading memory alone gives 9.3, 13.2 and 11.6 GB/s with 1, 2 and 4 threads, and a model of half a
gigabyte generates at 9.8 to 10.6 GB/s (ggml-org/llama.cpp, issue 26484). Its four cores came to 74 to 78 thousand
million integer multiply-adds a second with prompts of a 700M and a 350M model at 6 bits (issue 19360).

Raspberry Pi 4: copying gives 5.5 GB/s (sci-pi.org.uk/bench/stream.html), reading is taken for 4.5. A prompt of a 1.1B
model at 8 bits came to 11 thousand million (10 tokens/s of llamafile 0.7, justine.lol).

Apple: memory of 68 and 120 GB/s is what Apple says of the M1 and the M4, of which reading is taken to get 0.85. A
prompt of a 4B model at 4 bits came to 186 tokens/s with eight cores of an M1 Max (llama.cpp, Q4_0), so 93 thousand
million multiply-adds a second for each; of the M4 it is taken for so much more as its clock is faster.

Arithmetic in float32 is taken for 0.4 of the peak: two multiply-adds of four numbers a cycle (A76), one (A72), four
(Apple). What a layer takes beside its weights is that of a Zen 5 core, by the clock, and three times as long on a Pi.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from edgeq.errors import UsageError
from edgeq.machine.facts import Facts

__all__ = ["BOARDS", "Board", "board_facts", "find_board"]

_SYSTEM = 500_000_000
"""Bytes that a system without a desktop takes of a board's memory, its graphics included."""


class Board(NamedTuple):
    """stream: GB/s by threads. weights: GB/s of generation, and with how many threads. integers, floats: 10^9
    multiply-adds a second of all cores. layer: microseconds. sold_with: GiB of memory."""

    stream: Mapping[str, float]
    weights: float
    generation_threads: int
    integers: float
    floats: float
    layer: float
    sold_with: tuple[int, ...]

    def memory(self) -> dict[str, int]:
        """Bytes that a program may take, by the memory that the board is sold with."""
        return {f"{size} GB": (size << 30) - _SYSTEM for size in self.sold_with}


BOARDS: Mapping[str, Board] = {
    "pi5": Board({"1": 9.26, "2": 13.23, "4": 11.59}, 10.2, 2, 75, 30, 100, (2, 4, 8, 16)),
    "pi4": Board({"4": 4.5}, 4.2, 4, 11, 11, 150, (1, 2, 4, 8)),
    "m1": Board({"4": 58}, 58, 4, 372, 82, 40, (8, 16)),
    "m4": Board({"4": 102}, 102, 4, 511, 113, 30, (16, 24, 32)),
}
_CORES = 4
_PYTHON = 20  # times what a layer takes: what a token takes once
_KEYS = {"f16": 0.5, "int8": 0.25, "int4": 0.14}  # bytes of keys and values for a multiply-add of one token
_ENTRY = 8  # bytes of an entry of DeltaNet's states, read and written


def find_board(name: str) -> Board:
    """A board of `BOARDS`; UsageError for another name."""
    board = BOARDS.get(name.lower())
    if board is None:
        raise UsageError(f"unknown machine {name!r}", hint=f"use one of {', '.join(BOARDS)}, or leave it out for this")
    return board


def board_facts(name: str) -> Facts:
    """What is expected of a board of `BOARDS`; UsageError for another name."""
    board = find_board(name)
    floats, weights = 1e9 * board.floats, 1e9 * board.weights
    one = floats * board.generation_threads / _CORES
    return Facts(
        isa="computed", measured="computed",
        load=0.0, prompt_threads=_CORES, generation_threads=board.generation_threads,
        stream={threads: 1e9 * rate for threads, rate in board.stream.items()},
        weights=dict.fromkeys(("4", "6", "8", "16"), weights),
        products={**dict.fromkeys(("4", "6", "8"), 1e9 * board.integers), "16": floats},
        attention={kv: min(one, weights / nbytes) for kv, nbytes in _KEYS.items()},
        prompt_attention=dict.fromkeys(_KEYS, floats),
        delta=min(one / 4, weights / _ENTRY), prompt_delta=floats / 4, layers=1e6 / board.layer,
        tokens=1e6 / board.layer / _PYTHON, values=floats / 16, pages=weights / 4,
    )  # fmt: skip
