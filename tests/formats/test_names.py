"""Original names of models: a fused layer becomes several layers, exactly, for every method, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.combining import randomise
from tests.diffusion import text_encoder
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.formats import AdapterFiles, layers_of, translate
from adapterkit.formats.families import Family
from adapterkit.formats.names import in_diffusers_names
from adapterkit.model import BaseModules
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig

Make = Callable[[str, int], tuple[dict[str, Tensor], Tensor]]
FAMILY = Family(
    "a model",
    {
        "double_blocks.{}.qkv": " ".join(f"blocks.{{}}.attn.to_{name}" for name in "qkv"),
        "double_blocks.{}.qkv.norm": "blocks.{}.norm",
        "single_blocks.{}.linear1": " ".join([*(f"blocks.{{}}.single.{name}" for name in "qkv"), "blocks.{}.mlp*4"]),
        "img_in": "x_embedder",
        "last": "blocks.0.last",
    },
    frozenset({"last"}),
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
        self.blocks[0].last = nn.Linear(4, 8)


def changes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The change of each layer's weight that a file makes."""
    model = Net()
    modules = BaseModules(model)
    files = in_diffusers_names(AdapterFiles(Path("a.safetensors"), None, tensors, {}), layers_of(modules), (FAMILY,))
    found = translate(files, modules)
    before = {path: model.get_submodule(path).weight.detach().clone() for path in found.layers}
    adapters = ak.attach(model)
    adapters.add("a", found.config)
    assert adapters.load_state_dict("a", found.tensors).ok
    adapters.merge("a")
    return {path: model.get_submodule(path).weight.detach() - weight for path, weight in before.items()}


def lora(name: str, rows: int, alpha: float = 1.0, inputs: int = 4) -> tuple[dict[str, Tensor], Tensor]:
    """A layer's tensors in kohya-ss's names, and the change `alpha / r * up @ down`."""
    up, down = torch.randn(rows, 2), torch.randn(2, inputs)
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


QKV = [f"blocks.10.attn.to_{n}" for n in "qkv"]
SPLIT: dict[str, tuple[list[str], list[int]]] = {
    "lora_unet_double_blocks_10_qkv": (QKV, [4, 4, 4]),
    "diffusion_model.double_blocks.10.qkv": (QKV, [4, 4, 4]),
    "double_blocks.10.qkv": (QKV, [4, 4, 4]),
    "lora_unet_single_blocks_3_linear1": ([*(f"blocks.3.single.{n}" for n in "qkv"), "blocks.3.mlp"], [4, 4, 4, 16]),
}


@pytest.mark.parametrize("make", [lora, loha])
@pytest.mark.parametrize("name", SPLIT)
def test_rows_of_a_fused_layer_are_split_and_the_rest_is_shared(make: Make, name: str) -> None:
    layers, rows = SPLIT[name]
    tensors, change = make(name, sum(rows))
    check(changes(tensors), dict(zip(layers, change.split(rows), strict=True)))


def test_a_name_that_another_begins_with_and_one_of_several_families() -> None:
    norm, change = lora("diffusion_model.double_blocks.10.qkv.norm", 4)
    outer, other = lora("diffusion_model.img_in", 4)
    qkv, fused = lora("diffusion_model.double_blocks.10.qkv", 12)
    split = dict(zip(QKV, fused.split(4), strict=True))
    check(changes(norm | outer | qkv), {**split, "blocks.10.norm": change, "x_embedder": other})


def test_without_a_model_shares_are_the_table_s() -> None:
    tensors, _ = lora("lora_unet_single_blocks_3_linear1", 28)
    files = in_diffusers_names(AdapterFiles(Path("a"), None, tensors, {}), None, (FAMILY,))
    shapes = {key: tuple(t.shape) for key, t in files.tensors.items() if key.endswith("up.weight")}
    assert shapes == {
        **{f"lora_unet.blocks.3.single.{n}.lora_up.weight": (4, 2) for n in "qkv"},
        "lora_unet.blocks.3.mlp.lora_up.weight": (16, 2),
    }


def test_rows_that_cannot_be_split_are_refused() -> None:
    tensors, _ = lora("lora_unet_double_blocks_0_qkv", 13)
    with pytest.raises(
        ak.UnsupportedError, match=r"has the rows of .*'lora_B.weight' has 13 rows, which cannot be split as 4:4:4"
    ):
        changes(tensors)


