"""Checkpoints that other tools have quantized: every format's own files, read to the bit, and refusals by name."""

from __future__ import annotations

import json
import lzma
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_forms import Form, Tensors, linear, pack_folder, read_tensors, stream, twin, write_tensors

import edgeq
from edgeq.checkpoint import FolderCheckpoint, open_checkpoint
from edgeq.checkpoint.packing import Packing
from edgeq.errors import EdgeqError, ModelError
from edgeq.formats.affine import dequantize
from edgeq.formats.bf16 import Array, Float32, from_float32, round_to, to_float32
from edgeq.formats.names import neutral_name
from edgeq.formats.packed import Grouped, Packed, fields
from edgeq.formats.safetensors import SafetensorsFile
from edgeq.testing import config_values, write_checkpoint
from edgeq.weights import QMatrix, Role, TensorSpec

FIXTURES = Path(__file__).parent / "data" / "packed.safetensors.xz"
CASES = [
    *(f"gptq-{bits}" for bits in (2, 3, 4, 8)), "gptq_v2-3", "gptq_v2-4", "gptq-sym", "gptq-order", "gptq-16",
    *(f"auto_round-auto_gptq-{bits}" for bits in (2, 3, 4, 8)), *(f"auto_round-{bits}" for bits in (4, 5, 6)),
    "auto_round-auto_awq", "awq-gemm", "awq-gemv", "pack-quantized-4", "pack-quantized-8", "pack-quantized-asym-3",
    "pack-quantized-asym-4", "pack-quantized-channel", "int-quantized-sym", "int-quantized-asym",
    "float-quantized-channel", "float-quantized-tensor", "float-quantized-block", "fp8-blocks",
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
            assert case == "gptq-order" or "fp8" in case or "float" in case
            expected = to_float32(round_to(expected, computed.dtype))
        assert np.array_equal(decoded(computed), expected)
        arrays = computed.arrays if isinstance(computed, QMatrix) else [computed]
        assert sum(x.nbytes for x in arrays) <= matrix.memory_nbytes

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
}
IN_16_BITS = ("order", "FP8")


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
