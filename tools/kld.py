#!/usr/bin/env python3
"""How far a model's predictions are from a reference's: KL divergence over the next token, in nats.

    python tools/kld.py REFERENCE MODEL [MODEL ...] --text notes.txt --context 512

Each chunk of --context tokens is run from an empty state; the second half of its positions counts (as in llama.cpp's
perplexity tool, but in float32 throughout). Prints mean, 99 and 99.9 percentile, maximum, how often both agree on the
most likely token, and the normalised mean squared error of the logits. A MODEL may name its backend and the bits of its
KV cache: `q4@cpu`, `q4@cpu/4`. The reference runs on --backend (NumPy).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import edgeq  # noqa: E402
from edgeq.api import Model  # noqa: E402
from edgeq.formats.bf16 import Array, Float32  # noqa: E402
from edgeq.testing import nmse  # noqa: E402


def log_softmax(logits: Float32) -> Array:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    out: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return out


def divergence(reference: Float32, logits: Float32) -> tuple[Array, Array]:
    """KL(reference || model) and whether the best tokens agree, per position: logits [n, vocabulary]."""
    p, q = log_softmax(reference), log_softmax(logits)
    return (np.exp(p) * (p - q)).sum(axis=-1), p.argmax(axis=-1) == q.argmax(axis=-1)


def chunks(model: Model, text: str | None, context: int, count: int) -> list[list[int]]:
    """Token ids to evaluate on: of a text, or random ones."""
    if text is None:
        ids = np.random.default_rng(0).integers(0, model.vocab_size, context * count).tolist()
    else:
        ids = model.need_tokenizer().encode(Path(text).read_text(encoding="utf-8"))
    whole = [ids[i : i + context] for i in range(0, len(ids) - context + 1, context)]
    if not whole:
        sys.exit(f"the text has {len(ids)} tokens, fewer than one chunk of {context}")
    return whole[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--text", help="a UTF-8 file; random tokens without it")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--backend", default="numpy", help="of the reference")
    args = parser.parse_args()

    reference = edgeq.load(args.reference, backend=args.backend)
    texts = chunks(reference, args.text, args.context, args.chunks)
    half = args.context // 2
    expected = [reference.logits(ids)[half:] for ids in texts]
    print(f"{len(texts)} chunks of {args.context} tokens; reference {args.reference} on {args.backend}")
    print(f"{'model':40} {'mean':>10} {'99 %':>10} {'99.9 %':>10} {'max':>10} {'top-1':>8} {'NMSE':>9}")
    for name in args.models:
        path, _, backend = name.partition("@")
        backend, _, kv_bits = backend.partition("/")
        model = edgeq.load(path, backend=backend or "numpy", kv_bits=int(kv_bits) if kv_bits else None)
        logits = [model.logits(ids)[half:] for ids in texts]
        pairs = [divergence(e, x) for e, x in zip(expected, logits, strict=True)]
        kld, same = (np.concatenate(side) for side in zip(*pairs, strict=True))
        error = nmse(np.concatenate(expected), np.concatenate(logits))
        tail = " ".join(f"{x:10.6f}" for x in (*np.quantile(kld, [0.99, 0.999]), kld.max()))
        print(f"{name:40} {kld.mean():10.6f} {tail} {same.mean():8.2%} {error:9.1e}")


if __name__ == "__main__":
    main()
