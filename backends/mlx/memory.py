"""Holding MLX to a memory ceiling, and reading back how close it came."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

__all__ = ["Memory", "limit_memory", "used_memory"]

_CACHE_SHARE = 8  # freed buffers that MLX may keep for reuse: at most this part of the budget


class Memory(NamedTuple):
    """What MLX holds, in bytes: arrays in use, freed buffers kept for reuse, and the most ever in use."""

    active: int
    cached: int
    peak: int


def limit_memory(nbytes: int) -> None:
    """Hold MLX to `nbytes`, weights included.

    Beyond the limit MLX waits for running work to free memory before it allocates; it fails only where the system has
    none left. A part of the budget bounds its cache of freed buffers. On Apple Silicon the budget is also wired (macOS
    15 and later), as far as the system lets it, so that a waiting model is not paged out.
    """
    mx.set_memory_limit(nbytes)
    mx.set_cache_limit(nbytes // _CACHE_SHARE)
    if mx.metal.is_available():
        mx.set_wired_limit(min(nbytes, int(mx.device_info()["max_recommended_working_set_size"])))


def used_memory() -> Memory:
    """What MLX holds now. The peak counts from the start of the process, or from `mx.reset_peak_memory()`."""
    return Memory(mx.get_active_memory(), mx.get_cache_memory(), mx.get_peak_memory())
