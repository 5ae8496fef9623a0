"""The package's own tests: the kit, equality with PEFT's class, and LyCORIS' files."""

import copy
import logging

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

import adapterkit as ak
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


class Net(nn.Module):
    """Linear layers, a 3 x 3 convolution, one with groups, and one with a kernel of 1."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 8)
        self.conv, self.mix = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 4, 1, groups=2)

    def forward(self, x):
        return self.mix(self.conv(self.down(self.up(x)).unflatten(1, (8, 1, 1)).expand(-1, -1, 3, 3)).tanh())


X = torch.linspace(-1, 1, 60).view(5, 12)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net()


def lycoris_file(model, file, **options):
    """Write what LyCORIS writes for a trained LoKr; what it computes with it."""
    from lycoris import create_lycoris

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    model = copy.deepcopy(model)
    network = create_lycoris(
        model, 1.0, **{"algo": "lokr", "linear_dim": 1, "linear_alpha": 2, "conv_dim": 1, **options}
    )
    network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
        wanted = model(X)
    network.save_weights(str(file), None, {})
    return wanted


OPTIONS = {
    "factors of w2": {"linear_dim": 2, "conv_alpha": 3},
    "factors of both": {"decompose_both": True},
    "whole matrices, whose alpha does not count": {"full_matrix": True, "linear_alpha": 1e10},
    "some whole": {"linear_dim": 3},
    "core": {"use_tucker": True},
    "scalar": {"use_scalar": True},
    "rank-stabilised": {"linear_dim": 2, "conv_dim": 2, "rs_lora": True},
    "factor": {"factor": 4},
    "factor larger than the rest": {"factor": 8},
    "unbalanced": {"unbalanced_factorization": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_files_of_lycoris(model, tmp_path, options):
    wanted = lycoris_file(model, tmp_path / "a.safetensors", **options)
    before, adapters = model(X), ak.attach(model)
    assert adapters.load(tmp_path / "a.safetensors", "a").ok
    assert (wanted - before).abs().max() > 0.01
    torch.testing.assert_close(model(X), wanted, rtol=0, atol=1e-5)
    adapters.save("a", tmp_path / "saved")
    adapters.remove("a")
    ak.convert_file(tmp_path / "saved", tmp_path / "written.safetensors", to="lokr", naming="lycoris", base=model)
    for source in (tmp_path / "saved", tmp_path / "written.safetensors"):
        assert adapters.load(source, "a").ok
        torch.testing.assert_close(model(X), wanted, rtol=0, atol=1e-5)
        adapters.remove("a")


@pytest.mark.parametrize("options", [{"linear_dim": 2}, {"decompose_both": True}, {"full_matrix": True}])
def test_peft_reads_what_is_saved(model, tmp_path, options):
    wanted = lycoris_file(model, tmp_path / "a.safetensors", **options)
    adapters = ak.attach(copy.deepcopy(model))
    adapters.load(tmp_path / "a.safetensors", "a")
    adapters.save("a", tmp_path / "saved")
    torch.testing.assert_close(peft.PeftModel.from_pretrained(model, tmp_path / "saved")(X), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{"linear_dim": 2}, {"full_matrix": True}])
def test_lycoris_reads_what_is_written(model, tmp_path, options):
    from lycoris import create_lycoris_from_weights

    wanted = lycoris_file(model, tmp_path / "a.safetensors", **options)
    ak.convert_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="lokr", naming="lycoris", base=model)
    tensors = safetensors.torch.load_file(tmp_path / "b.safetensors")
    tensors = {k.replace("lora_unet_", "lycoris_"): t for k, t in tensors.items()}
    with torch.no_grad():
        network, _ = create_lycoris_from_weights(1.0, "", model, tensors)
        network.apply_to()
        torch.testing.assert_close(model(X), wanted, rtol=0, atol=1e-5)


def test_inspected_without_the_model(model, tmp_path):
    lycoris_file(model, tmp_path / "a.safetensors", use_tucker=True)
    found = ak.inspect_adapter(tmp_path / "a.safetensors")
    assert found.method == "lokr"
    shapes = {layer.path: (layer.kind, layer.shape) for layer in found.layers}
    assert shapes["lycoris_up"] == ("Linear", (16, 12))
    assert shapes["lycoris_conv"] == ("Conv2d", (12, 72))


def test_decomposed_weights_are_refused(model, tmp_path):
    lycoris_file(model, tmp_path / "a.safetensors", dora_wd=True)
    with pytest.raises(ak.UnsupportedError, match="this is a LoKr that is weight-decomposed"):
        ak.attach(model).load(tmp_path / "a.safetensors", "a")


@pytest.mark.parametrize("strict", [True, False])
def test_factor_that_is_missing_is_named(model, tmp_path, strict):
    safetensors.torch.save_file({"lycoris_up.lokr_w1": torch.ones(8, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(ak.CheckpointError, match=r"up\.lokr_w2_\w is missing, or has another shape than \(2, 8\)"):
        ak.attach(model).load(tmp_path / "a.safetensors", "a", strict=strict)


class Attention(nn.Module):
    """Where diffusers has q, k and v of a block of Flux."""

    def __init__(self):
        super().__init__()
        block = nn.ModuleDict({"attn": nn.ModuleDict({name: nn.Linear(8, 8) for name in ("to_q", "to_k", "to_v")})})
        self.transformer_blocks = nn.ModuleList([block])

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.transformer_blocks[0]["attn"].values()], -1)


@pytest.mark.parametrize("size", [(6, 4), (3, 2), (4, 8), (1, 1), (24, 1)])
@pytest.mark.parametrize("whole", [True, False])
def test_rows_of_a_fused_layer(tmp_path, size, whole):
    (a, c), name = size, "lora_unet_double_blocks_0_img_attn_qkv"
    w1, w2 = torch.randn(a, c), torch.randn(24 // a, 8 // c)
    tensors = {f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2, f"{name}.alpha": torch.tensor(0.5)}
    if not whole:
        up, down = torch.randn(24 // a, 1), torch.randn(1, 8 // c)
        w2 = 0.5 * up @ down
        tensors = {**tensors, f"{name}.lokr_w2_a": up, f"{name}.lokr_w2_b": down}
        del tensors[f"{name}.lokr_w2"]
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    model, x = Attention(), torch.randn(5, 8)
    wanted, adapters = model(x) + x @ torch.kron(w1, w2).T, ak.attach(model)
    adapters.load(tmp_path / "a.safetensors", "a")
    adapters.save("a", tmp_path / "saved")
    for source in (tmp_path / "a.safetensors", tmp_path / "saved"):
        assert adapters.load(source, "b").ok
        adapters.activate("b")
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-5)
        adapters.merge("b")
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-5)
        adapters.unmerge()
        adapters.remove("b")
