"""A state as NumPy arrays by name, in two forms.

`state_arrays` is for any backend: all float32, so a state survives the passage exactly between backends that hold it in
float32, and rounded once to whatever a backend keeps its keys and values in. `stored_arrays` is for the same backend
and type of keys and values: what comes back is the very state, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from edgeq.config import LayerKind, TextConfig
from edgeq.errors import ModelError
from edgeq.formats.bf16 import Array
from edgeq.numbers import whole_number
from edgeq.printable import brief
from edgeq.state import BLOCK, DeltaState, DraftState, KVCache, LayerState, Rows, State, joined

if TYPE_CHECKING:
    from edgeq.backends.ops import ArrayLike, Ops

    A = TypeVar("A", bound=ArrayLike)
else:
    A = TypeVar("A")

__all__ = ["state_arrays", "state_from_arrays", "state_from_stored", "stored_arrays"]

_HINT = "load the state with the model that it was saved with"

_PARTS: dict[LayerKind, tuple[str, str]] = {
    "linear_attention": ("conv", "matrix"),
    "full_attention": ("keys", "values"),
}


def state_arrays(ops: Ops[A, Any], state: State[A]) -> dict[str, Array]:
    """The state as arrays: layers.N.conv and .matrix, or .keys and .values [length, Hkv, D]; and two numbers.

    With an MTP head's part also draft.keys and .values of what it has read, and draft.vectors, .hidden [T, hidden] and
    .positions [3, T] of what it has not.
    """
    arrays: dict[str, Array] = {
        "length": np.array(state.length, np.int64),
        "next_position": np.array(state.next_position, np.int64),
    }
    for i, layer in enumerate(state.layers):
        kind: LayerKind = "full_attention" if isinstance(layer, KVCache) else "linear_attention"
        parts = layer.arrays() if isinstance(layer, KVCache) else layer
        for name, part in zip(_PARTS[kind], parts, strict=True):
            arrays[f"layers.{i}.{name}"] = np.ascontiguousarray(ops.numpy(part))  # files need it so
    if state.draft is not None:
        own = dict(zip(("keys", "values"), state.draft.cache.arrays(), strict=True))
        if state.draft.unread:
            unread = joined(ops, state.draft)
            own |= {"vectors": unread.vectors, "hidden": unread.hidden}
            arrays["draft.positions"] = np.ascontiguousarray(unread.positions)
        arrays |= {f"draft.{name}": np.ascontiguousarray(ops.numpy(part)) for name, part in own.items()}
    return arrays


def state_from_arrays(ops: Ops[A, Any], c: TextConfig, arrays: Mapping[str, Array]) -> State[A]:
    """The state that `state_arrays` gave, on this backend.

    Raises ModelError for a state of another model: other shapes, more or fewer layers, more tokens than its context
    window has; and for what no model can have written, such as NaN.
    """
    length = _count(arrays, "length", c.longest_context)
    next_position = _count(arrays, "next_position", length)  # images take more tokens than positions
    if length and not next_position:
        raise ModelError(f"the saved state's next_position is 0 after {length} tokens", hint=_HINT)
    _check_names(c, arrays)

    def layer(i: int, kind: LayerKind) -> LayerState[A]:
        first, second = (
            _checked(arrays, f"layers.{i}.{name}", shape)
            for name, shape in zip(_PARTS[kind], _shapes(c, kind, length), strict=True)
        )
        if kind == "full_attention":
            return ops.kv_cache(first, second)
        return DeltaState(ops.array(first), ops.array(second))

    layers = tuple(layer(i, kind) for i, kind in enumerate(c.layer_types))
    state: State[A] = State(layers, length, next_position)
    if not _has_draft(arrays):
        return state
    held = (_tokens(arrays, "draft.keys", 0), c.num_key_value_heads, c.head_dim)
    return state._replace(
        draft=_draft(ops, c, arrays, length, held[0], lambda: ops.kv_cache(
            _checked(arrays, "draft.keys", held), _checked(arrays, "draft.values", held)
        ))
    )  # fmt: skip


def stored_arrays(ops: Ops[A, Any], state: State[A], start: int = 0, draft_start: int = 0) -> dict[str, Array]:
    """The state as it is held: layers.N.conv and .matrix float32, and .kv [blocks, ...], blocks of 256 tokens (`BLOCK`)
    as the backend keeps them (`KVCache.block`); length, next_position, and how many blocks are left out (skipped).

    With an MTP head's part also draft.length, .skipped and .kv of what it has read, and draft.vectors, .hidden
    [T, hidden] and .positions [3, T] of what it has not.
    start: leaves out the blocks of the first tokens, as many as are whole, which another state has; draft_start: the
    same of what the MTP head has read (the other's `draft.cache.length`).
    """
    arrays: dict[str, Array] = {
        "length": np.array(state.length, np.int64),
        "next_position": np.array(state.next_position, np.int64),
        "skipped": np.array(start // BLOCK, np.int64),
    }
    for i, layer in enumerate(state.layers):
        if isinstance(layer, KVCache):
            arrays[f"layers.{i}.kv"] = _blocks(layer, start // BLOCK)
        else:
            for name, part in zip(_PARTS["linear_attention"], layer, strict=True):
                arrays[f"layers.{i}.{name}"] = np.ascontiguousarray(ops.numpy(part))
    if state.draft is not None:
        arrays["draft.length"] = np.array(state.draft.cache.length, np.int64)
        arrays["draft.skipped"] = np.array(draft_start // BLOCK, np.int64)
        arrays["draft.kv"] = _blocks(state.draft.cache, draft_start // BLOCK)
        if state.draft.unread:
            unread = joined(ops, state.draft)
            arrays["draft.positions"] = np.ascontiguousarray(unread.positions)
            arrays["draft.vectors"] = np.ascontiguousarray(ops.numpy(unread.vectors))
            arrays["draft.hidden"] = np.ascontiguousarray(ops.numpy(unread.hidden))
    return arrays


def _blocks(cache: KVCache[Any], skipped: int) -> Array:
    found = [cache.block(i) for i in range(skipped, cache.blocks)]
    return np.stack(found) if found else np.empty((0,), np.uint8)


def state_from_stored(
    ops: Ops[A, Any], c: TextConfig, arrays: Mapping[str, Array], base: State[A] | None = None
) -> State[A]:
    """The state that `stored_arrays` gave, on this backend with its type of keys and values.

    base: a state that has the tokens that were left out; their keys and values are shared with it. Blocks that lie in a
    mapped file are used there, not copied, where the backend can. ModelError as of `state_from_arrays`.
    """
    length = _count(arrays, "length", c.longest_context)
    next_position = _count(arrays, "next_position", length)
    if length and not next_position:
        raise ModelError(f"the saved state's next_position is 0 after {length} tokens", hint=_HINT)
    shape, dtype = ops.block_like(c.num_key_value_heads, c.head_dim)

    def cache(part: str, tokens: int, before: KVCache[A] | None, skipped: int) -> KVCache[A]:
        name = f"{part}.kv"
        if skipped * BLOCK > (0 if before is None else before.length):
            raise ModelError(f"the saved state's {name} lacks its first {skipped * BLOCK} tokens", hint=_HINT)
        found, count = arrays.get(name), -(-tokens // BLOCK) - skipped
        right = isinstance(found, np.ndarray) and found.shape == (count, *shape) and found.dtype == dtype
        if found is None or not (right or (not count and not found.size)):
            what = f"the saved state's {name} is {_what(found)}"
            raise ModelError(f"{what}, expected {dtype} {[count, *shape]}", hint=_HINT)
        return ops.stored_cache(list(found), tokens, c.num_key_value_heads, c.head_dim, before if skipped else None)

    skipped = _count(arrays, "skipped", length // BLOCK)

    def layer(i: int, kind: LayerKind) -> LayerState[A]:
        if kind == "full_attention":
            before = base.layers[i] if base is not None else None
            assert before is None or isinstance(before, KVCache)
            return cache(f"layers.{i}", length, before, skipped)
        conv, matrix = (
            ops.array(_checked(arrays, f"layers.{i}.{name}", shape))
            for name, shape in zip(_PARTS[kind], _shapes(c, kind, length), strict=True)
        )
        return DeltaState(conv, matrix)

    state: State[A] = State(tuple(layer(i, kind) for i, kind in enumerate(c.layer_types)), length, next_position)
    if not _has_draft(arrays):
        return state
    read = _count(arrays, "draft.length", length)
    without = _count(arrays, "draft.skipped", read // BLOCK)
    known = None if base is None or base.draft is None else base.draft.cache
    return state._replace(draft=_draft(ops, c, arrays, length, read, lambda: cache("draft", read, known, without)))


def _has_draft(arrays: Mapping[str, Array]) -> bool:
    return any(name.startswith("draft.") for name in arrays)


def _draft(
    ops: Ops[A, Any], c: TextConfig, arrays: Mapping[str, Array], length: int, read: int,
    cache: Callable[[], KVCache[A]],
) -> DraftState[A]:  # fmt: skip
    """The MTP head's part: it has read some tokens, of which there is `cache`."""
    waiting = _tokens(arrays, "draft.positions", 1)
    if not c.mtp_num_hidden_layers or read + waiting > length or (read and not waiting):
        raise ModelError(
            f"the saved state's MTP head has read {read} tokens and {waiting} wait, of {length}", hint=_HINT
        )  # fmt: skip
    if not waiting:
        return DraftState(cache())
    vectors, hidden = (_checked(arrays, f"draft.{name}", (waiting, c.hidden_size)) for name in ("vectors", "hidden"))
    positions = arrays["draft.positions"]
    if positions.shape != (3, waiting) or positions.dtype != np.int32:
        what = f"the saved state's draft.positions is {_what(positions)}"
        raise ModelError(f"{what}, expected int32 {[3, waiting]}", hint=_HINT)
    if positions.min() < 0 or positions.max() >= c.longest_context:
        raise ModelError("the saved state's draft.positions are outside of the context window", hint=_HINT)
    return DraftState(cache(), (Rows(ops.activations(vectors), ops.activations(hidden), positions),))


def _tokens(arrays: Mapping[str, Array], name: str, axis: int) -> int:
    """How many tokens an array of the MTP head is of; 0 for what is not there."""
    found = arrays.get(name)
    return found.shape[axis] if isinstance(found, np.ndarray) and found.ndim > axis else 0


def _shapes(c: TextConfig, kind: LayerKind, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if kind == "full_attention":
        held = (length, c.num_key_value_heads, c.head_dim)
        return held, held
    matrix = (c.linear_num_value_heads, c.linear_value_head_dim, c.linear_key_head_dim)
    return (c.linear_conv_kernel_dim - 1, c.conv_dim), matrix


def _count(arrays: Mapping[str, Array], name: str, high: int) -> int:
    found = arrays.get(name)
    if found is None:
        raise ModelError(f"the saved state lacks {name!r}", hint="save the state again")
    if not isinstance(found, np.ndarray) or found.shape or found.dtype.kind not in "iu":
        raise ModelError(f"the saved state's {name} is {_what(found)}, expected a whole number", hint=_HINT)
    return whole_number(int(found), f"the saved state's {name}", 0, high, hint=_HINT)


def _check_names(c: TextConfig, arrays: Mapping[str, Array]) -> None:
    """ModelError for arrays of layers that the model does not have, or not of this kind."""
    known = {f"layers.{i}.{part}" for i, kind in enumerate(c.layer_types) for part in _PARTS[kind]}
    if unknown := [name for name in arrays if name.startswith("layers.") and name not in known]:
        raise ModelError(f"the saved state has {min(unknown)}, which the model does not", hint=_HINT)


def _checked(arrays: Mapping[str, Array], name: str, shape: tuple[int, ...]) -> Array:
    found = arrays.get(name)
    if not isinstance(found, np.ndarray) or found.shape != shape or found.dtype != np.float32:
        what = f"the saved state's {name} is {_what(found)}"
        raise ModelError(f"{what}, expected float32 {list(shape)}", hint=_HINT)
    if not np.isfinite(found).all():
        raise ModelError(f"the saved state's {name} holds NaN or infinity", hint="save the state again")
    return found


def _what(found: object) -> str:
    if isinstance(found, np.ndarray):
        return f"{found.dtype} {list(found.shape)}"
    return "missing" if found is None else brief(found)
