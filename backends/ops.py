"""The seam: everything the model asks of a backend.

The model (`edgeq.model`) is written once against these operations and treats arrays (A) as opaque, apart from what
every array type offers: `shape`, slicing and `reshape`. Matrices (M) are whatever a backend multiplies by, made once,
when they are loaded. The NumPy backend is the specification of each operation; any other backend is held to it by one
suite (tests/test_ops.py).

Shapes: T tokens; Hq, Hkv attention heads of width D; Hk, Hv DeltaNet heads of widths K, V; C channels.
T may hold the tokens of several sequences one after another (`Batch.lengths`); only `delta_net` and
`gated_attention` care, and hand each sequence to the stateful operations by itself.

The larger pieces (`linears`, `mlp`, `delta_net`, `gated_attention`, `decoder_layers`, `vision_blocks`) have a body in
terms of the small ones, which backends inherit (`edgeq.backends.base`); they override one only where they have
something fused, and must agree with the body.

**Exactness.** On every backend: an operation is a function of its arguments; the same call gives the same bits; a state
that was given is left as it was; prompts are cut at absolute multiples of the chunk (`Engine.cut`), so that going on
from a state at such a place makes the very calls of a run from the beginning, and gives its bits.

The native CPU backend promises more, bit for bit (tests/test_exactness.py has a test by the name of each):

* results do not depend on the number of threads;
* a token's do not depend on other sequences in the same call: while the call has at most 16 rows, and likewise while it
  has more;
* verifying up to 16 tokens in one call, whatever it keeps, equals decoding them one by one, and they may be spread over
  calls of up to 16 rows in any way;
* a prompt may be cut at any multiple of 32 tokens, counted from where its call began.

What differs: a token in a call of up to 16 rows from the same token in a larger one, because matrices add the sums of
their groups in two orders and the delta rule takes two tokens at a time. NMSE of the logits over 96 tokens, decoded
against one prompt: 2e-11 (demo model, bfloat16), 2e-4 and 5e-5 (two trained models of 4 bits, where an activation now
and then rounds to another int8). NumPy's and MLX's own products choose an order by the shape of their input: 1e-12
between any two ways of cutting a text, on both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeq.config import RopeConfig, TextConfig, VisionConfig
from edgeq.formats.bf16 import Array, Float32
from edgeq.state import DeltaState, KVCache, LayerState, State
from edgeq.weights import (
    AttentionWeights,
    DeltaNetWeights,
    LayerWeights,
    Matrix,
    MLPWeights,
    TextWeights,
    VisionBlockWeights,
)

__all__ = ["Angles", "ArrayLike", "Ops"]


class ArrayLike(Protocol):
    """What the model may do with a backend's array without asking the backend."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __getitem__(self, index: Any, /) -> Any: ...
    @property
    def reshape(self) -> Callable[..., Any]: ...


A = TypeVar("A", bound=ArrayLike)
M = TypeVar("M")
Angles = tuple[A, A]
"""Cosine and sine of the rotary angles, each [T, rotary dim / 2]."""


