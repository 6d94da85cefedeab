"""One ceiling for the process: where it comes from, what is chosen under it, who gives way, and that it is kept."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ceiling_machine import SHAPE
from PIL import Image
from process import run_python

import edgeq
from edgeq.api import KV_DTYPES
from edgeq.backends import available, select
from edgeq.backends.ops import Ops
from edgeq.checkpoint import open_checkpoint
from edgeq.engine import Engine, Feed
from edgeq.errors import MemoryBudgetError, UsageError
from edgeq.formats.mapped import Pages, is_mapped
from edgeq.memory import ceiling as of_ceiling
from edgeq.memory.budget import SPARE, Budget
from edgeq.memory.ceiling import Ceiling, ceiling, parse_memory
from edgeq.memory.choice import Asked, Choice, choose_settings, least_ceiling
from edgeq.memory.ledger import Ledger
from edgeq.memory.resident import peak_resident, release_unused, resident
from edgeq.state import DeltaState, KVCache
from edgeq.testing import config_values, write_checkpoint

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
native = pytest.mark.skipif(
    next(b for b in available() if b.name == "cpu").ops is None, reason="the native backend is not built"
)
MB = 10**6


class TestSizes:
    @pytest.mark.parametrize(
        ("text", "nbytes"),
        [
            ("1.5G", 1_500_000_000), ("1500M", 1_500_000_000), ("1.5GiB", 3 << 29), ("1.5 gb", 1_500_000_000),
            ("2000000", 2_000_000), (" 2m ", 2_000_000), ("4096Ki", 4 << 20), (".5G", 500_000_000), (2 * MB, 2 * MB),
        ],
    )  # fmt: skip
    def test_as_people_write_them(self, text: str | int, nbytes: int) -> None:
        assert parse_memory(text) == nbytes

    def test_a_share_is_of_the_machine(self) -> None:
        assert parse_memory("50%") == pytest.approx((of_ceiling.machine_memory() or 0) / 2, abs=1)

    @pytest.mark.parametrize(
        "text",
        ["", "G", "1.5X", "1,5G", "-1G", "nan", "inf", "1e9", "1500", "0", "120%", "1IB", 0, -5, True, 1.5, None],
    )
    def test_others_are_refused(self, text: Any) -> None:
        with pytest.raises(UsageError, match="memory must be a size"):
            parse_memory(text)

    def test_the_environment_is_named_where_it_is_wrong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EDGEQ_MEMORY", "much")
        with pytest.raises(UsageError, match="EDGEQ_MEMORY must be a size"):
            ceiling()
        with pytest.raises(UsageError, match="EDGEQ_MEMORY must be a size"):
            ceiling("much")  # as a command hands it on
        with pytest.raises(UsageError, match=r"^memory must be a size"):
            ceiling("more")

    def test_what_was_asked_for_comes_before_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(of_ceiling, "_group_limit", lambda: None)
        assert ceiling() is None
        monkeypatch.setenv("EDGEQ_MEMORY", "2G")
        assert ceiling() == Ceiling(2_000 * MB, "EDGEQ_MEMORY 2G")
        assert ceiling("1G") == Ceiling(1_000 * MB, "--memory 1G")
        assert ceiling("none") is None


@linux
class TestControlGroups:
    def write(self, root: Path, own: str, limits: dict[str, str]) -> None:
        (root / "own").write_text(own)
        for name, text in limits.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)

    @pytest.fixture(autouse=True)
    def root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(of_ceiling, "_GROUPS", tmp_path)
        monkeypatch.setattr(of_ceiling, "_OWN_GROUPS", tmp_path / "own")
        monkeypatch.delenv("EDGEQ_MEMORY", raising=False)
        return tmp_path

    def test_the_lowest_limit_of_all_groups_holds(self, root: Path) -> None:
        self.write(
            root, "0::/a/b\n", {"memory.max": "max\n", "a/memory.max": "600000000\n", "a/b/memory.max": "900000000\n"}
        )
        found = ceiling()
        assert found is not None
        assert found.nbytes == 594 * MB  # the kernel has its part
        assert found.origin == "memory.max of the control group, 600 MB,"
        assert ceiling("2G") == found
        assert ceiling("500M") == Ceiling(500 * MB, "--memory 500M")

    def test_of_the_first_version(self, root: Path) -> None:
        self.write(root, "4:memory:/x\n0::/\n", {"memory/x/memory.limit_in_bytes": "700000000"})
        assert ceiling() == Ceiling(693 * MB, "memory.limit_in_bytes of the control group, 700 MB,", asked=False)

    def test_a_group_of_another_namespace(self, root: Path) -> None:
        """A container sees its own group at the root, whatever /proc calls it."""
        self.write(root, "0::/../../docker/1\n", {"memory.max": "700000000"})
        found = ceiling()
        assert found is not None
        assert found.nbytes == 693 * MB

    def test_no_limit(self, root: Path) -> None:
        self.write(root, "4:memory:/x\n", {"memory/x/memory.limit_in_bytes": str((1 << 63) - 4096)})
        assert ceiling() is None

    def test_what_others_hold_is_not_ours(self, root: Path) -> None:
        now = resident()
        assert now is not None
        stat = f"anon {now.private + 100 * MB}\nshmem 0\npagetables 0\nfile 5\n"
        self.write(root, "0::/\n", {"memory.max": "900000000", "memory.stat": stat})
        found = ceiling()
        assert found is not None
        assert found.nbytes == pytest.approx(0.99 * 800 * MB, abs=40 * MB)

    def test_what_is_left_for_the_page_cache(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(of_ceiling, "available_memory", lambda: 500 * MB)
        assert of_ceiling.cache_room(200 * MB, 300 * MB) == 300 * MB
        self.write(root, "0::/\n", {"memory.max": "400000000\n"})
        assert of_ceiling.cache_room(200 * MB, 300 * MB) == 96 * MB  # 1 % is the kernel's
        monkeypatch.setattr(of_ceiling, "available_memory", lambda: None)
        assert of_ceiling.cache_room(200 * MB, 390 * MB) == 6 * MB


# --- what is chosen --------------------------------------------------------------------------------------------------


class Described:
    """A model that is not here: the demo's configuration with larger weights."""

    def __init__(self, factor: int = 100) -> None:
        checkpoint = open_checkpoint(Path(edgeq.__file__).parent / "demo")
        self.config, self.storage, self._model, self._factor = checkpoint.config, checkpoint.storage, checkpoint, factor

    def memory_nbytes(self, spec: Any) -> int:
        return self._factor * self._model.memory_nbytes(spec)

    def is_mapped(self, spec: Any) -> bool:
        return True


