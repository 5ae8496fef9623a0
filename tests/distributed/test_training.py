"""Two processes train an adapter as one process does: DDP and FSDP2, in the ways that people set them up."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed.conftest import InTurn, assert_alike, assert_same, copies, on_two_processes, refused
from tests.models import build, inputs, run
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import adapterkit as ak
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig
from adapterkit_vera import VeraConfig

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"])
WHOLE = LoraConfig(r=2, target_modules=["q_proj"], bias="all", modules_to_save=["lm_head", "embed_tokens"])
METHODS = (LORA, LoHaConfig(r=2, target_modules="all-linear"), VeraConfig(r=2, target_modules=["q_proj", "o_proj"]))
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def adapted(config: ak.AdapterConfig, dtype: torch.dtype = torch.float32) -> tuple[Any, ak.Adapters]:
    model = build("llama").to(dtype).train()
    torch.manual_seed(1)
    adapters = ak.attach(model)
    adapters.add("a", config)
    return model, adapters


def train(model: Any, adapters: ak.Adapters, rows: slice, *, accumulated: int = 1) -> None:
    """Two steps, each on `accumulated` batches, of which this process has these rows."""
    optimizer, words = torch.optim.AdamW(adapters.parameters("a"), 1e-2), inputs("llama")["input_ids"]
    for step in range(2):
        for batch in range(accumulated):
            own = ((words + step + batch) % 32)[rows]
            last = batch == accumulated - 1
            with nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
                (model(input_ids=own, labels=own).loss / accumulated).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_trains_as_one_process(
    wrap: Callable[[Any], Any], config: ak.AdapterConfig, dtype: torch.dtype = torch.float32, **options: Any
) -> ak.Adapters:
    model, adapters = adapted(config, dtype)
    train(wrap(model), adapters, slice(dist.get_rank(), dist.get_rank() + 1), **options)
    alone, expected = adapted(config, dtype)
    train(alone, expected, slice(None), **options)
    near = TOLERANCE[dtype]
    torch.testing.assert_close(adapters.state_dict("a"), expected.state_dict("a"), rtol=near, atol=near)
    assert_alike(copies(adapters.state_dict("a")))
    return adapters


def checkpointed(model: Any) -> Any:
    """With gradient checkpointing, in one graph that does not change."""
    model.activation_checkpointing_enable()
    return DistributedDataParallel(model, static_graph=True)


def ddp_trains_as_one_process(folder: Path) -> None:
    for config in METHODS:
        assert_trains_as_one_process(DistributedDataParallel, config)
    assert_trains_as_one_process(partial(DistributedDataParallel, find_unused_parameters=True), WHOLE)
    assert_trains_as_one_process(partial(DistributedDataParallel, gradient_as_bucket_view=True), LORA, accumulated=2)
    assert_trains_as_one_process(checkpointed, LORA)


def shard(model: Any, **options: Any) -> Any:
    """Each block of the model is a group, with the adapters of its layers."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, **options)
    return model


def fsdp2_trains_as_one_process(folder: Path) -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    for config in (*METHODS, WHOLE):
        assert_trains_as_one_process(shard, config)
    half = torch.bfloat16
    adapters = assert_trains_as_one_process(shard, LORA, half)
    assert {p.dtype for p in adapters.parameters("a")} == {torch.float32}  # on a base in bfloat16
    mixed = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    assert_trains_as_one_process(partial(shard, mp_policy=mixed), LORA, half)
    assert_trains_as_one_process(partial(shard, offload_policy=CPUOffloadPolicy(pin_memory=False)), LORA)


def saving_and_loading_gather_adapters_alone(folder: Path) -> None:
    from torch.distributed.tensor.debug import CommDebugMode

    model, adapters = adapted(WHOLE)
    own, expected = copies(adapters.state_dict("a")), run(model.eval(), "llama")
    shard(model)
    with CommDebugMode() as communication:
        adapters.save("a", folder / "a")
    gathers = communication.get_comm_counts()[torch.ops.c10d_functional.all_gather_into_tensor]
    assert gathers == len([*adapters.parameters("a")])
    late = build("llama")
    shard(late)
    assert ak.attach(late).load(folder / "a", "a").ok
    assert_same(copies(ak.attach(late).state_dict("a")), own)
    torch.testing.assert_close(run(late, "llama"), expected)
    again = build("llama")
    ak.attach(again).load(folder / "a", "a", trainable=True)
    shard(again)  # a resumed training: the adapter is there before
    before = sum(p.numel() for p in ak.attach(again).parameters("a"))
    held = sum(p.to_local().numel() for p in ak.attach(again).parameters("a"))  # type: ignore[attr-defined]
    assert held <= before / 2 + 2
    torch.testing.assert_close(run(again, "llama"), expected)


def initial_values_do_not_depend_on_the_sharding(folder: Path) -> None:
    _, plain = adapted(LORA)
    sharded = shard(build("llama"))
    torch.manual_seed(1)
    ak.attach(sharded).add("a", LORA, activate=False)
    assert_same(copies(ak.attach(sharded).state_dict("a")), copies(plain.state_dict("a")))
    adapters = ak.attach(build("llama"))
    torch.manual_seed(1)
    adapters.add("a", LORA.replace(target_modules=["v_proj"]))
    assert all(torch.equal(tensor, plain.state_dict("a")[key]) for key, tensor in adapters.state_dict("a").items())


