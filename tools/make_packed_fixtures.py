#!/usr/bin/env python3
"""Make tests/data/packed.safetensors.xz: matrices as the writers of their formats pack them, and what went in.

    python tools/make_packed_fixtures.py

Needs torch, compressed-tensors, auto-round, autoawq and gptqmodel; the tests that use the result need none of them. A
case is the tensors `CASE/PART` of a module and the metadata `CASE`, what config.json says as `quantization_config`;
with `CASE/in/codes`, `zeros`, `scales` and `columns` (the group of each), of which the weights are (code - zero) *
scale, or with `CASE/in/weights`.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import torch
from auto_round.export.export_to_awq.utils import WQLinear_GEMM as AutoRoundAWQ
from auto_round_extension.torch.qlinear_torch import QuantLinear as AutoRoundLinear
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear as AutoRoundLessOne
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.modules.linear.gemv import WQLinear_GEMV
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.mxfp8.base import MXFP8QuantizationCompressor
from compressed_tensors.compressors.naive_quantized import NaiveQuantizationCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import FORMAT, METHOD
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save
from torch import Tensor, nn

OUT = Path(__file__).resolve().parent.parent / "tests" / "data" / "packed.safetensors.xz"
ROWS, COLUMNS = 32, 128

Parts = dict[str, Tensor]
Case = tuple[Parts, dict[str, Any]]


class Numbers:
    """Codes, zero points and scales at random, and the weights that they make: exactly, in float32."""

    def __init__(self, seed: int, bits: int, group: int, *, sym: bool, order: bool = False, least: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.bits, self.group, self.sym, self.order = bits, group, sym, order
        groups = COLUMNS // group
        self.codes = codes = torch.randint(0, 1 << bits, (ROWS, COLUMNS), generator=rng)
        zeros = torch.randint(least, 1 << bits, (ROWS, groups), generator=rng)
        self.zeros = torch.full_like(zeros, 1 << (bits - 1)) if sym else zeros
        self.scales = (torch.rand((ROWS, groups), generator=rng) * 0.02 + 0.001).half()
        self.g_idx = torch.arange(COLUMNS) // group
        if order:
            self.g_idx = self.g_idx[torch.randperm(COLUMNS, generator=rng)]
        self.weights = (codes - self.zeros[:, self.g_idx]).float() * self.scales.float()[:, self.g_idx]

    def tensors(self) -> Parts:
        return {
            "codes": self.codes.to(torch.uint8), "zeros": self.zeros.to(torch.uint8), "scales": self.scales,
            "columns": self.g_idx.to(torch.uint8),
        }  # fmt: skip

    def linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        linear = nn.Linear(COLUMNS, ROWS, bias=False)
        linear.weight = nn.Parameter(self.weights.to(dtype), requires_grad=False)
        return linear


def parts_of(module: nn.Module, *names: str) -> Parts:
    return {name: getattr(module, name).detach().clone().contiguous() for name in names}


def gptq(n: Numbers, layout: str) -> Case:
    module = TorchLinear(
        bits=n.bits, group_size=n.group, sym=n.sym, desc_act=n.order, in_features=COLUMNS, out_features=ROWS,
        bias=False, pack_dtype=torch.int32,
    )  # fmt: skip
    module.pack_original(n.linear(), n.scales.float(), n.zeros.float(), n.g_idx.int())
    config = {
        "quant_method": METHOD.GPTQ.value, "bits": n.bits, "group_size": n.group, "sym": n.sym, "desc_act": n.order,
        "checkpoint_format": layout, "lm_head": False, "pack_dtype": "int32", "dynamic": None,
    }  # fmt: skip
    if layout == FORMAT.GPTQ.value:
        settings: Any = type("Settings", (), {"bits": n.bits, "pack_dtype": torch.int32})
        convert_gptq_v2_to_v1_format_module(module, settings)
    return parts_of(module, "qweight", "qzeros", "scales", "g_idx"), config


def auto_round(n: Numbers, packing: str) -> Case:
    kind = AutoRoundLessOne if packing.endswith("auto_gptq") else AutoRoundLinear
    module = kind(n.bits, n.group, COLUMNS, ROWS, bias=False)
    module.device = "cpu"
    module.pack(n.linear(), n.scales.float(), n.zeros.float(), None, device="cpu")
    return parts_of(module, "qweight", "qzeros", "scales"), auto_round_config(n, packing)


def auto_round_config(n: Numbers, packing: str) -> dict[str, Any]:
    return {
        "quant_method": "auto-round", "packing_format": packing, "bits": n.bits, "group_size": n.group, "sym": n.sym,
        "data_type": "int", "block_name_to_quantize": "model.language_model.layers",
        "extra_config": {"lm_head": {"bits": 16}},
    }  # fmt: skip


def auto_round_awq(n: Numbers) -> Case:
    module = AutoRoundAWQ.from_linear(
        n.linear(), n.bits, n.group, scales=n.scales.T.contiguous(), zeros=n.zeros.T.contiguous(), device="cpu"
    )
    return parts_of(module, "qweight", "qzeros", "scales"), auto_round_config(n, "auto_round:auto_awq")


def awq(n: Numbers, version: str) -> Case:
    gemm = version == "gemm"
    kind = WQLinear_GEMM if gemm else WQLinear_GEMV
    scales, zeros = (x.T.contiguous() if gemm else x for x in (n.scales, n.zeros))
    module = kind.from_linear(n.linear(), n.bits, n.group, scales=scales, zeros=zeros)
    config = {
        "quant_method": "awq", "bits": n.bits, "group_size": n.group, "version": version, "zero_point": True,
        "modules_to_not_convert": ["visual"],
    }  # fmt: skip
    return parts_of(module, "qweight", "qzeros", "scales"), config


def compressed(
    args: QuantizationArgs, kind: Any, name: str, scale: Tensor, weight: Tensor, n: Numbers | None = None
) -> Case:
    """`weight` is that of `n`, if it is given."""
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    state: Parts = {"weight": weight, "weight_scale": scale}
    if n and not n.sym:
        state["weight_zero_point"] = (n.zeros - (1 << (n.bits - 1))).to(torch.int8)
    packed = kind.compress(state, scheme)
    group = {"targets": ["Linear"], "weights": json.loads(args.model_dump_json()), "input_activations": None}
    config = {
        "quant_method": "compressed-tensors", "format": name, "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*visual.*"], "quantization_status": "compressed", "kv_cache_scheme": None,
        "sparsity_config": {}, "transform_config": {},
    }  # fmt: skip
    parts = dict(packed)
    expected = kind.decompress(dict(packed), scheme)["weight"]
    if n is None:
        parts["in/weights"] = expected
    else:
        assert torch.equal(expected, n.weights.to(expected.dtype))  # the format rounds to the type of its scales
    return parts, config


def pack_quantized(n: Numbers, strategy: str) -> Case:
    group = {"group_size": n.group} if strategy == "group" else {}
    args = QuantizationArgs(num_bits=n.bits, type="int", symmetric=n.sym, strategy=strategy, **group)
    return compressed(args, PackedQuantizationCompressor, "pack-quantized", n.scales, n.weights, n)


def int_quantized(n: Numbers) -> Case:
    args = QuantizationArgs(num_bits=8, type="int", symmetric=n.sym, strategy="channel")
    return compressed(args, NaiveQuantizationCompressor, "int-quantized", n.scales, n.weights, n)


def float_quantized(strategy: str, counts: tuple[int, ...], dtype: torch.dtype, block: list[int] | None = None) -> Case:
    rng = torch.Generator().manual_seed(len(strategy))
    scale = (torch.rand(counts, generator=rng) * 0.001 + 0.0001).to(dtype)
    weight = torch.randn((ROWS, COLUMNS), generator=rng) * 0.05
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy=strategy, block_structure=block)
    parts, config = compressed(args, NaiveQuantizationCompressor, "float-quantized", scale, weight)
    parts["input_scale"] = torch.tensor([0.01])
    return parts, config


def mxfp(bits: int) -> Case:
    rng = torch.Generator().manual_seed(bits)
    scale = 2.0 ** torch.randint(-14, -9, (ROWS, COLUMNS // 32), generator=rng).float()
    weight = torch.randn((ROWS, COLUMNS), generator=rng) * 0.05
    args = QuantizationArgs(
        num_bits=bits, type="float", symmetric=True, strategy="group", group_size=32, scale_dtype=torch.uint8
    )
    kind = MXFP8QuantizationCompressor if bits == 8 else MXFP4PackedCompressor
    return compressed(args, kind, f"mxfp{bits}-{'' if bits == 8 else 'pack-'}quantized", scale, weight)


def finegrained(scale_dtype: torch.dtype) -> Case:
    """As DeepSeek and Qwen publish them: blocks, and the factor is called the inverse of a scale."""
    rng = torch.Generator().manual_seed(5)
    codes = (torch.randn((ROWS, COLUMNS), generator=rng) * 50).to(torch.float8_e4m3fn)
    scale = (torch.rand((2, 3), generator=rng) * 0.001 + 0.0001).to(scale_dtype)
    grid = scale.float().repeat_interleave(20, 0)[:ROWS].repeat_interleave(48, 1)[:, :COLUMNS]
    parts = {"weight": codes, "weight_scale_inv": scale, "in/weights": codes.float() * grid}
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [20, 48]}
    return parts, config


def main() -> None:
    cases: dict[str, tuple[Numbers | None, Case]] = {}

    def add(name: str, case: Case, n: Numbers | None = None) -> None:
        cases[name] = n, case

    for bits in (2, 3, 4, 8):
        n = Numbers(bits, bits, 32, sym=False, least=1)
        add(f"gptq-{bits}", gptq(n, "gptq"), n)
    for bits in (3, 4):
        n = Numbers(20 + bits, bits, 64, sym=False)
        add(f"gptq_v2-{bits}", gptq(n, "gptq_v2"), n)
    n = Numbers(30, 4, 128, sym=True)
    add("gptq-sym", gptq(n, "gptq"), n)
    n = Numbers(31, 4, 32, sym=False, order=True, least=1)
    add("gptq-order", gptq(n, "gptq"), n)
    n = Numbers(32, 4, 16, sym=False, least=1)
    add("gptq-16", gptq(n, "gptq"), n)
    for bits in (2, 3, 4, 8):
        n = Numbers(40 + bits, bits, 64, sym=False, least=1)
        add(f"auto_round-auto_gptq-{bits}", auto_round(n, "auto_round:auto_gptq"), n)
    for bits in (4, 5, 6):
        n = Numbers(50 + bits, bits, 32, sym=False)
        add(f"auto_round-{bits}", auto_round(n, "auto_round"), n)
    n = Numbers(60, 4, 32, sym=False)
    add("auto_round-auto_awq", auto_round_awq(n), n)
    n = Numbers(61, 4, 32, sym=False)
    add("awq-gemm", awq(n, "gemm"), n)
    n = Numbers(62, 4, 32, sym=False)
    add("awq-gemv", awq(n, "gemv"), n)
    for bits in (4, 8):
        n = Numbers(70 + bits, bits, 32, sym=True)
        add(f"pack-quantized-{bits}", pack_quantized(n, "group"), n)
    for bits in (3, 4):
        n = Numbers(80 + bits, bits, 32, sym=False)
        add(f"pack-quantized-asym-{bits}", pack_quantized(n, "group"), n)
    n = Numbers(90, 4, 128, sym=True)
    add("pack-quantized-channel", pack_quantized(n, "channel"), n)
    for sym in (True, False):
        n = Numbers(91, 8, 128, sym=sym)
        add(f"int-quantized-{'sym' if sym else 'asym'}", int_quantized(n), n)
    add("float-quantized-channel", float_quantized("channel", (ROWS, 1), torch.float32))
    add("float-quantized-tensor", float_quantized("tensor", (1,), torch.bfloat16))
    add("float-quantized-block", float_quantized("block", (2, 4), torch.float32, [16, 32]))
    add("fp8-blocks", finegrained(torch.bfloat16))
    for bits in (8, 4):
        add(f"mxfp{bits}-quantized", mxfp(bits))

    tensors: Parts = {}
    for name, (numbers, (parts, _)) in cases.items():
        parts |= {f"in/{part}": value for part, value in (numbers.tensors() if numbers else {}).items()}
        tensors |= {f"{name}/{part}": value.contiguous().clone() for part, value in parts.items()}
    file = save(tensors, {name: json.dumps(config) for name, (_, (_, config)) in cases.items()})
    OUT.write_bytes(lzma.compress(file, preset=9))
    print(f"{OUT}: {OUT.stat().st_size:,} bytes, {len(cases)} cases")


if __name__ == "__main__":
    main()
