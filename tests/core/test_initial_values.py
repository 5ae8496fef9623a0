"""The initial values of adapters: what they depend on, their dtype, models without values, and `reset`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.core.conftest import set_parameters
from tests.models import build, inputs, run
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import adapterkit as ak
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig
from adapterkit_vera import VeraConfig

# Configs with random numbers in every layer.
CONFIGS: dict[str, Callable[..., ak.AdapterConfig]] = {
    "kaiming": lambda **f: LoraConfig(r=2, **f),
    "gaussian": lambda **f: LoraConfig(r=2, init_lora_weights="gaussian", **f),
    "orthogonal": lambda **f: LoraConfig(r=2, init_lora_weights="orthogonal", **f),  # `torch.randn` in `setup`
    "pissa": lambda **f: LoraConfig(r=2, init_lora_weights="pissa_niter_2", **f),
    "loha": lambda **f: LoHaConfig(r=2, **f),
    "vera": lambda **f: VeraConfig(r=4, init_weights=False, **f),
}
VALUE = "bert.encoder.layer.1.attention.self.value."


def values(config: ak.AdapterConfig, seed: int | None, *, drawn_before: int = 0, **options: int) -> dict[str, Tensor]:
    """The initial values on a new model, after this seed."""
    adapters = ak.attach(build("bert"))
    if seed is not None:
        torch.manual_seed(seed)
    torch.rand(drawn_before)
    adapters.add("a", config, **options)  # type: ignore[arg-type]
    return adapters.training_state("a")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    keys = a.keys() & b.keys()
    return bool(keys) and all(torch.equal(a[key], b[key]) for key in keys)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_begins_alike_after_a_seed_whatever_else_is_selected(name: str) -> None:
    every = values(CONFIGS[name](target_modules=["query", "value", "output.dense"]), 3)
    one = values(CONFIGS[name](target_modules=[VALUE[:-1]]), 3)
    every, one = ({key: t for key, t in state.items() if key.startswith(VALUE)} for state in (every, one))
    assert every.keys() == one.keys()
    assert same(every, one)
    assert len(every) > 1


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - {"pissa"}))  # which follows from the weight
def test_another_seed_another_layer_and_another_add_begin_otherwise(name: str) -> None:
    def drawn(state: dict[str, Tensor]) -> list[Tensor]:
        return [t for key, t in state.items() if key.startswith("bert") and t.is_floating_point() and t.std() > 0]

    config = CONFIGS[name](target_modules=["query", "value"])
    first, other, again = drawn(values(config, 3)), drawn(values(config, 4)), drawn(values(config, None))
    for state in (other, again):
        assert not any(torch.equal(a, b) for a, b in zip(first, state, strict=True))
    assert not any(torch.equal(a, b) for i, a in enumerate(first) for b in first[:i] if a.shape == b.shape)


def test_rows_of_a_new_head_follow_from_the_seed() -> None:
    small = values(LoraConfig(target_modules=["query"]), 3, num_labels=5)
    large = values(LoraConfig(target_modules=["query", "value"]), 3, num_labels=5)
    assert same(small, large)
    assert small["classifier.adapter_heads.weight"].shape == (5, 16)
    assert not same(small, values(LoraConfig(target_modules=["query"]), 4, num_labels=5))


def test_add_draws_one_number_from_the_global_generator_whatever_its_size() -> None:
    after = []
    for targets in (["query"], "all-linear"):
        adapters = ak.attach(build("bert"))
        torch.manual_seed(5)
        adapters.add("a", LoraConfig(r=4, target_modules=targets), num_labels=7)
        after.append(torch.rand(3))
    assert torch.equal(*after)
    torch.manual_seed(5)
    assert not torch.equal(torch.rand(3), after[0])


def test_the_global_generator_is_as_before_if_add_fails() -> None:
    adapters = ak.attach(build("bert"))
    state = torch.random.get_rng_state()
    with pytest.raises(ak.StateError, match="r <= min"):
        adapters.add("a", LoraConfig(r=60, init_lora_weights="pissa", target_modules=["query"]))
    torch.random.set_rng_state(state)
    torch.randint(2**63 - 1, ())
    expected = torch.rand(2)
    torch.random.set_rng_state(state)
    with pytest.raises(ak.StateError, match="r <= min"):
        adapters.add("a", LoraConfig(r=60, init_lora_weights="pissa", target_modules=["query"]))
    assert torch.equal(torch.rand(2), expected)


def test_shapes_can_be_computed_where_no_tensor_has_a_value() -> None:
    with FakeTensorMode():
        adapters = ak.attach(torch.nn.Sequential(torch.nn.Linear(4, 3)))
        adapters.add("a", LoraConfig(r=2, target_modules=["0"]))
        assert adapters.model(torch.empty(5, 4)).shape == (5, 3)


# Their dtype


@pytest.mark.parametrize(
    ("dtype", "layers", "others"),
    [
        (None, torch.float32, torch.float32),
        ("model", torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16, torch.float32),
        (torch.float64, torch.float64, torch.float32),
    ],
)
def test_dtype_is_that_of_the_layers_and_model_that_of_heads_and_biases_too(
    dtype: torch.dtype | str | None, layers: torch.dtype, others: torch.dtype, tmp_path: Path
) -> None:
    adapters = ak.attach(build("bert").to(torch.bfloat16))
    config = LoraConfig(r=2, target_modules=["query"], bias="all", modules_to_save=["classifier"])
    adapters.add("a", config, dtype=dtype)
    adapters.save("a", tmp_path)
    adapters.load(tmp_path, "b", dtype=dtype, activate=False)
    for name in ("a", "b"):
        found = {"lora_" in key: t.dtype for key, t in adapters.named_parameters(name)}
        assert found == {True: layers, False: others}
        dtypes = {t.dtype for key, t in adapters.named_parameters(name)}
        assert dtypes == {layers, others}
    adapters.model(**inputs("bert")).logits.float().square().mean().backward()
    assert all(p.grad is not None for key, p in adapters.named_parameters("a") if "lora_" in key)


def test_other_dtypes_and_devices_are_refused() -> None:
    adapters = ak.attach(build("bert"))
    config = LoraConfig(target_modules=["query"])
    for options, message in (
        ({"dtype": "file"}, "dtype = 'file' must be .* or more, 'model', or None"),
        ({"dtype": torch.int8}, "dtype = torch.int8 must be"),
        ({"dtype": torch.float8_e4m3fn}, "dtype = torch.float8_e4m3fn must be"),
        ({"device": "cpu"}, "device = 'cpu' must be 'meta' or None"),
    ):
        with pytest.raises(ak.ConfigError, match=message):
            adapters.add("a", config, **options)  # type: ignore[arg-type]
    assert adapters.names == ()


# Without values, until something brings them


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_without_values_gets_those_of_a_state_where_its_layers_compute(name: str) -> None:
    config = CONFIGS[name](target_modules=["query"], bias="all", modules_to_save=["classifier"])
    first, second = ak.attach(build("bert")), ak.attach(build("bert"))
    first.add("a", config, num_labels=5)
    set_parameters(first, "a")
    before = torch.random.get_rng_state()
    second.add("a", config, num_labels=5, device="meta")
    assert all(tensor.is_meta for tensor in second.parameters("a"))
    torch.random.set_rng_state(before)
    second.load_training_state("a", first.training_state("a"))
    assert not any(tensor.is_meta for tensor in second.parameters("a"))
    torch.testing.assert_close(run(second.model, "bert"), run(first.model, "bert"))
    assert second.trainable == ("a",)


def test_an_adapter_without_values_gets_those_of_a_file_and_initial_ones_for_the_rest() -> None:
    first, second = ak.attach(build("bert")), ak.attach(build("bert"))
    config = VeraConfig(r=4, save_projection=False, target_modules=["query"])
    for adapters, device in ((first, None), (second, "meta")):
        adapters.add("a", config, device=device)
    set_parameters(first, "a")
    assert second.load_state_dict("a", first.state_dict("a")).ok
    torch.testing.assert_close(run(second.model, "bert"), run(first.model, "bert"))


USES: dict[str, Callable[[ak.Adapters, Path], object]] = {
    "forward": lambda adapters, folder: run(adapters.model, "bert"),
    "rows": lambda adapters, folder: in_rows(adapters),
    "save": lambda adapters, folder: adapters.save("a", folder),
    "save_pretrained": lambda adapters, folder: adapters.model.save_pretrained(folder),  # type: ignore[operator]
    "state_dict": lambda adapters, folder: adapters.state_dict("a"),
    "training_state": lambda adapters, folder: adapters.training_state("a"),
    "merge": lambda adapters, folder: adapters.merge("a"),
    "copy": lambda adapters, folder: adapters.copy("a", "b"),
    "combine": lambda adapters, folder: adapters.combine("b", {"a": 1.0}, heads="drop"),
    "report": lambda adapters, folder: adapters.report("a"),
}


def in_rows(adapters: ak.Adapters) -> None:
    with adapters.per_sample(["a", "a"]):
        run(adapters.model, "bert")


def empty(device: str | None) -> ak.Adapters:
    """The adapter "a" without values: of a model that is built on the meta device, or of one that has values."""
    with torch.device(device or "cpu"):
        model = build("bert")
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(r=2, target_modules=["query"], modules_to_save=None), device="meta")
    if device is not None:
        fill(model, build("bert"))
    return adapters


def fill(model: torch.nn.Module, base: torch.nn.Module) -> None:
    """Give a model on the meta device memory and the base's values."""
    model.to_empty(device="cpu")
    model.load_state_dict(base.state_dict())
    for name, buffer in base.named_buffers():
        model.get_buffer(name).copy_(buffer)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("device", ["meta", None])
