"""ollama's models: its GGUF files in every layout that its converter has written, and its manifests."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from random import Random
from typing import Any

import gguf
import numpy as np
import pytest
from fuzz_mutators import mutate_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ollama_files import Store, write_gguf

import edgeq
from edgeq.backends.numpy.ops import matrix_rows
from edgeq.checkpoint import Checkpoint, open_checkpoint
from edgeq.checkpoint.gguf import GGUFCheckpoint
from edgeq.errors import EdgeqError, ModelError, UsageError
from edgeq.formats.bf16 import Float32
from edgeq.hub import find_model
from edgeq.weights import Part, all_tensors

LIBRARY = "registry.ollama.ai/library/qwen3.5/2b"


@pytest.fixture(scope="module")
def blob_file(chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(chat_folder, tmp_path_factory.mktemp("blob") / "x")


@pytest.fixture(scope="module")
def blob(blob_file: Path) -> bytes:
    return blob_file.read_bytes()


def read(path: Path) -> GGUFCheckpoint:
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, GGUFCheckpoint)
    return checkpoint


def values(checkpoint: Checkpoint, name: str) -> Float32:
    spec = next(spec for spec, _ in checkpoint.storage() if spec.name == name)
    if len(spec.shape) == 2:
        return matrix_rows(checkpoint.matrix(name), slice(None))
    return checkpoint.dense(name)


def assert_same(ours: Checkpoint, theirs: Checkpoint) -> None:
    stored = {spec.name for spec, _ in ours.storage()}
    assert stored == {spec.name for spec in all_tensors(theirs.config)}
    for name in stored:  # of A, one unit in the last place: the file has exponentials of float64
        np.testing.assert_allclose(values(ours, name), values(theirs, name), rtol=2e-7, atol=0, err_msg=name)


LAYOUTS: dict[str, dict[str, Any]] = {
    "the library's": {},
    "norms of the head's layer without 1": {"mtp": "mtp.* without"},
    "head as a block": {"mtp": "blocks", "per_layer": False, "sections": ("rope.dimension_sections", 4)},
    "oldest sections": {"sections": ("mrope_sections", 3), "dt": "ssm_dt.bias", "tiled": None},
    "other sections": {"sections": ("rope.mrope_section", 3)},
    "heads not reordered": {"tiled": False},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_the_checkpoint_s(layout: str, chat_folder: Path, tmp_path: Path) -> None:
    ours, theirs = read(write_gguf(chat_folder, tmp_path / "sha256-1", **LAYOUTS[layout])), open_checkpoint(chat_folder)
    assert_same(ours, theirs)
    assert ours.config.text.layer_types == theirs.config.text.layer_types
    assert ours.config.text.rope == theirs.config.text.rope
    assert ours.config.vision == theirs.config.vision


def test_runs_chats_and_drafts(chat_folder: Path, tmp_path: Path) -> None:
    model = edgeq.load(write_gguf(chat_folder, tmp_path / "sha256-1"), backend="numpy")
    source = edgeq.load(chat_folder, backend="numpy")
    ours, theirs = model.language.tokenizer, source.language.tokenizer
    assert ours is not None
    assert theirs is not None
    ids = theirs.encode("hello world")
    assert ours.encode("hello world <think>") == theirs.encode("hello world <think>")
    np.testing.assert_allclose(model.logits(ids), source.logits(ids), atol=1e-5)
    assert model.engine.sees
    assert Part.MTP in {spec.part for spec, _ in model.checkpoint.storage()}
    assert len(set(model.checkpoint.eos_token_ids)) == 2


def test_padding_in_a_text_is_text(chat_folder: Path, tmp_path: Path) -> None:
    tokenizer = read(write_gguf(chat_folder, tmp_path / "x")).tokenizer()
    assert tokenizer is not None
    assert len(tokenizer.encode("[PAD0]")) > 1
    assert tokenizer.decode(tokenizer.encode("[PAD0]")) == "[PAD0]"


def test_text_only_and_quantized(chat_folder: Path, tmp_path: Path) -> None:
    ours = read(write_gguf(chat_folder, tmp_path / "x", mtp="none", vision=False))
    assert {spec.part for spec, _ in ours.storage()} == {Part.TEXT}
    assert ours.config.vision is None


WRONG: dict[str, tuple[str, Any, str]] = {
    "heads that differ": ("attention.head_count", [4, 2, 4, 4], r"head_count is 2 and 4 by layer, expected one number"),
    "no heads": ("attention.head_count_kv", [0, 0, 0, 0], r"head_count_kv is empty by layer, expected one number"),
    "two sections": ("rope.dimension_sections", [2, 1], r"dimension_sections is \[2, 1\], expected three numbers"),
    "a fourth section": ("rope.dimension_sections", [2, 1, 1, 4], r"is \[2, 1, 1, 4\], expected three numbers"),
    "a list for a number": ("embedding_length", [64], "embedding_length is a list of 1 numbers, expected a value"),
    "other sections": ("rope.mrope_interleaved", False, "mrope_interleaved is false, expected true"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_edgeq_does_not_do_is_named(case: str, chat_folder: Path, tmp_path: Path) -> None:
    key, value, message = WRONG[case]
    path = rewritten(write_gguf(chat_folder, tmp_path / "x"), f"qwen35.{key}", value)
    with pytest.raises(ModelError, match=message) as caught:
        read(path)
    assert "\n" not in caught.value.message
    assert "array(" not in caught.value.message


def rewritten(path: Path, key: str, value: Any) -> Path:
    """The metadata of a file, with one value another."""
    out, reader = path.with_name("rewritten"), gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, "qwen35")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")) and field.name != key:
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    writer.add_bool(key, value) if isinstance(value, bool) else writer.add_array(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
def test_changed_headers(seed: int, blob_file: Path, tmp_path: Path) -> None:
    """Every kind of number and name, by the same changes as tools/fuzz.py: a model, or one line."""
    blob = blob_file.read_bytes()
    head = blob.index(b"tokenizer.ggml.tokens")
    tail = blob.rindex(b"token_embd.weight") - 4_000
    rng = Random(seed)
    raw = mutate_bytes(rng, blob[:head]) + blob[head:] if seed % 2 else blob[:tail] + mutate_bytes(rng, blob[tail:])
    (tmp_path / "x").write_bytes(raw)
    try:
        with warnings.catch_warnings(action="ignore"):  # of a tower that does not fit any more
            checkpoint = read(tmp_path / "x")
        for spec, _ in checkpoint.storage():
            values(checkpoint, spec.name)
    except EdgeqError as error:
        assert "array(" not in error.message


# --- manifests -------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    return Store(tmp_path / "models")


@pytest.mark.parametrize(
    ("name", "manifest", "where"),
    [
        ("qwen3.5:2b", LIBRARY, "manifests"),
        ("Qwen3.5:2B", LIBRARY, "manifests"),
        ("library/qwen3.5:2b", LIBRARY, "manifests"),
        ("registry.ollama.ai/library/qwen3.5:2b", LIBRARY, "manifests-v2"),
        ("qwen3.5", "registry.ollama.ai/library/qwen3.5/latest", "manifests"),
        ("someone/tuned:q4", "registry.ollama.ai/someone/tuned/q4", "manifests"),
        ("hf.co/unsloth/Qwen3.5-2B-GGUF:Q4_K_M", "hf.co/unsloth/Qwen3.5-2B-GGUF/Q4_K_M", "manifests"),
        ("localhost:5000/a/b:c", "localhost:5000/a/b/c", "manifests"),
    ],
)
def test_names(name: str, manifest: str, where: str, store: Store, blob: bytes) -> None:
    expected = store.add(manifest, {"model": blob}, where=where)
    found = find_model(f"ollama:{name}")
    assert found == expected
    assert read(found).path.parent == store.root / "blobs"


def test_a_model_that_is_not_there(store: Store, blob: bytes) -> None:
    store.add(LIBRARY, {"model": blob})
    store.add("registry.ollama.ai/me/x/latest", {"model": blob})
    with pytest.raises(UsageError, match=r"ollama has no model qwen3\.5:4b") as caught:
        find_model("ollama:qwen3.5:4b")
    assert "qwen3.5:2b" in caught.value.message
    assert "me/x:latest" in caught.value.message
    for name in ("ollama:", "ollama:a/b/c/d/e", "ollama:../x", "ollama:x y"):
        with pytest.raises(UsageError, match="no name of a model of ollama's"):
            find_model(name)


def test_where_packages_put_them(tmp_path: Path, blob: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("edgeq.hub.ollama._PLACES", (str(tmp_path / "system"),))
    system = Store(tmp_path / "system").add(LIBRARY, {"model": blob})
    assert find_model("ollama:qwen3.5:2b") == system
    own = Store(tmp_path / ".ollama" / "models").add(LIBRARY, {"model": blob})
    assert find_model("ollama:qwen3.5:2b") == own


def test_nothing_is_written(store: Store, blob: bytes) -> None:
    store.add(LIBRARY, {"model": blob})
    before = {path: path.stat().st_mtime_ns for path in store.root.rglob("*")}
    edgeq.load("ollama:qwen3.5:2b", backend="numpy")
    assert {path: path.stat().st_mtime_ns for path in store.root.rglob("*")} == before


def test_parameters_and_projector_are_used(store: Store, chat_folder: Path, tmp_path: Path) -> None:
    from edgeq.quant.gguf_export import export_gguf, export_mmproj

    export_gguf(open_checkpoint(chat_folder), tmp_path / "text", "bf16")
    export_mmproj(open_checkpoint(chat_folder), tmp_path / "tower", "f16")
    parameters = json.dumps({"temperature": 0.25, "top_k": 7, "repeat_penalty": 1.5, "num_ctx": 8192}).encode()
    layers = {"model": (tmp_path / "text").read_bytes(), "projector": (tmp_path / "tower").read_bytes()}
    store.add(LIBRARY, {**layers, "params": parameters, "template": b"{{ .Prompt }}", "license": b"Apache"})
    ours = read(find_model("ollama:qwen3.5:2b"))
    assert ours.tower is not None
    assert ours.sampling["temperature"] == 0.25
    assert ours.sampling["top_k"] == 7
    assert ours.sampling["repetition_penalty"] == 1.5
    store.add(LIBRARY, {**layers, "projector": b"GGUF\3\0\0\0bad"})
    with pytest.warns(UserWarning, match="sha256"):
        assert read(find_model("ollama:qwen3.5:2b")).tower is None


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        ("system", b"You are a pirate.", "its system prompt is not used"),
        ("template", b"{{ .System }} {{ .Prompt }}", "its template is written for ollama, in Go's language: the chat"),
        ("template", b"\xff\xfe", "its template is written for ollama"),
        ("messages", b"[]", "the conversation that it begins with is not used"),
        ("draft", b"GGUF", "its draft model is not used"),
        ("params", b"nope", "its parameters are not used"),
        ("params", b'{"stop": ["x"], "mirostat": 1}', r"its parameters mirostat, stop are not used"),
    ],
)
def test_what_is_not_used_is_named(kind: str, data: bytes, message: str, store: Store, blob: bytes) -> None:
    store.add(LIBRARY, {"model": blob, kind: data})
    with pytest.warns(UserWarning, match=message):
        read(find_model("ollama:qwen3.5:2b"))


@pytest.mark.parametrize(
    ("layers", "more", "message"),
    [
        ({"model": b"GGUF", "adapter": b"GGUF"}, (), "is a model with an adapter, which edgeq wants to be named"),
        ({"tensor": b"x"}, (), "safetensors for ollama's MLX runner"),
        ({"license": b"x"}, (), "names no model file"),
        ({"model": b"GGUF"}, (("model", b"GGUF2"),), "names 2 files of the kind model"),
        ({"model": b"PK\x03\x04 not GGUF"}, (), "is a zip archive"),
        ({"model": b"GGUF", "params": b"["}, (), "not a valid GGUF file"),
    ],
)
def test_what_stops_it(layers: dict[str, bytes], more: Any, message: str, store: Store) -> None:
    store.add(LIBRARY, layers, more=more)
    with pytest.raises(ModelError, match=message):
        read(find_model("ollama:qwen3.5:2b"))


def test_lists_of_manifests(store: Store, blob: bytes) -> None:
    layers = {"layers": [store.layer("model", blob)]}
    mlx = {"runner": "mlx", "layers": [store.layer("tensor", b"x")]}
    listed = {"mediaType": "application/vnd.ollama.manifest.list.v2+json"}
    store.write(LIBRARY, {**listed, "manifests": [mlx, {"runner": "llamacpp", **layers}]})
    assert read(find_model("ollama:qwen3.5:2b")).tower is not None
    by_digest = {"runner": "ollama", "digest": store.blob(json.dumps(layers).encode())}
    store.write(LIBRARY, {**listed, "manifests": [mlx, by_digest]})
    assert read(find_model("ollama:qwen3.5:2b")).tower is not None
    store.write(LIBRARY, {**listed, "manifests": [mlx]})
    with pytest.raises(ModelError, match="safetensors for ollama's MLX runner"):
        read(find_model("ollama:qwen3.5:2b"))


@pytest.mark.parametrize("digest", ["sha256:../../../etc/passwd", "sha256:" + "a" * 64, 7, None, "x"])
def test_digests_that_lead_nowhere(digest: Any, store: Store) -> None:
    store.write(LIBRARY, {"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": digest}]})
    with pytest.raises(ModelError, match=r"names .*(expected a sha256|which is missing)"):
        read(find_model("ollama:qwen3.5:2b"))
