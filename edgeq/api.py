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
from edgeq.cache_check import check_cache
from edgeq.checkpoint import Checkpoint, open_checkpoint
from edgeq.config import stretched
from edgeq.engine import Engine, checked_context
from edgeq.errors import MemoryBudgetError, UsageError
from edgeq.formats.bf16 import Float32
from edgeq.generate import Decoding, GenerationSettings
from edgeq.hub import find_model
from edgeq.inputs import exists, expand_user
from edgeq.memory.budget import Budget
from edgeq.memory.ceiling import Ceiling, Size, ceiling
from edgeq.memory.choice import Asked, Choice, choose_settings, taken, tell, warn_of_swapping
from edgeq.memory.pages import lock_pages, read_ahead, weights_in_order
from edgeq.printable import brief
from edgeq.session.context import Context, Progress
from edgeq.session.language import Language
from edgeq.session.prefix_files import PrefixFolder, folder_size
from edgeq.session.prefixes import PrefixStore
from edgeq.session.prompt import Prompt
from edgeq.session.reply import PlainText, Reply
from edgeq.session.sight import Sight
from edgeq.state import State

if TYPE_CHECKING:
    from edgeq.session.chat import Chat
    from edgeq.session.visual_settings import VisualSettings
    from edgeq.text.template import ChatTemplate, Content, Message
    from edgeq.text.tokenizer import Tokenizer

__all__ = ["Model", "load", "load_session"]

KV_DTYPES = {16: "f16", 8: "int8", 4: "int4"}  # by bits


def load(
    model: str | Path, *, backend: str = "auto", threads: int | None = None, context: int | None = None,
    kv_bits: int | None = None, rope_scaling: str | None = None, mmproj: str | Path | None = None,
    adapter: str | Path | Sequence[str | Path] | None = None, chat_template: str | Path | None = None,
    memory: Size | None = None, lock: bool = False, on_read: Progress | None = None,
) -> Model:  # fmt: skip
    """Load a model. Weights that are not in memory are read ahead, in the order of their use.

    model: a checkpoint folder, a .gguf file, a Hugging Face ID ("Qwen/Qwen3.5-2B", "OWNER/NAME:Q4_K_M"), a short name
    ("qwen3.5:2b"), a model of ollama's ("ollama:qwen3.5:2b") or "demo" (docs/reference/formats.md).
    backend: "auto", "numpy", "cpu", "mlx", or the name of an installed plug-in.
    threads: for backends that have their own; None lets the backend choose.
    context: the context window in tokens; None is the model's maximum.
    kv_bits: 16, 8 or 4, the precision of the KV cache; None lets the backend choose (docs/concepts/backends.md). With 4
    a short text is run to see whether the model bears it, with a warning if it does not.
    rope_scaling: "yarn:4" for four times the context, "linear:2" or "none"; None is what the checkpoint says.
    mmproj: the vision tower of a .gguf file; None takes the one in it, or beside it, that fits.
    adapter: a LoRA adapter of PEFT, mlx-lm or llama.cpp, or several: paths or Hugging Face IDs, each with `:SCALE`
    behind it or not ("my-lora:0.5"). See docs/guides/adapters.md.
    chat_template: a file, the name of one of the checkpoint's templates, or a template's text; None is its default.
    memory: most that the whole process may take, "1.5G", "1500M", "1.5GiB", "50%" or bytes; None is EDGEQ_MEMORY or the
    limit of the control group, and "none" no ceiling. What is not asked for is chosen to fit: context, KV bits (8 at
    least), chunks, sizes of pictures (docs/concepts/memory.md). MemoryBudgetError where the model cannot be held to it.
    lock: lock the language model's weights in memory (mlock); MemoryBudgetError where the system does not allow it.
    on_read (done, total): called while weights are read ahead, with bytes.
    """
    bound = ceiling(memory)
    Budget.look()  # before anything is mapped
    check_kv_bits(kv_bits)
    checkpoint = _opened(model, mmproj, adapter, rope_scaling, chat_template)

    def make_ops(bits: int | None) -> Ops[Any, Any]:
        kv_dtype = None if bits is None else KV_DTYPES[bits]
        return select(None if backend == "auto" else backend, threads=threads, kv_dtype=kv_dtype)

    source: dict[str, Any] = {
        "model": _lasting(model), "backend": backend, "context": context, "kv_bits": kv_bits,
        "rope_scaling": rope_scaling, "mmproj": None if mmproj is None else _lasting(mmproj),
        "adapter": None if adapter is None else [_lasting_scaled(a) for a in _each(adapter)],
        "chat_template": None if chat_template is None else _lasting(chat_template),
    }  # fmt: skip
    ops = make_ops(kv_bits)
    checked_context(context, checkpoint.config.text.longest_context)
    if bound is None or not _keeps(ops, bound):
        warn_of_swapping(checkpoint, ops, context, Budget.process())
        loaded = _settled(Model(checkpoint, ops, context=context, source=source), lock, on_read)
        if kv_bits == 4:
            check_cache(loaded.engine, loaded.tokenizer)
        return loaded
    language, asked = Language(checkpoint), Asked(context, kv_bits)
    checkpoint.drop_pages()  # what was read of the file to get here is not there beside the weights
    choice = choose_settings(checkpoint, make_ops, bound, asked, taken())
    source["kv_bits"] = next((bits for bits, name in KV_DTYPES.items() if name == choice.ops.kv_dtype), kv_bits)
    loaded = Model(checkpoint, choice.ops, context=choice.context, choice=choice, language=language, source=source)
    tell(choice, asked, loaded.engine.weights.medium)
    loaded = _settled(loaded, lock, on_read, streamed=choice.streamed)
    if kv_bits == 4 and not choice.streamed:  # else every pass reads all weights from the disk
        check_cache(loaded.engine, loaded.tokenizer)
    return loaded


