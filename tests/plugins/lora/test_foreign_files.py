"""LoRA files of LyCORIS, kohya-ss and diffusers, against what LyCORIS itself writes and computes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lycoris import create_lycoris
from lycoris.modules.locon import LoConModule
from tests.diffusion import (
    MODELS,
    check,
    loaded,
    lycoris_file,
    output,
    read,
    refuse,
    rename,
    text_encoder,
    unet,
    with_weights,
    write,
)
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_lora import LoraConfig

OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"algo": "lora"},
    "locon": {"algo": "locon", "conv_dim": 2, "conv_alpha": 1},
    "tucker": {"algo": "locon", "use_tucker": True, "conv_dim": 2},
    "scalar": {"algo": "lora", "use_scalar": True},
    "bypass": {"algo": "lora", "bypass_mode": True},
    "alpha 0": {"algo": "lora", "linear_alpha": 0},
}
QUERY, VALUE, OUT = (f"down_blocks.0.attn1.{name}" for name in ("to_q", "to_v", "to_out.0"))
Tensors = dict[str, Tensor]


def factors(r: int = 2, *paths: str, size: int = 8, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """`(down, up)` in float64 for square linear layers of the tiny U-Net."""
    noise = torch.Generator().manual_seed(seed)
    shapes = (r, size), (size, r)
    return {path: tuple(torch.randn(s, generator=noise).double() for s in shapes) for path in paths}  # type: ignore[misc]


def kohya(prefix: str, values: dict[str, tuple[Tensor, Tensor]], alpha: float | None = None) -> Tensors:
    tensors = {}
    for path, (down, up) in values.items():
        name = f"{prefix}_{path.replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def expected(model: nn.Module, values: dict[str, tuple[Tensor, Tensor]], scale: float = 1.0) -> Tensor:
    return with_weights(model, {path: scale * (up @ down) for path, (down, up) in values.items()})


@pytest.fixture
def model() -> nn.Module:
    return unet().double()


# LyCORIS


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_file_of_lycoris_gives_its_outputs(
    make: Callable[[], nn.Module], options: dict[str, Any], tmp_path: Path
) -> None:
    model, file = make().double(), tmp_path / "a.safetensors"
    wanted = lycoris_file(model, file, **options)
    assert check(model, file, wanted) == ak.LoadReport()


def test_file_of_lycoris_gives_its_outputs_in_float32(tmp_path: Path) -> None:
    model, file = unet(), tmp_path / "a.safetensors"
    wanted = lycoris_file(model, file, use_tucker=True)
    with loaded(model, file):
        torch.testing.assert_close(output(model), wanted, rtol=0, atol=2e-6)


def test_config_is_exactly_the_files(model: nn.Module, tmp_path: Path) -> None:
    lycoris_file(model, tmp_path / "a.safetensors", conv_dim=2, conv_alpha=1)
    adapters = ak.attach(model)
    adapters.load(tmp_path / "a.safetensors", "x")
    config = adapters.config("x")
    assert isinstance(config, LoraConfig)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    assert sorted(config.target_modules or ()) == sorted(layers)
    assert (config.r, config.lora_alpha, config.modules_to_save) == (3, 2.0, None)
    (pattern, rank), (same, alpha) = *config.rank_pattern.items(), *config.alpha_pattern.items()
    assert pattern == same
    assert (rank, alpha) == (2, 1.0)
    assert set(pattern[4:-1].replace("\\", "").split("|")) == {
        p for p in layers if "conv1" in p or p in ("conv_in", "time_mix") or p.endswith("downsample_conv")
    }


@pytest.mark.parametrize("rank", [2, 5])
def test_rank_stabilised_alpha_of_lycoris(model: nn.Module, tmp_path: Path, rank: int) -> None:
    torch.manual_seed(0)
    layer = model.get_submodule(QUERY)
    theirs = LoConModule("lora_unet_" + QUERY.replace(".", "_"), layer, lora_dim=rank, alpha=3, rs_lora=True).double()
    with torch.no_grad():
        theirs.lora_up.weight.normal_()
    theirs.apply_to()
    wanted = output(model)
    file = write(tmp_path / "a.safetensors", theirs.state_dict(prefix=theirs.lora_name + "."))
    theirs.restore()
    del layer.forward
    base = output(model)
    with loaded(model, file, dtype="file"):
        assert (wanted - base).abs().max() > 0.01
        torch.testing.assert_close(output(model), wanted, rtol=0, atol=1e-6)  # its alpha is in float32


ALGORITHMS = {
    "lokr": "of LoKr: the method 'lokr' of the package adapterkit-lokr reads it, and is not installed",
    "full": "of a full difference of a weight or a bias (LyCORIS' algorithm 'full'): adapters.load and",
    "diag-oft": "of OFT of LyCORIS or kohya-ss: the method 'oft' of the package adapterkit-oft reads it",
    "boft": "of BOFT of LyCORIS: no method here reads it. LyCORIS puts such a file into a model itself",
    "glora": "of GLoRA: no method here reads it. LyCORIS",
    "ia3": "of LyCORIS' (IA)3: the method 'ia3' of the package adapterkit-ia3 reads it",
    "tlora": "of T-LoRA: no method here reads it",
}


@pytest.mark.parametrize(("algorithm", "text"), ALGORITHMS.items())
def test_other_algorithms_of_lycoris_are_refused_by_name(algorithm: str, text: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    network = create_lycoris(copy.deepcopy(model), 1.0, linear_dim=4, algo=algorithm)
    network.apply_to()
    refuse(
        model, network.state_dict(), ak.CheckpointError, "holds no adapter of an installed method: 'lycoris_0.", text
    )


@pytest.mark.parametrize("projection", [False, True])
def test_norms_that_were_trained_beside_lora(tmp_path: Path, projection: bool) -> None:
    model, file = text_encoder(projection), tmp_path / "a.safetensors"
    wanted = lycoris_file(model, file, train_norm=True)
    assert any(key.endswith(".w_norm") for key in read(file))
    adapters, base = ak.attach(model), output(model)
    assert adapters.load(file, "x").ok
    assert (wanted - base).abs().max() > 0.01
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=1e-5)
    adapters.save("x", tmp_path / "saved")
    adapters.merge("x")
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=1e-5)
    adapters.detach()
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    for number, source in enumerate((file, tmp_path / "saved")):
        ak.merge_checkpoint(tmp_path / "base", source, tmp_path / str(number))
        merged = type(model).from_pretrained(tmp_path / str(number))  # type: ignore[attr-defined]
        torch.testing.assert_close(output(merged), wanted, rtol=0, atol=1e-5)


def test_full_differences_beside_lora(model: nn.Module, tmp_path: Path) -> None:
    values = factors(2, QUERY)
    diffs = {
        "lora_unet_conv_in.diff": torch.randn(8, 3, 3, 3).double(),
        "lora_unet_norm.diff": torch.randn(8).double(),
        "lora_unet_norm.diff_b": torch.randn(8).double(),
    }
    file = write(tmp_path / "a.safetensors", kohya("lora_unet", values) | diffs)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for key, diff in diffs.items():
            module = twin.get_submodule(key.removeprefix("lora_unet_").partition(".")[0])
            module.get_parameter("bias" if key.endswith("_b") else "weight").add_(diff)
    wanted = expected(twin, values)
    assert check(model, file, wanted).ok
    write(file, kohya("lora_unet", values) | {"lora_unet_norm.diff": torch.ones(7)})
    refuse(model, file, ak.CheckpointError, "'lora_unet_norm.diff' holds torch.float32 of shape (7,); 'norm' has")
    write(file, kohya("lora_unet", values) | {f"lora_unet_norm.{n}": torch.ones(8) for n in ("diff", "w_norm")})
    refuse(model, file, ak.CheckpointError, "'lora_unet_norm.w_norm' is a second difference for the weight of 'norm'")


def test_differences_of_zeros_change_nothing(model: nn.Module) -> None:
    values = factors(2, QUERY)
    zeros = {f"lora_unet_{name}": torch.zeros(8) for name in ("norm.w_norm", "norm.b_norm", "other.diff")}
    report = check(model, kohya("lora_unet", values) | zeros, expected(model, values))
    assert set(report.ignored) == set(zeros)


def test_differences_that_have_no_place_are_named(model: nn.Module, tmp_path: Path) -> None:
    values = factors(2, QUERY)
    norms = {"lora_unet_other.w_norm": torch.ones(8), "lora_unet_other.b_norm": torch.ones(8)}
    file = write(tmp_path / "a.safetensors", kohya("lora_unet", values) | norms)
    text = "'lora_unet_other.b_norm' and 1 more keys are of a norm that was trained in full (LyCORIS' train_norm)"
    refuse(model, file, ak.CheckpointError, text, "strict=False loads what fits")
    assert text in ak.inspect_adapter(file, base=model).notes[0]
    with pytest.warns(ak.AdapterWarning, match="unexpected"):
        check(model, file, expected(model, values), strict=False)


@pytest.mark.parametrize("linear", [True, False])
def test_decomposed_file_of_lycoris_is_refused(model: nn.Module, tmp_path: Path, linear: bool) -> None:
    lycoris_file(model, tmp_path / "a.safetensors", dora_wd=True, wd_on_output=linear)
    refuse(model, tmp_path / "a.safetensors", ak.UnsupportedError, ".dora_scale': this is DoRA, which scales")


# kohya-ss


@pytest.mark.parametrize(
    ("make", "old", "new"),
    [
        (unet, "lycoris_", "lora_unet_"),
        (text_encoder, "lycoris_", "lora_te_text_model_"),
        (text_encoder, "lycoris_", "lora_te1_"),
        (MODELS["clip-projection"], "lycoris_text_model_", "lora_te2_"),
        (MODELS["clip-projection"], "lycoris_", "lora_te2_"),
    ],
)
def test_prefixes(make: Callable[[], nn.Module], old: str, new: str, tmp_path: Path) -> None:
    model, file = make().double(), tmp_path / "a.safetensors"
    wanted = lycoris_file(model, file, use_tucker=True)
    write(file, rename(rename(read(file), old, new), "lycoris_text_projection", "lora_te2_text_projection"))
    assert check(model, file, wanted).ok


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (3.0, 1.5), (0.0, 1.0), (-1.0, -0.5)])
def test_scale_is_alpha_by_rank(model: nn.Module, alpha: float | None, scale: float) -> None:
    values = factors(2, QUERY, VALUE)
    check(model, kohya("lora_unet", values, alpha), expected(model, values, scale))


@pytest.mark.parametrize("alpha", [torch.tensor(3.0, dtype=torch.bfloat16), torch.tensor([3]), torch.tensor([[3.0]])])
def test_an_alpha_is_one_number_of_any_dtype(model: nn.Module, alpha: Tensor) -> None:
    values = factors(2, QUERY)
    tensors = kohya("lora_unet", values) | {f"lora_unet_{QUERY.replace('.', '_')}.alpha": alpha}
    check(model, tensors, expected(model, values, 1.5))


@pytest.mark.parametrize("alpha", [torch.inf, torch.nan])
def test_an_alpha_that_is_not_finite_is_refused(model: nn.Module, tmp_path: Path, alpha: float) -> None:
    file = write(tmp_path / "a.safetensors", kohya("lora_unet", factors(2, QUERY), alpha))
    refuse(model, file, ak.CheckpointError, f"attn1_to_q.alpha' is {alpha}: the file is damaged")


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (3.0, 1.5), (-1.0, -0.5)])
def test_change_of_a_bias_beside_the_factors_is_not_scaled(model: nn.Module, alpha: float | None, scale: float) -> None:
    diff, layer = torch.randn(8).double(), model.get_submodule(OUT)
    tensors = kohya("lora_unet", factors(2, OUT, QUERY), alpha)
    bias: Any = layer.bias
    with torch.no_grad():
        before = bias.detach().clone()
        bias.add_(diff)
        wanted = expected(model, factors(2, OUT, QUERY), scale)
        bias.copy_(before)
    assert check(model, tensors | {f"lora_unet_{OUT.replace('.', '_')}.diff_b": diff}, wanted).ok


@pytest.mark.parametrize("dtype", [None, "file"])
def test_change_of_a_bias_in_half_precision(tmp_path: Path, dtype: str | None) -> None:
    tensors = kohya("lora_unet", factors(2, OUT), 3.0) | {f"lora_unet_{OUT.replace('.', '_')}.diff_b": torch.ones(8)}
    model, file = unet(), tmp_path / "a.safetensors"
    low, outputs = {key: tensor.half() for key, tensor in tensors.items()}, []
    for held in (low, {key: tensor.float() for key, tensor in low.items()}):
        with loaded(model, write(file, held), dtype=dtype):
            outputs.append(output(model))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)


def test_each_layer_has_its_own_rank_and_alpha(model: nn.Module) -> None:
    tensors, deltas = {}, {}
    for r, alpha, path in ((2, 1.0, QUERY), (2, 4.0, OUT), (3, 1.0, VALUE), (4, None, "down_blocks.1.attn1.to_q")):
        values = factors(r, path, seed=r)
        tensors |= kohya("lora_unet", values, alpha)
        deltas[path] = values[path][1] @ values[path][0] * ((alpha or r) / r)
    check(model, tensors, with_weights(model, deltas))


def test_scalar_is_folded_in(model: nn.Module) -> None:
    values = factors(2, QUERY)
    tensors = kohya("lora_unet", values, 1.0) | {f"lora_unet_{QUERY.replace('.', '_')}.scalar": torch.tensor(3.0)}
    check(model, tensors, expected(model, values, 1.5))


def test_shapes_of_1x1_convolutions_and_of_linear_layers_are_one(model: nn.Module) -> None:
    values = factors(2, QUERY, "down_blocks.0.proj_in")
    shaped = {QUERY: tuple(t[..., None, None] for t in values[QUERY])}
    tensors = kohya("lora_unet", {**values, **shaped}, 1.0)  # type: ignore[dict-item]
    check(model, tensors, expected(model, values, 0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_low_precision_is_computed_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model, file = unet(), tmp_path / "a.safetensors"
    lycoris_file(model, file, use_tucker=True)
    low = {key: tensor.to(dtype) for key, tensor in read(file).items()}
    outputs = []
    for tensors in (low, {key: tensor.float() for key, tensor in low.items()}):
        with loaded(model, write(file, tensors)):
            outputs.append(output(model))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
def test_pickled_file(model: nn.Module, tmp_path: Path, suffix: str) -> None:
    values = factors(2, QUERY)
    torch.save(kohya("lora_unet", values, 1.0), tmp_path / f"a{suffix}")
    check(model, tmp_path / f"a{suffix}", expected(model, values, 0.5))


# diffusers


def peft_names(
    prefix: str, values: dict[str, tuple[Tensor, Tensor]], names: tuple[str, str] = ("lora_A", "lora_B")
) -> Tensors:
    return {
        f"{prefix}{path}.{local}.weight": factor
        for path, pair in values.items()
        for local, factor in zip(names, pair, strict=True)
    }


def old_processors(prefix: str, values: dict[str, tuple[Tensor, Tensor]]) -> Tensors:
    tensors = {}
    for path, pair in values.items():
        block, _, layer = path.replace(".to_out.0", ".to_out").rpartition(".")
        for local, factor in zip(("down", "up"), pair, strict=True):
            tensors[f"{prefix}{block}.processor.{layer}_lora.{local}.weight"] = factor
    return tensors


def linear_layers(prefix: str, values: dict[str, tuple[Tensor, Tensor]]) -> Tensors:
    return peft_names(prefix, values, ("lora_linear_layer.down", "lora_linear_layer.up"))


def under_processor(prefix: str, values: dict[str, tuple[Tensor, Tensor]]) -> Tensors:
    return {
        key.replace(".attn1.", ".attn1.processor.").replace("lora_linear_layer", "lora"): tensor
        for key, tensor in linear_layers(prefix, values).items()
    }


@pytest.mark.parametrize("prefix", ["unet.", "transformer.", ""])
@pytest.mark.parametrize("form", [peft_names, old_processors, linear_layers, under_processor])
@pytest.mark.filterwarnings("ignore:The file does not say how its layers are scaled")
def test_forms_of_diffusers(model: nn.Module, form: Callable[..., Tensors], prefix: str) -> None:
    values = factors(2, QUERY, VALUE, OUT)
    assert check(model, form(prefix, values), expected(model, values)) == ak.LoadReport()


@pytest.mark.parametrize("projection", [False, True])
def test_text_encoders_of_diffusers(projection: bool) -> None:
    model = text_encoder(projection).double()
    prefix = "text_model." if projection else ""
    names = {
        "to_q_lora": "q_proj",
        "to_v_lora": "v_proj",
        "to_out_lora": "out_proj",
        "k_proj.lora_linear_layer": "k_proj",
    }
    values = factors(2, *(f"{prefix}encoder.layers.1.self_attn.{n}" for n in names.values()), size=16)
    tensors = {}
    for old, path in zip(names, values, strict=True):
        key = f"text_encoder.text_model.encoder.layers.1.self_attn.{old}"
        tensors |= {f"{key}.down.weight": values[path][0], f"{key}.up.weight": values[path][1]}
    check(model, tensors, expected(model, values))


def metadata(**fields: Any) -> str:
    return json.dumps(fields)


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_alpha_of_diffusers_metadata(model: nn.Module, tmp_path: Path, prefix: str) -> None:
    values = factors(2, QUERY, VALUE)
    fields = {
        "r": 2,
        "lora_alpha": 6,
        "alpha_pattern": {"attn1.to_v": 6.0},
        "target_modules": ["to_q"],
        "use_dora": False,
    }
    text = json.dumps({prefix + name: value for name, value in fields.items()} | {"text_encoder.lora_alpha": 99})
    file = write(tmp_path / "a.safetensors", peft_names(prefix, values), lora_adapter_metadata=text)
    check(model, file, expected(model, values, 3.0))


def header(**parts: float) -> str:
    """A header with an alpha for each of these parts, at rank 2."""
    return json.dumps(
        {f"{part}.{name}": n for part, alpha in parts.items() for name, n in (("lora_alpha", alpha), ("r", 2))}
    )


@pytest.mark.parametrize(
    ("prefix", "text"),
    [
        ("diffusion_model.", header(transformer=6)),
        ("unet.", header(transformer=6)),
        ("", header(transformer=6)),
        ("", header(unet=6)),
        ("diffusion_model.", header(transformer=6, text_encoder=99, text_encoder_2=98)),
        ("lora_unet_", header(unet=6, text_encoder=99)),
        ("transformer_2.", header(transformer=99, transformer_2=6)),
        ("unet.", json.dumps({"transformer.lora_alpha": 2, "transformer.alpha_pattern": {"to_q": 6, "attn1.to_v": 6}})),
        (
            "unet.",
            json.dumps({"transformer.lora_alpha": 6, "transformer.r": 9, "transformer.rank_pattern": {"to_q|to_v": 2}}),
        ),
    ],
)
def test_alpha_of_a_header_whose_part_the_keys_call_otherwise(
    model: nn.Module, tmp_path: Path, prefix: str, text: str
) -> None:
    values = factors(2, QUERY, VALUE)
    tensors = kohya("lora_unet", values) if prefix == "lora_unet_" else peft_names(prefix, values)
    check(model, write(tmp_path / "a.safetensors", tensors, lora_adapter_metadata=text), expected(model, values, 3.0))


@pytest.mark.parametrize("tensors", [kohya, lambda prefix, values: rename(kohya("lora_te", values), "lora_te", prefix)])
def test_alphas_of_a_header_for_two_text_encoders(tmp_path: Path, tensors: Callable[..., Tensors]) -> None:
    model, text = text_encoder().double(), header(text_encoder=2, text_encoder_2=6, unet=99)
    layer = "encoder.layers.0.self_attn.q_proj"
    values = [factors(2, layer, size=16, seed=seed) for seed in (0, 1)]
    both = tensors("lora_te1", values[0]) | tensors("lora_te2", values[1])
    file = write(tmp_path / "a.safetensors", both, lora_adapter_metadata=text)
    for part, held, scale in (("lora_te1", values[0], 1.0), ("lora_te2", values[1], 3.0)):
        check(model, file, expected(model, held, scale), component=part)


@pytest.mark.parametrize(
    ("prefix", "text", "named"),
    [
        ("", header(transformer=6, text_encoder=2), "scales 'text_encoder', 'transformer', and keys such as 'down_bl"),
        ("diffusion_model.", header(transformer=6, transformer_2=2), "'diffusion_model.down_blocks.0.attn1.to_q.lora"),
        ("unet.", header(text_encoder=2), "scales 'text_encoder', and keys such as 'unet."),
        ("clip_l.", header(transformer=6), "scales 'transformer', and keys such as 'clip_l."),
        ("text_encoder_2.", header(text_encoder=6), "scales 'text_encoder', and keys such as 'text_encoder_2."),
    ],
)
def test_header_of_which_no_part_or_several_may_be_meant(
    model: nn.Module, tmp_path: Path, prefix: str, text: str, named: str
) -> None:
    tensors = peft_names(prefix, factors(2, QUERY))
    file = write(tmp_path / "a.safetensors", tensors, lora_adapter_metadata=text)
    refuse(model, file, ak.CheckpointError, named, "Begin the keys with the part and a dot")


def test_header_of_other_ranks_is_another_files(model: nn.Module, tmp_path: Path) -> None:
    tensors = peft_names("transformer.", factors(4, QUERY))
    file = write(tmp_path / "a.safetensors", tensors, lora_adapter_metadata=header(transformer=6))
    refuse(model, file, ak.CheckpointError, "has rank 2 for 'down_blocks.0.attn1.to_q', and its tensors have rank 4")


def test_alpha_beside_the_tensors_counts_and_a_header_that_disagrees_raises_a_warning(
    model: nn.Module, tmp_path: Path
) -> None:
    values, file = factors(2, QUERY, VALUE), tmp_path / "a.safetensors"
    tensors = peft_names("transformer.", values) | {f"transformer.{QUERY}.alpha": torch.tensor(6.0)}
    deltas = {path: (up @ down) * 3 for path, (down, up) in values.items()}
    write(file, tensors, lora_adapter_metadata=header(transformer=6))
    check(model, file, with_weights(model, deltas))
    write(
        file, tensors | {f"transformer.{VALUE}.alpha": torch.tensor(1.0)}, lora_adapter_metadata=header(transformer=6)
    )
    deltas[VALUE] /= 6
    with pytest.warns(ak.AdapterWarning, match=r"scales 'down_blocks.0.attn1.to_v' by 3, and .* by 0.5. The alpha"):
        check(model, file, with_weights(model, deltas))


def test_scale_that_no_file_says_is_a_guess(tmp_path: Path) -> None:
    model, layer = text_encoder().double(), "encoder.layers.0.self_attn.q_proj"
    values, file = factors(2, layer, size=16), tmp_path / "a.safetensors"
    write(file, peft_names("", values))
    with pytest.warns(ak.AdapterWarning, match="does not say how its layers are scaled.*beside an adapter_config.json"):
        check(model, file, expected(model, values))
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "adapter_model.safetensors", peft_names("", values))
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": [layer]})
    )
    check(model, folder, expected(model, values, 3.0))


def test_scale_of_a_program_that_writes_no_alpha_is_none(tmp_path: Path) -> None:
    """ComfyUI and ai-toolkit take a missing alpha for the rank."""
    file = tmp_path / "a.safetensors"
    write(file, peft_names("diffusion_model.", factors(2, "blocks.0.q", size=16)))
    assert [layer.scaling for layer in ak.inspect_adapter(file).layers] == [1.0]  # and no warning


@pytest.mark.parametrize(("alpha", "warns"), [("6", True), ("2", False), ("None", False), ("six", False)])
def test_alpha_of_kohyas_header_is_named_where_layers_have_none(
    model: nn.Module, tmp_path: Path, alpha: str, warns: bool
) -> None:
    values = factors(2, QUERY)
    file = write(tmp_path / "a.safetensors", kohya("lora_unet", values), ss_network_alpha=alpha, ss_network_dim="2")
    with pytest.warns(ak.AdapterWarning, match="alpha 6 at rank 2, and 1 layers") if warns else nullcontext():
        check(model, file, expected(model, values))


def test_rank_stabilised_scaling_of_diffusers_metadata(model: nn.Module, tmp_path: Path) -> None:
    values = factors(4, QUERY)
    text = metadata(**{"unet.lora_alpha": 6, "unet.use_rslora": True, "unet.r": 4})
    file = write(tmp_path / "a.safetensors", peft_names("unet.", values), lora_adapter_metadata=text)
    check(model, file, expected(model, values, 3.0))


def test_bias_of_diffusers(model: nn.Module) -> None:
    bias = torch.randn(8).double()
    tensors = peft_names("unet.", factors(2, OUT)) | {f"unet.{OUT}.lora_B.bias": bias}
    with torch.no_grad():
        layer = model.get_submodule(OUT)
        before = layer.bias.detach().clone()  # type: ignore[union-attr, operator]
        layer.bias.add_(bias)  # type: ignore[union-attr, operator]
        wanted = expected(model, factors(2, OUT))
        layer.bias.copy_(before)  # type: ignore[union-attr, operator]
    check(model, tensors, wanted)


METADATA = {
    "dora": (
        metadata(**{"unet.use_dora": True}),
        ak.UnsupportedError,
        "use_dora = True changes what the adapter computes",
    ),
    "no json": ("{", ak.CheckpointError, "The header's 'lora_adapter_metadata' is not valid JSON: "),
    "a list": ("[]", ak.CheckpointError, "The header's 'lora_adapter_metadata' must hold a JSON object, not a list."),
    "alpha": (metadata(**{"unet.lora_alpha": "8"}), ak.ConfigError, "lora_alpha = '8' is a str"),
}


@pytest.mark.parametrize(("text", "error", "message"), METADATA.values(), ids=METADATA)
def test_metadata_that_are_refused(
    model: nn.Module, tmp_path: Path, text: str, error: type[Exception], message: str
) -> None:
    file = write(tmp_path / "a.safetensors", peft_names("unet.", factors(2, QUERY)), lora_adapter_metadata=text)
    refuse(model, file, error, message)


# Pipelines


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A file for a U-Net and two text encoders of one architecture."""
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    tensors = kohya("lora_unet", factors(2, QUERY), 1.0)
    tensors |= kohya("lora_te1", factors(2, layer, size=16, seed=1), 1.0)
    tensors |= kohya("lora_te2", factors(2, layer, size=16, seed=2), 1.0)
    return write(tmp_path / "pipeline.safetensors", tensors)


