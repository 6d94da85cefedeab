"""The vision tower against transformers (tests/data/vision), on every backend that runs here."""

from __future__ import annotations

import json
import sys
import tracemalloc
from pathlib import Path
from subprocess import run
from typing import Any

import numpy as np
import pytest
from test_ops import backends
from vision_cases import DATA, DEMO, Case, case, golden, patches

from edgeq.backends.numpy import NumpyOps
from edgeq.backends.ops import Ops
from edgeq.checkpoint import open_checkpoint
from edgeq.config import VisionConfig
from edgeq.engine import Engine
from edgeq.errors import ModelError, UsageError
from edgeq.formats.bf16 import Float32
from edgeq.memory.plan import plan_memory
from edgeq.model import text, vision
from edgeq.testing import config_values, nmse, write_checkpoint
from edgeq.weights import Affine, Part, VisionBlockWeights

SHAPES = ("narrow", "wide", "table-up", "table-down", "untied")
PROMPTS = ("image", "two", "smallest", "video", "mixed")
SHARED = Path(__file__).parent.parent.parent / "shared"

# NMSE of features and of the last logits. Two orders of float32 sums differ by 1e-12 in features; the layers of the
# language model amplify that a hundredfold. A GELU of the wrong kind would be 3e-7 in the logits.
FEATURES, LOGITS = 1e-11, 1e-9
BOUNDS = {  # products of 16-bit codes, 4e-9 each (tests/test_ops.py), amplified likewise from block to block
    "cpu": (1e-6, 1e-5),
}


@pytest.fixture(scope="module", params=backends())
def ops(request: pytest.FixtureRequest) -> Ops[Any, Any]:
    settings = {"mlx": {"dtype": "float32"}, "cpu": {"kv_dtype": "f32"}}.get(request.param.name, {})
    made: Ops[Any, Any] = request.param(**settings)
    return made


def engine(ops: Ops[Any, Any], path: Path) -> Engine[Any, Any]:
    return Engine(open_checkpoint(path), ops)


def features(e: Engine[Any, Any], c: Case) -> Float32:
    """Of all visuals of a prompt, one by one."""
    seen, start = [], 0
    for grid in c.grids:
        end = start + int(np.prod(grid))
        seen.append(e.ops.numpy(e.see(c.pixels[start:end], grid)))
        start = end
    return np.concatenate(seen)


def last_logits(e: Engine[Any, Any], ids: np.ndarray, positions: np.ndarray, features: Float32) -> Float32:
    """After a prompt whose placeholders are `features`."""
    weights, c, ops = e.weights.text, e.checkpoint.config, e.ops
    x = np.array(ops.numpy(text.embed(ops, weights, ids)))
    x[(ids == c.image_token_id) | (ids == c.video_token_id)] = features
    hidden, _ = text.run_layers(ops, c.text, weights, ops.array(x), positions, [len(ids)], [e.state()], [0])
    logits: Float32 = ops.numpy(text.logits(ops, weights, hidden[-1:]))[0]
    return logits


def check(e: Engine[Any, Any], c: Case) -> None:
    bound_features, bound_logits = BOUNDS.get(e.ops.name, (FEATURES, LOGITS))
    seen = features(e, c)
    assert nmse(c.features, seen) <= bound_features
    logits = last_logits(e, c.ids, c.positions, seen)
    assert nmse(c.logits, logits) <= bound_logits
    assert c.greedy[:1] in ([], [int(logits.argmax())])


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_tiny_checkpoints(ops: Ops[Any, Any], shape: str, prompt: str) -> None:
    check(engine(ops, DATA / shape), case(DATA / shape / "golden.safetensors", prompt))


DEMO_CASES: dict[str, Any] = json.loads((DATA / "demo.json").read_text())


def demo_case(name: str) -> Case:
    """A conversation with the demo model: pixel values made of its pictures, which need no resizing."""
    spec, held = DEMO_CASES[name], golden(DATA / "demo.safetensors")
    parts = [part for message in spec["messages"] for part in message["content"]]
    shown = [held[f"picture.{part[part['type']]}"] for part in parts if part["type"] != "text"]
    pixels = [patches(picture, spec["mean"], spec["std"]) for picture in shown]
    return case(DATA / "demo.safetensors", name, np.concatenate(pixels))


