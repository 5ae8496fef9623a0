"""`ak.as_peft(model)`: names, configs, files and calls are PEFT's own, and the adapters are the model's."""

from __future__ import annotations

import copy
import pickle
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from tests.models import MODELS, assert_same_outputs, build
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import adapterkit as ak
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig
from adapterkit_vera import VeraConfig

PAIRS: dict[str, tuple[Any, Any]] = {
    "lora": (LoraConfig, peft.LoraConfig),
    "loha": (LoHaConfig, peft.LoHaConfig),
    "vera": (VeraConfig, peft.VeraConfig),
}
PLACES = {
    "layers": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "layers and a head": ("llama", {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}),
    "a head of several layers": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
}


def both(method: str, place: str) -> tuple[Any, Any]:
    """A view, and PEFT's own model of the same config."""
    name, fields = PLACES[place]
    ours, theirs = PAIRS[method]
    model = build(name)
    ak.attach(model).add("default", ours(r=2, **fields))
    return ak.as_peft(model), peft.get_peft_model(build(name), theirs(r=2, **fields))


def view(**fields: Any) -> tuple[Any, ak.Adapters]:
    model = build("llama")
    adapters = ak.attach(model)
    adapters.add("default", LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **fields}))
    return ak.as_peft(model), adapters


def out(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**MODELS["llama"].inputs()).logits
    return result


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", PAIRS)
def test_parameters_have_the_names_that_peft_gives_them(method: str, place: str) -> None:
    ours, theirs = both(method, place)
    found = {name: (p.shape, p.requires_grad) for name, p in ours.named_parameters()}
    assert found == {name: (p.shape, p.requires_grad) for name, p in theirs.named_parameters()}
    assert all(ours.get_parameter(name) is parameter for name, parameter in ours.named_parameters())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", PAIRS)
def test_a_state_dict_has_the_keys_of_peft_and_goes_back(method: str, place: str) -> None:
    ours, theirs = both(method, place)
    state, expected = ours.state_dict(), theirs.state_dict()
    again = {key for key in expected if ".vera_A." in key or ".vera_B." in key}  # PEFT's layers list shared tensors too
    assert state.keys() == expected.keys() - {key for key in again if not key.startswith("base_model.vera_")}
    assert str(ours.load_state_dict(expected)) == "<All keys matched successfully>"
    other = {key: torch.randn_like(value) for key, value in state.items()}
    assert str(ours.load_state_dict(other)) == "<All keys matched successfully>"
    assert all(torch.equal(value, other[key]) for key, value in ours.state_dict().items())


def test_a_state_dict_names_what_it_lacks_as_peft_does() -> None:
    ours, _ = view()
    state = ours.state_dict()
    key = next(key for key in state if ".lora_A." in key)
    del state[key]
    state["base_model.model.other"] = torch.zeros(1)
    assert ours.load_state_dict(state, strict=False) == ([key], ["base_model.model.other"])


@pytest.mark.parametrize("method", PAIRS)
def test_configs_are_those_that_peft_keeps(method: str) -> None:
    ours, theirs = both(method, "layers and a head")
    found, expected = ours.peft_config["default"], theirs.peft_config["default"]
    assert type(found) is type(expected)
    assert found.to_dict() == expected.to_dict()
    assert ours.peft_config["default"] is found


def test_a_method_that_peft_lacks_has_a_config_that_makes_it_again() -> None:
    ours, adapters = view()
    config = LoraConfig(r=3, target_modules=["v_proj"])
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(peft.PEFT_TYPE_TO_CONFIG_MAPPING, "LORA")
        adapters.add("other", config, activate=False)
        made = ours.peft_config["other"]
    assert (made.r, made.peft_type, type(made).__mro__[1]) == (3, "LORA", peft.PeftConfig)
    ours.add_adapter("again", made)
    assert adapters.config("again").r == 3


def test_the_view_and_the_adapters_are_one_thing() -> None:
    ours, adapters = view()
    assert ak.attach(ours) is adapters
    assert ak.as_peft(ours) is ours
    assert isinstance(ours, peft.PeftModel)
    assert ours.get_base_model() is adapters.model
    adapters.add("other", LoraConfig(r=2, target_modules=["v_proj"]))
    assert ours.active_adapter == "other"
    assert [*ours.peft_config] == ["default", "other"]
    ours.set_adapter("default")
    assert adapters.active == adapters.trainable == ("default",)
    ours.delete_adapter("other")
    assert adapters.names == ("default",)


def test_an_added_adapter_does_not_act_yet() -> None:
    ours, adapters = view()
    before = out(ours)
    ours.add_adapter("other", peft.LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False))
    assert adapters.active == adapters.trainable == ("default",)
    assert torch.equal(out(ours), before)
    ours.set_adapter("other")
    assert not torch.equal(out(ours), before)


def test_a_reference_adapter_starts_as_a_copy() -> None:
    ours, adapters = view()
    ours.add_adapter("ref", ours.peft_config["default"])
    expected = adapters.state_dict("default")
    assert all(torch.equal(value, expected[key]) for key, value in adapters.state_dict("ref").items())


