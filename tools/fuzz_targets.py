"""What is fuzzed: a seed (a small file of each kind, made here) and the code that a stranger's file reaches."""

from __future__ import annotations

import json
import lzma
import warnings
from collections.abc import Callable
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from zlib import crc32

import gguf as gguf_py
import numpy as np
from fuzz_mutators import Mutator, mutate_bytes, mutate_json, mutate_template
from gguf import GGUFWriter
from gguf_forms import FORMS, gguf_matrix
from packed_forms import Form, copy_beside, linear, pack_folder, read_tensors, write_tensors
from PIL import Image

from edgeq import vision
from edgeq.adapters import AdaptedCheckpoint, adapted, given_adapters
from edgeq.api import load, load_session
from edgeq.checkpoint import open_checkpoint
from edgeq.config import read_config, read_json
from edgeq.errors import ModelError
from edgeq.formats.gguf import GGUFFile, open_gguf
from edgeq.formats.safetensors import SafetensorsFile, SafetensorsWriter
from edgeq.quant import quantize, verify
from edgeq.quant.gguf_export import export_gguf
from edgeq.session.files import SavedSession
from edgeq.testing import config_values, write_checkpoint
from edgeq.text.bpe import BYTE_OF
from edgeq.text.components import PATTERNS
from edgeq.text.conversation import Conversation
from edgeq.text.template import ChatTemplate
from edgeq.text.template_files import read_templates
from edgeq.text.tokenizer import Tokenizer, special_tokens

__all__ = ["Target", "targets"]


class Target(NamedTuple):
    """`run` takes the changed file where `path` says; `share` is its part of all inputs, in thousandths."""

    name: str
    path: Path
    seed: bytes
    mutator: Mutator
    run: Callable[[Path], None]
    share: int


TEMPLATE = """{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endif %}{%- set ns = namespace(n=0) %}{%- for message in messages %}
{%- set content = message.content | trim %}
{%- if message.role == 'assistant' %}{%- set ns.n = loop.index0 %}{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- if not enable_thinking %}
{{- '\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
IMAGES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
IMAGE_MEMORY = 24 << 20  # bytes, half of what an input may add
K_TYPES = Path(__file__).parent.parent / "tests" / "data" / "gguf" / "Q2_K.gguf.xz"
SHAPE: dict[str, Any] = {"vocab_size": 320, "linear_key_head_dim": 32, "linear_value_head_dim": 32}


def targets(folder: Path) -> list[Target]:
    """Make the seeds in `folder` (best in memory) and say what is done with them."""
    model, quantized, gguf = folder / "model", folder / "quantized", folder / "model.gguf"
    _make_model(model)
    quantize(model, quantized)
    export_gguf(open_checkpoint(model), gguf, "q8_0")
    gptq, compressed = _make_packed(model, folder)
    peft, mlx, lora = _make_adapters(model, folder)
    merge = _merge(model)
    modes, k_types = _make_modes(model, folder / "modes"), folder / "k.gguf"
    k_types.write_bytes(lzma.decompress(K_TYPES.read_bytes()))
    seed = folder / "seed"
    seed.mkdir()
    tokenizer = Tokenizer.from_folder(model)
    return [
        Target("safetensors", seed / "x.safetensors", _small_safetensors(), _mutate_header, _read_safetensors, 130),
        Target("gguf", seed / "x.gguf", _small_gguf(), mutate_bytes, _read_gguf, 100),
        Target("gguf-model", gguf, gguf.read_bytes(), _mutate_head(20_000), _read_model, 60),
        Target("gguf-k", k_types, k_types.read_bytes(), _mutate_head(20_000), _read_rows, 20),
        _part(folder),
        _json("manifest", _make_manifest(folder / "ollama", gguf), _open_quietly, 20),
        Target("template", seed / "x.jinja", TEMPLATE.encode(), mutate_template, _render(tokenizer), 40),
        _json("config", model / "config.json", read_config, 100),
        _json("generation_config", model / "generation_config.json", _read_without_warning, 30),
        _json("index", model / "model.safetensors.index.json", _read_model, 30),
        Target("gptq", gptq, gptq.read_bytes(), _mutate_header, _read_matrices, 20),
        Target("compressed", compressed, compressed.read_bytes(), _mutate_header, _read_matrices, 20),
        _json("compressed-config", compressed.parent / "config.json", _read_matrices, 20),
        Target("modes", modes, modes.read_bytes(), _mutate_header, _read_matrices, 20),
        _json("modes-config", modes.parent / "config.json", _read_matrices, 20),
        _json("quantization", quantized / "config.json", _read_model, 30),
        Target("adapter", peft, peft.read_bytes(), _mutate_header, merge, 20),
        _json("adapter-config", peft.with_name("adapter_config.json"), merge, 20),
        _json("mlx-adapter-config", mlx.with_name("adapter_config.json"), merge, 10),
        Target("gguf-adapter", lora, lora.read_bytes(), _mutate_head(600), merge, 10),
        _json("record", quantized / "edgeq.json", lambda path: _verify(path.parent), 30),
        _json("tokenizer_config", model / "tokenizer_config.json", _read_text, 20),
        _json("templates", _make_templates(seed), _read_templates, 20),
        _json("tokenizer", model / "tokenizer.json", _read_text, 40),
        *_sessions(model, seed),
        *(Target(kind.lower(), seed / f"x.{kind.lower()}", _image(kind), _mutate_image, _see, 20) for kind in IMAGES),
    ]


def _mutate_head(size: int) -> Mutator:
    """Changes of the first bytes only: of what follows, nothing but its length matters."""
    return lambda rng, data: mutate_bytes(rng, data[:size]) + data[size:]


def _mutate_header(rng: Random, data: bytes) -> bytes:
    """Bytes of a safetensors file, or the JSON of its header with the length corrected."""
    if rng.random() < 0.5:
        return mutate_bytes(rng, data)
    end = 8 + int.from_bytes(data[:8], "little")
    header = mutate_json(rng, data[8:end])
    return len(header).to_bytes(8, "little") + header + data[end:]


def _mutate_document(rng: Random, data: bytes) -> bytes:
    """Values in the document of a session file, with its checksum corrected."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    start = header["session"]["data_offsets"][0]  # the last tensor
    document = mutate_json(rng, data[end + start :])
    header["session"] |= {"shape": [len(document)], "data_offsets": [start, start + len(document)]}
    header["__metadata__"]["checksum"] = f"{crc32(document):08x}"
    blob = json.dumps(header, separators=(",", ":")).encode().ljust(end - 8)
    return data[:8] + blob + data[end : end + start] + document


