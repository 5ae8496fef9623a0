"""New weights into an adapter that is there: the outputs of the file in the adapter's memory, or nothing at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.combining import nothing_changes, outer_method
from tests.core.conftest import set_parameters
from tests.models import LABELS, assert_same_outputs, build, inputs, run
from torch import Tensor

import adapterkit as ak

KINDS = {
    "gpt2": ["c_attn", "wte"],
    "bert": ["query", "value", "word_embeddings"],
    "convnet": ["conv1d", "conv2d", "conv3d", "grouped", "dilated", "circular", "fc"],
    "gemma3": ["q_proj", "embed_tokens"],
}
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({"r": 4, "lora_alpha": 8}, {"r": 2, "lora_alpha": 3}),
    "loha": ({"r": 3, "alpha": 6}, {"r": 3, "alpha": 6}),
    "vera": ({"r": 3}, {"r": 3}),
}


def adapter(model: str, name: str, method: str, seed: int = 0, **fields: Any) -> ak.Adapters:
    """A float64 model with one adapter that has values."""
    adapters = ak.attach(build(model).double())
    defaults = {"target_modules": KINDS.get(model), "modules_to_save": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapters.add(name, ak.config(method, **{**defaults, **fields}))
    set_parameters(adapters, name, seed=seed)
    return adapters


def saved(folder: Path, model: str, method: str, seed: int = 1, **fields: Any) -> tuple[Path, Tensor]:
    """A file, and the outputs with it."""
    adapters = adapter(model, "f", method, seed, **fields)
    return adapters.save("f", folder / "file"), run(adapters.model, model)


def places(adapters: ak.Adapters, name: str = "a") -> dict[str, Any]:
    return {key: (id(p), p.data_ptr(), p.shape, p.requires_grad) for key, p in adapters.named_parameters(name)}


@pytest.mark.parametrize("method", SIZES)
@pytest.mark.parametrize("model", KINDS)
def test_the_outputs_are_the_file_s_and_the_parameters_stay_where_they_are(
    model: str, method: str, tmp_path: Path
) -> None:
    own, theirs = SIZES[method]
    folder, expected = saved(tmp_path, model, method, **theirs)
    adapters = adapter(model, "a", method, **own)
    before, config = places(adapters), adapters.config("a")
    report = adapters.swap("a", folder)
    assert places(adapters) == before
    torch.testing.assert_close(run(adapters.model, model), expected)
    assert adapters.config("a") == config
    assert report.cleared == ()
    assert "adapter 'a': new values in" in str(report)
    again = ak.attach(build(model).double())
    again.load(adapters.save("a", tmp_path / "again"), "x")
    torch.testing.assert_close(run(again.model, model), expected)


@pytest.mark.parametrize("init", ["pissa", "olora", True])
@pytest.mark.parametrize("own", ["pissa", True])
def test_the_initial_factors_of_pissa_are_room_and_are_taken_over(own: Any, init: Any, tmp_path: Path) -> None:
    fields = {"target_modules": ["query"], "lora_alpha": 4}
    folder, expected = saved(tmp_path, "bert", "lora", r=2, init_lora_weights=init, **fields)
    adapters = adapter("bert", "a", "lora", r=4, init_lora_weights=own, **fields)
    adapters.swap("a", folder)
    torch.testing.assert_close(run(adapters.model, "bert"), expected)
    again = ak.attach(build("bert").double())
    again.load(adapters.save("a", tmp_path / "again"), "x")
    torch.testing.assert_close(run(again.model, "bert"), expected)


def test_a_scaling_whose_ratio_is_a_power_of_two_is_exact(tmp_path: Path) -> None:
    folder, expected = saved(tmp_path, "bert", "lora", r=2, lora_alpha=16)
    adapters = adapter("bert", "a", "lora", r=2, lora_alpha=1)
    adapters.swap("a", folder)
    assert_same_outputs(run(adapters.model, "bert"), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_taken_over(value: float, tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "bert", "lora", target_modules=["query"])
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values())).fill_(value)
    save_file(tensors, folder / "adapter_model.safetensors")
    adapters = adapter("bert", "a", "lora", target_modules=["query"])
    adapters.swap("a", folder)
    assert all(torch.equal(t.nan_to_num(7.0), tensors[k].nan_to_num(7.0)) for k, t in adapters.state_dict("a").items())


def test_heads_biases_and_labels_are_the_file_s(tmp_path: Path) -> None:
    given: dict[str, Any] = {"target_modules": ["query"], "modules_to_save": "auto", "bias": "all"}
    other = ak.attach(build("bert").double())
    other.add("f", ak.config("lora", r=2, **given), id2label={0: "no", 1: "yes", 2: "perhaps"})
    set_parameters(other, "f", seed=3)
    folder = other.save("f", tmp_path / "file")
    adapters = adapter("bert", "a", "lora", r=3, **given)
    before = places(adapters)
    report = adapters.swap("a", folder)
    assert places(adapters) == before
    torch.testing.assert_close(run(adapters.model, "bert"), run(other.model, "bert"))
    assert adapters.model.config.id2label == {0: "no", 1: "yes", 2: "perhaps"}
    assert report.heads == ("classifier",)
    assert "head: classifier" in str(report)
    with adapters.disabled():
        adapters.swap("a", folder)
        assert adapters.model.config.id2label[0] != "no"
        assert len(adapters.model.config.id2label) == LABELS
    plain, _ = saved(tmp_path, "bert", "lora", target_modules=["query"], r=2)
    refused(adapters, plain, "the adapter has a head at 'classifier', and the file has none there")


def test_layers_and_biases_that_the_file_has_not_are_the_base_s(tmp_path: Path) -> None:
    folder, expected = saved(tmp_path, "bert", "lora", target_modules=["query"], r=2, lora_alpha=3)
    adapters = adapter("bert", "a", "lora", target_modules=["query", "value"], r=4, lora_alpha=8, bias="all")
    report = adapters.swap("a", folder)
    torch.testing.assert_close(run(adapters.model, "bert"), expected)
    assert len(report.cleared) == 2
    assert "changes nothing now: bert.encoder.layer.0" in str(report)


def test_nothing_is_compiled_again(tmp_path: Path) -> None:
    fields = {"target_modules": ["query", "value"]}
    folder, expected = saved(tmp_path, "bert", "lora", r=2, lora_alpha=3, **fields)
    adapters = adapter("bert", "a", "lora", r=4, lora_alpha=8, **fields)
    adapters.activate("a", trainable=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model: Any = torch.compile(adapters.model, fullgraph=True, backend="eager")
    with torch.no_grad():
        first = model(**inputs("bert")).logits
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        adapters.swap("a", folder)
        second = model(**inputs("bert")).logits
    assert graphs == torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, expected)


# What does not fit


def refused(adapters: ak.Adapters, folder: Path, why: str) -> None:
    message = (
        f"file cannot be swapped into adapter 'a': .*{why}.*. Nothing was changed. Load it under another name instead"
    )
    with nothing_changes(adapters), pytest.raises(ak.CheckpointError, match=message):
        adapters.swap("a", folder)


@pytest.mark.parametrize(
    ("own", "file", "why"),
    [
        (("lora", {"r": 2}), ("lora", {"r": 3}), r"at 'bert\..*' its rank is 3, and the adapter has room for 2"),
        (("loha", {"r": 2}), ("loha", {"r": 3}), r"its config differs .* does not say what that changes \(hook from_f"),
        (("lora", {"r": 2}), ("loha", {"r": 2}), "it is of the method 'loha', not 'lora'"),
        (("lora", {}), ("lora", {"target_modules": ["query", "key"]}), r"it changes 'bert\..*key' and 1 more, and the"),
        (
            ("lora", {}),
            ("lora", {"modules_to_save": ["classifier"]}),
            "it has a head at 'classifier', and the adapter has none",
        ),
        (("lora", {}), ("lora", {"bias": "lora_only"}), r"it trains the bias of 'bert\..*query' and 1 more"),
        (("lora", {}), ("lora", {"lora_bias": True}), r"it changes the bias, and the adapter does not"),
        (("lora", {"lora_alpha": 0}), ("lora", {}), r"the adapter's scaling is 0, so it can"),
        (
            ("vera", {"r": 2}),
            ("vera", {"r": 2, "projection_prng_key": 7}),
            "its 'vera_A', which all layers share, is another",
        ),
        (("vera", {"r": 2}), ("vera", {"r": 1}), "its 'vera_A', which all layers share, is another"),
    ],
)
def test_what_does_not_fit_changes_nothing(own: Any, file: Any, why: str, tmp_path: Path) -> None:
    (method, fields), (other, theirs) = own, file
    folder, _ = saved(tmp_path, "bert", other, **{"target_modules": ["query"], **theirs})
    refused(adapter("bert", "a", method, **{"target_modules": ["query"], **fields}), folder, why)


def test_a_head_of_another_size_is_refused(tmp_path: Path) -> None:
    other = ak.attach(build("bert").double())
    other.add("f", ak.config("lora", target_modules=["query"]), num_labels=7)
    adapters = adapter("bert", "a", "lora", target_modules=["query"], modules_to_save="auto")
    why = r"at 'classifier' 'weight' is \(7, 16\), and the adapter's is \(3, 16\)"
    refused(adapters, other.save("f", tmp_path / "file"), why)


def test_factors_across_groups_go_to_such_alone(tmp_path: Path) -> None:
    plain, _ = saved(tmp_path, "convnet", "lora", target_modules=["grouped"], r=2)
    across = {"grouped.lora_A.weight": torch.randn(2, 4, 3, 3), "grouped.lora_B.weight": torch.randn(8, 1, 1, 1)}
    folders = [shutil.copytree(plain, tmp_path / name) for name in "ab"]
    for factor, folder in enumerate(folders, 1):
        save_file({key: factor * value for key, value in across.items()}, folder / "adapter_model.safetensors")
    models = [ak.attach(build("convnet").double()) for _ in folders]
    for adapters, folder in zip(models, folders, strict=True):
        adapters.load(folder, "a")
    refused(models[0], plain, r"at 'grouped' 'lora_A.weight' is \(2, 2, 3, 3\), and the adapter's is \(2, 4, 3, 3\)")
    models[0].swap("a", folders[1])
    torch.testing.assert_close(run(models[0].model, "convnet"), run(models[1].model, "convnet"))


@pytest.fixture
def outer() -> None:
    ak.register(outer_method())


@pytest.mark.usefixtures("outer")
def test_a_method_that_says_nothing_takes_the_same_sizes_of_the_same_config(tmp_path: Path) -> None:
    folder, expected = saved(tmp_path, "bert", "outer", target_modules=["query"])
    adapters = adapter("bert", "a", "outer", target_modules=["query"], task_type="SEQ_CLS")
    adapters.swap("a", folder)
    assert adapters.config("a").task_type is None  # the file's
    torch.testing.assert_close(run(adapters.model, "bert"), expected)
    wider = adapter("bert", "a", "outer", target_modules=["query", "key"])
    why = (
        r"at 'bert\..*key' the file has no tensors, and the method does not say which values leave the layer unchanged"
    )
    refused(wider, folder, why)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_third_party_s_hook_makes_the_values_which_are_compared_with_the_file_s(
    factor: float, tmp_path: Path
) -> None:
    outer = outer_method()

    class Result(type(outer)):  # type: ignore[misc]
        def from_factors(self, factors: Any, kinds: Any) -> Any:
            vectors = {f"{path}.outer_u": factor * f.up[:, 0] for path, f in factors.items()}
            return self.config(), vectors | {f"{path}.outer_v": f.down[0] for path, f in factors.items()}

    ak.register(Result())
    folder, expected = saved(tmp_path, "bert", "outer", target_modules=["query"])
    adapters = adapter("bert", "a", "outer", target_modules=["query", "key"])
    if factor == 1.0:
        adapters.swap("a", folder)
        torch.testing.assert_close(run(adapters.model, "bert"), expected)
    else:
        refused(adapters, folder, "the method's from_factors gives another change under this config")


def test_a_merged_adapter_is_refused_and_a_damaged_file(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "bert", "lora", target_modules=["query"])
    adapters = adapter("bert", "a", "lora", target_modules=["query"])
    adapters.merge("a")
    with pytest.raises(ak.StateError, match="Adapter 'a' is merged into the weights"):
        adapters.swap("a", folder)
    adapters.unmerge()
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with nothing_changes(adapters), pytest.raises(ak.CheckpointError):
        adapters.swap("a", folder)


def test_inside_per_sample_the_rows_of_the_adapter_change(tmp_path: Path) -> None:
    folder, expected = saved(tmp_path, "bert", "lora", target_modules=["query"])
    adapters = adapter("bert", "a", "lora", target_modules=["query"])
    with adapters.per_sample(["a", None]):
        before = run(adapters.model, "bert")
        adapters.swap("a", folder)
        after = run(adapters.model, "bert")
    torch.testing.assert_close(after[0], expected[0])
    torch.testing.assert_close(after[1], before[1])
