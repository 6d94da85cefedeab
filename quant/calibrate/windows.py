"""The calibration text as windows of token ids."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeq.checkpoint import Checkpoint
from edgeq.errors import ModelError, UsageError
from edgeq.inputs import expand_user, read_text

__all__ = ["CONTEXT", "DEFAULT", "Windows", "read_windows"]

DEFAULT = "default"
CONTEXT = 512  # tokens of a window, as llama.cpp's tools take them
_FEWEST = 16  # tokens that a text must have: fewer say nothing about a model
_HELD_OUT = 16  # one window of so many is kept for judging the result


class Windows(NamedTuple):
    """Token ids int32 [windows, context] to calibrate on, and others to judge the result by (the same where the text is
    one window). `sha256` is the text's."""

    name: str
    sha256: str
    calibration: NDArray[np.int32]
    held_out: NDArray[np.int32]

    @property
    def record(self) -> dict[str, Any]:
        """What a provenance record says of them."""
        tokens, held_out = self.calibration.size, self.held_out.size
        return {"text": self.name, "sha256": self.sha256, "tokens": tokens, "held_out_tokens": held_out}


def read_windows(checkpoint: Checkpoint, text: str | Path, tokens: int, seed: int) -> Windows:
    """Windows of the UTF-8 file `text`, with about `tokens` tokens to calibrate on; `seed`
    chooses which windows of a longer text. The last sixteenth of the text is held out.

    A text shorter than a window becomes one window of its own length.
    UsageError for a file that cannot be read, is not UTF-8 or has too few tokens; ModelError without tokenizer.
    """
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        raise ModelError(
            f"{checkpoint.path} has no tokenizer, which calibration needs",
            hint="add the model's tokenizer.json and tokenizer_config.json to it, or quantize without calibration",
        )
    words = _read(Path(text))
    name, digest = Path(text).name, sha256(words.encode()).hexdigest()
    ids = tokenizer.encode(words, control=True)  # the text's author is its user: what is spelled as a token is one
    if len(ids) < _FEWEST:
        raise UsageError(
            f"the calibration text {name} has {len(ids)} tokens, expected {_FEWEST} at the very least",
            hint="give a longer text (16,000 tokens and more are worth it), or leave it out for the default text",
        )
    everything = np.array(ids, np.int32)
    context = min(CONTEXT, len(everything))
    count = len(everything) // context
    windows = everything[: count * context].reshape(count, context)
    kept = max(1, count // _HELD_OUT) if count > 1 else 0
    usable, held_out = windows[: count - kept], windows[count - kept :]
    wanted = min(len(usable), max(1, tokens // context))
    chosen = np.sort(np.random.default_rng(seed).choice(len(usable), wanted, replace=False))
    return Windows(name, digest, np.ascontiguousarray(usable[chosen]), held_out if kept else windows)


def _read(path: Path) -> str:
    try:
        return read_text(expand_user(path))
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text (byte {error.start:,})", hint="save it as UTF-8, or give another text"
        ) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(
            f"the calibration text {path} cannot be read: {reason}", hint="give a UTF-8 text file, or `default`"
        ) from None