def test_keys_of_other_models_of_a_pipeline_are_left_out_with_a_warning(model: nn.Module, pipeline: Path) -> None:
    with pytest.warns(ak.AdapterWarning, match="which this model is not: 'lora_te1' .*'lora_te2'"):
        report = check(model, pipeline, expected(model, factors(2, QUERY), 0.5))
    assert report.ok
    assert set(report.ignored) == {key for key in read(pipeline) if key.startswith("lora_te")}


def test_two_models_that_fit_need_a_choice(pipeline: Path) -> None:
    model = text_encoder().double()
    refuse(
        model,
        pipeline,
        ak.CheckpointError,
        "Both 'lora_te1_text_model_encoder_layers_0_self_attn_q_proj.",
        " and 'lora_te2_text_model_encoder_layers_0_self_attn_q_proj.",
        "are for the layer 'encoder.layers.0.self_attn.q_proj'. Say which part of the pipeline this model is, such as "
        "component='lora_te1'.",
    )
    for seed, part in enumerate(("lora_te1", "lora_te2"), 1):
        values = factors(2, "encoder.layers.0.self_attn.q_proj", size=16, seed=seed)
        report = check(model, pipeline, expected(model, values, 0.5), component=part)
        assert set(report.ignored) == {key for key in read(pipeline) if not key.startswith(part)}


