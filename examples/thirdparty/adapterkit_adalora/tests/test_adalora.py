"""The package's own tests: the kit, equality with PEFT's class, and that the budget moves as PEFT's does."""

import copy

import peft
import torch
from adapterkit_adalora import AdaLoraConfig
from torch import nn

import adapterkit as ak
from adapterkit.testing import check_peft, parametrize_with_checks

FIELDS = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 2, "total_step": 8}


@parametrize_with_checks([AdaLoraConfig(total_step=10), AdaLoraConfig(lora_dropout=0.1, **FIELDS)])
def test_contract(check, config):
    check(config)


def test_it_is_pefts():
    check_peft(AdaLoraConfig(**FIELDS), peft.AdaLoraConfig(**FIELDS))


def test_the_budget_moves_as_pefts(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.AdaLoraConfig(target_modules=["0", "2"], **FIELDS))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_E" in name:
                parameter.normal_(std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    adapters = ak.attach(base)
    adapters.load(tmp_path / "theirs", "a", trainable=True)
    assert ak.penalty(base) > 0
    x, y = torch.randn(7, 16), torch.randn(7, 8)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.5) for m in (theirs, base)]
    for number in range(1, 10):
        for model, optimizer in zip((theirs, base), optimizers, strict=True):
            optimizer.zero_grad()
            ((model(x) - y) ** 2).mean().backward()
            optimizer.step()
        if number <= FIELDS["total_step"]:
            theirs.base_model.update_and_allocate(number)
        adapters.step()
        torch.testing.assert_close(base(x), theirs(x), rtol=1e-4, atol=1e-5)
    ranks = [int((layer.lora_E != 0).sum()) for layer in adapters.layers("a").values()]
    assert sum(ranks) == 2 * FIELDS["target_r"]
    adapters.save("a", tmp_path / "ours")
    assert adapters.load(tmp_path / "ours", "b").ok
    assert [len(layer.lora_E) for layer in adapters.layers("b").values()] == ranks
    torch.testing.assert_close(base(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert float(ak.penalty(base)) > 0


def test_a_training_goes_on_with_its_averages_and_masks():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))

    def train(base, numbers):
        adapters = ak.attach(base)
        optimizer = torch.optim.SGD(adapters.parameters("a"), lr=0.5)
        for _ in numbers:
            optimizer.zero_grad()
            ((base(x) - y).square().mean() + ak.penalty(base)).backward()
            optimizer.step()
            adapters.step()
        return adapters

    x, y = torch.randn(7, 16), torch.randn(7, 8)
    bases = [model(), model()]
    for base in bases:
        ak.attach(base).add("a", AdaLoraConfig(target_modules=["0", "2"], **FIELDS))
    state = copy.deepcopy(train(bases[0], range(5)).training_state("a"))
    assert int(state["steps"]) == 5
    assert not state["2.adapters.lora_mask"].all()
    train(bases[0], range(4))
    ak.attach(bases[1]).load_training_state("a", state)
    train(bases[1], range(4))
    torch.testing.assert_close(bases[1](x), bases[0](x), rtol=1e-6, atol=1e-7)
    ends = [ak.attach(base).training_state("a") for base in bases]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0] if key.endswith("mask"))
