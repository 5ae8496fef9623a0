"""A view merges and combines adapters in PEFT's words, and shows layers as PEFT's do, with PEFT's results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from tests.models import assert_same_outputs, build, inputs, run
from torch.distributed.fsdp import FullyShardedDataParallel

import adapterkit as ak
from adapterkit.integrations.peft_view import PeftView

TARGETS = ["layers.0", "layers.1"]
LORA = LoraConfig(target_modules=TARGETS, init_lora_weights=False, r=3, lora_alpha=5)
TYPES = ("cat", "svd", "linear", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd")


def pair(*ranks: int) -> tuple[PeftView, PeftModel]:
    """A view and PEFT's model with adapters `one`, `two`, ... of the same values."""
    theirs = get_peft_model(build("embednet"), LORA, adapter_name="one").eval()
    for name, rank in zip(("two", "three"), ranks, strict=False):
        theirs.add_adapter(name, LoraConfig(**{**LORA.to_dict(), "r": rank}))
    adapters = ak.attach(build("embednet"))
    for name, config in theirs.peft_config.items():
        adapters.add(name, ak.config("lora", target_modules=TARGETS, r=config.r, lora_alpha=5))
        adapters.load_state_dict(name, get_peft_model_state_dict(theirs, adapter_name=name))
    adapters.activate("one")
    return ak.as_peft(adapters.model), theirs


CASES = [*((name, [0.5, 1.5]) for name in TYPES), *((name, [-1.0, 0.7]) for name in ("cat", "svd", "linear"))]


@pytest.mark.parametrize(("combination", "weights"), CASES)
def test_add_weighted_adapter_gives_pefts_change(combination: str, weights: list[float]) -> None:
    changes = []
    for model in pair(3):
        model.add_weighted_adapter(["one", "two"], weights, "sum", combination_type=combination, density=0.5)
        changes.append(model.base_model.model.layers[0].get_delta_weight("sum"))
    assert torch.allclose(*changes, atol=1e-5)


def test_disabled_adapters_are_not_merged() -> None:
    view, _ = pair()
    view.base_model.disable_adapter_layers()
    with pytest.raises(ak.StateError, match="The adapters are disabled, and merged they would act"):
        view.merge_adapter()
    view.base_model.enable_adapter_layers()
    with view.disable_adapter(), pytest.raises(ak.StateError, match="merge outside of the block"):
        view.merge_adapter()
    view.merge_adapter()
    assert view.base_model.adapters.merged == ("one",)


def test_add_weighted_adapter_does_not_activate() -> None:
    view, _ = pair(3)
    view.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", combination_type="cat")
    assert view.active_adapters == ["one"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((["one", "gone"], [1.0, 1.0], "sum"), "gone does not exist"),
        ((["one", "two"], [1.0, 1.0], "sum", "plus"), "Invalid combination_type"),
        ((["one", "two"], [1.0, 1.0], "sum", "linear"), "must have the same r"),
    ],
)
def test_add_weighted_adapter_refuses_what_peft_refuses(arguments: tuple[Any, ...], says: str) -> None:
    for model in pair(2):
        with pytest.raises(ValueError, match=says):
            model.add_weighted_adapter(*arguments)


@pytest.mark.parametrize(("names", "weights"), [(["one", "two"], [1.0]), (["one", "one"], [1.0, 2.0])])
def test_add_weighted_adapter_refuses_adapters_without_one_weight_each(names: list[str], weights: list[float]) -> None:
    with pytest.raises(ValueError, match="each adapter once and with one weight"):
        pair(2)[0].add_weighted_adapter(names, weights, "sum")


def test_layers_have_pefts_names_and_numbers() -> None:
    view, theirs = pair(2)
    own, other = (model.base_model.model.layers[0] for model in (view, theirs))
    assert (own.r, own.scaling, own.lora_alpha) == (other.r, other.scaling, other.lora_alpha)
    assert torch.allclose(own.get_delta_weight("two"), other.get_delta_weight("two"), atol=1e-6)
    found, expected = ([m for m in model.modules() if isinstance(m, BaseTunerLayer)] for model in (view, theirs))
    assert [(m.in_features, m.out_features) for m in found] == [(m.in_features, m.out_features) for m in expected]
    assert view.targeted_module_names == theirs.targeted_module_names


