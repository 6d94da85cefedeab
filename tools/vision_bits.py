#!/usr/bin/env python3
"""What a vision tower of 8 bits costs: answers about the demo's pictures, against a tower of 16 bits.

    python tools/vision_bits.py [pictures of each kind] [backend]     # needs pillow and tokenizers

Both models have the text in bfloat16; the right answers are forced, and the distributions of their tokens compared.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from demo import conversations, pictures  # noqa: E402
from demo.text import render  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

import edgeq  # noqa: E402
from edgeq.formats.bf16 import Float32  # noqa: E402
from edgeq.model import text  # noqa: E402
from edgeq.quant import quantize  # noqa: E402
from edgeq.testing import nmse  # noqa: E402

DEMO = ROOT / "edgeq" / "demo"
GRID = (1, 6, 6)  # patches of a picture, and 3 x 3 tokens


def features(model: edgeq.Model, patches: Float32) -> Float32:
    """Of pictures [n, 36, values]: [n * 9, hidden]."""
    engine = model.engine
    return np.concatenate([engine.ops.numpy(engine.see(picture, GRID)) for picture in patches])


def logits(model: edgeq.Model, ids: np.ndarray, seen: Float32) -> np.ndarray:
    """After every token of a prompt whose placeholders are `seen`: float64 [n, vocabulary]."""
    engine, ops, weights = model.engine, model.ops, model.engine.weights.text
    x = np.array(ops.numpy(text.embed(ops, weights, ids)))
    x[ids == model.config.image_token_id] = seen
    places = positions(ids, model.config.image_token_id or 0)
    hidden, _ = text.run_layers(ops, engine.config, weights, ops.array(x), places, [len(ids)], [model.state()], [0])
    return np.asarray(ops.numpy(text.logits(ops, weights, hidden)), np.float64)


def positions(ids: np.ndarray, pad: int) -> np.ndarray:
    """Positions int32 [3, n]: a picture's tokens stand in a square."""
    out, at, i = np.zeros((3, len(ids)), np.int32), 0, 0
    while i < len(ids):
        if ids[i] == pad:
            out[:, i : i + pictures.MERGED], at = pictures.grid_positions(3, 3, at)
            i += pictures.MERGED
        else:
            out[:, i], at, i = at, at + 1, i + 1
    return out


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


def main() -> None:
    count, backend = (*sys.argv[1:], *("50", "numpy")[len(sys.argv) - 1 :])[:2]
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    divergence, of_logits, of_features, changed = list[float](), list[float](), list[float](), 0
    with TemporaryDirectory() as folder:
        models = []
        for bits in (16, 8):
            quantize(DEMO, Path(folder) / str(bits), recipe="none", vision=bits)
            models.append(edgeq.load(Path(folder) / str(bits), backend=backend))
        for kind in pictures.KINDS:
            rng = Random(f"vision bits/{kind}")
            for _ in range(int(count)):
                found: list[Any] = []
                c = conversations.seen(rng, kind)
                prompt = render(c.prompt, c.tools, c.thinking, prompt=True)
                prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * pictures.MERGED)
                asked = tokenizer.encode(prompt, add_special_tokens=False).ids
                said = tokenizer.encode(f"{c.messages[-1]['content']}<|im_end|>", add_special_tokens=False).ids
                shown = pictures.patches(np.stack([np.asarray(image) for image in c.images])).astype(np.float32)
                for model in models:
                    seen = features(model, shown)
                    rows = logits(model, np.array(asked + said, np.int32), seen)[len(asked) - 1 : -1]
                    found.append((seen, rows))
                (seen16, logits16), (seen8, logits8) = found
                p, q = log_softmax(logits16), log_softmax(logits8)
                divergence += (np.exp(p) * (p - q)).sum(axis=-1).tolist()
                of_logits.append(nmse(logits16, logits8))
                of_features.append(nmse(seen16, seen8))
                changed += int((p.argmax(axis=-1) != q.argmax(axis=-1)).sum())
    print(
        f"{backend}, {len(of_logits)} pictures: KL {np.mean(divergence):.1e}, "
        f"largest {np.max(divergence):.1e}; NMSE of logits {np.mean(of_logits):.1e}, of features "
        f"{np.mean(of_features):.1e}; another token is best in {changed} of {len(divergence)}"
    )


if __name__ == "__main__":
    main()
