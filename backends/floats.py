"""The backend for measurements: float32 throughout, as fast as this machine has it."""

from __future__ import annotations

from typing import Any

from edgeq.backends import choose, select
from edgeq.backends.ops import Ops
from edgeq.errors import EdgeqError

__all__ = ["float_ops"]


def float_ops(threads: int | None = None) -> Ops[Any, Any]:
    """The native CPU backend, or NumPy's where it is not built. Both multiply 16- and 32-bit matrices by float32
    activations, add in float32 (NMSE of a product 1e-13), and keep keys and values in float32 here."""
    try:
        choose("cpu")
    except EdgeqError:
        return select("numpy", kv_dtype="f32")
    return select("cpu", threads=threads, kv_dtype="f32")
