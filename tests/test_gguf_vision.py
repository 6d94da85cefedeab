"""Vision towers of GGUF models: beside the model, in it, in llama.cpp's and ollama's layout, good and bad ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner

import edgeq
from edgeq.backends.numpy import NumpyOps
from edgeq.backends.numpy.ops import matrix_rows
from edgeq.checkpoint import Checkpoint, open_checkpoint
from edgeq.checkpoint.gguf import GGUFCheckpoint
from edgeq.cli import app
from edgeq.engine import Engine
from edgeq.errors import ModelError, UsageError
from edgeq.formats.bf16 import Array, Float32, to_float32
from edgeq.formats.gguf import GGUFFile
from edgeq.quant import quantize
from edgeq.quant.gguf_export import export_gguf, export_mmproj
from edgeq.testing import config_values, nmse, write_checkpoint
from edgeq.weights import vision_tensors

Q8_0 = gguf.GGMLQuantizationType.Q8_0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that sees, and has settings of its own for pictures."""
    path = tmp_path_factory.mktemp("seeing") / "model"
    values = config_values(vision=True)
    values["vision_config"] |= {"depth": 2, "num_position_embeddings": 25}
    write_checkpoint(path, values)
    (path / "preprocessor_config.json").write_text(
        '{"size": {"shortest_edge": 256, "longest_edge": 4096}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.3]}'
    )
    return path


@pytest.fixture
def model(folder: Path, tmp_path: Path) -> Path:
    """The language model as a GGUF file, by itself in a folder."""
    export_gguf(open_checkpoint(folder), tmp_path / "model.gguf", "bf16")
    return tmp_path / "model.gguf"


def read(path: Path, mmproj: Path | None = None) -> GGUFCheckpoint:
    checkpoint = open_checkpoint(path, mmproj)
    assert isinstance(checkpoint, GGUFCheckpoint)
    return checkpoint


Tensors = dict[str, tuple[Array, gguf.GGMLQuantizationType | None]]


def rewrite(
    sources: list[Path], out: Path, change: Callable[[dict[str, Float32]], Mapping[str, Array]] = lambda x: x,
    metadata: Mapping[str, Any] | None = None, drop: str = "nothing", quantized: bool = False,
) -> None:  # fmt: skip
    """Write the tensors of some files as one, float32 unless quantized; `metadata` replaces that of the first.

    change: of the tensors by name. drop: how metadata begins that is left out.
    """
    readers = [gguf.GGUFReader(path) for path in sources]
    arch = readers[0].fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, arch)
    values = {f.name: f for reader in readers for f in reader.fields.values() if not f.name.startswith(("GGUF.", drop))}
    for name, f in values.items():
        if name not in ("general.architecture", *(metadata or {})):
            writer.add_key_value(name, f.contents(), f.types[0], f.types[-1] if len(f.types) > 1 else None)
    for name, value in (metadata or {}).items():
        kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
        writer.add_key_value(name, value, getattr(gguf.GGUFValueType, kinds[type(value)]))
    files = [GGUFFile(path) for path in sources]
    tensors = {
        name: np.array(to_float32(file.data(name).view(info.type.layout).reshape(info.shape)))
        for file in files
        for name, info in file.tensors.items()
    }
    for name, x in change(tensors).items():
        if quantized and x.ndim == 2 and not name.startswith(("token_embd", "blk")):
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(x), Q8_0), raw_dtype=Q8_0)
        else:
            writer.add_tensor(name, np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_same_tower(ours: Checkpoint, theirs: Checkpoint) -> None:
    assert ours.config.vision == theirs.config.vision
    assert theirs.config.vision is not None
    for spec in vision_tensors(theirs.config.vision):
        np.testing.assert_array_equal(ours.dense(spec.name), theirs.dense(spec.name))
        if spec.is_matrix:
            one, other = (matrix_rows(c.matrix(spec.name), slice(None)) for c in (ours, theirs))
            np.testing.assert_array_equal(one, other)
    assert seen(ours).tobytes() == seen(theirs).tobytes()


def seen(checkpoint: Checkpoint) -> Float32:
    """The features of a picture."""
    pixels = np.random.default_rng(8).uniform(-1, 1, (24, 96)).astype(np.float32)
    e = Engine(checkpoint, NumpyOps())
    return np.array(e.see(pixels, (1, 4, 6)))


# --- files of their own ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f32", "bf16", "f16"])
def test_values_are_the_source_s(folder: Path, model: Path, kind: str) -> None:
    source = open_checkpoint(folder)
    export_mmproj(source, model.parent / f"mmproj-{kind}.gguf", kind)
    ours = read(model)
    if kind == "f16":  # of bfloat16's 8 bits all are kept, of its exponents not the smallest
        assert nmse(seen(source), seen(ours)) <= 1e-10
    else:
        assert_same_tower(ours, source)
    size = {"shortest_edge": 256, "longest_edge": 4096}
    expected = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "size": size}
    expected |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3]}
    assert ours.processor_values() == (expected, {})


