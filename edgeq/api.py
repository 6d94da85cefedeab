"""The model that a user holds.

model = load("Qwen/Qwen3.5-2B")                   # a folder, a .gguf file, a Hugging Face ID, or "demo"
logits, state = model.forward(ids, model.state())
for piece in model.generate("Once upon a time", max_tokens=64): ...
chat = model.chat(thinking=True)                  # see edgeq.session.chat
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeq.backends import select
from edgeq.backends.ops import Ops
from edgeq.checkpoint import Checkpoint, open_checkpoint
from edgeq.config import stretched
from edgeq.engine import Engine
from edgeq.errors import UsageError
from edgeq.formats.bf16 import Float32
from edgeq.generate import Decoding, GenerationSettings
from edgeq.hub import find_model
from edgeq.session.context import Context, Progress
from edgeq.session.language import Language
from edgeq.session.reply import PlainText, Reply
from edgeq.state import State

if TYPE_CHECKING:
    from edgeq.session.chat import Chat
    from edgeq.text.template import ChatTemplate
    from edgeq.text.tokenizer import Tokenizer

__all__ = ["Model", "load"]

KV_DTYPES = {16: "f16", 8: "int8", 4: "int4"}  # by bits


def load(
    model: str | Path, *, backend: str = "auto", threads: int | None = None, context: int | None = None,
    kv_bits: int | None = None, rope_scaling: str | None = None, mmproj: str | Path | None = None,
) -> Model:  # fmt: skip
    """Load a model.

    model: a checkpoint folder, a .gguf file, a Hugging Face ID ("Qwen/Qwen3.5-2B"), a short name ("qwen3.5:2b") or
    "demo".
    backend: "auto", "numpy", "cpu", "mlx", or the name of an installed plug-in.
    threads: for backends that have their own; None lets the backend choose.
    context: the context window in tokens; None is the model's maximum.
    kv_bits: 16, 8 or 4, the precision of the KV cache; None lets the backend choose (docs/concepts/backends.md).
    rope_scaling: "yarn:4" for four times the context, "linear:2" or "none"; None is what the checkpoint says.
    mmproj: the vision tower of a .gguf file; None takes the one in it, or beside it, that fits.
    """
    if kv_bits not in (None, *KV_DTYPES):
        raise UsageError(f"keys and values cannot be kept in {kv_bits} bits", hint="choose 16, 8 or 4 bits")
    checkpoint = open_checkpoint(find_model(model), None if mmproj is None else Path(mmproj))
    if rope_scaling is not None:
        checkpoint.config = stretched(checkpoint.config, rope_scaling)
    kv_dtype = None if kv_bits is None else KV_DTYPES[kv_bits]
    ops = select(None if backend == "auto" else backend, threads=threads, kv_dtype=kv_dtype)
    return Model(checkpoint, ops, context=context)


class Model:
    """A checkpoint on a backend: logits, resumable states, completion and chat. It holds no sequence: states are values
    that you keep.
    """

    def __init__(self, checkpoint: Checkpoint, ops: Ops[Any, Any], *, context: int | None = None) -> None:
        self.language = Language(checkpoint)
        self.engine = Engine(checkpoint, ops, context=context)
        self.checkpoint, self.ops, self.config = checkpoint, ops, checkpoint.config
        if tokenizer := self.language.tokenizer:
            self.engine.ledger.open("tokenizer tables", lambda: tokenizer.nbytes, mapped=True)

    @property
    def context_limit(self) -> int:
        """Most tokens of a sequence."""
        return self.engine.context_limit

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, padding rows included: the length of a vector of logits."""
        return self.config.text.vocab_size

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer; None for a checkpoint without one, which still takes token ids."""
        return self.language.tokenizer

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer, or a ModelError that says what is missing."""
        return self.language.need_tokenizer()

    @property
    def template(self) -> ChatTemplate | None:
        """The chat template; None for a checkpoint without one."""
        return self.language.template

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends a text."""
        return self.language.eos_ids

    # --- logits and states -------------------------------------------------------------------------------------------

    def state(self) -> State[Any]:
        """The state of an empty sequence."""
        return self.engine.state()

    def forward(self, ids: Sequence[int], state: State[Any]) -> tuple[Float32, State[Any]]:
        """Run `ids` from `state`: the logits after the last of them, float32 [vocab_size], and the new state.

        `state` stays valid. Any split of the tokens over calls gives the same result up to rounding, and one at
        multiples of `engine.chunk` exactly the same. Raises UsageError for ids outside of the vocabulary and for a
        state of another model, MemoryBudgetError where the context is full.
        """
        context = self._context(state)
        return context.feed(ids)[-1], context.state

    def advance(self, ids: Sequence[int], state: State[Any]) -> State[Any]:
        """The state after `ids`; skips the LM head."""
        context = self._context(state)
        context.feed(ids, rows=0)
        return context.state

    def logits(self, ids: Sequence[int]) -> Float32:
        """Logits after each of `ids` from an empty state: float32 [len(ids), vocab_size]."""
        return Context(self.engine).feed(ids, rows=len(ids))

    def mtp_logits(self, ids: Sequence[int]) -> Float32:
        """What the MTP head says after each token but the first: float32 [len(ids) - 1, vocab_size], whose row k
        predicts token k + 2. Raises UsageError where there is no head.
        """
        return self.engine.mtp_logits(ids)

    def mtp_draft(self, ids: Sequence[int], n: int) -> tuple[list[int], Float32]:
        """The MTP head's n greedy drafts of what follows `ids` and the model's own most likely next token, each made
        from the one before; and what they were chosen by, float32 [n, vocab_size]. Raises UsageError where there is no
        head.
        """
        return self.engine.mtp_draft(ids, n)

    def _context(self, state: State[Any]) -> Context:
        self.engine.check_state(state)  # None would stand for an empty one
        return Context(self.engine, state)

    # --- text --------------------------------------------------------------------------------------------------------

    def generate(
        self, prompt: str | Sequence[int], *, settings: GenerationSettings | None = None, ignore_eos: bool = False,
        draft: str | int = "auto", on_prefill: Progress | None = None, **options: Any,
    ) -> Reply:  # fmt: skip
        """Continue a text or token ids as they are, without a chat template; iterate over the result's pieces.

        draft: how tokens are drafted, which changes the speed and not the text: "auto", "off", "mtp", "ngram", or a
        number of drafts for every pass (docs/guides/drafts.md).

        `options` are fields of GenerationSettings (temperature, top_p, max_tokens, seed, stop, ...). Special tokens
        spelled in a text are text; give ids to use them. `ignore_eos` keeps generating after an end token.
        """
        ids = self.language.need_tokenizer().encode(prompt) if isinstance(prompt, str) else _listed(prompt)
        chosen = (settings or GenerationSettings()).replace(**options)
        context = Context(self.engine, speculation=self.language.speculation(self.engine, draft), on_prefill=on_prefill)
        decoding = Decoding(
            ids, self.language.sampler(chosen), room=context.room, eos_ids=() if ignore_eos else self.eos_ids
        )
        tokens = context.tokens(decoding)
        return Reply(decoding, PlainText(self.tokenizer), tokens, chosen.stop, cached=0, prompt=len(ids))

    def chat(
        self, *, thinking: bool | None = None, system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None, settings: GenerationSettings | None = None,
        draft: str | int = "auto", on_prefill: Progress | None = None, **options: Any,
    ) -> Chat:  # fmt: skip
        """Start a conversation. thinking: None is the chat template's default. See `edgeq.session.chat.Chat`."""
        from edgeq.session.chat import Chat  # its templates' library takes 25 ms and 8 MB

        return Chat(
            self,
            thinking=thinking,
            system=system,
            tools=tools,
            settings=settings,
            draft=draft,
            on_prefill=on_prefill,
            **options,
        )


def _listed(ids: object) -> list[int]:
    """Token ids as a list; UsageError for what is neither text nor ids."""
    found: list[Any] = list(ids) if isinstance(ids, Iterable) and not isinstance(ids, bytes | bytearray) else [None]
    if not all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in found):
        raise UsageError("a prompt must be a text or a sequence of token ids", hint="decode bytes first")
    return found