def _opened(
    model: str | Path, mmproj: str | Path | None, adapter: str | Path | Sequence[str | Path] | None,
    rope_scaling: str | None, chat_template: str | Path | None,
) -> Checkpoint:  # fmt: skip
    """The checkpoint that `load` means, with what goes over it."""
    checkpoint = open_checkpoint(find_model(model), None if mmproj is None else Path(mmproj))
    if adapter is not None:
        from edgeq.adapters import adapted, given_adapters  # and with them all of GGUF: for who needs it

        checkpoint = adapted(checkpoint, given_adapters(adapter))
    if rope_scaling is not None:
        checkpoint.config = stretched(checkpoint.config, rope_scaling)
    if chat_template is not None:
        checkpoint.templates = checkpoint.templates.choose(chat_template)
    return checkpoint


def _keeps(ops: Ops[Any, Any], bound: Ceiling) -> bool:
    """Whether a backend can be held to a ceiling. UsageError where it cannot, and somebody asked for it."""
    if not ops.keeps_ceiling and bound.asked:
        raise UsageError(
            f"the {ops.name} backend cannot be held to a ceiling: it allocates more than can be planned",
            hint="leave out --memory (memory= in Python), or use the cpu backend",
        )
    return ops.keeps_ceiling


def _settled(model: Model, lock: bool, on_read: Progress | None, *, streamed: int = 0) -> Model:
    """The model, its weights read ahead and perhaps locked, unless some of them are to be read anew in every pass."""
    if streamed:
        if lock:
            raise MemoryBudgetError(
                f"{streamed / 1e6:,.0f} MB of the weights to be locked in memory do not fit the ceiling",
                hint="leave out --lock (lock= in Python), or allow more memory",
            )
        return model
    weights = weights_in_order(model.engine.weights.text)
    read_ahead(weights, on_read)
    if lock:
        lock_pages(weights)
        model.engine.budget.locked = True
    return model


