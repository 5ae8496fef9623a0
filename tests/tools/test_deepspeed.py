"""Adapters on models that DeepSpeed trains on two processes, with ZeRO stages 2 and 3."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.core.conftest import set_parameters
from tests.distributed.conftest import Tensors, on_two_processes
from tests.models import build, inputs, run
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_lora import LoraConfig

pytest.importorskip("deepspeed")

NAME = "embednet"
CONFIG = LoraConfig(r=2, target_modules=["embed", "0", "1"], modules_to_save=["head"], bias="lora_only")
Found = dict[str, Any]


def attempt(call: Callable[[], object]) -> str:
    """The error that the call raises, as text, or `""`."""
    try:
        call()
    except ak.AdapterError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def adapted(*, partitioned: bool = False) -> tuple[nn.Module, ak.Adapters, Tensors]:
    """A model with one adapter as if trained, and copies of the adapter's tensors.

    Args:
        partitioned: the base's parameters are ZeRO-3's before the adapter is added.
    """
    import deepspeed

    torch.manual_seed(0)
    model = build(NAME)
    if partitioned:
        config = {"zero_optimization": {"stage": 3}, "train_batch_size": 2}
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
    adapters = ak.attach(model)
    adapters.add("a", CONFIG)
    set_parameters(adapters, "a")
    return model, adapters, {key: tensor.clone() for key, tensor in adapters.state_dict("a").items()}


def engine_of(model: nn.Module, adapters: ak.Adapters, stage: int) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(list(adapters.parameters("a")), 0.1)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    engine.eval()
    return engine


def step(engine: Any) -> None:
    engine.backward(engine(inputs(NAME)["x"][dist.get_rank() :][:1]).square().mean())
    engine.step()


def outputs(model: nn.Module, adapters: ak.Adapters, *names: str) -> Tensor:
    with adapters.activated(*names, trainable=False), torch.no_grad():
        found: Tensor = model(**inputs(NAME))
        return found.clone()


def scenario(folder: Path) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(dist.get_rank()))
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
    deepspeed.init_distributed("gloo", dist_init_required=False)
    found = Found()
    model, adapters, found["own"] = adapted()
    found["count"] = adapters.status().rows[0].parameters
    found["outputs"], found["base"] = outputs(model, adapters, "a"), outputs(model, adapters)
    for key, stage, partitioned in (("3", 3, False), ("Init", 3, True), ("2", 2, False)):
        model, adapters, own = adapted(partitioned=partitioned)
        found[key] = {"own": own} | tried(folder / key, engine_of(model, adapters, stage), adapters)
    torch.save(found, folder / f"{dist.get_rank()}.pt")


def tried(folder: Path, wrapped: Any, adapters: ak.Adapters) -> Found:
    model, own, found = adapters.model, adapters.state_dict("a"), Found()
    found["attach"] = ak.attach(wrapped) is adapters
    found["count"] = adapters.status().rows[0].parameters
    found["outputs"] = outputs(wrapped, adapters, "a")
    found["state"] = own = {key: tensor.clone() for key, tensor in own.items()}
    adapters.save("a", folder)
    found["file"] = load_file(folder / "adapter_model.safetensors")
    step(wrapped)
    found["trained"] = {key: tensor.clone() for key, tensor in adapters.state_dict("a").items()}
    adapters.load_state_dict("a", own)
    found["loaded"] = adapters.state_dict("a")
    found["loaded outputs"] = outputs(wrapped, adapters, "a")
    step(wrapped)
    found["trained again"] = {key: tensor.clone() for key, tensor in adapters.state_dict("a").items()}
    adapters.swap("a", folder)
    found["swapped"] = {key: tensor.clone() for key, tensor in adapters.state_dict("a").items()}
    step(wrapped)
    found["trained after swap"] = {key: tensor.clone() for key, tensor in adapters.state_dict("a").items()}
    adapters.load_state_dict("a", own)
    found["report"] = str(adapters.report("a"))
    with adapters.per_sample(["a", None]), torch.no_grad():
        found["rows"] = wrapped(**inputs(NAME)).clone()
    adapters.activate("a")
    found["train late"] = {
        "add": attempt(lambda: adapters.add("late", CONFIG)),
        "load": attempt(lambda: adapters.load(folder, "late", trainable=True)),
    }
    found["late"] = {
        "add": attempt(lambda: adapters.add("added", CONFIG, activate=False)),
        "load": attempt(lambda: adapters.load(folder, "loaded", activate=False)),
        "copy": attempt(lambda: adapters.copy("a", "copy")),
        "combine": attempt(lambda: adapters.combine("mean", {"a": 1.0}, heads="a")),
    }
    found["names"] = adapters.names
    found["activate late"] = [attempt(partial(adapters.activate, name)) for name in adapters.names if name != "a"]
    found["acts late"] = [
        outputs(wrapped, adapters, name) for name in ("loaded", "copy", "mean") if name in adapters.names
    ]
    found["merge"] = attempt(lambda: adapters.merge("a", keep_base=False))
    if found["merge"]:
        found["after merge"] = outputs(wrapped, adapters, "a")
        adapters.rename("a", "b")
        found["renamed"] = adapters.state_dict("b")
        adapters.remove("b")
        found["removed"] = wrapped(**inputs(NAME)).detach()
    else:
        found["after merge"] = run(model, NAME)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Found]:
    folder = tmp_path_factory.mktemp("deepspeed")
    on_two_processes(scenario, folder)
    one, other = (torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2))
    return one, other


@pytest.fixture(params=[0, 1])
def process(found: tuple[Found, Found], request: pytest.FixtureRequest) -> Found:
    """What one of the two found."""
    return found[request.param]


stages = pytest.mark.parametrize("stage", ["2", "3", "Init"])
three = pytest.mark.parametrize("stage", ["3", "Init"])


def assert_near(given: Tensors, expected: Tensors) -> None:
    assert given.keys() == expected.keys()
    for key, tensor in given.items():
        torch.testing.assert_close(tensor, expected[key])


@stages
def test_an_adapter_in_an_engine_acts_is_counted_and_is_saved(process: Found, stage: str) -> None:
    one = process[stage]
    assert one["attach"]
    assert one["count"] == process["count"]
    torch.testing.assert_close(one["outputs"], process["outputs"])
    assert one["own"].keys() == one["state"].keys() == one["file"].keys() == process["own"].keys()
    assert all(torch.equal(one["file"][key], tensor) for key, tensor in process["own"].items())
    assert all(torch.equal(one["state"][key], tensor) for key, tensor in process["own"].items())


@stages
def test_an_adapter_trains_alike_in_both_processes(found: tuple[Found, Found], stage: str) -> None:
    one, other = (each[stage]["trained"] for each in found)
    assert_near(one, other)
    assert all(not torch.equal(tensor, found[0]["own"][key]) for key, tensor in one.items())


@stages
def test_what_is_loaded_is_what_the_next_step_goes_on_from(process: Found, stage: str) -> None:
    one = process[stage]
    assert_near(one["loaded"], process["own"])
    torch.testing.assert_close(one["loaded outputs"], process["outputs"])
    assert_near(one["trained again"], one["trained"])
    assert_near(one["swapped"], process["own"])
    assert_near(one["trained after swap"], one["trained"])


@stages
def test_each_row_has_its_own_adapter_in_an_engine(process: Found, stage: str) -> None:
    torch.testing.assert_close(process[stage]["rows"][0], process["outputs"][0])
    torch.testing.assert_close(process[stage]["rows"][1], process["base"][1])


@stages
def test_what_comes_after_initialize_is_not_trained(process: Found, stage: str) -> None:
    one = process[stage]
    errors = [*one["train late"].values(), *one["activate late"]]
    assert all(error.startswith("StateError") and "deepspeed.initialize" in error for error in errors)


def test_what_comes_later_may_act_with_stage_2(process: Found) -> None:
    one = process["2"]
    assert not any(one["late"].values())
    assert all(torch.allclose(given, process["outputs"], atol=1e-5) for given in one["acts late"])


@three
def test_a_model_in_stage_3_takes_no_new_parameters(process: Found, stage: str) -> None:
    one = process[stage]
    assert all("ZeRO stage 3" in error and "before deepspeed.initialize" in error for error in one["late"].values())
    assert one["names"] == ("a",)


@three
def test_merging_into_partitions_is_refused_and_changes_nothing(process: Found, stage: str) -> None:
    one = process[stage]
    assert "sharded among processes" in one["merge"]
    torch.testing.assert_close(one["after merge"], process["outputs"])


def test_an_adapter_is_merged_with_stage_2(process: Found) -> None:
    assert process["2"]["merge"] == ""
    torch.testing.assert_close(process["2"]["after merge"], process["outputs"], atol=1e-5, rtol=1e-5)


@three
def test_an_adapter_in_an_engine_is_renamed_and_removed(process: Found, stage: str) -> None:
    assert_near(process[stage]["renamed"], process["own"])
    torch.testing.assert_close(process[stage]["removed"], process["base"])
