"""What a model with a context costs, before anything is loaded.

Arithmetic over the configuration, the declared tensors and how they are stored, and three figures of the backend. The
peak of a prompt that fills the context is its last chunk: every weight has been read, the keys and values are all
there, DeltaNet states exist twice (before the chunk and after it, because states are values), and the work of a chunk
lies between them. tests/test_memory.py measures how near it comes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from edgeq.backends.ops import Ops
from edgeq.checkpoint import Storage
from edgeq.config import ModelConfig, TextConfig
from edgeq.model.vision import largest_band
from edgeq.vision.visual import Grid
from edgeq.weights import Part, TensorSpec

__all__ = [
    "PAGE",
    "Plan",
    "Planned",
    "head_scratch_nbytes",
    "largest_context",
    "part_nbytes",
    "plan_memory",
    "prefill_chunk",
]

LARGEST_CHUNK = 512  # tokens; more are no faster
SMALLEST_CHUNK = 64
SCRATCH_NBYTES = 32 << 20  # for the work of a chunk, unless the smallest takes more
PAGE = 256  # tokens of keys and values that come together, on every backend
UNREAD = 256  # tokens that may wait for the MTP head


class Planned(Protocol):
    """What a plan is made of: a checkpoint, or the description of one that is not here."""

    config: ModelConfig

    def storage(self) -> Iterator[tuple[TensorSpec, Storage]]:
        """Every tensor, and how it is stored."""
        ...

    def memory_nbytes(self, spec: TensorSpec) -> int:
        """Bytes that a matrix takes in memory."""
        ...

    def is_mapped(self, spec: TensorSpec) -> bool:
        """Whether a matrix is used where its file is mapped."""
        ...


class Plan(NamedTuple):
    """Bytes of the resident set, at its peak.

    weights: pages of the file that are mapped and all read, and copies.
    runtime: the interpreter, NumPy, edgeq and what they import, the tokenizer's tables.
    states: DeltaNet states. kv: keys and values of the context.
    scratch: the work of a chunk, and the logits.
    vision: what seeing adds: pixels and features, and what the vision tower needs beyond all the above but the
    runtime, for it is not needed at the same time.
    checkpoints: DeltaNet states that are kept, from which other replies begin.
    """

    weights: int
    runtime: int
    states: int
    kv: int
    scratch: int
    vision: int = 0
    checkpoints: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def plan_memory(
    model: Planned, ops: Ops[Any, Any], context: int, chunk: int | None = None, grids: Sequence[Grid] = (), *,
    sequences: int = 1, checkpoints: int = 0, drafts: bool = False,
) -> Plan:  # fmt: skip
    """What `context` tokens of each of some sequences cost on a backend; `chunk` tokens of a prompt at a time.

    grids: of the images and videos among them (frames of two pictures, rows and columns of patches).
    checkpoints: states that are kept beside those of the sequences. drafts: whether the MTP head, if there is one,
    drafts.
    """
    c = model.config.text
    chunk = min(context, chunk or prefill_chunk(c, ops))
    weights, kv = part_nbytes(model, Part.TEXT), ops.kv_nbytes(c, context)
    if not c.tie_word_embeddings:
        weights -= _rows_not_read(model, context)
    logits = 2 * 4 * c.vocab_size  # what the head computes, and what the sampler makes of it
    scratch = ops.scratch_nbytes(c, chunk) + logits
    if drafts and (head := part_nbytes(model, Part.MTP)):
        weights += head
        kv += kv // max(1, c.layer_types.count("full_attention"))
        scratch += 2 * 4 * UNREAD * c.hidden_size + head_scratch_nbytes(c, chunk)
    state = ops.state_nbytes(c)
    plan = Plan(
        weights, ops.process_nbytes, 2 * sequences * state, sequences * kv, scratch, checkpoints=checkpoints * state
    )
    return plan._replace(vision=_pictures(model, ops, plan, grids)) if grids else plan


def _pictures(model: Planned, ops: Ops[Any, Any], text: Plan, grids: Sequence[Grid]) -> int:
    """What seeing them adds to a text's peak. The tower runs beside a state and its keys and values, at most."""
    v = model.config.vision
    if v is None:
        return 0
    patches = sum(map(math.prod, grids))
    held = 4 * patches * (v.patch_values + v.out_hidden_size // v.spatial_merge_size**2)
    seeing = part_nbytes(model, Part.VISION) + ops.vision_scratch_nbytes(v, largest_band(grids))
    return held + max(0, seeing - text.weights - text.states // 2 - text.scratch)


def part_nbytes(model: Planned, part: Part) -> int:
    """Bytes of the weights of a part as they are used: mapped, or copies."""
    return sum(
        model.memory_nbytes(spec) if spec.is_matrix else 4 * spec.size
        for spec, _ in model.storage()
        if spec.part is part
    )


def _rows_not_read(model: Planned, context: int) -> int:
    """Bytes of an embedding that is not also the head, less a row for every token."""
    table = next(spec for spec, _ in model.storage() if spec.name == "embed_tokens.weight")
    rows = table.shape[0]
    return model.memory_nbytes(table) * max(0, rows - context) // rows


def head_scratch_nbytes(c: TextConfig, tokens: int) -> int:
    """What the MTP head works in as it reads a call's `tokens` and those that waited: both in one piece, and UNREAD at
    a time two norms, these side by side, and the vectors that they become (`edgeq.model.mtp`)."""
    return 4 * c.hidden_size * (2 * (UNREAD + tokens) + 5 * UNREAD)


def largest_context(
    model: Planned, ops: Ops[Any, Any], ceiling: int, chunk: int | None = None, grids: Sequence[Grid] = (), *,
    sequences: int = 1, checkpoints: int = 0, drafts: bool = False,
) -> int:  # fmt: skip
    """Most tokens whose plan is within `ceiling` bytes: a number of whole pages, or what the model has at most; 0 where
    not even a page fits."""
    most = model.config.text.longest_context

    def fits(pages: int) -> bool:
        context = min(pages * PAGE, most)
        plan = plan_memory(
            model, ops, context, chunk, grids, sequences=sequences, checkpoints=checkpoints, drafts=drafts
        )
        return plan.total <= ceiling

    few, many = 0, -(-most // PAGE)  # those fit, one more than these does not
    if fits(many):
        return most
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if fits(middle) else (few, middle)
    return few * PAGE


def prefill_chunk(c: TextConfig, ops: Ops[Any, Any], nbytes: int = SCRATCH_NBYTES) -> int:
    """Tokens of a prompt that go through the model together: a power of two, as many as `nbytes` of work allow."""
    chunk = LARGEST_CHUNK
    while chunk > SMALLEST_CHUNK and ops.scratch_nbytes(c, chunk) > nbytes:
        chunk //= 2
    return chunk
