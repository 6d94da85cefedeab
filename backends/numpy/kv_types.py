"""What each type of KV cache keeps of a vector. The native backend packs the same numbers (backends/cpu/layers)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgeq.errors import UsageError
from edgeq.formats.bf16 import Float32, round_to, to_float32

__all__ = ["GROUP", "KEPT", "check_kv_dtype", "kept_int4", "kept_int8", "rotated"]

GROUP = 32  # entries of a rotated vector that share a scale


def rotated(x: Float32) -> Float32:
    """The orthonormal Walsh-Hadamard transform of the last axis, in blocks of the largest power of two that divides it.

    It is its own inverse and keeps inner products. A channel that is larger than all others becomes a part of every
    entry, so a coarse grid need not span what one channel reaches (Ashkboos et al., "QuaRot", arXiv:2404.00456).
    """
    width = x.shape[-1]
    block, step, y = width & -width, 1, x.astype(np.float32)
    while step < block:
        pairs = y.reshape(*x.shape[:-1], width // (2 * step), 2, step)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        y = np.stack([first + second, first - second], axis=-2).reshape(x.shape)
        step *= 2
    return y * np.float32(1 / np.sqrt(np.float32(block)))


def kept_int8(x: Float32) -> Float32:
    """Multiples of a float32 scale, of which the largest entry of the vector is 127."""
    largest = np.abs(x).max(axis=-1, keepdims=True, initial=0)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    return np.asarray(np.rint(x * inverse) * (largest / np.float32(127)))


def kept_int4(x: Float32) -> Float32:
    """-8 to 7 times a float16 scale for GROUP entries of the rotated vector, rotated back.

    The entry farthest from zero is -8, whatever its sign: the scale takes that. Gaussian vectors: NMSE 0.0076.
    """
    return rotated(_rounded_to_4_bits(rotated(x)))


def _rounded_to_4_bits(x: Float32) -> Float32:
    width, count = x.shape[-1], -(-x.shape[-1] // GROUP)
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count * GROUP - width)])
    groups = padded.reshape(*x.shape[:-1], count, GROUP)
    farthest = np.take_along_axis(groups, np.abs(groups).argmax(axis=-1, keepdims=True), axis=-1)
    scales = np.clip(farthest / np.float32(-8), -65504, 65504).astype(np.float16).astype(np.float32)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    codes = np.clip(np.rint(groups * inverse), -8, 7)
    return np.asarray((codes * scales).reshape(padded.shape)[..., :width])


def _kept_f16(x: Float32) -> Float32:
    return np.clip(x, -65504, 65504).astype(np.float16).astype(np.float32)


def _kept_bf16(x: Float32) -> Float32:
    return to_float32(round_to(x, np.uint16))


KEPT: dict[str, Callable[[Float32], Float32]] = {
    "f32": lambda x: x, "f16": _kept_f16, "bf16": _kept_bf16, "int8": kept_int8, "int4": kept_int4,
}  # fmt: skip
"""By the type's name: what is left of vectors [..., D]."""


def check_kv_dtype(name: str) -> str:
    """`name` as a type of cache entries, or a UsageError."""
    if name not in KEPT:
        raise UsageError(f"unknown KV cache type {name!r}", hint=f"use one of {', '.join(KEPT)}")
    return name
