"""What a path is: every row of docs/reference/formats.md, made here, and what edgeq says to it."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_forms import FORMS, gguf_matrix
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ollama_files import Store, write_gguf
from packed_forms import read_tensors, write_tensors
from typer.testing import CliRunner

from edgeq.adapters import read_folder
from edgeq.checkpoint import open_checkpoint
from edgeq.cli import app
from edgeq.errors import EdgeqError, ModelError, UsageError
from edgeq.formats.gguf import GGUFFile, SplitGGUF, peek
from edgeq.formats.safetensors import SafetensorsFile, SafetensorsWriter
from edgeq.hub import find_model
from edgeq.identify import identify
from edgeq.quant import quantize
from edgeq.quant.gguf_export import export_gguf, export_mmproj
from edgeq.testing import config_values, write_checkpoint

DOC = Path(__file__).parent.parent / "docs" / "reference" / "formats.md"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 1746882752\n"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def rows(section: str) -> dict[str, tuple[str, str]]:
    """A section's table: what, whether edgeq opens it, what it says."""
    text = DOC.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    return {what: (opened, said) for what, opened, said in cells[2:]}


class Models:
    """Models to build the rows from; copied, never changed."""

    def __init__(self, folder: Path, chat: Path) -> None:
        self.checkpoint, self.chat = folder / "checkpoint", chat
        write_checkpoint(self.checkpoint, config_values(vision=True))
        source = open_checkpoint(self.checkpoint)
        self.gguf, self.mmproj = folder / "model.gguf", folder / "tower" / "tower.gguf"
        self.mmproj.parent.mkdir()
        export_gguf(source, self.gguf, "bf16")
        export_mmproj(source, self.mmproj, "f16")

    def folder(self, path: Path) -> Path:
        shutil.copytree(self.checkpoint, path)
        return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, chat_folder: Path) -> Models:
    return Models(tmp_path_factory.mktemp("models"), chat_folder)


def gguf_file(path: Path, arch: str = "qwen35", **metadata: str | int) -> Path:
    """A GGUF file of a vector and these values; `general__type` is general.type."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        name = key.replace("__", ".")
        writer.add_string(name, value) if isinstance(value, str) else writer.add_uint32(name, value)
    writer.add_tensor("x", np.zeros(8, np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path


def split(source: Path, folder: Path, count: int, stem: str = "model") -> list[Path]:
    """Parts as llama.cpp's own writer makes them: metadata in the first, numbers in all."""
    reader = gguf.GGUFReader(source)
    per_part = -(-len(reader.tensors) // count)
    writer = gguf.GGUFWriter(folder / f"{stem}.gguf", "qwen35", split_max_tensors=per_part)
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type, raw_shape=tensor.data.shape)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return [folder / f"{stem}-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]


# --- rows of what is opened ------------------------------------------------------------------------------------------

Make = Callable[[Path, Models], Path]
OPENED: dict[str, Make] = {}
REFUSED: dict[str, Make] = {}


def opened(what: str) -> Callable[[Make], Make]:
    return lambda make: OPENED.setdefault(what, make)


def refused(what: str) -> Callable[[Make], Make]:
    return lambda make: REFUSED.setdefault(what, make)


def file(what: str, data: bytes, name: str = "model.gguf") -> None:
    """A row about a file of these bytes."""

    def make(path: Path, _: Models) -> Path:
        (path / name).write_bytes(data)
        return path / name

    REFUSED[what] = make


def folder(what: str, *files: str, said: dict[str, str] | None = None) -> None:
    """A row about a folder of these files; `said` are those with a content."""

    def make(path: Path, _: Models) -> Path:
        for name, text in {**dict.fromkeys(files, "x"), **(said or {})}.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(text)
        return path

    REFUSED[what] = make


@opened("checkpoint folder of the hub: config.json and safetensors, sharded or not")
def _checkpoint(path: Path, models: Models) -> Path:
    return models.folder(path / "x")


@opened("folder that edgeq quantized")
def _quantized(path: Path, models: Models) -> Path:
    quantize(models.checkpoint, path / "q")
    return path / "q"


@opened("folder of mlx-lm or mlx-vlm")
def _mlx(path: Path, _: Models) -> Path:
    write_checkpoint(path)
    file = SafetensorsFile(path / "model.safetensors")
    tensors = {name: np.array(file.array(name)) for name in file.tensors}
    tensors = {name: np.moveaxis(x, 1, 2) if name.endswith("conv1d.weight") else x for name, x in tensors.items()}
    entries = {name: (file.tensors[name].dtype, x.shape) for name, x in tensors.items()}
    with SafetensorsWriter(path / "model.safetensors", entries) as writer:
        for name, x in tensors.items():
            writer.write(name, np.ascontiguousarray(x))
    return path


@opened("the same in mode affine, mxfp4, nvfp4 or mxfp8")
def _mlx_modes(path: Path, models: Models) -> Path:
    _mlx(path, models)
    tensors = read_tensors(path)
    modules = [name.removesuffix(".weight") for name in tensors if "_proj." in name and ".mlp." in name][:3]
    entries: dict[str, object] = {"bits": 4, "group_size": 64, "mode": "affine"}
    for module, mode in zip(modules, ("mxfp4", "nvfp4", "mxfp8"), strict=True):
        form, (_, old) = FORMS[mode], tensors[f"{module}.weight"]
        w = gguf_matrix(np.random.default_rng(0), form, *old.shape)
        tensors |= {f"{module}.weight": ("U32", w.codes), f"{module}.scales": ("U8", w.factors[0])}
        entries[module] = {"bits": form.bits, "group_size": form.group_size, "mode": mode}
    write_tensors(path / "model.safetensors", tensors)
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | {"quantization": entries}))
    return path


