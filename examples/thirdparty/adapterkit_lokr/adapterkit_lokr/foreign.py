"""LoKr files of LyCORIS."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapterkit import ForeignLayer, Format, UnsupportedError
from adapterkit_lokr.config import LoKrConfig
from adapterkit_lokr.layer import Layout

_W1, _W2 = ("lokr_w1", "lokr_w1_a", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


class LoKrFormat(Format):
    """`lycoris_conv_in.lokr_w1`: PEFT's names, with an alpha for each layer."""

    config_type = LoKrConfig
    factors = frozenset({*_W1, *_W2})
    refused = {  # noqa: RUF012 - a class variable by its base
        "dora_scale": "a LoKr that is weight-decomposed (DoRA), which this package does not know",
        "lokr_t1": "a LoKr with a core tensor in w1, which this package does not know",
    }

    def config(self, layers: Mapping[str, ForeignLayer], metadata: Mapping[str, str], **fields: Any) -> LoKrConfig:
        """A layer that is split in another way than the config's rule says gets a rank at which it is not."""
        files = {path: _File(layer) for path, layer in layers.items()}
        shape = LoKrConfig(
            decompose_factor=_factor(files),
            decompose_both=any(f.pairs[0] for f in files.values()),
            use_effective_conv2d=any(f.has_core for f in files.values()),
        )
        ranks = {path: f.rank_for(shape) for path, f in files.items()}
        alphas = {path: f.scale * ranks[path] for path, f in files.items()}
        names = ("decompose_factor", "decompose_both", "use_effective_conv2d")
        return LoKrConfig.with_values({"r": ranks, "alpha": alphas}, **{name: getattr(shape, name) for name in names})

    def tensors(self, layer: ForeignLayer, config: LoKrConfig) -> dict[str, Tensor]:
        """In the form that the config gives the layer; exact."""
        return _File(layer).values(Layout.of(layer.kind, config.r, config), config.alpha / config.r)


class _File:
    """What a file has for one layer."""

    def __init__(self, layer: ForeignLayer) -> None:
        self.kind, self.keys = layer.kind, layer.keys
        named = {local: layer.matrix(local) for local in _W1 + _W2}
        self.tensors = {local: tensor for local, tensor in named.items() if tensor is not None}
        self.pairs = ("lokr_w1_a" in self.tensors, "lokr_w2_a" in self.tensors)
        self.has_core = "lokr_t2" in self.tensors
        needed = [("lokr_w1_a", "lokr_w1_b") if self.pairs[0] else ("lokr_w1",)]
        needed += [("lokr_w2_a", "lokr_w2_b") if self.pairs[1] else ("lokr_w2",)]
        missing = [local for group in needed for local in group if local not in self.tensors]
        if missing:
            raise UnsupportedError(
                f"The layer {layer.path!r} lacks {missing[0]!r} beside {next(iter(self.keys.values()))!r}."
            )
        alpha, scalar = layer.number("alpha"), layer.number("scalar")
        # LyCORIS: a missing alpha, or 0, is the rank; two whole factors are not scaled at all.
        self.scale = (alpha / self.rank if alpha and any(self.pairs) else 1.0) * (1.0 if scalar is None else scalar)

    @property
    def rank(self) -> int:
        """Of the pairs; 1 where there are none."""
        pair = next((self.tensors[n] for n in ("lokr_w2_b", "lokr_w1_b") if n in self.tensors), None)
        return 1 if pair is None else pair.shape[0]

    def whole(self) -> tuple[Tensor, Tensor]:
        """w1 `(a, c)` and w2 `(b, d, *kernel)`, multiplied out."""
        kernel = self.kind.down_shape(1)[2:]
        t = {n: tensor if tensor.dtype == torch.float64 else tensor.float() for n, tensor in self.tensors.items()}
        w1 = t["lokr_w1_a"] @ t["lokr_w1_b"] if self.pairs[0] else t["lokr_w1"]
        if not self.pairs[1]:
            w2 = t["lokr_w2"]
        elif self.has_core:
            w2 = torch.einsum("ijk,ib,jd->bdk", t["lokr_t2"].flatten(2), t["lokr_w2_a"], t["lokr_w2_b"])
        else:
            w2 = t["lokr_w2_a"] @ t["lokr_w2_b"]
        return w1, w2.reshape(w2.shape[0], -1, *kernel)

    def rank_for(self, shape: LoKrConfig) -> int:
        """The file's rank if the config's rule decomposes the layer as the file does, else one that is too large."""
        layout = Layout.of(self.kind, self.rank, shape)
        if (layout.decomposes, layout.effective) == (self.pairs, self.has_core):
            return self.rank
        return math.ceil(max(*layout.rows, *layout.columns) / 2)

    def values(self, layout: Layout, scaling: float) -> dict[str, Tensor]:
        """The layer's parameters, with what its own scaling does not say worked into w1."""
        values = self.tensors
        if (layout.decomposes, layout.effective) != (self.pairs, self.has_core):
            values = dict(zip(("lokr_w1", "lokr_w2"), self.whole(), strict=True))
        elif self.has_core:
            core = values["lokr_t2"]
            values = values | {"lokr_t2": core.reshape(*core.shape, *(1 for _ in range(4 - core.dim())))}
        first = "lokr_w1" if "lokr_w1" in values else "lokr_w1_a"
        if not math.isclose(self.scale, scaling):
            values = values | {first: values[first] * (self.scale / scaling)}
        return values


def _factor(files: Mapping[str, _File]) -> int:
    """The `decompose_factor` that splits every layer as the file has it."""
    splits = {path: tuple(w.shape[0] for w in (f.whole()[0], f.whole()[0].t())) for path, f in files.items()}
    for factor in (-1, *sorted({n for split in splits.values() for n in split})):
        config = LoKrConfig(decompose_factor=factor)
        layouts = {path: Layout.of(f.kind, 1, config) for path, f in files.items()}
        if all((layout.rows[0], layout.columns[0]) == splits[path] for path, layout in layouts.items()):
            return factor
    key = next(iter(next(iter(files.values())).keys.values()))
    raise UnsupportedError(
        f"{key!r}: no single decompose_factor splits every layer as this file does (unbalanced_factorization?)."
    )