def test_halves_of_a_last_layer_change_places() -> None:
    tensors, change = lora("lora_unet_last", 8)
    check(changes(tensors), {"blocks.0.last": torch.cat([change[4:], change[:4]])})


def test_two_names_for_one_layer_are_refused() -> None:
    fused, _ = lora("lora_unet_double_blocks_0_qkv", 12)
    own, _ = lora("diffusion_model.blocks.0.attn.to_q", 4)
    with pytest.raises(ak.CheckpointError, match=r"Both 'diffusion_model.blocks.0.attn.to_q"):
        changes(own | fused)


# Whole models


def model_of(layers: dict[str, tuple[int, int]]) -> nn.Module:
    """A model with linear layers at these paths, of these outputs and inputs."""
    model = nn.Module()
    for path, (outputs, inputs) in layers.items():
        place, *rest = model, *path.split(".")
        for name in rest[:-1]:
            if not hasattr(place, name):
                place.add_module(name, nn.Module())
            place = place.get_submodule(name)
        place.add_module(rest[-1], nn.Linear(inputs, outputs))
    return model


FUSED = [f"transformer_blocks.0.attn.to_{name}" for name in "qkv"]
MLP = "transformer_blocks.0.ff.net.0.proj"
FLUX = {
    **dict.fromkeys([*FUSED, "transformer_blocks.0.attn.to_out.0", "context_embedder"], (8, 8)),
    **dict.fromkeys([MLP, "single_transformer_blocks.0.proj_mlp"], (32, 8)),
    "transformer_blocks.0.norm1.linear": (48, 8),
    "norm_out.linear": (16, 8),
    "time_text_embed.guidance_embedder.linear_1": (8, 8),
}
UNET = {f"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_{name}": (8, 8) for name in "qkv"}


def saved(model: nn.Module, config: ak.AdapterConfig, folder: Path, *, same: bool = False) -> dict[str, Tensor]:
    """An adapter with random values in `folder`, with the same A everywhere or not; the change of each layer."""
    adapters = ak.attach(model)
    adapters.add("a", config)
    randomise(adapters, "a", 1)
    if same:
        state = adapters.state_dict("a")
        first = next(tensor for key, tensor in state.items() if "lora_A" in key)
        adapters.load_state_dict("a", {key: first if "lora_A" in key else t for key, t in state.items()})
    adapters.save("a", folder)
    found = merged(adapters, "a", adapters.layers("a"))
    adapters.remove("a")
    return found


def merged(adapters: ak.Adapters, name: str, paths: Iterable[str]) -> dict[str, Tensor]:
    """What merging an adapter adds to the weights of these layers."""
    before = {path: adapters.model.get_submodule(path).weight.detach().clone() for path in paths}
    adapters.merge(name)
    found = {path: adapters.model.get_submodule(path).weight.detach() - weight for path, weight in before.items()}
    adapters.unmerge()
    return found


def written(folder: Path, **options: Any) -> dict[str, tuple[int, Tensor]]:
    """The rank and the change `alpha / r * up @ down` of each module of the file that `folder` is converted to."""
    file = folder.with_suffix(".safetensors")
    ak.convert_file(folder, file, naming="kohya", **options)
    tensors, found = load_file(file), {}
    for module in (key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")):
        up, down = (tensors[f"{module}.lora_{name}.weight"] for name in ("up", "down"))
        found[module] = len(down), float(tensors[f"{module}.alpha"]) / len(down) * up @ down
    return found


@pytest.mark.parametrize(
    ("targets", "options", "same", "rank"),
    [
        (FUSED, {}, False, 6),
        (FUSED, {}, True, 2),
        (FUSED, {"alpha_pattern": {"to_k": 7}, "rank_pattern": {"to_v": 3}}, False, 7),
        (FUSED[::2], {}, False, 4),
        (FUSED[1:2], {"use_rslora": True}, False, 2),
    ],
    ids=["own A", "same A", "own ranks and alphas", "not k", "k alone"],
)
def test_layers_that_are_one_in_the_original_are_joined(
    targets: list[str], options: dict[str, Any], same: bool, rank: int, tmp_path: Path
) -> None:
    model = model_of(FLUX)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=[*targets, MLP], **options)
    expected = saved(model, config, tmp_path / "a", same=same)
    found = written(tmp_path / "a", base=model)
    zeros = torch.zeros(8, 8)
    whole = torch.cat([expected.get(path, zeros) for path in FUSED])
    assert found.keys() == {f"lora_unet_double_blocks_0_img_{name}" for name in ("attn_qkv", "mlp_0")}
    assert found["lora_unet_double_blocks_0_img_attn_qkv"][0] == rank
    torch.testing.assert_close(found["lora_unet_double_blocks_0_img_attn_qkv"][1], whole, rtol=0, atol=1e-5)
    adapters = ak.attach(model)
    adapters.load(tmp_path / "a.safetensors", "b")
    check(merged(adapters, "b", FUSED), {path: expected.get(path, zeros) for path in FUSED})


