"""Checkpoints that other tools have quantized: every format's own files, read to the bit, and refusals by name."""

from __future__ import annotations

import json
import lzma
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Run, leave_home, runner
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_forms import Form, Tensors, linear, pack_folder, read_tensors, stream, twin, write_tensors

import edgeq
from edgeq.backends import available
from edgeq.checkpoint import FolderCheckpoint, open_checkpoint
from edgeq.checkpoint.packing import Packing
from edgeq.errors import ModelError
from edgeq.formats.affine import dequantize, mlx_layout
from edgeq.formats.bf16 import Float32, from_float32, round_to, to_float32
from edgeq.formats.names import neutral_name
from edgeq.formats.packed import Float8, Packed, fields
from edgeq.formats.safetensors import SafetensorsFile
from edgeq.quant import quantize, verify
from edgeq.quant.gguf_export import export_gguf
from edgeq.testing import config_values, nmse, write_checkpoint
from edgeq.weights import QMatrix, Role, TensorSpec

FIXTURES = Path(__file__).parent / "data" / "packed.safetensors.xz"
CASES = [
    *(f"gptq-{bits}" for bits in (2, 3, 4, 8)), "gptq_v2-3", "gptq_v2-4", "gptq-sym", "gptq-order", "gptq-16",
    *(f"auto_round-auto_gptq-{bits}" for bits in (2, 3, 4, 8)), *(f"auto_round-{bits}" for bits in (4, 5, 6)),
    "auto_round-auto_awq", "awq-gemm", "awq-gemv", "pack-quantized-4", "pack-quantized-8", "pack-quantized-asym-3",
    "pack-quantized-asym-4", "pack-quantized-channel", "int-quantized-sym", "int-quantized-asym",
    "float-quantized-channel", "float-quantized-tensor", "float-quantized-block", "fp8-blocks", "mxfp8-quantized",
    "mxfp4-quantized",
]  # fmt: skip


def opened(folder: Path) -> FolderCheckpoint:
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, FolderCheckpoint)
    return checkpoint


def decoded(matrix: Any) -> Float32:
    return dequantize(matrix) if isinstance(matrix, QMatrix) else to_float32(matrix)


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory: pytest.TempPathFactory) -> SafetensorsFile:
    path = tmp_path_factory.mktemp("packed") / "packed.safetensors"
    path.write_bytes(lzma.decompress(FIXTURES.read_bytes()))
    return SafetensorsFile(path)


class TestOwnWriters:
    """What compressed-tensors, AutoRound, AutoAWQ and GPTQModel have packed (tools/make_packed_fixtures.py)."""

    def matrix(self, fixtures: SafetensorsFile, case: str) -> Packed:
        parts = {n.removeprefix(f"{case}/"): n for n in fixtures.tensors if n.startswith(f"{case}/")}
        packing = Packing(
            Path("folder"),
            {"quantization_config": json.loads(fixtures.metadata[case])},
            {f"m.{part}": fixtures.tensors[name] for part, name in parts.items()},
            lambda name: fixtures.array(parts[name.removeprefix("m.")]),
        )
        weight = next(part for part in ("qweight", "weight_packed", "weight") if part in parts)
        matrix = packing.open(TensorSpec("x.weight", (32, 128), Role.LINEAR), f"m.{weight}")
        assert matrix is not None
        return matrix

    def weights(self, fixtures: SafetensorsFile, case: str) -> Float32:
        if f"{case}/in/weights" in fixtures.tensors:
            return to_float32(fixtures.array(f"{case}/in/weights"))
        codes, zeros, scales, columns = (
            fixtures.array(f"{case}/in/{part}") for part in ("codes", "zeros", "scales", "columns")
        )
        return (codes.astype(np.float32) - zeros[:, columns]) * scales.astype(np.float32)[:, columns]

    def test_all_of_them(self, fixtures: SafetensorsFile) -> None:
        assert set(fixtures.metadata) == set(CASES)

    @pytest.mark.parametrize("case", CASES)
    def test_weights_to_the_bit(self, fixtures: SafetensorsFile, case: str) -> None:
        matrix, expected = self.matrix(fixtures, case), self.weights(fixtures, case)
        assert np.array_equal(matrix.rows(slice(None)), expected)
        some = np.array([30, 1, 17, 17])
        assert np.array_equal(matrix.rows(some), expected[some])
        assert np.array_equal(matrix.rows(slice(7, 21)), expected[7:21])
        computed = matrix.matrix()
        if not isinstance(computed, QMatrix):  # what no groups hold: rounded once
            assert case == "gptq-order" or "fp8-" in case or "float" in case
            expected = to_float32(round_to(expected, computed.dtype))
        assert np.array_equal(decoded(computed), expected)
        arrays = computed.arrays if isinstance(computed, QMatrix) else [computed]
        assert sum(x.nbytes for x in arrays) <= matrix.memory_nbytes

    def test_mlx_gets_16_bits_where_they_are_exact(self, fixtures: SafetensorsFile) -> None:
        for case in ("gptq-sym", "pack-quantized-4", "pack-quantized-8"):
            matrix = self.matrix(fixtures, case).matrix()
            assert isinstance(matrix, QMatrix)
            bfloat = matrix.replaced(scales=from_float32(to_float32(matrix.factors[0])))
            for w in (matrix, bfloat):
                explicit = mlx_layout(w)
                assert [x.dtype for x in explicit.factors] == [w.factors[0].dtype] * 2
                assert np.array_equal(dequantize(explicit), dequantize(w))

    def test_what_is_packed_the_same_way_is_not_copied(self, fixtures: SafetensorsFile) -> None:
        matrix = self.matrix(fixtures, "pack-quantized-4").matrix()
        assert isinstance(matrix, QMatrix)
        stored = fixtures.array("pack-quantized-4/weight_packed")
        assert np.shares_memory(matrix.codes, stored)
        assert np.shares_memory(matrix.scales, fixtures.array("pack-quantized-4/weight_scale"))


