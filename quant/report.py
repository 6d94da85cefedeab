"""What a quantization did, or would do: one line for every tensor, and the sums."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

__all__ = ["Report", "TensorReport", "format_table"]


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One tensor: `nbytes` are all its bytes, scales and biases included.

    `nmse` is the squared error relative to the tensor's own squares, for quantized tensors once they were written.
    """

    name: str
    file_name: str
    part: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    nmse: float | None = None
    note: str = ""

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Report:
    """A quantization: `seconds` is 0 and there are no errors after a dry run; `warnings` are about the source.

    `allocation`: where bits are chosen, how many `matrices` may take how many bytes (`budget`), what their smallest
    choices take (`least`), and what else counts (`others`). `gate`: what a calibrated result was judged by
    (`edgeq.quality.gate.GateResult.as_json`).
    """

    source: str
    out: str
    recipe: str
    tensors: tuple[TensorReport, ...]
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    allocation: Mapping[str, int] | None = None
    gate: Mapping[str, Any] | None = None

    @property
    def parts(self) -> list[str]:
        return list(dict.fromkeys(t.part for t in self.tensors))

    def nbytes(self, part: str | None = None) -> int:
        """Bytes of all tensors, or of one part's."""
        return sum(t.nbytes for t in self.tensors if part in (None, t.part))

    def bits_per_weight(self, part: str | None = None) -> float:
        """All bytes (scales, biases, norms, everything) over all weights."""
        return 8 * self.nbytes(part) / sum(t.size for t in self.tensors if part in (None, t.part))

    def as_json(self) -> dict[str, Any]:
        """Everything, for a program."""
        sums = {p: {"nbytes": self.nbytes(p), "bits_per_weight": self.bits_per_weight(p)} for p in self.parts}
        return {
            "source": self.source,
            "out": self.out,
            "recipe": self.recipe,
            "seconds": self.seconds,
            "nbytes": self.nbytes(),
            "bits_per_weight": self.bits_per_weight(),
            "parts": sums,
            "allocation": dict(self.allocation) if self.allocation else None,
            "gate": dict(self.gate) if self.gate else None,
            "tensors": [asdict(t) for t in self.tensors],
        }


def format_table(report: Report) -> str:
    """The tensors in columns, equal ones of many layers in one row, and the sums of every part."""
    rows = [("tensor", "count", "shape", "type", "bytes", "")]
    for (name, shape, kind, note), tensors in _alike(report.tensors).items():
        nbytes = sum(t.nbytes for t in tensors)
        size = " x ".join(map(str, shape))
        rows.append((name, str(len(tensors)), size, kind, f"{nbytes:,}", note))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [_columns(row, widths) for row in rows]
    sums = [(p, report.nbytes(p), report.bits_per_weight(p)) for p in report.parts]
    sums.append(("whole", report.nbytes(), report.bits_per_weight()))
    lines += ["", *(f"{p:<9}{nbytes:>15,} bytes  {bits:6.3f} bits per weight" for p, nbytes, bits in sums)]
    if allocation := report.allocation:
        lines.append(
            f"bits are to be chosen for {allocation['matrices']} matrices in {allocation['budget']:,} bytes "
            f"(at least {allocation['least']:,}); {allocation['others']:,} bytes beside them. Above: before that"
        )
    return "\n".join(lines)


def _columns(row: tuple[str, ...], widths: list[int]) -> str:
    name, count, shape, kind, nbytes, note = row
    texts = (name.ljust(widths[0]), count.rjust(widths[1]), shape.ljust(widths[2]), kind.ljust(widths[3]))
    return "  ".join((*texts, nbytes.rjust(widths[4]), note)).rstrip()


def _alike(tensors: Iterable[TensorReport]) -> dict[tuple[str, tuple[int, ...], str, str], list[TensorReport]]:
    """Tensors that differ only in the number of their layer."""
    groups: dict[tuple[str, tuple[int, ...], str, str], list[TensorReport]] = {}
    for t in tensors:
        name = re.sub(r"\.\d+\.", ".*.", t.name)
        groups.setdefault((name, t.shape, t.type, t.note), []).append(t)
    return groups
