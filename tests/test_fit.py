"""`edgeq fit`: what a model takes and how fast it will be, for models that are here and that are not."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgeq.hub
from edgeq import load
from edgeq.api import KV_DTYPES
from edgeq.backends import select
from edgeq.checkpoint import open_checkpoint
from edgeq.cli import main
from edgeq.errors import EdgeqError, MemoryBudgetError, UsageError
from edgeq.family import SIZES, family_config, size_of
from edgeq.fit import PARTS, Wanted, find_target, picture_grids
from edgeq.machine import measure, system
from edgeq.machine.boards import BOARDS, board_facts
from edgeq.machine.facts import Facts, facts_file, keep_facts, kept_facts
from edgeq.machine.speed import expected_speed
from edgeq.memory.budget import SPARE
from edgeq.memory.ceiling import Ceiling
from edgeq.memory.plan import plan_memory
from edgeq.quant.described import DescribedModel
from edgeq.quant.recipe import choose_recipe
from edgeq.weights import Part, text_tensors

KEYS = {
    "weights", "kv", "states", "checkpoints", "vision", "scratch", "runtime", "total", "largest_context",
    "prompt_tokens_per_s", "generated_tokens_per_s",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("EDGEQ_MEMORY", "EDGEQ_BACKEND"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Facts:
    """The native backend, on a machine that is taken for a Raspberry Pi 5."""
    pytest.importorskip("edgeq.backends.cpu", reason="the native backend is not built", exc_type=ImportError)
    facts = board_facts("pi5")
    monkeypatch.setattr(measure, "measure_machine", lambda _: facts)
    return facts


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(["fit", *arguments])
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


def fitted(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    found, out, err = run(capsys, *arguments, "--json")
    assert found == code, err
    result: dict[str, Any] = json.loads(out)
    return result


class TestFamily:
    @pytest.mark.parametrize(
        ("size", "parameters"), [("0.8b", 752_393_024), ("2b", 1_881_825_088), ("4b", 4_205_751_296)]
    )
    def test_the_numbers_of_parameters_are_the_hubs(self, size: str, parameters: int) -> None:
        assert sum(spec.size for spec in text_tensors(family_config(size).text)) == parameters

    def test_names(self) -> None:
        assert [size_of(name) for name in ("qwen3.5:4b", "Qwen/Qwen3.5-0.8B", "qwen3.5-2B-base", "4B")] == [
            "4b", "0.8b", "2b", "4b"
        ]  # fmt: skip
        assert [size_of(name) for name in ("qwen3.5:9b", "demo", "Qwen/Qwen3-4B", "")] == [None] * 4


class TestDescribed:
    @pytest.mark.parametrize("bits", [4, 8])
    def test_is_what_quantize_makes(self, bits: int, tmp_path: Path, chat_folder: Path) -> None:
        from edgeq.quant import quantize

        quantize(chat_folder, tmp_path / "q", bits=bits)
        made, ops = open_checkpoint(tmp_path / "q"), select("numpy")
        described = DescribedModel.of_recipe(open_checkpoint(chat_folder).config, choose_recipe(None, bits, None))
        assert {s.name: t for s, t in described.storage()} == {s.name: t for s, t in made.storage()}
        grids = [(1, 4, 4)]
        assert plan_memory(described, ops, 999, grids=grids) == plan_memory(made, ops, 999, grids=grids)
        values = json.loads((tmp_path / "q" / "config.json").read_text())
        by_config = DescribedModel.of_config(made.config, values)
        text, same = (
            {s.name: t for s, t in model.storage() if s.part is Part.TEXT} for model in (by_config, made)
        )  # of a tower config.json names what differs from the default alone
        assert text == same

    def test_unquantized(self, chat_folder: Path) -> None:
        whole = open_checkpoint(chat_folder)
        described = DescribedModel.of_recipe(whole.config, choose_recipe("none", None, None))
        assert {s.name: t for s, t in described.storage()} == {s.name: t for s, t in whole.storage()}


class TestCommand:
    @pytest.mark.usefixtures("native")
    @pytest.mark.parametrize("model", ["demo", "qwen3.5:4b", "Qwen/Qwen3.5-2B"])
    def test_json(self, capsys: pytest.CaptureFixture[str], model: str) -> None:
        found = fitted(capsys, model, "--context", "2048")
        assert found.keys() >= KEYS
        assert found["total"] == sum(found[name] for name in PARTS)
        assert found["context"] == 2048
        assert found["prompt_tokens_per_s"] > found["generated_tokens_per_s"] > 0
        assert all(row.keys() >= KEYS for row in found["table"])
        bits, contexts = ([row[name] for row in found["table"]] for name in ("bits", "context"))
        if model != "demo":
            assert sorted(set(bits)) == [4, 8, 16]
            assert [row["yarn"] for row in found["table"] if row["context"] == 1 << 20] == [4] * 3
            assert sorted(set(contexts)) == [1024, 4096, 16384, 65536, 262144, 1048576]

    @pytest.mark.usefixtures("native")
    def test_text_is_on_stdout_and_how_it_was_found_on_stderr(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, err = run(capsys, "qwen3.5:0.8b", "--bits", "4", "--memory", "2G")
        assert not code
        assert all(name in out for name in ("weights", "KV cache", "DeltaNet states", "kept states", "largest context"))
        assert "bits" not in err
        assert "speeds" in err

    @pytest.mark.usefixtures("native")
    def test_memory(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        # A chat's process, not this one with the tests before it.
        monkeypatch.setattr("edgeq.cli.memory.used_by_a_chat", lambda *_: 95_000_000)
        small = fitted(capsys, "qwen3.5:2b", "--bits", "4", "--memory", "1.4G")
        large = fitted(capsys, "qwen3.5:2b", "--bits", "4", "--memory", "2.5G")
        assert 4096 < small["largest_context"] < large["largest_context"] < 262144
        assert small["largest_context"] % 256 == 0
        most = str(small["largest_context"])
        assert fitted(capsys, "qwen3.5:2b", "--bits", "4", "--memory", "1.4G", "--context", most)["fits"]
        monkeypatch.setenv("EDGEQ_MEMORY", "1.4G")
        longer = fitted(capsys, "qwen3.5:2b", "--bits", "4", "--context", str(int(most) + 256))
        assert (longer["fits"], longer["kv_dtype"]) == (True, "f16")  # what a chat prefers to fewer bits of keys
        assert longer["streamed"] > 0
        assert "1.4G" in longer["memory_from"]
        assert longer["generated_tokens_per_s"] < 0.8 * small["generated_tokens_per_s"]
        fewer = fitted(capsys, "qwen3.5:2b", "--bits", "4", "--kv-bits", "4")
        assert fewer["largest_context"] > 1.5 * small["largest_context"]
        refused = fitted(capsys, "qwen3.5:2b", "--bits", "8", "--context", "262144", code=3)
        assert not refused["fits"]
        code, out, err = run(capsys, "qwen3.5:2b", "--bits", "4", "--context", "22528")
        assert not code
        assert "read anew for every token" in out
        code, out, err = run(capsys, "qwen3.5:2b", "--bits", "8", "--context", "262144")
        assert code == 3
        assert "does not fit" in out
        assert err.startswith("error: ") or "\nerror: " in err
        assert "EDGEQ_MEMORY 1.4G allows 1,400 MB" in err

    @pytest.mark.usefixtures("native")
    def test_several_conversations_and_pictures(self, capsys: pytest.CaptureFixture[str]) -> None:
        one = fitted(capsys, "qwen3.5:2b", "--bits", "4")
        three = fitted(capsys, "qwen3.5:2b", "--bits", "4", "--parallel", "3")
        assert (three["kv"], three["states"]) == (3 * one["kv"], 3 * one["states"])
        assert three["weights"] == one["weights"]
        seen = fitted(capsys, "qwen3.5:2b", "--bits", "4", "--image", "4000x3000", "--video", "600")
        assert seen["vision"] > 0 == one["vision"]
        assert 1024 < seen["picture_tokens"] <= 1024 + 2048

    @pytest.mark.parametrize(("arguments", "message"), [
        (["demo", "--image", "wide"], "expected WIDTHxHEIGHT"),
        (["demo", "--image", "0x4"], "expected WIDTHxHEIGHT"),
        (["demo", "--video", "0"], "expected seconds above 0"),
        (["demo", "--video", "nan"], "expected seconds above 0"),
        (["demo", "--parallel", "1000000000"], "expected 1 to 1024 conversations"),
        (["demo", "--context", "4", "--video", "600"], "the pictures are"),
        (["demo", "--kv-bits", "5"], "cannot be kept in 5 bits"),
        (["demo", "--memory", "much"], "memory must be a size"),
        (["demo", "--context", "99999999"], "the context must be 1 to"),
        (["demo", "--machine", "pi9"], "unknown machine"),
        (["qwen3.5:2b", "--bits", "7"], "bits must be"),
        (["nothing-of-this-name"], "model not found"),
    ])  # fmt: skip
    def test_usage(self, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
        code, out, err = run(capsys, *arguments, "--no-measure")
        assert (code, out) == (2, "")
        assert message in err

    def test_not_measured(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = fitted(capsys, "demo", "--no-measure", "--backend", "numpy")
        assert found["prompt_tokens_per_s"] is found["generated_tokens_per_s"] is None
        _, _, err = run(capsys, "demo", "--no-measure", "--backend", "numpy")
        assert "speeds are unknown" in err

    def test_a_board(self, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("edgeq.backends.cpu", reason="the native backend is not built", exc_type=ImportError)
        rates = [fitted(capsys, "qwen3.5:2b", "--bits", "4", "--machine", name) for name in ("pi5", "pi4")]
        assert rates[0]["generated_tokens_per_s"] > rates[1]["generated_tokens_per_s"] > 1
        assert rates[0]["measured"] == "computed for pi5"
        assert (rates[0]["memory"], [each["board"] for each in rates[0]["boards"]]) == (
            None, ["2 GB", "4 GB", "8 GB", "16 GB"]
        )  # fmt: skip
        contexts = [each["largest_context"] for each in rates[0]["boards"]]
        assert 4096 < contexts[0] < contexts[1] < contexts[2] == contexts[3] == 262144
        _, out, _ = run(capsys, "qwen3.5:4b", "--machine", "pi4")
        assert "pi4 with 1 GB: does not fit" in out
        with_memory = fitted(capsys, "qwen3.5:2b", "--bits", "4", "--machine", "pi5", "--memory", "1.5G")
        assert with_memory["memory"] == 1_500_000_000
        assert "boards" not in with_memory


class TestHub:
    """Models that are not here."""

    def test_of_the_hub_only_the_configuration(self, monkeypatch: pytest.MonkeyPatch, chat_folder: Path) -> None:
        values = json.loads((chat_folder / "config.json").read_text())
        monkeypatch.setattr("edgeq.fit.find_here", lambda _: None)
        monkeypatch.setattr("edgeq.fit.hub_config", lambda _: values)
        assert [variant.bits for variant in find_target("somebody/model").variants] == [4, 8, 16]
        assert [variant.bits for variant in find_target("somebody/model", 8).variants] == [8]
        quantized = values | {"quantization": {"bits": 8, "group_size": 32}}
        monkeypatch.setattr("edgeq.fit.hub_config", lambda _: quantized)
        (own,) = find_target("somebody/model").variants
        assert 9 <= own.bits < 9.5
        for other in (values | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, None):
            monkeypatch.setattr("edgeq.fit.hub_config", lambda _, other=other: other)
            with pytest.raises(UsageError, match="known once it is here"):
                find_target("somebody/model")

    def test_what_is_in_the_cache_is_used(self, monkeypatch: pytest.MonkeyPatch, chat_folder: Path) -> None:
        monkeypatch.setattr(edgeq.hub, "_cached", lambda _: chat_folder)
        assert find_target("somebody/model").here == chat_folder

    def test_offline(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
        code, out, err = run(capsys, "somebody/model", "--no-measure")
        assert (code, out) == (5, "")
        assert "cannot be reached" in err


def numpy_ops(kv_bits: int | None) -> Any:
    """Its arithmetic is the native backend's but for keys and values."""
    return select("numpy", kv_dtype=kv_bits and KV_DTYPES[kv_bits])


