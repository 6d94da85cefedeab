"""What codes stand for where they are no integers, and scales of 8 bits.

* IQ4: ggml's non-linear table of 4-bit codes (ggml/src/ggml-common.h: kvalues_iq4nl).
* E2M1, E4M3, E8M0: the 4-bit and 8-bit floating-point numbers, and the powers of two, of the OCP Microscaling Formats
  specification 1.0, sections 5.3 and 5.4. MLX's modes mxfp4 and mxfp8 and ggml's MXFP4 have E8M0 scales for groups of
  32; nvfp4 has E4M3 ones for groups of 16. E4M3 has no infinity, and one NaN for each sign.
* E5M2: the other 8-bit floating-point numbers there, with infinity and NaN as IEEE 754 has them.

As MLX computes it, the E8M0 scale 255 is infinity, not NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgeq.formats.bf16 import Array, Float32
from edgeq.formats.qmatrix import Mode

__all__ = ["E2M1", "E4M3", "E5M2", "E8M0", "IQ4", "SCALES", "VALUES"]


def _float8(fraction_bits: int, bias: int, beyond: Sequence[float]) -> Float32:
    """What 256 codes stand for, the negative ones behind the others; `beyond` are the largest, which are no numbers."""
    ones = 1 << fraction_bits
    exponent, fraction = np.divmod(np.arange(128), ones)
    significand = np.where(exponent > 0, ones + fraction, fraction)
    magnitudes = np.ldexp(significand, np.maximum(exponent, 1) - bias - fraction_bits)
    magnitudes[128 - len(beyond) :] = beyond
    return np.concatenate([magnitudes, -magnitudes]).astype(np.float32)


IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
E2M1: Float32 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
E4M3 = _float8(3, 7, [np.nan])
E5M2 = _float8(2, 15, [np.inf, np.nan, np.nan, np.nan])
E8M0: Float32 = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.inf)).astype(np.float32)

VALUES: Mapping[Mode, Array] = {"iq4": IQ4, "mxfp4": E2M1, "nvfp4": E2M1, "mxfp8": E4M3}
"""What a code stands for, by mode."""

SCALES: Mapping[Mode, Float32] = {"mxfp4": E8M0, "nvfp4": E4M3, "mxfp8": E8M0}
"""What a scale of 8 bits stands for, by mode."""
