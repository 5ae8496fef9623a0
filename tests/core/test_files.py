"""Adapter folders: what is read, what is refused, and that saving is all or nothing."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.core.conftest import set_parameters
from tests.core.test_errors import unchanged
from tests.models import EmbeddingNet, build
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.errors import SaveError
from adapterkit.files import folder as files
from adapterkit.files import tensors as mapping
from adapterkit.files.folder import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE
from adapterkit_lora import LoraConfig

PREFIX = "base_model.model."
QUICK = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def new() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EmbeddingNet().eval()


def config(r: int = 2, **fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": r, "target_modules": ["layers.0", "layers.1"], "modules_to_save": ["head"]} | fields)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved adapter: two layers and a head."""
    model = new()
    ak.attach(model).add("a", config())
    set_parameters(ak.attach(model), "a")
    return ak.attach(model).save("a", tmp_path / "adapter")


@pytest.fixture
def model() -> nn.Module:
    return new()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in safetensors.torch.load_file(folder / WEIGHTS_FILE).items()}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object], **metadata: str) -> None:
    """Change the tensors of a saved adapter."""
    tensors = tensors_of(folder)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt", **metadata})


def reconfigure(folder: Path, **fields: Any) -> None:
    """Change fields of a saved adapter's config."""
    values = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(values | fields))


def load(model: nn.Module, folder: str | Path, **options: Any) -> ak.LoadReport:
    return ak.attach(model).load(folder, "x", **options)


def refuse(model: nn.Module, folder: str | Path, *texts: str, error: type[Exception] = ak.CheckpointError) -> None:
    """The folder is refused with these texts, and nothing has changed."""
    with unchanged(model), pytest.raises(error) as caught:
        load(model, folder)
    for text in texts:
        assert text in str(caught.value)


# The report


def test_report_of_a_complete_file_is_empty(model: nn.Module, folder: Path) -> None:
    assert load(model, folder) == ak.LoadReport()


def test_report_names_what_is_missing(model: nn.Module, folder: Path) -> None:
    rewrite(folder, lambda t: t.pop(PREFIX + "layers.1.lora_B.weight"))
    refuse(model, folder, "does not fit adapter 'x'", "needs tensors that are missing", "layers.1.lora_B.weight")
    with pytest.warns(ak.AdapterWarning, match=r"missing \(1\)"):
        assert load(model, folder, strict=False).missing == ("layers.1.lora_B.weight",)


def test_report_names_what_is_unexpected(model: nn.Module, folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"elsewhere.lora_A.weight": torch.ones(2, 8)}))
    refuse(model, folder, "some belong to nothing on this model", "unexpected (1):\n    elsewhere.lora_A.weight")
    with pytest.warns(ak.AdapterWarning, match="unexpected"):
        assert load(model, folder, strict=False).unexpected == ("elsewhere.lora_A.weight",)


def test_report_names_what_has_another_shape(model: nn.Module, folder: Path) -> None:
    rewrite(folder, lambda t: t.update({PREFIX + "layers.0.lora_A.weight": torch.ones(3, 8)}))
    text = "layers.0.lora_A.weight: (3, 8) in the file, (2, 8) on this model"
    refuse(model, folder, "some have other shapes (another base model size, or another rank?)", text)
    with pytest.warns(ak.AdapterWarning, match="mismatched"):
        report = load(model, folder, strict=False)
    assert [str(m) for m in report.mismatched] == [text]


def test_report_names_what_is_exempt(model: nn.Module, folder: Path) -> None:
    reconfigure(folder, init_lora_weights="olora")
    report = load(model, folder)
    assert report.ok
    assert report.exempt == tuple(f"layers.{i}.lora_init_{x}" for i in (0, 1) for x in "AB")


def test_report_names_base_weights_that_were_ignored(model: nn.Module, folder: Path) -> None:
    rewrite(folder, lambda t: t.update({PREFIX + "overhead.weight": model.overhead.weight.detach()}))
    report = load(model, folder)
    assert report.ok
    assert report.ignored == ("overhead.weight",)


def test_base_weights_that_are_not_the_models_are_unexpected(model: nn.Module, folder: Path) -> None:
    rewrite(folder, lambda t: t.update({PREFIX + "overhead.weight": torch.zeros(8, 8)}))
    refuse(model, folder, "unexpected (1):\n    overhead.weight")


def test_names_of_python_attributes_are_no_base_weights(model: nn.Module, folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"overhead.forward": torch.zeros(1), "layers.training.x": torch.zeros(1)}))
    refuse(model, folder, "unexpected (2)")


@pytest.mark.parametrize(
    "prefix", ["model.", "base_model.model.base_model.model.", "module.", "base_model.model.model."]
)
def test_keys_under_a_wrong_prefix_are_never_dropped(model: nn.Module, folder: Path, prefix: str) -> None:
    def hide(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[prefix + key.removeprefix(PREFIX)] = tensors.pop(key)

    rewrite(folder, hide)
    refuse(model, folder, "missing (6)", "unexpected (6)")


def test_prefix_of_peft_is_optional(model: nn.Module, folder: Path) -> None:
    rewrite(folder, lambda t: [t.update({k.removeprefix(PREFIX): t.pop(k)}) for k in list(t)])
    assert load(model, folder) == ak.LoadReport()


def test_tensor_with_and_without_the_prefix_is_refused(model: nn.Module, folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"layers.0.lora_A.weight": torch.ones(2, 8)}))
    refuse(model, folder, "There are two tensors for 'layers.0.lora_A.weight': with and without PEFT's prefix.")


