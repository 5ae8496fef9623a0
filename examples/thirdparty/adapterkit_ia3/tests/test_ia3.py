"""The package's own tests: the kit, and equality with PEFT's class."""

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapterkit.testing import check_peft, parametrize_with_checks
from adapterkit_ia3 import IA3Config


@parametrize_with_checks(
    [IA3Config(feedforward_modules=".*down"), IA3Config(feedforward_modules=".*", init_ia3_weights=False)]
)
def test_contract(check, config):
    check(config)


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), (3, 6)),
    "transposed": (lambda: nn.Sequential(Conv1D(8, 6), Conv1D(4, 8)), (3, 6)),
    "convolutions": (lambda: nn.Sequential(nn.Conv2d(6, 8, 3), nn.Conv2d(8, 4, 3, groups=2)), (2, 6, 7, 7)),
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(("make", "shape"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("feedforward", [["1"], ["0"]])
def test_it_is_pefts(make, shape, feedforward):
    def model():
        torch.manual_seed(1)
        made = make()
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.3)
        return made

    fields = {"target_modules": ["0", "1"], "feedforward_modules": feedforward}
    inputs = torch.randn(shape)
    check_peft(IA3Config(**fields), peft.IA3Config(**fields), model=model, inputs=inputs)