def test_factors_that_no_adapter_of_the_method_joins_are_refused(tmp_path: Path) -> None:
    model = model_of(FLUX)
    saved(model, LoHaConfig(r=2, target_modules=[*FUSED, MLP]), tmp_path / "a")
    with pytest.raises(ak.UnsupportedError, match=r"differs between layers that are one layer there.*to='lora'"):
        written(tmp_path / "a", base=model, to="loha")


def test_names_are_written_as_kohya_s_programs_train_the_model(tmp_path: Path) -> None:
    saved(model_of(UNET), LoraConfig(r=2, target_modules=[*UNET]), tmp_path / "a")
    xl, original = (
        {**UNET, "add_embedding.linear_1": (8, 8)},
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_",
    )
    assert written(tmp_path / "a", base=model_of(xl)).keys() == {original + name for name in "qkv"}
    assert written(tmp_path / "a", overwrite=True).keys() == {f"lora_unet_{path.replace('.', '_')}" for path in UNET}


def test_layers_of_several_models_ask_for_the_base(tmp_path: Path) -> None:
    saved(model_of(FLUX), LoraConfig(r=2, target_modules=[MLP]), tmp_path / "a")
    with pytest.raises(ak.CheckpointError, match=r"may be for Flux or HunyuanVideo or .* Give base="):
        written(tmp_path / "a")
    tensors, _ = lora("diffusion_model.layers.0.feed_forward.w1", 12)
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(ak.CheckpointError, match=r"may be for Z-Image or Lumina 2, .* Give base="):
        ak.convert_file(tmp_path / "b.safetensors", tmp_path / "c")
    assert "diffusion_model.layers.0.feed_forward.w1" in str(ak.inspect_adapter(tmp_path / "b.safetensors"))
    one, other = lora("diffusion_model.single_blocks.0.linear1", 28)[0], lora("diffusion_model.mystery", 8)[0]
    save_file(one | other, tmp_path / "d.safetensors")
    with pytest.raises(ak.CheckpointError, match=r"mystery.* is not a name of Flux, .* Give base="):
        ak.convert_file(tmp_path / "d.safetensors", tmp_path / "e")


def test_shares_that_differ_tell_the_model_and_are_filled_with_zeros(tmp_path: Path) -> None:
    """Lumina 2 has three times as many rows of q as of k and of v; Z-Image has the same name for equal shares."""
    tensors, change = lora("diffusion_model.layers.0.attention.qkv", 20, inputs=12)
    save_file(tensors, tmp_path / "a.safetensors")
    ak.convert_file(tmp_path / "a.safetensors", tmp_path / "split")
    model = model_of({f"layers.0.attn.to_{name}": (12 if name == "q" else 4, 12) for name in "qkv"})
    adapters = ak.attach(model)
    adapters.load(tmp_path / "split", "b")
    parts = dict(zip(adapters.layers("b"), change.split([12, 4, 4]), strict=True))
    check(merged(adapters, "b", parts), parts)
    expected = saved(model, LoraConfig(r=2, target_modules=["to_q"]), tmp_path / "q")
    found = written(tmp_path / "q")["lora_unet_layers_0_attention_qkv"][1]
    whole = torch.cat([*expected.values(), torch.zeros(8, 12)])
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)


def test_a_layer_that_the_model_has_keeps_its_name(tmp_path: Path) -> None:
    tensors, _ = lora("diffusion_model.img_in", 8, inputs=8)
    save_file(tensors, tmp_path / "a.safetensors")
    adapters = ak.attach(model_of({"img_in": (8, 8), "x_embedder": (8, 8)}))
    adapters.load(tmp_path / "a.safetensors", "a")
    assert [*adapters.layers("a")] == ["img_in"]