class TestFields:
    @given(st.integers(1, 8), st.integers(1, 70), st.randoms(use_true_random=False))
    @settings(max_examples=50)
    def test_a_stream_of_any_width(self, bits: int, count: int, random: Any) -> None:
        codes = np.array([[random.randrange(1 << bits) for _ in range(count)] for _ in range(3)])
        at = np.array([random.randrange(count) for _ in range(5)])
        assert np.array_equal(fields(stream(codes, bits).view(np.uint32), bits, at), codes[:, at])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    write_checkpoint(folder, config_values(vision=True, mtp=True))
    return folder


FORMS: dict[str, Form] = {
    "GPTQ 4-bit g32": Form("gptq"),
    "GPTQ 3-bit g64": Form("gptq_v2", 3, 64),
    "GPTQ 8-bit per channel": Form("gptq", 8, -1, sym=True, scales="BF16"),
    "GPTQ 4-bit g16": Form("gptq", 4, 16),
    "GPTQ 4-bit g32, columns in act order": Form("gptq", order=True),
    "AWQ 4-bit g64": Form("gemm", group=64),
    "AWQ 4-bit g32": Form("gemv"),
    "compressed-tensors 4-bit g32": Form("pack", sym=True, scales="BF16"),
    "compressed-tensors 8-bit g64": Form("pack", 8, 64),
    "compressed-tensors 4-bit g32, columns in act order": Form("pack", order=True),
    "compressed-tensors 8-bit per channel": Form("int8", 8, -1, sym=True, scales="BF16"),
    "FP8 blocks of 48 x 32": Form("float8", scales="BF16"),
    "MXFP8": Form("mxfp8", 8, 32),
    "MXFP4": Form("mxfp4"),
}
IN_16_BITS = ("order", "FP8 ")


class TestFolders:
    @pytest.mark.parametrize("name", FORMS)
    def test_every_matrix(self, source: Path, tmp_path: Path, name: str) -> None:
        weights = pack_folder(source, tmp_path / "packed", FORMS[name])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = opened(tmp_path / "packed")
        assert checkpoint.format == f"safetensors, {name}"
        stored = {spec.name: kept for spec, kept in checkpoint.storage()}
        for file_name, expected in weights.items():
            matrix = str(neutral_name(file_name))
            assert stored[matrix].type == name
            assert np.array_equal(checkpoint.dense(matrix), expected)
            assert np.array_equal(checkpoint.rows(matrix, slice(3, 9)), expected[3:9])
            if not any(kind in name for kind in IN_16_BITS):
                assert np.array_equal(decoded(checkpoint.matrix(matrix)), expected)
        plain = opened(source)
        assert np.array_equal(checkpoint.dense("visual.blocks.0.attn.qkv.weight"),
                              plain.dense("visual.blocks.0.attn.qkv.weight"))  # fmt: skip
        total = sum(kept.nbytes for kept in stored.values())
        assert total == sum(i.end - i.start for f in checkpoint.files for i in f.tensors.values())

    @pytest.mark.parametrize("name", ["GPTQ 4-bit g32", "AWQ 4-bit g32", "compressed-tensors 4-bit g32"])
    def test_runs_as_its_dequantized_twin(self, source: Path, tmp_path: Path, name: str) -> None:
        weights = pack_folder(source, tmp_path / "packed", FORMS[name])
        twin(source, tmp_path / "twin", weights)
        packed, plain = (edgeq.load(tmp_path / kind, backend="numpy") for kind in ("packed", "twin"))
        ids = [5, 17, 33, 2, 250, 9]
        assert np.array_equal(packed.forward(ids)[0], plain.forward(ids)[0])

    @pytest.mark.parametrize("backend", [b.name for b in available() if b.ops and b.name != "numpy"])
    @pytest.mark.parametrize("name", ["GPTQ 4-bit g16", "AWQ 4-bit g64", "GPTQ 8-bit per channel"])
    def test_on_other_backends(self, source: Path, tmp_path: Path, backend: str, name: str) -> None:
        """In groups of 16, with float32 scales and biases, and with bfloat16 ones and a zero point. The native CPU
        backend's 8-bit activations are what differs: 5e-3 at most for these weights, which are large."""
        pack_folder(source, tmp_path / "packed", FORMS[name])
        ids = list(range(20))
        one, other = (edgeq.load(tmp_path / "packed", backend=b).forward(ids)[0] for b in (backend, "numpy"))
        assert nmse(one, other) < 1e-2


