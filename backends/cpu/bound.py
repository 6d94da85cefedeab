"""Weights as the kernels take them: checked and turned into pointers once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from edgeq.backends.cpu import _native
from edgeq.bf16 import Array
from edgeq.weights import AttentionWeights, DeltaNetWeights, Matrix, MLPWeights, QMatrix

__all__ = ["Bound", "attention", "delta_net", "matrix", "mlp", "storage"]

W = TypeVar("W")


class Bound(Generic[W]):
    """Native forms by the identity of one of their arrays, made when first asked for and forgotten with it.

    `make` must hold views of the arrays, not the arrays: a view keeps the mapped file, but not the weight.
    """

    def __init__(self, make: Callable[[W], Any]) -> None:
        self._make = make
        self._made: dict[int, tuple[Any, weakref.ref[Array]]] = {}

    def __call__(self, key: Array, weights: W) -> Any:
        if found := self._made.get(id(key)):
            return found[0]
        native = self._make(weights)
        if key.base is not None:  # else a view of it would keep it, and be kept, for ever
            address, forget = id(key), self._made.pop
            self._made[address] = native, weakref.ref(key, lambda _: forget(address, None))
        return native


def storage(w: Matrix[Array]) -> Array:
    """The array that stands for a matrix."""
    return w.codes if isinstance(w, QMatrix) else w


def matrix(w: Matrix[Array]) -> Any:
    if isinstance(w, QMatrix):
        return _native.Matrix(w.codes.view(), w.scales.view(), w.biases.view(), w.bits, w.group_size)
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
