"""LoHa files against the real PEFT, both ways: the same outputs from the same files.

Where PEFT itself is wrong (padding modes) or has no such layer, mathematics is the reference: see test_loha_math.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.models import MODELS, assert_same_outputs, build, run
from tests.plugins import parity
from tests.plugins.parity import assert_same, perturb
from torch import Tensor

import adapterkit as ak
from adapterkit_loha import LoHaConfig

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

# Layers that PEFT's LoHa knows: (model, fields).


def saved_by_us(folder: Path, name: str, **fields: Any) -> Tensor:
    return parity.saved_by_us("loha", build(name), folder, name, **fields)


def fields_for(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    return parity.fields_for("loha", name, fields)


@pytest.mark.parametrize("init", [True, False])
@pytest.mark.parametrize("effective", [True, False])
def test_initial_values_have_pefts_distribution(init: bool, effective: bool) -> None:
    fields = {"target_modules": ["conv2d", "fc"], "r": 16, "init_weights": init, "use_effective_conv2d": effective}
    torch.manual_seed(0)
    theirs = peft.get_peft_model(build("convnet"), peft.LoHaConfig(**fields))
    adapters = ak.attach(build("convnet"))
    adapters.add("mine", LoHaConfig(**fields))
    found, expected = adapters.state_dict("mine"), peft.get_peft_model_state_dict(theirs)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert bool((found[key] == 0).all()) == bool((value == 0).all()) == (init and key.endswith("hada_w2_b"))
        # Uniform within 1 / sqrt(fan in), of which the largest of many draws is near.
        bound = (value[0].numel()) ** -0.5 * bool(value.any())
        assert 0.6 * bound <= found[key].abs().max() <= bound * (1 + 1e-6)
        assert value.abs().max() <= bound * (1 + 1e-6)


def test_every_model_that_peft_refuses_is_adapted_here(tmp_path: Path) -> None:
    # GPT-2's Conv1D, embeddings and Conv3d: files of ours that only we read.
    for name, targets in {"gpt2": ["c_attn", "wte"], "convnet": ["conv3d"], "gemma3": ["embed_tokens"]}.items():
        assert name in MODELS
        base = build(name)
        adapters = ak.attach(base)
        adapters.add("mine", LoHaConfig(r=3, target_modules=targets, init_weights=False, modules_to_save=None))
        perturb(adapters.parameters("mine"))
        expected = run(base, name)
        adapters.save("mine", tmp_path / name)
        again = build(name)
        ak.attach(again).load(tmp_path / name, "mine")
        assert_same_outputs(run(again, name), expected)
        assert (expected - run(build(name), name)).abs().max() > 1e-3


def test_the_order_of_patterns_that_overlap_survives_the_file(tmp_path: Path) -> None:
    # PEFT sorts them when it writes, so its own files may come back as another adapter; it reads them in order.
    fields = {"rank_pattern": {"v_proj": 2, "^model.*": 3}, "alpha_pattern": {"q_proj": 32, "^model.*": 2}}
    expected = saved_by_us(tmp_path, "llama", **fields)
    base = build("llama")
    ak.attach(base).load(tmp_path, "again")
    assert_same_outputs(run(base, "llama"), expected)
    assert_same(run(peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval(), "llama"), expected, "llama")