def test_values_that_were_never_set_are_not_used(device: str | None, use: str, tmp_path: Path) -> None:
    adapters = empty(device)
    with pytest.raises(ak.StateError, match=r"'a' has no values.*adapters.reset\('a'\).*load_state_dict"):
        USES[use](adapters, tmp_path)
    with adapters.disabled():
        run(adapters.model, "bert")
    adapters.reset("a")
    USES[use](adapters, tmp_path)


@pytest.mark.parametrize("on", ["meta", "cpu"])
def test_values_that_to_empty_takes_are_not_used(on: str, tmp_path: Path) -> None:
    adapters = ak.attach(build("bert"))
    adapters.add("a", LoraConfig(r=2, target_modules=["query"], modules_to_save=None))
    set_parameters(adapters, "a")
    adapters.save("a", tmp_path)
    with torch.device(on):
        other = ak.attach(build("bert"))
    other.load(tmp_path, "a")
    if on == "cpu":
        run(other.model, "bert")
    fill(other.model, build("bert"))
    with pytest.raises(ak.StateError, match=r"'a' has no values.*to_empty"):
        run(other.model, "bert")
    assert other.load_state_dict("a", adapters.state_dict("a")).ok
    torch.testing.assert_close(run(other.model, "bert"), run(adapters.model, "bert"))


