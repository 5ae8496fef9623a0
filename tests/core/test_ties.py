"""Tied weights: what is parted is told to transformers, and nothing else, so that files give back what was merged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.models import tokens
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_lora import LoraConfig

IDS, PIXELS = {"input_ids": tokens()}, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
PAIRS = {**IDS, "decoder_input_ids": tokens().flip(1)}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 1}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
T5 |= {"decoder_start_token_id": 0, "tie_word_embeddings": True}
HALVES = {
    f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", 1), ("ffn_dim", 24))
}
HALVES |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16, "vocab_size": 32}
DECODERS = "decoder.embed_tokens"
ROPE = {**SIZES, "vocab_size": 32, "num_key_value_heads": 1}


def vision_encoder_decoder() -> nn.Module:
    encoder = transformers.ViTConfig(**SIZES, image_size=8, patch_size=4)
    decoder = transformers.GPT2Config(**GPT2, eos_token_id=1, add_cross_attention=True, is_decoder=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return transformers.VisionEncoderDecoderModel(config)


def llava() -> nn.Module:
    vision = transformers.CLIPVisionConfig(**SIZES, image_size=8, patch_size=4)
    text = transformers.LlamaConfig(**ROPE, tie_word_embeddings=True)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=31, tie_word_embeddings=True
    )
    return transformers.LlavaForConditionalGeneration(config)


def of(model: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**sizes))


# How to make it, its inputs, a table that is called, its output layer, and whether its config can say what is parted.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], str, str, bool]] = {
    "gpt2": (of("GPT2LMHeadModel", "GPT2Config", **GPT2, eos_token_id=1), IDS, "wte", "lm_head", True),
    "bart": (of("BartForConditionalGeneration", "BartConfig", **HALVES), PAIRS, DECODERS, "lm_head", True),
    "t5": (of("T5ForConditionalGeneration", "T5Config", **T5), PAIRS, DECODERS, "lm_head", False),
    "switch transformers": (
        of("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", **T5, num_experts=2),
        PAIRS,
        DECODERS,
        "lm_head",
        False,
    ),
    "bert": (of("BertForMaskedLM", "BertConfig", vocab_size=32, **SIZES), IDS, "word_embeddings", "decoder", True),
    "llama": (of("LlamaForCausalLM", "LlamaConfig", **ROPE), IDS, "embed_tokens", "lm_head", True),
    "gpt2 as a decoder": (
        vision_encoder_decoder,
        {"pixel_values": PIXELS, "decoder_input_ids": tokens()},
        "wte",
        "decoder.lm_head",
        True,
    ),
    "llava": (llava, IDS, "embed_tokens", "lm_head", True),
}
CASES = ("nothing tied", "table", "output layer", "output layer in full")


def build(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = MODELS[name][0]().eval()
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.config.architectures = [type(model).__name__]
    return model


@torch.no_grad()
def output(model: nn.Module, name: str) -> Tensor:
    return model(**MODELS[name][1]).logits


def adapted(name: str, case: str) -> ak.Adapters:
    model, (_, _, table, head, _) = build(name), MODELS[name]
    targets = {"table": table, "output layer": head}.get(case, "all-linear")
    in_full = [head] if case == "output layer in full" else None
    adapters = ak.attach(model)
    targets = targets if targets == "all-linear" else [targets]
    config = LoraConfig(r=2, target_modules=targets, modules_to_save=in_full)
    adapters.add("a", config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapters.parameters("a"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapters


def flags(config: Any) -> list[bool]:
    inner = [value for value in vars(config).values() if hasattr(value, "to_dict")]
    own = [config.tie_word_embeddings] if hasattr(config, "tie_word_embeddings") else []
    return own + [flag for value in inner for flag in flags(value)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_was_merged_for_good_is_the_same_from_its_files(name: str, case: str, tmp_path: Path) -> None:
    adapters = adapted(name, case)
    expected, tied = output(adapters.model, name), any(flags(adapters.model.config))
    base = output(build(name), name)
    model = adapters.merge_and_detach("a", untie=case != "output layer in full")
    torch.testing.assert_close(output(model, name), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, base, atol=1e-2)
    assert any(flags(model.config)) == (tied and (case == "nothing tied" or not MODELS[name][4]))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(output(again, name), expected, rtol=1e-4, atol=1e-5)
    model.tie_weights()
    torch.testing.assert_close(output(model, name), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Adapter 'a'.* layers never ran:adapterkit.errors.AdapterWarning")
@pytest.mark.parametrize("case", ["table", "output layer in full"])
@pytest.mark.parametrize("name", ["bart", "switch transformers", "gpt2 as a decoder", "llava"])
def test_a_merge_on_disk_says_the_same_of_ties(name: str, case: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "base")
    adapters = adapted(name, case)
    expected = output(adapters.model, name)
    adapters.save("a", tmp_path / "a")
    ak.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out", untie=True)
    model = type(adapters.model).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(output(model, name), expected, rtol=1e-4, atol=1e-5)
    adapters.merge_and_detach("a", untie=True).save_pretrained(tmp_path / "memory")
    in_memory, on_disk = ((tmp_path / place / "config.json").read_text() for place in ("memory", "out"))
    assert in_memory == on_disk


@pytest.mark.parametrize("name", ["gpt2", "bart", "t5", "gpt2 as a decoder", "llava"])
def test_unmerge_gives_every_tie_and_flag_back(name: str) -> None:
    def picture(model: nn.Module) -> dict[str, Any]:
        modules = dict(model.named_modules())
        return {
            "objects": {key: id(p) for key, p in model.named_parameters(remove_duplicate=False)},
            "config": copy.deepcopy(model.config.to_dict()),
            "ties": {path: getattr(m, "all_tied_weights_keys", None) for path, m in modules.items()},
            "attributes": {path: sorted(m.__dict__) for path, m in modules.items()},
        }

    adapters = adapted(name, "table")
    if name in ("bart", "t5"):  # a further merge ends a further tie
        adapters.add("b", LoraConfig(r=2, target_modules=["encoder.embed_tokens"]), activate=False)
    before = picture(adapters.model)
    for each in adapters:
        adapters.merge(each, untie=True)
    twin = copy.deepcopy(adapters.model)
    ak.attach(twin).unmerge()
    assert picture(twin) | {"objects": None} == before | {"objects": None}
    assert picture(adapters.model)["ties"] != before["ties"]
    adapters.unmerge()
    assert picture(adapters.model) == before


def test_unmerge_gives_the_ties_of_every_merge_back() -> None:
    model = nn.ModuleDict({name: build("gpt2") for name in ("one", "two")})
    adapters = ak.attach(model)
    for name in model:
        adapters.add(name, LoraConfig(r=2, target_modules=[f"{name}.transformer.wte"]), activate=False)
    before = [copy.copy(part.all_tied_weights_keys) for part in model.values()]
    for name in model:
        adapters.merge(name, untie=True)
    assert all(part.all_tied_weights_keys != ties for part, ties in zip(model.values(), before, strict=True))
    adapters.unmerge()
    assert [part.all_tied_weights_keys for part in model.values()] == before


def test_a_merged_model_with_a_head_at_a_tied_layer_is_the_same_from_its_files(tmp_path: Path) -> None:
    adapters = adapted("bart", "output layer in full")
    expected = output(adapters.model, "bart")
    adapters.merge("a")
    before = copy.deepcopy(adapters.model.config.to_dict())
    adapters.model.save_pretrained(tmp_path / "plain")
    adapters.model.save_pretrained(tmp_path / "state", state_dict=adapters.model.state_dict())
    assert adapters.model.config.to_dict() | {"dtype": None} == before | {"dtype": None}
    for place in ("plain", "state"):
        again = transformers.BartForConditionalGeneration.from_pretrained(tmp_path / place).eval()
        assert again.config.tie_word_embeddings is False
        torch.testing.assert_close(output(again, "bart"), expected, rtol=1e-4, atol=1e-5)


# By memory


class Pair(nn.Module):
    """Two layers on one input."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + 2 * self.head(x)


