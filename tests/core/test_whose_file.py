"""What a method's config says of its files: their type, their marks, and values for some layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.core.broken_methods import Outer

import adapterkit as ak
from adapterkit.contract import default_registry
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig


@dataclass(frozen=True, kw_only=True)
class DecomposedConfig(ak.AdapterConfig):
    method, peft_type, marks = "decomposed", "LORA", {"use_dora": True}
    patterns = {"rank_pattern": "r"}  # noqa: RUF012

    r: int = 8
    rank_pattern: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CoolConfig(ak.AdapterConfig):
    method, peft_type, marks = "cool", "LORA", {"use_dora": True, "kasa_config": ...}

    r: int = 8


@dataclass(frozen=True, kw_only=True)
class GeneralConfig(LoraConfig):
    """Knows the field, and does without the mark."""

    method, peft_type = "general", "LORA"

    use_dora: bool = False
    lora_alpha: float = 8
    new: int = 0


def register(*configs: type[ak.AdapterConfig]) -> None:
    for config in configs:
        ak.register(type("Method", (Outer,), {"config": config, "rule": ak.KeyRule(prefix="lora_")})())


@pytest.fixture
def third_parties() -> None:
    register(DecomposedConfig, CoolConfig)


@pytest.mark.parametrize(
    ("fields", "method"),
    [
        ({"peft_type": "LORA", "r": 4}, "lora"),
        ({"peft_type": "LORA", "r": 4, "use_dora": False, "kasa_config": None}, "lora"),
        ({"peft_type": "LORA", "r": 4, "use_dora": True}, "decomposed"),
        ({"peft_type": "LORA", "r": 4, "use_dora": True, "kasa_config": {"beta": 1}}, "cool"),
    ],
)
def test_a_file_is_the_methods_that_knows_all_its_fields_and_has_most_marks(
    third_parties: None, fields: dict[str, Any], method: str
) -> None:
    assert default_registry.claim(fields, "there").name == method


def test_of_two_methods_that_know_a_file_the_one_with_more_marks_takes_it(third_parties: None) -> None:
    register(GeneralConfig)
    fields = {"peft_type": "LORA", "r": 4, "use_dora": True}
    assert default_registry.claim(fields, "there").name == "decomposed"
    assert default_registry.claim({**fields, "new": 3}, "there").name == "general"


def test_a_file_that_no_method_takes_names_the_fields_that_each_does_not_implement(third_parties: None) -> None:
    with pytest.raises(ak.UnsupportedError) as error:
        default_registry.claim({"peft_type": "LORA", "lora_alpha": 4, "use_dora": True, "new": 3}, "there")
    for part in ("'lora' does not implement use_dora = True.", "'decomposed' does not implement lora_alpha = 4;"):
        assert part in str(error.value)


def test_a_field_that_nobody_knows_is_kept_with_a_warning(third_parties: None) -> None:
    fields = {"peft_type": "LORA", "use_dora": True, "torch_dtype": "bfloat16", "peft_version": "0.30.0", "new": None}
    with pytest.warns(ak.AdapterWarning, match="does not know torch_dtype = 'bfloat16'. It was written with PEFT 0.30"):
        method, config = default_registry.read_config(fields, "there")
    assert (method.name, config.to_dict()["torch_dtype"]) == ("decomposed", "bfloat16")


def test_a_method_whose_marks_a_file_lacks_says_so() -> None:
    register(CoolConfig)
    with pytest.raises(ak.UnsupportedError, match="'cool' needs use_dora = True, kasa_config = a value"):
        default_registry.claim({"peft_type": "LORA", "r": 4, "use_dora": True}, "there")


def test_two_methods_that_take_a_file_equally_are_both_named() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Twin(LoraConfig):
        method, peft_type = "lora_twin", "LORA"

    register(Twin)
    with pytest.raises(ak.CheckpointError, match="'lora' and 'lora_twin'"):
        default_registry.claim({"peft_type": "LORA", "r": 4}, "there")


def test_files_have_the_type_and_the_marks() -> None:
    written = DecomposedConfig(r=4).to_dict()
    assert (written["peft_type"], written["use_dora"]) == ("LORA", True)
    assert DecomposedConfig.from_dict(written) == DecomposedConfig(r=4)


def test_a_layer_has_the_values_of_the_first_pattern_that_matches() -> None:
    config = LoraConfig(r=8, rank_pattern={"query": 4, "layer.1.*": 2}, alpha_pattern={"^value": 1.5})
    assert [config.at(p).r for p in ("layer.1.query", "layer.1.value", "layer.0.value")] == [4, 2, 8]
    assert [config.at(p).lora_alpha for p in ("value", "layer.0.value")] == [1.5, 8]
    assert config.at("a.query") is config.at("b.query")
    plain = LoraConfig(r=8)
    assert plain.at("query") is plain


def test_the_value_of_a_pattern_is_checked_as_the_field_is() -> None:
    with pytest.raises(ak.ConfigError, match="rank_pattern: r = 3: init_lora_weights='orthogonal' needs an even rank"):
        LoraConfig(init_lora_weights="orthogonal", rank_pattern={"query": 3})


def test_every_method_trains_biases_and_says_which_there_are() -> None:
    assert LoHaConfig(bias="loha_only").trained_biases == "targets"
    assert DecomposedConfig(bias="lora_only").trained_biases == "targets"
    with pytest.raises(ak.ConfigError, match="bias = 'some' must be 'none' or 'all' or 'loha_only'"):
        LoHaConfig(bias="some")


def test_fields_that_pefts_config_lacks_are_written_where_they_say_something() -> None:
    assert "bias" not in LoHaConfig().to_dict()
    assert LoHaConfig(bias="all").to_dict()["bias"] == "all"
    assert LoraConfig().to_dict()["bias"] == "none"
