"""`edgeq bench`: llama-bench's tests, options and columns. Nothing here depends on how fast anything is."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeq
from edgeq.api import Model
from edgeq.bench import Result, Test, measure, model_size, read_rate, token_nbytes
from edgeq.cli import main
from edgeq.errors import UsageError
from edgeq.machine import stream
from edgeq.state import State
from edgeq.testing import config_values, write_checkpoint

Test.__test__ = False  # type: ignore[attr-defined]  # not a class of tests


@pytest.fixture(autouse=True)
def _small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PROBE_NBYTES", 1 << 20)
    stream._memory.cache_clear()
    monkeypatch.setenv("EDGEQ_BACKEND", "numpy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "model"
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return edgeq.load(folder, backend="numpy")


def table(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(["bench", str(folder), "-r", "2", *options])
    assert not left.value.code, capsys.readouterr().err
    return capsys.readouterr().out


class TestMeasuring:
    def test_names(self) -> None:
        assert Test(512, 0).name == "pp512"
        assert Test(0, 128, 4096).name == "tg128 @ d4096"
        assert Test(512, 128).name == "pp512+tg128"

    def test_rates(self) -> None:
        result = Result(Test(0, 100), 2, (1.0, 2.0), token_nbytes=1e9, read_rate=150.0)
        assert result.rates == [100, 50]
        assert (result.tok_per_s, result.gb_per_s, result.share) == (75, 75, 0.5)
        assert result.deviation == pytest.approx(np.std([100, 50], ddof=1))
        assert Result(Test(100, 0), 2, (1.0,)).deviation == 0

    def test_every_test_runs_the_tokens_it_says(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[tuple[int, int]] = []
        for name in ("forward", "advance"):
            method = getattr(Model, name)

            def recorded(model: Model, ids: list[int], state: State[Any], method: Any = method) -> Any:
                calls.append((state.length, len(ids)))
                return method(model, ids, state)

            monkeypatch.setattr(Model, name, recorded)
        (result,) = measure(model, [Test(5, 2, 3)], repetitions=2)
        once = [(3, 5), (8, 1), (9, 1)]
        assert calls == [(0, 3), (3, 5), (8, 1), *once, *once]
        assert len(result.seconds) == 2
        assert result.token_nbytes is None

    def test_only_generation_is_compared_with_the_memory(self, model: Model) -> None:
        prompt, generation = measure(model, [Test(4, 0), Test(0, 4)], repetitions=1)
        assert prompt.gb_per_s is prompt.share is None
        assert generation.gb_per_s
        assert generation.share

    def test_a_test_beyond_the_context(self, model: Model) -> None:
        with pytest.raises(UsageError, match=r"tg9 @ d4090 does not fit the context of 4096"):
            list(measure(model, [Test(0, 9, 4090)], repetitions=1))

    def test_read_rate(self) -> None:
        assert read_rate(2) > 0


class TestBytesOfAToken:
    def test_tied(self, model: Model) -> None:
        c = model.config.text
        weights, nbytes = model_size(model)
        assert nbytes == 2 * weights + 2 * (c.linear_num_value_heads + c.linear_value_head_dim) * 3  # F32: those two
        state = 4 * c.linear_num_value_heads * c.linear_value_head_dim * c.linear_key_head_dim + 4 * 3 * c.conv_dim
        kv = model.ops.kv_cache(*np.zeros((2, 4096, c.num_key_value_heads, c.head_dim), np.float32)).nbytes / 4096
        assert token_nbytes(model, 0) == nbytes + 2 * 3 * state
        assert token_nbytes(model, 1000) == nbytes + 2 * 3 * state + 1000 * kv

    def test_an_embedding_that_is_not_the_head_is_not_read(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, config_values(tie_word_embeddings=False))
        model = edgeq.load(tmp_path, backend="numpy")
        table = model.vocab_size * model.config.text.hidden_size * 2
        states = token_nbytes(model, 0) - (model_size(model)[1] - table * (model.vocab_size - 1) // model.vocab_size)
        assert 0 < states < 1e6


class TestCommand:
    def test_table(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        lines = table(capsys, folder, "-p", "4,6", "-n", "3", "-pg", "4,2", "-d", "0,5").splitlines()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        assert rows[0] == ["model", "size", "params", "backend", "threads", "kv", "test", "t/s", "GB/s", "of memory"]
        assert [row[6] for row in rows[2:]] == [
            "pp4", "pp6", "tg3", "pp4+tg2", "pp4 @ d5", "pp6 @ d5", "tg3 @ d5", "pp4+tg2 @ d5",
        ]  # fmt: skip
        assert all(" ± " in row[7] and row[3] == "numpy" and row[5] == "f32" for row in rows[2:])
        assert [bool(row[8]) for row in rows[2:]] == [row[6].startswith("tg") for row in rows[2:]]

    def test_json(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        prompt, generation = json.loads(table(capsys, folder, "-p", "4", "-n", "3", "-o", "json"))
        assert (prompt["n_prompt"], prompt["n_gen"], prompt["n_depth"]) == (4, 0, 0)
        assert len(generation["samples_ts"]) == len(generation["samples_ns"]) == 2
        assert generation["avg_ts"] == pytest.approx(sum(generation["samples_ts"]) / 2)
        assert generation["gb_per_s"] == pytest.approx(
            generation["avg_ts"] * generation["token_nbytes"] / 1e9, rel=1e-3
        )
        assert generation["backends"] == "numpy"

    def test_drafts(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        ways = ("-p", "4", "-n", "6", "--draft", "off,ngram,3")
        rows = json.loads(table(capsys, folder, *ways, "-o", "json"))
        assert [row["test"] for row in rows] == ["pp4", "tg6", "tg6, ngram", "tg6, 3"]
        assert [row["n_passes"] is None for row in rows] == [True, True, False, False]
        assert all(row["n_accepted"] + row["n_passes"] == 2 * 6 for row in rows[2:])
        lines = table(capsys, folder, *ways).splitlines()
        assert [cell.strip() for cell in lines[0].strip("|").split("|")][-2:] == ["accepted", "tokens/pass"]

    def test_csv(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        rows = list(csv.DictReader(io.StringIO(table(capsys, folder, "-p", "4", "-n", "0", "-o", "csv"))))
        assert [row["test"] for row in rows] == ["pp4"]

    @pytest.mark.parametrize("threads", ["1,2"])
    def test_threads(self, capsys: pytest.CaptureFixture[str], folder: Path, threads: str) -> None:
        pytest.importorskip("edgeq.backends.cpu", reason="the native backend is not built", exc_type=ImportError)
        options = ("-p", "4", "-n", "0", "-t", threads, "-o", "json", "--backend", "cpu")
        assert [row["n_threads"] for row in json.loads(table(capsys, folder, *options))] == [1, 2]

    def test_kv_bits_and_threads_of_the_backends_choice(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        cpu = pytest.importorskip("edgeq.backends.cpu", reason="the native backend is not built", exc_type=ImportError)
        options = ("-p", "4", "-n", "0", "--kv-bits", "16,8,4", "-o", "json", "--backend", "cpu")
        rows = json.loads(table(capsys, folder, *options))
        assert [(row["type_k"], row["type_v"]) for row in rows] == [(t, t) for t in ("f16", "int8", "int4")]
        assert {row["n_threads"] for row in rows} == {cpu.CpuOps().threads}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["-p", "many"], "--n-prompt many: expected whole numbers from 0"),
            (["-t", "0"], "--threads 0: expected whole numbers from 1"),
            (["-p", "0", "-n", "0"], "nothing to measure"),
            (["-pg", "5"], "-pg 5: expected the tokens of a prompt and of its continuation"),
            (["-o", "xml"], "--output must be md, json or csv, got 'xml'"),
            (["--kv-bits", "16,5"], "keys and values cannot be kept in 5 bits"),
            (["--kv-bits", "four"], "--kv-bits four: expected whole numbers"),
            (["-t", "2"], "numpy backend has no setting 'threads'"),
        ],
    )
    def test_bad_options(
        self, capsys: pytest.CaptureFixture[str], folder: Path, options: list[str], message: str
    ) -> None:
        with pytest.raises(SystemExit) as left:
            main(["bench", str(folder), *options])
        assert left.value.code == 2
        assert message in capsys.readouterr().err
