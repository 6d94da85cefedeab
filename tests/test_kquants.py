"""K-quants: blocks are packed as ggml unpacks them, and rounded better than step by step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import IM_END, WORDS, build_tiny_tokenizer

from edgeq.backends.numpy import NumpyOps
from edgeq.checkpoint import Checkpoint, open_checkpoint
from edgeq.errors import QualityError, UsageError
from edgeq.formats.bf16 import Array, Float32
from edgeq.formats.ggml import GGMLType
from edgeq.quality.kld import compare, cut
from edgeq.quality.stream import Stream
from edgeq.quant import kquants
from edgeq.quant.calibrate import request
from edgeq.quant.calibrate.request import Budget, CalibrationRequest
from edgeq.quant.gguf_export import export_gguf
from edgeq.quant.kquants import KQUANTS, codes_of, encode, fit, pack
from edgeq.testing import config_values, write_checkpoint

KINDS = list(KQUANTS.values())
kinds = pytest.mark.parametrize("kind", KINDS, ids=list(KQUANTS))


def weights(rows: int, columns: int, seed: int = 0) -> Float32:
    return (np.random.default_rng(seed).standard_t(5, (rows, columns)) * 0.02).astype(np.float32)


def values(raw: Array, kind: GGMLType) -> Float32:
    """As the gguf package reads them."""
    return np.asarray(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind.name]), np.float32)


@kinds
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-6, 1e3), shift=st.sampled_from([0.0, 1.0, -1.0, 5.0]))
def test_what_is_packed_is_what_the_levels_say(kind: GGMLType, seed: int, scale: float, shift: float) -> None:
    assert kind.coding is not None
    x = np.float32(scale) * (weights(6, 256, seed) * 50 + np.float32(shift))
    levels = fit(x, kind)
    codes = codes_of(x, kind, levels)
    scales, biases = levels.scales(), levels.biases(kind.coding.zero)
    groups = codes.reshape(len(x), -1, kind.coding.group_size).astype(np.float32)
    said = (groups * scales[..., None] + biases[..., None]).reshape(x.shape)
    np.testing.assert_allclose(values(pack(codes, kind, levels), kind), said, rtol=3e-7, atol=1e-6 * np.abs(x).max())


@kinds
def test_errors_are_below_those_of_a_plain_rounding(kind: GGMLType) -> None:
    """A plain rounding: every group's range in equal steps, units and integers rounded as they come."""
    assert kind.coding is not None
    x, group = weights(64, 1024), kind.coding.group_size
    top = (1 << kind.coding.bits) - 1
    g = x.reshape(-1, 256 // group, group)
    low = np.minimum(g.min(-1), 0) if not kind.coding.zero else -np.abs(g).max(-1)
    span = (np.maximum(g.max(-1), 0) if not kind.coding.zero else np.abs(g).max(-1)) - low
    most = 127 if kind.coding.zero else 63
    sc, mn = (np.rint(v / (v.max(1) / most)[:, None]) * (v.max(1) / most)[:, None] for v in (span / top, -low))
    mn = sc * kind.coding.zero if kind.coding.zero else mn
    plain = np.rint((g + mn[..., None]) / sc[..., None]).clip(0, top) * sc[..., None] - mn[..., None]
    error = np.square(values(encode(x, kind), kind) - x).sum()
    assert error < 0.9 * np.square(plain - g).sum()


@kinds
def test_importance_moves_the_error_to_where_it_matters_less(kind: GGMLType) -> None:
    x, importance = weights(32, 512), np.ones(512, np.float32)
    importance[::7] = 200
    error = [np.square(values(encode(x, kind, i), kind) - x) for i in (None, importance)]
    assert (error[1] @ importance).sum() < 0.9 * (error[0] @ importance).sum()
    assert np.isfinite(values(encode(x, kind, np.zeros(512, np.float32)), kind)).all()


@kinds
@pytest.mark.parametrize("x", [0.0, 1.5, -1.5, 1e-12, 60000.0])
def test_constant_blocks(kind: GGMLType, x: float) -> None:
    block = np.full((2, 256), x, np.float32)
    np.testing.assert_allclose(values(encode(block, kind), kind), block, rtol=0.04, atol=1e-9)


@kinds
def test_rows_do_not_depend_on_one_another(kind: GGMLType, monkeypatch: pytest.MonkeyPatch) -> None:
    x, importance = weights(24, 512), np.abs(weights(1, 512, 1)[0])
    whole = encode(x, kind, importance)
    monkeypatch.setattr(kquants, "_TILE", 6)
    np.testing.assert_array_equal(encode(x, kind, importance), whole)
    np.testing.assert_array_equal(encode(x[5:9], kind, importance), whole[5:9])


def test_an_exported_mixture(tmp_path: Path) -> None:
    wide = config_values(hidden_size=256, intermediate_size=512, linear_num_value_heads=2, vocab_size=300)
    write_checkpoint(tmp_path / "model", wide)
    source = open_checkpoint(tmp_path / "model")
    report = export_gguf(source, tmp_path / "model.gguf", "q4_k_m")
    back = open_checkpoint(tmp_path / "model.gguf")
    stored = {spec.name: storage.type for spec, storage in back.storage()}
    assert stored["embed_tokens.weight"] == "Q6_K"
    assert stored["layers.0.linear_attn.in_proj_a.weight"] == "Q8_0"
    assert stored["layers.0.mlp.up_proj.weight"] == "Q4_K"
    assert stored["layers.0.mlp.down_proj.weight"] == "Q5_K"
    assert any("do not fit Q5_K" in note for note in report.notes)  # out_proj: heads of 16
    for name in ("embed_tokens.weight", "layers.0.mlp.up_proj.weight", "layers.0.mlp.down_proj.weight"):
        x = source.rows(name, slice(None))
        np.testing.assert_array_equal(
            back.rows(name, slice(None)), values(encode(x, KQUANTS[stored[name]]), KQUANTS[stored[name]])
        )


@pytest.mark.parametrize("kind", ["q4_k_m", "q8_0", "q4_0", "q5_1"])
def test_groups_do_not_cut_heads(tmp_path: Path, kind: str) -> None:
    """Heads of 16 that the file orders anew, in groups of 32: such a matrix is stored as it is."""
    values = config_values(linear_num_key_heads=2, linear_num_value_heads=4, linear_value_head_dim=16)
    write_checkpoint(tmp_path / "model", values)
    report = export_gguf(open_checkpoint(tmp_path / "model"), tmp_path / "model.gguf", kind)
    name = "layers.0.linear_attn.out_proj.weight"
    stored = {spec.name: storage.type for spec, storage in open_checkpoint(tmp_path / "model.gguf").storage()}
    assert stored[name] == "F16"
    assert "blk.0.ssm_out.weight is F16: groups of 32 cut heads of 16" in report.notes


# --- calibrated ------------------------------------------------------------------------------------------------------

WIDE = config_values(
    hidden_size=256, intermediate_size=256, vocab_size=1088, eos_token_id=IM_END,
    linear_num_key_heads=4, linear_num_value_heads=8, linear_key_head_dim=32, linear_value_head_dim=32,
    layer_types=["linear_attention", "full_attention"],
)  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Checkpoint, Path]]:
    """A model whose value heads the file has in another order, as the 4B's, and a text."""
    folder = tmp_path_factory.mktemp("wide")
    write_checkpoint(folder / "model", WIDE)
    build_tiny_tokenizer(folder / "model")
    (folder / "text").write_text(" ".join(np.random.default_rng(0).choice(WORDS, 1000)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request, "BUDGETS", {"standard": Budget(1024, 512, 1, 1, asymmetric=True)})
        yield open_checkpoint(folder / "model"), folder / "text"


def divergence(source: Checkpoint, files: list[Path], text: Path) -> list[float]:
    tokenizer = source.tokenizer()
    assert tokenizer is not None
    streams = [Stream(open_checkpoint(file), NumpyOps()) for file in files]
    chunks = cut(tokenizer.encode(text.read_text()), 256)
    return [found.divergence.mean for found in compare(Stream(source, NumpyOps()), streams, chunks)]


def test_calibrated_blocks_are_better_at_the_same_bytes(wide: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    (source, text), files = wide, [tmp_path / "plain.gguf", tmp_path / "calibrated.gguf"]
    plain = export_gguf(source, files[0], "q4_k_m")
    asked = CalibrationRequest(str(text), "standard", 0, keeps_bits=True)
    done = export_gguf(source, files[1], "q4_k_m", calibration=asked)
    assert done.nbytes == plain.nbytes
    assert done.types == plain.types
    by_weights, calibrated = divergence(source, files, text)
    assert calibrated < 0.8 * by_weights
    assert done.gate is not None
    assert done.gate.passed
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["calibrated.gguf", "plain.gguf"]


def test_types_are_chosen_for_a_size(wide: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    source, text = wide
    asked = CalibrationRequest(str(text), "standard", 0, target_bpw=5.5)
    export_gguf(source, tmp_path / "model.gguf", "q4_k_m", calibration=asked)
    stored = list(open_checkpoint(tmp_path / "model.gguf").storage())
    nbytes = sum(
        spec.size // (b := gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[s.type]])[0] * b[1] for spec, s in stored
    )
    weights = sum(spec.size for spec, _ in stored)
    assert 5.2 < 8 * nbytes / weights <= 5.5
    assert len({s.type for spec, s in stored if spec.is_matrix}) > 2


def test_types_are_chosen_at_the_mixtures_size(wide: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    (source, text), out = wide, tmp_path / "model.gguf"
    plain = export_gguf(source, tmp_path / "plain.gguf", "q4_k_m")
    done = export_gguf(source, out, "q4_k_m", calibration=CalibrationRequest(str(text), "standard", 0))
    assert 0.99 * plain.nbytes < done.nbytes <= plain.nbytes
    assert done.types != plain.types


def test_what_calibration_cannot_do_is_told_before(wide: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    source, text = wide
    asked = CalibrationRequest(str(text), "standard", 0)
    with pytest.raises(UsageError, match="for K-quants, not for q8_0"):
        export_gguf(source, tmp_path / "model.gguf", "q8_0", calibration=asked)
    asked = CalibrationRequest(str(text), "standard", 0, target_nbytes=1000)
    with pytest.raises(UsageError, match="the smallest choices take"):
        export_gguf(source, tmp_path / "model.gguf", "q4_k_m", calibration=asked)
    assert not [*tmp_path.iterdir()]


def test_no_matrix_to_calibrate(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", config_values(vocab_size=1088, layer_types=["full_attention"]))
    source = open_checkpoint(tmp_path / "model")
    with pytest.raises(UsageError, match="has no matrix to calibrate"):
        export_gguf(source, tmp_path / "x.gguf", "q4_k_m", calibration=CalibrationRequest("t", "standard", 0))


def test_a_damaged_result_is_not_left(
    wide: tuple[Checkpoint, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, text = wide
    monkeypatch.setattr("edgeq.quality.gate.MOST_KL", 1e-12)
    with pytest.raises(QualityError, match=r"model\.gguf: the quantized model is damaged"):
        export_gguf(source, tmp_path / "model.gguf", "q4_k_m", calibration=CalibrationRequest(str(text), "standard", 0))
    assert not (tmp_path / "model.gguf").exists()
