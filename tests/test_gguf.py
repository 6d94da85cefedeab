"""GGUF: block formats, files of llama.cpp's quantizer, export and back, tokenizers, vision towers, files that lie."""

from __future__ import annotations

import lzma
import shutil
import struct
import time
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizer import build_tiny_tokenizer, link_real_tokenizer
from typer.testing import CliRunner

import edgeq
from edgeq.api import Model
from edgeq.backends import available
from edgeq.backends.numpy import NumpyOps
from edgeq.backends.numpy.ops import matrix_rows
from edgeq.checkpoint import FolderCheckpoint, open_checkpoint
from edgeq.checkpoint.gguf import GGUFCheckpoint
from edgeq.checkpoint.gguf_layout import head_order
from edgeq.config import Linear, Yarn, yarn_attention_factor
from edgeq.errors import EdgeqError, ModelError, UsageError
from edgeq.formats.affine import dequantize, pack
from edgeq.formats.bf16 import Array, Float32
from edgeq.formats.ggml import TYPES, decode
from edgeq.formats.gguf import GGUFFile
from edgeq.formats.safetensors import SafetensorsWriter, dtype_name
from edgeq.hub import DEMO
from edgeq.quant import quantize
from edgeq.quant.gguf_export import EXPORT_TYPES, export_gguf, export_mmproj
from edgeq.testing import config_values, nmse, write_checkpoint
from edgeq.text.tokenizer import Tokenizer
from edgeq.weights import QMatrix

DATA = Path(__file__).parent / "data" / "gguf"
FILES = sorted(path.name.removesuffix(".gguf.xz") for path in DATA.iterdir())
BITS_IN_MEMORY = {
    "Q4_0": 4.5, "Q4_1": 5.0, "Q5_0": 5.5, "Q5_1": 6.0, "Q8_0": 8.5, "Q4_K": 4.625, "Q5_K": 5.625, "Q6_K": 6.5625,
    "Q2_K": 2.625, "Q3_K": 3.5625, "IQ4_NL": 4.5, "IQ4_XS": 4.3125, "MXFP4": 4.25, "NVFP4": 4.5,
}  # fmt: skip
QUANTIZED = {number: t for number, t in TYPES.items() if t.coding is not None}


def read(path: Path) -> GGUFCheckpoint:
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, GGUFCheckpoint)
    return checkpoint


def dense(checkpoint: GGUFCheckpoint, name: str) -> Float32:
    """A matrix or vector as float32."""
    spec = checkpoint.tensors[name].spec
    if len(spec.shape) == 2:
        return matrix_rows(checkpoint.matrix(name), slice(None))
    return checkpoint.dense(name)


class DenseCheckpoint(GGUFCheckpoint):
    """The same weights, dequantized by the `gguf` package: what a float32 run of them computes with."""

    def matrix(self, name: str) -> Array:
        (file_name,), (info,) = self.tensors[name].names, self.tensors[name].infos
        raw = self.file.data(file_name).reshape(info.shape[0], -1)
        x = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[info.type.name])
        order = head_order(name, self.config.text)
        return x if order is None else order.from_file(x)


def unpacked(name: str, folder: Path) -> Path:
    path = folder / f"{name}.gguf"
    path.write_bytes(lzma.decompress((DATA / f"{name}.gguf.xz").read_bytes()))
    return path


class TestBlocks:
    def test_sizes_and_numbers_are_ggml_s(self) -> None:
        for number, kind in TYPES.items():
            theirs = gguf.GGMLQuantizationType(number)
            assert (kind.name, (kind.block, kind.nbytes)) == (theirs.name, gguf.GGML_QUANT_SIZES[theirs])

    @pytest.mark.parametrize("number", QUANTIZED, ids=[t.name for t in QUANTIZED.values()])
    def test_equal_to_gguf_bit_for_bit(self, number: int) -> None:
        kind, rng = TYPES[number], np.random.default_rng(number)
        raw = rng.integers(0, 256, (3000, kind.nbytes), dtype=np.uint8)
        blocks = raw.view(kind.layout).ravel()
        for field in {"d", "dmin", "m"} & set(kind.layout.names or ()):
            if blocks[field].dtype == np.float16:
                blocks[field] = rng.standard_normal(len(blocks)) * 0.1  # random bits are NaN, or beyond float16
            else:
                blocks[field] %= 255  # of an NVFP4 scale they are NaN
        if kind.name == "MXFP4":
            blocks["e"] %= 253  # beyond, some values are infinite, and 255 is NaN
        assert kind.coding is not None
        w = decode(blocks, kind.coding)
        assert w.codes.max() < 1 << w.bits
        w = w.replaced(codes=pack(w.codes, w.bits))
        assert 8 * sum(x.nbytes for x in w.arrays) / (len(blocks) * kind.block) == BITS_IN_MEMORY[kind.name]
        values = dequantize(w)
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(number))
        np.testing.assert_array_equal(values.reshape(expected.shape), expected)

    @pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q6_K"])
    def test_scales_that_are_not_finite_are_refused(self, name: str, tmp_path: Path) -> None:
        path = unpacked(name, tmp_path)
        info = GGUFFile(path).tensors["blk.0.ffn_up.weight"]
        raw = bytearray(path.read_bytes())
        end = info.start + info.nbytes if name == "Q6_K" else info.start + 2  # Q6_K's scale is a block's last field
        raw[end - 2 : end] = np.float16(np.inf).tobytes()
        path.write_bytes(raw)
        with pytest.raises(ModelError, match=r"blk\.0\.ffn_up\.weight holds NaN or infinity"):
            read(path).matrix("layers.0.mlp.up_proj.weight")


