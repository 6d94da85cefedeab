"""LoRA adapters: as PEFT, mlx-lm and llama.cpp write them, merged as they merge them, and what can be wrong."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import leave_home, runner
from gguf import GGUFWriter
from test_checkpoint import rewrite, save
from test_identify import rows

import edgeq
from edgeq.adapters import AdaptedCheckpoint, adapted, given_adapters
from edgeq.backends import select
from edgeq.checkpoint import Checkpoint, open_checkpoint
from edgeq.checkpoint.gguf_layout import file_names, head_order
from edgeq.errors import EdgeqError, ModelError, UsageError
from edgeq.formats.bf16 import Array, Float32, from_float32, to_float32
from edgeq.formats.names import hub_name, neutral_name
from edgeq.formats.safetensors import SafetensorsFile
from edgeq.memory.plan import plan_memory
from edgeq.quant import quantize
from edgeq.quant.gguf_export import export_gguf
from edgeq.testing import config_values, nmse, write_checkpoint
from edgeq.weights import QMatrix, Role, all_tensors

DATA = Path(__file__).parent / "data" / "adapters"
PEFT = sorted(folder.name for folder in DATA.iterdir() if folder.is_dir())
IDS = [5, 17, 33, 2, 250, 99, 7, 7, 120, 64, 31]
UP = "layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What PEFT's fixtures were made on (tools/make_adapter_fixtures.py)."""
    folder = tmp_path_factory.mktemp("adapters") / "base"
    write_checkpoint(folder, json.loads((DATA / "base.json").read_text()))
    return folder


@pytest.fixture(scope="module")
def quantized(base: Path) -> Path:
    quantize(base, base.parent / "q4", group_size=32)
    return base.parent / "q4"


@pytest.fixture(scope="module")
def wide(base: Path) -> Path:
    """The base in float32, where nothing is rounded."""
    folder = base.parent / "wide"
    shutil.copytree(base, folder)
    rewrite(folder, lambda tensors: tensors.update({name: to_float32(x) for name, x in tensors.items()}))
    return folder


def tensors_of(file: Path) -> dict[str, Array]:
    opened = SafetensorsFile(file)
    return {name: np.array(opened.array(name)) for name in opened.tensors}


def merged(base: Path, *adapters: Any) -> AdaptedCheckpoint:
    checkpoint = adapted(open_checkpoint(base), given_adapters([str(a) for a in adapters]))
    assert isinstance(checkpoint, AdaptedCheckpoint)
    return checkpoint


def plain(checkpoint: Checkpoint, name: str) -> Array:
    """A matrix that is not quantized, as it is kept."""
    w = checkpoint.matrix(name)
    assert not isinstance(w, QMatrix)
    return w


# --- adapters of the test's own --------------------------------------------------------------------------------------


def low_rank(rng: np.random.Generator, out: int, width: int, rank: int = 3) -> tuple[Float32, Float32]:
    a, b = rng.standard_normal((rank, width)), rng.standard_normal((out, rank))
    return np.float32(0.125) * a.astype(np.float32), np.float32(0.125) * b.astype(np.float32)


def peft_folder(folder: Path, tensors: dict[str, Array], **config: Any) -> Path:
    """As PEFT's save_pretrained writes it."""
    folder.mkdir()
    values = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6, "target_modules": ["up_proj"],
        "base_model_name_or_path": "someone/tiny", "bias": "none", "fan_in_fan_out": False, "use_dora": False,
        "init_lora_weights": True, "inference_mode": True, "lora_dropout": 0.05, "modules_to_save": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(values | config))
    save(folder / "adapter_model.safetensors", tensors)
    return folder


def mlx_folder(folder: Path, tensors: dict[str, Array], rank: int = 3, scale: float = 20.0, **config: Any) -> Path:
    """As mlx_lm.lora writes it: all that it was told is in adapter_config.json."""
    folder.mkdir()
    values = {
        "fine_tune_type": "lora", "num_layers": 16, "model": "mlx-community/tiny", "batch_size": 4, "lr_schedule": None,
        "lora_parameters": {"rank": rank, "dropout": 0.0, "scale": scale},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(values | config))
    save(folder / "adapters.safetensors", tensors)
    return folder


def up_proj(rng: np.random.Generator) -> dict[str, Array]:
    a, b = low_rank(rng, 96, 64)
    stem = "base_model.model.model.layers.1.mlp.up_proj.lora_"
    return {f"{stem}A.weight": a, f"{stem}B.weight": b}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


