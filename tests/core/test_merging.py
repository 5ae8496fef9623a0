"""Merging: the weights after it, and after it is undone."""

import copy
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests import combining
from tests.combining import bits, has_bits, registered, scaling_method
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

import adapterkit as ak
from adapterkit.contract.method import Method
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}


TARGETS = ["embed", "linear", "conv"]
IDS = torch.arange(14).view(2, 7) % 7


class Net(nn.Module):
    def __init__(self, size: int = 6, out: int = 5) -> None:
        super().__init__()
        self.embed, self.linear, self.conv = (
            nn.Embedding(7, size),
            nn.Linear(size, out),
            nn.Conv1d(out, 4, 3, padding=1),
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.conv(self.linear(self.embed(ids)).transpose(1, 2))


def network(dtype: torch.dtype = torch.float64, sizes: tuple[int, int] = (6, 5)) -> Net:
    torch.manual_seed(0)
    return Net(*sizes).to(dtype).eval()


def adapted(model: nn.Module, *names: str, targets: Any = TARGETS, **fields: Any) -> ak.Adapters:
    return combining.adapted(model, {name: {"lora_alpha": 8, **fields} for name in names}, targets)


def classifier() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=3, **sizes)).eval()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@given(names=st.permutations("abc"), sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)), bias=st.booleans())
@settings(deadline=None, max_examples=10)
def test_merged_output_is_the_adapted_output(
    dtype: torch.dtype, names: list[str], sizes: tuple[int, int], bias: bool
) -> None:
    model = network(dtype, sizes=sizes)
    adapters = adapted(model, *names, bias="all" if bias else "none")
    adapters.activate(*names, trainable=False)
    expected = model(IDS)
    tolerance = TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))  # outputs are sums of terms of that size
    for merged in (names[:2], names[2:]):
        adapters.merge(*merged)
        torch.testing.assert_close(model(IDS), expected, rtol=TOLERANCE[dtype], atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_unmerge_restores_every_bit(dtype: torch.dtype) -> None:
    model = network(dtype)
    adapters = adapted(model, "a", "b", bias="all")
    before, weight, place = bits(model), model.linear.weight, model.linear.weight.data_ptr()
    for _ in range(3):
        adapters.merge("a")
        adapters.merge("b")
        assert (model.linear.weight, model.linear.weight.data_ptr()) == (weight, place)
        adapters.unmerge()
    assert has_bits(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_the_float32_result_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    model = network(dtype)
    adapters = adapted(model, "a", "b", lora_alpha=5)
    adapters.load(adapters.save("a", tmp_path), "half", dtype=dtype)
    expected = model.linear.weight.detach().float()
    for name in ("half", "b"):
        layer = model.linear.adapters[name]
        up, down = layer.lora_B.weight.detach().float() * (5 / 3), layer.lora_A.weight.detach().float()
        expected = torch.addmm(expected, up, down)
    adapters.merge("half", "b")
    assert torch.equal(model.linear.weight, expected.to(dtype))


class Allocated(TorchDispatchMode):
    """The bytes of the largest storage that any operation makes anew."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in known:
            self.most = max(self.most, result.untyped_storage().nbytes())
        return result


MERGED = {  # the columns' weights are canonical only when they are transposed
    "rows": lambda: nn.Sequential(nn.Linear(2000, 2000, bias=False)),
    "columns": lambda: nn.ModuleDict({"layer": nn.Embedding(3000, 700), "conv": Conv1D(1500, 1400)}),
}


@pytest.mark.parametrize("config", [LoraConfig, LoHaConfig])
@pytest.mark.parametrize("layout", MERGED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_makes_no_buffer_of_a_weights_size(
    dtype: torch.dtype, layout: str, config: type[ak.AdapterConfig]
) -> None:
    model = MERGED[layout]().to(dtype)
    assert min(p.nbytes for p in model.parameters() if p.dim() == 2) > 4 << 19
    adapters = ak.attach(model)
    adapters.add("a", config(target_modules=".*", r=32))
    with Allocated() as allocated:
        adapters.merge("a", keep_base=False)
    assert allocated.most <= 1 << 19


KINDS: dict[str, Callable[[int, int], nn.Module]] = {
    "Linear": nn.Linear,
    "Embedding": nn.Embedding,
    "Conv1D": Conv1D,
    "Conv2d": lambda inside, out: nn.Conv2d(inside, out, 2),
    "channels last": lambda inside, out: nn.Conv2d(inside, out, 2).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@given(sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)), band=st.integers(1, 2000), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=10)
def test_tiles_of_any_size_give_the_same_merge(
    kind: str, dtype: torch.dtype, sizes: tuple[int, int], band: int, seed: int
) -> None:
    """Against the dense sum, entry by entry in float64: factors, tiles, and both at one layer."""
    torch.manual_seed(seed)
    model = nn.Sequential(KINDS[kind](*sizes)).to(dtype)
    adapters = ak.attach(model)
    adapters.add("factors", LoraConfig(target_modules=["0"], r=3, init_lora_weights=False))
    adapters.add("tiles", LoHaConfig(target_modules=["0"], r=7, init_weights=False))
    base, stride = model[0].weight.detach().double().clone(), model[0].weight.stride()
    delta = combining.deltas(adapters, "factors")["0"] + combining.deltas(adapters, "tiles")["0"]
    change = delta.t() if kind in ("Embedding", "Conv1D") else delta.view(base.shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adapterkit.kinds.tiles.TILE_BYTES", band)
        adapters.merge("factors", "tiles")
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype] * float(1 + change.abs().max())}
    torch.testing.assert_close(model[0].weight.detach().double(), base + change, **close)
    assert model[0].weight.stride() == stride


def test_the_factors_of_all_layers_are_never_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    adapters = adapted(model, "a", targets="all-linear")
    alive, counts, original = [], [], Method.factors

    def watched(self: Method, layer: ak.AdapterLayer, *dtype: torch.dtype) -> ak.Factors | None:
        found = original(self, layer, *dtype)
        alive.append(weakref.ref(found.up))
        counts.append(sum(ref() is not None for ref in alive))
        return found

    monkeypatch.setattr(Method, "factors", watched)
    adapters.merge("a")
    assert max(counts) == 1


@pytest.mark.parametrize("names", [(), ("a",)])
def test_merge_and_detach_gives_a_plain_model_with_the_adapter_in_it(names: tuple[str, ...], tmp_path: Path) -> None:
    model = classifier()
    keys = list(model.state_dict())
    adapters = ak.attach(model)
    adapters.add("b", LoraConfig(target_modules=["value"]))
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    adapters.add("a", config, id2label=dict(enumerate("vwxyz")))
    expected = model(IDS).logits
    plain = adapters.merge_and_detach(*names)
    assert plain is model
    assert list(plain.state_dict()) == keys
    assert not any(hasattr(type(m), "_adapted_from") for m in plain.modules())
    torch.testing.assert_close(plain(IDS).logits, expected)
    plain.save_pretrained(tmp_path)
    again = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(IDS).logits, expected)
    assert list(again.config.id2label.values()) == list("vwxyz")


@torch.no_grad()
def step(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.sub_(0.1)


def load_again(model: nn.Module) -> None:
    model.load_state_dict({key: value + 1 for key, value in model.state_dict().items()})


def assign_again(model: nn.Module) -> None:
    state = {key: value + 1 for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def replace_weight(model: Any) -> None:
    model.linear.weight = nn.Parameter(model.linear.weight + 1)


EDITS = pytest.mark.parametrize("edit", [load_again, step, assign_again, replace_weight])


@EDITS
def test_what_is_written_to_merged_weights_is_never_thrown_away_in_silence(edit: Callable[[Net], None]) -> None:
    model = network()
    before = bits(model)
    adapters = adapted(model, "a", "b")
    adapters.merge("a")
    edit(model)
    edited = model(IDS)
    for call in (adapters.unmerge, lambda: adapters.merge("b")):
        with pytest.raises(ak.StateError, match=r"is refused: '.*' was edited while 'a' was merged"):
            call()
    torch.testing.assert_close(model(IDS), edited)
    with pytest.warns(ak.AdapterWarning, match="was edited while it was merged"):
        adapters.detach()
    assert torch.equal(model.linear.weight, before["linear.weight"])


def test_merged_weights_may_move_to_another_dtype_and_back_to_the_base() -> None:
    model = network()
    expected = network().to(torch.bfloat16)(IDS)
    adapters = adapted(model, "a")
    adapters.merge("a")
    model.to(torch.bfloat16)
    adapters.unmerge()
    with adapters.disabled():
        torch.testing.assert_close(model(IDS), expected, rtol=0.04, atol=0.04)


COPIES = pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])


@COPIES
def test_a_copy_is_merged_and_unmerged_by_itself(copied: Callable[[Net], Net]) -> None:
    model = network()
    adapters = adapted(model, "a")
    expected, before = model(IDS), bits(model)
    ak.attach(copied(model)).merge("a")
    assert has_bits(model, before)
    adapters.merge("a")
    twin = copied(model)
    ak.attach(twin).unmerge()
    torch.testing.assert_close(twin(IDS), expected)
    assert adapters.merged == ("a",)


@COPIES
@EDITS
def test_an_edit_before_or_after_a_copy_is_not_lost_in_the_copy(
    edit: Callable[[Net], None], copied: Callable[[Net], Net]
) -> None:
    model = network()
    adapted(model, "a").merge("a")
    twin = copied(model)
    edit(twin)
    for edited in (twin, copied(twin)):
        with pytest.raises(ak.StateError, match=r"unmerge is refused: '.*' was edited while 'a' was merged"):
            ak.attach(edited).unmerge()


@pytest.mark.parametrize("keep_base", [True, False])
def test_safe_finds_values_that_are_not_finite_and_changes_nothing(keep_base: bool) -> None:
    model = network()
    adapters = adapted(model, "a")
    before = bits(model)
    with torch.no_grad():
        model.conv.adapters["a"].lora_B.weight.fill_(float("inf"))
        before["conv.adapters.a.lora_B.weight"].fill_(float("inf"))
    with pytest.raises(ak.StateError, match="Merging 'a' into 'conv' gives values that are not finite"):
        adapters.merge("a", safe=True, keep_base=keep_base)
    assert adapters.merged == ()
    assert has_bits(model, before)


@pytest.mark.parametrize("order", [("a", "s"), ("s", "a")], ids="-".join)
def test_other_methods_merge_by_their_own_rule_in_the_order_given(order: tuple[str, str]) -> None:
    model = network()
    adapters = adapted(model, "a")
    with registered(scaling_method(mergeable=True)) as scale:
        adapters.add("s", scale.config(target_modules=TARGETS, modules_to_save=None))
        combining.randomise(adapters, "s", 1)
        adapters.activate(*order)
        expected, before = model(IDS), bits(model)
        adapters.merge(*order)
        torch.testing.assert_close(model(IDS), expected)
        adapters.unmerge()
        assert has_bits(model, before)


MISUSES = {
    "twice": (
        lambda a: (a.merge("a"), a.merge("a")),
        r"Adapter 'a' is merged into the weights\. Call unmerge\(\) first",
    ),
    "rename": (lambda a: (a.merge("a"), a.rename("a", "c")), r"Adapter 'a' is merged"),
    "load": (lambda a: (a.merge("a"), a.load_state_dict("a", {})), r"Adapter 'a' is merged"),
    "disabled": (lambda a: (a.merge("a"), a.disabled().__enter__()), r"no bare model while 'a' is merged"),
    "nothing to unmerge": (lambda a: a.unmerge(), r"Nothing is merged"),
    "base gone": (lambda a: (a.merge("a", keep_base=False), a.unmerge()), r"'a' cannot be unmerged: with keep_base"),
    "no name": (
        lambda a: (a.activate(), a.merge()),
        r"merge\(\) needs active adapters, or each name once\. Merged: \(\)\.",
    ),
    "unknown": (lambda a: a.merge("x"), r"Unknown adapter 'x'\. Available: 'a', 'b'"),
    "trained biases": (
        lambda a: (a.merge("a"), a.add("c", LoraConfig(target_modules=TARGETS, bias="all", modules_to_save=None))),
        r"'c' trains biases, .* other adapters are merged into those now",
    ),
    "meta": (lambda a: (a.model.to("meta"), a.merge("a")), r"'embed\.weight' is not in memory"),
    "nothing active": (lambda a: (a.activate(), a.merge_and_detach()), r"nothing to merge: no adapter is active"),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_says_what_to_do(misuse: str) -> None:
    call, message = MISUSES[misuse]
    with pytest.raises(ak.AdapterError, match=message):
        call(adapted(network(), "a", "b"))


def test_a_bias_of_the_adapter_needs_one_of_the_layer() -> None:
    adapters = adapted(nn.Sequential(nn.Linear(4, 4, bias=False)), "a", targets=["0"], lora_bias=True)
    with pytest.raises(ak.StateError, match="'0' has no bias to merge the adapter's into"):
        adapters.merge("a")


def test_the_bias_of_one_adapter_is_merged_beside_another_without_one() -> None:
    model = network()
    adapters = combining.adapted(model, {"a": {"lora_bias": True}, "b": {}}, ["linear"])
    adapters.activate("a", "b")
    expected = model(IDS)
    adapters.merge("a", "b")
    torch.testing.assert_close(model(IDS), expected)


def test_biases_that_were_added_on_the_meta_device_are_changes_of_the_bare_bias() -> None:
    fields = {"target_modules": ["linear"], "bias": "all", "modules_to_save": None}
    with torch.device("meta"):
        model = Net().double().eval()
        adapters = ak.attach(model)
        for name in "ab":
            adapters.add(name, LoraConfig(r=2, **fields), activate=False)
    model.to_empty(device="cpu")
    model.load_state_dict(network().state_dict(), strict=False)
    for name in "ab":
        adapters.reset(name)
        combining.randomise(adapters, name, ord(name))
    adapters.activate("a", "b")
    expected = model(IDS)
    adapters.merge("a")
    torch.testing.assert_close(model(IDS), expected)


def test_merging_active_adapters_keeps_the_head_that_acts() -> None:
    model = classifier()
    adapters = ak.attach(model)
    for name in "ab":
        adapters.add(name, LoraConfig(target_modules=["query"], init_lora_weights=False), num_labels=3 + ord(name) - 96)
    with pytest.raises(ak.ConfigError, match=r"'a' and 'b' each have their own 'classifier', .* heads='a'\."):
        adapters.merge("a", "b")
    adapters.activate("a", "b", trainable=False, heads="a")
    expected = model(IDS).logits
    adapters.merge("a", "b")
    torch.testing.assert_close(model(IDS).logits, expected)
    assert model.config.num_labels == 4
    adapters.unmerge()
    with adapters.disabled():
        assert model(IDS).logits.shape == (2, 3)
    assert adapters.merge_and_detach("a", "b", heads="b")(IDS).logits.shape == (2, 5)


def test_a_resized_embedding_takes_its_own_change_in_and_gives_it_back(tmp_path: Path) -> None:
    """PEFT writes an embedding that it adapts in full beside the change; both act, so both are merged."""
    adapters = adapted(network(torch.float32), "a", targets=["embed", "linear"])
    adapters.save("a", tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.embed.base_layer.weight"] = torch.randn(7, 6)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = network(torch.float32)
    adapters = ak.attach(model)
    adapters.load(tmp_path, "a")
    expected, saved = model(IDS), {k: v.clone() for k, v in adapters.state_dict("a").items()}
    adapters.merge("a")
    torch.testing.assert_close(model(IDS), expected)
    for refused in (lambda: adapters.state_dict("a"), lambda: adapters.save("a", tmp_path / "x")):
        with pytest.raises(ak.StateError, match="is merged into its own copy of a module"):
            refused()
    adapters.unmerge()
    assert all(torch.equal(v, saved[k]) for k, v in adapters.state_dict("a").items())
    torch.testing.assert_close(adapters.merge_and_detach("a")(IDS), expected)