def test_the_adapter_that_is_left_becomes_active() -> None:
    ours, adapters = view()
    ours.add_adapter("other", ours.peft_config["default"])
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        ours.delete_adapter("default")
    assert adapters.active == ("other",)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_peft_reads_what_the_view_saves_and_the_other_way(safe: bool, tmp_path: Path) -> None:
    ours, _ = view(modules_to_save=["lm_head"])
    ours.add_adapter("other", peft.LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False))
    ours.save_pretrained(tmp_path / "ours", safe_serialization=safe)
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "ours")
    theirs.load_adapter(tmp_path / "ours" / "other", "other")
    torch.testing.assert_close(out(theirs), out(ours))
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=safe)
    again, _ = view(modules_to_save=["lm_head"])
    assert again.load_adapter(tmp_path / "theirs", "default") == ([], [])
    assert again.load_adapter(tmp_path / "theirs" / "other", "other") == ([], [])
    for name in ("default", "other"):
        ours.set_adapter(name)
        again.set_adapter(name)
        torch.testing.assert_close(out(again), out(ours))
    assert (tmp_path / "ours" / "README.md").read_text().startswith("---")


def test_only_selected_adapters_are_saved(tmp_path: Path) -> None:
    ours, _ = view()
    ours.add_adapter("other", ours.peft_config["default"])
    ours.save_pretrained(tmp_path, selected_adapters=["other"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "other"]
    with pytest.raises(ValueError, match="selected_adapters"):
        ours.save_pretrained(tmp_path, selected_adapters=["none"])


def test_a_file_that_lacks_tensors_says_which(tmp_path: Path) -> None:
    view(target_modules=["v_proj"])[1].save("default", tmp_path)
    ours, adapters = view(target_modules=["q_proj", "v_proj"])
    with pytest.warns(ak.AdapterWarning, match="missing"):
        result = ours.load_adapter(tmp_path, "default")
    lacking = {name for name, _ in ours.named_parameters() if "q_proj.lora_" in name}
    assert set(result.missing_keys) == lacking
    other = build("llama", seed=1)
    ak.attach(other).add("t", LoraConfig(r=3, target_modules=["v_proj"]))
    ak.attach(other).save("t", tmp_path)
    before = adapters.state_dict("default")
    with pytest.raises(RuntimeError, match="size mismatch"):
        ours.load_adapter(tmp_path, "default")
    assert all(torch.equal(value, before[key]) for key, value in adapters.state_dict("default").items())


def test_a_config_makes_a_view_in_get_peft_model() -> None:
    made = peft.get_peft_model(build("llama"), ak.as_peft(LoraConfig(r=3, target_modules=["q_proj"])))
    assert ak.attach(made).config("default").r == 3
    assert type(made.peft_config["default"]) is peft.LoraConfig


def test_an_adapter_that_a_tool_misses_is_named_with_those_there_are() -> None:
    ours, adapters = view()
    adapters.rename("default", "sql")
    with pytest.raises(KeyError, match=r"'sql'.*adapters.rename"):
        ours.peft_config["default"]
    assert ours.peft_config.get("default") is None


def test_a_model_without_adapters_has_no_view() -> None:
    with pytest.raises(ak.StateError, match="Add one first"):
        ak.as_peft(build("llama"))


def test_a_peft_model_is_not_attached_to() -> None:
    theirs = peft.get_peft_model(build("llama"), peft.LoraConfig(r=2))
    with pytest.raises(ak.ConfigError, match="from_peft"):
        ak.attach(theirs)


def test_without_peft_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    _, adapters = view()
    for module in ("names", "takeover"):
        monkeypatch.setitem(sys.modules, f"adapterkit.integrations.peft_{module}", None)  # as an import of peft fails
    for call in (ak.as_peft, ak.from_peft):
        with pytest.raises(ak.UnsupportedError, match=r"adapterkit\[peft\]"):
            call(adapters.model)  # type: ignore[operator]


def test_a_view_is_the_class_that_peft_has_for_the_task() -> None:
    ours, _ = view(task_type="CAUSAL_LM")
    assert isinstance(ours, peft.PeftModelForCausalLM)
    assert type(view()[0]).__mro__[1] is peft.PeftModel
    rows = MODELS["llama"].inputs()
    arguments = {"attention_mask": torch.ones(2, 6), "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(**rows, **arguments), ours.get_base_model().generate(**rows, **arguments))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_copies_and_pickles_of_a_view_are_views_of_their_own(copied: Any) -> None:
    ours, adapters = view(task_type="CAUSAL_LM")
    other = copied(ours)
    assert type(other) is type(ours)
    assert ak.attach(other) is not adapters
    expected = out(ours)
    adapters.activate()
    torch.testing.assert_close(out(other), expected)
    assert other.active_adapter == "default"


def test_a_folder_that_is_saved_again_holds_no_state_of_an_earlier_training(tmp_path: Path) -> None:
    ours, adapters = view(init_lora_weights="pissa")
    ours.save_pretrained(tmp_path, state_dict=None)
    with torch.no_grad():
        for parameter in adapters.parameters("default"):
            parameter.add_(1.0)
    expected = out(ours)
    ours.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    torch.testing.assert_close(out(again), expected)
    assert not (tmp_path / "adapter_state.safetensors").exists()


def test_a_checkpoint_of_a_training_gives_back_what_its_file_changes(tmp_path: Path) -> None:
    ours, adapters = view(init_lora_weights="pissa")
    with torch.no_grad():
        for parameter in adapters.parameters("default"):
            parameter.add_(0.1)
    ours.save_pretrained(tmp_path, state_dict=None)
    again, others = view(init_lora_weights="pissa")
    assert again.load_adapter(tmp_path, "default", is_trainable=True) == ([], [])
    for one, other in zip(adapters.parameters("default"), others.parameters("default"), strict=True):
        assert torch.equal(one, other)


def test_an_adapter_gets_the_dtype_and_the_device_that_peft_gives_it() -> None:
    ours, adapters = view()
    adapters.model.to(torch.bfloat16)
    config = peft.LoraConfig(r=2, target_modules=["v_proj"])
    ours.add_adapter("wide", config)
    ours.add_adapter("same", config, autocast_adapter_dtype=False)
    ours.add_adapter("empty", config, low_cpu_mem_usage=True)
    found = {name: {(p.dtype, p.device.type) for p in adapters.parameters(name)} for name in ("wide", "same", "empty")}
    assert found["wide"] == {(torch.float32, "cpu")}
    assert found["same"] == {(torch.bfloat16, "cpu")}
    assert {device for _, device in found["empty"]} == {"meta"}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", PAIRS)
def test_the_functions_of_peft_see_layers_and_heads(method: str, place: str) -> None:
    ours, theirs = both(method, place)
    found, expected = (peft.get_peft_model_state_dict(model) for model in (ours, theirs))
    assert found.keys() == expected.keys()
    other = {key: torch.randn_like(value) for key, value in found.items()}
    result = peft.set_peft_model_state_dict(ours, other)
    assert not result.unexpected_keys
    assert all(torch.equal(value, other[key]) for key, value in peft.get_peft_model_state_dict(ours).items())
    assert [vars(row) for row in ours.get_layer_status()] == [vars(row) for row in theirs.get_layer_status()]
    found, expected = (vars(model.get_model_status()) for model in (ours, theirs))
    assert found | {"adapter_model_type": ""} == expected | {"adapter_model_type": ""}


def test_the_state_dict_of_one_adapter_does_not_ask_for_another_that_trains() -> None:
    ours, adapters = view()
    ours.add_adapter("other", ours.peft_config["default"])
    state = {key: value + 1 for key, value in peft.get_peft_model_state_dict(ours, adapter_name="other").items()}
    peft.set_peft_model_state_dict(ours, state, adapter_name="other")
    assert all(torch.equal(value, state[key]) for key, value in adapters.state_dict("other").items())


def test_adapted_modules_have_the_names_of_tuner_layers() -> None:
    ours, adapters = view()
    layer = ours.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight is adapters.layers("default")["model.layers.0.self_attn.q_proj"].lora_A.weight
    assert layer.base_layer.weight is layer.weight
    rows = torch.randn(2, 16)
    assert torch.equal(layer.base_layer(rows), torch.nn.functional.linear(rows, layer.weight))
    assert layer.active_adapters == ["default"]
    assert not hasattr(layer, "lora_C")
    adapters.add("later", LoraConfig(r=2, target_modules=["v_proj"]), activate=False)
    assert "later" in ours.base_model.model.model.layers[0].self_attn.v_proj.lora_A
    adapters.detach()
    assert type(layer) is torch.nn.Linear


@pytest.mark.parametrize("method", PAIRS)
def test_torch_gathers_a_view_and_its_optimizer_and_gives_both_back(method: str) -> None:
    ours, _ = both(method, "layers and a head")
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad])
    ours(**MODELS["llama"].inputs()).logits.sum().backward()
    optimizer.step()
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    model = get_model_state_dict(ours, options=StateDictOptions(ignore_frozen_params=True))
    state = get_optimizer_state_dict(ours, optimizer)
    assert state["state"].keys() == trained
    assert trained <= model.keys()
    again, _ = both(method, "layers and a head")
    second = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad])
    set_model_state_dict(again, model, options=StateDictOptions(strict=False))
    set_optimizer_state_dict(again, second, state)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name)), name
    for name in trained:
        found, expected = second.state[again.get_parameter(name)], optimizer.state[ours.get_parameter(name)]
        assert torch.equal(found["exp_avg"], expected["exp_avg"])


