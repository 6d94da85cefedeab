"""States that are kept, so that any sequence with the same beginning goes on from there.

A recurrent state cannot be cut back: undoing a turn, answering it again, or reading a document's second question needs
a state from before. A store keeps them for a model, in a tree over token ids (and what pictures show): whoever begins a
prompt asks for the longest prefix of it that is at hand, and is told where it parts from what was read before.

A state's keys and values are pages that it shares with those before and after it; its DeltaNet states are its own. What
is kept is bounded in bytes. Where there is more, that state goes first which was used longest ago and costs least to
make again for its size: GreedyDual-Size (Cao & Irani, "Cost-Aware WWW Proxy Caching Algorithms", USENIX 1997), with the
tokens to be read again as the cost.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from time import monotonic
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet

import numpy as np

from edgeq.backends.ops import Ops
from edgeq.config import TextConfig
from edgeq.engine import Engine, Ids
from edgeq.errors import MemoryBudgetError
from edgeq.formats.bf16 import Float32
from edgeq.memory.plan import prefill_chunk
from edgeq.session.cuts import Said
from edgeq.session.places import Place
from edgeq.session.prefix_files import Filed, Line, PrefixFolder, Shown
from edgeq.state import Piece, State, pieces

__all__ = ["Miss", "Prefix", "PrefixStore", "default_limit", "most_kept", "shown"]

SHARE = 32  # of the machine's memory
MOST = 512 << 20  # bytes, whatever the machine has
STATES = 256  # in memory, however small they are
STRIDE = 8  # chunks of a long text from one state on disk to the next, or
PATIENCE = 20  # seconds
GHOSTS = 256  # prefixes whose ids are remembered when their states have gone


class Prefix(NamedTuple):
    """What was read and the state after it.

    ids: int32 [tokens]; places: of the pictures among them. logits: those after the last, float32 [vocabulary], where
    they are known. spoken: which tokens were generated rather than read, and so have other bits. line: the files that
    have its keys and values, as far as they are known.
    """

    ids: Ids
    places: tuple[Place, ...]
    state: State[Any]
    logits: Float32 | None = None
    spoken: Said = ()
    line: Line = ()


class Miss(NamedTuple):
    """Why no more of a prompt was at hand.

    reason: "empty", nothing like it was kept; "differs", what was kept goes on with another token; "picture", with
    another picture; "evicted", it was the same, but its state had to go.
    at: tokens that were the same. kept, given: the next token as it was kept, and as the prompt has it; None where
    there is none. kept_text, given_text: their texts.
    """

    reason: str
    at: int
    kept: int | None = None
    given: int | None = None
    kept_text: str = ""
    given_text: str = ""


class Holder(Protocol):
    """Whoever goes on with a state of its own."""

    state: State[Any]


def shown(places: Sequence[Place], stop: int) -> tuple[Shown, ...]:
    """What the places before token `stop` show."""
    return tuple(
        (p.start, p.position, p.height, p.width, p.visual.digest.hex(), p.frame) for p in places if p.start < stop
    )


class _Kept(NamedTuple):
    """What is in memory of a prefix."""

    state: State[Any]
    logits: Float32 | None
    spoken: Said
    line: Line


class _Node:
    """A place in the tree: the keys from its parent's place to its own (see `_keys`), and what is kept there."""

    def __init__(self, parent: _Node | None, keys: Ids) -> None:
        self.parent, self.keys = parent, keys
        self.stop: int = len(keys) + (parent.stop if parent else 0)
        self.children: dict[int, _Node] = {}
        self.kept: _Kept | None = None
        self.shown: tuple[Shown, ...] = ()  # of the state in memory
        self.filed: dict[str, Filed] = {}  # states on disk, by name
        self.used = 0.0  # the store's clock when it was used last
        self.ghost = False  # a state was kept here

    @property
    def bare(self) -> bool:
        """Whether nothing would be lost with it but a place to branch."""
        return self.kept is None and not self.ghost and not self.filed

    def ancestors(self) -> Iterator[_Node]:
        node = self.parent
        while node is not None:
            yield node
            node = node.parent


