"""What a calibration is asked for, and what contradicts it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from edgeq.errors import UsageError
from edgeq.numbers import Range
from edgeq.printable import brief
from edgeq.quant.calibrate.rounding import EFFORTS, Effort
from edgeq.quant.calibrate.windows import DEFAULT

__all__ = ["BPW", "BUDGETS", "Budget", "CalibrationRequest", "choose_calibration"]


class Budget(NamedTuple):
    """How many tokens an effort takes: to round by, and to measure by where bits are allocated; how many windows'
    beginnings predictions are compared on for that; how many windows the result is judged by. `asymmetric` is whether a
    block sees the inputs that the blocks before it give once they are quantized, `equalize` whether scale is moved
    between columns and norms."""

    tokens: int
    measured: int
    probes: int
    judged: int
    asymmetric: bool
    equalize: bool = True


BUDGETS: Mapping[str, Budget] = MappingProxyType(
    {
        "fast": Budget(2048, 2048, 4, 2, asymmetric=False),
        "standard": Budget(16384, 8192, 8, 8, asymmetric=True),
        "best": Budget(32768, 16384, 16, 16, asymmetric=True),
    }
)
BPW = Range(2, 16)
"""Bits per weight that can be asked for."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


@dataclass(frozen=True, slots=True)
class CalibrationRequest:
    """Calibrate on `text`, "default" or a file, with an effort by name, and allocate bits under a target: `target_bpw`
    (bits per weight of the language model, every byte of it counted), `target_nbytes` (of all tensors), or else the
    bytes that the recipe takes. With `keeps_bits` nothing is allocated: the recipe decides."""

    text: str
    effort: str
    seed: int
    target_bpw: float | None = None
    target_nbytes: int | None = None
    keeps_bits: bool = False

    @property
    def has_target(self) -> bool:
        """Whether the size is given, and not the recipe's."""
        return self.target_bpw is not None or self.target_nbytes is not None

    @property
    def budget(self) -> Budget:
        """Its tokens."""
        return BUDGETS[self.effort]

    @property
    def rounding(self) -> Effort:
        """Its work on a matrix."""
        return EFFORTS[self.effort]

    @property
    def record(self) -> dict[str, Any]:
        """What a provenance record says of it."""
        return {
            "effort": self.effort, "seed": self.seed, "target_bpw": self.target_bpw,
            "target_size": self.target_nbytes, "keep_bits": self.keeps_bits,
        }  # fmt: skip


def choose_calibration(
    calibrate: str | Path | bool | None, effort: str | None, target_bpw: float | None, target_size: int | str | None,
    seed: int | None, *, keep_bits: bool = False, recipe: str | None = None, bits: int | None = None,
    group_size: int | None = None,
) -> CalibrationRequest | None:  # fmt: skip
    """The calibration that is asked for, or None. UsageError for what contradicts itself or the recipe."""
    if calibrate is None or calibrate is False:
        needs = {
            "effort": effort, "target-bpw": target_bpw, "target-size": target_size, "seed": seed,
            "keep-bits": keep_bits or None,
        }  # fmt: skip
        for name, value in needs.items():
            if value is not None:
                raise UsageError(
                    f"{name} is for calibration, which is not asked for",
                    hint="add `--calibrate` (calibrate=True in Python)",
                )
        return None
    if str(calibrate) in ("", "."):
        raise UsageError("calibrate names no text", hint="give a UTF-8 text file, or `default`")
    if effort is not None and effort not in BUDGETS:
        raise UsageError(f"unknown effort {brief(effort)}", hint=f"use one of {', '.join(BUDGETS)}")
    if recipe in ("keep", "none"):
        raise UsageError(
            f"calibration and recipe {recipe!r} contradict each other: it quantizes nothing", hint="leave one out"
        )
    if target_bpw is not None and target_size is not None:
        raise UsageError("target-bpw and target-size contradict each other", hint="give one of them")
    target = "target-bpw" if target_bpw is not None else "target-size" if target_size is not None else None
    if target and keep_bits:
        raise UsageError(
            f"{target} and keep-bits contradict each other: the one has bits chosen, the other keeps them",
            hint="give one of them",
        )
    for name, value in {"recipe": recipe, "bits": bits, "group-size": group_size}.items():
        if target and value is not None:
            raise UsageError(
                f"{target} and {name} contradict each other: the one has bits chosen, the other says how many",
                hint="give one of them; `--type` (types= in Python) sets single tensors",
            )
    if target_bpw is not None and not BPW.holds(target_bpw):
        raise UsageError(f"target-bpw must be 2 to 16 bits per weight, got {brief(target_bpw)}")
    if seed is not None and not Range(0, 2**63 - 1, whole=True).holds(seed):
        raise UsageError(f"seed must be 0 to 2^63 - 1, got {brief(seed)}")
    text = DEFAULT if calibrate is True else str(calibrate)
    nbytes = None if target_size is None else _nbytes(target_size)
    return CalibrationRequest(text, effort or "standard", seed or 0, target_bpw, nbytes, bool(keep_bits))


def _nbytes(size: int | str) -> int:
    """Bytes of a size as people write it: 1.2G, 900MB, 1 GiB; G is 10^9, Gi 2^30."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMG]?I?)B?\s*", str(size).upper())
    if match is None or match[2] not in _UNITS or float(match[1]) == 0:
        raise UsageError(f"target-size {brief(size)} is no size", hint="give bytes with a unit: 1.2G, 900M, 1.1GiB")
    return int(float(match[1]) * _UNITS[match[2]])
