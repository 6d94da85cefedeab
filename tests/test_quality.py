"""Quality: the divergence of predictions against its definition, and where two computations of a model part."""

from __future__ import annotations

import gc
import json
import lzma
import math
import shutil
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Run, leave_home, runner

import edgeq
from edgeq.api import Model
from edgeq.backends import available
from edgeq.backends.floats import float_ops
from edgeq.backends.numpy import NumpyOps
from edgeq.cli.eval import table
from edgeq.errors import MemoryBudgetError, ModelError, QualityError, UsageError
from edgeq.formats.bf16 import Array
from edgeq.formats.safetensors import SafetensorsFile
from edgeq.quality import kld
from edgeq.quality.evaluate import Evaluation
from edgeq.quality.kld import Comparison, Divergence, check, compare, compare_pairs, cut, perplexity
from edgeq.quality.layerdiff import compare as compare_traces
from edgeq.quality.layerdiff import first_above, read_trace, trace
from edgeq.quality.stream import Stream
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


def stream(model: Model, *, floats: bool = False) -> Stream[Any, Any]:
    return Stream(model.checkpoint, model.ops, floats=floats)


class TestDivergence:
    def test_is_its_definition(self, models: tuple[Model, Model], monkeypatch: pytest.MonkeyPatch) -> None:
        """Also where chunks, the vocabulary and its logits come in many pieces."""
        reference, model = models
        chunks = cut(text(2 * CHUNK + 20), CHUNK)
        assert chunks.shape == (2, CHUNK)
        kl, same, losses, pairs = [], [], [], []
        for ids in chunks.tolist():
            for at in range(CHUNK // 2, CHUNK - 1):
                p, q = (probabilities(which.logits(ids)[at]) for which in models)
                kl.append(sum(p * np.log(p / q)))
                same.append(p.argmax() == q.argmax())
                losses.append((-math.log(p[ids[at + 1]]), -math.log(q[ids[at + 1]])))
                pairs.append([which.logits(ids)[at] for which in models])
        monkeypatch.setattr(kld, "PIECE", 64 * 100)  # 288 rows in three pieces
        monkeypatch.setattr(kld, "LOGITS", 100 * 31)
        monkeypatch.setattr(kld, "SCORED", 100 * 7)
        monkeypatch.setattr(kld, "HELD", 64 * CHUNK)  # a chunk at a time
        monkeypatch.setattr(edgeq.quality.stream, "CALL", 64)
        (found,) = compare(stream(reference), [stream(model)], chunks)
        result, delta = found.divergence, np.subtract(*np.array(losses).T[::-1])
        assert result.positions == len(kl) == 2 * (CHUNK // 2 - 1)
        assert (result.mean, result.median, result.max) == pytest.approx(
            (np.mean(kl), np.median(kl), max(kl)), rel=1e-5
        )
        assert (result.p99, result.p999) == pytest.approx(np.quantile(kl, (0.99, 0.999)), rel=1e-5)
        assert result.mean_error == pytest.approx(np.std(kl, ddof=1) / math.sqrt(len(kl)), rel=1e-5)
        assert result.top1 == np.mean(same)
        assert (result.reference_perplexity, result.perplexity) == pytest.approx(np.exp(np.mean(losses, 0)), rel=1e-5)
        assert result.delta_ln_perplexity == pytest.approx(delta.mean(), rel=1e-4)
        assert result.delta_ln_perplexity_error == pytest.approx(delta.std(ddof=1) / math.sqrt(len(kl)), rel=1e-4)
        assert result.nmse == pytest.approx(nmse([p for p, _ in pairs], [q for _, q in pairs]), rel=1e-5)
        assert result.mean > 1e-3
        alone = perplexity(stream(model), chunks)
        assert alone.perplexity == pytest.approx(result.perplexity, rel=1e-6)
        assert alone.error == pytest.approx(result.perplexity_error, rel=1e-6)

    def test_drift_is_the_error_of_every_step(self, models: tuple[Model, Model]) -> None:
        reference, model = models
        ids = text(40)
        (found,) = compare(stream(reference), [stream(model)], cut(ids, 40))
        expected = compare_traces(trace(reference.engine, ids), trace(model.engine, ids))
        del expected["logits"]  # of all positions there
        assert list(found.drift) == list(expected)
        assert found.drift == pytest.approx(expected, rel=1e-4)

    def test_of_a_model_from_itself(self, models: tuple[Model, Model]) -> None:
        reference, _ = models
        (found,) = compare(stream(reference), [stream(reference)], cut(text(40), 40))
        result = found.divergence
        assert (result.mean, result.p999, result.max, result.top1, result.nmse) == (0, 0, 0, 1, 0)
        assert result.perplexity == result.reference_perplexity
        assert set(found.drift.values()) == {0}

    def test_several_models_are_what_each_is_alone(self, models: tuple[Model, Model]) -> None:
        reference, model = (stream(which) for which in models)
        chunks = cut(text(120), 40, most=2)
        together = compare(reference, [model, reference, model], chunks)
        (alone,) = compare(reference, [model], chunks)
        assert together[0].divergence == together[2].divergence == alone.divergence
        assert together[1].divergence.mean == 0
        pairs = compare_pairs([reference, model, reference], [(0, 1), (1, 2), (1, 0)], chunks)
        assert pairs[0].divergence == alone.divergence
        assert pairs[1].divergence == pairs[2].divergence
        assert pairs[1].divergence.mean not in (0, alone.divergence.mean)

    @pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "mlx"])
    def test_weights_written_out_in_float32(self, models: tuple[Model, Model], backend: str) -> None:
        """NumPy's products are of float32 anyway; the native backend's are then, too."""
        chunks = cut(text(80), 40)
        model = edgeq.load(models[1].checkpoint.path, backend=backend)
        assert isinstance(float_ops(), type(edgeq.load(models[1].checkpoint.path).ops)) or backend == "numpy"
        written = Stream(model.checkpoint, edgeq.backends.select(backend, kv_dtype="f32"), floats=True)
        (found,) = compare(stream(models[1]), [written], chunks)
        assert found.divergence.nmse < 1e-9

    def test_progress(self, models: tuple[Model, Model]) -> None:
        seen: list[tuple[int, int]] = []
        compare(stream(models[0]), [stream(models[1])], cut(text(24), 8), lambda *at: seen.append(at))
        total = 2 * (len(models[0].config.text.layer_types) + 2) + 1
        assert seen == [(i, total) for i in range(total + 1)]

    def test_what_cannot_be_compared(self, models: tuple[Model, Model], tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "other", config_values(vocab_size=160))
        other = edgeq.load(tmp_path / "other", backend="numpy")
        with pytest.raises(UsageError, match="has a vocabulary of 160, expected the reference's 288"):
            compare(stream(models[0]), [stream(other)], cut(text(8), 8))
        with pytest.raises(MemoryBudgetError, match="context window of 4096"):
            compare(stream(models[0]), [stream(models[1])], cut(text(5000), 5000))
        with pytest.raises(UsageError, match="the text is 7 tokens long, expected at least one chunk of 8"):
            cut(text(7), 8)
        with pytest.raises(UsageError, match="at least 4 tokens, got 3"):
            cut(text(7), 3)
        with pytest.raises(ModelError, match="the text has token 287, the vocabulary is 160"):
            perplexity(stream(other), cut([*text(7), 287], 8))

    def test_a_layer_is_let_go_before_the_next(self, models: tuple[Model, Model]) -> None:
        """Without waiting for the collector of garbage, which would keep the whole model in float32."""
        made = list[Any]()

        class Watched(NumpyOps):
            def matrix(self, w: Any) -> Any:
                w = np.array(w) if isinstance(w, np.ndarray) else w
                if isinstance(w, np.ndarray):
                    made.append(weakref.ref(w))
                return w

        gc.disable()
        try:
            for name, _ in Stream(models[1].checkpoint, Watched(), floats=True).steps(cut(text(8), 8)):
                assert not any(ref() is not None for ref in made), name
        finally:
            gc.enable()
        assert len(made) > 20

    def test_models_of_two_shapes_have_no_drift(self, models: tuple[Model, Model], tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "deep", config_values(layer_types=["linear_attention"] * 5))
        deep = edgeq.load(tmp_path / "deep", backend="numpy")
        (found,) = compare(stream(models[0]), [stream(deep)], cut(text(24), 24))
        assert found.drift == {}
        assert found.divergence.mean > 0

    def test_logits_that_are_not_numbers(self, folder: Path, tmp_path: Path) -> None:
        shutil.copytree(folder, tmp_path / "nan")
        set_to_nan(tmp_path / "nan" / "model.safetensors", "model.language_model.layers.1.mlp.up_proj.weight")
        broken = edgeq.load(tmp_path / "nan", backend="numpy")
        with pytest.raises(ModelError, match=r"NaN or infinite logits, because layers.1.mlp.up_proj.weight holds"):
            perplexity(stream(broken), cut(text(24), 24))

    @pytest.mark.parametrize("mean", [0.2, math.inf, math.nan])
    def test_a_check_that_fails(self, mean: float) -> None:
        with pytest.raises(QualityError, match=r"q3: the mean KL divergence is .* nats, expected at most 0.1"):
            check("q3", divergence(mean), 0.1)

    def test_a_check_that_passes(self) -> None:
        check("q3", divergence(0.1), 0.1)


