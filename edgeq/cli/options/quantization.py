"""Options of the commands that quantize."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from edgeq.cli.options.groups import option
from edgeq.errors import UsageError
from edgeq.quant.recipe import RECIPES

__all__ = ["CalibrationOptions", "RecipeOptions"]

_RECIPE_HELP = "\n".join(
    ["Which tensors get how many bits:", *(f"{recipe.name:5}{recipe.summary}" for recipe in RECIPES.values())]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeOptions:
    """What every tensor is stored as."""

    title: ClassVar[str] = "Recipe"

    bits: Annotated[
        int | None,
        option("--bits", "--q-bits", metavar="N", env=False, default="the recipe's", help="Bits: 2, 3, 4, 5, 6 or 8."),
    ] = None
    group_size: Annotated[
        int | None,
        option(
            "--group-size", "--q-group-size", metavar="N", env=False, default="the recipe's",
            help="Weights per scale: 32, 64 or 128.",
        ),
    ] = None  # fmt: skip
    recipe: Annotated[
        str | None,
        option(
            "--recipe", metavar="NAME", env=False, default="q4; q8 with --bits 8; keep for GPTQ and the like",
            help=_RECIPE_HELP,
        ),
    ] = None  # fmt: skip
    types: Annotated[
        list[str] | None,
        option(
            "--type", metavar="PATTERN=SPEC", env=False,
            help="Store tensors whose name matches PATTERN as SPEC: bits (4), bits and group size (6g32), bf16, f16 "
            "or f32; repeatable, last match wins.",
        ),
    ] = None  # fmt: skip
    vision: Annotated[
        str | None,
        option(
            "--vision", metavar="16|8|none", env=False, default="8; 16 with --recipe none or keep",
            help="The vision tower: as it is, its matrices in 8 bits, or left out.",
        ),
    ] = None  # fmt: skip
    no_vision: Annotated[bool, option("--no-vision", env=False, help="Leave the vision tower out: --vision none.")] = (
        False
    )
    no_mtp: Annotated[bool, option("--no-mtp", env=False, help="Leave the MTP head out.")] = False

    def settings(self) -> dict[str, Any]:
        """As arguments of `edgeq.quantize`."""
        if self.no_vision and self.vision not in (None, "none"):
            raise UsageError(f"--no-vision and --vision {self.vision} contradict each other", hint="give one of them")
        return {
            "bits": self.bits, "group_size": self.group_size, "recipe": self.recipe, "types": self.types or (),
            "vision": "none" if self.no_vision else self.vision, "mtp": not self.no_mtp,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """What a calibration is asked for."""

    title: ClassVar[str] = "Calibration"

    calibrate: Annotated[
        str | None,
        option(
            "--calibrate", metavar="[TEXT]", env=False,
            help="Allocate bits to matrices by what each gains, and round them for what they multiply on a UTF-8 text; "
            "a run that was killed goes on.",
        ),
    ] = None  # fmt: skip
    effort: Annotated[
        str | None,
        option(
            "--effort", metavar="fast|standard|best", env=False, default="standard",
            help="How much work calibration is.",
        ),
    ] = None  # fmt: skip
    target_bpw: Annotated[
        float | None,
        option(
            "--target-bpw", metavar="BITS", env=False, default="as many as without calibration",
            help="Bits per weight of the language model, all its bytes counted.",
        ),
    ] = None  # fmt: skip
    target_size: Annotated[
        str | None,
        option("--target-size", metavar="SIZE", env=False, help="The same as the size of all tensors: 1.2G, 900M."),
    ] = None
    keep_bits: Annotated[
        bool, option("--keep-bits", env=False, help="Calibrate with the bits that matrices have without it.")
    ] = False
    seed: Annotated[
        int | None,
        option("--seed", metavar="N", env=False, default="0", help="Chooses parts of a long calibration text."),
    ] = None

    def settings(self) -> dict[str, Any]:
        """As arguments of `edgeq.quantize`."""
        return {
            "calibrate": self.calibrate, "effort": self.effort, "target_bpw": self.target_bpw,
            "target_size": self.target_size, "keep_bits": self.keep_bits, "seed": self.seed,
        }  # fmt: skip
