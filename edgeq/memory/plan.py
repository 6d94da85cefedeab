"""What a model with a context costs, before anything is loaded."""

from __future__ import annotations

from edgeq.config import TextConfig

__all__ = ["prefill_chunk"]


def prefill_chunk(c: TextConfig) -> int:
    """Tokens of a prompt that go through the model together.

    What lies between a layer's projections grows with them: a 4B takes fewer, a little slower, to stay in 2.75 GB.
    """
    return 512 if c.hidden_size <= 2048 else 192