def test_component_that_the_file_has_not(model: nn.Module, pipeline: Path) -> None:
    text = "The file holds nothing of component 'unet'. Its components: 'lora_te1', 'lora_te2', 'lora_unet'."
    refuse(model, pipeline, ak.CheckpointError, text, component="unet")


def test_two_keys_of_one_component_for_one_layer(model: nn.Module) -> None:
    values = factors(2, QUERY)
    tensors = peft_names("unet.", values) | linear_layers("unet.", values)
    refuse(model, tensors, ak.CheckpointError, "One of them must go.")


def test_layers_that_the_model_has_not_are_unexpected(model: nn.Module, tmp_path: Path) -> None:
    values = factors(2, QUERY)
    strange = kohya("lora_unet", factors(2, "mid_block.to_q"), 1.0) | {"lora_unet_mid_block_norm.w_norm": torch.ones(8)}
    file = write(tmp_path / "a.safetensors", kohya("lora_unet", values, 1.0) | strange)
    refuse(
        model, file, ak.CheckpointError, "some belong to nothing on this model", "unexpected (4)", "lora_unet_mid_bl"
    )
    with pytest.warns(ak.AdapterWarning, match="lora_unet_mid_block_norm"):
        report = ak.attach(model).load(file, "x", strict=False)
    assert set(report.unexpected) == set(strange)
    assert report.missing == report.ignored == ()


