"""The package's own tests: the kit, and what only LoKr does."""

import peft
import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.testing import check_peft, parametrize_with_checks
from adapterkit_lokr import LoKrConfig
from adapterkit_lokr.layer import apply_kron, kron_factors, split


@parametrize_with_checks(
    [
        LoKrConfig(),
        LoKrConfig(r=2, alpha=3, decompose_factor=2, init_weights="lycoris"),
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


@pytest.mark.parametrize(
    "config", [LoKrConfig(r=2), LoKrConfig(r=1, decompose_both=True, use_effective_conv2d=True)], ids=["whole", "pairs"]
)
def test_files_alone_tell_the_layers(config, tmp_path):
    model = nn.ModuleDict({"linear": nn.Linear(12, 20), "conv": nn.Conv2d(4, 6, 3)})
    adapters = ak.attach(model)
    adapters.add("a", config.replace(target_modules=["linear", "conv"]))
    for parameter in adapters.parameters("a"):
        nn.init.normal_(parameter)
    adapters.save("a", tmp_path / "a")
    shapes = {layer.path: layer.shape for layer in ak.inspect_adapter(tmp_path / "a").layers}
    assert shapes == {"linear": (20, 12), "conv": (6, 36)}
    ak.convert_file(tmp_path / "a", tmp_path / "lora")
    found = ak.diff_adapters(tmp_path / "a", tmp_path / "lora")
    assert found.same_function
    assert adapters.load(tmp_path / "lora", name="lora").ok


@pytest.mark.parametrize("fields", [{}, {"decompose_both": True}])
def test_it_is_pefts(fields):
    check_peft(LoKrConfig(r=2, alpha=3, **fields), peft.LoKrConfig(r=2, alpha=3, **fields))
