"""What a model takes and how fast it runs, for a model that need not be here: the arithmetic of `edgeq fit`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from edgeq.backends.ops import Ops
from edgeq.checkpoint import open_checkpoint
from edgeq.config import ModelConfig, parse_config, stretched
from edgeq.errors import UsageError
from edgeq.family import family_config, size_of
from edgeq.hub import find_here, hub_config
from edgeq.machine.facts import Facts
from edgeq.machine.speed import Speed, expected_speed
from edgeq.memory.budget import SPARE
from edgeq.memory.choice import IMPORTED_LATER
from edgeq.memory.plan import Plan, Planned, largest_context, plan_memory
from edgeq.quant.described import DescribedModel
from edgeq.quant.recipe import choose_recipe
from edgeq.session.prefixes import most_kept
from edgeq.session.visual_settings import CHAT_VISUALS
from edgeq.vision.settings import processor_of
from edgeq.vision.sizes import grid_of, image_size, sample_frames, tokens_of, video_size
from edgeq.vision.visual import Grid
from edgeq.weights import Part

__all__ = ["CONTEXTS", "PARTS", "Fit", "Target", "Variant", "Wanted", "find_target", "picture_grids", "table"]

CONTEXTS = (1024, 4096, 16_384, 65_536, 262_144, 1_048_576)
"""Those of the table; where a model was not made for so many tokens, YaRN stretches it."""

BITS = (4, 8, 16)
_YARN = 4  # times the context that the model cards allow
_FRAMES = 24  # of a second of a video, and its height and width
_VIDEO = (1080, 1920)


class Variant(NamedTuple):
    """A model as it is stored, or would be: `bits` as the user says, and those a weight takes, every byte counted."""

    model: Planned
    bits: float

    @property
    def bits_per_weight(self) -> float:
        stored = [(spec.size, s.nbytes) for spec, s in self.model.storage() if spec.part is Part.TEXT]
        return 8 * sum(nbytes for _, nbytes in stored) / sum(size for size, _ in stored)


class Target(NamedTuple):
    """What a user's name stands for: its variants, the one that is meant where nothing is said first."""

    name: str
    variants: Sequence[Variant]
    here: Path | None = None


class Fit(NamedTuple):
    """A model with a context on a machine.

    plan: bytes. largest: most tokens of context that fit. fits: whether this context does. speed: None where the
    machine was not measured. yarn: by how much the context is stretched.
    """

    bits: float
    context: int
    plan: Plan
    largest: int
    fits: bool
    speed: Speed | None
    yarn: int | None

    def as_json(self) -> dict[str, Any]:
        """Under the names of the command's JSON: bytes, tokens and tokens a second."""
        return {
            "bits": self.bits,
            "context": self.context,
            "yarn": self.yarn,
            "fits": self.fits,
            **{name: getattr(self.plan, name) for name in PARTS},
            "total": self.plan.total,
            "largest_context": self.largest,
            "prompt_tokens_per_s": self.speed and _rounded(self.speed.prompt),
            "generated_tokens_per_s": self.speed and _rounded(self.speed.generated),
        }


PARTS = ("weights", "kv", "states", "checkpoints", "vision", "scratch", "runtime")
"""Of a plan, in the order in which they are shown."""


def _rounded(rate: float) -> float:
    return round(rate, 1 if rate >= 10 else 3)


def find_target(name: str, bits: int | None = None) -> Target:
    """What `name` stands for, as it is here, or as the hub or the family's table describes it; in `bits` bits, if any.

    Raises UsageError, ModelError and NetworkError as `edgeq.hub.find_model` does.
    """
    if size := size_of(name):
        return Target(f"Qwen3.5-{size.upper()}", list(_recipes(family_config(size), bits)))
    if (path := find_here(name)) is not None:
        checkpoint = open_checkpoint(path)
        own = Variant(checkpoint, 0.0)
        own = own._replace(bits=round(own.bits_per_weight, 2))
        if bits is None:
            return Target(name, [own], path)
        if own.bits_per_weight < 16:
            raise UsageError(
                f"{name} has {own.bits:g} bits per weight already, and {bits} bits were asked for",
                hint="leave out the bits, or name the checkpoint that it was made from",
            )
        return Target(name, list(_recipes(checkpoint.config, bits)), path)
    values = hub_config(name)
    if values is None:
        raise UsageError(
            f"{name} is a GGUF file, whose sizes are known once it is here",
            hint="download it first, or name the model that it was made from, as in `edgeq fit qwen3.5:4b --bits 4`",
        )
    return Target(name, list(_of_hub(name, values, bits)))


def _recipes(config: ModelConfig, bits: int | None) -> Iterator[Variant]:
    for n in BITS if bits is None else (bits,):
        recipe = choose_recipe("none", None, None) if n == 16 else choose_recipe(None, n, None)
        yield Variant(DescribedModel.of_recipe(config, recipe), n)


