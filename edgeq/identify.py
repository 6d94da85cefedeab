"""What a path is: found out before anything is parsed, so that whoever names the wrong thing hears what it is.

edgeq opens three things: checkpoint folders, GGUF files and ollama's manifests. What leads to one of them is followed:
a folder of the hub's cache to its snapshot, a shard to its folder, a part of a split model to the first, a folder with
one GGUF model to that. Everything else is one line with the next step. Content decides, names only where there is none
(a GGUF file needs no suffix). All of them are listed in docs/reference/formats.md, with what edgeq says.
"""

from __future__ import annotations

import json
import re
from codecs import getincrementaldecoder
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from edgeq.errors import ModelError, UsageError
from edgeq.formats.gguf import GGUFFile, first_part, peek
from edgeq.formats.names import neutral_name
from edgeq.inputs import exists, is_file, is_folder, is_link, open_file, read_text
from edgeq.printable import brief, first_of

__all__ = [
    "ARCH",
    "VISION_ARCH",
    "GGUFKind",
    "Source",
    "check_download",
    "check_model",
    "gguf_kind",
    "identify",
    "is_adapter",
    "is_session",
]

ARCH, VISION_ARCH = "qwen35", "clip"
GGUFKind = Literal["model", "mmproj", "adapter", "imatrix", "control vector", "part", "other"]

_HEAD = 1 << 12  # bytes that are looked at
_SESSION = b'{"__metadata__":{"format":"edgeq session"'  # behind the header's length
_UNFINISHED = (".incomplete", ".part", ".crdownload", ".aria2", ".download", ".partial", ".!qB", "-partial")
_PIECE = re.compile(r"(?P<mark>\.part)\d+of\d+$|(?P<letter>-(?:split|part)-)[a-z]$", re.IGNORECASE)
_BESIDE = (".aria2", ".part")
_AGAIN = "start the download again: it goes on where it stopped"
_OTHERS = "use the Hugging Face checkpoint that it was made from, or a .gguf file"
_PICKLE = "use the model's safetensors, or save it again with save_pretrained of a current transformers"

# By suffix, for formats whose first bytes say less than that.
_FOREIGN = {
    ".onnx": "an ONNX model",
    ".ort": "an ONNX Runtime model",
    ".h5": "a TensorFlow model",
    ".keras": "a Keras model",
    ".pb": "a TensorFlow model",
    ".tflite": "a LiteRT model",
    ".litertlm": "a LiteRT-LM model",
    ".task": "a MediaPipe model",
    ".msgpack": "a Flax model",
    ".mlmodel": "a Core ML model",
    ".mlpackage": "a Core ML model",
    ".mnn": "an MNN model",
    ".pte": "an ExecuTorch model",
    ".engine": "a TensorRT engine",
    ".rkllm": "an RKLLM model",
    ".npz": "a NumPy archive, in which MLX once kept models",
    ".llamafile": "a llamafile",
}
_TORCH = (".bin", ".pt", ".pth", ".ckpt")
_TRAINING = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")  # what trainers leave beside weights
_MAGICS = (  # what files begin with
    (b"ggjt"[::-1], "a model of llama.cpp's from before GGUF", "download a .gguf file of the model"),
    (b"ggmf"[::-1], "a model of llama.cpp's from before GGUF", "download a .gguf file of the model"),
    (b"ggml"[::-1], "a model of llama.cpp's from before GGUF", "download a .gguf file of the model"),
    (b"\x89HDF\r\n\x1a\n", "a TensorFlow model (HDF5)", _OTHERS),
    (b"\x1f\x8b", "a gzip archive", "unpack it, and name what comes out"),
    (b"BZh", "a bzip2 archive", "unpack it, and name what comes out"),
    (b"\xfd7zXZ\0", "an xz archive", "unpack it, and name what comes out"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it, and name what comes out"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it, and name what comes out"),
    (b"Rar!\x1a\x07", "a rar archive", "unpack it, and name what comes out"),
    (b"\x93NUMPY", "a NumPy array", "name the model's folder, or its .gguf file"),
)
_GGUFS: Mapping[GGUFKind, tuple[str, str]] = {
    "mmproj": ("a vision tower (mmproj)", "pass the model file; edgeq finds the mmproj next to it"),
    "adapter": (
        "a LoRA adapter, not a model",
        "name the model it is for, and this file with `--adapter` (adapter= in Python)",
    ),
    "imatrix": ("an importance matrix of llama.cpp's, not a model", "name the model's own .gguf file"),
    "control vector": ("a control vector of llama.cpp's, not a model", "name the model's own .gguf file"),
    "part": ("a later part of a split model", "name the first part, which ends in -00001-of-0000N.gguf"),
}


