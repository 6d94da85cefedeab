"""Quality: the divergence of predictions against its definition, and where two computations of a model part."""

from __future__ import annotations

import json
import lzma
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from command import Run, leave_home, runner

import edgeq
from edgeq.api import Model
from edgeq.backends import available
from edgeq.cli.kld import _table
from edgeq.errors import MemoryBudgetError, ModelError, QualityError, UsageError
from edgeq.formats.bf16 import Array
from edgeq.formats.safetensors import SafetensorsFile
from edgeq.quality import kld
from edgeq.quality.kld import Divergence, check, compare, cut
from edgeq.quality.layerdiff import compare as compare_traces
from edgeq.quality.layerdiff import first_above, read_trace, trace
from edgeq.testing import config_values, nmse, write_checkpoint

DATA = Path(__file__).parent / "data"
BACKENDS = [backend.name for backend in available() if backend.ops is not None]
CHUNK = 150  # 75 rows of it are scored: more than are held at once


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quality") / "model"
    write_checkpoint(folder, config_values())
    return folder


@pytest.fixture(scope="module")
def models(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """A model, and the same in 3 bits."""
    small = tmp_path_factory.mktemp("small") / "q3"
    edgeq.quantize(folder, small, bits=3, group_size=32)
    return edgeq.load(folder, backend="numpy"), edgeq.load(small, backend="numpy")


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    leave_home(tmp_path, monkeypatch)
    return runner(capsys, monkeypatch)


def text(length: int) -> list[int]:
    ids: list[int] = np.random.default_rng(7).integers(0, 288, length).tolist()
    return ids


class TestDivergence:
    def test_is_its_definition(self, models: tuple[Model, Model]) -> None:
        reference, model = models
        chunks = cut(text(2 * CHUNK + 20), CHUNK)
        assert [len(chunk) for chunk in chunks] == [CHUNK, CHUNK]
        kl, same, losses, pairs = [], [], [], []
        for ids in chunks:
            for at in range(CHUNK // 2, CHUNK - 1):
                p, q = (probabilities(which.logits(ids)[at]) for which in models)
                kl.append(sum(p * np.log(p / q)))
                same.append(p.argmax() == q.argmax())
                losses.append((-math.log(p[ids[at + 1]]), -math.log(q[ids[at + 1]])))
                pairs.append([which.logits(ids)[at] for which in models])
        (result,) = compare(reference.engine, [model.engine], chunks)
        assert result.positions == len(kl) == 2 * (CHUNK // 2 - 1)
        expected = (np.mean(kl), np.quantile(kl, 0.99), np.quantile(kl, 0.999), max(kl), np.mean(same))
        assert result[1:6] == pytest.approx(expected, rel=1e-6)
        assert (result.reference_perplexity, result.perplexity) == pytest.approx(np.exp(np.mean(losses, 0)), rel=1e-6)
        assert result.nmse == pytest.approx(nmse([p for p, _ in pairs], [q for _, q in pairs]), rel=1e-6)
        assert result.mean > 1e-3

    def test_of_a_model_from_itself(self, models: tuple[Model, Model]) -> None:
        reference, _ = models
        (result,) = compare(reference.engine, [reference.engine], [text(40)])
        assert result[1:6] == (0, 0, 0, 0, 1)
        assert result.nmse == 0
        assert result.perplexity == result.reference_perplexity

    def test_several_models_are_what_each_is_alone(self, models: tuple[Model, Model]) -> None:
        reference, model = models
        chunks = cut(text(120), 40, most=2)
        together = compare(reference.engine, [model.engine, reference.engine, model.engine], chunks)
        assert together[0] == together[2] == compare(reference.engine, [model.engine], chunks)[0]
        assert together[1].mean == 0

    def test_few_rows_are_held_at_once(self, models: tuple[Model, Model], monkeypatch: pytest.MonkeyPatch) -> None:
        reference, model = models
        whole = compare(reference.engine, [model.engine], [text(90)])[0]
        monkeypatch.setattr(kld, "ROWS", 7)
        monkeypatch.setattr(kld, "SCORED", 3)
        engine, most = reference.engine, 0
        run = engine.run

        def watched(feeds: list[edgeq.engine.Feed[Array]]) -> list[edgeq.engine.Output[Array]]:
            nonlocal most
            most = max(most, *(feed.rows for feed in feeds))
            return run(feeds)

        monkeypatch.setattr(engine, "run", watched)
        assert compare(engine, [model.engine], [text(90)])[0] == pytest.approx(whole, rel=1e-4)  # cut into other calls
        assert most == 7

    def test_progress(self, models: tuple[Model, Model]) -> None:
        seen: list[tuple[int, int]] = []
        compare(models[0].engine, [models[0].engine], cut(text(24), 8), lambda *at: seen.append(at))
        assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]

    def test_what_cannot_be_compared(self, models: tuple[Model, Model], tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "other", config_values(vocab_size=160))
        other = edgeq.load(tmp_path / "other", backend="numpy")
        with pytest.raises(UsageError, match="has a vocabulary of 160, expected the reference's 288"):
            compare(models[0].engine, [other.engine], [text(8)])
        with pytest.raises(MemoryBudgetError, match="context window of 4096"):
            compare(models[0].engine, [models[1].engine], [text(5000)])
        with pytest.raises(UsageError, match="the text is 7 tokens long, expected at least one chunk of 8"):
            cut(text(7), 8)
        with pytest.raises(UsageError, match="at least 4 tokens, got 3"):
            cut(text(7), 3)

    @pytest.mark.parametrize("mean", [0.2, math.inf, math.nan])
    def test_a_check_that_fails(self, mean: float) -> None:
        with pytest.raises(QualityError, match=r"q3: the mean KL divergence is .* nats, expected at most 0.1"):
            check("q3", Divergence(1, mean, 0, 0, 0, 1, 1, 1, 0), 0.1)

    def test_a_check_that_passes(self) -> None:
        check("q3", Divergence(1, 0.1, 9, 9, 9, 0, 9, 1, 9), 0.1)


def probabilities(logits: Array) -> Array:
    powers: Array = np.exp(logits.astype(np.float64) - logits.max())
    total: Array = powers / powers.sum()
    return total


class TestCommand:
    def test_a_table_to_stdout(self, command: Run, models: tuple[Model, Model]) -> None:
        reference, model = (which.checkpoint.path for which in models)
        done = command("kld", reference, model, reference, "--context", "20", "--chunks", "3", "--kv-bits", "8")
        assert done.code == 0
        head, expected, *rows = done.out.splitlines()
        assert head.split() == ["model", "KL", "mean", "99", "%", "99.9", "%", "maximum", "top-1", "perplexity", "NMSE"]
        assert expected.startswith("reference")
        assert [row.split()[0] for row in rows] == [str(model), str(reference)]
        assert {len(line) for line in (head, *rows)} == {len(head)}
        assert "3 chunks of 20 tokens, 27 positions" in done.err

    def test_json_of_a_text(self, command: Run, chat_folder: Path, tmp_path: Path) -> None:
        (tmp_path / "text.txt").write_text("the water " * 40)
        file = command("kld", chat_folder, chat_folder, "--text", tmp_path / "text.txt", "-c", "16", "--json")
        piped = command("kld", chat_folder, chat_folder, "-f", "-", "-c", "16", "--json", stdin="the water " * 40)
        assert file.out == piped.out
        (record,) = json.loads(file.out)
        assert record["model"] == str(chat_folder)
        assert record["mean"] == 0
        assert record["top1"] == 1

    def test_a_limit_is_an_exit_code(self, command: Run, models: tuple[Model, Model]) -> None:
        reference, model = (which.checkpoint.path for which in models)
        assert command("kld", reference, reference, "-c", "8", "--max-kl", "0").code == 0
        failed = command("kld", reference, reference, model, "-c", "8", "--max-kl", "1e-6")
        assert failed.code == 6
        assert f"error: {model}: the mean KL divergence is" in failed.err
        assert len(failed.out.splitlines()) == 4, "the table comes all the same"

    def test_a_text_that_is_not_there(self, command: Run, chat_folder: Path, tmp_path: Path) -> None:
        missing = command("kld", chat_folder, chat_folder, "--text", tmp_path / "nothing")
        assert (missing.code, "text file not found" in missing.err) == (2, True)
        (tmp_path / "latin").write_bytes(b"caf\xe9")
        latin = command("kld", chat_folder, chat_folder, "--text", tmp_path / "latin")
        assert (latin.code, "is not UTF-8 text" in latin.err) == (2, True)
        short = command("kld", chat_folder, chat_folder, "--text", "-", stdin="short")
        assert (short.code, "expected at least one chunk of 512" in short.err) == (2, True)

    @pytest.mark.skipif(not Path("/dev/zero").exists(), reason="there are no devices")
    def test_a_text_without_end(self, command: Run, chat_folder: Path) -> None:
        endless = command("kld", chat_folder, chat_folder, "--text", "/dev/zero")
        assert (endless.code, "/dev/zero cannot be read: it has more than" in endless.err) == (2, True)

    def test_a_limit_is_a_number(self, command: Run, chat_folder: Path) -> None:
        for wrong in ("nan", "-1"):
            done = command("kld", chat_folder, chat_folder, "-c", "8", "--max-kl", wrong)
            assert (done.code, f"--max-kl must be a number of at least 0, got {wrong}" in done.err) == (2, True)

    def test_columns_stay_apart(self) -> None:
        result = Divergence(1, 0.0, 0.0, 0.0, 0.0, 1.0, perplexity=1234567.0, reference_perplexity=1e6, nmse=0.0)
        *_, row = _table(["model"], [result])
        assert row.split() == ["model", *["0.000000"] * 4, "100.00%", "1234567.0000", "0.0e+00"]


class TestLayerDiff:
    def test_a_good_model_passes_and_a_changed_layer_is_named(self, tmp_path: Path) -> None:
        folder = DATA / "models" / "value-heads-4x"
        ids, expected = read_trace(folder / "golden.safetensors")
        errors = compare_traces(expected, trace(edgeq.load(folder, backend="numpy").engine, ids))
        assert first_above(errors, 1e-9) is None
        assert list(errors) == ["embed", "layer.0", "layer.1", "layer.2", "layer.3", "norm", "logits"]

        shutil.copytree(folder, tmp_path / "changed")
        negate_a_row(tmp_path / "changed" / "model.safetensors", "model.language_model.layers.2.mlp.up_proj.weight")
        changed = trace(edgeq.load(tmp_path / "changed", backend="numpy").engine, ids)
        assert first_above(compare_traces(expected, changed), 1e-9) == "layer.2"

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("name", ["Q4_K_M", "IQ4_XS", "Q8_0"])
    def test_a_trace_ends_in_the_model_s_own_logits(self, name: str, backend: str, tmp_path: Path) -> None:
        """Also of matrices that a backend has in a form of its own."""
        path = tmp_path / "model.gguf"
        path.write_bytes(lzma.decompress((DATA / "gguf" / f"{name}.gguf.xz").read_bytes()))
        model, ids = edgeq.load(path, backend=backend), text(20)
        bound = 1e-4 if backend == "mlx" else 0  # the same calls; on a GPU rounded to bfloat16, perhaps at other places
        assert nmse(model.logits(ids), trace(model.engine, ids)["logits"]) <= bound

    def test_traces_of_different_models(self, folder: Path, tmp_path: Path) -> None:
        ids = text(5)
        mine = trace(edgeq.load(folder, backend="numpy").engine, ids)
        write_checkpoint(tmp_path / "deep", config_values(layer_types=["linear_attention"] * 5))
        deep = trace(edgeq.load(tmp_path / "deep", backend="numpy").engine, ids)
        for one, other in ((mine, deep), (deep, mine)):
            with pytest.raises(ModelError, match=r"do not match in layer.4: expected (nothing|\(5, 64\)), got"):
                compare_traces(one, other)
        with pytest.raises(ModelError, match=r"do not match in embed: expected \(5, 64\), got \(4, 64\)"):
            compare_traces(mine, {name: x[1:] for name, x in mine.items()})
        with pytest.raises(ModelError, match="holds no trace"):
            read_trace(folder / "model.safetensors")

    def test_an_error_that_is_not_a_number_is_above_every_bound(self) -> None:
        assert first_above({"embed": 0.0, "norm": math.nan}, 1.0) == "norm"


def negate_a_row(path: Path, tensor: str) -> None:
    file = SafetensorsFile(path)
    info = file.tensors[tensor]
    data = bytearray(path.read_bytes())
    start = file.data_start + info.start
    for high_byte in range(start + 1, start + 2 * info.shape[1], 2):
        data[high_byte] ^= 0x80
    path.write_bytes(data)
