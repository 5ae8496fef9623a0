"""What a training needs of adapters: which ones train, with which learning rates, and their whole state."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tests.models import build

import adapterkit as ak
from adapterkit_lora import LoraConfig

Trained = Callable[..., ak.Adapters]


# Which adapters train


def test_trainable_tells_which_adapters_require_gradients_whoever_set_it(trained: Trained) -> None:
    adapters = trained(build("bert"), "a", "b", "c", target_modules=["query"], modules_to_save=None)
    assert adapters.trainable == ()
    adapters.activate("c", "a")
    assert adapters.trainable == ("a", "c")
    next(iter(adapters.parameters("b"))).requires_grad_(True)
    with adapters.activated("b", trainable=False):
        assert adapters.trainable == ("a", "b", "c")
    adapters.activate()
    adapters.merge("a")
    assert adapters.trainable == ()
    with adapters.activated("b"):
        assert adapters.trainable == ("b",)


def test_heads_are_the_adapters_own_copies_by_path() -> None:
    model = build("bert")
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(target_modules=["query"], modules_to_save=["classifier"]), num_labels=5)
    adapters.add("b", LoraConfig(target_modules=["query"], modules_to_save=None))
    (path,) = adapters.heads("a")
    head = adapters.heads("a")[path]
    assert path == "classifier"
    assert isinstance(head, torch.nn.Linear)
    assert head.out_features == 5
    assert head is not model.get_submodule(path)
    assert adapters.heads("b") == {}
