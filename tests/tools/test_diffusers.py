"""diffusers: the adapters of a whole pipeline give what diffusers gives with PEFT, and follow their strengths."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig as PeftLora
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

import adapterkit as ak
from adapterkit.integrations.diffusers import PipelineAdapters

NAMES = ("to_q", "to_v", "to_out.0", "conv1")
FILE = "pytorch_lora_weights.safetensors"


def tokenizer() -> CLIPTokenizer:
    words = {f"{letter}</w>": i for i, letter in enumerate("abcdefghijklmnop", start=3)}
    vocab = {"!": 0, "<|startoftext|>": 1, "<|endoftext|>": 2, **words}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def clip() -> CLIPTextModel:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 1}
    return CLIPTextModel(CLIPTextConfig(**sizes, **tokens, projection_dim=16)).eval()


def stable_diffusion() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    pipeline = StableDiffusionPipeline(
        unet=unet.eval(),
        vae=vae.eval(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flux() -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    text = T5EncoderModel(T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, shift_factor=0.0)
    pipeline = FluxPipeline(
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        text_encoder_2=text.eval(),
        tokenizer_2=tokenizer(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image(pipeline: Any, **options: Any) -> Tensor:
    """The latents that the pipeline makes of one prompt and one noise; two steps."""
    sizes = {} if isinstance(pipeline, StableDiffusionPipeline) else {"height": 16, "width": 16}
    given = {"num_inference_steps": 2, "output_type": "latent", "generator": torch.Generator().manual_seed(1)}
    return pipeline("a b c", **sizes, **given, **options).images


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Equal within 1e-5 of the largest latent."""
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0.0)


def written(make: Callable[[], Any], folder: Path, seed: int, rank: int) -> Path:
    """What diffusers and PEFT save of an adapter on the denoiser and the text encoder."""
    pipeline, layers = make(), {}
    denoiser = "unet" if hasattr(pipeline, "unet") else "transformer"
    targets = {denoiser: NAMES, "text_encoder": ("q_proj", "out_proj")}
    noise = torch.Generator().manual_seed(seed)
    for part, names in targets.items():
        model = getattr(pipeline, part)
        model.add_adapter(PeftLora(r=rank, lora_alpha=2 * rank, target_modules=list(names)), "x")
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=noise)
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(model, adapter_name="x")
        layers[f"{part}_lora_adapter_metadata"] = model.peft_config["x"].to_dict()
    pipeline.save_lora_weights(folder, **layers)
    return folder


