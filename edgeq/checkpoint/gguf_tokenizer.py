"""The tokenizer in a GGUF file's metadata, and back: a vocabulary, merges, and what kind each token is.

GGUF names the pre-tokenizer instead of describing it, and leaves the normalizer out; llama.cpp does not normalize at
all. The model was trained behind NFC, so edgeq puts it back: a file tokenizes as the folder it was made from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Any

from edgeq.errors import ModelError
from edgeq.formats.gguf import GGUFFile
from edgeq.printable import brief
from edgeq.text.components import PATTERNS

__all__ = ["TokenType", "token_ids", "tokenizer_metadata", "tokenizer_spec"]

PRE_TOKENIZERS = {name: PATTERNS[name] for name in ("qwen35", "qwen2")}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


class TokenType(IntEnum):
    """llama.cpp's kinds of tokens."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


def tokenizer_spec(file: GGUFFile) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The contents of tokenizer.json and tokenizer_config.json; None if the file has no vocabulary."""
    if "tokenizer.ggml.tokens" not in file:
        return None
    model, pre = (file.get(f"tokenizer.ggml.{key}", str) for key in ("model", "pre"))
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        raise ModelError(
            f"{file.path}: tokenizer {model!r} with pre-tokenizer {pre!r} is not supported",
            hint="convert the model again with a current llama.cpp, which writes 'gpt2' with 'qwen35'",
        )
    tokens, kinds = _vocabulary(file)
    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == TokenType.NORMAL}
    added = [_added(i, tokens[i], kind) for i, kind in enumerate(kinds) if kind in _ADDED]
    split = {"type": "Split", "pattern": {"Regex": PRE_TOKENIZERS[pre]}, "behavior": "Isolated", "invert": False}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, _BYTE_LEVEL]},
        "post_processor": _BYTE_LEVEL,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": file.strings("tokenizer.ggml.merges"),
        },
    }
    return spec, _config(file, tokens, added)


_ADDED = (TokenType.CONTROL, TokenType.USER_DEFINED)
_PADDING = re.compile(r"\[PAD\d+\]")  # fills the vocabulary up to the embedding's rows


def _vocabulary(file: GGUFFile) -> tuple[list[str], list[int]]:
    tokens = file.strings("tokenizer.ggml.tokens")
    kinds = file.integers("tokenizer.ggml.token_type")
    if len(kinds) != len(tokens):
        raise ModelError(f"{file.path}: {len(tokens):,} tokens, but {len(kinds):,} token types")
    if len(set(tokens)) != len(tokens):
        raise ModelError(f"{file.path}: a token occurs twice in tokenizer.ggml.tokens")
    for i, token in enumerate(tokens):  # ollama's converter calls padding the user's: it would match in what they write
        if kinds[i] == TokenType.USER_DEFINED and _PADDING.fullmatch(token):
            kinds[i] = TokenType.UNUSED
    return tokens, kinds


def _added(token_id: int, text: str, kind: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": text, **flags, "special": kind == TokenType.CONTROL}


def _config(file: GGUFFile, tokens: list[str], added: list[dict[str, Any]]) -> dict[str, Any]:
    """What tokenizer_config.json says: the special tokens by name, and all added tokens."""

    def token(key: str) -> str | None:
        number = file.get(f"tokenizer.ggml.{key}_token_id", int, -1)
        if number >= len(tokens):
            raise ModelError(f"{file.path}: {key}_token_id is {number}, there are {len(tokens):,} tokens")
        return tokens[number] if number >= 0 else None

    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added},
        "add_prefix_space": False,
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "pad_token": token("padding"),
        "unk_token": None,
        "errors": "replace",
        "model_max_length": file.get("qwen35.context_length", int, 262144),
    }


def token_ids(file: GGUFFile, spellings: Iterable[str]) -> list[int | None]:
    """The ids of tokens by their spelling; None for those that the vocabulary does not have."""
    tokens = file.strings("tokenizer.ggml.tokens") if "tokenizer.ggml.tokens" in file else []
    ids = {token: i for i, token in enumerate(tokens)}
    return [ids.get(spelling) for spelling in spellings]


# --- writing ---------------------------------------------------------------------------------------------------------


def tokenizer_metadata(spec: Mapping[str, Any], config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The `tokenizer.ggml.*` entries, without that prefix, for a tokenizer.json and a tokenizer_config.json.

    `rows` is the embedding's: rows without a token become unused tokens, as llama.cpp wants one for each.
    """
    model = spec["model"]
    pre = [name for name, regex in PRE_TOKENIZERS.items() if json.dumps(regex) in json.dumps(spec["pre_tokenizer"])]
    if model.get("type") != "BPE" or not pre:
        raise ModelError("tokenizer.json is not Qwen3.5's byte-level BPE, the only kind that edgeq exports")
    for added in (*spec["added_tokens"], *config.get("added_tokens_decoder", {}).values()):
        if flag := next((flag for flag in ("lstrip", "rstrip", "single_word") if added.get(flag)), None):
            raise ModelError(
                f"tokenizer.json: token {brief(added['content'])} has {flag}, for which GGUF has no place",
                hint="quantize to a folder instead, or set it to false in tokenizer.json and tokenizer_config.json",
            )
    tokens = {i: (token, TokenType.NORMAL) for token, i in model["vocab"].items()}
    for added in spec["added_tokens"]:  # <|fim_prefix|> and its like are not "special" in the file, but control here
        control = added["special"] or (added["content"].startswith("<|") and added["content"].endswith("|>"))
        tokens[added["id"]] = added["content"], TokenType.CONTROL if control else TokenType.USER_DEFINED
    for key, added in config.get("added_tokens_decoder", {}).items():
        tokens.setdefault(int(key), (added["content"], TokenType.CONTROL))
    if max(tokens) >= rows:
        raise ModelError(f"the tokenizer has ids up to {max(tokens)}, the embedding has {rows} rows")
    table = [tokens.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(rows)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    ids = {token: i for i, (token, _) in tokens.items()}
    special = {"eos_token_id": config.get("eos_token"), "padding_token_id": config.get("pad_token")}
    return {
        "model": "gpt2",
        "pre": pre[0],
        "tokens": [token for token, _ in table],
        "token_type": [int(kind) for _, kind in table],
        "merges": merges,
        **{key: ids[name] for key, token in special.items() if (name := _text(token)) in ids},
        "add_bos_token": False,
        "add_eos_token": False,
    }


def _text(token: object) -> str:
    """How a special token is spelled, given as text or as an object; "" for anything else."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else ""