def a_model_gets_its_memory_after_its_adapters(folder: Path) -> None:
    """As in torchtitan and torchtune: everything on the meta device, then the shards, then the values."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    base, seed = build("embednet"), 1 + dist.get_rank()
    config = LoraConfig(r=2, target_modules=["0", "1"], modules_to_save=["head"], init_lora_weights="pissa")
    torch.manual_seed(seed)
    with torch.device("meta"):
        model: Any = build("embednet")
        adapters = ak.attach(model)
        adapters.add("a", config)
    for module in (*model.layers, model):
        fully_shard(module)
    model.to_empty(device="cpu")
    weights = base.state_dict() if dist.get_rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, weights, options=options)
    refused(lambda: adapters.save("a", folder / "a"), "'a' has no values", "adapters.reset('a')")
    adapters.reset("a")
    assert_alike(copies(adapters.training_state("a")))  # though the processes have seeds of their own
    torch.testing.assert_close(run(model, "embednet"), run(base, "embednet"), atol=1e-5, rtol=1e-5)
    before = copies(adapters.state_dict("a"))
    optimizer = torch.optim.AdamW(adapters.parameters("a"), 1e-2)
    model(inputs("embednet")["x"][dist.get_rank() :][:1]).square().mean().backward()
    optimizer.step()
    after = copies(adapters.state_dict("a"))
    assert_alike(after)
    assert all(not torch.equal(after[key], value) for key, value in before.items())


def a_method_with_a_penalty_and_a_step_trains_as_in_one_process(folder: Path) -> None:
    sys.path.append(str(Path(__file__).parents[2] / "examples" / "thirdparty" / "adapterkit_adalora"))
    from adapterkit_adalora import AdaLoraConfig, plugin

    ak.register(plugin)
    sizes = {"init_r": 3, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1, "total_step": 6}
    config = AdaLoraConfig(target_modules=["q_proj", "v_proj", "lm_head"], **sizes)  # type: ignore[arg-type]
    found = []
    for wrap in (lambda model: model, DistributedDataParallel, shard):
        model, adapters = adapted(config)
        wrapped, optimizer = wrap(model), torch.optim.SGD(adapters.parameters("a"), 0.1)
        words = inputs("llama")["input_ids"][
            slice(None) if wrapped is model and wrap is not shard else [dist.get_rank()]
        ]
        for _ in range(3):
            (wrapped(input_ids=words, labels=words).loss + ak.penalty(wrapped)).backward()
            optimizer.step()
            adapters.step()
            optimizer.zero_grad()
        found.append(copies(adapters.training_state("a")))
        refused(adapters.step, "before zero_grad()")
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


class Stage(nn.Module):
    """The second of two stages of a pipeline: the last block and the head, without the others."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleDict({"1": model.model.layers[1]})
        self.model.rotary_emb, self.model.norm, self.lm_head = model.model.rotary_emb, model.model.norm, model.lm_head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        positions = self.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        found: torch.Tensor = self.model.layers["1"](hidden, position_embeddings=positions)
        return self.lm_head(self.model.norm(found))


def a_stage_of_a_pipeline_has_its_part_of_an_adapter(folder: Path) -> None:
    _, adapters = adapted(LORA)
    keys = {key for key in adapters.state_dict("a") if ".layers.1." in key}
    stage = Stage(build("llama"))
    part = ak.attach(stage)
    torch.manual_seed(1)
    part.add("a", LORA)
    assert_same(copies(part.state_dict("a")), {key: adapters.state_dict("a")[key].clone() for key in keys})
    adapters.save("a", folder / str(dist.get_rank()))
    part.remove("a")
    refused(lambda: part.load(folder / str(dist.get_rank()), "a"), "layers.0", error=ak.CheckpointError)
    with pytest.warns(ak.AdapterWarning, match="layers.0"):
        part.load(folder / str(dist.get_rank()), "a", strict=False)
    assert_same(copies(part.state_dict("a")), {key: adapters.state_dict("a")[key].clone() for key in keys})


def data_parallel_passes_on_to_the_model(folder: Path) -> None:
    model, adapters = adapted(LORA)
    wrapped = DataParallel(model.eval())
    assert ak.attach(wrapped) is adapters
    torch.testing.assert_close(wrapped(**inputs("llama")).logits, model(**inputs("llama")).logits)


SCENARIOS = (
    saving_and_loading_gather_adapters_alone,
    initial_values_do_not_depend_on_the_sharding,
    a_model_gets_its_memory_after_its_adapters,
    a_stage_of_a_pipeline_has_its_part_of_an_adapter,
    data_parallel_passes_on_to_the_model,
    ddp_trains_as_one_process,
    fsdp2_trains_as_one_process,
    a_method_with_a_penalty_and_a_step_trains_as_in_one_process,
)


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    on_two_processes(InTurn(*SCENARIOS), tmp_path)