def test_values_that_somebody_else_sets_count() -> None:
    adapters = empty("meta")
    for parameter in adapters.parameters("a"):
        torch.nn.init.normal_(parameter)
    run(adapters.model, "bert")
    other = empty("meta")
    other.model.load_state_dict(adapters.model.state_dict(), assign=True)
    torch.testing.assert_close(run(other.model, "bert"), run(adapters.model, "bert"))


def test_a_compiled_forward_does_not_use_them_either() -> None:
    adapters, x = ak.attach(torch.nn.Sequential(torch.nn.Linear(4, 3))), torch.ones(2, 4)
    adapters.add("a", LoraConfig(r=2, target_modules=["0"]), device="meta")
    compiled = torch.compile(adapters.model, backend="eager")
    with pytest.raises(ak.StateError, match="'a' has no values"):
        compiled(x)
    adapters.reset("a")
    torch.testing.assert_close(compiled(x), adapters.model(x))


# Initial values again


@pytest.mark.parametrize("name", CONFIGS)
def test_reset_gives_what_add_gives_on_the_base_as_it_is(name: str) -> None:
    config = CONFIGS[name](target_modules=["query"], bias="all", modules_to_save=["classifier"])
    torch.manual_seed(3)
    with torch.device("meta"):
        late = ak.attach(build("bert"))
        late.add("a", config, num_labels=5)
    assert all(tensor.is_meta for tensor in late.model.state_dict().values())
    run_on_meta(late.model)
    with pytest.raises(ak.StateError, match="the base has no weights yet"):
        late.reset("a")
    base = build("bert", seed=1)
    with torch.no_grad():
        for tensor in base.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    fill(late.model, base)
    late.reset("a")
    early = ak.attach(base)
    torch.manual_seed(3)
    early.add("a", config, num_labels=5)
    expected = early.training_state("a")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in late.training_state("a").items())
    torch.testing.assert_close(run(late.model, "bert"), run(early.model, "bert"))
    set_parameters(early, "a")
    early.step()
    early.reset("a")
    again = early.training_state("a")
    assert all(torch.equal(tensor, again[key]) for key, tensor in late.training_state("a").items())
    assert int(again["steps"]) == 0


def run_on_meta(model: torch.nn.Module) -> None:
    """Shapes can be computed without values."""
    out = model(**{key: tensor.to("meta") for key, tensor in inputs("bert").items()})
    assert out.logits.is_meta


def test_reset_is_refused_where_it_cannot_be_right(trained: Callable[..., ak.Adapters], tmp_path: Path) -> None:
    adapters = trained(build("bert"), "a", "b", target_modules=["query"], modules_to_save=None, bias="all")
    adapters.merge("a")
    with pytest.raises(ak.StateError, match="'a' is merged"):
        adapters.reset("a")
    with pytest.raises(ak.StateError, match=r"'b' trains biases.*unmerge"):
        adapters.reset("b")
    adapters.unmerge()
    adapters.reset("b")


def test_reset_is_refused_if_a_file_gave_other_sizes_than_the_config(tmp_path: Path) -> None:
    adapters = ak.attach(build("convnet"))
    adapters.add("a", LoraConfig(r=2, target_modules=["grouped"]))
    adapters.save("a", tmp_path)
    crossing = {"lora_A": torch.ones(2, 4, 3, 3), "lora_B": torch.ones(8, 1, 1, 1)}  # over both groups, as PEFT's
    tensors = {f"base_model.model.grouped.{name}.weight": tensor for name, tensor in crossing.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    adapters.load(tmp_path, "b")
    with pytest.raises(ak.StateError, match="it is from a file with other sizes"):
        adapters.reset("b")
    assert all((parameter == 1).all() for parameter in adapters.parameters("b"))
