"""The pass over the model: block after block, each matrix rounded for the inputs that it will have.

Two streams of hidden states go through the model together, all calibration tokens of both: the float model's, and that
of the model as quantized so far. A block is run by the float model first, which records what every matrix is multiplied
by, and then by the model as it is: as each matrix is met, its inputs are there for all tokens, those of the float model
beside them, so it is solved and the block goes on with what it has become (`taps`). Whatever shares an input shares a
Hessian. Only one block's weights are ever in memory; the next block begins with the two streams, which the working
folder keeps.

The head is solved from the float model's last hidden states. Where it is the embedding too it comes first, because the
second stream begins with the embedding as quantized; else it comes last, and sees both streams.

The order of sums is fixed by the shapes: results do not depend on whether a run was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeq.checkpoint import Checkpoint
from edgeq.errors import ModelError
from edgeq.formats.bf16 import Array, Float32
from edgeq.model import layers, mtp, text
from edgeq.quant.calibrate.folding import StoredVectors, fold_block
from edgeq.quant.calibrate.hessian import Hessian
from edgeq.quant.calibrate.taps import Listener, TappedOps, row_blocks
from edgeq.quant.calibrate.workspace import SolvedMatrix, Workspace
from edgeq.quant.recipe import QuantSpec
from edgeq.state import Rows
from edgeq.weights import LayerWeights, TensorSpec, declare_mtp, declare_text, leaves, map_tree

__all__ = ["Calibrator", "Recorded", "Rounder", "SourceMatrix", "matrices", "shares_inputs"]

_FLOAT_TOKENS = 4096  # of the float model's pass at a time
_MTP_TOKENS = 4096  # of one sequence, that the MTP head is calibrated on
_ROUNDED_AT_ONCE = 1 << 25  # weights of a matrix
_SLOWER = 8.0  # rounding is, by multiplication, than a product
_ROWS = 1024  # that a rounder may take together: blocks of a matrix are multiples of it

Told = Callable[[float, str], None]
"""Told of work that is done, in multiplications, and what it was."""


class Rounder(Protocol):
    """Turns rows of a matrix, float32 [rows, in], into what is kept of them; `h` is None where nothing is known of its
    inputs, as for an embedding that is looked up alone."""

    def __call__(self, name: str, w: Float32, h: Hessian | None, /) -> SolvedMatrix: ...


class Recorded(NamedTuple):
    """What some matrices are multiplied by: inputs float32 [tokens, in]."""

    by: tuple[SourceMatrix, ...]
    inputs: Float32


class SourceMatrix:
    """A matrix of the source, and, once it is solved, of the result: what `TappedOps` multiplies by.

    With `held`, its float32 weights stay in memory until it is solved.
    """

    def __init__(self, checkpoint: Checkpoint, spec: TensorSpec, *, held: bool) -> None:
        self.name, self.shape = spec.name, (spec.shape[0], prod(spec.shape[1:]))
        self._checkpoint = checkpoint
        self._held: Float32 | None = self._read(slice(None)) if held else None
        self.solved: SolvedMatrix | None = None

    @property
    def weights(self) -> Float32:
        """The float32 weights, while they are held."""
        assert self._held is not None
        return self._held

    @weights.setter
    def weights(self, weights: Float32) -> None:
        self._held = weights

    def float_rows(self, rows: slice | Array) -> Float32:
        """Rows of the source's matrix."""
        return self._read(rows) if self._held is None else self._held[rows]

    def rows(self, rows: slice | Array) -> Float32:
        """Rows as they are by now."""
        if self.solved is None:
            return self.float_rows(rows)
        return self.solved.rows(rows)

    def settle(self, solved: SolvedMatrix) -> None:
        """From now on it is what was solved; the float weights go."""
        self.solved, self._held = solved, None

    def _read(self, rows: slice | Array) -> Float32:
        w = self._checkpoint.rows(self.name, rows)
        if not np.isfinite(w).all():
            raise ModelError(
                f"{self._checkpoint.path}: {self.name} holds NaN or infinity", hint="download or copy the file again"
            )
        return w


