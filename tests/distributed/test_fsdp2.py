"""Adapters on a model that `fully_shard` has divided between two processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.core.conftest import set_parameters
from tests.distributed.conftest import Tensors, assert_alike, assert_same, copies, on_two_processes, refused
from tests.models import build, inputs, run
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_lora import LoraConfig

NAME = "embednet"
CONFIG = LoraConfig(r=3, target_modules=["embed", "0", "1"], modules_to_save=["head"], bias="lora_only")
close = torch.testing.assert_close


def adapted(*, sharded: bool = True, **options: Any) -> tuple[nn.Module, ak.Adapters, Tensors]:
    """A model with one adapter as if trained, and copies of the adapter's tensors from before the model was sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = build(NAME)
    adapters = ak.attach(model)
    adapters.add("a", CONFIG)
    set_parameters(adapters, "a")
    own = copies(adapters.state_dict("a"))
    for module in (*model.layers, model) if sharded else ():
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)), **options)
    return model, adapters, own


def outputs(adapters: ak.Adapters, *names: str) -> Tensor:
    """The model's under these adapters, which are not trained; then as it was."""
    with adapters.activated(*names, trainable=False, heads=names[0] if names else None):
        return run(adapters.model, NAME)


def a_sharded_adapter_is_used_and_read_as_a_whole(folder: Path) -> None:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    rank = dist.get_rank()
    _, whole, _ = adapted(sharded=False)
    model, adapters, own = adapted()
    expected = outputs(whole, "a")
    close(outputs(adapters, "a"), expected)
    assert adapters.status().rows[0].parameters == whole.status().rows[0].parameters
    assert_same(adapters.state_dict("a"), own)
    assert_same(adapters.state_dict("a", source=get_model_state_dict(model)), own)
    assert str(adapters.report("a")) == str(whole.report("a"))
    adapters.save("a", folder / f"by{rank}")
    assert [path.name for path in folder.glob("by*")] == ["by0"]  # the first process writes
    assert_same(load_file(folder / "by0" / "adapter_model.safetensors"), own)
    place = Path("/proc/none") if rank == 0 else folder / "good"
    refused(lambda: adapters.save("a", place), "cannot be saved to /proc/none", error=ak.SaveError)  # in both
    for merge in (
        lambda: adapters.merge("a"),
        lambda: adapters.merge("a", keep_base=False, untie=True),
        adapters.merge_and_detach,
    ):
        refused(merge, "sharded", "ak.merge_checkpoint", error=ak.UnsupportedError)
    assert (adapters.active, adapters.merged) == (("a",), ())
    close(outputs(adapters, "a"), expected)


