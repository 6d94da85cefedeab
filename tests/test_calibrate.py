"""Calibrated quantization from folder to folder: the pass, going on after a kill, allocation, refusals, the record."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tiny_tokenizer import IM_END, WORDS, build_tiny_tokenizer
from typer.testing import CliRunner

from edgeq.backends.numpy import NumpyOps
from edgeq.checkpoint import FolderCheckpoint
from edgeq.cli import app
from edgeq.errors import MemoryBudgetError, ModelError, QualityError, UsageError
from edgeq.formats.bf16 import Array, from_float32
from edgeq.formats.safetensors import SafetensorsFile
from edgeq.quality.kld import compare, cut
from edgeq.quality.stream import Stream
from edgeq.quant.calibrate import request
from edgeq.quant.calibrate.calibrator import Calibrator, Recorded, matrices
from edgeq.quant.calibrate.folding import fold_block
from edgeq.quant.calibrate.request import Budget
from edgeq.quant.calibrate.rounder import AffineRounder
from edgeq.quant.calibrate.rounding import AffineGrid, round_rows
from edgeq.quant.calibrate.sensitivity import measure
from edgeq.quant.calibrate.taps import TappedOps, tapped_ops
from edgeq.quant.calibrate.windows import read_windows
from edgeq.quant.calibrate.workspace import Solved, Workspace
from edgeq.quant.quantizer import quantize
from edgeq.quant.recipe import QuantSpec
from edgeq.quant.report import Report
from edgeq.quant.source import open_source
from edgeq.testing import config_values, nmse, write_checkpoint

TINY = config_values(vocab_size=1088, eos_token_id=IM_END, mtp=True, layer_types=["linear_attention", "full_attention"])
Q4 = QuantSpec(4, 64)


class Bed(NamedTuple):
    """A checkpoint with a tokenizer, and a text of about 1,100 tokens."""

    model: Path
    text: Path


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    folder = tmp_path_factory.mktemp("calibrate")
    write_checkpoint(folder / "model", TINY)
    build_tiny_tokenizer(folder / "model")
    rng = np.random.default_rng(0)
    few = rng.standard_normal((1088, 6)) @ rng.standard_normal((6, 64)) / 20  # so that activations are correlated
    overwrite(folder / "model", "model.language_model.embed_tokens.weight", from_float32(few.astype(np.float32)))
    (folder / "text").write_text(" ".join(np.random.default_rng(0).choice(WORDS, 1000)))
    return Bed(folder / "model", folder / "text")


def overwrite(folder: Path, name: str, values: Array) -> None:
    """Put other bytes where a tensor begins."""
    file = SafetensorsFile(folder / "model.safetensors")
    with file.path.open("r+b") as out:
        out.seek(file.data_start + file.tensors[name].start)
        out.write(values.tobytes())


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """Few tokens: what is tested does not depend on how many."""
    with pytest.MonkeyPatch.context() as patch:
        quick = {
            name: Budget(1024, 512, 1, 1, asymmetric=asymmetric)
            for name, asymmetric in [("fast", False), ("standard", True)]
        }
        patch.setattr(request, "BUDGETS", quick)
        yield


@pytest.fixture(scope="module")
def standard(bed: Bed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("standard") / "out"
    quantize(bed.model, out, calibrate=bed.text, keep_bits=True, threads=1)
    return out


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def make_calibrator(bed: Bed, ops: TappedOps | None = None) -> Calibrator:
    """One that measures, and solves nothing."""
    ids = np.random.default_rng(0).integers(0, 1000, (2, 64)).astype(np.int32)
    return Calibrator(
        FolderCheckpoint(bed.model), ops or tapped_ops(1), ids, {}, _none, _none,  # type: ignore[arg-type]
        asymmetric=False, told=_none,
    )  # fmt: skip


def _none(*_: object) -> None:
    return None


class TestResult:
    def test_is_a_checkpoint_like_any_other(self, bed: Bed, standard: Path, tmp_path: Path) -> None:
        plain = tmp_path / "plain"
        quantize(bed.model, plain)
        one, other = FolderCheckpoint(standard), FolderCheckpoint(plain)
        assert list(one.storage()) == list(other.storage())
        assert weights(standard) != weights(plain)
        assert not list(standard.parent.glob(".*")), "nothing of the working folder is left"
        source, *models = (Stream(FolderCheckpoint(f), NumpyOps()) for f in (bed.model, standard, plain))
        tokenizer = FolderCheckpoint(bed.model).tokenizer()
        assert tokenizer is not None
        found = compare(source, models, cut(tokenizer.encode(bed.text.read_text()), 256))
        calibrated, by_weights = (comparison.divergence.mean for comparison in found)
        assert calibrated < 0.8 * by_weights

    def test_every_matrix_is_calibrated_and_the_rest_is_as_it_was_but_for_scale(self, bed: Bed, standard: Path) -> None:
        before, after = FolderCheckpoint(bed.model), FolderCheckpoint(standard)
        for name, tensor in after.tensors.items():
            if tensor.quantization is None and not tensor.spec.is_matrix and "layernorm" not in name:
                assert nmse(before.dense(name), after.dense(name)) < (
                    0.5 if name.endswith("attn.norm.weight") else 1e-12
                )

    def test_record(self, bed: Bed, standard: Path) -> None:
        record = json.loads((standard / "edgeq.json").read_text())["recipe"]["calibration"]
        assert (record["text"], record["effort"], record["seed"]) == ("text", "standard", 0)
        assert record["tokens"] == 512
        assert record["held_out_tokens"] == 512
        assert len(record["sha256"]) == 64
        assert record["stages"]["equalization"]
        gate = json.loads((standard / "edgeq.json").read_text())["gate"]
        assert gate["passed"]
        assert gate["kl"]["mean"] < gate["plain_rounding"]["kl"]["mean"]

    @pytest.mark.parametrize("threads", [2, 3])
    def test_does_not_depend_on_threads(self, bed: Bed, standard: Path, tmp_path: Path, threads: int) -> None:
        quantize(bed.model, tmp_path / "out", calibrate=bed.text, keep_bits=True, threads=threads)
        assert weights(tmp_path / "out") == weights(standard)

    def test_fast(self, bed: Bed, standard: Path, tmp_path: Path) -> None:
        quantize(bed.model, tmp_path / "out", calibrate=bed.text, effort="fast", keep_bits=True)
        assert list(FolderCheckpoint(tmp_path / "out").storage()) == list(FolderCheckpoint(standard).storage())

    def test_an_untied_model(self, bed: Bed, tmp_path: Path) -> None:
        values = config_values(vocab_size=1088, layer_types=["full_attention"], tie_word_embeddings=False)
        write_checkpoint(tmp_path / "model", values)
        build_tiny_tokenizer(tmp_path / "model")
        report = quantize(tmp_path / "model", tmp_path / "out", calibrate=bed.text, effort="standard", target_bpw=5.5)
        assert 5.3 < report.bits_per_weight("text") <= 5.5


class TestResuming:
    def test_goes_on_where_it_was_killed(self, bed: Bed, standard: Path, tmp_path: Path) -> None:
        class Killed(BaseException):
            pass

        def kill(done: int, total: int, what: str) -> None:
            if what == "layers.1.mlp.up_proj.weight":
                raise Killed

        out = tmp_path / "out"
        with pytest.raises(Killed) as killed:
            quantize(bed.model, out, calibrate=bed.text, keep_bits=True, progress=kill)
        assert not out.exists()
        (note,) = killed.value.__notes__
        assert re.fullmatch(
            rf"what is calibrated so far \(\d.* MB\) is kept in {tmp_path}/\.out\.calibration: "
            rf"the same command goes on from it, `edgeq clean {tmp_path}` removes it",
            note,
        )
        before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.calibration").glob("layers*")}
        assert "layers.1.self_attn.q_proj.weight.safetensors" in before
        seen = list[str]()
        quantize(
            bed.model, out, calibrate=bed.text, keep_bits=True, progress=lambda done, total, what: seen.append(what)
        )
        assert "layers.0.mlp.up_proj.weight" not in seen[: seen.index("mtp.fc.weight")]
        assert weights(out) == weights(standard)
        assert not (tmp_path / ".out.calibration").exists()

    def test_any_byte_of_the_source_starts_anew(self, bed: Bed, tmp_path: Path) -> None:
        """Whichever it is: a matrix of the file as it was before never gets into the result."""
        model = tmp_path / "model"
        shutil.copytree(bed.model, model)
        name = "model.language_model.layers.1.mlp.down_proj.weight"
        seen = list[str]()

        def stop(done: int, total: int, what: str) -> None:
            seen.append(what)
            if what == "layers.0.mlp.down_proj.weight":
                raise KeyboardInterrupt

        for values in (np.full(1, 7, "<u2"), np.full(1, 8, "<u2")):
            overwrite(model, name, values)
            seen.clear()
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                with pytest.raises(KeyboardInterrupt):
                    quantize(model, tmp_path / "out", calibrate=bed.text, effort="fast", keep_bits=True, progress=stop)
            assert "layers.0.mlp.up_proj.weight" in seen
        assert "an unfinished calibration differs in source: starting anew" in str(told[-1].message)

    def test_another_setting_starts_anew_and_says_so(self, bed: Bed, standard: Path, tmp_path: Path) -> None:
        folder = tmp_path / ".out.calibration"
        folder.mkdir()
        (folder / "asked.json").write_text('{"settings": {"seed": 7}}')
        (folder / "embed_tokens.weight.safetensors").write_bytes(b"of that other run")
        with pytest.warns(
            UserWarning, match=r"an unfinished calibration differs in .*settings \(.*seed.*\), .*: starting anew"
        ):
            quantize(bed.model, tmp_path / "out", calibrate=bed.text, keep_bits=True)
        assert weights(tmp_path / "out") == weights(standard)

    def test_what_is_damaged_is_made_again(self, bed: Bed, standard: Path, tmp_path: Path) -> None:
        def kill(done: int, total: int, what: str) -> None:
            if what == "layers.1.mlp.up_proj.weight":
                for path in (tmp_path / ".out.calibration").glob("*weight.safetensors"):
                    path.write_bytes(path.read_bytes()[:-1])
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quantize(bed.model, tmp_path / "out", calibrate=bed.text, keep_bits=True, progress=kill)
        quantize(bed.model, tmp_path / "out", calibrate=bed.text, keep_bits=True)
        assert weights(tmp_path / "out") == weights(standard)

    def test_nothing_is_left_of_a_run_that_has_done_nothing(self, bed: Bed, tmp_path: Path) -> None:
        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt) as stopped:
            quantize(bed.model, tmp_path / "out", calibrate=bed.text, progress=stop)
        assert not hasattr(stopped.value, "__notes__")
        assert not list(tmp_path.iterdir())

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One line, and nothing half-written; what was there before stays."""

        def full(path: Path, *_: object) -> None:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def keep() -> None:
            with Workspace(tmp_path / "out", {}) as work:
                work.keep_value("costs", 1)
                work.keep_arrays("b", {"x": np.zeros(1, np.float32)})

        monkeypatch.setattr("edgeq.quant.calibrate.workspace.SafetensorsWriter", full)
        with pytest.raises(MemoryBudgetError, match=r"\.out\.calibration could not be written: No space left") as found:
            keep()
        assert "the same command goes on" in found.value.__notes__[0]
        assert {path.name for path in (tmp_path / ".out.calibration").iterdir()} == {"asked.json", "costs.json", "lock"}

    @pytest.mark.parametrize("damage", [b"", b"3", b'{"x": 1}', b'{"value": {}, "sum": "00000000"}', b"[" * 100_000])
    def test_no_value_that_is_damaged_is_read(self, tmp_path: Path, damage: bytes) -> None:
        with Workspace(tmp_path / "out", {}) as work:
            work.keep_value("costs", {"a": [[4, 64, float("inf")]]})
            assert work.value("costs") == {"a": [[4, 64, float("inf")]]}
            (work.folder / "costs.json").write_bytes(damage)
            assert work.value("costs") is None

    def test_no_arrays_that_are_damaged_are_read(self, tmp_path: Path) -> None:
        """A bit in them, or another's file under their name; a run trusts what it has written itself."""
        solved = Solved(
            np.zeros((2, 8), np.uint32), np.ones((2, 1), np.uint16), np.ones((2, 1), np.uint16), 4, 64, 1.0, 2.0, 0.5
        )  # fmt: skip
        with Workspace(tmp_path / "out", {}) as work:
            work.keep_solved("a", solved)
            work.keep_arrays("b", {"block": np.array(3), "x": np.zeros((2, 3), np.float32)})
            file = work.folder / "a.safetensors"
        with Workspace(tmp_path / "out", {}) as work:
            assert work.solved("a").squared_error == 0.5
            assert work.arrays("b") is not None
        whole = file.read_bytes()
        for bad in (
            whole[:-1] + b"\1",
            whole.replace(b"0.5", b"0.6"),
            (work.folder / "b.arrays").read_bytes()[:-1] + b"1",
        ):
            file.write_bytes(bad)
            with Workspace(tmp_path / "out", {}) as work:
                assert work.solved("a") is None


