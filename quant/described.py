"""A model by its configuration and a recipe: how large every tensor would be, where there are none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from edgeq.checkpoint import Storage
from edgeq.checkpoint.base import without
from edgeq.checkpoint.folder import QuantizationTable
from edgeq.config import ModelConfig
from edgeq.quant.recipe import QuantSpec, Recipe, assign
from edgeq.weights import Part, Role, TensorSpec, all_tensors

__all__ = ["DescribedModel"]


class DescribedModel:
    """What `edgeq quantize` would make of a checkpoint with this configuration, or what somebody has made of it: enough
    for a plan (`edgeq.memory.plan.Planned`)."""

    def __init__(self, config: ModelConfig, specs: Mapping[TensorSpec, QuantSpec | None]) -> None:
        self.config = config
        self._specs = specs

    @classmethod
    def of_recipe(cls, config: ModelConfig, recipe: Recipe) -> DescribedModel:
        """The result of a recipe, from bfloat16."""
        given = [(spec, spec.name) for spec in all_tensors(config)]
        stored = {a.spec: a.storage if isinstance(a.storage, QuantSpec) else None for a in assign(given, recipe)}
        return cls(without(config, recipe.dropped), stored)

    @classmethod
    def of_config(cls, config: ModelConfig, values: Mapping[str, Any]) -> DescribedModel:
        """What a config.json in MLX's affine groups says: its default is for the language model alone."""
        table, specs = QuantizationTable(values), dict[TensorSpec, QuantSpec | None]()
        for spec in all_tensors(config):
            found = table.named(spec.name) if spec.part is Part.VISION else table.of(spec.name)
            quantized = found is not None and spec.role in (Role.LINEAR, Role.EMBEDDING)
            specs[spec] = QuantSpec(found.bits, found.group_size) if quantized and found else None
        return cls(config, specs)

    def storage(self) -> Iterator[tuple[TensorSpec, Storage]]:
        """Every tensor, and how it would be stored."""
        for spec, quantized in self._specs.items():
            kind = "F32" if spec.role in (Role.DECAY, Role.GATED_NORM) else "BF16"  # as in the hub's files
            yield spec, Storage(str(quantized or kind), self.memory_nbytes(spec))

    def memory_nbytes(self, spec: TensorSpec) -> int:
        """Bytes of a tensor: codes, and for every group a scale and a bias of 16 bits."""
        quantized = self._specs[spec]
        if quantized is not None:
            return spec.size * quantized.bits // 8 + 4 * spec.size // quantized.group_size
        return spec.size * (4 if spec.role in (Role.DECAY, Role.GATED_NORM) else 2)

    def is_mapped(self, spec: TensorSpec) -> bool:  # noqa: ARG002
        """Whether a matrix is used where the file is mapped, as those of edgeq's own files are."""
        return True
