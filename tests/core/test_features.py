"""Pooled hidden states, against the model's own outputs pooled row by row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.models import LENGTH, build, inputs, tokens
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_lora import LoraConfig

LENGTHS = (LENGTH, 3, 1, 4)


def rows(side: str = "right", batch: int = 4) -> dict[str, Tensor]:
    """Token numbers of rows of different lengths, padded with 0."""
    ids, mask = torch.zeros(batch, LENGTH, dtype=torch.long), torch.zeros(batch, LENGTH, dtype=torch.long)
    for i, (row, length) in enumerate(zip(tokens(batch), LENGTHS, strict=True)):
        place = slice(0, length) if side == "right" else slice(LENGTH - length, LENGTH)
        ids[i, place], mask[i, place] = row[:length], 1
    return {"input_ids": ids, "attention_mask": mask}


def one_by_one(model: nn.Module, batch: dict[str, Tensor], layer: Any, pooling: str) -> Tensor:
    """Each row alone, without any padding, through transformers' own outputs."""
    body = model.base_model
    body = body.get_encoder() if model.config.is_encoder_decoder else body
    found = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        with torch.no_grad():
            output = body(input_ids=ids[mask.bool()][None], output_hidden_states=True)
        states = (output.last_hidden_state if layer == "last" else output.hidden_states[layer])[0]
        found.append({"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling])
    return torch.stack(found)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("layer", ["last", -2])
@pytest.mark.parametrize(
    ("name", "side"), [("bert", "right"), ("gpt2", "right"), ("gpt2", "left"), ("llama", "left"), ("t5", "right")]
)
def test_padding_is_never_pooled(name: str, side: str, layer: int, pooling: Any) -> None:
    model, batch = build(name), rows(side)
    found = ak.features(model, [batch], layer=layer, pooling=pooling, progress=False)
    torch.testing.assert_close(found, one_by_one(model, batch, layer, pooling), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_without_pooling_padding_is_zero_and_shorter_batches_are_filled_up(side: str) -> None:
    model, batch = build("gpt2"), rows(side)
    short = {"input_ids": tokens()[:, :2], "attention_mask": torch.ones(2, 2, dtype=torch.long)}
    found = ak.features(model, [batch, short], pooling=None, progress=False)
    assert found.shape == (6, LENGTH, 16)
    mask = batch["attention_mask"].bool()
    assert not found[:4][~mask].any()
    assert found[:4][mask].any(1).all()
    assert not found[4:, 2:].any()
    both = ak.features(model, [batch, short], layer=["last", 0], pooling=None, progress=False)
    assert both.shape == (6, 2, LENGTH, 16)
    torch.testing.assert_close(both[:, 0], found)


def test_a_list_of_layers_gives_one_more_dimension() -> None:
    model, batch = build("bert"), rows()
    layers: list[Any] = ["last", -2, 0]
    found = ak.features(model, [batch, batch], layer=layers, progress=False)
    assert found.shape == (8, 3, 16)
    for i, layer in enumerate(layers):
        torch.testing.assert_close(found[:, i], ak.features(model, [batch, batch], layer=layer, progress=False))


def test_images_and_feature_maps() -> None:
    model = build("vit")
    with torch.no_grad():
        states = model.vit(**inputs("vit")).last_hidden_state
    torch.testing.assert_close(ak.features(model, [inputs("vit")], progress=False), states.mean(1))
    torch.testing.assert_close(ak.features(model, [inputs("vit")], pooling="cls", progress=False), states[:, 0])

    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    convolutional = ResNetForImageClassification(ResNetConfig(**sizes)).eval()
    images = {"pixel_values": torch.randn(2, 3, 32, 32)}
    with torch.no_grad():
        states = convolutional.resnet(**images).last_hidden_state
    torch.testing.assert_close(ak.features(convolutional, [images], progress=False), states.mean((2, 3)))
    with pytest.raises(ak.ConfigError, match=r"pooling = 'cls' has no meaning for a feature map\. Use 'mean'"):
        ak.features(convolutional, [images], pooling="cls", progress=False)
    with pytest.raises(ak.ConfigError, match=r"The layers have different sizes \(-1: \(16,\), 0: \(8,\)\)"):
        ak.features(convolutional, [images], layer=[-1, 0], progress=False)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_decoder_of_an_encoder_decoder(name: str) -> None:
    model = build(name)
    batch = {**rows(), "decoder_input_ids": rows()["input_ids"], "decoder_attention_mask": rows()["attention_mask"]}
    found = ak.features(model, [batch], stack="decoder", pooling="last", progress=False)
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).decoder_hidden_states[-1]
    expected = torch.stack([states[i, length - 1] for i, length in enumerate(LENGTHS)])
    torch.testing.assert_close(found, expected)
    encoder = ak.features(model, [batch], progress=False)  # needs no decoder, and ignores its inputs
    torch.testing.assert_close(encoder, ak.features(model, [rows()], progress=False))
    with pytest.raises(ak.ConfigError, match="stack='decoder' needs decoder_input_ids in each batch"):
        ak.features(model, [rows()], stack="decoder", progress=False)


def test_the_model_is_taken_as_it_is_adapted_now() -> None:
    model, batch = build("bert"), rows()
    bare = ak.features(model, [batch], progress=False)
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(target_modules=["query"], init_lora_weights=False), num_labels=7)
    active = ak.features(model, [batch], progress=False)
    assert not torch.allclose(active, bare, atol=1e-3)
    adapters.merge("a")
    torch.testing.assert_close(ak.features(model, [batch], progress=False), active, rtol=1e-4, atol=1e-5)
    adapters.unmerge()
    with adapters.disabled():
        torch.testing.assert_close(ak.features(model, [batch], progress=False), bare)


def test_modes_hooks_and_gradients_are_given_back() -> None:
    model = build("bert").train()
    model.bert.encoder.layer[0].eval()
    modes = [m.training for m in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with pytest.raises(ak.ConfigError, match=r"layer = 9 does not exist\. Available: -3"):
        ak.features(model, [rows()], layer=[-1, 9], progress=False)
    found = ak.features(model, [rows()], layer=-2, progress=False)
    assert torch.equal(found, ak.features(model, [rows()], layer=-2, progress=False))  # no dropout
    assert [m.training for m in model.modules()] == modes
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    probe = nn.Linear(16, 2)
    probe(found).sum().backward()  # an ordinary tensor, which a probe can be trained on
    assert not found.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("layer", [-1, [-1, -2]], ids=str)
@pytest.mark.parametrize("pooling", ["mean", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_streaming_writes_the_same_tensor(tmp_path: Path, layer: Any, pooling: Any, dtype: torch.dtype) -> None:
    model = build("bert").to(dtype)
    batches = [rows(), rows()]
    path = tmp_path / "deep" / "features.safetensors"
    found = ak.features(model, iter(batches), layer=layer, pooling=pooling, progress=False, out=path)
    assert found == path
    expected = ak.features(model, batches, layer=layer, pooling=pooling, progress=False)
    assert expected.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(load_file(path)["features"], expected)
    with safe_open(path, "pt") as file:
        assert file.get_slice("features")[2:5].shape == (3, *expected.shape[1:])
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def broken() -> Iterator[dict[str, Tensor]]:
    yield rows()
    raise OSError("the disk of the data is gone")


def test_a_stream_that_breaks_off_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "features.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="the disk of the data is gone"):
        ak.features(build("bert"), broken(), progress=False, out=path)
    short = {"input_ids": tokens()[:, :2]}
    with pytest.raises(
        ak.ConfigError, match=r"Streaming needs rows of one shape, but there are \(6, 16\) and \(2, 16\)"
    ):
        ak.features(build("bert"), [rows(), short], pooling=None, progress=False, out=path)
    with pytest.raises(ak.ConfigError, match="There are no batches"):
        ak.features(build("bert"), [], progress=False, out=path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ak.SaveError, match="cannot be written"):
        ak.features(build("bert"), [rows()], progress=False, out=path / "inside")


def test_labels_are_left_out_and_unknown_inputs_are_not() -> None:
    model = build("bert")
    found = ak.features(model, [{**rows(), "labels": torch.zeros(4, dtype=torch.long)}], progress=False)
    torch.testing.assert_close(found, ak.features(model, [rows()], progress=False))
    with pytest.raises(TypeError):
        ak.features(nn.Linear(2, 2), [{"nonsense": torch.zeros(1)}], progress=False)


def test_an_offloaded_model_gives_its_features() -> None:
    from accelerate import cpu_offload

    expected = ak.features(build("bert"), [rows()], progress=False)
    model = cpu_offload(build("bert"), torch.device("cpu"))
    torch.testing.assert_close(ak.features(model, [rows()], progress=False), expected)


PADDING = {"input_ids": tokens(), "attention_mask": torch.tensor([[1] * LENGTH, [0] * LENGTH])}
SQUARE = {"input_ids": tokens(), "attention_mask": torch.ones(2, 1, LENGTH, LENGTH)}
ERRORS: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "none": ([], {}, ak.ConfigError, r"There are no batches\. A generator can be read only once"),
    "batch": ([tokens()], {}, ak.ConfigError, r"Batch 0 is a Tensor; it must be a mapping of tensors by name"),
    "one batch": (rows(), {}, ak.ConfigError, r"batches is one dict\. Put it into a list: features\(model, "),
    "no tensors": ([{"input_ids": [[1]]}], {}, ak.ConfigError, r"Batch 0 holds no tensors\. Call the tokenizer"),
    "padding": ([rows(), PADDING], {}, ak.ConfigError, r"Batch 1: row 1 is all padding"),
    "mask": ([SQUARE], {}, ak.UnsupportedError, r"Batch 0: the mask has shape \(2, 1, 6, 6\), but the hidden states"),
    "pooling": ([rows()], {"pooling": "max"}, ak.ConfigError, r"pooling = 'max' must be one of 'mean', 'cls', 'last'"),
    "layer": ([rows()], {"layer": "end"}, ak.ConfigError, r"layer = 'end' must be 'last', the number of a layer, such"),
    "no layer": ([rows()], {"layer": []}, ak.ConfigError, r"layer = \[\] must be 'last', the number of a layer"),
    "bool": ([rows()], {"layer": True}, ak.ConfigError, r"layer = True must be 'last', the number of a layer"),
    "deep": ([rows()], {"layer": -4}, ak.ConfigError, r"layer = -4 does not exist\. Available: -3 \(embeddings\) to"),
    "no module": ([rows()], {"layer": "bert.x"}, ak.ConfigError, r"or the path of a module\. Nearest: "),
    "mixed": ([rows()], {"layer": ["bert", -1]}, ak.ConfigError, "mixes paths of modules"),
    "stack": ([rows()], {"stack": "both"}, ak.ConfigError, r"stack = 'both' must be 'encoder' or 'decoder'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_is_wrong(case: str) -> None:
    batches, fields, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        ak.features(build("bert"), batches, progress=False, **fields)


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": 16, "patch_size": 4}
TEXT = {**SIZES, "vocab_size": 32, "max_position_embeddings": 16}
IMAGES = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
SOUND = {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(0))}
CONVOLUTIONS = {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_conv_pos_embeddings": 4}
SPEECH = {"num_feat_extract_layers": 1, "num_conv_pos_embedding_groups": 2, "do_stable_layer_norm": True}
STAGES = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
# A class of transformers, the fields of its config, inputs, and whether its last hidden state is behind another norm.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Tensor], bool]] = {
    "a decoder": ("LlamaModel", TEXT, rows(), False),
    "a text encoder": ("RobertaModel", {**TEXT, "pad_token_id": 0}, rows(), False),
    "a post-norm text tower": ("CLIPTextModel", {**TEXT, "eos_token_id": 31}, rows(), True),
    "an image tower": ("SiglipVisionModel", VISION, IMAGES, True),
    "an image encoder": ("Dinov2Model", VISION, IMAGES, True),
    "an image encoder whose base is its layers": ("DINOv3ViTModel", VISION, IMAGES, True),
    "stages of images": ("SwinModel", STAGES, IMAGES, True),
    "a sound encoder": ("Wav2Vec2Model", {**SIZES, **CONVOLUTIONS, **SPEECH}, SOUND, True),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_number_is_the_index_into_hidden_states(name: str) -> None:
    import transformers

    cls, fields, batch, behind = MODELS[name]
    model_class = getattr(transformers, cls)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**fields)).eval()
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
    mask = batch.get("attention_mask")
    for layer in (*range(len(output.hidden_states)), -1, "last"):
        state = output.last_hidden_state if layer == "last" else output.hidden_states[layer]
        state = state if mask is None else state * mask[..., None]
        found = ak.features(model, [batch], layer=layer, pooling=None, progress=False)
        torch.testing.assert_close(found, state, rtol=1e-4, atol=1e-4)
    last = output.last_hidden_state
    assert behind == (last.shape != state.shape or not torch.allclose(last, output.hidden_states[-1], atol=1e-4))


def test_a_model_without_hidden_states_is_refused() -> None:
    with pytest.raises(ak.UnsupportedError, match=r"A Linear returns no hidden_states\. Use layer='last'"):
        ak.features(nn.Linear(2, 2), [{"input": torch.zeros(1, 2)}], layer=0, progress=False)
    with pytest.raises(
        ak.UnsupportedError, match=r"A Linear returns no last_hidden_state, so it has no features\. Pass"
    ):
        ak.features(nn.Linear(2, 2), [{"input": torch.zeros(1, 2)}], progress=False)


def plain_model() -> nn.Module:
    stages = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)])

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages, self.head = stages, nn.Linear(5, 2)

        def forward(self, image: Tensor) -> Tensor:
            for stage in self.stages:
                image = stage(image)
            return self.head(image.mean((2, 3)))  # type: ignore[no-any-return]

    return Plain()


def test_a_named_layer_of_a_plain_model_gives_its_output_with_the_adapters() -> None:
    torch.manual_seed(0)
    model, images = plain_model().eval(), torch.randn(4, 3, 8, 8)
    ak.attach(model).add("a", LoraConfig(r=2, target_modules=["stages.1"], init_lora_weights=False))
    with torch.no_grad():
        expected = model.stages[1](model.stages[0](images))  # type: ignore[index]
    for batches in ([images[:2], images[2:]], [{"image": images}], [(images,)]):
        found = ak.features(model, batches, layer="stages.1", progress=False)
        torch.testing.assert_close(found, expected.mean((2, 3)))
    with torch.no_grad():
        outputs = model(images)
    torch.testing.assert_close(ak.features(model, [images], layer="head", progress=False), outputs)
    assert not model.stages[1]._forward_hooks  # type: ignore[index,union-attr]


def test_a_named_layer_of_a_transformers_model_is_pooled_without_padding() -> None:
    model = build("bert").eval()
    ids, mask = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask}
    named = ak.features(model, [batch], layer="bert.encoder.layer.1", progress=False)
    torch.testing.assert_close(named, ak.features(model, [batch], layer=-1, progress=False))