@pytest.fixture(scope="module", params=[stable_diffusion, flux], ids=["unet", "flux"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A pipeline with the adapters `a` and `b` of diffusers and PEFT, and the same with ours."""
    folder, theirs = tmp_path_factory.mktemp("adapters"), request.param()
    ours = PipelineAdapters(request.param())
    for seed, name in enumerate("ab"):
        written(request.param, folder / name, seed, rank=2 + seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # the second one of each model
            theirs.load_lora_weights(folder / name, adapter_name=name)
        ours.load(folder / name, name)
    return theirs, ours


def test_one_file_adapts_the_denoiser_and_the_text_encoder(both: tuple[Any, Any]) -> None:
    theirs, ours = both
    denoiser = next(iter(set(ours) & {"unet", "transformer"}))
    assert {name: set(parts) for name, parts in ours.names.items()} == {
        name: {denoiser, "text_encoder"} for name in "ab"
    }
    for name in "ab":
        theirs.set_adapters(name)
        ours.activate(name)
        assert_close(image(ours.pipeline), image(theirs))
    ours.activate()
    assert not torch.allclose(image(ours.pipeline), image(theirs), atol=1e-2)


@pytest.mark.parametrize("by_component", [False, True])
def test_strengths_are_what_set_adapters_makes_of_weights(both: tuple[Any, Any], by_component: bool) -> None:
    theirs, ours = both
    denoiser = next(iter(set(ours) & {"unet", "transformer"}))
    a = {denoiser: 0.7, "text_encoder": 0.2} if by_component else 0.7
    theirs.set_adapters(["a", "b"], [a, 0.3])
    ours.activate("a", "b", strengths={"a": a, "b": 0.3})
    assert_close(image(ours.pipeline), image(theirs))


def test_blocks_have_the_strengths_that_set_adapters_gives_them(both: tuple[Any, Any]) -> None:
    theirs, ours = both
    if "unet" not in ours:
        pytest.skip("diffusers has strengths of blocks for UNets alone")
    theirs.set_adapters("a", {"unet": {"down": 0.5, "up": -0.3}, "text_encoder": 0.2})
    unet, blocks = ours.pipeline.unet, dict[str, float | None]()  # diffusers leaves blocks without attention at 1
    for name, strength in (("down_blocks", 0.5), ("up_blocks", -0.3)):
        with_attention = [i for i, block in enumerate(getattr(unet, name)) if hasattr(block, "attentions")]
        blocks |= {f"{name}.{i}": strength for i in with_attention}
    ours.activate("a", strengths={"a": {"unet": blocks, "text_encoder": 0.2}})
    assert_close(image(ours.pipeline), image(theirs))


def test_fused_weights_give_what_diffusers_gives_and_the_base_comes_back(both: tuple[Any, Any]) -> None:
    theirs, ours = both
    theirs.set_adapters(["a", "b"], [0.5, -0.5])
    ours.activate("a", "b", strengths={"a": 0.5, "b": -0.5})
    models = [adapters.model for adapters in ours.values()]
    before = [{key: value.clone() for key, value in model.state_dict().items()} for model in models]
    ours.merge("a", "b")
    assert_close(image(ours.pipeline), image(theirs))
    ours.unmerge()
    for model, values in zip(models, before, strict=True):
        assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


def test_strengths_may_change_between_two_steps(both: tuple[Any, Any]) -> None:
    theirs, ours = both
    theirs.set_adapters("a")
    ours.activate("a")

    def weaken(set_strength: Callable[[], None]) -> Any:
        return lambda pipeline, step, time, given: set_strength() or given

    expected = image(theirs, callback_on_step_end=weaken(lambda: theirs.set_adapters("a", 0.25)))
    found = image(ours.pipeline, callback_on_step_end=weaken(lambda: ours.activate("a", strengths={"a": 0.25})))
    assert_close(found, expected)


def test_the_scale_of_a_call_multiplies_the_strengths_of_the_denoiser(both: tuple[Any, Any]) -> None:
    theirs, ours = both
    option = "cross_attention_kwargs" if "unet" in ours else "joint_attention_kwargs"
    only = {"a": {"text_encoder": 0.0, "unet": 0.8, "transformer": 0.8}}
    theirs.set_adapters("a", [{part: scale for part, scale in only["a"].items() if part in ours}])
    ours.activate("a", strengths={"a": {part: scale for part, scale in only["a"].items() if part in ours}})
    with pytest.raises(ak.StateError, match="text_encoder"):
        image(ours.pipeline, **{option: {"scale": 0.5}})
    ours["text_encoder"].activate(trainable=False)
    found, expected = (image(pipeline, **{option: {"scale": 0.5}}) for pipeline in (ours.pipeline, theirs))
    assert_close(found, expected)
    assert_close(image(ours.pipeline), image(theirs))


def kohya(names: dict[str, nn.Module], rank: int = 2) -> dict[str, Tensor]:
    """LoRA tensors under kohya's names for layers of these shapes."""
    noise, found = torch.Generator().manual_seed(0), {}
    for name, layer in names.items():
        found[f"{name}.lora_down.weight"] = torch.randn(rank, layer.in_features, generator=noise) * 0.1
        found[f"{name}.lora_up.weight"] = torch.randn(layer.out_features, rank, generator=noise) * 0.1
        found[f"{name}.alpha"] = torch.tensor(3.0)
    return found


def linears(model: nn.Module, prefix: str, *ends: str) -> dict[str, nn.Module]:
    return {f"{prefix}_{path.replace('.', '_')}": m for path, m in model.named_modules() if path.endswith(ends)}


def test_kohyas_names_of_a_whole_pipeline(tmp_path: Path) -> None:
    pipeline = stable_diffusion()
    unet = linears(pipeline.unet, "lora_unet", "to_q", "to_v")
    text = linears(pipeline.text_encoder, "lora_te_text_model", "q_proj", "k_proj", "v_proj", "out_proj")
    save_file(kohya({**unet, **text}), tmp_path / "k.safetensors")
    theirs, ours = stable_diffusion(), PipelineAdapters(pipeline)
    theirs.load_lora_weights(tmp_path / "k.safetensors")
    reports = ours.load(tmp_path / "k.safetensors", "k")
    assert set(reports) == {"unet", "text_encoder"}
    assert_close(image(pipeline), image(theirs))


def test_a_textual_inversion_beside_an_adapter_is_left_out_and_told(tmp_path: Path) -> None:
    ours = PipelineAdapters(stable_diffusion())
    unet = kohya(linears(ours["unet"].model, "lora_unet", "to_q"))
    text = kohya(linears(ours["text_encoder"].model, "lora_te_text_model", "q_proj"))
    save_file({**unet, **text, "bundle_emb.cat.clip_l": torch.ones(1, 16)}, tmp_path / "k.safetensors")
    with pytest.warns(ak.AdapterWarning, match="also has a textual inversion"):
        ours.load(tmp_path / "k.safetensors", "k")
    assert set(ours.names["k"]) == {"unet", "text_encoder"}


def test_names_of_stability(tmp_path: Path) -> None:
    pipeline, blocks = stable_diffusion(), "down_blocks_1_attentions_0_transformer_blocks_0"
    layers = linears(pipeline.unet.down_blocks[1], "lora_unet_down_blocks_1", "attn1.to_q")
    tensors = kohya(layers)
    stability = {key.replace(blocks, "input_blocks_3_1_transformer_blocks_0"): value for key, value in tensors.items()}
    assert stability.keys() != tensors.keys()
    save_file(stability, tmp_path / "s.safetensors")
    save_file(tensors, tmp_path / "t.safetensors")
    ours = PipelineAdapters(pipeline)
    ours.load(tmp_path / "s.safetensors", "s")
    found = image(pipeline)
    ours.load(tmp_path / "t.safetensors", "t")
    assert_close(found, image(pipeline))


def test_flux_of_black_forest_labs_with_fused_projections(tmp_path: Path) -> None:
    size = flux().transformer.inner_dim
    names = {
        "lora_unet_double_blocks_0_img_attn_qkv": nn.Linear(size, 3 * size),
        "lora_unet_double_blocks_0_txt_mlp_0": nn.Linear(size, 4 * size),
    }
    save_file(kohya(names), tmp_path / "f.safetensors")
    theirs, ours = flux(), PipelineAdapters(flux())
    theirs.load_lora_weights(tmp_path / "f.safetensors")
    ours.load(tmp_path / "f.safetensors", "f")
    assert_close(image(ours.pipeline), image(theirs))


def test_parts_of_a_pipeline_by_the_names_of_comfyui(tmp_path: Path) -> None:
    ours = PipelineAdapters(flux())
    size = ours["transformer"].model.inner_dim
    names = {"diffusion_model.single_blocks.0.linear1": nn.Linear(size, 7 * size)}
    clip = "text_model.encoder.layers.0.self_attn.q_proj"
    names["text_encoders.clip_l.transformer." + clip] = nn.Linear(16, 16)
    names["text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"] = nn.Linear(16, 8)
    save_file(kohya(names), tmp_path / "c.safetensors")
    reports = ours.load(tmp_path / "c.safetensors", "c")
    assert {part: report.ok for part, report in reports.items()} == dict.fromkeys(ours.names["c"], True)
    assert set(ours.names["c"]) == {"transformer", "text_encoder", "text_encoder_2"}
    assert len(ours["transformer"].layers("c")) == 4


def test_an_adapter_of_pefts_folder_goes_to_the_denoiser(tmp_path: Path) -> None:
    adapters = ak.attach(stable_diffusion().unet)
    adapters.add("x", ak.config("loha", r=2, target_modules=["to_q", "conv1"]))
    for parameter in adapters.parameters("x"):
        parameter.data = torch.full_like(parameter, 0.1)
    ours = PipelineAdapters(stable_diffusion())
    assert set(ours.load(adapters.save("x", tmp_path / "x"), "x")) == {"unet"}
    ours.activate("x", strengths={"x": 0.5})
    found = image(ours.pipeline)
    ours.merge("x")
    assert_close(image(ours.pipeline), found)


def test_a_file_that_does_not_fit_changes_no_component(tmp_path: Path) -> None:
    ours = PipelineAdapters(stable_diffusion())
    tensors = load_file(written(stable_diffusion, tmp_path / "a", 0, rank=2) / FILE)
    wrong = next(key for key in tensors if key.startswith("unet.") and "lora_A" in key)
    shape, part = {wrong: tensors[wrong][:, :1].contiguous()}, {"text_encoder_2.x.lora_A.weight": torch.zeros(1, 1)}
    for change, message in (
        (shape, "other shapes"),
        (part, "this pipeline has no component for the keys of 'text_encoder_2'"),
    ):
        save_file({**tensors, **change}, tmp_path / "x.safetensors")
        with pytest.raises(ak.CheckpointError, match=message):
            ours.load(tmp_path / "x.safetensors", "x")
        assert ours.names == {}
    with pytest.raises(ak.CheckpointError, match="hub"):
        ours.load("nobody/nothing", "x")


def test_dora_is_refused_and_not_read_as_lora(tmp_path: Path) -> None:
    pipeline = stable_diffusion()
    tensors = kohya(linears(pipeline.unet, "lora_unet", "to_q"))
    down = next(key for key in tensors if "down" in key)
    tensors[down.replace("lora_down.weight", "dora_scale")] = torch.ones(16, 1)
    save_file(tensors, tmp_path / "d.safetensors")
    with pytest.raises(ak.AdapterError, match="DoRA"):
        PipelineAdapters(pipeline).load(tmp_path / "d.safetensors", "d")


def test_differences_that_have_no_place_are_refused_and_not_dropped(tmp_path: Path) -> None:
    pipeline = stable_diffusion()
    tensors = kohya(linears(pipeline.unet, "lora_unet", "to_q")) | {"lora_unet_other_norm.w_norm": torch.ones(16)}
    save_file(tensors, tmp_path / "d.safetensors")
    with pytest.raises(ak.CheckpointError, match="a norm that was trained in full"):
        PipelineAdapters(pipeline).load(tmp_path / "d.safetensors", "d")


def test_a_wrong_strength_leaves_every_component_as_it_was(both: tuple[Any, Any]) -> None:
    _, ours = both
    ours.activate("a", strengths={"a": 0.5})
    before = {part: adapters.strengths for part, adapters in ours.items()}
    with pytest.raises(ak.ConfigError):
        ours.activate("b", strengths={"b": {"text_encoder": math.nan}})
    with pytest.raises(ak.UnknownNameError):
        ours.activate("b", strengths={"b": {"text_encoder_9": 1.0}})
    assert {part: adapters.strengths for part, adapters in ours.items()} == before


def test_detach_leaves_no_trace_and_copies_work(tmp_path: Path) -> None:
    pipeline, plain = stable_diffusion(), stable_diffusion()
    ours = PipelineAdapters(pipeline)
    ours.load(written(stable_diffusion, tmp_path / "a", 0, rank=2), "a")
    assert ak.attach(copy.deepcopy(pipeline.unet)).active == ("a",)
    assert ak.attach(pickle.loads(pickle.dumps(pipeline.unet))).active == ("a",)
    assert PipelineAdapters(pipeline).detach() is pipeline
    assert torch.equal(image(pipeline), image(plain))
    assert not pipeline.unet._forward_pre_hooks
    assert not pipeline.unet._forward_hooks
