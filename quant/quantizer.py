"""From a checkpoint folder to a quantized one, tensor by tensor.

The output keeps the source's names and conventions (the hub's: zero-centred norms, convolution [C, 1, width]), only
the quantized matrices are replaced by MLX's weight, scales and biases. Stock mlx-lm and mlx-vlm sanitize hub files
when they load them, so they run the output unchanged, while nothing is lost for others: norms stay exact, the MTP head
is kept, and so is the vision tower unless it is to be left out. docs/reference/format.md has the layout.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from edgeq.adapters import given_adapters
from edgeq.errors import ModelError, UsageError
from edgeq.files import new_file, new_folder
from edgeq.files.publish import check_room
from edgeq.formats.bf16 import Array, Float32, all_finite, round_to, to_float32
from edgeq.formats.mapped import reading_on
from edgeq.formats.names import mlx_module
from edgeq.formats.packed import Grouped
from edgeq.formats.safetensors import DTYPES, SafetensorsWriter, dtype_name
from edgeq.hub import find_model
from edgeq.inputs import check_output
from edgeq.numbers import for_json
from edgeq.quality.gate import GateResult, check
from edgeq.quant.calibrate.allocation import Allowance
from edgeq.quant.calibrate.blas import cores
from edgeq.quant.calibrate.request import CalibrationRequest, choose_calibration
from edgeq.quant.calibrate.run import Calibration, calibrated
from edgeq.quant.calibrate.workspace import Solved
from edgeq.quant.matrix import QuantizedRows, quantize_rows
from edgeq.quant.page import page
from edgeq.quant.provenance import RECORD, Source, hash_files, provenance
from edgeq.quant.recipe import KEEP, Assignment, QuantSpec, Recipe, TypeRule, assign, choose_recipe
from edgeq.quant.report import Report, TensorReport
from edgeq.quant.source import WeightSource, coarse_warning, open_source
from edgeq.quant.target import FileTarget, FolderTarget, files_of
from edgeq.weights import Part

__all__ = ["Progress", "quantize"]

Progress = Callable[[int, int, str], None]
"""Called with the weights done, all weights, and the tensor at hand."""

_SHARD = 5_000_000_000  # bytes; the hub's own limit
_BLOCK = 1 << 20  # weights that a thread works on at a time
_DROP_EVERY = 1 << 25  # weights after which the source's pages are let go
_ALIGNMENT = 64
_SIDE_FILES = 32 << 20  # bytes of tokenizer, configuration and record, or a little more

A = TypeVar("A")
B = TypeVar("B")


def quantize(
    src: Path | str,
    out: Path | str | None,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    recipe: str | None = None,
    types: Sequence[str] = (),
    vision: int | str | None = None,
    mtp: bool = True,
    adapter: Path | str | Sequence[Path | str] | None = None,
    dry_run: bool = False,
    report: Path | str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    revision: str | None = None,
    threads: int | None = None,
    chat_template: str | Path | None = None,
    calibrate: Path | str | bool | None = None,
    effort: str | None = None,
    target_bpw: float | None = None,
    target_size: int | str | None = None,
    keep_bits: bool = False,
    seed: int | None = None,
) -> Report:
    """Quantize `src`, a checkpoint as `edgeq.load` takes it, into the new folder `out`.

    `recipe` is q4 (the default), q4+, q5, q6, q8, none or keep; with keep, the default for what is in groups of integer
    codes already (GPTQ, AWQ, AutoRound, compressed-tensors), these are converted without a change in value. `bits` and
    `group_size` replace the recipe's base; `types` are PATTERN=SPEC overrides, e.g. "*.down_proj=6g64". `vision` is
    what becomes of the vision tower: 16 (as it is), 8 (its matrices in 8 bits; the default wherever anything is
    quantized) or "none" (left out); `mtp` is whether the MTP head is kept. A part of `src` that is not fit for use is
    an error, unless it is left out on purpose. `adapter` is a LoRA adapter to merge first, or several (see
    `edgeq.load`). With `dry_run` nothing is quantized and `out` may be None. `report` is a file for the sizes and
    errors of all tensors: JSON, and a page with the same name but .html, whichever of the two is named. With `force`
    an existing model folder, or report, is replaced once the new one is complete. `revision` goes on record; it is
    known for folders in the hub's cache. `chat_template` replaces the source's: a file, or the name of one of its own.
    Memory stays below about 300 MB, whatever the model's size.

    `calibrate` (True or "default", or a UTF-8 text file) rounds the matrices for what they are multiplied by on a text,
    with an `effort` of "fast", "standard" (the default) or "best". Bits are allocated to matrices by what each of them
    costs, in as many bytes as the recipe takes, or for a target: `target_bpw` (bits per weight of the language model,
    all its bytes counted) or `target_size` (bytes of all tensors, or "1.2G"). With `keep_bits` every matrix has the
    recipe's. `seed` chooses among the windows of a long text. A run that was killed goes on where it was. Memory:
    docs/concepts/quantization.md; 6 GB for a model of 2 billion weights.
    """
    start = time.perf_counter()
    if out is not None:
        check_output(Path(out))
    chosen = replace(choose_recipe(recipe, bits, group_size, vision), mtp=mtp)
    request = choose_calibration(
        calibrate, effort, target_bpw, target_size, seed,
        keep_bits=keep_bits, recipe=recipe, bits=bits, group_size=group_size,
    )  # fmt: skip
    rules = [TypeRule.parse(t) for t in types]
    source = open_source(find_model(src), given_adapters(adapter), chosen.dropped, chat_template)
    if source.in_groups and (recipe, bits, group_size) == (None, None, None):
        chosen = replace(choose_recipe("keep", None, None, vision), mtp=mtp)
    plan = _Plan(source, chosen, rules, request)
    if vision in (8, 16, "8", "16") and not plan.sees:
        raise UsageError(f"{src} has no vision tower to store in {vision} bits", hint="leave that setting out")
    targets = _Targets(plan, out, report, dry_run, force)
    done = plan.report(str(src), str(out or ""))
    if targets.folder is not None:
        errors, judged = _make(plan, targets.folder, Source(source.path, revision), threads or cores(), progress)
        done = plan.report(str(src), str(out), errors, judged, seconds=time.perf_counter() - start)
    targets.write_report(done)
    return done


def _make(
    plan: _Plan, target: FolderTarget, source: Source, threads: int, progress: Progress | None
) -> tuple[dict[str, float], GateResult | None]:
    """Calibrate, if that is planned, and write the folder; what `_write_folder` found."""
    with ExitStack() as stack:
        stack.enter_context(reading_on())
        if plan.request is not None:
            check_room(target.out, 2 * plan.nbytes())  # once in the working folder
            work = calibrated(
                plan.request, plan.source, plan.assignments, plan.allowance, plan.recipe_record(), target.out,
                DTYPES[plan.scale_type], threads, progress,
            )  # fmt: skip
            plan.settle(stack.enter_context(work))
        folder = stack.enter_context(new_folder(target.out, room=plan.nbytes(), may_replace=target.may_replace))
        return _write_folder(plan, folder, target.out, source, threads, progress)


class _Targets:
    """Where the results go: checked before the work, and whether they may replace what is there."""

    def __init__(self, plan: _Plan, out: Path | str | None, report: Path | str | None, dry: bool, force: bool) -> None:
        source, inputs = plan.source.path, [*plan.source.files, *files_of(plan.source.path)]
        if out is None and not dry:
            raise UsageError("no output folder given", hint="give one with -o FOLDER, or as `out` in Python")
        self.folder = None if out is None or dry else FolderTarget(Path(out), source, inputs, force=force)
        outputs = [self.folder.out] if self.folder else []
        names = [] if report is None else _report_names(Path(report))
        self.reports = [FileTarget(name, source, inputs, outputs, force=force) for name in names]
        for target in (self.folder, *self.reports):
            if target is not None:
                target.check()

    def write_report(self, report: Report) -> None:
        """The report as JSON and as a page beside it."""
        for target, write in zip(self.reports, (_write_json, _write_page), strict=False):
            with new_file(target.out, may_replace=target.may_replace) as path:
                write(path, report.as_json())


def _report_names(name: Path) -> tuple[Path, Path]:
    """What a report's JSON and its page are called, by the name of either."""
    if name.suffix.lower() in (".html", ".htm"):
        return name.with_suffix(".json"), name
    return name, name.with_suffix(".html")


