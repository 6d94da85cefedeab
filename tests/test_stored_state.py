"""States as they are held: what is stored and read again is the same state, bit for bit, on every backend."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeq
from edgeq.api import Model
from edgeq.backends import available
from edgeq.backends.numpy.kv_pages import page_arrays, page_nbytes
from edgeq.errors import ModelError
from edgeq.state import BLOCK, KVCache, State
from edgeq.state_io import state_from_stored, stored_arrays
from edgeq.testing import config_values, write_checkpoint

KINDS = [("numpy", 16), ("numpy", 4), ("cpu", None), ("cpu", 8), ("cpu", 4), ("mlx", None)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored") / "model"
    write_checkpoint(folder, config_values(mtp=True))
    return folder


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(map(str, kind)))
def model(request: pytest.FixtureRequest, folder: Path) -> Model:
    backend, bits = request.param
    if backend not in {known.name for known in available() if known.ops}:
        pytest.skip(f"{backend} is not installed")
    return edgeq.load(folder, backend=backend, kv_bits=bits)


def read(model: Model, tokens: int) -> Any:
    engine = model.engine
    state, ids = engine.state(draft=True), np.random.default_rng(1).integers(5, 288, tokens)
    return model.forward(ids.tolist(), state)[1] if tokens else state


def keys(state: State[Any]) -> KVCache[Any]:
    """What the model's layer of attention remembers."""
    (cache,) = (layer for layer in state.layers if isinstance(layer, KVCache))
    return cache


def same(model: Model, a: Any, b: Any) -> None:
    """Both states are stored alike, and go on alike."""
    one, other = stored_arrays(model.ops, a), stored_arrays(model.ops, b)
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)
    for _ in range(3):
        (x, a), (y, b) = model.forward([7, 8], a), model.forward([7, 8], b)
        assert np.array_equal(x, y)
    assert (a.length, a.next_position) == (b.length, b.next_position)


@pytest.mark.parametrize("tokens", [0, BLOCK, BLOCK + 3])
def test_it_comes_back(model: Model, tokens: int) -> None:
    state = read(model, tokens)
    arrays = {name: x.copy() for name, x in stored_arrays(model.ops, state).items()}
    same(model, state, state_from_stored(model.ops, model.config.text, arrays))


def test_nothing_behind_its_last_token_is_stored(model: Model) -> None:
    """Where a page holds more, of a reply that was taken back for example."""
    state = read(model, BLOCK + 30)
    before = stored_arrays(model.ops, state)
    model.forward([9] * 40, state)  # into the same page
    after = stored_arrays(model.ops, state)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert not before["layers.3.kv"][1][..., 30:, :].any() if before["layers.3.kv"].ndim == 5 else True


def test_a_child_stores_what_its_parent_has_not(model: Model) -> None:
    parent = read(model, 2 * BLOCK + 40)
    _, child = model.forward([5, 6] * 130, parent)
    arrays = stored_arrays(model.ops, child, start=parent.length, draft_start=parent.draft.cache.length)
    assert len(arrays["layers.3.kv"]) == keys(child).blocks - 2
    back = state_from_stored(model.ops, model.config.text, arrays, base=parent)
    assert [keys(back).mark(i) is keys(child).mark(i) for i in range(3)] == [True, True, False]
    same(model, child, back)
    with pytest.raises(ModelError, match=r"layers\.3\.kv lacks its first 512 tokens"):
        state_from_stored(model.ops, model.config.text, arrays)


def test_marks_say_what_is_the_same(model: Model) -> None:
    state = read(model, BLOCK + 30)
    marks = [keys(state).mark(i) for i in range(2)]
    _, longer = model.forward([9] * 5, state)
    assert [keys(longer).mark(i) for i in range(2)] == marks
    _, other = model.forward([8] * 5, state)
    assert keys(other).mark(0) is marks[0] or model.ops.name == "mlx"
    assert keys(other).mark(1) is not keys(longer).mark(1)
    del longer, other
    _, third = model.forward([7] * 3, state)  # MLX writes over what nobody holds
    _, fourth = model.forward([6] * 3, state)
    assert keys(third).mark(1) is not keys(fourth).mark(1)


def test_what_is_mapped_is_read_where_it_is(model: Model, tmp_path: Path) -> None:
    """The native backend's pages lie in the file, cost no memory of their own and are copied to be written to."""
    state = read(model, BLOCK + 50)
    arrays = stored_arrays(model.ops, state)
    for name, x in arrays.items():
        if name.endswith("kv"):
            path = tmp_path / name
            path.write_bytes(x.tobytes())
            with path.open("rb") as file:
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            arrays[name] = np.frombuffer(memory, np.uint8).view(x.dtype).reshape(x.shape)
    back = state_from_stored(model.ops, model.config.text, arrays)
    if model.ops.name == "cpu":
        assert keys(back).nbytes == 0
    same(model, state, back)
    _, longer = model.forward([5], back)
    if model.ops.name == "cpu":
        assert keys(longer).nbytes == keys(state).nbytes // 2  # the page that was written to


def test_another_type_or_shape_is_refused(model: Model) -> None:
    arrays = stored_arrays(model.ops, read(model, BLOCK + 50))
    wrong = {
        "layers.3.kv": arrays["layers.3.kv"][:1], "draft.kv": arrays["draft.kv"].astype(np.float64),
        "layers.0.matrix": arrays["layers.0.matrix"] * np.nan, "draft.length": np.array(BLOCK + 51),
        "length": np.array(BLOCK - 1), "skipped": np.array(1),
    }  # fmt: skip
    for name, x in wrong.items():
        with pytest.raises(ModelError, match="the saved state"):
            state_from_stored(model.ops, model.config.text, arrays | {name: x})
    with pytest.raises(ModelError, match=r"layers\.3\.kv is missing"):
        state_from_stored(model.ops, model.config.text, {k: x for k, x in arrays.items() if k != "layers.3.kv"})


@pytest.mark.parametrize("kv_dtype", ["f16", "bf16", "f32", "int8", "int4"])
@pytest.mark.parametrize("dim", [32, 40])
def test_numpy_reads_native_pages(kv_dtype: str, dim: int) -> None:
    """int4: the rotation back is a sum of up to 32 products in another order."""
    cpu = pytest.importorskip("edgeq.backends.cpu", reason="the native backend is not built", exc_type=ImportError)
    rng, ops = np.random.default_rng(3), cpu.CpuOps(kv_dtype=kv_dtype)
    cache = ops.kv_cache(*rng.standard_normal((2, BLOCK, 3, dim), np.float32))
    page = cache.block(0)
    assert page.nbytes == page_nbytes(kv_dtype, 3, dim)
    for found, expected in zip(page_arrays(page, kv_dtype, 3, dim), cache.arrays(), strict=True):
        assert np.allclose(found, expected, rtol=0, atol=1e-5 if kv_dtype == "int4" else 0)
