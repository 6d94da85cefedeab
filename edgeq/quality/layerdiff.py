"""Where two computations of the same model part: embedding, every layer, final norm, logits, in order.

errors = compare(trace(reference.engine, ids), trace(model.engine, ids))
first_above(errors, 1e-9)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.engine import Engine
from edgeq.errors import ModelError
from edgeq.formats.bf16 import Float32
from edgeq.formats.safetensors import SafetensorsFile
from edgeq.model import text
from edgeq.quality.error import nmse

__all__ = ["Trace", "compare", "first_above", "read_trace", "trace"]

Trace = Mapping[str, Float32]
"""What comes out of each step, in order: "embed", "layer.0", ..., "norm" [T, hidden], "logits" [T, vocabulary]."""


def trace(engine: Engine[Any, Any], ids: Sequence[int]) -> Trace:
    """Run `ids` from an empty state, a layer at a time, on the weights and operations that the engine runs."""
    ops, c, weights, state = engine.ops, engine.config, engine.weights.text, engine.state()
    tokens = engine.checked_ids(ids, state)
    angles = ops.rope_angles(ops.array(text.next_positions(state, len(tokens))), c.rope)
    x = text.embed(ops, weights, tokens)
    seen = {"embed": np.array(ops.numpy(x))}
    for i, (layer, before) in enumerate(zip(weights.layers, state.layers, strict=True)):
        x, _ = ops.decoder_layers(x, [layer], c, angles, [[before]], [len(tokens)], [0])
        seen[f"layer.{i}"] = np.array(ops.numpy(x))
    x = ops.rms_norm(x, weights.norm, c.rms_norm_eps)
    seen["norm"] = np.array(ops.numpy(x))
    seen["logits"] = np.array(ops.numpy(text.logits(ops, weights, x)))
    return seen


def read_trace(path: Path) -> tuple[list[int], Trace]:
    """A stored trace (tensors "trace.embed", ...) and the token ids that it is of (tensor "ids")."""
    file = SafetensorsFile(path)
    seen = {name.removeprefix("trace."): file.array(name) for name in file.tensors if name.startswith("trace.")}
    if "ids" not in file.tensors or "embed" not in seen:
        raise ModelError(f"{path} holds no trace", hint="make one with tools/make_fixtures.py")
    return file.array("ids")[: len(seen["embed"])].tolist(), seen


def compare(expected: Trace, found: Trace) -> dict[str, float]:
    """The NMSE of every step, in the order of `found`. Raises ModelError for traces of different models."""
    for name in [*expected, *found]:
        shapes = [one[name].shape if name in one else "nothing" for one in (expected, found)]
        if shapes[0] != shapes[1]:
            raise ModelError(f"the traces do not match in {name}: expected {shapes[0]}, got {shapes[1]}")
    return {name: nmse(expected[name], values) for name, values in found.items()}


def first_above(errors: Mapping[str, float], bound: float) -> str | None:
    """The first step whose error is above `bound`, or not a number."""
    return next((name for name, error in errors.items() if not error <= bound), None)
