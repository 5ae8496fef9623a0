"""The package's own tests: the kit, equality with PEFT's class, and LyCORIS' files."""

import copy
import logging

import peft
import pytest
import safetensors.torch
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import adapterkit as ak
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
    from lycoris.modules.ia3 import IA3Module

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    model, x = copy.deepcopy(model), torch.linspace(-1, 1, 60).view(5, 12)
    network = nn.ModuleList(
        IA3Module(f"lycoris_{name}", module, **options)
        for name, module in model.named_children()
        if name != "mix" or not options["train_on_input"]  # LyCORIS cannot scale the inputs of groups
    )
    for module in network:
        module.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
        wanted = model(x)
    tensors = {f"{m.lora_name}.{key}": t for m in network for key, t in m.state_dict().items()}
    safetensors.torch.save_file(tensors, file)
    return x, wanted


@pytest.mark.parametrize("options", [{"train_on_input": True}, {"train_on_input": False}])
def test_files_of_lycoris(tmp_path, options):
    torch.manual_seed(0)
    model = Net()
    x, wanted = lycoris_file(model, tmp_path / "a.safetensors", **options)
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
