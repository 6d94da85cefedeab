"""States in a session file, for the engine that goes on with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgeq.backends.numpy.kv_pages import page_arrays, page_nbytes
from edgeq.backends.ops import Ops
from edgeq.config import TextConfig
from edgeq.engine import Engine
from edgeq.errors import UsageError
from edgeq.formats.bf16 import Array, to_float32
from edgeq.formats.mapped import Pages
from edgeq.printable import brief
from edgeq.session.files.checked import CheckedFile, number
from edgeq.state import BLOCK, DeltaState, DraftState, KVCache, Rows, State

__all__ = ["StateReader"]


class StateReader:
    """Reads the states of a session for an engine. The longest comes first: the others share its keys and values."""

    def __init__(self, file: CheckedFile, engine: Engine[Any, Any]) -> None:
        self._file, self._engine = file, engine
        self._ops: Ops[Any, Any] = engine.ops
        self._config: TextConfig = engine.config
        self._read = dict[str, list[tuple[list[tuple[str, int]], list[KVCache[Any]]]]]()

    def read(self, records: Sequence[Mapping[str, Any]]) -> list[tuple[State[Any], Array | None] | None]:
        """States and the logits after them (float32 [V], or None), in the order of their records; None for what a
        ceiling leaves no room for, beside the first, where the conversation stands. MemoryBudgetError if that does not
        fit.
        """
        order = sorted(range(len(records)), key=lambda i: -number(records[i]["length"]))
        with self._engine.budget.alone:
            found = {i: self._state(records[i]) for i in order if self._fits(records[i], needed=i == 0)}
        return [found.get(i) for i in range(len(records))]

    def _fits(self, record: Mapping[str, Any], *, needed: bool) -> bool:
        c, ops, budget, length = self._config, self._ops, self._engine.budget, number(record["length"])
        nbytes = ops.state_nbytes(c) + (0 if self._read or not length else ops.kv_nbytes(c, length))
        nbytes *= 1 if ops.maps_states else 2  # pages of the file are there beside the copy, until it is made
        if needed:
            budget.claim(nbytes, f"{length:,} tokens of {self._file.path}")
        return needed or budget.fits(nbytes)

    def _state(self, record: Mapping[str, Any]) -> tuple[State[Any], Array | None]:
        c, ops, name = self._config, self._ops, str(record["name"])
        length, position = number(record["length"]), number(record["next_position"])
        if not 0 < position <= length <= c.longest_context:
            raise ValueError(f"{name} is of {length} tokens, and goes on at {position}")
        caches = iter(self._caches("kv", record, length, c.layer_types.count("full_attention")))
        n = c.layer_types.count("linear_attention")
        conv_shape = (n, c.linear_conv_kernel_dim - 1, c.conv_dim)
        matrix_shape = (n, c.linear_num_value_heads, c.linear_value_head_dim, c.linear_key_head_dim)
        array = self._file.array
        stored = array(f"{name}.conv", conv_shape), array(f"{name}.matrix", matrix_shape)
        pairs = iter(zip(*stored, strict=True))
        layers = tuple(
            next(caches) if kind == "full_attention" else DeltaState(*map(ops.array, next(pairs)))
            for kind in c.layer_types
        )
        self._let_go(stored)
        state: State[Any] = State(layers, length, position, self._engine.fingerprint, self._draft(record, name, length))
        logits = array(f"{name}.logits", (c.vocab_size,)) if record["logits"] else None
        return state, logits

    def _draft(self, record: Mapping[str, Any], name: str, length: int) -> DraftState[Any] | None:
        c, ops, array = self._config, self._ops, self._file.array
        if "draft" not in record or self._engine.head is None:
            return None
        read = number(record["draft"][0])
        (cache,) = self._caches("draft", record, read, 1)
        if f"{name}.positions" not in self._file.checksums:
            if read:
                raise ValueError(f"{name} has read {read} tokens, and lacks the last")
            return DraftState(cache)
        positions = array(f"{name}.positions", None)
        waiting = positions.shape[-1]
        if positions.shape != (3, waiting) or positions.dtype != np.int32 or read + waiting > length or not waiting:
            raise ValueError(f"{name}.positions is {positions.dtype} {list(positions.shape)}")
        if positions.min() < 0 or positions.max() >= c.longest_context:
            raise ValueError(f"{name}.positions are outside of the context window")
        vectors, hidden = (array(f"{name}.{part}", (waiting, c.hidden_size)) for part in ("vectors", "hidden"))
        return DraftState(cache, (Rows(ops.activations(vectors), ops.activations(hidden), positions.copy()),))

    def _caches(self, group: str, record: Mapping[str, Any], length: int, layers: int) -> list[KVCache[Any]]:
        """The caches of a state, a layer each."""
        tokens, runs = record[group]
        rows = [(str(segment), number(first) + i) for segment, first, count in runs for i in range(number(count))]
        if tokens != length or len(rows) != -(-length // BLOCK):
            raise ValueError(f"{group} of {length} tokens has {len(rows)} rows of {BLOCK}")
        for longer, caches in self._read.setdefault(group, []):
            if longer[: len(rows)] == rows and caches[0].length >= length:
                return [cache.truncated(length) for cache in caches]
        found = [self._block(row, layers) for row in rows]
        made = [self._cache([block[layer] for block in found], length) for layer in range(layers)]
        self._let_go(found)
        self._read[group].append((rows, made))
        return made

    def _let_go(self, arrays: Sequence[Array]) -> None:
        """Of pages of the file, where what is in them has been copied."""
        if not self._ops.maps_states:
            Pages(arrays).let_go()

    def _block(self, row: tuple[str, int], layers: int) -> Array:
        """What a row of a segment holds, a layer each."""
        segment, index = row
        array = self._file.array(segment, None)
        if array.ndim < 3 or array.shape[1] != layers or index >= len(array):
            raise ValueError(
                f"{segment} is {array.dtype} {list(array.shape)}, and has no row {index} of {layers} layers"
            )
        found: Array = array[index]
        return found

    def _cache(self, blocks: list[Array], length: int) -> KVCache[Any]:
        heads, dim = self._config.num_key_value_heads, self._config.head_dim
        values, ops = self._file.values, self._ops
        if self._file.is_of(ops):
            shape, dtype = ops.block_like(heads, dim)
            if any(block.shape != shape or block.dtype != dtype for block in blocks):
                raise ValueError(f"the keys and values are not {dtype} {list(shape)}")
            return ops.stored_cache(blocks, length, heads, dim)
        none = np.zeros((0, heads, dim), np.float32)  # as an MTP head has that has not read
        both = [_unpacked(block, str(values["backend"]), str(values["kv"]), heads, dim) for block in blocks]
        keys, entries = (np.concatenate(side) for side in zip((none, none), *both, strict=True))
        return ops.kv_cache(keys[:length], entries[:length])


def _unpacked(block: Array, backend: str, kv: str, heads: int, dim: int) -> tuple[Array, Array]:
    """Keys and values, each float32 [BLOCK, heads, dim], of another backend's block, or another type's."""
    if backend == "cpu":
        if kv not in ("f16", "bf16", "f32", "int8", "int4") or block.shape != (page_nbytes(kv, heads, dim),):
            raise ValueError(f"the keys and values are not {brief(kv)} pages")
        return page_arrays(block, kv, heads, dim)
    if backend not in ("numpy", "mlx"):
        raise UsageError(f"its keys and values are those of another backend, {brief(backend)}")
    if block.shape != (2, heads, BLOCK, dim):
        raise ValueError(f"the keys and values are {list(block.shape)}")
    keys, values = to_float32(block).swapaxes(1, 2)
    return keys, values