def _mutate_image(rng: Random, data: bytes) -> bytes:
    """Changes anywhere, or only among the first bytes, where sizes and tables are."""
    return mutate_bytes(rng, data) if rng.random() < 0.5 else _mutate_head(120)(rng, data)


def _sessions(folder: Path, seed: Path) -> list[Target]:
    """A session as a file and by its document. What is read of a file must go on as it would have."""
    model = load(folder, backend="numpy")
    chat = model.chat(system="Be brief.", max_tokens=3, temperature=0, logprobs=1, draft="off")
    path = seed / "x.eqs"
    for text in ("What is this? " * 8, "And that?", "Why?"):
        list(chat.send(text))
        chat.save(path)
    list(chat.regenerate())
    chat.save(path)
    expected = [list(chat.send("And then?")), list(chat.ids)]

    def goes_on(path: Path) -> None:
        again = load_session(path, model)
        assert [list(again.send("And then?")), list(again.ids)] == expected, "a wrong continuation"

    def reads(path: Path) -> None:
        again = load_session(path, model)
        for _, _ in zip(range(3), again.send("And then?"), strict=False):
            pass
        again.save(path.with_suffix(".out"))
        SavedSession(path).facts()

    return [
        Target("session", path, path.read_bytes(), _mutate_header, goes_on, 20),
        Target("session-document", seed / "y.eqs", path.read_bytes(), _mutate_document, reads, 20),
    ]


def _json(name: str, path: Path, run: Callable[[Path], Any], share: int) -> Target:
    return Target(name, path, path.read_bytes(), mutate_json, run, share)


# --- what reads them -------------------------------------------------------------------------------------------------


def _read_safetensors(path: Path) -> None:
    file = SafetensorsFile(path)
    for name in file.tensors:
        file.array(name).tobytes()


def _read_gguf(path: Path) -> None:
    file = GGUFFile(path)
    for name in file.tensors:
        file.data(name).tobytes()
    for key, read in (("tokens", file.strings), ("numbers", file.integers), ("flags", file.array)):
        if key in file:
            read(key)


def _read_model(path: Path) -> None:
    checkpoint = open_checkpoint(path if path.suffix == ".gguf" else path.parent)
    list(checkpoint.storage())
    if path.suffix == ".gguf":
        checkpoint.tokenizer()
        checkpoint.template()