class TestWanted:
    @settings(max_examples=12)
    @given(
        st.sampled_from(SIZES), st.sampled_from([4, 8, 16]), st.integers(1, 1 << 20), st.integers(1, 4),
        st.integers(10**8, 2 * 10**10),
    )  # fmt: skip
    def test_what_fits_is_below_the_ceiling(
        self, size: str, bits: int, context: int, sequences: int, nbytes: int
    ) -> None:
        (variant,), asked = find_target(size, bits).variants, Ceiling(nbytes, "--memory")
        facts = board_facts("pi5")
        wanted = Wanted(numpy_ops, None, (), (), sequences, ceiling=asked, facts=facts, reread=facts.pages)
        found = wanted.of(variant, context)
        assert not found.fits or found.plan.total <= nbytes - SPARE
        assert found.fits or context > found.largest
        if found.largest:
            assert wanted.of(variant, found.largest).fits
        assert found.speed is not None
        assert min(found.speed) > 0

    @settings(max_examples=12)
    @given(st.sampled_from(SIZES), st.sampled_from([4, 8, 16]), st.integers(1, 1 << 20), st.integers(10**8, 2 * 10**10))
    def test_what_fits_free_memory(self, size: str, bits: int, context: int, nbytes: int) -> None:
        (variant,) = find_target(size, bits).variants
        wanted = Wanted(numpy_ops, free=nbytes, facts=board_facts("pi5"))
        found = wanted.of(variant, context)
        assert found.fits == (found.plan.total <= nbytes - SPARE)
        assert found.fits <= (context <= max(found.largest, 256))
        if found.largest:
            assert wanted.of(variant, found.largest).fits
            assert wanted.of(variant).fits

    def test_weights_that_do_not_stay(self) -> None:
        """A token and a chunk of a prompt take as much longer as reading them anew takes."""
        (variant,), facts = find_target("2b", 4).variants, board_facts("pi5")
        whole = Wanted(numpy_ops, ceiling=Ceiling(2 * 10**9, ""), facts=facts).of(variant, 4096)
        part = Wanted(numpy_ops, ceiling=Ceiling(650 * 10**6, ""), facts=facts, reread=1e9).of(variant, 4096)
        assert whole.speed is not None
        assert part.speed is not None
        assert not whole.streamed
        assert part.fits
        seconds = part.streamed / 1e9
        assert 0.3 < seconds < 1.1
        assert 1 / part.speed.generated == pytest.approx(1 / whole.speed.generated + seconds)
        assert 4096 / part.speed.prompt > 4096 / whole.speed.prompt + 4096 / part.chunk * seconds - 1e-6
        assert Wanted(numpy_ops, ceiling=Ceiling(650 * 10**6, ""), facts=facts).of(variant, 4096).speed is None

    def test_pictures_of_a_model_that_does_not_see(self) -> None:
        config = DescribedModel.of_recipe(family_config("2b"), choose_recipe("q4", None, None, "none")).config
        with pytest.raises(UsageError, match="does not see"):
            picture_grids(config, [(10, 10)])