def test_a_compiled_model_with_a_view_has_one_graph() -> None:
    ours, adapters = view()
    compiled = torch.compile(adapters.model, backend="eager", fullgraph=True)
    torch.testing.assert_close(out(compiled), out(ours))


def test_a_config_of_peft_for_a_task_trains_the_head_as_peft_does() -> None:
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    theirs = peft.get_peft_model(build("bert"), copy.deepcopy(config))
    made = peft.get_peft_model(build("bert"), ak.as_peft(LoraConfig(r=2, target_modules=["query"])))
    made.add_adapter("other", config)
    made.set_adapter("other")
    trained = [{n for n, p in model.named_parameters() if p.requires_grad} for model in (theirs, made)]
    assert {name.replace(".default.", ".other.") for name in trained[0]} == trained[1]


def test_modules_to_save_names_the_modules_that_it_names_in_peft() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    theirs, (ours, _) = peft.get_peft_model(build("llama"), copy.deepcopy(config), adapter_name="other"), view()
    ours.add_adapter("other", config)
    ours.set_adapter("other")
    trained = [{n for n, p in model.named_parameters() if p.requires_grad} for model in (ours, theirs)]
    assert trained[0] == trained[1]
    assert any("input_layernorm" in name for name in trained[0])


def test_an_adapter_of_a_config_for_inference_does_not_train() -> None:
    made = type(view()[0])(build("llama"), peft.LoraConfig(target_modules=["q_proj"], inference_mode=True))
    assert made.adapters.active == ("default",)
    assert not made.adapters.trainable
    assert made.peft_config["default"].inference_mode


