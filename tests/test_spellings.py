"""One model, however its files are spelled: what transformers 4 and 5, PEFT, compilers and parallel training make of
names and configurations. The logits are the same, or one line shows what is not known.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_checkpoint import rewrite

import edgeq
from edgeq.checkpoint import open_checkpoint
from edgeq.errors import ModelError
from edgeq.formats.bf16 import Float32
from edgeq.formats.names import is_usual
from edgeq.formats.safetensors import SafetensorsFile
from edgeq.quant import quantize
from edgeq.testing import config_values, write_checkpoint

IDS = [5, 17, 33, 2, 250]
Values = dict[str, Any]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spelled") / "plain"
    write_checkpoint(folder, config_values(vision=True, mtp=True, max_position_embeddings=64))
    return folder


@pytest.fixture(scope="module")
def expected(plain: Path) -> Float32:
    return edgeq.load(plain, backend="numpy").logits(IDS)


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    shutil.copytree(plain, tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, change: Callable[[Values], Any]) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(values) or values))


def of_4(values: Values) -> None:
    """transformers 4: the base beside, the sections under `rope_scaling`."""
    text = values["text_config"]
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"], "partial_rotary_factor": rope["partial_rotary_factor"]}
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"], "rope_type": "default"}


def one_level_up(values: Values) -> None:
    of_4(values)
    text = values["text_config"]
    values |= {key: text.pop(key) for key in ("rope_theta", "partial_rotary_factor", "rope_scaling")}


def no_sections(values: Values) -> None:
    rope = values["text_config"]["rope_parameters"]
    values["text_config"]["rope_parameters"] = {"type": "default", **rope, "rope_type": None}
    values["text_config"] |= {"rope_scaling": None, "rope_theta": None, "partial_rotary_factor": 0.25}


def by_kind_of_layer(values: Values) -> None:
    text = values["text_config"]
    text["rope_parameters"] = {"full_attention": text["rope_parameters"], "linear_attention": None}


def nulls(values: Values) -> None:
    """What is not set, written out."""
    text = values["text_config"]
    text |= {"attention_bias": None, "mtp_use_dedicated_embeddings": None, "pad_token_id": None, "bos_token_id": None}
    text |= {"tie_word_embeddings": True, "quantization_config": None, "sliding_window": None, "eos_token_id": None}
    values |= {"tie_word_embeddings": None, "quantization_config": None, "quantization": None, "eos_token_id": None}
    values |= {"torch_dtype": None, "dtype": "bfloat16", "transformers_version": "5.3.0", "rope_scaling": None}


def no_layer_types(values: Values) -> None:
    text = values["text_config"]
    text |= {"layer_types": None, "full_attention_interval": 4}


def flat(values: Values) -> Values:
    """The text's fields at the top, as mlx-lm reads them too."""
    text = values["text_config"] | {"model_type": "qwen3_5"}
    return {**text, "vision_config": values["vision_config"], "tie_word_embeddings": True}


def text_only(values: Values) -> Values:
    return {**values["text_config"], "model_type": "qwen3_5_text", "vision_config": values["vision_config"]}


CONFIGS = (of_4, one_level_up, no_sections, by_kind_of_layer, nulls, no_layer_types, flat)


@pytest.mark.parametrize("change", CONFIGS, ids=lambda change: change.__name__)
def test_configurations(folder: Path, expected: Float32, change: Callable[[Values], Any]) -> None:
    edit(folder, change)
    model = edgeq.load(folder, backend="numpy")
    assert np.array_equal(model.logits(IDS), expected)
    assert not model.checkpoint.left_out


def yarn(values: Values) -> Values:
    rope = {"factor": 4.0, "original_max_position_embeddings": 64}
    values["text_config"]["rope_parameters"] |= {"rope_type": "yarn", **rope}
    return values


def yarn_of_4(values: Values) -> Values:
    of_4(values)
    section = values["text_config"].pop("rope_scaling") | {"type": "yarn", "rope_type": "yarn"}
    values["rope_scaling"] = section | {"factor": 4.0, "original_max_position_embeddings": 64}
    return values


def yarn_beside(values: Values) -> Values:
    values["text_config"]["rope_parameters"] |= {"rope_type": "yarn", "factor": 4.0}
    values["text_config"]["original_max_position_embeddings"] = 64  # as transformers takes it: before its object's
    return values


def test_yarn_is_the_same_wherever_it_stands(folder: Path, expected: Float32) -> None:
    found = []
    before = (folder / "config.json").read_text()
    for change in (yarn, yarn_of_4, yarn_beside):
        (folder / "config.json").write_text(before)
        edit(folder, change)
        found.append(edgeq.load(folder, backend="numpy").logits(IDS))
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])
    assert not np.array_equal(found[0], expected)


def test_null_in_generation_config(folder: Path, expected: Float32) -> None:
    keys = ("eos_token_id", "temperature", "top_p", "top_k", "do_sample", "repetition_penalty", "min_p", "max_length")
    (folder / "generation_config.json").write_text(json.dumps(dict.fromkeys(keys)))
    model = edgeq.load(folder, backend="numpy")
    assert np.array_equal(model.logits(IDS), expected)
    assert not model.checkpoint.sampling


