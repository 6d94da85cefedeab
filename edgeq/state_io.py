"""A state as NumPy arrays by name: what one backend remembers, another can go on from.

The arrays are float32, so a state survives the passage exactly between backends that hold it in float32, and rounded
once to whatever a backend keeps its keys and values in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from edgeq.config import LayerKind, TextConfig
from edgeq.errors import ModelError
from edgeq.formats.bf16 import Array
from edgeq.state import DeltaState, KVCache, LayerState, State

if TYPE_CHECKING:
    from edgeq.backends.ops import ArrayLike, Ops

    A = TypeVar("A", bound=ArrayLike)
else:
    A = TypeVar("A")

__all__ = ["state_arrays", "state_from_arrays"]

_PARTS: dict[LayerKind, tuple[str, str]] = {
    "linear_attention": ("conv", "matrix"),
    "full_attention": ("keys", "values"),
}


def state_arrays(ops: Ops[A, Any], state: State[A]) -> dict[str, Array]:
    """The state as arrays: layers.N.conv and .matrix, or .keys and .values [length, Hkv, D]; and two numbers."""
    arrays: dict[str, Array] = {
        "length": np.array(state.length, np.int64),
        "next_position": np.array(state.next_position, np.int64),
    }
    for i, layer in enumerate(state.layers):
        kind: LayerKind = "full_attention" if isinstance(layer, KVCache) else "linear_attention"
        parts = layer.arrays() if isinstance(layer, KVCache) else layer
        for name, part in zip(_PARTS[kind], parts, strict=True):
            arrays[f"layers.{i}.{name}"] = np.ascontiguousarray(ops.numpy(part))  # files need it so
    return arrays


def state_from_arrays(ops: Ops[A, Any], c: TextConfig, arrays: Mapping[str, Array]) -> State[A]:
    """The state that `state_arrays` gave, on this backend. Raises ModelError for a state of another model."""
    try:
        length, next_position = int(arrays["length"]), int(arrays["next_position"])
    except KeyError as error:
        raise ModelError(f"the saved state lacks {error}", hint="save the state again") from None

    def layer(i: int, kind: LayerKind) -> LayerState[A]:
        first, second = (
            _checked(arrays, f"layers.{i}.{name}", shape)
            for name, shape in zip(_PARTS[kind], _shapes(c, kind, length), strict=True)
        )
        if kind == "full_attention":
            return ops.kv_cache(first, second)
        return DeltaState(ops.array(first), ops.array(second))

    return State(tuple(layer(i, kind) for i, kind in enumerate(c.layer_types)), length, next_position)


def _shapes(c: TextConfig, kind: LayerKind, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if kind == "full_attention":
        held = (length, c.num_key_value_heads, c.head_dim)
        return held, held
    matrix = (c.linear_num_value_heads, c.linear_value_head_dim, c.linear_key_head_dim)
    return (c.linear_conv_kernel_dim - 1, c.conv_dim), matrix


def _checked(arrays: Mapping[str, Array], name: str, shape: tuple[int, ...]) -> Array:
    found = arrays.get(name)
    if found is None or found.shape != shape or found.dtype != np.float32:
        what = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
        raise ModelError(
            f"the saved state's {name} is {what}, expected float32 {list(shape)}",
            hint="load the state with the model that it was saved with",
        )
    return found
