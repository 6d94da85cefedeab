"""Text to token ids and back: byte-level BPE from `tokenizer.json`, special tokens kept apart.

A control token (`<|im_end|>`, `<think>`, ...) means something only where the chat template or the model wrote it.
Text from a user that happens to spell one is ordinary text. So the BPE (see `edgeq.text.bpe`) knows no added tokens;
they are found here, control tokens only when the caller says that the text is trusted. What a fine-tune added as a word
(not special, and not of the family's own) is a word in anybody's text, as in Hugging Face's tokenizer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple, Self

from edgeq.config import read_json
from edgeq.errors import ModelError
from edgeq.inputs import exists
from edgeq.printable import brief
from edgeq.text.bpe import BYTE_OF, AddedToken, Bpe, bpe_of, load_bpe
from edgeq.text.components import MAX_ADDED, MAX_ADDED_SPELLING, MAX_TOKENS
from edgeq.text.pieces import check_length

__all__ = ["Tokenizer", "special_tokens"]

# The family's added tokens: those that its files do not call special, but that templates are written with, and others.
_FAMILY = {
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>", "<|fim_prefix|>",
    "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
}  # fmt: skip

_FAMILY_SPECIAL = {
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>", "<tts_pad>",
    "<tts_text_bos>", "<tts_text_bos_single>", "<tts_text_eod>",
}  # fmt: skip

_LONG, _TAKES = (
    1 << 16,
    48,
)  # characters; bytes for each that the ids of a longer text take, and what they are made with
_SURROGATE = re.compile("[\ud800-\udfff]")
_HIDDEN = 0xDC00  # what `Tokenizer.protect` hides of control tokens is this code point and those behind it


class Tokenizer:
    """Byte-level BPE with special tokens; agrees with Hugging Face's tokenizer on the same files.

    `vocab_size` counts the tokens that exist, also those listed in tokenizer_config.json alone; rows of the
    embedding beyond it are padding. `eos_token_ids` holds every token that ends a text, the tokenizer's own first.
    `special_tokens` are those that tokenizer_config.json names (`eos_token`, ...), for templates.
    """

    def __init__(self, bpe: Bpe, config: Mapping[str, Any]) -> None:
        self._bpe = bpe
        self.claim: Callable[..., None] | None = None
        """Asked before long texts are read: `edgeq.memory.budget.Budget.claim`."""
        added = _added_tokens(bpe, config)
        self._added = {text: token.id for text, token in added.items()}
        self._literal = {token.id: text for text, token in added.items()}
        self._sort(added)
        self.vocab_size = max(bpe.size, max(self._literal, default=-1) + 1)
        self.eos_token_ids = self._find_eos(config)
        self.special_tokens = special_tokens(config)

    def _sort(self, added: Mapping[str, _Added]) -> None:
        """What is found in which texts."""
        self._tokens = added
        control = [text for text, token in added.items() if token.control]
        words = [text for text, token in added.items() if not token.control]
        as_written = [text for text in words if not added[text].normalized]
        self._hidden = _Hidden(control)
        one = lambda text: re.escape(text) if added[text].control else self._hidden.pattern(text)  # noqa: E731
        self._trusted = _pattern([*control, *as_written], one)
        self._words = _pattern(as_written) if as_written else None
        self._normalized = {self._bpe.normalize(text): text for text in words if added[text].normalized}
        self._normalized_words = _pattern(self._normalized) if self._normalized else None
        self.control_ids = frozenset(added[text].id for text in control)

    @classmethod
    def from_folder(cls, path: Path) -> Self:
        """Read `tokenizer.json` in `path`, and `tokenizer_config.json` if it is there; ModelError if one is broken."""
        file = path / "tokenizer.json"
        if not exists(file):
            raise ModelError(f"{file} does not exist", hint="give the folder of a complete checkpoint")
        return cls(load_bpe(file), read_json(config) if exists(config := path / "tokenizer_config.json") else {})

    @classmethod
    def from_spec(cls, json_text: str, config: Mapping[str, Any]) -> Self:
        """Build one from the text of a tokenizer.json and the fields of a tokenizer_config.json."""
        return cls(bpe_of(json_text), config)

    @property
    def nbytes(self) -> int:
        """Bytes of its mapped tables."""
        return self._bpe.nbytes

    def encode(self, text: str, *, control: bool = False) -> list[int]:
        """Token ids of `text`; control tokens spelled in it are recognised only with `control=True`."""
        check_length(text)
        self._claim(text)
        if not control:
            return self._encode_words(text)
        shown = self._hidden.shown(text)
        return _split(shown, self._trusted.finditer(text), self._tokens, self._encode_normalized_words)

    def protect(self, text: str) -> str:
        """Rewrite untrusted text, character by character, so that `encode(..., control=True)` sees no control
        token in it and gives the ids of the text as it was.

        What a control token begins or ends with is replaced by a lone surrogate, which valid text cannot contain
        and a template passes through: what is left of a message after a template trimmed or joined it stays safe.
        """
        self._claim(text)
        return self._hidden.hidden(_SURROGATE.sub("\ufffd", text))

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
        added = self._added.get(token)
        return added if added is not None else self._bpe.token_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes a token stands for; an added token's are its spelling, a padding row's are none."""
        token = self.token(token_id)
        if token is None:
            return b""
        if token_id in self._literal:
            return token.encode()
        try:
            return bytes(BYTE_OF[char] for char in token)
        except KeyError:  # not spelled in the byte alphabet: the library's decoder takes it literally, and so do we
            return token.encode()

    def _claim(self, text: str) -> None:
        if self.claim is not None and len(text) > _LONG:
            self.claim(
                _TAKES * len(text), f"a text of {len(text):,} characters, and its tokens,",
                hint="shorten the text, or allow more with --memory (memory= in Python)",
            )  # fmt: skip

    def _encode_words(self, text: str) -> list[int]:
        """Token ids of text in which added words are words."""
        if self._words is not None:
            return _split(text, self._words.finditer(text), self._tokens, self._encode_normalized_words)
        return self._encode_normalized_words(text)

    def _encode_normalized_words(self, text: str) -> list[int]:
        if self._normalized_words is None:
            return self._encode_plain(text)
        tokens = {written: self._tokens[text] for written, text in self._normalized.items()}
        text = self._bpe.normalize(_SURROGATE.sub("\ufffd", text))
        return _split(text, self._normalized_words.finditer(text), tokens, self._encode_plain)

    def _encode_plain(self, text: str) -> list[int]:
        if not text:
            return []
        ids = self._bpe.encode(_SURROGATE.sub("\ufffd", text))
        if ids and max(ids) >= self.vocab_size:
            raise ModelError(f"tokenizer.json: token id {max(ids)} is beyond its {self.vocab_size} tokens")
        return ids

    def ending_with(self, ids: Iterable[int]) -> Self:
        """The same tokenizer for which these tokens end a text, too; those that were words become control tokens."""
        other = copy(self)
        other.eos_token_ids = tuple(dict.fromkeys((*self.eos_token_ids, *ids)))
        if not self.control_ids.issuperset(other.eos_token_ids):
            ends = {self._literal.get(i) for i in other.eos_token_ids}
            other._sort(
                {text: token._replace(control=token.control or text in ends) for text, token in self._tokens.items()}
            )
        return other

    def is_added(self, token_id: int) -> bool:
        """Whether a token is one of the added ones, and more than white space."""
        return bool(self._literal.get(token_id, "").strip())

    def strange_tokens(self, text: str) -> set[str]:
        """The added tokens that trusted text spells and that are none of the family's."""
        spelled = {*self._trusted.findall(text), *(own for found, own in self._normalized.items() if found in text)}
        return spelled - _FAMILY - _FAMILY_SPECIAL

    def _find_eos(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """The end that tokenizer_config.json names, of a turn and of a document: all of them stop generation.

        A fine-tune of a base model often names the document's only, and ends its turns as the family does.
        """
        name = config.get("eos_token")
        if isinstance(name, Mapping):
            name = name.get("content")
        if name is not None and not (isinstance(name, str) and name in self._added):
            raise ModelError(f"tokenizer_config.json: eos_token is {brief(name)}, which is not a special token")
        names = dict.fromkeys([name, "<|im_end|>", "<|endoftext|>"])
        return tuple(self._added[name] for name in names if name in self._added)


_OWN = ("eos_token", "pad_token", "unk_token")
_DEFAULTS = dict.fromkeys(("Qwen2Tokenizer", "Qwen2TokenizerFast", "Qwen3_5Tokenizer"), _OWN)
"""What transformers' classes fill in where the file says nothing."""


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that have a name (`eos_token`, `image_token`), as transformers gives them to templates."""
    named: dict[Any, Any] = dict.fromkeys(_DEFAULTS.get(str(config.get("tokenizer_class")), ()), "<|endoftext|>")
    named |= config
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        own = config.get(key)
        named |= own if isinstance(own, Mapping) else {}
    found = {}
    for name, token in named.items():
        text = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(name, str) and name.endswith("_token") and isinstance(text, str) and not _SURROGATE.search(text):
            found[name] = text
    return found


class _Added(NamedTuple):
    """An added token. control: only trusted text means it; the others are those of `AddedToken`."""

    id: int
    control: bool
    normalized: bool
    single_word: bool
    lstrip: bool
    rstrip: bool

    def place(self, text: str, match: re.Match[str], start: int) -> tuple[int, int] | None:
        """From where to where a token in `text` goes that is spelled at `match`; None if it is part of a word.

        Text before `start` belongs to the token before.
        """
        begin, end = match.span()
        if self.single_word and (_is_word(text[begin - 1 : begin]) or _is_word(text[end : end + 1])):
            return None
        while self.lstrip and begin > start and text[begin - 1] in _SPACE:
            begin -= 1
        while self.rstrip and end < len(text) and text[end] in _SPACE:
            end += 1
        return begin, end


# What Unicode calls white space, and what the regular expressions of Hugging Face's library (UTS 18) call a part of a
# word. Python's own notions are a little others.
_SPACE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B))))
_IN_WORDS = ("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "Pc")
_LETTERS = re.compile("[\u200c\u200d\u24b6-\u24e9\U0001f130-\U0001f149\U0001f150-\U0001f169\U0001f170-\U0001f189]")


def _is_word(character: str) -> bool:
    """Whether a character, or none, is part of a word."""
    return bool(character) and (
        unicodedata.category(character) in _IN_WORDS or _LETTERS.match(character) is not None  # in circles and squares
    )


def _added_tokens(bpe: Bpe, config: Mapping[str, Any]) -> dict[str, _Added]:
    """The added tokens of both files by spelling; ModelError if they contradict each other."""
    eos = config.get("eos_token")
    eos = eos.get("content") if isinstance(eos, Mapping) else eos
    control = _FAMILY | _FAMILY_SPECIAL | ({eos} if isinstance(eos, str) else set())
    found: dict[str, _Added] = {}
    for token_id, token in bpe.added.items():
        found[token.content] = _Added(token_id, token.special or token.content in control, *token[2:])
    for token_id, token in _config_tokens(config):
        text = token.content
        if found.setdefault(text, _Added(token_id, token.special or text in control, *token[2:])).id != token_id:
            raise ModelError(
                f"tokenizer_config.json: token {text!r} has id {token_id}, tokenizer.json gives it {found[text].id}"
            )
    ids = [token.id for token in found.values()]
    if len(set(ids)) != len(ids):
        raise ModelError("tokenizer_config.json: one id is given to two special tokens")
    if ids and max(ids) >= MAX_TOKENS:
        raise ModelError(f"tokenizer: token id {max(ids)}, expected less than {MAX_TOKENS}")
    return found


def _config_tokens(config: Mapping[str, Any]) -> list[tuple[int, AddedToken]]:
    """The ids and tokens of the `added_tokens_decoder` of a tokenizer_config.json. What it does not say is as in
    Hugging Face's: not special, normalized unless special, and nothing else."""
    table = config.get("added_tokens_decoder", {})
    if not isinstance(table, Mapping) or len(table) > MAX_ADDED or not all(starmap(_is_token, table.items())):
        raise ModelError('tokenizer_config.json: added_tokens_decoder is not a table of {"id": {"content": text}}')
    return [
        (int(key), AddedToken(entry["content"], special, bool(entry.get("normalized", not special)), *others))
        for key, entry in table.items()
        for special, *others in [[bool(entry.get(flag)) for flag in ("special", "single_word", "lstrip", "rstrip")]]
    ]


def _is_token(key: object, entry: object) -> bool:
    text = entry.get("content") if isinstance(entry, Mapping) else None
    number = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 18
    return number and isinstance(text, str) and 0 < len(text) <= MAX_ADDED_SPELLING and not _SURROGATE.search(text)


def _pattern(tokens: Iterable[str], one: Callable[[str], str] = re.escape) -> re.Pattern[str]:
    """Finds added tokens, the longest where several begin at the same place; an empty table matches nothing. `one` is
    the pattern of one token."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(one, longest_first)) or "(?!)")


def _split(
    text: str, spelled: Iterable[re.Match[str]], tokens: Mapping[str, _Added], encode: Callable[[str], list[int]]
) -> list[int]:
    """Ids of the tokens that are spelled in `text`, and of what is between them as `encode` has it."""
    found: list[int] = []
    start = 0
    for match in spelled:
        token = tokens[text[match.start() : match.end()]]
        if (place := token.place(text, match, start)) is not None:
            begin, end = place
            found += encode(text[start:begin])
            found.append(token.id)
            start = end
    return found + encode(text[start:])


class _Hidden:
    """Takes control tokens out of a text by writing some of its characters as lone surrogates, and puts them back.

    Those are the characters that control tokens begin and end with, so that no part of one is left either. Letters and
    digits stay readable, because templates look at texts: of a token that begins and ends with them, only whole
    occurrences are broken.
    """

    def __init__(self, control: Sequence[str]) -> None:
        edges = {edge for text in control for edge in (text[0], text[-1]) if not edge.isalnum()}
        bare = [text for text in control if not {text[0], text[-1]} & edges]
        characters = sorted(edges | {text[0] for text in bare})
        self._hide = {ord(edge): chr(_HIDDEN + n) for n, edge in enumerate(characters) if edge in edges}
        self._first = {edge: chr(_HIDDEN + n) for n, edge in enumerate(characters)}
        self._show = {_HIDDEN + n: edge for n, edge in enumerate(characters)}
        self._bare = _pattern(bare) if bare else None

    def pattern(self, word: str) -> str:
        """What finds a token that is a word, hidden or not."""
        return "".join(f"[{re.escape(c)}{self._first[c]}]" if c in self._first else re.escape(c) for c in word)

    def hidden(self, text: str) -> str:
        if self._bare is not None:
            text = self._bare.sub(lambda match: self._first[match[0][0]] + match[0][1:], text)
        return text.translate(self._hide)

    def shown(self, text: str) -> str:
        return text.translate(self._show)
