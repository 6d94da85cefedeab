"""What a tokenizer.json may consist of: an allow-list, with bounds.

The `tokenizers` library builds whatever the file describes: patterns that take exponential time, replacements that
multiply a text, tables that ask for gigabytes, merges left out at random. A byte-level BPE of the family needs little
of it. What is not listed here is refused by its name, and the library is given what is listed and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from edgeq.errors import ModelError
from edgeq.numbers import whole_number
from edgeq.printable import brief, one_line

__all__ = ["PATTERNS", "checked_components", "read_components"]

MAX_TOKENS = 1 << 20  # no tokenizer of the family comes near; more is a damaged file
MAX_ADDED = 1 << 12
MAX_SPELLING = 1 << 12  # characters of a token
MAX_ADDED_SPELLING = 1 << 8
_MAX_SEQUENCE = 8

PATTERNS = {  # Qwen3.5's joins marks to letters, the others do not
    "qwen35": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""The patterns that split a text into words, by GGUF's names. `edgeq.text.pieces` relies on how far they look ahead."""

_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD")  # they lengthen a text 18 times at most
_IGNORED = {  # not used: edgeq adds no special tokens and decodes bytes itself
    "post_processor": ("ByteLevel", "TemplateProcessing", "Sequence"),
    "decoder": ("ByteLevel", "Sequence", "Fuse"),
}
_TOP = {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "model", *_IGNORED}
_SWITCHES = ("fuse_unk", "byte_fallback", "ignore_merges")
_TEXTS = ("unk_token", "continuing_subword_prefix", "end_of_word_suffix")  # of other kinds of BPE: absent or empty
_MODEL = {"type", "vocab", "merges", "dropout", *_SWITCHES, *_TEXTS}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_components(text: str, name: str) -> dict[str, Any]:
    """The contents of a tokenizer.json, from its text; ModelError (naming `name`) if they are not all known."""
    try:
        spec = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{name} is not a tokenizer: {one_line(error)}") from None
    return checked_components(spec, name)


def checked_components(spec: Any, name: str) -> dict[str, Any]:
    """What of `spec` is handed to the library. Dropout, which draws other tokens every time, is left out."""
    check = _Check(name)
    check.keys(spec, _TOP, "the file")
    for key, known in _IGNORED.items():
        check.component(spec.get(key), known, key)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": check.added_tokens(spec.get("added_tokens", [])),
        "normalizer": check.normalizer(spec.get("normalizer")),
        "pre_tokenizer": check.pre_tokenizer(spec.get("pre_tokenizer")),
        "post_processor": None,
        "decoder": None,
        "model": check.model(spec.get("model")),
    }


