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

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import edgeq  # noqa: E402
from edgeq.quality.layerdiff import Trace, compare, first_above, read_trace, trace  # noqa: E402


def transformers_trace(folder: Path, ids: list[int]) -> Trace:
    """The trace of Hugging Face transformers."""
    from make_fixtures import reference_model
    from make_fixtures import trace as hooked

    values = hooked(reference_model(folder), np.array(ids), len(ids))
    return {name.removeprefix("trace."): value for name, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--backend", default="numpy")
    parser.add_argument("--against", default="transformers", help="transformers, a backend, or a trace file")
    parser.add_argument("--tokens", type=int, default=65, help="random tokens to run")
    parser.add_argument("--bound", type=float, default=1e-9)
    args = parser.parse_args()

    model = edgeq.load(args.model, backend=args.backend)
    ids = np.random.default_rng(0).integers(0, model.vocab_size, args.tokens).tolist()
    if args.against == "transformers":
        expected = transformers_trace(model.checkpoint.path, ids)
    elif args.against.endswith(".safetensors"):
        ids, expected = read_trace(Path(args.against))
    else:
        expected = trace(edgeq.load(args.model, backend=args.against).engine, ids)
    errors = compare(expected, trace(model.engine, ids))
    first = first_above(errors, args.bound)
    for name, error in errors.items():
        print(f"{name:12} NMSE {error:.3g}{'   <- first above the bound' if name == first else ''}")
    sys.exit(1 if first else 0)


if __name__ == "__main__":
    main()