@pytest.fixture
def adapter(tmp_path: Path, rng: np.random.Generator) -> Path:
    return peft_folder(tmp_path / "adapter", up_proj(rng))


# --- as PEFT merges --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PEFT)
def test_the_logits_are_those_of_peft(wide: Path, case: str) -> None:
    """Against PEFT's unmerged model in float32: LoRA, rank and alpha patterns, rsLoRA, DoRA, a tower, heads."""
    ours = edgeq.load(wide, backend="numpy", adapter=DATA / case).logits(IDS)
    assert nmse(np.load(DATA / case / "logits.npy"), ours) < 1e-10  # float32, in another order: 1e-11


@pytest.mark.parametrize("case", [case for case in PEFT if case not in ("head", "embedding")])
def test_the_weights_are_those_of_merge_and_unload(base: Path, case: str) -> None:
    """Bit for bit, in bfloat16. (Of a tied head PEFT merges both for one's adapter, with a warning; here it is untied,
    as the model was in training: the logits above.)"""
    ours = merged(base, DATA / case)
    for file_name, theirs in tensors_of(DATA / case / "merged.safetensors").items():
        name = neutral_name(file_name)
        assert name is not None
        if name == "lm_head.weight" and ours.config.text.tie_word_embeddings:
            name = "embed_tokens.weight"
        if theirs.ndim == 2:
            assert np.mean(plain(ours, name) == theirs) > 0.9999, file_name  # sums in another order may round apart
            assert np.array_equal(ours.rows(name, slice(2, 9)), to_float32(plain(ours, name))[2:9])
        else:
            gain = 1 + to_float32(theirs) if name.endswith("norm.weight") else to_float32(theirs)
            assert np.array_equal(ours.dense(name), gain)


def test_a_head_is_untied_by_what_changes_only_it(base: Path) -> None:
    assert merged(base, DATA / "tied").config.text.tie_word_embeddings
    for case in ("head", "embedding", "saved"):
        ours = merged(base, DATA / case)
        assert not ours.config.text.tie_word_embeddings
        assert "lm_head.weight" in {spec.name for spec, _ in ours.storage()}
    before, ours = open_checkpoint(base), merged(base, DATA / "saved")
    assert np.array_equal(plain(ours, "embed_tokens.weight"), plain(before, "embed_tokens.weight"))


def test_every_backend_runs_it(base: Path) -> None:
    reference = edgeq.load(base, backend="numpy", adapter=DATA / "plain").logits(IDS)
    for backend in ("cpu", "mlx"):
        try:
            model = edgeq.load(base, backend=backend, adapter=DATA / "plain", kv_bits=16)
        except EdgeqError:
            continue
        assert nmse(reference, model.logits(IDS)) < 2e-4  # 16-bit keys and values, and bfloat16 on a GPU


