"""Compare the forms of LoHa: which is the cheapest at which size, and which one the cost rule chooses.

    python benchmarks/loha_forms.py [--train | --infer] [--hidden 256 768] [--rank 4 8] [--tokens 8 128]

One Linear layer of `hidden x hidden`, one thread, all forms interleaved in one process; medians as multiples of
the base layer alone, and what autograd keeps for the backward. `(!)`: the rule chose a form that takes that many
times what the best one does. The forms are raw torch; `whole` is one product with W + dW.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.forward import arithmetic

Step = Callable[[Tensor], Tensor]
KEPT = ("adapterkit", "PEFT")


def forms(hidden: int, rank: int) -> dict[str, Step]:
    """Every form as a function of the input, all with the same values."""
    torch.manual_seed(0)
    fields = {"r": rank, "alpha": rank, "init_weights": False, "target_modules": ["fc"]}
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(hidden, hidden, bias=False))
    other = nn.Sequential()
    other.add_module("fc", nn.Linear(hidden, hidden, bias=False))
    other.fc.weight = model.fc.weight  # one weight for all: it is in the cache for all or for none
    theirs = peft.get_peft_model(other, peft.LoHaConfig(**fields))
    weight = model.fc.weight.detach()
    adapters = ak.attach(model)
    adapters.add("a", ak.config("loha", **fields))
    state = {k.removeprefix("base_model.model."): v for k, v in peft.get_peft_model_state_dict(theirs).items()}
    adapters.load_state_dict("a", state)
    layer: Any = model.fc.adapters["a"]
    kind = layer.kind
    return {
        "base": lambda x: F.linear(x, weight),
        "dense": lambda x: F.linear(x, weight) + F.linear(x, layer.change()),
        "factored": lambda x: F.linear(x, weight) + kind.apply(x, layer.factors()),
        "whole": lambda x: F.linear(x, layer.merged(weight, None)[0]),
        "adapterkit": model,
        "PEFT": theirs,
    }


def medians(steps: dict[str, Step], x: Tensor, train: bool, seconds: float) -> dict[str, float]:
    """Median time of each step, in milliseconds, all taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 5 or (time.perf_counter() < end and rounds < 200):
        rounds += 1
        for name, step in steps.items():
            start = time.perf_counter()
            if train:
                step(x).sum().backward()
            else:
                with torch.no_grad():
                    step(x)
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values[1:]) for name, values in times.items()}


def kept(step: Step, x: Tensor, model: nn.Module) -> float:
    """MiB that autograd keeps for the backward, but for the input and the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = step(x)
    del out
    return sum(storage.nbytes() for storage in storages.values()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="training steps only")
    parser.add_argument("--infer", action="store_true", help="forwards without gradients only")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 768, 2048])
    parser.add_argument("--rank", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 128, 1024])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    modes = [False] * (not arguments.train) + [True] * (not arguments.infer)
    for train, hidden in itertools.product(modes, arguments.hidden):
        print(f"\n{'training step' if train else 'inference'}, hidden {hidden}")
        for i, (rank, tokens) in enumerate(itertools.product(arguments.rank, arguments.tokens)):
            steps = forms(hidden, rank)
            x = torch.randn(tokens, hidden, requires_grad=train)
            found = medians(steps, x, train, arguments.seconds)
            model: Any = steps["adapterkit"]
            with torch.set_grad_enabled(train):
                chosen = arithmetic._cheapest(model.fc.adapters["a"], x, weight=True)
            memory = {name: kept(steps[name], x, model if name == "adapterkit" else steps["PEFT"]) for name in KEPT}
            if i == 0:
                names = [*list(found)[1:], *(f"MiB {name}" for name in memory if train)]
                print(f"{'rank':>4} {'tokens':>6} {'base ms':>8} " + " ".join(f"{name:>14}" for name in names))
            cells = [f"{found[name] / found['base']:14.2f}" for name in list(found)[1:]]
            cells += [f"{size:14.3f}" for size in memory.values() if train]
            over = found[chosen] / min(found[form] for form in ("factored", "dense", "whole"))
            remark = "" if over == 1 else f" (!) {over:.2f}"
            print(f"{rank:>4} {tokens:>6} {found['base']:>8.3f} {' '.join(cells)}  {chosen}{remark}", flush=True)


if __name__ == "__main__":
    main()
