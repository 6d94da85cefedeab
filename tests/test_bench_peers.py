"""tools/bench_peers.py: what it asks a peer's llama-bench for, what it reads from it, and what it makes of samples."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from documents import ROOT


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        import bench_peers
    return bench_peers


@pytest.fixture
def fake_bench(tmp_path: Path) -> Path:
    """A program that answers as llama-bench does, and takes as many milliseconds a token as -t says threads."""
    program = tmp_path / "llama-bench"
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, sys\n"
        "if '--help' in sys.argv: sys.exit(print('--n-depth --no-warmup'))\n"
        "if 'missing.gguf' in sys.argv: sys.exit('cannot load missing.gguf')\n"
        "option = lambda name: int(sys.argv[sys.argv.index(name) + 1])\n"
        "tokens = option('-p') + option('-n')\n"
        "print(json.dumps([{'samples_ns': [tokens * option('-t') * 1000000]}]))\n"
    )
    program.chmod(0o755)
    return program


def test_a_peer_is_a_name_and_a_command(bench: ModuleType, fake_bench: Path) -> None:
    peer = bench.Peer.parse(f"ik_llama.cpp, smallest={fake_bench} -rtr 1 -b '64'")
    assert peer == ("ik_llama.cpp, smallest", (str(fake_bench), "-rtr", "1", "-b", "64"))


def test_conditions_name_the_peers_options(bench: ModuleType, fake_bench: Path) -> None:
    peers = [bench.Peer.parse(f"a.cpp={fake_bench}"), bench.Peer.parse(f"b.cpp={fake_bench} -rtr 1")]
    assert bench.conditions(peers) == bench.CONDITIONS + "; b.cpp with -rtr 1"


@pytest.mark.parametrize("text", ["llama-bench", "=llama-bench", "llama.cpp=", "llama.cpp= "])
def test_other_peers_are_refused(bench: ModuleType, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse(["checkpoint", "work", "--peer", text])
    assert "a peer is NAME=BINARY OPTIONS..." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--peer", "a.cpp=/nowhere/llama-bench"], "/nowhere/llama-bench is no program"),
        (["--bits", "4,5"], "5 is none of 4, 8"),
        (["--forms", "Q4_0,Q5_K"], "Q5_K is none of Q4_0, Q4_K_M, Q8_0"),
        (["--bits", "4,8", "--forms", "Q8_0"], "--forms names no file of 4 bits"),
        (["--rounds", "0"], "--rounds must be 1 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    bench: ModuleType, fake_bench: Path, options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.parse(["checkpoint", "work", "--peer", f"a.cpp={fake_bench}", *options])
    assert complaint in capsys.readouterr().err


def test_without_peers_it_only_quantizes(bench: ModuleType) -> None:
    assert bench.parse(["checkpoint", "work", "--only", "quantize"]).peers == []
    with pytest.raises(SystemExit):
        bench.parse(["checkpoint", "work"])


@pytest.mark.parametrize(
    ("test", "help_text", "options"),
    [
        ((512, 0, 0), "", ["-p", "512", "-n", "0"]),
        ((0, 64, 0), "", ["-p", "0", "-n", "64"]),
        ((0, 64, 4096), "  -d, --n-depth <n>", ["-p", "0", "-n", "64", "-d", "4096"]),
        ((0, 64, 4096), "  -gp <pp,tg>", ["-p", "0", "-n", "0", "-gp", "4096,64"]),
    ],
)
def test_options(bench: ModuleType, test: tuple[int, int, int], help_text: str, options: list[str]) -> None:
    assert bench.test_options(bench.Speed(*test), help_text) == options


def test_a_prompt_behind_a_depth_needs_the_option(bench: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no prompt behind a depth"):
        bench.test_options(bench.Speed(512, 0, 1024), "-gp <pp,tg>")


def test_seconds_are_the_median_of_the_samples(bench: ModuleType) -> None:
    result = {"model_type": "qwen35 0.8B [x]", "avg_ts": 1.0, "samples_ns": [3_000_000_000, 1_000_000_000, 2_000_000]}
    assert bench.seconds_of(f"loading\n{json.dumps([result])}\nbuild: 1\n") == 1.0


@pytest.mark.parametrize("output", ["", "[]", "no [brackets", '[{"avg_ns": 1}]', "[1]", '[{"samples_ns": []}]'])
def test_other_output_is_refused(bench: ModuleType, output: str) -> None:
    with pytest.raises(SystemExit, match="no output of llama-bench"):
        bench.seconds_of(output)


def test_a_row_of_medians(bench: ModuleType) -> None:
    seconds = {
        "edgeq q4": [0.5, 1.0, 2.0],
        "a.cpp Q4_0": [1.0, 2.0, 4.0],
        "a.cpp Q4_K_M": [4.0] * 3,
        "b Q4_0": [1.0] * 3,
    }
    nbytes = {"edgeq q4": 1e9, "a.cpp Q4_0": 2e9, "a.cpp Q4_K_M": 1e9, "b Q4_0": 1e9}
    row = bench.speed_row(4, 2, bench.Speed(0, 64, 1024), seconds, nbytes, [100.0, 64.0, 64.0])
    assert row["test"] == "decode 64 at 1024"
    assert row["tok_per_s"] == {"edgeq q4": 64.0, "a.cpp Q4_0": 32.0, "a.cpp Q4_K_M": 16.0, "b Q4_0": 64.0}
    assert row["ratio"] == {"a.cpp": 2.0, "b": 1.0}  # the better file of each
    assert row["gb_per_s"]["a.cpp Q4_0"] == 64.0
    assert row["share"]["edgeq q4"] == 1.0  # of the same round: 128 of 100, 64 of 64, 32 of 64
    assert row["read_gb_per_s"] == 64.0


def test_a_prompt_reads_no_share_of_the_memory(bench: ModuleType) -> None:
    row = bench.speed_row(8, 1, bench.Speed(512, 0, 0), {"edgeq q8": [1.0], "a Q8_0": [2.0]}, {}, [40.0])
    assert "share" not in row
    assert row["ratio"] == {"a": 2.0}


def test_a_llama_bench_runs(bench: ModuleType, fake_bench: Path) -> None:
    engine = bench.LlamaBench(bench.Peer("a.cpp", (str(fake_bench),)), "Q4_0", Path("m.gguf"), 3)
    assert engine.name == "a.cpp Q4_0"
    assert engine.run(bench.Speed(0, 64, 1024)) == pytest.approx(0.192)
    seconds, peak = engine.launch(10)
    assert seconds > 0
    assert peak > 1 << 20


def test_a_llama_bench_that_fails_says_why(bench: ModuleType, fake_bench: Path) -> None:
    engine = bench.LlamaBench(bench.Peer("a.cpp", (str(fake_bench),)), "Q4_0", Path("missing.gguf"), 1)
    with pytest.raises(SystemExit, match="cannot load missing"):
        engine.run(bench.Speed(512, 0, 0))