def divergence(mean: float, **fields: float) -> Divergence:
    """Of one position; everything else 0 or 1."""
    nothing = dict.fromkeys(Divergence._fields, 0.0)
    return Divergence(**{**nothing, "positions": 1, "mean": mean, "top1": 1.0, **fields})  # type: ignore[arg-type]


def set_to_nan(path: Path, tensor: str) -> None:
    file = SafetensorsFile(path)
    data = bytearray(path.read_bytes())
    start = file.data_start + file.tensors[tensor].start
    data[start : start + 2] = b"\xc0\x7f"
    path.write_bytes(data)


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
        columns = "model KL mean +- median 99 % 99.9 % maximum top-1 perplexity ln ratio +- NMSE"
        assert head.split() == columns.split()
        assert expected.startswith("reference")
        assert [row.split()[:2] for row in rows] == [[f"{which}:", "whole"] for which in (model, reference)]
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

    @pytest.mark.parametrize("chunks", ["1", "3"])
    def test_the_shortest_chunks(self, command: Run, folder: Path, chunks: str) -> None:
        """One position of each is scored; what one alone does not have, an error of the mean, is null in JSON."""
        done = command("eval", folder, "--kld", folder, "-c", "4", "--chunks", chunks, "--json")
        (record,) = json.loads(done.out, parse_constant=pytest.fail)
        assert record["positions"] == int(chunks)
        assert record["mean_error"] == (None if chunks == "1" else 0)

    def test_another_tokenizer_is_told(self, command: Run, chat_folder: Path, tmp_path: Path) -> None:
        """Both models are given the reference's tokens; one that would read others of its own is named."""
        shutil.copytree(chat_folder, tmp_path / "other")
        spec = json.loads((chat_folder / "tokenizer.json").read_text("utf-8"))
        vocab = spec["model"]["vocab"]
        spec["model"]["vocab"] = dict(zip(vocab, reversed(vocab.values()), strict=True))
        (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
        (tmp_path / "text").write_text("the water " * 20)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            done = command("eval", tmp_path / "other", "--kld", chat_folder, "-f", tmp_path / "text", "-c", "8")
        assert done.code == 0
        assert f"other: its tokenizer is not that of {chat_folder}, whose tokens both are given" in done.err
        assert command("eval", chat_folder, "--kld", chat_folder, "-f", tmp_path / "text", "-c", "8").code == 0

    def test_an_adapter_of_no_reference(self, command: Run, folder: Path) -> None:
        done = command("eval", folder, "--perplexity", "-c", "4", "--reference-adapter", "nosuch")
        assert (done.code, "--reference-adapter is of a model to compare with" in done.err) == (2, True)

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
        nothing = np.zeros((1, 2))
        found = Comparison(nothing, nothing == 0, nothing + math.log(1234567), nothing + math.log(1e6), 0.0, {})
        *_, row = table([Evaluation("model", "weights", "float32", "f32", found)])
        expected = ["model", *["0.000000"] * 6, "100.00%", "1234567.0000", "+0.210720", "0.000000", "0.0e+00"]
        assert row.split() == expected

    def test_weights_and_activations_apart(self, command: Run, models: tuple[Model, Model]) -> None:
        reference, model = (which.checkpoint.path for which in models)
        done = command(
            "eval",
            model,
            "--kld",
            reference,
            "--backend",
            "auto",
            "--kv-bits",
            "8",
            "-c",
            "20",
            "--chunks",
            "3",
            "--json",
        )
        weights, activations, whole = json.loads(done.out)
        assert [one["what"] for one in (weights, activations, whole)] == ["weights", "activations", "whole"]
        assert (weights["backend"], weights["kv"], whole["kv"]) == ("float32", "f32", "int8")
        assert activations["mean"] < weights["mean"]
        assert activations["reference_perplexity"] == pytest.approx(weights["perplexity"])
        alone = command("eval", model, "--kld", reference, "-c", "20", "--chunks", "3", "--json")
        (record,) = json.loads(alone.out)
        assert record == weights
        assert list(record["drift"])[:2] == ["embed", "layer.0"]
        assert record["text"] == "random tokens"

    def test_of_a_gguf_file(self, command: Run, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        path.write_bytes(lzma.decompress((DATA / "gguf" / "Q4_K_M.gguf.xz").read_bytes()))
        (record,) = json.loads(command("eval", path, "--kld", path, "-c", "16", "--chunks", "2", "--json").out)
        assert (record["mean"], record["top1"]) == (0, 1)

    def test_perplexity(self, command: Run, chat_folder: Path, tmp_path: Path) -> None:
        (tmp_path / "text.txt").write_text("the water " * 40)
        asked = ("eval", chat_folder, "--text", tmp_path / "text.txt", "-c", "16", "--json")
        (record,) = json.loads(command(*asked, "--perplexity").out)
        assert record == json.loads(command(*asked).out)[0]
        (against,) = json.loads(command(*asked, "--kld", chat_folder).out)
        assert record["perplexity"] == pytest.approx(against["perplexity"])
        assert record["error"] == pytest.approx(against["perplexity_error"])
        shown = command(*asked[:-1])
        assert f"{record['perplexity']:.4f}" in shown.out

    def test_settings_that_make_no_sense(self, command: Run, chat_folder: Path) -> None:
        for asked, said in (
            (("--perplexity", "--kld", chat_folder), "--perplexity is of a model by itself"),
            (("--max-kl", "0.1"), "--max-kl needs a model to compare with"),
            (("--kld", chat_folder, "--kv-bits", "4"), "keys and values in 4 bits are a backend's, and none was named"),
            (("--kld", chat_folder, "--kv-bits", "5"), "keys and values cannot be kept in 5 bits"),
        ):
            done = command("eval", chat_folder, *asked)
            assert (done.code, said in done.err) == (2, True)

    def test_the_text_without_one(self, command: Run, chat_folder: Path) -> None:
        done = command("eval", chat_folder, "--kld", chat_folder, "-c", "64", "--chunks", "2")
        assert "edgeq default 1, held out: 2 chunks of 64 tokens, 62 positions" in done.err


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