def _read_without_warning(path: Path) -> None:
    """The model, where a warning counts as a refusal."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _read_model(path)
    if told:
        raise ModelError(str(told[0].message))


def _merge(model: Path) -> Callable[[Path], None]:
    """With an adapter: the tensors that it changes."""
    base = open_checkpoint(model)

    def run(path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of parts that are left out
            given = given_adapters(path if path.suffix == ".gguf" else path.parent)
            checkpoint = adapted(base, given)
            assert isinstance(checkpoint, AdaptedCheckpoint)
            for spec, _ in checkpoint.storage():
                if checkpoint.changed(spec.name) is not None:
                    checkpoint.dense(spec.name)

    return run


def _read_matrices(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is read, and takes more memory than its file
        checkpoint = open_checkpoint(path.parent)
        for spec, _ in checkpoint.storage():
            if spec.is_matrix:
                checkpoint.rows(spec.name, slice(0, 2))
                checkpoint.matrix(spec.name)


def _open_quietly(path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):  # of what is not used
        open_checkpoint(path)


def _read_rows(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    for spec, _ in checkpoint.storage():
        if spec.is_matrix:
            checkpoint.rows(spec.name, slice(0, 2))


def _read_text(path: Path) -> None:
    tokenizer = Tokenizer.from_folder(path.parent)
    ids = tokenizer.encode("The water, <|im_end|> and 42 wörds: 世界.\n\n", control=True)
    tokenizer.decode(ids)
    for token_id in range(0, tokenizer.vocab_size, 50):
        tokenizer.token_bytes(token_id)


def _read_templates(path: Path) -> None:
    for tools in (True, False):
        if named := read_templates(path.parent).pick(tools=tools):
            ChatTemplate(named.source, named.where, special_tokens(read_json(path)))


def _see(path: Path) -> None:
    """As an image and, if that is possible, as an animation; what a file may take is bounded by the budget."""
    vision.read_image(path, image_tokens=256, memory=IMAGE_MEMORY).pixel_values.tobytes()
    vision.read_image(path.read_bytes(), image_tokens=64, memory=IMAGE_MEMORY)
    if path.suffix in (".png", ".gif", ".webp"):
        vision.read_video(path, video_tokens=64, max_frames=4, memory=IMAGE_MEMORY)


def _verify(folder: Path) -> None:
    verify(folder)


def _render(tokenizer: Tokenizer) -> Callable[[Path], None]:
    def run(path: Path) -> None:
        template = ChatTemplate(path.read_text(encoding="utf-8", errors="surrogatepass"))
        template.render([{"role": "user", "content": "hi"}], add_generation_prompt=True, tools=[{"name": "f"}])
        Conversation(tokenizer, template, system="s").append_user("hi")

    return run


# --- seeds -----------------------------------------------------------------------------------------------------------


def _part(folder: Path) -> Target:
    """The second of two parts of a split GGUF file, beside a good first."""
    folder = folder / "parts"
    folder.mkdir()
    first, second = (folder / f"x-{n:05d}-of-00002.gguf" for n in (1, 2))
    for number, path in enumerate((first, second)):
        writer = gguf_py.GGUFWriter(path, "qwen35")
        for key, value in (("split.no", number), ("split.count", 2), ("split.tensors.count", 2)):
            writer.add_uint32(key, value)
        writer.add_tensor(f"x{number}", np.zeros((4, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def run(_: Path) -> None:
        file = open_gguf(first)
        for name in file.tensors:
            file.data(name).tobytes()

    return Target("gguf-part", second, second.read_bytes(), mutate_bytes, run, 10)


def _make_manifest(store: Path, model: Path) -> Path:
    """A model as ollama keeps it: the model's file, a system prompt and parameters."""
    layers, parameters = [], json.dumps({"temperature": 0.5, "stop": ["x"], "num_ctx": 4096})
    (store / "blobs").mkdir(parents=True)
    for kind, data in (("model", model.read_bytes()), ("system", b"Be brief."), ("params", parameters.encode())):
        digest = sha256(data).hexdigest()
        (store / "blobs" / f"sha256-{digest}").write_bytes(data)
        media = f"application/vnd.ollama.image.{kind}"
        layers.append({"mediaType": media, "digest": f"sha256:{digest}", "size": len(data)})
    manifest = store / "manifests" / "registry.ollama.ai" / "library" / "qwen3.5" / "2b"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return manifest


