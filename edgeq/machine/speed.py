"""How many tokens a second a model will run at, from what was measured of a machine.

A generated token reads every weight of the language model once, so

    seconds = sum over matrices: bytes / weights(bits)                  the products, at the rate of their kernels
            + entries / delta                                           DeltaNet states, read and written
            + multiply-adds / attention                                 with all tokens before it
            + layers / layers rate                                      norms, gates, waiting between small matrices
            + 1 / tokens                                                what there is once, most of it in Python

A prompt computes, and its weights are read once for hundreds of tokens, so per token

    seconds = sum over matrices: weights / products(bits)               multiply-adds
            + multiply-adds / prompt attention                          with those before it: grows with the prompt
            + entries / prompt delta
            + values / values rate                                      norms, gates, convolution

where the head counts once, and every chunk reads all weights. Where part of them does not stay in memory, a token and a
chunk both take as much longer as reading that part anew takes. Everything else (the tokenizer, sampling) is left out.
docs/reference/fit.md has how near this comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from edgeq.backends.ops import Ops
from edgeq.config import TextConfig
from edgeq.machine.facts import Facts
from edgeq.memory.plan import Planned, prefill_chunk
from edgeq.weights import Part, Role

__all__ = ["Speed", "delta_entries", "expected_speed", "values_per_token"]


class Speed(NamedTuple):
    """Tokens a second: of a prompt that fills the context, on average; of generation at its end."""

    prompt: float
    generated: float


def expected_speed(
    model: Planned, ops: Ops[Any, Any], facts: Facts, context: int, *, chunk: int | None = None,
    reading_anew: float = 0.0,
) -> Speed:  # fmt: skip
    """What a machine with these facts is expected to do; the KV cache is of the type that `ops` keeps.

    chunk: tokens of a prompt that go through together. reading_anew: seconds that every pass takes longer where part
    of the weights does not stay.
    """
    work, c = _Work.of(model), model.config.text
    chunk = min(context, chunk or prefill_chunk(c, ops))
    prompt = _prompt_seconds(work, c, ops, facts, context, chunk) + reading_anew * -(-context // chunk)
    return Speed(context / prompt, 1 / (_token_seconds(work, c, ops, facts, context) + reading_anew))


class _Work(NamedTuple):
    """Weights of the language model by the bits whose kernels run, without an embedding's that is not the head; of the
    head apart; and bytes of all of them."""

    weights: Mapping[str, int]
    head: tuple[str, int]
    nbytes: Mapping[str, int]

    @classmethod
    def of(cls, model: Planned) -> _Work:
        weights, nbytes = dict[str, int](), dict[str, int]()
        head = ("16", 0)
        tied = model.config.text.tie_word_embeddings
        for spec, _ in model.storage():
            if spec.part is not Part.TEXT or not spec.is_matrix:
                continue
            is_head = spec.name == ("embed_tokens.weight" if tied else "lm_head.weight")
            if spec.role is Role.EMBEDDING and not is_head:
                continue  # a row of it is read
            size = model.memory_nbytes(spec)
            kind = _kind(8 * size / spec.size)
            nbytes[kind] = nbytes.get(kind, 0) + size
            if is_head:
                head = kind, spec.size
            else:
                weights[kind] = weights.get(kind, 0) + spec.size
        return cls(weights, head, nbytes)


def _kind(bits: float) -> str:
    """The measured kernels that a matrix is nearest to; scales and biases add half a bit or so to its codes'."""
    return next(kind for kind, most in (("4", 5.2), ("6", 7.2), ("8", 11.0), ("16", float("inf"))) if bits <= most)


def _token_seconds(work: _Work, c: TextConfig, ops: Ops[Any, Any], facts: Facts, position: int) -> float:
    products = sum(nbytes / _rate(facts.weights, kind) for kind, nbytes in work.nbytes.items())
    attention = _attention_macs(c) * position / _rate(facts.attention, ops.kv_dtype)
    beside = len(c.layer_types) / facts.layers + 1 / facts.tokens
    return products + delta_entries(c) / facts.delta + attention + beside


def _prompt_seconds(work: _Work, c: TextConfig, ops: Ops[Any, Any], facts: Facts, tokens: int, chunk: int) -> float:
    each = sum(size / _rate(facts.products, kind) for kind, size in work.weights.items())
    each += _attention_macs(c) * (tokens + 1) / 2 / _rate(facts.prompt_attention, ops.kv_dtype)
    each += delta_entries(c) / facts.prompt_delta + values_per_token(c) / facts.values
    kind, size = work.head
    read = sum(nbytes / _rate(facts.weights, kind) for kind, nbytes in work.nbytes.items())
    head = work.nbytes.get(kind, 0) / _rate(facts.weights, kind) if size else 0.0
    least = read * -(-tokens // chunk)  # a chunk of a few tokens reads weights all the same
    return max(tokens * each, least) + head


def _rate(rates: Mapping[str, float], kind: str) -> float:
    """The rate of a kind; where it was not measured, the least of all."""
    return rates.get(kind) or min(rates.values())


def _attention_macs(c: TextConfig) -> int:
    """Multiply-adds of a token with each token before it."""
    return 2 * c.attention_dim * c.layer_types.count("full_attention")


def delta_entries(c: TextConfig) -> int:
    """Entries of the DeltaNet states, all of which a token updates."""
    heads = c.linear_num_value_heads * c.layer_types.count("linear_attention")
    return heads * c.linear_value_head_dim * c.linear_key_head_dim


def values_per_token(c: TextConfig) -> int:
    """Numbers that norms, gates, the convolution, rotations and sums work through between the products, for a token."""
    both = 4 * c.hidden_size + c.intermediate_size
    delta = both + c.conv_dim + 2 * c.key_dim + c.value_dim
    attention = both + 3 * c.attention_dim + 2 * c.kv_dim
    return sum(delta if kind == "linear_attention" else attention for kind in c.layer_types)
