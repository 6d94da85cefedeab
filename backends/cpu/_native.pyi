"""Types of the native module; tests/test_native_stub.py compares names and parameters with it.

Arrays are float32 where nothing else is said, inputs with a contiguous last axis, outputs contiguous and made by the
caller. What each function does is in its docstring and beside its kernel.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, final, overload

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.bf16 import Array, Float32

Ids = NDArray[np.int32]
Words = NDArray[np.uint32]
S = TypeVar("S", bound=tuple[Any, ...])

KV_PAGE: int
"""Tokens of a page."""

# --- matrices, instruction sets, threads ------------------------------------------------------------------------------

@final
class Matrix:
    @overload
    def __new__(
        cls,
        codes: Words,
        scales: Array,
        biases: Array | None,
        bits: int,
        group_size: int,
        block_scales: Array | None = None,
        block_biases: Array | None = None,
        zero: int = 0,
        mode: str = "affine",
    ) -> Matrix: ...
    @overload
    def __new__(cls, values: Array) -> Matrix: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def bits(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def zero(self) -> int: ...
    @property
    def mode(self) -> str: ...
    @property
    def arrays(self) -> tuple[Any, ...]: ...
    @property
    def nbytes(self) -> int: ...

def linear(x: Float32, w: Matrix, out: Float32) -> None: ...
def linears(x: Float32, ws: Iterable[Matrix], outs: Iterable[Float32]) -> None: ...
def read_out(x: Float32, w: Matrix, out: Float32) -> bool: ...
def embed(table: Matrix, ids: Ids, out: Float32) -> None: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def thread_count() -> int: ...
def set_thread_count(threads: int) -> None: ...
def start_threads() -> int: ...

# --- norms and pointwise ----------------------------------------------------------------------------------------------

def add(x: Float32, y: Float32, out: Float32) -> None: ...
def silu_mul(gate: Float32, up: Float32, out: Float32) -> None: ...
def sigmoid_mul(x: Float32, gate: Float32, out: Float32) -> None: ...
def rms_norm(x: Float32, gain: Float32, gate: Float32 | None, eps: float, out: Float32) -> None: ...
def l2_norm(x: Float32, eps: float, out: Float32) -> None: ...

# --- DeltaNet and attention between their projections -----------------------------------------------------------------

def causal_conv_silu(x: Float32, w: Float32, tail: Float32, out: Float32) -> None: ...
def delta_rule(
    q: Float32,
    k: Float32,
    v: Float32,
    g: Float32,
    beta: Float32,
    state: Float32,
    after: Iterable[Float32],
    out: Float32,
) -> None: ...
def rope_angles(
    positions: Ids, frequencies: Float32, factor: float, sections: tuple[int, int, int], cos: Float32, sin: Float32
) -> None: ...  # fmt: skip
def rope(x: Float32, cos: Float32, sin: Float32, out: Float32) -> None: ...

@final
class StateArray:
    def __init__(self) -> None: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def memory(self) -> list[tuple[int, int]]: ...
    def __getattr__(self, name: str) -> Any: ...

@final
class Page:
    written: int
    @overload
    def __init__(self, dtype: str, heads: int, dim: int) -> None: ...
    @overload
    def __init__(self, dtype: str, heads: int, dim: int, memory: NDArray[np.uint8]) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def data(self) -> NDArray[np.uint8]: ...
    def copy(self, tokens: int = 256) -> Page: ...
    def read(self, keys: Float32, values: Float32) -> None: ...

def append(k: Float32, v: Float32, past: int, pages: Iterable[Page]) -> None: ...
def attention(q: Float32, k: Float32, v: Float32, past: int, pages: Iterable[Page], out: Float32) -> None: ...

# --- larger pieces ----------------------------------------------------------------------------------------------------

def mlp(x: Float32, w: Iterable[Matrix], out: Float32) -> None: ...
def delta_net(
    x: Float32,
    w: Iterable[Float32 | Matrix],
    key_heads: int,
    eps: float,
    states: Iterable[Iterable[Float32]],
    lengths: Iterable[int],
    keep: Iterable[int],
    kind: type[S],
    out: Float32,
) -> list[tuple[S, ...]]: ...
def gated_attention(
    x: Float32,
    w: Iterable[Float32 | Matrix],
    eps: float,
    cos: Float32,
    sin: Float32,
    caches: Iterable[tuple[int, Iterable[Page]]],
    lengths: Iterable[int],
    out: Float32,
) -> None: ...

@final
class Layers:
    def __init__(
        self,
        layers: Iterable[Iterable[Any]],
        key_heads: int,
        eps: float,
        norm: Float32,
        frequencies: Float32,
        factor: float,
        sections: tuple[int, int, int],
    ) -> None: ...
    def call_after_each(self, call: Callable[[int], object]) -> None: ...

def decoder(
    x: Float32,
    layers: Layers,
    positions: Ids,
    states: Iterable[Iterable[Any]],
    lengths: Iterable[int],
    keep: Iterable[int],
    kind: type[tuple[Any, ...]],
    out: Float32,
) -> list[Any]: ...
def decoder_layers(
    x: Float32,
    layers: Iterable[Iterable[Any]],
    key_heads: int,
    eps: float,
    cos: Float32,
    sin: Float32,
    states: Iterable[Iterable[Any]],
    lengths: Iterable[int],
    keep: Iterable[int],
    kind: type[tuple[Any, ...]],
    out: Float32,
) -> list[Any]: ...

# --- the vision tower -------------------------------------------------------------------------------------------------

def layer_norm(x: Float32, gain: Float32, bias: Float32, eps: float, out: Float32) -> None: ...
def gelu(x: Float32, exact: bool, out: Float32) -> None: ...
def affine(x: Float32, w: Matrix, bias: Float32, out: Float32) -> None: ...
def full_attention(q: Float32, k: Float32, v: Float32, lengths: Iterable[int], out: Float32) -> None: ...
def vision_blocks(
    x: Float32,
    blocks: Iterable[Iterable[Any]],
    heads: int,
    eps: float,
    cos: Float32,
    sin: Float32,
    lengths: Iterable[int],
    out: Float32,
) -> None: ...
def vision_nbytes(tokens: int, hidden: int, heads: int, intermediate: int) -> int: ...

# --- memory -----------------------------------------------------------------------------------------------------------

def empty(nbytes: int) -> NDArray[np.uint8]: ...
def memory_held() -> tuple[int, int, int]: ...
def release_scratch() -> None: ...
def release_idle_blocks() -> None: ...
def idle_blocks(nbytes: int) -> int: ...

# --- the quantizer ----------------------------------------------------------------------------------------------------

def quantize(
    x: Float32,
    bits: int,
    group_size: int,
    stored: str,
    words: Words,
    scales: Float32,
    biases: Float32,
    errors: Float32,
) -> None: ...

# --- files that are cut short while they are mapped -------------------------------------------------------------------

def guard_install() -> None: ...
def guard_add(begin: int, size: int, path: str) -> int: ...
def guard_forget(number: int) -> None: ...
def guard_hit(number: int) -> bool: ...
def guard_zeros(wanted: bool) -> bool: ...
