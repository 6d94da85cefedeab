"""Matrices as GGUF's types have them (edgeq.formats.ggml): what QMatrix can do beyond MLX's layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from edgeq.formats.affine import pack
from edgeq.formats.bf16 import Array
from edgeq.formats.qmatrix import QMatrix, TwoLevel

__all__ = ["FORMS", "Form", "gguf_matrix"]


class Form(NamedTuple):
    bits: int
    group_size: int
    block: int | None  # weights of a unit of scales; None: float16 scales
    biases: bool
    zero: int = 0
    iq4: bool = False


FORMS: Mapping[str, Form] = {
    "Q4_0": Form(4, 32, None, False, 8),
    "Q5_0": Form(5, 32, None, False, 16),
    "Q8_0": Form(8, 32, None, False, 128),
    "Q4_K": Form(4, 32, 256, True),
    "Q4_K, heads moved": Form(4, 32, 128, True),
    "Q5_K": Form(5, 32, 256, True),
    "Q6_K": Form(6, 16, 256, False, 32),
    "Q6_K, heads moved": Form(6, 16, 128, False, 32),
    "IQ4_NL": Form(4, 32, None, False, 128, True),
    "IQ4_XS": Form(4, 32, 256, False, 128, True),
    "IQ4_XS, heads moved": Form(4, 32, 128, False, 128, True),
}


def gguf_matrix(rng: np.random.Generator, form: Form, out: int, width: int) -> QMatrix[Array]:
    """Random codes and scales; weights of about unit variance."""
    groups, step = (out, width // form.group_size), 4 / (1 << (8 if form.iq4 else form.bits))
    codes = pack(rng.integers(0, 1 << form.bits, (out, width)), form.bits)
    if form.block is None:
        scales = (step * rng.uniform(0.5, 1.5, groups)).astype(np.float16)
        return QMatrix(codes, scales, form.zero, form.bits, form.group_size, form.iq4)
    blocks = (out, width // form.block)
    sc = rng.integers(16, 32, groups).astype(np.int8) * rng.choice(np.array([-1, 1], np.int8), groups)
    units = (step * rng.uniform(0.02, 0.06, blocks)).astype(np.float16)
    if not form.biases:
        return QMatrix(codes, TwoLevel(sc, units), form.zero, form.bits, form.group_size, form.iq4)
    biases, bias_units = (
        rng.integers(-63, 1, groups).astype(np.int8),
        rng.uniform(0.01, 0.05, blocks).astype(np.float16),
    )
    return QMatrix(codes, TwoLevel(sc, units), TwoLevel(biases, bias_units), form.bits, form.group_size)
