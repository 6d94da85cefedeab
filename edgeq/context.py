"""One sequence that grows: what generation drives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from edgeq.formats.bf16 import Float32
from edgeq.state import State

if TYPE_CHECKING:
    from edgeq.runtime import Model

__all__ = ["Context"]


class Context:
    """One sequence that grows: the engine of `edgeq.generate.Decoding`.

    on_prefill(done, total) is called as a prompt of more than one chunk goes through the model.
    """

    def __init__(
        self, model: Model, state: State[Any] | None = None, *, on_prefill: Callable[[int, int], None] | None = None
    ) -> None:
        self.model = model
        self.state = state if state is not None else model.state()
        self._on_prefill = on_prefill

    @property
    def position(self) -> int:
        return self.state.length

    @property
    def context_limit(self) -> int:
        return self.model.context_limit

    def feed(self, ids: Sequence[int]) -> Float32:
        """Append `ids`, a chunk at a time, so that an interruption loses one chunk at most."""
        step = self.model.prefill
        *chunks, last = (ids[start : start + step] for start in range(0, len(ids), step))
        for done, chunk in enumerate(chunks):
            if self._on_prefill:
                self._on_prefill(done * step, len(ids))
            self.state = self.model.advance(chunk, self.state)
        logits, self.state = self.model.forward(last, self.state)
        if self._on_prefill and chunks:
            self._on_prefill(len(ids), len(ids))
        return logits
