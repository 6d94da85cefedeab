"""`edgeq info`: what is in a model, and what this installation can do."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeq.api import KV_DTYPES, check_kv_bits
from edgeq.backends import available, choose, select
from edgeq.backends.ops import Ops
from edgeq.checkpoint import Checkpoint, Storage, open_checkpoint
from edgeq.cli.console import show, show_json
from edgeq.cli.facts import description, lines, versions
from edgeq.cli.memory import choice_facts, plan_facts, used_by_a_chat
from edgeq.cli.options import BackendOption, ContextOption, KvBitsOption, MemoryOption, OptionalModelArgument, option
from edgeq.config import TextConfig
from edgeq.engine import checked_context
from edgeq.errors import ModelError, UsageError
from edgeq.hub import find_model
from edgeq.identify import is_adapter, is_session
from edgeq.inputs import expand_user
from edgeq.memory.ceiling import ceiling
from edgeq.memory.choice import Asked, choose_settings
from edgeq.memory.plan import plan_memory
from edgeq.printable import printable
from edgeq.session.files import SavedSession
from edgeq.session.prefixes import most_kept
from edgeq.text.template_files import DEFAULT
from edgeq.weights import Part, TensorSpec

if TYPE_CHECKING:
    from edgeq.text.tokenizer import Tokenizer

__all__ = ["info"]


def info(
    ctx: typer.Context,
    model: OptionalModelArgument = None,
    verify: Annotated[
        bool, option("--verify", env=False, help="Check every file of a quantized model against its provenance record.")
    ] = False,
    config: Annotated[
        bool, option("--config", env=False, help="Show the value of every option and where it comes from.")
    ] = False,
    plan: Annotated[
        bool, option("--plan", env=False, help="Show what a model will take in memory, and what it would run with.")
    ] = False,
    context: ContextOption = None,
    kv_bits: KvBitsOption = None,
    memory: MemoryOption = None,
    backend: BackendOption = "auto",
    as_json: Annotated[bool, option("--json", env=False, help="Print one JSON object.")] = False,
) -> None:
    """Show what is in a model, or what is installed.

    \b
    edgeq info
    edgeq info demo
    edgeq info q2b --verify
    edgeq info q2b --plan --memory 1.5G

    With MODEL: shapes, types, chat template and provenance. Without: this installation and its backends.
    """
    if plan and (model is None or config):
        raise UsageError("--plan needs a model", hint="try `edgeq info FOLDER --plan --memory 1.5G`")
    if config:
        facts = _options(ctx)
    elif model is None:
        if verify:
            raise UsageError("--verify needs a model", hint="try `edgeq info FOLDER --verify`")
        facts = _installation()
    else:
        path = expand_user(Path(model))
        if is_adapter(path):
            facts = _adapter(path)
        elif is_session(path):
            facts = _session(path, verify=verify)
            verify = False
        else:
            path = find_model(model)
            if plan:
                facts = _plan(open_checkpoint(path), backend, memory, Asked(context, kv_bits))
            else:
                facts = _model(open_checkpoint(path))
        if verify:
            from edgeq.quant import verify as verify_files

            facts["verified"] = f"{len(verify_files(path))} files match their record"
    if as_json:
        show_json(facts, indent=2)
    else:
        show("\n".join(lines(facts)))


def _installation() -> dict[str, Any]:
    chosen = choose()
    return {
        **versions(),
        "backend": f"{chosen.name} ({chosen.reason})",
        "backends": {backend.name: description(backend) for backend in available()},
    }


def _model(checkpoint: Checkpoint) -> dict[str, Any]:
    text = checkpoint.config.text
    stored = list(checkpoint.storage())
    parts = {spec.part for spec, _ in stored}
    weights = sum(spec.size for spec, _ in stored if spec.part is Part.TEXT)
    nbytes = sum(storage.nbytes for spec, storage in stored if spec.part is Part.TEXT)
    tokenizer = checkpoint.tokenizer()
    kinds = Counter(text.layer_types)
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "language model": f"{weights / 1e6:,.1f} M parameters in {nbytes / 1e6:,.1f} MB",
        "bits per weight": f"{8 * nbytes / weights:.3f}, every byte of the language model counted",
        "layers": f"{kinds['linear_attention']} Gated DeltaNet, {kinds['full_attention']} gated attention",
        "hidden size": text.hidden_size,
        "attention heads": f"{text.num_attention_heads} ({text.num_key_value_heads} KV) x {text.head_dim}",
        "DeltaNet heads": f"{text.linear_num_value_heads} value x {text.linear_value_head_dim}, "
        f"{text.linear_num_key_heads} key x {text.linear_key_head_dim}",
        "vocabulary": f"{text.vocab_size:,} rows" + (f", {tokenizer.vocab_size:,} tokens" if tokenizer else ""),
        "context": _context(text),
        "head": "tied to the embedding" if text.tie_word_embeddings else "its own",
        "MTP head": "yes" if Part.MTP in parts else "no",
        **_seeing(checkpoint, [(spec, storage) for spec, storage in stored if spec.part is Part.VISION]),
        "tokenizer": "yes" if tokenizer else "none: token ids only",
        **_templates(checkpoint, tokenizer),
        "tensors": _by_type(stored),
    }


def _plan(checkpoint: Checkpoint, backend: str, memory: str | None, asked: Asked) -> dict[str, Any]:
    """What a model takes, and under a ceiling what it would run with, or a MemoryBudgetError."""

    def make_ops(bits: int | None) -> Ops[Any, Any]:
        return select(None if backend == "auto" else backend, kv_dtype=None if bits is None else KV_DTYPES[bits])

    check_kv_bits(asked.kv_bits)
    checked_context(asked.context, checkpoint.config.text.longest_context)
    if (bound := ceiling(memory)) is not None:
        used = used_by_a_chat(make_ops, asked.kv_bits, checkpoint)
        return {"path": str(checkpoint.path), **choice_facts(choose_settings(checkpoint, make_ops, bound, asked, used))}
    ops = make_ops(asked.kv_bits)
    tokens = asked.context or checkpoint.config.text.longest_context
    kept = most_kept(ops, checkpoint.config.text, tokens)
    return {
        "path": str(checkpoint.path),
        "context": f"{tokens:,} tokens",
        "keys and values": ops.kv_dtype,
        "plan": plan_facts(plan_memory(checkpoint, ops, tokens, checkpoints=kept, drafts=True)),
    }


def _session(path: Path, *, verify: bool) -> dict[str, Any]:
    saved = SavedSession(path)
    facts = saved.facts()
    if verify:
        saved.check()
        facts["verified"] = "everything in it matches its checksum"
    return facts | {"to go on": f"edgeq chat --session {path}"}


def _adapter(path: Path) -> dict[str, Any]:
    from edgeq.adapters import read_folder

    adapter = read_folder(path)
    ranks = ", ".join(map(str, adapter.ranks))
    return {
        "path": str(adapter.path),
        "format": adapter.kind,
        "base": adapter.base or "not said",
        "tensors it changes": len(adapter.changes),
        **({"ranks": ranks} if ranks else {}),
        "size": f"{sum(len(file.mapped) for file in adapter.files) / 1e6:,.2f} MB",
        "to run it": f"edgeq chat {adapter.base or 'MODEL'} --adapter {adapter.path}",
    }


def _templates(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> dict[str, str]:
    """What a conversation is written with; what cannot be used is said, and no more."""
    try:
        template = checkpoint.template(tokenizer)
        told = f"thinking is {'on' if template.thinking_default else 'off'} by default" if template else "none"
    except ModelError as error:
        told = f"cannot be used: {error.message}"
    others = [name for name in checkpoint.templates.found if name != DEFAULT]
    return {"chat template": told} | ({"other chat templates": printable(", ".join(others))} if others else {})


def _context(text: TextConfig) -> str:
    scaling = text.rope.scaling
    stretched = "" if scaling is None else f", {type(scaling).__name__.lower()} scaling by {scaling.factor:g}"
    return f"{text.longest_context:,} tokens{stretched}"


def _seeing(checkpoint: Checkpoint, stored: list[tuple[TensorSpec, Storage]]) -> dict[str, str]:
    """The vision tower, and what a picture costs in tokens."""
    if not stored or checkpoint.config.vision is None:
        return {"vision tower": f"no: {checkpoint.lacks_tower()}"}
    from edgeq.session.visual_settings import CHAT_VISUALS
    from edgeq.vision import image_size

    nbytes = Counter[str]()
    for _, storage in stored:
        nbytes[storage.type] += storage.nbytes
    (most, _), *_ = nbytes.most_common()
    square = (checkpoint.config.vision.patch_size * checkpoint.config.vision.spatial_merge_size) ** 2
    try:
        whole, in_a_chat = (
            prod(image_size(3000, 4000, checkpoint.config, image_tokens=tokens)) // square
            for tokens in (None, CHAT_VISUALS.image_tokens)
        )
        photo = f"{whole:,} of 4000 x 3000 pixels, {in_a_chat:,} in a chat"
    except ModelError as error:  # in the processor's files: the text runs without them
        photo = f"unknown: {error.message}"
    return {
        "vision tower": "yes",
        "sees with": f"{sum(spec.size for spec, _ in stored) / 1e6:,.1f} M parameters in "
        f"{sum(nbytes.values()) / 1e6:,.1f} MB, most of them {most}",
        "tokens of a photo": photo,
    }


def _by_type(stored: list[Any]) -> dict[str, str]:
    """Kinds of tensors and how they are stored: "MLP gate_proj: 24 x 4-bit g64, 49.5 MB"."""
    groups: dict[tuple[str, str], list[int]] = {}
    for spec, storage in stored:
        kind = ".".join("N" if part.isdigit() else part for part in spec.name.split("."))
        groups.setdefault((kind, storage.type), []).append(storage.nbytes)
    return {
        f"{kind} [{stored_as}]": f"{len(sizes)} x, {sum(sizes) / 1e6:,.2f} MB"
        for (kind, stored_as), sizes in groups.items()
    }


def _options(ctx: typer.Context) -> dict[str, Any]:
    """Value and origin of every option: environment, configuration file, or the default."""
    parent: Any = ctx.parent
    result: dict[str, Any] = {}
    for name, command in parent.command.commands.items():
        file_values = (parent.default_map or {}).get(name, {})
        sub = type(ctx)(command, parent=parent, info_name=name)
        for parameter in command.params:
            if parameter.name is None or not parameter.envvar:
                continue
            value, origin = parameter.get_default(sub), "default"
            if parameter.name in file_values:
                value, origin = file_values[parameter.name], "configuration file"
            if (given := parameter.value_from_envvar(sub)) is not None:
                value, origin = given, f"environment ({parameter.envvar})"
            result[f"{name}.{parameter.name}"] = f"{value} ({origin})"
    return result