def _make_model(folder: Path) -> None:
    """A complete checkpoint of a few hundred kilobytes."""
    write_checkpoint(folder, config_values(vision=False, mtp=True, **SHAPE))
    names = SafetensorsFile(folder / "model.safetensors").tensors
    files = {
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": _tokenizer_config(),
        "generation_config.json": {"eos_token_id": [1, 3], "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.1},
        "model.safetensors.index.json": {"weight_map": dict.fromkeys(names, "model.safetensors")},
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def _make_templates(folder: Path) -> Path:
    """A tokenizer_config.json with named templates, alone in a folder."""
    named = [{"name": name, "template": TEMPLATE} for name in ("default", "tool_use", "rag")]
    path = folder / "templates" / "tokenizer_config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}, "chat_template": named}))
    return path


def _make_packed(model: Path, folder: Path) -> tuple[Path, Path]:
    """The weights of a GPTQ checkpoint, and of one that has all kinds of compressed-tensors."""
    pack_folder(model, folder / "gptq", Form("gptq"))
    ints, floats = folder / "ints", folder / "floats"
    pack_folder(model, ints, Form("int8", 8, -1), lambda name: name.endswith("up_proj.weight"))
    pack_folder(ints, floats, Form("float8"), lambda name: name.endswith("down_proj.weight"))
    packed = Form("pack", config={"weight_block_size": [48, 32]})
    pack_folder(floats, folder / "compressed", packed, lambda name: linear(name) and ".mlp." not in name)
    return folder / "gptq" / "model.safetensors", folder / "compressed" / "model.safetensors"


def _make_adapters(model: Path, folder: Path) -> tuple[Path, Path, Path]:
    """Weights of adapters as PEFT, mlx-lm and llama.cpp write them: LoRA with DoRA, a whole norm, a head of its own."""
    shapes = {spec.name: spec.shape for spec, _ in open_checkpoint(model).storage()}
    names = ("layers.0.mlp.up_proj", "layers.3.self_attn.q_proj")
    rng = np.random.default_rng(0)
    pairs = {n: (rng.standard_normal((2, shapes[f"{n}.weight"][1])), rng.standard_normal((shapes[f"{n}.weight"][0], 2)))
             for n in names}  # fmt: skip
    peft, mlx = dict[str, Any](), dict[str, Any]()
    for n, (a, b) in pairs.items():
        module = f"base_model.model.model.language_model.{n}"
        peft |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        peft[f"{module}.lora_magnitude_vector"] = np.ones(len(b))
        mlx |= {f"language_model.model.{n}.lora_a": a.T, f"language_model.model.{n}.lora_b": b.T}
    peft["base_model.model.lm_head.weight"] = rng.standard_normal(shapes["embed_tokens.weight"])
    peft["base_model.model.model.language_model.norm.weight"] = rng.standard_normal(shapes["norm.weight"])
    configs = {
        "peft": {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": True, "use_rslora": True, "bias": "none",
                 "alpha_pattern": {r"^model.*layers\.\d+\.mlp\.(up|down)_proj": 3}, "rank_pattern": {"q_proj": 2},
                 "init_lora_weights": "gaussian", "layer_replication": None},
        "mlx": {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 2.0, "alpha": 2}, "model": "m"},
    }  # fmt: skip
    files = {"peft": ("adapter_model", peft), "mlx": ("adapters", mlx)}
    places = []
    for kind, (stem, tensors) in files.items():
        (folder / kind).mkdir()
        (folder / kind / "adapter_config.json").write_text(json.dumps(configs[kind]))
        places.append(folder / kind / f"{stem}.safetensors")
        with SafetensorsWriter(places[-1], {n: ("F32", x.shape) for n, x in tensors.items()}) as file:
            for n, x in tensors.items():
                file.write(n, x.astype(np.float32))
    lora = GGUFWriter(folder / "lora.gguf", "qwen35")
    lora.add_string("general.type", "adapter")
    lora.add_string("adapter.type", "lora")
    lora.add_float32("adapter.lora.alpha", 4.0)
    for name, x in zip(("a", "b"), pairs[names[0]], strict=True):
        lora.add_tensor(f"blk.0.ffn_up.weight.lora_{name}", np.ascontiguousarray(x, np.float16))
    lora.write_header_to_file()
    lora.write_kv_data_to_file()
    lora.write_tensors_to_file()
    lora.close()
    return places[0], places[1], folder / "lora.gguf"


def _make_modes(model: Path, out: Path) -> Path:
    """The weights of a checkpoint whose matrices are in MLX's three modes of floating point."""
    rng, tensors, modes = np.random.default_rng(1), read_tensors(model), ("mxfp4", "nvfp4", "mxfp8")
    quantization: dict[str, Any] = {"bits": 4, "group_size": 32, "mode": "mxfp4"}
    for i, name in enumerate(filter(linear, list(tensors))):
        module, form = name.removesuffix(".weight"), FORMS[modes[i % 3]]
        w = gguf_matrix(rng, form, *tensors[name][1].shape)
        tensors |= {name: ("U32", w.codes), f"{module}.scales": ("U8", w.factors[0])}
        quantization[module] = {"bits": form.bits, "group_size": form.group_size, "mode": form.mode}
    copy_beside(model, out, quantization=quantization)
    write_tensors(out / "model.safetensors", tensors)
    return out / "model.safetensors"


def _tokenizer() -> dict[str, Any]:
    vocab = {char: i for i, char in enumerate(BYTE_OF)}
    merges = ["t h", "th e", "w a", "wa t", "Ġ w", "Ġ the"]
    for merge in merges:
        vocab[merge.replace(" ", "")] = len(vocab)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERNS["qwen35"]}, "behavior": "Isolated", "invert": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": len(vocab) + i, "content": t, **flags, "special": True} for i, t in enumerate(SPECIAL)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "vocab": vocab, "merges": merges},
    }


