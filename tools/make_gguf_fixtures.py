#!/usr/bin/env python3
"""Make tests/data/gguf: files that llama.cpp itself quantized, for tests that run without it.

    python tools/make_gguf_fixtures.py            # needs llama-cpp-python; the tests that use the result do not

One layer of each kind, value heads two to a key head, every matrix made of a few rows over and over: so that the
compressed files are small, while codes and scales are as varied as any.
"""

from __future__ import annotations

import json
import lzma
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llama import FILE_TYPES, k_shape, quantize  # noqa: E402

from edgeq.checkpoint import open_checkpoint  # noqa: E402
from edgeq.config import parse_config  # noqa: E402
from edgeq.formats.bf16 import from_float32  # noqa: E402
from edgeq.formats.names import hub_name  # noqa: E402
from edgeq.formats.safetensors import SafetensorsWriter  # noqa: E402
from edgeq.quant.gguf_export import export_gguf  # noqa: E402
from edgeq.testing import random_values  # noqa: E402
from edgeq.weights import TensorSpec, all_tensors  # noqa: E402

ROWS = 4  # different rows of a matrix


def values_of(spec: TensorSpec, rng: np.random.Generator) -> np.ndarray:
    x = random_values(spec, rng)
    if len(spec.shape) != 2:
        return x
    few = x[:ROWS]
    return np.tile(few, (-(-len(x) // ROWS), 1))[: len(x)]


def main() -> None:
    out = ROOT / "tests" / "data" / "gguf"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        for file_type in FILE_TYPES.keys() - {"BF16"}:  # which needs no quantizer
            make(Path(name) / file_type, file_type, out / f"{file_type}.gguf.xz")
        narrow = {"linear_key_head_dim": 64, "linear_value_head_dim": 64}  # a block of scales is two pairs of heads
        make(Path(name) / "narrow", "Q4_K_M", out / "Q4_K_M-narrow-heads.gguf.xz", **narrow)


def make(folder: Path, file_type: str, out: Path, **shape: Any) -> None:
    folder.mkdir()
    write(folder, **shape)
    export_gguf(open_checkpoint(folder), folder / "f32.gguf", "f32")
    raw = quantize(folder / "f32.gguf", folder / "quantized.gguf", file_type).read_bytes()
    out.write_bytes(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))
    print(f"{out.name}: {len(raw):,} bytes, {out.stat().st_size:,} compressed")


def write(folder: Path, **shape: Any) -> None:
    values = k_shape(layer_types=["linear_attention", "full_attention"], intermediate_size=256, **shape)
    (folder / "config.json").write_text(json.dumps(values))
    rng = np.random.default_rng(7)
    specs = list(all_tensors(parse_config(values)))
    entries = {hub_name(spec.name): ("BF16", spec.shape) for spec in specs}
    with SafetensorsWriter(folder / "model.safetensors", entries) as file:
        for spec in specs:
            file.write(hub_name(spec.name), from_float32(values_of(spec, rng)))


if __name__ == "__main__":
    main()
