"""Adapters on a model that `fully_shard` has divided between two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.core.conftest import set_parameters
from tests.distributed.conftest import Found, attempt, on_two_processes
from tests.models import build, inputs, run
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_lora import LoraConfig

NAME = "embednet"
CONFIG = LoraConfig(r=3, target_modules=["embed", "0", "1"], modules_to_save=["head"], bias="lora_only")
Tensors = dict[str, Tensor]


def adapted(seed: int = 0) -> tuple[nn.Module, ak.Adapters, Tensors]:
    """A model with one adapter as if trained, and copies of the adapter's tensors."""
    torch.manual_seed(seed)
    model = build(NAME)
    adapters = ak.attach(model)
    adapters.add("a", CONFIG)
    set_parameters(adapters, "a", seed)
    return model, adapters, {key: tensor.clone() for key, tensor in adapters.state_dict("a").items()}


def shard(model: nn.Module, **options: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, **options)


def outputs(model: nn.Module, adapters: ak.Adapters, *names: str) -> Tensor:
    """The model's under these adapters, which are not trained; then as it was."""
    with adapters.activated(*names, trainable=False, heads=names[0] if names else None):
        return run(model, NAME)


def scenario(folder: Path) -> Found:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    rank, found = dist.get_rank(), Found()
    plain, whole, own = adapted()
    whole.save("a", folder / f"whole{rank}")
    whole.copy("a", "b")
    whole.combine("mean", {"a": 0.5, "b": 1.0}, heads="a")
    found["own"], found["expected"] = own, outputs(plain, whole, "a")
    found["expected mean"] = outputs(plain, whole, "mean")
    found["expected base"] = outputs(plain, whole)
    found["expected count"] = whole.status().rows[0].parameters

    model, adapters, _ = adapted()
    shard(model)
    found["acts"] = outputs(model, adapters, "a")
    found["count"] = adapters.status().rows[0].parameters
    found["state"] = adapters.state_dict("a")
    # Only the first process's folder may appear.
    adapters.save("a", folder / f"by{rank}")
    found["written"] = sorted(p.name for p in folder.glob("by*"))
    found["file"] = load_file(folder / "by0" / "adapter_model.safetensors")
    found["not saved"] = attempt(lambda: adapters.save("a", Path("/proc/none") if rank == 0 else folder / "good"))
    found["from source"] = adapters.state_dict("a", source=get_model_state_dict(model))
    found["merge"] = [
        attempt(lambda: adapters.merge("a")),
        attempt(lambda: adapters.merge("a", keep_base=False, untie=True)),
        attempt(adapters.merge_and_detach),
    ]
    found["after merge"] = (adapters.active, adapters.merged, outputs(model, adapters, "a"))
    found["report"] = str(adapters.report("a")) == str(whole.report("a"))

    # What comes after `fully_shard` may act, and not be trained.
    other = CONFIG.replace(modules_to_save=None)
    found["add"] = (attempt(lambda: adapters.add("late", other)), adapters.names, adapters.active)
    found["load to train"] = (
        attempt(lambda: adapters.load(folder / "by0", "late", trainable=True)),
        adapters.names,
        adapters.active,
    )
    adapters.add("zero", other, activate=False)
    found["zero"] = (outputs(model, adapters, "zero"), attempt(lambda: adapters.activate("zero")), adapters.active)
    adapters.copy("a", "copy")
    found["copy"] = outputs(model, adapters, "copy")
    adapters.load(folder / "by0", "loaded", activate=False)
    found["load"] = outputs(model, adapters, "loaded")
    adapters.combine("mean", {"a": 0.5, "copy": 1.0}, heads="a")
    found["mean"] = outputs(model, adapters, "mean")
    found["activate"] = [attempt(lambda n=n: adapters.activate(n)) for n in ("copy", "loaded", "mean")]
    found["rows to train"] = attempt(lambda: adapters.per_sample(["copy", None], trainable=True).__enter__())
    with adapters.per_sample(["a", None]):
        found["rows"] = run(model, NAME)
    adapters.add("pissa", LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa"), activate=False)
    found["pissa"] = outputs(model, adapters, "pissa")
    found["head of a sharded module"] = attempt(
        lambda: adapters.add("x", LoraConfig(target_modules=["embed"], modules_to_save=["layers.0"]), activate=False)
    )
    for name in ("copy", "loaded", "mean", "zero", "pissa"):
        adapters.remove(name)

    # Writing: behind a forward that leaves whole copies of the root's parameters in place.
    run(model, NAME)
    doubled = {key: tensor * 2 for key, tensor in own.items()}
    adapters.load_state_dict("a", doubled)
    whole.load_state_dict("a", doubled)
    found["loaded"] = (outputs(model, adapters, "a"), outputs(plain, whole, "a"), adapters.state_dict("a"))
    wrong = {key: tensor[..., :1] for key, tensor in own.items()}
    found["wrong shapes"] = (attempt(lambda: adapters.load_state_dict("a", wrong)), adapters.state_dict("a"))
    adapters.load_state_dict("a", get_model_state_dict(model))
    found["loaded shards"] = adapters.state_dict("a")
    adapters.swap("a", folder / "by0")
    found["swapped"] = (outputs(model, adapters, "a"), adapters.state_dict("a"))

    # Training on other rows in each process, with a switch between forward and backward.
    adapters.activate("a")
    optimizer = torch.optim.SGD(list(adapters.parameters("a")), 0.1)
    loss = model(inputs(NAME)["x"][rank : rank + 1]).square().mean()
    adapters.activate("a")
    loss.backward()
    optimizer.step()
    found["trained"] = adapters.state_dict("a")
    adapters.rename("a", "z")
    found["renamed"] = adapters.state_dict("z")
    adapters.detach()
    found["detached"] = run(model, NAME)

    for key, options in {
        "mixed": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
        "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    }.items():
        model, adapters, _ = adapted()
        shard(model, **options)
        run(model, NAME)
        found[key] = (adapters.state_dict("a"), run(model, NAME))
        run(model, NAME)
        adapters.load_state_dict("a", doubled)
        run(model, NAME)
        found[f"{key} loaded"] = adapters.state_dict("a")
    found["doubled"] = doubled
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Found]:
    return on_two_processes(scenario, tmp_path_factory.mktemp("fsdp2"))


@pytest.fixture(params=[0, 1])
def process(found: tuple[Found, Found], request: pytest.FixtureRequest) -> Found:
    """What one of the two found."""
    return found[request.param]


def assert_same(given: Tensors, expected: Tensors) -> None:
    assert given.keys() == expected.keys()
    assert all(type(tensor) is Tensor and torch.equal(tensor, expected[key]) for key, tensor in given.items())


def refused(error: str, *words: str) -> bool:
    return error.startswith("StateError") and all(word in error for word in words)


def test_a_sharded_adapter_acts_and_is_counted_as_a_whole(process: Found) -> None:
    torch.testing.assert_close(process["acts"], process["expected"])
    assert process["count"] == process["expected count"]


def test_state_dict_gathers_the_adapter(process: Found) -> None:
    assert_same(process["state"], process["own"])


def test_state_dict_gathers_what_a_sharded_state_dict_holds(process: Found) -> None:
    assert_same(process["from source"], process["own"])


def test_save_gathers_the_adapter_alone_and_the_first_process_writes(process: Found) -> None:
    assert_same(process["file"], process["own"])
    assert process["written"] == ["by0"]


def test_every_process_gets_the_error_of_the_one_that_writes(process: Found) -> None:
    assert process["not saved"].startswith("SaveError: The adapter cannot be saved to /proc/none")


def test_merging_into_shards_is_refused_and_changes_nothing(process: Found) -> None:
    assert all("sharded" in error and "ak.merge_checkpoint" in error for error in process["merge"])
    active, merged, outputs = process["after merge"]
    assert (active, merged) == (("a",), ())
    torch.testing.assert_close(outputs, process["expected"])


def test_a_report_of_a_sharded_adapter_is_that_of_the_whole(process: Found) -> None:
    assert process["report"]


@pytest.mark.parametrize("call", ["add", "load to train"])
def test_an_adapter_to_train_that_comes_after_sharding_is_refused(process: Found, call: str) -> None:
    error, names, active = process[call]
    assert refused(error, "'late'", "fully_shard", "not averaged", "trainable=False")
    assert (names, active) == (("a",), ("a",))


def test_an_adapter_that_comes_after_sharding_may_act(process: Found) -> None:
    outputs, error, active = process["zero"]
    torch.testing.assert_close(outputs, process["expected base"])
    assert refused(error, "'zero'", "fully_shard")
    assert active == ("a",)


@pytest.mark.parametrize("how", ["copy", "load"])
def test_a_copy_and_a_loaded_adapter_act_as_the_sharded_one(process: Found, how: str) -> None:
    torch.testing.assert_close(process[how], process["expected"])


def test_sharded_adapters_are_combined(process: Found) -> None:
    torch.testing.assert_close(process["mean"], process["expected mean"])


def test_copies_loaded_and_combined_adapters_are_not_trained(process: Found) -> None:
    assert all(refused(error, "fully_shard") for error in (*process["activate"], process["rows to train"]))


def test_each_row_has_its_own_adapter(process: Found) -> None:
    torch.testing.assert_close(process["rows"][0], process["expected"][0])
    torch.testing.assert_close(process["rows"][1], process["expected base"][1])


def test_a_method_reads_whole_weights(process: Found) -> None:
    torch.testing.assert_close(process["pissa"], process["expected base"], atol=1e-5, rtol=1e-5)


def test_a_head_at_a_module_sharded_by_itself_is_refused(process: Found) -> None:
    assert refused(process["head of a sharded module"], "'layers.0'", "Add the adapter before fully_shard")


def test_load_state_dict_divides_what_it_is_given(process: Found) -> None:
    outputs, expected, tensors = process["loaded"]
    torch.testing.assert_close(outputs, expected)
    assert_same(tensors, process["doubled"])


def test_a_state_dict_that_does_not_fit_changes_nothing(process: Found) -> None:
    error, tensors = process["wrong shapes"]
    assert error.startswith("CheckpointError")
    assert_same(tensors, process["doubled"])


def test_a_sharded_state_dict_is_loaded(process: Found) -> None:
    assert_same(process["loaded shards"], process["doubled"])


def test_swap_divides_what_the_file_holds(process: Found) -> None:
    outputs, tensors = process["swapped"]
    torch.testing.assert_close(outputs, process["expected"])
    assert_same(tensors, process["own"])


def test_training_moves_both_processes_alike(found: tuple[Found, Found]) -> None:
    one, other = found
    assert_same(one["trained"], other["trained"])
    assert all(not torch.equal(tensor, one["own"][key]) for key, tensor in one["trained"].items())
    assert_same(one["renamed"], one["trained"])


def test_detach_gives_the_base_back(process: Found) -> None:
    torch.testing.assert_close(process["detached"], process["expected base"])


@pytest.mark.parametrize("policy", ["mixed", "offloaded"])
def test_policies_do_not_change_what_is_saved_and_loaded(process: Found, policy: str) -> None:
    tensors, outputs = process[policy]
    assert_same(tensors, process["own"])
    torch.testing.assert_close(outputs.float(), process["expected"], atol=0.1, rtol=0.1)
    assert_same(process[f"{policy} loaded"], process["doubled"])