def what_comes_after_sharding_acts_and_is_not_trained(folder: Path) -> None:
    _, whole, _ = adapted(sharded=False)
    whole.copy("a", "b")
    whole.combine("mean", {"a": 0.5, "b": 1.0}, heads="a")
    expected, base = outputs(whole, "a"), outputs(whole)
    model, adapters, _ = adapted()
    adapters.save("a", folder / "a")
    other, words = CONFIG.replace(modules_to_save=None), ("fully_shard", "not averaged", "trainable=False")
    refused(lambda: adapters.add("late", other), "'late'", *words)
    refused(lambda: adapters.load(folder / "a", "late", trainable=True), "'late'", *words)
    assert (adapters.names, adapters.active) == (("a",), ("a",))
    adapters.add("zero", other, activate=False)
    adapters.copy("a", "copy")
    adapters.load(folder / "a", "loaded", activate=False)
    adapters.combine("mean", {"a": 0.5, "copy": 1.0}, heads="a")
    adapters.add("pissa", LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa"), activate=False)
    for name, output in {"zero": base, "copy": expected, "loaded": expected, "mean": outputs(whole, "mean")}.items():
        close(outputs(adapters, name), output)
        refused(lambda name=name: adapters.activate(name), *words)  # type: ignore[misc]
    close(outputs(adapters, "pissa"), base, atol=1e-5, rtol=1e-5)  # it has read whole weights
    refused(lambda: adapters.per_sample(["copy", None], trainable=True).__enter__(), *words)
    with adapters.per_sample(["a", None]):
        close(run(model, NAME), torch.stack([expected[0], base[1]]))
    head = LoraConfig(target_modules=["embed"], modules_to_save=["layers.0"])
    refused(lambda: adapters.add("x", head, activate=False), "'layers.0'", "Add the adapter before fully_shard")
    assert adapters.active == ("a",)


def what_is_written_is_divided(folder: Path) -> None:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    rank = dist.get_rank()
    _, whole, _ = adapted(sharded=False)
    expected, base = outputs(whole, "a"), outputs(whole)
    model, adapters, own = adapted()
    adapters.save("a", folder / "a")
    doubled = {key: tensor * 2 for key, tensor in own.items()}
    run(model, NAME)  # leaves whole copies of the root's parameters in place
    adapters.load_state_dict("a", doubled)
    whole.load_state_dict("a", doubled)
    close(outputs(adapters, "a"), outputs(whole, "a"))
    assert_same(adapters.state_dict("a"), doubled)
    wrong = {key: tensor[..., :1] for key, tensor in own.items()}
    refused(lambda: adapters.load_state_dict("a", wrong), error=ak.CheckpointError)
    assert_same(adapters.state_dict("a"), doubled)
    adapters.load_state_dict("a", get_model_state_dict(model))
    assert_same(adapters.state_dict("a"), doubled)
    adapters.swap("a", folder / "a")
    close(outputs(adapters, "a"), expected)
    assert_same(adapters.state_dict("a"), own)
    # Training on other rows in each process, with a switch between forward and backward.
    adapters.activate("a")
    optimizer = torch.optim.SGD(list(adapters.parameters("a")), 0.1)
    loss = model(inputs(NAME)["x"][rank : rank + 1]).square().mean()
    adapters.activate("a")
    loss.backward()
    optimizer.step()
    trained = adapters.state_dict("a")
    assert_alike(trained)
    assert all(not torch.equal(tensor, own[key]) for key, tensor in trained.items())
    adapters.rename("a", "z")
    assert_same(adapters.state_dict("z"), trained)
    adapters.detach()
    close(run(model, NAME), base)


def policies_do_not_change_what_is_saved_and_loaded(folder: Path) -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    _, whole, _ = adapted(sharded=False)
    mixed, offloaded = MixedPrecisionPolicy(param_dtype=torch.bfloat16), CPUOffloadPolicy(pin_memory=False)
    for options in ({"mp_policy": mixed}, {"offload_policy": offloaded}):
        model, adapters, own = adapted(**options)
        close(run(model, NAME).float(), outputs(whole, "a"), atol=0.1, rtol=0.1)
        assert_same(adapters.state_dict("a"), own)
        run(model, NAME)
        doubled = {key: tensor * 2 for key, tensor in own.items()}
        adapters.load_state_dict("a", doubled)
        run(model, NAME)
        assert_same(adapters.state_dict("a"), doubled)


def a_model_from_the_meta_device_begins_as_one_that_was_never_divided(folder: Path) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    base, config = build(NAME, seed=1), LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights="pissa")
    for fields in ({}, {"init_lora_weights": True, "target_modules": ["embed", "0"], "modules_to_save": ["head"]}):
        torch.manual_seed(dist.get_rank())  # the first process's values are everyone's
        with torch.device("meta"):
            model = build(NAME)
        adapters = ak.attach(model)
        adapters.add("a", config.replace(bias="lora_only", **fields))
        for module in (*model.layers, model):
            fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
        model.to_empty(device="cpu")
        full = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(model, dict(base.state_dict()), options=full)
        refused(lambda model=model: run(model, NAME), "'a' has no values", "adapters.reset('a')")  # type: ignore[misc]
        refused(lambda adapters=adapters: adapters.reset("a"), "reset_iter_state")  # type: ignore[misc]
        model.reset_iter_state()
        adapters.reset("a")
        whole = ak.attach(copy.deepcopy(base))
        torch.manual_seed(0)
        whole.add("a", adapters.config("a"))
        assert_same(adapters.training_state("a"), whole.training_state("a"))
        close(run(model, NAME), run(whole.model, NAME))


SCENARIOS = (
    a_sharded_adapter_is_used_and_read_as_a_whole,
    what_comes_after_sharding_acts_and_is_not_trained,
    what_is_written_is_divided,
    policies_do_not_change_what_is_saved_and_loaded,
    a_model_from_the_meta_device_begins_as_one_that_was_never_divided,
)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_on_two_processes(scenario: Callable[[Path], None], tmp_path: Path) -> None:
    on_two_processes(scenario, tmp_path)
