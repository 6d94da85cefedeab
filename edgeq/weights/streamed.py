"""Weights of which only some stay in memory: pages of the others are let go after each use, and come again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from edgeq.formats.mapped import Pages
from edgeq.weights.trees import LayerWeights

__all__ = ["StreamedLayers", "Turns"]


class Turns:
    """Pages of pieces that are used one after another, again and again.

    pieces: in the order of use; None for those that stay.
    """

    def __init__(self, pieces: Sequence[Pages | None]) -> None:
        self._pieces = list(pieces)

    def begin(self) -> None:
        """The first piece is about to be used."""
        self._come(0)

    def done(self, i: int) -> None:
        """Piece i has been used: its pages go, the next piece's come, and those behind it begin to be read."""
        if (piece := self._pieces[i]) is not None:
            piece.let_go()
        self._come(i + 1)

    def _come(self, i: int) -> None:
        coming, behind = (self._pieces[j] if j < len(self._pieces) else None for j in (i, i + 1))
        if coming is not None:
            coming.come()
        if behind is not None:
            behind.read_ahead()


class StreamedLayers(tuple[LayerWeights[Any, Any], ...]):
    """Layers that tell `turns` when they have run; who runs them otherwise than by iterating calls `turns.done`."""

    turns: Turns

    @classmethod
    def of(cls, layers: Sequence[LayerWeights[Any, Any]], turns: Turns) -> StreamedLayers:
        """The layers, with their turns."""
        made = cls(layers)
        made.turns = turns
        return made

    def __iter__(self) -> Iterator[LayerWeights[Any, Any]]:
        for i in range(len(self)):
            yield self[i]
            self.turns.done(i)