def fuse(model: Any, *, columns: bool, kept: bool = False, shift: int = 8) -> None:
    """Make the weights parts of one tensor, which is a buffer too if it is `kept`."""
    fused = torch.randn(8, 16) if columns else torch.randn(16, 8)
    model.left.weight.data = fused[:, :8] if columns else fused[:8]
    model.head.weight.data = fused[:, shift : shift + 8] if columns else fused[shift : shift + 8]
    if kept:
        model.register_buffer("fused", fused)


# What makes two parameters share memory, and the tensor that the head's then shares it with.
SHARED: dict[str, tuple[Callable[[Any], object], str]] = {
    "data": (lambda m: setattr(m.left.weight, "data", m.head.weight.data), "left.weight"),
    "rows of a buffer": (lambda m: fuse(m, columns=False, kept=True), "fused"),
    "columns of a buffer": (lambda m: fuse(m, columns=True, kept=True), "fused"),
    "a part": (lambda m: fuse(m, columns=False, shift=7), "left.weight"),
    "some columns": (lambda m: fuse(m, columns=True, shift=7), "left.weight"),
    "bias": (lambda m: setattr(m.left, "bias", m.head.bias), "left.bias"),
    "itself": (lambda m: setattr(m.head, "weight", nn.Parameter(torch.randn(8, 1).expand(8, 8))), ""),
}


