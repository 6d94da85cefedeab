"""The MLX backend: Apple Silicon's GPU, and with the same code NVIDIA's (CUDA) and any CPU."""

from edgeq.backends.mlx.memory import Memory, limit_memory, used_memory
from edgeq.backends.mlx.ops import MlxOps

__all__ = ["Memory", "MlxOps", "limit_memory", "used_memory"]
