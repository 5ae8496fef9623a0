"""Modules with trained copies in a view of PEFT: PEFT's `ModulesToSaveWrapper`."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.utils import ModulesToSaveWrapper
from tests.models import build
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_lora import LoraConfig


class Two(nn.Module):
    """A body and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.body(x))
        return result


def viewed(*names: str) -> tuple[Any, ak.Adapters]:
    model = Two()
    adapters = ak.attach(model)
    for name in names:
        adapters.add(
            name, LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]), activate=name == names[0]
        )
        nn.init.normal_(adapters.heads(name)["head"].weight)
    return ak.as_peft(model), adapters


def test_a_module_with_trained_copies_is_pefts_wrapper_until_they_are_removed() -> None:
    view, adapters = viewed("default", "other")
    head = adapters.model.head
    assert isinstance(head, ModulesToSaveWrapper)
    assert isinstance(head, nn.Linear)
    assert head.original_module.weight is adapters.model._modules["head"]._parameters["weight"]
    assert {*head.modules_to_save} == {"default", "other"}
    assert head.active_adapters == ["default"]
    assert [status.module_type for status in view.get_layer_status()] == ["lora.Linear", "ModulesToSaveWrapper"]
    assert sum(isinstance(module, ModulesToSaveWrapper) for module in view.modules()) == 1
    adapters.detach()
    assert type(head) is nn.Linear


def test_the_weight_of_a_module_with_trained_copies_is_that_of_the_one_that_acts() -> None:
    view, adapters = viewed("default", "other")
    head, x = adapters.model.head, torch.randn(3, 4)
    base = head.original_module.weight
    for name in ("default", "other"):
        view.set_adapter(name)
        assert head.weight is adapters.heads(name)["head"].weight
        assert head.bias is adapters.heads(name)["head"].bias
    expected = [view(x)]
    with view.disable_adapter():
        assert head.weight is base
        expected.append(view(x))
    rows = view.eval()(torch.cat([x, x]), adapter_names=["other"] * 3 + ["__base__"] * 3)
    torch.testing.assert_close(rows, torch.cat(expected))
    with torch.no_grad():
        head.weight.zero_()
    assert base.abs().sum() > 0


def test_the_weight_of_an_output_layer_that_a_loss_reads_is_that_of_the_copy_that_acts() -> None:
    model: Any = build("llama")
    adapters = ak.attach(model)
    adapters.add("default", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    base, copied = model.lm_head.weight, adapters.heads("default")["lm_head"].weight
    view = ak.as_peft(model)
    assert view.get_output_embeddings().weight is copied
    with view.disable_adapter():
        assert model.lm_head.weight is base
    adapters.detach()
    assert model.lm_head.weight is base


def test_a_layer_that_is_added_beside_a_trained_copy_starts_from_the_base() -> None:
    view, adapters = viewed("default")
    plain = Two()
    plain.head.load_state_dict(adapters.model.head.original_module.state_dict())
    config = LoraConfig(r=2, target_modules=["head"], init_lora_weights="pissa")
    for model in (adapters.model, plain):
        ak.attach(model).add("pissa", config, activate=False)
    found, expected = (ak.attach(model).layers("pissa")["head"].state_dict() for model in (adapters.model, plain))
    torch.testing.assert_close(found, expected)
    state = peft.get_peft_model_state_dict(view)
    assert any(key.startswith("base_model.model.head") for key in state)


def test_what_a_trained_copy_cannot_do_alone_is_refused() -> None:
    view, adapters = viewed("default", "other")
    head, x = adapters.model.head, torch.randn(3, 4)
    before = view(x)
    for call in (
        lambda: head.set_adapter("other"),
        lambda: head.enable_adapters(False),
        lambda: head.delete_adapter("other", None),
        lambda: head.update("third"),
        lambda: head.modules_to_save.update({"other": nn.Linear(4, 3)}),
    ):
        with pytest.raises(ak.UnsupportedError, match=r"view|cannot be (set|removed)"):
            call()
    head.set_adapter("default")
    head.enable_adapters(True)
    assert torch.equal(view(x), before)