def make_ops(bits: int | None) -> Ops[Any, Any]:
    return select("cpu", kv_dtype=None if bits is None else KV_DTYPES[bits])


def chosen(megabytes: int, *, factor: int = 100, **asked: Any) -> Choice:
    return choose_settings(Described(factor), make_ops, Ceiling(megabytes * MB, "--memory"), Asked(**asked))


@native
class TestChoice:
    def test_what_is_not_asked_for_is_chosen(self) -> None:
        whole, tight, tighter = chosen(2000), chosen(690), chosen(665)
        assert (whole.context, whole.kv_bits, whole.streamed, whole.drafts) == (32_768, None, 0, True)
        assert whole.context > tight.context > 0
        assert not tight.streamed
        assert tight.kv_bits in (None, 8)
        for choice, megabytes in ((whole, 2000), (tight, 690), (tighter, 665)):
            assert choice.plan.total + SPARE <= megabytes * MB

    def test_keys_and_values_are_never_kept_in_fewer_than_8_bits_unasked(self) -> None:
        for megabytes in (400, 660, 700, 900):
            try:
                assert chosen(megabytes).kv_bits in (None, 8)
            except MemoryBudgetError:
                continue
        assert chosen(690, kv_bits=4).kv_bits == 4

    def test_what_is_asked_for_is_kept(self) -> None:
        for context in (300, 5000, 20_000):
            assert chosen(900, context=context).context == context
        assert chosen(900, kv_bits=16).kv_bits == 16

    def test_weights_that_do_not_fit_are_read_anew(self) -> None:
        choice = chosen(400)
        assert choice.resident is not None
        assert choice.streamed + choice.resident > 500 * MB
        assert choice.plan.total + SPARE <= 400 * MB
        assert not choice.drafts

    @pytest.mark.parametrize(
        ("factor", "megabytes", "asked"),
        [
            (100, 60, {}), (100, 97, {"context": 2000}), (1, 75, {"context": 32_768, "kv_bits": 16}),
            (1, 66, {"context": 32_768, "kv_bits": 8}),
        ],
    )  # fmt: skip
    def test_a_refusal_says_what_would_fit_and_that_is_true(
        self, factor: int, megabytes: int, asked: dict[str, int]
    ) -> None:
        with pytest.raises(MemoryBudgetError, match=r"does not fit: [\d,]+ MB with a context of") as refused:
            chosen(megabytes, factor=factor, **asked)
        hint = refused.value.hint or ""
        assert "--memory" in hint
        for option, value in re.findall(r"--(memory|context|kv-bits) (\d+)", hint):
            changed = asked | ({} if option == "memory" else {option.replace("-", "_"): int(value)})
            chosen(int(value) if option == "memory" else megabytes, factor=factor, **changed)

    def test_a_megabyte_less_than_the_least_is_refused(self) -> None:
        least = least_ceiling(Described(), make_ops, Asked(4096, 16))
        assert least is not None
        chosen(least // MB, context=4096, kv_bits=16)
        with pytest.raises(MemoryBudgetError):
            chosen(least // MB - 1, context=4096, kv_bits=16)


# --- who gives way ---------------------------------------------------------------------------------------------------


@linux
class TestGivingWay:
    def test_in_the_written_order_and_no_more_than_needed(self) -> None:
        ledger, asked, held = Ledger(), list[str](), dict[str, Any]()
        for owner in ("scratch", "vision tower", "prefix checkpoints", "features of pictures"):  # in any order
            held[owner] = np.ones(8 << 20, np.uint8)

            def give_way(_: int, owner: str = owner) -> int:
                asked.append(owner)
                held[owner] = None
                return 8 << 20

            ledger.open(owner, lambda: 8 << 20, give_way=give_way)
        gc.collect()
        release_unused()
        room = 4 << 20
        budget = Budget(ledger, lambda: 0, lambda: None, Ceiling(Budget.process() + SPARE + room, "--memory"))
        budget.claim(1 << 20, "a little")
        assert asked == []
        budget.claim(room + (12 << 20), "two accounts")
        assert asked == ["prefix checkpoints", "features of pictures"]
        asked.clear()
        with pytest.raises(MemoryBudgetError, match="a lot do not fit: 1,074 MB more"):
            budget.claim(1 << 30, "a lot")
        assert asked == ["prefix checkpoints", "features of pictures", "vision tower", "scratch"]

    def test_who_gave_less_than_was_said_is_asked_again(self) -> None:
        asked, ledger = list[int](), Ledger()

        def give_way(nbytes: int) -> int:  # of what others hold as well
            asked.append(nbytes)
            return nbytes if len(asked) < 3 else 0

        ledger.open("prefix checkpoints", lambda: 0, give_way=give_way)
        budget = Budget(ledger, lambda: 0, lambda: None, Ceiling(Budget.process() + MB, "--memory"))
        with pytest.raises(MemoryBudgetError):
            budget.claim(1 << 34, "much")
        assert len(asked) == 3

    @native
    def test_a_conversation_holds_one_state_beside_what_is_kept(self) -> None:
        model = edgeq.load("demo", backend="cpu")
        chat, held = model.chat(max_tokens=3, draft="none"), model.engine.ops.held
        for text in ("What is 7 * 8?", "And 8 * 9?"):
            reply = iter(chat.send(text))
            next(reply)
            kept = model.prefixes.nbytes, sum(held().values()), held()["scratch"]
            logits = sum(n for what, n in model.prefixes._own().items() if what not in ("KV cache", "DeltaNet states"))
            model.prefixes.give_way(1 << 40)
            assert kept[1] - sum(held().values()) == kept[0] - logits
            list(reply)
        assert kept[0] > logits

    @linux
    @native
    def test_a_session_is_counted_when_it_is_loaded(self, tmp_path: Path) -> None:
        model = edgeq.load("demo", backend="cpu", memory=(peak_resident() or 0) + 80 * MB)
        chat = model.chat(max_tokens=3)
        list(chat.send("What is 7 * 8?"))
        chat.save(tmp_path / "a.eqs")
        again = edgeq.load_session(tmp_path / "a.eqs", model)
        state = again._context.state
        assert not any(is_mapped(x) for layer in state.layers if isinstance(layer, DeltaState) for x in layer)
        assert not any(is_mapped(layer.block(0)) for layer in state.layers if isinstance(layer, KVCache))
        assert [turn.reply for turn in again.turns] == [turn.reply for turn in chat.turns]
        again.save(tmp_path / "a.eqs")  # what was copied is known to be there
        assert edgeq.load_session(tmp_path / "a.eqs", model).ids == chat.ids

    def test_without_a_ceiling_nobody_does(self) -> None:
        ledger = Ledger()
        ledger.open("scratch", lambda: 1, give_way=lambda _: pytest.fail("asked"))
        Budget(ledger, lambda: 0, lambda: None).claim(1 << 50, "everything")

    def test_only_who_has_a_place_in_the_order_can(self) -> None:
        with pytest.raises(AssertionError, match="no place"):
            Ledger().open("weights", lambda: 1, give_way=lambda _: 0)


# --- that it is kept -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose keys and values are large, and its weights a few megabytes."""
    path = tmp_path_factory.mktemp("ceiling") / "model"
    write_checkpoint(path, config_values(**SHAPE, vocab_size=4096, intermediate_size=256))
    return path


def engines(folder: Path, backend: str, resident: int) -> tuple[Engine[Any, Any], Engine[Any, Any]]:
    """The same model with all of its weights resident, and with some."""
    checkpoint, ops = open_checkpoint(folder), select(backend)
    whole = Engine(checkpoint, ops)
    plan = choose_settings(checkpoint, lambda _: ops, Ceiling(10**10, ""), Asked(), 0)
    choice = plan._replace(streamed=1, resident=resident, resident_at_a_time=resident)
    return whole, Engine(open_checkpoint(folder), ops, choice=choice)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("backend", ["numpy", pytest.param("cpu", marks=native)])
def test_weights_that_come_and_go_give_the_same_bits(folder: Path, backend: str, share: float) -> None:
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    whole, some = engines(folder, backend, int(share * size))
    for tokens in (1, 40):
        feeds = [Feed(e.state(), np.arange(tokens, dtype=np.int32), rows=min(tokens, 3)) for e in (whole, some)]
        (expected,), (found,) = whole.run(feeds[:1]), some.run(feeds[1:])
        if backend == "cpu":
            np.testing.assert_array_equal(found.logits, expected.logits)
        else:  # NumPy's products choose an order by their shape
            np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-4, atol=1e-5)


@native
def test_a_prompt_in_two_calls_gives_the_same_bits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = edgeq.load(folder, backend="cpu", memory="8G", kv_bits=16)
    ids = np.arange(300, dtype=np.int32)
    (whole,) = model.engine.run([Feed(model.state(), ids, rows=1)])
    calls, claim = list[int](), model.engine.claim

    def short(feeds: Any, copies: int = 0, *, drafts: bool = False) -> None:
        if sum(tokens for _, tokens, _ in feeds) > 100:
            raise MemoryBudgetError("short")
        calls.append(feeds[0][1])
        claim(feeds, drafts=drafts)

    monkeypatch.setattr(model.engine, "claim", short)
    (pieces,) = model.engine.run([Feed(model.state(), ids, rows=1)])
    assert calls == [64, 64, 64, 64, 44]
    np.testing.assert_array_equal(pieces.logits, whole.logits)
    for a, b in zip(pieces.state.layers, whole.state.layers, strict=True):
        for x, y in zip(getattr(a, "arrays", lambda a=a: a)(), getattr(b, "arrays", lambda b=b: b)(), strict=True):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@linux
def test_pages_come_and_go(tmp_path: Path) -> None:
    from edgeq.formats.mapped import map_file

    (tmp_path / "file").write_bytes(bytes(range(256)) * (40 << 12))
    x = np.frombuffer(map_file(tmp_path / "file"), np.uint8)[5000 : 30 << 20]
    pages, before = Pages([x, np.ones(5)]), resident()
    pages.come()
    total, there = int(x.sum()), resident()
    pages.read_ahead()
    pages.let_go()
    after = resident()
    assert before
    assert there
    assert after
    assert there.files - before.files > 25 << 20
    assert there.files - after.files > 25 << 20
    assert int(x.sum()) == total
    assert x.nbytes <= pages.nbytes <= x.nbytes + 8192


@linux
def test_pages_that_are_not_locked_go(tmp_path: Path) -> None:
    """Those before a locked part of a file, and those behind it."""
    from edgeq.formats.mapped import drop_pages, map_file
    from edgeq.memory.pages import lock_pages

    (tmp_path / "file").write_bytes(bytes(24 << 20))
    mapping = map_file(tmp_path / "file")
    x = np.frombuffer(mapping, np.uint8)
    try:
        lock_pages([x[8 << 20 : 9 << 20]])
    except MemoryBudgetError as error:
        pytest.skip(str(error))
    x.sum()
    there = resident()
    drop_pages(mapping)
    after = resident()
    assert there
    assert after
    assert 22 << 20 < there.files - after.files < 24 << 20


# A conversation that outgrows its ceiling, in a process of its own: what was refused, and the peak against the ceiling.
TALK = """
import json, sys
path, megabytes = json.loads(sys.argv[1])
import edgeq
from edgeq.errors import MemoryBudgetError
from edgeq.memory.resident import peak_resident
from edgeq.session.context import Context
model = edgeq.load(path, backend="cpu", memory=megabytes * 10**6, kv_bits=16)
states, refused = [], 0
for turn in range(40):
    begun = states[turn // 3 % len(states)][0] if turn % 3 and states else None
    context = Context(model.engine, begun, prefixes=model.prefixes)
    try:
        context.feed([turn + 1] * 150)
        states.append((context.state, context.feed([7])[-1].tobytes()))
    except MemoryBudgetError:
        refused += 1
print(json.dumps({"peak": peak_resident(), "refused": refused, "kept": len(states)}))
"""


@linux
@native
@pytest.mark.parametrize("megabytes", [140, 200])
def test_a_ceiling_is_kept_whatever_is_asked(folder: Path, megabytes: int) -> None:
    done = run_python(TALK, json.dumps([str(folder), megabytes]))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["peak"] <= megabytes * MB
    assert found["refused"]
    assert found["kept"]


# The same in a control group, whose limit is the ceiling unless there is to be none; the system kills who goes above.
GROUP = """
import os, sys
from pathlib import Path
group, path, memory = sys.argv[1:]
Path(group, "cgroup.procs").write_text(str(os.getpid()))
import edgeq
from edgeq.errors import MemoryBudgetError
from edgeq.session.context import Context
model = edgeq.load(path, backend="cpu", memory=memory or None, kv_bits=16)
states, refused = [], 0
for turn in range(40):
    context = Context(model.engine, states[-1] if turn % 3 and states else None, prefixes=model.prefixes)
    try:
        context.feed([turn + 1] * 150)
        states.append(context.state)
    except MemoryBudgetError as error:
        assert "of the control group, 170 MB, allows" in str(error), error
        refused += 1
print(len(states), refused)
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group that may take 170 MB, of whichever version there is."""
    for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(root, f"edgeq-test-{os.getpid()}")
        with suppress(OSError):
            group.mkdir()
        try:
            with (group / limit).open("r+") as file:  # which the system makes, if it makes any
                file.write(str(170 * MB))
        except OSError:
            continue
        else:
            yield group
            return
        finally:
            with suppress(OSError):
                group.rmdir()
    pytest.skip("no control group with a limit of memory can be made here")


@linux
@native
def test_a_real_limit_is_lived_under(folder: Path, group: Path) -> None:
    done = run_python(GROUP, str(group), str(folder), "")
    assert done.returncode == 0, done.stderr[-2000:]
    kept, refused = map(int, done.stdout.split())
    assert min(kept, refused) > 5
    assert run_python(GROUP, str(group), str(folder), "none").returncode == -signal.SIGKILL


@linux
@native
def test_what_is_read_of_a_long_text_is_claimed() -> None:
    model = edgeq.load("demo", backend="cpu", memory=(peak_resident() or 0) + 80 * MB)
    before, text = peak_resident() or 0, "the quick brown fox " * 400_000
    for read in (lambda: model.generate(text), lambda: list(model.chat().send(text))):
        with pytest.raises(
            MemoryBudgetError, match="a text of 8,000,000 characters, and its tokens, do not fit"
        ) as error:
            read()
        assert (error.value.hint or "").startswith("shorten the text")
    assert (peak_resident() or 0) - before < 80 * MB


@linux
@native
def test_what_was_dropped_makes_room_for_another_model(folder: Path) -> None:
    """A model refers to itself: the memory of one that nobody has anymore waits for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        model = edgeq.load(folder, backend="cpu", memory=Budget.process() + 120 * MB, kv_bits=16)
        state = model.advance([5] * 1000)
        ceiling, held = model.engine.budget.ceiling, Budget.process()
        del model, state
        edgeq.load(folder, backend="cpu", memory=ceiling, kv_bits=16)
        assert Budget.process() < held
    finally:
        gc.enable()


# Large pictures under a ceiling that leaves no room to decode them: which of them were seen, and the peak above it.
LOOK = """
import json, sys
folder = sys.argv[1]
import edgeq
from edgeq.errors import MemoryBudgetError
from edgeq.memory.budget import Budget
from edgeq.memory.resident import peak_resident
from PIL import Image
ceiling = Budget.process() + 75 * 10**6
model, seen = edgeq.load("demo", backend="cpu", memory=ceiling), []
open("/proc/self/clear_refs", "w").write("5")
for name in ("a.png", "b.webp", "c.tif", "d.gif", "e.jpg", "f.png"):
    try:
        list(model.chat(max_tokens=2).send("What is this?", images=[f"{folder}/{name}"]))
        seen.append(name)
    except MemoryBudgetError as error:
        assert error.hint.startswith("make it smaller first"), error.hint
print(json.dumps([seen, peak_resident() - ceiling]))
"""


@linux
@native
def test_pictures_are_decoded_within_the_ceiling(tmp_path: Path) -> None:
    """A JPEG at a part of its size; formats that cannot be are refused, and the next picture is seen."""
    for name in ("a.png", "b.webp", "c.tif", "d.gif", "e.jpg"):
        Image.new("RGB", (4000, 3000), (20, 90, 30)).save(tmp_path / name)
    Image.new("RGB", (300, 200)).save(tmp_path / "f.png")
    done = run_python(LOOK, str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    seen, above = json.loads(done.stdout)
    assert seen == ["e.jpg", "f.png"]
    assert above <= 0


# Four threads, each with a sequence of its own; how many were refused, and the peak above the ceiling.
THREADS = """
import json, sys
from threading import Barrier, Thread
import edgeq
from edgeq.errors import MemoryBudgetError
from edgeq.memory.budget import Budget
from edgeq.memory.resident import peak_resident
from edgeq.session.context import Context
warm = edgeq.load(sys.argv[1], backend="cpu")
Context(warm.engine).feed([5] * 300)
del warm
ceiling, together, refused, others = Budget.process() + 80 * 10**6, Barrier(4), [], []
open("/proc/self/clear_refs", "w").write("5")
model = edgeq.load(sys.argv[1], backend="cpu", memory=ceiling, kv_bits=16)
def talk(number):
    for _ in range(3):
        together.wait()
        context = Context(model.engine)
        try:
            for _ in range(3):
                context.feed([number] * 200)
        except MemoryBudgetError as error:
            refused.append(error)
        except Exception as error:
            others.append(repr(error))
threads = [Thread(target=talk, args=(i,)) for i in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps([len(refused), others, peak_resident() - ceiling]))
"""


@linux
@native
def test_threads_take_what_they_claim_one_after_another(folder: Path) -> None:
    done = run_python(THREADS, str(folder))
    assert done.returncode == 0, done.stderr[-2000:]
    refused, others, above = json.loads(done.stdout)
    assert 0 < refused < 12
    assert not others
    assert above <= 0


@linux
@native
def test_random_sequences_of_actions() -> None:
    """A few here; ten thousand by hand (tests/ceiling_machine.py)."""
    done = run_python("import sys; sys.path.insert(0, 'tests'); import ceiling_machine; ceiling_machine.main(12)")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@linux
def test_weights_that_come_back_do_so_beside_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of libraries that came after the first look are known once weights have been let go."""
    from edgeq.formats.mapped import map_file

    (tmp_path / "weights").write_bytes(bytes(24 << 20))
    pages = Pages([np.frombuffer(map_file(tmp_path / "weights"), np.uint8)])
    monkeypatch.setattr(Budget, "_all", set())
    monkeypatch.setattr(Budget, "_code", 0)  # as if everything had been imported since
    budget = Budget(Ledger(), lambda: 24 << 20, lambda: None, Ceiling(1 << 40, "--memory"))
    pages.come()
    there = budget.used()
    pages.let_go()
    Budget.look(budget)
    assert budget.used() == pytest.approx(there, abs=2 << 20)
    assert budget.used(weights=False) == pytest.approx(there - (24 << 20), abs=2 << 20)


class TestOptions:
    def test_wrong_sizes_are_told_before_anything_is_loaded(self) -> None:
        with pytest.raises(UsageError, match="memory must be a size"):
            edgeq.load("no such model", memory="1.5X")

    def test_backends_that_cannot_be_held_to_it_refuse_it(self) -> None:
        with pytest.raises(UsageError, match="the numpy backend cannot be held to a ceiling"):
            edgeq.load("demo", backend="numpy", memory="2G")

    @linux
    @native
    def test_a_conversation_under_a_ceiling_says_what_it_says_without(self) -> None:
        said = []
        for memory in (None, peak_resident()):
            chat = edgeq.load("demo", backend="cpu", memory=memory and memory + 80 * MB).chat(temperature=0.0)
            said.append("".join(piece.text for piece in chat.send("What is 7 * 8?")))
        assert said[0] == said[1]
        assert "56" in said[0]