class Ops(ABC, Generic[A, M]):
    """A backend's operations on its arrays A and matrices M. One object may serve several models; it holds no model and
    no sequence.
    """

    name: ClassVar[str]
    kv_dtype: str = "f32"
    """Type of the keys and values it keeps."""
    maps_files: ClassVar[bool] = True
    """Whether matrices are used where the file is mapped; else they are copied when they are loaded."""

    maps_states: bool = True
    """Whether states that are read from a file stay where it is mapped, if the backend can use them there. Under a
    ceiling they are copied: what has not been read yet of a file would not be counted."""

    few: ClassVar[int | None] = 1
    """Most tokens of a sequence that may share a call and each have the bits of a call of its own; None where that is
    not promised for any number."""
    grain: ClassVar[int | None] = None
    """A prompt may be cut after any multiple of so many tokens, counted from where its call began, without changing a
    bit, if more than `few` are left; None where only multiples of the chunk will do."""

    keeps_ceiling: ClassVar[bool] = True
    """Whether the resident set is what was claimed: false where a library allocates as it likes."""

    @property
    def threads(self) -> int | None:
        """How many threads share its work; None where it has none of its own."""
        return None

    @classmethod
    def describe(cls) -> str:
        """How it runs on this machine, in a few words: library, instruction set, device."""
        return "available"

    def limit_memory(self, nbytes: int | None = None) -> None:
        """Hold weights, states and work to `nbytes`, or None to what the machine recommends: for a backend whose
        memory is its own to manage. Called before a model is loaded."""

    # What it will cost, before anything is loaded (edgeq.memory.plan): bytes.

    process_nbytes: ClassVar[int] = 50_000_000
    """The process itself with this backend and a tokenizer, before any weight: the resident set, measured."""

    def state_nbytes(self, c: TextConfig) -> int:
        """The DeltaNet states of a sequence."""
        matrix = c.linear_num_value_heads * c.linear_value_head_dim * c.linear_key_head_dim
        conv = (c.linear_conv_kernel_dim - 1) * c.conv_dim
        return 4 * (matrix + conv) * c.layer_types.count("linear_attention")

    def kv_nbytes(self, c: TextConfig, tokens: int) -> int:
        """The keys and values of a sequence, spare room included."""
        entries = 2 * c.num_key_value_heads * c.head_dim * c.layer_types.count("full_attention")
        return 4 * entries * -(-tokens // 256) * 256

    def scratch_nbytes(self, c: TextConfig, tokens: int) -> int:
        """What a call with `tokens` tokens takes to work in, hidden states included."""
        widest = max(2 * c.intermediate_size, c.conv_dim + 2 * c.value_dim, 2 * (c.attention_dim + c.kv_dim))
        return 4 * tokens * (widest + 4 * c.hidden_size)

    def vision_scratch_nbytes(self, c: VisionConfig, patches: int) -> int:
        """What `patches` patches take to work in that go through the vision tower together, hidden states included."""
        return 4 * patches * (2 * c.hidden_size + 4 * c.intermediate_size)

    # What it costs now.

    def held(self) -> Mapping[str, int]:
        """Bytes that it holds now beside the weights, by what they are for ("KV cache", "DeltaNet states", "scratch"):
        each piece of memory once, however many states share it."""
        return {}

    def idle_nbytes(self, c: TextConfig) -> int:  # noqa: ARG002
        """Bytes that it has ready for the DeltaNet states of the next call, and counts as nobody's."""
        return 0

    def release_idle(self) -> None:
        """Give back to the system what was freed and is kept for the next state."""

    def release_scratch(self) -> None:
        """Give back to the system what is kept to work in."""

    def peak_memory(self) -> int | None:
        """Most bytes that a backend's own allocator has held in this process; None where all memory is the process's.
        A GPU's may be missing in the resident set."""
        return None

    # --- the edge ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def matrix(self, w: Matrix[Array]) -> M:
        """A matrix from the file (uint16: see `edgeq.formats.bf16`) as the backend multiplies by it; called once for
        each, when it is loaded, and without copying if possible. It keeps the file's memory as long as it lives."""

    @abstractmethod
    def vector(self, x: Float32) -> A:
        """A small weight (a gain, a bias, a convolution) as the backend's array."""

    def ready(self, w: TextWeights[A, M], c: TextConfig) -> TextWeights[A, M]:  # noqa: ARG002
        """The same weights in whatever form `decoder` runs them fastest; called once, when they are loaded."""
        return w

    @abstractmethod
    def array(self, x: Array) -> A:
        """A NumPy array of numbers (float32, int32) as the backend's array."""

    def activations(self, x: Float32) -> A:
        """What `numpy` gave of hidden states or features, in the type that the backend computes with."""
        return self.array(x)

    @abstractmethod
    def numpy(self, x: A) -> Float32:
        """The backend's array as float32 NumPy; waits for a lazy backend."""

    @abstractmethod
    def zeros(self, *shape: int) -> A:
        """float32 zeros."""

    @abstractmethod
    def kv_cache(self, keys: Float32, values: Float32) -> KVCache[A]:
        """A cache that holds `keys` and `values`, each [length, Hkv, D]; length may be 0."""

    @abstractmethod
    def stored_cache(
        self, blocks: Sequence[Array], length: int, heads: int, dim: int, base: KVCache[A] | None = None
    ) -> KVCache[A]:
        """The cache of `length` tokens whose `KVCache.block`s these are, bit for bit; of one of the same `kv_dtype`.

        base: has the first blocks, whole ones, in place of which `blocks` has none. Blocks that lie in a mapped file
        are used where they are, if the backend can.
        """

    @abstractmethod
    def block_like(self, heads: int, dim: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape and dtype of a block of such a cache."""

    @abstractmethod
    def concat(self, xs: Sequence[A], axis: int = 0) -> A:
        """Join along an axis."""

    def start(self, hidden: A, states: Sequence[State[A]]) -> None:
        """The model has been called and these are its results: a lazy backend sets them going, without waiting.

        Without this the graph of a long prompt, or of states that nobody reads, would grow without end.
        """

    # --- matrices ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def embed(self, table: M, ids: A) -> A:
        """Rows of `table` [vocabulary, hidden] for `ids` int32 [T] -> [T, hidden]."""

    @abstractmethod
    def linear(self, x: A, w: M) -> A:
        """y = x @ w^T: x [T, in], w [out, in] -> [T, out]."""

    def linears(self, x: A, ws: Sequence[M]) -> tuple[A, ...]:
        """Several projections of the same input."""
        return tuple(self.linear(x, w) for w in ws)

    @abstractmethod
    def affine(self, x: A, w: M, bias: A) -> A:
        """y = x @ w^T + bias: x [T, in], w [out, in], bias [out] -> [T, out]."""

    @abstractmethod
    def embedding_bag(self, table: M, ids: Array, weights: Float32) -> A:
        """Weighted sums of rows, sum_i weights[t, i] * table[ids[t, i]]: table [rows, hidden], ids int32 [T, n],
        weights float32 [T, n] -> [T, hidden]."""

    @abstractmethod
    def rows(self, w: M, rows: slice | NDArray[np.int32]) -> M:
        """Some rows of a matrix as a matrix of its own: the first ones (a slice from 0) in the memory that they have,
        where the backend can; those of a list of row numbers gathered into new memory."""

    # --- norms and pointwise -----------------------------------------------------------------------------------------

    @abstractmethod
    def layer_norm(self, x: A, gain: A, bias: A, eps: float) -> A:
        """y = (x - mean) / sqrt(variance + eps) * gain + bias over the last axis: x [..., n], gain, bias [n]."""

    @abstractmethod
    def gelu(self, x: A, exact: bool) -> A:
        """x * P(X <= x) for a standard normal X (Hendrycks & Gimpel, arXiv:1606.08415): by the error function where
        `exact`, x / 2 (1 + erf(x / sqrt(2))), else x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""

    @abstractmethod
    def rms_norm(self, x: A, gain: A, eps: float) -> A:
        """y = x / sqrt(mean(x^2) + eps) * gain over the last axis: x [..., n], gain [n]."""

    @abstractmethod
    def gated_rms_norm(self, x: A, gain: A, z: A, eps: float) -> A:
        """rms_norm(x, gain, eps) * silu(z): x, z [..., n], gain [n]; the gate is no part of the variance."""

    @abstractmethod
    def l2_norm(self, x: A, eps: float) -> A:
        """y = x / sqrt(sum(x^2) + eps) over the last axis."""

    @abstractmethod
    def add(self, x: A, y: A) -> A:
        """x + y, same shape."""

    @abstractmethod
    def silu_mul(self, gate: A, up: A) -> A:
        """silu(gate) * up, same shape."""

    @abstractmethod
    def sigmoid_mul(self, x: A, gate: A) -> A:
        """x * sigmoid(gate), same shape."""

    @abstractmethod
    def delta_gates(self, a: A, b: A, decay: A, dt_bias: A) -> tuple[A, A]:
        """DeltaNet's log decay and write strength: g = decay * softplus(a + dt_bias) and beta = sigmoid(b):
        a, b [T, Hv], decay, dt_bias [Hv] -> [T, Hv]."""

    # --- attention ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def rope_angles(self, positions: A, rope: RopeConfig) -> Angles[A]:
        """Angles of interleaved mRoPE: positions int32 [3, T] (time, height, width)."""

    @abstractmethod
    def rope(self, x: A, angles: Angles[A]) -> A:
        """Rotate the first entries of every head, pairs (i, i + dim / 2); the rest passes: x [T, H, D]."""

    @abstractmethod
    def attention(self, q: A, k: A, v: A, cache: KVCache[A]) -> tuple[A, KVCache[A]]:
        """Append k, v [T, Hkv, D] of one sequence and attend causally, scale D^-0.5: q [T, Hq, D] -> [T, Hq, D]."""

    @abstractmethod
    def full_attention(self, q: A, k: A, v: A, lengths: Sequence[int]) -> A:
        """Attend to everything within each span of `lengths`, scale D^-0.5: q, k, v [T, H, D] -> [T, H, D].

        Never holds the scores of a whole picture: its 65,000 patches would have 17 GB of them for each head.
        """

    @abstractmethod
    def append(self, k: A, v: A, cache: KVCache[A]) -> KVCache[A]:
        """The cache with k, v [T, Hkv, D] of one sequence behind it: `attention` that nobody asks."""

    # --- DeltaNet ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def causal_conv_silu(self, x: A, w: A, tail: A, keep: int = 0) -> tuple[A, tuple[A, ...]]:
        """Depthwise causal convolution of one sequence, then SiLU.

        x [T, C], w [C, width], tail [width - 1, C] (the inputs before x) -> y [T, C] and keep + 1 tails, entry i
        being the tail after T - keep + i tokens.
        """

    @abstractmethod
    def delta_rule(self, q: A, k: A, v: A, g: A, beta: A, state: A, keep: int = 0) -> tuple[A, tuple[A, ...]]:
        """Gated delta rule of one sequence (Yang et al., "Gated Delta Networks", arXiv:2412.06464).

        For every token and value head h with its key head h // (Hv / Hk):
            S <- exp(g) S;  d = beta (v - S k);  S <- S + d k^T;  o = K^-0.5 S q
        q, k [T, Hk, K] of unit length, v [T, Hv, V], g, beta [T, Hv], state S [Hv, V, K] -> o [T, Hv, V] and
        keep + 1 states, entry i being S after T - keep + i tokens.
        """

    # --- larger pieces -----------------------------------------------------------------------------------------------

    @abstractmethod
    def read_out(self, x: A, head: M) -> tuple[Float32, bool]:
        """The logits x @ head^T as float32 NumPy, and whether all are finite: x [T, hidden] -> [T, vocabulary]."""

    @abstractmethod
    def mlp(self, x: A, w: MLPWeights[M]) -> A:
        """Feed-forward of a layer: x [T, hidden] -> [T, hidden]."""

    @abstractmethod
    def delta_net(
        self, x: A, w: DeltaNetWeights[A, M], c: TextConfig, states: Sequence[DeltaState[A]], lengths: Sequence[int],
        keep: Sequence[int],
    ) -> tuple[A, list[tuple[DeltaState[A], ...]]]:  # fmt: skip
        """Gated DeltaNet mixer: x [T, hidden] -> [T, hidden] and keep[i] + 1 states for sequence i."""

    @abstractmethod
    def gated_attention(
        self, x: A, w: AttentionWeights[A, M], c: TextConfig, angles: Angles[A], caches: Sequence[KVCache[A]],
        lengths: Sequence[int],
    ) -> tuple[A, list[KVCache[A]]]:  # fmt: skip
        """Gated attention mixer: x [T, hidden] -> [T, hidden] and the longer cache of each sequence."""

    @abstractmethod
    def decoder_layers(
        self, x: A, ws: Sequence[LayerWeights[A, M]], c: TextConfig, angles: Angles[A],
        states: Sequence[Sequence[LayerState[A]]], lengths: Sequence[int], keep: Sequence[int],
    ) -> tuple[A, list[list[tuple[LayerState[A], ...]]]]:  # fmt: skip
        """Some decoder layers after one another: x [T, hidden] -> [T, hidden].

        states[l][i] is the state of sequence i before layer l of `ws`; the result has keep[i] + 1 states in its place,
        the last of them after all of the sequence's tokens.
        """

    @abstractmethod
    def decoder(
        self, x: A, w: TextWeights[A, M], c: TextConfig, positions: NDArray[np.int32],
        states: Sequence[Sequence[LayerState[A]]], lengths: Sequence[int], keep: Sequence[int],
    ) -> tuple[A, list[list[tuple[LayerState[A], ...]]]]:  # fmt: skip
        """All layers of the language model and its final norm: vectors x [T, hidden], which stand at `positions`
        int32 [3, T], -> hidden states [T, hidden]; states as of `decoder_layers`."""

    @abstractmethod
    def vision_blocks(
        self, x: A, ws: Sequence[VisionBlockWeights[A, M]], c: VisionConfig, angles: Angles[A], lengths: Sequence[int]
    ) -> A:
        """The blocks of the vision tower after one another: x [T, hidden] -> [T, hidden], T patches of frames of
        `lengths`, which do not attend to one another."""