def test_from_pretrained_gives_a_view_or_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    ours, adapters = view(r=4)
    ours.save_pretrained(tmp_path)
    again = type(ours).from_pretrained(build("llama"), tmp_path)
    torch.testing.assert_close(out(again), out(ours))
    assert not ak.attach(again).trainable
    weights = adapters.state_dict("default")
    key = next(iter(weights))
    safetensors.torch.save_file(weights | {key: weights[key][:2].clone()}, tmp_path / "adapter_model.safetensors")
    bare = build("llama")
    with pytest.warns(ak.AdapterWarning), pytest.raises(RuntimeError, match="size mismatch"):
        type(ours).from_pretrained(bare, tmp_path)
    assert not ak.attach(bare).names


def test_a_config_that_peft_refuses_is_one_of_its_method(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: Any) -> None:
        raise ValueError("PEFT's own class wants more")

    monkeypatch.setattr(peft.LoraConfig, "__post_init__", refuse)
    ours, _ = view()
    config = ours.peft_config["default"]
    assert type(config).__mro__[1] is peft.PeftConfig
    assert config.to_dict()["r"] == 2


def test_a_view_without_adapters_says_so(tmp_path: Path) -> None:
    adapters = ak.attach(build("bert"))
    adapters.add("a", ak.config("lora", r=2, target_modules=["query"], modules_to_save=None))
    view = ak.as_peft(adapters.model)
    adapters.remove("a")
    with pytest.raises(ak.StateError, match=r"no adapters any more. view.get_base_model\(\)"):
        view.save_pretrained(tmp_path)


def test_attach_to_adapters_names_their_model() -> None:
    with pytest.raises(ak.ConfigError, match=r"not a Adapters\. These are adapters already, and adapters.model is"):
        ak.attach(ak.attach(build("bert")))  # type: ignore[arg-type]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", PAIRS)
def test_the_state_dict_of_the_base_has_its_own_keys_and_goes_back(method: str, place: str) -> None:
    ours, _ = both(method, place)
    ours.add_adapter("other", ours.peft_config["default"])
    expected = build(PLACES[place][0]).state_dict()
    found = peft.get_base_model_state_dict(ours)
    assert found.keys() == expected.keys()
    adapters = {name: value.clone() for name, value in ours.state_dict().items()}
    other = {key: torch.randn_like(value) for key, value in found.items()}
    with pytest.warns(ak.AdapterWarning, match="'default' stays as it is"):
        assert peft.set_base_model_state_dict(ours, other) == ([], [])
    assert all(torch.equal(value, other[key]) for key, value in peft.get_base_model_state_dict(ours).items())
    trained = [name for name, parameter in ours.named_parameters() if parameter.requires_grad]
    assert all(torch.equal(ours.get_parameter(name), adapters[name]) for name in trained)


def test_peft_swaps_a_folder_into_an_adapter_of_a_view(tmp_path: Path) -> None:
    other, _ = view(r=2, lora_alpha=12, rank_pattern={"layers.1.self_attn.q_proj": 3})
    other.save_pretrained(tmp_path)
    ours, adapters = view(r=4, target_modules=["q_proj", "v_proj"])
    memory = [parameter.data_ptr() for parameter in adapters.parameters("default")]
    prepare_model_for_compiled_hotswap(ours, target_rank=4)
    compiled = torch.compile(ours, backend="eager")
    before = out(compiled)
    hotswap_adapter(compiled, str(tmp_path), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(out(compiled), out(other))
    assert not torch.allclose(out(ours), before)
    assert [parameter.data_ptr() for parameter in adapters.parameters("default")] == memory


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True, "lora_dropout": 0.1},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"layers.0.self_attn.q_proj": 5}},
    ],
)
def test_peft_makes_room_for_larger_ranks_in_a_view(fields: Any, tmp_path: Path) -> None:
    other, _ = view(**{**fields, "r": 8, "lora_alpha": 3})
    other.save_pretrained(tmp_path / "other")
    ours, adapters = view(r=4, **fields)
    before, flags = out(ours), [p.requires_grad for p in adapters.parameters("default")]
    ours.save_pretrained(tmp_path / "ours")
    prepare_model_for_compiled_hotswap(ours, target_rank=8)
    torch.testing.assert_close(out(ours), before)
    assert {layer.r for layer in adapters.layers("default").values()} == {8}
    assert [p.requires_grad for p in adapters.parameters("default")] == flags
    assert adapters.config("default").lora_dropout == fields.get("lora_dropout", 0.0)
    adapters.save("default", tmp_path / "padded")
    again = build("llama")
    ak.attach(again).load(tmp_path / "padded", "default")
    torch.testing.assert_close(out(again), before)
    for folder, expected in (("other", out(other)), ("ours", before)):
        hotswap_adapter(ours, str(tmp_path / folder), adapter_name="default", torch_device="cpu")
        torch.testing.assert_close(out(ours), expected)