class TestQuantize:
    """From packed matrices: groups are kept to the bit, unless other bits are asked for."""

    @pytest.mark.parametrize(
        "name", [name for name in FORMS if not any(kind in name for kind in (*IN_16_BITS, "g16", "MXFP"))]
    )
    def test_groups_are_kept(self, source: Path, tmp_path: Path, name: str) -> None:
        weights = pack_folder(source, tmp_path / "packed", FORMS[name])
        report = quantize(tmp_path / "packed", tmp_path / "out")
        assert not report.warnings
        before, after = opened(tmp_path / "packed"), opened(tmp_path / "out")
        for spec, _ in before.storage():
            assert np.array_equal(before.dense(spec.name), after.dense(spec.name)), spec.name
        kinds = {spec.name: kept.type for spec, kept in after.storage()}
        assert kinds["layers.0.mlp.up_proj.weight"].startswith(f"{FORMS[name].bits}-bit g")
        assert kinds["layers.0.linear_attn.in_proj_a.weight"] == kinds["embed_tokens.weight"] == "BF16"
        assert len(weights) == sum("-bit" in kind for kind in kinds.values())
        verify(tmp_path / "out")

    @pytest.mark.parametrize("name", ["GPTQ 4-bit g16", "GPTQ 4-bit g32, columns in act order"])
    def test_what_no_groups_hold_is_rounded_once(self, source: Path, tmp_path: Path, name: str) -> None:
        weights = pack_folder(source, tmp_path / "packed", FORMS[name])
        report = quantize(tmp_path / "packed", tmp_path / "out", recipe="keep")
        assert f"{len(weights)} matrices" in report.warnings[0]
        after = opened(tmp_path / "out")
        for file_name, expected in weights.items():
            assert np.array_equal(after.dense(str(neutral_name(file_name))), to_float32(from_float32(expected)))

    @pytest.mark.parametrize("name", ["FP8 blocks of 48 x 32", "GPTQ 4-bit g32"])
    def test_a_recipe_quantizes_the_weights(self, source: Path, tmp_path: Path, name: str) -> None:
        weights = pack_folder(source, tmp_path / "packed", FORMS[name])
        twin(source, tmp_path / "twin", weights)
        recipe = "q8" if "GPTQ" in name else None
        report = quantize(tmp_path / "packed", tmp_path / "out", recipe=recipe)
        quantize(tmp_path / "twin", tmp_path / "from_twin", recipe=recipe)
        assert bool(report.warnings) == ("GPTQ" in name)
        one, other = opened(tmp_path / "out"), opened(tmp_path / "from_twin")
        for spec, kept in one.storage():
            assert np.array_equal(one.dense(spec.name), other.dense(spec.name)), spec.name
            assert kept.type == dict(other.storage())[spec].type

    def test_to_gguf(self, source: Path, tmp_path: Path) -> None:
        weights = pack_folder(source, tmp_path / "packed", FORMS["AWQ 4-bit g64"])
        export_gguf(opened(tmp_path / "packed"), tmp_path / "model.gguf", "f32")
        exported = open_checkpoint(tmp_path / "model.gguf")
        for file_name, expected in weights.items():
            if ".layers." in file_name and "mtp" not in file_name:
                assert np.array_equal(exported.dense(str(neutral_name(file_name))), expected)


UP = "model.language_model.layers.1.mlp.up_proj"


