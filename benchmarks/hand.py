"""Adapters by hand: the least plain torch that does the work, without checks, reports or a way back.

Each layer has two parameters, registered at the layer itself, so they move, train and are listed with the model. All
layers read one pointer to the active adapter. No module is made: all that a library makes beyond this is its own cost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import linears


@dataclass
class Pointer:
    """Which adapter is active."""

    name: str | None = None


class HandLinear(nn.Linear):
    """A linear layer that adds `B A x` of the adapter that its model's pointer names."""

    pointer: Pointer

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T + x A^T B^T`."""
        out = F.linear(x, self.weight, self.bias)
        down = self._parameters.get(f"lora_A_{self.pointer.name}")
        return (
            out if down is None else out + F.linear(F.linear(x, down), self._parameters[f"lora_B_{self.pointer.name}"])
        )


class HandModel:
    """The hand-written adapters of one model: LoRA, alpha = r."""

    def __init__(self, model: nn.Module, rank: int = 16) -> None:
        self.model, self.rank, self.pointer = model, rank, Pointer()
        self.trained: str | None = None
        self.layers: list[tuple[str, nn.Linear]] = []

    def inject(self, name: str, train: bool = True) -> None:
        """Add an adapter, active if it will train: A uniform (Kaiming), B zero. The first one freezes the model."""
        if not self.layers:
            self.model.requires_grad_(False)
            self.layers = linears(self.model)
        for _, layer in self.layers:
            down = torch.empty(self.rank, layer.in_features, device=layer.weight.device)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            up = torch.zeros(layer.out_features, self.rank, device=layer.weight.device)
            self._put(layer, name, nn.Parameter(down, train), nn.Parameter(up, train))
        if train:
            self.pointer.name = self.trained = name

    def assign(self, name: str, tensors: dict[str, Tensor]) -> None:
        """A new adapter with a file's tensors, by PEFT's keys, as they are."""
        if not self.layers:
            self.model.requires_grad_(False)
            self.layers = linears(self.model)
        for path, layer in self.layers:
            key = f"base_model.model.{path}.lora_"
            down, up = tensors[f"{key}A.weight"], tensors[f"{key}B.weight"]
            self._put(layer, name, nn.Parameter(down), nn.Parameter(up))
        self.pointer.name = self.trained = name

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The adapter's tensors by PEFT's keys."""
        found = {}
        for path, layer in self.layers:
            for part in "AB":
                parameter = layer._parameters[f"lora_{part}_{name}"]
                assert parameter is not None
                found[f"base_model.model.{path}.lora_{part}.weight"] = parameter.detach()
        return found

    def train(self, name: str) -> None:
        """Make one adapter active and trainable, and no other."""
        for _, layer in self.layers:
            for part in "AB":
                for other, on in ((self.trained, False), (name, True)):
                    parameter = layer._parameters.get(f"lora_{part}_{other}")
                    if parameter is not None:
                        parameter.requires_grad_(on)
        self.pointer.name = self.trained = name

    def remove(self, name: str) -> None:
        """Delete an adapter."""
        for _, layer in self.layers:
            del layer._parameters[f"lora_A_{name}"], layer._parameters[f"lora_B_{name}"]
        if self.pointer.name == name:
            self.pointer.name = None

    @torch.no_grad()
    def merge(self) -> None:
        """`W += B A` in float32, rounded once, for the adapter that acts."""
        for _, layer in self.layers:
            down, up = (layer._parameters[f"lora_{part}_{self.pointer.name}"] for part in "AB")
            assert down is not None
            assert up is not None
            weight = layer.weight
            if weight.dtype == torch.float32:
                weight.addmm_(up, down)
                continue
            for rows, changes in zip(weight.split(256), up.split(256), strict=True):  # few enough to stay in the cache
                rows.copy_(torch.addmm(rows.float(), changes.float(), down.float()))

    def _put(self, layer: nn.Linear, name: str, down: nn.Parameter, up: nn.Parameter) -> None:
        layer.__class__ = HandLinear
        layer.__dict__["pointer"] = self.pointer
        layer._parameters[f"lora_A_{name}"], layer._parameters[f"lora_B_{name}"] = down, up


class LoraModule(nn.Module):
    """The LoRA of textbooks: a module around the layer, with one linear layer for each factor."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`base(x) + B A x`."""
        out: Tensor = self.base(x) + self.lora_B(self.lora_A(x))
        return out


def inject_modules(model: nn.Module, rank: int = 16) -> nn.Module:
    """Put a `LoraModule` in the place of every linear layer."""
    model.requires_grad_(False)
    for path, layer in linears(model):
        with torch.device(layer.weight.device):
            model.set_submodule(path, LoraModule(layer, rank))
    return model
