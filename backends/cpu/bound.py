"""Weights as the kernels take them: checked and turned into pointers once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np

from edgeq.backends.cpu import _native
from edgeq.formats.bf16 import Array
from edgeq.weights import AttentionWeights, DeltaNetWeights, Matrix, MLPWeights, QMatrix

__all__ = ["Bound", "attention", "delta_net", "matrix", "mlp"]

W = TypeVar("W")


class Bound(Generic[W]):
    """Native forms of weights, made when first asked for and forgotten as soon as one of the arrays goes.

    They are found by the identity of all their arrays: weights that differ in a single one are others. `make` must
    hold views of the arrays, not the arrays: a view keeps the mapped file, but not the weight.
    """

    def __init__(self, make: Callable[[W], Any]) -> None:
        self._make = make
        self._made: dict[tuple[int, ...], tuple[Any, list[weakref.ref[Array]]]] = {}

    def __call__(self, weights: W) -> Any:
        arrays = leaves(weights)
        key = tuple([id(x) for x in arrays])
        if found := self._made.get(key):
            return found[0]
        native = self._make(weights)
        if all(x.base is not None for x in arrays):  # else a view of it would keep it, and be kept, for ever
            self._made[key] = native, [weakref.ref(x, lambda _: self._made.pop(key, None)) for x in arrays]
        return native


def leaves(weights: Any) -> list[Array]:
    """The arrays of a matrix or of a tuple of matrices and vectors."""
    if isinstance(weights, np.ndarray):
        return [weights]
    arrays: list[Array] = []
    for part in (weights,) if isinstance(weights, QMatrix) else weights:
        if isinstance(part, QMatrix):
            arrays += part.arrays
        else:
            arrays.append(part)
    return arrays


def matrix(w: Matrix[Array]) -> Any:
    if isinstance(w, QMatrix):
        return _native.Matrix(*w.map(lambda x: x.view()))
    return _native.Matrix(w.view())


def mlp(w: MLPWeights[Array]) -> Any:
    return _native.Mlp(*map(matrix, w))


def delta_net(w: DeltaNetWeights[Array]) -> Any:
    projections = map(matrix, (w.in_proj_qkv, w.in_proj_z, w.in_proj_b, w.in_proj_a))
    vectors = (x.view() for x in (w.conv, w.decay, w.dt_bias, w.norm))
    return _native.DeltaNet(*projections, *vectors, matrix(w.out_proj))


def attention(w: AttentionWeights[Array]) -> Any:
    projections = map(matrix, (w.q_proj, w.k_proj, w.v_proj, w.o_proj))
    return _native.GatedAttention(*projections, w.q_norm.view(), w.k_norm.view())
