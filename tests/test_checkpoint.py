"""Checkpoint folders: layouts, conventions, and files that lie."""

from __future__ import annotations

import json
import struct
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgeq
from edgeq.checkpoint import FolderCheckpoint, open_checkpoint
from edgeq.errors import ModelError, UsageError
from edgeq.formats.bf16 import Array, from_float32, to_float32
from edgeq.formats.names import hub_name, neutral_name
from edgeq.formats.safetensors import SafetensorsFile, SafetensorsWriter
from edgeq.quant import quantize
from edgeq.testing import config_values, file_weights, write_checkpoint
from edgeq.weights import QMatrix, Role, all_tensors


def read(folder: Path) -> FolderCheckpoint:
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, FolderCheckpoint)
    return checkpoint


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Load all tensors of a checkpoint, change the dictionary, write it back."""
    path = folder / "model.safetensors"
    file = SafetensorsFile(path)
    tensors = {name: np.array(file.array(name)) for name in file.tensors}
    change(tensors)
    save(path, tensors)


def save(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    names = {"float32": "F32", "float16": "F16", "uint16": "BF16", "uint32": "U32", "int64": "I64"}
    entries = {name: (names[str(x.dtype)], x.shape) for name, x in tensors.items()}
    with SafetensorsWriter(path, entries, metadata) as file:
        for name, x in tensors.items():
            file.write(name, x)


class TestSafetensors:
    def test_agrees_with_the_reference_library(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        tensors: dict[str, Array] = {
            "a": rng.standard_normal((3, 5)).astype(np.float32),
            "b": rng.standard_normal((2, 2, 2)).astype(np.float16),
            "c": rng.integers(0, 2**32, (4, 8), dtype=np.uint32),
            "scalar": np.array(3.0, np.float32),
            "empty": np.zeros((0, 4), np.float32),
        }
        safetensors.numpy.save_file(tensors, tmp_path / "theirs.safetensors", {"format": "np"})
        ours = SafetensorsFile(tmp_path / "theirs.safetensors")
        assert ours.metadata == {"format": "np"}
        for name, x in tensors.items():
            assert np.array_equal(ours.array(name), x)
            assert ours.array(name).shape == x.shape
        save(tmp_path / "ours.safetensors", tensors)
        theirs = safetensors.numpy.load_file(tmp_path / "ours.safetensors")
        assert all(np.array_equal(theirs[name], x) for name, x in tensors.items())

    def test_arrays_are_views_that_cannot_be_written(self, tmp_path: Path) -> None:
        save(tmp_path / "f", {"x": np.ones(4, np.float32)})
        x = SafetensorsFile(tmp_path / "f").array("x")
        with pytest.raises(ValueError, match="read-only"):
            x[0] = 2

    def test_data_is_aligned(self, tmp_path: Path) -> None:
        save(tmp_path / "f", {"x": np.ones(4, np.float32), "a longer name": np.ones(3, np.uint16)})
        assert SafetensorsFile(tmp_path / "f").data_start % 64 == 0


def raw_file(path: Path, header: Any, data: bytes, length: int | None = None) -> None:
    blob = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(blob) if length is None else length) + blob + data)


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


LIES: dict[str, tuple[Any, bytes, int | None, str]] = {
    "nothing": (b"", b"", None, "header is not JSON"),
    "huge header": (b"{}", b"", 1 << 60, "header claims"),
    "header beyond the end": (b"{}", b"", 100, "header claims 100 bytes"),
    "no json": (b"{nope", b"", None, "not JSON"),
    "deep json": (b"[" * 50_000, b"", None, "not JSON"),
    "a list": (b"[]", b"", None, "not a JSON object"),
    "twice the same name": (
        b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
        b"1234",
        None,
        "occurs twice",
    ),
    "unknown dtype": ({"a": entry(0, 4, [1], "F13")}, b"1234", None, "dtype 'F13'"),
    "dtype of no type": ({"a": entry(0, 4, [1], [])}, b"1234", None, "dtype"),  # type: ignore[arg-type]
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, b"1234", None, "lacks dtype, shape or data_offsets"),
    "negative shape": ({"a": entry(0, 4, [-1])}, b"1234", None, "has shape"),
    "absurd shape": ({"a": entry(0, 4, [1 << 40, 1 << 40])}, b"1234", None, "needs"),
    "float shape": ({"a": entry(0, 4, [1.0])}, b"1234", None, "has shape"),  # type: ignore[list-item]
    "offsets against shape": ({"a": entry(0, 4, [2])}, b"1234", None, "needs 8 bytes"),
    "backwards": ({"a": entry(4, 0, [1])}, b"1234", None, "needs 4 bytes"),
    "overlap": ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"1234" * 3, None, "'b' overlaps"),
    "hole": ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, b"1234" * 3, None, "'b' leaves a hole"),
    "beyond the end": ({"a": entry(0, 8, [2])}, b"1234", None, "need 8 bytes, the file holds 4"),
    "truncated by one": ({"a": entry(0, 8, [2])}, b"1234567", None, "need 8 bytes, the file holds 7"),
    "more than declared": ({"a": entry(0, 4, [1])}, b"12345", None, "need 4 bytes, the file holds 5"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", None, "__metadata__"),
    "metadata in a list": ({"__metadata__": []}, b"", None, "__metadata__"),
}


def test_no_metadata_as_mlx_writes_it(tmp_path: Path) -> None:
    raw_file(tmp_path / "f.safetensors", {"__metadata__": None, "a": entry(0, 4, [1])}, b"1234", None)
    file = SafetensorsFile(tmp_path / "f.safetensors")
    assert (file.metadata, list(file.tensors)) == ({}, ["a"])


class TestLies:
    @pytest.mark.parametrize("name", LIES)
    def test_one_line_and_exit_code_4(self, tmp_path: Path, name: str) -> None:
        header, data, length, message = LIES[name]
        raw_file(tmp_path / "f.safetensors", header, data, length)
        with pytest.raises(ModelError, match=message) as caught:
            SafetensorsFile(tmp_path / "f.safetensors")
        assert "\n" not in caught.value.message
        assert caught.value.exit_code == 4

    def test_empty_and_short_and_absent_files(self, tmp_path: Path) -> None:
        for content, message in ((b"", "is empty"), (b"1234", "too short")):
            (tmp_path / "f").write_bytes(content)
            with pytest.raises(ModelError, match=message):
                SafetensorsFile(tmp_path / "f")
        with pytest.raises(ModelError, match="does not exist"):
            SafetensorsFile(tmp_path / "g")
        with pytest.raises(ModelError, match="cannot be read"):
            SafetensorsFile(tmp_path)

    @settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_mutations_never_crash_and_never_allocate(self, tmp_path: Path, data: st.DataObject) -> None:
        path = tmp_path / "f.safetensors"
        save(path, {"a": np.ones((2, 3), np.float32), "b": np.ones(5, np.uint16)}, {"format": "pt"})
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            kind = data.draw(st.sampled_from(["byte", "cut", "insert", "digits"]))
            at = data.draw(st.integers(0, len(content) - 1))
            if kind == "byte":
                content[at] = data.draw(st.integers(0, 255))
            elif kind == "cut":
                del content[at:]
            elif kind == "insert":
                content[at:at] = data.draw(st.binary(max_size=8))
            else:
                content[at:at] = b"9" * data.draw(st.integers(1, 20))
            if not content:
                break
        path.write_bytes(content)
        tracemalloc.start()
        try:
            file = SafetensorsFile(path)
            for name in file.tensors:
                file.array(name).sum()
        except ModelError as error:
            assert "\n" not in error.message
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 1_000_000


class TestFolder:
    def test_hub_layout(self, tmp_path: Path) -> None:
        config = write_checkpoint(tmp_path, config_values(vision=True, mtp=True))
        checkpoint = read(tmp_path)
        assert checkpoint.format == "safetensors"
        assert {spec.name for spec, _ in checkpoint.storage()} == {spec.name for spec in all_tensors(config)}
        weights = file_weights(checkpoint)
        assert weights.lm_head is weights.embed_tokens
        raw = to_float32(checkpoint.raw("layers.0.input_layernorm.weight"))
        assert np.array_equal(weights.layers[0].input_layernorm, 1 + raw)

    @pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
    def test_float_types(self, tmp_path: Path, dtype: str) -> None:
        write_checkpoint(tmp_path, dtype=dtype)
        assert {s.type for spec, s in read(tmp_path).storage() if spec.role is Role.LINEAR} == {dtype}

    def test_text_only_names(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, config_values(tie_word_embeddings=False))

        def rename(tensors: dict[str, Any]) -> None:
            for name in list(tensors):
                tensors[name.replace("model.language_model.", "model.")] = tensors.pop(name)

        before = read(tmp_path).raw("layers.2.mlp.up_proj.weight").copy()
        rewrite(tmp_path, rename)
        values = json.loads((tmp_path / "config.json").read_text())
        text_only = {**values["text_config"], "tie_word_embeddings": False}
        (tmp_path / "config.json").write_text(json.dumps(text_only))
        checkpoint = read(tmp_path)
        assert np.array_equal(checkpoint.raw("layers.2.mlp.up_proj.weight"), before)
        assert file_weights(checkpoint).lm_head is not file_weights(checkpoint).embed_tokens

    def test_shards(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path)
        whole = file_weights(read(tmp_path))
        file = SafetensorsFile(tmp_path / "model.safetensors")
        names = sorted(file.tensors)
        weight_map = dict[str, str]()
        for i, part in enumerate((names[::2], names[1::2])):
            shard = f"model.safetensors-0000{i + 1}-of-00002.safetensors"
            save(tmp_path / shard, {name: np.array(file.array(name)) for name in part})
            weight_map |= dict.fromkeys(part, shard)
        (tmp_path / "model.safetensors").unlink()
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert np.array_equal(file_weights(read(tmp_path)).norm, whole.norm)
        (tmp_path / "model.safetensors-00002-of-00002.safetensors").unlink()
        with pytest.raises(ModelError, match=r"lacks model\.safetensors-00002-of-00002"):
            read(tmp_path)

    @pytest.mark.parametrize("indexed", [False, True])
    def test_a_tensor_in_two_files(self, tmp_path: Path, indexed: bool) -> None:
        """What an earlier download or conversion left beside a model: whose tensors are the model's?"""
        write_checkpoint(tmp_path / "other", seed=1)
        write_checkpoint(tmp_path)
        (tmp_path / "other/model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
        if indexed:
            weight_map = {"a": "model.safetensors", "b": "model-00001-of-00001.safetensors"}
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ModelError, match=r"model-00001-of-00001\.safetensors and model\.safetensors both hold "):
            read(tmp_path)

    @staticmethod
    def beside_an_index(folder: Path, seed: int, *, keep: int = 2) -> None:
        """A checkpoint with seed 0, beside an index of two shards of another, of which `keep` are there."""
        write_checkpoint(folder)
        write_checkpoint(folder / "other", seed=seed)
        file = SafetensorsFile(folder / "other/model.safetensors")
        names = sorted(file.tensors)
        weight_map = dict[str, str]()
        for i, part in enumerate((names[::2], names[1::2])):
            shard = f"model-0000{i + 1}-of-00002.safetensors"
            weight_map |= dict.fromkeys(part, shard)
            if i < keep:
                save(folder / shard, {name: np.array(file.array(name)) for name in part})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    @pytest.mark.parametrize("keep", [0, 1])
    def test_an_index_whose_shards_are_gone(self, tmp_path: Path, keep: int) -> None:
        self.beside_an_index(tmp_path, seed=1, keep=keep)
        with pytest.warns(UserWarning, match=r"lacks 'model-0000.*: model\.safetensors is used"):
            found = read(tmp_path)
        (tmp_path / "model.safetensors.index.json").unlink()
        for shard in tmp_path.glob("model-*"):
            shard.unlink()
        assert np.array_equal(found.dense("norm.weight"), read(tmp_path).dense("norm.weight"))

    def test_two_models_in_one_folder(self, tmp_path: Path) -> None:
        self.beside_an_index(tmp_path, seed=1)
        with pytest.raises(
            ModelError, match=r"model\.safetensors and model\.safetensors\.index\.json are two models"
        ) as e:
            read(tmp_path)
        assert "move one of them away" in str(e.value.hint)

    def test_the_same_model_twice(self, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
        self.beside_an_index(tmp_path, seed=0)
        assert read(tmp_path).tensors
        assert not recwarn.list

    def test_a_tied_checkpoint_with_a_head_of_its_own(self, tmp_path: Path) -> None:
        """Fine-tunes keep the flag: the head that is stored counts."""
        folder = tmp_path / "model"
        write_checkpoint(folder, config_values(tie_word_embeddings=True))
        embedding = hub_name("embed_tokens.weight")
        ids = [1, 2, 3]
        tied = edgeq.load(folder, backend="numpy").logits(ids)
        rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": np.array(tensors[embedding])}))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an equal copy is nothing to speak of
            assert np.array_equal(edgeq.load(folder, backend="numpy").logits(ids), tied)
        rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding][::-1].copy()}))
        with pytest.warns(UserWarning, match="lm_head is not its embedding"):
            untied = edgeq.load(folder, backend="numpy")
        np.testing.assert_allclose(untied.logits(ids), tied[:, ::-1], atol=1e-5)
        with pytest.warns(UserWarning, match="lm_head is not its embedding"):
            quantize(folder, tmp_path / "out", bits=8)
        back = read(tmp_path / "out")
        assert "lm_head.weight" in back.tensors
        assert not back.config.text.tie_word_embeddings

    def test_an_mtp_head_that_the_configuration_does_not_count(self, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        write_checkpoint(folder, config_values(mtp=True))
        values = json.loads((folder / "config.json").read_text())
        del values["text_config"]["mtp_num_hidden_layers"]
        (folder / "config.json").write_text(json.dumps(values))
        assert read(folder).config.text.mtp_num_hidden_layers == 1
        quantize(folder, tmp_path / "out", bits=8)
        assert "mtp.fc.weight" in read(tmp_path / "out").tensors
        rewrite(folder, lambda tensors: tensors.pop("mtp.fc.weight"))
        with pytest.warns(UserWarning, match="its MTP head: .* are missing; the model runs without it"):
            assert read(folder).config.text.mtp_num_hidden_layers == 0

    @pytest.mark.parametrize(
        ("spelled", "neutral"),
        [
            ("model.language_model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
            ("base_model.model.model.language_model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
            ("model.language_model.language_model.language_model.norm.weight", "norm.weight"),
            ("_orig_mod.model.layers.3._orig_mod.input_layernorm.weight", "layers.3.input_layernorm.weight"),
            ("module.model.visual.pos_embed.weight", "visual.pos_embed.weight"),
            ("language_model.vision_tower.pos_embed.weight", "visual.pos_embed.weight"),
            ("layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
            ("module.mtp.fc.weight", "mtp.fc.weight"),
            ("language_model.lm_head.weight", "lm_head.weight"),
            ("transformer.h.0.weight", None),
            ("model", ""),
        ],
    )
    def test_names_in_whatever_training_wrapped_them(self, spelled: str, neutral: str | None) -> None:
        assert (neutral_name(spelled) or "") == (neutral or "")

    def test_wrapped_names_and_shards_in_a_sub_folder(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path)
        expected = read(tmp_path).dense("norm.weight")
        file = SafetensorsFile(tmp_path / "model.safetensors")
        tensors = {f"base_model.model.{name}": np.array(file.array(name)) for name in file.tensors}
        (tmp_path / "model.safetensors").unlink()
        (tmp_path / "weights").mkdir()
        save(tmp_path / "weights/a.safetensors", tensors)
        index = {"weight_map": dict.fromkeys(tensors, "weights/a.safetensors")}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        assert np.array_equal(read(tmp_path).dense("norm.weight"), expected)

    def test_an_index_cannot_point_outside(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
        with pytest.raises(ModelError, match="outside of the folder"):
            read(tmp_path)

    def test_everything_wrong_is_reported_at_once(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path)

        def damage(tensors: dict[str, Any]) -> None:
            del tensors[hub_name("layers.1.mlp.up_proj.weight")]
            tensors[hub_name("layers.0.input_layernorm.weight")] = np.ones(7, np.float32)
            tensors[hub_name("layers.2.mlp.up_proj.weight")] = np.ones((128, 64), np.int64)
            tensors["model.language_model.layers.0.extra"] = np.ones(2, np.float32)

        rewrite(tmp_path, damage)
        with pytest.raises(ModelError) as caught:
            read(tmp_path)
        message = caught.value.message
        assert "layers.0.input_layernorm.weight is [7], expected [64]" in message
        assert "layers.2.mlp.up_proj.weight is I64" in message
        assert "missing layers.1.mlp.up_proj.weight [128, 64]" in message
        assert "unexpected model.language_model.layers.0.extra" in message

    def test_half_an_mtp_head(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, config_values(mtp=True))
        rewrite(tmp_path, lambda tensors: tensors.pop("mtp.fc.weight"))
        with pytest.warns(UserWarning, match=r"its MTP head: missing mtp\.fc\.weight .*; the model runs without it"):
            assert read(tmp_path).config.text.mtp_num_hidden_layers == 0

    def test_without_mtp_head_and_vision_tower(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, config_values(mtp=True, vision=True))

        def drop(tensors: dict[str, Any]) -> None:
            for name in [n for n in tensors if n.startswith(("mtp.", "model.visual."))]:
                del tensors[name]

        rewrite(tmp_path, drop)
        assert file_weights(read(tmp_path)).norm.shape == (64,)

    def test_no_weights_no_config_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="is an empty folder"):
            open_checkpoint(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(config_values()))
        with pytest.raises(ModelError, match=r"holds a config\.json, but no model\*\.safetensors"):
            open_checkpoint(tmp_path)
        with pytest.raises(UsageError, match="is a text file of a model"):
            open_checkpoint(tmp_path / "config.json")

    def test_nan_in_a_vector(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path)
        nan = from_float32(np.full(64, np.nan, np.float32))
        rewrite(tmp_path, lambda tensors: tensors.update({hub_name("norm.weight"): nan}))
        with pytest.raises(ModelError, match=r"norm\.weight holds NaN"):
            file_weights(read(tmp_path))

    def test_nan_in_a_quantized_matrix(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "model")
        quantize(tmp_path / "model", tmp_path / "out", bits=8)
        biases = hub_name("layers.0.mlp.up_proj.biases")  # bfloat16
        rewrite(tmp_path / "out", lambda tensors: tensors[biases].fill(0x7FC0))
        with pytest.raises(ModelError, match=r"up_proj\.weight holds NaN"):
            read(tmp_path / "out").dense("layers.0.mlp.up_proj.weight")

    def test_stop_ids_of_generation_config(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path)
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
        assert read(tmp_path).eos_token_ids == (1, 7, 9)
        for wrong in ('"x"', "true", "-1", "1.0", "[7, 1e3]", "[" + "9" * 400 + "]", "[[7]]", "{}"):
            (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {wrong}}}')
            with pytest.raises(ModelError, match=r"generation_config\.json: eos_token_id is .*, expected an id"):
                read(tmp_path)

    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("temperature", "-0.1", "from 0 to 10, got -0.1"),
            ("temperature", "NaN", "from 0 to 10, got nan"),
            ("temperature", "1e999", "from 0 to 10, got inf"),
            ("temperature", "true", "from 0 to 10, got True"),
            ("temperature", '"hot"', "from 0 to 10, got 'hot'"),
            ("temperature", "9" * 400, "from 0 to 10, got 999"),
            ("temperature", "[0.7]", "from 0 to 10, got [0.7]"),
            ("top_p", "0", "above 0 and at most 1, got 0"),
            ("top_p", "1.5", "above 0 and at most 1, got 1.5"),
            ("min_p", "-1", "from 0 to 1, got -1"),
            ("top_k", "20.5", "a whole number of at least 0, got 20.5"),
            ("top_k", "-2", "a whole number of at least 0, got -2"),
            ("top_k", "9" * 400, "a whole number below 2^64, got 999"),
            ("repetition_penalty", "0", "from 0.1 to 10, got 0"),
            ("presence_penalty", "{}", "from -2 to 2, got {}"),
        ],
    )
    def test_sampling_out_of_range_is_left_out(self, tmp_path: Path, name: str, value: str, expected: str) -> None:
        write_checkpoint(tmp_path)
        (tmp_path / "generation_config.json").write_text(f'{{"min_p": 0.25, "{name}": {value}}}')
        found = read(tmp_path).recommended
        assert dict(found.values) == ({"min_p": 0.25} if name != "min_p" else {})
        assert f"{name} must be {expected}" in found.left_out[name]
        assert found.where == str(tmp_path / "generation_config.json")

    def test_sampling_in_the_ways_of_people(self, tmp_path: Path) -> None:
        """Off in its spellings says nothing, a whole number may be written as 20.0, unknown keys are passed over."""
        write_checkpoint(tmp_path)
        for text, values in (
            ('{"temperature": null, "top_k": 5, "num_beams": "x"}', {"top_k": 5}),
            ('{"top_k": 20.0, "top_p": "off", "min_p": false}', {"top_k": 20}),
            ('{"top_k": -1, "temperature": " None "}', {}),
            ('{"top_k": -1.0, "temperature": 1}', {"temperature": 1}),
            ('{"presence_penalty": 1.5, "do_sample": false, "temperature": 0.6}',
             {"presence_penalty": 1.5, "temperature": 0}),
            ('{"top_k": 0, "frequency_penalty": -0.5}', {"top_k": 0, "frequency_penalty": -0.5}),
        ):  # fmt: skip
            (tmp_path / "generation_config.json").write_text(text)
            found = read(tmp_path)
            assert found.sampling == values
            assert not found.recommended.left_out


class TestMLXLayout:
    """What mlx_lm.convert writes: prefix, moved axes, 1 added to the norms, quantized triples, overrides."""

    @staticmethod
    def convert(folder: Path, bits: int, group: int, overrides: dict[str, Any] | None = None) -> None:
        mx = pytest.importorskip("mlx.core")
        checkpoint = read(folder)
        tensors: dict[str, Any] = {}
        for spec, _ in checkpoint.storage():
            x = checkpoint.raw(spec.name)
            name = f"language_model.model.{spec.name}"
            if spec.role is Role.NORM:
                x = from_float32(1 + to_float32(x))
            elif spec.role is Role.CONV:
                x = np.moveaxis(x, 2, 1)
            module = name.removesuffix(".weight")
            own = (overrides or {}).get(module, {"bits": bits, "group_size": group})
            if spec.role in (Role.LINEAR, Role.EMBEDDING, Role.GATE) and own:
                parts = mx.quantize(
                    mx.array(to_float32(x)).astype(mx.bfloat16), group_size=own["group_size"], bits=own["bits"]
                )
                for part, value in zip(("weight", "scales", "biases"), parts, strict=True):
                    bits16 = part != "weight"
                    tensors[f"{module}.{part}"] = np.array(value.view(mx.uint16) if bits16 else value)
            else:
                tensors[name] = np.array(x)
        save(folder / "model.safetensors", tensors, {"format": "mlx"})
        values = json.loads((folder / "config.json").read_text())
        values["quantization"] = {"group_size": group, "bits": bits, "mode": "affine", **(overrides or {})}
        (folder / "config.json").write_text(json.dumps(values))

    @pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
    @pytest.mark.parametrize("group", [32, 64])
    def test_every_width(self, tmp_path: Path, bits: int, group: int) -> None:
        write_checkpoint(tmp_path)
        before = file_weights(read(tmp_path))
        self.convert(tmp_path, bits, group)
        checkpoint = read(tmp_path)
        assert checkpoint.layout == "mlx"
        after = file_weights(checkpoint)
        assert isinstance(after.embed_tokens, QMatrix)
        assert (after.embed_tokens.bits, after.embed_tokens.group_size) == (bits, group)
        assert after.layers[0].mixer[4].shape == before.layers[0].mixer[4].shape
        assert np.allclose(after.norm, before.norm, atol=1e-2)

    def test_overrides(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path)
        self.convert(
            tmp_path,
            4,
            64,
            {
                "language_model.model.layers.0.mlp.up_proj": {"bits": 8, "group_size": 32},
                "language_model.model.layers.1.mlp.up_proj": False,
            },
        )
        kinds = {spec.name: stored.type for spec, stored in read(tmp_path).storage()}
        assert kinds["layers.0.mlp.up_proj.weight"] == "8-bit g32"
        assert kinds["layers.1.mlp.up_proj.weight"] == "BF16"
        assert kinds["layers.2.mlp.up_proj.weight"] == "4-bit g64"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"bits": 7}, "has bits 7"),
            ({"group_size": 16}, "group_size 16"),
            ({"mode": "nf4"}, "mode is 'nf4', expected one of affine, mxfp4, nvfp4, mxfp8"),
            ({"mode": "mxfp4"}, "has group_size 64 in mode mxfp4, expected 32"),
            ({"mode": "mxfp8", "group_size": 32}, "has bits 4 in mode mxfp8, expected 8"),
            ({"mode": "nvfp4", "group_size": None}, r"up_proj\.scales is \[128, 1\], expected \[128, 4\] at 4 bits"),
            ({"mode": "mxfp4", "group_size": 32}, r"up_proj\.scales is \[128, 1\], expected \[128, 2\] at 4 bits"),
            ({"quant_method": "gptq"}, "quant_method 'gptq', but the tensors are quantized for MLX"),
            ({"bits": 8}, "expected .* at 8 bits"),
            ({"bits": 4.0}, r"has bits 4\.0"),
            ({"bits": True}, "has bits True"),
            ({"bits": [4]}, r"has bits \[4\]"),
            ({"bits": 10**400}, "has bits 1000"),
            ({"group_size": 64.0}, r"group_size 64\.0"),
            ({"group_size": None}, "group_size None"),
            ({"model.layers.0.mlp.up_proj": {"bits": 4.0}}, r"up_proj has bits 4\.0"),
            ({"mode": ["affine"]}, r"mode is \['affine'\]"),
        ],
    )
    def test_a_block_that_does_not_fit(self, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        write_checkpoint(tmp_path)
        self.convert(tmp_path, 4, 64)
        values = json.loads((tmp_path / "config.json").read_text())
        values["quantization"] |= change
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(ModelError, match=message):
            read(tmp_path)

    def test_scales_without_biases(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path)
        self.convert(tmp_path, 4, 64)
        rewrite(tmp_path, lambda tensors: tensors.pop("language_model.model.layers.0.mlp.up_proj.biases"))
        with pytest.raises(ModelError, match="scales but no biases"):
            read(tmp_path)
