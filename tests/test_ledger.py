"""The ledger against the plan: what the arithmetic says beforehand is what is held, to the byte."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeq
from edgeq.api import Model
from edgeq.backends import available
from edgeq.checkpoint import open_checkpoint
from edgeq.engine import Feed
from edgeq.memory.ledger import Holding, Ledger
from edgeq.memory.plan import SCRATCH_NBYTES, plan_memory, prefill_chunk
from edgeq.quant import quantize
from edgeq.quant.gguf_export import export_gguf
from edgeq.session.context import Context
from edgeq.state import KVCache
from edgeq.testing import config_values, write_checkpoint
from edgeq.weights import Part

WIDE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "linear_key_head_dim": 64,
    "linear_value_head_dim": 64, "max_position_embeddings": 1 << 16,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model unquantized, quantized, and as GGUF in types of one and two levels."""
    root = tmp_path_factory.mktemp("ledger")
    write_checkpoint(root / "bf16", config_values(mtp=True, vision=True, **WIDE))
    quantize(root / "bf16", root / "q4", group_size=32)
    for kind in ("q8_0", "q4_1"):
        export_gguf(open_checkpoint(root / "bf16"), root / f"{kind}.gguf", kind)
    return {name: root / name for name in ("bf16", "q4", "q8_0.gguf", "q4_1.gguf")}


