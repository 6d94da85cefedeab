"""The quantizer from folder to folder: what it writes, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import edgeq
from edgeq.checkpoint import FolderCheckpoint
from edgeq.cli.quantize import quantize as quantize_command
from edgeq.errors import EdgeqError, MemoryBudgetError, ModelError, UsageError
from edgeq.files import publish
from edgeq.formats.affine import dequantize
from edgeq.formats.bf16 import Array, from_float32, to_float32
from edgeq.formats.names import hub_name
from edgeq.formats.safetensors import SafetensorsFile, SafetensorsWriter
from edgeq.quant import matrix, quantizer
from edgeq.quant.provenance import RECORD, verify
from edgeq.quant.quantizer import quantize
from edgeq.quant.report import Report, format_table
from edgeq.testing import config_values, nmse, write_checkpoint
from edgeq.weights import QMatrix, Role, TensorSpec

SMALL = config_values(vision=True, mtp=True, hidden_size=128, intermediate_size=192)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantize") / "source"
    write_checkpoint(folder, SMALL)
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "generation_config.json"):
        (folder / name).write_text("{}")
    (folder / "README.md").write_text("of the source")
    return folder


class Done(NamedTuple):
    folder: Path
    report: Report


@pytest.fixture(scope="session")
def q4(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    out = tmp_path_factory.mktemp("q4") / "out"
    return Done(out, quantize(source, out))


def decoded(folder: FolderCheckpoint, name: str) -> Array:
    m = folder.matrix(name)
    return dequantize(m) if isinstance(m, QMatrix) else to_float32(m)


def overwrite(folder: Path, name: str, change: Callable[[Array], None]) -> None:
    """Change a tensor of a checkpoint in place."""
    file = SafetensorsFile(folder / "model.safetensors")
    array = file.array(hub_name(name))
    start = array.__array_interface__["data"][0] - np.frombuffer(file.mapped, np.uint8).__array_interface__["data"][0]
    writable = np.memmap(file.path, array.dtype, "r+", start, array.shape)
    change(writable)
    writable.flush()


class TestOutput:
    def test_is_a_checkpoint(self, source: Path, q4: Done) -> None:
        before, after = FolderCheckpoint(source), FolderCheckpoint(q4.folder)
        assert after.config == before.config
        assert list(after.tensors) == list(before.tensors)

    def test_report_says_what_is_stored(self, q4: Done) -> None:
        stored = dict(FolderCheckpoint(q4.folder).storage())
        assert {t.name: (t.type, t.nbytes) for t in q4.report.tensors} == {
            spec.name: (storage.type, storage.nbytes) for spec, storage in stored.items()
        }
        file = SafetensorsFile(q4.folder / "model.safetensors")
        assert q4.report.nbytes() == sum(info.end - info.start for info in file.tensors.values())

    def test_errors_in_the_report_are_true(self, source: Path, q4: Done) -> None:
        before, after = FolderCheckpoint(source), FolderCheckpoint(q4.folder)
        for t in q4.report.tensors:
            if t.nmse is not None:
                assert nmse(decoded(before, t.name), decoded(after, t.name)) == pytest.approx(t.nmse, rel=1e-3)
                assert t.nmse < (0.008 if t.type.startswith("4") else 0.0005)

    def test_the_rest_is_untouched(self, source: Path, q4: Done) -> None:
        before, after = FolderCheckpoint(source), FolderCheckpoint(q4.folder)
        for t in q4.report.tensors:
            if t.nmse is None:
                assert after.raw(t.name).dtype == before.raw(t.name).dtype
                assert np.array_equal(after.raw(t.name), before.raw(t.name))

    def test_configuration(self, source: Path, q4: Done) -> None:
        before, after = (json.loads((f / "config.json").read_text()) for f in (source, q4.folder))
        block = after.pop("quantization")
        assert block == after.pop("quantization_config")
        assert {key: block.pop(key) for key in ("bits", "group_size", "mode")} == {
            "bits": 4, "group_size": 64, "mode": "affine"
        }  # fmt: skip
        assert block["language_model.model.layers.0.linear_attn.out_proj"] == {"group_size": 64, "bits": 6}
        before["text_config"]["tie_word_embeddings"] = True  # in both places, for mlx-lm
        assert after == before

    def test_small_files_come_along(self, q4: Done) -> None:
        assert {path.name for path in q4.folder.iterdir()} == {
            "config.json", "model.safetensors", "model.safetensors.index.json", RECORD,
            "tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "generation_config.json",
        }  # fmt: skip
        assert not list(q4.folder.parent.glob(".*"))

    def test_codes_are_aligned(self, q4: Done) -> None:
        file = SafetensorsFile(q4.folder / "model.safetensors")
        assert file.data_start % 64 == 0
        for info in file.tensors.values():
            assert info.start % {"U32": 4, "F32": 4}.get(info.dtype, 2) == 0

    def test_does_not_depend_on_the_extension(
        self, source: Path, q4: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(matrix, "BUILT", False)
        quantize(source, tmp_path / "out", threads=2)
        assert (tmp_path / "out/model.safetensors").read_bytes() == (q4.folder / "model.safetensors").read_bytes()

    def test_shards(self, source: Path, q4: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(quantizer, "_SHARD", 50_000)
        quantize(source, tmp_path / "out")
        names = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
        assert len(names) > 2
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == names
        assert index["metadata"]["total_size"] == q4.report.nbytes()
        one, many = FolderCheckpoint(q4.folder), FolderCheckpoint(tmp_path / "out")
        for name in one.tensors:
            assert np.array_equal(decoded(one, name), decoded(many, name))

    def test_progress(self, source: Path, tmp_path: Path) -> None:
        calls: list[tuple[int, int, str]] = []
        report = quantize(source, tmp_path / "out", progress=lambda *call: calls.append(call))
        done = [call[0] for call in calls]
        assert done == sorted(done)
        assert calls[-1][0] == calls[-1][1] == sum(t.size for t in report.tensors)

    @pytest.mark.parametrize(("dtype", "scales"), [("F16", "F16"), ("F32", "BF16"), ("BF16", "BF16")])
    def test_scales_follow_the_source(self, dtype: str, scales: str, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "in", dtype=dtype)
        quantize(tmp_path / "in", tmp_path / "out")
        file = SafetensorsFile(tmp_path / "out/model.safetensors")
        assert file.tensors["model.language_model.embed_tokens.scales"].dtype == scales
        assert file.tensors["model.language_model.norm.weight"].dtype == dtype

    def test_untied_head_and_text_only_configuration(self, tmp_path: Path) -> None:
        values = config_values(tie_word_embeddings=False)
        write_checkpoint(tmp_path / "in", {**values["text_config"], "model_type": "qwen3_5_text"})
        quantize(tmp_path / "in", tmp_path / "out")
        assert isinstance(FolderCheckpoint(tmp_path / "out").matrix("lm_head.weight"), QMatrix)
        block = json.loads((tmp_path / "out/config.json").read_text())["quantization"]
        assert "language_model.model.layers.0.linear_attn.out_proj" in block

    def test_types_reach_the_file(self, source: Path, tmp_path: Path) -> None:
        quantize(source, tmp_path / "out", types=["*.down_proj=8g32", "*.k_proj=f32"])
        stored = {spec.name: storage.type for spec, storage in FolderCheckpoint(tmp_path / "out").storage()}
        assert stored["layers.0.mlp.down_proj.weight"] == "8-bit g32"
        assert stored["layers.3.self_attn.k_proj.weight"] == "F32"


class TestNone:
    def test_bfloat16_comes_through_bit_for_bit(self, source: Path, tmp_path: Path) -> None:
        report = quantize(source, tmp_path / "out", recipe="none")
        before, after = FolderCheckpoint(source), FolderCheckpoint(tmp_path / "out")
        for name in before.tensors:
            assert np.array_equal(after.raw(name), before.raw(name))
        assert "quantization" not in json.loads((tmp_path / "out/config.json").read_text())
        assert {t.type for t in report.tensors} == {"BF16", "F32"}

    def test_float32_is_rounded_once(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "in", dtype="F32")
        quantize(tmp_path / "in", tmp_path / "out", recipe="none")
        before, after = FolderCheckpoint(tmp_path / "in"), FolderCheckpoint(tmp_path / "out")
        for name, tensor in before.tensors.items():
            raw = before.raw(name)
            exact = tensor.spec.role in (Role.DECAY, Role.GATED_NORM)
            assert np.array_equal(after.raw(name), raw if exact else from_float32(raw))


class TestMLX:
    def test_mlx_lm_runs_it_unchanged(self, tmp_path: Path) -> None:
        """Same greedy tokens, and the same logits but for the order of float32 sums.

        mlx-lm adds the norms' 1 in bfloat16; norms of which 1 + w is a bfloat16 take that rounding out of the
        comparison, and float32 activations the one of every layer.
        """
        pytest.importorskip("mlx_lm")
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.utils import load_model

        config = write_checkpoint(tmp_path / "in", SMALL)
        for spec in (s for s in FolderCheckpoint(tmp_path / "in").tensors.values() if s.spec.role is Role.NORM):
            overwrite(tmp_path / "in", spec.spec.name, _round_to_128ths)
        ids = np.random.default_rng(0).integers(0, config.text.vocab_size, 12).tolist()
        for recipe, types in (("q4", []), ("q8", ["*.k_proj=bf16", "layers.0.*=6g32"])):
            quantize(tmp_path / "in", tmp_path / recipe, recipe=recipe, types=types)
            ours = edgeq.load(tmp_path / recipe, backend="numpy")
            theirs, _ = load_model(tmp_path / recipe)
            assert theirs(mx.array([ids])).dtype == mx.bfloat16  # float32 A_log and gated norm promote nothing
            theirs.set_dtype(mx.float32)
            assert nmse(ours.logits(ids), np.array(theirs(mx.array([ids]))[0])) < 1e-8
            cache, state, tokens = make_prompt_cache(theirs), ours.state(), ids
            for _ in range(32):
                logits, state = ours.forward(tokens, state)
                best = int(np.argmax(logits))
                assert best == int(mx.argmax(theirs(mx.array([tokens]), cache=cache)[0, -1]))
                tokens = [best]


def _round_to_128ths(norm: Array) -> None:
    norm[:] = from_float32((np.round(to_float32(norm) * 128) / 128).astype(np.float32))


class TestRefusals:
    def test_nan_is_named_and_nothing_is_left(self, source: Path, tmp_path: Path) -> None:
        shutil.copytree(source, tmp_path / "in")
        for name in ("layers.1.mlp.up_proj.weight", "layers.0.input_layernorm.weight"):
            overwrite(tmp_path / "in", name, lambda x: x.reshape(-1).__setitem__(7, 0x7FC0))
            with pytest.raises(ModelError, match=f"{name} holds NaN or infinity"):
                quantize(tmp_path / "in", tmp_path / "out")
            assert [path.name for path in tmp_path.iterdir()] == ["in"]

    def test_float16_that_overflows(self, source: Path, tmp_path: Path) -> None:
        shutil.copytree(source, tmp_path / "in")
        (million,) = from_float32(np.array([1e6], np.float32))
        overwrite(tmp_path / "in", "norm.weight", lambda x: x.__setitem__(0, million))
        with pytest.raises(ModelError, match=r"norm.weight has values beyond the range of F16"):
            quantize(tmp_path / "in", tmp_path / "out", types=["norm=f16"])

    def test_quantized_already(self, q4: Done, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="quantized already"):
            quantize(q4.folder, tmp_path / "out")

    def test_existing_folder(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(UsageError, match="exists"):
            quantize(source, tmp_path / "out")

    def test_force_spares_what_is_no_model(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "precious.txt").write_text("mine")
        with pytest.raises(UsageError, match="not a model folder"):
            quantize(source, tmp_path, force=True)
        (tmp_path / "file").write_text("")
        with pytest.raises(UsageError, match="not a folder"):
            quantize(source, tmp_path / "file", force=True)

    def test_source_in_output_and_the_other_way_round(self, source: Path) -> None:
        for out in (source, source / "q4", source.parent):
            with pytest.raises(UsageError, match="overlap"):
                quantize(source, out, force=True)

    def test_no_room(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        with pytest.raises(MemoryBudgetError, match="needs"):
            quantize(source, tmp_path / "new/out")
        assert not (tmp_path / "new").exists()

    def test_no_output(self, source: Path) -> None:
        with pytest.raises(UsageError, match="no output folder"):
            quantize(source, None)

    def test_unwritable_parent(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")  # file modes do not stop root

        monkeypatch.setattr(Path, "mkdir", refuse)
        with pytest.raises(EdgeqError, match="could not be written: Permission denied"):
            quantize(source, tmp_path / "out")


class Interrupted(Exception):
    """Stands for any error."""


class TestAtomicity:
    """However it ends, there is the old folder or the new one, whole, and nothing else."""

    @staticmethod
    def stop_with(error: BaseException) -> Callable[[int, int, str], None]:
        def progress(done: int, total: int, name: str) -> None:
            if done > total // 2:
                raise error

        return progress

    @pytest.mark.parametrize("error", [Interrupted(), KeyboardInterrupt()])
    def test_stopped_halfway(self, source: Path, tmp_path: Path, error: BaseException) -> None:
        with pytest.raises(type(error)):
            quantize(source, tmp_path / "out", progress=self.stop_with(error))
        assert not list(tmp_path.iterdir())

    def test_full_disk(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write = SafetensorsWriter.write

        def write_until_full(self: SafetensorsWriter, name: str, block: Array) -> None:
            if "layers.2" in name:
                raise OSError(errno.ENOSPC, "No space left on device")
            write(self, name, block)

        monkeypatch.setattr(SafetensorsWriter, "write", write_until_full)
        with pytest.raises(EdgeqError, match="could not be written: No space left on device"):
            quantize(source, tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_replacing_keeps_the_old_folder_until_the_new_one_is_whole(self, source: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        quantize(source, out, recipe="q8")
        files = {path.name: path.read_bytes() for path in out.iterdir()}
        with pytest.raises(KeyboardInterrupt):
            quantize(source, out, force=True, progress=self.stop_with(KeyboardInterrupt()))
        assert files == {path.name: path.read_bytes() for path in out.iterdir()}
        quantize(source, out, force=True)
        assert json.loads((out / RECORD).read_text())["recipe"]["name"] == "q4"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_replacing_that_fails_at_the_last_moment(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        quantize(source, out, recipe="q8")

        def fail(*_: Path) -> bool:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(publish, "exchange", fail)
        with pytest.raises(EdgeqError, match="Input/output error"):
            quantize(source, out, force=True)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        verify(out)


class TestProvenance:
    def test_record(self, source: Path, q4: Done) -> None:
        record = json.loads((q4.folder / RECORD).read_text())
        assert record["edgeq"] == edgeq.__version__
        assert record["recipe"] == {"name": "q4", "bits": 4, "group_size": 64, "types": [], "vision": "8"}
        assert record["source"]["name"] == source.name
        assert set(record["source"]["files"]) == {"config.json", "model.safetensors"}
        assert set(verify(q4.folder)) == {path.name for path in q4.folder.iterdir()} - {RECORD}

    def test_hub_id_and_revision_are_known_in_the_cache(self, source: Path, tmp_path: Path) -> None:
        snapshot = tmp_path / "models--Qwen--Qwen3.5-2B/snapshots" / ("0123456789" * 4)
        shutil.copytree(source, snapshot)
        quantize(snapshot, tmp_path / "out")
        record = json.loads((tmp_path / "out" / RECORD).read_text())
        assert (record["source"]["name"], record["source"]["revision"]) == ("Qwen/Qwen3.5-2B", snapshot.name)

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
    def test_a_flipped_bit_is_found(self, q4: Done, tmp_path: Path, name: str) -> None:
        folder = shutil.copytree(q4.folder, tmp_path / "copy")
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
        with pytest.raises(ModelError, match=f"{name} has other contents"):
            verify(folder)

    def test_everything_is_reported_at_once(self, q4: Done, tmp_path: Path) -> None:
        folder = shutil.copytree(q4.folder, tmp_path / "copy")
        (folder / "config.json").write_text("{}")
        (folder / "tokenizer.json").unlink()
        with pytest.raises(ModelError, match=r"config.json has 2 bytes.*tokenizer.json is missing"):
            verify(folder)

    @pytest.mark.parametrize("record", [{}, {"files": {"../x": {"bytes": 1, "sha256": ""}}}, {"files": {"x": 1}}])
    def test_a_record_that_is_none(self, tmp_path: Path, record: dict[str, Any]) -> None:
        (tmp_path / RECORD).write_text(json.dumps(record))
        with pytest.raises(ModelError, match="not a record of files"):
            verify(tmp_path)


class TestReport:
    def test_dry_run_writes_nothing_and_knows_the_sizes(self, source: Path, q4: Done, tmp_path: Path) -> None:
        report = quantize(source, tmp_path / "out", dry_run=True)
        assert not list(tmp_path.iterdir())
        assert report.nbytes() == q4.report.nbytes()
        assert quantize(source, None, dry_run=True).tensors == report.tensors

    def test_every_byte_counts(self, q4: Done) -> None:
        text = [t for t in q4.report.tensors if t.part == "text"]
        assert q4.report.bits_per_weight("text") == 8 * sum(t.nbytes for t in text) / sum(t.size for t in text)
        assert sum(q4.report.nbytes(part) for part in q4.report.parts) == q4.report.nbytes()

    def test_table(self, source: Path, q4: Done) -> None:
        table = format_table(quantize(source, None, dry_run=True))
        row = next(line.split() for line in table.splitlines() if "in_proj_qkv" in line)
        assert row[:6] == ["layers.*.linear_attn.in_proj_qkv.weight", "3", "128", "x", "128", "4-bit"]
        assert f"{q4.report.bits_per_weight('text'):.3f} bits per weight" in table

    @pytest.mark.shared
    @pytest.mark.parametrize(("size", "bits"), [("0.8b", 4.65), ("2b", 4.65), ("4b", 4.65)])
    def test_size_of_the_real_models(self, size: str, bits: float) -> None:
        config = Path(__file__).parents[2] / "shared/qwen3.5" / size / "config.json"
        if not config.exists():
            pytest.skip("../shared is not there")
        assert _planned_bits_per_weight(config) <= bits


def _planned_bits_per_weight(config: Path) -> float:
    """Bits per text weight of q4, from the shapes alone."""
    from edgeq.config import read_config
    from edgeq.quant.recipe import QuantSpec, assign, choose_recipe
    from edgeq.weights import text_tensors

    def nbytes(spec: TensorSpec, storage: object) -> float:
        if isinstance(storage, QuantSpec):
            return spec.size * (storage.bits / 8 + 4 / storage.group_size)
        return spec.size * (4 if spec.role in (Role.DECAY, Role.GATED_NORM) else 2)

    specs = [(spec, spec.name) for spec in text_tensors(read_config(config).text)]
    assignments = assign(specs, choose_recipe("q4", None, None))
    return 8 * sum(nbytes(a.spec, a.storage) for a in assignments) / sum(spec.size for spec, _ in specs)


class TestCommand:
    app = typer.Typer()
    app.command()(quantize_command)

    def run(self, *arguments: object) -> Any:
        return CliRunner().invoke(self.app, [str(a) for a in arguments])

    def test_dry_run_prints_the_table(self, source: Path) -> None:
        result = self.run(source, "--dry-run", "--bits", "8")
        assert result.exit_code == 0
        assert result.stdout.startswith("tensor")
        assert "8-bit g64" in result.stdout

    def test_writes_folder_and_report(self, source: Path, tmp_path: Path) -> None:
        out, report = tmp_path / "out", tmp_path / "report.json"
        result = self.run(source, "-o", out, "--type", "*.down_proj=8", "--report", report)
        assert result.exit_code == 0
        assert result.stdout == ""
        assert "bits per weight" in result.stderr
        tensors = {t["name"]: t for t in json.loads(report.read_text())["tensors"]}
        assert tensors["layers.0.mlp.down_proj.weight"]["type"] == "8-bit g64"
        assert 0 < tensors["layers.0.mlp.up_proj.weight"]["nmse"] < 0.01

    def test_unwritable_report_is_found_before_the_work(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        result = self.run(source, "-o", tmp_path / "out", "--report", tmp_path / "file/report.json")
        assert isinstance(result.exception, EdgeqError)
        assert not (tmp_path / "out").exists()