def check_kv_bits(bits: int | None) -> None:
    """UsageError for bits that keys and values cannot be kept in."""
    if bits not in (None, *KV_DTYPES):
        raise UsageError(f"keys and values cannot be kept in {bits} bits", hint="choose 16, 8 or 4 bits")


def load_session(
    path: str | Path, model: Model | str | Path | None = None, *, on_prefill: Progress | None = None,
    on_look: Progress | None = None, **options: Any,
) -> Chat:  # fmt: skip
    """Go on with a conversation that `chat.save` has written, as if it had never stopped.

    model: the loaded Model, or what `load` takes; None is the one that the file names, with the options that it was
    loaded with. options: of `load`, over those. on_prefill, on_look: as of `Model.chat`.

    Another backend, or other KV bits, go on with the same tokens, and numbers that are equal but for rounding. Raises
    ModelError for another model and for a file that is damaged, or of another version.
    """
    from edgeq.session.chat import Chat
    from edgeq.session.files import SessionFile

    file = SessionFile(expand_user(Path(path)).absolute())
    saved = file.read()
    if not isinstance(model, Model):
        known = saved.load_options(options.get("backend")) if model is None else {"model": model}
        model = load(**known | options)
    elif options:
        raise UsageError(f"{min(options)} is an option of a model that is yet to be loaded", hint="leave it out")
    return Chat.restored(model, file, saved=saved, on_prefill=on_prefill, on_look=on_look)