@pytest.fixture(scope="module", params=["numpy", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if next(b for b in available() if b.name == name).ops is None:
        pytest.skip(f"the {name} backend does not run here")
    return name


def held(model: Model) -> dict[str, int]:
    gc.collect()
    return {holding.owner: holding.nbytes for holding in model.engine.ledger.holdings()}


@pytest.mark.parametrize("name", ["bf16", "q4", "q8_0.gguf", "q4_1.gguf"])
def test_weights(folders: dict[str, Path], backend: str, name: str) -> None:
    model = edgeq.load(folders[name], backend=backend)
    plan, holdings = plan_memory(model.checkpoint, model.ops, 64), held(model)
    assert holdings["weights, mapped"] + holdings["weights"] == plan.weights
    matrices = sum(
        model.checkpoint.memory_nbytes(s) for s, _ in model.checkpoint.storage() if s.part is Part.TEXT and s.is_matrix
    )
    assert (holdings["weights, mapped"] == matrices) == (not name.endswith("gguf"))  # GGUF's codes are put in order


def test_a_part_counts_while_it_is_loaded(folders: dict[str, Path], backend: str) -> None:
    model = edgeq.load(folders["bf16"], backend=backend)
    before = model.engine.ledger.nbytes()
    assert model.engine.weights.vision is not None
    more = model.engine.ledger.nbytes()
    assert more > before
    model.engine.weights.release(Part.VISION)
    assert model.engine.ledger.nbytes() == before


@pytest.mark.parametrize("tokens", [1, 256, 257, 700])
@pytest.mark.parametrize("kv_bits", [16, 8, 4])
def test_states_and_pages(folders: dict[str, Path], backend: str, tokens: int, kv_bits: int) -> None:
    model = edgeq.load(folders["q4"], backend=backend, kv_bits=kv_bits)
    plan, before = plan_memory(model.checkpoint, model.ops, tokens), held(model)
    context = Context(model.engine)
    context.feed([5] * tokens)
    after = held(model)
    assert after["KV cache"] - before["KV cache"] == plan.kv
    assert after["DeltaNet states"] - before["DeltaNet states"] == plan.states // 2  # the old ones are gone
    branch = model.advance([6], context.state)
    more = held(model)
    page = plan.kv // -(-tokens // 256)  # of all layers
    assert more["KV cache"] - after["KV cache"] == (0 if tokens % 256 else page)  # the others are shared
    assert more["DeltaNet states"] - after["DeltaNet states"] == plan.states // 2
    del branch, context
    freed = held(model)
    assert {**freed, "scratch": 0} == {**before, "scratch": 0}


def test_kept_states_are_held_as_long_as_somebody_keeps_them(folders: dict[str, Path], backend: str) -> None:
    model = edgeq.load(folders["q4"], backend=backend)
    engine, before = model.engine, held(model)["DeltaNet states"]
    one = plan_memory(model.checkpoint, model.ops, 64).states // 2
    (output,) = engine.run([Feed(engine.state(), np.arange(5, dtype=np.int32), keep=4)])
    kept = held(model)["DeltaNet states"] - before
    last = output.state
    del output
    left = held(model)["DeltaNet states"] - before
    if backend == "cpu":  # a state, and what tokens did to it
        assert one < left <= kept < 2 * one
    else:
        assert (kept, left) == (5 * one, one)
    del last
    assert held(model)["DeltaNet states"] == before


def test_scratch_grows_with_a_prompt_and_shrinks_after_it(tmp_path: Path) -> None:
    if next(b for b in available() if b.name == "cpu").ops is None:
        pytest.skip("the native backend is not built")
    write_checkpoint(tmp_path, config_values(**(WIDE | {"intermediate_size": 2048})))
    model = edgeq.load(tmp_path, backend="cpu", threads=1)
    context = Context(model.engine)
    context.feed([5] * 512)
    prompt = held(model)["scratch"]
    assert prompt <= model.ops.scratch_nbytes(model.config.text, 512) + (1 << 20)  # and what threads keep of attention
    assert prompt >= 4 * 2 * 512 * 2048  # gate and up of the feed-forward
    context.feed([5])
    assert held(model)["scratch"] <= prompt // 4


class TestPlan:
    def test_more_context_costs_its_pages(self, folders: dict[str, Path], backend: str) -> None:
        model = edgeq.load(folders["q4"], backend=backend)
        short, long = (plan_memory(model.checkpoint, model.ops, n) for n in (4096, 8192))
        assert long._replace(kv=short.kv) == short
        assert long.kv == 2 * short.kv
        assert short.total == sum(short)

    def test_the_chunk_is_what_the_scratch_memory_allows(self, folders: dict[str, Path], backend: str) -> None:
        model = edgeq.load(folders["q4"], backend=backend)
        c: Any = model.config.text
        chunk = prefill_chunk(c, model.ops)
        assert chunk == model.engine.chunk == 512
        wide = replace(c, intermediate_size=9216, hidden_size=2560)
        narrower = prefill_chunk(wide, model.ops)
        assert narrower in (64, 128, 256)
        assert model.ops.scratch_nbytes(wide, narrower) <= SCRATCH_NBYTES < model.ops.scratch_nbytes(wide, 2 * narrower)
        assert prefill_chunk(replace(c, intermediate_size=1 << 20), model.ops) == 64

    def test_an_untied_embedding_counts_the_rows_that_are_read(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, config_values(tie_word_embeddings=False, vocab_size=8192))
        model = edgeq.load(tmp_path, backend="numpy")
        few, all_rows = (plan_memory(model.checkpoint, model.ops, n).weights for n in (16, 4096))
        assert all_rows - few == (4096 - 16) * 64 * 2  # bfloat16 rows of 64


def test_a_ledger_counts_when_it_is_asked() -> None:
    ledger, size = Ledger(), [1]
    ledger.open("a", lambda: size[0])
    ledger.open("file", lambda: 10, mapped=True)
    assert ledger.holdings() == [Holding("a", 1), Holding("file", 10, True)]
    size[0] = 5
    assert (ledger.nbytes(), ledger.nbytes(mapped=True), ledger.nbytes(mapped=False)) == (15, 10, 5)


def test_the_tokenizer_s_tables_have_an_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeq.text.bpe.WORTH_A_TABLE", 0)  # the demo's is small
    model = edgeq.load("demo", backend="numpy")
    tables = next(holding for holding in model.engine.ledger.holdings() if holding.owner == "tokenizer tables")
    assert tables.mapped
    assert model.tokenizer is not None
    assert tables.nbytes == model.tokenizer.nbytes > 10_000


def test_mlx_counts_its_own_buffers(folders: dict[str, Path]) -> None:
    pytest.importorskip("mlx.core", reason="MLX is not installed")
    from edgeq.backends.mlx import MlxOps

    model = Model(open_checkpoint(folders["q4"]), MlxOps("float16"))
    context = Context(model.engine)
    for tokens in (1, 300):
        context.feed([5] * (tokens - context.position))
        caches = [layer for layer in context.state.layers if isinstance(layer, KVCache)]
        assert sum(cache.nbytes for cache in caches) == model.ops.kv_nbytes(model.config.text, tokens)
