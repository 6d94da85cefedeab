"""edgeq's MLX backend beside mlx-lm, on the same random weights of a real model's shape, in one run.

    python tools/bench_mlx.py                    # what says something on any device
    python tools/bench_mlx.py --speed            # decode and prefill too: for a GPU

Both get the same arrays, 4-bit in groups of 64. Every figure is the best of several, the two
taking turns, because the machine may have other work. Needs mlx-lm (pip install mlx-lm).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.quantized import quantize
from mlx_lm.generate import generate_step
from mlx_lm.models import gated_delta, qwen3_5
from mlx_lm.models.cache import make_prompt_cache

from edgeq.backends.mlx import MlxOps, used_memory
from edgeq.backends.mlx.delta import delta_products
from edgeq.backends.mlx.ops import MlxQMatrix
from edgeq.config import TextConfig, parse_config
from edgeq.model.text import forward, initial_state, logits, text_batch
from edgeq.state import State
from edgeq.testing import nmse
from edgeq.weights import Role, TensorSpec, TextWeights, declare_text, map_tree, text_tensors

BITS, GROUP = 4, 64


def config_values(layers: int, vocab: int) -> dict[str, Any]:
    """A config.json with the shapes of Qwen3.5-0.8B, but for the number of layers and the vocabulary."""
    kinds = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)]
    return {
        "model_type": "qwen3_5",
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen3_5_text", "vocab_size": vocab, "hidden_size": 1024, "intermediate_size": 3584,
            "num_hidden_layers": layers, "layer_types": kinds, "full_attention_interval": 4,
            "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256,
            "linear_num_key_heads": 16, "linear_num_value_heads": 16, "linear_key_head_dim": 128,
            "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 262144, "hidden_act": "silu", "attn_output_gate": True,
            "tie_word_embeddings": True, "eos_token_id": 1, "mtp_num_hidden_layers": 0,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25,
                "mrope_interleaved": True, "mrope_section": [11, 11, 10],
            },
        },
    }  # fmt: skip


Weights = TextWeights[mx.array, mx.array | MlxQMatrix]


def both_models(layers: int, vocab: int, dtype: mx.Dtype) -> tuple[TextConfig, Weights, Any]:
    """The configuration, edgeq's weights and mlx-lm's model, of the same arrays."""
    values = config_values(layers, vocab)
    c = parse_config(values).text
    arrays = random_weights(c, dtype)
    return c, edgeq_weights(c, arrays), peer_model(values, arrays)


def random_weights(c: TextConfig, dtype: mx.Dtype) -> dict[str, mx.array]:
    """The table's tensors as an MLX checkpoint stores them, by their neutral names; `dtype` of all but codes."""
    rng, arrays = np.random.default_rng(0), {}
    for spec in text_tensors(c):
        if spec.role in (Role.LINEAR, Role.EMBEDDING, Role.GATE):
            out, width = spec.shape
            spread = 2.0 / (1 << BITS) / np.sqrt(width)
            groups = (out, width // GROUP)
            scales = rng.uniform(spread, 2 * spread, groups).astype(np.float32)
            codes = rng.integers(0, 1 << 32, (out, width * BITS // 32), np.uint32)
            module = spec.name.removesuffix("weight")
            arrays[spec.name] = mx.array(codes)
            arrays[f"{module}scales"] = mx.array(scales).astype(dtype)
            arrays[f"{module}biases"] = mx.array(scales * -(1 << (BITS - 1))).astype(dtype)
        elif spec.role is Role.DECAY:
            arrays[spec.name] = mx.array(np.log(rng.uniform(0.5, 16, spec.shape)).astype(np.float32))
        else:
            near = {Role.CONV: 0.0, Role.VECTOR: 0.0}.get(spec.role, 1.0)
            x = mx.array((near + 0.2 * rng.standard_normal(spec.shape)).astype(np.float32)).astype(dtype)
            arrays[spec.name] = x.swapaxes(1, 2) if spec.role is Role.CONV else x
    mx.eval(arrays)
    return arrays


def edgeq_weights(c: TextConfig, arrays: dict[str, mx.array]) -> Weights:
    """The tree of the same arrays; the few vectors in float32, as edgeq has them."""

    def leaf(spec: TensorSpec) -> mx.array | MlxQMatrix:
        if spec.is_matrix:
            module = spec.name.removesuffix("weight")
            return MlxQMatrix(arrays[spec.name], arrays[f"{module}scales"], arrays[f"{module}biases"], BITS, GROUP)
        x = arrays[spec.name].astype(mx.float32)
        return -mx.exp(x) if spec.role is Role.DECAY else x.squeeze(-1) if spec.role is Role.CONV else x

    weights: Weights = map_tree(leaf, declare_text(c))
    return weights


def peer_model(values: dict[str, Any], arrays: dict[str, mx.array]) -> Any:
    """mlx-lm's model of the same arrays."""
    model = qwen3_5.Model(qwen3_5.ModelArgs.from_dict(values))
    quantize(model, GROUP, BITS)
    model.load_weights([(f"language_model.model.{name}", x) for name, x in arrays.items()])
    return model.eval()


def seconds(runs: int, *tasks: Callable[[], object]) -> list[float]:
    """Best time of each task; they take turns, after one run that is not counted."""
    best = [float("inf")] * len(tasks)
    for turn in range(runs + 1):
        for i, task in enumerate(tasks):
            start = time.perf_counter()
            task()
            if turn:
                best[i] = min(best[i], time.perf_counter() - start)
    return best


class BuildOnly(MlxOps):
    """The backend without the going: a call builds its graph and nothing else."""

    def start(self, hidden: mx.array, states: Sequence[State[mx.array]]) -> None:
        pass


def bench_delta_rule(tokens: int) -> None:
    """The delta rule of one layer: edgeq's form for this device against mlx-lm's for this device."""
    H, D = 16, 128
    rng = np.random.default_rng(0)
    q, k, v = (mx.array(rng.standard_normal((tokens, H, D)).astype(np.float32)) for _ in "qkv")
    ops = MlxOps("float32")
    q, k = ops.l2_norm(q, 1e-6), ops.l2_norm(k, 1e-6)
    g = mx.array(-np.exp(2 * rng.standard_normal((tokens, H)) - 2).astype(np.float32))
    beta = mx.array(rng.uniform(0, 1, (tokens, H)).astype(np.float32))
    state, decay, scaled = mx.zeros((H, D, D)), mx.exp(g), q * D**-0.5
    mx.eval(q, k, v, g, beta, state, decay, scaled)
    peer_inputs = [x[None] for x in (scaled, k, v, decay, beta, state)]
    on_kernel = mx.metal.is_available() and mx.default_device() != mx.Device(mx.cpu)
    peer_rule = gated_delta.gated_delta_kernel if on_kernel else gated_delta.gated_delta_ops

    def ours() -> mx.array:
        o, states = ops.delta_rule(q, k, v, g, beta, state)
        mx.eval(o, *states)
        return o

    def peer() -> mx.array:
        o, after = peer_rule(*peer_inputs)
        mx.eval(o, after)
        first: mx.array = o[0]
        return first

    def one_core() -> None:
        o, states = delta_products(q, k, v, g, beta, state, 0, 16)
        mx.eval(o, *states)

    report(f"delta rule of a layer, {tokens} tokens", "ms", *(1e3 * s for s in seconds(5, ours, peer)))
    if mx.default_device() == mx.Device(mx.cpu):
        report("  the same on one core", "ms", *(1e3 * s for s in seconds(5, one_core, peer)))
    print(f"  NMSE of the outputs: {nmse(*(np.array(x().astype(mx.float32)) for x in (peer, ours))):.1e}")


def bench_graph(c: TextConfig, weights: Weights, model: Any) -> None:
    """Time of Python to build the graph of one token after 1000 as on a GPU, nothing computed."""
    ops = BuildOnly("bfloat16", compiled=True)
    past = np.zeros((1000, c.num_key_value_heads, c.head_dim), np.float32)
    state = initial_state(ops, c)
    kinds = list(zip(c.layer_types, state.layers, strict=True))
    layers = tuple(ops.kv_cache(past, past) if kind == "full_attention" else layer for kind, layer in kinds)
    state = State(layers, 1000, 1000)
    token, cache = np.array([7], np.int32), make_prompt_cache(model)
    kv = mx.zeros((1, c.num_key_value_heads, 1024, c.head_dim), mx.bfloat16)
    conv = mx.zeros((1, c.linear_conv_kernel_dim - 1, c.conv_dim), mx.bfloat16)
    matrix = mx.zeros((1, c.linear_num_value_heads, c.linear_value_head_dim, c.linear_key_head_dim))

    def ours() -> None:
        hidden, _ = forward(ops, c, weights, text_batch([token], [state]), [state])
        logits(ops, weights, hidden)

    def peer() -> None:
        for entry, kind in zip(cache, c.layer_types, strict=True):  # from the same state every time, as ours
            if kind == "full_attention":
                entry.keys, entry.values, entry.offset = mx.array(kv), mx.array(kv), 1000  # it writes into them
            else:
                entry[0], entry[1] = conv, matrix
        model(mx.array(token)[None], cache)

    report(f"graph of one token, {len(c.layer_types)} layers", "ms", *(1e3 * s for s in seconds(30, ours, peer)))


def bench_agreement(c: TextConfig, weights: Weights, model: Any) -> None:
    """The same tokens through both models, in float32."""
    ops, ids = MlxOps("float32"), np.arange(3, 12, dtype=np.int32)
    state = initial_state(ops, c)
    hidden, _ = forward(ops, c, weights, text_batch([ids], [state]), [state])
    ours = logits(ops, weights, hidden)
    peer = model(mx.array(ids)[None], make_prompt_cache(model))[0]
    error = nmse(np.array(peer.astype(mx.float32)), np.array(ours))
    print(f"  NMSE of the logits in float32, {len(c.layer_types)} layers: {error:.1e}")


def bench_speed(c: TextConfig, weights: Weights, model: Any, prompt: int, tokens: int) -> None:
    """Prefill and greedy decode, tokens per second."""
    ops, ids = MlxOps(), np.random.default_rng(0).integers(2, c.vocab_size, prompt).astype(np.int32)
    times: dict[str, list[tuple[float, float]]] = {"edgeq": [], "mlx-lm": []}
    for _ in range(3):
        for name, run in (("edgeq", ours_decode(ops, c, weights, ids)), ("mlx-lm", peer_decode(model, ids, tokens))):
            stamps = [time.perf_counter()]
            for _ in zip(range(tokens + 1), run, strict=False):
                stamps.append(time.perf_counter())
            times[name].append((prompt / (stamps[1] - stamps[0]), tokens / (stamps[-1] - stamps[1])))
    for i, what in enumerate((f"prefill of {prompt}", f"decode of {tokens}")):
        report(what, "tok/s", *(max(run[i] for run in times[name]) for name in times))
    print(f"  peak memory of the run: {used_memory().peak / 1e6:.0f} MB")


def ours_decode(ops: MlxOps, c: TextConfig, weights: Weights, ids: np.ndarray) -> Iterator[int]:
    """As the runtime does it: 512 tokens of the prompt at a time, and every token's logits come to NumPy."""
    state = initial_state(ops, c)
    while True:
        for start in range(0, len(ids), 512):
            chunk = ids[start : start + 512]
            hidden, ((state,),) = forward(ops, c, weights, text_batch([chunk], [state]), [state])
        token = int(ops.numpy(logits(ops, weights, hidden[-1:]))[0].argmax())
        yield token
        ids = np.array([token], np.int32)


def peer_decode(model: Any, ids: np.ndarray, tokens: int) -> Iterator[int]:
    """mlx-lm's own loop."""
    return (int(token) for token, _ in generate_step(mx.array(ids), model, max_tokens=tokens + 1))


def report(what: str, unit: str, ours: float, peer: float) -> None:
    times = ours / peer if unit == "tok/s" else peer / ours
    print(f"{what:36} edgeq {ours:9.2f} {unit:5}  mlx-lm {peer:9.2f} {unit:5}  {times:5.2f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true", help="decode and prefill of the whole model too")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prompt for --speed")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to decode for --speed")
    options = parser.parse_args()
    print(f"mlx {version('mlx')} on {mx.default_device()}")
    bench_delta_rule(512)
    bench_agreement(*both_models(4, 4096, mx.float32))
    models = both_models(options.layers, 248320, mx.bfloat16)
    bench_graph(*models)
    if options.speed:
        bench_speed(*models, options.prompt, options.tokens)


if __name__ == "__main__":
    main()
