"""A saved state is checked completely before a model goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeq
from edgeq.api import Model
from edgeq.errors import ModelError
from edgeq.state_io import state_arrays, state_from_arrays
from edgeq.testing import config_values, write_checkpoint

TOKENS = 7


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("state") / "model"
    write_checkpoint(folder, config_values(max_position_embeddings=64))
    return edgeq.load(folder, backend="numpy")


@pytest.fixture
def saved(model: Model) -> dict[str, Any]:
    return dict(state_arrays(model.ops, model.forward(list(range(TOKENS)), model.state())[1]))


def restore(model: Model, saved: dict[str, Any]) -> Any:
    return state_from_arrays(model.ops, model.config.text, saved)


def test_it_goes_on_where_it_was(model: Model, saved: dict[str, Any]) -> None:
    there = model.forward([3], restore(model, saved))[0]
    assert np.array_equal(there, model.forward([3], model.forward(list(range(TOKENS)), model.state())[1])[0])
    assert restore(model, dict(state_arrays(model.ops, model.state()))).length == 0


@pytest.mark.parametrize("name", ["length", "next_position"])
@pytest.mark.parametrize(
    "value",
    [
        np.array(-1), np.array(10**12), np.array(65), np.array(7.0), np.array(float("nan")), np.array(True),
        np.array([7]), np.array([7, 7]), np.array("7"), np.array(2**63, np.uint64), 7, "7", None,
    ],
)  # fmt: skip
def test_numbers(model: Model, saved: dict[str, Any], name: str, value: Any) -> None:
    with pytest.raises(ModelError, match=f"the saved state('s {name} is|.* lacks '{name}')"):
        restore(model, saved | {name: value})


def test_lengths_that_do_not_fit_the_arrays(model: Model, saved: dict[str, Any]) -> None:
    for length in (0, TOKENS - 1, TOKENS + 1):
        numbers = {"length": np.array(length), "next_position": np.array(length)}
        with pytest.raises(ModelError, match=r"layers\.3\.keys is float32 \[7, .*\], expected float32"):
            restore(model, saved | numbers)


@pytest.mark.parametrize("position", [0, TOKENS + 1])
def test_positions_that_no_model_reaches(model: Model, saved: dict[str, Any], position: int) -> None:
    with pytest.raises(ModelError, match="next_position is"):
        restore(model, saved | {"next_position": np.array(position)})


@pytest.mark.parametrize("name", ["layers.0.conv", "layers.1.matrix", "layers.3.keys", "layers.3.values"])
class TestArrays:
    @pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
    def test_what_is_no_number(self, model: Model, saved: dict[str, Any], name: str, wrong: float) -> None:
        saved[name] = saved[name].copy()
        saved[name].flat[-1] = wrong
        with pytest.raises(ModelError, match=f"the saved state's {name} holds NaN or infinity"):
            restore(model, saved)

    @pytest.mark.parametrize("dtype", ["f8", "f2", "i4", "u2", ">f4", "c8"])
    def test_another_type(self, model: Model, saved: dict[str, Any], name: str, dtype: str) -> None:
        with pytest.raises(ModelError, match=f"the saved state's {name} is .*, expected float32"):
            restore(model, saved | {name: saved[name].astype(dtype)})

    def test_another_shape(self, model: Model, saved: dict[str, Any], name: str) -> None:
        x = saved[name]
        for wrong in (x[:-1], x[..., :-1], x[None], x.reshape(-1), np.concatenate([x, x]), x.T, None, x.tolist()):
            with pytest.raises(ModelError, match=f"the saved state's {name} is .*, expected float32"):
                restore(model, saved | {name: wrong})


def test_more_and_fewer_layers(model: Model, saved: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"has layers\.4\.conv, which the model does not"):
        restore(model, saved | {"layers.4.conv": saved["layers.0.conv"], "layers.4.matrix": saved["layers.0.matrix"]})
    with pytest.raises(ModelError, match=r"has layers\.3\.conv, which the model does not"):
        restore(model, saved | {"layers.3.conv": saved["layers.0.conv"]})
    with pytest.raises(ModelError, match=r"layers\.0\.matrix is missing"):
        restore(model, {name: x for name, x in saved.items() if name != "layers.0.matrix"})


def test_another_model(saved: dict[str, Any], tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {"num_key_value_heads": 1},
        {"linear_key_head_dim": 32},
        {"max_position_embeddings": 6},
        {"layer_types": ["full_attention"] + ["linear_attention"] * 3},
    ]
    for i, change in enumerate(changes):
        write_checkpoint(tmp_path / str(i), config_values(**change))
        other = edgeq.load(tmp_path / str(i), backend="numpy")
        with pytest.raises(ModelError, match="the saved state"):
            restore(other, saved)