@opened("one of the safetensors files of such a folder")
def _one_shard(path: Path, models: Models) -> Path:
    return models.folder(path / "x") / "model.safetensors"


@opened("folder of the hub's cache, models--OWNER--NAME")
def _cache(path: Path, models: Models) -> Path:
    cache = path / "models--Qwen--Qwen3.5-Tiny"
    models.folder(cache / "snapshots" / COMMIT)
    models.folder(cache / "snapshots" / "older")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    return cache


@opened("GGUF model, whatever the file is called")
def _gguf(path: Path, models: Models) -> Path:
    return Path(shutil.copy(models.gguf, path / "model.bin"))


@opened("GGUF model in parts, NAME-00001-of-0000N.gguf, by any of its parts")
def _parts(path: Path, models: Models) -> Path:
    return split(models.gguf, path, 3)[1]


@opened("folder with one GGUF model, beside mmproj, imatrix and adapters")
def _one_gguf(path: Path, models: Models) -> Path:
    shutil.copy(models.gguf, path / "z.gguf")
    shutil.copy(models.mmproj, path / "a.gguf")
    gguf_file(path / "b.gguf", general__type="imatrix")
    gguf_file(path / "c.gguf", general__type="adapter", adapter__type="lora")
    (path / "config.json").write_text("{}")
    return path


@opened("folder with one GGUF model that is called otherwise, as m.bin")
def _unnamed_gguf(path: Path, models: Models) -> Path:
    shutil.copy(models.gguf, path / "m.bin")
    (path / "README.md").write_text("GGUF")
    return path


@opened("ollama's GGUF blob (blobs/sha256-...)")
def _blob(path: Path, models: Models) -> Path:
    return write_gguf(models.chat, path / f"sha256-{'a' * 64}")


@opened("ollama's manifest, or ollama:NAME")
def _manifest(path: Path, models: Models) -> Path:
    blob = write_gguf(models.chat, path / "x").read_bytes()
    return Store(path / "models").add("registry.ollama.ai/library/qwen3.5/2b", {"model": blob})


# --- rows of what is refused -----------------------------------------------------------------------------------------


@refused("folder with config.json only")
def _config_only(path: Path, models: Models) -> Path:
    shutil.copy(models.checkpoint / "config.json", path)
    return path


@refused("folder with weights and no config.json")
def _weights_only(path: Path, models: Models) -> Path:
    shutil.copy(models.checkpoint / "model.safetensors", path)
    return path


@refused("folder that holds models in folders")
def _above(path: Path, models: Models) -> Path:
    models.folder(path / "one")
    models.folder(path / "two")
    return path


@refused("folder that holds models two folders down")
def _two_above(path: Path, models: Models) -> Path:
    (path / "publisher" / "model").mkdir(parents=True)
    shutil.copy(models.gguf, path / "publisher" / "model")
    return path


@refused("folder with several GGUF models")
def _several(path: Path, models: Models) -> Path:
    for name in ("a-Q4_K_M.gguf", "a-Q8_0.gguf"):
        shutil.copy(models.gguf, path / name)
    return path


