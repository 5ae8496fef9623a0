"""The package's own tests: the kit, and what only LoKr does."""

import pytest
import torch

from adapterkit.testing import parametrize_with_checks
from adapterkit_lokr import LoKrConfig
from adapterkit_lokr.layer import apply_kron, kron_factors, split


@parametrize_with_checks(
    [
        LoKrConfig(),
        LoKrConfig(r=2, alpha=3, decompose_both=True, decompose_factor=2, init_weights="lycoris"),
        LoKrConfig(r=1, decompose_both=True, use_effective_conv2d=True, init_weights=False, rank_dropout=0.2),
    ]
)
def test_contract(check, config):
    check(config)


@pytest.mark.parametrize(("number", "factor", "parts"), [(256, -1, (16, 16)), (128, 4, (4, 32)), (127, -1, (1, 127))])
def test_split(number, factor, parts):
    assert split(number, factor) == parts


def test_factors_and_forward_are_the_kronecker_product():
    w1, up, down = torch.randn(2, 3), torch.randn(5, 2), torch.randn(2, 4)
    dense = torch.kron(w1, up @ down)
    torch.testing.assert_close(kron_factors(w1, (up, down)).delta(), dense)
    torch.testing.assert_close(kron_factors(w1, up @ down).delta(), dense)
    x = torch.randn(7, 12)
    torch.testing.assert_close(apply_kron(x, w1, up @ down), x @ dense.T)