class TestFilesOfLlamaCpp:
    """tools/make_gguf_fixtures.py made them: value heads two to a key head."""

    @pytest.mark.parametrize("name", FILES)
    def test_dequantized_values_are_gguf_s(self, name: str, tmp_path: Path) -> None:
        checkpoint = read(unpacked(name, tmp_path))
        assert checkpoint.format.startswith("GGUF, ")
        reference = {t.name: t for t in gguf.GGUFReader(checkpoint.path).tensors}
        for tensor_name, tensor in checkpoint.tensors.items():
            (file_name,) = tensor.names
            theirs = reference[file_name]
            expected = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
            if order := head_order(tensor_name, checkpoint.config.text):
                expected = order.from_file(expected)
            np.testing.assert_array_equal(dense(checkpoint, tensor_name), expected, err_msg=tensor_name)

    @pytest.mark.parametrize("name", FILES)
    def test_runs_as_its_dequantized_weights(self, name: str, tmp_path: Path) -> None:
        path = unpacked(name, tmp_path)
        ids = np.random.default_rng(0).integers(0, 288, 20).tolist()
        quantized, expected = (Model(c, NumpyOps()).logits(ids) for c in (read(path), DenseCheckpoint(path)))
        assert nmse(expected, quantized) <= 1e-9  # the same weights; only sums may run in another order

    @pytest.mark.parametrize("name", FILES)
    def test_native_backend_multiplies_by_every_matrix(self, name: str, tmp_path: Path) -> None:
        backends = {backend.name: backend for backend in available()}
        if backends["cpu"].ops is None:
            pytest.skip(backends["cpu"].reason)
        ops, checkpoint = backends["cpu"].ops(), read(unpacked(name, tmp_path))
        rng = np.random.default_rng(0)
        for spec, storage in checkpoint.storage():
            matrix = checkpoint.matrix(spec.name) if len(spec.shape) == 2 else None
            if not isinstance(matrix, QMatrix):
                continue
            for tokens in (4, 20):  # few and many: two kernels
                x = rng.standard_normal((tokens, spec.shape[1]), np.float32)
                groups = x.reshape(tokens, -1, matrix.group_size)  # the kernels take them as 8-bit integers
                amax = np.abs(groups).max(-1, keepdims=True)
                rounded = np.rint(groups * (np.float32(127) / amax)) * (amax / np.float32(127))
                expected = NumpyOps().linear(rounded.reshape(x.shape), matrix)
                assert nmse(expected, ops.linear(x, ops.matrix(matrix))) <= 1e-11, (
                    spec.name,
                    storage.type,
                )  # float32 sums

    @pytest.mark.parametrize("name", FILES)
    def test_mlx_runs_the_same_weights(self, name: str, tmp_path: Path) -> None:
        pytest.importorskip("mlx.core", reason="MLX is not installed")
        from edgeq.backends.mlx import MlxOps

        checkpoint = read(unpacked(name, tmp_path))
        ids = np.random.default_rng(0).integers(0, 288, 12).tolist()
        expected, found = (Model(checkpoint, ops).logits(ids) for ops in (NumpyOps(), MlxOps(dtype="float32")))
        assert nmse(expected, found) <= 1e-8  # float32 sums in another order, fed back by the delta rule


WIDE: dict[str, Any] = {"linear_key_head_dim": 32, "linear_value_head_dim": 32}  # a head is no narrower than a block
SHAPES = (WIDE, {"linear_num_value_heads": 2}, {"linear_num_value_heads": 8, "tie_word_embeddings": False})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = []
    for i, shape in enumerate(SHAPES):
        folders.append(tmp_path_factory.mktemp("export") / "model")
        write_checkpoint(folders[-1], config_values(mtp=i != 1, eos_token_id=[], **shape), seed=i)
    return folders


