"""Adapters on models that torch's wrappers train on two processes: DDP, and the older FSDP."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.core.conftest import set_parameters
from tests.distributed.conftest import Tensors, assert_alike, assert_same, copies, on_two_processes, refused
from tests.models import build, inputs, run
from torch import nn
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


def assert_trained_alike(model: nn.Module, adapters: ak.Adapters, name: str) -> None:
    """Train the adapter for two steps, each process on rows of its own."""
    optimizer = torch.optim.SGD(list(adapters.parameters(name)), 0.1)
    before = copies(adapters.state_dict(name))
    for _ in range(2):
        optimizer.zero_grad()
        model(inputs(NAME)["x"][dist.get_rank() :][:1]).square().mean().backward()
        optimizer.step()
    after = adapters.state_dict(name)
    assert any(not torch.equal(after[key], value) for key, value in before.items())
    assert_alike(after)


def ddp_trains_what_it_averages_and_refuses_the_rest(folder: Path) -> None:
    words = ("when the model was given to DistributedDataParallel", "trainable=False")
    model = build(NAME)
    wrapper: Any = DistributedDataParallel(model)  # before anything was attached in this process
    refused(lambda: ak.attach(model).add("a", CONFIG), *words)

    model, adapters = adapted("a", "b")
    adapters.save("a", folder / str(dist.get_rank()))
    adapters.activate("a")
    before = str(adapters.status())
    wrapper = DistributedDataParallel(model)
    assert ak.attach(wrapper) is adapters
    calls: tuple[Callable[[], object], ...] = (
        lambda: adapters.add("late", CONFIG),
        lambda: adapters.load(folder / str(dist.get_rank()), "late", trainable=True),
        lambda: adapters.activate("b"),
        lambda: adapters.activate("a", "b", heads="a"),
        lambda: adapters.activated("b").__enter__(),
        lambda: adapters.per_sample(["b", None], trainable=True).__enter__(),
    )
    for call in calls:
        refused(call, "Adapter '", *words)
    assert str(adapters.status()) == before
    adapters.copy("a", "copy")
    adapters.combine("mean", {"a": 0.5, "b": 0.5}, heads="a")
    for name in ("copy", "mean"):
        refused(partial(adapters.activate, name), *words)
    with adapters.activated("b", trainable=False), torch.no_grad():
        torch.testing.assert_close(wrapper(**inputs(NAME)), run(model, NAME))
    assert_trained_alike(wrapper, adapters, "a")

    # A copy of the model is nobody's, and neither is the model without its wrapper.
    ak.attach(copy.deepcopy(model)).activate("b")
    del wrapper
    adapters.activate("b")
    assert_trained_alike(DistributedDataParallel(model), adapters, "b")

    # Both train when the model is wrapped, so either may afterwards.
    adapters.activate("a", "b", heads="a")
    wrapper = DistributedDataParallel(model, find_unused_parameters=True)
    for name in ("a", "b"):
        adapters.activate(name)
        assert_trained_alike(wrapper, adapters, name)
    outer = nn.Sequential(model)
    wrapper = DistributedDataParallel(outer)
    refused(lambda: adapters.add("late", CONFIG), "DistributedDataParallel")
    del wrapper, outer
    adapters.add("late", CONFIG)


def the_older_fsdp_trains_and_hides_parameters(folder: Path) -> None:
    from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

    def full() -> Tensors:
        config = FullStateDictConfig()
        with FullyShardedDataParallel.state_dict_type(wrapper, StateDictType.FULL_STATE_DICT, config):
            return wrapper.state_dict()

    model, adapters = adapted("a", "b")
    file = adapters.save("a", folder / str(dist.get_rank()))
    adapters.activate("a")
    expected, own = run(model, NAME), copies(adapters.state_dict("a"))
    wrapper: Any = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    assert ak.attach(wrapper) is adapters
    torch.testing.assert_close(wrapper(**inputs(NAME)).detach(), expected)
    calls: tuple[Callable[[], object], ...] = (
        lambda: adapters.state_dict("a"),
        lambda: adapters.save("a", folder / "fsdp1"),
        lambda: adapters.load_state_dict("a", own),
        lambda: adapters.swap("a", file),
        lambda: adapters.copy("a", "c"),
        lambda: adapters.combine("c", {"a": 1.0}, heads="drop"),
        lambda: adapters.merge("a"),
        lambda: adapters.report("a"),
        lambda: adapters.add("c", CONFIG),
    )
    for call in calls:
        refused(call, "The model is in FullySharded")
    assert adapters.names == ("a", "b")
    assert not (folder / "fsdp1").exists()
    assert_same(adapters.state_dict("a", source=full()), own)
    assert "the parameters are those of this process" in str(adapters.status())
    for name in ("a", "b"):
        adapters.activate(name)
        optimizer = torch.optim.SGD(list(adapters.parameters(name)), 0.1)
        wrapper(inputs(NAME)["x"][dist.get_rank() :][:1]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_alike(adapters.state_dict(name, source=full()))


SCENARIOS = (
    ddp_trains_what_it_averages_and_refuses_the_rest,
    the_older_fsdp_trains_and_hides_parameters,
)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_on_two_processes(scenario: Callable[[Path], None], tmp_path: Path) -> None:
    on_two_processes(scenario, tmp_path)