def repack(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of a checkpoint."""
    tensors = read_tensors(folder)
    change(tensors)
    write_tensors(folder / "model.safetensors", tensors)


def set_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def set_method(method: str, values: dict[str, Any]) -> None:
    values["quantization_config"] = {"quant_method": method}


class TestWhatFoldersHave:
    """Odd, and right."""

    @pytest.fixture
    def gptq(self, source: Path, tmp_path: Path) -> Path:
        pack_folder(source, tmp_path / "packed", Form("gptq"))
        return tmp_path / "packed"

    def test_quantize_config_json_only(self, gptq: Path) -> None:
        expected = opened(gptq).dense("layers.1.mlp.up_proj.weight")
        block = json.loads((gptq / "config.json").read_text())["quantization_config"]
        set_config(gptq, lambda values: values.pop("quantization_config"))
        (gptq / "quantize_config.json").write_text(
            json.dumps({k: block[k] for k in ("bits", "group_size", "desc_act")})
        )
        assert np.array_equal(opened(gptq).dense("layers.1.mlp.up_proj.weight"), expected)
        assert gptq / "quantize_config.json" in opened(gptq).config_files

    def test_two_files_that_agree_or_not(self, gptq: Path) -> None:
        """What one leaves out the other may say."""
        expected = opened(gptq).dense("layers.1.mlp.up_proj.weight")
        set_config(gptq, lambda values: values["quantization_config"].pop("checkpoint_format"))
        said = {"bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}
        (gptq / "quantize_config.json").write_text(json.dumps(said))
        assert not np.array_equal(opened(gptq).dense("layers.1.mlp.up_proj.weight"), expected)
        set_config(gptq, lambda values: values["quantization_config"].update(checkpoint_format="gptq"))
        with pytest.raises(
            ModelError, match=r"quantization_config and quantize_config.json differ in checkpoint_format"
        ):
            opened(gptq)

    @pytest.mark.parametrize(("kind", "key"), [("gptq", "checkpoint_format"), ("gemm", "version")])
    def test_null_is_not_set(self, source: Path, tmp_path: Path, kind: str, key: str) -> None:
        pack_folder(source, tmp_path / "packed", Form(kind))
        expected = opened(tmp_path / "packed").dense("layers.1.mlp.up_proj.weight")
        set_config(tmp_path / "packed", lambda values: values["quantization_config"].update({key: None}))
        assert np.array_equal(opened(tmp_path / "packed").dense("layers.1.mlp.up_proj.weight"), expected)

    @pytest.mark.parametrize("form", ["dense", "pack-quantized"])
    def test_saved_without_compression(self, source: Path, tmp_path: Path, form: str) -> None:
        """compressed-tensors leaves the scales beside the weights that it has not packed."""
        left: Tensors = {
            f"{UP}.weight_scale": ("BF16", np.ones((128, 2), np.uint16)),
            f"{UP}.weight_zero_point": ("I8", np.zeros((128, 2), np.int8)),
        }
        twin(source, tmp_path / "plain", {})
        write_tensors(tmp_path / "plain" / "model.safetensors", {**read_tensors(source), **left})
        block = {"quant_method": "compressed-tensors", "format": form}
        set_config(tmp_path / "plain", lambda values: values.update(quantization_config=block))
        if form == "dense":
            with pytest.warns(UserWarning, match="not quantized, although its configuration says compressed-tensors"):
                checkpoint = FolderCheckpoint(tmp_path / "plain")
            name = "layers.1.mlp.up_proj.weight"
            assert np.array_equal(checkpoint.dense(name), opened(source).dense(name))
        else:
            with pytest.raises(ModelError, match="does not hold the tensors"):
                opened(tmp_path / "plain")

    def test_a_broken_leftover_stops_no_plain_model(self, source: Path, tmp_path: Path) -> None:
        twin(source, tmp_path / "plain", {})
        (tmp_path / "plain" / "quantize_config.json").write_text("{")
        assert opened(tmp_path / "plain").format == "safetensors"

    def test_in_text_config(self, gptq: Path) -> None:
        set_config(gptq, lambda v: v["text_config"].update(quantization_config=v.pop("quantization_config")))
        assert opened(gptq).format == "safetensors, GPTQ 4-bit g32"

    def test_overrides_by_pattern(self, source: Path, tmp_path: Path) -> None:
        """`dynamic` of GPTQ: other bits, other groups, not at all."""
        form = Form("gptq", config={"dynamic": {"+:.*up_proj": {"bits": 8, "group_size": 64}, "-:.*down_proj": {}}})
        pack_folder(source, tmp_path / "packed", form, lambda name: linear(name) and "down_proj" not in name)
        parts, expected = Form("gptq", 8, 64).pack((128, 64), np.random.default_rng(3))
        repack(tmp_path / "packed", lambda tensors: tensors.update({f"{UP}.{part}": x for part, x in parts.items()}))
        checkpoint = opened(tmp_path / "packed")
        kinds = {spec.name: kept.type for spec, kept in checkpoint.storage()}
        assert kinds["layers.1.mlp.up_proj.weight"] == "GPTQ 8-bit g64"
        assert kinds["layers.1.mlp.gate_proj.weight"] == "GPTQ 4-bit g32"
        assert kinds["layers.1.mlp.down_proj.weight"] == "BF16"
        assert np.array_equal(checkpoint.dense("layers.1.mlp.up_proj.weight"), expected)
        quantize(tmp_path / "packed", tmp_path / "out")
        assert np.array_equal(opened(tmp_path / "out").dense("layers.1.mlp.up_proj.weight"), expected)

    @pytest.mark.parametrize("kind", ["gptq", "pack"])
    def test_a_quantized_head(self, source: Path, tmp_path: Path, kind: str) -> None:
        """It is the head's, whatever the flag says that ties it to the embedding."""
        pack_folder(source, tmp_path / "packed", Form(kind))
        parts, expected = Form(kind, config={}).pack((288, 64), np.random.default_rng(3))
        repack(tmp_path / "packed", lambda tensors: tensors.update({f"lm_head.{part}": x for part, x in parts.items()}))
        with pytest.warns(UserWarning, match="the lm_head is used"):
            checkpoint = opened(tmp_path / "packed")
        assert np.array_equal(checkpoint.dense("lm_head.weight"), expected)

    def test_everything_quantized(self, source: Path, tmp_path: Path) -> None:
        """Embedding, gates and the tower's matrices, which have biases of their own."""
        plain = {spec.name for spec, _ in opened(source).storage() if spec.is_matrix and len(spec.shape) == 2}
        weights = pack_folder(
            source, tmp_path / "packed", Form("pack", sym=True, group=16),
            lambda name: neutral_name(name) in plain and "pos_embed" not in name,
        )  # fmt: skip
        checkpoint = opened(tmp_path / "packed")
        assert len(weights) == len(plain) - 1
        assert all(np.array_equal(checkpoint.dense(str(neutral_name(n))), x) for n, x in weights.items())
        model = edgeq.load(tmp_path / "packed", backend="numpy")
        assert np.isfinite(model.forward([1, 2, 3])[0]).all()

    @pytest.mark.parametrize("size", [1024, 48, 100, -1])
    def test_odd_groups(self, source: Path, tmp_path: Path, size: int) -> None:
        """Larger than a row, not dividing it, and not dividing it into runs that a kernel has."""
        weights = pack_folder(source, tmp_path / "packed", Form("gptq", group=size))
        checkpoint = opened(tmp_path / "packed")
        for file_name, expected in weights.items():
            name = str(neutral_name(file_name))
            assert np.array_equal(checkpoint.dense(name), expected)
            if size != 100 or expected.shape[1] <= 100:
                assert np.array_equal(decoded(checkpoint.matrix(name)), expected)
            else:
                with pytest.warns(UserWarning, match="GPTQ 4-bit g100: such matrices take 16 bits"):
                    assert not isinstance(opened(tmp_path / "packed").matrix(name), QMatrix)

    def test_whole_groups_in_another_order(self, source: Path, tmp_path: Path) -> None:
        """`g_idx` that only says which scales a run of columns has: still groups."""
        pack_folder(source, tmp_path / "packed", Form("gptq"))
        order = np.repeat([1, 0], 32).astype(np.int32)
        before = opened(tmp_path / "packed").matrix("layers.1.mlp.up_proj.weight")
        repack(tmp_path / "packed", lambda tensors: tensors.update({f"{UP}.g_idx": ("I32", order)}))
        checkpoint = opened(tmp_path / "packed")
        after = checkpoint.matrix("layers.1.mlp.up_proj.weight")
        assert isinstance(before, QMatrix)
        assert isinstance(after, QMatrix)
        assert np.array_equal(after.factors[0], before.factors[0][:, ::-1])
        assert np.array_equal(dequantize(after), checkpoint.dense("layers.1.mlp.up_proj.weight"))

    @pytest.mark.parametrize("unused", [0, -1])
    def test_g_idx_that_nobody_filled_in(self, gptq: Path, unused: int) -> None:
        expected = opened(gptq).dense("layers.1.mlp.up_proj.weight")
        repack(gptq, lambda tensors: tensors.update({f"{UP}.g_idx": ("I32", np.full(64, unused, np.int32))}))
        assert np.array_equal(opened(gptq).dense("layers.1.mlp.up_proj.weight"), expected)

    def test_biases_of_zeros_and_scales_of_activations(self, gptq: Path) -> None:
        repack(gptq, lambda tensors: tensors.update({
            f"{UP}.bias": ("F16", np.zeros(128, np.float16)), f"{UP}.input_scale": ("F32", np.ones(1, np.float32))
        }))  # fmt: skip
        opened(gptq)

    def test_zero_points_that_are_not_packed(self, source: Path, tmp_path: Path) -> None:
        """As compressed-tensors wrote them at first."""
        parts, expected = Form("pack").pack((128, 64), np.random.default_rng(3))
        stored = fields(parts["weight_zero_point"][1].view(np.uint32).T, 4, np.arange(128)).T
        parts["weight_zero_point"] = ("I8", (stored.astype(np.int8) - 8))
        pack_folder(source, tmp_path / "packed", Form("pack"))
        repack(tmp_path / "packed", lambda tensors: tensors.update({f"{UP}.{part}": x for part, x in parts.items()}))
        assert np.array_equal(opened(tmp_path / "packed").dense("layers.1.mlp.up_proj.weight"), expected)

    @pytest.mark.parametrize("said", [None, [48, 32], [64, 64]])
    def test_float8_blocks(self, source: Path, tmp_path: Path, said: list[int] | None) -> None:
        """Where nothing is said, blocks are even; what is said has to fit."""
        weights = pack_folder(source, tmp_path / "packed", Form("float8", config={"weight_block_size": said}))
        if said == [48, 32]:
            checkpoint = opened(tmp_path / "packed")
            assert all(np.array_equal(checkpoint.dense(str(neutral_name(n))), x) for n, x in weights.items())
        else:  # 128 rows are three blocks of 48, cut short
            with pytest.raises(ModelError, match=r"which no block size of .* makes"):
                opened(tmp_path / "packed")

    def test_float8_in_even_blocks_of_which_nothing_is_said(self, source: Path, tmp_path: Path) -> None:
        plain = read_tensors(source)
        codes = np.random.default_rng(0).integers(0, 126, (128, 64)).astype(np.uint8)
        grid = np.array([[1, 2], [3, 4]], np.float32) / 1024
        parts: Tensors = {f"{UP}.weight": ("F8_E4M3", codes), f"{UP}.weight_scale_inv": ("F32", grid)}
        twin(source, tmp_path / "packed", {})
        write_tensors(tmp_path / "packed" / "model.safetensors", {**plain, **parts})
        set_config(tmp_path / "packed", partial(set_method, "fp8"))
        dense = opened(tmp_path / "packed").dense("layers.1.mlp.up_proj.weight")
        one = Float8(codes, np.ones((1, 1), np.float32), (128, 64), "F8_E4M3").rows(slice(None))
        assert np.array_equal(dense, one * np.kron(grid, np.ones((64, 32), np.float32)))

    def test_shards(self, gptq: Path) -> None:
        expected = opened(gptq).dense("layers.1.mlp.up_proj.weight")
        tensors = read_tensors(gptq)
        (gptq / "model.safetensors").unlink()
        names = sorted(tensors)
        halves = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
        for file, own in halves.items():
            write_tensors(gptq / file, {name: tensors[name] for name in own})
        index = {"weight_map": {name: file for file, own in halves.items() for name in own}}
        (gptq / "model.safetensors.index.json").write_text(json.dumps(index))
        assert np.array_equal(opened(gptq).dense("layers.1.mlp.up_proj.weight"), expected)

    def test_plain_weights_with_a_leftover_configuration(self, source: Path, tmp_path: Path) -> None:
        twin(source, tmp_path / "plain", {})
        for method in ("gptq", "bitsandbytes", "fp8", "modelopt", "something"):
            set_config(tmp_path / "plain", partial(set_method, method))
            with pytest.warns(UserWarning, match=f"its tensors are not quantized, although .* {method}"):
                checkpoint = opened(tmp_path / "plain")
            assert checkpoint.format == "safetensors"
        with pytest.warns(UserWarning, match="something"):
            quantize(tmp_path / "plain", tmp_path / "out", recipe="none")
        assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())

    def test_memory_is_said_beforehand(self, source: Path, tmp_path: Path) -> None:
        for number, form in enumerate(FORMS.values()):
            pack_folder(source, tmp_path / str(number), form)
            checkpoint = opened(tmp_path / str(number))
            warnings.simplefilter("ignore")
            for spec, _ in checkpoint.storage():
                matrix = checkpoint.matrix(spec.name) if spec.is_matrix else None
                arrays = matrix.arrays if isinstance(matrix, QMatrix) else [] if matrix is None else [matrix]
                assert sum(x.nbytes for x in arrays) <= checkpoint.memory_nbytes(spec)

    def test_act_order_and_fp8_say_what_they_cost(self, source: Path, tmp_path: Path) -> None:
        for name, form in FORMS.items():
            if any(kind in name for kind in IN_16_BITS):
                pack_folder(source, tmp_path / name, form)
                with pytest.warns(UserWarning, match="16 bits a weight in memory") as said:
                    edgeq.load(tmp_path / name, backend="numpy").forward([1, 2])
                assert len(said) == 1


