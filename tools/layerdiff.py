#!/usr/bin/env python3
"""Say where two computations of the same model part: embedding, every layer, final norm, logits, in order.

    python tools/layerdiff.py FOLDER --against numpy --backend cpu     # a backend against another
    python tools/layerdiff.py FOLDER --against transformers            # against Hugging Face (needs torch)
    python tools/layerdiff.py FOLDER --against golden.safetensors      # against a stored trace (tools/make_fixtures.py)

Prints the NMSE (sum of squared differences over sum of squares) of each and exits with 1 at the first above --bound.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from edgeq.backends import select  # noqa: E402
from edgeq.checkpoint import open_checkpoint  # noqa: E402
from edgeq.formats.bf16 import Float32  # noqa: E402
from edgeq.formats.safetensors import SafetensorsFile  # noqa: E402
from edgeq.loading import LoadedWeights  # noqa: E402
from edgeq.model import layers, text  # noqa: E402

Trace = dict[str, Float32]


def trace(folder: Path, backend: str, ids: list[int]) -> Trace:
    """Hidden states after each step of the model on one of edgeq's backends."""
    checkpoint = open_checkpoint(folder)
    ops: Any = select(backend)
    c, weights = checkpoint.config.text, LoadedWeights(checkpoint, ops).text
    state = text.initial_state(ops, c)
    batch = text.text_batch([np.array(ids, np.int32)], [state])
    angles = ops.rope_angles(ops.array(batch.positions), c.rope)
    x = ops.embed(weights.embed_tokens, ops.array(batch.ids))
    seen = {"embed": np.array(ops.numpy(x))}
    for i, layer in enumerate(weights.layers):
        x, _ = layers.decoder_layer(ops, x, layer, c, angles, [state.layers[i]], batch.lengths, [0])
        seen[f"layer.{i}"] = np.array(ops.numpy(x))
    x = ops.rms_norm(x, weights.norm, c.rms_norm_eps)
    seen["norm"] = np.array(ops.numpy(x))
    seen["logits"] = np.array(ops.numpy(text.logits(ops, weights, x)))
    return seen


def stored_trace(path: Path) -> tuple[list[int], Trace]:
    """The trace in a file of tools/make_fixtures.py, and the ids it is of."""
    file = SafetensorsFile(path)
    seen = {name.removeprefix("trace."): file.array(name) for name in file.tensors if name.startswith("trace.")}
    return file.array("ids")[: len(seen["embed"])].tolist(), seen


def transformers_trace(folder: Path, ids: list[int]) -> Trace:
    """The same of Hugging Face transformers."""
    from make_fixtures import reference_model
    from make_fixtures import trace as hooked

    values = hooked(reference_model(folder), np.array(ids), len(ids))
    return {name.removeprefix("trace."): value for name, value in values.items()}


def compare(ours: Trace, theirs: Trace, bound: float) -> tuple[list[tuple[str, float]], str | None]:
    """NMSE of every step in order, and the first step above `bound`."""
    rows = []
    for name, mine in ours.items():
        reference = theirs[name].astype(np.float64)
        rows.append((name, float(np.sum((mine - reference) ** 2) / np.sum(reference**2))))
    return rows, next((name for name, error in rows if not error <= bound), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backend", default="numpy")
    parser.add_argument("--against", default="transformers", help="transformers, a backend, or a trace file")
    parser.add_argument("--tokens", type=int, default=65, help="random tokens to run")
    parser.add_argument("--bound", type=float, default=1e-9)
    args = parser.parse_args()

    vocabulary = open_checkpoint(args.folder).config.text.vocab_size
    ids = np.random.default_rng(0).integers(0, vocabulary, args.tokens).tolist()
    if args.against == "transformers":
        theirs = transformers_trace(args.folder, ids)
    elif args.against.endswith(".safetensors"):
        ids, theirs = stored_trace(Path(args.against))
    else:
        theirs = trace(args.folder, args.against, ids)
    rows, first = compare(trace(args.folder, args.backend, ids), theirs, args.bound)
    for name, error in rows:
        print(f"{name:12} NMSE {error:.3g}{'   <- first above the bound' if name == first else ''}")
    sys.exit(1 if first else 0)


if __name__ == "__main__":
    main()
