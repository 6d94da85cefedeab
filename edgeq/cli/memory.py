"""What a model takes, for people: the plan, and what is held now."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from edgeq.checkpoint import Checkpoint
from edgeq.engine import Engine
from edgeq.memory.budget import SPARE, megabytes
from edgeq.memory.choice import Choice, MakeOps, taken
from edgeq.memory.plan import Plan
from edgeq.memory.resident import peak_resident, resident
from edgeq.session.language import Language

__all__ = ["choice_facts", "ledger_facts", "plan_facts", "used_by_a_chat"]

_TOKENIZER = 3_000_000  # bytes, its table mapped

_NAMES = {
    "weights": "weights", "runtime": "the process itself", "states": "DeltaNet states", "kv": "keys and values",
    "scratch": "work of a chunk", "vision": "more for pictures", "checkpoints": "kept states",
}  # fmt: skip


def used_by_a_chat(make_ops: MakeOps, kv_bits: int | None, checkpoint: Checkpoint | None) -> int:
    """Bytes that a chat's process takes before it chooses what to run with, so that others choose the same; of a model
    that is not here with the family's tokenizer."""
    held = [make_ops(kv_bits), Language(checkpoint) if checkpoint else None, import_module("edgeq.cli.chat")]
    nbytes = taken(0 if checkpoint else _TOKENIZER)
    held.clear()
    return nbytes


def plan_facts(plan: Plan) -> dict[str, Any]:
    """A plan, line by line."""
    facts = {_NAMES[name]: megabytes(nbytes) for name, nbytes in plan._asdict().items() if nbytes}
    return {**facts, "in all": megabytes(plan.total)}


def choice_facts(choice: Choice) -> dict[str, Any]:
    """What a model runs with under a ceiling, and its plan."""
    facts: dict[str, Any] = {
        "ceiling": f"{megabytes(choice.ceiling.nbytes)} ({choice.ceiling.origin}), {megabytes(SPARE)} of it spare",
        "context": f"{choice.context:,} tokens",
        "keys and values": choice.ops.kv_dtype,
        "prompts": f"{choice.chunk} tokens at a time",
        "drafts of the MTP head": "yes" if choice.drafts else "no",
        "largest picture": f"{choice.picture_tokens:,} tokens" if choice.picture_tokens else "none",
    }
    if choice.streamed:
        facts["weights read anew in every pass"] = megabytes(choice.streamed)
    return {**facts, "plan": plan_facts(choice.plan)}


def ledger_facts(engine: Engine[Any, Any]) -> dict[str, Any]:
    """What is held now."""
    held = {h.owner: megabytes(h.nbytes) for h in engine.ledger.holdings() if h.nbytes}
    facts: dict[str, Any] = {"held": held}
    if (now := resident()) is not None:
        facts["resident now"] = f"{megabytes(now.total)}, {megabytes(now.files)} of it pages of files"
    if (peak := peak_resident()) is not None:
        facts["peak so far"] = megabytes(peak)
    if (room := engine.budget.room()) is not None:
        facts["room"] = megabytes(max(0, room))
    return facts
