"""Every `combination_type` of PEFT's `add_weighted_adapter`, number by number, where PEFT is right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import peft.tuners.lora.model as peft_lora
import pytest
import torch
from peft.tuners.lora import LoraLayer
from tests import combining
from tests.combining import same
from tests.models import MODELS, build
from torch import Tensor

import adapterkit as ak
from adapterkit.contract.registry import default_registry

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

# What PEFT's types are called here.
TYPES: dict[str, dict[str, Any]] = {
    "linear": {"space": "factors"},
    "ties": {"space": "factors", "method": "ties"},
    "magnitude_prune": {"space": "factors", "method": "magnitude_prune"},
    "dare_linear": {"space": "factors", "method": "dare_linear"},
    "dare_ties": {"space": "factors", "method": "dare_ties"},
    "cat": {},
    "svd": {"rank": 3},
    "ties_svd": {"rank": 3, "method": "ties"},
    "magnitude_prune_svd": {"rank": 3, "method": "magnitude_prune"},
    "dare_linear_svd": {"rank": 3, "method": "dare_linear"},
    "dare_ties_svd": {"rank": 3, "method": "dare_ties"},
}
FIXED = [t for t in TYPES if "dare" not in t]
NAMES = ("a", "b", "c")
LAYERS = {"bert": ["query", "intermediate.dense"], "gpt2": ["c_attn", "wte"], "convnet": ["conv2d", "fc"]}


def both(name: str, targets: list[str], folder: Path, **fields: Any) -> tuple[Any, ak.Adapters]:
    """The same three adapters in PEFT and here, from PEFT's files."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, **fields})
    wrapped = peft.get_peft_model(build(name), config, adapter_name="a")
    for other in NAMES[1:]:
        wrapped.add_adapter(other, config)
    for seed, (_, parameter) in enumerate((n, p) for n, p in wrapped.named_parameters() if "lora_" in n):
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    wrapped.save_pretrained(folder)
    adapters = ak.attach(build(name))
    for adapter in NAMES:
        adapters.load(folder / adapter, adapter, activate=False)
    return wrapped, adapters


def peft_deltas(wrapped: Any, name: str, adapters: ak.Adapters) -> dict[str, Tensor]:
    """PEFT's changes as canonical `(out, in)` float64 matrices."""
    found = {}
    for path, module in wrapped.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and name in module.scaling:
            kind = default_registry.kind_of(adapters.model.get_submodule(path))
            delta = module.get_delta_weight(name).detach().double()
            found[path] = (delta.t() if kind.name in ("Conv1D", "Embedding") else delta).flatten(1)
    return found


def combined(
    kind: str, weights: Mapping[str, float], wrapped: Any, adapters: ak.Adapters, density: float = 0.0, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The result's changes here and in PEFT."""
    pruned = {"density": density} if kind.startswith(("ties", "magnitude", "dare")) else {}
    rank = {"svd_rank": 3} if kind.endswith("svd") else {}
    wrapped.add_weighted_adapter(
        list(weights), list(weights.values()), "out", combination_type=kind, **pruned, **rank, **options
    )
    adapters.combine("out", weights, **{**TYPES[kind], **pruned, **options})
    return combining.deltas(adapters, "out"), peft_deltas(wrapped, "out", adapters)


# The model, the weights, other fields of the adapters, and options of the combination.
CASES: dict[str, tuple[str, tuple[float, ...], dict[str, Any], dict[str, Any]]] = {
    **{name: (name, (0.7, 1.5, 0.2), {}, {"density": 0.4}) for name in LAYERS},
    "negative": ("bert", (0.7, -1.5, -0.2), {"alpha_pattern": {"query": 3}}, {"density": 0.5}),
    "frequency": ("bert", (0.7, 1.5, 0.2), {}, {"density": 0.6, "majority_sign_method": "frequency"}),
}


# PEFT's `ties_svd` elects signs without regard to negative weights.
@pytest.mark.parametrize(("kind", "case"), [(k, c) for k in FIXED for c in CASES if (k, c) != ("ties_svd", "negative")])
def test_each_type_has_pefts_numbers(kind: str, case: str, tmp_path: Path) -> None:
    name, weights, fields, options = CASES[case]
    wrapped, adapters = both(name, LAYERS[name], tmp_path, **fields)
    found, expected = combined(kind, dict(zip(NAMES, weights, strict=True)), wrapped, adapters, **options)
    same(found, expected, 2e-5)


@pytest.mark.parametrize("kind", [t for t in TYPES if "dare" in t])
def test_dare_with_pefts_masks(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped, adapters = both("bert", ["layer.0.attention.self.query"], tmp_path)
    function = kind.removesuffix("_svd")
    original, seeded = getattr(peft_lora, function), []

    def from_a_seed(*args: Any, **kwargs: Any) -> Tensor:
        if not seeded:  # PEFT has drawn the new adapter's initial values by now
            seeded.append(torch.manual_seed(11))
        return original(*args, **kwargs)

    monkeypatch.setattr(peft_lora, function, from_a_seed)
    density = 0.5
    weights = {"a": 0.7, "b": 1.5, "c": 0.2}
    rank = {"svd_rank": 3} if kind.endswith("svd") else {}
    wrapped.add_weighted_adapter(list(weights), list(weights.values()), "out", kind, density=density, **rank)
    torch.manual_seed(11)
    adapters.combine("out", weights, density=density, **TYPES[kind])
    same(combining.deltas(adapters, "out"), peft_deltas(wrapped, "out", adapters), 2e-5)


def test_factors_of_our_result_are_pefts_own(tmp_path: Path) -> None:
    wrapped, adapters = both("bert", LAYERS["bert"], tmp_path)
    weights = {"a": 0.7, "b": -1.5, "c": 0.2}
    wrapped.add_weighted_adapter(list(weights), list(weights.values()), "out", "linear")
    adapters.combine("out", weights, space="factors")
    ours = adapters.state_dict("out")
    theirs = peft.get_peft_model_state_dict(wrapped, adapter_name="out")
    assert set(ours) == set(theirs)
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key])


def test_our_result_acts_in_peft_as_it_does_here(tmp_path: Path) -> None:
    _, adapters = both("bert", LAYERS["bert"], tmp_path / "in", rank_pattern={"query": 2})
    adapters.combine("out", {"a": 0.7, "b": -1.5}, energy=0.8)
    adapters.activate("out", trainable=False)
    inputs = MODELS["bert"].inputs()
    loaded = peft.PeftModel.from_pretrained(build("bert"), adapters.save("out", tmp_path / "out"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, adapters.model(**inputs).logits)


@pytest.mark.parametrize("kind", ["linear", "cat"])
def test_where_peft_takes_rslora_twice_we_do_not(kind: str, tmp_path: Path) -> None:
    wrapped, adapters = both("bert", LAYERS["bert"], tmp_path, use_rslora=True)
    found, theirs = combined(kind, {"a": 1.0}, wrapped, adapters)
    exact = combining.deltas(adapters, "a")
    same(found, exact, 1e-5)
    path = next(iter(exact))
    assert float((theirs[path] - exact[path]).norm() / exact[path].norm()) > 0.5
