"""The package's own tests: the kit, and equality with PEFT's class."""

import peft
import pytest
import torch
from torch import nn

from adapterkit.testing import check_peft, parametrize_with_checks
from adapterkit_lokr import LoKrConfig, split


@parametrize_with_checks(
    [
        LoKrConfig(r=2, alpha=3, decompose_factor=2, init_weights="lycoris", module_dropout=0.1),
        LoKrConfig(r=1, decompose_both=True, init_weights=False, rank_dropout=0.2, rank_dropout_scale=True),
    ]
)
def test_contract(check, config):
    check(config)


@pytest.mark.parametrize(("number", "factor", "parts"), [(256, -1, (16, 16)), (128, 4, (4, 32)), (127, -1, (1, 127))])
def test_split(number, factor, parts):
    assert split(number, factor) == parts


FIELDS = [
    {"r": 2, "alpha": 3},
    {"r": 1, "decompose_both": True},
    {"decompose_factor": 2, "rank_pattern": {"up": 2}},
]


@pytest.mark.parametrize("fields", FIELDS)
def test_it_is_pefts(fields):
    check_peft(LoKrConfig(**fields), peft.LoKrConfig(**fields))


def test_it_is_pefts_at_convolutions():
    def model():
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 3, groups=2))

    fields = {"target_modules": ["0", "1"], "r": 1}
    check_peft(LoKrConfig(**fields), peft.LoKrConfig(**fields), model=model, inputs=torch.randn(2, 4, 7, 7))
