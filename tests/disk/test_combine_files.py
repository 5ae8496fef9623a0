"""Combining by files alone, against `Adapters.combine` and `save` on the model, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests import combining
from tests.combining import randomise, tiny
from tests.disk.merging import peak
from tests.models import build, run
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig
from adapterkit_vera import VeraConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def saved(adapters: ak.Adapters, folder: Path, *names: str) -> dict[str | Path, float]:
    """The adapters' folders, with the weights that all tests take."""
    return {adapters.save(n, folder / n): w for n, w in zip(names, (0.7, -0.4, 1.3), strict=False)}


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    with safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    return load_file(folder / WEIGHTS), metadata, json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def equal(found: Path, expected: Path, *, config: bool = True) -> None:
    """The same tensors, to the bit, the same metadata and the same config."""
    (tensors, metadata, fields), (wanted, wanted_metadata, wanted_fields) = read(found), read(expected)
    assert tensors.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert tensors[key].dtype == tensor.dtype, key
        assert torch.equal(tensors[key], tensor), key
    assert metadata == wanted_metadata
    if config:
        assert fields == wanted_fields


def both(adapters: ak.Adapters, folder: Path, *names: str, base: Any = None, **choices: Any) -> tuple[Path, Path]:
    """The result on files and the result on the model, saved."""
    sources = saved(adapters, folder, *names)
    files = ak.combine_files(sources, folder / "files", base=base, **choices)
    memory = adapters.combine("memory", dict(zip(names, sources.values(), strict=True)), **choices)
    adapters.save("memory", folder / "memory")
    assert files.name == "files"
    assert (files.method, dict(files.ranks), dict(files.errors), files.heads) == (
        memory.method,
        dict(memory.ranks),
        dict(memory.errors),
        memory.heads,
    )
    return folder / "files", folder / "memory"


CHOICES: dict[str, dict[str, Any]] = {
    "linear": {},
    "rank": {"rank": 2},
    "energy": {"energy": 0.8},
    "isotropize": {"isotropize": True},
    "ties": {"method": "ties", "density": 0.4},
    "ties frequency": {"method": "ties", "density": 0.4, "majority_sign_method": "frequency", "rank": 3},
    "dare_linear": {"method": "dare_linear", "density": 0.5, "seed": 3},
    "dare_ties": {"method": "dare_ties", "density": 0.5, "seed": 3, "rank": 2},
    "magnitude_prune": {"method": "magnitude_prune", "density": 0.5},
    "tsv": {"method": "tsv"},
    "core": {"space": "core", "method": "ties", "density": 0.4},
    "factors": {"space": "factors", "method": "ties", "density": 0.4},
}


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_every_way_to_combine_gives_the_bits_that_the_model_gives(choices: dict[str, Any], tmp_path: Path) -> None:
    adapters = tiny("bert", {"a": {}, "b": {"r": 3, "lora_alpha": 2}}, torch.float32)
    equal(*both(adapters, tmp_path, "a", "b", **choices))


@pytest.mark.parametrize("name", ["gpt2", "convnet", "embednet", "bart", "vit"])
def test_every_kind_of_layer(name: str, tmp_path: Path) -> None:
    dtype = torch.float64 if name in ("gpt2", "convnet") else torch.float32
    adapters = tiny(name, {"a": {"r": 3}, "b": {"r": 2}}, dtype)
    equal(*both(adapters, tmp_path, "a", "b", rank=1), config=name != "embednet")  # `layers.0` for `0`, the same layer


