"""Adapter folders and files, damaged in every way: configs, safetensors headers, keys, tensors, pickles."""

from __future__ import annotations

import copy
import functools
import io
import json
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tests.fuzz.oracle import Finding, State, refused, same_tensors
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.files.folder import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE
from adapterkit.files.tensors import write_tensors


class Net(nn.Module):
    """A layer of each kind, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.conv, self.norm, self.head = nn.Conv1d(4, 4, 3, padding=1), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(self.norm(self.conv(x.transpose(1, 2)).transpose(1, 2)))


def net() -> nn.Module:
    """The model, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"r": 2, "target_modules": ["layers.0", "conv", "embed"], "modules_to_save": ["head"]}),
    "patterns": ("lora", {"r": 1, "target_modules": r"layers\.\d", "rank_pattern": {"1": 2}, "bias": "all"}),
    "pissa": ("lora", {"r": 1, "target_modules": ["layers.0", "layers.1"], "init_lora_weights": "pissa"}),
    "loha": ("loha", {"r": 2, "target_modules": ["layers.0", "conv"], "use_effective_conv2d": True}),
    "vera": ("vera", {"r": 2, "target_modules": ["layers.0", "layers.1"]}),
}


@dataclass
class Input:
    """An adapter as its parts; or, where `raw` has a file's name, the bytes that are written in place of it."""

    config: Any
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    form: str = "folder"
    raw: dict[str, bytes] = field(default_factory=dict)

    def files(self) -> dict[str, bytes]:
        """Its files by name, all of them as bytes."""
        weights = {"folder": WEIGHTS_FILE, "pickle": PICKLE_FILE, "file": "a.safetensors"}[self.form]
        found = {} if self.form == "file" else {CONFIG_FILE: _json(self.config)}
        found[weights] = _pickled(self.tensors) if self.form == "pickle" else _safetensors(self.tensors, self.metadata)
        return found | self.raw


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _pickled(tensors: dict[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def _safetensors(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    place = Path("/dev/shm" if Path("/dev/shm").is_dir() else ".") / f"fuzz-{id(tensors)}"
    try:
        write_tensors(tensors, place, metadata)
        return place.read_bytes()
    finally:
        place.unlink(missing_ok=True)


def seeds(folder: Path) -> list[Input]:
    """Adapters of each method as they are saved, and files in the other programs' names."""
    found = []
    for name, (method, fields) in ADAPTERS.items():
        adapters = ak.attach(net())
        adapters.add("a", ak.config(method, **fields))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in adapters.parameters("a"):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        place = adapters.save("a", folder / name)
        config = json.loads((place / CONFIG_FILE).read_text())
        tensors = ak.attach(net())
        tensors.load(place, "a")
        own = {key: value.detach().clone() for key, value in adapters.state_dict("a").items()}
        found += [Input(config, own, {"format": "pt"}), Input(config, own, {}, "pickle")]
    for module in ("layers_0", "conv"):
        kohya = {f"lora_unet_{module}.lora_down.weight": torch.randn(2, 4), "alpha": torch.tensor(1.0)}
        kohya[f"lora_unet_{module}.lora_up.weight"] = torch.randn(4, 2)
        kohya[f"lora_unet_{module}.alpha"] = kohya.pop("alpha")
        found.append(Input(None, kohya, {"ss_network_dim": "2"}, "file"))
    diffusers = {"unet.layers.0.lora_A.weight": torch.randn(2, 4), "unet.layers.0.lora_B.weight": torch.randn(4, 2)}
    found.append(Input(None, diffusers, {"lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 4}'}, "file"))
    halves = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    lycoris = {f"lycoris_layers_1.{h}": torch.randn(*((4, 2) if h[-1] == "a" else (2, 4))) for h in halves}
    found.append(Input(None, lycoris | {"lycoris_layers_1.alpha": torch.tensor(2.0)}, {}, "file"))
    return found


VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, -1, 3, 10**30, 2**63, 1.5, -0.0, 1e308, float("nan"), float("inf"), "", "x"),
    *("layers.0", ".*", "(", "all-linear", "none", "all", "LORA", "LOHA", "VERA", "../..", "\x00", "é", "\ud800"),
    *([], ["x"], ["layers.0"], [[1]], [None], {}, {"x": 1}, {"layers.0": 2}, {"1": 0}, {"": {}}, [0, 1], [-1]),
    *(["", "."], ["layers.0"] * 300, "a" * 5000, "(a|aa)+!", "(?:" * 300, {"(a+)+$": 4}),
    *("\x1b]52;c;eA==\x07", "a\nb", "\u202e", "(?:a{9999}){9999}", 3e38, 10**9, ["a" * 50_000]),
]
PARTS = [
    *("base_model.model.", "layers.0", "layers.1", "conv", "embed", "head", "norm", "lora_A.weight"),
    *("lora_B.weight", "lora_A", "lora_embedding_A", "lora_embedding_B", "hada_w1_a", "hada_t1", "vera_lambda_b"),
    *("vera_A", "bias", "weight", "base_layer.", "modules_to_save.", "original_module.", "lora_magnitude_vector"),
    *("dora_scale", "alpha", "lora_down.weight", "lora_up.weight", "lora_mid.weight", "lora_unet_", "lora_te_"),
    *("lycoris_", "unet.", "..", ".", "", "default.", "adapter_shared", "adapters", "é", "\x00", "0", "9999999999"),
    *("\x1b[2J", "\n", "\u202e"),
]
DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64),
]
SIZES = [0, 1, 2, 3, 4, 6, 17]


def _config_field(dice: random.Random, given: Input) -> None:
    config = given.config if isinstance(given.config, dict) else {}
    names = [*config, "peft_type", "r", "use_dora", "layers_to_transform", "layers_pattern", "exclude_modules", "new"]
    name = dice.choice(names)
    match dice.randrange(8):
        case 0:
            config.pop(name, None)
        case 1:
            config[name + dice.choice(["x", "s", " "])] = config.get(name)
        case 2 if isinstance(config.get(name), list):
            config[name] = [*config[name], dice.choice(VALUES)]
        case 3 if isinstance(config.get(name), dict):
            config[name] = {**config[name], str(dice.choice(VALUES))[:40]: dice.choice(VALUES)}
        case 4 if config:
            config[name] = copy.deepcopy(config[dice.choice([*config])])
        case _:
            config[name] = copy.deepcopy(dice.choice(VALUES))
    given.config = config


def _no_object(dice: random.Random, given: Input) -> None:
    given.config = dice.choice(VALUES)


def _key(dice: random.Random, given: Input) -> None:
    if not given.tensors:
        return
    key = dice.choice([*given.tensors])
    parts = key.split(".")
    place = dice.randrange(len(parts))
    match dice.randrange(5):
        case 0:
            parts[place] = dice.choice(PARTS)
        case 1:
            parts.insert(place, dice.choice(PARTS))
        case 2:
            del parts[place]
        case 3:
            parts = [dice.choice(PARTS), *parts]
        case _:
            parts = dice.choice([*given.tensors]).split(".")[: place + 1] + parts[place + 1 :]
    new = ".".join(parts)
    given.tensors[new] = given.tensors[key] if dice.random() < 0.3 else given.tensors.pop(key)


def _drop(dice: random.Random, given: Input) -> None:
    for _ in range(dice.randint(1, 3)):
        if given.tensors:
            del given.tensors[dice.choice([*given.tensors])]


def _shape(dice: random.Random, given: Input) -> None:
    if not given.tensors:
        return
    key = dice.choice([*given.tensors])
    tensor = given.tensors[key]
    match dice.randrange(6):
        case 0:
            given.tensors[key] = tensor.reshape(-1)
        case 1:
            given.tensors[key] = tensor.unsqueeze(dice.randint(0, tensor.dim()))
        case 2 if tensor.dim() > 1:
            given.tensors[key] = tensor.transpose(0, 1).contiguous()
        case 3 if tensor.dim():
            given.tensors[key] = tensor[: dice.randint(0, tensor.shape[0])].clone()
        case _:
            shape = [dice.choice(SIZES) for _ in range(dice.randint(0, 5))]
            given.tensors[key] = torch.ones(
                shape if torch.Size(shape).numel() < 5000 else shape[:2], dtype=tensor.dtype
            )


def _dtype(dice: random.Random, given: Input) -> None:
    dtype = dice.choice(DTYPES)
    for key in [*given.tensors] if dice.random() < 0.3 else [dice.choice([*given.tensors] or [""])]:
        if key in given.tensors:
            given.tensors[key] = given.tensors[key].to(torch.complex64 if dtype.is_complex else torch.float32).to(dtype)


def _value(dice: random.Random, given: Input) -> None:
    if given.tensors:
        key = dice.choice([*given.tensors])
        tensor = given.tensors[key].clone()
        if tensor.numel() and tensor.is_floating_point():
            tensor.view(-1)[dice.randrange(tensor.numel())] = dice.choice(
                [0.0, -0.0, 1e-40, 1e30, float("nan"), float("inf")]
            )
        given.tensors[key] = tensor


def _metadata(dice: random.Random, given: Input) -> None:
    names = ["format", "adapterkit.id2label", "lora_adapter_metadata", "ss_network_dim", "ss_network_module", "x"]
    texts = [
        "",
        "{",
        "[]",
        "null",
        "3",
        '{"0": "a", "1": "b", "2": "c"}',
        '{"0": 1}',
        '{"-1": "a"}',
        '{"unet.r": null}',
    ]
    given.metadata = {**given.metadata, dice.choice(names): dice.choice(texts)}


def _form(dice: random.Random, given: Input) -> None:
    given.form = dice.choice(["folder", "pickle", "file"])
    if given.config is None and given.form != "file":
        given.config = dice.choice([{}, {"peft_type": "LORA"}, {"peft_type": "LOHA", "r": 2}])


def _views(dice: random.Random, given: Input) -> None:
    """What only a pickle can hold: tensors that share memory, lie across it, or are no plain tensors; other objects."""
    given.form = "pickle"
    given.config = given.config if isinstance(given.config, dict) else {"peft_type": "LORA"}
    odd: list[Callable[[Tensor], Any]] = [
        *(lambda t: t.t() if t.dim() == 2 else t, lambda t: t[:1].expand_as(t) if t.dim() else t),
        *(lambda t: nn.Parameter(t) if t.is_floating_point() else t, lambda t: t.to_sparse() if t.dim() else t),
        *(
            lambda t: torch.zeros(1).expand(1 << 20, 1 << 20),
            lambda t: t.to("meta"),
            lambda t: [t],
            lambda t: None,
            lambda t: t.tolist(),
            lambda t: {"x": t},
            lambda t: 3,
        ),
    ]
    key = dice.choice([*given.tensors] or ["x"])
    try:
        changed = {**given.tensors, key: dice.choice(odd)(given.tensors.get(key, torch.zeros(2, 4)))}
        if dice.random() < 0.1:
            changed = dice.choice(
                [{3: torch.zeros(1)}, [torch.zeros(1)], torch.zeros(1), None, {"state_dict": changed}]
            )
        pickled = _pickled(changed)
        given.raw[PICKLE_FILE] = _compressed(pickled) if dice.random() < 0.1 else pickled
    except (RuntimeError, NotImplementedError, TypeError, pickle.PicklingError):
        pass


def _compressed(archive: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return made.getvalue()


def _header(dice: random.Random, given: Input) -> None:
    """A safetensors header that contradicts itself or the file."""
    if given.form == "pickle":
        return
    name = "a.safetensors" if given.form == "file" else WEIGHTS_FILE
    data = given.files()[name]
    length = int.from_bytes(data[:8], "little")
    try:
        table = json.loads(data[8 : 8 + length])
        entry = table[dice.choice([*table] or ["x"])]
    except (ValueError, KeyError, TypeError):
        return
    odd = [0, -1, 1, 4, [1] * 100, 2**31, 2**63, 2**64, 1.5, None, "4", True, [], {}]
    match dice.randrange(6):
        case 0:
            entry["data_offsets"] = [dice.choice(odd), dice.choice(odd)]
        case 1:
            entry["shape"] = [dice.choice(odd) for _ in range(dice.randint(0, 3))]
        case 2:
            entry["dtype"] = dice.choice(["F4", "F6_E2M3", "F8_E8M0", "C64", "I4", "", None, 3, "f32", "U16", "BOOL"])
        case 3:
            entry[dice.choice(["shape", "dtype", "data_offsets", "x"])] = dice.choice(VALUES)
        case 4:
            table[dice.choice(["__metadata__", "x", ""])] = dice.choice(VALUES)
        case _:
            entry.pop(dice.choice([*entry] or ["x"]), None)
    try:
        header = json.dumps(table).encode()
    except ValueError:
        return
    given.raw[name] = len(header).to_bytes(8, "little") + header + data[8 + length :]


def _bytes(dice: random.Random, given: Input) -> None:
    files = given.files()
    name = dice.choice([*files])
    data = bytearray(files[name])
    for _ in range(dice.randint(1, 5)):
        place = dice.randrange(len(data) + 1) if dice.random() < 0.4 else dice.randrange(min(len(data), 300) + 1)
        match dice.randrange(5):
            case 0:
                data[place : place + 1] = bytes([dice.randrange(256)])
            case 1:
                del data[place : place + dice.randint(1, 40)]
            case 2:
                data[place:place] = dice.randbytes(dice.randint(1, 20))
            case 3:
                del data[place:]
            case _:
                data[place : place + 1] = dice.choice([b"0", b"9", b"F", b'"', b"[", b"{", b"-", b"\\u"])
    given.raw[name] = bytes(data)


CHANGES = [
    *([_config_field] * 5 + [_key] * 4 + [_shape] * 3 + [_header] * 2 + [_bytes] * 2 + [_views]),
    *(_no_object, _drop, _dtype, _value, _metadata, _form),
]


def draw(dice: random.Random, known: list[Input]) -> Input:
    """A seed with a few changes; sometimes the tensors of one beside the config of another."""
    given = copy.copy(dice.choice(known))
    given.config, given.tensors, given.raw = copy.deepcopy(given.config), dict(given.tensors), {}
    if dice.random() < 0.05:
        given.tensors |= dice.choice(known).tensors
    for _ in range(dice.choice([1, 1, 1, 2, 2, 3, 5])):
        if given.raw:  # what was changed as bytes has no parts any more
            break
        dice.choice(CHANGES)(dice, given)
    return given


@functools.cache
def warm_up() -> None:
    """Import what the first call of some function imports: that is no input's time."""
    import torch._dynamo  # noqa: F401


class Target:
    """The model that every input is loaded onto, and the folder that it is read from."""

    def __init__(self, folder: Path) -> None:
        self.place, self.again = folder / "input", folder / "again"
        self.model = net()
        self.adapters = ak.attach(self.model)
        self.adapters.add("held", ak.config("lora", r=2, target_modules=["layers.0", "conv"], modules_to_save=["head"]))
        self.state = State.of(self.model)
        warm_up()

    def write(self, files: dict[str, bytes]) -> Path:
        """Put an input's files into the folder."""
        if self.place.is_dir():
            for old in self.place.iterdir():
                old.unlink()
        self.place.mkdir(exist_ok=True)
        for name, data in files.items():
            (self.place / name).write_bytes(data)
        return self.place / "a.safetensors" if "a.safetensors" in files else self.place

    def check(self, files: dict[str, bytes]) -> bool:
        """Load one input, and say whether it was accepted.

        Raises:
            Finding: something else than the library's own error, a change of the model, or a load that a save and
                another load do not repeat.
        """
        source = self.write(files)
        for options in ({}, {"strict": False, "dtype": "file"}):
            if not refused(lambda options=options: self.adapters.load(source, "x", activate=False, **options)):
                self._repeats(options)
                self.adapters.remove("x")
                self._unchanged("load, save, load and remove")
                return True
            self._unchanged("load")
        return False

    def check_more(self, files: dict[str, bytes]) -> None:
        """The dearer readers: what works on files alone, and `swap`."""
        source = self.write(files)
        out = self.again.with_name("out")
        for call in (
            lambda: ak.inspect_adapter(source),
            lambda: ak.combine_files({source: 0.5}, out, overwrite=True),
            lambda: ak.convert_file(source, out, to="lora", overwrite=True),
            lambda: ak.diff_adapters(source, source),
            lambda: ak.read_config(source),
        ):
            refused(call)
            self._unchanged("a call on files")
        shutil.rmtree(out, ignore_errors=True)
        twin = ak.attach(net())
        twin.add("held", ak.config("lora", r=2, target_modules=["layers.0", "conv"], modules_to_save=["head"]))
        before = State.of(twin.model)
        if refused(lambda: twin.swap("held", source)) and State.of(twin.model) != before:
            raise Finding("a refused swap changed the model")

    def _repeats(self, options: dict[str, Any]) -> None:
        written: dict[str, Any] = {}

        def repeat() -> None:
            self.adapters.save("x", self.again)
            kept = {k: v for k, v in options.items() if k == "dtype"}
            report = self.adapters.load(self.again, "y", activate=False, **kept)
            written.update(ok=report.ok, x=self.adapters.state_dict("x"), y=self.adapters.state_dict("y"))
            written["configs"] = [self.adapters.config(n) for n in "xy"]

        if refused(repeat):
            raise Finding("what was loaded cannot be saved and loaded again")
        self.adapters.remove("y")
        if not (written["ok"] and same_tensors(written["x"], written["y"])):
            raise Finding("what was loaded, saved and loaded again is not the same")

    def _unchanged(self, call: str) -> None:
        if State.of(self.model) != self.state:
            raise Finding(f"{call} changed the model")
