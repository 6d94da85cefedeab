"""What every choice of bits costs: the divergence (KL) of the model's predictions that one matrix alone would cause.

Measured in one sweep of the float model through its layers, a block's weights in memory at a time:

* As a probe, some tokens are carried along once for every layer already passed, each time as that layer, with all its
  matrices rounded plainly to 4 bits, would have left them. At the end each has moved the predictions by some KL from
  the float model's: what a squared error behind that layer costs.
* Behind each layer, what rounding a single matrix of it adds to that error.
* For each matrix, the squared error of its own output at every number of bits and group size, from a sample of its
  rows, rounded as they will be, with the inputs of many more tokens than the probe has (`allocate.sample_errors`).

The product of the three is the cost. The head's is the KL that its own rounding causes, and that of the embedding's
vectors where they are the same matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from edgeq.formats.bf16 import Array, Float32
from edgeq.quant.calibrate.allocate import sample_errors
from edgeq.quant.calibrate.blas import in_threads
from edgeq.quant.calibrate.calibrator import Calibrator, Recorded, SourceMatrix, matrices, shares_inputs
from edgeq.quant.calibrate.rounder import searched
from edgeq.quant.calibrate.taps import row_blocks
from edgeq.quant.calibrate.workspace import Solved
from edgeq.quant.recipe import QuantSpec
from edgeq.weights import LayerWeights, leaves, map_tree

__all__ = ["Costs", "expected", "measure"]

Costs = dict[str, dict[QuantSpec, float]]
"""KL by matrix and choice."""

_CONTEXT = 128  # tokens of a probe's window; the second half of its predictions counts
_SAMPLED = 128  # rows of a matrix that choices are tried on


def measure(
    calibrator: Calibrator, choices: Mapping[str, Sequence[QuantSpec]], probes: int, dtype: np.dtype[Any]
) -> Costs:
    """The cost of every choice for the matrices that `choices` names, on the calibrator's windows; `probes` of them
    give the beginnings that predictions are compared on. Scales are stored as `dtype`."""
    return _Sweep(calibrator, choices, probes, dtype).run()


def expected(calibrator: Calibrator, choices: Mapping[str, Sequence[QuantSpec]], probes: int) -> float:
    """About the work that `measure` is going to tell of."""
    tokens, probe = calibrator.ids.size, probes * min(_CONTEXT, calibrator.ids.shape[1])
    work: float = 2.0 * probe / 2 * (len(calibrator.declared.layers) + 3) * calibrator.declared.lm_head.size
    for i, layer in enumerate(calibrator.declared.layers):
        named = [spec for spec in leaves(layer) if spec.is_matrix]
        of_probe = probe * (i + 3 + sum(spec.name in choices for spec in named))
        work += 2.0 * sum(spec.size for spec in named) * (tokens + of_probe)
        work += sum(2.0 * tokens * spec.shape[1] ** 2 for spec in named if not shares_inputs(spec.name))
    return work


class _Sweep:
    def __init__(
        self, calibrator: Calibrator, choices: Mapping[str, Sequence[QuantSpec]], probes: int, dtype: np.dtype[Any]
    ) -> None:
        self.calibrator, self.choices, self.dtype = calibrator, choices, dtype
        self.threads = calibrator.ops.workers
        self.context = min(_CONTEXT, calibrator.ids.shape[1])
        spread = np.linspace(0, len(calibrator.ids) - 1, min(probes, len(calibrator.ids))).astype(int)
        self.ids = np.ascontiguousarray(calibrator.ids[spread, : self.context]).reshape(-1)
        self.relative: Costs = {}  # errors of a matrix' output, as multiples of plain rounding's
        self.added: list[dict[str, float]] = []  # by layer: what each matrix adds to the error behind it

    def run(self) -> Costs:
        cal = self.calibrator
        table, head = cal.matrix(cal.declared.embed_tokens), cal.matrix(cal.declared.lm_head)
        x, probe = table.float_rows(cal.ids.reshape(-1)), table.float_rows(self.ids)
        moved = [self._plain(table.name, probe).rows(slice(None)) if table.name in self.choices else probe]
        for i, declared in enumerate(cal.declared.layers):
            weights, recorded = cal.weights(declared), dict[str, Recorded]()
            x = cal.float_block(i, weights, x, recorded)
            while recorded:
                self._compare(recorded.pop(next(iter(recorded))))
            probe, moved = self._probe(i, weights, probe, moved)
            cal.checkpoint.drop_pages()
        norm = cal.checkpoint.dense(cal.declared.norm.name)
        x, probe, *moved = (cal.ops.rms_norm(y, norm, cal.c.rms_norm_eps) for y in (x, probe, *moved))
        self._compare(Recorded((head,), x))
        scored = np.arange(len(probe)) % self.context >= self.context // 2
        of_head, of_table, *of_layers = self._divergences(head, probe[scored], [y[scored] for y in moved])
        costs = {
            name: self._scaled(name, kl * error / sum(added.values()))
            for kl, added in zip(of_layers, self.added, strict=True)
            for name, error in added.items()
        }
        if head.name in self.choices:
            costs[head.name] = self._scaled(head.name, of_head)
        if table.name in self.choices:
            costs[table.name] = self._of_table(table, of_table, costs.get(table.name, {}))
        return costs

    def _scaled(self, name: str, cost: float) -> dict[QuantSpec, float]:
        """The cost of plain rounding as that of every choice."""
        return {spec: cost * error for spec, error in self.relative[name].items()}

    def _of_table(self, table: SourceMatrix, cost: float, as_head: Mapping[QuantSpec, float]) -> dict[QuantSpec, float]:
        """Of the embedding: by its own error, and what it costs as the head."""
        sample = table.float_rows(self.ids)
        choices = self.choices[table.name]
        errors = {spec: searched(sample, spec, self.dtype, self.threads).squared_error for spec in choices}
        plain = errors[self._reference(table.name)] or 1.0
        return {spec: cost * errors[spec] / plain + as_head.get(spec, 0.0) for spec in choices}

    def _compare(self, read: Recorded) -> None:
        """Errors of the choices for matrices that share inputs, as multiples of the error of plain rounding."""
        wanted = [w for w in read.by if w.name in self.choices]
        if not wanted:
            return
        h = self.calibrator.hessian(wanted[0].name, read.inputs, None)

        def compare(w: SourceMatrix) -> dict[QuantSpec, float]:
            rows = w.float_rows(np.arange(0, w.shape[0], -(-w.shape[0] // _SAMPLED)))
            difference = self._plain(w.name, rows).rows(slice(None)) - rows
            plain = float(np.square(difference @ h.factor).sum(dtype=np.float64)) / h.tokens
            errors = sample_errors(rows, h, self.choices[w.name], dtype=self.dtype, rows=len(rows))
            return {spec: error / plain if plain else 0.0 for spec, error in errors.items()}

        _ = h.factor  # once, before the threads
        compared = in_threads(compare, wanted, self.threads)
        self.relative.update(zip((w.name for w in wanted), compared, strict=True))

    def _probe(
        self, i: int, weights: LayerWeights[Array, Any], probe: Float32, moved: list[Float32]
    ) -> tuple[Float32, list[Float32]]:
        """The probe, and those that are moved, behind layer i; the last is moved by this one."""
        cal = self.calibrator
        through = cal.float_block(i, weights, np.concatenate([probe, *moved]), context=self.context)
        exact, *moved = np.split(through, 1 + len(moved))
        plain = {m.name: _Plain(m, self._plain(m.name, m.weights)) for m in matrices(weights) if m.name in self.choices}
        added = {}
        for name in plain:
            one = cal.float_block(i, _with({name: plain[name]}, weights), probe, context=self.context)
            added[name] = float(np.square(one - exact).sum(dtype=np.float64)) or 1e-30
        self.added.append(added)
        return exact, [*moved, cal.float_block(i, _with(plain, weights), probe, context=self.context)]

    def _reference(self, name: str) -> QuantSpec:
        """How plain rounding rounds a matrix: 4 bits in groups of 64, or what comes next to it."""
        return min(self.choices[name], key=lambda spec: (abs(spec.bits - 4), abs(spec.group_size - 64)))

    def _plain(self, name: str, w: Float32) -> Solved:
        return searched(w, self._reference(name), self.dtype, self.threads)

    def _divergences(self, head: SourceMatrix, exact: Float32, moved: Sequence[Float32]) -> list[float]:
        """Mean KL of predictions from those of the hidden states `exact`: with the head plainly rounded, and with the
        head as it is from every one of `moved`. One pass over the vocabulary, some rows of the head at a time."""
        reference = _Softmax(len(exact))
        others = [_Softmax(len(exact)) for _ in range(1 + len(moved))]
        for rows in row_blocks(head.shape):
            part = head.float_rows(rows)
            rounded = self._plain(head.name, part).rows(slice(None)) if head.name in self.choices else part
            logits = exact @ part.T
            weights = reference.add(logits)
            jobs = [(others[0], exact, rounded), *((o, y, part) for o, y in zip(others[1:], moved, strict=True))]

            def one(job: tuple[_Softmax, Float32, Float32], logits: Float32 = logits, weights: Any = weights) -> None:
                softmax, hidden, matrix = job
                found = hidden @ matrix.T
                softmax.add(found)
                softmax.shift *= weights.carried
                softmax.shift += np.einsum("ij,ij->i", weights.now, logits - found, dtype=np.float64)

            in_threads(one, jobs, self.threads)
            self.calibrator.told(2.0 * exact.size * (1 + len(jobs)) * len(part), "head")
        self.calibrator.checkpoint.drop_pages()
        return [float((o.shift / reference.sum - reference.log + o.log).mean()) for o in others]


class _Weights(NamedTuple):
    """exp(logit - highest so far) of some tokens' logits [rows, tokens], and by what earlier sums are multiplied."""

    now: Float32
    carried: Any


