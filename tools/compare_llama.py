#!/usr/bin/env python3
"""One GGUF file in llama.cpp and in edgeq: the error of its logits, and whether both continue alike.

    python tools/compare_llama.py FILE.gguf [PROMPTS]            # needs the extra `peers`

llama.cpp rounds activations to F16 before it multiplies by F16 weights, and edgeq does not. Its BLAS backend does not
either (prompts of 32 tokens and more, matrices of 32 rows and more), so this shows what else there is:

    CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_BLAS=ON -DGGML_BLAS_VENDOR=OpenBLAS" pip install llama-cpp-python
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llama import Llama  # noqa: E402

import edgeq  # noqa: E402
from edgeq.formats.bf16 import Float32  # noqa: E402
from edgeq.testing import nmse  # noqa: E402

PROMPT, REPLY = 40, 32  # tokens; the prompt's are random


def greedy(model: edgeq.Model, prompt: list[int]) -> tuple[list[int], Float32]:
    """REPLY tokens, and the logits that each was chosen from."""
    ids, rows = list[int](), list[Float32]()
    logits, state = model.forward(prompt, model.state())
    for _ in range(REPLY):
        rows.append(logits.ravel())
        ids.append(int(logits.argmax()))
        logits, state = model.forward(ids[-1:], state)
    return ids, np.stack(rows)


def main() -> None:
    path, prompts = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3
    model, theirs = edgeq.load(path), Llama(path)
    rng = np.random.default_rng(0)
    for _ in range(prompts):
        prompt = rng.integers(0, model.vocab_size, PROMPT).tolist()
        ids, ours = greedy(model, prompt)
        found = theirs.logits(prompt + ids[:-1])[PROMPT - 1 :]  # in one batch; the same tokens as long as they agree
        same = int((found.argmax(-1) == ids).sum())
        ordered = np.sort(ours, axis=-1)
        gap = (ordered[:, -1] - ordered[:, -2]).min()
        print(
            f"logits: NMSE {nmse(ours, found):.1e}; {same} of {REPLY} greedy tokens equal; the closest two differ by "
            f"{gap:.4f}, logits by {np.sqrt(np.mean((ours - found) ** 2)):.4f} (rms)"
        )


if __name__ == "__main__":
    main()