class TestAllocation:
    def test_meets_the_target(self, bed: Bed, tmp_path: Path) -> None:
        rules = ["layers.0.mlp.up_proj=8g32"]
        dry = quantize(bed.model, None, calibrate=bed.text, target_bpw=5.2, types=rules, dry_run=True)
        done = quantize(bed.model, tmp_path / "out", calibrate=bed.text, target_bpw=5.2, types=rules)
        assert 5.0 < done.bits_per_weight("text") <= 5.2
        assert dry.allocation == done.allocation
        kinds = {t.name: t.type for t in done.tensors}
        assert kinds["layers.0.mlp.up_proj.weight"] == "8-bit g32"
        assert len(set(kinds.values())) > 4
        record = json.loads((tmp_path / "out/edgeq.json").read_text())["recipe"]["calibration"]["allocation"]
        assert record["bits"]["embed_tokens.weight"] == kinds["embed_tokens.weight"]

    def test_the_recipes_size_by_default(self, bed: Bed, standard: Path, tmp_path: Path) -> None:
        """No byte more than the recipe takes, other bits, and whatever says no more than the default is the default."""
        done = quantize(bed.model, tmp_path / "out", calibrate=bed.text)
        same = quantize(bed.model, None, calibrate=bed.text, recipe="q4", bits=4, group_size=64, dry_run=True)
        kept = quantize(bed.model, None, calibrate=bed.text, keep_bits=True, dry_run=True)
        assert done.allocation == same.allocation != kept.allocation
        assert kept.nbytes("text") - 3000 < done.nbytes("text") <= kept.nbytes("text")
        assert done.nbytes("mtp") == kept.nbytes("mtp")
        kinds = {t.type for t in done.tensors if t.part == "text"}
        assert len(kinds & {f"{bits}-bit g{size}" for bits in (3, 4, 5, 6, 8) for size in (64, 128)}) > 3
        assert list(FolderCheckpoint(tmp_path / "out").storage()) != list(FolderCheckpoint(standard).storage())

    @pytest.mark.parametrize("settings", [{"bits": 8}, {"target_bpw": 16}])
    def test_nothing_is_measured_where_there_is_room_for_the_largest(
        self, bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
    ) -> None:
        monkeypatch.setattr("edgeq.quant.calibrate.run.measure", None)
        done = quantize(bed.model, tmp_path / "out", calibrate=bed.text, effort="fast", **settings)
        assert {t.type for t in done.tensors if t.part == "text" and "bit" in t.type} == {"8-bit g64"}

    def test_rules_that_leave_nothing_to_choose(self, bed: Bed) -> None:
        done = quantize(bed.model, None, calibrate=bed.text, types=["*=4g32"], dry_run=True)
        assert done.allocation is None

    def test_size(self, bed: Bed, tmp_path: Path) -> None:
        size = quantize(bed.model, None, dry_run=True).nbytes() + 10_000
        done = quantize(bed.model, tmp_path / "out", calibrate=bed.text, effort="fast", target_size=f"{size / 1000}K")
        assert size - 3000 < done.nbytes() <= size

    def test_costs_of_the_head_are_its_divergence(self, bed: Bed) -> None:
        cal = make_calibrator(bed)
        head = "embed_tokens.weight"
        costs = measure(cal, {head: [Q4, QuantSpec(8, 64)]}, 2, np.dtype(np.uint16))[head]
        assert 0 < 20 * costs[QuantSpec(8, 64)] < costs[Q4]


