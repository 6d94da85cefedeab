"""The calibration text as windows of token ids."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeq.checkpoint import Checkpoint
from edgeq.errors import UsageError
from edgeq.inputs import expand_user, read_text
from edgeq.quality.calibration import CONTEXT, NAME, default_ids, split, text_ids

__all__ = ["DEFAULT", "Windows", "read_windows"]

DEFAULT = "default"
_FEWEST = 16  # tokens that a text must have: fewer say nothing about a model


class Windows(NamedTuple):
    """Token ids int32 [windows, context] to calibrate on, and others to judge the result by (the same where the text is
    one window). `sha256` is that of a file's text, or of the default text's ids."""

    name: str
    sha256: str
    calibration: NDArray[np.int32]
    held_out: NDArray[np.int32]

    @property
    def record(self) -> dict[str, Any]:
        """What a provenance record says of them."""
        tokens, held_out = self.calibration.size, self.held_out.size
        return {"text": self.name, "sha256": self.sha256, "tokens": tokens, "held_out_tokens": held_out}


def read_windows(checkpoint: Checkpoint, text: str, tokens: int, judged: int, seed: int) -> Windows:
    """Windows of the default text, or of the UTF-8 file `text`, with about `tokens` tokens to calibrate on, and at most
    `judged` windows to judge by, of the last sixteenth of the text; `seed` chooses which windows of a longer text.

    A text shorter than a window becomes one window of its own length.
    UsageError for a file that cannot be read, is not UTF-8 or has too few tokens; ModelError without tokenizer.
    """
    if text == DEFAULT:
        name, ids = NAME, default_ids(checkpoint)
        digest = sha256(np.array(ids, np.int32).tobytes()).hexdigest()
    else:
        words = _read(Path(text))
        name, ids, digest = Path(text).name, text_ids(checkpoint, words), sha256(words.encode()).hexdigest()
    if len(ids) < _FEWEST:
        raise UsageError(
            f"the calibration text {name} has {len(ids)} tokens, expected {_FEWEST} at the very least",
            hint="give a longer text (16,000 tokens and more are worth it), or leave it out for the default text",
        )
    usable, held_out = split(ids, min(CONTEXT, len(ids)))
    rng = np.random.default_rng(seed)
    return Windows(
        name,
        digest,
        _chosen(usable, tokens, rng),
        _chosen(held_out if len(held_out) else usable, judged * CONTEXT, rng),
    )


def _chosen(windows: NDArray[np.int32], tokens: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """Some of the windows, in order, with about so many tokens."""
    count = min(len(windows), max(1, tokens // windows.shape[1]))
    return np.ascontiguousarray(windows[np.sort(rng.choice(len(windows), count, replace=False))])


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
