"""The package's own tests: the kit, and what only OFT does."""

import peft
import pytest
import torch

import adapterkit as ak
from adapterkit.testing import check_peft, parametrize_with_checks
from adapterkit_oft import OFTConfig
from adapterkit_oft.layer import cayley, cayley_neumann, skew


@parametrize_with_checks(
    [
        OFTConfig(oft_block_size=8),
        OFTConfig(oft_block_size=4, module_dropout=0.5),
        OFTConfig(oft_block_size=4, block_share=True),
        OFTConfig(r=2, oft_block_size=0, use_cayley_neumann=False, init_weights=False),
    ]
)
def test_contract(check, config):
    check(config)


def test_cayley_is_orthogonal_and_neumann_nears_it():
    q = skew(torch.randn(3, 6, dtype=torch.float64) * 0.1, 4)
    one = torch.eye(4, dtype=torch.float64).expand(3, 4, 4)
    torch.testing.assert_close(cayley(q) @ cayley(q).mT, one)
    torch.testing.assert_close(cayley_neumann(q, 30), cayley(-q))


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


@pytest.mark.parametrize("fields", [{"oft_block_size": 4}, {"r": 2, "oft_block_size": 0}])
def test_it_is_pefts(fields):
    check_peft(OFTConfig(**fields), peft.OFTConfig(**fields))
