"""One line instead of a silent death when a model's file is cut short while it is in use.

Weights are read from mapped files. If one is truncated meanwhile, or its disk fails, the system ends the process by
SIGBUS. The command line calls `guard_mapped_files`; a program that uses edgeq as a library may, and keeps its own
handler for every other SIGBUS. Without the native kernels there is no guard.
"""

from __future__ import annotations

from edgeq.formats.mapped import set_guard

__all__ = ["guard_mapped_files"]


class _NativeGuard:
    """The handler of the native kernels; ImportError or AttributeError where they are missing or of another build."""

    def __init__(self) -> None:
        from edgeq.backends.cpu import _native

        _native.guard_install()
        self.add = _native.guard_add
        self.forget = _native.guard_forget
        self.hit = _native.guard_hit
        self.zeros = _native.guard_zeros


def guard_mapped_files() -> bool:
    """Name the file and leave with exit code 4 when a mapped file cannot be read; False if there is no guard here.

    `quantize` and the exports raise ModelError instead, and leave nothing behind.
    """
    try:
        guard = _NativeGuard()
    except (ImportError, AttributeError):
        return False
    set_guard(guard)
    return True
