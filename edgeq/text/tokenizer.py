"""Text to token ids and back: byte-level BPE from `tokenizer.json`, special tokens kept apart.

A special token (`<|im_end|>`, `<think>`, ...) means something only where the chat template or the model wrote it.
Text from a user that happens to spell one is ordinary text. So the BPE (see `edgeq.text.bpe`) knows no special tokens;
they are found here, and only when the caller says that the text is trusted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import starmap
from pathlib import Path
from typing import Any, Self

from edgeq.config import read_json
from edgeq.errors import ModelError
from edgeq.inputs import exists
from edgeq.printable import brief
from edgeq.text.bpe import BYTE_OF, Bpe, bpe_of, load_bpe
from edgeq.text.components import MAX_ADDED, MAX_ADDED_SPELLING, MAX_TOKENS
from edgeq.text.pieces import check_length

__all__ = ["Tokenizer"]

_SURROGATE = re.compile("[\ud800-\udfff]")
_HIDDEN = 0xDC00  # `Tokenizer.protect` writes the n-th edge character of special tokens as this code point + n


class Tokenizer:
    """Byte-level BPE with special tokens; agrees with Hugging Face's tokenizer on the same files.

    `vocab_size` counts the tokens that exist, also those listed in tokenizer_config.json alone; rows of the
    embedding beyond it are padding. `eos_token_ids` holds every token that ends a text, the chat turn's first.
    """

    def __init__(self, bpe: Bpe, config: Mapping[str, Any]) -> None:
        self._bpe = bpe
        self._control = _control_tokens(bpe, config)
        self._literal = {token_id: text for text, token_id in self._control.items()}
        self._pattern = _pattern(self._control)
        edges = sorted({edge for text in self._control for edge in (text[0], text[-1])})
        self._hide = {ord(edge): chr(_HIDDEN + n) for n, edge in enumerate(edges)}
        self._show = {_HIDDEN + n: edge for n, edge in enumerate(edges)}
        self.control_ids = frozenset(self._literal)
        self.vocab_size = max(bpe.size, max(self._literal, default=-1) + 1)
        self.eos_token_ids = self._find_eos(config)

    @classmethod
    def from_folder(cls, path: Path) -> Self:
        """Read `tokenizer.json` and `tokenizer_config.json` in `path`; ModelError if one is missing or broken."""
        file = path / "tokenizer.json"
        if not exists(file):
            raise ModelError(f"{file} does not exist", hint="give the folder of a complete checkpoint")
        return cls(load_bpe(file), read_json(path / "tokenizer_config.json"))

    @classmethod
    def from_spec(cls, json_text: str, config: Mapping[str, Any]) -> Self:
        """Build one from the text of a tokenizer.json and the fields of a tokenizer_config.json."""
        return cls(bpe_of(json_text), config)

    @property
    def nbytes(self) -> int:
        """Bytes of its mapped tables."""
        return self._bpe.nbytes

    def encode(self, text: str, *, control: bool = False) -> list[int]:
        """Token ids of `text`; special tokens spelled in it are recognised only with `control=True`."""
        check_length(text)
        if not control:
            return self._encode_plain(text)
        ids: list[int] = []
        start = 0
        for match in self._pattern.finditer(text):
            ids += self._encode_plain(text[start : match.start()].translate(self._show))
            ids.append(self._control[match[0]])
            start = match.end()
        return ids + self._encode_plain(text[start:].translate(self._show))

    def protect(self, text: str) -> str:
        """Rewrite untrusted text, character by character, so that `encode(..., control=True)` sees no control
        token in it and gives the ids of the text as it was.

        What a special token begins or ends with is replaced by a lone surrogate, which valid text cannot contain
        and a template passes through: what is left of a message after a template trimmed or joined it stays safe.
        """
        return _SURROGATE.sub("\ufffd", text).translate(self._hide)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, ids without a token become nothing."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it (bytes as byte-level BPE writes them), None if there is none."""
        if not 0 <= token_id < self.vocab_size:
            return None
        literal = self._literal.get(token_id)
        return literal if literal is not None else self._bpe.token(token_id)

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it."""
        control = self._control.get(token)
        return control if control is not None else self._bpe.token_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes a token stands for; a special token's are its spelling, a padding row's are none."""
        token = self.token(token_id)
        if token is None:
            return b""
        if token_id in self.control_ids:
            return token.encode()
        try:
            return bytes(BYTE_OF[char] for char in token)
        except KeyError:  # not spelled in the byte alphabet: the library's decoder takes it literally, and so do we
            return token.encode()

    def _encode_plain(self, text: str) -> list[int]:
        if not text:
            return []
        ids = self._bpe.encode(_SURROGATE.sub("\ufffd", text))
        if ids and max(ids) >= self.vocab_size:
            raise ModelError(f"tokenizer.json: token id {max(ids)} is beyond its {self.vocab_size} tokens")
        return ids

    def _find_eos(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """The chat turn's end from tokenizer_config.json, and the end of a document: both stop generation."""
        name = config.get("eos_token")
        if isinstance(name, Mapping):
            name = name.get("content")
        if name is not None and not (isinstance(name, str) and name in self._control):
            raise ModelError(f"tokenizer_config.json: eos_token is {brief(name)}, which is not a special token")
        names = dict.fromkeys([name, "<|endoftext|>"])
        return tuple(self._control[name] for name in names if name in self._control)


def _control_tokens(bpe: Bpe, config: Mapping[str, Any]) -> dict[str, int]:
    """Spelling -> id of the added tokens of both files; ModelError if they contradict each other."""
    found: dict[str, int] = {}
    for token_id, token in bpe.added.items():
        if not token.bare:
            raise ModelError(f"tokenizer.json: token {token.content!r} strips or needs word boundaries: not supported")
        found[token.content] = token_id
    for text, token_id in _config_tokens(config):
        if found.setdefault(text, token_id) != token_id:
            raise ModelError(
                f"tokenizer_config.json: token {text!r} has id {token_id}, tokenizer.json gives it {found[text]}"
            )
    if len(set(found.values())) != len(found):
        raise ModelError("tokenizer_config.json: one id is given to two special tokens")
    if found and max(found.values()) >= MAX_TOKENS:
        raise ModelError(f"tokenizer: token id {max(found.values())}, expected less than {MAX_TOKENS}")
    return found


def _config_tokens(config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(spelling, id) of the `added_tokens_decoder` of a tokenizer_config.json."""
    table = config.get("added_tokens_decoder", {})
    if not isinstance(table, Mapping) or len(table) > MAX_ADDED or not all(starmap(_is_token, table.items())):
        raise ModelError('tokenizer_config.json: added_tokens_decoder is not a table of {"id": {"content": text}}')
    return [(entry["content"], int(key)) for key, entry in table.items()]


def _is_token(key: object, entry: object) -> bool:
    text = entry.get("content") if isinstance(entry, Mapping) else None
    number = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 18
    return number and isinstance(text, str) and 0 < len(text) <= MAX_ADDED_SPELLING and not _SURROGATE.search(text)


def _pattern(control: Iterable[str]) -> re.Pattern[str]:
    """Finds special tokens, the longest where several begin at the same place; an empty table matches nothing."""
    longest_first = sorted(control, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
