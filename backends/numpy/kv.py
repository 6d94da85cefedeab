"""Keys and values in pages, shared between the states that have them in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self
from weakref import WeakSet

import numpy as np

from edgeq.backends.numpy.kv_types import KEPT
from edgeq.formats.bf16 import Array, Float32, round_to, to_float32
from edgeq.state import BLOCK, KVCache

__all__ = ["PAGE", "Page", "PagedKV"]

PAGE = BLOCK  # tokens
STORED: dict[str, np.dtype[Any]] = {
    "f16": np.dtype(np.float16), "bf16": np.dtype(np.uint16),
    **dict.fromkeys(("f32", "int8", "int4"), np.dtype(np.float32)),
}  # fmt: skip
"""By the name of a cache's type: what holds all that it keeps."""


class Page:
    """Room for PAGE tokens: keys and values [Hkv, PAGE, D], of which the first `written` are in use by somebody."""

    __slots__ = ("__weakref__", "keys", "values", "written")
    alive: ClassVar[WeakSet[Page]] = WeakSet()

    def __init__(self, heads: int, dim: int) -> None:
        self.keys: Float32 = np.empty((heads, PAGE, dim), np.float32)
        self.values: Float32 = np.empty((heads, PAGE, dim), np.float32)
        self.written = 0
        self.alive.add(self)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def copy(self, length: int) -> Page:
        """A page of its own with the first `length` tokens of this one."""
        page = Page(self.keys.shape[0], self.keys.shape[2])
        page.keys[:, :length] = self.keys[:, :length]
        page.values[:, :length] = self.values[:, :length]
        page.written = length
        return page


class PagedKV(KVCache[Array]):
    """The KV cache of one layer and sequence, as a value.

    Caches that grew out of each other share pages. Appending writes behind the last token that any of them wrote;
    where another cache has been there first (the state was branched or rolled back), only the last page is copied.

    Entries are float32 here, whatever the type: what `dtype` (a name of `KEPT`) leaves of them.
    """

    def __init__(self, heads: int, dim: int, dtype: str) -> None:
        self.heads, self.dim, self.dtype = heads, dim, dtype
        self.pages: tuple[Page, ...] = ()
        self.length = 0

    def _with(self, pages: tuple[Page, ...], length: int) -> Self:
        other = type(self)(self.heads, self.dim, self.dtype)
        other.pages, other.length = pages, length
        return other

    def appended(self, keys: Float32, values: Float32) -> Self:
        """This cache and then `keys`, `values` float32 [T, Hkv, D], rounded to the cache's dtype."""
        pages, end = list(self.pages), self.length
        new = [KEPT[self.dtype](x).swapaxes(0, 1) for x in (keys, values)]
        done = 0
        while done < len(keys):
            offset = end % PAGE
            if offset == 0:
                pages.append(Page(self.heads, self.dim))
            elif pages[-1].written > offset:
                pages[-1] = pages[-1].copy(offset)
            count = min(PAGE - offset, len(keys) - done)
            page = pages[-1]
            page.keys[:, offset : offset + count] = new[0][:, done : done + count]
            page.values[:, offset : offset + count] = new[1][:, done : done + count]
            page.written = offset + count
            done, end = done + count, end + count
        return self._with(tuple(pages), end)

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
        if offset and isinstance(later, PagedKV) and later.length > self.length:
            page, end = self.pages[whole], min(PAGE, later.length - whole * PAGE)
            if later.pages[whole] is page and page.written == end:  # else another has written there
                page.written = offset

    def block(self, i: int) -> Array:
        """[2, Hkv, PAGE, D], in the type that has all that its type keeps."""
        used, page = min(PAGE, self.length - i * PAGE), self.pages[i]
        block = np.zeros((2, *page.keys.shape), np.float32)
        block[0, :, :used], block[1, :, :used] = page.keys[:, :used], page.values[:, :used]
        return round_to(block, STORED[self.dtype])

    def mark(self, i: int) -> object:
        return self.pages[i]

    def of_blocks(self, blocks: Sequence[Array], length: int) -> Self:
        """This cache's first pages, whole ones, and then the `block`s of another: `length` tokens."""
        pages = list(self.pages[: -(-length // PAGE) - len(blocks)])
        for block in blocks:
            page = Page(self.heads, self.dim)
            page.keys[:], page.values[:] = to_float32(block)
            page.written = min(PAGE, length - len(pages) * PAGE)
            pages.append(page)
        return self._with(tuple(pages), length)

    def parts(self) -> Iterator[tuple[Float32, Float32]]:
        """Keys and values page by page, each float32 [Hkv, tokens, D]."""
        for i, page in enumerate(self.pages):
            used = min(PAGE, self.length - i * PAGE)
            yield page.keys[:, :used], page.values[:, :used]

    def arrays(self) -> tuple[Array, Array]:
        empty = np.zeros((self.heads, 0, self.dim), np.float32)
        blocks = [(empty, empty), *self.parts()]
        keys, values = (np.concatenate(side, axis=1).swapaxes(0, 1) for side in zip(*blocks, strict=True))
        return keys, values

    def memory(self) -> Iterator[tuple[int, int]]:
        return ((id(page), page.nbytes) for page in self.pages)