def test_a_merge_is_told_as_peft_tells_it() -> None:
    for model in pair(2):
        with pytest.warns(UserWarning, match="Already unmerged"):
            model.unmerge_adapter()
        model.merge_adapter()
        with pytest.warns(UserWarning, match="already merged, nothing to do"):
            model.merge_adapter()
        with pytest.warns(UserWarning, match="additionally merging two"):
            model.merge_adapter(["two"])
        assert model.base_model.model.layers[0].merged_adapters == ["one", "two"]


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_an_adapter_at_tied_embeddings_is_merged_into_a_weight_of_its_own(call: str) -> None:
    model = build("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    ak.attach(model).add("default", ak.config("lora", r=2, target_modules=["embed_tokens"], init_lora_weights=False))
    view, given = ak.as_peft(model), inputs("llama")
    expected, head = view(**given).logits, model.lm_head.weight.detach().clone()
    merged = getattr(view, call)() or view
    torch.testing.assert_close(merged(**given).logits, expected)
    assert torch.equal(model.lm_head.weight, head)
    assert not model.config.tie_word_embeddings
    if merged is view:
        view.unmerge_adapter()
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.config.tie_word_embeddings


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_a_safe_merge_of_nan_is_a_value_error(call: str) -> None:
    for model in pair():
        with torch.no_grad():
            model.get_parameter("base_model.model.layers.0.lora_B.one.weight")[0] = torch.nan
        with pytest.raises(
            ValueError, match=r"NaNs detected in the merged weights\. The adapter one seems to be broken"
        ):
            getattr(model, call)(safe_merge=True)


def test_disabled_adapters_come_before_adapter_names() -> None:
    view, _ = pair(2)
    numbers = inputs("embednet")["x"]
    with torch.no_grad(), view.disable_adapter():
        expected = view(numbers)
        assert_same_outputs(view(numbers, adapter_names=["one", "two"]), expected)


def test_key_mapping_is_refused(tmp_path: Path) -> None:
    view, _ = pair()
    view.save_pretrained(tmp_path)
    with pytest.raises(ak.UnsupportedError, match="key_mapping"):
        view.load_adapter(tmp_path / "one", "two", key_mapping={"a": "b"})


def test_merge_and_unload_keeps_what_is_merged() -> None:
    view, _ = pair()
    expected = run(view, "embednet")
    view.merge_adapter()
    with pytest.warns(UserWarning, match="already merged"):
        plain = view.merge_and_unload()
    assert_same_outputs(run(plain, "embednet"), expected)


def test_the_config_stays_the_object_that_was_given(tmp_path: Path) -> None:
    pair()[0].save_pretrained(tmp_path)
    config = LoHaConfig(target_modules=TARGETS)
    assert PeftView(build("embednet"), config).peft_config["default"] is config
    loaded = LoraConfig.from_pretrained(tmp_path / "one")
    view = PeftView.from_pretrained(build("embednet"), tmp_path / "one", config=loaded)
    assert view.peft_config["default"] is loaded
    assert not view.training


@pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_adapters_have_the_dtype_that_peft_gives_them(autocast: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    pair()[0].save_pretrained(tmp_path)
    view = PeftView.from_pretrained(build("embednet").bfloat16(), tmp_path / "one", autocast_adapter_dtype=autocast)
    view.load_adapter(tmp_path / "one", "two", autocast_adapter_dtype=autocast)
    assert {p.dtype for name in ("default", "two") for p in view.adapters.parameters(name)} == {dtype}


@pytest.fixture
def process() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch")
@pytest.mark.usefixtures("process")
def test_fsdp_around_a_view_gives_pefts_names() -> None:
    view, theirs = pair()
    wrapped = FullyShardedDataParallel(view, use_orig_params=True, device_id=torch.device("cpu"))
    expected = get_peft_model_state_dict(theirs, adapter_name="one")
    found = get_peft_model_state_dict(wrapped, adapter_name="one")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
