"""What stock mlx-lm writes, edgeq reads (what edgeq writes and mlx-lm reads is in test_quantize.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeq
from edgeq.api import Model
from edgeq.backends import available
from edgeq.backends.numpy.ops import matrix_rows
from edgeq.checkpoint import open_checkpoint
from edgeq.quant import quantize
from edgeq.quant.gguf_export import export_gguf
from edgeq.testing import config_values, nmse, write_checkpoint
from edgeq.weights import QMatrix

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def convert(
    folder: Path, out: Path, bits: int | None, group_size: int | None, predicate: Any = None, mode: str = "affine"
) -> Any:
    """mlx_lm.convert without its tokenizer: load, quantize, save. Returns the quantized model."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    model, config = load_model(folder, lazy=True)
    model, config = quantize_model(model, config, group_size, bits, mode, quant_predicate=predicate)
    save_model(out, model)
    save_config(config, out / "config.json")
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hub")
    write_checkpoint(path, config_values(vocab_size=320, vision=True, mtp=True))
    return path


@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (8, 64), (4, 32), (3, 64), (6, 32)])
def test_a_converted_model(folder: Path, tmp_path: Path, bits: int, group_size: int) -> None:
    theirs = convert(folder, tmp_path / "mlx", bits, group_size)
    checkpoint = open_checkpoint(tmp_path / "mlx")
    assert checkpoint.format == "MLX safetensors, group-quantized"
    up = checkpoint.matrix("layers.1.mlp.up_proj.weight")
    assert isinstance(up, QMatrix)
    module = theirs.language_model.model.layers[1].mlp.up_proj
    expected = mx.dequantize(
        module.weight, module.scales.astype(mx.float32), module.biases.astype(mx.float32), group_size, bits
    )
    assert np.array_equal(matrix_rows(up, slice(None)), np.array(expected))

    ids = list(range(1, 40))
    ours = edgeq.load(tmp_path / "mlx", backend="numpy").logits(ids)
    theirs.set_dtype(mx.float32)  # random weights blow bfloat16 activations up; in float32 only the order differs
    reference = np.array(theirs(mx.array([ids]))[0])
    assert float(np.sum((ours - reference) ** 2) / np.sum(reference**2)) < 1e-8


def test_mixed_precision(folder: Path, tmp_path: Path) -> None:
    def predicate(path: str, _module: Any) -> bool | dict[str, int]:
        if "in_proj_a" in path or "in_proj_b" in path:
            return False
        return {"bits": 8, "group_size": 32} if "out_proj" in path else True

    convert(folder, tmp_path / "mlx", 4, 64, predicate)
    kinds = {spec.name: stored.type for spec, stored in open_checkpoint(tmp_path / "mlx").storage()}
    assert kinds["layers.0.linear_attn.in_proj_a.weight"] == "BF16"
    assert kinds["layers.0.linear_attn.out_proj.weight"] == "8-bit g32"
    assert kinds["layers.0.mlp.down_proj.weight"] == "4-bit g64"
    block = json.loads((tmp_path / "mlx" / "config.json").read_text())["quantization"]
    assert block["language_model.model.layers.0.linear_attn.out_proj"] == {"bits": 8, "group_size": 32}


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_modes_of_floating_point(folder: Path, tmp_path: Path, mode: str) -> None:
    """Every weight is mx.dequantize's, bit for bit, and every backend runs them."""
    theirs = convert(folder, tmp_path / "mlx", None, None, mode=mode)
    checkpoint = open_checkpoint(tmp_path / "mlx")
    stored = {spec.name: stored for spec, stored in checkpoint.storage()}
    nbytes = 128 * {"mxfp4": 34, "nvfp4": 36, "mxfp8": 66}[mode]  # rows of 64
    assert stored["layers.1.mlp.up_proj.weight"] == (mode, nbytes)
    for name in ("layers.1.mlp.up_proj", "layers.3.self_attn.o_proj", "embed_tokens"):
        module: Any = theirs.language_model.model
        for part in name.split("."):
            module = module[int(part)] if part.isdigit() else getattr(module, part)
        w = checkpoint.matrix(f"{name}.weight")
        assert isinstance(w, QMatrix)
        assert w.mode == mode
        expected = np.array(mx.dequantize(module.weight, module.scales, mode=mode, dtype=mx.float32))
        assert matrix_rows(w, slice(None)).tobytes() == expected.tobytes()

    ids = list(range(1, 40))
    backends: dict[str, Any] = {backend.name: backend.ops for backend in available() if backend.ops}
    ours = Model(checkpoint, backends["numpy"]()).logits(ids)
    theirs.set_dtype(mx.float32)
    assert nmse(np.array(theirs(mx.array([ids]))[0]), ours) < 1e-8
    assert nmse(ours, Model(checkpoint, backends["mlx"]()).logits(ids)) < 1e-8
    if "cpu" in backends:
        cpu, table, rows = backends["cpu"](kv_dtype="f32"), checkpoint.matrix("embed_tokens.weight"), np.array(ids)
        embedded = cpu.embed(cpu.matrix(table), rows.astype(np.int32))
        np.testing.assert_array_equal(embedded, matrix_rows(table, rows))
        if mode == "mxfp8":  # its products are float32; others round activations (test_native_linear.py)
            assert nmse(ours, Model(checkpoint, cpu).logits(ids)) < 1e-8


def test_modes_are_mixed_by_module(folder: Path, tmp_path: Path) -> None:
    def predicate(path: str, _module: Any) -> bool | dict[str, Any]:
        return {"bits": 8, "group_size": 64, "mode": "affine"} if "embed_tokens" in path else "in_proj_a" not in path

    convert(folder, tmp_path / "mlx", None, None, predicate, mode="mxfp4")
    kinds = {spec.name: stored.type for spec, stored in open_checkpoint(tmp_path / "mlx").storage()}
    assert kinds["layers.0.linear_attn.in_proj_a.weight"] == "BF16"
    assert kinds["embed_tokens.weight"] == "8-bit g64"
    assert kinds["layers.0.mlp.down_proj.weight"] == "mxfp4"


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_such_models_are_sources(folder: Path, tmp_path: Path, mode: str) -> None:
    """They are dequantized as they are read, which 16 bits hold exactly; of 4 bits it is said that errors add up."""
    convert(folder, tmp_path / "mlx", None, None, mode=mode)
    report = quantize(tmp_path / "mlx", tmp_path / "out", bits=8, group_size=32, types=["*.up_proj=bf16"])
    warning = f"mlx holds {mode}: quantizing again adds to their error; better take an original"
    assert report.warnings == (() if mode == "mxfp8" else (warning,))
    export_gguf(open_checkpoint(tmp_path / "mlx"), tmp_path / "model.gguf", "bf16")
    source, out, gguf = (open_checkpoint(tmp_path / name) for name in ("mlx", "out", "model.gguf"))
    up, down = "layers.1.mlp.up_proj.weight", "layers.1.mlp.down_proj.weight"
    for name, other in ((up, out), (up, gguf), (down, gguf)):
        np.testing.assert_array_equal(other.rows(name, slice(None)), source.rows(name, slice(None)))
    assert nmse(source.rows(down, slice(None)), out.rows(down, slice(None))) < 1e-4
    assert {stored.type for spec, stored in out.storage() if spec.name == down} == {"8-bit g32"}
