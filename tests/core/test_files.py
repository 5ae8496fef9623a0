"""Adapter folders: what is read, what is refused, and that saving is all or nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
from adapterkit.contract.config import OPTIONS
from adapterkit.errors import SaveError
from adapterkit.files import folder as files
from adapterkit.files import tensors as mapping
from adapterkit.files import writing
from adapterkit.files.folder import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE
from adapterkit_lora import LoraConfig

PREFIX = "base_model.model."
A, B = PREFIX + "layers.0.lora_A.weight", PREFIX + "layers.1.lora_B.weight"
QUICK = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
BOTH = pytest.mark.parametrize("r", [2, 3], ids=["same config", "another config"])


def new() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EmbeddingNet().eval()


def config(r: int = 2, **fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": r, "target_modules": ["layers.0", "layers.1"], "modules_to_save": ["head"]} | fields)


def saved(place: Path) -> Path:
    """A saved adapter: two layers and a head."""
    adapters = ak.attach(new())
    adapters.add("a", config())
    set_parameters(adapters, "a")
    return adapters.save("a", place)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "adapter")


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


def refuse(
    model: nn.Module, folder: str | Path, *texts: str, error: type[Exception] = ak.CheckpointError, **options: Any
) -> None:
    """The folder is refused with these texts, and nothing has changed."""
    with unchanged(model), pytest.raises(error) as caught:
        load(model, folder, **options)
    for text in texts:
        assert text in str(caught.value)


# The report


def moved(prefix: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda t: [t.update({prefix + k.removeprefix(PREFIX): t.pop(k)}) for k in list(t)]


def put(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda t: t.update({key: value})


def test_a_complete_file_is_loaded_whole_and_nothing_is_random(model: nn.Module, folder: Path) -> None:
    state = torch.random.get_rng_state()
    assert load(model, folder) == ak.LoadReport()
    assert torch.equal(state, torch.random.get_rng_state())
    rewrite(folder, moved(""))  # PEFT's prefix is optional
    assert ak.attach(model).load(folder, "y") == ak.LoadReport()
    reconfigure(folder, init_lora_weights="olora")
    report = ak.attach(model).load(folder, "z")
    assert report.ok
    assert report.exempt == tuple(f"layers.{i}.lora_init_{x}" for i in (0, 1) for x in "AB")


MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str, str, list[str]]] = {
    "missing": (
        lambda t: t.pop(B),
        "missing",
        "the adapter on this model needs tensors that are missing (another base, or other targets?)",
        ["layers.1.lora_B.weight"],
    ),
    "unexpected": (
        put("elsewhere.lora_A.weight", torch.ones(2, 8)),
        "unexpected",
        "some belong to nothing on this model",
        ["elsewhere.lora_A.weight"],
    ),
    "another name in a layer": (
        put(PREFIX + "layers.0.lora_C.weight", torch.ones(2, 8)),
        "unexpected",
        "does not fit adapter 'x': some belong to nothing on this model",
        ["layers.0.lora_C.weight"],
    ),
    "mismatched": (
        put(A, torch.ones(3, 8)),
        "mismatched",
        "some have other shapes (a base of another size, or another rank?)",
        ["layers.0.lora_A.weight: (3, 8) in the file, (2, 8) on this model"],
    ),
    "another base weight": (put(PREFIX + "overhead.weight", torch.zeros(8, 8)), "unexpected", "", ["overhead.weight"]),
    "names of attributes": (
        lambda t: t.update({"overhead.forward": torch.zeros(1), "layers.training.x": torch.zeros(1)}),
        "unexpected",
        "",
        ["layers.training.x", "overhead.forward"],
    ),
}


@pytest.mark.parametrize(("change", "field", "reason", "keys"), MISFITS.values(), ids=MISFITS.keys())
def test_what_does_not_fit_is_refused_or_reported(
    change: Any, field: str, reason: str, keys: list[str], model: nn.Module, folder: Path
) -> None:
    rewrite(folder, change)
    refuse(model, folder, "does not fit adapter 'x'", reason, f"{field} ({len(keys)}):\n    {keys[0]}")
    with pytest.warns(ak.AdapterWarning, match=rf"{field} \({len(keys)}\)"):
        report = load(model, folder, strict=False)
    assert sorted(map(str, getattr(report, field))) == keys


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], object]:
    def rename(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(PREFIX + old, PREFIX + new)] = tensors.pop(key)

    return rename


CAUSES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "a model around it": (
        renamed("", "unet."),
        "the file's begin with 'unet'; it is for a model that has this one at 'unet': load it there",
    ),
    "a part of it": (renamed("layers.", ""), "it is for what this model has at 'layers': load it there"),
    "another class": (renamed("layers.", "blocks."), "begin with 'layers', the file's begin with 'blocks'"),
    "a layer that the config does not name": (
        put(PREFIX + "overhead.lora_A.weight", torch.ones(2, 8)),
        "it has tensors for 'overhead', which its config does not select (target_modules, exclude_modules)",
    ),
    "ZeRO-3": (
        put(A, torch.zeros(0)),
        "lora_A.weight' has no values (1 such): it was saved under DeepSpeed's",
    ),
}


@pytest.mark.parametrize(("change", "cause"), CAUSES.values(), ids=CAUSES)
def test_the_cause_is_named_and_not_another_base(change: Any, cause: str, model: nn.Module, folder: Path) -> None:
    rewrite(folder, change)
    with pytest.raises(ak.CheckpointError) as error:
        load(model, folder)
    assert cause in str(error.value)
    assert "another base" not in str(error.value)
    assert "another size" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_the_base_s_own_weights_are_ignored(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder, put(PREFIX + "overhead.weight", model.overhead.weight.detach().to(dtype)))
    report = load(model, folder)
    assert report.ok
    assert report.ignored == ("overhead.weight",)


@pytest.mark.parametrize("prefix", ["model.", "x.", "base_model.model.model."])
def test_keys_under_a_wrong_prefix_are_never_dropped(model: nn.Module, folder: Path, prefix: str) -> None:
    rewrite(folder, moved(prefix))
    refuse(model, folder, "missing (6)", "unexpected (6)")


REFUSED_TENSORS = {
    "with and without the prefix": (
        put("layers.0.lora_A.weight", torch.ones(2, 8)),
        "There are two tensors for 'layers.0.lora_A.weight': with and without PEFT's prefix.",
    ),
    "embeddings that are no table": (
        put(PREFIX + "embed.weight", torch.tensor(1.0)),
        "embed.weight: () in the file, (32, 8) on this model",
    ),
    **{
        str(dtype): (
            lambda t, dtype=dtype: t.update({k: v.to(dtype) for k, v in t.items()}),
            f"holds {dtype}, and floating numbers are needed: it is quantised, or damaged.",
        )
        for dtype in (torch.int8, torch.int64, torch.bool)
    },
}


@pytest.mark.parametrize(("change", "text"), REFUSED_TENSORS.values(), ids=REFUSED_TENSORS.keys())
def test_tensors_that_are_refused(change: Any, text: str, model: nn.Module, folder: Path) -> None:
    rewrite(folder, change)
    refuse(model, folder, text)


def test_not_strict_fills_what_is_missing_with_initial_values_and_the_model_s_head(
    model: nn.Module, folder: Path
) -> None:
    rewrite(folder, lambda t: [t.pop(k) for k in list(t) if "layers.1" in k or "head" in k])
    with pytest.warns(ak.AdapterWarning):
        load(model, folder, strict=False)
    found = dict(ak.attach(model).named_parameters("x"))
    assert not found["layers.1.lora_B.weight"].any()
    assert found["layers.1.lora_A.weight"].abs().max() > 0
    assert torch.equal(found["layers.0.lora_A.weight"], tensors_of(folder)[A])
    assert torch.equal(found["head.weight"], model.head.weight)
    model(torch.tensor([[1, 2]]))


def test_load_state_dict_that_does_not_fit_changes_nothing(model: nn.Module, folder: Path) -> None:
    adapters = ak.attach(model)
    adapters.add("x", config())
    tensors = tensors_of(folder)
    tensors.pop(PREFIX + "head.bias")
    with unchanged(model), pytest.raises(ak.CheckpointError, match="The state dict does not fit adapter 'x'"):
        adapters.load_state_dict("x", tensors)
    with pytest.warns(ak.AdapterWarning):
        assert adapters.load_state_dict("x", tensors, strict=False).missing == ("head.bias",)
    for wrong, text in (
        ([1], "is a mapping from names to tensors, not a list"),
        ({"a": 1}, "at 'a' there is a int"),
        ({key: value.to("meta") for key, value in tensors.items()}, "has no values of .*: it is on the meta device"),
    ):
        with unchanged(model), pytest.raises(ak.CheckpointError, match=text):
            adapters.load_state_dict("x", wrong)


def test_embeddings_and_label_sets_of_another_size(tmp_path: Path) -> None:
    model = build("bert")
    ak.attach(model).add("a", LoraConfig(r=2))
    folder = ak.attach(model).save("a", tmp_path / "a")
    labels = json.dumps({str(i): f"L{i}" for i in range(9)})
    rewrite(folder, lambda t: None, **{"adapterkit.id2label": labels})
    refuse(model, folder, "the file's label set has 9 classes, and no layer of its heads has that many rows.")
    key = "bert.embeddings.word_embeddings"
    rewrite(folder, put(f"{PREFIX}{key}.weight", torch.ones(40, 16)))
    text = (
        f"The file holds its own '{key}' with 40 rows; the model's has 32. It was trained with a resized vocabulary: "
    )
    refuse(model, folder, text + "call model.resize_token_embeddings(40) first.")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_floating_dtypes_are_taken(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder, lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    assert load(model, folder).ok
    assert {p.dtype for p in ak.attach(model).parameters("x")} == {torch.float32}


def test_float8_is_no_dtype_to_compute_with_also_where_the_dtype_is_the_file_s(model: nn.Module, folder: Path) -> None:
    rewrite(folder, lambda t: t.update({k: v.to(torch.float8_e4m3fn) for k, v in t.items()}))
    load(model, folder, dtype="file")
    assert {p.dtype for p in ak.attach(model).parameters("x")} == {torch.float32}
    model(torch.tensor([[1, 2]]))


# Files that are damaged, or something else


def overwrite(data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS_FILE).write_bytes(data)


def only(name: str) -> Callable[[Path], object]:
    """The weights under another name."""
    return lambda folder: (folder / WEIGHTS_FILE).rename(folder / name)


def text(data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / CONFIG_FILE).write_bytes(data)


def bin_file(content: object, zip_format: bool = True) -> Callable[[Path], object]:
    """The old format in place of the new one."""
    save = partial(torch.save, content, _use_new_zipfile_serialization=zip_format)
    return lambda f: ((f / WEIGHTS_FILE).unlink(), save(f / PICKLE_FILE))


def broken_bin(folder: Path) -> None:
    bin_file(tensors_of(folder))(folder)
    content = (folder / PICKLE_FILE).read_bytes()
    (folder / PICKLE_FILE).write_bytes(content.replace(b"PK\x01\x02", b"XX\x01\x02"))


NO_SAFETENSORS = "is not a safetensors file, or it is damaged or cut off"
NO_JSON = "adapter_config.json is not valid JSON"
NO_TENSORS = "adapter_model.bin holds no mapping from names to tensors."
DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "half": (lambda f: overwrite((f / WEIGHTS_FILE).read_bytes()[:-100])(f), NO_SAFETENSORS),
    "header of 2**63 bytes": (overwrite(struct.pack("<Q", 2**63) + b"{}"), "Fetch or save it again."),
    "an unknown dtype": (
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
        "is not an adapter: it has no adapter_config.json. It holds adapter_model.safetensors.",
    ),
    "an empty folder": (
        lambda f: [p.unlink() for p in list(f.iterdir())],
        "it has no adapter_config.json. It is empty.",
    ),
    "a config that is a list": (text(b"[]"), "adapter_config.json must hold a JSON object, not a list."),
    "an empty config": (text(b""), f"{NO_JSON}: Expecting value"),
    "a config in latin-1": (text(b'{"peft_type": "\xe4"}'), NO_JSON),
    "a config nested without end": (text(b"[" * 100_000), NO_JSON),
    "a number without end": (text(b'{"r": ' + b"9" * 10_000 + b"}"), NO_JSON),
    "no type": (text(b"{}"), "adapter_config.json has no 'peft_type', so its method is not known."),
    "a type that is no text": (lambda f: reconfigure(f, peft_type=3), "adapter_config.json has no 'peft_type'"),
    "a bin file whose directory is damaged": (
        broken_bin,
        "adapter_model.bin is a damaged archive: Bad magic number for central directory.",
    ),
    **{
        f"a bin file of {content!r}": (bin_file(content), NO_TENSORS)
        for content in ([1, 2], {"a": 1}, {1: torch.ones(1)}, torch.ones(2), None, {"a": torch.ones(2).to_sparse()})
    },
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
    "targets missing here": ({"target_modules": ["q_proj"]}, ak.SelectionError, "['q_proj'] matched none"),
    "nested": ({"target_modules": json.loads("[" * 400 + "]" * 400)}, ak.ConfigError, ""),
    "DoRA": ({"use_dora": True}, ak.UnsupportedError, "use_dora = True changes what the adapter computes"),
    "pissa of a random start": (
        {"init_lora_weights": "pissa_niter_4"},
        ak.CheckpointError,
        "These are the trained factors of init_lora_weights='pissa_niter_4' alone.",
    ),
    "a type of no plugin": (
        {"peft_type": "BONE"},
        ak.UnknownNameError,
        "is an adapter of type 'BONE', and no plugin provides the method 'bone'. Installed methods: ",
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


def test_modules_to_save_that_the_model_has_not_are_refused_if_the_file_has_them(
    model: nn.Module, folder: Path
) -> None:
    reconfigure(folder, modules_to_save=["classifier", "head"])
    assert load(model, folder) == ak.LoadReport()
    reconfigure(folder, modules_to_save=["classifier"])
    rewrite(folder, put(PREFIX + "classifier.weight", torch.ones(3, 8)))
    ak.attach(model).remove("x")
    refuse(model, folder, "modules_to_save 'classifier' matched no module", error=ak.SelectionError)


@pytest.mark.parametrize(
    "labels", ["{0:", '["a"]', '{"0": "a", "2": "b"}', '{"a": 0}', '{"0":' * 50_000, "{}", "3"], ids=lambda s: s[:9]
)
def test_label_set_that_is_malformed(model: nn.Module, folder: Path, labels: str) -> None:
    rewrite(folder, lambda t: None, **{"adapterkit.id2label": labels})
    refuse(model, folder, "The file's label set is malformed: ")


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
    """`data` with a few pieces of it replaced, cut out or put in, or its end missing; most often in its first part."""
    places = st.integers(0, len(data) - 1) | st.integers(0, min(600, len(data) - 1))
    new = st.binary(max_size=20) | st.sampled_from([b"0", b"9", b"F", b"I", b'"', b"["])
    result = bytearray(data)
    for place, size, piece in draw(st.lists(st.tuples(places, st.sampled_from([0, 1, 1, 20, 10**9]), new), min_size=1)):
        result[place : place + size] = piece
    return bytes(result)


@pytest.mark.parametrize("form", ["safetensors", "zip", "old"])
@QUICK
@given(draw=st.data())
def test_any_bytes_load_or_raise_an_adapter_error(form: str, folder: Path, draw: st.DataObject) -> None:
    sound = folder.parent / "sound"
    if not sound.exists():  # the first example
        if form != "safetensors":
            bin_file(tensors_of(folder), form == "zip")(folder)
        shutil.copytree(folder, sound)
    (weights,) = (path for path in sound.iterdir() if path.name != CONFIG_FILE)
    (folder / weights.name).write_bytes(draw.draw(damage(weights.read_bytes())))
    only_adapter_errors(new(), folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted({*LoraConfig.__dataclass_fields__, *OPTIONS, "peft_type", "extra", "new"})


@QUICK
@pytest.mark.filterwarnings("ignore:.* does not know:adapterkit.AdapterWarning")
@given(values=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
def test_any_json_loads_or_raises_an_adapter_error(folder: Path, values: dict[str, Any]) -> None:
    good = (folder / CONFIG_FILE).read_text()
    reconfigure(folder, **values)
    try:
        only_adapter_errors(new(), folder)
    finally:
        (folder / CONFIG_FILE).write_text(good)


# Where an adapter is looked for


SOURCES: dict[str, tuple[Any, type[Exception], str]] = {
    "a number": (5, ak.ConfigError, "5 is not a folder: give its path, as text or as a pathlib.Path."),
    "nothing": ("", ak.ConfigError, "'' is not a folder"),
    "nobody's home": ("~nobody_at_all/x", ak.ConfigError, "'~nobody_at_all/x' is not a folder"),
    "no folder": ("./nowhere/at/all", ak.CheckpointError, "There is no folder './nowhere/at/all' (working directory: "),
    "no folder as a path": (Path("nowhere"), ak.CheckpointError, "There is no folder 'nowhere'"),
    "a long name": ("a" * 300, ak.CheckpointError, "is not a folder here (working directory: "),
    "a long path": ("a/" * 3000, ak.CheckpointError, "There is no folder 'a/a/"),
    "NUL": ("a\0b", ak.CheckpointError, "is not a folder here"),
    "no hub id": ("what is this?", ak.CheckpointError, "a repository cannot have this name."),
    "a file": ("style.safetensors", ak.CheckpointError, "There is no folder 'style.safetensors'"),
}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is offline: nothing waits, and nothing asks the network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it asks the network"))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("source", "error", "message"), SOURCES.values(), ids=SOURCES.keys())
def test_source_that_is_none(model: nn.Module, source: Any, error: type[Exception], message: str) -> None:
    refuse(model, source, message, error=error)


@pytest.mark.usefixtures("offline")
def test_a_path_that_is_nearly_right_is_not_asked_of_the_hub(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapters/mood").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    refuse(model, "adapters/moods", "There is no folder 'adapters/moods'", "Nearest: 'adapters/mood'.")
    with pytest.raises(ak.CheckpointError, match=r"'x/nowhere' is not a folder here .*: it is not in the cache"):
        ak.skeleton("x/nowhere")


@pytest.mark.parametrize("source", ["./nowhere", "nowhere/adapter"])
@pytest.mark.usefixtures("offline")
def test_a_working_directory_that_was_deleted_is_named(
    model: nn.Module, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    refuse(model, source, "(working directory: deleted)")


SHA = "0123456789012345678901234567890123456789"


@pytest.fixture
def cache(tmp_path: Path, folder: Path, offline: None) -> Path:
    """huggingface_hub's cache with one repository, which has the adapter at its root and in a subfolder."""
    repository = tmp_path / "cache" / "models--someone--adapter"
    snapshot = repository / "snapshots" / SHA
    shutil.copytree(folder, snapshot)
    shutil.copytree(folder, snapshot / "german")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(SHA)
    return tmp_path / "cache"


