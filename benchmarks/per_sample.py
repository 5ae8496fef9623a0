"""What does it cost to have a different adapter for each row of a batch, as the number of adapters grows?

One decoding step, with one token for each row. `hand: gathered` stacks the factors of all rows and computes two batched
products; `hand: one by one` picks the rows of each adapter. `base` is the model without adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak
from benchmarks.check import same
from benchmarks.libraries import RANK, adapter_parameters, give_values
from benchmarks.models import NAMES, Stack
from benchmarks.runner import Case, Goal, Run, repeated

LLAMA = [f"{name}_proj" for name in NAMES]


def cases(tiny: bool) -> Iterator[Case]:
    """A small transformer, and layers alone, with few adapters and with many."""
    hidden, rows = (16, 4) if tiny else (256, 64)
    for count in (2, 3) if tiny else (4, 16, 64):
        curve = ("adapters", count)
        case = Ways(lambda: decoder(hidden), LLAMA, count, rows).case(f"Llama of width {hidden}", curve)
        yield case
    for width in (hidden,) if tiny else (256, 1024):
        for count in (2,) if tiny else (4, 16):
            yield Ways(lambda width=width: Stack(1, width), NAMES, count, rows).case(f"7 layers of {width}")


def decoder(hidden: int) -> nn.Module:
    """A Llama of two blocks, with the same values each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2, "vocab_size": 512}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=4, **sizes)).eval()


class HandRows(nn.Module):
    """A linear layer whose rows each have their own factors."""

    def __init__(self, layer: nn.Linear, downs: list[Tensor], ups: list[Tensor], slots: Tensor, gathered: bool) -> None:
        super().__init__()
        self.layer, self.downs, self.ups, self.gathered = layer, downs, ups, gathered
        self.rows = [(slots == i).nonzero().flatten() for i in range(len(downs))]
        self.down, self.up = torch.stack(downs)[slots], torch.stack([up.t() for up in ups])[slots]

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T + x A_i^T B_i^T` for each row `i`."""
        out = self.layer(x)
        if self.gathered:
            tokens = x.view(len(x), -1, x.shape[-1])
            return torch.baddbmm(out.view(len(x), -1, out.shape[-1]), tokens @ self.down.mT, self.up).view(out.shape)
        for rows, down, up in zip(self.rows, self.downs, self.ups, strict=True):
            out.index_add_(0, rows, F.linear(F.linear(x[rows], down), up))
        return out


class Ways:
    """The same adapters on the same model, in each way; every row has one of them."""

    def __init__(self, make: Callable[[], nn.Module], targets: list[str], count: int, rows: int) -> None:
        self.names = [f"a{i % count}" for i in range(rows)]
        self.count, self.rows, self.base = count, rows, make().requires_grad_(False)
        self.ours, self.peft = ak.attach(make()), self._peft(make(), targets)
        for i in range(count):
            config = ak.config("lora", r=RANK, lora_alpha=RANK, target_modules=targets)
            self.ours.add(f"a{i}", config, activate=False)
            for model in (self.ours.model, self.peft):
                give_values(adapter_parameters(model, f"a{i}"), i)
        self.x = torch.arange(rows).view(-1, 1) if targets is LLAMA else torch.linspace(-1, 1, rows * self.base.hidden)
        if targets is not LLAMA:
            self.x = self.x.view(rows, 1, -1)
        self.hand = {gathered: self._hand(make(), targets, gathered) for gathered in (True, False)}

    def _peft(self, model: nn.Module, targets: list[str]) -> Any:
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
        found = peft.get_peft_model(model, config, adapter_name="a0")
        for i in range(1, self.count):
            found.add_adapter(f"a{i}", config)
        return found.eval()

    def _hand(self, model: nn.Module, targets: list[str], gathered: bool) -> nn.Module:
        slots = torch.tensor([int(name[1:]) for name in self.names])
        values = [[p.detach() for _, p in adapter_parameters(self.ours.model, f"a{i}")] for i in range(self.count)]
        places = [(m, n) for m in model.modules() for n, _ in m.named_children() if n in targets]
        for at, (owner, name) in enumerate(places):
            downs, ups = ([own[2 * at + i] for own in values] for i in range(2))
            setattr(owner, name, HandRows(getattr(owner, name), downs, ups, slots, gathered))
        return model.requires_grad_(False)

    def _run(self, model: Any, **more: Any) -> Run:
        @torch.no_grad()
        def step() -> Tensor:
            out = model(self.x, **more)
            return out if isinstance(out, Tensor) else out.logits

        return step

    def _ours(self) -> Run:
        step = self._run(self.ours.model)
        self.block = self.ours.per_sample(self.names)  # the block lasts for the whole generation
        self.block.__enter__()
        return step

    def case(self, what: str, curve: tuple[str, int] | None = None) -> Case:
        """One row of the table."""
        runs = {
            "hand: gathered": self._run(self.hand[True]),
            "hand: one by one": self._run(self.hand[False]),
            "adapterkit": self._ours(),
            "peft": self._run(self.peft, adapter_names=self.names),
            "base": self._run(self.base),
        }
        name = f"{what}, {self.rows} rows" + (f", {self.count} adapters" if curve is None else "")
        ways = {way: repeated(run) for way, run in runs.items()}
        goals = (Goal(1.6, beside="base"),)
        return Case(name, ways, goals, adapted_same, calls=3, seconds=4.0, curve=curve, why=WHY if curve else "")


WHY = "a few products a layer for all rows, whatever the number of adapters; beyond that, copying their factors"


def adapted_same(results: Mapping[str, Any]) -> None:
    """All ways but `base`, which does another thing, give the same."""
    same({name: result for name, result in results.items() if name != "base"}, 1e-3, 1e-4)
