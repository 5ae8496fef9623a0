"""Adapters on models that torch's wrappers train on two processes: DDP, and the older FSDP."""

from __future__ import annotations

import copy
import operator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.core.conftest import set_parameters
from tests.distributed.conftest import Found, attempt, on_two_processes
from tests.models import build, inputs, run
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import adapterkit as ak
from adapterkit_lora import LoraConfig

NAME = "embednet"
CONFIG = LoraConfig(r=2, target_modules=["0", "1"], modules_to_save=["head"])


def adapted(*names: str) -> tuple[nn.Module, ak.Adapters]:
    torch.manual_seed(0)
    model = build(NAME)
    adapters = ak.attach(model)
    for name in names:
        adapters.add(name, CONFIG, activate=False)
        set_parameters(adapters, name, len(adapters))
    return model, adapters


def train(model: nn.Module, adapters: ak.Adapters, name: str) -> dict[str, Tensor]:
    """The adapter behind two steps, each process on rows of its own."""
    optimizer = torch.optim.SGD(list(adapters.parameters(name)), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(inputs(NAME)["x"][dist.get_rank() :][:1]).square().mean().backward()
        optimizer.step()
    return {key: tensor.clone() for key, tensor in adapters.state_dict(name).items()}


def scenario(folder: Path) -> Found:
    found = Found()
    # Before anything was attached in this process.
    model = build(NAME)
    wrapper = DistributedDataParallel(model)
    found["wrapped before attach"] = attempt(lambda: ak.attach(model).add("a", CONFIG))

    model, adapters = adapted("a", "b")
    adapters.save("a", folder / str(dist.get_rank()))
    adapters.activate("a")
    before = adapters.status()
    wrapper: Any = DistributedDataParallel(model)
    attached = ak.attach(wrapper)
    found["attach"] = attached is adapters
    found["refused"] = {
        "add": attempt(lambda: adapters.add("late", CONFIG)),
        "add through the wrapper": attempt(lambda: attached.add("late", CONFIG)),
        "load": attempt(lambda: adapters.load(folder / str(dist.get_rank()), "late", trainable=True)),
        "activate": attempt(lambda: adapters.activate("b")),
        "activate both": attempt(lambda: adapters.activate("a", "b", heads="a")),
        "activated": attempt(lambda: adapters.activated("b").__enter__()),
        "per_sample": attempt(lambda: adapters.per_sample(["b", None], trainable=True).__enter__()),
    }
    found["unchanged"] = str(adapters.status()) == str(before)
    adapters.copy("a", "copy")
    adapters.combine("mean", {"a": 0.5, "b": 0.5}, heads="a")
    found["refused"] |= {name: attempt(partial(adapters.activate, name)) for name in ("copy", "mean")}
    with adapters.activated("b", trainable=False), torch.no_grad():
        found["acts"] = wrapper(**inputs(NAME))
    with adapters.activated("b", trainable=False):
        found["acts on the model itself"] = run(model, NAME)
    found["trained"] = train(wrapper, adapters, "a")

    # A copy of the model is nobody's, and neither is the model without its wrapper.
    duplicate = ak.attach(copy.deepcopy(model))
    duplicate.activate("b")
    del wrapper
    adapters.activate("b")
    wrapper = DistributedDataParallel(model)
    found["b"] = train(wrapper, adapters, "b")

    # Both train when the model is wrapped, so either may afterwards.
    del wrapper
    adapters.activate("a", "b", heads="a")
    wrapper = DistributedDataParallel(model, find_unused_parameters=True)
    for name in ("a", "b"):
        adapters.activate(name)
        found[f"{name} in turn"] = train(wrapper, adapters, name)
    outer = nn.Sequential(model)
    wrapper = DistributedDataParallel(outer)
    found["inside a wrapped model"] = attempt(lambda: adapters.add("late", CONFIG))
    del wrapper, outer
    convolutions = build("convnet")
    grouped = ak.attach(convolutions)
    grouped.add("a", LoraConfig(r=2, target_modules=["grouped"]))
    shapes = zip(("lora_B", "lora_A"), grouped.model.grouped.adapters["a"].kind.ungrouped_shapes(2), strict=True)
    tensors = {f"grouped.{name}.weight": torch.ones(shape) for name, shape in shapes}
    wrapper = DistributedDataParallel(convolutions)
    parameters = list(grouped.parameters("a"))
    found["other shapes"] = attempt(lambda: grouped.load_state_dict("a", tensors))
    found["the same parameters"] = all(map(operator.is_, parameters, grouped.parameters("a")))
    del wrapper
    grouped.load_state_dict("a", tensors)
    adapters.add("late", CONFIG)
    return found | fsdp1(folder)


def fsdp1(folder: Path) -> Found:
    from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

    found = Found()
    model, adapters = adapted("a", "b")
    adapters.activate("a")
    expected, own = run(model, NAME), {k: v.clone() for k, v in adapters.state_dict("a").items()}
    wrapper: Any = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    found["fsdp1 attach"] = ak.attach(wrapper) is adapters
    found["fsdp1 acts"] = (wrapper(**inputs(NAME)).detach(), expected)
    found["fsdp1 refused"] = {
        "state_dict": attempt(lambda: adapters.state_dict("a")),
        "save": attempt(lambda: adapters.save("a", folder / "fsdp1")),
        "load_state_dict": attempt(lambda: adapters.load_state_dict("a", own)),
        "swap": attempt(lambda: adapters.swap("a", folder / "0")),
        "copy": attempt(lambda: adapters.copy("a", "c")),
        "combine": attempt(lambda: adapters.combine("c", {"a": 1.0}, heads="drop")),
        "merge": attempt(lambda: adapters.merge("a")),
        "report": attempt(lambda: adapters.report("a")),
        "add": attempt(lambda: adapters.add("c", CONFIG)),
    }
    found["fsdp1 names"] = (adapters.names, (folder / "fsdp1").exists())
    with FullyShardedDataParallel.state_dict_type(wrapper, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
        full = wrapper.state_dict()
    found["fsdp1 source"] = (adapters.state_dict("a", source=full), own)
    found["fsdp1 status"] = str(adapters.status())
    for name in ("a", "b"):
        adapters.activate(name)
        optimizer = torch.optim.SGD(list(adapters.parameters(name)), 0.1)
        wrapper(inputs(NAME)["x"][dist.get_rank() :][:1]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with FullyShardedDataParallel.state_dict_type(wrapper, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
            found[f"fsdp1 trained {name}"] = adapters.state_dict(name, source=wrapper.state_dict())
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Found]:
    return on_two_processes(scenario, tmp_path_factory.mktemp("wrapped"))


def alike(found: tuple[Found, Found], key: str) -> bool:
    one, other = (each[key] for each in found)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_wrapper_made_before_attach_is_found(found: tuple[Found, Found]) -> None:
    assert all("when the model was given to DistributedDataParallel" in each["wrapped before attach"] for each in found)


def test_what_a_wrapper_does_not_average_is_not_trained(found: tuple[Found, Found]) -> None:
    for one in found:
        for error in one["refused"].values():
            assert error.startswith("StateError: Adapter '")
            assert "DistributedDataParallel" in error
            assert "trainable=False" in error


def test_a_refused_call_changes_nothing(found: tuple[Found, Found]) -> None:
    assert all(one["unchanged"] and one["attach"] for one in found)


def test_an_adapter_that_is_not_trained_acts_in_a_wrapped_model(found: tuple[Found, Found]) -> None:
    one, _ = found
    torch.testing.assert_close(one["acts"], one["acts on the model itself"])


@pytest.mark.parametrize("key", ["trained", "b", "a in turn", "b in turn"])
def test_what_was_active_when_the_model_was_wrapped_is_the_same_in_all_processes(
    found: tuple[Found, Found], key: str
) -> None:
    assert alike(found, key)


def test_the_wrapper_of_a_model_around_the_adapted_one_counts(found: tuple[Found, Found]) -> None:
    assert all("DistributedDataParallel" in one["inside a wrapped model"] for one in found)


def test_a_parameter_that_a_wrapper_knows_is_not_replaced(found: tuple[Found, Found]) -> None:
    for one in found:
        assert one["other shapes"].startswith("StateError: 'grouped.lora_")
        assert one["the same parameters"]


# The older FSDP


def test_adapters_act_and_train_in_the_older_fsdp(found: tuple[Found, Found]) -> None:
    for one in found:
        torch.testing.assert_close(*one["fsdp1 acts"])
        assert one["fsdp1 attach"]
    for name in ("a", "b"):
        assert alike(found, f"fsdp1 trained {name}")


def test_the_older_fsdp_gives_an_adapter_by_its_full_state_dict(found: tuple[Found, Found]) -> None:
    for one in found:
        taken, own = one["fsdp1 source"]
        assert taken.keys() == own.keys()
        assert all(torch.equal(taken[key], own[key]) for key in own)


def test_whatever_needs_the_parameters_of_the_older_fsdp_is_refused(found: tuple[Found, Found]) -> None:
    for one in found:
        assert all(e.startswith("StateError: The model is in FullySharded") for e in one["fsdp1 refused"].values())
        assert one["fsdp1 names"] == (("a", "b"), False)
        assert "the parameters are those of this process" in one["fsdp1 status"]
