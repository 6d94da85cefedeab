"""The native CPU backend: hand-written kernels that read the mapped weights where they are."""

try:
    from edgeq.backends.cpu import _native
except ImportError as error:
    raise ImportError(f"its native kernels are not built ({error}); in a checkout run tools/build_native") from error

from edgeq.backends.cpu.ops import CpuOps

__all__ = ["CpuOps", "_native"]
