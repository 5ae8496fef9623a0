"""What people write by mistake: each error says what was wrong and what to write."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from tests.models import build
from torch import nn

import adapterkit as ak
from adapterkit.errors import usage
from adapterkit_lora import LoraConfig

QUERY = {"target_modules": ["query"]}


def adapted(*names: str) -> ak.Adapters:
    adapters = ak.attach(build("bert"))
    for name in names:
        adapters.add(name, LoraConfig(r=2, **QUERY))
    return adapters


def add(**fields: Any) -> object:
    return adapted().add("a", LoraConfig(**fields))


def dynamic() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


# What is written, the error, and what its message must have.
WRONG: dict[str, tuple[Any, ...]] = {
    "swapped": (
        lambda: adapted().add(LoraConfig(**QUERY), "a"),
        ak.UsageError,
        "The name comes before the config: adapters.add('mood', ak.LoraConfig(r=8))",
    ),
    "no arguments": (
        lambda: adapted().add(),
        ak.UsageError,
        "'name'. It is called so: adapters.add('mood', ak.Lora",
    ),
    "no name": (lambda: adapted().add(LoraConfig()), ak.UsageError, "'config'", "adapters.add('mood', ak.Lora"),
    "no folder": (lambda: adapted("a").save("a"), ak.UsageError, "'folder'", "adapters.save('mood', 'out/mood')"),
    "attach with a config": (
        lambda: ak.attach(build("bert"), LoraConfig()),
        ak.UsageError,
        "adapters = ak.attach(model); adapters.add(",
    ),
    "unknown option": (lambda: adapted("a").save("a", "x", safe=True), ak.UsageError, "'safe'"),
    "the class": (lambda: adapted().add("a", LoraConfig), ak.ConfigError, "ak.LoraConfig(r=8)"),
    "rank": (lambda: LoraConfig(rank=8), ak.UnknownNameError, "no field 'rank'. Did you mean 'r'?"),
    "misspelt task": (
        lambda: LoraConfig(task_type="CAUSALLM"),
        ak.ConfigError,
        "task_type = 'CAUSALLM': did you mean 'CAUSAL_LM'? PEFT knows ",
    ),
    "order of fields": (lambda: LoraConfig(size=8), ak.UnknownNameError, "Its fields: r, lora_alpha, use_rslora,"),
    "targets": (lambda: LoraConfig(targets=["q"]), ak.UnknownNameError, "Did you mean 'target_modules'?"),
    "one name": (lambda: add(target_modules="query"), ak.SelectionError, "Did you mean the list ['query']"),
    "names with commas": (
        lambda: add(target_modules="query,value"),
        ak.SelectionError,
        "Did you mean the list ['query', 'value']",
    ),
    "misspelt stack": (
        lambda: add(**QUERY, layers_to_transform=[0], layers_pattern="layrs"),
        ak.SelectionError,
        "'layrs': no stack has that name",
        "'bert.encoder.layer' (2 layers)",
    ),
    "misspelt stack in a mapping": (
        lambda: add(**QUERY, layers_to_transform={"encoder.layrs": [0]}),
        ak.SelectionError,
        "'encoder.layrs': no stack has that name",
        "'bert.encoder.layer' (2 layers)",
    ),
    "layer number": (
        lambda: add(target_modules="all-linear", layers_to_transform=[7]),
        ak.SelectionError,
        "layers_to_transform = [7]: 'bert.encoder.layer' has layers 0 to 1",
    ),
    "a PeftModel": (
        lambda: ak.attach(peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"]))),
        ak.ConfigError,
        "ak.from_peft(model)",
    ),
    "heads": (
        lambda: adapted("a", "b").combine("c", {"a": 1, "b": 1}),
        ak.ConfigError,
        "heads='a'",
        "heads='average'",
        "heads='concat'",
    ),
    "names in a list": (lambda: adapted().activate(["a", "b"]), ak.UnknownNameError, "Give each name by itself"),
    "PEFT's argument": (
        lambda: adapted().load("out/mood", is_trainable=True),
        ak.UsageError,
        "'is_trainable'. Did you mean 'trainable'? It is called so: adapters.load('out/mood')",
    ),
    "PEFT's argument without a name here": (
        lambda: adapted().combine("b", {"a": 1}, combination_type="svd"),
        ak.UsageError,
        "'combination_type'. Its arguments: name, sources, method, space, rank,",
    ),
    "no adapter's parameters": (lambda: adapted().parameters(), ak.UsageError, "adapters.parameters('mood')"),
    "unmerge one": (lambda: adapted().unmerge("a"), ak.UsageError, "adapters.unmerge(), which restores all"),
    "convert by position": (
        lambda: adapted().convert("a", "lora"),
        ak.UsageError,
        "adapters.convert('mood', to='lora', name=",
    ),
    "merge twice": (
        lambda: (adapters := adapted("a")).merge() or adapters.merge(),
        ak.ConfigError,
        "needs active adapters, or each name once. Merged: ('a',).",
    ),
    "an optimizer while merged": (
        lambda: (adapters := adapted("a")).merge() or adapters.parameter_groups(),
        ak.StateError,
        "'a' is merged; call unmerge() first",
    ),
    "all-linear in a list": (
        lambda: add(target_modules=["all-linear"]),
        ak.SelectionError,
        "Did you mean target_modules='all-linear', as text?",
    ),
    "another spelling of all-linear": (
        lambda: add(target_modules="all_linear"),
        ak.SelectionError,
        "Did you mean target_modules='all-linear'",
    ),
    "extract from folders": (
        lambda: ak.extract("base", "tuned", rank=4),
        ak.ConfigError,
        "Load the model first; ak.extract_files",
    ),
    "a second object": (
        lambda: ak.Adapters(adapted("a").model),
        ak.UsageError,
        "ak.attach(model) gives the adapters of a model",
    ),
    "extract from one folder": (
        lambda: ak.extract(build("bert"), "tuned", rank=4),
        ak.UsageError,
        "extract needs two models, not a str; ak.extract_files takes folders",
    ),
    "a quantised layer": (
        lambda: ak.attach(dynamic()).add("a", LoraConfig(target_modules=["0"])),
        ak.SelectionError,
        "is a Linear, which cannot be adapted: its weight is quantised, in a way",
        "before it is quantised",
    ),
    "a quantised model": (
        lambda: ak.attach(dynamic()).add("a", LoraConfig(target_modules="all-linear")),
        ak.SelectionError,
        "has no linear layer that can be adapted: '0', for one, is quantised",
        "before it is quantised",
    ),
    "a name of the package": (lambda: ak.atach, AttributeError, "Did you mean attach"),
    "a call of all adapters on one": (
        lambda: adapted("a")["a"].activate,
        AttributeError,
        "Write adapters.activate, with the name.",
    ),
    "features of tensors": (
        lambda: ak.features(nn.Sequential(nn.Linear(4, 4)), [torch.zeros(1, 4)], progress=False),
        ak.ConfigError,
        "must be a mapping of tensors by name. For plain tensors name a module",
    ),
    "another spelling of a method": (lambda: ak.config("LoRA"), ak.UnknownNameError, "Did you mean 'lora'?"),
    "the name of a method": (lambda: ak.lora, AttributeError, "ak.config('lora') makes a config"),
    "a method of PEFT's": (lambda: ak.IA3Config, AttributeError, "LoraConfig, VeraConfig. docs"),
    "another spelling of a config": (lambda: ak.LoRAConfig, AttributeError, "Did you mean LoraConfig?"),
    "a misspelt config": (lambda: ak.LorraConfig, AttributeError, "Did you mean LoraConfig"),
    "a call of the adapters on the package": (
        lambda: ak.load("out/mood"),
        AttributeError,
        "A model's adapters have it: ak.attach(model).load.",
    ),
    "an adapter as an attribute": (
        lambda: adapted("mood").mood,
        AttributeError,
        "One adapter is adapters['mood'].",
    ),
    "PEFT's name of an argument": (
        lambda: adapted().load("out/mood", adapter_name="a"),
        ak.UsageError,
        "Did you mean 'name'?",
    ),
    "a field of the file": (
        lambda: LoraConfig(peft_type="LORA"),
        ak.UnknownNameError,
        "no field 'peft_type': files get it by themselves",
    ),
    "selection swapped": (
        lambda: ak.select(LoraConfig(), build("bert")),
        ak.ConfigError,
        "The model comes before the config.",
    ),
    "preview swapped": (
        lambda: ak.preview(LoraConfig(), build("bert")),
        ak.ConfigError,
        "A BertForSequenceClassification is not an adapter config",
    ),
    "modules as targets": (
        lambda: LoraConfig(target_modules=[build("bert")]),
        ak.ConfigError,
        "it must be str or a list of str or None",
    ),
    "nothing to unmerge": (lambda: adapted().unmerge(), ak.StateError, "Nothing is merged"),
    "adapters of a wrong type": (
        lambda: ak.merge_checkpoint("base", 5, "out"),
        ak.ConfigError,
        "adapters = 5 has the type int; it must be Mapping[str | Path, float] | Sequence[str | Path] | str | Path",
    ),
    "text for a number": (
        lambda: ak.inspect_adapter("a", top="3"),
        ak.ConfigError,
        "top = '3' has the type str; it must be int | None",
    ),
    "text for an object": (
        lambda: ak.describe_methods("lora"),
        ak.ConfigError,
        "registry = 'lora' has the type str; it must be Registry",
    ),
    "a list for a choice": (
        lambda: ak.check_serving("a", []),
        ak.ConfigError,
        "server = [] has the type list; it must be 'vllm' or 'sglang'",
    ),
    "a model for a folder": (
        lambda: ak.skeleton(build("bert")),
        ak.ConfigError,
        "A BertForSequenceClassification is not a folder: give its path",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_message_says_what_was_wrong_and_what_to_write(case: str) -> None:
    call, kind, *parts = WRONG[case]
    with pytest.raises(kind) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)
    assert len(str(caught.value)) < 600


def public_calls() -> dict[str, Callable[..., object]]:
    """Every function of the package, and every public method of what a user holds, by how it is called."""
    adapters = adapted("a")
    of = {"adapters": adapters, "adapters['mood']": adapters["a"], "ak": ak}
    names = [(prefix, name) for prefix, owner in of.items() for name in dir(owner) if not name.startswith("_")]
    found = {f"{prefix}.{name}": getattr(of[prefix], name) for prefix, name in names}
    found = {name: call for name, call in found.items() if inspect.isroutine(call) and name != "ak.hookimpl"}
    return {**found, "config.replace": LoraConfig().replace}


CALLS = public_calls()


@pytest.mark.parametrize("called", CALLS)
def test_a_call_with_an_unknown_argument_shows_how_it_is_called(called: str) -> None:
    arguments = [None] * 20 if called in ("ak.config", "config.replace") else []
    unknown = {} if arguments else {"unheard_of": 1}
    with pytest.raises(ak.UsageError) as caught:
        CALLS[called](*arguments, **unknown)
    text = str(caught.value)
    assert text.startswith(f"{called.rpartition('.')[2]}: ")
    assert " It is called so: " in text
    assert not any(name in text for name in ("Adapters.", "AdapterView", "Registry", "AdapterConfig.", "self"))
    assert caught.value.__suppress_context__  # the message of Python, which names a class, is not shown above


def test_a_bias_that_the_base_lacks_is_told_when_the_adapter_is_added() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    fields = {"r": 2, "lora_bias": True}
    report = ak.attach(model).add("a", LoraConfig(target_modules=["0", "1"], **fields))
    assert "note: the adapter cannot be merged: it adds a bias at '0', where the base has none" in str(report)
    assert not ak.attach(model).add("b", LoraConfig(target_modules=["1"], **fields)).notes


def test_an_adapter_of_another_model_is_named_as_that(tmp_path: Path) -> None:
    folder = adapted("a").save("a", tmp_path / "a")
    with pytest.raises(ak.CheckpointError) as caught:
        ak.attach(build("llama")).load(folder)
    assert "is an adapter of another model: this LlamaForCausalLM has none of its 2 layers, such as" in str(
        caught.value
    )


def test_a_file_with_a_misspelt_task_is_read(tmp_path: Path) -> None:
    folder = adapted("a").save("a", tmp_path / "a")
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"SEQ_CLS"', '"seq_cls"'))
    with pytest.warns(ak.AdapterWarning, match="task_type = 'seq_cls' is read as 'SEQ_CLS'"):
        assert ak.read_config(folder).task_type == "SEQ_CLS"


def test_training_while_merged_is_warned_of_once() -> None:
    adapters = adapted("a")
    adapters.merge()
    adapters.add("b", LoraConfig(r=2, target_modules=["key"], modules_to_save=None))
    adapters.model.train()  # b trains
    adapters.activate("b", trainable=False)
    adapters.model.eval()
    with pytest.warns(ak.AdapterWarning, match=r"while 'a' is merged .* Call unmerge\(\)") as caught:
        adapters.model.train()
    assert len(caught) == 1
    adapters.model.train()
    adapters.unmerge()
    adapters.model.train()


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda adapters: adapters.merge(), "nothing trains: merged adapters train only after unmerge()"),
        (lambda adapters: adapters.activate(), "nothing trains: activate(name) lets an adapter train"),
    ],
)
def test_the_status_says_why_nothing_trains(call: Callable[[ak.Adapters], object], line: str) -> None:
    adapters = adapted("a")
    assert "nothing trains" not in str(adapters.status())
    call(adapters)
    assert line in str(adapters.status()).splitlines()


@pytest.mark.parametrize(
    "call",
    [
        lambda adapters: adapters.add("b", LoraConfig(r=2, target_modules=["query", "qury"])),
        lambda adapters: adapters.load_state_dict("a", {"x": torch.zeros(1)}, strict=False),
        lambda adapters: LoraConfig.from_dict({"peft_type": "LORA", "r": 2, "unheard_of": 1}),
        lambda adapters: (adapters.merge(), adapters.model.train()),
    ],
    ids=["add", "load_state_dict", "from_dict", "train"],
)
def test_a_warning_is_at_the_line_of_the_call(call: Callable[[ak.Adapters], object]) -> None:
    adapters = adapted("a")
    with pytest.warns(ak.AdapterWarning) as caught:
        call(adapters)
    assert caught[0].filename == __file__


def test_a_type_error_inside_a_call_stays_what_it_is() -> None:
    @usage("call(1)")
    def call(number: int) -> None:
        raise TypeError(f"inside {number}")

    with pytest.raises(TypeError, match="inside 1") as caught:
        call(1)
    assert not isinstance(caught.value, ak.UsageError)


class Samples(torch.utils.data.Dataset[torch.Tensor]):
    """A dataset as torch has them: it can be iterated over, and is no `Iterable`."""

    def __getitem__(self, number: int) -> torch.Tensor:
        if number > 1:
            raise IndexError
        return torch.ones(2, 4)


class BrokenSamples(Samples):
    def __getitem__(self, number: int) -> torch.Tensor:
        raise TypeError("in the dataset")


class Broken(nn.Sequential):
    def forward(self, batch: object) -> object:
        raise AttributeError("in the model")


def features(model: nn.Module, batches: Any, layer: Any = "0") -> object:
    return ak.features(model, batches, layer=layer, pooling=None, progress=0)


def test_an_error_of_a_model_or_a_dataset_is_not_blamed_on_an_argument() -> None:
    samples = Samples()
    assert isinstance(features(nn.Sequential(nn.Linear(4, 4)), samples), torch.Tensor)
    with pytest.raises(TypeError, match=r"^in the dataset$"):
        features(nn.Sequential(nn.Linear(4, 4)), BrokenSamples())
    with pytest.raises(AttributeError, match=r"^in the model$"):
        features(Broken(nn.Linear(4, 4)), samples)
    with pytest.raises(TypeError, match=r"^linear\(\)"):  # a layer of torch gets no tensor
        features(nn.Sequential(nn.Linear(4, 4)), [{"input": ["text", torch.ones(1)]}])
    with pytest.raises(ak.UsageError, match=r"layer = 1\.5 has the type float"):
        features(nn.Sequential(nn.Linear(4, 4)), samples, layer=1.5)


# What one reads back


def test_a_config_shows_what_differs_from_the_defaults() -> None:
    assert repr(LoraConfig(r=16, target_modules=["q"])) == "LoraConfig(r=16, target_modules=('q',))"
    assert repr(LoraConfig()) == "LoraConfig()"
    assert "&lt;" in LoraConfig(target_modules=["<b>"])._repr_html_()


def test_numpy_s_numbers_are_numbers() -> None:
    config = LoraConfig(r=np.int64(4), lora_alpha=np.float32(8), layers_to_transform=list(np.arange(2)))
    assert config == LoraConfig(r=4, lora_alpha=8.0, layers_to_transform=[0, 1])
    assert type(config.r) is int
    model = build("bert")
    ak.attach(model).add("a", LoraConfig(r=2, **QUERY), num_labels=np.int64(5))
    assert model.config.num_labels == 5


def test_a_long_list_does_not_fill_the_screen() -> None:
    assert len(repr(LoraConfig(target_modules=[f"layers.{i}" for i in range(1000)]))) < 200


def test_a_method_s_own_fields_come_first_in_help() -> None:
    names = list(inspect.signature(LoraConfig).parameters)
    assert names[:2] == ["r", "lora_alpha"]
    assert set(names) == {f.name for f in dataclasses.fields(LoraConfig)}


@pytest.mark.parametrize(
    ("method", "shown"),
    [("lora", "(lora_A): (2, 4)"), ("loha", "hada_w1_a: (3, 2)"), ("vera", "vera_lambda_d: (2)")],
)
def test_printing_a_model_shows_the_shapes_of_adapters(method: str, shown: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    ak.attach(model).add("a", ak.config(method, r=2, target_modules=["0"]))
    assert shown in str(model)


def test_a_notebook_shows_the_adapters_as_their_status() -> None:
    adapters = adapted("a")
    assert adapters._repr_html_() == adapters.status()._repr_html_()
    adapters.detach()
    assert "&lt;Adapters, detached&gt;" in adapters._repr_html_()


def test_python_s_prompt_shows_a_report_as_its_text() -> None:
    adapters = adapted("a")
    report = adapters.status()
    assert repr(report) == str(report)
    assert repr(ak.select(adapters.model, LoraConfig(**QUERY))).startswith("2 layers adapted, ")
