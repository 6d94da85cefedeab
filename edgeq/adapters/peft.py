"""Adapters of PEFT: adapter_config.json and adapter_model.safetensors, as `save_pretrained` writes them.

The scale of a module is alpha / rank, or alpha / sqrt(rank) with `use_rslora` (Kalajdzievski, arXiv:2312.03732); both
may differ by module. Every key of the configuration that would change the arithmetic is used, or refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

from edgeq.adapters.changes import Adapter, Change, LowRank, Whole
from edgeq.adapters.tensors import FLOATS, LONGEST_NAME, checked, low_rank, neutral
from edgeq.errors import ModelError
from edgeq.formats.safetensors import SafetensorsFile
from edgeq.numbers import number, whole_number
from edgeq.printable import brief

__all__ = ["read_peft"]

_MERGE = "merge it into its base with PEFT's merge_and_unload, and give the merged folder"
_AGAIN = "save the adapter again with PEFT, or download it again"
_PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT")
# Keys that say how it was trained, or how to find the modules, which the tensors' names say too.
_NO_ARITHMETIC = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules",
    "task_type",
    "fan_in_fan_out",  # is for layers that store [in, out]; PEFT turns it off where they do not, as here
}  # fmt: skip
_USED = {
    "alpha_pattern", "bias", "ensure_weight_tying", "init_lora_weights", "lora_alpha", "r", "rank_pattern", "use_dora",
    "use_rslora",
}  # fmt: skip
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # that leave the base's weights as they are
_LORA = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!weight$|bias$)\w+))?(?:\.(?P<leaf>weight|bias))?"
)
_WHOLE = re.compile(
    r"(?P<module>.+?)(?:\.modules_to_save(?:\.\w+)?|\.base_layer)?\.(?P<leaf>weight|bias|A_log|dt_bias)"
)


def read_peft(config: Path, values: Mapping[str, Any], weights: Path) -> Adapter:
    """An adapter of PEFT's; ModelError for what is no LoRA, or a kind of it that edgeq does not know."""
    reader = _Reader(config, values)
    file = SafetensorsFile(weights)
    changes, origin = reader.changes(file)
    dora = " with DoRA" if reader.dora else ""
    base = values.get("base_model_name_or_path")
    return Adapter(
        weights.parent, f"PEFT LoRA{dora}", base if isinstance(base, str) and base else None, changes, origin, (file,),
        ties=bool(values.get("ensure_weight_tying")),
    )  # fmt: skip