def _each(given: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    return [given] if isinstance(given, str | Path) else given


def _lasting(name: str | Path) -> str:
    """A name that means the same from another folder: what is a path becomes an absolute one."""
    path = expand_user(Path(name))
    return str(path.absolute()) if exists(path) else str(name)


def _lasting_scaled(name: str | Path) -> str:
    """The same for `PATH:SCALE`."""
    path, colon, scale = str(name).rpartition(":")
    return f"{_lasting(path)}{colon}{scale}" if path and exists(expand_user(Path(path))) else _lasting(name)


class Model:
    """A checkpoint on a backend: logits, resumable states, completion and chat. It holds no sequence: states are values
    that you keep.
    """

    def __init__(
        self, checkpoint: Checkpoint, ops: Ops[Any, Any], *, context: int | None = None, choice: Choice | None = None,
        language: Language | None = None, source: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.language = language or Language(checkpoint)
        self.engine = Engine(checkpoint, ops, context=context, choice=choice)
        self.language.budget = self.engine.budget
        self.checkpoint, self.ops, self.config = checkpoint, ops, checkpoint.config
        self.sight = Sight(self.engine)
        self.prefixes = PrefixStore(self.engine, text=self.language.spelled)
        self.source = source
        """What `load` was given, if it was that."""
        if tokenizer := self.language.tokenizer:
            tokenizer.claim = self.engine.budget.claim
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

    @property
    def chat_visuals(self) -> VisualSettings:
        """How large pictures are that conversations begin with; smaller where the ceiling leaves less room."""
        from edgeq.session.visual_settings import CHAT_VISUALS, fitting_visuals

        choice = self.engine.choice
        return CHAT_VISUALS if choice is None else fitting_visuals(choice.picture_tokens)

    # --- logits and states -------------------------------------------------------------------------------------------

    def state(self) -> State[Any]:
        """The state of an empty sequence."""
        return self.engine.state()

    def forward(
        self, ids: Sequence[int], state: State[Any] | None = None, visuals: Sequence[Any] = ()
    ) -> tuple[Float32, State[Any]]:
        """Run `ids` from `state` (None: from the beginning): the logits after the last of them, float32 [vocab_size],
        and the new state.

        visuals: pictures as (kind, pixel_values, grid), in the order of the tokens in `ids` that stand for them; see
        `edgeq.vision.preprocess` and `prompt`. Without them all ids are tokens like any other.

        `state` stays valid. Any split of the tokens over calls gives the same result up to rounding, and one at
        multiples of `engine.chunk` exactly the same. Raises UsageError for ids outside of the vocabulary, pictures that
        do not fit their tokens and a state of another model, MemoryBudgetError where the context is full.
        """
        return self._run(ids, state, visuals, rows=1)

    def advance(
        self, ids: Sequence[int], state: State[Any] | None = None, *, visuals: Sequence[Any] = ()
    ) -> State[Any]:
        """The state after `ids`; skips the LM head."""
        return self._run(ids, state, visuals, rows=0)[1]

    def logits(self, ids: Sequence[int], *, visuals: Sequence[Any] = ()) -> Float32:
        """Logits after each of `ids` from an empty state: float32 [len(ids), vocab_size]."""
        context = Context(self.engine, sight=self.sight)
        tokens = self.engine.checked_ids(ids, context.state)
        return context.feed(tokens, rows=len(tokens), places=self.sight.places(tokens, visuals))

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

    def _run(
        self, ids: Sequence[int], state: State[Any] | None, visuals: Sequence[Any], rows: int
    ) -> tuple[Float32, State[Any]]:
        if state is not None:
            self.engine.check_state(state)
        context = Context(self.engine, state, sight=self.sight)
        tokens, before = self.engine.checked_ids(ids, context.state), context.state
        places = self.sight.places(tokens, visuals, start=before.length, position=before.next_position)
        logits = context.feed(tokens, rows, places)
        return logits[-1] if rows else logits, context.state

    # --- text --------------------------------------------------------------------------------------------------------

    def prompt(
        self, messages: Sequence[Message] | str, thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None, *, visual_settings: VisualSettings | None = None,
        add_vision_id: bool = False, template_kwargs: Mapping[str, Any] | None = None,
    ) -> Prompt:  # fmt: skip
        """The prompt for a reply to a history, by the chat template: ids, their positions, and the pictures.

        messages: [{"role": "user", "content": text, or a list of parts}, ...]; a part is {"type": "text", "text": ...},
        {"type": "image", "image": path, bytes, data URL, PIL image or array}, {"type": "video", "video": path or
        frames}, or what OpenAI's interfaces have in their place. thinking: None is the template's default.
        visual_settings: None is the checkpoint's own limits. add_vision_id: number the pictures ("Picture 1: ").
        template_kwargs: variables for the template, as {"enable_thinking": True}.
        """
        from edgeq.session.history import make_prompt  # its templates' library takes 25 ms and 8 MB

        return make_prompt(
            self.language, self.sight, messages, thinking=thinking, tools=tools, settings=visual_settings,
            add_vision_id=add_vision_id, template_kwargs=template_kwargs,
        )  # fmt: skip

    def generate(
        self, prompt: str | Sequence[int] | Prompt, *, settings: GenerationSettings | None = None,
        ignore_eos: bool = False, draft: str | int = "auto", on_prefill: Progress | None = None,
        on_look: Progress | None = None, **options: Any,
    ) -> Reply:  # fmt: skip
        """Continue a text or token ids as they are, without a chat template, or a Prompt; iterate over the result's
        pieces.

        draft: how tokens are drafted, which changes the speed and not the text: "auto", "off", "mtp", "ngram", or a
        number of drafts for every pass (docs/guides/drafts.md).

        `options` are fields of GenerationSettings (temperature, top_p, max_tokens, seed, stop, ...). Special tokens
        spelled in a text are text; give ids to use them. `ignore_eos` keeps generating after an end token.
        on_prefill, on_look (done, total): called while a long prompt goes through the model, and pictures through the
        tower.
        """
        given, visuals = (prompt.ids, prompt.visuals) if isinstance(prompt, Prompt) else (prompt, ())
        ids = self.language.need_tokenizer().encode(given) if isinstance(given, str) else _listed(given)
        places = self.sight.places(ids, visuals)
        if isinstance(prompt, Prompt) and not np.array_equal(prompt.positions, Prompt.of(ids, places).positions):
            raise UsageError("the prompt's positions do not belong to its ids", hint="make it with model.prompt")
        if settings is not None and not isinstance(settings, GenerationSettings):
            raise UsageError(f"settings must be GenerationSettings, got {brief(settings)}", hint="or give them by name")
        chosen = (settings or GenerationSettings()).replace(**options)
        if ignore_eos and chosen.shape is not None:
            raise UsageError(f"ignore_eos cannot be combined with a {chosen.shape[0]}, which says where the text ends")
        context = Context(
            self.engine, sight=self.sight, speculation=self.language.speculation(self.engine, draft),
            prefixes=self.prefixes, messages=self.language.messages, on_prefill=on_prefill, on_look=on_look,
        )  # fmt: skip
        decoding = Decoding(
            ids, self.language.sampler(chosen), room=context.room, eos_ids=() if ignore_eos else self.eos_ids,
            constraint=self.language.constraint(chosen),
        )  # fmt: skip
        found = context.resume(self.engine.checked_ids(ids, context.state), places)
        tokens = context.tokens(decoding, places, start=0, logits=found.logits)
        return Reply(
            decoding, PlainText(self.tokenizer), tokens, chosen.stop,
            cached=len(found.ids), prompt=len(ids), miss=context.miss,
        )  # fmt: skip

    def keep_prefixes(self, folder: str | Path, size: int | str | None = None) -> None:
        """Keep the states of prompts and conversations in a folder as well, for later processes and for others at the
        same time: what was read once is not read again (docs/concepts/prefixes.md).

        size: most bytes that the folder may have, a number or as in "4G"; None is 4 GB, or half of what is free on the
        disk if that is less. Files of other models are left alone, but for the room that they take. Raises UsageError
        for what cannot be a folder to write to.
        """
        where = expand_user(Path(folder))
        self.prefixes.folder = PrefixFolder(where, self.engine, folder_size(where, size))

    def chat(
        self, *, messages: Sequence[Message] = (), thinking: bool | None = None, system: Content | None = None,
        documents: Sequence[Any] = (), tools: Sequence[Mapping[str, Any]] | None = None,
        settings: GenerationSettings | None = None,
        visual_settings: VisualSettings | None = None, draft: str | int = "auto", overflow: str = "stop",
        template_kwargs: Mapping[str, Any] | None = None, on_prefill: Progress | None = None,
        on_look: Progress | None = None, **options: Any,
    ) -> Chat:  # fmt: skip
        """Start a conversation, or go on with one: messages, as OpenAI's interfaces write them.

        documents: texts that it is about, paths or (name, text), which come before the system prompt; `Chat.prepare`
        reads them ahead, and with `keep_prefixes` they are read once (docs/guides/documents.md).
        thinking: None is the chat template's default. visual_settings: None is 1,024 tokens for an image, and 64 frames
        and 2,048 tokens for a video. overflow: "shift" forgets the oldest turns where the context is full.
        template_kwargs: further variables for the chat template. See `edgeq.session.chat.Chat`.
        """
        from edgeq.session.chat import Chat  # its templates' library takes 25 ms and 8 MB
        from edgeq.session.documents import with_documents

        return Chat(
            self, messages=messages, thinking=thinking, system=with_documents(documents, system), tools=tools,
            settings=settings,
            visual_settings=visual_settings or self.chat_visuals, draft=draft, overflow=overflow,
            template_kwargs=template_kwargs, on_prefill=on_prefill, on_look=on_look, **options,
        )  # fmt: skip


def _listed(ids: object) -> list[int]:
    """Token ids as a list; UsageError for what is neither text nor ids."""
    found: list[Any] = list(ids) if isinstance(ids, Iterable) and not isinstance(ids, bytes | bytearray) else [None]
    if not all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in found):
        raise UsageError("a prompt must be a text or a sequence of token ids", hint="decode bytes first")
    return found