def test_inspect_keeps_the_names_and_says_whose_they_are(tmp_path: Path) -> None:
    tensors, _ = lora("lora_unet_single_blocks_0_linear1", 28)
    save_file(tensors, tmp_path / "a.safetensors")
    report = str(ak.inspect_adapter(tmp_path / "a.safetensors"))
    assert "layout: kohya-ss, Flux in its original names" in report
    assert "lora_unet_single_blocks_0_linear1 " in report
    tensors, _ = lora("transformer.transformer_blocks.0.attn.to_q", 4)  # diffusers' name, and Qwen-Image's
    save_file(tensors, tmp_path / "b.safetensors")
    assert "original names" not in str(ak.inspect_adapter(tmp_path / "b.safetensors"))


def test_parts_of_a_fused_layer_that_have_numbers(tmp_path: Path) -> None:
    """The Open Model Initiative's names, which OneTrainer and InvokeAI write."""
    tensors, change = lora("transformer.double_blocks.0.img_attn.qkv.1", 8, inputs=8)
    save_file(tensors, tmp_path / "a.safetensors")
    adapters = ak.attach(model_of(FLUX))
    adapters.load(tmp_path / "a.safetensors", "a")
    assert [*adapters.layers("a")] == [FUSED[1]]
    check(merged(adapters, "a", FUSED[1:2]), {FUSED[1]: change})


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("lora_unet_input_blocks_7_1_proj_in", "down_blocks.2.attentions.0.proj_in"),
        ("unet.middle_block.2.out_layers.3", "mid_block.resnets.1.conv2"),
        ("model.diffusion_model.output_blocks.2.1.conv", "up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_output_blocks_11_0_emb_layers_1", "up_blocks.3.resnets.2.time_emb_proj"),
        ("Hunyuan_video_I2V_lora_double_blocks_1_txt_mod_linear", "transformer_blocks.1.norm1_context.linear"),
        ("diffusion_model.blocks.39.cross_attn.v_img", "blocks.39.attn2.add_v_proj"),
    ],
)
def test_layers_that_original_names_stand_for(name: str, path: str, tmp_path: Path) -> None:
    tensors, change = lora(name, 8, inputs=8)
    save_file(tensors, tmp_path / "a.safetensors")
    adapters = ak.attach(model_of({path: (8, 8), "proj_out": (8, 8)}))
    adapters.load(tmp_path / "a.safetensors", "a")
    check(merged(adapters, "a", [path]), {path: change})


def test_whole_differences_have_the_rows_of_their_layers(tmp_path: Path) -> None:
    model, halves, bias = model_of(FLUX), torch.randn(16, 8), torch.arange(1.0, 25.0)
    tensors, _ = lora("diffusion_model.double_blocks.0.img_mlp.0", 32, inputs=8)
    tensors["diffusion_model.final_layer.adaLN_modulation.1.diff"] = halves
    tensors["diffusion_model.double_blocks.0.img_attn.qkv.diff_b"] = bias
    save_file(tensors, tmp_path / "a.safetensors")
    adapters = ak.attach(model)
    adapters.load(tmp_path / "a.safetensors", "a")
    found = {path: dict(head.named_parameters()) for path, head in adapters.heads("a").items()}
    change = found["norm_out.linear"]["weight"] - model.get_submodule("norm_out.linear").weight
    torch.testing.assert_close(change, torch.cat([halves[8:], halves[:8]]), rtol=0, atol=1e-5)
    for path, own in zip(FUSED, bias.split(8), strict=True):
        torch.testing.assert_close(found[path]["bias"] - model.get_submodule(path).bias, own, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "prefix",
    [
        *("lora_te_text_model_", "lora_te1_text_model_", "lora_te4_", "lora_prior_te_text_model_", "clip_g."),
        *("clip_l.text_model.", "text_encoders.clip_l.transformer.text_model.", "text_encoder_2.text_model."),
        *("text_encoders.qwen3_8b.transformer.", "text_encoders.gemma3_12b."),
    ],
)
def test_prefixes_of_text_encoders(prefix: str, tmp_path: Path) -> None:
    path = "encoder.layers.1.self_attn.q_proj"
    tensors = {"lora_down.weight": torch.ones(2, 16), "lora_up.weight": torch.ones(16, 2), "alpha": torch.tensor(1.0)}
    name = prefix + (path if prefix.endswith(".") else path.replace(".", "_"))
    save_file({f"{name}.{local}": tensor for local, tensor in tensors.items()}, tmp_path / "a.safetensors")
    adapters = ak.attach(text_encoder())
    assert adapters.load(tmp_path / "a.safetensors", "a").ok
    check(merged(adapters, "a", [path]), {path: torch.ones(16, 16)})
