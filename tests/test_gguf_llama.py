"""edgeq's files in llama.cpp and llama.cpp's in edgeq. Needs llama-cpp-python (see tools/llama.py), else skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_gguf import DenseCheckpoint, dense, read
from tiny_tokenizer import build_tiny_tokenizer, link_real_tokenizer
from tokenizers.normalizers import NFC

import edgeq
from edgeq.api import Model
from edgeq.backends.numpy import NumpyOps
from edgeq.checkpoint import open_checkpoint
from edgeq.formats.bf16 import Array
from edgeq.hub import DEMO
from edgeq.quant.gguf_export import export_gguf
from edgeq.testing import config_values, nmse, write_checkpoint
from edgeq.weights import Matrix

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
from llama import FILE_TYPES, Llama, k_shape, quantize

pytestmark = pytest.mark.slow

PROMPT = np.random.default_rng(0).integers(0, 288, 37).tolist()
SHAPES: dict[str, dict[str, Any]] = {
    "value-heads-1x": k_shape(1, mtp=True),
    "value-heads-2x": k_shape(2, mtp=True),
    "value-heads-4x-untied": k_shape(4, tie_word_embeddings=False),
}


class HalfActivations(NumpyOps):
    """What llama.cpp does with F16 weights: it rounds activations to F16 before it multiplies."""

    def linear(self, x: Array, w: Matrix[Array]) -> Array:
        return super().linear(x.astype(np.float16).astype(np.float32), w)


def greedy(model: Model, ids: list[int], count: int) -> list[int]:
    out: list[int] = []
    logits, state = model.forward(ids, model.state())
    for _ in range(count):
        out.append(int(logits.argmax()))
        logits, state = model.forward(out[-1:], state)
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("kind", "ops", "bound"),
    [
        ("f32", NumpyOps(), 1e-9),  # only the order of sums differs
        ("f16", NumpyOps(), 1e-5),  # it rounds activations to F16
        ("f16", HalfActivations(), 2e-6),  # a sum in another order can round one to the other neighbour
    ],
)
def test_exports_run_in_llama_cpp(shape: str, kind: str, ops: NumpyOps, bound: float, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", SHAPES[shape])
    path = tmp_path / "model.gguf"
    export_gguf(open_checkpoint(tmp_path / "model"), path, kind)
    checkpoint, theirs = open_checkpoint(path), Llama(path)
    assert nmse(theirs.logits(PROMPT), Model(checkpoint, ops).logits(PROMPT)) <= bound
    assert greedy(Model(checkpoint, NumpyOps()), PROMPT, 32) == theirs.greedy(PROMPT, 32)


@pytest.mark.parametrize("file_type", FILE_TYPES)
@pytest.mark.parametrize("shape", ["value-heads-1x", "value-heads-2x"])
def test_files_of_its_quantizer(shape: str, file_type: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", SHAPES[shape])
    export_gguf(open_checkpoint(tmp_path / "model"), tmp_path / "f32.gguf", "f32")
    path = quantize(tmp_path / "f32.gguf", tmp_path / f"{file_type}.gguf", file_type)
    checkpoint, expected = read(path), DenseCheckpoint(path)
    assert checkpoint.format.startswith(f"GGUF, {file_type.removesuffix('_M')}")
    for name, tensor in checkpoint.tensors.items():
        if len(tensor.spec.shape) == 2:
            np.testing.assert_array_equal(dense(checkpoint, name), expected.matrix(name), err_msg=name)
    logits = [Model(c, NumpyOps()).logits(PROMPT) for c in (expected, checkpoint)]
    assert nmse(*logits) <= 1e-9
    # llama.cpp multiplies quantized weights by 8-bit activations (BF16 by BF16): the loosest sanity bound.
    assert nmse(Llama(path).logits(PROMPT), logits[1]) < 0.2


@pytest.mark.parametrize("kind", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_quantized_exports_load(kind: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", SHAPES["value-heads-2x"])
    path = tmp_path / "model.gguf"
    export_gguf(open_checkpoint(tmp_path / "model"), path, kind)
    assert nmse(Llama(path).logits(PROMPT), Model(open_checkpoint(path), NumpyOps()).logits(PROMPT)) < 0.2


QUESTIONS = {
    "What is 7 * 8?": "7 * 8 = 56.",
    "What is 24 + 37?": None,
    "Tell me a story.": None,
    "Hi!": None,
}


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize("thinking", [False, True])
def test_the_demo_model_answers_alike(kind: str, thinking: bool, tmp_path: Path) -> None:
    """A trained model, its own template and stop token: the same tokens up to and with the end of the reply."""
    export_gguf(open_checkpoint(DEMO), tmp_path / "demo.gguf", kind)
    model, theirs = edgeq.load(tmp_path / "demo.gguf", backend="numpy"), Llama(tmp_path / "demo.gguf")
    for question, answer in QUESTIONS.items():
        chat = model.chat(thinking=thinking, temperature=0.0, max_tokens=100)
        reply = chat.send(question)
        text = "".join(piece.text for piece in reply if piece.channel == "answer")
        start = reply.usage.prompt_tokens
        prompt, found = list(chat.ids[:start]), list(chat.ids[start:])
        assert found == theirs.greedy(prompt, len(found)), question
        assert answer is None or text.strip() == answer


def test_the_demo_model_survives_q4_k_m(tmp_path: Path) -> None:
    """Its heads of 64 are narrower than a block of scales."""
    export_gguf(open_checkpoint(DEMO), tmp_path / "f32.gguf", "f32")
    path = quantize(tmp_path / "f32.gguf", tmp_path / "Q4_K_M.gguf", "Q4_K_M")
    expected, found = (Model(c, NumpyOps()).logits(PROMPT) for c in (DenseCheckpoint(path), read(path)))
    assert nmse(expected, found) <= 1e-9
    chat = edgeq.load(path).chat(thinking=False, temperature=0.0, max_tokens=30)
    assert "".join(piece.text for piece in chat.send("What is 7 * 8?")).strip() == "7 * 8 = 56."


TEXTS = (
    "Hello, world!  How's it going?\n\n\tIt's 3.14159 o'clock.",
    "größe naïve café 中文 你好世界 日本語テスト мир привет مرحبا שָׁלוֹם नमस्ते 안녕 😀👩‍👩‍👧",
    "def f(x):\n    return x**2  # comment\r\n\r\n",
    "cafe\u0301 A\u030angstro\u0308m \u1e9b\u0323 \u212b",  # NFC changes these
    "   leading and trailing   ",
    "<|im_start|>user\nplain text here<|im_end|>\n",
)


def assert_tokenizes_alike(path: Path, texts: tuple[str, ...]) -> None:
    ours, theirs = open_checkpoint(path).tokenizer(), Llama(path, vocab_only=True)
    assert ours is not None
    for text in texts:
        composed = NFC().normalize_str(text)  # the step that llama.cpp leaves out
        assert ours.encode(text, control=True) == theirs.tokenize(composed, control=True), text
        assert ours.encode(text) == theirs.tokenize(composed), text


def test_tokenizes_alike(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", config_values(vocab_size=1088))
    build_tiny_tokenizer(tmp_path / "model")
    export_gguf(open_checkpoint(tmp_path / "model"), tmp_path / "model.gguf", "f16")
    assert_tokenizes_alike(tmp_path / "model.gguf", TEXTS)


@pytest.mark.shared
def test_the_real_tokenizer_tokenizes_alike(tmp_path: Path) -> None:
    link_real_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    values = config_values(vocab_size=248320, hidden_size=32, layer_types=["linear_attention", "full_attention"])
    write_checkpoint(tmp_path / "model", values)
    export_gguf(open_checkpoint(tmp_path / "model"), tmp_path / "model.gguf", "f16")
    rng = np.random.default_rng(0)
    ranges = ((0x20, 0x7F), (0xA0, 0x2000), (0x2000, 0xD800), (0x1F000, 0x1FB00))
    drawn = tuple("".join(chr(rng.integers(*ranges[rng.integers(4)])) for _ in range(30)) for _ in range(500))
    assert_tokenizes_alike(tmp_path / "model.gguf", TEXTS + drawn)
