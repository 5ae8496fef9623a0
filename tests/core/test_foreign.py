"""Bare files of other programs: which method is asked, what is an error, and that any content is safe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.core.test_contract import ShiftConfig, ShiftLayer
from tests.core.test_files import only_adapter_errors, refuse
from tests.diffusion import read, write
from tests.models import EmbeddingNet, build
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.contract.formats import LayerNames, component
from adapterkit_lora import LoraConfig

DOWN, UP = torch.ones(2, 8), torch.ones(8, 2)
LORA = {"lora_unet_layers_0.lora_down.weight": DOWN, "lora_unet_layers_0.lora_up.weight": UP}
LOHA = {f"lora_unet_layers_1.hada_w{n}_{x}": t for n in (1, 2) for x, t in (("a", UP), ("b", DOWN))}


@pytest.fixture
def model() -> nn.Module:
    return EmbeddingNet().eval()


class ShiftFormat(ak.Format):
    names = {"by": "shift_by"}  # noqa: RUF012 - a class variable by its base
    factors = frozenset({"shift_by"})

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def readings(self, key: str) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return super().readings(key)

    def config(self, layers: Any, metadata: Any) -> Any:
        return self.answer()

    def tensors(self, layer: ak.ForeignLayer, config: Any) -> Mapping[str, Tensor]:
        return layer.tensors


class Greedy(ak.Format):
    """Takes any file."""

    def read(self, tensors: Any, kinds: Any, metadata: Any, config: Any = None) -> Any:
        return ShiftConfig(target_modules=["head"]), tensors


def method(config: Any = ShiftConfig, form: ak.Format | None = None) -> ak.Plugin:
    """A method `shift` whose format makes a `config`, or raises it."""
    base = ak.plugin(ShiftConfig, ShiftLayer, prefix="shift_")
    hooks = {"formats": lambda self: [form or ShiftFormat(config)]}
    made: ak.Plugin = type("Shift", (type(base),), hooks)()
    return made


# Who is asked


def test_method_that_answers_is_the_one(model: nn.Module, tmp_path: Path) -> None:
    adapters = ak.attach(model)
    assert adapters.load(write(tmp_path / "a.safetensors", LORA), "x") == ak.LoadReport()
    assert adapters.config("x").method == "lora"
    assert adapters.load(str(write(tmp_path / "b.safetensors", LOHA)), "y") == ak.LoadReport()
    assert adapters.config("y").method == "loha"


NOBODYS = "a.safetensors has no adapter_config.json, and no method finds layers of its own in it that this model has. "
REFUSED: dict[str, tuple[Any, dict[str, Tensor], str]] = {
    "of no method": (
        EmbeddingNet,
        {"lora_unet_layers_0.sum": DOWN},
        f"{NOBODYS}Methods asked: loha, lora, vera. Keys in the file: 'lora_unet_layers_0.sum'. "
        "Layers of the model: 'embed', 'layers.0', 'layers.1'.",
    ),
    "without tensors": (EmbeddingNet, {}, "a.safetensors holds no tensors. PEFT writes such a file where"),
    "for another model": (lambda: build("bert"), LORA, NOBODYS),
    "of two methods": (
        EmbeddingNet,
        LORA | LOHA,
        "holds layers of several methods: loha, lora. Split it",
    ),
    "with keys of PEFT": (
        EmbeddingNet,
        {"base_model.model.layers.0.lora_A.weight": DOWN},
        "has PEFT's keys; the scaling that goes with them is in its adapter_config.json. Give the folder that holds",
    ),
}


@pytest.mark.parametrize(("make", "tensors", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_file_that_is_refused(make: Any, tensors: dict[str, Tensor], text: str, tmp_path: Path) -> None:
    refuse(make(), write(tmp_path / "a.safetensors", tensors, format="pt"), text)


def test_method_from_outside_is_asked_too(model: nn.Module, tmp_path: Path) -> None:
    ak.register(method())
    adapters = ak.attach(model)
    file = write(tmp_path / "a.safetensors", {"lycoris_head.by": torch.ones(3), "lora_te_x.by": torch.ones(3)})
    before = model(torch.tensor([[1, 2]]))
    with pytest.warns(ak.AdapterWarning, match=r"which this model is not: 'lora_te' \(1 tensors\)"):
        report = adapters.load(file, "x")
    assert report.ok
    assert report.ignored == ("lora_te_x.by",)
    torch.testing.assert_close(model(torch.tensor([[1, 2]])), before + 1)


def test_method_that_raises_breaks_only_itself(model: nn.Module, tmp_path: Path) -> None:
    ak.register(method(ValueError("oh")))
    refuse(
        model,
        write(tmp_path / "a.safetensors", {"lycoris_head.by": torch.ones(3)}),
        "Methods asked: loha, lora, vera.",
        "Not asked: The method 'shift' (Shift): its hook formats gave a ShiftFormat whose read raised ValueError: oh.",
    )
    with pytest.warns(ak.AdapterWarning, match="a method could not be asked about it. The method 'shift'"):
        ak.attach(model).load(write(tmp_path / "b.safetensors", LORA), "x")


def test_method_that_takes_every_file_hinders_none(model: nn.Module, tmp_path: Path) -> None:
    ak.register(method(form=Greedy()))
    adapters = ak.attach(model)
    assert adapters.load(write(tmp_path / "a.safetensors", LORA), "x") == ak.LoadReport()
    assert adapters.config("x").method == "lora"


def test_method_that_refuses_another_s_file_hinders_none(model: nn.Module, tmp_path: Path) -> None:
    ak.register(method(ak.UnsupportedError("not mine")))
    file = write(tmp_path / "a.safetensors", {"lycoris_head.by": torch.ones(3)})
    with pytest.raises(ak.UnsupportedError, match="not mine"):
        ak.attach(model).load(file, "x")
    assert ak.attach(model).load(write(tmp_path / "b.safetensors", LORA), "x") == ak.LoadReport()


def test_config_of_another_method_is_a_fault(model: nn.Module, tmp_path: Path) -> None:
    ak.register(method(LoraConfig))
    file = write(tmp_path / "a.safetensors", {"lycoris_head.by": torch.ones(3)})
    refuse(model, file, "its hook formats gave a ShiftFormat whose read gave a LoraConfig; it must give a ShiftConfig.")


def test_heads_are_not_made_for_a_file_that_has_none(tmp_path: Path) -> None:
    ak.register(method())  # its config leaves modules_to_save at "auto"
    model = build("bert")
    layer = "bert.encoder.layer.0.output.dense"
    file = write(tmp_path / "a.safetensors", {f"lycoris_{layer.replace('.', '_')}.by": torch.ones(16)})
    assert ak.attach(model).load(file, "x").ok
    assert not ak.attach(model).status().rows[0].heads


def test_what_is_no_such_file(model: nn.Module, tmp_path: Path) -> None:
    other = ak.attach(EmbeddingNet())
    other.add("a", LoraConfig(r=2, target_modules=["layers.0"]))
    folder = other.save("a", tmp_path / "adapter")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        text = "is a file; give the folder that holds adapter_config.json and adapter_model.safetensors."
        refuse(model, folder / name, text)
    for name, text in (("a.txt", "is not a safetensors file"), ("a.pt", "cannot be read as a file of tensors only")):
        (tmp_path / name).write_text("What is this?")
        refuse(model, tmp_path / name, text)
    file = write(tmp_path / "a.safetensors", LORA)
    refuse(model, file, "is a file, so it has no subfolder 'inner'", subfolder="inner")
    refuse(model, folder, "nothing of component 'unet'", component="unet")


# Names


@pytest.mark.parametrize(
    ("name", "part", "path"),
    [
        ("transformer.h.0", "transformer", "transformer.h.0"),
        ("transformer.text_model.b", "transformer", "text_model.b"),
        ("text_encoder.b", "text_encoder", "text_model.b"),
        ("text_encoder_2.text_model.x.c", "text_encoder_2", "x.c"),
        ("lora_te_text_model_x_c", "lora_te", "x.c"),
        ("lora_te2_b", "lora_te2", "text_model.b"),
        ("lora_unet_h_0", "lora_unet", None),
        ("lycoris_a", "lycoris", None),
        ("unet.", "unet", None),
        ("unet_a.b", "", None),
        ("x_c", "", None),
        ("other.x.c", "", None),
        ("", "", None),
    ],
)
def test_part_and_layer_that_a_name_stands_for(name: str, part: str, path: str | None) -> None:
    assert component(name) == part
    assert LayerNames(["transformer.h.0", "text_model.b", "x.c"]).find(name) == path


def test_module_of_the_model_that_is_called_like_a_part_of_a_pipeline(tmp_path: Path) -> None:
    """GPT-2's layers are under `transformer`: what it has not is still unexpected."""
    model = build("gpt2")
    ak.attach(model).add("a", LoraConfig(r=2, target_modules=["c_attn"]))
    folder = ak.attach(model).save("a", tmp_path / "a")
    tensors = {k.replace("h.1", "h.7"): t for k, t in read(folder / "adapter_model.safetensors").items()}
    write(folder / "adapter_model.safetensors", tensors)
    refuse(build("gpt2"), folder, "missing (2)", "unexpected (2)")