def test_several_with_scales(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    one, two = up_proj(rng), up_proj(rng)
    paths = [peft_folder(tmp_path / name, x) for name, x in (("one", one), ("two:3", two))]
    w = to_float32(plain(open_checkpoint(base), UP))
    deltas = [2 * b @ a for a, b in (x.values() for x in (one, two))]
    ours = merged(base, f"{paths[0]}:0.5", paths[1])
    assert np.array_equal(plain(ours, UP), from_float32(w + np.float32(0.5) * deltas[0] + deltas[1]))
    assert np.array_equal(plain(merged(base, f"{paths[1]}:-2"), UP), from_float32(w - 2 * deltas[1]))
    assert np.array_equal(plain(merged(base, f"{paths[1]}:0"), UP), from_float32(w))
    assert len({merged(base, *x).fingerprint() for x in ([paths[0]], [paths[1]], [f"{paths[0]}:0.5"], paths)}) == 4


def test_what_cannot_be_scaled_or_added_up(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    for case in ("dora", "saved"):
        merged(base, f"{DATA / case}:1")
        with pytest.raises(UsageError, match="cannot be scaled"):
            merged(base, f"{DATA / case}:0.5")
        with pytest.raises(UsageError, match="and not both by adding to it"):
            merged(base, DATA / case, DATA / case)
    merged(base, f"{DATA / 'embedding'}:0.5")  # the embedding that PEFT stores beside its product is the base's
    merged(base, DATA / "dora", peft_folder(tmp_path / "other", {
        name.replace("up_proj", "gate_proj"): x for name, x in up_proj(rng).items()
    }))  # fmt: skip


# --- mlx-lm ----------------------------------------------------------------------------------------------------------


def mlx_model(folder: Path, adapter: Path) -> Any:
    """The fused model of `mlx_lm.fuse --dequantize`, without its tokenizer."""
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    from mlx.utils import tree_unflatten
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model = load_adapters(load_model(folder, lazy=True)[0], str(adapter))
    fused = [(name, m.fuse(dequantize=True)) for name, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(fused))
    return model


def mlx_adapter(folder: Path, kind: str, rng: np.random.Generator, keys: list[str], base: Path, rank: int = 3) -> Path:
    """An adapter whose tensors mlx-lm itself names and shapes, with values like those of training."""
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    model, _ = load_model(base, lazy=True)
    model.freeze()
    parameters = {"rank": rank, "dropout": 0.0, "scale": 2.5, "keys": keys}
    linear_to_lora_layers(model, 2, parameters, use_dora=kind == "dora")
    tensors, trained = {}, dict[str, Any](tree_flatten(model.trainable_parameters()))
    for name, x in trained.items():
        noise = rng.standard_normal(x.shape).astype(np.float32)
        tensors[name] = np.array(x.astype(mx.float32)) * (1 + noise / 8) if name.endswith(".m") else noise / 8
    return mlx_folder(folder, tensors, rank, fine_tune_type=kind, lora_parameters=parameters)


LINEARS = ["self_attn.q_proj", "linear_attn.in_proj_qkv", "linear_attn.out_proj", "mlp.down_proj"]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_weights_are_those_of_mlx_lm(
    base: Path, quantized: Path, tmp_path: Path, rng: np.random.Generator, kind: str
) -> None:
    keys = LINEARS if kind == "lora" else LINEARS[:2]  # mlx-lm's DoRA cannot count the columns of 5-bit matrices
    adapter = mlx_adapter(tmp_path / "a", kind, rng, keys, base)
    for folder in (base, quantized):
        theirs = dict(mlx_model(folder, adapter).named_modules())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = merged(folder, adapter)
        for name in ("layers.0.linear_attn.in_proj_qkv", "layers.1.self_attn.q_proj"):
            import mlx.core as mx

            expected = np.array(theirs[f"language_model.model.{name}"].weight.astype(mx.float32))
            found = to_float32(plain(ours, f"{name}.weight"))
            if kind == "lora" and folder == base:  # to the bit, but for sums that round apart
                assert np.mean(found == expected) > 0.9999
            # Else mlx-lm rounds to bfloat16 on the way: products of scale and code (larger than the weights), DoRA's
            # sum and its lengths. An error of 2^-8 in all of them is 1.5e-5; found: 1.6e-5 and 1.0e-5.
            assert nmse(expected, found) < 5e-5


def test_an_embedding_of_mlx_lm_moves_the_tied_head(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    adapter = mlx_adapter(tmp_path / "a", "lora", rng, ["language_model.model.embed_tokens"], base)
    import mlx.core as mx

    theirs = np.array(mlx_model(base, adapter).language_model.model.embed_tokens.weight.astype(mx.float32))
    ours = merged(base, adapter)
    assert ours.config.text.tie_word_embeddings
    assert np.mean(to_float32(plain(ours, "embed_tokens.weight")) == theirs) > 0.9999


def test_whole_tensors_of_mlx_lm(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """`fine_tune_type: full`: MLX's own convention, norms with the 1 and the convolution's channels last."""
    stem = "language_model.model.layers.1."
    norm, up = (rng.standard_normal(shape).astype(np.float32) for shape in ((64,), (96, 64)))
    gain, conv = from_float32(norm), rng.standard_normal((256, 4, 1)).astype(np.float32)
    tensors: dict[str, Array] = {
        f"{stem}input_layernorm.weight": gain, f"{stem}mlp.up_proj.weight": up,
        "language_model.model.layers.0.linear_attn.conv1d.weight": conv,
    }  # fmt: skip
    ours = merged(base, mlx_folder(tmp_path / "a", tensors, fine_tune_type="full"))
    assert np.array_equal(ours.dense("layers.1.input_layernorm.weight"), to_float32(gain))
    assert np.array_equal(plain(ours, UP), up)
    assert np.array_equal(ours.dense("layers.0.linear_attn.conv1d.weight"), conv[..., 0])


def test_a_step_of_mlx_lm(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """mlx-lm keeps an adapter for every so many steps beside the last; one is given as a file."""
    a, b = low_rank(rng, 96, 64)
    stem = "language_model.model.layers.1.mlp.up_proj.lora_"
    folder = mlx_folder(tmp_path / "a", {f"{stem}a": a.T.copy(), f"{stem}b": b.T.copy()})
    shutil.copy(folder / "adapters.safetensors", folder / "0000100_adapters.safetensors")
    ours = merged(base, folder / "0000100_adapters.safetensors")
    assert np.array_equal(plain(ours, UP), plain(merged(base, folder), UP))


# --- llama.cpp -------------------------------------------------------------------------------------------------------


def gguf_adapter(path: Path, checkpoint: Checkpoint, changes: dict[str, tuple[Float32, Float32]], **meta: Any) -> Path:
    """As convert_lora_to_gguf writes it: the model's own names and order of heads, applied to a and b."""
    writer = GGUFWriter(path, meta.get("arch", "qwen35"))
    if meta.get("is_adapter", True):
        writer.add_string("general.type", "adapter")
        writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", meta.get("alpha", 6.0))
    for name, (a, b) in changes.items():
        if order := head_order(name, checkpoint.config.text):
            a, b = (a, order.to_file(b)) if order.axis == 0 else (order.to_file(a), b)
        stem = file_names(name, len(checkpoint.config.text.layer_types))[0]
        writer.add_tensor(f"{stem}.lora_a", np.ascontiguousarray(a, np.float16))
        writer.add_tensor(f"{stem}.lora_b", np.ascontiguousarray(b, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_adapter_of_llama_cpp(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    before = open_checkpoint(base)
    names = [UP, "layers.0.linear_attn.in_proj_qkv.weight", "layers.0.linear_attn.out_proj.weight"]
    shapes = {spec.name: spec.shape for spec, _ in before.storage()}
    changes = {name: low_rank(rng, *shapes[name]) for name in names}
    ours = merged(base, gguf_adapter(tmp_path / "a.gguf", before, changes))
    for name, (a, b) in changes.items():
        delta = 2 * b.astype(np.float16).astype(np.float32) @ a.astype(np.float16).astype(np.float32)
        w = to_float32(plain(before, name)) + delta
        assert np.allclose(to_float32(plain(ours, name)), w, rtol=2**-8, atol=1e-6)
    with pytest.raises(ModelError, match="is a model, not an adapter"):
        merged(base, gguf_adapter(tmp_path / "m.gguf", before, changes, is_adapter=False))
    with pytest.raises(ModelError, match="of the kind mmproj, not an adapter"):
        merged(base, gguf_adapter(tmp_path / "v.gguf", before, changes, is_adapter=False, arch="clip"))
    with pytest.raises(ModelError, match=r"general\.architecture"):
        merged(base, gguf_adapter(tmp_path / "l.gguf", before, changes, arch="llama"))


# --- a quantized base ------------------------------------------------------------------------------------------------


def test_on_a_quantized_base(base: Path, quantized: Path, adapter: Path, tmp_path: Path) -> None:
    """Merged with the exact values, kept in 16 bits; said in a line, and counted before and after loading."""
    before = open_checkpoint(quantized)
    tensors = list(tensors_of(adapter / "adapter_model.safetensors").values())
    w = before.rows(UP, slice(None)) + 2 * tensors[1] @ tensors[0]
    export_gguf(open_checkpoint(base), tmp_path / "q8.gguf", "q8_0")
    for folder in (quantized, tmp_path / "q8.gguf"):
        with pytest.warns(UserWarning, match=r"is quantized: matrices .* \(1\) are held in 16 bits"):
            model = edgeq.load(folder, backend="numpy", adapter=adapter)
        assert isinstance(model.checkpoint.matrix("layers.0.mlp.up_proj.weight"), QMatrix)
        ours = to_float32(plain(model.checkpoint, UP))
        alone = open_checkpoint(folder)
        exact = alone.rows(UP, slice(None)) + 2 * tensors[1] @ tensors[0]
        assert np.array_equal(ours, to_float32(from_float32(exact)))
        model.logits(IDS)
        ops = select("numpy")
        added = 2 * w.size - alone.memory_nbytes(next(s for s, _ in alone.storage() if s.name == UP))
        plans = [plan_memory(checkpoint, ops, 256).weights for checkpoint in (model.checkpoint, alone)]
        assert plans[0] - plans[1] == added
        weights = [h for h in model.engine.ledger.holdings() if "weights" in h.owner and not h.mapped]
        assert sum(h.nbytes for h in weights) >= 2 * w.size


def test_quantize_and_export_with_an_adapter(base: Path, tmp_path: Path) -> None:
    """The same bytes as from the folder that PEFT's merging would have written."""
    folder = tmp_path / "merged"
    shutil.copytree(base, folder)
    changed = {hub_name(str(neutral_name(n))): x for n, x in tensors_of(DATA / "plain" / "merged.safetensors").items()}
    rewrite(folder, lambda tensors: tensors.update(changed))
    quantize(base, tmp_path / "one", group_size=32, adapter=DATA / "plain")
    quantize(folder, tmp_path / "two", group_size=32)
    one, two = (tensors_of(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert np.mean([np.array_equal(one[name], two[name]) for name in one]) > 0.95  # sums that round apart
    record = json.loads((tmp_path / "one" / "edgeq.json").read_text())
    assert record["recipe"]["adapters"] == [{"name": "plain", "scale": 1.0}]
    assert "adapter_model.safetensors" in record["source"]["files"]

    export_gguf(merged(base, DATA / "plain"), tmp_path / "one.gguf", "bf16")
    exported, expected = open_checkpoint(tmp_path / "one.gguf"), merged(base, DATA / "plain")
    for spec in all_tensors(expected.config):
        if spec.part.value == "text" and spec.role is Role.LINEAR:
            assert np.array_equal(plain(exported, spec.name), plain(expected, spec.name)), spec.name


@pytest.mark.parametrize("case", ["head", "saved", "vision"])
def test_quantizing_what_is_untied_or_sees(base: Path, tmp_path: Path, case: str) -> None:
    quantize(base, tmp_path / "out", recipe="none", adapter=DATA / case)
    written, ours = open_checkpoint(tmp_path / "out"), merged(base, DATA / case)
    assert written.config.text.tie_word_embeddings == ours.config.text.tie_word_embeddings
    for spec, _ in ours.storage():
        assert np.array_equal(written.dense(spec.name), ours.dense(spec.name)), spec.name


# --- the commands ----------------------------------------------------------------------------------------------------


def test_the_commands(
    chat_folder: Path, tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    leave_home(tmp_path, monkeypatch)
    run = runner(capsys, monkeypatch)

    def said(*arguments: str | Path) -> str:
        result = run(*arguments)
        assert result.code == 0, result.err
        return result.out

    a, b = low_rank(rng, 128, 64)
    stem = "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_"
    folder = peft_folder(tmp_path / "my-lora", {f"{stem}A.weight": a, f"{stem}B.weight": b})
    prompt = ("-p", "hello", "-n", "8", "--temp", "0", "--draft", "off")
    plain = said("generate", chat_folder, *prompt)
    assert said("generate", chat_folder, *prompt, "--adapter", f"{folder}:0") == plain
    assert said("generate", chat_folder, *prompt, "--lora", folder) != plain
    said("chat", chat_folder, *prompt, "--adapter-path", folder)
    said("bench", chat_folder, "-p", "8", "-n", "2", "-r", "1", "--adapter", folder)
    against = ("kld", chat_folder, chat_folder, "--context", "16", "--chunks", "1", "--adapter", folder, "--json")
    assert json.loads(said(*against))[0]["mean"] > 0
    assert json.loads(said(*against, "--reference-adapter", folder))[0]["mean"] == 0
    said("quantize", chat_folder, "-o", tmp_path / "q", "--group-size", "32", "--adapter", folder)
    said("export", chat_folder, "-o", tmp_path / "x.gguf", "--adapter", folder)
    facts = json.loads(said("info", folder, "--json"))
    assert facts["format"] == "PEFT LoRA"
    assert facts["base"] == "someone/tiny"
    assert facts["ranks"] == "3"

    result = run("chat", folder, *prompt)
    assert result.code == 4
    assert "is an adapter for someone/tiny, not a model" in result.err
    assert f"edgeq chat someone/tiny --adapter {folder}" in result.err


# --- what is wrong, or not known -------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "LoHa": ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    "IA3": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING'"),
    "no type": ({"peft_type": None}, "peft_type is None"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    "replicated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "QA-LoRA": ({"use_qalora": True}, "use_qalora"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "bias of lora_B": ({"lora_bias": True}, "lora_bias"),
    "token indices": ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    "parameters": ({"target_parameters": ["x"]}, "target_parameters"),
    "something new": ({"use_something_new": True}, "use_something_new"),
    "rank": ({"r": 4}, "of rank 3, adapter_config.json says 4"),
    "rank pattern": ({"rank_pattern": {"mlp.up_proj": 5}}, "of rank 3, adapter_config.json says 5"),
    "no rank": ({"r": None}, "r is None"),
    "alpha": ({"lora_alpha": "16"}, "lora_alpha is '16'"),
    "infinite alpha": ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
    "a flag": ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
    "DoRA without lengths": ({"use_dora": True}, "has no lora_magnitude_vector"),
    "hostile pattern": ({"alpha_pattern": {"(a+)+b": 2}}, "alpha_pattern has a pattern"),
    "slow pattern": ({"alpha_pattern": {".*" * 40 + "x": 2}}, "alpha_pattern has a pattern"),
    "patterns": ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(base: Path, adapter: Path, case: str) -> None:
    change, message = REFUSED[case]
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ModelError, match=message) as error:
        merged(base, adapter)
    assert documented("Adapters that are refused", case, adapter, base) in one_line(error.value)


HARMLESS: tuple[dict[str, Any], ...] = (
    {"eva_config": {"rho": 2.0}, "init_lora_weights": "eva"},
    {"loftq_config": {}, "megatron_config": None, "layer_replication": None, "peft_version": "0.21.0", "revision": "a"},
    {"fan_in_fan_out": True, "auto_mapping": {"unsloth_fixed": True}, "bias": "none", "qalora_group_size": 16},
    {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {r"layers\.\d+\.mlp\.(up|down)_proj": 6, "^model.visual.*": 3}},
)


@pytest.mark.parametrize("change", HARMLESS, ids=lambda change: next(iter(change)))
def test_used_all_the_same(base: Path, adapter: Path, change: dict[str, Any]) -> None:
    expected = plain(merged(base, adapter), UP)
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    assert np.array_equal(plain(merged(base, adapter), UP), expected)


def test_named_by_a_file_of_it(base: Path, adapter: Path) -> None:
    expected = plain(merged(base, adapter), UP)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert np.array_equal(plain(merged(base, adapter / name), UP), expected)


def test_without_a_word_about_the_file(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """mx.save_safetensors, which mlx-lm's trainer calls without metadata, writes null in their place."""
    a, b = low_rank(rng, 96, 64)
    name = "language_model.model.layers.1.mlp.up_proj"
    folder = mlx_folder(tmp_path / "a", {f"{name}.lora_a": a.T.copy(), f"{name}.lora_b": b.T.copy()})
    expected = plain(merged(base, folder), UP)
    file = folder / "adapters.safetensors"
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps({"__metadata__": None, **json.loads(data[8:end])}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    assert np.array_equal(plain(merged(base, folder), UP), expected)


def drop(*parts: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if any(part in name for part in parts)]:
            del tensors[name]

    return change


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def values(part: str, make: Callable[[Array], Array]) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if part in name]:
            tensors[name] = make(tensors[name])

    return change


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no lora_B": (drop("lora_B"), "has no lora_B"),
    "empty": (drop(""), "holds no tensors"),
    "another layer": (renamed("layers.1", "layers.7"), r"unexpected layers\.7\.mlp\.up_proj.*someone/tiny"),
    "another model": (renamed("mlp.up_proj", "mlp.experts.3.up_proj"), "unexpected layers.1.mlp.experts.3.up_proj"),
    "another size": (values("lora_A", lambda x: np.tile(x, 2)), r"changed as \[96, 128\], expected \[96, 64\]"),
    "a norm": (renamed("mlp.up_proj", "input_layernorm"), "is no matrix that edgeq adapts"),
    "ranks apart": (values("lora_B", lambda x: x[:, :2].copy()), "no product of low rank"),
    "a shard": (values("lora_A", lambda x: x[:0].copy()), "no product of low rank"),
    "flat": (values("lora_A", np.ravel), "no product of low rank"),
    "NaN": (values("lora_A", lambda x: x * np.float32(np.nan)), "NaN or infinity"),
    "integers": (values("lora_A", lambda x: x.astype(np.int64)), "is I64, expected F32, F16, BF16"),
    "beyond all numbers": (values("lora_", lambda x: x * np.float32(1e25)), "no longer finite"),
    "tokens": (renamed("mlp.up_proj.lora_A.weight", "token_adapter.trainable_tokens_delta"), "does not know what"),
    "a bias": (renamed("lora_B.weight", "lora_B.bias"), "lora_bias"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(base: Path, adapter: Path, case: str) -> None:
    change, message = BROKEN[case]
    path = adapter / "adapter_model.safetensors"
    tensors = tensors_of(path)
    change(tensors)
    save(path, tensors)
    with pytest.raises(ModelError) as error:
        plain(merged(base, adapter), UP)
    assert re.search(message, " ".join(f"{error.value} {error.value.hint}".split())), error.value
    assert documented("Adapters that are refused", case, adapter, base) in one_line(error.value)


def documented(section: str, what: str, path: Path, base: Path) -> str:
    """What docs/reference/formats.md says that edgeq says."""
    return rows(section)[what][1].replace("PATH", str(path)).replace("BASE", str(base))


def one_line(error: ModelError) -> str:
    return " ".join(str(error).split())


def test_every_refusal_has_a_row() -> None:
    assert rows("Adapters that are refused").keys() == REFUSED.keys() | BROKEN.keys() | {"an embedding resized"}


def test_names_as_tools_leave_them(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """With the adapter's own name, wrapped by compilers and parallel training, from classes with and without tower."""
    tensors = up_proj(rng)
    expected = plain(merged(base, peft_folder(tmp_path / "plain", tensors)), UP)
    for i, (old, new) in enumerate([
        (".weight", ".default.weight"), ("base_model.model.", "base_model.model._orig_mod."),
        ("base_model.model.model.", "module.base_model.model.model.language_model."),
        ("base_model.model.model.layers", "base_model.model.layers"),
    ]):  # fmt: skip
        renaming = {name.replace(old, new): x for name, x in tensors.items()}
        assert np.array_equal(plain(merged(base, peft_folder(tmp_path / str(i), renaming)), UP), expected)
    both = tensors | {name.replace(".weight", ".other.weight"): x for name, x in tensors.items()}
    with pytest.raises(ModelError, match="more than one adapter"):
        merged(base, peft_folder(tmp_path / "both", both))


def test_files_that_are_missing(base: Path, tmp_path: Path, adapter: Path) -> None:
    with pytest.raises(ModelError, match=r"adapter_config\.json is missing"):
        merged(base, base)
    (tmp_path / "out" / "checkpoint-20").mkdir(parents=True)
    shutil.copytree(adapter, tmp_path / "out" / "checkpoint-40")
    with pytest.raises(ModelError) as error:
        merged(base, tmp_path / "out")
    assert "checkpoint-40" in str(error.value.hint)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="a pickle of PyTorch"):
        merged(base, adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is missing"):
        merged(base, adapter)
    for given in (f"{tmp_path / 'nothing'}:0.5", str(tmp_path / "nothing")):
        with pytest.raises(UsageError, match="not found"):
            merged(base, given)
    with pytest.raises(UsageError, match="an adapter's scale"):
        merged(base, f"{tmp_path}:1e9")


@pytest.mark.parametrize(("change", "message"), [
    ({"fine_tune_type": "prefix"}, "fine_tune_type is 'prefix'"),
    ({"lora_parameters": {"rank": 3, "dropout": 0.0}}, "lora_parameters.scale is None"),
    ({"lora_parameters": {"rank": 3, "scale": 2.0, "alpha": 16}}, "lora_parameters.alpha is 16"),
    ({"lora_parameters": {"rank": 8, "scale": 2.0}}, "of rank 3, adapter_config.json says 8"),
    ({"lora_parameters": None}, "lora_parameters is None"),
    ({"fine_tune_type": "dora"}, "has no m"),
])  # fmt: skip
def test_what_mlx_lm_cannot_have_meant(
    base: Path, tmp_path: Path, rng: np.random.Generator, change: dict[str, Any], message: str
) -> None:
    a, b = low_rank(rng, 96, 64)
    stem = "language_model.model.layers.1.mlp.up_proj.lora_"
    with pytest.raises(ModelError, match=message):
        merged(base, mlx_folder(tmp_path / "a", {f"{stem}a": a.T.copy(), f"{stem}b": b.T.copy()}, **change))


def test_another_base_of_the_same_size(tmp_path: Path, adapter: Path) -> None:
    folder = tmp_path / "models--Qwen--Qwen3.5-2B" / "snapshots" / "abc"
    write_checkpoint(folder, json.loads((DATA / "base.json").read_text()))
    config = adapter / "adapter_config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps(told | {"base_model_name_or_path": "unsloth/Qwen3.5-2B-Base"}))
    with pytest.warns(UserWarning, match=r"trained on unsloth/Qwen3.5-2B-Base, and this is Qwen3.5-2B"):
        merged(folder, adapter)
    config.write_text(json.dumps(told | {"base_model_name_or_path": "unsloth/Qwen3.5-2B-bnb-4bit"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged(folder, adapter)


def test_a_chat_template_of_its_own(chat_folder: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    a, b = low_rank(rng, 128, 64)
    stem = "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_"
    folder = peft_folder(tmp_path / "a", {f"{stem}A.weight": a, f"{stem}B.weight": b})
    shutil.copy(chat_folder / "chat_template.jinja", folder)  # trainers save the base's with every adapter
    assert merged(chat_folder, folder).template() is not None
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    ours = merged(chat_folder, folder)
    with pytest.warns(UserWarning, match=r"a: its chat_template\.jinja is another chat template than the model's"):
        template = ours.template()
    assert template is not None
    assert template.source == (chat_folder / "chat_template.jinja").read_text()
    with pytest.warns(UserWarning, match="is another chat template"):
        quantize(chat_folder, tmp_path / "out", group_size=32, adapter=folder)
    chosen = folder / "chat_template.jinja"
    model = edgeq.load(chat_folder, backend="numpy", adapter=folder, chat_template=chosen)  # and nothing is said
    assert model.template is not None
    assert model.template.source == chosen.read_text()


def test_embeddings_that_were_resized(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """PEFT stores them whole, and trained ones (`modules_to_save`) twice. The next step is not the base again."""
    table, stem = np.ones((260, 64), np.float32), "base_model.model.model.embed_tokens"
    again, other = ({f"{stem}.modules_to_save.weight": x} for x in (table, 2 * table))
    for i, tensors in enumerate(({f"{stem}.weight": table}, {f"{stem}.weight": table, **again})):
        with pytest.raises(ModelError) as error:
            merged(base, peft_folder(tmp_path / str(i), tensors | up_proj(rng)))
        said = documented("Adapters that are refused", "an embedding resized", tmp_path / str(i), base)
        name = re.escape(f"{stem}.") + r"(modules_to_save\.)?weight"
        assert re.sub(name, f"{stem}.weight", one_line(error.value)).startswith(said)
        assert "resized to 260 tokens" in str(error.value.hint)
        assert "give that model" not in str(error.value.hint)
    with pytest.raises(ModelError, match="are the same tensor"):
        merged(base, peft_folder(tmp_path / "other", {f"{stem}.weight": table, **other}))
    row = {f"{stem}.weight": table[:256], f"{stem}.modules_to_save.weight": table[:256]}
    assert (plain(merged(base, peft_folder(tmp_path / "same", row)), "embed_tokens.weight") == 1).all()


def test_parts_that_the_base_lacks(base: Path, tmp_path: Path) -> None:
    quantize(base, tmp_path / "blind", recipe="none", vision="none")
    with pytest.warns(UserWarning, match="has no vision tower: what the adapter changes in it is left out"):
        ours = merged(tmp_path / "blind", DATA / "vision")
    assert np.array_equal(
        plain(ours, "layers.1.self_attn.v_proj.weight"),
        plain(merged(base, DATA / "vision"), "layers.1.self_attn.v_proj.weight"),
    )


def test_beside_a_model(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Some trainers save the adapter into the folder of the whole model."""
    folder = tmp_path / "both"
    shutil.copytree(base, folder)
    for file in adapter.iterdir():
        shutil.copy(file, folder)
    with pytest.warns(UserWarning, match="holds an adapter beside the model"):
        assert np.array_equal(plain(open_checkpoint(folder), UP), plain(open_checkpoint(base), UP))
    with pytest.warns(UserWarning, match="holds an adapter beside the model"):
        assert np.array_equal(plain(merged(folder, folder), UP), plain(merged(base, adapter), UP))


def test_nothing_given_changes_nothing(base: Path) -> None:
    checkpoint = open_checkpoint(base)
    assert adapted(checkpoint, given_adapters(None)) is checkpoint
    assert adapted(checkpoint, given_adapters([])) is checkpoint
    assert config_values()["model_type"] == "qwen3_5"