class Source(NamedTuple):
    """Something that edgeq opens, and where it really is."""

    kind: Literal["folder", "gguf", "ollama"]
    path: Path


def identify(path: Path) -> Source:
    """What `path` is, if edgeq opens it.

    Raises ModelError for something else, or something that is not whole; UsageError if it holds several models.
    """
    if is_folder(path):
        return _folder(path)
    if is_file(path):
        return _file(path)
    if exists(path):
        raise ModelError(f"{path} is neither a file nor a folder", hint="name a model's folder or its .gguf file")
    if is_link(path):
        raise ModelError(f"{path} is a link to something that is gone", hint="download the model again")
    raise ModelError(f"{path} does not exist", hint="check the path")


# --- files -----------------------------------------------------------------------------------------------------------


def _file(path: Path) -> Source:
    head = _head(path)
    if piece := _PIECE.search(path.name):
        raise ModelError(f"{path} is a piece of a file, which has been cut for its size", hint=_join(piece))
    if head.startswith(b"GGUF") and not _is_unfinished(path):
        first = first_part(path) if gguf_kind(peek(path)) == "part" else path  # anything can be called so
        if not is_file(first):
            raise ModelError(
                f"{path} is a later part of a split model, and {first.name} is missing beside it",
                hint="download all parts into one folder",
            )
        return Source("gguf", first)
    if head[8:].startswith(_SESSION):
        raise _session(path)
    if _is_safetensors(head, path) and not _is_unfinished(path):
        return _shard(path)
    if problem := _not_a_model(path, head):
        raise problem
    if _is_manifest(path, head):
        return Source("ollama", path)
    raise _other_file(path, head)


def _head(path: Path) -> bytes:
    try:
        with open_file(path) as file:
            return file.read(_HEAD)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", hint="check its permissions") from None


def _join(piece: re.Match[str]) -> str:
    """How to make one file again of the pieces of which this is the name of one."""
    whole, mark = piece.string[: piece.start()], piece["mark"] or piece["letter"]
    return f"join the pieces in their order, as in `cat {whole}{mark}* > {whole}`"


def _is_unfinished(path: Path) -> bool:
    """Whether a file is part of a download, by its own name or by what its downloader keeps beside it."""
    beside = (path.with_name(path.name + suffix) for suffix in _BESIDE)
    return path.name.endswith(_UNFINISHED) or "-partial-" in path.name or any(map(exists, beside))


def _is_safetensors(head: bytes, path: Path) -> bool:
    """Whether a file begins as safetensors do: the header's length, and the header."""
    size = path.stat().st_size
    return len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < max(size, 1 << 27)


def check_download(path: Path) -> None:
    """ModelError if something else than was wanted is in a file: a web page, a pointer, nothing."""
    if problem := _not_a_model(path, _head(path)):
        raise problem