@refused("folder with an mmproj alone")
def _mmproj_folder(path: Path, models: Models) -> Path:
    shutil.copy(models.mmproj, path)
    return path


@refused("folder of the cache with several revisions")
def _revisions(path: Path, models: Models) -> Path:
    for name in ("a", "b"):
        models.folder(path / "models--a--b" / "snapshots" / name)
    return path / "models--a--b"


@refused("checkpoint of another architecture")
def _other(path: Path, models: Models) -> Path:
    values = json.loads((models.folder(path / "x") / "config.json").read_text())
    (path / "x" / "config.json").write_text(json.dumps({**values, "model_type": "llama"}))
    return path / "x"


@refused("unfinished download of a folder")
def _unfinished(path: Path, models: Models) -> Path:
    folder = models.folder(path / "x")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (folder / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "download" / "ab12.incomplete").write_bytes(b"x")
    return folder


@refused("download that is under way")
def _under_way(path: Path, models: Models) -> Path:
    folder = models.folder(path / "x")
    (folder / "model.safetensors.aria2").write_bytes(b"x")
    return folder


@refused("snapshot whose blobs are gone")
def _gone(path: Path, models: Models) -> Path:
    folder = models.folder(path / "x")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(path / "blobs" / "abc")
    return folder


def weights(what: str, data: bytes) -> None:
    """A row about a checkpoint in which these bytes stand for the weights."""

    def make(path: Path, models: Models) -> Path:
        folder = models.folder(path / "x")
        (folder / "model.safetensors").write_bytes(data)
        return folder

    REFUSED[what] = make


weights("checkpoint cloned without Git LFS", LFS)
weights("checkpoint whose weights are a web page", b"\n<!DOCTYPE html><html></html>")
weights("checkpoint whose weights are an error in words", "Entry not found: café".encode())
weights("checkpoint whose weights are pickled", pickle.dumps({"a": 1}))
weights("checkpoint whose weights are a GGUF file", b"GGUF\x03\0\0\0")


@refused("GGUF vision tower (mmproj)")
def _mmproj(path: Path, models: Models) -> Path:
    return Path(shutil.copy(models.mmproj, path / "a.gguf"))


@refused("GGUF adapter")
def _lora(path: Path, _: Models) -> Path:
    return gguf_file(path / "a.gguf", general__type="adapter", adapter__type="lora")


@refused("GGUF vocabulary")
def _vocabulary(path: Path, models: Models) -> Path:
    return without(models.gguf, path / "a.gguf", lambda name: True)


@refused("GGUF file of an MTP head")
def _head_only(path: Path, models: Models) -> Path:
    return without(models.gguf, path / "a.gguf", lambda name: not name.startswith("blk.3."))


