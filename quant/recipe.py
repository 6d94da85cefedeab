"""Recipes: what every tensor of a checkpoint is stored as.

A recipe is a base (bits and group size) and rules that lift some matrices above it. What the rules rest on: DeltaNet's
`out_proj` is the matrix that costs most when it is coarse, by public measurements on this model family; the a and b
projections, the convolution, `A_log`, `dt_bias` and the norms are under 0.3% of the bytes and drive the recurrence, so
no recipe touches them. The MTP head follows the base: it only proposes tokens that the model verifies, so its error
costs acceptance rate, never an answer.

The vision tower is apart: 8 bits for its blocks and its merger cost nothing that can be measured
(docs/concepts/quantization.md), fewer would; patch embedding, position table, norms and biases stay as they are. It can
be kept at 16 bits, or left out.

`--type PATTERN=SPEC` overrides a recipe, later ones win; for the tower only patterns that name it (`visual.*`) count.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

from edgeq.errors import UsageError
from edgeq.formats.affine import BITS, GROUP_SIZES
from edgeq.printable import brief
from edgeq.weights import Part, Role, TensorSpec

__all__ = [
    "KEEP",
    "RECIPES",
    "VISION",
    "Assignment",
    "QuantSpec",
    "Recipe",
    "Storage",
    "TypeRule",
    "VisionChoice",
    "assign",
    "choose_recipe",
]

FloatType: TypeAlias = Literal["BF16", "F16", "F32"]
KEEP: Literal["keep"] = "keep"

VisionChoice: TypeAlias = Literal["16", "8", "none"]
VISION: tuple[VisionChoice, ...] = get_args(VisionChoice)
"""What becomes of the vision tower: kept as it is, its matrices of 8 bits, or left out."""

_VISION_GROUP = 64
_FLOAT_TYPES: Mapping[str, FloatType] = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
_EXACT = (Role.DECAY, Role.GATED_NORM)  # float32 in the hub's files, and kept so


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """Affine codes of `bits` bits, with a scale and a bias for every `group_size` weights of a row."""

    bits: int
    group_size: int

    def __str__(self) -> str:
        return f"{self.bits}-bit g{self.group_size}"


Storage: TypeAlias = QuantSpec | FloatType | Literal["keep"]
"""What a tensor is stored as; KEEP is the source's own type."""


@dataclass(frozen=True, slots=True)
class TypeRule:
    """`PATTERN=SPEC` of --type: SPEC is bits ("4", "8"), bits and group size ("4g32", "6g64"), bf16, f16 or f32."""

    text: str
    pattern: str
    type: FloatType | tuple[int, int | None]  # bits and group size; None: the recipe's

    @classmethod
    def parse(cls, text: str) -> TypeRule:
        pattern, _, spec = text.rpartition("=")
        kind = _FLOAT_TYPES.get(spec.lower()) or _bits_and_group(spec)
        if not pattern or kind is None:
            raise UsageError(
                f"type {text!r} is not PATTERN=SPEC",
                hint="SPEC is bits (2, 3, 4, 5, 6, 8), bits and group size (6g32), bf16, f16 or f32",
            )
        return cls(text, pattern, kind)

    @property
    def quantizes(self) -> bool:
        return not isinstance(self.type, str)

    def matches(self, *names: str) -> bool:
        """Whether the pattern matches one of the names, with or without `.weight`."""
        candidates = (*names, *(name.removesuffix(".weight") for name in names))
        return any(fnmatchcase(name, self.pattern) for name in candidates)

    def applies(self, spec: TensorSpec) -> bool:
        """Whether it may decide on a tensor whose name it matches."""
        named = spec.part is not Part.VISION or self.pattern.startswith(("visual.", "model.visual.", "vision_tower."))
        return not self.quantizes or (named and _quantizable(spec))

    def storage(self, group_size: int) -> Storage:
        if isinstance(self.type, str):
            return self.type
        bits, own_group_size = self.type
        return QuantSpec(bits, own_group_size or group_size)


def _bits_and_group(spec: str) -> tuple[int, int | None] | None:
    match = re.fullmatch(r"(\d)(?:g(\d+))?", spec)
    if match is None:
        return None
    bits, group_size = int(match[1]), int(match[2]) if match[2] else None
    return (bits, group_size) if bits in BITS and group_size in (None, *GROUP_SIZES) else None


@dataclass(frozen=True, slots=True)
class Recipe:
    """`base` for every matrix, at least `lifted` bits where a pattern matches the neutral name; None: all are `plain`.
    `vision` is what becomes of the tower, `mtp` whether the MTP head is kept."""

    name: str
    summary: str
    base: QuantSpec | None
    lifted: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    vision: VisionChoice = "16"
    plain: Literal["BF16", "keep"] = "BF16"
    mtp: bool = True

    @property
    def dropped(self) -> set[Part]:
        """The parts that the result is not to have."""
        wanted = {Part.TEXT: True, Part.MTP: self.mtp, Part.VISION: self.vision != "none"}
        return {part for part, kept in wanted.items() if not kept}

    def keeps(self, spec: TensorSpec) -> bool:
        """Whether the result has the tensor at all."""
        return spec.part not in self.dropped

    def storage(self, spec: TensorSpec) -> Storage:
        """What the recipe stores a tensor as."""
        if spec.part is Part.VISION and _quantizable(spec) and self.vision == "8":
            return QuantSpec(8, _VISION_GROUP)
        if self.base is None:
            return KEEP if spec.role in _EXACT else self.plain
        if not _quantizable(spec) or spec.part is Part.VISION:
            return KEEP
        lifts = [bits for pattern, bits in self.lifted.items() if fnmatchcase(spec.name, pattern)]
        return replace(self.base, bits=max([self.base.bits, *lifts]))


