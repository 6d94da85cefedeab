"""Matrices as GGUF's types and MLX's floating-point modes have them: what QMatrix can do beyond MLX's affine layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from edgeq.formats.affine import pack
from edgeq.formats.bf16 import Array
from edgeq.formats.qmatrix import Mode, QMatrix, TwoLevel, UpperHalves

__all__ = ["FORMS", "Form", "gguf_matrix"]


class Form(NamedTuple):
    bits: int
    group_size: int
    block: int | None  # weights of a unit of scales; None: float16 scales
    biases: bool
    zero: int = 0
    mode: Mode = "affine"


FORMS: Mapping[str, Form] = {
    "Q4_0": Form(4, 32, None, False, 8),
    "Q5_0": Form(5, 32, None, False, 16),
    "Q8_0": Form(8, 32, None, False, 128),
    "Q4_K": Form(4, 32, 256, True),
    "Q4_K, heads moved": Form(4, 32, 128, True),
    "Q5_K": Form(5, 32, 256, True),
    "Q6_K": Form(6, 16, 256, False, 32),
    "Q6_K, heads moved": Form(6, 16, 128, False, 32),
    "Q2_K": Form(2, 16, 256, True),
    "Q2_K, heads moved": Form(2, 16, 128, True),
    "Q3_K": Form(3, 16, 256, False, 4),
    "Q3_K, heads moved": Form(3, 16, 128, False, 4),
    "IQ4_NL": Form(4, 32, None, False, mode="iq4"),
    "IQ4_XS": Form(4, 32, 256, False, mode="iq4"),
    "IQ4_XS, heads moved": Form(4, 32, 128, False, mode="iq4"),
    "mxfp4": Form(4, 32, None, False, mode="mxfp4"),
    "nvfp4": Form(4, 16, None, False, mode="nvfp4"),
    "mxfp8": Form(8, 32, None, False, mode="mxfp8"),
}


def gguf_matrix(rng: np.random.Generator, form: Form, out: int, width: int) -> QMatrix[Array]:
    """Random codes and scales; weights of about unit variance."""
    groups, largest = (out, width // form.group_size), 256 if form.mode == "iq4" else 1 << form.bits
    codes = pack(_codes(rng, form, (out, width)), form.bits)
    if form.mode in _SCALES:
        scales: Array = rng.integers(*_SCALES[form.mode], groups, np.uint8)
        return QMatrix(codes, scales, 0, form.bits, form.group_size, form.mode)
    if form.block is None:
        scales = (4 / largest * rng.uniform(0.5, 1.5, groups)).astype(np.float16)
        return QMatrix(codes, scales, form.zero, form.bits, form.group_size, form.mode)
    blocks = (out, width // form.block)
    units = (4 / largest * rng.uniform(0.02, 0.06, blocks)).astype(np.float16)
    bias_units = rng.uniform(0.01, 0.05, blocks).astype(np.float16)
    if form.biases and form.bits == 2:
        pairs = rng.integers(0, 256, groups, np.uint8)
        return QMatrix(codes, TwoLevel(pairs, 4 * units), UpperHalves(4 * bias_units), form.bits, form.group_size)
    sc = rng.integers(16, 32, groups).astype(np.int8) * rng.choice(np.array([-1, 1], np.int8), groups)
    if not form.biases:
        return QMatrix(codes, TwoLevel(sc, units), form.zero, form.bits, form.group_size, form.mode)
    biases = rng.integers(-63, 1, groups).astype(np.int8)
    return QMatrix(codes, TwoLevel(sc, units), TwoLevel(biases, bias_units), form.bits, form.group_size)


_SCALES: Mapping[Mode, tuple[int, int]] = {"mxfp4": (124, 128), "nvfp4": (1, 60), "mxfp8": (119, 122)}


def _codes(rng: np.random.Generator, form: Form, shape: tuple[int, int]) -> Array:
    codes = rng.integers(0, 1 << form.bits, shape, np.uint8)
    return np.where(codes & 127 == 127, 0, codes) if form.mode == "mxfp8" else codes  # those are NaN