# --- planning --------------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A tensor as it is written to a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


class _Carried:
    """A matrix whose codes and scales are kept."""

    def __init__(self, groups: Grouped) -> None:
        assert groups.run is not None
        self.groups, self.spec = groups, QuantSpec(groups.bits, groups.run)
        self.scale_type = dtype_name(groups.factors()[0].dtype)

    def factors(self) -> tuple[Array, Array]:
        """Scales and biases, of one type."""
        scales, biases = self.groups.factors()
        if isinstance(biases, int):  # a power of two, and the product exact
            biases = round_to(to_float32(scales) * np.float32(-biases), scales.dtype)
        return scales, biases


class _Plan:
    """Everything that is decided before the first byte is written. UsageError for a calibration that cannot be."""

    def __init__(
        self, source: WeightSource, recipe: Recipe, rules: Sequence[TypeRule], request: CalibrationRequest | None
    ) -> None:
        if request is not None and source.in_groups:
            raise UsageError(
                f"calibration is not for {source.path}: its matrices are integer codes already, which are kept as they "
                "are",
                hint="calibrate the original model, or leave calibration out",
            )
        if request is not None and request.has_target:
            recipe = replace(recipe, name="allocated", summary="bits as they cost least")
        self.source, self.recipe, self.rules, self.request = source, recipe, rules, request
        self.assignments = assign(source.tensors, recipe, rules)
        self.scale_type = source.scale_type
        kept = ((a.spec.name, source.groups(a.spec.name)) for a in self.assignments if a.storage == KEEP)
        self.carried = {name: _Carried(groups) for name, groups in kept if groups}
        source.drop_pages()  # scales have been read
        self.allowance = None if request is None else self._allowance(request)
        self.calibration: Calibration | None = None
        self.warnings = (*source.warnings, *self._losses())

    def _losses(self) -> Iterator[str]:
        """What is said of matrices that were quantized, and do not stay as they were."""
        coarse, wide = set[str](), list[Assignment]()
        for a in self.assignments:
            packed = self.source.packed.get(a.spec.name)
            if isinstance(a.storage, QuantSpec) and packed is not None and packed.bits <= 6:
                coarse.add(f"{packed.bits}-bit codes")
            if a.storage == KEEP and isinstance(packed, Grouped) and a.spec.name not in self.carried:
                wide.append(a)
        yield from coarse_warning(self.source.path, coarse)
        if wide:
            yield (
                f"{len(wide)} matrices, {wide[0].file_name} and others, are stored as {self.scale_type}, rounded once: "
                "their columns are not in groups of 32, 64 or 128"
            )

    def spec(self, a: Assignment) -> QuantSpec | None:
        """Bits and group size of what is written in groups."""
        if carried := self.carried.get(a.spec.name):
            return carried.spec
        return a.storage if isinstance(a.storage, QuantSpec) else None

    def settle(self, calibration: Calibration) -> None:
        """From now on matrices are what was made of them."""
        self.calibration, self.assignments = calibration, list(calibration.assignments)

    def _allowance(self, request: CalibrationRequest) -> Allowance | None:
        """What is left to the language model's matrices that no rule has decided on, if bits are allocated. UsageError
        if it is not enough."""
        tensors = ((a.spec, sum(part.nbytes for part in self.parts(a))) for a in self.assignments)
        free = [a for a in self.assignments if isinstance(a.storage, QuantSpec) and self._is_free(a)]
        return Allowance.of(request, tensors, free)

    def _is_free(self, a: Assignment) -> bool:
        decided = (rule.matches(a.spec.name, a.file_name) and rule.applies(a.spec) for rule in self.rules)
        return a.spec.part is Part.TEXT and not any(decided)

    @property
    def sees(self) -> bool:
        """Whether the source has a vision tower."""
        return any(spec.part is Part.VISION for spec, _ in self.source.tensors)

    def parts(self, a: Assignment) -> list[_Part]:
        """What is written for a tensor: itself, or the triple of a quantized matrix."""
        spec, carried = self.spec(a), self.carried.get(a.spec.name)
        if spec is None:
            assert not isinstance(a.storage, QuantSpec)
            stored = self.source.stored(a.spec.name)
            return [_Part(a.file_name, stored.dtype if a.storage == KEEP else a.storage, stored.shape)]
        rows, columns = a.spec.shape
        module, groups = a.file_name.removesuffix(".weight"), (rows, columns // spec.group_size)
        scale_type = carried.scale_type if carried else self.scale_type
        return [
            _Part(a.file_name, "U32", (rows, columns * spec.bits // 32)),
            _Part(f"{module}.scales", scale_type, groups),
            _Part(f"{module}.biases", scale_type, groups),
        ]

    def nbytes(self) -> int:
        """Bytes of the output folder, or a little more."""
        weights = sum(part.nbytes for a in self.assignments for part in self.parts(a))
        return weights + _SIDE_FILES

    def report(
        self, source: str, out: str, errors: Mapping[str, float] | None = None, judged: GateResult | None = None,
        seconds: float = 0.0,
    ) -> Report:  # fmt: skip
        """What is planned, or, with the errors of quantized tensors and what a calibrated result was found to be, what
        was done in so many seconds."""
        errors, tensors = errors or {}, []
        for a in self.assignments:
            parts = self.parts(a)
            kind = str(self.spec(a) or parts[0].dtype)
            nbytes = sum(part.nbytes for part in parts)
            note = "as it was" if a.spec.name in self.carried else a.note
            tensors.append(
                TensorReport(
                    a.spec.name, a.file_name, a.spec.part.value, a.spec.shape, kind, nbytes,
                    nmse=errors.get(a.spec.name), note=note,
                )
            )  # fmt: skip
        return Report(
            source, out, self.recipe.name, tuple(tensors), warnings=self.warnings, seconds=seconds,
            allocation=self.allowance.record if self.allowance else None,
            gate=judged.as_json() if judged else None,
        )  # fmt: skip

    def shards(self) -> dict[str, list[Assignment]]:
        """Files by name, and what goes into each."""
        shards: list[list[Assignment]] = [[]]
        held = 0
        for a in sorted(self.assignments, key=self._alignment):
            nbytes = sum(part.nbytes for part in self.parts(a))
            if held + nbytes > _SHARD and shards[-1]:
                shards.append([])
                held = 0
            shards[-1].append(a)
            held += nbytes
        if len(shards) == 1:
            return {"model.safetensors": shards[0]}
        return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}

    def _alignment(self, a: Assignment) -> int:
        """Order in a file: first what keeps every tensor at a multiple of 64 bytes, last what breaks 4 bytes."""
        parts = self.parts(a)
        if all(part.nbytes % _ALIGNMENT == 0 for part in parts):
            return 0
        return 1 if sum(part.nbytes for part in parts) % 4 == 0 else 2

    def config(self) -> dict[str, Any]:
        """The output's config.json."""
        text = self.source.config.text
        values = self.source.config_values()
        known = {  # what the tensors know better (and mlx-lm looks for the flag only in text_config)
            "tie_word_embeddings": text.tie_word_embeddings,
            "mtp_num_hidden_layers": text.mtp_num_hidden_layers if self.recipe.mtp else 0,
        }  # fmt: skip
        if "text_config" in values:
            values["text_config"] = values["text_config"] | known
        values |= {"tie_word_embeddings": text.tie_word_embeddings} if "text_config" in values else known
        if self.recipe.vision == "none":
            values.pop("vision_config", None)
        specs = {a.spec.name: spec for a in self.assignments if (spec := self.spec(a))}
        base = self.recipe.base or next(iter(specs.values()), None)
        if base is None:
            return values
        block: dict[str, Any] = {"group_size": base.group_size, "bits": base.bits, "mode": "affine"}
        for name, spec in specs.items():
            if spec != base:
                block[mlx_module(name)] = {"group_size": spec.group_size, "bits": spec.bits}
        return values | {"quantization": block, "quantization_config": block}

    def recipe_record(self) -> dict[str, Any]:
        base = self.recipe.base
        return {
            "name": self.recipe.name,
            "bits": base.bits if base else None,
            "group_size": base.group_size if base else None,
            "types": [rule.text for rule in self.rules],
            "vision": self.recipe.vision if self.sees else None,
            **({"adapters": list(self.source.adapters)} if self.source.adapters else {}),
            **({"calibration": self.calibration.record} if self.calibration else {}),
        }


# --- writing ---------------------------------------------------------------------------------------------------------


def _write_folder(
    plan: _Plan, folder: Path, out: Path, source: Source, threads: int, progress: Progress | None
) -> tuple[dict[str, float], GateResult | None]:
    """Write everything into `folder`, which is going to be `out`; the relative squared error of every quantized tensor,
    and how good a calibrated result is. QualityError for one that is damaged."""
    stop, judged = threading.Event(), None
    with ThreadPoolExecutor(threads + 1) as pool:
        inputs = pool.submit(hash_files, plan.source.files, stop=stop.is_set)
        try:
            errors = _WeightWriter(plan, folder, pool, threads, progress).write()
            plan.source.write_side_files(folder)
            _write_json(folder / "config.json", plan.config())
            if plan.calibration is not None:
                judged = check(
                    plan.source.checkpoint, folder, plan.calibration.windows.held_out, out=out, threads=threads,
                    progress=progress and _judging(progress),
                )  # fmt: skip
                judged.need()
            outputs = hash_files(sorted(path for path in folder.rglob("*") if path.is_file()), folder)
            record = provenance(source, inputs.result(), outputs, plan.recipe_record())
            if judged is not None:
                record["gate"] = judged.as_json()
            plan.source.check_whole()  # or what was hashed is not what was read
            _write_json(folder / RECORD, record)
        finally:
            stop.set()
    return errors, judged


def _judging(progress: Progress) -> Callable[[int, int], None]:
    return lambda done, total: progress(done, total, "judging the result")


class _WeightWriter:
    """Streams the tensors: blocks of rows are read and quantized by a pool, and written in order."""

    def __init__(
        self, plan: _Plan, folder: Path, pool: ThreadPoolExecutor, threads: int, progress: Progress | None
    ) -> None:
        self.plan, self.folder, self.pool = plan, folder, pool
        self.ahead = 2 * threads
        self.progress = progress
        self.total = sum(a.spec.size for a in plan.assignments)
        self.done = 0

    def write(self) -> dict[str, float]:
        errors: dict[str, float] = {}
        shards = self.plan.shards()
        for file_name, assignments in shards.items():
            entries = {p.name: (p.dtype, p.shape) for a in assignments for p in self.plan.parts(a)}
            with SafetensorsWriter(self.folder / file_name, entries, {"format": "pt"}) as file:
                for a in assignments:
                    if carried := self.plan.carried.get(a.spec.name):
                        self._write_carried(file, a, carried)
                    elif self.plan.calibration and a.spec.name in self.plan.calibration.specs:
                        errors[a.spec.name] = self._write_solved(file, a, self.plan.calibration.solved(a.spec.name))
                    elif self.plan.calibration and a.spec.name in self.plan.calibration.changed:
                        file.write(self.plan.parts(a)[0].name, self.plan.calibration.changed[a.spec.name])
                    elif isinstance(a.storage, QuantSpec):
                        errors[a.spec.name] = self._write_quantized(file, a, a.storage)
                    else:
                        self._write_plain(file, a)
        self._write_index(shards)
        return errors

    def _write_quantized(self, file: SafetensorsWriter, a: Assignment, spec: QuantSpec) -> float:
        codes, scales, biases = self.plan.parts(a)
        dtype = DTYPES[scales.dtype]

        def job(x: Float32) -> tuple[QuantizedRows, float]:
            return quantize_rows(x, spec.bits, spec.group_size, dtype), float(np.vdot(x, x))

        factors: list[tuple[Array, Array]] = []
        squared_error = squares = 0.0
        for rows, block_squares in self._map_blocks(a, job):
            file.write(codes.name, rows.codes)
            factors.append((rows.scales, rows.biases))
            squared_error += rows.squared_error
            squares += block_squares
        file.write(scales.name, np.concatenate([s for s, _ in factors]))
        file.write(biases.name, np.concatenate([b for _, b in factors]))
        return squared_error / squares if squares else 0.0

    def _write_solved(self, file: SafetensorsWriter, a: Assignment, solved: Solved) -> float:
        """A calibrated matrix, as it is in the working folder."""
        names = [part.name for part in self.plan.parts(a)]
        for words in self._map_rows(a, lambda rows: solved.words[rows]):
            file.write(names[0], words)
        file.write(names[1], solved.scales)
        file.write(names[2], solved.biases)
        return solved.squared_error / solved.squares if solved.squares else 0.0

    def _write_carried(self, file: SafetensorsWriter, a: Assignment, carried: _Carried) -> None:
        codes, scales, biases = self.plan.parts(a)
        factors = carried.factors()
        if not all(map(all_finite, factors)):
            raise self._not_finite(a)
        for words in self._map_rows(a, carried.groups.words):
            file.write(codes.name, words)
        file.write(scales.name, factors[0])
        file.write(biases.name, factors[1])

    def _write_plain(self, file: SafetensorsWriter, a: Assignment) -> None:
        (part,) = self.plan.parts(a)

        def job(x: Float32) -> Array:
            with np.errstate(over="ignore"):  # told below, with the tensor's name
                return round_to(x, DTYPES[part.dtype])

        for block in self._map_blocks(a, job):
            if not np.isfinite(to_float32(block)).all():
                raise ModelError(f"{a.file_name} has values beyond the range of {part.dtype}", hint="store it as bf16")
            file.write(part.name, block)

    def _map_blocks(self, a: Assignment, job: Callable[[Float32], B]) -> Iterator[B]:
        """`job` of every block of rows of a tensor, in order; blocks are read, checked and worked on by the pool."""
        return self._map_rows(a, lambda rows: job(self._checked(a, self.plan.source.rows(a.spec.name, rows))))

    def _map_rows(self, a: Assignment, work: Callable[[slice], B]) -> Iterator[B]:
        source, count = self.plan.source, a.spec.shape[0]
        width = a.spec.size // count
        step = max(1, _BLOCK // width)

        def read(start: int) -> B:
            result = work(slice(start, start + step))
            source.check_whole()
            return result

        for start, result in _in_order(self.pool, read, range(0, count, step), self.ahead):
            before, self.done = self.done, self.done + min(step, count - start) * width
            if before // _DROP_EVERY != self.done // _DROP_EVERY:
                source.drop_pages()
            if self.progress is not None:
                self.progress(self.done, self.total, a.spec.name)
            yield result

    def _checked(self, a: Assignment, block: Array) -> Float32:
        x = to_float32(block)
        if not np.isfinite(x).all():
            raise self._not_finite(a)
        return x

    def _not_finite(self, a: Assignment) -> ModelError:
        return ModelError(
            f"{self.plan.source.path}: {a.file_name} holds NaN or infinity", hint="download or copy the file again"
        )

    def _write_index(self, shards: dict[str, list[Assignment]]) -> None:
        parts = {part.name: (file, part.nbytes) for file, s in shards.items() for a in s for part in self.plan.parts(a)}
        total = sum(nbytes for _, nbytes in parts.values())
        weight_map = {name: file for name, (file, _) in sorted(parts.items())}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(self.folder / "model.safetensors.index.json", index)


def _in_order(pool: ThreadPoolExecutor, job: Callable[[A], B], items: Sequence[A], ahead: int) -> Iterator[tuple[A, B]]:
    """Results of `job` for every item, in order, with at most `ahead` jobs begun or waiting."""
    pending: deque[tuple[A, Future[B]]] = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(job, item)))
            if len(pending) == ahead:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()
    finally:
        for _, future in pending:
            future.cancel()


def _write_page(path: Path, report: dict[str, Any]) -> None:
    path.write_text(page(report), encoding="utf-8")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(for_json(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
