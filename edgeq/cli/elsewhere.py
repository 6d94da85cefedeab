"""What the commands and flags of llama.cpp, ollama and mlx-lm are called here.

Flags that mean the same as one of edgeq's are other names of it (`edgeq.cli.options`). These have another form: a line
with one is not understood, and gets a hint of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["COMMANDS", "FLAGS", "hint_for"]

_DOWNLOADS = "`edgeq chat` and `edgeq quantize` download at first use; `hf cache ls` and `hf cache rm` manage the files"
_SERVER = "edgeq has no server yet; in Python, `Model.chat(messages=...)` answers histories"

COMMANDS = {
    "run": "`edgeq chat MODEL` does that",
    "show": "`edgeq info MODEL` does that",
    "convert": "`edgeq quantize MODEL -o OUT` does that",
    "create": "`edgeq quantize MODEL -o OUT` does that",
    "fuse": "`edgeq quantize MODEL -o OUT --adapter PATH` does that",
    "benchmark": "`edgeq bench MODEL` does that",
    "perplexity": "`edgeq eval MODEL --text FILE` does that, and with --kld REFERENCE the divergence",
    "pull": _DOWNLOADS,
    "list": _DOWNLOADS,
    "ls": _DOWNLOADS,
    "rm": _DOWNLOADS,
    "serve": _SERVER,
    "server": _SERVER,
}

_BACKEND = "give --backend mlx for the GPU of a Mac, or --backend cpu"
_KV_BITS = "give --kv-bits 8, or 4, for keys and values"
_ONCE = "leave it out: `edgeq chat MODEL TEXT` answers once, without TEXT it goes on"
_RAW = "use `edgeq generate MODEL TEXT`, which has no chat template"
_THINK = "give --think or --no-think"
_DRAFT = "give --draft: the model drafts with its own MTP head, not with a second model"
_ALONE = "give the model alone: `edgeq bench MODEL`"
_SESSION = "give --session FILE.eqs to `edgeq chat`, or --cache-dir FOLDER: nothing is read twice"

_CHAT = {
    "-ngl": _BACKEND,
    "--gpu-layers": _BACKEND,
    "--n-gpu-layers": _BACKEND,
    "-ctk": _KV_BITS,
    "-ctv": _KV_BITS,
    "--cache-type-k": _KV_BITS,
    "--cache-type-v": _KV_BITS,
    "-cnv": _ONCE,
    "--conversation": _ONCE,
    "-st": _ONCE,
    "--single-turn": _ONCE,
    "-no-cnv": _RAW,
    "--no-conversation": _RAW,
    "--ignore-chat-template": _RAW,
    "-rea": _THINK,
    "--reasoning": _THINK,
    "-r": "give --stop TEXT",
    "--reverse-prompt": "give --stop TEXT",
    "--context-shift": "give --overflow shift",
    "--rope-scale": "give kind and factor together, as in --rope-scaling yarn:4",
    "--max-kv-size": "give --context N, perhaps with --overflow shift",
    "--model-draft": _DRAFT,
    "--draft-model": _DRAFT,
    "--prompt-cache": _SESSION,
    "--format": "give --schema FILE for an answer in JSON, or --json for the whole reply as an object",
    "--verbose": "leave it out: statistics follow each reply, unless --quiet is given",
    "--jinja": "leave it out: the checkpoint's chat template is always used",
    "--prefill-response": "give --assistant-prefix TEXT",
    "--chat-template-config": "give --chat-template-kwargs JSON",
    "--audio": "leave it out: Qwen3.5 takes images and video, not sound",
}

FLAGS = {
    "chat": _CHAT,
    "generate": {**_CHAT, "--session": _SESSION},
    "quantize": {
        "--hf-path": "give the model alone: `edgeq quantize MODEL -o OUT`",
        "--mlx-path": "give -o OUT",
        "--q-mode": "leave it out: edgeq quantizes to affine groups",
    },
    "bench": {"-m": _ALONE, "--model": _ALONE},
}


def hint_for(arguments: Sequence[str]) -> str | None:
    """The hint for the first of a line's words that is another engine's; None if none is."""
    command = next((word for word in arguments if not word.startswith("-")), "")
    flags = FLAGS.get(command, {})
    names = (word.partition("=")[0] for word in arguments)
    return COMMANDS.get(command) or next((flags[name] for name in names if name in flags), None)
