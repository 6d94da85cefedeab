"""The frequencies of rotary position embeddings, and the axis that each of them follows.

Computed as transformers does it, in float32 at every step: a frequency that is one rounding off turns a token at
position 200,000 by 0.01 radians.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, floor, log, pi

import numpy as np
from numpy.typing import NDArray

from edgeq.config import RopeConfig, Yarn
from edgeq.formats.bf16 import Float32

__all__ = ["axes", "frequencies"]


@lru_cache(maxsize=16)
def frequencies(rope: RopeConfig) -> Float32:
    """Radians for each position, float32 [dim / 2]; read-only."""
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    wavelengths = (np.float64(rope.theta) ** exponents.astype(np.float64)).astype(np.float32)
    plain = np.float32(1) / wavelengths
    if rope.scaling is None:
        found = plain
    elif isinstance(rope.scaling, Yarn):
        stretched = np.float32(1) / (np.float32(rope.scaling.factor) * wavelengths)
        keep = np.float32(1) - _ramp(rope, rope.scaling)
        found = stretched * (np.float32(1) - keep) + plain * keep
    else:
        found = plain / np.float32(rope.scaling.factor)
    found.flags.writeable = False
    return found


def _ramp(rope: RopeConfig, yarn: Yarn) -> Float32:
    """How far each frequency is stretched, 0 to 1: not at all where it turns `beta_fast` times or more within the
    original context, wholly where it turns `beta_slow` times or less (Peng et al., "YaRN", arXiv:2309.00071, 3.2)."""

    def turning(times: float) -> float:
        """The (fractional) pair that turns so many times within the original context."""
        return rope.dim * log(yarn.original_context / (times * 2 * pi)) / (2 * log(rope.theta))

    low, high = turning(yarn.beta_fast), turning(yarn.beta_slow)
    if yarn.truncate:
        low, high = floor(low), ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    pairs = np.arange(rope.dim // 2, dtype=np.float32)
    ramp: Float32 = np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1)
    return ramp


@lru_cache(maxsize=16)
def axes(rope: RopeConfig) -> NDArray[np.intp]:
    """Which of time (0), height (1) and width (2) each frequency follows, [dim / 2]: interleaved mRoPE."""
    axis = np.zeros(rope.dim // 2, np.intp)
    for i in (1, 2):
        axis[i : 3 * rope.sections[i] : 3] = i
    return axis
