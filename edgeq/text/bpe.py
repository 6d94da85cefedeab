"""Byte-level BPE: text to token ids and back, special tokens aside.

The family's tokenizer.json takes the `tokenizers` library 0.5 s and 110 MB to load: 248,044 tokens, 247,587 merges.
Once read, it is therefore kept in the user's cache as a table of sorted arrays (7 MB, named after the file's hash),
which is mapped in a few milliseconds and costs the pages that are looked at. `TableBpe` merges from it; what depends
on Unicode, normalizing and splitting into words, stays the library's. `LibraryBpe` is the library alone: for small
files, for the kinds of BPE that the table has no room for, and to compare with.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import tokenizers
from numpy.typing import NDArray

from edgeq.config import read_json
from edgeq.errors import ModelError
from edgeq.foreign import translated
from edgeq.formats.safetensors import SafetensorsFile
from edgeq.inputs import TOKENIZER_LIMIT, open_file, read_text
from edgeq.printable import one_line
from edgeq.shortage import require
from edgeq.text.components import checked_components, read_components
from edgeq.text.pieces import normalized, pieces
from edgeq.text.table_cache import cache_problem, open_table, save_table, table_path

__all__ = ["BYTE_OF", "AddedToken", "Bpe", "LibraryBpe", "TableBpe", "bpe_of", "load_bpe", "write_table"]

WORTH_A_TABLE = 1 << 20  # bytes of a tokenizer.json; smaller ones load at once anyway
_LIBRARY_TAKES = 10  # bytes of memory for one of tokenizer.json
_WORDS = 1 << 14  # whose ids are remembered: most of a text is few words
_LONG = 64  # characters of a word that is not remembered
_NOT_PLAIN = (
    "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges",
)  # fmt: skip


class AddedToken(NamedTuple):
    """An entry of tokenizer.json's `added_tokens`, as the library has it.

    special: it is no text. normalized: it is looked for in text that has been normalized. single_word: it is found only
    where it is no part of a word. lstrip, rstrip: it takes the white space before and after it along.
    """

    content: str
    special: bool = True
    normalized: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False


class Bpe(Protocol):
    """A byte-level BPE."""

    @property
    def size(self) -> int:
        """How many tokens there are, without the added ones."""

    @property
    def nbytes(self) -> int:
        """Bytes of its mapped tables; 0 where the library holds them."""

    @property
    def added(self) -> Mapping[int, AddedToken]:
        """The added tokens by id."""

    def normalize(self, text: str) -> str:
        """`text` as it is encoded."""

    def encode(self, text: str) -> list[int]:
        """Token ids of valid text; added tokens spelled in it are text."""

    def token(self, token_id: int) -> str | None:
        """How the vocabulary spells a token, None if there is none."""

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it."""


class LibraryBpe:
    """The `tokenizers` library's. `description` is the text of a tokenizer.json; ModelError if it is not one."""

    nbytes = 0

    def __init__(self, description: str, name: str = "the tokenizer description") -> None:
        require(_LIBRARY_TAKES * len(description), "the tokenizer")  # where Rust gets no memory, the process is gone
        self._bpe = _library(read_components(description, name), name)
        added = self._bpe.get_added_tokens_decoder()
        self.added = {i: AddedToken(*(getattr(token, key) for key in AddedToken._fields)) for i, token in added.items()}
        self.size: int = self._bpe.get_vocab_size(with_added_tokens=False)
        # The library can treat spelled-out special tokens as text, so all added tokens become special.
        special = [tokenizers.AddedToken(t.content, special=True, normalized=False) for t in added.values()]
        self._bpe.add_special_tokens(special)
        self._bpe.encode_special_tokens = True

    def normalize(self, text: str) -> str:
        with translated(_encoding_failed):
            return normalized(text, self._bpe.normalizer)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        with translated(_encoding_failed):
            text = normalized(text, self._bpe.normalizer)
            for piece, _ in pieces(text, self._bpe.pre_tokenizer):
                ids += self._bpe.encode(piece, add_special_tokens=False).ids
        return ids

    def token(self, token_id: int) -> str | None:
        token: str | None = self._bpe.id_to_token(token_id)
        return token

    def token_id(self, token: str) -> int | None:
        token_id: int | None = self._bpe.token_to_id(token)
        return token_id