def test_not_strict_fills_what_is_missing_with_initial_values(model: nn.Module, folder: Path) -> None:
    rewrite(folder, lambda t: [t.pop(k) for k in list(t) if "layers.1" in k])
    with pytest.warns(ak.AdapterWarning):
        load(model, folder, strict=False)
    found = dict(ak.attach(model).named_parameters("x"))
    assert not found["layers.1.lora_B.weight"].any()
    assert found["layers.1.lora_A.weight"].abs().max() > 0
    assert torch.equal(found["layers.0.lora_A.weight"], tensors_of(folder)[PREFIX + "layers.0.lora_A.weight"])
    model(torch.tensor([[1, 2]]))


def test_not_strict_keeps_the_models_head_where_the_file_has_none(model: nn.Module, folder: Path) -> None:
    rewrite(folder, lambda t: [t.pop(k) for k in list(t) if "head" in k])
    with pytest.warns(ak.AdapterWarning):
        load(model, folder, strict=False)
    assert torch.equal(dict(ak.attach(model).named_parameters("x"))["head.weight"], model.head.weight)


def test_load_state_dict_that_does_not_fit_changes_nothing(model: nn.Module, folder: Path) -> None:
    adapters = ak.attach(model)
    adapters.add("x", config())
    tensors = tensors_of(folder)
    tensors.pop(PREFIX + "head.bias")
    with unchanged(model), pytest.raises(ak.CheckpointError, match="The state dict does not fit adapter 'x'"):
        adapters.load_state_dict("x", tensors)
    with pytest.warns(ak.AdapterWarning):
        assert adapters.load_state_dict("x", tensors, strict=False).missing == ("head.bias",)


def test_file_of_a_model_of_another_size(folder: Path) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(12, 12) for _ in range(2)), "head": nn.Linear(12, 3)})
    refuse(model, folder, "another base model size", "mismatched (5)")


def test_file_of_a_model_with_fewer_layers(folder: Path) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 8)]), "head": nn.Linear(8, 3)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ak.AdapterWarning)
        refuse(model, folder, "unexpected (2)")


def test_embeddings_with_other_rows_say_to_resize(folder: Path) -> None:
    model = build("bert")
    ak.attach(model).add("a", LoraConfig(r=2))
    ak.attach(model).save("a", folder)
    key = "bert.embeddings.word_embeddings"
    rewrite(folder, lambda t: t.update({f"{PREFIX}{key}.weight": torch.ones(40, 16)}))
    refuse(
        model,
        folder,
        f"The file holds its own '{key}' with 40 rows; the model's has 32. It was trained with a resized vocabulary: "
        "call model.resize_token_embeddings(40) first.",
    )


def test_embeddings_that_are_no_table(model: nn.Module, folder: Path) -> None:
    rewrite(folder, lambda t: t.update({PREFIX + "embed.weight": torch.tensor(1.0)}))
    refuse(model, folder, "The file holds 'embed.weight' of shape (); a table of embeddings has two dimensions.")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_floating_dtypes_are_taken(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder, lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    assert load(model, folder).ok
    assert {p.dtype for p in ak.attach(model).parameters("x")} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool], ids=str)
