"""Convolutions in one, two and three dimensions, with groups, dilation and every padding mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit.kinds.base import LayerKind, dropped, is_floating_weight, is_original, runs_forward_of

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# What may change in a layer that has an adapter, and how messages call it.
_GEOMETRY = {
    "stride": "stride",
    "padding": "padding",
    "dilation": "dilation",
    "groups": "number of groups",
    "padding_mode": "padding_mode",
    "pad": "padding",
}


@dataclass(frozen=True)
class Conv(LayerKind):
    """`torch.nn.ConvNd`: canonical weight `(out_channels, in_channels / groups * prod(kernel))`.

    A down factor is a convolution of its own with the layer's geometry, an up factor a 1 x 1
    convolution. With groups, row `o` of the weight reads the channels of `o`'s group only: the down
    factor runs on every group and the up factor takes each output's own group.
    """

    dims: ClassVar[int]
    module_type: ClassVar[Any]

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    pad: tuple[int, ...]

    @classmethod
    def of(cls, module: nn.Module) -> Self | None:
        """See `LayerKind.of`. A subclass with a `forward` of its own, such as a causal one, is left out."""
        if not isinstance(module, cls.module_type) or not is_floating_weight(module, cls.dims + 2):
            return None
        if not runs_forward_of(module, cls.module_type):
            return None

        def each(value: Any) -> Any:  # torch takes one number for all dimensions, too
            return (value,) * cls.dims if isinstance(value, int) else value

        m: Any = module
        return cls(
            out_features=m.out_channels,
            in_features=m.in_channels // m.groups * math.prod(m.kernel_size),
            kernel=tuple(m.kernel_size),
            stride=each(m.stride),
            padding=each(m.padding),
            dilation=each(m.dilation),
            groups=m.groups,
            padding_mode=m.padding_mode,
            pad=() if m.padding_mode == "zeros" else tuple(m._reversed_padding_repeated_twice),
        )

    def changed(self, module: nn.Module) -> str | None:
        """See `LayerKind.changed`: another stride, padding, dilation or number of groups."""
        m: Any = module  # without `of`, which cannot be compiled, as long as nothing has changed
        known = (self.stride, self.padding, self.dilation, self.groups, self.padding_mode)
        as_known = (m.stride, m.padding, m.dilation, m.groups, m.padding_mode) == known
        if as_known and (not self.pad or tuple(m._reversed_padding_repeated_twice) == self.pad):
            return None
        now = self.of(module)
        for name, what in _GEOMETRY.items() if now is not None and now != self else ():
            before, after = getattr(self, name), getattr(now, name)
            if before != after:
                return f"another {what}: {after!r} in place of {before!r}"
        return None

    def up_shape(self, rank: int) -> tuple[int, ...]:
        """See `LayerKind.up_shape`: a 1 x 1 kernel."""
        return (self.out_features, rank, *(1,) * self.dims)

    def down_shape(self, rank: int) -> tuple[int, ...]:
        """See `LayerKind.down_shape`: the layer's kernel."""
        return (rank, self.in_features // math.prod(self.kernel), *self.kernel)

    def ungrouped_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """See `LayerKind.ungrouped_shapes`: A reads every channel, B each group's own part of A's output."""
        if self.groups == 1 or rank % self.groups:
            return None
        _, channels, *kernel = self.down_shape(rank)
        return (self.out_features, rank // self.groups, *(1,) * self.dims), (rank, self.groups * channels, *kernel)

    def is_ungrouped(self, down: Tensor) -> bool:
        """See `LayerKind.is_ungrouped`."""
        return self.groups > 1 and down.shape[1] == self.groups * self.in_features

    def canonical(self, weight: Tensor) -> Tensor:
        """See `LayerKind.canonical`: a view, but a copy of a channels-last weight."""
        return weight.flatten(1)

    def laid_out(self, weight: Tensor, own: Tensor) -> Tensor:
        """See `LayerKind.laid_out`."""
        return weight.reshape(own.shape)

    def project(self, x: Tensor, down: Tensor, dropout: float = 0.0) -> Tensor:
        """See `LayerKind.project`: `r` channels for each group, or `r` in all from a factor that is ungrouped."""
        groups = 1 if self.is_ungrouped(down) else self.groups
        kernel = down.reshape(down.shape[0], -1, *self.kernel)
        if groups > 1:
            kernel = kernel.repeat(groups, *(1,) * (self.dims + 1))
        return self._convolve(dropped(x, down.dtype, dropout), kernel, groups)

    def expand(self, hidden: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `LayerKind.expand`: a 1 x 1 convolution."""
        return _CONV[self.dims](hidden, up.reshape(*up.shape, *(1,) * self.dims), bias, groups=self.groups)

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
        """See `LayerKind.apply_weight`."""
        kernel = weight.reshape(weight.shape[0], -1, *self.kernel)
        return self._convolve(dropped(x, weight.dtype, dropout), kernel, self.groups, bias)

    def computes_plainly(self, forward: Callable[..., Any], module: nn.Module) -> bool:
        """See `LayerKind.computes_plainly`. Programs replace `_conv_forward`, or the padding, of layers that exist."""
        convolve: Any = module._conv_forward
        plain = super().computes_plainly(forward, module) and is_original(convolve, self.module_type, "_conv_forward")
        return plain and self == self.of(module)

    def work(self, x: Tensor, rank: int | None = None) -> int:
        """See `LayerKind.work`; the places are counted without regard to padding."""
        channels = self.groups * self.in_features // math.prod(self.kernel)
        places = x.numel() // channels // math.prod(self.stride)
        if rank is None:
            return places * self.out_features * self.in_features
        return places * rank * (self.out_features + self.groups * self.in_features)

    def _convolve(self, x: Tensor, kernel: Tensor, groups: int, bias: Tensor | None = None) -> Tensor:
        padding: tuple[int, ...] | str | int = self.padding
        if self.pad:
            x, padding = F.pad(x, self.pad, mode=self.padding_mode), 0
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
