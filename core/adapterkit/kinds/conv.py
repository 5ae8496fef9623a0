"""Convolutions in one, two and three dimensions, with groups, dilation and every padding mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit.kinds.base import LayerKind, is_floating_weight, runs_forward_of
from adapterkit.kinds.factors import Factors

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_NAMES = {"groups": "number of groups", "pad_mode": "padding_mode", "pad_amount": "padding"}


@dataclass(frozen=True)
class Conv(LayerKind):
    """`torch.nn.ConvNd`: canonical weight `(out_channels, in_channels / groups * prod(kernel))`.

    A down factor is a convolution of its own with the layer's geometry, an up factor a 1 x 1
    convolution. With groups, row `o` of the weight reads the channels of `o`'s group only: the down
    factor runs on every group and the up factor takes each output's own group.
    """

    dims: ClassVar[int]
    module_type: ClassVar[type[nn.Module]]

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    pad_mode: str
    pad_amount: tuple[int, ...]

    @classmethod
    def of(cls, module: nn.Module) -> Self | None:
        """See `LayerKind.of`. A subclass with a `forward` of its own, such as a causal one, is none."""
        if not isinstance(module, cls.module_type) or not is_floating_weight(module, cls.dims + 2):
            return None
        if not runs_forward_of(module, cls.module_type):
            return None
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        pad = () if module.padding_mode == "zeros" else tuple(module._reversed_padding_repeated_twice)
        return cls(
            out_features=module.out_channels,
            in_features=module.in_channels // module.groups * math.prod(module.kernel_size),
            kernel=tuple(module.kernel_size),
            stride=cls._each(module.stride),
            padding=module.padding if isinstance(module.padding, str) else cls._each(module.padding),
            dilation=cls._each(module.dilation),
            groups=module.groups,
            pad_mode=module.padding_mode,
            pad_amount=pad,
        )

    @classmethod
    def _each(cls, value: Any) -> tuple[int, ...]:
        """A number for each dimension; torch takes one for all, too."""
        return (value,) * cls.dims if isinstance(value, int) else tuple(value)

    def changed(self, module: nn.Module) -> str | None:
        """See `LayerKind.changed`: another stride, padding, dilation or number of groups."""
        m: Any = module
        known = (self.stride, self.padding, self.dilation, self.groups, self.pad_mode)
        as_known = (m.stride, m.padding, m.dilation, m.groups, m.padding_mode) == known
        if as_known and (not self.pad_amount or tuple(m._reversed_padding_repeated_twice) == self.pad_amount):
            return None
        now = type(self).of(module)
        for name in ("stride", "padding", "dilation", "groups", "pad_mode", "pad_amount") if now is not None else ():
            before, after = getattr(self, name), getattr(now, name)
            if before != after:
                return f"another {_NAMES.get(name, name)}: {after!r} in place of {before!r}"
        return None

    def up_shape(self, rank: int) -> tuple[int, ...]:
        """See `LayerKind.up_shape`: a 1 x 1 kernel."""
        return (self.out_features, rank, *(1,) * self.dims)

    def down_shape(self, rank: int) -> tuple[int, ...]:
        """See `LayerKind.down_shape`: the layer's kernel."""
        return (rank, self.in_features // math.prod(self.kernel), *self.kernel)

    def canonical(self, weight: Tensor) -> Tensor:
        """See `LayerKind.canonical`: a view, but a copy of a channels-last weight."""
        return weight.flatten(1)

    def laid_out(self, weight: Tensor, own: Tensor) -> Tensor:
        """See `LayerKind.laid_out`."""
        return weight.reshape(own.shape)

    def project(self, x: Tensor, down: Tensor, dropout: float = 0.0) -> Tensor:
        """See `LayerKind.project`: `r` channels for each group, or `r` in all from a factor that is ungrouped."""
        if x.dtype != down.dtype:
            x = x.to(down.dtype)
        if dropout > 0.0:
            x = F.dropout(x, dropout)
        kernel = down.reshape(down.shape[0], -1, *self.kernel)
        if self._reads_every_group(down):
            return self.convolve(x, kernel, 1)
        if self.groups > 1:
            kernel = kernel.repeat(self.groups, *(1,) * (self.dims + 1))
        return self.convolve(x, kernel, self.groups)

    def expand(self, hidden: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `LayerKind.expand`: a 1 x 1 convolution."""
        return _CONV[self.dims](hidden, up.reshape(*up.shape, *(1,) * self.dims), bias, groups=self.groups)

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
        """See `LayerKind.apply_weight`."""
        x = x.to(weight.dtype)
        kernel = weight.reshape(weight.shape[0], -1, *self.kernel)
        return self.convolve(F.dropout(x, dropout) if dropout > 0.0 else x, kernel, self.groups, bias)

    def is_plain_forward(self, forward: Callable[..., Any], module: nn.Module) -> bool:
        """See `LayerKind.is_plain_forward`. Programs replace `_conv_forward`, or the padding, of layers that exist."""
        cls: Any = self.module_type
        if getattr(forward, "__func__", None) is not cls.forward or "_conv_forward" in module.__dict__:
            return False
        own: Any = type(module)
        return own._conv_forward is cls._conv_forward and self == type(self).of(module)

    def work(self, x: Tensor, rank: int | None = None) -> int:
        """See `LayerKind.work`; the places are counted without regard to padding."""
        channels = self.groups * self.in_features // math.prod(self.kernel)
        places = x.numel() // channels // math.prod(self.stride)
        if rank is None:
            return places * self.out_features * self.in_features
        return places * rank * (self.out_features + self.groups * self.in_features)

    def is_ungrouped(self, factors: Factors) -> bool:
        """See `LayerKind.is_ungrouped`."""
        return self._reads_every_group(factors.down)

    def ungrouped_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """See `LayerKind.ungrouped_shapes`: A reads every channel, B each group's own part of A's output."""
        if self.groups == 1 or rank % self.groups:
            return None
        channels = self.groups * self.in_features // math.prod(self.kernel)
        return (self.out_features, rank // self.groups, *(1,) * self.dims), (rank, channels, *self.kernel)

    def _reads_every_group(self, down: Tensor) -> bool:
        return self.groups > 1 and down.shape[1] == self.groups * self.in_features

    def convolve(self, x: Tensor, kernel: Tensor, groups: int, bias: Tensor | None = None) -> Tensor:
        """`x` convolved with `kernel` in the layer's own geometry."""
        padding: tuple[int, ...] | str | int = self.padding
        if self.pad_amount:
            x, padding = F.pad(x, self.pad_amount, mode=self.pad_mode), 0
        return _CONV[self.dims](x, kernel, bias, self.stride, padding, self.dilation, groups)

    def spread(self, bias: Tensor) -> Tensor:
        """See `LayerKind.spread`."""
        return bias.view(-1, *(1,) * self.dims)


@dataclass(frozen=True)
class Conv1d(Conv):
    """`torch.nn.Conv1d`."""

    name, dims, sample_dims, module_type = "Conv1d", 1, 2, nn.Conv1d


@dataclass(frozen=True)
class Conv2d(Conv):
    """`torch.nn.Conv2d`."""

    name, dims, sample_dims, module_type = "Conv2d", 2, 3, nn.Conv2d


@dataclass(frozen=True)
class Conv3d(Conv):
    """`torch.nn.Conv3d`."""

    name, dims, sample_dims, module_type = "Conv3d", 3, 4, nn.Conv3d
