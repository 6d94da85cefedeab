"""Which model a session was made with, so that no other goes on with it."""

from __future__ import annotations

import json
from dataclasses import asdict
from hashlib import sha256
from typing import Any

from edgeq.checkpoint import Checkpoint
from edgeq.config import TextConfig
from edgeq.inputs import is_file, read_text
from edgeq.session.language import Language

__all__ = ["model_identity"]

_RECORD = "edgeq.json"  # of a quantized model: the hashes of its files
_FIELDS = (  # what decides what a state means; fixed by the version of the format
    "vocab_size", "hidden_size", "intermediate_size", "layer_types", "num_attention_heads", "num_key_value_heads",
    "head_dim", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
    "linear_conv_kernel_dim", "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip
_PROBE = "Straße 12,5 \u4f60\u597d <|im_start|>user\n\tx = {'a': 0x1F}\U0001f600 naïve\r\n"


def model_identity(checkpoint: Checkpoint, language: Language) -> dict[str, str]:
    """Hashes that together tell a model from others.

    weights: of pages all over its files, adapters included, and of the record of a quantized model, which has the
    sha256 of each. config: of what decides what a state means, the stretching of the context included. tokenizer: of
    what it makes of some text, and of some of its tokens.
    """
    return {
        "weights": _hash([checkpoint.sampled(), _recorded(checkpoint)]),
        "config": _hash(_config(checkpoint.config.text)),
        "tokenizer": _hash(_spelling(language)),
    }


def _recorded(checkpoint: Checkpoint) -> Any:
    record = checkpoint.path / _RECORD
    if not is_file(record):
        return None
    try:
        return json.loads(read_text(record)).get("files")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def _config(c: TextConfig) -> dict[str, Any]:
    rope = asdict(c.rope) | {"scaling kind": type(c.rope.scaling).__name__}
    return {name: getattr(c, name) for name in _FIELDS} | {"rope": rope}


def _spelling(language: Language) -> Any:
    tokenizer = language.tokenizer
    if tokenizer is None:
        return None
    some = range(0, tokenizer.vocab_size, max(1, tokenizer.vocab_size // 64))
    return [
        tokenizer.vocab_size, tokenizer.encode(_PROBE), tokenizer.encode(_PROBE, control=True),
        [tokenizer.token(i) for i in some],
    ]  # fmt: skip


def _hash(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
