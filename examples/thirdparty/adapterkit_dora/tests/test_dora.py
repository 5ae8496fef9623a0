"""The package's own tests: the kit, equality with PEFT's class, and LyCORIS' files."""

import copy
import logging

import peft
import pytest
import safetensors.torch
import torch
from adapterkit_dora import DoraConfig
from torch import nn

import adapterkit as ak
from adapterkit.testing import check_peft, parametrize_with_checks

FIELDS = [{"r": 4, "lora_alpha": 3}, {"r": 4, "use_rslora": True, "rank_pattern": {"up": 2}}]


@parametrize_with_checks([DoraConfig(), DoraConfig(r=2, use_rslora=True, lora_dropout=0.1)])
def test_contract(check, config):
    check(config)


@pytest.mark.parametrize("fields", FIELDS)
def test_it_is_pefts(fields):
    check_peft(DoraConfig(**fields), peft.LoraConfig(use_dora=True, **fields))


class Net(nn.Module):
    """A square and an oblong linear layer, a 3 x 3 convolution with as many inputs as outputs, and a 1 x 1."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 8)
        self.conv, self.mix = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.mix(self.conv(self.down(self.up(x)).unflatten(1, (8, 1, 1)).expand(-1, -1, 3, 3)).tanh())


X = torch.linspace(-1, 1, 30).view(5, 6)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net()


def lycoris_file(model, file, **options):
    """Write what LyCORIS writes for a trained DoRA; what it computes with it."""
    from lycoris import create_lycoris

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    model = copy.deepcopy(model)
    network = create_lycoris(model, 1.0, linear_dim=3, linear_alpha=2, dora_wd=True, **options)
    network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
        wanted = model(X)
    network.save_weights(str(file), None, {})
    return wanted


OPTIONS = {
    "rows": {},
    "columns": {"wd_on_output": False},
    "Tucker": {"algo": "locon", "conv_dim": 2, "conv_alpha": 1, "use_tucker": True},
    "columns of convolutions": {"algo": "locon", "conv_dim": 2, "wd_on_output": False},
    "rank-stabilised": {"rs_lora": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_files_of_lycoris(model, tmp_path, options):
    wanted = lycoris_file(model, tmp_path / "a.safetensors", **options)
    before, adapters = model(X), ak.attach(model)
    assert adapters.load(tmp_path / "a.safetensors", "a").ok
    assert (wanted - before).abs().max() > 0.05
    torch.testing.assert_close(model(X), wanted, rtol=0, atol=1e-5)
    adapters.merge("a")
    torch.testing.assert_close(model(X), wanted, rtol=0, atol=1e-5)
    adapters.unmerge()
    adapters.save("a", tmp_path / "saved")
    adapters.remove("a")
    for source in (tmp_path / "saved", tmp_path / "written.safetensors"):
        if source.suffix:
            ak.convert_file(tmp_path / "saved", source, to="dora", naming="lycoris", base=model)
        assert adapters.load(source, "a").ok
        torch.testing.assert_close(model(X), wanted, rtol=0, atol=1e-5)
        adapters.remove("a")


def test_scale_by_the_name_that_diffusers_gives_it(model, tmp_path):
    wanted = lycoris_file(model, tmp_path / "a.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    renamed = {key.replace("_up.dora_scale", "_up.lora_magnitude_vector"): t for key, t in tensors.items()}
    assert renamed.keys() != tensors.keys()
    safetensors.torch.save_file(renamed, tmp_path / "b.safetensors")
    assert ak.attach(model).load(tmp_path / "b.safetensors", "b").ok
    torch.testing.assert_close(model(X), wanted, rtol=0, atol=1e-5)


def test_lycoris_reads_what_is_written(model, tmp_path):
    from lycoris import create_lycoris_from_weights

    wanted = lycoris_file(model, tmp_path / "a.safetensors")
    ak.convert_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="dora", naming="lycoris", base=model)
    tensors = {
        k.replace("lora_unet_", "lycoris_"): t
        for k, t in safetensors.torch.load_file(tmp_path / "b.safetensors").items()
    }
    with torch.no_grad():
        network, _ = create_lycoris_from_weights(1.0, "", model, tensors)
        network.apply_to()
        torch.testing.assert_close(model(X), wanted, rtol=0, atol=1e-5)


def test_inspected_and_refused(model, tmp_path):
    lycoris_file(model, tmp_path / "a.safetensors")
    assert ak.inspect_adapter(tmp_path / "a.safetensors").method == "dora"
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    del tensors["lycoris_up.dora_scale"]
    safetensors.torch.save_file(tensors, tmp_path / "mixed.safetensors")
    with pytest.raises(ak.UnsupportedError, match=r"'lycoris_up\.\w+.*' is plain LoRA, and other layers have"):
        ak.attach(model).load(tmp_path / "mixed.safetensors", "a")
    tensors["lycoris_up.dora_scale"] = torch.ones(3, 2)
    safetensors.torch.save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(ak.CheckpointError, match=r"shape \(3, 2\); at 'up' it is \(8, 1\) for the rows or \(1, 6\)"):
        ak.attach(model).load(tmp_path / "odd.safetensors", "a")