class Repository(BaseHTTPRequestHandler):
    """Gives the files of one repository, `me/lora`."""

    files: dict[str, bytes]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name, content = self.path.rpartition("/resolve/1/")[2], None
        if "/me/lora/tree/" in self.path:
            sizes = {name: len(content) for name, content in self.files.items()}
            content = json.dumps([{"type": "file", "path": n, "size": size, "oid": n} for n, size in sizes.items()])
            content = content.encode()
        elif self.path.startswith("/api/models/me/lora"):
            found = {"id": "me/lora", "sha": "1", "siblings": [{"rfilename": name} for name in self.files]}
            content = json.dumps(found).encode()
        else:
            content = self.files.get(name)
        self.send_response(200 if content is not None else 404)
        self.send_header("X-Repo-Commit", "1")
        self.send_header("ETag", f'"{name}"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content or b"")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """The files of `me/lora` on a server that speaks the hub's protocol."""
    handler = type("Handler", (Repository,), {"files": {p.name: p.read_bytes() for p in folder.iterdir()}})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        places = {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
        for name, value in places.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        yield handler.files
        server.shutdown()


def test_weights_beside_an_adapter_on_the_hub_are_told_of(
    model: nn.Module, hub: dict[str, bytes], tmp_path: Path
) -> None:
    hub.update({"non_lora_trainables.bin": b"", "training_args.bin": b"", "checkpoint-1/value_head.bin": b""})
    message = "me/lora also holds weights beside the adapter: non_lora_trainables.bin. They are not read."
    with pytest.warns(ak.AdapterWarning, match=re.escape(message)):
        assert ak.attach(model).load("me/lora", "x", cache_dir=tmp_path / "cache").ok


def test_hub_id_in_the_cache_loads(cache: Path) -> None:
    for options in ({}, {"subfolder": "german"}, {"revision": "main"}, {"revision": SHA}):
        assert load(new(), "someone/adapter", cache_dir=cache, **options) == ak.LoadReport()


@pytest.mark.parametrize(
    ("source", "options"),
    [("someone/other", {}), ("someone/adapter", {"revision": "v2"}), ("nowhere", {})],
    ids=["repository", "revision", "name"],
)
def test_hub_id_that_is_not_there_is_refused_in_one_line(
    model: nn.Module, cache: Path, source: str, options: dict[str, str]
) -> None:
    with unchanged(model), pytest.raises(ak.CheckpointError, match=f"{source!r} is not a folder here") as caught:
        load(model, source, cache_dir=cache, **options)
    assert "and could not be read from the hub or its cache: it is not in the cache, and HF_HUB" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", [lambda m: ak.attach(m).load("no/adapter", "a"), lambda m: ak.skeleton("no/model")])
def test_without_a_network_nothing_is_tried_again_and_again(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, call: Callable[[nn.Module], object]
) -> None:
    asked = []

    def nowhere(*args: object) -> None:
        asked.append(args)
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("adapterkit.files.hub.getproxies", dict)
    monkeypatch.setattr("socket.getaddrinfo", nowhere)
    with pytest.raises(ak.CheckpointError, match="it is not in the cache, and the hub cannot be reached"):
        call(model)
    assert len(asked) <= 2  # six tries, with pauses between them, before


@pytest.mark.parametrize("below", [["default"], ["checkpoint-10/adapter"], ["checkpoint-10", "checkpoint-20"], []])
def test_the_one_adapter_in_a_folder_of_a_repository_is_fetched_alone(
    model: nn.Module, hub: dict[str, bytes], tmp_path: Path, below: list[str]
) -> None:
    files = dict(hub)
    hub.clear()
    hub.update({f"{folder}/{name}": content for folder in below for name, content in files.items()} | {"x.md": b""})
    there = {"cache_dir": tmp_path / "cache"}
    if len(below) == 1:
        hub["other/large.safetensors"] = b""
        with pytest.warns(ak.AdapterWarning, match=f"me/lora is not an adapter; the one below is read: {below[0]}"):
            assert load(model, "me/lora", **there).ok
        assert not list((tmp_path / "cache").rglob("large.safetensors"))
    elif below:
        refuse(model, "me/lora", "me/lora is not an adapter, but holds 2: checkpoint-10, checkpoint-20.", **there)
    else:
        refuse(model, "me/lora", "it has no adapter_config.json", **there)


def test_hub_repository_that_is_no_adapter(model: nn.Module, cache: Path) -> None:
    snapshot = cache / "models--someone--adapter" / "snapshots" / SHA
    (snapshot / CONFIG_FILE).unlink()
    (snapshot / "german" / CONFIG_FILE).unlink()
    refuse(model, "someone/adapter", "it has no adapter_config.json", cache_dir=cache)
    refuse(model, "someone/adapter", "There is no such folder", cache_dir=cache, subfolder="french")


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


def save(place: str | Path, r: int = 2, alpha: float = 1.0) -> Path:
    return ak.attach(adapted(r, alpha)).save("a", place)


def whole(folder: Path) -> float:
    """The version a folder holds, known by its alpha; fails if config and weights are of two versions."""
    found = files.read(folder)
    alpha, r = found.config["lora_alpha"], found.config["r"]
    assert all((t == alpha).all() for t in found.tensors.values())
    assert found.tensors[A].shape[0] == r
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


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path: Path) -> None:
    with pytest.raises(ak.SaveError, match="safetensors files have no torch"):
        mapping.write_tensors({"a": torch.zeros(2, dtype=torch.complex128)}, tmp_path / "a", {})
    model = new()
    ak.attach(model).add("a", config(extra={"when": object()}))
    with unchanged(model), pytest.raises(ak.ConfigError, match="cannot be written as JSON: Object of type obj"):
        ak.attach(model).save("a", tmp_path / "a")
    empty = ak.attach(nn.ModuleDict({"fc": nn.Linear(4, 4, device="meta")}))
    empty.add("a", LoraConfig(r=2, target_modules=["fc"]))
    with pytest.raises(ak.AdapterError, match=r"Adapter 'a' has no values to save: .* is on the meta device"):
        empty.save("a", tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A small disk of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(place)]
    if not IS_ROOT or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("disk", ["24k"], indirect=True)
def test_really_full_disk_changes_nothing(disk: Path) -> None:
    save(disk / "a", 1)
    with not_saved(model := adapted(400), disk, "pace"):
        ak.attach(model).save("a", disk / "a")
    assert whole(disk / "a") == 1.0


@pytest.mark.parametrize("disk", ["1m"], indirect=True)
def test_folder_that_is_a_mount_is_saved_to(disk: Path) -> None:
    for r, alpha in ((1, 1.0), (1, 2.0), (3, 3.0)):
        assert whole(save(disk, r, alpha)) == alpha
    assert sorted(p.name for p in disk.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder of our own, all that this process may write to meanwhile."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        if IS_ROOT:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if IS_ROOT:
                os.seteuid(0)
            for path in [folder, *folder.rglob("*")]:
                path.chmod(0o777)


@BOTH
def test_read_only_folder_changes_nothing_and_a_writable_one_inside_is_saved_to(unprivileged: Path, r: int) -> None:
    parent = unprivileged / "parent"
    parent.mkdir()
    save(parent / "a")
    parent.chmod(0o555)
    assert whole(save(parent / "a", r, 5.0)) == 5.0
    with not_saved(model := adapted(r, 4.0), parent, "ermission denied"):
        ak.attach(model).save("a", parent / "new")
    for mode in (0o555, 0o777):  # of the parent
        (parent / "a").chmod(0o555)
        parent.chmod(mode)
        with not_saved(model := adapted(r, 4.0), parent, "ermission denied"):
            ak.attach(model).save("a", parent / "a")


def test_a_path_with_nul_is_refused(tmp_path: Path) -> None:
    model = adapted()
    with not_saved(model, tmp_path, "embedded null"):
        ak.attach(model).save("a", "a\0b")


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111], ids=oct)
def test_a_folder_that_may_not_be_opened_is_refused(unprivileged: Path, mode: int) -> None:
    place = save(unprivileged / "a")
    place.chmod(mode)
    calls = (lambda: load(new(), place), lambda: ak.inspect_adapter(place), lambda: ak.skeleton(place))
    for call in (*calls, lambda: load(new(), unprivileged, subfolder="a")):
        with pytest.raises(ak.CheckpointError, match="a cannot be read: you may not open this folder"):
            call()


def test_folders_above_are_made_but_a_file_in_their_place_stays(tmp_path: Path) -> None:
    assert whole(save(tmp_path / "x" / "y" / "a")) == 1.0
    (tmp_path / "b").write_text("mine")
    with not_saved(model := adapted(), tmp_path, ""):
        ak.attach(model).save("a", tmp_path / "b")


@BOTH
def test_what_else_is_in_a_folder_and_how_it_is_reached_stays(
    tmp_path: Path, r: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = save(tmp_path / "a")
    bin_file({})(target)
    (target / "README.md").write_text("mine")
    (target / "logs" / "deep").mkdir(parents=True)
    (target / "logs" / "deep" / "run.txt").write_text("42")
    (target / "link").symlink_to("README.md")
    target.chmod(0o750)
    (tmp_path / "linked").symlink_to(target)
    monkeypatch.chdir(target)
    for place in (tmp_path / "linked", Path()):
        save(place, r, 7.0)
        assert whole(target) == whole(tmp_path / "linked") == whole(Path()) == 7.0
    assert Path.cwd() == target
    assert (target / "README.md").read_text() == (target / "link").read_text() == "mine"
    assert (target / "link").is_symlink()
    assert (target / "logs" / "deep" / "run.txt").read_text() == "42"
    assert target.stat().st_mode & 0o777 == 0o750
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "linked"]
    assert sorted(p.name for p in target.iterdir()) == ["README.md", CONFIG_FILE, WEIGHTS_FILE, "link", "logs"]


def test_a_new_folder_follows_the_umask_also_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    before = os.umask(0o027)
    try:
        save(tmp_path / "link")
    finally:
        os.umask(before)
    assert whole(tmp_path / "real") == 1.0
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o750
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "real").iterdir()} == {0o640}


def test_any_number_of_savers_may_save_to_one_folder_at_once(tmp_path: Path) -> None:
    savers, folders, failed = 4, 10, []
    begin, inside = threading.Barrier(savers), threading.Semaphore(1)

    def write_alone(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        if not inside.acquire(blocking=False):
            failed.append("two at once")
            return
        time.sleep(0.005)  # the others come here meanwhile, if nothing stops them
        mapping.write_tensors(tensors, path, metadata)
        inside.release()

    def save_all(saver: int) -> None:
        for number in range(folders):
            begin.wait()
            place, tensors = tmp_path / str(number // 2), {"a": torch.full((2,), saver)}
            try:
                writing.write_folder(place, {"r": saver}, tensors, {}, write_alone)
            except SaveError as error:
                failed.append(str(error))

    threads = [threading.Thread(target=save_all, args=(saver,)) for saver in range(savers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(list(tmp_path.iterdir())) == folders // 2
    for folder in tmp_path.iterdir():
        found = files.read(folder)
        assert found.config == {"r": int(found.tensors["a"][0])}


@pytest.mark.parametrize("there", [(), (CONFIG_FILE,), (CONFIG_FILE, WEIGHTS_FILE)], ids=["none", "config", "both"])
def test_a_save_that_fails_between_its_files_gives_the_old_ones_back(
    there: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, replace = tmp_path / "a", Path.replace
    writing.write_folder(place, {"r": 2}, {"a": torch.zeros(2)}, {})
    for file in place.iterdir():
        file.unlink() if file.name not in there else None
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    for failing in (CONFIG_FILE, WEIGHTS_FILE):

        def fail(path: Path, target: Path, failing: str = failing) -> Path:
            if target.name == failing and path.name.endswith("unfinished"):
                monkeypatch.setattr(Path, "replace", replace)
                raise OSError("the disk has gone")
            return replace(path, target)

        monkeypatch.setattr(Path, "replace", fail)
        with pytest.raises(SaveError, match="the disk has gone"):
            writing.write_folder(place, {"r": 1}, {"a": torch.ones(2)}, {})
        assert {path.name: path.read_bytes() for path in place.iterdir()} == before


def test_a_folder_in_the_place_of_the_weights_leaves_the_config_as_it_is(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS_FILE).mkdir()
    (tmp_path / CONFIG_FILE).write_text("{}")
    with pytest.raises(SaveError):
        writing.write_folder(tmp_path, {"r": 1}, {"a": torch.ones(2)}, {})
    assert (tmp_path / CONFIG_FILE).read_text() == "{}"
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}


# Reading


def test_reader_beside_a_writer_sees_whole_versions(tmp_path: Path) -> None:
    end, target = threading.Event(), tmp_path / "a"

    def write(alpha: int) -> None:
        tensors = {A: torch.full((alpha, 8), float(alpha))}
        writing.write_folder(target, {"lora_alpha": alpha, "r": alpha}, tensors, {})

    def write_on() -> None:
        while not end.is_set():
            for alpha in (1, 2, 2, 3):
                write(alpha)

    write(1)
    writer = threading.Thread(target=write_on)
    writer.start()
    try:
        versions = {whole(target) for _ in range(100)}
        while len(versions) == 1:  # a busy machine has not written anything yet
            versions.add(whole(target))
    finally:
        end.set()
        writer.join()


def test_folder_that_changes_under_every_reading_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = iter(range(1000))
    monkeypatch.setattr(files, "_version", lambda folder: [next(counter)])
    with pytest.raises(ak.CheckpointError, match="is being written again and again; load it when that is over"):
        files.read(folder)


def assert_own_memory(model: nn.Module) -> None:
    """Where torch's allocator puts it: at multiples of a cache line."""
    tensors = list(ak.attach(model).parameters("x"))
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)


@pytest.mark.parametrize("options", [{}, {"dtype": "file"}], ids=["dtype of the model", "dtype of the file"])
def test_loaded_tensors_have_memory_of_their_own(model: nn.Module, folder: Path, options: dict[str, Any]) -> None:
    load(model, folder, **options)
    assert_own_memory(model)


def test_tensors_that_share_memory_in_a_file_are_trained_apart(model: nn.Module, folder: Path) -> None:
    tensors = tensors_of(folder)
    first, second = (key for key in tensors if key.endswith("lora_A.weight"))
    bin_file({**tensors, second: tensors[first]})(folder)
    load(model, folder, trainable=True)
    assert_own_memory(model)


def test_file_that_is_cut_off_while_it_is_read_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_header = mapping.read_header

    def cut_after(path: Path) -> Any:
        shard = read_header(path)
        os.truncate(path, shard.size - 4)
        return shard

    monkeypatch.setattr(mapping, "read_header", cut_after)
    with pytest.raises(ak.CheckpointError, match="was cut off while it was read"):
        mapping.read_tensors(folder / WEIGHTS_FILE)
