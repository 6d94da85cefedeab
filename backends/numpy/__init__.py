"""The NumPy backend: the readable, executable specification, in float32."""

from edgeq.backends.numpy.ops import ArrayOps, NumpyOps

__all__ = ["ArrayOps", "NumpyOps"]
