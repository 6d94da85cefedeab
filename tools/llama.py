"""llama.cpp, for comparison: loads and quantizes GGUF files through llama-cpp-python (the extra `peers`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp as L
import numpy as np

from edgeq.formats.bf16 import Array, Float32
from edgeq.testing import config_values

# Files of llama.cpp's own quantizer, by llama_ftype. The K types and IQ4_XS mix in others (Q6_K for the head ...);
# MXFP4 is asked for with `pure`, since the file type is for experts.
FILE_TYPES = {
    "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q8_0": 7, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25,
    "IQ4_XS": 30, "BF16": 32,
    "Q2_K": 10, "Q3_K_M": 12, "MXFP4": 38,
}  # fmt: skip


@L.llama_log_callback
def _silent(_level: int, _text: bytes, _data: Any) -> None:
    pass


L.llama_log_set(_silent, ctypes.c_void_p(0))
L.llama_backend_init()


class Llama:
    """A model in llama.cpp, float32 caches, one thread."""

    def __init__(self, path: Path, context: int = 256, *, vocab_only: bool = False) -> None:
        model = L.llama_model_default_params()
        model.n_gpu_layers, model.vocab_only = 0, vocab_only
        self._model = L.llama_model_load_from_file(str(path).encode(), model)
        assert self._model, f"llama.cpp does not load {path}"
        self._vocab = L.llama_model_get_vocab(self._model)
        if vocab_only:
            return
        settings = L.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = 1
        settings.type_k = settings.type_v = 0  # F32
        settings.flash_attn_type = 0  # off
        self._context = L.llama_init_from_model(self._model, settings)
        assert self._context
        self._position = 0

    def logits(self, ids: Sequence[int]) -> Float32:
        """Logits after each of `ids` from an empty state: float32 [len(ids), vocabulary]."""
        L.llama_memory_clear(L.llama_get_memory(self._context), True)
        self._position = 0
        return self._decode(ids)

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The next `count` tokens."""
        out, last = [], self.logits(ids)[-1]
        for _ in range(count):
            out.append(int(last.argmax()))
            last = self._decode(out[-1:])[-1]
        return out

    def tokenize(self, text: str, *, control: bool = False) -> list[int]:
        raw = text.encode()
        buffer = (L.llama_token * (len(raw) + 16))()
        return list(buffer[: L.llama_tokenize(self._vocab, raw, len(raw), buffer, len(buffer), False, control)])

    def _decode(self, ids: Sequence[int]) -> Float32:
        batch = L.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, self._position + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
        assert L.llama_decode(self._context, batch) == 0
        self._position += len(ids)
        size = (L.llama_vocab_n_tokens(self._vocab),)
        rows: list[Array] = [
            np.ctypeslib.as_array(L.llama_get_logits_ith(self._context, i), shape=size).copy() for i in range(len(ids))
        ]
        L.llama_batch_free(batch)
        return np.stack(rows)


def quantize(source: Path, out: Path, file_type: str) -> Path:
    """Let llama.cpp quantize a GGUF file."""
    settings = L.llama_model_quantize_default_params()
    settings.ftype, settings.nthread, settings.pure = FILE_TYPES[file_type], 2, file_type == "MXFP4"
    assert L.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(settings)) == 0
    return out


def k_shape(value_heads_per_key_head: int = 2, **text: Any) -> dict[str, Any]:
    """A config.json whose matrices have rows of 256, as the K types need."""
    shape = {
        "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "linear_num_key_heads": 4 // value_heads_per_key_head, "linear_num_value_heads": 4,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    }  # fmt: skip
    values = config_values(**{**shape, **text})
    values["text_config"]["rope_parameters"]["mrope_section"] = [3, 3, 2]
    return values
