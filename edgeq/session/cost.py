"""How long pictures will take, before the work begins.

The multiplications of the tower and of the language model are counted, and how many of each the machine does in a
second is measured on one block of the tower and one matrix of the model. The rest comes on top, as a share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any

import numpy as np

from edgeq.config import VisionConfig
from edgeq.engine import Engine
from edgeq.model.vision import vision_angles
from edgeq.vision.visual import Visual
from edgeq.weights import TensorSpec, declare_text, declare_vision, leaves

__all__ = ["seconds_to_see"]

ROWS = 256  # of the products that are timed
TOWER, TEXT = 0.9, 1.4  # whole time over that of the products, as the CPU backend has it for 600 to 4,096 patches


def seconds_to_see(engine: Engine[Any, Any], visuals: Sequence[Visual], *, known: int = 0) -> float:
    """Seconds that some pictures take: through the tower, and as tokens through the language model.

    known: temporal patches of them, the first ones, that the tower has been through already.
    """
    vision = engine.checkpoint.config.vision
    frames = [visual.grid[1] * visual.grid[2] for visual in visuals for _ in range(visual.frames)]
    if vision is None or not frames:
        return 0.0
    tower = sum(_tower_products(vision, patches) for patches in frames[known:])
    text = sum(visual.tokens for visual in visuals) * _text_products(engine)
    seconds = TEXT * text / _text_rate(engine)
    return seconds + TOWER * tower / _tower_rate(engine, vision) if tower else seconds


def _text_products(engine: Engine[Any, Any]) -> int:
    """Multiplications for a token of a prompt, without attention and the head."""
    return sum(spec.size for layer in declare_text(engine.config).layers for spec in _matrices(layer))


def _tower_products(c: VisionConfig, patches: int) -> int:
    """Multiplications for a frame: every matrix for each patch or token, and attention among all patches."""
    tree, tokens = declare_vision(c), patches // c.spatial_merge_size**2
    per_patch = sum(spec.size for block in tree.blocks for spec in _matrices(block))
    per_token = sum(spec.size for spec in _matrices(tree.merger))
    return patches * (per_patch + 2 * patches * c.hidden_size * c.depth) + tokens * per_token


def _matrices(tree: Any) -> Iterator[TensorSpec]:
    return (spec for spec in leaves(tree) if spec.is_matrix)


def _text_rate(engine: Engine[Any, Any]) -> float:
    ops, c, weight = engine.ops, engine.config, engine.weights.text.layers[0].mlp.gate_proj
    x = ops.array(np.ones((ROWS, c.hidden_size), np.float32))
    return _rate(lambda: ops.numpy(ops.linear(x, weight)), c.hidden_size * c.intermediate_size)


def _tower_rate(engine: Engine[Any, Any], c: VisionConfig) -> float:
    ops, weights = engine.ops, engine.weights.vision
    assert weights is not None, "only a model that sees is asked"
    x, angles = ops.array(np.ones((ROWS, c.hidden_size), np.float32)), vision_angles(ops, c, (1, 16, ROWS // 16))
    block = sum(spec.size for spec in _matrices(declare_vision(c).blocks[0])) + 2 * ROWS * c.hidden_size
    return _rate(lambda: ops.numpy(ops.vision_blocks(x, weights.blocks[:1], c, angles, [ROWS])), block)


def _rate(product: Callable[[], Any], size: int) -> float:
    """Multiplications in a second by a matrix of `size` weights: the best of a few, of which the first finds pages."""
    best = float("inf")
    for _ in range(4):
        started = perf_counter()
        product()
        best = min(best, perf_counter() - started)
    return ROWS * size / max(best, 1e-9)
