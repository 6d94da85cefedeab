"""What a matrix reads, as sums over the tokens of a calibration text.

The error that rounding W to V makes in the output is, summed over tokens, the trace of (W - V) H (W - V)^T with
H = sum x x^T: half the Hessian of the squared error, the same for every row of W (Frantar et al., "GPTQ", 2022). The
inputs are those of the model as quantized so far. Beside them the float model's inputs may be given, from which the
weights are corrected for what the inputs have lost already (`rounding.corrected`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np

from edgeq.errors import ModelError
from edgeq.formats.bf16 import Array, Float32

__all__ = ["Hessian"]

DAMPING = 0.01
"""Share of the mean diagonal that is added to the diagonal (GPTQ's `percdamp`)."""

_STRIP = 1024  # columns of a product at a time, so that no sum depends on how BLAS cuts up a larger one


class Hessian:
    """Sums over tokens of x x^T (`gram`, float32 [columns, columns]), x being what a matrix reads, and of
    (x_float - x) x^T (`drift`, the same shape, or None), with the number of tokens.
    """

    def __init__(self, columns: int, *, drift: bool = True) -> None:
        self.columns, self.tokens = columns, 0
        self.gram: Float32 = np.zeros((columns, columns), np.float32)
        self.drift: Float32 | None = np.zeros_like(self.gram) if drift else None

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> Hessian:
        """The same from `arrays()`."""
        made = cls(len(arrays["gram"]), drift=False)
        made.gram, made.drift, made.tokens = arrays["gram"], arrays.get("drift"), int(arrays["tokens"])
        return made

    def arrays(self) -> dict[str, Array]:
        """Everything it holds, by name."""
        drift = {} if self.drift is None else {"drift": self.drift}
        return {"gram": self.gram, "tokens": np.array(self.tokens, np.int64), **drift}

    def add(self, x: Float32, x_float: Float32 | None = None) -> None:
        """Add tokens: x float32 [tokens, columns] of the model as it is so far, and of the float model.

        ModelError where they, or their squares, are not finite.
        """
        self._add(self.gram, x, x)
        if self.drift is not None and x_float is not None:
            self._add(self.drift, x_float - x, x)
        self.tokens += len(x)
        self.__dict__.pop("factor", None)
        self.__dict__.pop("correction", None)
        if not np.isfinite(np.diagonal(self.gram)).all() or (x_float is not None and not np.isfinite(x_float).all()):
            raise ModelError(
                "activations that are NaN, infinite or beyond 1e19 on the calibration text",
                hint="check the source with edgeq eval: it may be damaged",
            )

    @staticmethod
    def _add(total: Float32, left: Float32, right: Float32) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # told by `add`
            for start in range(0, len(total), _STRIP):
                strip = slice(start, start + _STRIP)
                total[strip] += left[:, strip].T @ right

    @property
    def damping(self) -> float:
        """What is added to the diagonal; columns that nothing was read from get only this."""
        mean = float(np.diagonal(self.gram).mean(dtype=np.float64))
        return DAMPING * mean if mean > 0 else 1.0

    def damped(self) -> Float32:
        """`gram` with `damping` on the diagonal: positive definite, whatever was read."""
        h = self.gram.copy()
        h[np.diag_indices(self.columns)] += np.float32(self.damping)
        return h

    @cached_property
    def factor(self) -> Float32:
        """Upper triangular V, float32, V V^T being the damped Hessian: the error is the square of (W - W_rounded) V."""
        backward = self.damped()[::-1, ::-1].astype(np.float64)
        for _ in range(6):  # float32 sums of a text can be indefinite by their own rounding
            try:
                lower = np.linalg.cholesky(backward)
                break
            except np.linalg.LinAlgError:
                backward[np.diag_indices(self.columns)] += self.damping
        else:
            raise ModelError("activations of which no Hessian can be made", hint="give a longer calibration text")
        return np.ascontiguousarray(lower[::-1, ::-1], np.float32)

    @cached_property
    def correction(self) -> Float32 | None:
        """P, float32 [columns, columns], for which W + W P fits the float model's output best; None: nothing to
        correct."""
        if self.drift is None or not self.drift.any():
            return None
        return np.ascontiguousarray(np.linalg.solve(self.damped(), self.drift.T).T)