def _not_a_model(path: Path, head: bytes) -> ModelError | None:
    """What stands in a file that was to be something else: a download that went wrong, or is not finished."""
    text, suffix = head[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower(), path.suffix.lower()
    if _is_unfinished(path):
        return ModelError(f"{path} is an unfinished download", hint=_AGAIN)
    if not head:
        return ModelError(f"{path} is empty", hint="download or copy the file again")
    if head.startswith(b"version https://git-lfs"):
        return ModelError(
            f"{path} is a Git LFS pointer of {path.stat().st_size} bytes, not the file that it stands for",
            hint="run `git lfs install` and `git lfs pull` in its folder",
        )
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")) and suffix != ".xml":
        return ModelError(
            f"{path} is a web page, not a model: what a failed download leaves",
            hint="download it again; log in first if the model asks for that",
        )
    if suffix in (".gguf", ".safetensors") and _is_text(head):
        return ModelError(
            f"{path} is a text, what a failed download leaves: {brief(head[:200].decode(errors='replace').strip())}",
            hint="download it again",
        )
    if not head.strip(b"\0"):
        return ModelError(f"{path} holds nothing but zeros: an unfinished download", hint=_AGAIN)
    return None


def _is_text(head: bytes) -> bool:
    """Whether a file begins with words: UTF-8 without control characters, and no format's mark."""
    try:
        text = getincrementaldecoder("utf-8")().decode(head[:200])  # which may end within a character
    except UnicodeDecodeError:
        return False
    return not head.startswith((b"GGUF", *(magic for magic, _, _ in _MAGICS))) and "".join(text.split()).isprintable()


def _shard(path: Path) -> Source:
    """A safetensors file stands for its folder, if that is a checkpoint and the file is of it."""
    folder = path.parent
    if exists(folder / "adapter_config.json") and "adapter" in path.name:  # mlx-lm: 0000100_adapters.safetensors
        raise _adapter(folder)
    if not exists(folder / "config.json"):
        raise ModelError(
            f"{path} is a safetensors file without the rest of its model: its folder has no config.json",
            hint="download the whole model, and name its folder",
        )
    source = _folder(folder)
    if path not in _weights(folder):
        raise ModelError(
            f"{path} is a safetensors file, but none of the model in its folder", hint=f"name the folder: {folder}"
        )
    return source


def _session(path: Path) -> UsageError:
    return UsageError(
        f"{path} is a saved session, not a model",
        hint=f"go on with it: `edgeq chat --session {path}` (edgeq.load_session in Python)",
    )


def _other_file(path: Path, head: bytes) -> ModelError | UsageError:
    """What else a file is."""
    suffix = path.suffix.lower()
    if suffix == ".eqs":
        return ModelError(
            f"{path} is not a session file, whatever its name says",
            hint="restore it from a copy, or begin another session",
        )
    if suffix in _FOREIGN:
        return ModelError(f"{path} is {_FOREIGN[suffix]}, which edgeq does not read", hint=_OTHERS)
    if "imatrix" in path.name.lower():
        what, hint = _GGUFS["imatrix"]
        return ModelError(f"{path} is {what}", hint=hint)
    if head.startswith(b"PK\x03\x04") and (suffix in _TORCH or b"/data.pkl" in head):
        return ModelError(f"{path} holds PyTorch weights (pickle), which edgeq does not read", hint=_PICKLE)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return ModelError(f"{path} is a Python pickle, which edgeq does not read: it could run code", hint=_PICKLE)
    if head.startswith(b"PK\x03\x04"):
        return ModelError(f"{path} is a zip archive", hint="unpack it, and name what comes out")
    if head[257:262] == b"ustar":
        return ModelError(f"{path} is a tar archive", hint="unpack it, and name what comes out")
    for magic, what, hint in _MAGICS:
        if head.startswith(magic):
            return ModelError(f"{path} is {what}", hint=hint)
    if suffix in _TORCH:
        return ModelError(f"{path} holds PyTorch weights, which edgeq does not read", hint=_PICKLE)
    if suffix in (".json", ".jinja") or head.lstrip()[:1] == b"{":
        return UsageError(f"{path} is a text file of a model, not the model", hint=f"name its folder: {path.parent}")
    if any(line.strip().upper().startswith(b"FROM ") for line in head.splitlines()):
        return UsageError(f"{path} is an ollama Modelfile, not a model", hint="name what stands behind FROM in it")
    known = "safetensors" if suffix == ".safetensors" else "GGUF" if suffix == ".gguf" else ""
    if known:
        return ModelError(
            f"{path} is no {known} file: its first bytes are {head[:4].hex(' ')}", hint="download or copy it again"
        )
    return ModelError(
        f"{path} is no model that edgeq knows: its first bytes are {head[:4].hex(' ')}",
        hint="name a folder with config.json and safetensors files, or a .gguf file",
    )


def _is_manifest(path: Path, head: bytes) -> bool:
    """Whether a file is one of those in which ollama notes what a model consists of."""
    return path.suffix.lower() != ".json" and b'"layers"' in head and b"vnd.ollama" in head


# --- GGUF ------------------------------------------------------------------------------------------------------------


def gguf_kind(metadata: Mapping[str, Any]) -> GGUFKind:
    """What a GGUF file is, by the single values in its metadata."""
    arch, kind = metadata.get("general.architecture"), metadata.get("general.type")
    if kind == "imatrix" or any(str(key).startswith("imatrix.") for key in metadata):
        return "imatrix"
    if kind == "adapter" or "adapter.type" in metadata:
        return "adapter"
    if arch == VISION_ARCH or (kind == "mmproj" and arch != ARCH):
        return "mmproj"
    if kind == "controlvector" or arch == "controlvector":
        return "control vector"
    if isinstance(number := metadata.get("split.no"), int) and number > 0:
        return "part"
    return "model" if arch == ARCH else "other"


def check_model(file: GGUFFile) -> None:
    """ModelError unless a GGUF file is a language model that edgeq runs."""
    if (kind := gguf_kind(file.single_values)) in _GGUFS:
        what, hint = _GGUFS[kind]
        raise ModelError(f"{file.path} is {what}", hint=hint)
    arch = file.get("general.architecture", str)
    if arch != ARCH:
        raise ModelError(
            f"{file.path} is of architecture {arch!r}, expected {ARCH!r}",
            hint="use a Qwen3.5 model: 0.8B, 2B or 4B",
        )


# --- folders ---------------------------------------------------------------------------------------------------------


def _folder(path: Path) -> Source:
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", hint="check its permissions") from None
    if path.name.startswith("models--") and "snapshots" in names:
        return _folder(_snapshot(path))
    if path.name in ("snapshots", "blobs", "refs") and path.parent.name.startswith("models--"):
        return _folder(_snapshot(path.parent))
    if "config.json" in names and (weights := _weights(path)):
        tokenizer = filter(is_file, [path / "tokenizer.json"])  # without one there are token ids
        text = (file for file, parts in weights.items() if not parts or parts - {"visual", "mtp"})
        for file in (path / "config.json", *tokenizer, *text):  # of other files the reader says what is wrong
            _check_content(path, file)
        return Source("folder", path)
    if any(name.lower().endswith(".gguf") for name in names):
        return Source("gguf", _only_gguf(path, [name for name in names if name.lower().endswith(".gguf")]))
    if unnamed := [name for name in names if _is_unnamed_gguf(path / name)]:
        return Source("gguf", _only_gguf(path, unnamed))
    raise _no_model(path, names)


def _is_unnamed_gguf(path: Path) -> bool:
    """Whether a file of a folder is a whole GGUF file by its content, and none of ollama's."""
    if not is_file(path) or path.name.startswith("sha256-") or _PIECE.search(path.name) or _is_unfinished(path):
        return False
    try:
        return _head(path).startswith(b"GGUF")
    except ModelError:
        return False


def _weights(path: Path) -> dict[Path, set[str]]:
    """The safetensors files of a checkpoint, whether they are there or not: by its index, or by their names; and how
    the neutral names of their tensors begin, where the index says so."""
    found, indexed = sorted(path.glob("model*.safetensors")), _indexed(path)
    if not indexed or path / "model.safetensors" in found:
        return {file: indexed.get(file, set()) for file in found}
    return dict(sorted(indexed.items()))


def _indexed(path: Path) -> dict[Path, set[str]]:
    """The files that a checkpoint's index names, and how the neutral names of their tensors begin."""
    index, files = path / "model.safetensors.index.json", dict[Path, set[str]]()
    named = _json(index).get("weight_map") if exists(index) else None
    for tensor, name in named.items() if isinstance(named, dict) else ():
        file = Path(name) if isinstance(name, str) else Path("..")
        if not file.is_absolute() and ".." not in file.parts:
            files.setdefault(path / file, set()).add((neutral_name(tensor) or "").partition(".")[0])
    return files


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none in it: whoever parses the file says what is wrong."""
    try:
        values = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _check_content(folder: Path, file: Path) -> None:
    """ModelError if a file of a checkpoint is missing, or something else was downloaded in its place."""
    if is_link(file) and not exists(file):
        raise ModelError(
            f"{file} is a link to something that is gone", hint="download the model again, as into an empty cache"
        )
    if not exists(file):
        if unfinished := _unfinished(folder):
            raise ModelError(f"{folder} is an unfinished download: {file.name} is missing ({unfinished})", hint=_AGAIN)
        return  # said by the reader, with all others that are missing
    if not is_file(file):
        raise ModelError(f"{file} is not a file, as a model has it", hint="download the model again")
    head = _head(file)
    if problem := _not_a_model(file, head):
        raise problem
    if file.suffix == ".safetensors" and not _is_safetensors(head, file):
        if head.startswith(b"GGUF"):
            raise ModelError(f"{file} is a GGUF file, not safetensors", hint=f"name the file itself: {file}")
        raise _other_file(file, head)


def _unfinished(folder: Path) -> str:
    """The name of a file that a download has left in a folder, or in the cache that it is in; "" for none."""
    places = [folder, folder / ".cache" / "huggingface" / "download"]
    if folder.parent.name == "snapshots":
        places.append(folder.parent.parent / "blobs")
    files = (file.name for place in places for file in _entries(place))
    return next((name for name in files if name.endswith(_UNFINISHED)), "")


def _snapshot(cache: Path) -> Path:
    """The snapshot of a model in the hub's cache: of its main branch, or the only one."""
    snapshots = [path for path in _entries(cache / "snapshots") if is_folder(path)]
    name = cache.name.removeprefix("models--").replace("--", "/")
    try:
        main = cache / "snapshots" / read_text(cache / "refs" / "main", 1 << 10).strip()
    except (OSError, ValueError):
        main = cache
    if main in snapshots:
        return main
    if not snapshots:
        raise ModelError(f"{cache} is a place in the Hugging Face cache without a model", hint=f"download {name} again")
    if len(snapshots) > 1:
        raise UsageError(
            f"{cache} holds {len(snapshots)} revisions of a model:",
            details=first_of([path.name for path in snapshots]),
            hint=f"name one: {snapshots[0]}",
        )
    return snapshots[0]


def _only_gguf(path: Path, names: list[str]) -> Path:
    """The one model among a folder's GGUF files."""
    files = [path / name for name in names if is_file(path / name)]
    kinds = {file: gguf_kind(peek(file)) for file in files}
    models = [file for file in files if kinds[file] in ("model", "other")]
    models = [file for file in models if kinds[file] == "model"] or models
    if len(models) == 1:
        return models[0]
    if models:
        raise UsageError(
            f"{path} holds {len(models)} GGUF models:",
            details=first_of([file.name for file in models]),
            hint=f"name one of the files, as in {models[0]}",
        )
    if pieces := _in_pieces(path, [entry.name for entry in _entries(path)]):
        raise pieces
    whats = sorted({_GGUFS[kind][0] for kind in kinds.values() if kind in _GGUFS}) or ["nothing that is a file"]
    raise ModelError(
        f"{path} holds no GGUF model: what is there is {' and '.join(whats)}", hint="download the model's .gguf file"
    )


def _in_pieces(path: Path, names: list[str]) -> ModelError | None:
    """The error for a folder with a file that has been cut, None if there is none."""
    piece = next(filter(None, map(_PIECE.search, names)), None)
    if piece is None:
        return None
    return ModelError(
        f"{path} holds a file in pieces ({piece.string}), which has been cut for its size", hint=_join(piece)
    )


def _no_model(path: Path, names: list[str]) -> ModelError | UsageError:
    """What a folder is that holds neither a checkpoint nor GGUF files."""
    visible = [name for name in names if name not in (".DS_Store", ".git", ".gitattributes", ".cache", "README.md")]
    if not visible and not _unfinished(path):
        return ModelError(f"{path} is an empty folder", hint="download the model into it, or name another folder")
    if "model_index.json" in names:
        kind = _json(path / "model_index.json").get("_class_name")
        what = f" ({kind})" if isinstance(kind, str) else ""
        return ModelError(
            f"{path} is a diffusers pipeline{what}, which makes pictures; edgeq runs the language models of Qwen3.5",
            hint="use a Qwen3.5 model: 0.8B, 2B or 4B",
        )
    if is_adapter(path):
        return _adapter(path)
    if _is_ollamas(path, names):
        return UsageError(
            f"{path} is where ollama keeps its models", hint="name one as ollama does, with ollama: before it"
        )
    if unfinished := _unfinished(path):
        return ModelError(f"{path} is an unfinished download ({unfinished})", hint=_AGAIN)
    if pieces := _in_pieces(path, names):
        return pieces
    if inner := _models_below(path, names):
        return UsageError(
            f"{path} is no model, but holds {'one' if len(inner) == 1 else len(inner)}:",
            details=first_of(inner),
            hint=f"name {'it' if len(inner) == 1 else 'one of them'}: {path / inner[0]}",
        )
    if adapters := sorted(name for name in names if is_adapter(path / name)):
        return UsageError(
            f"{path} is no model, but holds {len(adapters)} adapters:",
            details=first_of(adapters),
            hint=f"name both: `edgeq chat MODEL --adapter {path / adapters[-1]}` (adapter= in Python)",
        )
    if foreign := _foreign(path, names):
        return foreign
    if loose := [name for name in names if name.endswith(".safetensors")]:
        if "config.json" in names:
            return ModelError(
                f"{path} holds {loose[0]}, but no model*.safetensors",
                hint="download the model again: its weights are in files called model",
            )
        return ModelError(f"{path} holds weights, but no config.json", hint="download the whole model")
    if "config.json" in names:
        return ModelError(
            f"{path} holds a config.json, but no model*.safetensors files",
            hint="download the weights, too",
        )
    return ModelError(
        f"{path} is a folder without a model in it",
        hint="name a folder with config.json and safetensors files, or a .gguf file",
    )


def _is_ollamas(path: Path, names: list[str]) -> bool:
    """Whether a folder is ollama's, the one of its models, or one of the two inside."""
    if any(name.startswith("sha256-") for name in names):
        return True
    return any(
        exists(place / "manifests") and exists(place / "blobs") for place in (path, path / "models", path.parent)
    )


def is_session(path: Path) -> bool:
    """Whether a file is a session, by its content: of any version, and perhaps damaged behind its beginning."""
    try:
        with open_file(path) as file:
            return file.read(256)[8:].startswith(_SESSION)
    except OSError:
        return False


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and no model (some tools put the base's config.json beside it)."""
    return exists(path / "adapter_config.json") and not any(path.glob("model*.safetensors"))


def _adapter(folder: Path) -> ModelError:
    values = _json(folder / "adapter_config.json")
    base = values.get("base_model_name_or_path", values.get("model"))  # PEFT's name for it, and mlx-lm's
    base = base if isinstance(base, str) else ""
    return ModelError(
        f"{folder} is an adapter{f' for {base}' if base else ''}, not a model",
        hint=f"name both: `edgeq chat {base or 'MODEL'} --adapter {folder}` (adapter= in Python)",
    )


def _foreign(path: Path, names: list[str]) -> ModelError | None:
    """Weights that edgeq does not read, in a folder, or one inside, without any that it does."""
    inside = [f"{name}/{entry.name}" for name in names if is_folder(path / name) for entry in _entries(path / name)]
    for name in [*names, *inside]:
        suffix = Path(name).suffix.lower()
        what = _FOREIGN.get(suffix)
        if suffix == ".xml" and exists(path / f"{name[:-4]}.bin"):
            what = "an OpenVINO model"
        if what:
            return ModelError(f"{path} holds {what} ({name}), which edgeq does not read", hint=_OTHERS)
    for name in names:
        if Path(name).suffix.lower() in _TORCH and not name.startswith(_TRAINING):
            return ModelError(f"{path} holds PyTorch weights ({name}), which edgeq does not read", hint=_PICKLE)
    return None


def _entries(path: Path) -> list[Path]:
    """What is in a folder, in order; nothing if it is none, or cannot be read."""
    try:
        return sorted(path.iterdir())
    except OSError:
        return []


def _models_below(path: Path, names: list[str]) -> list[str]:
    """The entries of a folder that are models; if there are none, those of the folders in it."""
    if inner := [name for name in names if _is_model(path / name)]:
        return inner
    return [f"{name}/{below.name}" for name in names for below in _entries(path / name) if _is_model(below)]


def _is_model(path: Path) -> bool:
    """Whether an entry of a folder looks like a model, at a glance."""
    if not is_folder(path):
        return False
    if path.name.startswith("models--"):
        return exists(path / "snapshots")
    try:
        return exists(path / "config.json") or any(path.glob("*.gguf"))
    except OSError:
        return False
