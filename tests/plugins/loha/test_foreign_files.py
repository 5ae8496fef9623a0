"""LoHa files of LyCORIS and kohya-ss, against what LyCORIS itself writes and computes.

Its forward is the reference: its merge applies alpha / r twice.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules.loha import LohaModule
from tests.diffusion import MODELS, check, loaded, lycoris_file, output, refuse, unet, with_weights, write
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_loha import LoHaConfig

OPTIONS: dict[str, dict[str, Any]] = {
    "flat": {},
    "conv": {"conv_dim": 2, "conv_alpha": 5},
    "tucker": {"use_tucker": True, "conv_dim": 2},
    "scalar": {"use_scalar": True, "use_tucker": True},
    "bypass": {"bypass_mode": True},
}
QUERY, CONV = "down_blocks.0.attn1.to_q", "down_blocks.0.conv1"
Tensors = dict[str, Tensor]


@pytest.fixture
def model() -> nn.Module:
    return unet().double()


def normal(*shapes: tuple[int, ...]) -> list[Tensor]:
    noise = torch.Generator().manual_seed(4)
    return [torch.randn(s, generator=noise, dtype=torch.float64) for s in shapes]


def linear(r: int = 2, size: int = 8) -> Tensors:
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    return dict(zip(names, normal((size, r), (r, size), (size, r), (r, size)), strict=True))


def flat_delta(t: Tensors) -> Tensor:
    return (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])


def tucker(r: int = 2, size: int = 8) -> Tensors:
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    return dict(zip(names, normal(*4 * [(r, size)], *2 * [(r, r, 3, 3)]), strict=True))


def tucker_delta(t: Tensors) -> Tensor:
    first, second = (
        torch.einsum("ijkl,jc,io->ockl", t[f"hada_t{n}"], t[f"hada_w{n}_b"], t[f"hada_w{n}_a"]) for n in (1, 2)
    )
    return first * second


def kohya(path: str, tensors: Tensors, alpha: float | None = None, prefix: str = "lora_unet") -> Tensors:
    name = f"{prefix}_{path.replace('.', '_')}"
    alphas = {} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)}
    return {f"{name}.{local}": tensor for local, tensor in tensors.items()} | alphas


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_file_of_lycoris_gives_its_outputs(
    make: Callable[[], nn.Module], options: dict[str, Any], tmp_path: Path
) -> None:
    model, file = make().double(), tmp_path / "a.safetensors"
    wanted = lycoris_file(model, file, algo="loha", **options)
    assert check(model, file, wanted) == ak.LoadReport()


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (3.0, 1.5), (0.0, 1.0)])
def test_scale_is_alpha_by_rank(model: nn.Module, alpha: float | None, scale: float) -> None:
    check(model, kohya(QUERY, linear(), alpha), with_weights(model, {QUERY: scale * flat_delta(linear())}))


def test_rank_stabilised_alpha_of_lycoris(model: nn.Module, tmp_path: Path) -> None:
    layer = model.get_submodule(CONV)
    theirs = LohaModule(
        "lora_unet_" + CONV.replace(".", "_"), layer, lora_dim=3, alpha=2, rs_lora=True, use_tucker=True
    )
    theirs.double().hada_w2_a.data.normal_()
    theirs.apply_to()
    wanted = output(model)
    file = write(tmp_path / "a.safetensors", theirs.state_dict(prefix=theirs.lora_name + "."))
    theirs.restore()
    del layer.forward
    base = output(model)
    with loaded(model, file, dtype="file"):
        assert (wanted - base).abs().max() > 1e-3
        torch.testing.assert_close(output(model), wanted, rtol=0, atol=1e-6)  # its alpha is in float32


def test_scalar_is_folded_in(model: nn.Module) -> None:
    check(
        model,
        kohya(CONV, {**tucker(), "scalar": torch.tensor(3.0)}, 1.0),
        with_weights(model, {CONV: 1.5 * tucker_delta(tucker())}),
    )


def test_ranks_and_alphas_of_each_layer(model: nn.Module) -> None:
    tensors = kohya(QUERY, linear(2), 1.0) | kohya(CONV, tucker(3), 6.0)
    deltas = {QUERY: 0.5 * flat_delta(linear(2)), CONV: 2.0 * tucker_delta(tucker(3))}
    check(model, tensors, with_weights(model, deltas))


def test_cores_beside_flat_convolutions(model: nn.Module, tmp_path: Path) -> None:
    """One config cannot have both forms, so the cores are worked into their factors: the same outputs."""
    flat = linear()
    flat["hada_w1_b"], flat["hada_w2_b"] = normal((2, 72), (2, 72))
    other = "down_blocks.1.conv1"
    file = write(tmp_path / "a.safetensors", kohya(CONV, tucker(), 1.0) | kohya(other, flat, 1.0))
    wanted = with_weights(model, {CONV: 0.5 * tucker_delta(tucker()), other: 0.5 * flat_delta(flat)})
    check(model, file, wanted)
    adapters = ak.attach(model)
    adapters.load(file, "x")
    config = adapters.config("x")
    assert isinstance(config, LoHaConfig)
    assert (config.use_effective_conv2d, config.r, config.alpha) == (False, 2, 1.0)
    assert config.target_modules == (CONV, other)


def test_decomposed_file_of_lycoris_is_refused(model: nn.Module, tmp_path: Path) -> None:
    lycoris_file(model, tmp_path / "a.safetensors", algo="loha", dora_wd=True)
    text = ".dora_scale': this is a LoHa that is weight-decomposed (DoRA), which no method here"
    refuse(model, tmp_path / "a.safetensors", ak.UnsupportedError, text)


def test_core_of_another_shape_is_refused(model: nn.Module) -> None:
    wrong = {**tucker(), "hada_t1": torch.ones(2, 2, 3, 2)}
    text = ".hada_t1' has shape (2, 2, 3, 2); the core at the Conv2d 'down_blocks.0.conv1' is (2, 2, 3, 3)."
    refuse(model, kohya(CONV, wrong), ak.CheckpointError, text)


@pytest.mark.parametrize("effective", [True, False])
@pytest.mark.parametrize("alpha", [1.0, 7.0])
def test_foreign_tensors_for_an_adapter_with_a_config(model: nn.Module, effective: bool, alpha: float) -> None:
    """The outputs stay the file's, whatever the config says of scaling and form."""
    adapters, wanted = ak.attach(model), with_weights(model, {CONV: alpha / 2 * tucker_delta(tucker())})
    adapters.add("a", LoHaConfig(r=2, alpha=1, target_modules=[CONV], use_effective_conv2d=effective))
    assert adapters.load_state_dict("a", kohya(CONV, tucker(), alpha)).ok
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=1e-12)
