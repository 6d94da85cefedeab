"""Recipes: what each tensor is stored as, overrides, fallbacks, and the sizes that come of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.config import ModelConfig, parse_config
from edgeq.errors import UsageError
from edgeq.formats.affine import BITS, GROUP_SIZES
from edgeq.formats.names import hub_name
from edgeq.quant.recipe import KEEP, RECIPES, QuantSpec, Storage, TypeRule, assign, choose_recipe
from edgeq.testing import config_values
from edgeq.weights import Part, Role, TensorSpec, all_tensors, text_tensors

Q4, Q6, Q8 = QuantSpec(4, 64), QuantSpec(6, 64), QuantSpec(8, 64)


def storages(config: ModelConfig, recipe: str | None, *types: str, **base: int) -> dict[str, Storage]:
    tensors = [(spec, hub_name(spec.name)) for spec in all_tensors(config)]
    rules = [TypeRule.parse(t) for t in types]
    chosen = choose_recipe(recipe, base.get("bits"), base.get("group_size"))
    return {a.spec.name: a.storage for a in assign(tensors, chosen, rules)}


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "linear_value_head_dim": 32}
    return parse_config(config_values(vision=True, mtp=True, **sizes))


class TestRecipes:
    def test_q4(self, config: ModelConfig) -> None:
        chosen = storages(config, "q4")
        assert chosen["embed_tokens.weight"] == Q4
        assert chosen["layers.0.linear_attn.out_proj.weight"] == Q6
        assert chosen["layers.0.linear_attn.in_proj_qkv.weight"] == Q4
        assert chosen["layers.3.self_attn.o_proj.weight"] == Q4
        assert chosen["mtp.fc.weight"] == chosen["mtp.layers.0.self_attn.o_proj.weight"] == Q4

    @pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.base])
    def test_what_is_never_quantized(self, config: ModelConfig, name: str) -> None:
        chosen = storages(config, name)
        for spec in all_tensors(config):
            quantized = isinstance(chosen[spec.name], QuantSpec)
            assert quantized == (spec.role in (Role.LINEAR, Role.EMBEDDING)), spec.name

    @pytest.mark.parametrize("name", RECIPES)
    def test_the_vision_tower_has_8_bits_16_or_none(self, config: ModelConfig, name: str) -> None:
        tower = [spec for spec in all_tensors(config) if spec.part is Part.VISION]
        for vision in (None, 8, 16, "8", "16", "none"):
            recipe = choose_recipe(name, None, None, vision)
            assert recipe.vision == (str(vision) if vision else "16" if name in ("none", "keep") else "8")
            made = {a.spec.name: a.storage for a in assign([(spec, spec.name) for spec in all_tensors(config)], recipe)}
            if recipe.vision == "none":
                assert not any(spec.name in made for spec in tower)
                continue
            quantized = {spec.role for spec in tower if isinstance(made[spec.name], QuantSpec)}
            assert quantized == ({Role.LINEAR} if recipe.vision == "8" else set())
        with pytest.raises(UsageError, match="the vision tower cannot be stored as"):
            choose_recipe(name, None, None, 4)

    def test_only_patterns_that_name_the_tower_quantize_it(self, config: ModelConfig) -> None:
        tensors = [(spec, hub_name(spec.name)) for spec in all_tensors(config)]
        for pattern, bits in (("*", 8), ("visual.*.fc1", 8), ("visual.*linear_fc1", 4), ("model.visual.*fc1*", 4)):
            try:
                made = assign(tensors, choose_recipe("q6", None, None), [TypeRule.parse(f"{pattern}=4")])
            except UsageError:
                assert pattern == "visual.*.fc1"  # matches nothing
                continue
            (storage,) = {a.storage for a in made if a.spec.name == "visual.blocks.0.mlp.linear_fc1.weight"}
            assert isinstance(storage, QuantSpec)
            assert storage.bits == bits

    def test_q4_plus(self, config: ModelConfig) -> None:
        chosen = storages(config, "q4+")
        lifted = {name for name, storage in chosen.items() if storage == Q6}
        assert lifted == {
            "embed_tokens.weight",
            *(f"layers.{i}.linear_attn.out_proj.weight" for i in range(3)),
            "layers.3.self_attn.o_proj.weight",
            "layers.3.self_attn.v_proj.weight",
        }

    def test_none_is_bfloat16_but_for_what_is_float32_on_the_hub(self, config: ModelConfig) -> None:
        chosen = storages(config, "none")
        exact = {name for name, storage in chosen.items() if storage == KEEP}
        assert {name.rpartition("linear_attn.")[2] for name in exact} == {"A_log", "norm.weight"}
        assert set(chosen.values()) == {KEEP, "BF16"}

    def test_defaults(self) -> None:
        assert choose_recipe(None, None, None).name == choose_recipe(None, 4, None).name == "q4"
        assert choose_recipe(None, 8, None).name == "q8"

    @given(
        st.sampled_from([n for n, r in RECIPES.items() if r.base]), st.sampled_from(BITS), st.sampled_from(GROUP_SIZES)
    )
    def test_base_is_replaced_and_lifts_only_lift(self, name: str, bits: int, group_size: int) -> None:
        recipe = choose_recipe(name, bits, group_size)
        for spec in text_tensors(parse_config(config_values()).text):
            storage = recipe.storage(spec)
            if isinstance(storage, QuantSpec):
                assert storage.bits in {bits, max(bits, 6)}
                assert storage.group_size == group_size

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("q3", None, None), "unknown recipe 'q3'"),
            (("none", 4, None), "quantizes nothing"),
            ((None, 7, None), "bits must be 2, 3, 4, 5, 6 or 8, got 7"),
            ((None, 4, 48), "group size must be 32, 64 or 128, got 48"),
        ],
    )
    def test_nonsense(self, arguments: Any, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            choose_recipe(*arguments)


class TestTypes:
    def test_later_ones_win(self, config: ModelConfig) -> None:
        chosen = storages(config, "q4", "*.down_proj=8", "layers.1.*=6g32", "*.k_proj=bf16")
        assert chosen["layers.0.mlp.down_proj.weight"] == Q8
        assert chosen["layers.1.mlp.down_proj.weight"] == QuantSpec(6, 32)
        assert chosen["layers.1.input_layernorm.weight"] == KEEP  # bits are for matrices
        assert chosen["layers.3.self_attn.k_proj.weight"] == "BF16"

    def test_names_of_files_fit_too(self, config: ModelConfig) -> None:
        chosen = storages(config, "q4", "model.language_model.layers.0.mlp.up_proj.weight=f16", "model.visual.*=f32")
        assert chosen["layers.0.mlp.up_proj.weight"] == "F16"
        assert chosen["visual.merger.linear_fc1.bias"] == "F32"

    def test_group_size_of_the_recipe(self, config: ModelConfig) -> None:
        assert storages(config, "q4", "*.up_proj=5", group_size=32)["layers.0.mlp.up_proj.weight"] == QuantSpec(5, 32)

    @pytest.mark.parametrize(
        ("rule", "message"),
        [
            ("*.nothing=4", "matches no tensor"),
            ("*.in_proj_a=8", "never quantized"),
            ("visual.pos_embed=4", "never quantized"),
            ("*.up_proj", "not PATTERN=SPEC"),
            ("*.up_proj=7", "not PATTERN=SPEC"),
            ("*.up_proj=4g48", "not PATTERN=SPEC"),
            ("*.up_proj=q4", "not PATTERN=SPEC"),
            ("=4", "not PATTERN=SPEC"),
        ],
    )
    def test_nonsense(self, config: ModelConfig, rule: str, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            storages(config, "q4", rule)


class TestFallback:
    @pytest.mark.parametrize(
        ("width", "group_size", "storage"),
        [(192, 128, Q4), (96, 64, QuantSpec(4, 32)), (160, 128, QuantSpec(4, 32)), (80, 32, KEEP), (16, 64, KEEP)],
    )
    def test_groups_divide_a_row(self, width: int, group_size: int, storage: Storage) -> None:
        tensor = (TensorSpec("layers.0.mlp.up_proj.weight", (8, width), Role.LINEAR), "x")
        (assignment,) = assign([tensor], choose_recipe("q4", None, group_size))
        assert assignment.storage == storage
        assert f"rows of {width}" in assignment.note