class _Reader:
    """The configuration, checked."""

    def __init__(self, config: Path, values: Mapping[str, Any]) -> None:
        self.config, self.values = config, values
        kind = values.get("peft_type")
        if kind != "LORA":
            hint = "use a LoRA adapter: prompts are not weights" if kind in _PROMPTS else _MERGE
            raise ModelError(f"{config}: peft_type is {brief(kind)}, expected 'LORA'", hint=hint)
        for key in sorted(values.keys() - _NO_ARITHMETIC - _USED):
            if values[key]:
                raise ModelError(f"{config}: {key} is {brief(values[key])}, which edgeq does not support", hint=_MERGE)
        start = values.get("init_lora_weights")
        if not any(start is plain or (isinstance(start, str) and start == plain) for plain in _PLAIN_STARTS):
            raise ModelError(
                f"{config}: init_lora_weights is {brief(start)}, which changes the base's own weights",
                hint="save it again with PEFT's path_initial_model_for_weight_conversion, or merge it",
            )
        self.dora = self._flag("use_dora")
        self.rslora = self._flag("use_rslora")
        self.rank = self._rank(values.get("r"), "r")
        self.alpha = self._alpha(values.get("lora_alpha"), "lora_alpha")
        self.ranks = {key: self._rank(r, f"rank_pattern.{key}") for key, r in self._patterns("rank_pattern").items()}
        self.alphas = {
            key: self._alpha(a, f"alpha_pattern.{key}") for key, a in self._patterns("alpha_pattern").items()
        }

    def changes(self, file: SafetensorsFile) -> tuple[dict[str, tuple[Change, ...]], dict[str, str]]:
        """What the file's tensors do, by neutral name, and which of the file's names that comes from."""
        pieces, whole, origin, adapters = dict[str, dict[str, str]](), dict[str, str](), dict[str, str](), set[str]()
        for name in file.tensors:
            if name.endswith((".original_module.weight", ".original_module.bias")):
                continue  # the base's own
            if len(name) > LONGEST_NAME:
                raise ModelError(f"{file.path} has a name of {len(name):,} characters", hint="save the adapter again")
            if found := _LORA.fullmatch(name):
                if found["leaf"] == "bias":
                    raise ModelError(f"{file.path}: {name}: edgeq does not support lora_bias", hint=_MERGE)
                tensor, kind = neutral(f"{found['module']}.weight"), found["kind"]
                if kind in pieces.setdefault(tensor, {}) or len(adapters | {found["adapter"]}) > 1:
                    raise ModelError(f"{file.path} holds more than one adapter", hint="save one by itself with PEFT")
                adapters.add(found["adapter"])
                pieces[tensor][kind] = origin[tensor] = name
            elif (found := _WHOLE.fullmatch(name)) and "token_adapter" not in name:
                tensor = neutral(f"{found['module']}.{found['leaf']}")
                if tensor in whole:
                    if _same(file, name, whole[tensor]):
                        continue  # PEFT stores embeddings that were resized and trained twice
                    raise ModelError(f"{file.path}: {name} and {whole[tensor]} are the same tensor", hint=_MERGE)
                whole[tensor] = name
                origin.setdefault(tensor, name)
            else:
                raise ModelError(f"{file.path}: edgeq does not know what {name} does to a model", hint=_MERGE)
        changes: dict[str, tuple[Change, ...]] = {
            tensor: (Whole(checked(file, name, FLOATS)),) for tensor, name in whole.items()
        }
        for tensor, names in pieces.items():
            changes[tensor] = (*changes.get(tensor, ()), self._low_rank(file, names))
        return changes, origin

    def _low_rank(self, file: SafetensorsFile, names: Mapping[str, str]) -> LowRank:
        embedding = any(kind.startswith("lora_embedding") for kind in names)
        a_name, b_name = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        any_name = next(iter(names.values()))
        module = _module(any_name)
        length = "lora_magnitude_vector"
        for kind in (a_name, b_name, *([length] if self.dora else [])):
            if kind not in names:
                raise ModelError(f"{file.path}: {module} has no {kind}", hint="download or save the adapter again")
        if set(names) - {a_name, b_name, length} or (length in names and not self.dora):
            raise ModelError(f"{file.path}: {any_name} contradicts use_dora in {self.config.name}", hint=_MERGE)
        if embedding and self.dora:
            raise ModelError(f"{file.path}: {module}: edgeq does not support DoRA on an embedding", hint=_MERGE)
        a, b = (checked(file, names[kind], FLOATS) for kind in (a_name, b_name))
        if embedding:  # PEFT adds the transposed product: A [rank, rows], B [columns, rank]
            a, b = (x.T if x.ndim == 2 else x for x in (b, a))
        lengths = checked(file, names[length], FLOATS).reshape(-1) if self.dora else None
        change = low_rank(file, names[a_name], a, b, 1.0, lengths)
        rank = len(change.a)
        expected = next((r for key, r in self.ranks.items() if _matches(key, module)), self.rank)
        if rank != expected:
            raise ModelError(
                f"{file.path}: {module} is of rank {rank}, {self.config.name} says {expected}",
                hint="take both files from one adapter",
            )
        alpha = next((a for key, a in self.alphas.items() if _matches(key, module)), self.alpha)
        return low_rank(file, names[a_name], a, b, alpha / (sqrt(rank) if self.rslora else rank), lengths)

    def _flag(self, key: str) -> bool:
        value = self.values.get(key)
        if value not in (None, True, False):
            raise ModelError(f"{self.config}: {key} is {brief(value)}, expected true or false", hint=_AGAIN)
        return bool(value)

    def _rank(self, value: object, key: str) -> int:
        return whole_number(value, f"{self.config}: {key}", 1, 1 << 16, hint=_AGAIN)

    def _alpha(self, value: object, key: str) -> float:
        return number(value, f"{self.config}: {key}", -1e6, 1e6, hint=_AGAIN)

    def _patterns(self, key: str) -> dict[str, Any]:
        patterns = self.values.get(key) or {}
        if not isinstance(patterns, dict):
            raise ModelError(f"{self.config}: {key} is {brief(patterns)}, expected an object", hint=_AGAIN)
        for pattern in patterns:
            repeating = pattern.count("*") + pattern.count("+")
            if len(pattern) > _LONGEST or repeating > _REPEATING or not _HARMLESS.fullmatch(pattern):
                raise ModelError(
                    f"{self.config}: {key} has a pattern that edgeq does not take: {brief(pattern)}", hint=_MERGE
                )
        return patterns


# Patterns are regular expressions of a stranger: names, alternatives of names, and few things that repeat, none of
# them within another, so that matching ends soon.
_LONGEST, _REPEATING = 256, 4
_HARMLESS = re.compile(r"\^?(?:\((?:\?:)?[\w.|\\]*\)|[\w.|\\]|(?:\\d|\\w|\.|\[0-9\])[*+]){1,200}\$?")


def _matches(pattern: str, module: str) -> bool:
    """Whether a pattern of a configuration means a module: at its end, from a dot on, as PEFT has it."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        return False


def _same(file: SafetensorsFile, one: str, other: str) -> bool:
    a, b = file.tensors[one], file.tensors[other]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and file.array(one).tobytes() == file.array(other).tobytes()


def _module(name: str) -> str:
    """A module as PEFT's patterns name it: as the model calls it, without the wrapper's prefix."""
    module = re.split(r"\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)\b", name)[0]
    return module.removeprefix("base_model.model.")
