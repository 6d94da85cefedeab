"""edgeq.quant: group-wise affine quantization of whole checkpoints, in the layout that MLX uses.

    from edgeq.quant import quantize, verify

    report = quantize("Qwen/Qwen3.5-2B", "q2b", recipe="q4")
    verify(Path("q2b"))

Imported when first used: the checkpoint readers need `edgeq.formats.affine` alone, and the quantizer needs the readers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeq.quant.provenance import verify
    from edgeq.quant.quantizer import quantize
    from edgeq.quant.recipe import RECIPES
    from edgeq.quant.report import Report, TensorReport, format_table

_LAZY = {
    "RECIPES": "edgeq.quant.recipe",
    "Report": "edgeq.quant.report",
    "TensorReport": "edgeq.quant.report",
    "format_table": "edgeq.quant.report",
    "quantize": "edgeq.quant.quantizer",
    "verify": "edgeq.quant.provenance",
}

__all__ = ["RECIPES", "Report", "TensorReport", "format_table", "quantize", "verify"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _LAZY:
        raise AttributeError(f"module 'edgeq.quant' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
