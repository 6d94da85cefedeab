"""Files as ollama lays them out: GGUF files by its converter's rules, and its folder of manifests and blobs.

The rules are facts of ollama's convert/convert_qwen3next.go and its tokenizer's converter; nothing of edgeq's reader or
exporter is used.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from edgeq.checkpoint import FolderCheckpoint
from edgeq.formats.bf16 import Array, Float32, to_float32

RENAMED = (  # in this order, anywhere in a name
    ("lm_head", "output"), ("model.language_model.embed_tokens", "token_embd"),
    ("model.language_model.norm", "output_norm"), ("model.language_model.layers", "blk"), ("model.visual", "v"),
    ("patch_embed.proj", "patch_embed"), ("blocks", "blk"), ("attn.qkv", "attn_qkv"), ("attn.proj", "attn_out"),
    ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "post_attention_norm"),
    ("self_attn.q_proj", "attn_q"), ("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_proj", "attn_k"),
    ("self_attn.k_norm", "attn_k_norm"), ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"),
    ("linear_attn.in_proj_qkv", "attn_qkv"), ("linear_attn.in_proj_z", "attn_gate"),
    ("linear_attn.in_proj_a", "ssm_alpha"), ("linear_attn.in_proj_b", "ssm_beta"), ("linear_attn.conv1d", "ssm_conv1d"),
    ("linear_attn.dt_bias", "ssm_dt"), ("linear_attn.A_log", "ssm_a"), ("linear_attn.norm", "ssm_norm"),
    ("linear_attn.out_proj", "ssm_out"), ("mlp.down_proj", "ffn_down"), ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
)  # fmt: skip
NEXTN = {
    "mtp.fc.weight": "nextn.eh_proj.weight",
    "mtp.pre_fc_norm_embedding.weight": "nextn.enorm.weight",
    "mtp.pre_fc_norm_hidden.weight": "nextn.hnorm.weight",
    "mtp.norm.weight": "nextn.shared_head_norm.weight",
}


def write_gguf(
    folder: Path, out: Path, *, mtp: str = "mtp.* with 1", vision: bool = True, per_layer: bool = True,
    sections: tuple[str, int] = ("rope.dimension_sections", 3), dt: str = "ssm_dt", tiled: bool | None = True,
    quantized: gguf.GGMLQuantizationType | None = None, **metadata: Any,
) -> Path:  # fmt: skip
    """Convert a checkpoint of the hub's layout.

    mtp: "mtp.* with 1", "mtp.* without", "blocks" (as later versions) or "none". per_layer: key-value heads by layer.
    sections: under which key, and how many numbers. dt: the name of the time-step bias. tiled: order of value heads,
    None to leave the key out. quantized: the type of matrices.
    """
    source = FolderCheckpoint(folder)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    rope = text["rope_parameters"]
    writer = gguf.GGUFWriter(out, "qwen35")
    layers, kv = text["num_hidden_layers"], text["num_key_value_heads"]
    writer.add_uint32("qwen35.block_count", layers + (mtp == "blocks"))
    if mtp == "blocks":
        writer.add_uint32("qwen35.nextn_predict_layers", 1)
    writer.add_uint32("qwen35.context_length", text["max_position_embeddings"])
    writer.add_uint32("qwen35.embedding_length", text["hidden_size"])
    writer.add_uint32("qwen35.feed_forward_length", text["intermediate_size"])
    writer.add_uint32("qwen35.attention.head_count", text["num_attention_heads"])
    heads = [kv if kind == "full_attention" else 0 for kind in text["layer_types"]]
    writer.add_array("qwen35.attention.head_count_kv", heads) if per_layer else writer.add_uint32(
        "qwen35.attention.head_count_kv", kv
    )
    for key in ("attention.key_length", "attention.value_length"):
        writer.add_uint32(f"qwen35.{key}", text["head_dim"])
    writer.add_float32("qwen35.attention.layer_norm_rms_epsilon", text["rms_norm_eps"])
    writer.add_float32("qwen35.rope.freq_base", rope["rope_theta"])
    writer.add_uint32("qwen35.rope.dimension_count", int(text["head_dim"] * rope["partial_rotary_factor"]))
    writer.add_array(f"qwen35.{sections[0]}", [*rope["mrope_section"], 0][: sections[1]])
    writer.add_bool("qwen35.rope.mrope_interleaved", True)
    writer.add_uint32("qwen35.ssm.inner_size", text["linear_value_head_dim"] * text["linear_num_value_heads"])
    writer.add_uint32("qwen35.ssm.state_size", text["linear_key_head_dim"])
    writer.add_uint32("qwen35.ssm.group_count", text["linear_num_key_heads"])
    writer.add_uint32("qwen35.ssm.time_step_rank", text["linear_num_value_heads"])
    writer.add_uint32("qwen35.ssm.conv_kernel", text["linear_conv_kernel_dim"])
    if tiled is not None:
        writer.add_bool("qwen35.ssm.v_head_reordered", tiled)
    if vision and source.config.vision is not None:
        v = json.loads((folder / "config.json").read_text())["vision_config"]
        for key, field in (
            ("block_count", "depth"), ("embedding_length", "hidden_size"), ("attention.head_count", "num_heads"),
            ("num_channels", "in_channels"), ("patch_size", "patch_size"), ("spatial_merge_size", "spatial_merge_size"),
            ("temporal_patch_size", "temporal_patch_size"),
        ):  # fmt: skip
            writer.add_uint32(f"qwen35.vision.{key}", v[field])
    _add_tokenizer(writer, folder, text["vocab_size"])
    for key, value in metadata.items():
        name = key.replace("__", ".")
        writer.add_array(name, value) if isinstance(value, list) else writer.add_string(name, value)
    for name, x in _tensors(source, text, mtp, vision, dt, tiled is not False).items():
        if quantized is not None and x.ndim == 2 and x.shape[1] % 256 == 0 and "conv1d" not in name:
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(x), quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(name, np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _tensors(
    source: FolderCheckpoint, text: dict[str, Any], mtp: str, vision: bool, dt: str, tiled: bool
) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    for file in source.files:
        for hub in file.tensors:
            x, name = np.array(to_float32(file.array(hub))), hub
            for old, new in RENAMED:
                name = name.replace(old, new)
            if (hub.startswith("mtp.") and mtp == "none") or (name.startswith("v.") and not vision):
                continue
            if mtp == "blocks" and name.startswith("mtp."):
                block = f"blk.{text['num_hidden_layers']}"
                name = f"{block}.{NEXTN[name]}" if name in NEXTN else name.replace("mtp.layers.0", block)
            if name.endswith("_norm.weight") and not name.endswith(".ssm_norm.weight"):
                x = x if name.startswith("mtp.") and mtp == "mtp.* without" else x + 1
            if name.endswith((".nextn.enorm.weight", ".nextn.hnorm.weight")):
                x = x + 1
            if name.endswith(".ssm_a"):
                x = (-np.exp(x.astype(np.float64))).astype(np.float32)
            if name.endswith("ssm_conv1d.weight"):
                x = x.reshape(x.shape[0], -1)
            if tiled and name.startswith("blk."):
                x = _tile(name.split(".", 2)[2], x, text)
            if name.startswith("v.blk.") and ".attn_qkv." in name:
                for part, piece in zip("qkv", np.split(x, 3), strict=True):
                    tensors[name.replace("attn_qkv", f"attn_{part}")] = piece
            elif name == "v.patch_embed.weight":
                tensors[name] = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
            else:
                tensors[re.sub(r"\bssm_dt$", dt, name)] = x
    return tensors


def _tile(name: str, x: Float32, text: dict[str, Any]) -> Float32:
    """Value heads from [key head, of it] to [of its key head, key head], as llama.cpp wants them."""
    keys, per_key = text["linear_num_key_heads"], text["linear_num_value_heads"] // text["linear_num_key_heads"]
    width = text["linear_value_head_dim"]

    def swap(y: Float32, axis: int, size: int) -> Float32:
        y = np.moveaxis(y, axis, 0)
        parts = y.reshape(keys, per_key, size, *y.shape[1:])
        return np.moveaxis(parts.swapaxes(0, 1).reshape(y.shape), 0, axis)

    if name in ("attn_qkv.weight", "ssm_conv1d.weight"):
        fixed = 2 * keys * text["linear_key_head_dim"]
        return np.concatenate([x[:fixed], swap(x[fixed:], 0, width)])
    if name == "attn_gate.weight":
        return swap(x, 0, width)
    if name in ("ssm_beta.weight", "ssm_alpha.weight", "ssm_dt", "ssm_a"):
        return swap(x, 0, 1)
    return swap(x, 1, width) if name == "ssm_out.weight" else x


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, rows: int) -> None:
    spec = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    table = {i: (token, 1) for token, i in spec["model"]["vocab"].items()}
    table |= {t["id"]: (t["content"], 3 if t["special"] else 4) for t in spec["added_tokens"]}
    table |= {int(i): (t["content"], 3) for i, t in config["added_tokens_decoder"].items() if int(i) not in table}
    tokens = [table[i] for i in range(len(table))]
    tokens += [(f"[PAD{i}]", 4) for i in range(rows - len(tokens))]  # the user's, as ollama's converter has it
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen35")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_token_scores([float(i) for i in range(len(tokens))])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]])
    ids = {token: i for i, (token, _) in enumerate(tokens)}
    writer.add_eos_token_id(ids["<|im_end|>"])
    writer.add_array("tokenizer.ggml.eos_token_ids", [ids["<|im_end|>"], ids["<|endoftext|>"]])
    writer.add_chat_template((folder / "chat_template.jinja").read_text())


# --- the folder ------------------------------------------------------------------------------------------------------


class Store:
    """A folder of manifests and blobs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "blobs").mkdir(parents=True)

    def blob(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        (self.root / "blobs" / f"sha256-{digest}").write_bytes(data)
        return f"sha256:{digest}"

    def add(
        self, name: str, layers: dict[str, bytes], *, where: str = "manifests", more: tuple[tuple[str, bytes], ...] = ()
    ) -> Path:
        """A model of these layers by kind ("model", "params"); `name` is HOST/NAMESPACE/MODEL/TAG."""
        listed = [self.layer(kind, data) for kind, data in (*layers.items(), *more)]
        return self.write(name, {"schemaVersion": 2, "config": {"digest": self.blob(b"{}")}, "layers": listed}, where)

    def layer(self, kind: str, data: bytes) -> dict[str, Any]:
        media = f"application/vnd.ollama.image.{kind}"
        return {"mediaType": media, "digest": self.blob(data), "size": len(data)}

    def write(self, name: str, manifest: dict[str, Any], where: str = "manifests") -> Path:
        path = self.root / where / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = "application/vnd.docker.distribution.manifest.v2+json"
        path.write_text(json.dumps({"mediaType": kind, **manifest}))
        return path