class TestExport:
    @pytest.mark.parametrize("shape", range(3))
    @pytest.mark.parametrize("kind", ["f32", "bf16"])
    def test_exact_types_come_back_bit_for_bit(
        self, shape: int, kind: str, folders: list[Path], tmp_path: Path
    ) -> None:
        source = open_checkpoint(folders[shape])
        report = export_gguf(source, tmp_path / "model.gguf", kind)
        assert report.nbytes == (tmp_path / "model.gguf").stat().st_size
        back = read(tmp_path / "model.gguf")
        assert back.config.text == source.config.text
        assert {spec.name for spec, _ in back.storage()} == {spec.name for spec, _ in source.storage()}
        for spec, _ in source.storage():
            if len(spec.shape) == 2:
                expected = matrix_rows(source.matrix(spec.name), slice(None))
            else:
                expected = source.dense(spec.name)
            np.testing.assert_array_equal(dense(back, spec.name), expected, err_msg=spec.name)
        ids = [5, 9, 2, 250, 17]
        np.testing.assert_array_equal(Model(back, NumpyOps()).logits(ids), Model(source, NumpyOps()).logits(ids))

    @pytest.mark.parametrize("kind", [kind for kind in EXPORT_TYPES if kind[0] == "q" and "k" not in kind])
    def test_quantized_types_are_gguf_s(self, kind: str, folders: list[Path], tmp_path: Path) -> None:
        source = open_checkpoint(folders[0])
        export_gguf(source, tmp_path / "model.gguf", kind)
        back = read(tmp_path / "model.gguf")
        stored = {spec.name: storage.type for spec, storage in back.storage()}
        assert stored["layers.0.mlp.up_proj.weight"] == kind.upper()
        assert stored["embed_tokens.weight"] == stored["layers.0.linear_attn.in_proj_a.weight"] == "Q8_0"
        for name in ("layers.0.mlp.down_proj.weight", "embed_tokens.weight", "layers.3.self_attn.q_proj.weight"):
            type_ = gguf.GGMLQuantizationType[stored[name]]
            raw = gguf.quants.quantize(matrix_rows(source.matrix(name), slice(None)), type_)
            np.testing.assert_array_equal(dense(back, name), gguf.quants.dequantize(raw, type_))

    def test_folders_that_are_quantized(self, folders: list[Path], tmp_path: Path) -> None:
        quantize(folders[0], tmp_path / "q4", group_size=32)
        source = open_checkpoint(tmp_path / "q4")
        export_gguf(source, tmp_path / "model.gguf", "f32")
        ours = Model(source, NumpyOps()).logits([5, 9, 2])
        np.testing.assert_array_equal(Model(read(tmp_path / "model.gguf"), NumpyOps()).logits([5, 9, 2]), ours)

    @pytest.mark.parametrize("kind", ["f16", "q8_0", "q5_1", "q4_0"])
    def test_weights_too_small_for_any_scale_are_zero(self, kind: str, tmp_path: Path) -> None:
        config = write_checkpoint(tmp_path / "model", config_values(**WIDE), dtype="F32")
        source = open_checkpoint(tmp_path / "model")
        stored = source.rows

        def rows(name: str, rows: Any) -> Float32:
            return stored(name, rows) * np.float32(1e-38)

        source.rows = rows  # type: ignore[method-assign]
        export_gguf(source, tmp_path / "model.gguf", kind)
        back = read(tmp_path / "model.gguf")
        assert config == source.config
        assert not any(dense(back, spec.name).any() for spec, _ in back.storage() if len(spec.shape) == 2)

    def test_rows_that_fit_no_block_become_f16_and_are_reported(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "model", config_values(intermediate_size=80, linear_num_value_heads=2))
        report = export_gguf(open_checkpoint(tmp_path / "model"), tmp_path / "model.gguf", "q8_0")
        assert "blk.0.ffn_down.weight is F16: rows of 80 do not fit Q8_0" in report.notes
        assert report.types["F16"] == 4

    def test_heads_narrower_than_a_group_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another program may write such a file; the exporter does not (tests/test_kquants.py)."""
        monkeypatch.setattr("edgeq.quant.gguf_export._cuts_heads", lambda *_: None)
        write_checkpoint(tmp_path / "model", config_values(linear_num_value_heads=4))
        export_gguf(open_checkpoint(tmp_path / "model"), tmp_path / "model.gguf", "q8_0")
        with pytest.raises(ModelError, match="whose groups of 32 cut heads of 16"):
            open_checkpoint(tmp_path / "model.gguf")

    def test_what_a_type_cannot_hold_is_an_error_and_leaves_nothing(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "model", dtype="F32")
        source = open_checkpoint(tmp_path / "model")
        huge = source.matrix

        def matrix(name: str) -> Array:
            x = np.array(huge(name))
            x[0, 0] = 1e6
            return x

        source.matrix = matrix  # type: ignore[method-assign]
        with pytest.raises(ModelError, match=r"token_embd.weight holds 1000000.0, which F16 cannot store"):
            export_gguf(source, tmp_path / "out" / "model.gguf", "f16")
        assert list((tmp_path / "out").iterdir()) == []

    def test_an_existing_file_is_kept_without_force(self, folders: list[Path], tmp_path: Path) -> None:
        out = tmp_path / "model.gguf"
        out.write_text("mine")
        source = open_checkpoint(folders[0])
        with pytest.raises(UsageError, match="exists"):
            export_gguf(source, out, "f16")
        assert out.read_text() == "mine"
        export_gguf(source, out, "f16", force=True)
        with pytest.raises(UsageError, match="is the source"):
            export_gguf(open_checkpoint(out), out, "f16", force=True)
        assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]

    def test_one_gguf_file_becomes_another(self, chat_folder: Path, tmp_path: Path) -> None:
        export_gguf(open_checkpoint(chat_folder), tmp_path / "a.gguf", "f32")
        export_gguf(read(tmp_path / "a.gguf"), tmp_path / "b.gguf", "f32")
        a, b = (GGUFFile(tmp_path / name) for name in ("a.gguf", "b.gguf"))
        assert a.tensors == b.tensors
        assert all(np.array_equal(a.data(name), b.data(name)) for name in a.tensors)
        for key in ("tokens", "merges"):
            assert a.strings(f"tokenizer.ggml.{key}") == b.strings(f"tokenizer.ggml.{key}")

    def test_command(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "model", config_values(vision=True, vocab_size=1088, **WIDE))
        build_tiny_tokenizer(tmp_path / "model")
        import typer

        from edgeq.cli.export import export

        app = typer.Typer()
        app.command()(export)
        arguments = [str(tmp_path / "model"), "-o", str(tmp_path / "m.gguf"), "--type", "q8_0", "--mmproj"]
        result = CliRunner().invoke(app, [*arguments, str(tmp_path / "mmproj.gguf")])
        assert result.exit_code == 0, result.output
        assert "m.gguf:" in result.stderr
        assert result.stdout == ""
        assert read(tmp_path / "m.gguf").config.vision is not None
        result = CliRunner().invoke(app, [str(tmp_path / "model"), "-o", str(tmp_path / "n.gguf"), "--type", "q9"])
        assert isinstance(result.exception, UsageError)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


class TestRopeScaling:
    """A longer context survives export and quantization, and is the same model in every file."""

    @pytest.mark.parametrize(
        "scaling",
        [
            YARN,
            YARN | {"attention_factor": 1.5, "beta_fast": 8.0, "beta_slow": 2.0},
            {"rope_type": "linear", "factor": 2.0},
        ],
    )
    @pytest.mark.parametrize("where", ["rope_parameters", "rope_scaling"])
    def test_goes_through_every_file(self, where: str, scaling: dict[str, Any], tmp_path: Path) -> None:
        values = config_values(max_position_embeddings=1024)
        values["text_config"][where] = values["text_config"].get(where, {}) | scaling
        folder = tmp_path / "folder"
        write_checkpoint(folder, values)
        source = open_checkpoint(folder).config.text
        assert source.rope.scaling is not None
        export_gguf(open_checkpoint(folder), tmp_path / "out.gguf", "f16")
        quantize(folder, tmp_path / "q8", bits=8)
        for path in (tmp_path / "out.gguf", tmp_path / "q8"):
            found = open_checkpoint(path).config.text
            factor = source.rope.attention_factor  # in GGUF a float32
            assert found.rope.attention_factor == pytest.approx(factor, rel=1e-7)
            if isinstance(found.rope.scaling, Yarn):
                found = replace(
                    found, rope=replace(found.rope, scaling=replace(found.rope.scaling, attention_factor=factor))
                )
            assert found.rope == source.rope
            assert found.longest_context == source.longest_context

    def test_changes_the_logits(self, tmp_path: Path) -> None:
        plain, stretched = tmp_path / "plain", tmp_path / "stretched"
        write_checkpoint(plain, config_values())
        values = config_values()
        values["text_config"]["rope_scaling"] = {"type": "yarn", "factor": 4.0}
        write_checkpoint(stretched, values)
        ids = list(range(1, 40))
        one, other = (edgeq.load(path, backend="numpy").logits(ids) for path in (plain, stretched))
        asked = edgeq.load(plain, backend="numpy", rope_scaling="yarn:4")
        assert nmse(one, other) > 1e-6
        assert np.array_equal(asked.logits(ids), other)
        assert asked.context_limit == 4 * 4096

    def test_a_state_is_of_one_scaling(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, config_values())
        state = edgeq.load(tmp_path, backend="numpy").state()
        with pytest.raises(UsageError, match="another model"):
            edgeq.load(tmp_path, backend="numpy", rope_scaling="yarn:2").forward([1], state)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"type": "longrope", "factor": 2.0}, "rope_type is 'longrope'"),
            ({"type": "yarn", "factor": 4.0, "yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
            ({"type": "yarn", "factor": 4.0, "yarn_ext_factor": 0.5}, "yarn_ext_factor"),
            ({"type": "yarn", "factor": -1.0}, "factor is -1.0"),
            ({"attn_factor": 1.5}, r"rope.scaling.attn_factor is 1.5"),
            ({"type": "linear", "factor": 2.0, "yarn_attn_factor": 1.5}, r"rope.scaling.yarn_attn_factor is 1.5"),
            ({"factor": 2.0, "yarn_ext_factor": 1.0}, r"rope.scaling.yarn_ext_factor is 1,"),
        ],
    )
    def test_what_is_not_implemented_is_refused(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        folder, path = tmp_path / "folder", tmp_path / "out.gguf"
        write_checkpoint(folder, config_values())
        export_gguf(open_checkpoint(folder), path, "f16")
        with pytest.raises(ModelError, match=message):
            open_checkpoint(with_metadata(path, {f"qwen35.rope.scaling.{key}": x for key, x in change.items()}))

    def test_gguf_keys_as_llama_cpp_writes_them(self, tmp_path: Path) -> None:
        folder, path = tmp_path / "folder", tmp_path / "out.gguf"
        write_checkpoint(folder, config_values(max_position_embeddings=1024))
        export_gguf(open_checkpoint(folder), path, "f16")
        keys = {"type": "yarn", "factor": 4.0, "original_context_length": 1024}
        rope = open_checkpoint(
            with_metadata(path, {f"qwen35.rope.scaling.{k}": x for k, x in keys.items()})
        ).config.text
        assert rope.rope.scaling == Yarn(4.0, 1024, yarn_attention_factor(4.0))

    def test_a_factor_without_a_type_is_linear(self, tmp_path: Path) -> None:
        """As llama.cpp reads it, under the key's old name too; 0 and negative numbers are what is not set."""
        folder, path = tmp_path / "folder", tmp_path / "out.gguf"
        write_checkpoint(folder, config_values())
        export_gguf(open_checkpoint(folder), path, "f16")
        plain, unset = path.read_bytes(), {"yarn_ext_factor": -1.0, "attn_factor": 1.0}
        for keys, expected in (
            ({"scaling.factor": 4.0}, Linear(4.0)),
            ({"scale_linear": 4.0}, Linear(4.0)),
            ({"scaling.factor": 2.0, "scale_linear": 4.0}, Linear(2.0)),
            ({"scaling.factor": 0.0, "scale_linear": 4.0}, None),
            ({"scaling.type": "none", "scaling.factor": 4.0}, None),
            (
                {"scaling.type": "linear", "scale_linear": 4.0, **{f"scaling.{k}": x for k, x in unset.items()}},
                Linear(4.0),
            ),
        ):
            path.write_bytes(plain)
            found = open_checkpoint(with_metadata(path, {f"qwen35.rope.{k}": x for k, x in keys.items()}))
            assert found.config.text.rope.scaling == expected, keys


