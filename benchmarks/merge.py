"""What does it cost to merge an adapter into the weights in memory, and how much memory beside them?

`hand` adds the product to each weight in place and keeps nothing, as adapterkit's `merge_and_detach` does. `merge`
keeps the base, so that `unmerge` restores it bit for bit; PEFT subtracts the product again, which is not exact.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import adapterkit as ak
from benchmarks.check import same, within
from benchmarks.libraries import OUR_CONFIG, adapter_parameters, give_values, hand, ours, theirs
from benchmarks.memory import PEAK
from benchmarks.models import Stack, linears
from benchmarks.runner import Case, Goal, Run, Way


def cases(tiny: bool) -> Iterator[Case]:
    """Time and memory, in float32 and in bfloat16."""
    blocks, hidden = (1, 64) if tiny else (2, 2048)
    for dtype in (torch.float32, torch.bfloat16):
        ways = Models(blocks, hidden, dtype).ways()
        what = f"merge LoRA in {str(dtype).removeprefix('torch.')}, {7 * blocks} layers of {hidden}"
        check = same if dtype == torch.float32 else within(1e-2, 1e-2)
        yield Case(what, ways, (Goal(1.2),), check, rounds=5, plotted=True)
        # By the profiler: its first run in a process costs memory of its own, which warms up.
        yield Case(f"{what}: memory", ways, (Goal(limit=4.0),), check, PEAK, rounds=1)


class Models:
    """The same model and adapter for each way, and the bare weights to begin again from."""

    def __init__(self, blocks: int, hidden: int, dtype: torch.dtype) -> None:
        def make() -> nn.Module:
            return Stack(blocks, hidden).to(dtype)

        self.hand, self.peft = hand(make, 1), theirs(make, 1)
        self.plain, self.kept = make(), ours(make, 1)
        self.bare = {path: layer.weight.detach().clone() for path, layer in linears(self.plain)}
        for owner in (self.hand.model, self.peft, self.kept.model):
            give_values(adapter_parameters(owner, "a0"), 0)

    @torch.no_grad()
    def restored(self, model: nn.Module) -> None:
        """Give a model its bare weights again."""
        for path, layer in linears(model):
            layer.weight.copy_(self.bare[path])

    def ways(self) -> dict[str, Way]:
        """How each merges, from the bare weights each time."""
        base = self.peft.base_model.model
        return {
            "hand": Way(self._hand, lambda _: _weights(self.hand.model)),
            "adapterkit": Way(self._for_good, lambda _: _weights(self.plain)),
            "adapterkit: base kept": Way(self._keeping, lambda _: _weights(self.kept.model)),
            "peft": Way(self._theirs, lambda _: [m.base_layer.weight for m in base.modules() if hasattr(m, "lora_A")]),
        }

    def _hand(self) -> Run:
        self.restored(self.hand.model)
        return self.hand.merge

    def _for_good(self) -> Run:
        self.restored(self.plain)
        adapters = ak.attach(self.plain)
        adapters.add("a0", OUR_CONFIG)
        give_values(adapter_parameters(self.plain, "a0"), 0)
        return lambda: adapters.merge_and_detach("a0")

    def _keeping(self) -> Run:
        if self.kept.merged:
            self.kept.unmerge()
        return lambda: self.kept.merge("a0")

    def _theirs(self) -> Run:
        if self.peft.base_model.model.layers[0].q.merged:
            self.peft.unmerge_adapter()
        run: Run = self.peft.merge_adapter
        return run


def _weights(model: nn.Module) -> list[Tensor]:
    return [layer.weight.detach() for _, layer in linears(model)]
