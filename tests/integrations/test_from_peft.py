"""`ak.from_peft`: a live PeftModel's adapters, taken over with the parameters that they have."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from tests.models import assert_same_outputs, build, inputs, run
from torch import nn

import adapterkit as ak

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "thirdparty" / "adapterkit_ia3"))
from adapterkit_ia3 import plugin as ia3

TARGETS = ["layers.0", "layers.1"]
LORA: dict[str, Any] = {"target_modules": TARGETS, "init_lora_weights": False, "r": 2}
CONFIGS = {
    "lora": lambda: LoraConfig(**LORA),
    "rslora and patterns": lambda: LoraConfig(**LORA, use_rslora=True, rank_pattern={"layers.0": 3}, lora_alpha=5),
    "lora at an embedding": lambda: LoraConfig(**{**LORA, "target_modules": ["embed", "overhead"]}),
    "lora with a bias": lambda: LoraConfig(**LORA, lora_bias=True),
    "trained biases": lambda: LoraConfig(**LORA, bias="all"),
    "biases of targets": lambda: LoraConfig(**LORA, bias="lora_only"),
    "a head": lambda: LoraConfig(**LORA, modules_to_save=["head"]),
    "an option without a value": lambda: LoraConfig(**LORA, target_parameters=[]),
    "pissa": lambda: LoraConfig(**{**LORA, "init_lora_weights": "pissa"}),
    "loha": lambda: LoHaConfig(target_modules=TARGETS, init_weights=False, r=2),
    "vera": lambda: VeraConfig(target_modules=TARGETS, init_weights=False, r=4),
    "vera without projections": lambda: VeraConfig(target_modules=TARGETS, r=4, save_projection=False),
    "ia3": lambda: IA3Config(target_modules=TARGETS, feedforward_modules=["layers.1"]),
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*has changed the weights of the base:adapterkit.AdapterWarning",
    "ignore:Specified to not save vera_A",
    "ignore:.*LoRA tensor.* have invalid shape",  # PEFT means the bias of B
)


def live(config: peft.PeftConfig) -> PeftModel:
    """A PeftModel whose adapter, head and biases have been trained."""
    model = get_peft_model(build("embednet"), config).eval()
    train(model)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, steps: int = 3) -> torch.optim.Optimizer:
    """A few steps, with the given optimizer or with one for what requires a gradient."""
    optimizer = optimizer or torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs("embednet")).square().mean().backward()
        optimizer.step()
    return optimizer


@pytest.fixture(autouse=True)
def methods() -> None:
    """IA3, which is an example, beside the methods that come with adapterkit."""
    ak.register(ia3)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_outputs_are_as_before(config: Callable[[], peft.PeftConfig]) -> None:
    model = live(config())
    before = run(model, "embednet")
    adapters = ak.from_peft(model)
    assert_same_outputs(run(adapters.model, "embednet"), before)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_parameters_that_train_are_the_same_objects(config: Callable[[], peft.PeftConfig]) -> None:
    model = live(config())
    before = {id(p) for p in model.parameters() if p.requires_grad}
    adapters = ak.from_peft(model)
    assert {id(p) for p in adapters.model.parameters() if p.requires_grad} == before
    assert {id(p) for p in adapters.parameters("default")} >= before


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_an_optimizer_goes_on_as_with_peft(config: Callable[[], peft.PeftConfig]) -> None:
    torch.manual_seed(0)
    expected = get_peft_model(build("embednet"), config()).eval()
    torch.manual_seed(0)
    taken = get_peft_model(build("embednet"), config()).eval()
    train(expected, train(expected))
    optimizer = train(taken)
    adapters = ak.from_peft(taken)
    train(adapters.model, optimizer)
    assert torch.allclose(run(adapters.model, "embednet"), run(expected, "embednet"), atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_file_has_the_tensors_of_pefts_file(config: Callable[[], peft.PeftConfig], tmp_path: Path) -> None:
    model = live(config())
    model.save_pretrained(tmp_path / "peft")
    ak.from_peft(model).save("default", tmp_path / "own")
    own, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("own", "peft"))
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[key], theirs[key]) for key in own)


def test_the_base_is_the_same_object_without_pefts_modules() -> None:
    base = build("embednet")
    layer = base.layers[0]
    adapters = ak.from_peft(get_peft_model(base, LoraConfig(**LORA, modules_to_save=["head"])))
    assert adapters.model is base
    assert base.layers[0] is layer
    assert not [m for m in base.modules() if isinstance(m, BaseTunerLayer) or type(m).__module__.startswith("peft.")]
    assert not hasattr(base, "peft_config")


def test_the_bare_model_is_what_it_was() -> None:
    base = build("embednet")
    bare = run(base, "embednet")
    adapters = ak.from_peft(live_on(base))
    assert not torch.allclose(run(base, "embednet"), bare, atol=1e-3)
    assert_same_outputs(run(adapters.detach(), "embednet"), bare)


def live_on(base: nn.Module) -> PeftModel:
    """Two adapters, of which the second acts."""
    model = get_peft_model(base, LoraConfig(**LORA, modules_to_save=["head"]), adapter_name="one").eval()
    model.add_adapter("two", LoraConfig(**{**LORA, "target_modules": ["layers.0"]}))
    model.set_adapter("two")
    train(model)
    return model


def test_several_adapters_keep_their_names_and_the_active_one() -> None:
    model = get_peft_model(build("embednet"), LoraConfig(**LORA), adapter_name="one").eval()
    model.add_adapter("two", LoraConfig(**{**LORA, "target_modules": ["overhead"]}))
    outputs = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        outputs[name] = run(model, "embednet")
    adapters = ak.from_peft(model)
    assert (adapters.names, adapters.active, adapters.trainable) == (("one", "two"), ("two",), ("two",))
    for name, expected in outputs.items():
        adapters.activate(name)
        assert_same_outputs(run(adapters.model, "embednet"), expected)


def test_disabled_adapters_stay_disabled() -> None:
    model = live(LoraConfig(**LORA))
    expected = run(model, "embednet")
    model.base_model.disable_adapter_layers()
    adapters = ak.from_peft(model)
    assert adapters.active == ()
    adapters.activate("default")
    assert_same_outputs(run(adapters.model, "embednet"), expected)


def test_flags_that_a_user_set_stay() -> None:
    model = live(LoraConfig(**LORA))
    model.base_model.model.layers[0].lora_A["default"].weight.requires_grad_(False)
    model.base_model.model.overhead.weight.requires_grad_(True)
    before = {id(p) for p in model.parameters() if p.requires_grad}
    adapters = ak.from_peft(model)
    assert {id(p) for p in adapters.model.parameters() if p.requires_grad} == before


@pytest.mark.parametrize("layers", [["layers.0"], ["layers.0", "layers.1"]])
def test_scalings_that_peft_set_become_strengths(layers: list[str]) -> None:
    model = live(LoraConfig(**LORA))
    scaled = [m for name, m in model.get_base_model().named_modules() if name in layers]
    for module in scaled:
        module.scale_layer(0.5)
    before = run(model, "embednet")
    adapters = ak.from_peft(model)
    assert len(scaled) == len(layers)
    assert_same_outputs(run(adapters.model, "embednet"), before)


def scaled_without_acting() -> PeftModel:
    """An adapter that does not act has another scaling."""
    model = live(LoraConfig(**LORA))
    model.add_adapter("other", LoraConfig(**LORA))
    model.base_model.model.layers[0].set_scale("other", 0.5)
    return model


def merged() -> PeftModel:
    """Merged into the base."""
    model = live(LoraConfig(**LORA))
    model.merge_adapter()
    return model


def tied() -> PeftModel:
    """PEFT adapts a module at one of its two paths."""
    base = build("embednet")
    base.layers[1] = base.layers[0]
    return get_peft_model(base, LoraConfig(**{**LORA, "target_modules": ["layers.0"]}))


def with_irregular_layers() -> PeftModel:
    """One layer has no active adapter."""
    model = live(LoraConfig(**LORA))
    model.base_model.model.layers[0].enable_adapters(False)
    return model


REFUSED = {
    "a merged adapter": (merged, ak.StateError, r"unmerge_adapter\(\) first"),
    "irregular layers": (with_irregular_layers, ak.StateError, "do not agree"),
    "an unknown type": (lambda: live(peft.LoKrConfig(target_modules=TARGETS)), ak.UnknownNameError, "LOKR"),
    "an option that is not there": (
        lambda: live(LoraConfig(**LORA, trainable_token_indices={"embed": [1]})),
        ak.UnsupportedError,
        r"This LoraConfig: trainable_token_indices = {'embed': \[1\]} changes what the adapter computes",
    ),
    "scalings of others": (scaled_without_acting, ak.UnsupportedError, "set_scale"),
    "a tied module": (tied, ak.UnsupportedError, "is one module with"),
}


@pytest.mark.parametrize(("make", "error", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_taken_over_is_refused_and_stays(make: Any, error: type[Exception], says: str) -> None:
    model = make()
    before, modules = run(model, "embednet"), list(model.modules())
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=says):
        ak.from_peft(model)
    assert list(model.modules()) == modules
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(run(model, "embednet"), before)
    assert not ak.attach(model.get_base_model()).names


def test_prompt_learning_is_refused() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ak.UnsupportedError, match="learns a prompt"):
        ak.from_peft(get_peft_model(build("llama"), config))


def test_a_mixed_model_is_refused() -> None:
    model = get_peft_model(build("embednet"), LoraConfig(**LORA), mixed=True)
    with pytest.raises(ak.UnsupportedError, match="PeftMixedModel"):
        ak.from_peft(model)


def test_a_view_gives_its_adapters() -> None:
    adapters = ak.attach(build("embednet"))
    adapters.add("default", ak.config("lora", target_modules=TARGETS))
    assert ak.from_peft(ak.as_peft(adapters.model)) is adapters


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(ak.ConfigError, match="not a EmbeddingNet"):
        ak.from_peft(build("embednet"))


def test_the_way_for_adapters_of_transformers_own_add_adapter_is_named_and_works(tmp_path: Path) -> None:
    model: Any = build("bert")
    model.add_adapter(LoraConfig(r=2, target_modules=["query"], init_lora_weights=False), "a")
    model.eval()
    before = run(model, "bert")
    with pytest.raises(ak.ConfigError, match=r"Save what model\.add_adapter made, make the model again"):
        ak.from_peft(model)
    model.save_pretrained(tmp_path)
    again = build("bert")
    ak.attach(again).load(tmp_path, "a")
    assert_same_outputs(run(again, "bert"), before)


def test_a_compiled_peft_model_is_taken_over() -> None:
    model = live(LoraConfig(**LORA))
    before = run(model, "embednet")
    adapters = ak.from_peft(torch.compile(model, backend="eager"))  # type: ignore[arg-type]
    assert adapters.model is model.get_base_model()
    assert_same_outputs(run(adapters.model, "embednet"), before)


def test_attach_to_a_peft_model_names_from_peft() -> None:
    with pytest.raises(ak.ConfigError, match=r"ak\.from_peft\(model\)"):
        ak.attach(live(LoraConfig(**LORA)))


def test_a_changed_base_is_told() -> None:
    with pytest.warns(ak.AdapterWarning, match="pissa.*has changed the weights of the base"):
        ak.from_peft(live(LoraConfig(**{**LORA, "init_lora_weights": "pissa"})))


def test_a_transformers_model_keeps_its_head_and_labels() -> None:
    model = get_peft_model(build("bert"), LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)).eval()
    before = run(model, "bert")
    adapters = ak.from_peft(model)
    assert list(adapters.heads("default")) == ["classifier"]
    assert_same_outputs(run(adapters.model, "bert"), before)


def add_with_transformers(model: Any) -> None:
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))


def load_with_transformers(model: Any) -> None:
    model.load_adapter(
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]), adapter_state_dict={}, adapter_name="other"
    )


@pytest.mark.parametrize(
    "put",
    [
        add_with_transformers,
        load_with_transformers,
        lambda model: get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])),
        lambda model: get_peft_model(model, LoHaConfig(r=2, target_modules=["v_proj"]), mixed=True),
        lambda model: get_peft_model(model, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")),
        lambda model: inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model),
        lambda model: get_peft_model(nn.Sequential(model), LoraConfig(r=2, target_modules=["q_proj"])),
    ],
    ids=["add_adapter", "load_adapter", "get_peft_model", "mixed", "prompt tuning", "inject", "a model around it"],
)
def test_peft_on_an_adapted_model_is_refused_and_changes_nothing(put: Callable[[Any], object]) -> None:
    model: Any = build("llama")
    adapters = ak.attach(model)
    adapters.add("t", ak.config("lora", r=2, target_modules=["q_proj"]))
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ak.ConfigError, match=r"has adapters of adapterkit \('t'\), which PEFT would freeze"):
        put(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert adapters.trainable == ("t",)
    assert not model._hf_peft_config_loaded
    adapters.detach()
    put(model)
