"""A group-quantized matrix, as every format that edgeq reads becomes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeAlias, TypeVar

A = TypeVar("A")
B = TypeVar("B")

__all__ = ["Matrix", "QMatrix"]


class QMatrix(NamedTuple, Generic[A]):
    """A group-quantized matrix [out, in]: weight = scale * code + bias.

    codes: uint32 [out, in * bits / 32], every row one little-endian stream of `bits`-bit codes, lowest bit first.
    scales, biases: [out, in / group_size], float16, float32 or bfloat16.

    That is MLX's layout. GGUF's types (edgeq.formats.ggml) leave something out, which takes no memory here either:
    block_scales, block_biases: float16 [out, in / 128 or 256]; scales (biases) are int8 then, in units of these.
    biases None: bias = -zero * scale.
    iq4: a 4-bit code is a place in the table edgeq.formats.affine.IQ4, which has the codes proper, of 8 bits.
    """

    codes: A
    scales: A
    biases: A | None
    bits: int
    group_size: int
    block_scales: A | None = None
    block_biases: A | None = None
    zero: int = 0
    iq4: bool = False

    @property
    def arrays(self) -> list[A]:
        """The arrays that it is made of."""
        return [x for x in (self.codes, self.scales, self.biases, *self[5:7]) if x is not None]

    def map(self, convert: Callable[[A], B]) -> QMatrix[B]:
        """`convert` applied to every array."""

        def optional(x: A | None) -> B | None:
            return None if x is None else convert(x)

        return QMatrix(
            convert(self.codes), convert(self.scales), optional(self.biases), self.bits, self.group_size,
            optional(self.block_scales), optional(self.block_biases), self.zero, self.iq4,
        )  # fmt: skip


Matrix: TypeAlias = A | QMatrix[A]
"""A matrix [out, in]: an array (float32, float16 or bfloat16) or a QMatrix."""