class _Softmax:
    """Sums over a vocabulary of which some tokens come at a time, for each of `count` predictions.

    shift: the sum of exp(reference's logit - its highest) * (reference's logit - this one's), kept by the caller.
    """

    def __init__(self, count: int) -> None:
        self.highest = np.full(count, -np.inf)
        self.sum, self.shift = np.zeros(count), np.zeros(count)

    def add(self, logits: Float32) -> _Weights:
        """More logits [count, tokens]."""
        highest = np.maximum(self.highest, logits.max(1))
        carried = np.exp(self.highest - highest)
        now = np.exp(logits - highest[:, None].astype(np.float32))
        self.sum = self.sum * carried + now.sum(1, dtype=np.float64)
        self.highest = highest
        return _Weights(now, carried)

    @property
    def log(self) -> Any:
        """The logarithm of the sum of exp(logit)."""
        return self.highest + np.log(self.sum)


class _Plain:
    """A matrix as plain rounding has it."""

    def __init__(self, source: SourceMatrix, rounded: Solved) -> None:
        self.name, self.shape, self.rows = source.name, source.shape, rounded.rows


def _with(replaced: Mapping[str, _Plain], weights: LayerWeights[Array, Any]) -> LayerWeights[Array, Any]:
    """The same weights with some matrices replaced."""
    tree: LayerWeights[Array, Any] = map_tree(
        lambda leaf: replaced.get(leaf.name, leaf) if isinstance(leaf, SourceMatrix) else leaf, weights
    )
    return tree
