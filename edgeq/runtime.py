"""A loaded model: logits, resumable states, raw completion.

model = load("Qwen/Qwen3.5-2B")                   # a folder, a .gguf file, a hub id, or "demo"
logits, state = model.forward(ids, model.state())
for piece in model.generate("Once upon a time", max_tokens=64): ...
chat = model.chat(thinking=True)                  # see edgeq.chat
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeq.backends import select
from edgeq.backends.ops import Ops
from edgeq.checkpoint import Checkpoint, open_checkpoint
from edgeq.context import Context
from edgeq.errors import MemoryBudgetError, ModelError, UsageError
from edgeq.formats.bf16 import Float32
from edgeq.generate import THINKING_CUT, Decoding, GenerationSettings, Sampler, ThinkTokens
from edgeq.hub import find_model
from edgeq.model import text
from edgeq.reply import PlainText, Reply, Transcript
from edgeq.state import State
from edgeq.weights import map_text

if TYPE_CHECKING:
    from edgeq.chat import Chat
    from edgeq.text.template import ChatTemplate
    from edgeq.text.tokenizer import Tokenizer

__all__ = ["Model", "load"]

KV_DTYPES = {16: "f16", 8: "int8", 4: "int4"}  # by bits

ALL_LOGITS = 64  # tokens read out at a time where every position's logits are wanted


def load(
    model: str | Path, *, backend: str = "auto", threads: int | None = None, context: int | None = None,
    kv_bits: int | None = None,
) -> Model:  # fmt: skip
    """Load a model.

    model: a checkpoint folder, a .gguf file, a hub id ("Qwen/Qwen3.5-2B"), or "demo".
    backend: "auto", "numpy", "cpu", "mlx", or the name of an installed plug-in.
    threads: for backends that have their own; None lets the backend choose.
    context: most tokens of a sequence; None is what the model was made for.
    kv_bits: 16, 8 or 4 for keys and values in the cache; None lets the backend choose (docs/backends.md).
    """
    if kv_bits not in (None, *KV_DTYPES):
        raise UsageError(f"keys and values cannot be kept in {kv_bits} bits", hint="--kv-bits is one of 16, 8, 4")
    checkpoint = open_checkpoint(find_model(model))
    kv_dtype = None if kv_bits is None else KV_DTYPES[kv_bits]
    ops = select(None if backend == "auto" else backend, threads=threads, kv_dtype=kv_dtype)
    return Model(checkpoint, ops, context=context)


class Model:
    """A checkpoint on a backend. Holds no sequence: states are values that the caller keeps.

    `tokenizer` and `template` are None for a checkpoint without them; token ids still work.
    """

    def __init__(self, checkpoint: Checkpoint, ops: Ops[Any], *, context: int | None = None) -> None:
        self.checkpoint, self.ops = checkpoint, ops
        self.config = checkpoint.config
        self.context_limit = _context_limit(context, self.config.text.max_position_embeddings)
        self.tokenizer: Tokenizer | None = checkpoint.tokenizer()
        self._check_tokenizer()
        ops.limit_memory()
        self._weights = map_text(checkpoint.text_weights(), ops.load, ops.prepare)
        checkpoint.drop_pages()  # where the backend has copies of its own, the file's pages need not stay

    def _check_tokenizer(self) -> None:
        if self.tokenizer is not None and self.tokenizer.vocab_size > self.vocab_size:
            raise ModelError(
                f"{self.checkpoint.path}: the tokenizer has {self.tokenizer.vocab_size} tokens, "
                f"the model {self.vocab_size}",
                hint="the tokenizer files belong to another model",
            )

    # --- the model itself --------------------------------------------------------------------------------------------

    @property
    def prefill(self) -> int:
        """Tokens of a prompt that go through the model together.

        What lies between a layer's projections grows with them: a 4B takes fewer, a little slower, to stay in 2.75 GB.
        """
        return 512 if self.config.text.hidden_size <= 2048 else 192

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The chat template; read when it is first wanted, because its library takes 25 ms and 8 MB."""
        return self.checkpoint.template()

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, padding rows included: the length of a vector of logits."""
        return self.config.text.vocab_size

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends a text: of the configuration files and the tokenizer together."""
        ids = self.checkpoint.eos_token_ids + (self.tokenizer.eos_token_ids if self.tokenizer else ())
        return frozenset(i for i in ids if i < self.vocab_size)

    def state(self) -> State[Any]:
        """The state of an empty sequence."""
        return text.initial_state(self.ops, self.config.text)

    def forward(self, ids: Sequence[int], state: State[Any]) -> tuple[Float32, State[Any]]:
        """Run `ids` from `state`: the logits after the last of them, float32 [vocab_size], and the new state.

        Any split of the tokens over calls gives the same; `state` stays valid. Raises UsageError for ids that the
        vocabulary does not have, MemoryBudgetError where the context is full.
        """
        tokens = self._checked(ids, state)
        for start in range(0, len(tokens), self.prefill):
            hidden, state = self._run(tokens[start : start + self.prefill], state)
        return self._last_logits(hidden), state

    def advance(self, ids: Sequence[int], state: State[Any]) -> State[Any]:
        """The state after `ids`, for who wants no logits: the head is not run."""
        tokens = self._checked(ids, state)
        for start in range(0, len(tokens), self.prefill):
            _, state = self._run(tokens[start : start + self.prefill], state)
        return state

    def logits(self, ids: Sequence[int]) -> Float32:
        """Logits after each of `ids` from an empty state: float32 [len(ids), vocab_size]."""
        state = self.state()
        tokens = self._checked(ids, state)
        out = np.empty((len(tokens), self.vocab_size), np.float32)
        for start in range(0, len(tokens), self.prefill):
            hidden, state = self._run(tokens[start : start + self.prefill], state)
            for row in range(0, hidden.shape[0], ALL_LOGITS):
                rows = text.logits(self.ops, self._weights, hidden[row : row + ALL_LOGITS])
                out[start + row : start + row + rows.shape[0]] = self.ops.numpy(rows)
        return out

    def _run(self, tokens: NDArray[np.int32], state: State[Any]) -> tuple[Any, State[Any]]:
        batch = text.text_batch([tokens], [state])
        with np.errstate(all="ignore"):  # a damaged checkpoint shows in its logits, in one clear message
            hidden, states = text.forward(self.ops, self.config.text, self._weights, batch, [state])
        return hidden, states[0][-1]

    def _last_logits(self, hidden: Any) -> Float32:
        logits: Float32 = self.ops.numpy(text.logits(self.ops, self._weights, hidden[-1:]))[0]
        if not np.isfinite(logits).all():
            culprit = self.checkpoint.find_non_finite()
            raise ModelError(
                f"{self.checkpoint.path}: the model's output is not a number"
                + (f", because {culprit} holds NaN or infinity" if culprit else ""),
                hint="the checkpoint is damaged; fetch or quantize it again",
            )
        return logits

    def _checked(self, ids: Sequence[int], state: State[Any]) -> NDArray[np.int32]:
        """`ids` as an array, if the vocabulary has them and the context has room."""
        if len(ids) == 0:
            raise UsageError("there are no tokens to run", hint="give at least one token id")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise UsageError(f"token id {wrong} is outside of the vocabulary of {self.vocab_size}")
        if state.length + len(ids) > self.context_limit:
            raise MemoryBudgetError(
                f"{state.length + len(ids)} tokens do not fit the context of {self.context_limit}",
                hint="shorten the text or use a larger context",
            )
        return np.asarray(ids, np.int32)

    # --- text --------------------------------------------------------------------------------------------------------

    def generate(
        self, prompt: str | Sequence[int], *, settings: GenerationSettings | None = None, ignore_eos: bool = False,
        on_prefill: Callable[[int, int], None] | None = None, **options: Any,
    ) -> Reply:  # fmt: skip
        """Continue a text or token ids as they are, without a chat template; iterate over the result's pieces.

        `options` are fields of GenerationSettings (temperature, top_p, max_tokens, seed, stop, ...). Control tokens
        spelled in a text are text; give ids to use them. `ignore_eos` goes on past the end of a text.
        """
        if isinstance(prompt, str):
            prompt = self.need_tokenizer().encode(prompt)
        chosen = (settings or GenerationSettings()).replace(**options)
        decoding = Decoding(
            Context(self, on_prefill=on_prefill), list(prompt), self.sampler(chosen),
            eos_ids=() if ignore_eos else self.eos_ids,
        )  # fmt: skip
        transcript: Transcript = PlainText(self.tokenizer)
        return Reply(decoding, transcript, chosen.stop, cached=0, prompt=len(prompt))

    def chat(
        self, *, thinking: bool | None = None, system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None, settings: GenerationSettings | None = None,
        on_prefill: Callable[[int, int], None] | None = None, **options: Any,
    ) -> Chat:  # fmt: skip
        """Start a conversation. thinking: None is the chat template's default. See `edgeq.chat.Chat`."""
        from edgeq.chat import Chat

        return Chat(
            self, thinking=thinking, system=system, tools=tools, settings=settings, on_prefill=on_prefill, **options
        )

    def sampler(self, settings: GenerationSettings) -> Sampler:
        """A sampler over the tokens that exist; the vocabulary's padding rows are never drawn."""
        tokens = self.tokenizer.vocab_size if self.tokenizer else self.vocab_size
        return Sampler(settings, vocab_size=min(tokens, self.vocab_size))

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer, or a ModelError that says what is missing."""
        if self.tokenizer is None:
            raise ModelError(
                f"{self.checkpoint.path} has no tokenizer.json, which text needs",
                hint="copy the tokenizer files of the original checkpoint into it, or give token ids",
            )
        return self.tokenizer

    def think_tokens(self) -> ThinkTokens | None:
        """The ids around a thinking block and of its forced end, if the tokenizer has thinking."""
        tokenizer = self.need_tokenizer()
        opened, closed = tokenizer.token_id("<think>"), tokenizer.token_id("</think>")
        if opened is None or closed is None:
            return None
        return ThinkTokens(opened, closed, tuple(tokenizer.encode(THINKING_CUT)), tuple(tokenizer.encode("\n\n")))


def _context_limit(asked: int | None, most: int) -> int:
    if asked is None:
        return most
    if not 1 <= asked <= most:
        raise UsageError(f"a context of {asked} tokens is not possible; this model takes 1 to {most}")
    return asked
