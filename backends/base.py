"""What a backend starts from: the larger pieces in terms of the small operations, as the model's layers spell them."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from edgeq.backends.ops import ArrayLike, Ops
from edgeq.formats.bf16 import Array, Float32
from edgeq.model import layers, vision

__all__ = ["BaseOps"]

A = TypeVar("A", bound=ArrayLike)
M = TypeVar("M")


class BaseOps(Ops[A, M]):
    """Operations of which only the small ones are left to define. What is overridden must agree with what is here."""

    def embedding_bag(self, table: M, ids: Array, weights: Float32) -> A:
        total = np.float32(0)
        for column, weight in zip(np.ascontiguousarray(ids.T), weights.T, strict=True):
            total = total + self.numpy(self.embed(table, self.array(column))) * weight[:, None]
        return self.array(np.asarray(total))

    def read_out(self, x: A, head: M) -> tuple[Float32, bool]:
        logits = self.numpy(self.linear(x, head))
        return logits, bool(np.isfinite(logits.sum()) or np.isfinite(logits).all())  # one pass where all is well

    mlp = layers.mlp
    delta_net = layers.delta_net
    gated_attention = layers.gated_attention
    decoder_layers = layers.decoder_layers
    decoder = layers.decoder
    vision_blocks = vision.vision_blocks
