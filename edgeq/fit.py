"""What a model takes and how fast it runs, for a model that need not be here: the arithmetic of `edgeq fit`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from edgeq.backends.ops import Ops
from edgeq.checkpoint import Checkpoint, open_checkpoint
from edgeq.config import ModelConfig, parse_config, stretched
from edgeq.errors import MemoryBudgetError, UsageError
from edgeq.family import family_config, size_of
from edgeq.hub import find_here, hub_config
from edgeq.machine.facts import Facts
from edgeq.machine.speed import Speed, expected_speed
from edgeq.memory.budget import SPARE
from edgeq.memory.ceiling import Ceiling
from edgeq.memory.choice import (
    IMPORTED_LATER,
    LEAST_CONTEXT,
    Asked,
    MakeOps,
    find_settings,
    least_plan,
    most_context,
    refusal,
)
from edgeq.memory.plan import SMALLEST_CHUNK, Plan, Planned, largest_context, plan_memory, prefill_chunk
from edgeq.quant.described import DescribedModel
from edgeq.quant.recipe import choose_recipe
from edgeq.session.prefixes import most_kept
from edgeq.session.visual_settings import CHAT_VISUALS, VisualSettings, fitting_visuals
from edgeq.vision.settings import processor_of
from edgeq.vision.sizes import grid_of, image_size, sample_frames, tokens_of, video_size
from edgeq.vision.visual import Grid
from edgeq.weights import Part

__all__ = ["CONTEXTS", "PARTS", "Fit", "Target", "Variant", "Wanted", "find_target", "picture_grids", "table"]

SHOWN = 4096  # tokens of context where none are given
CONTEXTS = (1024, 4096, 16_384, 65_536, 262_144, 1_048_576)
"""Those of the table; where a model was not made for so many tokens, YaRN stretches it."""

BITS = (4, 8, 16)
_YARN = 4  # times the context that the model cards allow
_FRAMES = 24  # of a second of a video, and its height and width
_VIDEO = (1080, 1920)
MOST_TOKENS = 16_384  # of a picture, by the checkpoints


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
    checkpoint: Checkpoint | None = None


class Fit(NamedTuple):
    """A model with a context on a machine.

    ops: the backend, with keys and values of the type that they have. plan: bytes. largest: most tokens of context that
    fit with all weights in memory, or, where none do, with part of them. fits: whether it runs. speed: None where the
    machine was not measured, or the medium was not that weights are read from. yarn: by how much the context is
    stretched. picture_tokens: those of pictures, as large as there is room for. streamed: bytes of the weights that do
    not stay, and are read anew for every token, and for every `chunk` tokens of a prompt.
    """

    bits: float
    context: int
    ops: Ops[Any, Any]
    chunk: int
    plan: Plan
    largest: int
    fits: bool
    speed: Speed | None
    yarn: int | None
    picture_tokens: int
    streamed: int = 0

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
            "kv_dtype": self.ops.kv_dtype,
            "chunk": self.chunk,
            "streamed": self.streamed,
            "picture_tokens": self.picture_tokens,
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
            return Target(name, [own], path, checkpoint)
        if own.bits_per_weight < 16:
            raise UsageError(
                f"{name} has {own.bits:g} bits per weight already, and {bits} bits were asked for",
                hint="leave out the bits, or name the checkpoint that it was made from",
            )
        return Target(name, list(_recipes(checkpoint.config, bits)), path, checkpoint)
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
    """What is asked of a model on a machine.

    make_ops: the backend with keys and values of so many bits. kv_bits: None is as many as the backend likes, and under
    a ceiling 8 where it needs them. images (width, height) and videos (seconds). sequences: at a time.
    ceiling: kept; used: bytes of it that the process takes already. free: else the bytes that there are; None is no
    matter. facts: of the machine. reread: bytes a second of weights that are read anew; None where that is not known.
    """

    make_ops: MakeOps
    kv_bits: int | None = None
    images: Sequence[tuple[int, int]] = ()
    videos: Sequence[float] = ()
    sequences: int = 1
    ceiling: Ceiling | None = None
    used: int = 0
    free: int | None = None
    facts: Facts | None = None
    reread: float | None = None

    def of(self, variant: Variant, context: int | None = None) -> Fit:
        """A variant with a context, which is stretched by YaRN where it has to be; with None what a chat takes under
        the ceiling, and else SHOWN, or what fits. UsageError beyond what YaRN can."""
        model, yarn = _stretched(variant.model, context or 1)
        if self.ceiling is not None:
            fit = self._under(self.ceiling, model, context)
        else:
            fit = self._free(model, context or min(SHOWN, model.config.text.longest_context))
            if context is None and not fit.fits and fit.largest:
                fit = self._free(model, fit.largest)
        return fit._replace(bits=variant.bits, yarn=yarn)

    def refusal(self, variant: Variant, context: int | None) -> MemoryBudgetError:
        """What a chat says where it does not run under the ceiling: numbers, and what would fit."""
        assert self.ceiling is not None
        model, _ = _stretched(variant.model, context or 1)
        grids, _ = self._pictures(model, 0)
        asked = Asked(context, self.kv_bits, grids, self.sequences)
        return refusal(model, self.make_ops, self.ceiling, asked, self.used)

    def _under(self, ceiling: Ceiling, model: Planned, context: int | None) -> Fit:
        """What runs under a ceiling: what a chat chooses (`edgeq.memory.choice`)."""
        asked = Asked(context, self.kv_bits, (), self.sequences)
        choice = find_settings(model, self.make_ops, ceiling, asked, self.used)
        grids, tokens = self._pictures(model, choice.picture_tokens if choice else 0)
        if grids:
            asked = asked._replace(grids=grids)
            choice = choice and find_settings(model, self.make_ops, ceiling, asked, self.used)
        largest = most_context(model, self.make_ops, ceiling, asked, self.used)
        if choice is None:
            plan, ops = least_plan(model, self.make_ops, asked, self.used), self.make_ops(self.kv_bits)
            context = context or min(LEAST_CONTEXT, model.config.text.longest_context)
            speed = self._speed(model, ops, context, None, 0)
            return Fit(0, context, ops, SMALLEST_CHUNK, plan, largest, False, speed, None, tokens)
        room = ceiling.nbytes - SPARE - choice.plan.total
        plan = choice.plan._replace(
            checkpoints=0 if choice.streamed else self._kept(model, choice.ops, choice.context, room)
        )
        speed = self._speed(model, choice.ops, choice.context, choice.chunk, choice.streamed)
        return Fit(
            0, choice.context, choice.ops, choice.chunk, plan, largest, True, speed, None, tokens, choice.streamed
        )  # fmt: skip

    def _free(self, model: Planned, context: int) -> Fit:
        """With all weights in memory, and the MTP head and kept states as far as there is room for them."""
        ops, (grids, tokens) = self.make_ops(self.kv_bits), self._pictures(model, MOST_TOKENS)
        room = None if self.free is None else self.free - SPARE - IMPORTED_LATER
        plan = plan_memory(model, ops, context, grids=grids, sequences=self.sequences, drafts=True)
        if room is not None and plan.total > room:
            plan = plan_memory(model, ops, context, grids=grids, sequences=self.sequences)
        largest, fits = model.config.text.longest_context, room is None or plan.total <= room
        if room is not None:
            largest = largest_context(model, ops, room, grids=grids, sequences=self.sequences)
        kept = self._kept(model, ops, context, None if room is None else room - plan.total)
        plan = plan._replace(runtime=plan.runtime + IMPORTED_LATER, checkpoints=kept)
        speed = self._speed(model, ops, context, None, 0)
        return Fit(0, context, ops, prefill_chunk(model.config.text, ops), plan, largest, fits, speed, None, tokens)

    def _kept(self, model: Planned, ops: Ops[Any, Any], context: int, room: int | None) -> int:
        """Bytes of states that conversations keep, as far as there is room for them: one after every chunk of a prompt,
        after the prompt and after the reply, up to the limit of a model's prefixes. The one before the chunk at hand is
        counted with the states."""
        state, count = ops.state_nbytes(model.config.text), most_kept(ops, model.config.text, context, self.sequences)
        return state * (count if room is None else min(count, max(0, room) // max(1, state)))

    def _pictures(self, model: Planned, most: int) -> tuple[list[Grid], int]:
        return picture_grids(model.config, self.images, self.videos, fitting_visuals(most))

    def _speed(
        self, model: Planned, ops: Ops[Any, Any], context: int, chunk: int | None, streamed: int
    ) -> Speed | None:
        if self.facts is None or (streamed and self.reread is None):
            return None
        seconds = streamed / self.reread if streamed and self.reread else 0.0
        return expected_speed(model, ops, self.facts, context, chunk=chunk, reading_anew=seconds)


def _stretched(model: Planned, context: int) -> tuple[Planned, int | None]:
    """The model, with its context stretched if it is to hold more tokens than it was made for."""
    longest = model.config.text.longest_context
    if context <= longest:
        return model, None
    if context > _YARN * longest or model.config.text.rope.scaling is not None:
        most = longest * (1 if model.config.text.rope.scaling is not None else _YARN)
        raise UsageError(f"the context must be 1 to {most:,} tokens, got {context:,}", hint=f"ask for {most:,} or less")
    return _Stretched(model, stretched(model.config, f"yarn:{_YARN}")), _YARN


class _Stretched:
    """A model with another configuration."""

    def __init__(self, model: Planned, config: ModelConfig) -> None:
        self.config, self.storage, self.memory_nbytes = config, model.storage, model.memory_nbytes
        self.is_mapped = model.is_mapped


def picture_grids(
    config: ModelConfig, images: Sequence[tuple[int, int]] = (), videos: Sequence[float] = (),
    visuals: VisualSettings = CHAT_VISUALS,
) -> tuple[list[Grid], int]:  # fmt: skip
    """Patches of images (width, height) and of videos of so many seconds, as a conversation takes them, and the tokens
    that they are. UsageError for a model that does not see."""
    if not images and not videos:
        return [], 0
    if config.vision is None:
        raise UsageError("the model does not see: it has no vision tower", hint="leave out images and videos")
    c, grids = processor_of(config), list[Grid]()
    for width, height in images:
        grids.append(grid_of(1, image_size(height, width, config, image_tokens=visuals.image_tokens), c))
    for seconds in videos:
        frames, _ = sample_frames(max(1, round(seconds * _FRAMES)), _FRAMES, config, max_frames=visuals.max_frames)
        size = video_size(len(frames), *_VIDEO, config, video_tokens=visuals.video_tokens)
        grids.append(grid_of(len(frames), size, c))
    return grids, sum(tokens_of(grid, config) for grid in grids)


def table(target: Target, wanted: Wanted) -> list[Fit]:
    """Every variant with every context of `CONTEXTS` that it can have."""
    text = target.variants[0].model.config.text
    most = text.longest_context * (_YARN if text.rope.scaling is None else 1)
    contexts = [tokens for tokens in CONTEXTS if tokens <= most] or [text.longest_context]
    return [wanted.of(variant, tokens) for variant in target.variants for tokens in contexts]
