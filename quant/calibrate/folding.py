"""Equalization of a block: scale moved from columns that round badly into what makes their inputs (`equalize`).

Where that is exact in this architecture: a norm's gain and all matrices that read it, DeltaNet's gated norm (whose gain
all heads share) and `out_proj`, rows of `v_proj` and the columns of `o_proj` that read them (those of all query heads
of a group: the gate on the output does not mix entries), rows of `up_proj` and columns of `down_proj` (SwiGLU is linear
in `up`). DeltaNet's gates, which are not quantized, read the first norm, too, and are rounded to their type once
more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeq.config import TextConfig
from edgeq.formats.bf16 import Array, Float32, round_to, to_float32
from edgeq.quant.calibrate.equalize import column_factors, fold_norm
from edgeq.quant.calibrate.hessian import Hessian
from edgeq.quant.recipe import QuantSpec
from edgeq.weights import AttentionWeights, DeltaNetWeights, LayerWeights, Role, TensorSpec

__all__ = ["Scalable", "StoredVectors", "fold_block"]

_TOKENS = 4096  # that factors are found on


class StoredVectors(Protocol):
    """Tensors as they are stored, and whether norms have 1 taken off."""

    centred: bool

    def rows(self, name: str, rows: slice, /) -> Array: ...


class Scalable(Protocol):
    """A matrix whose float32 weights [out, in] may be changed."""

    name: str
    weights: Float32


def fold_block(
    c: TextConfig, declared: LayerWeights[TensorSpec, TensorSpec], weights: LayerWeights[Array, Any],
    inputs: Mapping[str, Float32], specs: Mapping[str, QuantSpec], source: StoredVectors,
) -> tuple[LayerWeights[Array, Any], dict[str, Array]]:  # fmt: skip
    """Equalize a block. `inputs` float32 [tokens, in] are what the matrices read, by the name of the first that reads
    them; they and the matrices' weights are changed in place. `specs` are of the matrices to be quantized.

    Returns the weights with new norms, and the tensors that are not quantized and have changed, as they are stored.
    """
    folder = _Folder(inputs, specs, source)
    mlp, declared_mlp = weights.mlp, declared.mlp
    if isinstance(weights.mixer, DeltaNetWeights):
        assert isinstance(declared.mixer, DeltaNetWeights)
        mixer, named = weights.mixer, declared.mixer
        gated = np.arange(c.value_dim) % c.linear_value_head_dim
        norm = folder.norm(named.norm, mixer.norm, {named.out_proj: mixer.out_proj}, gated)
        readers = _pairs(named, mixer, "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
        weights = weights._replace(mixer=mixer._replace(norm=norm))
    else:
        assert isinstance(declared.mixer, AttentionWeights)
        attention, read = weights.mixer, declared.mixer
        heads, channels = np.divmod(np.arange(c.attention_dim), c.head_dim)
        groups = heads // (c.num_attention_heads // c.num_key_value_heads)
        folder.rows(attention.v_proj, attention.o_proj, groups * c.head_dim + channels)
        readers = _pairs(read, attention, "q_proj", "k_proj", "v_proj")
    folder.rows(mlp.up_proj, mlp.down_proj)
    first = folder.norm(declared.input_layernorm, weights.input_layernorm, readers)
    widening = _pairs(declared_mlp, mlp, "gate_proj", "up_proj")
    second = folder.norm(declared.post_attention_layernorm, weights.post_attention_layernorm, widening)
    return weights._replace(input_layernorm=first, post_attention_layernorm=second), folder.changed


def _pairs(declared: Any, weights: Any, *names: str) -> dict[TensorSpec, Any]:
    return {getattr(declared, name): getattr(weights, name) for name in names}


class _Folder:
    def __init__(self, inputs: Mapping[str, Float32], specs: Mapping[str, QuantSpec], source: StoredVectors) -> None:
        self.inputs, self.specs, self.source = inputs, specs, source
        self.changed: dict[str, Array] = {}

    def norm(
        self, norm: TensorSpec, gain: Float32, readers: Mapping[TensorSpec, Scalable],
        share: NDArray[np.intp] | None = None,
    ) -> Float32:  # fmt: skip
        """The gain with scale of its readers' columns in it; column j reads entry share[j] of it, or j."""
        quantized = [w for spec, w in readers.items() if spec.role is not Role.GATE]
        if any(w.name not in self.specs for w in quantized):
            return gain
        factors = self._factors(quantized, share)[: len(gain)]
        centred = self.source.centred and norm.role is Role.NORM
        stored, ratio = fold_norm(self.source.rows(norm.name, slice(None)).reshape(-1), factors, centred=centred)
        if (ratio == 1).all():
            return gain
        columns = ratio if share is None else ratio[share]
        for spec, w in readers.items():
            w.weights *= columns
            if spec.role is Role.GATE:
                self.changed[w.name] = round_to(w.weights, self.source.rows(w.name, slice(0, 1)).dtype)
                w.weights[:] = to_float32(self.changed[w.name])
        self.inputs[quantized[0].name][:] /= columns
        self.changed[norm.name] = stored
        return to_float32(stored) + np.float32(centred)

    def rows(self, writer: Scalable, reader: Scalable, share: NDArray[np.intp] | None = None) -> None:
        """Move scale of the reader's columns to the writer's rows; column j reads row share[j], or j."""
        if writer.name not in self.specs or reader.name not in self.specs:
            return
        columns = self._factors([reader], share)
        rows = columns
        if share is not None:
            rows = np.ones(len(writer.weights), np.float32)
            rows[share] = columns
        reader.weights *= columns
        writer.weights /= rows[:, None]
        self.inputs[reader.name][:] /= columns

    def _factors(self, ws: Sequence[Scalable], share: NDArray[np.intp] | None) -> Float32:
        read = self.inputs[ws[0].name][:_TOKENS]
        h = Hessian(read.shape[1], drift=False)
        h.add(read)
        return column_factors([w.weights for w in ws], h, [self.specs[w.name] for w in ws], share)
