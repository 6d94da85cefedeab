"""Parts of the MLX backend by themselves: the delta rule in its forms, attention in blocks, growing buffers.

NMSE is sum((a - b)^2) / sum(a^2). What only a Metal device can show is skipped elsewhere, with that as the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from edgeq.backends.numpy.delta import delta_step
from edgeq.formats.bf16 import Array
from edgeq.testing import nmse

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

from edgeq.backends.mlx import MlxOps, used_memory  # noqa: E402
from edgeq.backends.mlx.delta import cpu_streams, delta_metal, delta_products  # noqa: E402
from edgeq.backends.mlx.kv import capacity_for  # noqa: E402

ON_METAL = mx.metal.is_available() and mx.default_device() != mx.Device(mx.cpu)
needs_metal = pytest.mark.skipif(not ON_METAL, reason="needs an Apple GPU")


# --- the delta rule --------------------------------------------------------------------------------------------------


def delta_inputs(T: int, heads: int, K: int, V: int, share: int) -> list[Array]:
    rng = np.random.default_rng(1)
    q, k = (rng.standard_normal((T, heads, K)).astype(np.float32) for _ in "qk")
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = rng.standard_normal((T, heads * share, V)).astype(np.float32)
    g = -np.exp(2 * rng.standard_normal((T, heads * share)) - 2).astype(np.float32)
    beta = rng.uniform(0, 1, (T, heads * share)).astype(np.float32)
    return [q, k, v, g, beta, rng.standard_normal((heads * share, V, K)).astype(np.float32)]


def products(inputs: Sequence[Array], keep: int, chunk: int, streams: Sequence[Any] = ()) -> Any:
    q, k, v, g, beta, state = map(mx.array, inputs)
    return delta_products(q, k, v, g, beta, state, keep, chunk, streams)


@pytest.mark.parametrize("C", [4, 16, 64])
def test_delta_rule_with_keys_that_repeat(C: int) -> None:
    """A text that goes in circles: equal keys, full strength, hardly any decay. Powers of the system would overflow."""
    q, k, v, g, beta, state = delta_inputs(256, 2, 32, 16, 1)
    k[:], g[:], beta[:] = k[:1], -1e-4, 1
    o, (after,) = products([q, k, v, g, beta, state], 0, C)
    outputs = []
    for t in range(len(q)):
        out, state = delta_step(q[t], k[t], v[t], g[t], beta[t], state)
        outputs.append(out)
    assert nmse(np.stack(outputs), np.array(o)) <= 1e-9  # float32 sums fed back a few hundred times
    assert nmse(state, np.array(after)) <= 1e-9


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_heads_shared_out_among_streams(heads: int) -> None:
    streams = [*cpu_streams(), *cpu_streams(), *cpu_streams()][:3]  # on a machine of one core, three times the same
    inputs = delta_inputs(75, heads, 32, 16, 2)
    with mx.stream(mx.cpu):
        expected, after = products(inputs, 2, 16)
        o, states = products(inputs, 2, 16, streams)
        for one, shared in zip((expected, *after), (o, *states), strict=True):
            assert nmse(np.array(one), np.array(shared)) <= 1e-12  # the same products, head by head


@needs_metal
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 257])
def test_metal_kernel(T: int, dtype: str) -> None:
    for heads, K, V, share in ((2, 128, 128, 1), (2, 128, 128, 2), (3, 40, 24, 1), (1, 7, 5, 4)):
        q, k, v, g, beta, state = map(mx.array, delta_inputs(T, heads, K, V, share))
        q, k, v = (x.astype(getattr(mx, dtype)) for x in (q, k, v))
        for keep in {0, min(T, 4)}:
            o, states = delta_metal(q, k, v, g, beta, state, keep)
            o_products, states_products = delta_products(q, k, v, g, beta, state, keep, 64)
            assert nmse(np.array(o_products), np.array(o)) <= 1e-9  # float32 on both sides, whatever the inputs were
            for found, expected in zip(states, states_products, strict=True):
                assert nmse(np.array(expected), np.array(found)) <= 1e-9


# --- attention and its buffers ---------------------------------------------------------------------------------------


def test_attention_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long context: the scores of a chunk are spelled out a few rows at a time."""
    rng, ops = np.random.default_rng(0), MlxOps("float32")
    q, k, v = (mx.array(rng.standard_normal((50, heads, 16)).astype(np.float32)) for heads in (4, 2, 2))
    answers = []
    for scores in (1 << 24, 7 * 4 * 70, 1):  # all rows, seven, and one at a time
        monkeypatch.setattr("edgeq.backends.mlx.ops._SCORES", scores)
        answers.append(np.array(ops.attention(q, k, v, ops.kv_cache(np.array(k[:20]), np.array(v[:20])))[0]))
    assert nmse(answers[0], answers[1]) <= 1e-12  # the same sums in another order
    assert nmse(answers[0], answers[2]) <= 1e-12


def test_capacities_grow_by_a_quarter() -> None:
    assert [capacity_for(n) for n in (0, 1, 256, 257, 2047, 2048, 2049, 262144)] == [
        0, 256, 256, 512, 2048, 2048, 2560, 262144,
    ]  # fmt: skip
    sizes = {capacity_for(n) for n in range(1, 1 << 18)}
    assert len(sizes) < 50
    assert all(capacity_for(n) - n < max(256, n / 4 + 1) for n in range(1, 1 << 14))


def test_appending_is_in_place() -> None:
    """The old cache is still held, and yet nothing of the buffer is copied."""
    room = np.zeros((8000, 4, 64), np.float32)  # 8 MB a side
    held = [MlxOps("float32").kv_cache(room, room)]
    token = mx.zeros((1, 4, 64))
    mx.eval(held[0].buffer.keys, held[0].buffer.values)
    mx.reset_peak_memory()
    before = used_memory().active
    for _ in range(20):
        held.append(held[-1].appended(token, token))
        mx.eval(held[-1].buffer.keys, held[-1].buffer.values)
    assert used_memory().peak - before < held[0].nbytes / 10
    assert all(cache.buffer is held[0].buffer for cache in held)


def test_a_rollback_writes_over_what_nobody_holds() -> None:
    ops = MlxOps("float32")
    x = np.random.default_rng(0).standard_normal((10, 2, 8)).astype(np.float32)
    cache = ops.kv_cache(x, x)
    longer = cache.appended(mx.array(x[:3]), mx.array(x[:3]))
    branch = cache.appended(mx.array(x[3:4]), mx.array(x[3:4]))
    assert branch.buffer is not cache.buffer  # `longer` is in use
    del longer, branch
    again = cache.appended(mx.array(x[3:4]), mx.array(x[3:4]))
    assert again.buffer is cache.buffer
    assert np.array_equal(np.array(again.arrays()[0]), np.concatenate([x, x[3:4]]))