def test_integers_are_refused(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder, lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    refuse(model, folder, f"holds {dtype}, and floating numbers are needed: it is quantised, or damaged.")


def test_base_weight_in_float8_is_compared(model: nn.Module, folder: Path) -> None:
    value = model.overhead.weight.detach().to(torch.float8_e4m3fn)
    rewrite(folder, lambda t: t.update({PREFIX + "overhead.weight": value}))
    assert load(model, folder).ignored == ("overhead.weight",)


# Files that are damaged, or something else


def overwrite(data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS_FILE).write_bytes(data)


def only(name: str) -> Callable[[Path], object]:
    """The weights under another name."""
    return lambda folder: (folder / WEIGHTS_FILE).rename(folder / name)


def text(data: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / CONFIG_FILE).write_bytes(data if isinstance(data, bytes) else data.encode())


def fields(**values: Any) -> Callable[[Path], object]:
    return lambda folder: reconfigure(folder, **values)


def full_model(folder: Path) -> None:
    (folder / CONFIG_FILE).rename(folder / "config.json")
    (folder / WEIGHTS_FILE).rename(folder / "model.safetensors")


DAMAGED = {
    "empty": (overwrite(b""), "is not a safetensors file, or it is damaged or cut off"),
    "short": (overwrite(b"abc"), "is not a safetensors file, or it is damaged or cut off"),
    "half": (
        lambda f: overwrite((f / WEIGHTS_FILE).read_bytes()[:-100])(f),
        "or it is damaged or cut off",
    ),
    "header of 2**63 bytes": (overwrite(struct.pack("<Q", 2**63) + b"{}"), "Fetch or save it again."),
    "header longer than the file": (
        overwrite(struct.pack("<Q", 10**6) + b"{}"),
        "is not a safetensors file, or it is damaged or cut off",
    ),
    "header that is no JSON": (
        overwrite(struct.pack("<Q", 2) + b"[["),
        "is not a safetensors file, or it is damaged or cut off",
    ),
    "a web page": (
        overwrite(b"<!DOCTYPE html><html>Access denied</html>"),
        "is not a safetensors file, or it is damaged or cut off",
    ),
    "a pointer of git lfs": (
        overwrite(b"version https://git-lfs.github.com/spec/v1\noid"),
        "is not a safetensors file, or it is damaged or cut off",
    ),
    "tensors of an unknown dtype": (
        lambda f: overwrite((f / WEIGHTS_FILE).read_bytes().replace(b'"F32"', b'"F99"'))(f),
        "unknown variant `F99`",
    ),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), "Found: adapter_config.json. Only its config is there."),
    "sharded": (
        only("adapter_model-00001-of-00002.safetensors"),
        "It is sharded, which no adapter format is: join the shards into one file.",
    ),
    "renamed": (
        only("pytorch_lora_weights.safetensors"),
        "Rename the adapter's weights to adapter_model.safetensors if one of these holds them.",
    ),
    "no config": (
        lambda f: (f / CONFIG_FILE).unlink(),
        "is no adapter: it has no adapter_config.json. It holds adapter_model.safetensors.",
    ),
    "a full model": (full_model, "it has no adapter_config.json. It holds config.json, model.safetensors."),
    "an empty folder": (
        lambda f: [p.unlink() for p in list(f.iterdir())],
        "it has no adapter_config.json. It is empty.",
    ),
    "a config that is a list": (text("[]"), "adapter_config.json must hold a JSON object, not a list."),
    "a config that is a number": (text("3"), "must hold a JSON object, not a int."),
    "a config that is null": (text("null"), "must hold a JSON object, not a NoneType."),
    "an empty config": (text(""), "adapter_config.json is no valid JSON: Expecting value"),
    "half a config": (text('{"peft_type": "LO'), "adapter_config.json is no valid JSON"),
    "a config in latin-1": (text(b'{"peft_type": "\xe4"}'), "adapter_config.json is no valid JSON"),
    "a config nested without end": (text("[" * 100_000), "adapter_config.json is no valid JSON"),
    "a number without end": (text('{"r": ' + "9" * 10_000 + "}"), "adapter_config.json is no valid JSON"),
    "no type": (text("{}"), "adapter_config.json has no 'peft_type', so its method is not known."),
    "a type that is no text": (fields(peft_type=3), "adapter_config.json has no 'peft_type'"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_folder(model: nn.Module, folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    refuse(model, folder, message, str(folder))


def test_config_that_may_not_be_read(model: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path, **_: Any) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    refuse(model, folder, "adapter_config.json cannot be read: [Errno 13] Permission denied")


WRONG_FIELDS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank as text": ({"r": "8"}, ak.ConfigError, "LoraConfig: r = '8' is a str; it must be int."),
    "rank null": ({"r": None}, ak.ConfigError, "r = None is a NoneType; it must be int."),
    "rank nan": ({"r": float("nan")}, ak.ConfigError, "r = nan is a float; it must be int."),
    "rank zero": ({"r": 0}, ak.ConfigError, "r = 0: a rank must be at least 1."),
    "alpha infinite": ({"lora_alpha": float("inf")}, ak.ConfigError, "it must be a finite float32."),
    "targets an object": ({"target_modules": {"q": 1}}, ak.ConfigError, "must be str or a list of str or None"),
    "targets missing here": (
        {"target_modules": ["q_proj"]},
        ak.SelectionError,
        "['q_proj'] matched none",
    ),
    "pattern that is none": ({"target_modules": "(("}, ak.ConfigError, "is no valid regular expression"),
    "DoRA": ({"use_dora": True}, ak.UnsupportedError, "use_dora = True is not implemented by the method 'lora' here"),
    "parameters": ({"target_parameters": ["w"]}, ak.UnsupportedError, "target_parameters = ['w'] is not implemented"),
    "EVA": ({"eva_config": {"rho": 2.0}}, ak.UnsupportedError, "eva_config = {'rho': 2.0} is not implemented"),
    "a start of PEFT": (
        {"init_lora_weights": "eva"},
        ak.UnsupportedError,
        "init_lora_weights = 'eva' is an option of PEFT",
    ),
    "a field of next year": ({"use_magic": 7}, ak.UnsupportedError, "use_magic = 7 is not implemented"),
    "nested": (
        {"target_modules": json.loads("[" * 400 + "]" * 400)},
        ak.ConfigError,
        "",
    ),
}


@pytest.mark.parametrize(("values", "error", "message"), WRONG_FIELDS.values(), ids=WRONG_FIELDS.keys())
def test_config_with_a_wrong_field(
    model: nn.Module, folder: Path, values: dict[str, Any], error: type[Exception], message: str
) -> None:
    reconfigure(folder, **values)
    refuse(model, folder, message, error=error)


@pytest.mark.parametrize("value", [None, False, {}, [], ""], ids=repr)
def test_unknown_field_that_changes_nothing_is_kept_and_written_back(
    model: nn.Module, folder: Path, tmp_path: Path, value: Any
) -> None:
    reconfigure(folder, next_years=value)
    load(model, folder)
    written = ak.attach(model).save("x", tmp_path / "again")
    assert json.loads((written / CONFIG_FILE).read_text())["next_years"] == value


def test_pissa_factors_of_a_random_start_alone(model: nn.Module, folder: Path) -> None:
    reconfigure(folder, init_lora_weights="pissa_niter_4")
    text = "These are the trained factors of init_lora_weights='pissa_niter_4' alone."
    refuse(model, folder, text, "save the adapter in its converted form instead.")


def test_type_that_no_plugin_provides(model: nn.Module, folder: Path) -> None:
    reconfigure(folder, peft_type="BONE")
    installed = ", ".join(map(str, ak.methods().values()))
    refuse(
        model,
        folder,
        "is an adapter of type 'BONE', and no plugin provides the method 'bone'.",
        f"Installed methods: {installed} (entry-point group 'adapterkit.methods'). Install the package of that one.",
        error=ak.UnknownNameError,
    )
    assert "lora (adapterkit " in installed


def test_modules_to_save_that_neither_model_nor_file_has_is_passed_over(model: nn.Module, folder: Path) -> None:
    reconfigure(folder, modules_to_save=["classifier", "head"])
    assert load(model, folder) == ak.LoadReport()


def test_modules_to_save_that_the_file_has_and_the_model_has_not(model: nn.Module, folder: Path) -> None:
    reconfigure(folder, modules_to_save=["classifier"])
    rewrite(folder, lambda t: t.update({PREFIX + "classifier.weight": torch.ones(3, 8)}))
    refuse(model, folder, "modules_to_save 'classifier' matched no module", error=ak.SelectionError)


LABEL_SETS = {
    "no JSON": "{0:",
    "a list": '["a", "b", "c"]',
    "gaps": '{"0": "a", "2": "b"}',
    "names for numbers": '{"a": 0}',
    "nested": '{"0":' * 50_000,
    "empty": "{}",
    "a number": "3",
}


@pytest.mark.parametrize("labels", LABEL_SETS.values(), ids=LABEL_SETS.keys())
def test_label_set_that_is_malformed(model: nn.Module, folder: Path, labels: str) -> None:
    rewrite(folder, lambda t: None, **{"adapterkit.id2label": labels})
    refuse(model, folder, "The file's label set is malformed: ")


def test_label_set_of_another_size_than_the_head(tmp_path: Path) -> None:
    model = build("bert")
    ak.attach(model).add("a", LoraConfig(r=2))
    folder = ak.attach(model).save("a", tmp_path / "a")
    labels = json.dumps({str(i): f"L{i}" for i in range(9)})
    rewrite(folder, lambda t: None, **{"adapterkit.id2label": labels})
    refuse(model, folder, "the file's label set has 9 classes, and no layer of its heads has that many rows.")


# Any bytes, any JSON


def only_adapter_errors(model: nn.Module, folder: Path) -> None:
    """Loading either works or raises `AdapterError`, and leaves nothing behind."""
    adapters = ak.attach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapters.load(folder, "x")
        except ak.AdapterError:
            assert "x" not in adapters
        else:
            model(torch.tensor([[1, 2]]))
            adapters.remove("x")


@st.composite
def damage(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` with bytes changed, cut out, put in, or its end missing; most often in its first part."""
    result = bytearray(data)
    places = st.integers(0, len(data) - 1) | st.integers(0, min(600, len(data) - 1))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(places)
        match draw(st.sampled_from(["change", "cut", "insert", "end", "digit"])):
            case "change":
                result[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
            case "cut":
                del result[place : place + draw(st.integers(1, 40))]
            case "insert":
                result[place:place] = draw(st.binary(max_size=20))
            case "end":
                del result[place:]
            case _:
                result[place : place + 1] = draw(st.sampled_from([b"0", b"9", b"F", b"I", b'"', b"["]))
    return bytes(result)


@QUICK
@given(draw=st.data())
def test_any_safetensors_bytes_load_or_raise_an_adapter_error(
    tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject
) -> None:
    folder, data = reference(tmp_path_factory)
    (folder / WEIGHTS_FILE).write_bytes(draw.draw(damage(data)))
    only_adapter_errors(new(), folder)


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "old"])
@QUICK
@given(draw=st.data())
def test_any_pickle_bytes_load_or_raise_an_adapter_error(
    tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject, old_format: bool
) -> None:
    folder, _ = reference(tmp_path_factory)
    good = tensors_of_reference(tmp_path_factory)
    (folder / WEIGHTS_FILE).unlink(missing_ok=True)
    torch.save(good, folder / PICKLE_FILE, _use_new_zipfile_serialization=not old_format)
    data = (folder / PICKLE_FILE).read_bytes()
    (folder / PICKLE_FILE).write_bytes(draw.draw(damage(data)))
    only_adapter_errors(new(), folder)
    (folder / PICKLE_FILE).unlink()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted({*LoraConfig.__dataclass_fields__, *LoraConfig.not_implemented, "peft_type", "extra", "new"})


@QUICK
@given(values=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
def test_any_json_loads_or_raises_an_adapter_error(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    folder, data = reference(tmp_path_factory)
    (folder / WEIGHTS_FILE).write_bytes(data)
    good = (folder / CONFIG_FILE).read_text()
    reconfigure(folder, **values)
    try:
        only_adapter_errors(new(), folder)
    finally:
        (folder / CONFIG_FILE).write_text(good)


_reference: dict[str, Any] = {}


def reference(factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """One saved adapter for all examples: its folder, and the bytes of its weights."""
    if not _reference:
        folder = factory.mktemp("reference") / "adapter"
        model = new()
        ak.attach(model).add("a", config())
        ak.attach(model).save("a", folder)
        _reference.update(folder=folder, data=(folder / WEIGHTS_FILE).read_bytes(), tensors=tensors_of(folder))
    return _reference["folder"], _reference["data"]


def tensors_of_reference(factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    reference(factory)
    found: dict[str, Tensor] = _reference["tensors"]
    return found


# The old format


def as_pickle(folder: Path, content: object) -> None:
    (folder / WEIGHTS_FILE).unlink()
    torch.save(content, folder / PICKLE_FILE)


def test_bin_file_loads(model: nn.Module, folder: Path) -> None:
    tensors = tensors_of(folder)
    as_pickle(folder, tensors)
    assert load(model, folder) == ak.LoadReport()
    for key, value in ak.attach(model).state_dict("x").items():
        assert torch.equal(value, tensors[key])


class Malicious:
    """Runs a command when it is unpickled without care."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("old_format", [False, True], ids=["torch.save", "plain pickle"])
def test_bin_file_that_runs_code_is_refused(model: nn.Module, folder: Path, tmp_path: Path, old_format: bool) -> None:
    evil = Malicious(f"touch {tmp_path / 'ran'}")
    if old_format:
        (folder / WEIGHTS_FILE).unlink()
        (folder / PICKLE_FILE).write_bytes(pickle.dumps({"a": evil}, protocol=2))
    else:
        as_pickle(folder, {"a": evil})
    refuse(model, folder, "adapter_model.bin cannot be read as a file of tensors only: ")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {1: torch.ones(1)}, torch.ones(2), None], ids=repr)
def test_bin_file_of_other_things(model: nn.Module, folder: Path, content: object) -> None:
    as_pickle(folder, content)
    refuse(model, folder, "adapter_model.bin holds no mapping from names to tensors.")


def test_bin_file_of_sparse_tensors(model: nn.Module, folder: Path) -> None:
    as_pickle(folder, {k: v.to_sparse() for k, v in tensors_of(folder).items()})
    refuse(model, folder, "adapter_model.bin holds no mapping from names to tensors.")


# Where an adapter is looked for


SOURCES: dict[str, tuple[Any, type[Exception], str]] = {
    "a number": (5, ak.ConfigError, "5 is no folder: give its path, as text or as a pathlib.Path."),
    "None": (None, ak.ConfigError, "None is no folder"),
    "nothing": ("", ak.ConfigError, "'' is no folder"),
    "nobody's home": ("~nobody_at_all/x", ak.ConfigError, "'~nobody_at_all/x' is no folder"),
    "no folder": ("./nowhere/at/all", ak.CheckpointError, "There is no folder './nowhere/at/all' (working directory: "),
    "no folder as a path": (Path("nowhere"), ak.CheckpointError, "There is no folder 'nowhere'"),
    "a long name": ("a" * 300, ak.CheckpointError, "is no folder here (working directory: "),
    "a long path": ("a/" * 3000, ak.CheckpointError, "There is no folder 'a/a/"),
    "NUL": ("a\0b", ak.CheckpointError, "is no folder here"),
    "no hub id": ("what is this?", ak.CheckpointError, "it is no name that a repository can have."),
    "a file": ("style.safetensors", ak.CheckpointError, "There is no folder 'style.safetensors'"),
}


@pytest.mark.parametrize(("source", "error", "message"), SOURCES.values(), ids=SOURCES.keys())
def test_source_that_is_none(
    model: nn.Module, source: Any, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refuse(model, source, message, error=error)


def test_a_path_that_is_nearly_right_is_not_asked_of_the_hub(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapters/mood").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    refuse(model, "adapters/moods", "Nearest: 'adapters/mood'.", error=ak.CheckpointError)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ak.CheckpointError, match=r"'x/nowhere' is no folder here .*: it is not in the cache"):
        ak.skeleton("x/nowhere")


def test_file_instead_of_a_folder(model: nn.Module, folder: Path) -> None:
    text = "is a file; give the folder that holds adapter_config.json and adapter_model.safetensors."
    refuse(model, folder / WEIGHTS_FILE, text)


SHA = "0123456789012345678901234567890123456789"


@pytest.fixture
def cache(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """huggingface_hub's cache with one repository, which has the adapter at its root and in a subfolder; no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache" / "models--someone--adapter"
    snapshot = repository / "snapshots" / SHA
    shutil.copytree(folder, snapshot)
    shutil.copytree(folder, snapshot / "german")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(SHA)
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "options",
    [{}, {"subfolder": "german"}, {"revision": "main"}, {"revision": SHA}],
    ids=lambda o: ",".join(o) or "root",
)
def test_hub_id_in_the_cache_loads(model: nn.Module, cache: Path, options: dict[str, str]) -> None:
    assert load(model, "someone/adapter", cache_dir=cache, **options) == ak.LoadReport()


@pytest.mark.parametrize(
    ("source", "options"),
    [("someone/other", {}), ("someone/adapter", {"revision": "v2"}), ("nowhere", {})],
    ids=["repository", "revision", "name"],
)
def test_hub_id_that_is_not_there_is_refused_without_waiting(
    model: nn.Module, cache: Path, source: str, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it asks the network"))
    with unchanged(model), pytest.raises(ak.CheckpointError) as caught:
        load(model, source, cache_dir=cache, **options)
    assert f"{source!r} is no folder here" in str(caught.value)
    assert "and could not be had from the hub or its cache: it is not in the cache, and HF_HUB" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_subfolder_that_the_repository_has_not(model: nn.Module, cache: Path) -> None:
    with unchanged(model), pytest.raises(ak.CheckpointError, match="There is no such folder"):
        load(model, "someone/adapter", cache_dir=cache, subfolder="french")


def test_hub_repository_that_is_no_adapter(model: nn.Module, cache: Path) -> None:
    (cache / "models--someone--adapter" / "snapshots" / SHA / CONFIG_FILE).unlink()
    with unchanged(model), pytest.raises(ak.CheckpointError, match=r"it has no adapter_config\.json"):
        load(model, "someone/adapter", cache_dir=cache)


# Saving


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@contextmanager
def not_saved(model: nn.Module, parent: Path, message: str) -> Iterator[None]:
    """Saving raises, and every file under `parent` is what and where it was."""
    before = contents(parent)
    with unchanged(model), pytest.raises(ak.SaveError) as caught:
        yield
    assert message in str(caught.value)
    assert "The adapter cannot be saved to " in str(caught.value)
    assert "What was there before is untouched." in str(caught.value)
    assert contents(parent) == before
    assert not [p for p in parent.rglob(".*") if p.is_dir()]


def adapted(r: int = 2, alpha: float = 1.0) -> nn.Module:
    """A model whose adapter's every number is `alpha`, so that config and weights can be held against each other."""
    model = new()
    ak.attach(model).add("a", config(r, lora_alpha=alpha))
    with torch.no_grad():
        for parameter in ak.attach(model).parameters("a"):
            parameter.fill_(alpha)
    return model


def whole(folder: Path) -> float:
    """The version a folder holds, known by its alpha; fails if config and weights are of two versions."""
    found = files.read(folder)
    alpha, r = found.config["lora_alpha"], found.config["r"]
    assert all((t == alpha).all() for t in found.tensors.values())
    assert found.tensors[PREFIX + "layers.0.lora_A.weight"].shape[0] == r
    return float(alpha)


@pytest.mark.parametrize("old", [None, "same config", "another config"])
def test_full_disk_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, old: str | None) -> None:
    model = adapted(2 if old == "same config" else 3)
    target = folder if old else folder.parent / "new"

    def full(tensor: torch.Tensor) -> memoryview:  # after the header
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(mapping, "as_bytes", full)
    with not_saved(model, folder.parent, "No space left on device"):
        ak.attach(model).save("a", target)
    assert target.exists() == bool(old)


@pytest.mark.parametrize("hidden", [8, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_file_is_what_safetensors_itself_writes(tmp_path: Path, hidden: int, dtype: torch.dtype) -> None:
    up = torch.randn(hidden, 4).to(dtype)
    tensors = {"b.ä": up, "a": up.t(), "same": up, "wide": torch.randn(3).double(), "none": torch.zeros(0, 2)}
    mapping.write_tensors(tensors, tmp_path / "ours", {"format": "pt"})
    own = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(own, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_dtype_that_files_lack_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ak.SaveError, match="safetensors files have no torch"):
        mapping.write_tensors({"a": torch.zeros(2, dtype=torch.complex128)}, tmp_path / "a", {})


def mount(folder: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no permission to mount")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_really_full_disk_changes_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", disk], capture_output=True, check=False
    ).returncode:
        pytest.skip("no permission to mount")
    try:
        ak.attach(small := adapted(1)).save("a", disk / "a")
        with not_saved(small, disk, "pace"):
            ak.attach(model := adapted(400)).save("a", disk / "a")
        assert len(ak.attach(model)) == 1
        assert whole(disk / "a") == 1.0
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_folder_that_is_a_mount_is_saved_to(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount(disk, "size=1m")
    try:
        for r, alpha in ((1, 1.0), (1, 2.0), (3, 3.0)):
            ak.attach(adapted(r, alpha)).save("a", disk)
            assert whole(disk) == alpha
        assert sorted(p.name for p in disk.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder of our own, all that this process may write to meanwhile."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        if root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if root:
                os.seteuid(0)
            for path in [folder, *folder.rglob("*")]:
                path.chmod(0o777)


@pytest.mark.parametrize("old", [None, "same config", "another config"])
def test_read_only_folder_changes_nothing(unprivileged: Path, old: str | None) -> None:
    parent = unprivileged / "parent"
    parent.mkdir()
    if old:
        ak.attach(adapted(2)).save("a", parent / "a")
        (parent / "a").chmod(0o555)
    parent.chmod(0o555)
    model = adapted(2 if old == "same config" else 3, 4.0)
    with not_saved(model, parent, "ermission denied"):
        ak.attach(model).save("a", parent / "a")


@pytest.mark.parametrize("r", [2, 3], ids=["same config", "another config"])
def test_writable_folder_in_a_read_only_one_is_saved_to(unprivileged: Path, r: int) -> None:
    parent = unprivileged / "parent"
    parent.mkdir()
    ak.attach(adapted(2)).save("a", parent / "a")
    parent.chmod(0o555)
    ak.attach(adapted(r, 5.0)).save("a", parent / "a")
    assert whole(parent / "a") == 5.0


def test_read_only_folder_is_not_replaced_although_its_parent_is_writable(unprivileged: Path) -> None:
    ak.attach(adapted(2)).save("a", unprivileged / "a")
    (unprivileged / "a").chmod(0o555)
    with not_saved(model := adapted(3), unprivileged, "ermission denied"):
        ak.attach(model).save("a", unprivileged / "a")


def test_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with not_saved(model := adapted(), tmp_path, ""):
        ak.attach(model).save("a", tmp_path / "a")


def test_config_that_is_no_json(tmp_path: Path) -> None:
    model = new()
    ak.attach(model).add("a", config(extra={"when": object()}))
    with (
        unchanged(model),
        pytest.raises(ak.ConfigError, match="The config cannot be written as JSON: Object of type obj"),
    ):
        ak.attach(model).save("a", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_adapter_without_values_is_not_saved(tmp_path: Path) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(4, 4, device="meta")})
    ak.attach(model).add("a", LoraConfig(r=2, target_modules=["fc"]))
    with pytest.raises(ak.AdapterError, match=r"Adapter 'a' has no values to save: .* is on the meta device"):
        ak.attach(model).save("a", tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_folders_above_are_made(tmp_path: Path) -> None:
    assert whole(ak.attach(adapted()).save("a", tmp_path / "x" / "y" / "a")) == 1.0


@pytest.mark.parametrize("r", [2, 3], ids=["same config", "another config"])
def test_other_files_are_kept(tmp_path: Path, r: int) -> None:
    target = ak.attach(adapted()).save("a", tmp_path / "a")
    (target / "README.md").write_text("mine")
    (target / "logs" / "deep").mkdir(parents=True)
    (target / "logs" / "deep" / "run.txt").write_text("42")
    (target / "link").symlink_to("README.md")
    target.chmod(0o750)
    ak.attach(adapted(r, 7.0)).save("a", target)
    assert whole(target) == 7.0
    assert (target / "README.md").read_text() == (target / "link").read_text() == "mine"
    assert (target / "link").is_symlink()
    assert (target / "logs" / "deep" / "run.txt").read_text() == "42"
    assert target.stat().st_mode & 0o777 == 0o750
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("r", [2, 3], ids=["same config", "another config"])
def test_linked_folder_is_saved_to_behind_the_link(tmp_path: Path, r: int) -> None:
    real = ak.attach(adapted()).save("a", tmp_path / "real")
    (tmp_path / "link").symlink_to(real)
    ak.attach(adapted(r, 7.0)).save("a", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert whole(real) == whole(tmp_path / "link") == 7.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_link_to_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    ak.attach(adapted()).save("a", tmp_path / "link")
    assert whole(tmp_path / "real") == 1.0


@pytest.mark.parametrize("r", [2, 3], ids=["same config", "another config"])
def test_working_directory_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, r: int) -> None:
    ak.attach(adapted()).save("a", tmp_path / "a")
    monkeypatch.chdir(tmp_path / "a")
    ak.attach(adapted(r, 7.0)).save("a", ".")
    assert Path.cwd() == tmp_path / "a"
    assert whole(Path()) == whole(tmp_path / "a") == 7.0


@pytest.mark.parametrize("r", [2, 3], ids=["same config", "another config"])
def test_weights_of_the_old_format_go(tmp_path: Path, r: int) -> None:
    target = ak.attach(adapted()).save("a", tmp_path / "a")
    as_pickle(target, {})
    ak.attach(adapted(r, 7.0)).save("a", target)
    assert sorted(p.name for p in target.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_saved_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        target = ak.attach(adapted()).save("a", tmp_path / "a")
    finally:
        os.umask(before)
    assert target.stat().st_mode & 0o777 == 0o750
    assert {p.stat().st_mode & 0o777 for p in target.iterdir()} == {0o640}


def test_any_number_of_savers_may_save_to_one_folder_at_once(tmp_path: Path) -> None:
    savers, folders, failed = 4, 20, []
    begin, inside = threading.Barrier(savers), threading.Semaphore(1)

    def write_alone(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        if not inside.acquire(blocking=False):
            failed.append("two at once")
            return
        time.sleep(0.005)  # the others come here meanwhile, if nothing stops them
        mapping.write_tensors(tensors, path, metadata)
        inside.release()

    def save(saver: int) -> None:
        for number in range(folders):
            begin.wait()
            try:
                files.write_folder(
                    tmp_path / str(number // 2), {"r": saver}, {"a": torch.full((2,), saver)}, {}, write_alone
                )
            except SaveError as error:
                failed.append(str(error))

    threads = [threading.Thread(target=save, args=(saver,)) for saver in range(savers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(list(tmp_path.iterdir())) == folders // 2
    for folder in tmp_path.iterdir():
        found = files.read(folder)
        assert found.config == {"r": int(found.tensors["a"][0])}


NEW, OLD = {"r": 1, "of": "new"}, {"r": 2, "of": "old"}


@pytest.fixture
def cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `OLD`, in which a save of `NEW` ended between the weights and the config."""
    place, replace = tmp_path / "a", Path.replace

    def end_before_config(path: Path, target: Path) -> Path:
        if target.name == CONFIG_FILE:
            raise OSError("the process ends here")
        return replace(path, target)

    files.write_folder(place, OLD, {"a": torch.zeros(2)}, {})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", end_before_config)
        with pytest.raises(SaveError):
            files.write_folder(place, NEW, {"a": torch.ones(2)}, {})
    assert json.loads((place / CONFIG_FILE).read_text()) == OLD
    return place


def test_a_save_that_was_cut_between_its_two_files_is_the_new_version(cut: Path) -> None:
    found = files.read(cut)
    assert (found.config, found.tensors["a"].tolist()) == (NEW, [1, 1])
    assert files.read_config(cut) == NEW


@pytest.mark.parametrize("again", [NEW, OLD, {"r": 3}], ids=["new", "old", "another"])
def test_a_save_after_one_that_was_cut_is_whole(cut: Path, again: dict[str, Any]) -> None:
    files.write_folder(cut, again, {"a": torch.full((2,), 7.0)}, {})
    found = files.read(cut)
    assert (found.config, found.tensors["a"].tolist()) == (again, [7, 7])
    assert json.loads((cut / CONFIG_FILE).read_text()) == again


def test_a_cut_save_to_a_folder_without_a_config_is_the_new_version(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    files.write_folder(tmp_path, NEW, {"a": torch.ones(2)}, {})
    (tmp_path / CONFIG_FILE).unlink()
    assert files.read(tmp_path).config == NEW


def test_a_config_that_was_edited_by_hand_counts(cut: Path) -> None:
    (cut / CONFIG_FILE).write_text(json.dumps(OLD | {"of": "hand"}))
    assert files.read(cut).config == OLD | {"of": "hand"}
    files.write_folder(cut, NEW, {"a": torch.ones(2)}, {})
    (cut / CONFIG_FILE).write_text(json.dumps(NEW | {"of": "hand"}))
    assert files.read(cut).config == files.read_config(cut) == NEW | {"of": "hand"}


def test_only_weights_that_replace_another_config_hold_theirs(tmp_path: Path) -> None:
    for config in (OLD, OLD):
        files.write_folder(tmp_path / "a", config, {"a": torch.ones(2)}, {})
        assert files.read(tmp_path / "a").metadata == {"format": "pt"}
    files.write_folder(tmp_path / "a", NEW, {"a": torch.ones(2)}, {})
    assert json.loads(files.read(tmp_path / "a").metadata["adapterkit.config"]) == NEW


SAVER = """
import itertools, os, signal, sys, warnings
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import adapterkit as ak
from tests.core.test_files import adapted
models = [adapted(r, alpha) for r, alpha in ((2, 1.0), (3, 2.0), (3, 2.0), (5, 3.0))]
target = sys.argv[1]
ak.attach(models[0]).save("a", target)
for line in sys.stdin:  # each line: a child that saves until it is killed
    child = os.fork()
    if not child:
        for model in itertools.cycle(models):
            ak.attach(model).save("a", target)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


@contextmanager
def saver(target: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that saves versions of an adapter to `target`, in a child that may be killed, as often as asked."""
    script = SAVER.format(root=str(Path(__file__).parents[2]))
    with subprocess.Popen(
        [sys.executable, "-c", script, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()


def start(process: subprocess.Popen[str]) -> int:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def kill(process: subprocess.Popen[str], child: int) -> None:
    os.kill(child, signal.SIGKILL)
    assert process.stdout is not None
    assert process.stdout.readline() == "dead\n"


def test_reader_beside_a_writer_sees_whole_versions(tmp_path: Path) -> None:
    target = tmp_path / "a"
    with saver(target) as process:
        child = start(process)
        try:
            versions = {whole(target) for _ in range(100)}
            while len(versions) == 1:  # a busy machine has not written anything yet
                versions.add(whole(target))
        finally:
            kill(process, child)


def test_folder_that_changes_under_every_reading_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = iter(range(1000))
    monkeypatch.setattr(files, "_version", lambda folder: [next(counter)])
    with pytest.raises(ak.CheckpointError, match="is being written again and again; load it when that is over"):
        files.read(folder)


def test_nothing_is_random_while_loading(model: nn.Module, folder: Path) -> None:
    state = torch.random.get_rng_state()
    load(model, folder)
    assert torch.equal(state, torch.random.get_rng_state())


def test_loading_copies_the_file(model: nn.Module, folder: Path) -> None:
    """Training a loaded adapter must not write through to the file, nor fail when the file goes."""
    load(model, folder, trainable=True)
    before = (folder / WEIGHTS_FILE).read_bytes()
    with torch.no_grad(), nullcontext():
        for parameter in ak.attach(model).parameters("x"):
            parameter.add_(1.0)
    assert (folder / WEIGHTS_FILE).read_bytes() == before


@pytest.mark.parametrize("options", [{}, {"dtype": "file"}], ids=["dtype of the model", "dtype of the file"])
def test_loaded_tensors_have_memory_of_their_own_where_torch_puts_it(
    model: nn.Module, folder: Path, options: dict[str, Any]
) -> None:
    load(model, folder, **options)
    assert_own_memory(model)


def assert_own_memory(model: nn.Module) -> None:
    tensors = list(ak.attach(model).parameters("x"))
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)  # of a cache line: what torch's allocator gives


def test_file_may_be_overwritten_and_cut_off_after_loading(model: nn.Module, folder: Path) -> None:
    load(model, folder)
    before = {name: p.detach().clone() for name, p in ak.attach(model).named_parameters("x")}
    with (folder / WEIGHTS_FILE).open("r+b") as file:  # as `cp` writes over a file that is there
        file.write(b"\x55" * file.seek(0, 2))
        assert all(torch.equal(p, before[name]) for name, p in ak.attach(model).named_parameters("x"))
        file.truncate(8)
    assert all(torch.equal(p, before[name]) for name, p in ak.attach(model).named_parameters("x"))


def test_file_that_is_cut_off_while_it_is_read_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_header = mapping.read_header

    def cut_after(path: Path) -> Any:
        shard = read_header(path)
        os.truncate(path, shard.size - 4)
        return shard

    monkeypatch.setattr(mapping, "read_header", cut_after)
    with pytest.raises(ak.CheckpointError, match="was cut off while it was read"):
        mapping.read_tensors(folder / WEIGHTS_FILE)


def test_tensors_that_share_memory_in_a_file_are_trained_apart(model: nn.Module, folder: Path) -> None:
    tensors = tensors_of(folder)
    (folder / WEIGHTS_FILE).unlink()
    first, second = (key for key in tensors if key.endswith("lora_A.weight"))
    torch.save({**tensors, second: tensors[first]}, folder / PICKLE_FILE)
    load(model, folder, trainable=True)
    assert_own_memory(model)
