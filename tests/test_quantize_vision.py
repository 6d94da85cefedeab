"""The vision tower through the quantizer: kept, its matrices in 8 bits, or left out; and in MLX's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_ops import backends
from typer.testing import CliRunner
from vision_cases import DATA, DEMO, case, patches

from edgeq.backends.numpy import NumpyOps
from edgeq.backends.ops import Ops
from edgeq.checkpoint import FolderCheckpoint, open_checkpoint
from edgeq.cli import app
from edgeq.engine import Engine
from edgeq.errors import UsageError
from edgeq.formats.bf16 import Array, Float32
from edgeq.formats.safetensors import SafetensorsFile, SafetensorsWriter, dtype_name
from edgeq.quant import quantize
from edgeq.quant.gguf_export import export_mmproj
from edgeq.testing import config_values, nmse, write_checkpoint
from edgeq.weights import Part, QMatrix, Role, vision_tensors

SOURCE = DATA / "wide"  # 96 wide: groups of 32
PICTURE = case(SOURCE / "golden.safetensors", "image")


def features(ops: Ops[Any, Any], folder: Path) -> Float32:
    return np.array(ops.numpy(Engine(open_checkpoint(folder), ops).see(PICTURE.pixels, PICTURE.grids[0])))


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vision") / "eight"
    quantize(SOURCE, out, recipe="q8")
    return out


def test_matrices_have_8_bits_by_default_and_the_rest_is_as_it_was(eight: Path) -> None:
    before, after = FolderCheckpoint(SOURCE), FolderCheckpoint(eight)
    assert after.config == before.config
    assert after.config.vision is not None
    for spec in vision_tensors(after.config.vision):
        if spec.role is Role.LINEAR:
            matrix = after.matrix(spec.name)
            assert isinstance(matrix, QMatrix)
            assert matrix.bits == 8
        else:
            assert after.raw(spec.name).tobytes() == before.raw(spec.name).tobytes()
    record = json.loads((eight / "edgeq.json").read_text())
    assert record["recipe"]["vision"] == "8"


@pytest.mark.parametrize("ops", list(backends()))
def test_8_bits_run_on_every_backend(ops: Any, eight: Path) -> None:
    settings = {"mlx": {"dtype": "float32"}, "cpu": {"kv_dtype": "f32"}}.get(ops.name, {})
    seen = features(ops(**settings), eight)
    # 1/255 of the range of 32 weights, about 4 deviations: (4 / 255)^2 / 12 = 2e-5 a matrix, half a dozen of them;
    # the native backend may round activations as well.
    assert nmse(PICTURE.features, seen) <= 1e-3
    same = NumpyOps() if ops.name != "numpy" else None
    assert same is None or nmse(features(same, eight), seen) <= (1e-3 if ops.name == "cpu" else 1e-11)


def test_16_bits_are_the_source_s(tmp_path: Path) -> None:
    quantize(SOURCE, tmp_path / "out", vision=16)
    before, after = FolderCheckpoint(SOURCE), FolderCheckpoint(tmp_path / "out")
    assert after.config.vision is not None
    for spec in vision_tensors(after.config.vision):
        assert after.raw(spec.name).tobytes() == before.raw(spec.name).tobytes()
    assert json.loads((tmp_path / "out" / "edgeq.json").read_text())["recipe"]["vision"] == "16"


def test_the_tower_alone(tmp_path: Path) -> None:
    """8 bits for it where nothing else is quantized."""
    quantize(SOURCE, tmp_path / "out", recipe="none", vision="8")
    after = FolderCheckpoint(tmp_path / "out")
    types = {storage.type for spec, storage in after.storage() if spec.part is Part.TEXT}
    assert types <= {"BF16", "F32"}
    assert nmse(PICTURE.features, features(NumpyOps(), tmp_path / "out")) <= 1e-3


def test_left_out(tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = quantize(SOURCE, out, vision="none")
    assert "vision" not in report.parts
    after = FolderCheckpoint(out)
    assert not any(spec.part is Part.VISION for spec, _ in after.storage())
    assert json.loads((out / "edgeq.json").read_text())["recipe"]["vision"] == "none"
    with pytest.raises(UsageError, match=r"does not see: it was quantized without its vision tower \(--vision none\)"):
        Engine(after, NumpyOps()).see(PICTURE.pixels, PICTURE.grids[0])
    shown = CliRunner().invoke(app, ["info", str(out)]).output
    assert "no: it was quantized without its vision tower" in " ".join(shown.split())
    with pytest.raises(UsageError, match="has no vision tower"):
        export_mmproj(after, tmp_path / "x.gguf", "f16")


def test_a_source_without_tower(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "text", config_values())
    for vision in (None, "none"):
        quantize(tmp_path / "text", tmp_path / f"out-{vision}", vision=vision)
        assert json.loads((tmp_path / f"out-{vision}" / "edgeq.json").read_text())["recipe"]["vision"] is None
    with pytest.raises(UsageError, match="has no vision tower to store in 8 bits"):
        quantize(tmp_path / "text", tmp_path / "x", vision=8)
    result = CliRunner().invoke(app, ["quantize", str(tmp_path / "text"), "-o", str(tmp_path / "x"), "--vision", "4"])
    assert result.exit_code == UsageError.exit_code


def test_8_bits_cost_the_demo_model_nothing_that_shows(tmp_path: Path) -> None:
    """Features of a red square at 8 bits; docs/concepts/quantization.md has what becomes of answers."""
    quantize(DEMO, tmp_path / "out", recipe="none", vision=8)
    picture = np.full((96, 96, 3), 240, np.uint8)
    picture[10:40, 55:85] = (220, 30, 30)
    pixels = patches(picture)
    sixteen, eight = (
        np.array(Engine(open_checkpoint(path), NumpyOps()).see(pixels, (1, 6, 6))) for path in (DEMO, tmp_path / "out")
    )
    assert nmse(sixteen, eight) <= 1e-4


# --- MLX's layout ----------------------------------------------------------------------------------------------------


def mlx_name(name: str) -> str:
    """A hub name as mlx-vlm writes it."""
    if name.startswith("model.visual."):
        return name.replace("model.visual.", "vision_tower.", 1)
    return name.replace("model.language_model.", "language_model.model.", 1)


def as_mlx(source: Path, out: Path) -> None:
    """A checkpoint as mlx-vlm writes it: its names, convolutions with the channels last, norms with their 1."""
    checkpoint, file = FolderCheckpoint(source), SafetensorsFile(next(source.glob("model*.safetensors")))
    norms = {t.file_name for t in checkpoint.tensors.values() if t.spec.role is Role.NORM}
    tensors = dict[str, Array]()
    for name in file.tensors:
        x = np.array(file.array(name))
        if name.endswith(("conv1d.weight", "patch_embed.proj.weight")):
            x = np.moveaxis(x, 1, -1)
        tensors[mlx_name(name)] = checkpoint.dense(checkpoint_name(checkpoint, name)) if name in norms else x
    out.mkdir()
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    entries = {name: (dtype_name(x.dtype), x.shape) for name, x in tensors.items()}
    with SafetensorsWriter(out / "model.safetensors", entries, {"format": "mlx"}) as written:
        for name, x in tensors.items():
            written.write(name, x)


def checkpoint_name(checkpoint: FolderCheckpoint, file_name: str) -> str:
    return next(name for name, t in checkpoint.tensors.items() if t.file_name == file_name)


@pytest.mark.parametrize("quantized", [False, True], ids=["16 bits", "8 bits"])
def test_mlx_folders_see(eight: Path, tmp_path: Path, quantized: bool) -> None:
    source = eight if quantized else SOURCE
    as_mlx(source, tmp_path / "mlx")
    assert FolderCheckpoint(tmp_path / "mlx").layout == "mlx"
    ours, theirs = (features(NumpyOps(), path) for path in (tmp_path / "mlx", source))
    assert ours.tobytes() == theirs.tobytes()


def test_a_tower_in_part_is_left_out(tmp_path: Path) -> None:
    as_mlx(SOURCE, tmp_path / "mlx")
    file = SafetensorsFile(tmp_path / "mlx" / "model.safetensors")
    tensors = {n: np.array(file.array(n)) for n in file.tensors if not n.endswith("merger.norm.bias")}
    with SafetensorsWriter(file.path, {n: (dtype_name(x.dtype), x.shape) for n, x in tensors.items()}) as written:
        for name, x in tensors.items():
            written.write(name, x)
    with pytest.warns(UserWarning, match=r"missing visual\.merger\.norm\.bias .* does not see"):
        assert FolderCheckpoint(tmp_path / "mlx").config.vision is None