class TableBpe:
    """BPE over a mapped table (see `write_table`); gives what the library gives.

    Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (2016): the neighbours that were
    merged first in training merge first, the leftmost of several.
    """

    def __init__(self, file: SafetensorsFile) -> None:
        names = ("pairs", "ranks", "products", "ends", "spellings")
        self._pairs, self._ranks, self._products, self._ends, self._spellings = (file.array(n).data for n in names)
        self.nbytes = sum(info.end - info.start for info in file.tensors.values())
        rest = json.loads(file.metadata["rest"])
        self.size = len(self._ends)
        self.added = {
            entry["id"]: AddedToken(*(entry[key] for key in AddedToken._fields)) for entry in rest.pop("added_tokens")
        }
        library = _library({**rest, "added_tokens": []}, "the tokenizer table")
        self._normalizer, self._splitter = library.normalizer, library.pre_tokenizer
        self._byte_ids: dict[str, int] = json.loads(file.metadata["bytes"])
        self._remembered = lru_cache(_WORDS)(self._word)

    @classmethod
    def cached(cls, digest: str, spec: Callable[[], Mapping[str, Any]]) -> Self | None:
        """The table for a tokenizer.json of this hash from the user's cache, made from its contents if need be.

        None if it is no plain BPE, or there is no place for tables.
        """
        try:
            if cache_problem():
                return None
            path = table_path(digest)
            with suppress(Exception):  # not there yet, or odd in some way
                return cls(open_table(path, digest))
            return cls(open_table(path, digest)) if write_table(spec(), path, digest) else None
        except Exception:  # a cache that cannot be used, or an odd file: the library works, or says what is wrong
            return None

    def normalize(self, text: str) -> str:
        with translated(_encoding_failed):
            return normalized(text, self._normalizer)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        with translated(_encoding_failed):
            for _, words in pieces(normalized(text, self._normalizer), self._splitter):
                for word in words:
                    ids += self._remembered(word) if len(word) <= _LONG else self._word(word)
        return ids

    def token(self, token_id: int) -> str | None:
        if not 0 <= token_id < self.size:
            return self.added[token_id].content if token_id in self.added else None
        start = self._ends[token_id - 1] if token_id else 0
        return bytes(self._spellings[start : self._ends[token_id]]).decode()

    def token_id(self, token: str) -> int | None:
        ids = (*range(self.size), *self.added)  # slow, but it is special tokens that one asks for
        return next((i for i in ids if self.token(i) == token), None)

    def _word(self, word: str) -> Sequence[int]:
        """Ids of one word in the byte alphabet.

        `queue` holds the merges that were possible when they were entered, as (rank, place, pair, product); one that
        no longer finds its pair is passed over. `ids[i]` is -1 once token i has become part of the one before it.
        """
        ids = [self._byte_ids[char] for char in word]
        after, before = [*range(1, len(ids) + 1)], [*range(-1, len(ids) - 1)]
        queue = [merge for i in range(len(ids) - 1) if (merge := self._merge(i, ids[i], ids[i + 1]))]
        heapify(queue)
        while queue:
            _, i, pair, product = heappop(queue)
            j = after[i]
            if j == len(ids) or ids[i] << 32 | ids[j] != pair:
                continue
            ids[i], ids[j] = product, -1
            after[i] = k = after[j]
            if k < len(ids):
                before[k] = i
                if merge := self._merge(i, product, ids[k]):
                    heappush(queue, merge)
            if (h := before[i]) >= 0 and (merge := self._merge(h, ids[h], product)):
                heappush(queue, merge)
        return [i for i in ids if i >= 0]

    def _merge(self, place: int, left: int, right: int) -> tuple[int, int, int, int] | None:
        pair = left << 32 | right
        at = bisect_left(self._pairs, pair)
        if at == len(self._pairs) or self._pairs[at] != pair:
            return None
        return self._ranks[at], place, pair, self._products[at]


def _library(spec: Mapping[str, Any], name: str) -> Any:
    """The library's tokenizer for checked components; ModelError if it does not take them."""
    with translated(lambda error: ModelError(f"{name} is not a tokenizer: {one_line(error)}")):
        return tokenizers.Tokenizer.from_str(json.dumps(spec))


