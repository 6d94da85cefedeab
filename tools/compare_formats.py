#!/usr/bin/env python3
"""Compare quantized files of one model: KL divergence, its tail, top-1 and bits per weight, with confidence intervals.

    tools/compare_formats.py ORIGINAL FILE... --text held-out.txt [--context 512 2048] [--to FILE] [--cache FOLDER]
    tools/compare_formats.py ORIGINAL q4 q4.gguf --ids held-out.npy

Every file's weights are written out in float32 and run by the same program, so only they differ; every byte of the
language model is counted. Chunks start from an empty state, and the second half of each is scored. Ratios are to the
file named by --to (the first one otherwise), with a 95 % interval of a paired bootstrap over chunks. Text should be
none that a file was calibrated on. With --cache what was measured of a file is kept by its content and is not
measured again. NAME=PATH gives a file a name of its own in the table.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from edgeq.backends.floats import float_ops  # noqa: E402
from edgeq.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from edgeq.formats.bf16 import Array  # noqa: E402
from edgeq.quality.gate import bits_per_weight  # noqa: E402
from edgeq.quality.kld import compare, cut  # noqa: E402
from edgeq.quality.stream import Chunks, Stream  # noqa: E402

DRAWS = 2000


class Measured(NamedTuple):
    """Of a file at every position: kl in nats, same (the most likely token), delta (of the loss), [chunks, n]."""

    kl: Array
    same: Array
    delta: Array


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("files", nargs="+", metavar="[NAME=]FILE")
    parser.add_argument("--text", type=Path, help="UTF-8")
    parser.add_argument("--ids", type=Path, help="token ids in place of a text, a .npy file")
    parser.add_argument("--context", type=int, nargs="+", default=[512])
    parser.add_argument("--tokens", type=int, help="use the last N tokens only")
    parser.add_argument("--to", help="name of the file that ratios are to")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    original = open_checkpoint(args.original)
    files = {name: open_checkpoint(Path(path)) for name, path in map(named, args.files)}
    ids = np.load(args.ids) if args.ids else np.array(tokenized(original, args.text), np.int32)
    for context in args.context:
        chunks = cut(ids[-args.tokens :] if args.tokens else ids, context)
        found = measure(original, files, chunks, args.cache, args.threads)
        print(f"\n{args.original}: {len(chunks)} chunks of {context}, {found[next(iter(files))].kl.size:,} positions")
        print("\n".join(table(files, found, args.to or next(iter(files)))), flush=True)


def named(argument: str) -> tuple[str, str]:
    name, equals, path = argument.partition("=")
    return (name, path) if equals else (Path(argument).name, argument)


def tokenized(checkpoint: Checkpoint, text: Path | None) -> list[int]:
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None or text is None:
        sys.exit("give the text with --text, for a model that has a tokenizer, or token ids with --ids")
    return tokenizer.encode(text.read_text(encoding="utf-8"))


def measure(
    original: Checkpoint, files: dict[str, Checkpoint], chunks: Chunks, cache: Path | None, threads: int | None
) -> dict[str, Measured]:
    """What is not in the cache is measured, all files in one go."""
    key = hashlib.sha256(chunks.tobytes() + original.fingerprint().encode()).hexdigest()[:16]
    places = {
        name: cache / f"{file.fingerprint()}-{chunks.shape[1]}-{key}.npz" for name, file in files.items() if cache
    }
    missing = [name for name in files if not (name in places and places[name].exists())]
    found: dict[str, Measured] = {}
    if missing:
        ops = float_ops(threads)
        streams = [Stream(files[name], ops, floats=True) for name in missing]
        results = compare(Stream(original, ops, floats=True), streams, chunks)
        for name, r in zip(missing, results, strict=True):
            found[name] = Measured(r.kl, r.same, r.loss - r.reference_loss)
            if name in places:
                places[name].parent.mkdir(parents=True, exist_ok=True)
                np.savez(places[name], **found[name]._asdict())
    for name in files.keys() - found.keys():
        with np.load(places[name]) as kept:
            found[name] = Measured(**kept)
    return found


def table(files: dict[str, Checkpoint], found: dict[str, Measured], to: str) -> Iterator[str]:
    width = max(map(len, files))
    yield (
        f"{'file':{width}}   bits    mean KL +-95 %       99 %   99.9 %    top-1 +-    d ln PPL    "
        f"mean / {to}          99.9 % /             top-1 -"
    )
    base = found[to]
    draws = np.random.default_rng(0).integers(0, len(base.kl), (DRAWS, len(base.kl)))
    for name, file in files.items():
        x = found[name]
        means = x.kl.mean(axis=1)
        tail = f"{np.quantile(x.kl, 0.99):8.4f} {np.quantile(x.kl, 0.999):8.4f}"
        spread = 1.96 * float(means[draws].mean(axis=1).std())
        tops = x.same.mean(axis=1)
        top = f"{100 * x.same.mean():6.2f} {196 * float(tops[draws].mean(axis=1).std()):5.2f}"
        line = f"{name:{width}} {bits_per_weight(file):7.3f}  {x.kl.mean():.6f} {spread:.6f} {tail}  {top}"
        ratio = interval(
            x.kl.mean() / base.kl.mean(), means[draws].mean(axis=1) / base.kl.mean(axis=1)[draws].mean(axis=1)
        )
        tails = [np.quantile(m.kl.astype(np.float32)[draws[:200]].reshape(200, -1), 0.999, axis=1) for m in (x, base)]
        tail_ratio = interval(np.quantile(x.kl, 0.999) / np.quantile(base.kl, 0.999), tails[0] / tails[1])
        gain = 100 * (tops[draws].mean(axis=1) - base.same.mean(axis=1)[draws].mean(axis=1))
        more = interval(100 * (x.same.mean() - base.same.mean()), gain)
        yield f"{line}  {x.delta.mean():+.5f}   {ratio}  {tail_ratio}  {more}"


def interval(value: float, draws: Sequence[float] | Array) -> str:
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{value:6.3f} [{low:6.3f}, {high:6.3f}]"


if __name__ == "__main__":
    main()