def test_q8_0(folder: Path, model: Path) -> None:
    source = open_checkpoint(folder)
    export_mmproj(source, model.parent / "x", "f32")
    rewrite([model.parent / "x"], model.parent / "mmproj-q8.gguf", quantized=True)
    ours = read(model)
    types = {storage.type for spec, storage in ours.storage() if spec.name.endswith("attn.qkv.weight")}
    assert types == {"Q8_0"}
    assert nmse(seen(source), seen(ours)) <= 1e-3  # steps of 1/127 of the largest of 32 weights
    engine = Engine(ours, NumpyOps())
    engine.see(np.zeros((4, 96), np.float32), (1, 2, 2))


def test_the_file_that_is_asked_for(folder: Path, model: Path, tmp_path: Path) -> None:
    source, elsewhere = open_checkpoint(folder), tmp_path / "elsewhere" / "tower.gguf"
    elsewhere.parent.mkdir()
    export_mmproj(source, elsewhere, "f32")
    assert not Engine(read(model), NumpyOps()).sees
    assert_same_tower(read(model, elsewhere), source)
    assert edgeq.load(model, mmproj=elsewhere).engine.sees


def test_one_that_is_not_called_so(folder: Path, model: Path) -> None:
    source = open_checkpoint(folder)
    export_mmproj(source, model.parent / "vision-f32.gguf", "f32")
    export_gguf(source, model.parent / "other-quantization.gguf", "q8_0")
    assert_same_tower(read(model), source)


def test_one_at_the_top_of_its_repository(folder: Path, model: Path, tmp_path: Path) -> None:
    source, snapshot = open_checkpoint(folder), tmp_path / "models--a--b" / "snapshots" / "0123"
    (snapshot / "BF16").mkdir(parents=True)
    export_mmproj(source, snapshot / "mmproj-F32.gguf", "f32")
    assert_same_tower(read(model.rename(snapshot / "BF16" / "model.gguf")), source)