def wrapped(name: str, *, tower: str = "visual.", text: str = "language_model.") -> str:
    return name.replace("model.visual.", f"model.{tower}").replace("model.language_model.", f"model.{text}")


NAMES: dict[str, Callable[[str], str]] = {
    "PEFT": lambda name: f"base_model.model.{name}",
    "PEFT twice": lambda name: f"base_model.model.base_model.model.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "torch.compile, layer by layer": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "DistributedDataParallel": lambda name: f"module.{name}",
    "DDP of a compiled model": lambda name: f"module._orig_mod.{name}",
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}".replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "checkpointed activations": lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
    "tripled": lambda name: wrapped(name, text="language_model.language_model.language_model."),
    "model twice": lambda name: wrapped(name, text="language_model.model."),
    "no language_model": lambda name: wrapped(name, text=""),
    "bare": lambda name: name.replace("model.language_model.", "").replace("model.visual.", "visual."),
    "MLX's order": lambda name: name.replace("model.language_model.", "language_model.model."),
    "an adapter taken off": lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight"),
    "all at once": lambda name: f"module.base_model.model._orig_mod.{wrapped(name, text='language_model.model.')}",
}


@pytest.mark.parametrize("case", NAMES)
def test_names(folder: Path, tmp_path: Path, expected: Float32, case: str) -> None:
    def change(tensors: Values) -> None:
        for name in list(tensors):
            tensors[NAMES[case](name)] = tensors.pop(name)

    rewrite(folder, change)
    model = edgeq.load(folder, backend="numpy")
    assert np.array_equal(model.logits(IDS), expected)
    assert not model.checkpoint.left_out
    quantize(folder, tmp_path / "out", recipe="none")
    assert all(is_usual(name) for name in SafetensorsFile(tmp_path / "out" / "model.safetensors").tensors)
    assert np.array_equal(edgeq.load(tmp_path / "out", backend="numpy").logits(IDS), expected)


def test_a_tied_head_that_was_kept_in_the_place_of_the_embedding(
    folder: Path, tmp_path: Path, expected: Float32
) -> None:
    """safetensors.torch.save_model drops all names of a shared tensor but the first of the alphabet."""
    rewrite(folder, lambda t: t.update({"lm_head.weight": t.pop("model.language_model.embed_tokens.weight")}))
    model = edgeq.load(folder, backend="numpy")
    assert model.config.text.tie_word_embeddings
    assert np.array_equal(model.logits(IDS), expected)
    quantize(folder, tmp_path / "out", recipe="none")
    names = SafetensorsFile(tmp_path / "out" / "model.safetensors").tensors
    assert "model.language_model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


UNKNOWN: dict[str, Callable[[str], str]] = {
    "another framework's": lambda name: name.replace("model.language_model.layers.", "transformer.h."),
    "renamed": lambda name: name.replace("mlp.up_proj", "feed_forward.w3"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_one_line_shows_a_name_as_the_file_has_it(folder: Path, case: str) -> None:
    def change(tensors: Values) -> None:
        for name in list(tensors):
            tensors[UNKNOWN[case](name)] = tensors.pop(name)

    rewrite(folder, change)
    with pytest.raises(ModelError) as error:
        open_checkpoint(folder)
    first = str(error.value).splitlines()[1].strip()
    assert first.startswith("unexpected ")
    assert ("transformer.h." in first) or ("feed_forward.w3" in first)


def test_a_model_with_its_adapter_still_on(folder: Path) -> None:
    """PEFT's wrapped model, saved as a whole: what is in the adapter would be lost."""

    def change(tensors: Values) -> None:
        for name in list(tensors):
            module = name.removesuffix(".weight")
            if module.endswith("q_proj"):
                tensors[f"base_model.model.{module}.base_layer.weight"] = tensors.pop(name)
                tensors[f"base_model.model.{module}.lora_A.default.weight"] = np.zeros((2, 64), np.float32)
                tensors[f"base_model.model.{module}.lora_B.default.weight"] = np.zeros((256, 2), np.float32)

    rewrite(folder, change)
    message = r"holds an adapter that is not merged into its weights \(.*q_proj\.lora_A\.default\.weight\)"
    with pytest.raises(ModelError, match=message) as error:
        open_checkpoint(folder)
    assert "merge_and_unload" in str(error.value.hint)


def test_an_index_of_other_names(folder: Path, expected: Float32) -> None:
    """The files decide what is in them; an index from before a renaming does not."""
    index = {"weight_map": {"some.old.name": "model.safetensors", "another": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert np.array_equal(edgeq.load(folder, backend="numpy").logits(IDS), expected)


def test_a_text_model_that_was_saved_with_the_tower_of_its_origin(folder: Path, expected: Float32) -> None:
    edit(folder, text_only)
    with pytest.warns(UserWarning, match="its vision tower: config.json does not describe it"):
        model = edgeq.load(folder, backend="numpy")
    assert np.array_equal(model.logits(IDS), expected)