class TestFolding:
    def test_changes_nothing_in_float(self, bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever the factors are: the block's output and its matrices' inputs go together as before."""
        rng, source = np.random.default_rng(0), open_source(bed.model)

        def factors(ws: Any, h: Any, specs: Any, share: Any = None) -> Any:
            s = np.exp(rng.standard_normal(h.columns)).astype(np.float32)
            return s if share is None else s[: share.max() + 1][share]

        monkeypatch.setattr("edgeq.quant.calibrate.folding.column_factors", factors)
        cal = make_calibrator(bed)
        x = rng.standard_normal((128, 64)).astype(np.float32)
        for i, declared in enumerate(cal.declared.layers):
            weights, recorded = cal.weights(declared), dict[str, Recorded]()
            before = cal.float_block(i, weights, x, recorded)
            inputs = {name: read.inputs for name, read in recorded.items()}
            specs = {m.name: Q4 for m in matrices(weights) if "in_proj_a" not in m.name and "in_proj_b" not in m.name}
            folded, changed = fold_block(cal.c, declared, weights, inputs, specs, source)
            again = dict[str, Recorded]()
            after = cal.float_block(i, folded, x, again)
            assert nmse(before, after) < (1e-5 if i == 0 else 1e-10)  # DeltaNet's gates are rounded to bfloat16 again
            assert (
                nmse(inputs[f"layers.{i}.mlp.down_proj.weight"], again[f"layers.{i}.mlp.down_proj.weight"].inputs)
                < 1e-5
            )
            assert f"layers.{i}.input_layernorm.weight" in changed


def test_an_interrupted_command_says_what_it_leaves(bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Calibrator, "_mtp", interrupt)
    words = ["quantize", str(bed.model), "-o", str(tmp_path / "out"), "--calibrate", str(bed.text), "--keep-bits"]
    found = CliRunner().invoke(app, [*words, "--effort", "fast"])
    assert found.exit_code == 130
    assert re.fullmatch(r"note: what is calibrated so far .* is kept in .*`edgeq clean .*` removes it\n", found.output)


@pytest.mark.parametrize("layer", [0, 1])
def test_backends_agree(bed: Bed, layer: int) -> None:
    native = make_calibrator(bed)
    reference = make_calibrator(bed, ops=TappedOps("f32"))
    x = np.random.default_rng(1).standard_normal((128, 64)).astype(np.float32)
    one, other = (c.float_block(layer, c.weights(c.declared.layers[layer]), x) for c in (native, reference))
    assert nmse(other, one) < 1e-10


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "problem"),
        [
            ({"effort": "best"}, "effort is for calibration"),
            ({"target_bpw": 4.6}, "target-bpw is for calibration"),
            ({"keep_bits": True}, "keep-bits is for calibration"),
            ({"calibrate": "t", "target_bpw": 4.6, "keep_bits": True}, "target-bpw and keep-bits contradict"),
            ({"calibrate": "t", "target_size": "1G", "keep_bits": True}, "target-size and keep-bits contradict"),
            ({"calibrate": "t", "bits": 2}, "the recipe's size is too small: the smallest choices take 3"),
            ({"calibrate": "t", "effort": "most"}, "unknown effort 'most'"),
            ({"calibrate": "t", "recipe": "keep"}, "calibration and recipe 'keep' contradict"),
            ({"calibrate": "t", "recipe": "none"}, "calibration and recipe 'none' contradict"),
            ({"calibrate": "t", "target_bpw": 4.6, "target_size": "1G"}, "target-bpw and target-size contradict"),
            ({"calibrate": "t", "target_bpw": 4.6, "bits": 4}, "target-bpw and bits contradict"),
            ({"calibrate": "t", "target_size": "1G", "recipe": "q4"}, "target-size and recipe contradict"),
            ({"calibrate": "t", "target_bpw": 4.6, "group_size": 32}, "target-bpw and group-size contradict"),
            ({"calibrate": "t", "target_bpw": 1.5}, "target-bpw must be"),
            ({"calibrate": "t", "target_bpw": float("nan")}, "target-bpw must be"),
            ({"calibrate": "t", "target_size": "much"}, "target-size 'much' is no size"),
            ({"calibrate": "t", "seed": -1}, "seed must be"),
            ({"calibrate": ""}, "calibrate names no text"),
        ],
    )
    def test_settings(self, bed: Bed, tmp_path: Path, settings: dict[str, Any], problem: str) -> None:
        with pytest.raises(UsageError, match=problem):
            quantize(bed.model, tmp_path / "out", **settings)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("types", [(), ["*.mlp.*=4g32"]])
    def test_a_target_that_is_too_small_is_told_the_least(self, bed: Bed, types: Sequence[str]) -> None:
        """The hint holds when tried; what does not count for a target is not named."""

        def dry(**settings: Any) -> Report:
            return quantize(bed.model, None, calibrate="t", types=types, dry_run=True, **settings)

        with pytest.raises(
            UsageError, match=r"the smallest choices take [34]\..* bits per weight of the lang"
        ) as small:
            dry(target_bpw=2)
        least = re.fullmatch(r"give at least (\d\.\d+)", small.value.hint or "")
        assert least is not None
        assert dry(target_bpw=float(least[1])).allocation
        with pytest.raises(UsageError, match="the smallest choices take"):
            dry(target_bpw=float(least[1]) - 0.01)
        with pytest.raises(UsageError, match="the smallest choices take") as small:
            dry(target_size=10)
        hint = small.value.hint or ""
        least = re.fullmatch(r"give at least (\d+), or leave out the MTP head with `--no-mtp` .*", hint)
        assert least is not None
        assert dry(target_size=int(least[1])).allocation
        with pytest.raises(UsageError, match="the smallest choices take"):
            dry(target_size=int(least[1]) - 1)
        with pytest.raises(UsageError) as small:
            dry(target_size=10, mtp=False)
        assert re.fullmatch(r"give at least \d+", small.value.hint or "")

    def test_a_target_without_anything_to_choose(self, bed: Bed) -> None:
        with pytest.raises(UsageError, match="target-bpw 5: no matrix is left to choose bits for"):
            quantize(bed.model, None, calibrate="t", types=["*=4g32"], target_bpw=5, dry_run=True)

    @pytest.mark.parametrize(
        ("data", "problem"),
        [
            (b"", "has 0 tokens, expected 16"),
            (b"one two", "tokens, expected 16"),
            (b"\xff\xfe text", "is not UTF-8 text"),
            (None, "cannot be read: No such file"),
        ],
    )
    def test_texts(self, bed: Bed, tmp_path: Path, data: bytes | None, problem: str) -> None:
        if data is not None:
            (tmp_path / "text").write_bytes(data)
        with pytest.raises(UsageError, match=problem):
            quantize(bed.model, tmp_path / "out", calibrate=tmp_path / "text")
        assert not list(tmp_path.glob(".*"))

    def test_a_short_text_is_one_window(self, bed: Bed, tmp_path: Path) -> None:
        (tmp_path / "text").write_text(" ".join(WORDS[:20]))
        quantize(bed.model, tmp_path / "out", calibrate=tmp_path / "text", target_bpw=5.5)
        assert FolderCheckpoint(tmp_path / "out").format == "safetensors, group-quantized"

    def test_no_tokenizer(self, bed: Bed, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "model", TINY)
        with pytest.raises(ModelError, match="has no tokenizer"):
            quantize(tmp_path / "model", tmp_path / "out", calibrate=bed.text)

    def test_weights_that_overflow(self, bed: Bed, tmp_path: Path) -> None:
        model = tmp_path / "model"
        shutil.copytree(bed.model, model)
        large = np.full(64, 0x7F00, "<u2")  # 1.7e38 in bfloat16
        overwrite(model, "model.language_model.layers.0.mlp.down_proj.weight", large)
        with pytest.raises(ModelError, match=r"NaN|finite|beyond"):
            quantize(model, tmp_path / "out", calibrate=bed.text)
        assert not (tmp_path / "out").exists()

    def test_nan_is_told_once_with_its_name(self, bed: Bed, tmp_path: Path) -> None:
        model = tmp_path / "model"
        shutil.copytree(bed.model, model)
        overwrite(model, "model.language_model.embed_tokens.weight", np.full(64, 0x7FC0, "<u2"))
        with pytest.raises(ModelError, match=r"^[^:]*model: embed_tokens.weight holds NaN or infinity$"):
            quantize(model, tmp_path / "out", calibrate=bed.text, effort="fast")

    def test_weights_next_to_zero(self, bed: Bed) -> None:
        """Steps whose inverse float32 does not have: no warning, and no NaN."""
        w = (np.random.default_rng(0).standard_normal((8, 64)) * 1e-38).astype(np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rows = round_rows(w, np.eye(64, dtype=np.float32), AffineGrid(Q4, np.dtype(np.float32), 1))
        assert np.abs(rows.weights() - w).max() < 1e-37

    def test_a_damaged_result(self, bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rounded = AffineRounder.__call__

        def damaged(self: AffineRounder, name: str, w: Any, h: Any, /) -> Solved:
            solved = rounded(self, name, w, h)
            return solved._replace(scales=np.zeros_like(solved.scales)) if "down_proj" in name else solved

        monkeypatch.setattr(AffineRounder, "__call__", damaged)
        with pytest.raises(QualityError, match=r"^[^:]*/out: the quantized model is damaged"):
            quantize(bed.model, tmp_path / "out", calibrate=bed.text)
        assert not list(tmp_path.iterdir()), "neither the result nor what it was made from"

    def test_two_runs(self, bed: Bed, tmp_path: Path) -> None:
        def other(done: int, total: int, what: str) -> None:
            with pytest.raises(UsageError, match="another run is calibrating"):
                quantize(bed.model, tmp_path / "out", calibrate=bed.text)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quantize(bed.model, tmp_path / "out", calibrate=bed.text, progress=other)


def test_the_default_text(bed: Bed, tmp_path: Path) -> None:
    windows = read_windows(FolderCheckpoint(bed.model), "default", 4096, 2, 0)
    other = read_windows(FolderCheckpoint(bed.model), "default", 4096, 2, 1)
    assert windows.calibration.shape == other.calibration.shape == (8, 512)
    assert windows.name.startswith("edgeq default")
    assert not np.array_equal(windows.calibration, other.calibration)


def test_command(bed: Bed, tmp_path: Path) -> None:
    words = ["quantize", str(bed.model), "-o", str(tmp_path / "out"), "--calibrate", str(bed.text), "--effort", "fast"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    assert "KL divergence on held-out text" in found.output
    words = ["quantize", str(bed.model), "--calibrate", "--target-bpw", "5", "--dry-run"]  # no text: the default
    dry = CliRunner().invoke(app, words)
    assert "to be chosen for 14 matrices" in dry.output, dry.output