def test_what_is_asked_for_must_fit(folder: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        read(model, tmp_path / "none.gguf")
    with pytest.raises(ModelError, match=r"model\.gguf holds no v\.position_embd\.weight"):
        read(model, model)
    (tmp_path / "noise.gguf").write_bytes(bytes(100))
    with pytest.raises(ModelError, match="is not a valid GGUF file"):
        read(model, tmp_path / "noise.gguf")
    with pytest.raises(UsageError, match=r"is no GGUF file"):
        open_checkpoint(folder, model)
    result = CliRunner().invoke(app, ["generate", str(model), "-p", "x", "--mmproj", str(tmp_path / "none.gguf")])
    assert result.exit_code == ModelError.exit_code


def test_the_one_that_fits_is_found_among_many(folder: Path, model: Path) -> None:
    source = open_checkpoint(folder)
    write_checkpoint(model.parent / "other", config_values(vision=True, hidden_size=96))
    export_mmproj(open_checkpoint(model.parent / "other"), model.parent / "a-mmproj.gguf", "f16")
    export_mmproj(source, model.parent / "mmproj-model-f32.gguf", "f32")
    export_mmproj(source, model.parent / "mmproj-f16.gguf", "f16")
    (model.parent / "mmproj-broken.gguf").write_bytes(b"GGUF")
    found = read(model)  # without a word about the others
    assert found.tower is not None
    assert found.tower.file.path.name == "mmproj-model-f32.gguf"


BAD: dict[str, dict[str, Any]] = {
    "projector": {"metadata": {"clip.projector_type": "llava"}},
    "deepstack": {"metadata": {"clip.vision.is_deepstack_layers": [True, False]}},
    "epsilon": {"metadata": {"clip.vision.attention.layer_norm_epsilon": 1e-5}},
    "heads": {"metadata": {"clip.vision.attention.head_count": 3}},
    "no heads": {"drop": "clip.vision.attention.head_count"},
    "depth": {"metadata": {"clip.vision.block_count": 3}},
    "shape": {"change": lambda x: x | {"v.post_ln.bias": np.zeros(31, np.float32)}},
    "missing": {"change": lambda x: {name: y for name, y in x.items() if name != "mm.2.bias"}},
    "unexpected": {"change": lambda x: x | {"v.deepstack.0.fc1.weight": np.zeros((4, 4), np.float32)}},
    "audio": {"change": lambda x: x | {"a.conv1d.1.weight": np.zeros((4, 4), np.float32)}},
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_tower_never_stops_the_text(folder: Path, model: Path, name: str) -> None:
    export_mmproj(open_checkpoint(folder), model.parent / "x", "f32")
    rewrite([model.parent / "x"], model.parent / "mmproj.gguf", **BAD[name])
    with pytest.warns(UserWarning, match=r"mmproj\.gguf.*; the model runs without it and does not see") as caught:
        blind = read(model)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert blind.tower is None
    assert not Engine(blind, NumpyOps()).sees


def test_a_folder_called_like_a_tower(model: Path) -> None:
    (model.parent / "mmproj.gguf").mkdir()
    with pytest.warns(UserWarning, match="cannot be read"):
        assert read(model).tower is None


# --- in the model's file ---------------------------------------------------------------------------------------------


def ollama_tensors(x: dict[str, Float32]) -> dict[str, Float32]:
    """llama.cpp's names and parts as ollama's: the hub's in part, queries, keys and values apart."""
    first, second = x.pop("v.patch_embd.weight"), x.pop("v.patch_embd.weight.1")
    whole = np.stack([first, second], axis=2)
    out = {"v.patch_embed.weight": whole.reshape(-1, *whole.shape[2:])}
    names = {
        "v.patch_embd.": "v.patch_embed.", "v.position_embd.": "v.pos_embed.", "v.post_ln.": "v.merger.norm.",
        "mm.0.": "v.merger.linear_fc1.", "mm.2.": "v.merger.linear_fc2.", ".ln1.": ".norm1.", ".ln2.": ".norm2.",
        ".ffn_up.": ".mlp.linear_fc1.", ".ffn_down.": ".mlp.linear_fc2.",
    }  # fmt: skip
    for name, y in x.items():
        if not name.startswith(("v.", "mm.")):
            out[name] = y
            continue
        for old, new in names.items():
            name = name.replace(old, new)
        if ".attn_qkv." in name:
            parts = zip("qkv", np.split(y, 3), strict=True)
            out |= {name.replace("attn_qkv", f"attn_{part}"): z for part, z in parts}
        else:
            out[name] = y
    return out


OLLAMA_KEYS = {
    "qwen35.vision.block_count": 2, "qwen35.vision.embedding_length": 32, "qwen35.vision.attention.head_count": 2,
    "qwen35.vision.num_channels": 3, "qwen35.vision.patch_size": 4, "qwen35.vision.spatial_merge_size": 2,
    "qwen35.vision.attention.layer_norm_epsilon": 1e-6, "qwen35.vision.rope.freq_base": 10000.0,
    "qwen35.vision.temporal_patch_size": 2, "qwen35.vision.shortest_edge": 256, "qwen35.vision.longest_edge": 4096,
    "qwen35.vision.image_mean": [0.4, 0.5, 0.6], "qwen35.vision.image_std": [0.3],
}  # fmt: skip


@pytest.mark.parametrize("layout", ["llama.cpp", "ollama"])
@pytest.mark.parametrize("quantized", [False, True], ids=["f32", "q8_0"])
def test_a_tower_inside(folder: Path, tmp_path: Path, layout: str, quantized: bool) -> None:
    source = open_checkpoint(folder)
    export_gguf(source, tmp_path / "text", "f32")
    export_mmproj(source, tmp_path / "tower", "f32")
    both, inside = [tmp_path / "text", tmp_path / "tower"], tmp_path / "blob.gguf"
    if layout == "ollama":
        rewrite(both, inside, ollama_tensors, OLLAMA_KEYS, drop="clip.", quantized=quantized)
    else:
        rewrite(both, inside, quantized=quantized)
    ours = read(inside)
    assert ours.weight_files() == [inside]
    if quantized:
        assert nmse(seen(source), seen(ours)) <= 1e-3
    else:
        assert_same_tower(ours, source)
    assert ours.processor_values()[0]["size"] == {"shortest_edge": 256, "longest_edge": 4096}


def test_a_bad_tower_inside_is_left_out(folder: Path, tmp_path: Path) -> None:
    source = open_checkpoint(folder)
    export_gguf(source, tmp_path / "text", "f32")
    export_mmproj(source, tmp_path / "tower", "f32")
    rewrite(
        [tmp_path / "text", tmp_path / "tower"], tmp_path / "blob.gguf",
        lambda x: {name: y for name, y in x.items() if name != "v.blk.1.ln2.bias"},
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"missing v\.blk\.1\.ln2\.bias"):
        blind = read(tmp_path / "blob.gguf")
    assert blind.tower is None
    assert nmse(edgeq.load(folder).logits([1, 2, 3]), edgeq.load(read_path(tmp_path)).logits([1, 2, 3])) <= 1e-4


def read_path(folder: Path) -> Path:
    """The text alone, from which the file was made."""
    (folder / "text").rename(folder / "plain.gguf")
    return folder / "plain.gguf"


# --- and back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_round_trip(folder: Path, model: Path, tmp_path: Path, kind: str) -> None:
    """Folder, GGUF, folder, GGUF: the same tower, the same settings, and the second file is the first."""
    export_mmproj(open_checkpoint(folder), tmp_path / "mmproj.gguf", kind)
    quantize(model, tmp_path / "again", recipe="none")
    again = open_checkpoint(tmp_path / "again")
    assert_same_tower(again, open_checkpoint(folder))
    assert again.processor_values() == read(model).processor_values()
    export_mmproj(again, tmp_path / "second", kind)
    first, second = GGUFFile(tmp_path / "mmproj.gguf"), GGUFFile(tmp_path / "second")
    assert first.tensors.keys() == second.tensors.keys()
    for name in first.tensors:
        assert first.data(name).tobytes() == second.data(name).tobytes()
