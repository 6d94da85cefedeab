"""The text that models are calibrated and checked with: the one that ships with edgeq, or the user's.

What ships (`documents.txt`, `conversations.json`; where it is from stands in SOURCES.md) is small and mixed: prose in
many languages and scripts, code in many languages, and conversations with thinking and tool calls, which go through the
checkpoint's own chat template. It stands in one fixed order with everything mixed, so any part of it is a sample.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from edgeq.checkpoint import Checkpoint
from edgeq.errors import ModelError, UsageError
from edgeq.quality.stream import Chunks
from edgeq.text.template import ChatTemplate
from edgeq.text.tokenizer import Tokenizer

__all__ = ["CONTEXT", "NAME", "default_ids", "split", "text_ids"]

NAME = "edgeq default 1"
"""What the text is called in records; the number goes up when it changes."""

CONTEXT = 512  # tokens of a chunk, as in llama.cpp's tools
HELD_OUT = 16  # one chunk of so many is never calibrated on

_FOLDER = Path(__file__).parent


def default_ids(checkpoint: Checkpoint) -> list[int]:
    """The text that ships with edgeq as token ids: documents as they are, conversations by the chat template.

    Raises ModelError for a checkpoint without tokenizer.
    """
    tokenizer, template = _need_tokenizer(checkpoint), checkpoint.template()
    end, ids = _end(tokenizer), list[int]()
    for item in _items():
        ids += tokenizer.encode(item) if isinstance(item, str) else _conversation(item, tokenizer, template)
        ids += end
    return ids


def text_ids(checkpoint: Checkpoint, text: str) -> list[int]:
    """A text of the user's as token ids; control tokens spelled in it are text."""
    return _need_tokenizer(checkpoint).encode(text)


def split(ids: list[int], context: int = CONTEXT) -> tuple[Chunks, Chunks]:
    """What may be calibrated on and what is held out, int32 [n, context] each: the last sixteenth of the chunks, at
    least one, is held out where there are two or more. Raises UsageError for a text that makes no chunk."""
    count = len(ids) // context
    if not count:
        raise UsageError(
            f"the text is {len(ids)} tokens long, expected at least one chunk of {context}",
            hint="use a longer text, or leave it out for the one that ships with edgeq",
        )
    chunks = np.asarray(ids[: count * context], np.int32).reshape(count, context)
    held = max(1, count // HELD_OUT) if count > 1 else 0
    return chunks[: count - held], chunks[count - held :]


def _need_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        raise ModelError(
            f"{checkpoint.path} has no tokenizer, so it cannot be given a text",
            hint="copy the tokenizer files of the original checkpoint into it",
        )
    return tokenizer


def _end(tokenizer: Tokenizer) -> list[int]:
    """What stands behind a document: the family's end of a text, where the tokenizer has it."""
    end = tokenizer.token_id("<|endoftext|>")
    return [] if end is None else [end]


def _items() -> Iterator[str | dict[str, Any]]:
    """Documents and conversations, mixed: always in the same order."""
    documents = (_FOLDER / "documents.txt").read_text(encoding="utf-8").split("\f\n")
    conversations: list[dict[str, Any]] = json.loads((_FOLDER / "conversations.json").read_text(encoding="utf-8"))
    items: list[str | dict[str, Any]] = [*documents, *conversations]
    Random(0).shuffle(items)
    yield from items


def _conversation(given: dict[str, Any], tokenizer: Tokenizer, template: ChatTemplate | None) -> list[int]:
    """By the template; the plain text of it where there is none, or one that knows no such messages."""
    messages = given["messages"]
    if template is not None:
        try:
            text = template.render(
                messages, add_generation_prompt=False, enable_thinking=given.get("thinking"), tools=given.get("tools")
            )
        except ModelError:
            pass
        else:
            return tokenizer.encode(text, control=True)
    return tokenizer.encode("\n\n".join(message.get("content") or "" for message in messages))