def test_pefts_swap_of_a_larger_rank_makes_room_for_it(tmp_path: Path) -> None:
    other, _ = view(r=8)
    other.save_pretrained(tmp_path)
    ours, _ = view(r=4)
    hotswap_adapter(ours, str(tmp_path), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(out(ours), out(other))


def test_what_peft_cannot_swap_into_a_view_changes_nothing(tmp_path: Path) -> None:
    other, _ = view(r=8, target_modules=["q_proj", "v_proj"])
    other.save_pretrained(tmp_path)
    ours, adapters = view(r=4)
    before, parameters, config = out(ours), [*adapters.parameters("default")], adapters.config("default")
    with pytest.raises(RuntimeError, match="v_proj"):
        hotswap_adapter(ours, str(tmp_path), adapter_name="default", torch_device="cpu")
    with pytest.raises(ValueError, match="larger"):
        prepare_model_for_compiled_hotswap(ours, target_rank=2)
    layer = ours.base_model.model.model.layers[0].self_attn.q_proj
    with pytest.raises(ak.UnsupportedError, match="strengths"):
        layer.r["default"] = 2
    assert torch.equal(out(ours), before)
    assert all(one is other for one, other in zip(adapters.parameters("default"), parameters, strict=True))
    assert adapters.config("default") is config
    ours.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        hotswap_adapter(ours, str(tmp_path), adapter_name="default", torch_device="cpu")
    loha, _ = both("loha", "layers")
    with pytest.raises(ak.UnsupportedError, match="LoRA alone"):
        prepare_model_for_compiled_hotswap(loha, target_rank=4)


def test_pefts_swap_of_an_adapter_with_a_head_says_what_to_call(tmp_path: Path) -> None:
    ours, adapters = view(modules_to_save=["lm_head"])
    ours.save_pretrained(tmp_path)
    with pytest.raises(ak.UnsupportedError, match=r"swap\('default', folder\)"):
        hotswap_adapter(ours, str(tmp_path), adapter_name="default", torch_device="cpu")
    adapters.swap("default", tmp_path)


def test_pefts_own_models_are_still_swapped_by_peft(tmp_path: Path) -> None:
    _, theirs = both("lora", "layers")
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        before = out(theirs)
        for parameter in theirs.parameters():
            parameter.add_(parameter.requires_grad)
    prepare_model_for_compiled_hotswap(theirs, target_rank=4)
    hotswap_adapter(theirs, str(tmp_path), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(out(theirs), before)
    assert any(".lora_A." in key for key in theirs.state_dict())
    assert not any("lora" in key for key in peft.get_base_model_state_dict(theirs))


LAYER = "base_model.model.model.layers.{}.self_attn.q_proj"


def layers_of(*models: Any) -> list[list[Any]]:
    return [[model.get_submodule(LAYER.format(i)) for i in range(2)] for model in models]


def trained_pair(other: bool = False) -> tuple[Any, Any]:
    """A view and PEFT's own model with the same numbers, the base's random biases too."""
    fields = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
    ours, theirs = view()[0], peft.get_peft_model(build("llama"), peft.LoraConfig(**fields)).eval()
    for model in (ours, theirs) if other else ():
        model.add_adapter("other", peft.LoraConfig(**fields))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_adapted_modules_are_instances_of_the_layers_and_tuners_of_peft() -> None:
    ours, theirs = trained_pair()
    for own, its in zip(*layers_of(ours, theirs), strict=True):
        assert isinstance(own, torch.nn.Linear)
        assert isinstance(own, type(its))
        assert repr(own).startswith("lora.Linear(")
    assert sum(isinstance(m, peft.tuners.lora.LoraLayer) for m in ours.modules()) == 2
    assert isinstance(ours.base_model, peft.LoraModel)
    ours.adapters.add("loha", LoHaConfig(r=2, target_modules=["v_proj"]))
    v_proj = ours.base_model.model.model.layers[0].self_attn.v_proj
    assert isinstance(v_proj, peft.tuners.loha.LoHaLayer)
    assert not isinstance(v_proj, peft.tuners.lora.LoraLayer)
    ours.adapters.detach()
    assert type(v_proj) is torch.nn.Linear
    gpt2 = build("gpt2")
    ak.attach(gpt2).add("default", LoraConfig(r=2, target_modules=["c_attn"]))
    ak.as_peft(gpt2)
    assert isinstance(gpt2.transformer.h[0].attn.c_attn, peft.tuners.lora.Linear)


def test_embeddings_that_cannot_be_found_are_warned_of_when_they_are_to_be_saved(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    ak.attach(model).add("default", LoraConfig(r=2, target_modules=["0"]))
    with pytest.warns(UserWarning, match="Could not identify embedding layer"):
        ak.as_peft(model).save_pretrained(tmp_path, save_embedding_layers=True)
    assert ak.inspect_adapter(tmp_path).layers


def test_modules_has_the_containers_of_peft() -> None:
    for method in PAIRS:
        ours, theirs = both(method, "layers")
        ours.add_adapter("other", ours.peft_config["default"])
        found = dict(ours.named_modules())
        filled = {name: m for name, m in theirs.named_modules() if hasattr(m, "keys") and "default" in m}
        expected = {name for name in filled if "vera_A" not in name and "vera_B" not in name and "dropout" not in name}
        assert expected <= found.keys()
        assert all("default" in found[name] and "other" in found[name] for name in expected)
        assert len({id(p) for p in ours.parameters()}) == len([*ours.parameters()])


def rescaled(model: Any, layers: Any) -> None:
    before = out(model)
    with peft.helpers.rescale_adapter_scale(model, 0.5):
        assert not torch.allclose(out(model), before)
    layers[0].set_scale("default", 0.5)


def disabled(model: Any, layers: Any) -> None:
    with model.disable_adapter():
        assert_same_outputs(out(model), out(build("llama")))
        assert model.active_adapter == "default"


def disabled_with_a_layer_off(model: Any, layers: Any) -> None:
    layers[0].enable_adapters(False)
    with pytest.warns(UserWarning, match="some adapter layers that are enabled"), model.disable_adapter():
        pass


def set_while_disabled(model: Any, layers: Any) -> None:
    with model.disable_adapter():
        model.set_adapter("other")
        assert_same_outputs(out(model), out(build("llama")))
        assert model.active_adapter == "other"


def set_between_disabling_and_enabling(model: Any, layers: Any) -> None:
    model.base_model.disable_adapter_layers()
    model.set_adapter("other")
    assert_same_outputs(out(model), out(build("llama")))
    model.base_model.enable_adapter_layers()


def deleted_while_disabled(model: Any, layers: Any) -> None:
    model.add_adapter("third", peft.LoraConfig(target_modules=["q_proj"]))
    with model.disable_adapter():
        model.delete_adapter("third")
        model.set_adapter("other")
        model.set_adapter("default")


def set_after_a_merge(model: Any, layers: Any) -> None:
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Adapter cannot be set when the model is merged. Unmerging the model first"):
        model.set_adapter("other")


def scaled_while_it_waits(model: Any, layers: Any) -> None:
    layers[0].set_scale("other", 2.0)
    layers[1].scale_layer(3.0)
    model.set_adapter("other")
    layers[0].scale_layer(0.5)
    model.set_adapter("default")


def set_alone_and_then_together(model: Any, layers: Any) -> None:
    layers[0].scale_layer(2.0)
    layers[1].set_adapter("other")
    model.set_adapter("default")
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()


CALLS: dict[str, Any] = {
    "one layer off": lambda model, layers: layers[0].enable_adapters(False),
    "one layer off and on": lambda model, layers: [layers[0].enable_adapters(flag) for flag in (False, True)],
    "another adapter at one layer": lambda model, layers: layers[1].set_adapter("other"),
    "both adapters at one layer": lambda model, layers: layers[1].set_adapter(["default", "other"]),
    "flags at one layer": lambda model, layers: layers[1].set_requires_grad(["default"], False),
    "one layer scaled": lambda model, layers: layers[0].scale_layer(2.0),
    "one layer scaled and unscaled": lambda model, layers: [
        (layer.scale_layer(3.0), layer.unscale_layer(number)) for layer, number in zip(layers, (2.0, None), strict=True)
    ],
    "set_scale": lambda model, layers: layers[0].set_scale("default", 0.5),
    "scaling.update": lambda model, layers: layers[1].scaling.update(default=3.0),
    "scaling of zero": lambda model, layers: layers[0].scaling.__setitem__("default", 0.0),
    "rescale_adapter_scale": rescaled,
    "disabled": disabled,
    "disabled with a layer off": disabled_with_a_layer_off,
    "set while disabled": set_while_disabled,
    "set between disabling and enabling": set_between_disabling_and_enabling,
    "deleted while disabled": deleted_while_disabled,
    "set after a merge": set_after_a_merge,
    "scaled while it waits": scaled_while_it_waits,
    "set alone and then together": set_alone_and_then_together,
}


@pytest.mark.filterwarnings("ignore:All adapters are already merged", "ignore:Adapter cannot be set")  # PEFT's layers
@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_calls_that_change_what_acts_leave_what_they_leave_in_peft(calls: Any) -> None:
    ours, theirs = trained_pair(other=True)
    for model, layers in zip((ours, theirs), layers_of(ours, theirs), strict=True):
        calls(model, layers)
    assert_same_outputs(out(ours), out(theirs))
    flags = [{name: p.requires_grad for name, p in model.named_parameters()} for model in (ours, theirs)]
    assert flags[0] == flags[1]
    for own, its in zip(*layers_of(ours, theirs), strict=True):
        assert own.disable_adapters == its.disable_adapters
        assert own.scaling == its.scaling
        torch.testing.assert_close(own.get_delta_weight("default"), its.get_delta_weight("default"))
    for call in (ours.merge_adapter, ours.unmerge_adapter):
        call()
        assert_same_outputs(out(ours), out(theirs))


def test_every_dropout_of_a_tool_includes_those_of_adapters() -> None:
    for method, name in (("lora", "lora_dropout"), ("vera", "vera_dropout")):
        model, config = build("llama"), ak.config(method, r=2, target_modules=["q_proj"], **{name: 0.9})
        ak.attach(model).add("default", config)
        for parameter in ak.attach(model).parameters("default"):
            torch.nn.init.normal_(parameter)
        expected, ours = out(model), ak.as_peft(model).train()
        assert not torch.allclose(out(ours), expected)
        dropouts = {module for module in model.modules() if isinstance(module, torch.nn.Dropout)}
        assert dropouts <= {*ours.modules()}
        assert dropouts >= {getattr(layer, name)["default"] for layer in layers_of(ours)[0]}
        for switch in (torch.nn.Module.eval, lambda dropout: setattr(dropout, "p", 0.0)):
            ours.train()
            for dropout in dropouts:
                switch(dropout)
            torch.testing.assert_close(out(ours), expected)


def test_what_a_layer_cannot_do_alone_is_refused_and_changes_nothing() -> None:
    ours, adapters = view(modules_to_save=["lm_head"])
    ours.add_adapter("other", ours.peft_config["default"])
    layer, before = ours.get_submodule(LAYER.format(0)), out(ours)
    for call in (
        layer.merge,
        layer.unmerge,
        lambda: layer.set_adapter("other"),
        lambda: layer.delete_adapter("other"),
        lambda: setattr(layer, "r", {"default": 3}),
        lambda: setattr(layer, "merged", True),
        lambda: setattr(layer, "_active_adapter", ["other"]),
        lambda: setattr(layer, "cast_input_dtype_enabled", False),
        lambda: layer.lora_A.__setitem__("default", torch.nn.Linear(1, 1)),
        lambda: layer.lora_A.update({"default": torch.nn.Linear(1, 1)}),
        lambda: layer.lora_B.pop("default"),
        layer.lora_A.clear,
        lambda: layer.scaling.pop("default"),
        lambda: ours.base_model.model.lm_head.set_adapter("other"),
    ):
        with pytest.raises(ak.UnsupportedError, match=r"view|cannot be (set|removed)"):
            call()
    with pytest.raises(ak.UnknownNameError, match="'nothing'"):
        layer.scaling["nothing"] = 2.0
    with pytest.raises(ak.UnsupportedError, match="has a scaling of 0 here"):
        layers_of(view(lora_alpha=0)[0])[0][0].scaling["default"] = 2.0
    with pytest.raises(ak.ConfigError, match="PEFT's names of adapters have no dot"):
        ours.add_adapter("v1.0", ours.peft_config["default"])
    with pytest.raises(ValueError, match="not found"):
        layer.set_adapter("nothing")
    with pytest.raises(ValueError, match="names an adapter twice"):
        ours.set_adapter(["other", "other"])
    layer.scale_layer(2.0)
    with pytest.raises(ak.UnsupportedError, match="scaling"):
        layer.enable_adapters(False)
    layer.unscale_layer()
    assert torch.equal(out(ours), before)
    assert adapters.strengths == {"default": 1.0}


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_the_state_dict_of_one_adapter_has_its_trained_biases_as_peft_writes_them(bias: Any, tmp_path: Path) -> None:
    model = build("bert")
    adapters = ak.attach(model)
    adapters.add("default", LoraConfig(r=2, target_modules=["query"], bias=bias, modules_to_save=None))
    ours = ak.as_peft(model)
    with torch.no_grad():
        for parameter in adapters.parameters("default"):
            parameter.normal_()
    state = {key: value.clone() for key, value in peft.get_peft_model_state_dict(ours).items()}
    ours.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    theirs = peft.PeftModel.from_pretrained(build("bert"), tmp_path)
    expected = peft.get_peft_model_state_dict(theirs)
    assert {key.replace(".base_layer", "") for key in state} == {key.replace(".base_layer", "") for key in saved}
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value)
    before = {key: value.clone() for key, value in ours.get_base_model().state_dict().items() if "adapter" not in key}
    peft.set_peft_model_state_dict(ours, {key: value + 1 for key, value in state.items()})
    again = peft.get_peft_model_state_dict(ours)
    assert all(torch.allclose(value, state[key] + 1) for key, value in again.items())
    assert all(torch.equal(value, ours.get_base_model().state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"target_modules": ["nothing"]}, ValueError, "Target modules .* not found in the base model"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, ValueError, "No modules were targeted"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, ValueError, "All modules were excluded"),
        ({"target_modules": ["embed_tokens"], "lora_bias": True}, ValueError, "is not supported for Embedding"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["layers"]}, TypeError, "cannot be applied to modules of"),
    ],
)
def test_errors_have_the_class_and_the_words_of_peft_and_ours(fields: Any, kind: Any, words: str) -> None:
    ours, adapters = view()
    with pytest.raises(kind, match=words) as raised:
        ours.add_adapter("other", peft.LoraConfig(**fields))
    assert isinstance(raised.value, ak.AdapterError)
    with pytest.raises(ak.AdapterError) as own:
        adapters.add("other", LoraConfig(**fields))
    assert str(own.value) in str(raised.value)