def _tokenizer_config() -> dict[str, Any]:
    first = len(BYTE_OF) + 6
    added = {str(first + i): {"content": text, "special": True} for i, text in enumerate(SPECIAL)}
    return {"added_tokens_decoder": added, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def _image(kind: str) -> bytes:
    """A small file that uses much of what its kind has: animation, palettes, transparency, EXIF, progressive coding."""
    x = np.random.default_rng(1).integers(0, 256, (24, 32, 4), dtype=np.uint8)
    x[4:20] = x[4] // 64 * 64
    image = Image.fromarray(x)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [image, image.rotate(180), image.rotate(180)]
    animated = {"save_all": True, "append_images": frames[1:], "duration": 80}
    options: dict[str, dict[str, Any]] = {
        "PNG": animated | {"exif": exif},
        "JPEG": {"exif": exif, "progressive": True, "quality": 60},
        "WEBP": animated | {"exif": exif, "quality": 50},
        "GIF": animated | {"transparency": 3, "disposal": 2},
        "BMP": {},
        "TIFF": {"compression": "tiff_lzw", "exif": exif},
    }
    if kind in ("GIF", "BMP"):
        image = image.convert("RGB").quantize(32)
    file = BytesIO()
    (image.convert("RGB") if kind == "JPEG" else image).save(file, kind, **options[kind])
    return file.getvalue()


def _small_safetensors() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "b": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
        "c": {"dtype": "U32", "shape": [1, 0, 4], "data_offsets": [16, 16]},
    }
    blob = json.dumps(header).encode()
    return len(blob).to_bytes(8, "little") + blob + bytes(16)


def _small_gguf() -> bytes:
    def text(value: str) -> bytes:
        return len(value).to_bytes(8, "little") + value.encode()

    def u32(value: int) -> bytes:
        return value.to_bytes(4, "little")

    def u64(value: int) -> bytes:
        return value.to_bytes(8, "little")

    entries = [
        text("general.architecture") + u32(8) + text("qwen35"),
        text("general.alignment") + u32(4) + u32(32),
        text("qwen35.rope.freq_base") + u32(6) + bytes(4),
        text("flag") + u32(7) + b"\x01",
        text("tokens") + u32(9) + u32(8) + u64(3) + text("a") + text("bc") + text(""),
        text("numbers") + u32(9) + u32(5) + u64(4) + bytes(16),
        text("flags") + u32(9) + u32(7) + u64(2) + b"\x01\x00",
    ]
    tensors = [
        text("x.weight") + u32(2) + u64(32) + u64(2) + u32(8) + u64(0),
        text("y") + u32(1) + u64(4) + u32(0) + u64(96),
    ]
    head = b"GGUF" + u32(3) + u64(len(tensors)) + u64(len(entries)) + b"".join(entries + tensors)
    return head + bytes(-len(head) % 32) + bytes(96 + 16)