def _quantizable(spec: TensorSpec) -> bool:
    return spec.role in (Role.LINEAR, Role.EMBEDDING)


def _recipes(*recipes: Recipe) -> Mapping[str, Recipe]:
    return MappingProxyType({recipe.name: recipe for recipe in recipes})


_OUT_PROJ = {"layers.*.linear_attn.out_proj.weight": 6}
_EMBEDDING = {"embed_tokens.weight": 6, "lm_head.weight": 6}

RECIPES = _recipes(
    Recipe("q4", "4-bit, with DeltaNet out_proj at 6 bits", QuantSpec(4, 64), _OUT_PROJ),
    Recipe(
        "q4+",
        "4-bit, with out_proj, o_proj, v_proj, embedding at 6 bits",
        QuantSpec(4, 64),
        {**_OUT_PROJ, "layers.*.self_attn.o_proj.weight": 6, "layers.*.self_attn.v_proj.weight": 6, **_EMBEDDING},
    ),
    Recipe(
        "q5",
        "4-bit feed-forward, everything else at 6 bits",
        QuantSpec(4, 64),
        {"layers.*.linear_attn.*": 6, "layers.*.self_attn.*": 6, **_EMBEDDING},
    ),
    Recipe("q6", "6-bit", QuantSpec(6, 64)),
    Recipe("q8", "8-bit", QuantSpec(8, 64)),
    Recipe("none", "bfloat16, not quantized", None),
    Recipe("keep", "as it is; GPTQ, AWQ and the like to the bit", None, plain=KEEP),
)


def _either(values: Sequence[int]) -> str:
    *others, last = map(str, sorted(values))
    return f"{', '.join(others)} or {last}"


def choose_recipe(
    name: str | None, bits: int | None, group_size: int | None, vision: int | str | None = None
) -> Recipe:
    """The recipe called `name`, by default q4 or, at 8 bits, q8; `bits` and `group_size` replace its base's.

    vision: 16, 8 or "none"; by default 8, but 16 for a recipe that quantizes nothing.
    """
    if bits is not None and bits not in BITS:
        raise UsageError(f"bits must be {_either(BITS)}, got {bits}")
    if group_size is not None and group_size not in GROUP_SIZES:
        raise UsageError(f"group size must be {_either(GROUP_SIZES)}, got {group_size}")
    name = name or ("q8" if bits == 8 else "q4")
    if name not in RECIPES:
        raise UsageError(f"unknown recipe {name!r}", hint=f"use one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    choice = next((choice for choice in VISION if choice == str(vision)), None)
    if choice is None and vision is not None:
        raise UsageError(
            f"the vision tower cannot be stored as {brief(vision)}", hint=f"use one of {', '.join(VISION)}"
        )
    recipe = replace(recipe, vision=choice or ("16" if recipe.base is None else "8"))
    if recipe.base is None:
        if bits is not None or group_size is not None:
            raise UsageError(f"recipe {name!r} quantizes nothing", hint="leave out bits and group size")
        return recipe
    base = QuantSpec(bits or recipe.base.bits, group_size or recipe.base.group_size)
    return replace(recipe, base=base)


@dataclass(frozen=True, slots=True)
class Assignment:
    """The decision for one tensor; `note` says where it is not what was asked for."""

    spec: TensorSpec
    file_name: str
    storage: Storage
    note: str = ""


def assign(
    tensors: Sequence[tuple[TensorSpec, str]], recipe: Recipe, rules: Sequence[TypeRule] = ()
) -> list[Assignment]:
    """Decide for every tensor that is kept, given as spec and name in the file. UsageError for a rule that applies to
    none."""
    group_size = recipe.base.group_size if recipe.base else 64
    unused = set(rules)
    assignments = []
    for spec, file_name in tensors:
        if not recipe.keeps(spec):
            continue
        storage = recipe.storage(spec)
        for rule in rules:
            if rule.matches(spec.name, file_name) and rule.applies(spec):
                storage = rule.storage(group_size)
                unused.discard(rule)
        assignments.append(_fit(Assignment(spec, file_name, storage)))
    for rule in rules:
        if rule in unused:
            raise _unused_error(rule, tensors)
    return assignments


def _fit(a: Assignment) -> Assignment:
    """Groups must divide a row: else smaller groups, else the source's type."""
    if not isinstance(a.storage, QuantSpec):
        return a
    width, wanted = a.spec.shape[-1], a.storage.group_size
    if width % wanted == 0:
        return a
    smaller = [g for g in GROUP_SIZES if g < wanted and width % g == 0]
    if smaller:
        note = f"groups of {smaller[-1]}: rows of {width} are not a multiple of {wanted}"
        return replace(a, storage=replace(a.storage, group_size=smaller[-1]), note=note)
    return replace(a, storage=KEEP, note=f"not quantized: rows of {width} are not a multiple of {GROUP_SIZES[0]}")


def _unused_error(rule: TypeRule, tensors: Sequence[tuple[TensorSpec, str]]) -> UsageError:
    if any(rule.matches(spec.name, file_name) for spec, file_name in tensors):
        return UsageError(
            f"type {rule.text!r} matches only tensors that are never quantized",
            hint="gates, convolutions, norms and vectors can be bf16, f16 or f32; name the tower as visual.*",
        )
    return UsageError(
        f"type {rule.text!r} matches no tensor",
        hint="match whole names, such as '*.down_proj' or 'layers.0.*'; a dry run lists the names",
    )
