"""config.json: the real ones are read, everything else is refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from math import log
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.config import Linear, RopeConfig, Yarn, parse_config, read_config, stretched
from edgeq.errors import ModelError, UsageError
from edgeq.testing import config_values
from edgeq.weights import all_tensors, mtp_tensors, text_tensors, vision_tensors

SHARED = Path(__file__).parent.parent.parent / "shared" / "qwen3.5"

# Tensors and parameters of the hub's checkpoints (their index files and parameter tables).
SIZES = {
    "0.8b": (488, 752_393_024, 100_592_896, 20_452_864),
    "2b": (632, 1_881_825_088, 331_416_576, 60_828_160),
    "4b": (738, 4_205_751_296, 333_514_240, 120_599_552),
}


@pytest.mark.skipif(not SHARED.exists(), reason="the real config files are in ../shared, which is not here")
@pytest.mark.parametrize("size", sorted(SIZES))
def test_the_real_configurations(size: str) -> None:
    config = read_config(SHARED / size / "config.json")
    tensors, text, vision, mtp = SIZES[size]
    assert config.vision is not None
    assert len(list(all_tensors(config))) == tensors
    assert sum(spec.size for spec in text_tensors(config.text)) == text
    assert sum(spec.size for spec in vision_tensors(config.vision)) == vision
    assert sum(spec.size for spec in mtp_tensors(config.text)) == mtp
    assert config.text.rope.dim == 64
    assert config.text.rope.sections == (11, 11, 10)
    assert config.text.tie_word_embeddings
    assert config.text.eos_token_ids == (248044,)


def test_the_text_only_layout_is_the_same_model() -> None:
    values = config_values()
    flat = {**values["text_config"], "tie_word_embeddings": True}
    assert parse_config(flat).text == parse_config(values).text
    assert parse_config(flat).vision is None


def test_layers_may_be_given_by_interval() -> None:
    values = config_values()
    del values["text_config"]["layer_types"]
    values["text_config"] |= {"num_hidden_layers": 8, "full_attention_interval": 4}
    kinds = parse_config(values).text.layer_types
    assert [i for i, kind in enumerate(kinds) if kind == "full_attention"] == [3, 7]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, r"text_config\.hidden_size is missing, expected a whole number from 1"),
        ({"hidden_size": "64"}, r"text_config\.hidden_size is '64', expected a whole number from 1"),
        ({"hidden_size": True}, r"text_config\.hidden_size is True"),
        (
            {"hidden_size": 10**15},
            r"text_config\.hidden_size is 10{15}, expected a whole number from 1 to 1048576",
        ),
        ({"vocab_size": 0}, r"text_config\.vocab_size is 0"),
        ({"num_hidden_layers": 10**9}, r"text_config\.num_hidden_layers is 1000000000"),
        ({"layer_types": ["linear_attention"]}, r"a list of num_hidden_layers = 4"),
        ({"layer_types": ["mamba"] * 4}, r"layer_types is 'mamba'"),
        (
            {"linear_num_value_heads": 3},
            r"linear_num_value_heads is 3, expected a multiple of linear_num_key_heads = 2",
        ),
        ({"num_key_value_heads": 3}, r"num_attention_heads is 4, expected a multiple of num_key_value_heads = 3"),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu', expected 'silu'"),
        ({"attn_output_gate": False}, r"attn_output_gate is False"),
        ({"rope_parameters": None}, r"rope_parameters is missing, expected an object"),
        ({"eos_token_id": "x"}, r"eos_token_id is 'x'"),
        ({"eos_token_id": [1, 10**400]}, r"eos_token_id is \[1, 1000"),
        ({"eos_token_id": True}, r"eos_token_id is True"),
        *(({"rms_norm_eps": x}, r"rms_norm_eps is .*, expected a number above") for x in (NAN, INF, 0, -1, 10**400)),
        ({"rms_norm_eps": True}, r"rms_norm_eps is True, expected a number above"),
        ({"hidden_size": 64.0}, r"hidden_size is 64\.0, expected a whole number"),
        ({"hidden_size": 10**400}, r"hidden_size is 1000.*, expected a whole number"),
        ({"linear_key_head_dim": 1 << 19}, r"linear_key_head_dim is 524288, expected a whole number"),
        ({"attn_output_gate": 1}, r"attn_output_gate is 1, expected True"),
        ({"hidden_size": [[[[[[[1]]]]]]] * 10**5}, r"hidden_size is \[.{0,200}\.\.\.\], expected"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    values = config_values()
    values["text_config"] |= change
    with pytest.raises(ModelError, match=message):
        parse_config(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({"rope_type": x}, f"rope_type is '{x}', expected")
            for x in ("dynamic", "longrope", "llama3", "proportional")
        ),
        ({"rope_type": ["yarn"]}, "rope_type is \\['yarn'\\], expected"),
        ({"type": "llama3", "rope_type": None}, "rope_type is 'llama3', expected"),
        ({"rope_type": "yarn"}, "factor is missing"),
        ({"rope_type": "linear"}, "factor is missing"),
        ({"factor": 4.0}, "factor is 4.0, but no rope_type says what it scales"),
        *(
            ({"rope_type": kind, "factor": x}, "a number above .* and at most 1024")
            for kind in ("yarn", "linear")
            for x in (NAN, INF, 0.5, "4", True, 1e9)
        ),
        ({"rope_type": "yarn", "factor": 4, "beta_fast": 0.5}, "beta_fast is 0.5, expected at least beta_slow = 1"),
        ({"rope_type": "yarn", "factor": 4, "truncate": 1}, "truncate is 1, expected a value of type bool"),
        ({"rope_type": "yarn", "factor": 4, "long_factor": [1.0]}, "long_factor is not known to edgeq"),
        ({"mrope_section": [1, 1]}, "three numbers that add up to 4"),
        ({"mrope_section": [2, 2, 1]}, "three numbers that add up to 4"),
        ({"mrope_section": [4, 0, True]}, "mrope_section is True, expected a whole number from 0 to 4"),
        ({"mrope_section": [4, 0, 0.0]}, "mrope_section is 0.0, expected a whole number"),
        ({"mrope_section": [10**400, 1, 1]}, "mrope_section is 1000.*, expected a whole number"),
        ({"mrope_section": [-1, 4, 1]}, "mrope_section is -1, expected a whole number"),
        ({"partial_rotary_factor": 0.01}, "an even rotary width"),
        *(({"partial_rotary_factor": x}, "a number above 0 and at most 1") for x in (7.0, NAN, INF, 0, -0.5, 10**400)),
        *(({"rope_theta": x}, "a number above 1 and at most") for x in (NAN, INF, -INF, 1, 10**400, True, "1e6")),
    ],
)
def test_rope_is_checked(change: dict[str, Any], message: str) -> None:
    values = config_values()
    values["text_config"]["rope_parameters"] |= change
    with pytest.raises(ModelError, match=message):
        parse_config(values)


@pytest.mark.parametrize("value", [True, -1, 1.0, "7", 10**400, [3]])
def test_ids_of_images_are_ids(value: object) -> None:
    with pytest.raises(ModelError, match=r"config\.json: image_token_id is .*, expected a whole number"):
        parse_config(config_values(vision=True) | {"image_token_id": value})


def test_another_architecture() -> None:
    with pytest.raises(ModelError, match="model_type is 'llama', expected 'qwen3_5'") as caught:
        parse_config({"model_type": "llama"})
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("content", ["{", "[]", '"x"', "\xff", "[" * 100_000])
def test_a_file_that_is_no_json_object(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(tmp_path / "config.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_change_is_understood_or_refused(data: st.DataObject) -> None:
    values = copy.deepcopy(config_values(vision=True))
    section = data.draw(st.sampled_from([values, values["text_config"], values["vision_config"]]))
    section[data.draw(st.sampled_from(sorted(section)))] = data.draw(json_values)
    try:
        parse_config(json.loads(json.dumps(values)))
    except ModelError as error:
        assert "\n" not in error.message


class TestRopeScaling:
    """The same scaling in every spelling that people have is read, or refused; never ignored."""

    YARN: ClassVar[dict[str, Any]] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    OLD: ClassVar[dict[str, Any]] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}

    @staticmethod
    def spelled(change: Callable[[dict[str, Any], dict[str, Any]], None], *, text_only: bool = False) -> RopeConfig:
        values = config_values()
        text = values["text_config"]
        change(values, text)
        return parse_config(text | {"model_type": "qwen3_5_text"} if text_only else values).text.rope

    def expected(self) -> RopeConfig:
        return self.spelled(lambda values, text: text["rope_parameters"].update(self.YARN))

    def test_in_rope_parameters(self) -> None:
        scaling = self.expected().scaling
        assert scaling == Yarn(4.0, 1024, 0.1 * log(4) + 1)

    @pytest.mark.parametrize("text_only", [False, True])
    @pytest.mark.parametrize("said", ["YARN", "OLD"])
    def test_beside_rope_parameters(self, said: str, text_only: bool) -> None:
        change = lambda values, text: text.update(rope_scaling=getattr(self, said))  # noqa: E731
        assert self.spelled(change, text_only=text_only) == self.expected()

    @pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
    def test_at_the_top(self, key: str) -> None:
        assert self.spelled(lambda values, text: values.update({key: self.OLD})) == self.expected()

    @pytest.mark.parametrize("top", [False, True])
    def test_as_transformers_4_wrote_it(self, top: bool) -> None:
        def change(values: dict[str, Any], text: dict[str, Any]) -> None:
            rope, place = text.pop("rope_parameters"), values if top else text
            for key in ("rope_theta", "partial_rotary_factor"):
                place[key] = rope.pop(key)
            place["rope_scaling"] = rope | {"rope_type": None} | self.OLD

        assert self.spelled(change) == self.expected()

    def test_null_is_nothing(self) -> None:
        assert self.spelled(lambda values, text: text.update(rope_scaling=None)).scaling is None

    def test_older_multimodal_type(self) -> None:
        change = lambda values, text: text.update(rope_scaling={"type": "mrope", "mrope_section": [2, 1, 1]})  # noqa: E731
        assert self.spelled(change) == self.spelled(lambda values, text: None)

    def test_two_ways_are_refused(self) -> None:
        def change(values: dict[str, Any], text: dict[str, Any]) -> None:
            text["rope_parameters"] |= self.YARN
            values["rope_scaling"] = {"type": "linear", "factor": 2.0}

        with pytest.raises(ModelError, match=r"rope_parameters.* and .*rope_scaling.* two ways"):
            self.spelled(change)

    def test_the_factor_may_follow_from_the_two_lengths(self) -> None:
        yarn = {key: value for key, value in self.YARN.items() if key != "factor"}
        rope = self.spelled(lambda values, text: text["rope_parameters"].update(yarn))  # 4096 tokens
        assert rope == self.expected()

    def test_the_context_grows_with_the_factor(self) -> None:
        values = config_values(max_position_embeddings=1024)
        values["text_config"]["rope_scaling"] = {"type": "yarn", "factor": 4.0}
        assert parse_config(values).text.longest_context == 4096

    @pytest.mark.parametrize(
        ("asked", "scaling", "longest"),
        [("yarn:4", Yarn(4.0, 4096, 0.1 * log(4) + 1), 16384), ("linear:2", Linear(2.0), 8192), ("none", None, 4096)],
    )
    def test_stretched_on_request(self, asked: str, scaling: object, longest: int) -> None:
        text = stretched(parse_config(config_values()), asked).text
        assert (text.rope.scaling, text.longest_context) == (scaling, longest)

    @pytest.mark.parametrize(
        "asked", ["", "yarn", "yarn:", "yarn:x", "yarn:0.5", "yarn:nan", "llama3:8", "none:2", "4"]
    )
    def test_a_wrong_request(self, asked: str) -> None:
        with pytest.raises(UsageError, match="a rope scaling is yarn:FACTOR, linear:FACTOR or none"):
            stretched(parse_config(config_values()), asked)
