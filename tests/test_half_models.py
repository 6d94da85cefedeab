"""Half of a model is no reason to refuse the other: the text runs, one line says what does not, and whatever writes a
model refuses to lose a part until it is told.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import leave_home, runner
from test_checkpoint import rewrite, save
from test_identify import rows

import edgeq
from edgeq.checkpoint import open_checkpoint
from edgeq.checkpoint.base import PARTS
from edgeq.errors import EdgeqError, ModelError, UsageError
from edgeq.formats.bf16 import Float32
from edgeq.formats.safetensors import SafetensorsFile
from edgeq.quant import quantize
from edgeq.quant.gguf_export import export_gguf, export_mmproj
from edgeq.testing import config_values, write_checkpoint
from edgeq.weights import Part

IDS = [5, 17, 33, 2, 250]
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half") / "whole"
    write_checkpoint(folder, config_values(mtp=True, vision=True, linear_key_head_dim=32, linear_value_head_dim=32))
    return folder


@pytest.fixture(scope="module")
def expected(whole: Path) -> Float32:
    return edgeq.load(whole, backend="numpy").logits(IDS)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "model")
    return tmp_path / "model"


def config(**changes: Any) -> Change:
    """Change fields of config.json, `a__b` being b in a."""

    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        for path, value in changes.items():
            *outer, key = path.split("__")
            section = values
            for name in outer:
                section = section[name]
            section[key] = value
            if value is ...:
                del section[key]
        (folder / "config.json").write_text(json.dumps(values))

    return change


def tensors(change: Callable[[dict[str, Any]], Any]) -> Change:
    def changed(values: dict[str, Any]) -> None:
        change(values)

    return lambda folder: rewrite(folder, changed)


def shards(damage: Callable[[Path], object]) -> Change:
    """The tower in a file of its own in a sub-folder, which is damaged."""

    def change(folder: Path) -> None:
        file = SafetensorsFile(folder / "model.safetensors")
        every = {name: np.array(file.array(name)) for name in file.tensors}
        (folder / "model.safetensors").unlink()
        (folder / "vision").mkdir()
        places = {name: "vision/tower.safetensors" if ".visual." in name else "text.safetensors" for name in every}
        for place in set(places.values()):
            save(folder / place, {name: x for name, x in every.items() if places[name] == place})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        damage(folder / "vision" / "tower.safetensors")

    return change


TOWER: dict[str, tuple[Change, str]] = {
    "a tensor missing": (tensors(lambda t: t.pop("model.visual.pos_embed.weight")), "missing visual.pos_embed.weight"),
    "another shape": (
        tensors(lambda t: t.update({"model.visual.merger.norm.bias": np.zeros(5, np.float32)})), "expected [32]",
    ),
    "another type": (
        tensors(lambda t: t.update({"model.visual.merger.norm.bias": np.zeros(32, np.int64)})), "is I64",
    ),
    "deepstack": (
        tensors(lambda t: t.update({"model.visual.deepstack_merger_list.0.norm.weight": np.zeros(8, np.float32)})),
        "unexpected model.visual.deepstack_merger_list.0.norm.weight",
    ),
    "twice": (
        tensors(lambda t: t.update({"vision_tower.merger.norm.bias": np.zeros(32, np.float32)})), "are the same tensor",
    ),
    "not described": (config(vision_config=...), "config.json does not describe it (vision_config)"),
    "described as null": (config(vision_config=None), "config.json does not describe it (vision_config)"),
    "described as a list": (config(vision_config=[1]), "vision_config is [1], expected an object"),
    "no depth": (config(vision_config__depth=...), "vision_config.depth is missing"),
    "another activation": (config(vision_config__hidden_act="quick_gelu"), "hidden_act is 'quick_gelu'"),
    "deepstack described": (config(vision_config__deepstack_visual_indexes=[1]), "deepstack_visual_indexes is [1]"),
    "another model's": (config(vision_config__out_hidden_size=2048), "out_hidden_size is 2048"),
    "other rotations": (
        config(vision_config__rope_parameters={"rope_type": "axial", "rope_theta": 5e5}), "rope_theta is 500000.0",
    ),
    "an odd token": (config(image_token_id="<image>"), "image_token_id is '<image>'"),
    "its shard missing": (shards(lambda file: file.unlink()), "tower.safetensors does not exist"),
    "its shard cut short": (shards(lambda file: file.write_bytes(file.read_bytes()[:-9])), "the tensors need"),
    "its shard a web page": (shards(lambda file: file.write_text("<html>" * 9)), "not a valid safetensors file"),
}  # fmt: skip

HEAD: dict[str, tuple[Change, str]] = {
    "a tensor missing": (tensors(lambda t: t.pop("mtp.fc.weight")), "missing mtp.fc.weight"),
    "uncounted and a tensor missing": (
        lambda folder: (
            config(text_config__mtp_num_hidden_layers=0)(folder), tensors(lambda t: t.pop("mtp.fc.weight"))(folder)
        )[0],
        "some of its tensors are missing",
    ),
    "another shape": (tensors(lambda t: t.update({"mtp.norm.weight": np.zeros(5, np.float32)})), "is [5]"),
    "more than one layer": (config(text_config__mtp_num_hidden_layers=2), "mtp_num_hidden_layers is 2"),
    "a tensor more": (
        tensors(lambda t: t.update({"mtp.embed_tokens.weight": np.zeros(5, np.float32)})),
        "unexpected mtp.embed_tokens.weight",
    ),
    "an embedding of its own": (
        config(text_config__mtp_use_dedicated_embeddings=True), "mtp_use_dedicated_embeddings is True",
    ),
}  # fmt: skip

CASES = [(Part.VISION, name) for name in TOWER] + [(Part.MTP, name) for name in HEAD]


@pytest.mark.parametrize(("part", "case"), CASES, ids=lambda value: getattr(value, "name", value))
def test_the_text_runs(folder: Path, expected: Float32, part: Part, case: str, tmp_path: Path) -> None:
    change, why = (TOWER if part is Part.VISION else HEAD)[case]
    change(folder)
    with pytest.warns(UserWarning, match="the model runs without it") as caught:
        model = edgeq.load(folder, backend="numpy")
    (line,) = [str(warning.message) for warning in caught]
    assert why in line
    assert rows(f"Models without their {PARTS[part]}")[case][1].replace("PATH", str(folder)) in line
    assert list(model.checkpoint.left_out) == [part]
    assert np.array_equal(model.logits(IDS), expected)
    assert {spec.part for spec, _ in model.checkpoint.storage()} == set(Part) - {part}

    dropped: dict[str, Any] = {"vision": "none"} if part is Part.VISION else {"mtp": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ModelError, match="would be lost") as error:
            quantize(folder, tmp_path / "out", recipe="none")
        assert ("--no-vision" if part is Part.VISION else "--no-mtp") in str(error.value.hint)
        quantize(folder, tmp_path / "out", recipe="none", **dropped)
    assert np.array_equal(edgeq.load(tmp_path / "out", backend="numpy").logits(IDS), expected)  # and nothing is said


def test_every_half_has_a_row() -> None:
    assert rows("Models without their vision tower").keys() == TOWER.keys()
    assert rows("Models without their MTP head").keys() == HEAD.keys()


def test_both_parts_at_once(folder: Path, expected: Float32) -> None:
    config(vision_config__depth="many", text_config__mtp_num_hidden_layers=3)(folder)
    with pytest.warns(UserWarning, match="the model runs without it") as caught:
        model = edgeq.load(folder, backend="numpy")
    assert len(caught) == 2
    assert np.array_equal(model.logits(IDS), expected)


def test_the_text_is_still_refused(folder: Path) -> None:
    """What is wrong with the language model is not put on another part."""
    config(text_config__hidden_act="relu", vision_config__depth="many")(folder)
    with pytest.raises(ModelError, match="hidden_act is 'relu'"):
        open_checkpoint(folder)


def test_a_text_shard_is_still_missed(folder: Path) -> None:
    shards(lambda _: None)(folder)
    (folder / "text.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks text\.safetensors"):
        open_checkpoint(folder)


def test_shards_in_sub_folders(folder: Path, expected: Float32) -> None:
    shards(lambda _: None)(folder)
    model = edgeq.load(folder, backend="numpy")
    assert not model.checkpoint.left_out
    assert np.array_equal(model.logits(IDS), expected)


@pytest.mark.parametrize("names", [
    ["model.language_model.layers.3.self_attn.rotary_emb.inv_freq"], ["model.language_model.rotary_emb.inv_freq"],
    ["model.language_model.layers.3.self_attn.k_scale", "model.language_model.layers.3.self_attn.v_scale"],
    ["model.visual.rotary_pos_emb.inv_freq"],
])  # fmt: skip
def test_leftover_buffers(folder: Path, expected: Float32, names: list[str]) -> None:
    rewrite(folder, lambda t: t.update({name: np.ones(4, np.float32) for name in names}))
    with pytest.warns(UserWarning, match="is no weight, and is not used") as caught:
        model = edgeq.load(folder, backend="numpy")
    assert len(caught) == 1
    assert np.array_equal(model.logits(IDS), expected)


@pytest.mark.parametrize("name", ["score.weight", "v_head.summary.bias", "medusa_head.0.0.linear.weight"])
def test_heads_of_classifiers_and_trainers(folder: Path, expected: Float32, name: str) -> None:
    rewrite(folder, lambda t: t.update({name: np.ones(4, np.float32)}))
    with pytest.warns(UserWarning, match=f"{name} is of a head that writes no text, and is not used") as caught:
        model = edgeq.load(folder, backend="numpy")
    assert len(caught) == 1
    assert np.array_equal(model.logits(IDS), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_commands(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_home(tmp_path, monkeypatch)
    run = runner(capsys, monkeypatch)
    config(vision_config__depth=0)(folder)
    tensors(lambda t: t.pop("mtp.fc.weight"))(folder)
    out, both = tmp_path / "x.gguf", ("--no-vision", "--no-mtp")
    for command in (("quantize", folder, "-o", tmp_path / "q", "--recipe", "none"), ("export", folder, "-o", out)):
        for some in ((), both[:1], both[1:]):
            result = run(*command, *some)
            assert result.code == 4
            assert "would be lost" in result.err
        assert run(*command, *both).code == 0
    assert run("export", folder, "-o", out, "--no-vision", "--mmproj", tmp_path / "m.gguf").code == 2
    assert run("quantize", folder, "-o", out, "--no-vision", "--vision", "8").code == 2
    assert "not fit for use: config.json: vision_config.depth is 0" in run("info", folder).out


def test_parts_left_out_on_purpose(whole: Path, tmp_path: Path, expected: Float32) -> None:
    """Both flags work on a whole model, too."""
    quantize(whole, tmp_path / "out", recipe="none", vision="none", mtp=False)
    back = open_checkpoint(tmp_path / "out")
    assert {spec.part for spec, _ in back.storage()} == {Part.TEXT}
    assert back.config.text.mtp_num_hidden_layers == 0
    export_gguf(open_checkpoint(whole), tmp_path / "x.gguf", "f32", mtp=False)
    exported = edgeq.load(tmp_path / "x.gguf", backend="numpy")
    assert {spec.part for spec, _ in exported.checkpoint.storage()} == {Part.TEXT}
    assert np.allclose(exported.logits(IDS), expected, rtol=1e-3, atol=1e-3)


MMPROJ: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "a web page": lambda file: file.write_text("<html>" * 20),
    "nothing but its beginning": lambda file: file.write_bytes(file.read_bytes()[:64]),
}


@pytest.mark.parametrize("case", MMPROJ)
def test_a_broken_mmproj(whole: Path, tmp_path: Path, case: str) -> None:
    gguf, mmproj = tmp_path / "model.gguf", tmp_path / "mmproj.gguf"
    export_gguf(open_checkpoint(whole), gguf, "f32")
    alone = edgeq.load(gguf, backend="numpy").logits(IDS)
    export_mmproj(open_checkpoint(whole), mmproj, "f32")
    MMPROJ[case](mmproj)
    with pytest.warns(UserWarning, match=r"mmproj\.gguf.*the model runs without it and does not see") as caught:
        model = edgeq.load(gguf, backend="numpy")
    assert len(caught) == 1
    assert np.array_equal(model.logits(IDS), alone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(EdgeqError):
            open_checkpoint(gguf, mmproj)  # asked for
        with pytest.raises(ModelError, match="would be lost"):
            quantize(gguf, tmp_path / "out", recipe="none")
        quantize(gguf, tmp_path / "out", recipe="none", vision="none")
        with pytest.raises(UsageError, match="has no vision tower to export"):
            export_mmproj(open_checkpoint(gguf), tmp_path / "m2.gguf", "f16")


def test_half_an_mtp_head_in_gguf(whole: Path, tmp_path: Path) -> None:
    """The tensors' names are changed in place, so that the file is whole and the head is not."""
    gguf = tmp_path / "model.gguf"
    export_gguf(open_checkpoint(whole), gguf, "f32")
    alone = edgeq.load(gguf, backend="numpy").logits(IDS)
    gguf.write_bytes(gguf.read_bytes().replace(b"nextn.enorm.weight", b"nextn.enorm.weighx"))
    with pytest.warns(UserWarning, match="its MTP head: missing .*; the model runs without it"):
        model = edgeq.load(gguf, backend="numpy")
    assert model.config.text.mtp_num_hidden_layers == 0
    assert np.array_equal(model.logits(IDS), alone)
    with pytest.warns(UserWarning, match="its MTP head"), pytest.raises(ModelError, match="would be lost"):
        quantize(gguf, tmp_path / "out", recipe="none")
