"""Tiny models for tests: made from configs, seeded, in eval mode; each with inputs and one output tensor.

`build(name)` gives the same weights at every call with the same seed, and touches no global random state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, LABELS, BATCH, LENGTH = 32, 3, 2, 6


@dataclass(frozen=True)
class Tiny:
    """One tiny model.

    Attributes:
        make: builds it, with torch's global random state.
        inputs: keyword arguments for its forward.
        targets: suffixes of layers of every sort it has, embeddings left out, that PEFT adapts rightly too.
        embedding: suffix of an embedding, if it has one.
        head: suffix of a module to train in full.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    targets: tuple[str, ...]
    embedding: str | None = None
    head: str | None = None


class ConvNet(nn.Module):
    """Every sort of convolution in a row. Input `(batch, 4, 12)`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(4, 8, 3, padding=1)
        self.conv2d = nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=1)
        self.conv3d = nn.Conv3d(1, 4, (1, 3, 2), padding=(0, 1, 0))
        self.grouped = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.dilated = nn.Conv2d(8, 4, 3, padding=2, dilation=2)
        self.circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 6)
        self.head = nn.Linear(6, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, labels)`."""
        x = torch.tanh(self.conv1d(x)).unflatten(1, (2, 4))
        x = torch.tanh(self.conv2d(x)).unsqueeze(1)
        x = torch.tanh(self.conv3d(x)).mean(2)
        x = torch.tanh(self.dilated(torch.tanh(self.grouped(x))))
        x = self.norm(torch.tanh(self.circular(x))).mean((2, 3))
        return self.head(torch.tanh(self.fc(x)))


class EmbeddingNet(nn.Module):
    """An embedding with a padding row, two layers in a stack, and modules whose names are alike. Input: numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8, padding_idx=0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.overhead = nn.Linear(8, 8)
        self.head = nn.Linear(8, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, labels)`."""
        h = self.embed(x)
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        return self.head(torch.tanh(self.overhead(h)).mean(1))


def tokens(batch: int = BATCH) -> Tensor:
    """Token numbers `(batch, length)`; none is the padding token 0."""
    return torch.randint(1, VOCABULARY, (batch, LENGTH), generator=torch.Generator().manual_seed(1))


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = {**SIZES, "vocab_size": VOCABULARY}
IMAGES = {**SIZES, "image_size": 8, "patch_size": 4, "num_labels": LABELS}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 1}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
BART = {f"{part}_{size}": n for part in ("encoder", "decoder") for size, n in (("layers", 2), ("attention_heads", 2))}
BART |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "d_model": 16, "max_position_embeddings": 16}


def _of(name: str, **fields: Any) -> Callable[[], nn.Module]:
    """Makes a model of this class of transformers; the fields are its config's."""

    def make() -> nn.Module:
        import transformers

        model: Any = getattr(transformers, name)
        made: nn.Module = model(model.config_class(**fields))
        return made

    return make


def _ids() -> dict[str, Tensor]:
    return {"input_ids": tokens()}


def _seq2seq() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens().flip(1)}


MODELS: dict[str, Tiny] = {
    "gpt2": Tiny(_of("GPT2LMHeadModel", vocab_size=VOCABULARY, **GPT2), _ids, ("c_attn", "mlp.c_proj"), "wte", "ln_f"),
    "llama": Tiny(
        _of("LlamaForCausalLM", num_key_value_heads=1, **WORDS),
        _ids,
        ("q_proj", "v_proj", "down_proj"),
        "embed_tokens",
        "lm_head",
    ),
    "bert": Tiny(
        _of("BertForSequenceClassification", max_position_embeddings=16, num_labels=LABELS, **WORDS),
        _ids,
        ("query", "value", "intermediate.dense"),
        "word_embeddings",
        "classifier",
    ),
    "t5": Tiny(
        _of("T5ForConditionalGeneration", vocab_size=VOCABULARY, **T5),
        _seq2seq,
        ("q", "v", "wo"),
        None,
        "final_layer_norm",
    ),
    "vit": Tiny(
        _of("ViTForImageClassification", **IMAGES),
        lambda: {"pixel_values": _normal(BATCH, 3, 8, 8)},
        ("q_proj", "projection"),
        None,
        "classifier",
    ),
    "gemma3": Tiny(
        _of("Gemma3ForCausalLM", num_key_value_heads=1, head_dim=8, **WORDS),
        _ids,
        ("q_proj", "v_proj"),
        "embed_tokens",
        "norm",
    ),
    "bart": Tiny(
        _of("BartForConditionalGeneration", vocab_size=VOCABULARY, scale_embedding=True, **BART),
        _seq2seq,
        ("q_proj", "fc2"),
        "encoder.embed_tokens",
        "layernorm_embedding",
    ),
    "convnet": Tiny(ConvNet, lambda: {"x": _normal(BATCH, 4, 12)}, ("conv1d", "conv2d", "conv3d", "fc"), None, "head"),
    "embednet": Tiny(EmbeddingNet, lambda: {"x": tokens()}, ("layers.0", "layers.1", "overhead"), "embed", "head"),
}
NAMES = tuple(MODELS)


def build(name: str, seed: int = 0) -> nn.Module:
    """The model `name`, in eval mode, with the weights of `seed`."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes half a millisecond without a GPU
        model = MODELS[name].make().eval()
        for parameter in model.parameters():  # transformers starts near zero, where differences are hard to see
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model


def inputs(name: str) -> dict[str, Tensor]:
    """Keyword arguments for `name`'s forward, the same at every call."""
    return MODELS[name].inputs()


def run(model: nn.Module, name: str) -> Tensor:
    """The model's output for `inputs(name)`: its logits, floating, without a graph."""
    with torch.no_grad():
        out = model(**_cast(inputs(name), model))
    return out if isinstance(out, Tensor) else out.logits


def assert_same_outputs(found: Tensor, expected: Tensor) -> None:
    """Two outputs of equal parameters that lie in other memory: loaded, copied or made a second time.

    Kernels round by where a tensor begins in memory, so the last bits may differ: up to 32 roundings of the largest
    value are allowed. What an adapter changes in these models is a thousand times that.
    """
    allowed = 32 * torch.finfo(expected.dtype).eps * max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=allowed)


def _cast(values: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Floating inputs in the dtype of the model's weights."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in values.items()}
