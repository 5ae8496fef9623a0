"""The package's own tests: the kit, what only OFT does, and equality with PEFT's class."""

import peft
import pytest
import torch

import adapterkit as ak
from adapterkit.testing import check_peft, parametrize_with_checks
from adapterkit_oft import OFTConfig


@parametrize_with_checks(
    [
        OFTConfig(oft_block_size=4, block_share=True, num_cayley_neumann_terms=7),
        OFTConfig(r=2, oft_block_size=0, use_cayley_neumann=False, init_weights=False),
    ]
)
def test_contract(check, config):
    check(config)


def test_angles_between_the_weights_rows_stay():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6, dtype=torch.float64))
    before = model[0].weight.detach() @ model[0].weight.detach().T
    adapters = ak.attach(model)
    adapters.add("a", OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=["0"], init_weights=False))
    adapters.merge_and_detach("a")
    torch.testing.assert_close(model[0].weight.detach() @ model[0].weight.detach().T, before)


def test_one_of_r_and_block_size():
    with pytest.raises(ak.ConfigError, match="One of r = 2 and oft_block_size = 32 must be 0"):
        OFTConfig(r=2)


FIELDS = [
    {"oft_block_size": 5, "use_cayley_neumann": False},
    {"r": 2, "oft_block_size": 0, "block_share": True},
    *({"oft_block_size": 4, "num_cayley_neumann_terms": terms} for terms in (1, 2, 3, 4, 7)),
]


@pytest.mark.parametrize("fields", FIELDS)
def test_it_is_pefts(fields):
    if fields.get("num_cayley_neumann_terms") == 1:  # R is the identity
        with pytest.raises(AssertionError, match="PEFT's adapter changes no output"):
            check_peft(OFTConfig(**fields), peft.OFTConfig(**fields))
    else:
        check_peft(OFTConfig(**fields), peft.OFTConfig(**fields))
