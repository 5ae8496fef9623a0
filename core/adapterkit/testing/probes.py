"""The models that methods are tried on: two layers of one kind, `up` and `down`, and a third that is left alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TARGETS = ("up", "down")
ROWS, PLACES, WIDTH, HIDDEN = 3, 5, 16, 24


class ProbeModel(nn.Module):
    """`rest(down(tanh(up(x))))`; for embeddings, which read row numbers, `rest(up(x) + down(x))`."""

    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.down = up, down
        self.reads_rows = isinstance(up, nn.Embedding)
        self.rest = nn.Linear(HIDDEN if self.reads_rows else WIDTH, 4)
        self.rest.bias.requires_grad_(False)
        self.channels_first = isinstance(up, nn.Conv1d | nn.Conv2d | nn.Conv3d)

    def forward(self, x: Tensor) -> Tensor:
        """`(rows, ..., 4)`."""
        hidden = self.up(x) + self.down(x) if self.reads_rows else self.down(torch.tanh(self.up(x)))
        out: Tensor = self.rest(hidden.movedim(1, -1) if self.channels_first else hidden)
        return out


@dataclass(frozen=True)
class Probe:
    """One layer kind to try.

    Attributes:
        name: what messages call it.
        up, down: make the two layers.
        shape: of the input; row numbers below `WIDTH` for embeddings.
    """

    name: str
    up: Callable[[], nn.Module]
    down: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def build(self, dtype: torch.dtype = torch.float32) -> ProbeModel:
        """The model in eval mode, with the same weights at each call, whatever the global random state."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return ProbeModel(self.up(), self.down()).to(dtype).eval()

    def inputs(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The same input at each call."""
        generator = torch.Generator().manual_seed(1)
        if self.name == "Embedding":
            return torch.randint(WIDTH, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator).to(dtype)


def linear(out_features: int, in_features: int) -> Probe:
    """Linear layers of these sizes."""
    return Probe(
        "Linear",
        lambda: nn.Linear(in_features, out_features),
        lambda: nn.Linear(out_features, WIDTH),
        (ROWS, in_features),
    )


def _transposed(out_features: int, in_features: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer: nn.Module = Conv1D(out_features, in_features)
    with torch.no_grad():
        layer.get_parameter("weight").normal_(std=in_features**-0.5)
        layer.get_parameter("bias").normal_(std=0.1)
    return layer


PROBES: tuple[Probe, ...] = (
    linear(HIDDEN, WIDTH),
    Probe(
        "Linear without bias",
        lambda: nn.Linear(WIDTH, HIDDEN, bias=False),
        lambda: nn.Linear(HIDDEN, WIDTH, bias=False),
        (ROWS, PLACES, WIDTH),
    ),
    Probe(
        "Conv1D (transformers)",
        lambda: _transposed(HIDDEN, WIDTH),
        lambda: _transposed(WIDTH, HIDDEN),
        (ROWS, PLACES, WIDTH),
    ),
    Probe(
        "Conv1d",
        lambda: nn.Conv1d(WIDTH, HIDDEN, 3, padding=1),
        lambda: nn.Conv1d(HIDDEN, WIDTH, 1, bias=False),
        (ROWS, WIDTH, PLACES),
    ),
    Probe(
        "Conv2d",
        lambda: nn.Conv2d(WIDTH, HIDDEN, (3, 2), stride=(1, 2), padding=1, padding_mode="circular"),
        lambda: nn.Conv2d(HIDDEN, WIDTH, 3, padding=2, dilation=2),
        (ROWS, WIDTH, 4, 4),
    ),
    Probe(
        "Conv2d with groups",
        lambda: nn.Conv2d(WIDTH, HIDDEN, 3, padding=1, groups=2),
        lambda: nn.Conv2d(HIDDEN, WIDTH, 1, groups=4),
        (ROWS, WIDTH, 4, 4),
    ),
    Probe(
        "Conv3d",
        lambda: nn.Conv3d(WIDTH, HIDDEN, (1, 2, 2)),
        lambda: nn.Conv3d(HIDDEN, WIDTH, 1),
        (ROWS, WIDTH, 2, 3, 3),
    ),
    Probe(
        "Embedding",
        lambda: nn.Embedding(WIDTH, HIDDEN, padding_idx=0),
        lambda: nn.Embedding(WIDTH, HIDDEN),
        (ROWS, PLACES),
    ),
)
