"""How does each operation grow, and why can it not grow slower?

The slope is that of the line through the logarithms of size and cost: 0 is flat, 1 is linear, 2 is quadratic. Small
sizes have a part that does not grow, so the measured slopes are below those of large sizes.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak
from benchmarks.hand import HandModel
from benchmarks.libraries import OUR_CONFIG, PEFT_CONFIG, adapter_parameters, give_values, names
from benchmarks.models import Stack
from benchmarks.runner import Case, Run, Way, repeated
from benchmarks.switch import Three

FLAT = "one pointer that all layers read"
EACH_LAYER = "each layer gets or gives up something of its own"
EACH_NUMBER = "each number is made, read or written once"


def cases(tiny: bool) -> Iterator[Case]:
    """Curves over layers, adapters, rank, rows and vocabulary."""
    for blocks in (1, 2) if tiny else (32, 80, 200):
        yield from _layers(blocks)
    for count in (2, 3) if tiny else (2, 10, 100):
        yield from _adapters(count)
    for rank in (4, 8) if tiny else (4, 16, 64, 256):
        yield from _ranks(rank, 64 if tiny else 512)
    for rows in (8, 16) if tiny else (8, 64, 512, 4096):
        yield _rows(rows)
    for words in (100, 200) if tiny else (8_000, 32_000, 128_000):
        yield from _vocabulary(words)


def _on(case: Case, operation: str, axis: str, size: int, why: str) -> Case:
    return dataclasses.replace(
        case, operation=operation, curve=(axis, size), why=why, goals=(), plotted=False, rounds=5, seconds=3.0
    )


def _layers(blocks: int) -> Iterator[Case]:
    two, size = Three(blocks, 2, hidden=64, peft=False), 7 * blocks
    yield _on(two.switching(False), "switch for inference", "layers", size, FLAT)
    yield _on(two.disabling(False), "disabled()", "layers", size, FLAT)
    yield _on(two.training(), "switch for training", "layers", size, "each parameter has a `requires_grad`")
    yield _on(two.deleting(), "delete", "layers", size, EACH_LAYER)
    yield _on(_adding(two, {}), "add", "layers", size, EACH_LAYER)
    yield _on(_loading(two), "load", "layers", size, EACH_LAYER)


def _adding(models: Three, peft: dict[str, Any]) -> Case:
    new = names()

    def way(model: Any, add: Callable[[str], object]) -> Way:
        def added(_: object) -> int:
            before = len(list(model.parameters()))
            add(next(new))
            return len(list(model.parameters())) - before

        return repeated(lambda: add(next(new)), added)

    ways = {
        "hand": way(models.hand.model, lambda name: models.hand.inject(name, train=False)),
        "adapterkit": way(models.ours.model, lambda name: models.ours.add(name, OUR_CONFIG, activate=False)),
    }
    return Case("add", {**ways, **{name: way(model, add) for name, (model, add) in peft.items()}})


def _loading(models: Three) -> Case:
    temporary = tempfile.TemporaryDirectory()
    folder, new = Path(temporary.name) / "a", names()
    models.ours.save("a0", folder)

    def load() -> str:
        name = next(new)
        models.ours.load(folder, name, activate=False)
        return name

    def by_hand() -> str:
        from safetensors.torch import load_file

        models.hand.assign("loaded", load_file(folder / "adapter_model.safetensors"))
        return "loaded"

    return Case(
        "load",
        {
            "hand": repeated(by_hand, models.hand.tensors),
            "adapterkit": repeated(load, lambda name: temporary and dict(models.ours.state_dict(name))),
        },
    )


def _adapters(count: int) -> Iterator[Case]:
    many = Three(2, count, hidden=64)
    yield _on(many.switching(False), "switch for inference", "adapters", count, FLAT)
    yield _on(many.disabling(False), "disabled()", "adapters", count, FLAT)
    yield _on(many.training(), "switch for training", "adapters", count, "only the old and the new are touched")
    yield _on(many.deleting(), "delete", "adapters", count, "only the deleted one is touched")
    peft = {"peft": (many.peft, lambda name: many.peft.add_adapter(name, PEFT_CONFIG))}
    yield _on(_adding(many, peft), "add a further one", "adapters", count, "what is there already is not touched")
    yield _on(_forward(many, 8), "forward with one active", "adapters", count, "only the active one is looked up")


def _forward(models: Three, rows: int) -> Case:
    def way(name: str) -> Way:
        model = models.models[name]
        x = torch.linspace(-1.0, 1.0, rows * models.hand.layers[0][1].in_features).view(rows, -1)

        @torch.no_grad()
        def run() -> Tensor:
            out: Tensor = model(x)
            return out

        return repeated(run)

    models.hand.pointer.name = "a0"
    models.ours.activate("a0", trainable=False)
    if models.peft is not None:
        models.peft.set_adapter("a0", inference_mode=True)
    return Case("forward", {name: way(name) for name in models.models}, calls=3)


def _ranks(rank: int, hidden: int) -> Iterator[Case]:
    config = OUR_CONFIG.replace(r=rank, lora_alpha=rank)
    by_hand, adapters = HandModel(Stack(2, hidden), rank), ak.attach(Stack(2, hidden))
    by_hand.inject("a0")
    adapters.add("a0", config)
    for model in (by_hand.model, adapters.model):
        give_values(adapter_parameters(model, "a0"), 0)
    x = torch.linspace(-1.0, 1.0, 64 * hidden).view(64, hidden)

    def forward(model: nn.Module) -> Way:
        return repeated(torch.no_grad()(lambda: model(x)))

    forwards = {"hand": forward(by_hand.model), "adapterkit": forward(adapters.model)}
    why = "linear beside the layer's own product: `2 r / hidden` of it"
    yield _on(Case("forward", forwards, calls=3), "forward, 64 rows", "rank", rank, why)
    new = names()

    def add(run: Callable[[str], object], model: nn.Module) -> Way:
        return repeated(lambda: run(next(new)), lambda _: sum(p.numel() for p in model.parameters() if p.requires_grad))

    adding = {
        "hand": add(lambda name: by_hand.inject(name, train=False), by_hand.model),
        "adapterkit": add(lambda name: adapters.add(name, config, activate=False), adapters.model),
    }
    yield _on(Case("add", adding), "add", "rank", rank, EACH_NUMBER)


def _rows(rows: int) -> Case:
    models = Three(1, 2)
    return _on(_forward(models, rows), "forward, hidden 256", "rows", rows, "each row is multiplied")


class _Words(nn.Module):
    """A table of words and nothing else."""

    def __init__(self, words: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.table = nn.Embedding(words, 64)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.table(ids)
        return out


def _vocabulary(words: int) -> Iterator[Case]:
    model, plain = _Words(words), _Words(words)
    config = ak.config("lora", r=16, lora_alpha=16, target_modules=["table"])
    adapters = ak.attach(model)
    adapters.add("a0", config)
    give_values(adapter_parameters(model, "a0"), 0)
    down, up = (p.detach() for _, p in adapter_parameters(model, "a0"))
    ids = torch.arange(0, words, max(1, words // 64))[:64]

    @torch.no_grad()
    def by_hand() -> Tensor:
        return F.embedding(ids, plain.table.weight) + F.embedding(ids, down.t()) @ up.t()

    ways = {"hand": repeated(by_hand), "adapterkit": repeated(torch.no_grad()(lambda: model(ids)))}
    why = "only the rows that are looked up are read"
    yield _on(Case("forward", ways, calls=10), "forward of an embedding, 64 words", "vocabulary", words, why)
    new = names()

    def factors() -> tuple[Tensor, Tensor]:
        return nn.Parameter(torch.zeros(16, words)), nn.Parameter(torch.empty(64, 16).normal_())

    def add() -> Run:
        name = next(new)

        def run() -> list[nn.Parameter]:
            adapters.add(name, config, activate=False)
            return list(adapters.parameters(name))

        return run

    def shapes(made: Any) -> list[tuple[int, ...]]:
        return [tuple(p.shape) for p in made]

    adding = {"hand": repeated(factors, shapes), "adapterkit": Way(add, shapes)}
    yield _on(Case("add", adding), "add to an embedding", "vocabulary", words, EACH_NUMBER)
