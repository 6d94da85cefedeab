"""K-quants: blocks are packed as ggml unpacks them, and rounded better than step by step."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.checkpoint import open_checkpoint
from edgeq.formats.bf16 import Array, Float32
from edgeq.formats.ggml import GGMLType
from edgeq.quant import kquants
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