U8, BYTES = "U8", np.zeros((128, 32), np.uint8)
KINDS: dict[str, tuple[dict[str, Any], Tensors]] = {
    "bitsandbytes NF4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {
        "weight": (U8, np.zeros((4096, 1), np.uint8)), "weight.absmax": (U8, np.zeros(128, np.uint8)),
        "weight.quant_map": ("F32", np.zeros(16, np.float32)),
        "weight.quant_state.bitsandbytes__nf4": (U8, np.zeros(80, np.uint8)),
    }),
    "bitsandbytes 8-bit": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, {
        "weight": ("I8", np.zeros((128, 64), np.int8)), "SCB": ("F32", np.zeros(128, np.float32)),
    }),
    "NVFP4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, {
        "weight": (U8, BYTES), "weight_scale": ("F8_E4M3", np.zeros((128, 4), np.uint8)),
        "weight_scale_2": ("F32", np.ones((), np.float32)), "input_scale": ("F32", np.ones((), np.float32)),
    }),
    "NVFP4, which": ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, {
        "weight_packed": (U8, BYTES), "weight_scale": ("F8_E4M3", np.zeros((128, 4), np.uint8)),
    }),
    "HQQ": ({"quant_method": "hqq"}, {"W_q": (U8, BYTES), "meta": ("F32", np.ones(1, np.float32))}),
    "EXL2": ({"quant_method": "exl2", "bits": 4.0}, {
        "q_weight": ("I32", np.zeros((8, 128), np.int32)), "q_invperm": ("I16", np.zeros(64, np.int16)),
    }),
    "EXL3": ({"quant_method": "exl3"}, {"trellis": ("I16", np.zeros((4, 8, 64), np.int16))}),
    "AQLM": ({"quant_method": "aqlm"}, {"codebooks": ("F16", np.zeros((1, 8), np.float16))}),
    "EETQ": ({"quant_method": "eetq"}, {
        "weight": ("I8", np.zeros((64, 128), np.int8)), "weight_scales": ("F16", np.zeros(128, np.float16)),
    }),
    "modelopt 'W4A8_AWQ'": ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, {
        "weight": (U8, BYTES), "weight_scale": ("F32", np.zeros((128, 1), np.float32)),
        "pre_quant_scale": ("F32", np.ones(64, np.float32)),
    }),
    "compressed-tensors 'marlin-24'": ({"quant_method": "compressed-tensors", "format": "marlin-24"}, {
        "weight_packed": ("I32", np.zeros((2, 256), np.int32)), "scale_packed": ("F16", np.zeros((1, 128), np.float16)),
    }),
    "'a-new-one'": ({"quant_method": "a-new-one"}, {"codes": (U8, BYTES)}),
}  # fmt: skip


