"""Keys and values in one growing buffer, shared between the states that have them in common."""

from __future__ import annotations

from collections.abc import Iterator
from weakref import WeakSet

import mlx.core as mx
import numpy as np

from edgeq.formats.bf16 import Array
from edgeq.state import BLOCK, KVCache

__all__ = ["Buffer", "BufferedKV", "StepKV", "capacity_for"]

_STEP = 256  # tokens: the least that a buffer grows by


def capacity_for(length: int) -> int:
    """Room to make for `length` tokens: at most 256 or a quarter more, so that growing copies each token a few times.

    The sizes are few (four for every doubling), since `mx.compile` traces the decode step anew for each.
    """
    step = max(_STEP, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


class Buffer:
    """Room for the keys and values of one layer, [Hkv, capacity, D] each.

    This object is the only one to hold the two arrays: MLX then appends in place, where it would otherwise copy.
    """

    def __init__(self, keys: mx.array, values: mx.array) -> None:
        self.keys, self.values = keys, values
        self.caches: WeakSet[BufferedKV] = WeakSet()  # those that live in it
        self.marks = list[object]()  # of the blocks that have been written to
        self.written = 0  # tokens, by the longest that ever lived in it

    @property
    def capacity(self) -> int:
        return self.keys.shape[1]

    def copy(self, length: int, capacity: int) -> Buffer:
        """A buffer of its own with the first `length` tokens of this one."""
        spare = [(0, 0), (0, capacity - length), (0, 0)]
        other = Buffer(mx.pad(self.keys[:, :length], spare), mx.pad(self.values[:, :length], spare))
        other.marks, other.written = self.marks[: length // BLOCK], length
        return other

    def write(self, start: int, end: int) -> None:
        """Tokens from `start` to `end` are about to be written: blocks of which something is written over, and those
        that are new, are marked anew."""
        del self.marks[start // BLOCK if start < self.written else -(-start // BLOCK) :]
        self.marks += (object() for _ in range(-(-end // BLOCK) - len(self.marks)))
        self.written = end


class BufferedKV(KVCache[mx.array]):
    """The KV cache of one layer and sequence, as a value: the first `length` tokens of a buffer.

    Caches that grew out of each other share the buffer, and appending writes behind the tokens of this one. Where a
    longer cache that is still in use has been there first (the state was branched), or where there is no room, the
    buffer is copied. After a rollback nobody holds the longer cache any more, and its tokens are written over.
    """

    def __init__(self, buffer: Buffer, length: int) -> None:
        self.buffer, self.length = buffer, length
        buffer.caches.add(self)

    def extended(self, tokens: int) -> BufferedKV:
        """A cache of `tokens` more, which are still to be written: into its buffer, behind those of this one."""
        end, buffer = self.length + tokens, self.buffer
        if buffer.capacity < end or any(cache.length > self.length for cache in buffer.caches):
            buffer = buffer.copy(self.length, capacity_for(end))
        buffer.write(self.length, end)
        return BufferedKV(buffer, end)

    def appended(self, keys: mx.array, values: mx.array) -> BufferedKV:
        """This cache and then `keys`, `values` [T, Hkv, D], rounded to the cache's dtype."""
        longer = self.extended(keys.shape[0])
        longer.buffer.keys[:, self.length : longer.length] = keys.swapaxes(0, 1)
        longer.buffer.values[:, self.length : longer.length] = values.swapaxes(0, 1)
        return longer

    def truncated(self, length: int) -> BufferedKV:
        return self if length == self.length else BufferedKV(self.buffer, length)

    def block(self, i: int) -> Array:
        """[2, Hkv, BLOCK, D], bfloat16 as uint16."""
        rows = slice(i * BLOCK, min(self.length, (i + 1) * BLOCK))
        used = mx.stack([self.buffer.keys[:, rows], self.buffer.values[:, rows]])
        whole = mx.pad(used, [(0, 0), (0, 0), (0, BLOCK - used.shape[2]), (0, 0)])
        return np.array(whole.view(mx.uint16) if whole.dtype == mx.bfloat16 else whole)

    def mark(self, i: int) -> object:
        return self.buffer.marks[i]

    def arrays(self) -> tuple[mx.array, mx.array]:
        keys, values = (x[:, : self.length].swapaxes(0, 1) for x in (self.buffer.keys, self.buffer.values))
        return keys, values

    def memory(self) -> Iterator[tuple[int, int]]:
        yield id(self.buffer), self.buffer.keys.nbytes + self.buffer.values.nbytes


class StepKV(KVCache[mx.array]):
    """A cache as the compiled decode step sees it: whole buffers, and the length as an array.

    Nothing that `mx.compile` looks at changes from token to token, so the step is traced once for each capacity.
    """

    def __init__(self, keys: mx.array, values: mx.array, end: mx.array) -> None:
        self.keys, self.values, self.end = keys, values, end  # [Hkv, capacity, D] twice, int32 [1]

    def appended(self, keys: mx.array, values: mx.array) -> StepKV:
        """This cache and then `keys`, `values` [T, Hkv, D], for which there is room."""

        def put(buffer: mx.array, x: mx.array) -> mx.array:
            return mx.slice_update(buffer, x.swapaxes(0, 1).astype(buffer.dtype), self.end, (1,))

        return StepKV(put(self.keys, keys), put(self.values, values), self.end + keys.shape[0])

    def truncated(self, length: int) -> StepKV:  # noqa: ARG002
        raise AssertionError("only whole steps are rolled back")

    def block(self, i: int) -> Array:  # noqa: ARG002
        raise AssertionError("only whole steps are stored")

    def mark(self, i: int) -> object:  # noqa: ARG002
        raise AssertionError("only whole steps are stored")

    def arrays(self) -> tuple[mx.array, mx.array]:
        raise AssertionError("the length is not known while tracing")

    def memory(self) -> Iterator[tuple[int, int]]:
        yield id(self.keys), self.keys.nbytes + self.values.nbytes
