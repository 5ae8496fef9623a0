"""Algorithms whose tensors are in files of LyCORIS, kohya-ss and other programs, and who reads them: for messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from adapterkit.contract import default_registry

_EXTRACT = (
    "LyCORIS puts such a file into a model itself (lycoris.create_lycoris_from_weights, then merge_to), and ak.extract "
    "makes a LoRA of the difference from the base"
)
_BESIDE = f"adapters.load and ak.merge_checkpoint add it where the adapter leaves the module of that name. {_EXTRACT}"


@dataclass(frozen=True)
class Algorithm:
    """What the last part of a key tells.

    Attributes:
        name: what users call it.
        endings: an expression for what follows the layer's name and a dot.
        method: the method that reads it, and `package` the one that has it; empty: there is none.
        dims: of the tensor, where the name is another algorithm's as well.
        cure: what to do where there is none.
    """

    name: str
    endings: str
    method: str = ""
    package: str = ""
    dims: int | None = None
    cure: str = f"no method here reads it. {_EXTRACT}"


ALGORITHMS = (
    Algorithm("LoHa", r"hada_(w[12]_[ab]|t[12])", "loha", "adapterkit"),
    Algorithm("LoKr", r"lokr_(w[12](_[ab])?|t[12])", "lokr", "adapterkit-lokr"),
    Algorithm("DoRA", r"dora_scale|lora_magnitude_vector(\.weight)?", "dora", "adapterkit-dora"),
    Algorithm("AdaLoRA", r"lora_E", "adalora", "adapterkit-adalora"),
    Algorithm("VeRA", r"vera_lambda_[bd]", "vera", "adapterkit"),
    Algorithm("PEFT's OFT", r"oft_[Rr](\.weight)?", "oft", "adapterkit-oft"),
    Algorithm("PEFT's (IA)3", r"ia3_l", "ia3", "adapterkit-ia3"),
    Algorithm("a full difference of a weight or a bias (LyCORIS' algorithm 'full')", r"diff(_b)?", cure=_BESIDE),
    Algorithm("a norm that was trained in full (LyCORIS' train_norm)", r"[wb]_norm", cure=_BESIDE),
    Algorithm("LyCORIS' (IA)3", r"on_input", "ia3", "adapterkit-ia3"),
    Algorithm("BOFT of LyCORIS", r"oft_blocks", dims=4),
    Algorithm("OFT of LyCORIS or kohya-ss", r"oft_blocks", "oft", "adapterkit-oft"),
    Algorithm("PEFT's BOFT", r"boft_[Rs]", cure="no method here reads it, but PEFT reads its folder"),
    Algorithm("GLoRA", r"(a[12]|b[12]|bm)\.weight"),
    Algorithm("T-LoRA", r"lambda_layer|[pq]_layer\.weight|(base_)?lambda"),
    Algorithm(
        "a whole weight that replaces the model's (ComfyUI)",
        r"set_weight|reshape_weight",
        cure="no method here reads it. Merge it in ComfyUI",
    ),
)


def algorithms_in(
    keys: Iterable[str], tensors: Mapping[str, Tensor] = MappingProxyType({})
) -> tuple[list[str], list[str]]:
    """A sentence for each algorithm that no installed method reads, and the keys of no known algorithm."""
    found: dict[Algorithm, list[str]] = {}
    installed, others = default_registry.methods(), []
    for key in keys:
        dims = (None, tensors[key].dim() if key in tensors else None)
        known = (a for a in ALGORITHMS if re.search(rf"\.(?:{a.endings})$", key) and a.dims in dims)
        algorithm = next(known, None)
        if algorithm is None or algorithm.method in installed:
            others.append(key)
        else:
            found.setdefault(algorithm, []).append(key)
    sentences = []
    for algorithm, (first, *more) in found.items():
        are = f" and {len(more):,} more keys are" if more else " is"
        reads = f"the method {algorithm.method!r} of the package {algorithm.package} reads it, and is not installed"
        sentences.append(f"{first!r}{are} of {algorithm.name}: {reads if algorithm.method else algorithm.cure}")
    return sentences, others
