"""LoKr: the change is a Kronecker product (Yeh et al. 2023, arXiv 2309.14859). Files: PEFT's, LyCORIS', kohya-ss's.

`dW = alpha / r * kron(w1, w2)`, w1 `(a, c)` and w2 `(b, d * kernel)`, for `a b` outputs and `c d` input channels. In
place of w2, and of w1, there may be two factors of rank r.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

import adapterkit as ak


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(ak.AdapterConfig):
    """w1 starts at zero, with `init_weights="lycoris"` w2, with `False` neither.

    w1 has `decompose_factor` rows and columns, where that divides the layer's; `-1`: near the square root. w2, and with
    `decompose_both` w1, is decomposed where that saves parameters.
    """

    method = "lokr"
    patterns = {"rank_pattern": "r", "alpha_pattern": "alpha"}
    not_implemented = {"use_effective_conv2d": False}

    r: ak.Rank = 8
    alpha: float = 8
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout: ak.Probability = 0.0
    rank_dropout_scale: bool = False
    module_dropout: ak.Probability = 0.0
    init_weights: bool | Literal["lycoris"] = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    @property
    def scaling(self) -> float:
        """`alpha / r`."""
        return self.alpha / self.r


def split(number: int, factor: int) -> tuple[int, int]:
    """`(a, b)` with `a b = number`: a is `factor` if that divides it, else the largest divisor up to the root."""
    if factor > 0 and number % factor == 0:
        return factor, number // factor
    limit = min(math.isqrt(number), number if factor == -1 else factor)
    small = max(d for d in range(1, limit + 1) if number % d == 0)
    return small, number // small


def outer(tensors: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """The shape `(a, c)` of w1, whole or in factors; `None`: it is not there, or no matrix."""
    names = ("lokr_w1", "lokr_w1") if "lokr_w1" in tensors else ("lokr_w1_a", "lokr_w1_b")
    held = [tensors.get(name) for name in names]
    if any(t is None or t.dim() != 2 or 0 in t.shape for t in held):
        return None
    return held[0].shape[0], held[1].shape[1]  # type: ignore[union-attr]


def inner_rows(tensors: Mapping[str, Tensor]) -> int:
    """The rows of w2, whole or in factors."""
    return tensors["lokr_w2" if "lokr_w2" in tensors else "lokr_w2_a"].shape[0]


class LoKrLayer(ak.DenseLayer):
    """`lokr_w1` and `lokr_w2`, or `lokr_w1_a` and `lokr_w1_b`, whose product it is.

    The sizes of w1, and which of both is whole, follow from a file: LyCORIS divides some layers in another way. A file
    of a fused layer, such as q, k and v in one, gives each of them the rows of the product from `lokr_first` on.
    """

    def setup(self, target: ak.Target, config: LoKrConfig) -> None:
        r, file, (_, channels, *kernel) = config.r, target.file or {}, target.kind.down_shape(1)
        (a, b), (c, d) = (split(n, config.decompose_factor) for n in (target.out_features, channels))
        self.row_dropout, self.row_dropout_rescales = config.rank_dropout, config.rank_dropout_scale
        self.module_dropout = config.module_dropout
        found, self.first = outer(file), None
        if found is not None and "lokr_first" in file and found[1] and channels % found[1] == 0:
            (a, c), b, d, self.first = found, inner_rows(file), channels // found[1], int(file["lokr_first"].sum())
            if not 0 <= self.first <= a * b - target.out_features:
                raise ak.CheckpointError(f"{target.path!r}: lokr_first = {self.first} is outside of {a * b} rows.")
            self.register_buffer("lokr_first", torch.zeros_like(file["lokr_first"], device=target.device))
        elif found is not None and target.out_features % found[0] == 0 == channels % found[1]:
            (a, c), (b, d) = found, (target.out_features // found[0], channels // found[1])
        first, second = (0.0 if config.init_weights == zero else ak.kaiming for zero in (True, "lycoris"))
        whole = "lokr_w1" in file if found else not config.decompose_both or r >= max(a, c) / 2
        if whole:
            self.lokr_w1 = target.new(a, c, init=first)
        else:
            self.lokr_w1_a, self.lokr_w1_b = target.new(a, r, init=first), target.new(r, c, init=ak.kaiming)
        whole = "lokr_w2" in file if found else r >= max(b, d) / 2
        if whole:  # with the kernel of a convolution
            self.lokr_w2 = target.new(b, d, *kernel, init=second)
        else:
            self.lokr_w2_a = target.new(b, r, init=ak.kaiming)
            self.lokr_w2_b = target.new(r, d * math.prod(kernel), init=second)

    def change(self) -> Tensor:
        w1 = self.lokr_w1_a @ self.lokr_w1_b if hasattr(self, "lokr_w1_a") else self.lokr_w1
        w2 = self.lokr_w2_a @ self.lokr_w2_b if hasattr(self, "lokr_w2_a") else self.lokr_w2.flatten(1)
        change = torch.kron(w1 * self.config.scaling, w2)
        return change if self.first is None else change[self.first : self.first + self.kind.out_features]


class LoKrFormat(ak.Format):
    """`lora_unet_conv_in.lokr_w1`: PEFT's names, with an alpha for each layer, which counts if w1 or w2 has factors.

    A convolution may have a core, `lokr_t2 (r, r, *kernel)`, between `lokr_w2_a (r, b)` and `lokr_w2_b (r, d)`.
    """

    config_type = LoKrConfig
    namings = ("kohya", "lycoris")
    factors = frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"})
    scaled = frozenset({"lokr_w1", "lokr_w1_a"})
    rows = {"lokr_w1": 0, "lokr_w1_a": 0}
    names = {name: name for name in ("lokr_t2", "lokr_first")}
    unwritten = frozenset({"lokr_first"})
    refused = {
        "dora_scale": "a LoKr that is weight-decomposed (DoRA), which no method here implements. LyCORIS can put "
        "it into the model (lycoris.create_lycoris_from_weights, then merge_to)"
    }

    def rank(self, tensors: Mapping[str, Tensor]) -> int:
        """Of two whole matrices: one at which PEFT makes w2 whole."""
        dims = {"lokr_t2": 0, "lokr_w2_b": 0, "lokr_w1_b": 0, "lokr_w2_a": 1, "lokr_w1_a": 1}
        found = [tensors[name].shape[dim] for name, dim in dims.items() if name in tensors]
        return int(found[0] if found else max(t.shape[dim] for t in tensors.values() if t.dim() > 1 for dim in (0, 1)))

    def split(self, tensors: Mapping[str, Tensor], sizes: Sequence[int]) -> list[dict[str, Tensor]]:
        """Each part has the rows of w1 that it needs. `lokr_first` says where it begins, if that is inside of one."""
        if outer(tensors) is None or "lokr_t2" in tensors or not {"lokr_w2", "lokr_w2_a"} & tensors.keys():
            raise ak.UnsupportedError("A LoKr with a core, or with a factor missing, cannot be split.")
        name, rows = "lokr_w1" if "lokr_w1" in tensors else "lokr_w1_a", inner_rows(tensors)
        total, begin, parts = len(tensors[name]) * rows, 0, []
        for size in sizes:
            end = begin + total * size // sum(sizes)
            parts.append({**tensors, name: tensors[name][begin // rows : -(-end // rows)]})
            if begin % rows or end % rows:
                parts[-1]["lokr_first"] = torch.tensor(begin % rows)
            begin = end
        return parts

    def layers(self, tensors: Mapping[str, Tensor], kinds: Mapping[str, ak.LayerKind]) -> dict[str, ak.ForeignLayer]:
        """LyCORIS writes an alpha beside two whole matrices and does not use it."""
        found = super().layers(tensors, kinds)
        for path, layer in found.items():
            if {"lokr_w1", "lokr_w2"} <= layer.tensors.keys():
                kept = {name: tensor for name, tensor in layer.tensors.items() if name != "alpha"}
                found[path] = ak.ForeignLayer(path, layer.kind, kept, layer.keys)
        return found

    def config(self, layers: Mapping[str, ak.ForeignLayer], metadata: Mapping[str, str], **fields: Any) -> Any:
        """With the `decompose_factor` that divides all layers so, if there is one: PEFT needs it."""
        both = any("lokr_w1_a" in layer.tensors for layer in layers.values())
        plain = [layer for layer in layers.values() if "lokr_first" not in layer.tensors]
        sizes = [((x.kind.out_features, x.kind.down_shape(1)[1]), outer(x.tensors)) for x in plain]
        factors = {-1: None} | dict.fromkeys(n for _, found in sizes if found for n in found)
        fits = (f for f in factors if all(tuple(split(n, f)[0] for n in size) == found for size, found in sizes))
        return super().config(layers, metadata, decompose_both=both, decompose_factor=next(fits, -1), **fields)

    def tensors(self, layer: ak.ForeignLayer, config: LoKrConfig) -> dict[str, Tensor]:
        """PEFT's shapes; a core is worked into `lokr_w2_b (r, d * kernel)`."""
        values, rank, kernel = super().tensors(layer, config), self.rank(layer.tensors), layer.kind.down_shape(1)[2:]
        if values.pop("lokr_t2", None) is not None and {"lokr_w2_a", "lokr_w2_b"} <= values.keys():
            core = layer.wide("lokr_t2")
            if core.dim() < 3 or core.shape[:2] != (rank, rank) or core.numel() != rank * rank * math.prod(kernel):
                raise ak.CheckpointError(
                    f"{layer.keys['lokr_t2']!r} has shape {tuple(core.shape)}; the core at the {layer.kind.name} "
                    f"{layer.path!r} is {(rank, rank, *kernel)}."
                )
            values["lokr_w2_a"] = values["lokr_w2_a"].t()
            values["lokr_w2_b"] = torch.einsum("ijk,jd->idk", core.flatten(2), layer.wide("lokr_w2_b")).flatten(1)
        if "lokr_w2" in values and values["lokr_w2"][0, 0].numel() == math.prod(kernel):
            values["lokr_w2"] = values["lokr_w2"].reshape(*values["lokr_w2"].shape[:2], *kernel)
        return values

    def write(
        self,
        naming: str,
        config: LoKrConfig,
        tensors: Mapping[str, Mapping[str, Tensor]],
        kinds: Mapping[str, ak.LayerKind],
        component: str,
    ) -> ak.ForeignFile:
        """The scaling of two whole matrices goes into w1."""
        scaled = {}
        for path, held in tensors.items():
            whole, scaling = {"lokr_w1", "lokr_w2"} <= held.keys(), config.at(path).scaling
            scaled[path] = {**held, "lokr_w1": held["lokr_w1"] * scaling} if whole and scaling != 1.0 else held
        return super().write(naming, config, scaled, kinds, component)


class LoKrPlugin(ak.Plugin):
    """Its files tell the sizes of layers."""

    config, layer, prefix = LoKrConfig, LoKrLayer, "lokr_"

    def sizes(self, tensors: Mapping[str, Tensor]) -> nn.Module | None:
        """A linear layer, or a convolution where w2 is whole or has a core. Some rows of a product do not tell."""
        first, core, second = outer(tensors), tensors.get("lokr_t2"), tensors.get("lokr_w2")
        if second is None and {"lokr_w2_a", "lokr_w2_b"} <= tensors.keys():
            up, down = tensors["lokr_w2_a"], tensors["lokr_w2_b"]
            kernel = () if core is None else core.shape[2:]
            second = torch.empty(*up.shape[core is not None :][:1], *down.shape[1:], *kernel, device="meta")
        if first is None or second is None or second.dim() < 2 or 0 in second.shape or "lokr_first" in tensors:
            return None
        return ak.empty_layer(first[0] * second.shape[0], first[1] * second.shape[1], *second.shape[2:])

    def formats(self) -> Sequence[ak.Format]:
        """LyCORIS' and kohya-ss's."""
        return [LoKrFormat()]


plugin = LoKrPlugin()