def with_metadata(path: Path, values: dict[str, Any]) -> Path:
    """The file with further entries in its metadata, numbers as float32 or uint32."""
    raw = path.read_bytes()
    version, tensors, count = struct.unpack("<IQQ", raw[4:24])
    entries = b""
    for key, value in values.items():
        entries += string(key.encode())
        if isinstance(value, str):
            entries += struct.pack("<I", 8) + string(value.encode())
        else:
            entries += struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)
    # the data begins at a multiple of 32: an entry fills up what is missing
    pad = -(len(entries) + 8 + len("pad") + 4 + 8) % 32
    entries += string(b"pad") + struct.pack("<I", 8) + string(b"x" * pad)
    assert len(entries) % 32 == 0
    head = raw[:4] + struct.pack("<IQQ", version, tensors, count + len(values) + 1)
    out = path.with_name("changed.gguf")
    out.write_bytes(head + entries + raw[24:])
    return out


class TestSampling:
    def test_the_demo_model_s_own_comes_back(self, tmp_path: Path) -> None:
        demo = open_checkpoint(DEMO)
        assert demo.sampling == {"temperature": 0.3, "top_k": 20, "top_p": 0.9, "presence_penalty": 0.0}
        export_gguf(demo, tmp_path / "demo.gguf", "bf16")
        back = read(tmp_path / "demo.gguf")
        assert back.sampling == demo.sampling
        quantize(tmp_path / "demo.gguf", tmp_path / "folder", bits=8)
        assert open_checkpoint(tmp_path / "folder").sampling == back.sampling

    def test_what_cannot_be_is_left_out(self, chat_folder: Path, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        export_gguf(open_checkpoint(chat_folder), path, "f16")
        keys = {"top_k": 20.0, "top_p": 7.0, "temp": "off", "min_p": 0.05, "penalty_repeat": 1, "mirostat": 2}
        found = read(with_metadata(path, {f"general.sampling.{key}": value for key, value in keys.items()})).recommended
        assert found.values == {"top_k": 20, "min_p": 0.05, "repetition_penalty": 1}
        assert found.left_out == {"top_p": "general.sampling.top_p must be above 0 and at most 1, got 7.0"}

    def test_without_any(self, chat_folder: Path, tmp_path: Path) -> None:
        export_gguf(open_checkpoint(chat_folder), tmp_path / "model.gguf", "f16")
        assert not read(tmp_path / "model.gguf").sampling


class TestTokenizer:
    def test_comes_back_as_it_was(self, chat_folder: Path, tmp_path: Path) -> None:
        export_gguf(open_checkpoint(chat_folder), tmp_path / "model.gguf", "f16")
        checkpoint = read(tmp_path / "model.gguf")
        ours, theirs = checkpoint.tokenizer(), Tokenizer.from_folder(chat_folder)
        assert ours is not None
        assert_same_tokenizer(ours, theirs)
        template = checkpoint.template()
        assert template is not None
        assert template.source == (chat_folder / "chat_template.jinja").read_text()
        text = "Hello über größe! <think> cafe\u0301 <|im_end|>"  # the accent joins its letter: NFC is in force
        assert ours.encode(text) == theirs.encode(text)

    @pytest.mark.no_cover
    @pytest.mark.shared
    def test_the_real_one(self, tmp_path: Path) -> None:
        link_real_tokenizer(tmp_path / "model")
        (tmp_path / "model" / "config.json").unlink()
        write_checkpoint(
            tmp_path / "model",
            config_values(vocab_size=248320, hidden_size=32, layer_types=["linear_attention"], **WIDE),
        )
        export_gguf(open_checkpoint(tmp_path / "model"), tmp_path / "model.gguf", "q8_0")
        ours = read(tmp_path / "model.gguf").tokenizer()
        assert ours is not None
        assert_same_tokenizer(ours, Tokenizer.from_folder(tmp_path / "model"))
        kinds = np.bincount(GGUFFile(tmp_path / "model.gguf").array("tokenizer.ggml.token_type")).tolist()
        assert kinds == [0, 248044, 0, 27, 6, 243]  # as llama.cpp's own converter writes them

    def test_without_one(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "model")
        report = export_gguf(open_checkpoint(tmp_path / "model"), tmp_path / "model.gguf", "f16")
        assert "the checkpoint has no tokenizer: the file takes and gives token ids only" in report.notes
        assert read(tmp_path / "model.gguf").tokenizer() is None
        assert read(tmp_path / "model.gguf").template() is None

    def test_files_of_a_folder(self, chat_folder: Path, tmp_path: Path) -> None:
        export_gguf(open_checkpoint(chat_folder), tmp_path / "model.gguf", "f16")
        for name, text in read(tmp_path / "model.gguf").folder_files().items():
            (tmp_path / name).write_text(text)
        assert_same_tokenizer(Tokenizer.from_folder(tmp_path), Tokenizer.from_folder(chat_folder))


def assert_same_tokenizer(ours: Tokenizer, theirs: Tokenizer) -> None:
    assert ours.vocab_size == theirs.vocab_size
    assert ours.control_ids == theirs.control_ids
    assert ours.eos_token_ids == theirs.eos_token_ids
    assert [ours.token(i) for i in range(ours.vocab_size)] == [theirs.token(i) for i in range(theirs.vocab_size)]


class TestVision:
    def test_a_tower_beside_the_model_is_found(self, chat_folder: Path, tmp_path: Path) -> None:
        source = open_checkpoint(chat_folder)
        export_gguf(source, tmp_path / "model.gguf", "f16")
        assert read(tmp_path / "model.gguf").config.vision is None
        export_mmproj(source, tmp_path / "mmproj-F32.gguf", "f32")
        both = read(tmp_path / "model.gguf")
        assert both.config.vision == source.config.vision
        assert both.config.image_token_id == 1036
        for spec, _ in source.storage():
            if spec.name.startswith("visual."):
                np.testing.assert_array_equal(both.dense(spec.name), source.dense(spec.name))

    def test_the_tower_of_an_mlx_folder(self, chat_folder: Path, tmp_path: Path) -> None:
        """mlx-vlm stores the patch embedding channels last."""
        source = FolderCheckpoint(chat_folder)
        shutil.copytree(chat_folder, tmp_path / "mlx")
        moved = {name: np.array(source.raw(name)) for name in source.tensors}
        for name, x in moved.items():
            if name.endswith(("conv1d.weight", "patch_embed.proj.weight")):
                moved[name] = np.moveaxis(x, 1, -1)
        entries = {source.file_name(name): (dtype_name(x.dtype), x.shape) for name, x in moved.items()}
        with SafetensorsWriter(tmp_path / "mlx" / "model.safetensors", entries) as file:
            for name, x in moved.items():
                file.write(source.file_name(name), x)
        ours = FolderCheckpoint(tmp_path / "mlx")
        assert ours.layout == "mlx"
        name = "visual.patch_embed.proj.weight"
        np.testing.assert_array_equal(ours.dense(name), source.dense(name))
        for checkpoint, out in ((source, "a.gguf"), (ours, "b.gguf")):
            export_mmproj(checkpoint, tmp_path / out, "f16")
        assert (tmp_path / "a.gguf").read_bytes()[4096:] == (tmp_path / "b.gguf").read_bytes()[4096:]

    def test_a_tower_of_another_model_is_not(self, chat_folder: Path, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "other", config_values(vision=True, hidden_size=96))
        export_mmproj(open_checkpoint(tmp_path / "other"), tmp_path / "mmproj-other.gguf", "f16")
        export_gguf(open_checkpoint(chat_folder), tmp_path / "model.gguf", "f16")
        with pytest.warns(UserWarning, match=r"mmproj-other\.gguf: out_hidden_size is 96, .* does not see"):
            assert read(tmp_path / "model.gguf").tower is None

    def test_a_tower_alone_is_no_model(self, chat_folder: Path, tmp_path: Path) -> None:
        export_mmproj(open_checkpoint(chat_folder), tmp_path / "mmproj.gguf", "f16")
        with pytest.raises(ModelError, match=r"is a vision tower \(mmproj\)"):
            open_checkpoint(tmp_path / "mmproj.gguf")


class TestQuantize:
    """A .gguf file as the quantizer's source."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        write_checkpoint(tmp_path / "model", config_values(mtp=True, vision=True, vocab_size=1088, **WIDE))
        build_tiny_tokenizer(tmp_path / "model")
        return tmp_path / "model"

    def test_gives_what_the_folder_gives(self, folder: Path, tmp_path: Path) -> None:
        source = open_checkpoint(folder)
        export_gguf(source, tmp_path / "model.gguf", "bf16")
        export_mmproj(source, tmp_path / "mmproj.gguf", "f32")
        assert quantize(tmp_path / "model.gguf", tmp_path / "a", group_size=32).warnings == ()
        quantize(folder, tmp_path / "b", group_size=32)
        a, b = FolderCheckpoint(tmp_path / "a"), FolderCheckpoint(tmp_path / "b")
        assert a.config.vision == b.config.vision
        assert a.config.image_token_id == b.config.image_token_id
        assert a.tensors.keys() == b.tensors.keys()
        for name, tensor in a.tensors.items():
            assert tensor.quantization == b.tensors[name].quantization
            if tensor.quantization is not None:
                one, other = a.matrix(name), b.matrix(name)
                assert isinstance(one, QMatrix)
                assert isinstance(other, QMatrix)
                for ours, theirs in zip(one.arrays, other.arrays, strict=True):
                    np.testing.assert_array_equal(ours, theirs)
            elif name.endswith("A_log"):
                np.testing.assert_allclose(a.raw(name), b.raw(name), rtol=2e-7, atol=2e-7)  # log of exp
            elif not name.startswith("visual."):  # which comes as float32 here
                np.testing.assert_array_equal(a.raw(name), b.raw(name), err_msg=name)
        tokenizer, template = a.tokenizer(), a.template()
        assert tokenizer is not None
        assert template is not None
        assert_same_tokenizer(tokenizer, Tokenizer.from_folder(folder))
        assert nmse(Model(b, NumpyOps()).logits([5, 9, 2]), Model(a, NumpyOps()).logits([5, 9, 2])) < 1e-10

    @pytest.mark.parametrize(("kind", "coarse"), [("f16", False), ("q8_0", False), ("q4_0", True)])
    def test_quantized_sources(self, kind: str, coarse: bool, folder: Path, tmp_path: Path) -> None:
        export_gguf(open_checkpoint(folder), tmp_path / "model.gguf", kind)
        report = quantize(tmp_path / "model.gguf", tmp_path / "out", bits=8, group_size=32)
        expected = "model.gguf holds Q4_0: quantizing again adds to their error; better take an original"
        assert report.warnings == ((expected,) if coarse else ())
        gguf_logits, logits = (
            Model(open_checkpoint(tmp_path / n), NumpyOps()).logits([5, 9]) for n in ("model.gguf", "out")
        )
        assert nmse(gguf_logits, logits) < 1e-2  # 8 bits of a random model


# --- files that lie --------------------------------------------------------------------------------------------------


class Fields:
    """The header of a GGUF file, cut at every number: where they are, how wide, and what they say."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 4
        self.numbers: list[tuple[int, int, str]] = []  # position, width, meaning
        self.sections: list[int] = [0, 4]
        self._number(4, "version")
        tensors, entries = self._number(8, "tensor count"), self._number(8, "entry count")
        for _ in range(entries):
            self._string("key")
            self._value(self._number(4, "type"))
            self.sections.append(self.at)
        for _ in range(tensors):
            self._string("tensor name")
            dims = self._number(4, "dimension count")
            for _ in range(dims):
                self._number(8, "dimension")
            self._number(4, "tensor type")
            self._number(8, "offset")
            self.sections.append(self.at)

    def _number(self, width: int, meaning: str) -> int:
        self.numbers.append((self.at, width, meaning))
        self.at += width
        return int.from_bytes(self.raw[self.at - width : self.at], "little")

    def _string(self, meaning: str) -> None:
        length = self._number(8, f"{meaning} length")
        self.at += length

    def _value(self, kind: int) -> None:
        if kind == 8:
            return self._string("string")
        if kind == 9:
            item, count = self._number(4, "item type"), self._number(8, "item count")
            for _ in range(count if item == 8 else 0):
                self._string("item")
            self.at += 0 if item == 8 else count * WIDTHS[item]
            return None
        self._number(WIDTHS[kind], "value")
        return None


WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
ABSURD = [0, 1, 2, 7, 31, 255, 1 << 16, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63,
          (1 << 64) - 1]  # fmt: skip


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small complete file, with a short vocabulary so that its header is small as well."""
    folder = tmp_path_factory.mktemp("victim")
    write_checkpoint(
        folder / "model", config_values(layer_types=["linear_attention", "full_attention"], vocab_size=1088)
    )
    build_tiny_tokenizer(folder / "model")
    export_gguf(open_checkpoint(folder / "model"), folder / "model.gguf", "f16")
    return (folder / "model.gguf").read_bytes()


def use_everything(path: Path) -> None:
    """Open a file and read all that is in it."""
    checkpoint = read(path)
    for spec, _ in checkpoint.storage():
        if len(spec.shape) == 2:
            checkpoint.matrix(spec.name)
        else:
            checkpoint.dense(spec.name)
    checkpoint.template()
    checkpoint.tokenizer()


def survives(path: Path, raw: bytes, act: Callable[[Path], object] = use_everything) -> str | None:
    """Whatever is in the file: it works, or a ModelError says what is wrong, soon and in little memory."""
    path.write_bytes(raw)
    tracemalloc.start()
    begin = time.monotonic()
    try:
        act(path)
        return None
    except ModelError as error:
        return error.message
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 12 * len(raw) + (8 << 20), f"{peak:,} bytes for a file of {len(raw):,}"
        assert time.monotonic() - begin < 20


class TestBadFiles:
    def test_the_fixture_is_good(self, victim: bytes, tmp_path: Path) -> None:
        assert survives(tmp_path / "model.gguf", victim) is None

    @pytest.mark.no_cover
    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_wrong_numbers(self, data: st.DataObject, victim: bytes, tmp_path: Path) -> None:
        """Counts, lengths, dimensions, types, offsets and values."""
        fields = Fields(victim).numbers
        kinds = sorted({meaning for _, _, meaning in fields})
        raw = bytearray(victim)
        for _ in range(data.draw(st.integers(1, 3))):
            kind = data.draw(st.sampled_from(kinds))
            at, width, _ = data.draw(st.sampled_from([f for f in fields if f[2] == kind]))
            value = data.draw(st.one_of(st.sampled_from(ABSURD), st.integers(0, 300), st.integers(0, (1 << 64) - 1)))
            raw[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
        survives(tmp_path / "model.gguf", bytes(raw))

    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_wrong_bytes(self, data: st.DataObject, victim: bytes, tmp_path: Path) -> None:
        """Anywhere in the header, strings included."""
        end = Fields(victim).at
        raw = bytearray(victim)
        for _ in range(data.draw(st.integers(1, 8))):
            raw[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
        survives(tmp_path / "model.gguf", bytes(raw))

    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_a_wrong_tower_beside_a_good_model(self, data: st.DataObject, chat_folder: Path, tmp_path: Path) -> None:
        if not (tmp_path / "good").exists():
            source = open_checkpoint(chat_folder)
            export_gguf(source, tmp_path / "model.gguf", "f16")
            export_mmproj(source, tmp_path / "good", "f16")
        raw = bytearray((tmp_path / "good").read_bytes())
        at, width, _ = data.draw(st.sampled_from(Fields(bytes(raw)).numbers))
        raw[at : at + width] = (data.draw(st.sampled_from(ABSURD)) % (1 << 8 * width)).to_bytes(width, "little")
        (tmp_path / "mmproj.gguf").write_bytes(raw)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert read(tmp_path / "model.gguf").config.text == open_checkpoint(chat_folder).config.text

    def test_cut_short_at_every_section(self, victim: bytes, tmp_path: Path) -> None:
        fields = Fields(victim)
        info = GGUFFile(write(tmp_path / "whole.gguf", victim)).tensors
        cuts = [*fields.sections, fields.at, fields.at + 1]
        cuts += [i.start + n for i in info.values() for n in (0, 1, i.nbytes - 1)]
        cuts += [
            at + n for at, width, _ in fields.numbers[:: max(1, len(fields.numbers) // 200)] for n in (0, width - 1)
        ]
        for cut in sorted({cut for cut in cuts if cut < len(victim) - 64}):
            message = survives(tmp_path / "model.gguf", victim[:cut])
            assert message is not None, f"cut at {cut}"
            assert "\n" not in message

    @pytest.mark.parametrize("count", [1 << 17, 1 << 40, (1 << 64) - 1])
    @pytest.mark.parametrize("kind", [0, 4, 7, 8, 9, 12, 13])
    def test_absurd_arrays(self, kind: int, count: int, tmp_path: Path) -> None:
        entry = string(b"a") + struct.pack("<IIQ", 9, kind, count)
        raw = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry + bytes(64)
        assert survives(tmp_path / "model.gguf", raw) is not None

    def test_every_number_alone(self, victim: bytes, tmp_path: Path) -> None:
        """The header's first 100 numbers, each replaced by each absurd value; only the header is read."""
        for at, width, _ in Fields(victim).numbers[:100]:
            for value in ABSURD[8:]:
                raw = bytearray(victim)
                raw[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
                survives(tmp_path / "model.gguf", bytes(raw), GGUFFile)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda raw: b"GGML" + raw[4:], "is no GGUF file: its first bytes are 47 47 4d 4c"),
            (lambda raw: raw[:4] + struct.pack("<I", 1) + raw[8:], "is GGUF version 1; edgeq reads versions 2 and 3"),
            (lambda raw: raw[:4] + struct.pack(">I", 3) + raw[8:], "is a big-endian GGUF file"),
            (lambda raw: raw.replace(b"qwen35", b"llama3", 1), "is of architecture 'llama3', expected 'qwen35'"),
            (lambda raw: raw.replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_up.wEight"), "missing blk.0.ffn_up.weight"),
            (lambda raw: raw.replace(b"qwen35.block_count", b"qwen35.block_counT"), "qwen35.block_count is missing"),
            (lambda _: b"", "is empty"),
        ],
    )
    def test_says_what_is_wrong(
        self, change: Callable[[bytes], bytes], message: str, victim: bytes, tmp_path: Path
    ) -> None:
        found = survives(tmp_path / "model.gguf", change(victim))
        assert found is not None
        assert message in found

    @pytest.mark.parametrize("key", [b"qwen35.rope.dimension_sections", b"tokenizer.ggml.token_type"])
    def test_numbers_that_must_be_whole(self, key: bytes, victim: bytes, tmp_path: Path) -> None:
        """float32 in the place of int32; NaN among them would be no number at all."""
        before = string(key) + struct.pack("<II", 9, 5)
        assert victim.count(before) == 1
        end = victim.index(before) + len(before) + 8
        raw = victim.replace(before, string(key) + struct.pack("<II", 9, 6))
        raw = raw[:end] + struct.pack("<f", float("nan")) + raw[end + 4 :]
        message = survives(tmp_path / "model.gguf", raw, lambda path: open_checkpoint(path).tokenizer())
        assert message is not None
        assert f"metadata {key.decode()} is not an array of whole numbers" in message

    def test_a_type_that_is_not_supported_is_named(self, victim: bytes, tmp_path: Path) -> None:
        at = next(at for at, _, meaning in Fields(victim).numbers if meaning == "tensor type")
        raw = bytearray(victim)
        raw[at : at + 4] = struct.pack("<I", 16)
        message = survives(tmp_path / "model.gguf", bytes(raw))
        assert message is not None
        assert "tensor 'token_embd.weight' is of type IQ2_XXS, which edgeq does not read" in message

    def test_errors_are_one_line_at_the_prompt(self, victim: bytes, tmp_path: Path) -> None:
        from edgeq.cli.console import error_line

        path = write(tmp_path / "model.gguf", victim[:5000])
        with pytest.raises(EdgeqError) as caught:
            open_checkpoint(path)
        assert len([line for line in error_line(caught.value).splitlines() if not line.startswith("hint:")]) == 1


def write(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text