def classifiers(labels: tuple[int, int] = (3, 3)) -> ak.Adapters:
    adapters = ak.attach(build("bert"))
    for seed, (name, count) in enumerate(zip("ab", labels, strict=True)):
        id2label = {i: f"{name}{i}" if i else "none" for i in range(count)}
        adapters.add(name, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"), id2label=id2label)
        randomise(adapters, name, seed)
    return adapters


@pytest.mark.parametrize(
    ("labels", "heads"),
    [((3, 3), "a"), ((3, 3), "average"), ((2, 4), "b"), ((2, 4), "concat"), ((2, 4), "drop")],
    ids=str,
)
def test_heads_and_labels_are_chosen_as_in_memory(labels: tuple[int, int], heads: str, tmp_path: Path) -> None:
    files, memory = both(classifiers(labels), tmp_path, "a", "b", heads=heads)
    equal(files, memory, config=False)
    adapters = ak.attach(build("bert"))
    adapters.load(files, "c")
    rows = {"b": 4, "concat": 6}.get(heads, 3)
    assert run(adapters.model, "bert").shape == (2, rows)
    if heads == "concat":
        assert adapters.model.config.id2label[0] == "a/none"


def test_layers_beside_a_head_are_named_in_full_where_short_names_might_be_the_heads(tmp_path: Path) -> None:
    files, memory = both(classifiers(), tmp_path, "a", "b", heads="drop")
    assert read(memory)[2]["target_modules"] == ["query"]
    assert read(files)[2]["target_modules"] == [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]
    given, _ = both(classifiers(), tmp_path / "given", "a", "b", heads="drop", base=build("bert").to("meta"))
    assert read(given)[2] == read(memory)[2]


def test_layers_that_only_some_adapters_change_are_named_in_full(tmp_path: Path) -> None:
    first = {"target_modules": ["query", "value"], "layers_to_transform": [0]}
    adapters = tiny("bert", {"a": first, "b": {"target_modules": ["value"]}}, torch.float32)
    files, memory = both(adapters, tmp_path, "a", "b")
    equal(files, memory, config=False)
    assert all(name.startswith("bert.encoder") for name in read(files)[2]["target_modules"])
    assert ak.attach(build("bert")).load(files, "c").ok


def peft_file(folder: Path, config: Any, model: nn.Module) -> Path:
    """What PEFT itself saves, with all its numbers random."""
    import peft

    theirs = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    theirs.save_pretrained(folder)
    return folder


def test_files_of_peft_without_a_label_set(tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=3, bias="lora_only")
    folder = peft_file(tmp_path / "a", config, build("bert"))
    ak.combine_files({folder: 1.0}, tmp_path / "files", heads="a")
    adapters = ak.attach(build("bert"))
    adapters.load(folder, "a")
    adapters.combine("c", {"a": 1.0}, heads="a")
    equal(tmp_path / "files", adapters.save("c", tmp_path / "memory"), config=False)


def test_half_precision_files_are_combined_in_float32(tmp_path: Path) -> None:
    dtype = torch.bfloat16
    adapters = mixed(build("bert"))
    halves = saved(adapters, tmp_path, "a", "h")
    for folder in map(Path, halves):
        tensors, metadata, _ = read(folder)
        save_file({k: t.to(dtype) for k, t in tensors.items()}, folder / WEIGHTS, metadata)
    ak.combine_files(halves, tmp_path / "files")
    fresh = ak.attach(build("bert"))
    for folder in map(Path, halves):
        fresh.load(folder, folder.name)
    fresh.combine("c", {Path(k).name: w for k, w in halves.items()})
    equal(tmp_path / "files", fresh.save("c", tmp_path / "memory"))
    ak.combine_files(halves, tmp_path / "small", dtype=dtype)
    small, big = read(tmp_path / "small")[0], read(tmp_path / "files")[0]
    assert all(torch.equal(small[key], tensor.to(dtype)) for key, tensor in big.items())


def mixed(model: nn.Module) -> ak.Adapters:
    """A LoRA, a LoHa and a VeRA adapter."""
    adapters = ak.attach(model)
    fields: dict[str, Any] = {"target_modules": ["query", "value"], "modules_to_save": None}
    adapters.add("a", LoraConfig(r=3, rank_pattern={"value": 2}, use_rslora=True, **fields))
    adapters.add("h", LoHaConfig(r=2, alpha=3, **fields))
    adapters.add("v", VeraConfig(r=5, target_modules=["query", "intermediate.dense"], modules_to_save=None))
    for seed, name in enumerate(adapters):
        randomise(adapters, name, seed)
    return adapters


@pytest.mark.parametrize("stored", [True, False])
def test_methods_are_mixed_and_the_base_tells_what_the_tensors_do_not(stored: bool, tmp_path: Path) -> None:
    adapters = mixed(build("bert"))
    if not stored:
        adapters.add("w", VeraConfig(r=5, save_projection=False, target_modules=["query"], modules_to_save=None))
        randomise(adapters, "w", 5)
    name = "v" if stored else "w"
    equal(*both(adapters, tmp_path, "a", "h", name, base=build("bert").to("meta")))
    message = (
        r"a?: the tensors of a 'vera' adapter do not tell the sizes of the layers that it changes\. Give base=, the "
        r"folder of the model that it was trained on, of which only config\.json is read\."
    )
    with pytest.raises(ak.CheckpointError, match=message):
        ak.combine_files({tmp_path / name: 1.0}, tmp_path / "no")


def test_the_base_may_be_a_folder_or_the_one_that_the_config_names(tmp_path: Path) -> None:
    model = build("bert")
    model.config.architectures = ["BertModel"]  # without the task's head, and so without `bert.` in its names
    model.config.save_pretrained(tmp_path / "base")
    adapters = mixed(model)
    files, memory = both(adapters, tmp_path, "v", base=tmp_path / "base")
    equal(files, memory, config=False)
    fields = read(tmp_path / "v")[2] | {"base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "v" / CONFIG).write_text(json.dumps(fields), encoding="utf-8")
    ak.combine_files({tmp_path / "v": 0.7}, tmp_path / "named")
    equal(tmp_path / "named", memory, config=False)


def test_a_base_that_lacks_the_layers_is_named(tmp_path: Path) -> None:
    sources = saved(mixed(build("bert")), tmp_path, "a", "h", "v")
    message = r"The adapter changes 'bert\.encoder\.layer\.0.*', and GPT2LMHeadModel, given as its base, has no such"
    with pytest.raises(ak.CheckpointError, match=message):
        ak.combine_files(sources, tmp_path / "no", base=build("gpt2").to("meta"))


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_need_the_base_unless_the_weights_add_up_to_one(bias: str, tmp_path: Path) -> None:
    adapters = tiny("bert", {"a": {"bias": bias}, "b": {"bias": bias, "r": 2}}, torch.float32)
    build("bert").save_pretrained(tmp_path / "base")
    equal(*both(adapters, tmp_path, "a", "b", base=tmp_path / "base"))
    sources = dict.fromkeys((tmp_path / "a", tmp_path / "b"), 1.0)
    message = r"The result trains biases, and the files of 'a' do not tell .* at '.*'\. Give base="
    with pytest.raises(ak.StateError, match=message):
        ak.combine_files(sources, tmp_path / "no")
    ak.combine_files(dict(zip(sources, (0.75, 0.25), strict=True)), tmp_path / "sum")
    adapters.combine("c", {"a": 0.75, "b": 0.25})
    equal(tmp_path / "sum", adapters.save("c", tmp_path / "memory sum"))
    adapters.remove("memory")
    equal(*both(adapters, tmp_path / "again", "a", base=build("bert")))


UNTRAINED: dict[str, tuple[dict[str, dict[str, Any]], dict[str, Any]]] = {
    "of another adapter's layers": ({"a": {"bias": "lora_only", "target_modules": ["query"]}, "b": {}}, {}),
    "of a head that is left out": (
        {"a": {"bias": "all", "target_modules": ["query"], "modules_to_save": ["classifier"]}},
        {"heads": "drop"},
    ),
}


@pytest.mark.parametrize("case", UNTRAINED)
def test_biases_that_no_source_trained_are_the_bases(case: str, tmp_path: Path) -> None:
    sources, choices = UNTRAINED[case]
    build("bert").save_pretrained(tmp_path / "base")
    files, memory = both(tiny("bert", sources, torch.float32), tmp_path, *sources, base=tmp_path / "base", **choices)
    equal(files, memory)
    assert ak.attach(build("bert")).load(files, "c").ok
    with pytest.raises(ak.StateError, match="do not tell the bias that the base has at"):
        ak.combine_files(
            dict.fromkeys((tmp_path / name for name in sources), 1 / len(sources)), tmp_path / "no", **choices
        )
    if choices:
        ak.convert_file(tmp_path / "a", tmp_path / "kept", base=tmp_path / "base", heads="drop")
        assert ak.attach(build("bert")).load(tmp_path / "kept", "k").ok


@pytest.fixture
def outer() -> ModuleType:
    plugin = combining.outer_method()
    ak.register(plugin)
    return plugin


def test_a_third_partys_adapter_that_does_not_say_its_layers_needs_the_base(outer: ModuleType, tmp_path: Path) -> None:
    adapters = tiny("gpt2", {"a": {}}, torch.float32)
    adapters.add("o", outer.config(target_modules=["c_attn", "wte"], modules_to_save=None))
    randomise(adapters, "o", 3)
    with pytest.raises(ak.CheckpointError, match=r"the tensors of a 'outer' adapter do not tell"):
        both(adapters, tmp_path, "a", "o")
    equal(*both(adapters, tmp_path, "a", "o", base=build("gpt2").to("meta")))

    @ak.hookimpl
    def sizes(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        return len(tensors["outer_u"]), len(tensors["outer_v"])

    ak.default_registry.unregister("outer")
    outer.sizes = sizes  # type: ignore[attr-defined]
    ak.register(outer)  # which says its layers
    adapters = tiny("gpt2", {"a": {"target_modules": ["c_attn"]}}, torch.float32)
    adapters.add("o", outer.config(target_modules=["c_attn"], modules_to_save=None))
    randomise(adapters, "o", 3)
    equal(*both(adapters, tmp_path / "said", "a", "o"))


def test_an_embedding_that_peft_saved_in_full_is_kept_as_a_head(tmp_path: Path) -> None:
    import peft

    model = build("llama")
    model.resize_token_embeddings(40)
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    theirs = peft.get_peft_model(model, config)
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    ak.combine_files({tmp_path / "a": 1.0}, tmp_path / "files", heads="a")
    keys = {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}
    assert keys <= read(tmp_path / "files")[0].keys()
    fresh = build("llama")
    fresh.resize_token_embeddings(40)
    assert ak.attach(fresh).load(tmp_path / "files", "c").ok


def change(folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Write other tensors to the folder's file."""
    tensors, metadata, _ = read(folder)
    save_file({k: v.contiguous().clone() for k, v in edit(tensors).items()}, folder / WEIGHTS, metadata)
    return folder


def fields(folder: Path, **changes: Any) -> None:
    (folder / CONFIG).write_text(json.dumps(read(folder)[2] | changes), encoding="utf-8")


def without(folder: Path, word: str) -> None:
    change(folder, lambda tensors: {k: v for k, v in tensors.items() if word not in k})


def nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    next(iter(tensors.values())).fill_(float("nan"))
    return tensors


def wider(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: torch.cat([v, v], dim=1) if "query.lora_A" in k else v for k, v in tensors.items()}


DAMAGE: dict[str, tuple[Any, type[Exception], str]] = {
    "gone": (lambda f: (f / WEIGHTS).unlink(), ak.CheckpointError, r"has no adapter_model\.safetensors"),
    "no config": (lambda f: (f / CONFIG).unlink(), ak.CheckpointError, r"is not an adapter: it has no adapter_config"),
    "cut": (
        lambda f: os.truncate(f / WEIGHTS, (f / WEIGHTS).stat().st_size - 8),
        ak.CheckpointError,
        r"adapter_model\.safetensors is not a safetensors file, or it is damaged or cut off",
    ),
    "method": (
        lambda f: fields(f, peft_type="NOTHING"),
        ak.UnknownNameError,
        r"is an adapter of type 'NOTHING', and no plugin provides .*entry-point group 'adapterkit\.methods'",
    ),
    "nan": (lambda f: change(f, nan), ak.StateError, r"Adapter 'b' has values at '.*' that are not finite"),
    "missing": (lambda f: without(f, "0.attention.self.query.lora_B"), ak.CheckpointError, r"missing \(1\):"),
    "unexpected": (
        lambda f: change(f, lambda t: t | {"base_model.model.bert.pooler.lora_C.weight": torch.zeros(2)}),
        ak.CheckpointError,
        r"belong to nothing",
    ),
    "size": (
        lambda f: change(f, wider),
        ak.CheckpointError,
        r"'a' and 'b' are not of one base model: at '.*query' one is for a layer of",
    ),
    "rank": (lambda f: fields(f, r=7), ak.CheckpointError, r"some have other shapes"),
    "base": (
        lambda f: fields(f, base_model_name_or_path="other"),
        ak.ConfigError,
        r"trained on different bases: 'a' of 'one', 'b' of 'other'",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_bad_files_are_named_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    damage, kind, message = DAMAGE[case]
    adapters = tiny("bert", {n: {"base_model_name_or_path": "one", "target_modules": ["query"]} for n in "ab"})
    sources = saved(adapters, tmp_path, "a", "b")
    damage(tmp_path / "b")
    with pytest.raises(kind, match=message):
        ak.combine_files(sources, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    adapters = tiny("bert", {"a": {}, "b": {}}, torch.float32)
    a, b = saved(adapters, tmp_path, "a", "b")
    weights = {a: 1.0, b: 1.0}
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"sources": [a, b]}, ak.ConfigError, "combine takes adapters and their weights"),
        ({"sources": {a: float("inf")}}, ak.ConfigError, "must be a finite number"),
        ({"sources": {a: 1.0, str(a): 1.0}}, ak.ConfigError, "An adapter is named twice"),
        ({"sources": {tmp_path / "x": 1.0}}, ak.CheckpointError, "There is no folder"),
        ({"method": "x"}, ak.UnknownNameError, "Unknown method of combination 'x'"),
        ({"rank": 99}, ak.ConfigError, "rank = 99 is larger than"),
        ({"to": "loha"}, ak.UsageError, "The method 'loha' cannot be a result"),
        ({"heads": "x"}, ak.UnknownNameError, "Unknown choice of heads 'x'"),
        *(
            (
                {"dtype": dtype},
                ak.UsageError,
                rf"dtype = {dtype} must be a floating torch\.dtype of 16 bits or more, or",
            )
            for dtype in (torch.int8, torch.float8_e4m3fn)
        ),
        ({"out": a}, ak.ConfigError, r"a is an input; give the output another place"),
        ({"out": a, "overwrite": True}, ak.ConfigError, r"a is an input"),
        ({"out": tmp_path / "there"}, ak.SaveError, r"adapter_config\.json exists already\. Say overwrite=True"),
        ({"out": tmp_path / "a" / WEIGHTS}, ak.SaveError, r"safetensors is a file; the output is a folder"),
        ({"out": tmp_path / "model"}, ak.SaveError, r"model is a model's folder: it holds model\.safetensors"),
        ({"out": tmp_path / "model", "overwrite": True}, ak.SaveError, "Give the adapter a folder of its own"),
        ({"out": tmp_path / ("x" * 300)}, ak.SaveError, "cannot be written: .*File name too long"),
        ({"out": "a\0b"}, ak.SaveError, "cannot be written: .*embedded null"),
        ({"out": "/proc/none/out"}, ak.SaveError, r"Nothing can be written in /proc/none"),
    ]
    adapters.save("a", tmp_path / "there")
    build("bert").save_pretrained(tmp_path / "model")
    for given, kind, message in cases:
        with pytest.raises(kind, match=message):
            ak.combine_files(**{"sources": weights, "out": tmp_path / "out", **given})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "model", "there"]
    ak.combine_files(weights, tmp_path / "there", overwrite=True)
    assert ak.attach(build("bert")).load(tmp_path / "there", "c").ok


@pytest.mark.parametrize("naming", ["peft", "kohya", "mlx"])
def test_values_that_are_too_large_for_the_dtype_are_refused(naming: Any, tmp_path: Path) -> None:
    adapters = tiny("bert", {"a": {"target_modules": ["query"]}}, torch.float32)
    with torch.no_grad():
        next(adapters.parameters("a")).fill_(1e5)
    source, out = adapters.save("a", tmp_path / "a"), tmp_path / "out.safetensors"
    with pytest.raises(ak.SaveError, match=r"has values that are too large for torch\.float16"):
        ak.convert_file(source, out, naming=naming, dtype=torch.float16)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    found = []
    for layers in (4, 32):
        folder = tmp_path / str(layers)
        folder.mkdir()
        shapes = {"lora_A": (16, 8192), "lora_B": (8192, 16)}
        tensors = {
            f"base_model.model.layers.{i}.proj.{local}.weight": torch.randn(shape)
            for i in range(layers)
            for local, shape in shapes.items()
        }
        save_file(tensors, folder / WEIGHTS)
        config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": ["proj"]}
        (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        other = shutil.copytree(folder, tmp_path / f"other{layers}")
        out = tmp_path / f"out{layers}"
        del tensors

        def work(sources: Any = {folder: 0.5, other: 0.5}, out: Path = out) -> None:  # noqa: B006 - not changed
            options: dict[str, Any] = {"method": "ties", "density": 0.5, "space": "core", "rank": 16}
            ak.combine_files(sources, out, overwrite=True, **options)

        found.append(peak(work, tmp_path / "peak"))
    size = (tmp_path / "out32" / WEIGHTS).stat().st_size
    assert size > 32 << 20
    assert found[1] - found[0] < size / 4, found


def test_what_files_alone_take_for_a_linear_layer_loads_on_the_convolution(tmp_path: Path) -> None:
    adapters = ak.attach(build("convnet"))
    adapters.add("h", LoHaConfig(r=2, target_modules=["conv1d", "conv2d", "fc"], modules_to_save=None))
    randomise(adapters, "h", 1)
    expected = run(adapters.model, "convnet")
    ak.combine_files({adapters.save("h", tmp_path / "h"): 1.0}, tmp_path / "files")
    fresh = build("convnet")
    assert ak.attach(fresh).load(tmp_path / "files", "c").ok
    torch.testing.assert_close(run(fresh, "convnet"), expected)


def test_an_embedding_that_equals_the_bases_is_none_of_the_adapters_own(tmp_path: Path) -> None:
    import peft

    base = build("llama")
    base.save_pretrained(tmp_path / "base")
    peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], r=2)).save_pretrained(
        tmp_path / "a", save_embedding_layers=True
    )
    assert "base_model.model.model.embed_tokens.base_layer.weight" in read(tmp_path / "a")[0]
    with pytest.raises(ak.ConfigError, match=r"'a' has a head\. Choose one of heads='a'"):
        ak.combine_files({tmp_path / "a": 0.5}, tmp_path / "files")
    report = ak.combine_files({tmp_path / "a": 0.5}, tmp_path / "files", base=tmp_path / "base")
    assert report.heads == ()
    assert not [key for key in read(tmp_path / "files")[0] if "lora" not in key]


def test_files_of_other_programs_are_combined(tmp_path: Path) -> None:
    from tests.diffusion import lycoris_file, output, unet

    model = unet()
    for name, algo in (("l.safetensors", "lora"), ("h.safetensors", "loha")):
        lycoris_file(model, tmp_path / name, algo=algo)
    sources = {tmp_path / "l.safetensors": 0.7, tmp_path / "h.safetensors": -0.4}
    ak.combine_files(sources, tmp_path / "files", base=model)
    adapters = ak.attach(model)
    for number, file in enumerate(sources):
        adapters.load(file, str(number))
    adapters.combine("c", {"0": 0.7, "1": -0.4})
    adapters.activate("c", trainable=False)
    expected = output(model)
    adapters.load(tmp_path / "files", "files")
    torch.testing.assert_close(output(model), expected, rtol=0, atol=1e-6)
