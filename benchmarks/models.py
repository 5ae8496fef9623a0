"""The models that benchmarks adapt: stacks of linear layers, without the other parts of a transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NAMES = ["q", "k", "v", "o", "gate", "up", "down"]


class Block(nn.Module):
    """Seven linear layers, as many as a Llama block has, and all square."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        for name in NAMES:
            setattr(self, name, nn.Linear(hidden, hidden, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Each layer beside the identity, so that values neither vanish nor grow."""
        for layer in self.children():
            x = x + 0.1 * layer(x)
        return x


class Stack(nn.Module):
    """`7 * blocks` linear layers of `hidden x hidden`, with the same values each time."""

    def __init__(self, blocks: int, hidden: int = 256) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList(Block(hidden) for _ in range(blocks))
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        """Block after block."""
        for layer in self.layers:
            x = layer(x)
        return x

    def probe(self) -> Tensor:
        """An input to compare outputs for."""
        return torch.linspace(-1.0, 1.0, 2 * self.hidden).view(2, self.hidden)


class LlamaBlock(nn.Module):
    """The linear layers of one block of Llama 3 8B: grouped keys and values, a gated MLP."""

    def __init__(self, hidden: int, keys: int, inner: int) -> None:
        super().__init__()
        sizes = {"q": (hidden, hidden), "k": (hidden, keys), "v": (hidden, keys), "o": (hidden, hidden)}
        sizes |= {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}
        for name in NAMES:
            setattr(self, name, nn.Linear(*sizes[name], bias=False))


def llama(blocks: int = 32, hidden: int = 4096, keys: int = 1024, inner: int = 14336) -> nn.Module:
    """The linear layers of Llama 3 8B on the meta device."""
    with torch.device("meta"):
        model = nn.Module()
        model.layers = nn.ModuleList(LlamaBlock(hidden, keys, inner) for _ in range(blocks))
    return model


def linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Every linear layer with its path."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