class Calibrator:
    """Calibrates the matrices of `checkpoint` that `specs` names, on `ids` int32 [windows, context].

    `rounder` decides what a matrix becomes, given its rows, a multiple of 1,024 of them after the other where they are
    many, and the Hessian of its inputs. With `asymmetric`, inputs are those of the model as quantized so far, and the
    Hessian has the drift from the float model's; without, they are the float model's, and its pass is the only one.
    With `equalize`, which has the tensors as stored, blocks are equalized first (`folding`); tensors that change with
    it and are not quantized are kept under the block's name in the working folder.
    """

    def __init__(
        self, checkpoint: Checkpoint, ops: TappedOps, ids: NDArray[np.int32], specs: Mapping[str, QuantSpec],
        rounder: Rounder, work: Workspace, *, asymmetric: bool, told: Told, equalize: StoredVectors | None = None,
    ) -> None:  # fmt: skip
        self.checkpoint, self.c, self.ops, self.ids = checkpoint, checkpoint.config.text, ops, ids
        self.specs, self.rounder, self.work = specs, rounder, work
        self.asymmetric, self.told, self.equalize = asymmetric, told, equalize
        self.declared = declare_text(self.c)
        self.tied = self.declared.lm_head is self.declared.embed_tokens

    def run(self) -> None:
        """Solve every matrix that is wanted into the working folder."""
        head, table = self.matrix(self.declared.lm_head), self.matrix(self.declared.embed_tokens)
        if self.tied and self.asymmetric and not self._is_solved(head.name):
            self._solve([head], self.float_hidden(), None)
        if not self.tied and not self._is_solved(table.name):
            self._keep(table, None)
        streams = self._streams_at_start()
        start = int(streams.pop("block"))
        exact, x = streams["float"], streams["quantized"]
        for i in range(start, len(self.declared.layers)):
            exact, x = self._block(i, exact, x)
            self.work.keep_arrays("streams", {"block": np.array(i + 1), "float": exact, "quantized": x})
        norm = self.checkpoint.dense(self.declared.norm.name)
        exact, x = (self.ops.rms_norm(y, norm, self.c.rms_norm_eps) for y in (exact, x))
        if not self._is_solved(head.name):
            self._solve([head], x, exact if self.asymmetric else None)
        if any(name.startswith("mtp.") for name in self.specs):
            self._mtp(exact, x)

    def expected(self) -> float:
        """About the work that `run` is going to tell of."""
        work: float
        tokens, start = self.ids.size, int((self.work.arrays("streams") or {"block": np.array(0)})["block"])
        passes = [2.0 * tokens * sum(s.size for s in leaves(layer) if s.is_matrix) for layer in self.declared.layers]
        first = self.tied and self.asymmetric and not self._is_solved(self.declared.lm_head.name)
        work = sum(passes) * float(first) + sum(passes[start:]) * (1 + self.asymmetric)
        for spec in dict.fromkeys((*leaves(self.declared), *leaves(declare_mtp(self.c)))):
            if not self._is_solved(spec.name):
                rows, columns = spec.shape
                read = _MTP_TOKENS if spec.name.startswith("mtp.") else tokens
                sums = 0 if shares_inputs(spec.name) else 2.0 * read * columns**2 * (1 + self.asymmetric)
                work += _rounding(rows, columns) + sums
        return work

    # --- blocks ------------------------------------------------------------------------------------------------------

    def _streams_at_start(self) -> dict[str, Array]:
        """The streams before the first block that is not done, and its number."""
        kept = self.work.arrays("streams")
        if kept is not None and self._is_done(int(kept["block"])):
            return {name: np.array(x) for name, x in kept.items()}
        table, ids = self.matrix(self.declared.embed_tokens), self.ids.reshape(-1)
        exact = table.float_rows(ids)
        x = self._with_solved(table).rows(ids) if self.asymmetric else exact
        return {"block": np.array(0), "float": exact, "quantized": x}

    def _is_done(self, blocks: int) -> bool:
        """Whether everything of the first blocks is in the working folder."""
        solved = all(self._is_solved(spec.name) for spec in leaves(self.declared.layers[:blocks]))
        equalized = self.equalize is None or all(self.work.arrays(f"layers.{i}") is not None for i in range(blocks))
        return solved and equalized

    def _block(self, i: int, exact: Float32, x: Float32) -> tuple[Float32, Float32]:
        """The two streams behind block i, whose matrices are solved on the way."""
        weights = self.weights(self.declared.layers[i])
        recorded: dict[str, Recorded] = {}
        exact = self.float_block(i, weights, exact, recorded)
        if self.equalize is not None:
            all_inputs = {name: read.inputs for name, read in recorded.items()}
            declared = self.declared.layers[i]
            weights, changed = fold_block(self.c, declared, weights, all_inputs, self.specs, self.equalize)
            del all_inputs  # they go as they are used
            self.work.keep_arrays(f"layers.{i}", changed)
        self.checkpoint.drop_pages()
        if not self.asymmetric:
            while recorded:
                ws, inputs = recorded.pop(next(iter(recorded)))
                self._solve(ws, inputs, None)
            return exact, exact
        with self._listening(self._solver(recorded)):
            return exact, self.run_block(i, weights, x)

    def float_block(
        self, i: int, weights: LayerWeights[Array, Any], x: Float32, recorded: dict[str, Recorded] | None = None,
        context: int | None = None,
    ) -> Float32:  # fmt: skip
        """Run x [windows * context, hidden] through block i, some windows at a time; with `recorded`, keep what every
        matrix is multiplied by, under the name of the first that shares it."""
        context = context or self.ids.shape[1]
        step = max(1, _FLOAT_TOKENS // context) * context
        y = np.empty_like(x)
        for start in range(0, len(x), step):
            rows = slice(start, min(start + step, len(x)))
            with self._listening(None if recorded is None else _recorder(recorded, rows, len(x))):
                y[rows] = self.run_block(i, weights, x[rows], context)
        if not np.isfinite(y).all():
            raise ModelError(
                f"{self.checkpoint.path}: layer {i} gives NaN or infinity on the calibration text",
                hint="its weights may be damaged: download or copy them again",
            )
        return y

    @contextmanager
    def _listening(self, listener: Listener | None) -> Iterator[None]:
        self.ops.on_input = listener
        try:
            yield
        finally:
            self.ops.on_input = None

    def run_block(self, i: int, weights: LayerWeights[Array, Any], x: Float32, context: int | None = None) -> Float32:
        """Block i for windows of `context` tokens one after another, each from an empty state."""
        context = context or self.ids.shape[1]
        count = len(x) // context
        positions = np.tile(np.arange(context, dtype=np.int32), (3, count))
        state = text.initial_state(self.ops, self.c).layers[i]
        angles = self.ops.rope_angles(positions, self.c.rope)
        y, _ = layers.decoder_layer(
            self.ops, x, weights, self.c, angles, [state] * count, [context] * count, [0] * count
        )  # fmt: skip
        self.told(2.0 * len(x) * sum(prod(m.shape) for m in matrices(weights)), f"layer {i}")
        return y

    def _solver(self, recorded: dict[str, Recorded]) -> Listener:
        """Solves every matrix as it is met, given what the float model's was multiplied by."""

        def solve(x: Float32, ws: Sequence[SourceMatrix]) -> None:
            self._solve(ws, x, recorded.pop(ws[0].name).inputs)

        return solve

    def _solve(self, ws: Sequence[SourceMatrix], x: Float32, exact: Float32 | None) -> None:
        """Solve those of some matrices with inputs x that are wanted, unless that has been done."""
        h: Hessian | None = None
        for w in ws:
            if not self._is_solved(w.name):
                h = h or self.hessian(w.name, x, exact)
                self._keep(w, h)
            self._with_solved(w)

    def hessian(self, name: str, x: Float32, exact: Float32 | None) -> Hessian:
        """The Hessian of inputs x [tokens, in] of the matrix `name`; `exact` are the float model's."""
        h = Hessian(x.shape[1], drift=exact is not None)
        try:
            for start in range(0, len(x), _FLOAT_TOKENS):
                rows = slice(start, start + _FLOAT_TOKENS)
                h.add(x[rows], None if exact is None else exact[rows], threads=self.ops.workers)
        except ModelError as error:
            raise ModelError(f"{self.checkpoint.path}: {name} is given {error.message}", hint=error.hint) from None
        self.told(2.0 * len(x) * x.shape[1] ** 2 * (1 if exact is None else 2), name)
        return h

    def _keep(self, w: SourceMatrix, h: Hessian | None) -> None:
        """Round a matrix and keep it."""
        parts = []
        for rows in row_blocks(w.shape, _ROUNDED_AT_ONCE, _ROWS):
            values = np.ascontiguousarray(w.float_rows(rows))
            try:
                parts.append(self.rounder(w.name, values, h))
            except ModelError as error:
                raise ModelError(f"{self.checkpoint.path}: {w.name}: {error.message}", hint=error.hint) from None
            self.told(_rounding(rows.stop - rows.start, w.shape[1]), w.name)
        self.work.keep_solved(w.name, parts[0] if len(parts) == 1 else parts[0].stacked(parts[1:]))

    # --- what stands before and behind the blocks --------------------------------------------------------------------

    def float_hidden(self) -> Float32:
        """The float model's hidden states behind the final norm, of all tokens: [tokens, hidden]."""
        x = self.matrix(self.declared.embed_tokens).float_rows(self.ids.reshape(-1))
        for i, declared in enumerate(self.declared.layers):
            x = self.float_block(i, self.weights(declared), x)
            self.checkpoint.drop_pages()
        return self.ops.rms_norm(x, self.checkpoint.dense(self.declared.norm.name), self.c.rms_norm_eps)

    def _mtp(self, exact: Float32, x: Float32) -> None:
        """Calibrate the MTP head on the first windows as one sequence."""
        declared = declare_mtp(self.c)
        tokens = min(len(x), _MTP_TOKENS) - 1
        ids = self.ids.reshape(-1)[1 : tokens + 1]
        table = self.matrix(self.declared.embed_tokens)
        positions = np.tile(np.arange(tokens, dtype=np.int32), (3, 1))
        weights = map_tree(self._leaf, declared)
        empty = np.zeros((0, self.c.num_key_value_heads, self.c.head_dim), np.float32)
        recorded: dict[str, Recorded] = {}

        def predict(listener: Listener, vectors: Float32, hidden: Float32) -> None:
            rows = Rows(vectors, hidden[:tokens], positions)
            with self._listening(listener):
                mtp.predict(self.ops, self.c, weights, rows, self.ops.kv_cache(empty, empty))

        predict(_recorder(recorded, slice(0, tokens), tokens), table.float_rows(ids), exact)
        if self.asymmetric:
            predict(self._solver(recorded), self._with_solved(table).rows(ids), x)
        for ws, inputs in recorded.values():
            self._solve(ws, inputs, None)

    # --- leaves ------------------------------------------------------------------------------------------------------

    def weights(self, declared: LayerWeights[TensorSpec, TensorSpec]) -> LayerWeights[Array, Any]:
        """A block's weights, its matrices in float32."""
        weights: LayerWeights[Array, Any] = map_tree(self._leaf, declared)
        return weights

    def _leaf(self, spec: TensorSpec) -> Any:
        if spec.is_matrix:
            return SourceMatrix(self.checkpoint, spec, held=True)
        return self.ops.vector(self.checkpoint.dense(spec.name))

    def matrix(self, spec: TensorSpec) -> SourceMatrix:
        """A matrix that stays in its file."""
        return SourceMatrix(self.checkpoint, spec, held=False)

    def _is_solved(self, name: str) -> bool:
        return name not in self.specs or self.work.solved(name) is not None

    def _with_solved(self, w: SourceMatrix) -> SourceMatrix:
        solved = self.work.solved(w.name)
        if solved is not None:
            w.settle(solved)
        return w


def shares_inputs(name: str) -> bool:
    """Whether a matrix reads what another one does that comes before it."""
    return name.endswith(
        ("k_proj.weight", "v_proj.weight", "in_proj_z.weight", "in_proj_b.weight", "in_proj_a.weight", "up_proj.weight")
    )


def matrices(tree: Any) -> Iterator[SourceMatrix]:
    """The matrices of a tree of weights."""
    return (leaf for leaf in leaves(tree) if isinstance(leaf, SourceMatrix))


def _recorder(recorded: dict[str, Recorded], rows: slice, tokens: int) -> Listener:
    """Keeps inputs as rows `rows` of all `tokens`, under the name of the first matrix that they are for."""

    def record(x: Float32, ws: Sequence[SourceMatrix]) -> None:
        if ws[0].name not in recorded:
            recorded[ws[0].name] = Recorded(tuple(ws), np.empty((tokens, x.shape[1]), np.float32))
        recorded[ws[0].name].inputs[rows] = x

    return record


def _rounding(rows: int, columns: int) -> float:
    """About what rounding takes, in multiplications of a matrix product of the same time."""
    return _SLOWER * rows * columns**2