class TestAgreement:
    """What is said beforehand is what a chat does: context, KV bits, chunk, what is read anew, and refusals."""

    USED = 84 << 20

    @pytest.fixture(autouse=True)
    def _used(self, native: Facts, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the process takes is no matter here: that of the tests grows as they go on."""
        for module in ("edgeq.api", "edgeq.cli.memory"):
            monkeypatch.setattr(f"{module}.taken", lambda _=0: self.USED)

    @pytest.mark.parametrize("more", [1, 14, 17, 20, 29])
    @pytest.mark.parametrize("options", [
        (), ("--context", "2048"), ("--context", "20000"), ("--kv-bits", "4"), ("--kv-bits", "8", "--context", "32768"),
        ("--kv-bits", "16"),
    ])  # fmt: skip
    def test_with_a_chat(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, more: int, options: tuple[str, ...]
    ) -> None:
        """The demo under ceilings of so many MB more than the process takes: refused, read in part, and whole."""
        from edgeq.memory.budget import Budget

        monkeypatch.setattr(Budget, "claim", lambda *_, **__: None)  # nothing is run
        memory = f"{(self.USED + (more << 20)) // 10**6}M"
        given = dict(zip(options[::2], map(int, options[1::2]), strict=True))
        said: EdgeqError | None = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                choice = load(
                    "demo", memory=memory, context=given.get("--context"), kv_bits=given.get("--kv-bits")
                ).engine.choice
        except MemoryBudgetError as error:
            choice, said = None, error
        code, out, err = run(capsys, "demo", "--memory", memory, *options, "--json")
        found = json.loads(out)
        assert (code, found["fits"]) == ((0, True) if choice else (3, False))
        if choice is None:
            assert said is not None
            assert said.message in err
            assert said.hint is not None
            assert said.hint in err.replace("\n", " ")
            return
        assert found["context"] == choice.context
        assert found["kv_dtype"] == choice.ops.kv_dtype
        assert (found["chunk"], found["streamed"]) == (choice.chunk, choice.streamed)
        assert {name: found[name] for name in PARTS if name != "checkpoints"} == {
            name: getattr(choice.plan, name) for name in PARTS if name != "checkpoints"
        }
        assert found["total"] <= choice.ceiling.nbytes - SPARE

    @pytest.mark.parametrize("sight", [("--image", "900x700"), ("--image", "64x64", "--video", "2")])
    @pytest.mark.parametrize("parallel", ["1", "3"])
    def test_pictures_and_conversations_take_from_the_context(
        self, capsys: pytest.CaptureFixture[str], sight: tuple[str, ...], parallel: str
    ) -> None:
        memory = f"{(self.USED + (22 << 20)) // 10**6}M"
        alone = fitted(capsys, "demo", "--memory", memory)
        beside = fitted(capsys, "demo", "--memory", memory, *sight, "--parallel", parallel)
        assert 0 < beside["picture_tokens"] < beside["context"] <= alone["context"]
        assert beside["total"] <= beside["memory"] - SPARE
        assert beside["vision"] > 0


class TestFacts:
    def test_are_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        facts = board_facts("pi4")
        assert kept_facts(facts.isa) is None
        assert keep_facts(facts) == facts_file(facts.isa)
        assert kept_facts(facts.isa) == facts
        assert kept_facts("another") is None

    @pytest.mark.parametrize("damage", [
        {"stream": {}}, {"values": 0}, {"delta": "fast"}, {"prompt_threads": 0}, {"generation_threads": 2.0},
        {"layers": 0}, {"pages": None}, {"tokens": "1"}, {"load": -1},
        {"weights": {"4": float("nan")}}, {"products": None}, {"isa": "other"}, {"attention": {"f16": -1}},
    ])  # fmt: skip
    def test_damaged_ones_count_as_none(self, damage: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        facts = board_facts("pi4")
        path = keep_facts(facts)
        assert path is not None
        path.write_text(json.dumps(json.loads(path.read_text()) | damage))
        assert kept_facts(facts.isa) is None
        path.write_text(path.read_text()[:50])
        assert kept_facts(facts.isa) is None

    def test_a_cache_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert keep_facts(board_facts("pi4")) is None

    def test_measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(measure, "_ROWS", 64)
        monkeypatch.setattr(measure, "_PAST", 64)
        monkeypatch.setattr(measure, "_ROUNDS", 1)
        monkeypatch.setattr(measure, "_TOKENS", 16)
        monkeypatch.setattr(measure, "_model_config", lambda _: measure._least_config())
        native = pytest.importorskip(
            "edgeq.backends.cpu", reason="the native backend is not built", exc_type=ImportError
        )
        steps = list[tuple[int, int]]()
        before = native._native.thread_count()
        facts = measure.measure_machine(lambda done, total, _: steps.append((done, total)), seconds=0.0, nbytes=1 << 20)
        assert native._native.thread_count() == before
        assert steps == [(i, len(steps)) for i in range(len(steps))]
        keep_facts(facts)
        assert kept_facts(facts.isa) == facts

    def test_a_busy_machine_does_not_get_fewer_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        native = pytest.importorskip("edgeq.backends.cpu")._native
        for name, value in (("_ROUNDS", 1), ("_TOKENS", 16), ("_ROWS", 64), ("_PAST", 64)):
            monkeypatch.setattr(measure, name, value)
        monkeypatch.setattr(measure, "_model_config", lambda _: measure._least_config())
        monkeypatch.setattr(measure, "_best_count", lambda _, default: default + 1)
        default = native.thread_count()
        for beside, threads in ((1.0, default), (0.0, default + 1)):
            monkeypatch.setattr(
                system.Neighbours, "__exit__", lambda self, *_, beside=beside: setattr(self, "load", beside)
            )
            facts = measure.measure_machine(seconds=0.0, nbytes=1 << 20)
            assert (facts.prompt_threads, facts.generation_threads, facts.load) == (threads, threads, beside)

    def test_measured_on_a_busy_machine(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, native: Facts
    ) -> None:
        """Facts say so, and so does who uses them."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        module = pytest.importorskip("edgeq.backends.cpu")._native
        for beside, busy in ((0.1, False), (1.5, True)):
            keep_facts(replace(native, isa=module.isa(), load=beside))
            assert fitted(capsys, "demo")["measured_under_load"] == busy
            _, _, err = run(capsys, "demo")
            assert ("kept 1.5 processors busy" in err and "edgeq doctor --measure" in err) == busy

    def test_threads_follow(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Prompts and generation use their own numbers, and the results are the same."""
        native = pytest.importorskip(
            "edgeq.backends.cpu", reason="the native backend is not built", exc_type=ImportError
        )
        module = native._native
        before = module.thread_count()
        logits = {}
        try:
            for prompt, generation in ((1, 1), (3, 2)):
                monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(prompt)))
                keep_facts(
                    replace(board_facts("pi4"), isa=module.isa(), prompt_threads=prompt, generation_threads=generation)
                )
                model = load("demo", backend="cpu")
                _, state = model.forward(list(range(64)))
                assert module.thread_count() == prompt
                logits[prompt], _ = model.forward([5], state)
                assert module.thread_count() == generation
        finally:
            module.set_thread_count(before)
        assert (logits[1] == logits[3]).all()


@pytest.mark.parametrize(("board", "prompt", "generated"), [
    ("pi5", 25, 4.1), ("pi4", 4, 1.7), ("m1", 90, 20), ("m4", 130, 36),
])  # fmt: skip
def test_expected_speeds_are_near_published_ones(board: str, prompt: float, generated: float) -> None:
    """A Pi 5 generated 4.5 tokens/s with a 4B model of 2.5 GB, and took 28 tokens/s of prompt (MNN, potato-os); an M4
    generated 28 to 39 (llama.cpp, MLX)."""
    (variant,) = find_target("4b", 4).variants
    speed = expected_speed(variant.model, select("numpy"), board_facts(board), 512)
    assert speed.generated == pytest.approx(generated, rel=0.2)
    assert speed.prompt == pytest.approx(prompt, rel=0.3)


def test_every_board_is_compared() -> None:
    assert set(BOARDS) == {"pi5", "pi4", "m1", "m4"}


def test_the_parts_of_a_plan_are_all_shown() -> None:
    model = DescribedModel.of_recipe(family_config("2b"), choose_recipe("q4", None, None))
    assert set(PARTS) == set(plan_memory(model, select("numpy"), 64)._fields)