class TestCommands:
    @pytest.fixture
    def run(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
        leave_home(tmp_path, monkeypatch)
        return runner(capsys, monkeypatch)

    @pytest.mark.parametrize("name", ["GPTQ 4-bit g32", "FP8 blocks of 48 x 32"])
    def test_on_a_folder(self, chat_folder: Path, tmp_path: Path, run: Run, name: str) -> None:
        weights = pack_folder(chat_folder, tmp_path / "packed", FORMS[name])
        twin(chat_folder, tmp_path / "twin", weights, "BF16" if "FP8" in name else "F32")
        said = run("info", tmp_path / "packed")
        assert said.code == 0
        assert f"safetensors, {name}" in said.out
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            ask = ("-p", "hi", "--max-tokens", "8", "--temp", "0")
            answers = [run("chat", tmp_path / kind, *ask) for kind in ("packed", "twin")]
        assert answers[0].out == answers[1].out
        assert ("16 bits a weight in memory" in answers[0].err) == ("FP8" in name)
        assert run("export", tmp_path / "packed", "-o", tmp_path / "model.gguf", "--type", "bf16").code == 0
        planned = run("quantize", tmp_path / "packed", "--dry-run")
        assert ("as it was" in planned.out) == ("GPTQ" in name)

    def test_a_refusal(self, chat_folder: Path, tmp_path: Path, run: Run) -> None:
        twin(chat_folder, tmp_path / "other", {})
        repack(tmp_path / "other", lambda tensors: tensors.update({f"{UP}.W_q": (U8, BYTES)}))
        for command in (["info"], ["chat", "-p", "hi"], ["quantize", "--dry-run"]):
            said = run(command[0], tmp_path / "other", *command[1:])
            assert said.code == 4
            assert "is quantized as HQQ, which edgeq does not read" in said.err


class TestDocumentation:
    """docs/reference/formats.md has what is tested here, in the words that a person sees."""

    def rows(self, header: str) -> list[list[str]]:
        text = (Path(__file__).parent.parent / "docs" / "reference" / "formats.md").read_text()
        section = text[text.index("## Quantized by other tools") : text.index("## Refused")]
        table = section[section.index(header) :].split("\n\n")[0].splitlines()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]

    def test_what_is_read(self) -> None:
        said = {row[-1].removeprefix("safetensors, ") for row in self.rows("| what | runs |")}
        assert said - {"AutoRound 4-bit g64", "FP8 per channel", "FP8 per tensor"} == FORMS.keys()

    def test_what_is_refused(self) -> None:
        said = [row[-1] for row in self.rows("| what | edgeq |")]
        assert len(said) == len(KINDS)
        for kind, sentence in zip(KINDS, said, strict=True):
            assert sentence.startswith(f"PATH is quantized as {kind}")
            assert sentence.endswith("which edgeq does not read")