def _encoding_failed(error: BaseException) -> ModelError:
    return ModelError(f"the tokenizer cannot encode this text: {one_line(error)}")


def load_bpe(file: Path) -> Bpe:
    """The BPE of a tokenizer.json; ModelError if it is none."""
    try:
        with open_file(file) as opened:
            nbytes, digest = os.fstat(opened.fileno()).st_size, hashlib.file_digest(opened, "sha256").hexdigest()
        if nbytes >= WORTH_A_TABLE:
            spec = lambda: checked_components(read_json(file, TOKENIZER_LIMIT), str(file))  # noqa: E731
            if table := TableBpe.cached(digest, spec):
                return table
        return LibraryBpe(read_text(file, TOKENIZER_LIMIT), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} cannot be read: {one_line(error)}") from None


def bpe_of(description: str) -> Bpe:
    """The BPE that the text of a tokenizer.json describes; ModelError if it is none."""
    if len(description) >= WORTH_A_TABLE:
        digest = hashlib.sha256(description.encode()).hexdigest()
        if table := TableBpe.cached(digest, lambda: read_components(description, "the tokenizer description")):
            return table
    return LibraryBpe(description)


# --- making a table --------------------------------------------------------------------------------------------------


def write_table(spec: Mapping[str, Any], path: Path, source: str = "") -> bool:
    """Write the table of a tokenizer.json's contents, of sha256 `source`; False if it is not a plain byte-level BPE.

    pairs: int64 [merges], left id << 32 | right id, sorted; ranks, products: uint32 [merges], which merge it is and
    the id it makes. ends: uint32 [tokens], where each token's UTF-8 spelling ends in spellings, uint8. The metadata
    holds the ids of single bytes and the rest of the description.
    """
    if not _is_plain(spec):
        return False
    vocab: Mapping[str, int] = spec["model"]["vocab"]
    pairs, products = _merges(vocab, spec["model"]["merges"])
    order = np.argsort(pairs).astype(np.uint32)
    if (np.diff(pairs[order]) == 0).any():
        return False
    spellings = [token.encode() for token in vocab]
    arrays: dict[str, NDArray[Any]] = {
        "pairs": pairs[order],
        "ranks": order,
        "products": products[order],
        "ends": np.cumsum([len(spelling) for spelling in spellings], dtype=np.uint32),
        "spellings": np.frombuffer(b"".join(spellings), np.uint8),
    }
    rest = {**spec, "model": {**spec["model"], "vocab": {}, "merges": []}}
    byte_ids = {char: vocab[char] for char in BYTE_OF}
    save_table(path, arrays, {"rest": json.dumps(rest), "bytes": json.dumps(byte_ids), "source": source})
    return True


def _is_plain(spec: Mapping[str, Any]) -> bool:
    """Whether merges alone decide, ids count up from 0, and added tokens follow."""
    model, added, splitter = spec["model"], spec["added_tokens"], spec["pre_tokenizer"]
    vocab = model["vocab"]
    last = splitter["pretokenizers"][-1] if splitter["type"] == "Sequence" else splitter
    ids = [*vocab.values(), *(entry["id"] for entry in added)]
    return (
        model["type"] == "BPE"
        and not any(model.get(key) for key in _NOT_PLAIN)
        and last["type"] == "ByteLevel"
        and ids == list(range(len(ids)))
        and BYTE_OF.keys() <= vocab.keys()
        and len(vocab.keys() | {entry["content"] for entry in added}) == len(ids)
    )


def _merges(vocab: Mapping[str, int], merges: Sequence[str | Sequence[str]]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The pair and the product of every merge, in training's order; KeyError for a token that there is not."""
    pairs, products = np.empty(len(merges), np.int64), np.empty(len(merges), np.uint32)
    for i, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        pairs[i], products[i] = vocab[left] << 32 | vocab[right], vocab[left + right]
    return pairs, products


def _byte_alphabet() -> dict[str, int]:
    """The byte each character of byte-level BPE stands for (GPT-2's table).

    Printable Latin-1 stands for itself; the other bytes, in order, are written as U+0100, U+0101, ...
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