@pytest.mark.parametrize("case", SHARED)
def test_weights_that_share_memory_are_tied_whichever_objects_they_are(case: str) -> None:
    tie, other = SHARED[case]
    torch.manual_seed(0)
    model, x = Pair(), torch.randn(3, 8)
    tie(model)
    base, before = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    adapters = ak.attach(model)
    config = LoraConfig(
        target_modules=["head"], init_lora_weights=False, modules_to_save=None, lora_bias=case == "bias"
    )
    adapters.add("a", config)
    for parameter in adapters.parameters("a"):
        nn.init.normal_(parameter, std=0.3)
    expected = model(x)
    expanded = "is expanded: several of its numbers are one in memory.* Merge with untie=True to give each its own"
    tied = f"is tied to another module: it shares memory with '{other}'"
    with pytest.raises(ak.StateError, match=tied if other else expanded):
        adapters.merge("a")
    adapters.merge("a", untie=True)
    torch.testing.assert_close(model(x), expected)
    adapters.detach()
    assert torch.equal(model(x), base)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("columns", [False, True])
def test_parts_of_one_tensor_that_do_not_overlap_are_not_tied(columns: bool) -> None:
    model, x = Pair(), torch.randn(3, 8)
    fuse(model, columns=columns)
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(target_modules=["head"], init_lora_weights=False))
    expected = model(x)
    adapters.merge("a")
    torch.testing.assert_close(model(x), expected)


def test_a_bias_that_two_layers_share_is_said_to_be_trained_at_one_alone() -> None:
    model = Pair()
    model.left.bias = model.head.bias
    report = ak.attach(model).add("a", LoraConfig(target_modules=["left", "head"], bias="all"))
    assert any("biases not trained" in note and note.endswith(": head") for note in report.notes)


def test_ties_that_end_inside_one_module_raise_a_warning() -> None:
    """`resize_token_embeddings` makes the three tables of an encoder-decoder one module; files have it once then."""
    model: Any = transformers.BartForConditionalGeneration(transformers.BartConfig(**HALVES))
    model.resize_token_embeddings(40)
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.warns(ak.AdapterWarning, match=r"are one module.*save the resized model and load it again"):
        adapters.merge_and_detach("a", untie=True)
