"""LoKr files of LyCORIS."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from adapterkit import ForeignLayers, LayerKind, PatternTable, UnsupportedError, with_patterns
from adapterkit_lokr.config import LoKrConfig
from adapterkit_lokr.layer import Layout

_W1, _W2 = ("lokr_w1", "lokr_w1_a", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_REFUSED = {"dora_scale": "weight-decomposed (DoRA)", "lokr_t1": "with a core tensor in w1"}
_CONVOLUTIONS: Mapping[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_LOCALS = frozenset({*_W1, *_W2, *_REFUSED, "alpha", "scalar"})


def readings(key: str) -> Iterator[tuple[str, str]]:
    """What a key may mean: `lycoris_conv_in.lokr_w1` is `lokr_w1` of the module `lycoris_conv_in`."""
    module, _, local = key.rpartition(".")
    if local in _LOCALS:
        yield module, local


def read(tensors: Mapping[str, Tensor], layers: Mapping[str, LayerKind]) -> ForeignLayers:
    """The layers that the file has factors for.

    Raises:
        UnsupportedError: of a sort that is no plain Kronecker product.
    """
    found = ForeignLayers.read(tensors, layers, readings).keep(lambda keys: not keys.keys().isdisjoint(_W1 + _W2))
    for keys in found.keys.values():
        for local, what in _REFUSED.items():
            if local in keys:
                raise UnsupportedError(f"{keys[local]!r}: this LoKr is {what}, which this package does not know.")
    return found


def config_of(tensors: Mapping[str, Tensor], layers: Mapping[str, LayerKind]) -> LoKrConfig | None:
    """The config of a file without one.

    A layer that is decomposed in another way than the config's rule says gets a rank at which it is not decomposed.
    """
    found = read(tensors, layers)
    if not found.keys:
        return None
    files = {path: _File(found, path) for path in found.keys}
    shape = LoKrConfig(
        decompose_factor=_factor(files),
        decompose_both=any(f.pairs[0] for f in files.values()),
        use_effective_conv2d=any(f.has_core for f in files.values()),
    )
    ranks = {path: f.rank_for(shape) for path, f in files.items()}
    r, rank_pattern = with_patterns(ranks)
    alpha, alpha_pattern = with_patterns({path: f.scale * ranks[path] for path, f in files.items()})
    return shape.replace(
        target_modules=found.target_modules,
        modules_to_save=None,
        r=r,
        alpha=alpha,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
    )


def renamed(config: LoKrConfig, tensors: Mapping[str, Tensor], layers: Mapping[str, LayerKind]) -> Mapping[str, Tensor]:
    """The tensors under PEFT's names, in the form that the config gives each layer; exact."""
    found = read(tensors, layers)
    extra = {"alpha", "scalar"}  # which no file of PEFT's has
    if all(found.is_native(path) and extra.isdisjoint(keys) for path, keys in found.keys.items()):
        return tensors
    result = found.rest
    for path in found.keys:
        rank = PatternTable(config.rank_pattern, "rank_pattern").get(path, config.r)
        alpha: float = PatternTable(config.alpha_pattern, "alpha_pattern").get(path, config.alpha)
        values = _File(found, path).values(Layout.of(layers[path], rank, config), alpha / rank)
        result |= {f"{path}.{local}": tensor for local, tensor in values.items()}
    return result


def layers_of(tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """The layers that the factors are for, on the meta device: those with both; convolutions where w2 has a kernel."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        for module, local in readings(key):
            groups.setdefault(module, {})[local] = tensor
    made = {module: _layer_of(group) for module, group in groups.items()}
    return {module: layer for module, layer in made.items() if layer is not None}


def _layer_of(t: Mapping[str, Tensor]) -> nn.Module | None:
    first = t["lokr_w1"].shape if "lokr_w1" in t else _product(t, "lokr_w1_a", "lokr_w1_b")
    core = t.get("lokr_t2")
    second = t["lokr_w2"].shape if "lokr_w2" in t else _product(t, "lokr_w2_a", "lokr_w2_b")
    if core is not None and "lokr_w2_a" in t and "lokr_w2_b" in t:
        second = torch.Size((t["lokr_w2_a"].shape[1], t["lokr_w2_b"].shape[1], *core.shape[2:]))
    if first is None or second is None or 0 in (*first, *second):
        return None
    outputs, inputs, kernel = first[0] * second[0], first[1] * second[1], tuple(second[2:])
    if len(kernel) not in _CONVOLUTIONS:
        return nn.Linear(inputs, outputs, bias=False, device="meta")
    return _CONVOLUTIONS[len(kernel)](inputs, outputs, kernel, bias=False, device="meta")


def _product(t: Mapping[str, Tensor], up: str, down: str) -> torch.Size | None:
    return torch.Size((t[up].shape[0], t[down].shape[1])) if up in t and down in t else None


class _File:
    """What a file has for one layer."""

    def __init__(self, found: ForeignLayers, path: str) -> None:
        self.kind, self.keys = found.kinds[path], found.keys[path]
        named = {local: found.matrix(path, local) for local in _W1 + _W2}
        self.tensors = {local: tensor for local, tensor in named.items() if tensor is not None}
        self.pairs = ("lokr_w1_a" in self.tensors, "lokr_w2_a" in self.tensors)
        self.has_core = "lokr_t2" in self.tensors
        needed = [("lokr_w1_a", "lokr_w1_b") if self.pairs[0] else ("lokr_w1",)]
        needed += [("lokr_w2_a", "lokr_w2_b") if self.pairs[1] else ("lokr_w2",)]
        missing = [local for group in needed for local in group if local not in self.tensors]
        if missing:
            raise UnsupportedError(
                f"The layer {path!r} lacks {missing[0]!r} beside {next(iter(self.keys.values()))!r}."
            )
        alpha, scalar = found.number(path, "alpha"), found.number(path, "scalar")
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