def test_a_bias_where_the_layer_has_none_is_warned_of_and_cannot_be_merged() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True, init_lora_weights=False)
    ours, _ = view(target_modules=["v_proj"])
    with pytest.warns(UserWarning, match="the targeted layer of type Linear has no bias"):
        ours.add_adapter("other", config)
    before = out(ours)
    with pytest.raises(RuntimeError, match="Impossible to merge LoRA with `lora_bias=True`"):
        ours.merge_adapter(["other"])
    assert torch.equal(out(ours), before)


def test_what_a_config_names_in_vain_is_warned_of_in_the_words_of_peft() -> None:
    ours, _ = view()
    config = peft.LoraConfig(target_modules=["q_proj"], rank_pattern={"typo": 2}, exclude_modules=["nothing"])
    with pytest.warns(
        RuntimeWarning, match=r"rank_pattern keys did not match any targeted module .*\['typo'\]"
    ) as told:
        ours.add_adapter("other", config)
    assert len(told) == 1
    assert "no modules were excluded" in str(told[0].message)
    assert "matched nothing: exclude_modules 'nothing', rank_pattern 'typo'" in str(told[0].message)


def test_a_second_adapter_with_trained_biases_is_refused_as_by_peft_which_has_one_name_for_them() -> None:
    ours, adapters = view(bias="all")
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        ours.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"], bias="lora_only"))
    assert adapters.names == ("default",)
    ours.add_adapter("ref", ours.peft_config["default"])  # TRL's reference is a copy
    ours.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"]))
    assert adapters.names == ("default", "ref", "other")


