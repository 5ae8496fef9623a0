"""The package's own tests, as its author would write them: the kit, and what only (IA)3 does."""

import peft
import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.testing import check_peft, parametrize_with_checks
from adapterkit_ia3 import IA3Config


@parametrize_with_checks(
    [IA3Config(), IA3Config(feedforward_modules=".*down"), IA3Config(feedforward_modules=".*", init_ia3_weights=False)]
)
def test_contract(check, config):
    check(config)


def test_inputs_of_feedforward_layers_are_scaled_and_outputs_of_others():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    adapters = ak.attach(model)
    adapters.add("a", IA3Config(target_modules=["0", "1"], feedforward_modules=["1"]))
    for parameter in adapters.parameters("a"):
        nn.init.constant_(parameter, 2.0)
    x = torch.randn(2, 3)
    hidden = 2 * nn.functional.linear(x, model[0].weight, model[0].bias)
    torch.testing.assert_close(model(x), nn.functional.linear(2 * hidden, model[1].weight, model[1].bias))
    assert [tuple(p.shape) for p in adapters.parameters("a")] == [(4, 1), (1, 4)]


def test_feedforward_modules_must_be_targets():
    with pytest.raises(ak.ConfigError, match=r"feedforward_modules \['b'\] must be in target_modules, too"):
        IA3Config(target_modules=["a"], feedforward_modules=["b"])


def test_it_is_pefts():
    fields = {"target_modules": ["up", "down"], "feedforward_modules": ["down"]}
    check_peft(IA3Config(**fields), peft.IA3Config(**fields))
