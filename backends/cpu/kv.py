"""Keys and values of the native backend: pages that the kernels write and read, shared between states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import numpy as np

from edgeq.backends.cpu import _native
from edgeq.formats.bf16 import Array, Float32
from edgeq.state import KVCache

__all__ = ["PAGE", "NativeKV"]

PAGE: int = _native.KV_PAGE  # tokens


class NativeKV(KVCache[Array]):
    """The KV cache of one layer and sequence, as a value. `dtype` is "f16", "bf16", "f32", "int8" or "int4".

    Caches that grew out of each other share pages. Room is made behind the last token that any of them wrote; where
    another cache has been there first (the state was branched or rolled back), only the last page is copied. So is one
    in a mapped file, of which nothing can be written.
    """

    __slots__ = ("dim", "dtype", "heads", "length", "pages")

    def __init__(self, heads: int, dim: int, dtype: str, pages: tuple[_native.Page, ...] = (), length: int = 0) -> None:
        self.heads, self.dim, self.dtype = heads, dim, dtype
        self.pages, self.length = pages, length

    def _with(self, pages: tuple[_native.Page, ...], length: int) -> Self:
        return type(self)(self.heads, self.dim, self.dtype, pages, length)

    def with_room(self, tokens: int) -> Self:
        """This cache longer by `tokens` tokens, which the caller has yet to write."""
        end = self.length + tokens
        whole, offset = divmod(self.length, PAGE)
        if offset and offset + tokens <= PAGE and (last := self.pages[-1]).written == offset:  # nearly always
            last.written = offset + tokens
            return self._with(self.pages, end)
        pages = list(self.pages)
        if offset and tokens and pages[-1].written > offset:
            pages[-1] = pages[-1].copy(offset)
        while len(pages) * PAGE < end:
            pages.append(_native.Page(self.dtype, self.heads, self.dim))
        for i in range(whole, len(pages)):
            pages[i].written = min(PAGE, end - i * PAGE)
        return self._with(tuple(pages), end)

    def appended(self, keys: Float32, values: Float32) -> Self:
        """This cache and then `keys`, `values` float32 [T, Hkv, D], rounded to the cache's type."""
        longer = self.with_room(len(keys))
        if len(keys):
            _native.append(keys, values, self.length, longer.pages)
        return longer

    def truncated(self, length: int) -> Self:
        if length == self.length:
            return self
        return self._with(self.pages[: -(-length // PAGE)], length)

    @property
    def copies(self) -> bool:
        offset = self.length % PAGE
        return bool(offset) and self.pages[-1].written > offset

    def take_back(self, later: KVCache[Array]) -> None:
        whole, offset = divmod(self.length, PAGE)
        if offset and isinstance(later, NativeKV) and later.length > self.length:
            page, end = self.pages[whole], min(PAGE, later.length - whole * PAGE)
            if later.pages[whole] is page and page.written == end:  # else another has written there
                page.written = offset

    def block(self, i: int) -> Array:
        used, page = min(PAGE, self.length - i * PAGE), self.pages[i]
        return np.asarray(page.data if used == PAGE else page.copy(used).data)

    def mark(self, i: int) -> object:
        return self.pages[i]

    def arrays(self) -> tuple[Array, Array]:
        keys = np.empty((self.length, self.heads, self.dim), np.float32)
        values = np.empty_like(keys)
        for i, page in enumerate(self.pages):
            rows = slice(i * PAGE, min(self.length, (i + 1) * PAGE))
            page.read(keys[rows], values[rows])
        return keys, values

    def memory(self) -> Iterator[tuple[int, int]]:
        return ((id(page), page.nbytes) for page in self.pages)