class _Check:
    """Checks the parts of one file."""

    def __init__(self, name: str) -> None:
        self.name = name

    def error(self, problem: str) -> ModelError:
        return ModelError(
            f"{self.name} is not a tokenizer that edgeq reads: {problem}",
            hint="edgeq reads byte-level BPE as the Qwen models have it; take the tokenizer files of the original",
        )

    def keys(self, value: Any, known: set[str], where: str) -> None:
        if not isinstance(value, Mapping):
            raise self.error(f"{where} is {brief(value)}, expected an object")
        if unknown := value.keys() - known:
            raise self.error(f"{where} has {brief(min(unknown))}, which is not known")

    def component(self, value: Any, known: tuple[str, ...], where: str) -> str | None:
        """The type of a component that may be absent."""
        if value is None:
            return None
        kind = value.get("type") if isinstance(value, Mapping) else None
        if not isinstance(kind, str) or kind not in known:
            found = brief(value if kind is None else kind)
            raise self.error(f"{where} {found} is not supported, expected {' or '.join(known)}")
        return kind

    def sequence(self, value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or len(value) > _MAX_SEQUENCE:
            raise self.error(f"{where} is {brief(value)}, expected a list of at most {_MAX_SEQUENCE}")
        return value

    def normalizer(self, value: Any) -> dict[str, Any] | None:
        kind = self.component(value, (*_NORMALIZERS, "Sequence"), "normalizer")
        if kind != "Sequence":
            return kind and {"type": kind}  # type: ignore[return-value]
        parts = self.sequence(value.get("normalizers"), "normalizer Sequence")
        kinds = [self.component(part, _NORMALIZERS, "normalizer") for part in parts]
        return {"type": "Sequence", "normalizers": [{"type": kind} for kind in kinds]}

    def pre_tokenizer(self, value: Any) -> dict[str, Any]:
        """ByteLevel with its own pattern, or one of PATTERNS and then ByteLevel without."""
        kind = self.component(value, ("ByteLevel", "Sequence"), "pre_tokenizer")
        parts = self.sequence(value.get("pretokenizers"), "pre_tokenizer") if kind == "Sequence" else [value]
        if len(parts) == 1:
            return self.byte_level(parts[0], use_regex=True)
        if len(parts) != 2:
            raise self.error(f"pre_tokenizer has {len(parts)} parts, expected Split and ByteLevel")
        split = self.split(parts[0])
        return {"type": "Sequence", "pretokenizers": [split, self.byte_level(parts[1], use_regex=False)]}

    def byte_level(self, value: Any, *, use_regex: bool) -> dict[str, Any]:
        if self.component(value, ("ByteLevel",), "pre_tokenizer") is None:
            raise self.error("pre_tokenizer is missing, expected ByteLevel")
        expected = {"add_prefix_space": False, "use_regex": use_regex}
        for key, wanted in expected.items():
            if value.get(key, key == "use_regex") is not wanted:
                raise self.error(f"pre_tokenizer ByteLevel has {key} {brief(value.get(key))}, expected {wanted}")
        return {"type": "ByteLevel", "trim_offsets": False, **expected}

    def split(self, value: Any) -> dict[str, Any]:
        self.component(value, ("Split",), "pre_tokenizer")
        pattern = value.get("pattern") if isinstance(value, Mapping) else None
        if not isinstance(pattern, Mapping) or pattern.get("Regex") not in PATTERNS.values():
            raise self.error(f"pre_tokenizer Split has the pattern {brief(pattern)}, which is not one of the family's")
        if value.get("behavior") != "Isolated" or value.get("invert", False) is not False:
            raise self.error("pre_tokenizer Split is not 'Isolated', or inverted")
        return {
            "type": "Split", "pattern": {"Regex": pattern["Regex"]}, "behavior": "Isolated", "invert": False
        }  # fmt: skip

    def added_tokens(self, value: Any) -> list[dict[str, Any]]:
        if not isinstance(value, list) or len(value) > MAX_ADDED:
            raise self.error(f"added_tokens is {brief(value)}, expected a list of at most {MAX_ADDED:,}")
        return [self.added_token(entry) for entry in value]

    def added_token(self, entry: Any) -> dict[str, Any]:
        self.keys(entry, {"id", "content", *_FLAGS}, "added_tokens")
        content, flags = entry.get("content"), {flag: entry.get(flag, False) for flag in _FLAGS}
        if not isinstance(content, str) or not 0 < len(content) <= MAX_ADDED_SPELLING:
            raise self.error(
                f"added_tokens has content {brief(content)}, expected 1 to {MAX_ADDED_SPELLING} characters"
            )
        if not all(isinstance(flag, bool) for flag in flags.values()):
            raise self.error(f"added_tokens has {brief(flags)} for {brief(content)}")
        token_id = whole_number(entry.get("id"), f"{self.name}: the id of {brief(content)}", 0, MAX_TOKENS - 1)
        return {"id": token_id, "content": content, **flags}

    def model(self, value: Any) -> dict[str, Any]:
        if self.component(value, ("BPE",), "model") is None:
            raise self.error("model is missing, expected BPE")
        self.keys(value, _MODEL, "model")
        for key in _SWITCHES:
            if value.get(key) not in (None, False, True):
                raise self.error(f"model.{key} is {brief(value[key])}, expected true or false")
        for key in _TEXTS:
            if value.get(key) not in (None, ""):
                raise self.error(f"model.{key} is {brief(value[key])}, expected none")
        vocab = self.vocab(value.get("vocab"))
        tables = {"vocab": vocab, "merges": self.merges(value.get("merges"), vocab)}
        return {"type": "BPE", "dropout": None, **{k: value.get(k) for k in _TEXTS},
                **{k: bool(value.get(k)) for k in _SWITCHES}, **tables}  # fmt: skip

    def vocab(self, value: Any) -> Any:
        if not isinstance(value, Mapping) or len(value) > MAX_TOKENS:
            raise self.error(f"model.vocab is {brief(value)}, expected an object of at most {MAX_TOKENS:,} tokens")
        if not all(type(token_id) is int and 0 <= token_id < MAX_TOKENS for token_id in value.values()):
            raise self.error(f"model.vocab has an id that is not a number from 0 to {MAX_TOKENS - 1}")
        if max(map(len, value), default=0) > MAX_SPELLING:
            raise self.error(f"model.vocab has a token of more than {MAX_SPELLING:,} characters")
        return value

    def merges(self, value: Any, vocab: Mapping[str, int]) -> Any:
        """Each is a text of two tokens with a space between them, or a list of the two; together they are a token.

        The library panics where they are not.
        """
        if not isinstance(value, list) or len(value) > MAX_TOKENS:
            raise self.error(f"model.merges is {brief(value)}, expected a list of at most {MAX_TOKENS:,}")
        for merge in value:
            pair = merge.split(" ") if isinstance(merge, str) else merge
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
                raise self.error(f"model.merges has {brief(merge)}, which is not a pair of tokens")
            if not (pair[0] in vocab and pair[1] in vocab and pair[0] + pair[1] in vocab):
                raise self.error(f"model.merges has {brief(merge)}, but model.vocab has not all three tokens of it")
        return value