class PrefixStore:
    """The prefixes kept for a model, `limit` bytes of them at most: what is kept beside the states of those who go on
    with them now (`attach`). It is the ledger's account "prefix checkpoints".

    folder: keeps them on disk as well, for later. text: of a token, to say where a prompt parts from what was read
    before.
    """

    def __init__(
        self, engine: Engine[Any, Any], limit: int | None = None, folder: PrefixFolder | None = None, *,
        text: Callable[[int], str] = lambda _: "",
    ) -> None:  # fmt: skip
        self._engine, self.folder, self._text = engine, folder, text
        self._written = monotonic()  # when something was written last
        self._filed: dict[str, _Node] = {}  # where the prefixes on disk are
        self._root = _Node(None, np.empty(0, np.int32))
        self._nodes: dict[_Node, None] = {}  # that have a state in memory, the latest last
        self._ghosts = deque[_Node]()
        self._clock = 0.0
        self._holders: WeakSet[Any] = WeakSet()
        self._limit = default_limit(engine.ops.state_nbytes(engine.config)) if limit is None else limit
        self._open_accounts()

    # --- how much ----------------------------------------------------------------------------------------------------

    @property
    def limit(self) -> int:
        """Bytes that may be kept; 0 keeps nothing."""
        return self._limit

    @limit.setter
    def limit(self, nbytes: int) -> None:
        self._limit = nbytes
        self._shrink(nbytes)
        if not nbytes:  # those that others hold as well
            for node in list(self._nodes):
                self._drop(node)

    @property
    def nbytes(self) -> int:
        """Bytes that would be free without it; what became too much when others let go of it has gone."""
        self._shrink(self._limit)
        return self._total

    def __len__(self) -> int:
        """States in memory."""
        return len(self._nodes)

    def give_way(self, nbytes: int) -> int:
        """Let go of about so many bytes, the least useful first; the bytes that were freed."""
        before = self._total
        self._shrink(max(0, before - nbytes))
        return before - self._total

    def attach(self, holder: Holder) -> None:
        """`holder.state` is in use as long as `holder` lives: what it shares with kept states is not the store's."""
        self._holders.add(holder)

    # --- what is kept ------------------------------------------------------------------------------------------------

    def keep(self, prefix: Prefix, why: str = "", *, named: str = "") -> Line:
        """Remember a prefix; the files that have its keys and values.

        why: what it is kept for, as `edgeq.session.cuts` has it, which decides whether it goes to disk. named: what
        people call it.
        """
        if not len(prefix.ids) or not (self._limit or self.folder):
            return prefix.line
        keys, what, line = _keys(prefix.ids, prefix.places), shown(prefix.places, len(prefix.ids)), prefix.line
        if self.folder is not None and self._goes_to_disk(len(keys), why):
            self._look()
            line = self.folder.write(keys, prefix.state, what, prefix.spoken, line, named=named) or line
            self._look()
        if self._limit:
            node = self._insert(keys)
            logits = prefix.logits
            if logits is None and node.kept is not None and (node.shown, node.kept.spoken) == (what, prefix.spoken):
                logits = node.kept.logits
            node.kept, node.shown = _Kept(prefix.state, logits, prefix.spoken, line), what
            self._touch(node)
            self._shrink(self._limit)
        return line

    def _goes_to_disk(self, tokens: int, why: str) -> bool:
        """Whether a state is written: of a long text one now and then, so that little is read again after a kill."""
        if why in ("", "prompt"):
            return False
        now = monotonic()
        if why == "chunk" and tokens % (STRIDE * self._engine.chunk) and now - self._written < PATIENCE:
            return False
        self._written = now
        return True

    def along(self, ids: Ids, places: Sequence[Place] = ()) -> list[Prefix]:
        """The prefixes of a sequence that are at hand in memory, the longest last."""
        path, _ = self._walk(_keys(ids, places))
        kept = [(node, node.kept) for node in path if node.kept and node.shown == shown(places, node.stop)]
        return [Prefix(ids[: node.stop], tuple(places), *found) for node, found in kept]

    def forget(self, ids: Ids, places: Sequence[Place] = ()) -> None:
        """Let go of the state after `ids`, if it is in memory."""
        path, matched = self._walk(_keys(ids, places))
        if path[-1].stop == matched == len(ids) and path[-1].kept is not None:
            self._drop(path[-1])

    def longest(
        self, ids: Ids, places: Sequence[Place] = (), takes: Callable[[int, Said], bool] = lambda *_: True,
        near: int = 0,
    ) -> Prefix | None:  # fmt: skip
        """The longest prefix of a sequence that is at hand, if something is known, or left to be run, of what follows.

        takes: whether to go on from a place, and what was spoken before it; another one is taken only where it saves
        more than `near` tokens.
        """
        self._look()
        lost = set[str]()
        while True:
            path, _ = self._walk(_keys(ids, places))
            usable = [each for node in reversed(path) for each in self._usable(node, ids, places, lost)]
            good = next((each for each in usable if takes(each[0].stop, each[1].spoken)), None)
            least = near + (good[0].stop if good else 0)
            best = next((each for each in usable if each[0].stop > least), good)
            if best is None:
                return None
            node, what = best
            if isinstance(what, Filed):
                if (read := self._read(node, what)) is None:
                    lost.add(what.name)
                    continue
                what = read
            if node.kept is what:
                self._touch(node)
            return Prefix(ids[: node.stop], tuple(places), *what)

    def _usable(
        self, node: _Node, ids: Ids, places: Sequence[Place], lost: Collection[str]
    ) -> Iterator[tuple[_Node, _Kept | Filed]]:
        """What is kept at a node that a sequence can go on from; without files that could not be read."""
        left = len(ids) - node.stop
        if left < 0 or not (node.kept or node.filed):
            return
        seen = shown(places, node.stop)
        if node.kept is not None and node.shown == seen and (left or node.kept.logits is not None):
            yield node, node.kept
        for filed in node.filed.values():
            if filed.has_state and filed.shown == seen and left and filed.name not in lost:
                yield node, filed

    def _read(self, node: _Node, filed: Filed) -> _Kept | None:
        """A state from the disk, which stays in memory if there is room; None where it is gone, or does not fit."""
        assert self.folder is not None
        engine = self._engine
        nbytes = engine.ops.state_nbytes(engine.config) + engine.ops.kv_nbytes(engine.config, filed.stop)
        with engine.budget.alone:
            try:
                engine.budget.claim(nbytes, "a kept prefix")
            except MemoryBudgetError:
                return None
            state = self.folder.read(filed)
        if state is None:
            return None
        kept = _Kept(state, None, filed.spoken, filed.line)
        if self._limit:
            node.kept, node.shown = kept, filed.shown
            self._touch(node)
            self._shrink(self._limit)
        return kept

    def miss(self, ids: Ids, places: Sequence[Place], cached: int) -> Miss | None:
        """Why no more than the first `cached` tokens of a sequence are at hand; None where all that was kept of it is
        used, and nothing that was kept goes on otherwise."""
        self._look()
        if not self._root.children:
            return Miss("empty", 0) if len(ids) > cached else None
        path, matched = self._walk(keys := _keys(ids, places))
        gone = any(node.ghost and node.kept is None and cached < node.stop < len(ids) for node in path)
        other = self._continuation(path[-1], keys, matched)
        if other is None or matched == len(keys):
            return Miss("evicted", matched) if gone else None
        given = int(keys[matched])
        if other < 0 and given < 0:
            return Miss("picture", matched)
        tokens = [None if token < 0 else token for token in (other, given)]
        texts = ["" if token is None else self._text(token) for token in tokens]
        return Miss("evicted" if gone else "differs", matched, tokens[0], tokens[1], *texts)

    def _look(self) -> None:
        """Find what is new on disk, and what is gone."""
        if self.folder is None or (found := self.folder.look()) is None:
            return
        for name in self._filed.keys() - found.keys():
            node = self._filed.pop(name)
            node.filed.pop(name, None)
            self._prune(node)
        whole = dict[str, Ids]()
        for name, filed in found.items():
            above = whole[filed.line[-2][1]] if len(filed.line) > 1 else filed.keys[:0]
            whole[name] = np.concatenate([above, filed.keys]) if len(above) else filed.keys
            if name not in self._filed:
                self._filed[name] = self._insert(whole[name])
            self._filed[name].filed[name] = filed

    # --- the tree ----------------------------------------------------------------------------------------------------

    def _walk(self, keys: Ids) -> tuple[list[_Node], int]:
        """The nodes on the way of some keys, and how many keys agree, which may be within the next edge."""
        path, at = [self._root], 0
        while at < len(keys) and (child := path[-1].children.get(int(keys[at]))) is not None:
            same = _agreeing(child.keys, keys[at:])
            at += same
            if same < len(child.keys):
                break
            path.append(child)
        return path, at

    def _insert(self, keys: Ids) -> _Node:
        """The node at the end of some keys."""
        path, matched = self._walk(keys)
        node = path[-1]
        if matched > node.stop:  # within an edge
            node = self._split(node.children[int(keys[node.stop])], matched - node.stop)
        if matched < len(keys):
            node.children[int(keys[matched])] = node = _Node(node, keys[matched:].copy())
        return node

    def _split(self, child: _Node, length: int) -> _Node:
        """A new node after the first keys of an edge."""
        assert child.parent is not None
        middle = _Node(child.parent, child.keys[:length].copy())
        child.parent.children[int(child.keys[0])] = middle
        child.parent, child.keys = middle, child.keys[length:].copy()
        middle.children[int(child.keys[0])] = child
        return middle

    def _continuation(self, node: _Node, keys: Ids, matched: int) -> int | None:
        """The key behind the first `matched`, as it was kept last; None where nothing goes on there."""
        if matched > node.stop:
            child = node.children[int(keys[node.stop])]
            return int(child.keys[matched - node.stop])
        return next(reversed(node.children), None)

    def _prune(self, node: _Node) -> None:
        """Take a node out of the tree that is good for nothing, and what is good for nothing without it."""
        while node.parent is not None and node.bare:
            parent = node.parent
            if len(node.children) > 1:
                return
            first = int(node.keys[0])
            if node.children:
                (child,) = node.children.values()
                child.keys, child.parent = np.concatenate([node.keys, child.keys]), parent
                parent.children[first] = child
                return
            del parent.children[first]
            node = parent

    # --- what goes ---------------------------------------------------------------------------------------------------

    def _touch(self, node: _Node) -> None:
        node.used = self._clock
        self._nodes.pop(node, None)
        self._nodes[node] = None

    def _drop(self, node: _Node) -> None:
        """Let go of a node's state; its ids are remembered for a while."""
        node.kept = None
        del self._nodes[node]
        if not node.ghost:
            node.ghost = True
            self._ghosts.append(node)
        while len(self._ghosts) > GHOSTS:
            gone = self._ghosts.popleft()
            gone.ghost = False
            self._prune(gone)

    @property
    def _total(self) -> int:
        return sum(self._own().values())

    def _shrink(self, nbytes: int) -> None:
        """Let go of states until the rest has at most so many bytes."""
        while self._nodes and (self._total > nbytes or len(self._nodes) > STATES):
            sizes = self._sizes()
            worths = {node: self._worth(node, max(1, sizes[node])) for node in self._nodes}
            victim = min(worths, key=lambda node: worths[node])
            self._clock = max(self._clock, worths[victim])
            self._drop(victim)

    def _worth(self, node: _Node, size: int) -> float:
        """When its time is up, by the store's clock: later, the more tokens for its size would have to be read."""
        before = next((above.stop for above in node.ancestors() if above.kept is not None), 0)
        return node.used + (node.stop - before) * self._engine.ops.state_nbytes(self._engine.config) / size

    def _sizes(self) -> dict[_Node, int]:
        """The bytes that each state would leave free."""
        held, mine = self._in_use(), dict[_Node, list[Piece]]()
        count = dict[int, int]()
        for node in self._nodes:
            mine[node] = self._pieces(node)
            for piece in mine[node]:
                count[piece.key] = count.get(piece.key, 0) + 1
        return {
            node: sum(piece.nbytes for piece in found if count[piece.key] == 1 and piece.key not in held)
            for node, found in mine.items()
        }

    def _own(self) -> dict[str, int]:
        """The bytes that would be free without the store, by what they are for."""
        held = self._in_use()
        found = {piece.key: piece for node in self._nodes for piece in self._pieces(node) if piece.key not in held}
        own = dict[str, int]()
        for piece in found.values():
            own[piece.what] = own.get(piece.what, 0) + piece.nbytes
        return own

    def _pieces(self, node: _Node) -> list[Piece]:
        assert node.kept is not None
        state, logits = node.kept[:2]
        return [*pieces(state), *([] if logits is None else [Piece("logits", id(logits), logits.nbytes)])]

    def _in_use(self) -> set[int]:
        return {piece.key for holder in self._holders for piece in pieces(holder.state)}

    def _open_accounts(self) -> None:
        """The account of what is kept, and without it those of which it would be a part."""
        ledger, ops = self._engine.ledger, self._engine.ops
        ledger.open("prefix checkpoints", lambda: self.nbytes, give_way=self.give_way)
        for owner in ("KV cache", "DeltaNet states"):
            if owner in ops.held():
                ledger.open(owner, lambda owner=owner: ops.held()[owner] - self._own().get(owner, 0))  # type: ignore[misc]


def most_kept(ops: Ops[Any, Any], c: TextConfig, tokens: int, sequences: int = 1) -> int:
    """States that a store keeps of sequences of so many tokens, if nothing but `default_limit` bounds it: one after
    every chunk of a prompt, and after the reply."""
    state = max(1, ops.state_nbytes(c))
    return min(sequences * (tokens // prefill_chunk(c, ops) + 1), default_limit(state) // state, STATES)


def default_limit(state_nbytes: int) -> int:
    """Bytes that are kept where nobody says how many: a share of the machine's memory, but two states at least, to undo
    a turn and to answer another way."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # a system that does not say
        memory = 0
    return max(min(memory // SHARE, MOST), 2 * state_nbytes)


def _keys(ids: Ids, places: Sequence[Place]) -> Ids:
    """What a sequence is found by: its ids, and in a picture's place negative numbers that tell what it shows."""
    if not any(place.start < len(ids) for place in places):
        return ids
    keys = ids.copy()
    for place in places:
        digest = int.from_bytes(place.visual.digest[:8], "little") + place.frame
        keys[place.start : place.stop] = -1 - digest % (1 << 31)
    return keys


def _agreeing(a: Ids, b: Ids) -> int:
    """How many elements two arrays begin with that are the same."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