@pytest.mark.parametrize("name", DEMO_CASES)
def test_conversations_with_the_demo_model(ops: Ops[Any, Any], name: str) -> None:
    check(engine(ops, DEMO), demo_case(name))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint of the reference material."""
    if not (SHARED / "goldens").exists():
        pytest.skip("the goldens are in ../shared, which is not here")
    folder = tmp_path_factory.mktemp("reference") / "tiny"
    run(
        [sys.executable, SHARED / "make_reference.py", "--size", "tiny", "--out", folder],
        check=True,
        capture_output=True,
    )
    return folder


@pytest.mark.shared
@pytest.mark.parametrize("name", ["image", "image_noresize", "video", "video_hf5"])
def test_shared_goldens(ops: Ops[Any, Any], reference: Path, name: str) -> None:
    g, kind = golden(SHARED / "goldens" / f"tiny.{name}.safetensors"), name.partition("_")[0]
    c = Case(
        ids=g["input_ids"].astype(np.int32), positions=g["position_ids"].astype(np.int32),
        rope_delta=int(g["rope_delta"][0]), kinds=[1 if kind == "image" else 2],
        grids=[(int(t), int(h), int(w)) for t, h, w in g[f"{kind}_grid_thw"]],
        pixels=g["pixel_values" if kind == "image" else "pixel_values_videos"], features=g["vision.merger"],
        logits=g["greedy_logits"][0], greedy=g["greedy_ids"].tolist(),
    )  # fmt: skip
    check(engine(ops, reference), c)


# --- the model's own pieces ------------------------------------------------------------------------------------------


def config(**changes: int) -> VisionConfig:
    sizes = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "in_channels": 3, "patch_size": 4,
        "temporal_patch_size": 2, "spatial_merge_size": 2, "num_position_embeddings": 49, "out_hidden_size": 64,
    }  # fmt: skip
    return VisionConfig(**{**sizes, **changes})


def test_patches_go_square_by_square() -> None:
    rows, columns = vision.patch_places(config(), (2, 4, 6))
    places = list(zip(rows.tolist(), columns.tolist(), strict=True))
    assert places[:5] == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2)]
    assert places[12] == (2, 0)
    assert places[24:] == places[:24]


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_a_table_of_the_picture_s_size_is_taken_as_it_is(merge: int) -> None:
    c = config(num_position_embeddings=36, spatial_merge_size=merge)
    taps, weights = vision.position_taps(c, (1, 6, 6))
    rows, columns = vision.patch_places(c, (1, 6, 6))
    exact = np.zeros((36, 36), np.float32)
    np.add.at(exact, (np.arange(36)[:, None], taps), weights)
    assert np.array_equal(exact, np.eye(36)[rows * 6 + columns])


@pytest.mark.parametrize("grid", [(1, 2, 2), (1, 10, 4), (1, 2, 30)], ids=str)
def test_the_table_is_stretched_corner_on_corner(grid: tuple[int, int, int]) -> None:
    """A table that is linear in row and column stays so."""
    c = config()
    taps, weights = vision.position_taps(c, grid)
    rows, columns = vision.patch_places(c, grid)
    table = np.arange(7)[:, None] * 10.0 + np.arange(7)
    expected = rows * 6 / (grid[1] - 1) * 10 + columns * 6 / (grid[2] - 1)
    assert np.allclose((table.ravel()[taps] * weights).sum(axis=1), expected, atol=1e-5)


def test_frames_do_not_depend_on_their_band(monkeypatch: pytest.MonkeyPatch) -> None:
    c, e = case(DATA / "narrow" / "golden.safetensors", "video"), engine(NumpyOps(), DATA / "narrow")
    assert vision.largest_band(c.grids) == 72
    whole = features(e, c)
    monkeypatch.setattr(vision, "BAND", 50)  # two frames of 24 patches
    assert vision.largest_band([(3, 4, 6), (1, 10, 10)]) == 100
    assert nmse(whole, features(e, c)) <= FEATURES


def test_the_tower_is_loaded_when_something_is_seen_and_let_go() -> None:
    e, c = engine(NumpyOps(), DATA / "narrow"), case(DATA / "narrow" / "golden.safetensors", "image")
    assert e.sees
    assert e.weights.nbytes(Part.VISION, mapped=True) == 0
    first = features(e, c)
    assert e.weights.nbytes(Part.VISION, mapped=True) > 0
    e.weights.release(Part.VISION)
    assert e.weights.nbytes(Part.VISION, mapped=True) == 0
    assert np.array_equal(features(e, c), first)


def test_the_plan_knows_what_a_picture_costs() -> None:
    """NumPy tells tracemalloc of its memory: between half of what is planned and all of it."""
    c, grid, ops = config(hidden_size=64, intermediate_size=256, num_heads=1), (1, 60, 60), NumpyOps()
    rng = np.random.default_rng(3)

    def affine(out: int, width: int) -> Any:
        return Affine(rng.standard_normal((out, width), np.float32), np.ones(out, np.float32))

    norm = Affine(np.ones(64, np.float32), np.zeros(64, np.float32))
    w = VisionBlockWeights(norm, norm, affine(192, 64), affine(64, 64), affine(256, 64), affine(64, 256))
    x, angles = rng.standard_normal((3600, 64), np.float32), vision.vision_angles(ops, c, grid)
    tracemalloc.start()
    ops.vision_blocks(x, [w], c, angles, [3600])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    planned = ops.vision_scratch_nbytes(c, 3600)
    assert planned / 2 <= peak <= planned
    assert planned < 3600 * 3600 * 4 * 2  # scores of the whole picture would take more


def test_the_tower_and_the_text_are_planned_one_after_the_other() -> None:
    checkpoint, ops = open_checkpoint(DEMO), NumpyOps()
    text_only = plan_memory(checkpoint, ops, 256)
    one, two = (plan_memory(checkpoint, ops, 256, grids=[(1, 6, 6)] * n) for n in (1, 2))
    assert text_only.total < one.total < two.total
    assert two.vision - one.vision == 4 * 36 * (1536 + 256 // 4)  # pixels and features
    everything = sum(storage.nbytes for _, storage in checkpoint.storage())
    assert one.vision < everything + ops.vision_scratch_nbytes(checkpoint.config.vision or config(), 36)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_model_without_tower_does_not_see(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, config_values())
    e = engine(NumpyOps(), tmp_path)
    assert not e.sees
    with pytest.raises(UsageError, match="does not see: it has no vision tower"):
        e.see(np.zeros((4, 96), np.float32), (1, 2, 2))


@pytest.mark.parametrize(
    ("grid", "shape", "dtype"),
    [
        ((1, 3, 2), (6, 96), "float32"),
        ((0, 2, 2), (0, 96), "float32"),
        ((1, 2, 2), (8, 96), "float32"),
        ((1, 2, 2), (4, 95), "float32"),
        ((1, 2, 2), (4, 96), "float64"),
        ((2, 2), (4, 96), "float32"),
        ((1, 2, 2.0), (4, 96), "float32"),
    ],
    ids=str,
)
def test_patches_that_do_not_fit_their_grid(grid: Any, shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(UsageError, match=r"grid .* expected"):
        engine(NumpyOps(), DATA / "narrow").see(np.zeros(shape, dtype), grid)


def test_what_is_not_numbers_is_said() -> None:
    with pytest.raises(ModelError, match="NaN or infinite"):
        engine(NumpyOps(), DATA / "narrow").see(np.full((4, 96), np.nan, np.float32), (1, 2, 2))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("deepstack_visual_indexes", [0]),
        ("hidden_act", "gelu"),
        ("num_heads", 3),  # of 32 entries
        ("num_heads", 16),  # of 2 entries: a quarter of them is no number
        ("num_position_embeddings", 15),
        ("out_hidden_size", 32),
    ],
)
def test_towers_of_another_architecture_are_left_out_by_name(tmp_path: Path, key: str, value: Any) -> None:
    values = config_values(vision=True)
    write_checkpoint(tmp_path, values)
    values["vision_config"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.warns(UserWarning, match=f"vision_config.{key} .* does not see"):
        assert open_checkpoint(tmp_path).config.vision is None