class TestRefusals:
    @pytest.fixture
    def gptq(self, source: Path, tmp_path: Path) -> Path:
        pack_folder(source, tmp_path / "packed", Form("gptq"))
        return tmp_path / "packed"

    @pytest.mark.parametrize("kind", KINDS)
    def test_by_name(self, source: Path, tmp_path: Path, kind: str) -> None:
        config, parts = KINDS[kind]
        twin(source, tmp_path / "other", {})
        set_config(tmp_path / "other", lambda values: values.update(quantization_config=config))

        def change(tensors: Tensors) -> None:
            del tensors[f"{UP}.weight"]
            tensors.update({f"{UP}.{part}": value for part, value in parts.items()})

        repack(tmp_path / "other", change)
        for use in (opened, lambda folder: quantize(folder, tmp_path / "out")):
            with pytest.raises(ModelError, match=f"is quantized as {kind}.*edgeq does not read") as raised:
                use(tmp_path / "other")
            assert "unquantized model" in str(raised.value.hint)
            assert "damaged" not in str(raised.value) + str(raised.value.hint)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"quant_method": None}, "says nothing of how .*qweight is packed"),
            ({"quant_method": "awq", "version": "gemm"}, "qweight is .*, expected"),
            ({"quant_method": "marlin"}, "is quantized as 'marlin'"),
            ({"quant_method": "fp8"}, "is quantized as fp8, with .*qweight"),
            ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
            ({"checkpoint_format": "gptq_p"}, "checkpoint_format 'gptq_p'"),
            ({"bits": 8}, "is not .* at 8 bits"),
            ({"group_size": 64}, "has 2 groups in rows of 64; config.json's quantization_config has group_size 64"),
            ({"group_size": "32"}, "has group_size none"),
        ],
    )
    def test_configurations(self, gptq: Path, change: dict[str, Any], message: str) -> None:
        set_config(gptq, lambda values: values["quantization_config"].update(change))
        repack(gptq, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("g_idx")])
        with pytest.raises(ModelError, match=message):
            opened(gptq)

    @pytest.mark.parametrize(
        ("part", "value", "message"),
        [
            ("qzeros", None, r"missing .*up_proj\.qzeros"),
            ("qweight", ("I32", np.zeros((7, 128), np.int32)), "is not .* at 4 bits"),
            ("qweight", ("I16", np.zeros((8, 128), np.int16)), "is I16, expected I32"),
            ("qweight", ("I32", np.zeros((), np.int32)), "at 4 bits"),
            ("scales", ("F16", np.zeros((2, 127), np.float16)), r"expected \['any', 128\]"),
            ("scales", ("I32", np.zeros((2, 128), np.int32)), "is I32, expected F16"),
            ("g_idx", ("I32", np.full(64, 2, np.int32) - (np.arange(64) < 9)), "groups 1 to 2, expected 0 to 1"),
            ("g_idx", ("I32", np.zeros(63, np.int32)), "expected .64."),
            ("bias", ("F16", np.ones(128, np.float16)), r"unexpected .*up_proj\.bias"),
            ("pairs", ("F16", np.ones(128, np.float16)), "ParoQuant"),
            ("theta", ("F16", np.ones(128, np.float16)), r"unexpected .*up_proj\.theta"),
            ("weight", ("BF16", np.zeros((128, 64), np.uint16)), "are the same tensor"),
        ],
    )
    def test_tensors(self, gptq: Path, part: str, value: Any, message: str) -> None:
        repack(gptq, lambda t: t.pop(f"{UP}.{part}") if value is None else t.update({f"{UP}.{part}": value}))
        with pytest.raises(ModelError, match=message):
            opened(gptq)

    @pytest.mark.parametrize("name", ["linear_attn.in_proj_qkvz.qweight", "linear_attn.in_proj_ba.weight"])
    def test_fused_projections(self, gptq: Path, name: str) -> None:
        def change(tensors: Tensors) -> None:
            for part in ("qweight", "qzeros", "scales", "g_idx"):
                del tensors[f"model.language_model.layers.0.linear_attn.in_proj_qkv.{part}"]
            tensors[f"model.language_model.layers.0.{name}"] = ("I32", np.zeros((8, 192), np.int32))

        repack(gptq, change)
        with pytest.raises(ModelError, match=f"{name}: projections that are fused"):
            opened(gptq)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse compressed-tensors"),
            ({"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}, "transform_config"),
        ],
    )
    def test_what_changes_the_arithmetic(self, source: Path, tmp_path: Path, config: Any, message: str) -> None:
        pack_folder(source, tmp_path / "packed", Form("pack", config=config))
        with pytest.raises(ModelError, match=message):
            opened(tmp_path / "packed")

    def test_a_file_cut_short_while_it_is_open(self, gptq: Path) -> None:
        checkpoint, file = opened(gptq), gptq / "model.safetensors"
        with file.open("r+b") as writable:
            writable.truncate(file.stat().st_size // 2)
        for read in (checkpoint.matrix, checkpoint.dense, partial(checkpoint.rows, rows=slice(0, 1))):
            with pytest.raises(ModelError, match="was cut short"):
                read("layers.1.mlp.up_proj.weight")

    def test_zero_points_that_do_not_fit(self, source: Path, tmp_path: Path) -> None:
        pack_folder(source, tmp_path / "packed", Form("int8", 8, 32))
        change = {f"{UP}.weight_zero_point": ("I8", np.zeros((128, 3), np.int8))}
        repack(tmp_path / "packed", lambda tensors: tensors.update(change))
        with pytest.raises(ModelError, match=r"has zero points \[128, 3\] and scales \[128, 2\]"):
            opened(tmp_path / "packed")

    @pytest.mark.parametrize("form", [Form("gptq", 4, 16), Form("gemm", group=16), Form("int8", 8, -1, sym=True)])
    def test_rows_that_are_no_whole_words(self, tmp_path: Path, form: Form) -> None:
        write_checkpoint(tmp_path / "odd", config_values(intermediate_size=48))
        pack_folder(tmp_path / "odd", tmp_path / "packed", form)
        with pytest.raises(ModelError, match="in rows of 48, expected a multiple of 32") as caught:
            opened(tmp_path / "packed")
        assert "unexpected" not in caught.value.message  # the parts of what is refused are known

    def test_float8_without_scales(self, source: Path, tmp_path: Path) -> None:
        pack_folder(source, tmp_path / "packed", Form("float8"))
        repack(tmp_path / "packed", lambda tensors: tensors.pop(f"{UP}.weight_scale_inv"))
        with pytest.raises(ModelError, match="F8_E4M3 without"):
            opened(tmp_path / "packed")

    def test_scales_that_are_not_numbers(self, gptq: Path, tmp_path: Path) -> None:
        repack(gptq, lambda t: t.update({f"{UP}.scales": ("F16", np.full((2, 128), np.nan, np.float16))}))
        with pytest.raises(ModelError, match="NaN or infinity"):
            edgeq.load(gptq, backend="numpy").forward([1])
        with pytest.raises(ModelError, match="NaN or infinity"):
            quantize(gptq, tmp_path / "out")
        with pytest.raises(ModelError, match="NaN or infinity"):
            opened(gptq).dense("layers.1.mlp.up_proj.weight")
