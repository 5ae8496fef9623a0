"""Tables of names: a fused layer of another program becomes several layers, exactly, for every method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.formats import AdapterFiles, layers_of, translate
from adapterkit.formats.families import Family
from adapterkit.formats.names import OriginalNames
from adapterkit.model import BaseModules

Make = Callable[[str, int], tuple[dict[str, Tensor], Tensor]]
QKV = {f"blocks.{{}}.attn.to_{name}": 1 for name in "qkv"}
SINGLE = {f"blocks.{{}}.single.{name}": 1 for name in "qkv"}
NAMES = OriginalNames(
    (
        Family(
            "a model",
            {
                "double_blocks.{}.qkv": QKV,
                "double_blocks.{}.qkv.norm": "blocks.{}.norm",
                "single_blocks.{}.linear1": {**SINGLE, "blocks.{}.mlp": 4},
                "img_in": "x_embedder",
                "last": "blocks.0.last",
            },
            frozenset({"last"}),
        ),
    )
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({f"to_{name}": nn.Linear(4, 4) for name in "qkv"})
        self.single = nn.ModuleDict({name: nn.Linear(4, 4) for name in "qkv"})
        self.mlp, self.norm = nn.Linear(4, 16), nn.Linear(4, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(11))


def changes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The change of each layer's weight that a file makes."""
    model = Net()
    modules = BaseModules(model)
    files = NAMES.read(AdapterFiles(Path("a.safetensors"), None, tensors, {}), layers_of(modules))
    assert files is not None
    found = translate(files, modules)
    before = {path: model.get_submodule(path).weight.detach().clone() for path in found.layers}
    adapters = ak.attach(model)
    adapters.add("a", found.config)
    assert adapters.load_state_dict("a", found.tensors).ok
    adapters.merge("a")
    return {path: model.get_submodule(path).weight.detach() - weight for path, weight in before.items()}


def lora(name: str, rows: int, alpha: float = 1.0) -> tuple[dict[str, Tensor], Tensor]:
    """A layer's tensors in kohya-ss's names, and the change `alpha / r * up @ down`."""
    up, down = torch.randn(rows, 2), torch.randn(2, 4)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(alpha)}
    return {f"{name}.{local}": tensor for local, tensor in tensors.items()}, alpha / 2 * up @ down


def loha(name: str, rows: int, alpha: float = 1.0) -> tuple[dict[str, Tensor], Tensor]:
    """As `lora`: `alpha / r * (w1_a @ w1_b) * (w2_a @ w2_b)`."""
    shapes = {"w1_a": (rows, 2), "w1_b": (2, 4), "w2_a": (rows, 2), "w2_b": (2, 4)}
    t = {local: torch.randn(shape) for local, shape in shapes.items()}
    change = alpha / 2 * (t["w1_a"] @ t["w1_b"]) * (t["w2_a"] @ t["w2_b"])
    named = {f"hada_{local}": tensor for local, tensor in t.items()} | {"alpha": torch.tensor(alpha)}
    return {f"{name}.{local}": tensor for local, tensor in named.items()}, change


def check(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for path, change in wanted.items():
        torch.testing.assert_close(found[path], change, rtol=0, atol=1e-5)


KEYS = ("lora_unet_double_blocks_10_qkv", "diffusion_model.double_blocks.10.qkv", "double_blocks.10.qkv")


@pytest.mark.parametrize("make", [lora, loha])
@pytest.mark.parametrize("name", KEYS)
def test_rows_of_a_fused_layer_are_split_and_the_rest_is_shared(make: Make, name: str) -> None:
    tensors, change = make(name, 12)
    found = changes(tensors)
    check(found, {f"blocks.10.attn.to_{n}": part for n, part in zip("qkv", change.split(4), strict=True)})


def test_shares_may_differ() -> None:
    tensors, change = lora("lora_unet_single_blocks_3_linear1", 28)
    *qkv, mlp = change.split([4, 4, 4, 16])
    found = changes(tensors)
    check(found, {f"blocks.3.single.{n}": part for n, part in zip("qkv", qkv, strict=True)} | {"blocks.3.mlp": mlp})


def test_a_name_that_another_begins_with_and_one_of_several_families() -> None:
    norm, change = lora("diffusion_model.double_blocks.0.qkv.norm", 4)
    outer, other = lora("diffusion_model.img_in", 4)
    qkv, fused = lora("diffusion_model.double_blocks.0.qkv", 12)
    split = {f"blocks.0.attn.to_{n}": part for n, part in zip("qkv", fused.split(4), strict=True)}
    check(changes(norm | outer | qkv), {**split, "blocks.0.norm": change, "x_embedder": other})


def test_without_a_model_shares_are_the_table_s() -> None:
    tensors, _ = lora("lora_unet_single_blocks_3_linear1", 28)
    files = NAMES.read(AdapterFiles(Path("a"), None, tensors, {}), None)
    assert files is not None
    shapes = {key: tuple(t.shape) for key, t in files.tensors.items() if key.endswith("up.weight")}
    assert shapes == {
        **{f"lora_unet.blocks.3.single.{n}.lora_up.weight": (4, 2) for n in "qkv"},
        "lora_unet.blocks.3.mlp.lora_up.weight": (16, 2),
    }


def test_rows_that_cannot_be_split_are_refused() -> None:
    tensors, _ = lora("lora_unet_double_blocks_0_qkv", 13)
    with pytest.raises(ak.UnsupportedError, match=r"has 13 outputs in 'lora_B.weight'; they cannot be split as"):
        changes(tensors)
