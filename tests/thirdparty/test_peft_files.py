"""Files of PEFT for (IA)3, OFT and LoKr: both ways, with equal outputs. The packages are used as they lie here."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.models import build, run
from tests.thirdparty.environment import PACKAGES
from torch import nn

import adapterkit as ak

NAMES = {"ia3": "IA3Config", "oft": "OFTConfig", "lokr": "LoKrConfig"}
# Name of the method, tiny model, fields. Left out is what PEFT 0.21.2 does not do: at a Conv1d with a whole w2 it
# pairs the axes of the Kronecker product wrongly, and an effective Conv1d raises in its forward.
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("ia3", "llama", {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    ("ia3", "gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}),
    ("ia3", "convnet", {"target_modules": ["conv2d", "grouped", "dilated"], "feedforward_modules": ["grouped"]}),
    ("oft", "llama", {"target_modules": ["q_proj", "down_proj"], "oft_block_size": 8}),
    ("oft", "llama", {"target_modules": ["q_proj"], "oft_block_size": 5, "use_cayley_neumann": False}),
    ("oft", "llama", {"target_modules": ["q_proj"], "r": 2, "oft_block_size": 0, "block_share": True}),
    ("oft", "llama", {"target_modules": ["q_proj"], "oft_block_size": 4, "num_cayley_neumann_terms": 7}),
    ("lokr", "llama", {"target_modules": ["q_proj", "down_proj"], "alpha": 3}),
    ("lokr", "llama", {"target_modules": ["q_proj", "down_proj"], "r": 1, "decompose_both": True}),
    ("lokr", "llama", {"target_modules": ["q_proj"], "decompose_factor": 2, "rank_pattern": {"q_proj": 2}}),
    ("lokr", "convnet", {"target_modules": ["conv2d", "grouped"], "r": 2}),
    ("lokr", "convnet", {"target_modules": ["conv1d", "grouped"], "r": 1}),
    ("lokr", "convnet", {"target_modules": ["grouped"], "r": 1, "use_effective_conv2d": True}),
]


@pytest.fixture(scope="module", autouse=True)
def methods() -> Iterator[None]:
    """The three methods, registered as from a notebook."""
    for name in NAMES:
        sys.path.insert(0, str(PACKAGES[name]))
        ak.register(importlib.import_module(f"adapterkit_{name}.plugin"))
    yield
    for name in NAMES:
        ak.default_registry.unregister(name)
        sys.path.remove(str(PACKAGES[name]))


def peft_model(method: str, model: str, fields: dict[str, Any]) -> nn.Module:
    """PEFT's model, its adapter away from the identity."""
    config = getattr(peft, NAMES[method])(**fields)
    torch.manual_seed(3)
    adapted = peft.get_peft_model(build(model), config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if f"{method}_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return adapted


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "model", "fields"), CASES)
def test_what_peft_writes_gives_the_same_outputs_here(
    method: str, model: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    theirs = peft_model(method, model, fields)
    theirs.save_pretrained(str(tmp_path))
    ours = build(model)
    ak.attach(ours).load(tmp_path, name="a")
    assert (run(theirs, model) - run(build(model), model)).abs().max() > 1e-3
    torch.testing.assert_close(run(ours, model), run(theirs, model), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "model", "fields"), CASES)
def test_what_is_written_here_gives_the_same_outputs_in_peft(
    method: str, model: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    ours = build(model)
    adapters = ak.attach(ours)
    adapters.add("a", ak.config(method, **fields))
    with torch.no_grad():
        for parameter in adapters.parameters("a"):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)), alpha=0.2)
    adapters.save("a", tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(model), str(tmp_path)).eval()
    torch.testing.assert_close(run(theirs, model), run(ours, model), rtol=1e-4, atol=1e-5)


class TwoNames(nn.Module):
    """One layer under two paths, called by both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_file_of_peft_for_a_module_of_two_paths_is_loaded_with_a_warning(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["first", "second"], init_lora_weights=False)
    peft.get_peft_model(TwoNames(), config).save_pretrained(tmp_path)
    with pytest.warns(
        ak.AdapterWarning, match="'first' is one module with 'second', .* PEFT, .* adapts the first path"
    ):
        ak.attach(TwoNames()).load(tmp_path, "a")


def test_own_file_for_a_module_of_two_paths_is_loaded_without_a_warning(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TwoNames()
    adapters, other = ak.attach(copy.deepcopy(model)), ak.attach(model)
    adapters.add("a", ak.config("lora", target_modules=["first"], init_lora_weights=False))
    other.load(adapters.save("a", tmp_path), "a")
    x = torch.ones(2, 4)
    torch.testing.assert_close(other.model(x), adapters.model(x))
