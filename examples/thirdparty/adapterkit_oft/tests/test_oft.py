"""The package's own tests: the kit, what only OFT does, equality with PEFT's class, and LyCORIS' files."""

import copy
import logging

import peft
import pytest
import torch
from torch import nn

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


class Net(nn.Module):
    """A linear layer, a 3 x 3 convolution, and one with groups."""

    def __init__(self):
        super().__init__()
        self.up, self.conv = nn.Linear(12, 8), nn.Conv2d(8, 16, 3, padding=1)
        self.mix = nn.Conv2d(16, 8, 1, groups=2)

    def forward(self, x):
        return self.mix(self.conv(self.up(x).unflatten(1, (8, 1, 1)).expand(-1, -1, 3, 3)).tanh())


def lycoris_file(model, file, **options):
    """Write what LyCORIS writes for a trained adapter; the inputs, and what it computes with it."""
    from lycoris import create_lycoris

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    model, x = copy.deepcopy(model), torch.linspace(-1, 1, 60).view(5, 12)
    network = create_lycoris(model, 1.0, linear_dim=4, conv_dim=4, **options)
    network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
        wanted = model(x)
    network.save_weights(str(file), None, {})
    return x, wanted


@pytest.mark.parametrize("options", [{}, {"rescaled": True}, {"constraint": 0.01}])
def test_files_of_lycoris(tmp_path, options):
    torch.manual_seed(0)
    model = Net()
    x, wanted = lycoris_file(model, tmp_path / "a.safetensors", algo="diag-oft", **options)
    before, adapters = model(x), ak.attach(model)
    assert adapters.load(tmp_path / "a.safetensors", "a").ok
    assert (wanted - before).abs().max() > 0.01
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-5)
    adapters.save("a", tmp_path / "saved")
    adapters.merge("a")
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-5)
    adapters.detach()
    assert ak.attach(model).load(tmp_path / "saved", "a").ok
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-5)


def test_boft_is_refused(tmp_path):
    model = Net()
    lycoris_file(model, tmp_path / "a.safetensors", algo="boft")
    with pytest.raises(ak.UnsupportedError, match=r"oft_blocks': this is BOFT"):
        ak.attach(model).load(tmp_path / "a.safetensors", "a")