def without(source: Path, out: Path, leave_out: Callable[[str], bool]) -> Path:
    """A GGUF file without some of its tensors."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(out, "qwen35")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        if not leave_out(tensor.name):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type, raw_shape=tensor.data.shape)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return out


@refused("GGUF importance matrix")
def _imatrix(path: Path, _: Models) -> Path:
    return gguf_file(path / "a.gguf", general__type="imatrix")


@refused("GGUF control vector")
def _control(path: Path, _: Models) -> Path:
    return gguf_file(path / "a.gguf", "controlvector", controlvector__model_hint="qwen35")


@refused("GGUF of another architecture, of any types")
def _llama(path: Path, _: Models) -> Path:
    raw = gguf_file(path / "a.gguf", "llama").read_bytes()
    at = raw.index(b"\x01\0\0\0\0\0\0\0x") + 9  # the tensor's name, before dimensions, shape and type
    (path / "a.gguf").write_bytes(raw[: at + 12] + (16).to_bytes(4, "little") + raw[at + 16 :])  # IQ2_XXS
    return path / "a.gguf"


@refused("GGUF model with a type that is not read, such as IQ2 and IQ3")
def _iq3(path: Path, models: Models) -> Path:
    raw = models.gguf.read_bytes()
    at = raw.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8  # before it dimensions and shape
    assert raw[at : at + 4] == (30).to_bytes(4, "little")  # BF16
    (path / "a.gguf").write_bytes(raw[:at] + (21).to_bytes(4, "little") + raw[at + 4 :])
    return path / "a.gguf"


@refused("later part of a GGUF model without the first")
def _no_first(path: Path, models: Models) -> Path:
    first, second = split(models.gguf, path, 2)
    first.unlink()
    return second


@refused("first part of a GGUF model without the others")
def _no_others(path: Path, models: Models) -> Path:
    first, *others = split(models.gguf, path, 3)
    for other in others:
        other.unlink()
    return first


@refused("safetensors file alone")
def _alone(path: Path, models: Models) -> Path:
    return Path(shutil.copy(models.checkpoint / "model.safetensors", path / "x.safetensors"))


@refused("safetensors file of something else beside a model")
def _beside(path: Path, models: Models) -> Path:
    return Path(shutil.copy(models.checkpoint / "model.safetensors", models.folder(path / "x") / "vae.safetensors"))


@refused("safetensors file of an adapter")
def _adapter_file(path: Path, models: Models) -> Path:
    folder = models.folder(path / "x")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3.5-2B"}')
    shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")
    return folder / "adapter_model.safetensors"


@refused("pipe, device")
def _pipe(path: Path, _: Models) -> Path:
    os.mkfifo(path / "pipe")
    return path / "pipe"


@refused("link to nothing")
def _link(path: Path, _: Models) -> Path:
    (path / "model.gguf").symlink_to(path / "nothing")
    return path / "model.gguf"


def zipped(*names: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return data.getvalue()


def tarred() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.gguf"))
    return data.getvalue()


PEFT = {"adapter_config.json": '{"base_model_name_or_path": "Qwen/Qwen3.5-2B", "peft_type": "LORA"}'}
folder("empty folder")
folder("folder of something else", "notes.txt")
folder("folder of ollama's models", "manifests/a", "blobs/sha256-1")
folder("adapter folder (PEFT)", "adapter_model.safetensors", said=PEFT)
folder("adapter folder (mlx-lm)", "adapters.safetensors", said={"adapter_config.json": '{"model": "q2b"}'})
folder("diffusers pipeline", "unet/x.safetensors", said={"model_index.json": '{"_class_name": "FluxPipeline"}'})
folder("folder with PyTorch weights", "config.json", "pytorch_model.bin", "training_args.bin")
folder("folder with an ONNX model", "config.json", "onnx/model.onnx")
folder("folder with an OpenVINO model", "config.json", "openvino_model.bin", "openvino_model.xml")
folder("folder with a Flax model", "config.json", "flax_model.msgpack")
folder("unfinished download without any weights", "config.json", "model.safetensors.part")
file("empty file", b"")
file("Git LFS pointer", LFS)
file("web page saved as a model", b"\xef\xbb\xbf<html><head>", "model.safetensors")
file("error in words saved as a model", b'{"error":"Invalid credentials"}')
file("piece of a GGUF file", b"GGUF", "model.gguf.part1of2")
file("piece of a GGUF file, lettered", b"GGUF", "model.gguf-split-b")
folder("folder with a GGUF file in pieces", "m.gguf.part1of2", said={"m.gguf.part2of2": "GGUF"})
file("unfinished download of a file", b"GGUF", "model.gguf.incomplete")
file("space that was never filled", bytes(5000))
file("PyTorch weights (zip)", zipped("archive/data.pkl"), "model.dat")
file("PyTorch weights (old)", pickle.dumps({"a": 1}), "pytorch_model.bin")
file("ONNX model", b"\x08\x07\x12\x07pytorch", "model.onnx")
file("TensorFlow model", b"\x89HDF\r\n\x1a\n", "tf_model.h5")
file("llamafile", b"MZqFpD=\n'", "qwen.llamafile")
file("llama.cpp's format before GGUF", b"tjgg\x03\0\0\0", "ggml-model-q4_0.bin")
file("importance matrix of old", b"\x08\0\0\0blk.0", "imatrix.dat")
file("zip archive", zipped("model.gguf"), "model.zip")
file("tar archive", tarred(), "model.tar")
file("gzip archive", b"\x1f\x8b\x08", "model.gguf.gz")
file("config.json, or another text file of a model", b"{}", "config.json")
file("Modelfile", b"# mine\nFROM ./model.gguf\nPARAMETER temperature 0.5\n", "Modelfile")
file(".eqs that is no session", b"junk", "talk.eqs")
file("damaged GGUF file", b"\x01\x02\x03\x04\x05")
file("anything else", b"\x01\x02\x03\x04\x05", "model.dat")


# --- tests -----------------------------------------------------------------------------------------------------------


def test_every_row_is_tested() -> None:
    assert rows("Opened").keys() == OPENED.keys()
    assert rows("Refused").keys() == REFUSED.keys()


@pytest.mark.parametrize("what", OPENED)
def test_opened(what: str, tmp_path: Path, models: Models) -> None:
    path = OPENED[what](tmp_path, models)
    checkpoint = open_checkpoint(path)
    assert checkpoint.format == rows("Opened")[what][1]
    assert open_checkpoint(find_model(path)).path == checkpoint.path
    done = CliRunner().invoke(app, ["info", str(path), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["path"] == str(checkpoint.path)


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    path = REFUSED[what](tmp_path, models)
    opened, said = rows("Refused")[what]
    with pytest.raises(EdgeqError) as caught:
        open_checkpoint(path)
    error = caught.value
    assert error.message.splitlines()[0].replace(str(path), "PATH").replace(str(path.parent), "PATH") == said
    assert error.exit_code == (UsageError.exit_code if opened == "no (2)" else ModelError.exit_code)
    assert error.hint
    assert "array(" not in error.message
    monkeypatch.setenv("COLUMNS", "1000")
    done = CliRunner().invoke(app, ["info", str(path)])
    assert done.exit_code == error.exit_code


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        identify(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["models--a--b", "models--a--b/blobs"])
@pytest.mark.parametrize("snapshots", ["missing", "a file"])
def test_a_cache_without_snapshots(name: str, snapshots: str, tmp_path: Path) -> None:
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    if snapshots == "a file":
        (tmp_path / "models--a--b" / "snapshots").touch()
    with pytest.raises(ModelError, match=r"without a model"):
        identify(tmp_path / name)


def test_leftovers_do_not_stop_a_whole_model(tmp_path: Path, models: Models) -> None:
    """Beside whole weights, everything else is only looked at by whoever needs it."""
    folder = models.folder(tmp_path / "x")
    for name in (
        "pytorch_model.bin",
        "model.onnx",
        "b.incomplete",
        "x.gguf",
        "adapter_config.json",
        "model_index.json",
    ):
        (folder / name).write_bytes(b"x")
    assert identify(folder).path == folder
    assert identify(folder / "model.safetensors").path == folder


def test_parts_that_the_text_does_not_need(tmp_path: Path, models: Models) -> None:
    """A tower that was not downloaded is for its reader; the file itself still names its model."""
    folder = models.folder(tmp_path / "x")
    names = SafetensorsFile(folder / "model.safetensors").tensors
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    files = {name: f"model-0000{1 + ('visual' in name)}-of-00002.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "model-00002-of-00002.safetensors").write_bytes(LFS)
    assert identify(folder).path == folder
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
    assert identify(folder / "model-00002-of-00002.safetensors").path == folder
    (folder / "model-00001-of-00002.safetensors").write_bytes(LFS)
    with pytest.raises(ModelError, match=r"00001-of-00002\.safetensors is a Git LFS pointer"):
        identify(folder)


def test_an_adapter_that_was_not_downloaded(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    (tmp_path / "adapter_model.safetensors").write_bytes(LFS)
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is a Git LFS pointer"):
        read_folder(tmp_path)


def test_a_folder_of_adapters(tmp_path: Path) -> None:
    for step in (10, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UsageError, match="is no model, but holds 2 adapters:") as caught:
        identify(tmp_path)
    assert f"--adapter {tmp_path / 'checkpoint-20'}`" in (caught.value.hint or "")


@pytest.mark.parametrize("name", [".", "models", "models/blobs", "models/manifests"])
def test_all_of_ollama_s_folders(name: str, tmp_path: Path) -> None:
    Store(tmp_path / "models").add("registry.ollama.ai/library/qwen3.5/2b", {"model": b"GGUF"})
    with pytest.raises(UsageError, match="is where ollama keeps its models"):
        identify(tmp_path / name)


def test_a_folder_with_one_model_in_it_names_it(tmp_path: Path, models: Models) -> None:
    models.folder(tmp_path / "up" / "here")
    with pytest.raises(UsageError, match="holds one:") as caught:
        identify(tmp_path / "up")
    assert str(tmp_path / "up" / "here") in (caught.value.hint or "")


class TestParts:
    @pytest.fixture
    def parts(self, tmp_path: Path, models: Models) -> list[Path]:
        return split(models.gguf, tmp_path, 3)

    @pytest.mark.parametrize("named", [0, 1, 2])
    def test_one_model(self, named: int, parts: list[Path], models: Models) -> None:
        ours, whole = open_checkpoint(parts[named]), open_checkpoint(models.gguf)
        assert ours.weight_files() == parts
        assert ours.path == parts[0]
        for spec, storage in whole.storage():
            assert ours.dense(spec.name).tobytes() == whole.dense(spec.name).tobytes()
            assert ours.memory_nbytes(spec) == storage.nbytes
        assert isinstance(GGUFFile(parts[0]), GGUFFile)
        assert not isinstance(GGUFFile(parts[0]), SplitGGUF)
        ours.check_whole()
        ours.drop_pages()

    def test_a_part_that_is_missing(self, parts: list[Path]) -> None:
        parts[1].unlink()
        with pytest.raises(ModelError, match=r"model-00002-of-00003\.gguf is missing beside it"):
            open_checkpoint(parts[2])

    def test_a_part_of_another_model(self, parts: list[Path], tmp_path: Path, models: Models) -> None:
        (tmp_path / "other").mkdir()
        shutil.copy(split(models.gguf, tmp_path / "other", 2)[1], parts[1])
        with pytest.raises(ModelError, match=r"00002-of-00003\.gguf is not part 2 of 3 .* says that it is part 2 of 2"):
            open_checkpoint(parts[0])
        shutil.copy(parts[2], parts[1])
        with pytest.raises(ModelError, match=r"00002-of-00003\.gguf is not part 2 .* says that it is part 3 of 3"):
            open_checkpoint(parts[0])
        shutil.copy(models.gguf, parts[1])
        with pytest.raises(ModelError, match=r"00002-of-00003\.gguf is not part 2 .* is no part of a split"):
            open_checkpoint(parts[0])

    def test_a_part_cut_short(self, parts: list[Path]) -> None:
        parts[1].write_bytes(parts[1].read_bytes()[:-100])
        with pytest.raises(ModelError, match=r"00002-of-00003\.gguf is not a valid GGUF file"):
            open_checkpoint(parts[0])

    def test_a_whole_model_that_is_called_like_a_part(self, tmp_path: Path, models: Models) -> None:
        (tmp_path / "whole").mkdir()
        copy = Path(shutil.copy(models.gguf, tmp_path / "whole" / "model-00002-of-00002.gguf"))
        assert open_checkpoint(copy).path == copy
        assert identify(copy.parent).path == copy

    def test_a_name_that_does_not_tell(self, parts: list[Path]) -> None:
        renamed = parts[0].rename(parts[0].with_name("model.gguf"))
        with pytest.raises(ModelError, match="is the first of 3 parts of a model, and its name does not tell"):
            open_checkpoint(renamed)

    def test_a_model_quantizes_from_its_parts(self, parts: list[Path], tmp_path: Path) -> None:
        quantize(parts[1], tmp_path / "out", recipe="none")
        assert open_checkpoint(tmp_path / "out").weight_files()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_file_holds(data: st.DataObject, tmp_path: Path, models: Models) -> None:
    """Noise, and files of every kind with some bytes wrong: an EdgeqError of one line, or a model."""
    good = data.draw(st.sampled_from([LFS, models.gguf.read_bytes()[:3000], zipped("a"), tarred(), b"{}", b""]))
    raw = bytearray(good + data.draw(st.binary(max_size=64)))
    for _ in range(data.draw(st.integers(0, 4))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / data.draw(st.sampled_from(["a.gguf", "a.safetensors", "a", "a.bin", "a.json"]))
    path.write_bytes(raw)
    peek(path)
    for asked in (path, tmp_path):
        try:
            open_checkpoint(asked)
        except EdgeqError as error:
            assert "\n" not in error.message.splitlines()[0]
            assert "array(" not in error.message
    path.unlink()


def test_peek_reads_little_and_believes_nothing(tmp_path: Path, models: Models) -> None:
    assert peek(models.gguf)["general.architecture"] == "qwen35"
    (tmp_path / "x").write_bytes(models.gguf.read_bytes()[:100])
    assert "general.architecture" in peek(tmp_path / "x")
    assert peek(tmp_path) == {}
    with SafetensorsWriter(tmp_path / "y", {"a": ("F32", (1,))}) as writer:
        writer.write("a", np.zeros(1, np.float32))
    assert peek(tmp_path / "y") == {}
