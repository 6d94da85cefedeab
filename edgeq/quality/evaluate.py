"""What a model's numbers cost in predictions: of its weights, of the activations of a backend, and of both.

    for e in evaluate(["q2b"], "Qwen/Qwen3.5-2B", backend="cpu"):
        e.what, e.divergence.mean        # "weights", "activations", "whole"

"weights": the weights written out in float32, float32 activations, against the reference. "whole": as the model runs on
the backend, with its activations (8 bits on the native one) and its cache of keys and values. "activations": the
backend's against the float32 run of the same weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.adapters import adapted, given_adapters
from edgeq.backends import select
from edgeq.backends.floats import float_ops
from edgeq.backends.ops import Ops
from edgeq.checkpoint import Checkpoint, open_checkpoint
from edgeq.errors import UsageError
from edgeq.hub import find_model
from edgeq.quality.calibration import NAME, default_ids, split, text_ids
from edgeq.quality.kld import Comparison, Divergence, Perplexity, Progress, compare_pairs, cut, perplexity
from edgeq.quality.stream import Chunks, Stream

__all__ = ["Evaluation", "Text", "evaluate", "evaluate_perplexity", "open_model", "read_text"]

KV_DTYPES = {16: "f16", 8: "int8", 4: "int4"}  # by bits


@dataclass(frozen=True, slots=True)
class Text:
    """What is predicted: token ids int32 [n, context], and what they are in a few words."""

    name: str
    chunks: Chunks


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One measurement of `model`: what of it ("weights", "activations" or "whole"), on which backend ("float32": none
    of its own), with which type of cache, and what was found at every position."""

    model: str
    what: str
    backend: str
    kv: str
    found: Comparison

    @property
    def divergence(self) -> Divergence:
        """The figures."""
        return self.found.divergence


def open_model(model: str | Path, adapter: Sequence[str | Path] | str | Path | None = None) -> Checkpoint:
    """A checkpoint by whatever `edgeq.load` takes, with adapters merged."""
    checkpoint = open_checkpoint(find_model(model))
    return checkpoint if adapter is None else adapted(checkpoint, given_adapters(adapter))


def read_text(
    checkpoint: Checkpoint, text: str | None, context: int, chunks: int | None, *, name: str = "text"
) -> Text:
    """`text` by the tokenizer of `checkpoint`, cut into at most so many chunks. Without one: what the text that ships
    with edgeq holds out of calibration, or random tokens for a checkpoint that has no tokenizer."""
    if text is not None:
        return Text(name, cut(text_ids(checkpoint, text), context, chunks))
    if checkpoint.tokenizer() is None:
        ids = np.random.default_rng(0).integers(0, checkpoint.config.text.vocab_size, context * (chunks or 8))
        return Text("random tokens", cut(ids, context, chunks))
    _, held = split(default_ids(checkpoint))
    return Text(f"{NAME}, held out", cut(held.reshape(-1), min(context, held.size), chunks))


def evaluate(
    models: Sequence[str | Path], reference: str | Path, *, text: str | None = None, context: int = 512,
    chunks: int | None = 8, backend: str | None = None, kv_bits: int | None = None, threads: int | None = None,
    apart: bool = True, adapter: Any = None, reference_adapter: Any = None, reference_backend: str | None = None,
    progress: Progress | None = None,
) -> tuple[Text, list[Evaluation]]:  # fmt: skip
    """Each of `models` against `reference`, names as `edgeq.load` takes them, GGUF and MLX files included.

    text: what to predict; None is edgeq's own (see `read_text`). context, chunks: how it is cut.
    backend: None measures the weights alone; a backend's name, or "auto", the model as it runs there, with a cache of
    `kv_bits`, and with `apart` the weights and the activations beside it. reference_backend: where the reference runs;
    None is float32, whatever it is stored in.
    progress(done, total): called after every step.

    One layer of every model is in memory at a time (see `edgeq.quality.stream`). Raises UsageError for models that
    cannot be compared and settings that make no sense, ModelError for damaged files.
    """
    _check_kv_bits(kv_bits, backend)
    original = open_model(reference, reference_adapter)
    read = read_text(original, text, context, chunks)
    opened = [open_model(model, adapter) for model in models]
    for checkpoint in opened:
        _warn_of_other_tokens(original, checkpoint, read)
    floats = float_ops(threads)
    expected: Stream[Any, Any] = Stream(original, floats, floats=True)
    if reference_backend is not None:
        expected = Stream(original, _selected(reference_backend, threads))
    ops = None if backend is None else _selected(backend, threads, kv_bits)
    streams, asked = [expected], list[tuple[str, str, int, int]]()  # model, what, reference's place, its own
    for name, checkpoint in zip(map(str, models), opened, strict=True):
        weights = running = len(streams)
        if ops is None or apart:
            streams.append(Stream(checkpoint, floats, floats=True))
            asked.append((name, "weights", 0, weights))
        if ops is not None:
            running = len(streams)
            streams.append(Stream(checkpoint, ops))
            if apart:
                asked.append((name, "activations", weights, running))
            asked.append((name, "whole", 0, running))
    found = compare_pairs(streams, [(p, q) for _, _, p, q in asked], read.chunks, progress)
    return read, [
        Evaluation(name, what, "float32" if streams[q].floats else streams[q].ops.name, streams[q].ops.kv_dtype, one)
        for (name, what, _, q), one in zip(asked, found, strict=True)
    ]


def _warn_of_other_tokens(original: Checkpoint, model: Checkpoint, read: Text) -> None:
    """A warning where a model's own tokenizer reads the beginning of what is predicted as other tokens."""
    theirs, own = original.tokenizer(), model.tokenizer()
    if theirs is None or own is None:
        return
    text = theirs.decode(read.chunks[0].tolist())
    if own.encode(text) != theirs.encode(text):
        warnings.warn(
            f"{model.path}: its tokenizer is not that of {original.path}, whose tokens both are given: with its own it "
            "predicts otherwise",
            stacklevel=3,
        )


def evaluate_perplexity(
    model: str | Path, *, text: str | None = None, context: int = 512, chunks: int | None = 8,
    backend: str | None = None, kv_bits: int | None = None, threads: int | None = None, adapter: Any = None,
    progress: Progress | None = None,
) -> tuple[Text, Perplexity]:  # fmt: skip
    """How well a model predicts a text, by its weights alone or as it runs on `backend`; settings as of `evaluate`."""
    _check_kv_bits(kv_bits, backend)
    checkpoint = open_model(model, adapter)
    read = read_text(checkpoint, text, context, chunks)
    ops = float_ops(threads) if backend is None else _selected(backend, threads, kv_bits)
    return read, perplexity(Stream(checkpoint, ops, floats=backend is None), read.chunks, progress)


def _selected(backend: str, threads: int | None, kv_bits: int | None = None) -> Ops[Any, Any]:
    kv_dtype = None if kv_bits is None else KV_DTYPES[kv_bits]
    return select(None if backend == "auto" else backend, threads=threads, kv_dtype=kv_dtype)


def _check_kv_bits(kv_bits: int | None, backend: str | None) -> None:
    if kv_bits is not None and kv_bits not in KV_DTYPES:
        raise UsageError(f"keys and values cannot be kept in {kv_bits} bits", hint="choose 16, 8 or 4 bits")
    if kv_bits is not None and backend is None:
        raise UsageError(
            f"keys and values in {kv_bits} bits are a backend's, and none was named",
            hint="add `--backend auto` (backend='auto' in Python)",
        )