def _of_hub(name: str, values: Mapping[str, Any], bits: int | None) -> Iterator[Variant]:
    """A model that its config.json describes: whole, or in MLX's groups."""
    config = parse_config(values, f"{name}: config.json")
    quantized = values.get("quantization", values.get("quantization_config"))
    if quantized is None:
        yield from _recipes(config, bits)
        return
    if not isinstance(quantized, Mapping) or quantized.get("quant_method", "affine") != "affine":
        raise UsageError(
            f"{name} is quantized by another tool, so its sizes are known once it is here",
            hint="download it first, or name the model that it was made from, as in `edgeq fit qwen3.5:4b --bits 4`",
        )
    if bits is not None:
        raise UsageError(f"{name} is quantized already, and {bits} bits were asked for", hint="leave out the bits")
    own = Variant(DescribedModel.of_config(config, values), 0)
    yield own._replace(bits=round(own.bits_per_weight, 2))


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of a model: grids of its pictures, sequences at a time, and bytes that it may take (None: no
    matter)."""

    grids: Sequence[Grid] = ()
    sequences: int = 1
    ceiling: int | None = None

    def of(self, variant: Variant, ops: Ops[Any, Any], facts: Facts | None, context: int) -> Fit:
        """A variant with a context; it is stretched by YaRN where it has to be. UsageError beyond that."""
        model, yarn = _stretched(variant.model, context)
        room = None if self.ceiling is None else self.ceiling - SPARE - IMPORTED_LATER
        plan = self._plan(model, ops, context, room)
        largest = model.config.text.longest_context
        if room is not None:
            largest = largest_context(model, ops, room, grids=self.grids, sequences=self.sequences)
        speed = None if facts is None else expected_speed(model, ops, facts, context)
        fits = room is None or plan.total <= room
        plan = plan._replace(runtime=plan.runtime + IMPORTED_LATER)
        return Fit(variant.bits, context, plan, largest, fits, speed, yarn)

    def _plan(self, model: Planned, ops: Ops[Any, Any], context: int, room: int | None) -> Plan:
        """With the MTP head and the states that conversations keep, as far as there is room for them: one after every
        chunk of a prompt, after the prompt and after the reply, up to the limit of a model's prefixes. The one before
        the chunk at hand is counted with the states."""
        state = ops.state_nbytes(model.config.text)
        count = most_kept(ops, model.config.text, context, self.sequences)
        plan = plan_memory(
            model, ops, context, grids=self.grids, sequences=self.sequences, checkpoints=count, drafts=True
        )
        if room is None or plan.total <= room:
            return plan
        plan = plan_memory(model, ops, context, grids=self.grids, sequences=self.sequences)
        kept = min(count, max(0, room - plan.total) // max(1, state))
        return plan._replace(checkpoints=kept * state)


def _stretched(model: Planned, context: int) -> tuple[Planned, int | None]:
    """The model, with its context stretched if it is to hold more tokens than it was made for."""
    longest = model.config.text.longest_context
    if context <= longest:
        return model, None
    if context > _YARN * longest or model.config.text.rope.scaling is not None:
        most = longest * (1 if model.config.text.rope.scaling is not None else _YARN)
        raise UsageError(f"the context must be 1 to {most:,} tokens, got {context:,}", hint="ask for less")
    return _Stretched(model, stretched(model.config, f"yarn:{_YARN}")), _YARN


class _Stretched:
    """A model with another configuration."""

    def __init__(self, model: Planned, config: ModelConfig) -> None:
        self.config, self.storage, self.memory_nbytes = config, model.storage, model.memory_nbytes
        self.is_mapped = model.is_mapped


def picture_grids(
    config: ModelConfig, images: Sequence[tuple[int, int]] = (), videos: Sequence[float] = ()
) -> tuple[list[Grid], int]:
    """Patches of images (width, height) and of videos of so many seconds, as a conversation takes them, and the tokens
    that they are. UsageError for a model that does not see."""
    if config.vision is None:
        if images or videos:
            raise UsageError("the model does not see: it has no vision tower", hint="leave out images and videos")
        return [], 0
    c, own, grids = processor_of(config), CHAT_VISUALS, list[Grid]()
    for width, height in images:
        grids.append(grid_of(1, image_size(height, width, config, image_tokens=own.image_tokens), c))
    for seconds in videos:
        frames, _ = sample_frames(max(1, round(seconds * _FRAMES)), _FRAMES, config, max_frames=own.max_frames)
        grids.append(grid_of(len(frames), video_size(len(frames), *_VIDEO, config, video_tokens=own.video_tokens), c))
    return grids, sum(tokens_of(grid, config) for grid in grids)


def table(target: Target, ops: Ops[Any, Any], facts: Facts | None, wanted: Wanted) -> list[Fit]:
    """Every variant with every context of `CONTEXTS` that it can have."""
    text = target.variants[0].model.config.text
    most = text.longest_context * (_YARN if text.rope.scaling is None else 1)
    contexts = [tokens for tokens in CONTEXTS if tokens <= most] or [text.longest_context]
    return [wanted.of(variant, ops, facts, tokens) for variant in target.variants for tokens in contexts]