def test_each_config_that_peft_gets_is_the_one_that_it_shows() -> None:
    ours, _ = view()
    configs = [peft.LoraConfig(target_modules="all-linear") for _ in range(2)]
    for name, config in zip("ab", configs, strict=True):
        ours.add_adapter(name, config)
        assert ours.peft_config[name] is config
    assert configs[0].target_modules == configs[1].target_modules != "all-linear"
    ours.add_adapter("c", configs[0])
    assert ours.peft_config["c"] is not configs[0]


@pytest.mark.parametrize("method", PAIRS)
def test_peft_converts_the_adapters_of_a_view_to_lora(method: str) -> None:
    ours, _ = view() if method == "lora" else (both(method, "layers")[0], None)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    assert ours.supports_lora_conversion()
    with pytest.warns(UserWarning, match="already a LoRA") if method == "lora" else nullcontext():
        config, state = peft.convert_to_lora(ours, rank=4)
    converted = peft.get_peft_model(build("llama"), config)
    assert not peft.set_peft_model_state_dict(converted, state).unexpected_keys
    torch.testing.assert_close(out(converted), out(ours), rtol=1e-4, atol=1e-4)


def test_a_layer_has_every_container_of_pefts_layer_though_it_is_empty() -> None:
    ours, _ = view(target_modules=["q_proj", "embed_tokens"])
    for module in ours.modules():
        if hasattr(module, "lora_B"):
            kinds = (module.lora_B, module.lora_embedding_B)
            assert [len(kind) for kind in kinds] in ([1, 0], [0, 1])
            weight = module.get_base_layer().weight
            assert module.get_delta_weight("default").shape == weight.shape


