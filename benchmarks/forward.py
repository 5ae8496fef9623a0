"""What do forwards and training steps cost, and what does autograd keep?

One square Linear layer with its bias, float32. `hand` is the least raw torch: LoRA, and LoHa by its Khatri-Rao
factors, as two small products and one scaled sum for each adapter; VeRA the same through its shared projections.
`hand: one product` is one `addmm` for LoRA, factors put together beforehand for several, and W + dW for LoHa. A
training step is forward and backward, with gradients of the input and of the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak
from benchmarks.check import within
from benchmarks.memory import saved
from benchmarks.runner import Case, Goal, Measure, Run, Way, repeated

Forward = Callable[[Tensor], Tensor]
LORA, VERA = 8, 16
PRODUCT = "hand: one product"
PEFT = {"lora": peft.LoraConfig, "loha": peft.LoHaConfig, "vera": peft.VeraConfig}


def cases(tiny: bool) -> Iterator[Case]:
    """Each method at sizes from where calls decide to where arithmetic does."""
    small, large = ((16, 2), (16, 3)) if tiny else ((256, 8), (2048, 1024))
    for hidden, tokens in (small,) if tiny else (small, (768, 8), (2048, 1), large):
        yield from both(Layers("lora", hidden, LORA), tokens, Goal(1.1))
    for count in (2,) if tiny else (2, 4):
        for hidden, tokens in (small, large):
            yield timed(Layers("lora", hidden, LORA, count), tokens, Goal(1.1), train=False)
    shapes = (
        [(16, 2, 2)] if tiny else [(256, 16, 128), (768, 32, 1024), (2048, 8, 8), (2048, 8, 1024), (2048, 16, 1024)]
    )
    for hidden, rank, tokens in shapes:
        yield from both(Layers("loha", hidden, rank), tokens, Goal(1.15))
    for hidden, tokens in (small, large):
        yield from both(Layers("vera", hidden, VERA), tokens, Goal(1.15))
    for method, rank in (("loha", 2 if tiny else 8), ("vera", VERA)):
        yield kept(Layers(method, large[0], rank), large[1])


def both(layers: Layers, tokens: int, goal: Goal) -> Iterator[Case]:
    """Inference and a training step."""
    for train in (False, True):
        yield timed(layers, tokens, goal, train)


class Layers:
    """One layer with `count` adapters of a method, all active, made by each library with the same values."""

    def __init__(self, method: str, hidden: int, rank: int, count: int = 1) -> None:
        self.method, self.hidden, self.rank = method, hidden, rank
        self.names = [f"a{i}" for i in range(count)]
        self.base = nn.Linear(hidden, hidden).requires_grad_(False)
        self.adapters = self._ours()
        self.peft = self._theirs()

    def __str__(self) -> str:
        many = f"{len(self.names)} × " if len(self.names) > 1 else ""
        return f"{many}{ {'lora': 'LoRA', 'loha': 'LoHa', 'vera': 'VeRA'}[self.method] } r={self.rank}, {self.hidden}"

    def ways(self) -> dict[str, Forward]:
        """The layer as each library runs it."""
        hands = {"lora": self._lora, "loha": self._loha, "vera": self._vera}[self.method]()
        found: dict[str, Forward] = {**hands, "adapterkit": self.adapters.model, "peft": self.peft}
        return found if self.method == "vera" or len(self.names) > 1 else {**found, "lycoris": self._lycoris()}

    def parameters(self, way: str) -> list[Tensor]:
        """What trains."""
        if way == "lycoris":
            return list(self.trained.parameters())
        if way == "peft":
            return [p for p in self.peft.parameters() if p.requires_grad]
        return list(self.adapters.parameters(self.names[0]))

    def _model(self) -> nn.Module:
        layer = nn.Linear(self.hidden, self.hidden, device="meta")
        layer.weight, layer.bias = self.base.weight, self.base.bias  # one for all: in the cache for all or for none
        model = nn.Sequential()
        model.add_module("fc", layer)
        return model

    def _fields(self) -> dict[str, Any]:
        alpha = {"lora": {"lora_alpha": 2 * self.rank}, "loha": {"alpha": 2 * self.rank}}.get(self.method, {})
        return {"r": self.rank, "target_modules": ["fc"], **alpha}

    def _ours(self) -> ak.Adapters:
        adapters = ak.attach(self._model())
        for i, name in enumerate(self.names):
            adapters.add(name, ak.config(self.method, **self._fields()), activate=False)
            generator = torch.Generator().manual_seed(i)
            with torch.no_grad():
                for parameter in adapters.parameters(name):
                    parameter.normal_(std=self.rank**-0.5 / 4, generator=generator)
        return adapters

    def _theirs(self) -> Any:
        config = PEFT[self.method](**self._fields())
        model = peft.get_peft_model(self._model(), config, adapter_name=self.names[0])
        for name in self.names[1:]:
            model.add_adapter(name, config)
        for name in self.names:
            peft.set_peft_model_state_dict(model, dict(self.adapters.state_dict(name)), adapter_name=name)
        model.base_model.set_adapter(self.names)
        return model

    def _own(self, name: str) -> Any:
        return self.adapters.model.fc.adapters[name]

    def _lora(self) -> dict[str, Forward]:
        weight, bias = self.base.weight, self.base.bias
        factors = [self._own(name).factors() for name in self.names]
        pairs = [(f.down, f.up) for f in factors]

        def loop(x: Tensor) -> Tensor:
            out = F.linear(x, weight, bias)
            for down, up in pairs:
                out = torch.add(out, F.linear(F.linear(x, down), up), alpha=2.0)
            return out

        def product(x: Tensor) -> Tensor:
            return torch.addmm(F.linear(x, weight, bias), F.linear(x, pairs[0][0]), pairs[0][1].t(), alpha=2.0)

        if len(pairs) == 1:
            return {"hand": loop, PRODUCT: product}
        downs, ups = (torch.cat(list(side), i).detach() for i, side in enumerate(zip(*pairs, strict=True)))

        def together(x: Tensor) -> Tensor:
            return torch.add(F.linear(x, weight, bias), F.linear(F.linear(x, downs), ups), alpha=2.0)

        return {"hand": loop, PRODUCT: together}

    def _loha(self) -> dict[str, Forward]:
        weight, bias = self.base.weight, self.base.bias
        a1, b1, a2, b2 = self.adapters.parameters(self.names[0])

        def factored(x: Tensor) -> Tensor:
            up, down = (a1[:, :, None] * a2[:, None]).flatten(1), (b1[:, None] * b2[None]).flatten(0, 1)
            return torch.add(F.linear(x, weight, bias), F.linear(F.linear(x, down), up), alpha=2.0)

        def whole(x: Tensor) -> Tensor:
            return F.linear(x, torch.addcmul(weight, a1 @ b1, a2 @ b2, value=2.0), bias)

        return {"hand": factored, PRODUCT: whole}

    def _vera(self) -> dict[str, Forward]:
        weight, bias = self.base.weight, self.base.bias
        up, down, _, b, d = self._own(self.names[0]).factors()
        return {
            "hand": lambda x: torch.addcmul(F.linear(x, weight, bias), F.linear(F.linear(x, down) * d, up), b),
        }

    def _lycoris(self) -> Forward:
        from lycoris.modules.locon import LoConModule
        from lycoris.modules.loha import LohaModule

        layer: Any = self._model().fc
        cls = {"lora": LoConModule, "loha": LohaModule}[self.method]
        self.trained = cls("fc", layer, 1.0, self.rank, 2.0 * self.rank)
        own = self._own(self.names[0])
        names = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
        with torch.no_grad():
            for name, parameter in self.trained.named_parameters():
                parameter.copy_(own.get_parameter(names.get(name, name)))
        self.trained.apply_to()
        return layer  # type: ignore[no-any-return]


def timed(layers: Layers, tokens: int, goal: Goal, train: bool) -> Case:
    """One case."""
    layers.adapters.activate(*layers.names, trainable=train)
    x = torch.randn(tokens, layers.hidden, generator=torch.Generator().manual_seed(0), requires_grad=train)
    ways = layers.ways()

    def step(way: str) -> Run:
        if not train:
            return torch.no_grad()(lambda: ways[way](x))
        trained = [x, *layers.parameters(way)]

        def run() -> tuple[Tensor, Tensor]:
            out = ways[way](x)
            return out.detach(), torch.autograd.grad(out, trained, torch.ones_like(out))[0]

        return run

    def prepared(way: str) -> Run:
        if (
            next(layers.adapters.parameters(layers.names[0])).requires_grad != train
        ):  # the other case's turn came between
            layers.adapters.activate(*layers.names, trainable=train)
        return step(way)

    sort, large = "training step" if train else "inference", tokens * layers.hidden > 2**16
    return Case(
        f"{layers} × {tokens} tokens, {sort}",
        {way: Way(partial(prepared, way)) for way in ways},
        (goal, Goal(1.0, beside="peft")),
        check=within(1e-3, 1e-3),
        rounds=21,
        calls=1 if large else 50,
        seconds=4.0,
    )


def kept(layers: Layers, tokens: int) -> Case:
    """What autograd keeps of a forward, the input and parameters apart."""
    layers.adapters.activate(*layers.names)
    x = torch.randn(tokens, layers.hidden, requires_grad=True)
    own = [x, layers.base.weight, *layers.adapters.model.buffers()]
    ways: Mapping[str, Forward] = {k: v for k, v in layers.ways().items() if not k.startswith("hand")}
    return Case(
        f"{layers} × {tokens} tokens, kept for the backward",
        {way: repeated(partial(forward, x)) for way, forward in ways.items()},
        (Goal(0.7, beside="peft"),),
        check=within(1e-3, 1e-3),
        measure=Measure("MiB", partial(saved, own=own)),
        rounds=1,
        warm_up=False,
    )
