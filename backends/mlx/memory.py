"""Holding MLX to a memory ceiling, and reading back how close it came."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

__all__ = ["Memory", "limit_memory", "used_memory"]

_CACHE_SHARE = 8  # freed buffers that MLX may keep for reuse: at most this part of the budget,
_CACHE_MOST = 512 << 20  # and never more than this


class Memory(NamedTuple):
    """What MLX holds, in bytes: arrays in use, freed buffers kept for reuse, and the most ever in use."""

    active: int
    cached: int
    peak: int


def limit_memory(nbytes: int | None = None) -> None:
    """Hold MLX to `nbytes`, weights included; None is what macOS recommends for its GPU, or elsewhere MLX's own limits.

    Beyond the limit MLX waits for running work to free memory before it allocates; it fails only where the system has
    none left. A part of the budget bounds its cache of freed buffers. On Apple Silicon the budget is also wired (macOS
    15 and later), as far as the system lets it, so that a waiting model is not paged out.
    """
    most = int(mx.device_info(mx.Device(mx.gpu))["max_recommended_working_set_size"]) if _on_metal() else None
    nbytes = nbytes or most
    if nbytes is None:
        return
    mx.set_memory_limit(nbytes)
    mx.set_cache_limit(min(nbytes // _CACHE_SHARE, _CACHE_MOST))
    if most is not None:
        mx.set_wired_limit(min(nbytes, most))


def _on_metal() -> bool:
    return bool(mx.metal.is_available())


def used_memory() -> Memory:
    """What MLX holds now. The peak counts from the start of the process, or from `mx.reset_peak_memory()`."""
    return Memory(mx.get_active_memory(), mx.get_cache_memory(), mx.get_peak_memory())
