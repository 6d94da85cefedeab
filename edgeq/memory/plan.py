"""What a model with a context costs, before anything is loaded.

Arithmetic over the configuration, the declared tensors and how they are stored, and three figures of the backend. The
peak of a prompt that fills the context is its last chunk: every weight has been read, the keys and values are all
there, DeltaNet states exist twice (before the chunk and after it, because states are values), and the work of a chunk
lies between them. tests/test_memory.py measures how near it comes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from edgeq.backends.ops import Ops
from edgeq.checkpoint import Checkpoint
from edgeq.config import TextConfig
from edgeq.model.vision import largest_band
from edgeq.vision.visual import Grid
from edgeq.weights import Part

__all__ = ["Plan", "plan_memory", "prefill_chunk"]

LARGEST_CHUNK = 512  # tokens; more are no faster
SMALLEST_CHUNK = 64
SCRATCH_NBYTES = 32 << 20  # for the work of a chunk, unless the smallest takes more


class Plan(NamedTuple):
    """Bytes of the resident set, at its peak.

    weights: pages of the file that are mapped and all read, and copies.
    process: the interpreter, NumPy, edgeq and what they import, the tokenizer's tables.
    states: DeltaNet states. kv_cache: keys and values of the context.
    scratch: the work of a chunk, and the logits.
    pictures: what seeing adds: pixels and features, and what the vision tower needs beyond all the above but the
    process, for it is not needed at the same time.
    """

    weights: int
    process: int
    states: int
    kv_cache: int
    scratch: int
    pictures: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def plan_memory(
    checkpoint: Checkpoint, ops: Ops[Any, Any], context: int, chunk: int | None = None, grids: Sequence[Grid] = ()
) -> Plan:
    """What `context` tokens of one sequence cost on a backend; `chunk` tokens of a prompt at a time.

    grids: of the images and videos among them (frames of two pictures, rows and columns of patches).
    """
    c = checkpoint.config.text
    chunk = min(context, chunk or prefill_chunk(c, ops))
    weights = _weights(checkpoint, Part.TEXT)
    if not c.tie_word_embeddings:
        weights -= _rows_not_read(checkpoint, context)
    logits = 2 * 4 * c.vocab_size  # what the head computes, and what the sampler makes of it
    scratch = ops.scratch_nbytes(c, chunk) + logits
    plan = Plan(weights, ops.process_nbytes, 2 * ops.state_nbytes(c), ops.kv_nbytes(c, context), scratch)
    return plan._replace(pictures=_pictures(checkpoint, ops, plan, grids)) if grids else plan


def _pictures(checkpoint: Checkpoint, ops: Ops[Any, Any], text: Plan, grids: Sequence[Grid]) -> int:
    """What seeing them adds to a text's peak. The tower runs beside a state and its keys and values, at most."""
    v = checkpoint.config.vision
    if v is None:
        return 0
    patches = sum(map(math.prod, grids))
    held = 4 * patches * (v.patch_values + v.out_hidden_size // v.spatial_merge_size**2)
    seeing = _weights(checkpoint, Part.VISION) + ops.vision_scratch_nbytes(v, largest_band(grids))
    return held + max(0, seeing - text.weights - text.states // 2 - text.scratch)


def _weights(checkpoint: Checkpoint, part: Part) -> int:
    return sum(
        checkpoint.memory_nbytes(spec) if spec.is_matrix else 4 * spec.size
        for spec, _ in checkpoint.storage()
        if spec.part is part
    )


def _rows_not_read(checkpoint: Checkpoint, context: int) -> int:
    """Bytes of an embedding that is not also the head, less a row for every token."""
    table = next(spec for spec, _ in checkpoint.storage() if spec.name == "embed_tokens.weight")
    rows = table.shape[0]
    return checkpoint.memory_nbytes(table) * max(0, rows - context) // rows


def prefill_chunk(c: TextConfig, ops: Ops[Any, Any]) -> int:
    """Tokens of a prompt that go through the model together: a power of two, as many as SCRATCH_NBYTES allow."""
    chunk = LARGEST_CHUNK
    while chunk > SMALLEST_CHUNK and ops.scratch_nbytes(c, chunk) > SCRATCH_NBYTES:
        chunk //= 2
    return chunk