# Any content


MODULES = ["lora_unet_layers_0", "lycoris_layers_1", "unet.layers.0", "layers.1", "lora_te_x", "embed", "lycoris_embed"]
LOCALS = [
    *("lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "scalar", "dora_scale", "lora_A.weight"),
    *("lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B", "lora.up.weight", "to_q_lora.up.weight"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "vera_A"),
]
SHAPES = st.sampled_from([(), (1,), (2, 8), (8, 2), (2, 2), (2, 2, 1), (0, 8), (2, 8, 1, 1), (2, 2, 3, 3), (32, 2)])
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.float8_e4m3fn, torch.int8, torch.complex64, torch.bool])


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.dictionaries(
        st.tuples(st.sampled_from(MODULES), st.sampled_from(LOCALS)), st.tuples(SHAPES, DTYPES), max_size=8
    ),
    text=st.none() | st.sampled_from(["", "{", "[]", '{"unet.lora_alpha": 2}', '{"r": null}', '{"alpha_pattern": 1}']),
)
def test_any_tensors_load_or_raise_an_adapter_error(
    tmp_path: Path, shapes: dict[tuple[str, str], tuple[tuple[int, ...], torch.dtype]], text: str | None
) -> None:
    tensors = {f"{m}.{local}": torch.zeros(s, dtype=d) for (m, local), (s, d) in shapes.items()}
    metadata = {} if text is None else {"lora_adapter_metadata": text}
    only_adapter_errors(EmbeddingNet(), write(tmp_path / "a.safetensors", tensors, **metadata))
