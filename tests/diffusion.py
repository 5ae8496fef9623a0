"""The models of a tiny diffusion pipeline, and files of their adapters as LyCORIS and others write them."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from lycoris.wrapper import create_lycoris
from tests.core.test_errors import unchanged
from torch import Tensor, nn

import adapterkit as ak

logging.getLogger("LyCORIS").setLevel(logging.ERROR)


class Attention(nn.Module):
    """diffusers' names: `to_q`, `to_k`, `to_v`, `to_out.0`."""

    def __init__(self, size: int, context: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(size, size, bias=False)
        self.to_k = nn.Linear(context, size, bias=False)
        self.to_v = nn.Linear(context, size, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(size, size), nn.Dropout(0.0)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        weights = (self.to_q(x) @ self.to_k(context).transpose(1, 2)).softmax(-1)
        return self.to_out[0](weights @ self.to_v(context))


class Block(nn.Module):
    """A 3 x 3 and a strided convolution, a 1 x 1 projection and attention."""

    def __init__(self, size: int, context: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(size, size, 3, padding=1)
        self.proj_in = nn.Conv2d(size, size, 1)
        self.attn1 = Attention(size, size)
        self.attn2 = Attention(size, context)
        self.downsample_conv = nn.Conv2d(size, size, 3, stride=2, padding=1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + torch.tanh(self.conv1(x))
        h = self.proj_in(x).flatten(2).transpose(1, 2)
        h = h + self.attn1(h, h)
        h = h + self.attn2(h, context)
        return torch.tanh(self.downsample_conv(h.transpose(1, 2).reshape(x.shape)))


class Unet(nn.Module):
    """Input `(batch, 3, 8, 8)` and a text of `(batch, 4, 6)`; output of the input's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.time_embed = nn.Linear(5, 8)
        self.time_mix = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.down_blocks = nn.ModuleList(Block(8, 6) for _ in range(2))
        self.norm = nn.GroupNorm(2, 8)
        self.conv_out = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        h = self.conv_in(x) + self.time_mix(self.time_embed(time)[:, :, None]).sum(-1)[..., None, None]
        for block in self.down_blocks:
            h = block(h, text)
        return self.conv_out(self.norm(h))


def unet() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Unet().eval()


def text_encoder(projection: bool = False) -> nn.Module:
    """A CLIP text encoder; with a projection its layers are under `text_model.`."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    return model.eval()


def output(model: nn.Module) -> Tensor:
    """What the model computes for one fixed input."""
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        if isinstance(model, Unet):
            shapes = ((2, 3, 8, 8), (2, 5), (2, 4, 6))
            found: Tensor = model(*(torch.randn(s, generator=noise).to(model.conv_in.weight.dtype) for s in shapes))
            return found
        tokens = torch.randint(3, 32, (2, 7), generator=noise)
        result = model(input_ids=tokens)
        hidden: Tensor = result[0]
        return hidden


def lycoris_file(model: nn.Module, file: Path, **options: Any) -> Tensor:
    """Write what LyCORIS writes for a trained adapter on `model`; what it computes with it. `model` is as before."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = create_lycoris(model, 1.0, warn_on_unmatched=False, **{"linear_dim": 3, "linear_alpha": 2, **options})
        network.apply_to()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    network.to(next(model.parameters()).dtype)
    computed = output(model)
    network.save_weights(str(file), None, {"ss_network_dim": "3"})
    network.restore()
    return computed


def write(file: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    safetensors.torch.save_file({k: v.contiguous().clone() for k, v in tensors.items()}, file, metadata=metadata)
    return file


def read(file: Path) -> dict[str, Tensor]:
    return dict(safetensors.torch.load_file(file))


def rename(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {new + key.removeprefix(old) if key.startswith(old) else key: t for key, t in tensors.items()}


@contextmanager
def loaded(model: nn.Module, file: Path, **options: Any) -> Iterator[ak.LoadReport]:
    """The file's adapter acts on `model`, and is gone afterwards."""
    adapters = ak.attach(model)
    yield adapters.load(file, "x", **options)
    adapters.remove("x")


@contextmanager
def as_file(adapter: Path | dict[str, Tensor]) -> Iterator[Path]:
    """The file of an adapter; of tensors, one that is written here."""
    with tempfile.TemporaryDirectory() as folder:
        yield adapter if isinstance(adapter, Path) else write(Path(folder) / "a.safetensors", adapter)


def check(model: nn.Module, adapter: Path | dict[str, Tensor], wanted: Tensor, **options: Any) -> ak.LoadReport:
    """The adapter loads on `model`, gives these outputs and leaves nothing."""
    base = output(model)
    with as_file(adapter) as file, loaded(model, file, dtype="file", **options) as report:
        assert (wanted - base).abs().max() > 0.01
        torch.testing.assert_close(output(model), wanted, rtol=0, atol=1e-12)
    return report


def refuse(
    model: nn.Module, adapter: Path | dict[str, Tensor], error: type[Exception], *texts: str, **options: Any
) -> None:
    """The adapter does not load, and the message has these texts."""
    with as_file(adapter) as file, unchanged(model), pytest.raises(error) as caught:
        ak.attach(model).load(file, "x", **options)
    for text in texts:
        assert text in str(caught.value)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "unet": unet,
    "clip": text_encoder,
    "clip-projection": lambda: text_encoder(projection=True),
}


def with_weights(model: nn.Module, deltas: dict[str, Tensor]) -> Tensor:
    """What `model` computes with these changes added to its weights."""
    weights = {path: model.get_submodule(path).weight for path in deltas}
    before = {path: weight.detach().clone() for path, weight in weights.items()}
    with torch.no_grad():
        for path, delta in deltas.items():
            weights[path].add_(delta.reshape(weights[path].shape))
        found = output(model)
        for path, weight in weights.items():
            weight.copy_(before[path])
    return found