def test_tied_weights_are_warned_of_as_peft_does() -> None:
    model = build("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    with pytest.warns(UserWarning, match="a tied layer is part of the adapter"):
        peft.get_peft_model(model, ak.as_peft(LoraConfig(r=2, target_modules=["lm_head"])))


def test_get_peft_model_of_an_adapted_model_replaces_the_adapter_with_a_warning() -> None:
    ours, adapters = view()
    with pytest.warns(UserWarning, match="second time"), pytest.raises(ValueError, match="not found"):
        peft.get_peft_model(ours.get_base_model(), ak.as_peft(LoraConfig(target_modules=["nothing"])))
    assert adapters.config("default").r == 2
    with pytest.warns(UserWarning, match="second time"), pytest.warns(UserWarning, match="learned is gone"):
        again = peft.get_peft_model(ours.get_base_model(), ak.as_peft(LoraConfig(r=3, target_modules=["v_proj"])))
    assert again.adapters is adapters
    assert adapters.names == adapters.active == adapters.trainable == ("default",)
    assert adapters.config("default").r == 3


def test_nothing_requires_gradients_while_the_adapters_are_disabled_and_a_graph_goes_on() -> None:
    ours, adapters = view()
    loss = ours(**MODELS["llama"].inputs()).logits.square().mean()
    with ours.disable_adapter():
        assert not any(p.requires_grad for p in ours.parameters())
    loss.backward()
    assert all(p.requires_grad and p.grad is not None for p in adapters.parameters("default"))
    with pytest.raises(KeyError), ours.disable_adapter():
        raise KeyError
    assert all(p.requires_grad for p in adapters.parameters("default"))


def test_rows_name_adapters_that_there_are_and_that_are_not_merged() -> None:
    ours, _ = view()
    given = MODELS["llama"].inputs()
    with pytest.raises(ValueError, match="non-existing adapter"):
        ours(**given, adapter_names=["default", "nothing"])
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        ours(**given, adapter_names=["default"] * 3)
    ours.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        ours(**given, adapter_names=["default", "__base__"])


def test_what_a_container_has_may_be_changed_in_place() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    ak.attach(model).add("default", ak.config("vera", r=2, target_modules=["0"]))
    view = ak.as_peft(model)
    before = view.base_model.vera_A["default"].clone()
    with torch.no_grad():
        view.base_model.vera_A["default"] += 1.0
    torch.testing.assert_close(ak.as_peft(model).base_model.vera_A["default"], before + 1.0)
