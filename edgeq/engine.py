"""The engine: weights on a backend, and the only caller of the model.

What is to be run is a list of feeds, one for each sequence: its state, its tokens (some of them with vectors that are
ready, such as an image's, in their place, and all with their positions), how many states to keep, and how many rows of
logits are wanted. Prompts, single tokens and drafts to be verified are all feeds, and may share a call. What a call
promises about its results is the exactness contract of `edgeq.backends.ops`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.ops import ArrayLike, Ops
from edgeq.checkpoint import Checkpoint
from edgeq.config import TextConfig, VisionConfig
from edgeq.draft_head import MANY, PIECES, DraftHead, DraftVocabulary, draft_prefix
from edgeq.errors import MemoryBudgetError, ModelError, UsageError
from edgeq.formats.bf16 import Float32
from edgeq.loading import LoadedWeights
from edgeq.memory.budget import Budget
from edgeq.memory.choice import Choice
from edgeq.memory.ledger import Ledger
from edgeq.memory.plan import SMALLEST_CHUNK, head_scratch_nbytes, part_nbytes, prefill_chunk
from edgeq.memory.resident import release_unused
from edgeq.model import text, vision
from edgeq.model.layers import spans
from edgeq.numbers import Range
from edgeq.pace import Pace
from edgeq.printable import brief
from edgeq.state import DeltaState, DraftState, KVCache, Rows, State, joined
from edgeq.vision.visual import Grid, Pixels
from edgeq.weights import Part

if TYPE_CHECKING:
    from edgeq.vision.images import Memory

__all__ = ["Engine", "Feed", "Ids", "Output", "checked_context"]

A = TypeVar("A", bound=ArrayLike)
M = TypeVar("M")
Ids = NDArray[np.int32]

KEPT_COPIES = 16_000_000  # bytes of the tower's weights that stay in memory after a picture: norms and biases
READ_OUT = 64  # rows of logits computed at a time where a whole text's are wanted: 64 MB of them


@dataclass(frozen=True, slots=True)
class Feed(Generic[A]):
    """What one sequence is given in a call.

    state: where it goes on from.
    ids: its next tokens, int32 [T], T at least 1.
    inserts: (row, vectors [n, hidden]): n tokens from that row on have these in place of their own; in order.
    positions: int32 [3, T] (time, height, width); None is text, one position after another.
    keep: states wanted beside the last, those after all but the last keep, ..., 1 tokens; at most T.
    rows: logits wanted, those after the last `rows` tokens, at most T; 0 leaves the head out.
    """

    state: State[A]
    ids: Ids
    inserts: Sequence[tuple[int, A]] = ()
    positions: NDArray[np.int32] | None = None
    keep: int = 0
    rows: int = 1

    def cut(self, place: int) -> tuple[Feed[A], Feed[A]]:
        """Its first `place` tokens, and the others, whose state is not right yet; it keeps no states."""
        assert not self.keep
        first, second = list[tuple[int, A]](), list[tuple[int, A]]()
        for row, x in self.inserts:
            n = x.shape[0]
            if row < place:
                first.append((row, x if row + n <= place else x[: place - row]))
            if row + n > place:
                second.append((max(0, row - place), x if row >= place else x[place - row :]))
        positions, rest = self.positions, len(self.ids) - place
        before, after = (None, None) if positions is None else (positions[:, :place], positions[:, place:])
        return (
            replace(self, ids=self.ids[:place], inserts=first, positions=before, rows=max(0, self.rows - rest)),
            replace(self, ids=self.ids[place:], inserts=second, positions=after, rows=min(self.rows, rest)),
        )


class Output(NamedTuple, Generic[A]):
    """What a feed gave: logits float32 [rows, vocabulary], and keep + 1 states, the last after all of its tokens."""

    logits: Float32
    states: tuple[State[A], ...]

    @property
    def state(self) -> State[A]:
        """The state after all tokens."""
        return self.states[-1]


class Engine(Generic[A, M]):
    """A checkpoint's weights on a backend. It holds no sequence: states are values that its callers keep.

    chunk: prompts are cut at multiples of it, counted from the beginning of the sequence.
    context_limit: most tokens of a sequence.
    ledger: what the weights and the backend hold now. budget: the ceiling that it must stay under, if there is one.
    choice: what it runs with under that ceiling.
    head: the MTP head; None for a checkpoint without one.
    pace: what is known of how fast passes with drafts are, and how often those are right.
    """

    def __init__(
        self, checkpoint: Checkpoint, ops: Ops[A, M], *, context: int | None = None, choice: Choice | None = None
    ) -> None:
        self.checkpoint, self.ops, self.choice = checkpoint, ops, choice
        self.config: TextConfig = checkpoint.config.text
        self.context_limit = checked_context(context, self.config.longest_context)
        self.chunk = prefill_chunk(self.config, ops) if choice is None else choice.chunk
        self.fingerprint = f"{checkpoint.fingerprint()} {ops.name} {ops.kv_dtype}"
        ops.limit_memory()
        ops.maps_states = choice is None
        resident, cached = (None, True) if choice is None else (choice.resident, choice.cached)
        self.weights = LoadedWeights(checkpoint, ops, resident, cached=cached)
        self.ledger = Ledger()
        self.budget = Budget(self.ledger, self._resident_weights, ops.release_idle, choice.ceiling if choice else None)
        self._text = self.weights.text
        for owner, parts in (("weights", (Part.TEXT, Part.MTP)), ("vision tower", (Part.VISION,))):
            self._open_account(owner, *parts)
        self.ledger.open_all(ops.held)
        self.ledger.open("scratch", lambda: ops.held().get("scratch", 0), give_way=self._release_scratch)
        self.head = DraftHead(ops, self.config, self.weights) if Part.MTP in self.weights.parts else None
        if self.head is not None and choice is not None and choice.drafts:
            self.head.load()  # so that its pages are counted before they come
        if self.head is not None and ops.maps_files:
            self.ledger.open("draft vocabulary", lambda: sum(v.nbytes for v in DraftVocabulary.alive))
        self.pace = Pace()
        c = self.config
        self._attention = [i for i, kind in enumerate(c.layer_types) if kind == "full_attention"]
        self._delta_nets = [i for i, kind in enumerate(c.layer_types) if kind != "full_attention"]
        self._delta_shapes = (
            (c.linear_conv_kernel_dim - 1, c.conv_dim),
            (c.linear_num_value_heads, c.linear_value_head_dim, c.linear_key_head_dim),
        )

    def _open_account(self, owner: str, *parts: Part) -> None:
        if not self.weights.parts.isdisjoint(parts):
            self.ledger.open(f"{owner}, mapped", lambda: self.weights.nbytes(*parts, mapped=True), mapped=True)
            if self.ops.maps_files:
                give_way = self._release_tower if Part.VISION in parts else None
                self.ledger.open(owner, lambda: self.weights.nbytes(*parts, mapped=False), give_way=give_way)

    def _resident_weights(self) -> int:
        """Bytes of mapped weights, the tower's left out, that are in memory when all that is to stay has been read."""
        if self.choice is not None and self.choice.streamed:
            return self.choice.resident_at_a_time
        return self.weights.nbytes(Part.TEXT, Part.MTP, mapped=True)

    def _release_tower(self, _: int) -> int:
        """Let go of the tower's copies, which the next picture makes again; the bytes."""
        held = self.weights.nbytes(Part.VISION, mapped=False)
        self.weights.release(Part.VISION)
        return held

    def _release_scratch(self, _: int) -> int:
        before = self.ops.held().get("scratch", 0)
        self.ops.release_scratch()
        return max(0, before - self.ops.held().get("scratch", 0))

    def state(self, *, draft: bool = False) -> State[A]:
        """The state of an empty sequence; `draft`: with the MTP head's part, which all that follow from it then have.

        Raises UsageError where there is no head.
        """
        state = text.initial_state(self.ops, self.config)._replace(origin=self.fingerprint)
        return state._replace(draft=self.need_head().state()) if draft else state

    def need_head(self) -> DraftHead[A, M]:
        """The MTP head, or a UsageError that says what to do without one."""
        if self.head is None:
            raise UsageError(
                f"{self.checkpoint.path} has no MTP head to draft with",
                hint='use draft="ngram" (--draft ngram), which needs none, or a checkpoint that has kept its head',
            )
        if not self.drafts:
            raise MemoryBudgetError(
                f"{self.budget.origin} leaves no room for the MTP head of {self.checkpoint.path}",
                hint='use draft="ngram" (--draft ngram), or allow more with --memory (memory= in Python)',
            )
        return self.head

    @property
    def drafts(self) -> bool:
        """Whether there is an MTP head, and room for it."""
        return self.head is not None and (self.choice is None or self.choice.drafts)

    def cut(self, start: int, tokens: int) -> Iterator[slice]:
        """Pieces of `tokens` tokens that follow `start` others, cut at absolute multiples of the chunk.

        So going on from a state at such a place runs the very calls that a run from the beginning would.
        """
        done = 0
        while done < tokens:
            piece = min(tokens - done, self.chunk - (start + done) % self.chunk)
            yield slice(done, done + piece)
            done += piece

    def _copies(self, state: State[A]) -> bool:
        """Whether going on from a state copies pages of keys and values."""
        layer = state.layers[self._attention[0]] if self._attention else None
        return isinstance(layer, KVCache) and layer.copies

    def claim(self, feeds: Sequence[tuple[int, int, int]], copies: int = 0, *, drafts: bool = False) -> None:
        """Make room for a call: for each feed the tokens before it, its own, and the rows of logits; `copies` of them
        go on beside others. drafts: the MTP head reads them, too. Whatever gives way does; MemoryBudgetError if that is
        not enough."""
        if self.budget.ceiling is None:
            return
        c, ops, several = self.config, self.ops, Budget.by_several()
        tokens = sum(more for _, more, _ in feeds)
        keys = sum(self._kv_nbytes(length + more) - self._kv_nbytes(length) for length, more, _ in feeds)
        keys += copies * ops.kv_nbytes(c, 1)
        logits = 2 * 4 * c.vocab_size * max(1, sum(rows for _, _, rows in feeds))
        head = 0
        if drafts:
            head = keys // max(1, len(self._attention)) + head_scratch_nbytes(c, min(tokens, self.chunk))

        def nbytes() -> int:  # what is kept from call to call is there, unless it gives way
            states = len(feeds) * ops.state_nbytes(c) - ops.idle_nbytes(c)
            held, most = 0 if several else ops.held().get("scratch", 0), min(tokens, self.chunk)
            work = ops.scratch_nbytes(c, most)
            if work - 8 * most * c.hidden_size <= 1.05 * held:  # else it grows, and the allocator keeps what it was
                work -= held
            return keys + max(0, states) + max(0, work) + logits + head

        self.budget.claim(
            nbytes, f"{sum(length + more for length, more, _ in feeds):,} tokens",
            hint="start a new conversation, let go of others, or allow more with --memory (memory= in Python)",
        )  # fmt: skip

    def _kv_nbytes(self, tokens: int) -> int:
        return self.ops.kv_nbytes(self.config, tokens) if tokens else 0

    def run(self, feeds: Sequence[Feed[A]], *, checked: bool = False) -> list[Output[A]]:
        """Run all feeds in one call of the model.

        States that were given stay valid. Raises UsageError for a state that this engine did not make (`checked`: the
        caller knows that it did), MemoryBudgetError where the ceiling leaves no room, ModelError where the logits are
        not numbers.
        """
        with self.budget.alone:
            outputs = self._run(feeds, checked)
            if self.budget.ceiling is not None and Budget.by_several():
                self.ops.release_scratch()
            return outputs

    def _run(self, feeds: Sequence[Feed[A]], checked: bool) -> list[Output[A]]:
        if self.budget.ceiling is not None:
            try:
                copies = [feed for feed in feeds if self._copies(feed.state)]
                self.claim(
                    [(feed.state.length, len(feed.ids), feed.rows) for feed in feeds], copies=len(copies),
                    drafts=any(feed.state.draft is not None for feed in feeds),
                )  # fmt: skip
            except MemoryBudgetError:
                if len(feeds) > 1 or (place := self._half(feeds[0])) is None:
                    raise
                return [self._run_in_two(feeds[0], place)]
        for feed in feeds:
            if not checked:
                self.check_state(feed.state)
            assert max(feed.rows, feed.keep) <= len(feed.ids), "more would be its neighbour's in the call"
        with np.errstate(all="ignore"):  # a damaged checkpoint shows in its logits, in one clear message
            hidden, states = self._forward(feeds)
            ends = accumulate(len(feed.ids) for feed in feeds)
            logits = self._read_out(hidden, [(end, feed.rows) for end, feed in zip(ends, feeds, strict=True)])
            states = [self._caught_up(hidden, kept) for kept in states]
        return [Output(*both) for both in zip(logits, states, strict=True)]

    def _half(self, feed: Feed[A]) -> int | None:
        """Where a prompt is cut that is too much for one call; None where it is as short as it can be."""
        tokens, step = len(feed.ids), self.ops.grain or SMALLEST_CHUNK
        place = max(SMALLEST_CHUNK, tokens // 2 // step * step)
        return place if not feed.keep and tokens - place > (self.ops.few or 0) else None

    def _run_in_two(self, feed: Feed[A], place: int) -> Output[A]:
        """What a call with `feed` gives, by two or more of fewer tokens."""
        first, second = feed.cut(place)
        (before,) = self.run([first], checked=True)
        (after,) = self.run([replace(second, state=before.state)], checked=True)
        logits = [output.logits for output in (before, after) if len(output.logits)]
        return Output(np.concatenate(logits) if logits else after.logits, after.states)

    def draft_vocabulary(self, tokens: int, always: Collection[int] = ()) -> DraftVocabulary[A, M]:
        """The tokens that a sequence's drafts are chosen among: see `DraftVocabulary`."""
        stored = {spec.name: held.nbytes for spec, held in self.checkpoint.storage() if spec.part is Part.TEXT}
        head = stored["embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"]
        row_nbytes = head // self.config.vocab_size
        prefix = draft_prefix(row_nbytes, sum(stored.values()))
        return DraftVocabulary(self.ops, self._text.lm_head, tokens, row_nbytes, prefix, always, self.budget.fits)

    def mtp_logits(self, ids: Sequence[int]) -> Float32:
        """What the MTP head says of a text: row k, read after the tokens up to k + 1, predicts token k + 2.

        float32 [len(ids) - 1, vocabulary]. Raises UsageError where there is no head.
        """
        state, logits = self.state(draft=True), [np.empty((0, self.config.vocab_size), np.float32)]
        head, tokens = self.need_head(), self.checked_ids(ids, state)
        self.claim([(0, len(tokens), len(tokens))], drafts=True)
        for piece in self.cut(0, len(tokens)):
            _, [(state,)] = self._forward([Feed(state, tokens[piece])])
            if state.draft is not None and state.draft.waiting > 1:
                hidden, draft = head.read(state.draft)
                state = state._replace(draft=draft)
                logits.append(self._many_logits(hidden))
        return np.concatenate(logits)

    def mtp_draft(self, ids: Sequence[int], n: int) -> tuple[list[int], Float32]:
        """The MTP head's n greedy drafts of what follows `ids` and the model's own most likely next token, each made
        from the one before; and what they were chosen by, float32 [n, vocabulary].

        Raises UsageError where there is no head.
        """
        head, state, logits = self.need_head(), self.state(draft=True), list[Float32]()
        tokens = self.checked_ids(ids, state)
        if not Range(1, self.context_limit, whole=True).holds(n):
            raise UsageError(f"drafts must be 1 to {self.context_limit}, got {brief(n)}")
        self.claim([(0, len(tokens) + n, n)], drafts=True)

        def choose(hidden: A) -> int:
            logits.append(self._logits(hidden))
            return int(logits[-1].argmax())

        for piece in self.cut(0, len(tokens)):
            (output,) = self.run([Feed(state, tokens[piece])])
            state = output.state
        drafts, _ = head.draft(state, int(output.logits.argmax()), n, choose)
        return drafts, np.concatenate(logits)

    def _forward(self, feeds: Sequence[Feed[A]]) -> tuple[A, list[tuple[State[A], ...]]]:
        """All feeds through the layers: hidden states [T, hidden], and each feed's states."""
        x, positions, lengths = self._embed(feeds), _positions(feeds), [len(feed.ids) for feed in feeds]
        hidden, states = text.run_layers(
            self.ops, self.config, self._text, x, positions, lengths,
            [feed.state for feed in feeds], [feed.keep for feed in feeds],
        )  # fmt: skip
        if any(feed.state.draft for feed in feeds):
            parts = [Rows(x[span], hidden[span], positions[:, span]) for span in spans(lengths)]
            states = [
                tuple([self._shown(state, rows, state.length - feed.state.length) for state in kept])
                for feed, rows, kept in zip(feeds, parts, states, strict=True)
            ]
        return hidden, states

    def _shown(self, state: State[A], rows: Rows[A], tokens: int) -> State[A]:
        """A state whose MTP head, if it has one, is shown the first `tokens` of `rows`."""
        draft = state.draft
        if draft is None or not tokens:
            return state
        if tokens < rows.positions.shape[1]:
            rows = Rows(rows.vectors[:tokens], rows.hidden[:tokens], rows.positions[:, :tokens])
        unread = draft.unread if len(draft.unread) < PIECES else (joined(self.ops, draft),)
        return state._replace(draft=DraftState(draft.cache, (*unread, rows)))

    def _caught_up(self, hidden: A, states: tuple[State[A], ...]) -> tuple[State[A], ...]:
        """The states, their MTP heads caught up where many tokens wait."""
        last = states[-1].draft
        if self.head is None or last is None or last.waiting <= MANY:
            return states
        after = tuple(
            state._replace(draft=self.head.caught_up(state.draft)) if state.draft else state for state in states
        )
        self.ops.start(hidden, after)
        return after

    @property
    def sees(self) -> bool:
        """Whether the checkpoint has a vision tower."""
        return self.checkpoint.config.vision is not None and Part.VISION in self.weights.parts

    def see(self, pixels: Pixels, grid: Grid) -> A:
        """What the model sees of an image, or of the frames of a video.

        pixels: float32 [patches, colours * 2 frames * height * width of a patch], in block order; grid: frames (of two
        pictures), rows and columns of patches. Returns [tokens, hidden], a token for every square of patches, to be fed
        in place of its placeholders.

        The tower and the language model are not needed at the same time: pages of the file are let go in between, and
        so are copies of the tower's weights, unless they are the backend's own. The next picture finds them again.

        Raises UsageError for a model without vision tower and for patches that do not fit the grid, ModelError where
        the result is not numbers.
        """
        c = self.checkpoint.config.vision
        if not self.sees or c is None:
            raise UsageError(
                f"{self.checkpoint.path} does not see: {self.checkpoint.lacks_tower()}",
                hint="use a checkpoint that has its vision tower, or quantize the original again with it",
            )
        _check_patches(pixels, grid, c)
        with self.budget.alone:
            self._let_go()
            try:
                self._claim_sight(grid, c)
                weights = self.weights.vision
                assert weights is not None
                with np.errstate(all="ignore"):  # as in `run`
                    features = vision.see(self.ops, c, weights, pixels, [grid])
                finite = np.isfinite(self.ops.numpy(features)).all()
            finally:
                self._let_go()
                if self.ops.maps_files and self.weights.nbytes(Part.VISION, mapped=False) > KEPT_COPIES:
                    self.weights.release(Part.VISION)
                release_unused()  # pixels and the tower's work, before the prompt needs as much for other things
        if not finite:
            raise ModelError(
                f"{self.checkpoint.path}: the vision tower's output is NaN or infinite",
                hint="download the checkpoint, or quantize it, again",
            )
        return features

    def _let_go(self) -> None:
        """Let go of all pages of the file; the next call finds them again."""
        self.checkpoint.drop_pages()
        Budget.look(self.budget)

    @property
    def decoding_memory(self) -> Memory | None:
        """What decoding a picture may take: under a ceiling what there is room for, with the language model's pages let
        go if they have to be. The next call finds them again, as it does after the tower."""
        if self.budget.ceiling is None:
            return None

        def make_room(nbytes: int, what: str) -> None:
            if self.budget.fits(nbytes):
                return
            self._let_go()
            self.budget.claim(
                nbytes, what, weights=False,
                hint="make it smaller first, or allow more with --memory (memory= in Python)",
            )  # fmt: skip

        return make_room

    def _claim_sight(self, grid: Grid, c: VisionConfig) -> None:
        """Make room for the tower and a picture; the language model's pages have been let go."""
        patches = math.prod(grid)
        work = self.ops.vision_scratch_nbytes(c, patches) + 4 * patches * (c.patch_values + c.out_hidden_size)
        tower = part_nbytes(self.checkpoint, Part.VISION) - self.weights.nbytes(Part.VISION, mapped=False)
        self.budget.claim(
            tower + work, f"the vision tower and a picture of {patches // c.spatial_merge_size**2:,} tokens",
            weights=False,
            hint="leave out --lock, or allow more with --memory (lock=, memory= in Python)" if self.budget.locked
            else "use --image-tokens, or more --memory (visual_settings=, memory= in Python)",
        )  # fmt: skip

    def checked_ids(self, ids: Sequence[int] | NDArray[Any], state: State[A]) -> Ids:
        """`ids` as an array, if the vocabulary has them and the context has room for them after `state`."""
        if type(ids) in (list, tuple) and len(ids) == 1 and type(ids[0]) is int:  # plain, because every token pays
            valid = 0 <= ids[0] < self.config.vocab_size and state.length < self.context_limit
            if valid:
                return np.array(ids, np.int32)
        try:
            tokens = np.asarray(ids)
        except (ValueError, OverflowError):
            tokens = np.empty(())
        if tokens.ndim != 1 or (tokens.dtype.kind not in "iu" and tokens.size):
            raise UsageError("token ids must be a sequence of integers", hint="encode text with model.tokenizer first")
        if not tokens.size:
            raise UsageError("no tokens to run", hint="give at least one token id")
        size = self.config.vocab_size
        if tokens.min() < 0 or tokens.max() >= size:
            wrong = next(i for i in tokens.tolist() if not 0 <= i < size)
            raise UsageError(f"token id {wrong} is outside of the vocabulary of {size}")
        if state.length + tokens.size > self.context_limit:
            raise MemoryBudgetError(
                f"{state.length + tokens.size} tokens exceed the context window of {self.context_limit}",
                hint="shorten the text or use a larger context",
            )
        return tokens.astype(np.int32)

    def check_state(self, state: State[A]) -> None:
        """Raise UsageError for what is no state of this model on this backend."""
        if not isinstance(state, State):
            raise UsageError(f"a state is expected, got {type(state).__name__}", hint="begin with model.state()")
        if state.origin not in ("", self.fingerprint):
            raise UsageError(
                "the state was made by another model, or on another backend",
                hint="begin with model.state() of this one, or convert it with edgeq.state_io",
            )
        if not self._whole(state) or (not state.origin and not self._fits(state)):
            raise UsageError(
                f"the state does not fit the model: expected {len(self.config.layer_types)} whole layers that hold "
                f"{brief(state.length)} tokens, the next of them at position {brief(state.next_position)}",
                hint="begin with model.state()",
            )

    def _whole(self, state: State[A]) -> bool:
        """Whether it has every layer, each of its kind and size, and every cache all of its tokens."""
        length, position, layers = state.length, state.next_position, state.layers
        if not (type(length) is int and type(position) is int and 0 <= position <= self.config.longest_context):
            return False
        if not isinstance(layers, tuple) or len(layers) != len(self.config.layer_types):
            return False
        for i in self._attention:  # plain, because every token pays for it
            layer = layers[i]
            if not isinstance(layer, KVCache) or layer.length != length:
                return False
        conv_shape, matrix_shape = self._delta_shapes
        for i in self._delta_nets:
            layer = layers[i]
            if type(layer) is not DeltaState:
                return False
            conv, matrix = layer
            if getattr(conv, "shape", None) != conv_shape or getattr(matrix, "shape", None) != matrix_shape:
                return False
        return state.draft is None or self._drafts(state.draft, length)

    def _drafts(self, draft: DraftState[A], length: int) -> bool:
        """Whether an MTP head may have made `draft` in a sequence of `length` tokens."""
        if self.head is None or not isinstance(draft, DraftState) or not isinstance(draft.cache, KVCache):
            return False
        waiting = 0
        for rows in draft.unread:
            tokens = rows.positions.shape[1]
            if not rows.vectors.shape == rows.hidden.shape == (tokens, self.config.hidden_size):
                return False
            waiting += tokens
        return draft.cache.length + waiting <= length and (waiting > 0 or draft.cache.length == 0)

    def _fits(self, state: State[A]) -> bool:
        """Whether the caches of a state of unknown origin are this backend's."""
        return all(type(mine) is type(theirs) for mine, theirs in zip(self.state().layers, state.layers, strict=True))

    def _embed(self, feeds: Sequence[Feed[A]]) -> A:
        each = [feed.ids for feed in feeds]
        x = self.weights.embed(each[0] if len(each) == 1 else np.concatenate(each))
        starts = (rows.start for rows in spans(list(map(len, each))))
        inserts = [(start + row, x) for start, feed in zip(starts, feeds, strict=True) for row, x in feed.inserts]
        return self._replaced(x, inserts) if inserts else x

    def _replaced(self, x: A, inserts: Sequence[tuple[int, A]]) -> A:
        """x [T, hidden] with vectors in place of the rows from each of the places on."""
        parts, done = list[A](), 0
        for row, vectors in inserts:
            parts += [x[done:row], vectors] if row > done else [vectors]
            done = row + vectors.shape[0]
        assert done <= x.shape[0], "more would be its neighbour's in the call"
        return self.ops.concat([*parts, x[done:]] if done < x.shape[0] else parts)

    def _read_out(self, hidden: A, wanted: Sequence[tuple[int, int]]) -> list[Float32]:
        """The logits of each feed: those of `rows` rows of hidden [T, hidden] before row `end`."""
        total = sum(rows for _, rows in wanted)
        if total > READ_OUT:
            return [self._many_logits(hidden[end - rows : end]) for end, rows in wanted]
        if not total:
            return [np.empty((0, self.config.vocab_size), np.float32) for _ in wanted]
        chosen = [hidden[end - rows : end] for end, rows in wanted if rows]
        logits = self._logits(chosen[0] if len(chosen) == 1 else self.ops.concat(chosen))
        return [logits[rows] for rows in spans([rows for _, rows in wanted])]

    def _many_logits(self, hidden: A) -> Float32:
        rows = hidden.shape[0]
        out = np.empty((rows, self.config.vocab_size), np.float32)
        for start in range(0, rows, READ_OUT):
            out[start : start + READ_OUT] = self._logits(hidden[start : start + READ_OUT])
        return out

    def _logits(self, hidden: A) -> Float32:
        logits, finite = self.weights.read_out(hidden)
        if not finite:
            culprit = self.checkpoint.find_non_finite()
            raise ModelError(
                f"{self.checkpoint.path}: the model produced NaN or infinite logits"
                + (f", because {culprit} holds NaN or infinity" if culprit else ""),
                hint="download the checkpoint, or quantize it, again",
            )
        return logits


def _check_patches(pixels: Pixels, grid: Grid, c: VisionConfig) -> None:
    square = c.spatial_merge_size
    if not (
        len(grid) == 3 and all(isinstance(n, int | np.integer) and n > 0 for n in grid)
        and grid[1] % square == grid[2] % square == 0
    ):  # fmt: skip
        raise UsageError(
            f"the grid is {brief(grid)}, expected (frames, rows, columns) of patches, "
            f"rows and columns in multiples of {square}"
        )
    expected = (math.prod(grid), c.patch_values)
    if getattr(pixels, "shape", None) != expected or pixels.dtype != np.float32:
        found = f"{getattr(pixels, 'dtype', type(pixels).__name__)} {brief(getattr(pixels, 'shape', ''))}"
        raise UsageError(
            f"the patches of the grid {brief(grid)} are {found}, expected float32 {expected}",
            hint="make both with edgeq.vision.preprocess",
        )


def _positions(feeds: Sequence[Feed[A]]) -> NDArray[np.int32]:
    """Where the tokens of all feeds stand: int32 [3, T]."""
    each = [
        text.next_positions(feed.state, len(feed.ids)) if feed.positions is None else feed.positions for feed in feeds
    ]
    return each[0] if len(each) == 1 else np.concatenate(each, axis=1)


def checked_context(asked: int | None, most: int) -> int:
    """The most tokens of a sequence, as asked for or `most`; UsageError for what is no such number."""
    if asked is None:
        return most
    if not Range(1, most, whole=True).holds(asked):
        raise UsageError(
            f"the context must be 1 to {most} tokens, got {brief(asked)}",
            hint="leave it out for the most that the model has, or stretch that with a rope scaling such as yarn:4",
        )
    return asked