def test_half_a_layer_is_missing(model: nn.Module) -> None:
    tensors = kohya("lora_unet", factors(2, QUERY, VALUE), 1.0)
    del tensors[f"lora_unet_{QUERY.replace('.', '_')}.lora_up.weight"]
    refuse(model, tensors, ak.CheckpointError, "missing (1)", f"{QUERY}.lora_B.weight")


def test_file_for_another_size_is_mismatched(model: nn.Module, tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", kohya("lora_unet", factors(2, QUERY, size=9), 1.0))
    refuse(model, file, ak.CheckpointError, "some have other shapes", "(2, 9) in the file, (2, 8) on this model")


# Names


class Alike(nn.Module):
    """Paths that end alike, and paths that are one with underscores for dots."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"proj": nn.Linear(8, 8), "a_b": nn.Linear(8, 8)})
        self.inner_a = nn.ModuleDict({"b": nn.Linear(8, 8)})


def test_layer_whose_path_ends_another_is_adapted_alone(tmp_path: Path) -> None:
    model = Alike()
    ak.attach(model).load(write(tmp_path / "a.safetensors", kohya("lora_unet", factors(2, "proj"))), "x")
    assert [row.targets for row in ak.attach(model).status().rows] == [1]
    assert set(ak.attach(model).state_dict("x")) == set(peft_names("base_model.model.", factors(2, "proj")))


def test_ambiguous_name_is_refused() -> None:
    text = "'lora_unet_inner_a_b' may be any of the layers 'inner.a_b', 'inner_a.b': their names are the same with '_'"
    refuse(
        Alike(),
        kohya("lora_unet", factors(2, "inner.a_b")),
        ak.CheckpointError,
        text,
    )


# Damage


def change(name: str, tensor: Tensor) -> Tensors:
    values = factors(2, "down_blocks.0.conv1")["down_blocks.0.conv1"]
    tensors = {"lora_down.weight": values[0][..., None, None], "lora_up.weight": values[1][..., None, None]}
    tensors |= {"lora_mid.weight": torch.ones(2, 2, 3, 3).double(), "alpha": torch.tensor(1.0), name: tensor}
    return {f"lora_unet_down_blocks_0_conv1.{local}": t for local, t in tensors.items()}


DAMAGE = {
    "a vector": ("lora_up.weight", torch.ones(8), "holds torch.float32 of shape (8,); a factor is a floating matrix."),
    "integers": ("lora_down.weight", torch.ones(2, 8).int(), "holds torch.int32 of shape (2, 8); a factor is a"),
    "two alphas": ("alpha", torch.ones(2), ".alpha' has shape (2,); 'alpha' is a single number."),
    "core": ("lora_mid.weight", torch.ones(3, 2, 3, 3), "a Tucker core is (r, r, kernel), and its factor (r, in)."),
    "alpha nan": ("alpha", torch.tensor(float("nan")), "is nan: the file is damaged"),
}


@pytest.mark.parametrize(("name", "tensor", "text"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_file(model: nn.Module, name: str, tensor: Tensor, text: str) -> None:
    refuse(model, change(name, tensor), ak.AdapterError, text)


# Afterwards


def test_saved_again_it_is_a_folder_as_any(model: nn.Module, tmp_path: Path) -> None:
    wanted = lycoris_file(model, tmp_path / "a.safetensors", use_tucker=True, conv_dim=2, conv_alpha=5)
    adapters = ak.attach(model)
    adapters.load(tmp_path / "a.safetensors", "x", dtype="file")
    adapters.save("x", tmp_path / "folder")
    check(unet().double(), tmp_path / "folder", wanted)


def test_saved_again_it_loads_in_peft(tmp_path: Path) -> None:
    """Without the convolution with groups, for which PEFT has another form."""
    model, noise = unet().double(), torch.Generator().manual_seed(0)
    lycoris_file(model, tmp_path / "a.safetensors", use_tucker=True, conv_dim=2, conv_alpha=5)
    tensors = {k: t for k, t in read(tmp_path / "a.safetensors").items() if "time_mix" not in k}
    adapters = ak.attach(model)
    adapters.load(write(tmp_path / "b.safetensors", tensors), "x", dtype="file")
    adapters.save("x", tmp_path / "folder")
    theirs = peft.PeftModel.from_pretrained(unet().double(), tmp_path / "folder", autocast_adapter_dtype=False)
    arguments = [torch.randn(s, generator=noise).double() for s in ((2, 3, 8, 8), (2, 5), (2, 4, 6))]
    with torch.no_grad():
        torch.testing.assert_close(theirs.double()(*arguments), model(*arguments), rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [1.0, 7.0])
def test_foreign_tensors_for_an_adapter_with_a_config(model: nn.Module, tmp_path: Path, alpha: float) -> None:
    """The scaling stays the file's: what the config's differs by goes into the factors."""
    values = factors(2, QUERY, VALUE)
    tensors = kohya("lora_unet", values, alpha)
    adapters, wanted = ak.attach(model), expected(model, values, alpha / 2)
    adapters.add("a", LoraConfig(r=2, lora_alpha=6, target_modules=[QUERY, VALUE], use_rslora=True))
    adapters.save("a", tmp_path / "a")
    assert adapters.load_state_dict("a", tensors).ok
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=1e-12)
    adapters.remove("a")
    write(tmp_path / "a" / "adapter_model.safetensors", tensors)
    check(model, tmp_path / "a", wanted)
