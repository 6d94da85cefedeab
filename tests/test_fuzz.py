"""Changed and truncated files of every kind are read, or refused in one clear message (tools/fuzz.py)."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random
from typing import Any

import fuzz
import fuzz_mutators
import pytest
from fuzz_targets import Target, targets

from edgeq.errors import ModelError

NAMES = (
    "safetensors", "gguf", "gguf-model", "gguf-k", "gguf-part", "manifest", "template", "config", "generation_config",
    "index", "gptq", "compressed", "compressed-config", "modes", "modes-config", "quantization", "adapter",
    "adapter-config", "mlx-adapter-config", "gguf-adapter", "record", "tokenizer_config", "templates", "tokenizer",
    "session", "session-document", "png", "jpeg", "webp", "gif", "bmp", "tiff",
)  # fmt: skip


@pytest.fixture(scope="module")
def all_targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return {target.name: target for target in targets(tmp_path_factory.mktemp("fuzz"))}


@pytest.mark.parametrize("name", NAMES)
def test_a_few_hundred_of_each(all_targets: dict[str, Target], name: str) -> None:
    """120 mutations and 30 truncations, the same in every run."""
    results, faults = fuzz.fuzz(all_targets[name], 20261126, range(150), 30)
    assert not faults, "\n".join(map(str, faults))
    assert results["refused"] > 30  # of what was changed, that is; the seeds themselves are read
    assert results.total() == 150


def test_every_target_is_tried(all_targets: dict[str, Target]) -> None:
    assert tuple(all_targets) == NAMES
    assert sum(target.share for target in all_targets.values()) == 1000


@pytest.mark.soak
def test_a_million() -> None:
    assert not fuzz.fuzz_all([], 1, 1_000_000, 1_000)


class TestTheHarness:
    """It would notice."""

    @pytest.fixture
    def target(self, tmp_path: Path) -> Target:
        return Target("t", tmp_path / "x", b"seed", fuzz_mutators.mutate_bytes, lambda path: None, 1)

    def faults(self, target: Target, run: Any) -> list[fuzz.Fault]:
        return fuzz.fuzz(target._replace(run=run), 1, range(1), 0)[1]

    def test_an_exception(self, target: Target) -> None:
        def run(_: Path) -> None:
            raise KeyError("x")

        assert "KeyError" in self.faults(target, run)[1].what

    def test_a_panic(self, target: Target) -> None:
        def run(_: Path) -> None:
            raise type("PanicException", (BaseException,), {})("x")

        assert "PanicException" in self.faults(target, run)[1].what

    def test_a_hang(self, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
        def run(_: Path) -> None:
            while True:
                pass

        monkeypatch.setattr(fuzz, "SECONDS", 0.05)
        assert "seconds" in self.faults(target, run)[1].what

    def test_memory(self, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
        peaks = iter((0,))
        monkeypatch.setattr(fuzz, "peak", lambda: next(peaks, 1 << 30))
        assert "1024 MB of memory" in self.faults(target._replace(seed=b"x"), lambda _: None)[0].what

    def test_a_message_that_steers_a_terminal(self, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
        def run(_: Path) -> None:
            error = ModelError("x")
            error.message = "a\x1b[2J"
            raise error

        assert "unprintable" in self.faults(target, run)[1].what

    def test_a_process_that_dies(self, target: Target, capsys: pytest.CaptureFixture[str]) -> None:
        def run(path: Path) -> None:
            if path.read_bytes() == b"se":
                os._exit(7)

        found = fuzz._in_processes(target._replace(run=run), 1, 4, 4)
        assert [(fault.number, fault.what) for fault in found] == [(2, "the process ended with 7")]
        assert "2 before a crash, 1 read; 1 faults" in capsys.readouterr().out

    def test_inputs_follow_from_the_seed(self) -> None:
        seed = b'{"a": [1, 2, {"b": "c"}]}'
        for mutate in (fuzz_mutators.mutate_bytes, fuzz_mutators.mutate_json):
            one = [mutate(Random(i), seed) for i in range(50)]
            assert one == [mutate(Random(i), seed) for i in range(50)]
            assert len(set(one)) > 30
        assert [fuzz_mutators.cut(b"abcd", i, 4) for i in range(4)] == [b"", b"a", b"ab", b"abc"]
