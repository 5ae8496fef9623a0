"""Converting files: to other methods, and from and to the names of kohya-ss, LyCORIS and diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lycoris.wrapper import create_lycoris_from_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.combining import randomise, tiny
from tests.diffusion import lycoris_file, output, text_encoder, unet
from tests.disk.test_combine_files import CONFIG, WEIGHTS, classifiers, equal, mixed, read, without
from tests.models import build
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig

TARGETS = [f"down_blocks.0.{n}" for n in ("attn1.to_q", "attn1.to_v", "attn1.to_out.0", "conv1", "proj_in")] + [
    "time_mix"
]
CONFIGS: dict[str, ak.AdapterConfig] = {
    "lora": LoraConfig(r=3, lora_alpha=2, target_modules=TARGETS),
    "rslora": LoraConfig(
        r=2, lora_alpha=3, use_rslora=True, target_modules=["to_q", "conv1"], alpha_pattern={"to_q": 7}
    ),
    "patterns": LoraConfig(
        r=3, rank_pattern={"to_v": 2, "conv1": 4}, alpha_pattern={"to_q": 7}, target_modules=TARGETS
    ),
    "pissa": LoraConfig(r=2, init_lora_weights="pissa", target_modules=["to_q", "to_v"]),
    "loha": LoHaConfig(r=2, alpha=3, rank_pattern={"to_v": 3}, target_modules=TARGETS),
    "loha effective": LoHaConfig(r=2, alpha=3, use_effective_conv2d=True, target_modules=TARGETS),
}
NAMINGS = ("kohya", "lycoris", "diffusers")


def saved(config: ak.AdapterConfig, folder: Path, make: Callable[[], nn.Module] = unet) -> Tensor:
    """An adapter of this config in `folder`, and what the model computes with it."""
    model = make()
    adapters = ak.attach(model)
    adapters.add("a", config.replace(modules_to_save=None))
    randomise(adapters, "a", 1)
    adapters.save("a", folder)
    return output(model)


def loaded(source: Path, make: Callable[[], nn.Module] = unet) -> Tensor:
    model = make()
    assert ak.attach(model).load(source, "x").ok
    return output(model)


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_change_that_is_scaled_by_0_changes_nothing_there(naming: Any, tmp_path: Path) -> None:
    """An alpha of 0 means the rank in files of kohya-ss and LyCORIS, and 0 in a header of diffusers."""
    expected = saved(LoraConfig(r=2, lora_alpha=0, target_modules=["to_q"]), tmp_path / "a")
    torch.testing.assert_close(output(unet()), expected)
    ak.convert_file(tmp_path / "a", tmp_path / "there.safetensors", naming=naming, base=unet())
    torch.testing.assert_close(loaded(tmp_path / "there.safetensors"), expected)


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("case", CONFIGS)
def test_there_and_back_gives_the_same_outputs_and_tensors(case: str, naming: Any, tmp_path: Path) -> None:
    expected = saved(CONFIGS[case], tmp_path / "a")
    method = CONFIGS[case].method
    there, back = tmp_path / "there.safetensors", tmp_path / "back"
    if method == "loha" and naming == "diffusers":
        with pytest.raises(ak.UnsupportedError, match=r"The method 'loha' has no form in naming='diffusers'\. Convert"):
            ak.convert_file(tmp_path / "a", there, to=method, naming=naming)
        assert not there.exists()
        return
    report = ak.convert_file(tmp_path / "a", there, to=method, naming=naming, base=unet())
    assert report.method == method
    torch.testing.assert_close(loaded(there), expected, rtol=0, atol=1e-6)
    if naming == "lycoris" and case != "pissa":  # which computes the same with it
        model = unet()
        assert (expected - output(model)).abs().max() > 0.01
        create_lycoris_from_weights(1.0, str(there), model)[0].apply_to()
        torch.testing.assert_close(output(model), expected, rtol=0, atol=1e-5)
    ak.convert_file(there, back, to=method, base=unet().to("meta"))
    torch.testing.assert_close(loaded(back), expected, rtol=0, atol=1e-6)
    tensors, wanted = read(back)[0], read(tmp_path / "a")[0]
    assert tensors.keys() == wanted.keys()
    if case != "rslora":
        assert all(torch.equal(tensors[key], tensor) for key, tensor in wanted.items())
    else:  # PEFT reads what comes back
        theirs = peft.PeftModel.from_pretrained(unet(), back).eval()
        torch.testing.assert_close(output(theirs.base_model.model), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("algo", ["lora", "locon", "loha"])
def test_files_that_lycoris_wrote_are_converted(algo: str, tmp_path: Path) -> None:
    model, file = unet(), tmp_path / "x.safetensors"
    options = {"use_tucker": True, "conv_dim": 2} if algo == "locon" else {}
    expected = lycoris_file(model, file, algo=algo, **options)
    to = "loha" if algo == "loha" else "lora"
    ak.convert_file(file, tmp_path / "same", to=to, base=unet())
    torch.testing.assert_close(loaded(tmp_path / "same"), expected, rtol=0, atol=2e-6)
    ak.convert_file(file, tmp_path / "lora", base=unet())
    torch.testing.assert_close(loaded(tmp_path / "lora"), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("naming", "part", "key"),
    [
        ("kohya", None, "lora_unet_down_blocks_0_attn1_to_q.lora_down.weight"),
        ("kohya", "lora_te2", "lora_te2_down_blocks_0_attn1_to_q.lora_down.weight"),
        ("lycoris", None, "lycoris_down_blocks_0_attn1_to_q.lora_down.weight"),
        ("lycoris", "lora_unet", "lora_unet_down_blocks_0_attn1_to_q.lora_down.weight"),
        ("diffusers", None, "unet.down_blocks.0.attn1.to_q.lora_A.weight"),
        ("diffusers", "transformer", "transformer.down_blocks.0.attn1.to_q.lora_A.weight"),
    ],
)
def test_keys_are_those_of_the_other_program(naming: Any, part: str | None, key: str, tmp_path: Path) -> None:
    saved(CONFIGS["lora"], tmp_path / "a")
    file = tmp_path / "a.safetensors"
    ak.convert_file(tmp_path / "a", file, naming=naming, as_component=part)
    tensors = load_file(file)
    assert key in tensors
    if naming != "diffusers":
        assert tensors[key.replace("lora_down.weight", "alpha")] == 2.0


def test_diffusers_header_is_a_config_of_peft(tmp_path: Path) -> None:
    saved(CONFIGS["patterns"], tmp_path / "a")
    file = tmp_path / "a.safetensors"
    ak.convert_file(tmp_path / "a", file, naming="diffusers", as_component="transformer")
    fields = json.loads(metadata_of(file)["lora_adapter_metadata"])
    theirs = peft.LoraConfig(**{k.removeprefix("transformer."): v for k, v in fields.items()})
    assert (theirs.r, theirs.rank_pattern, theirs.alpha_pattern) == (3, {"to_v": 2, "conv1": 4}, {"to_q": 7})


def test_text_encoders_go_from_kohya_to_diffusers(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "fc1"])
    expected = saved(config, tmp_path / "a", text_encoder)
    kohya, diffusers = tmp_path / "k.safetensors", tmp_path / "d.safetensors"
    ak.convert_file(tmp_path / "a", kohya, naming="kohya", as_component="lora_te1")
    assert all(key.startswith("lora_te1_text_model_encoder_layers_") for key in load_file(kohya))
    ak.convert_file(kohya, diffusers, naming="diffusers", as_component="text_encoder", base=text_encoder())
    torch.testing.assert_close(loaded(diffusers, text_encoder), expected)


def test_one_part_of_a_pipeline_is_taken(tmp_path: Path) -> None:
    expected = saved(CONFIGS["lora"], tmp_path / "a")
    saved(LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "t", text_encoder)
    for name, part in (("a", "unet"), ("t", "text_encoder")):
        ak.convert_file(tmp_path / name, tmp_path / f"{name}.safetensors", naming="diffusers", as_component=part)
    both = tmp_path / "both.safetensors"
    save_file(load_file(tmp_path / "a.safetensors") | load_file(tmp_path / "t.safetensors"), both)
    with pytest.raises(ak.CheckpointError, match=r"is for several models of a pipeline: 'text_encoder', 'unet'\. Say"):
        ak.convert_file(both, tmp_path / "no")
    save_file(load_file(both), both, metadata_of(tmp_path / "a.safetensors"))
    ak.convert_file(both, tmp_path / "unet", component="unet")
    with pytest.warns(ak.AdapterWarning, match="other models of a pipeline, which this model is not: 'text_encoder'"):
        ak.convert_file(both, tmp_path / "by its base", base=unet())
    equal(tmp_path / "by its base", tmp_path / "unet", config=False)
    torch.testing.assert_close(loaded(tmp_path / "unet"), expected)


def test_names_with_underscores_need_a_base(tmp_path: Path) -> None:
    saved(CONFIGS["lora"], tmp_path / "a")
    ak.convert_file(tmp_path / "a", tmp_path / "k.safetensors", naming="kohya")
    message = r"k\.safetensors: its names, such as 'lora_unet_.*', have '_' for '\.', so the layers' paths cannot be"
    with pytest.raises(ak.CheckpointError, match=message):
        ak.convert_file(tmp_path / "k.safetensors", tmp_path / "no")


@pytest.mark.parametrize("fields", [{}, {"rank": 1}, {"energy": 0.9}], ids=str)
@pytest.mark.parametrize("name", ["a", "h", "v"])
def test_a_conversion_is_that_of_the_model(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    adapters = mixed(build("bert"))
    source, files = adapters.save(name, tmp_path / name), tmp_path / "files"
    report = ak.convert_file(source, files, base=build("bert").to("meta") if name == "v" else None, **fields)
    if name == "a" and not fields:  # the same method: nothing is made anew
        equal(files, source)
        return
    memory = adapters.convert(name, to="lora", name="c", **fields)
    assert (dict(report.ranks), dict(report.errors)) == (dict(memory.ranks), dict(memory.errors))
    equal(files, adapters.save("c", tmp_path / "memory"))


@pytest.mark.parametrize(
    ("name", "base", "head", "classes"),
    [
        ("bert", "bert", "classifier", 5),  # other rows than the base's head
        ("bert", "bert", "classifier", 3),
        ("bert", "body", "classifier", 5),  # a base without that head
        ("bert", "body", "classifier", 3),
        ("llama", "llama", "lm_head", 2),  # no classifier: the model's own labels, not one for each token
    ],
)
def test_the_base_and_the_rows_of_a_head_tell_the_labels_that_a_file_lacks(
    name: str, base: str, head: str, classes: int, tmp_path: Path
) -> None:
    adapters = ak.attach(build(name))
    target, fields = ("query", {"num_labels": classes}) if name == "bert" else ("q_proj", {})
    adapters.add("a", LoraConfig(r=2, target_modules=[target], modules_to_save=[head]), **fields)
    adapters.save("a", tmp_path / "a")
    save_file(read(tmp_path / "a")[0], tmp_path / "a" / WEIGHTS)  # as PEFT writes it
    model: Any = build(name)
    own = {i: f"class {i}" for i in model.config.id2label}
    model.config.id2label = own
    ak.convert_file(tmp_path / "a", tmp_path / "out", rank=1, base=model.bert if base == "body" else model)
    labels = ak.inspect_adapter(tmp_path / "out").labels
    assert labels == (own if classes == len(own) else {i: f"LABEL_{i}" for i in range(classes)})
    ak.attach(model).load(tmp_path / "a", "a")
    assert model.config.id2label == labels


def test_heads_biases_and_half_precision_are_kept(tmp_path: Path) -> None:
    source = classifiers((2, 4)).save("b", tmp_path / "b")
    ak.convert_file(source, tmp_path / "same")
    equal(tmp_path / "same", source)
    held, labels, config = read(source)
    half = tmp_path / "half"
    half.mkdir()
    save_file({key: tensor.half() for key, tensor in held.items()}, half / WEIGHTS, labels)
    (half / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    ak.convert_file(half, tmp_path / "same half")
    equal(tmp_path / "same half", half)
    ak.convert_file(source, tmp_path / "small", rank=1, dtype=torch.bfloat16)
    tensors, metadata, _ = read(tmp_path / "small")
    assert metadata == read(source)[1]
    assert {str(t.dtype) for k, t in tensors.items() if "classifier" in k} == {"torch.float32"}
    assert {str(t.dtype) for k, t in tensors.items() if "lora" in k} == {"torch.bfloat16"}
    adapters = tiny("bert", {"a": {"bias": "all"}}, torch.float32)
    adapters.save("a", tmp_path / "biased")
    ak.convert_file(tmp_path / "biased", tmp_path / "copy")
    equal(tmp_path / "copy", tmp_path / "biased")


def test_what_a_naming_has_no_place_for_is_refused_or_left_out(tmp_path: Path) -> None:
    classifiers().save("a", tmp_path / "heads")
    tiny("bert", {"a": {"bias": "all"}}, torch.float32).save("a", tmp_path / "biases")
    tiny("bert", {"a": {"lora_bias": True, "target_modules": ["query"]}}, torch.float32).save(
        "a", tmp_path / "lora_bias"
    )
    tiny("embednet", {"a": {}}, torch.float32).save("a", tmp_path / "embedding")
    cases = {
        "heads": r"naming='kohya' has no place for heads, such as that of 'classifier'\. heads='drop' leaves them",
        "biases": r"naming='kohya' has no place for trained biases, such as that of '.*'",
        "lora_bias": r"naming='kohya' has no name for 'lora_B\.bias' of '.*query'\. Keep PEFT's format",
        "embedding": r"naming='kohya' has no name for 'lora_embedding_A' of 'embed'",
    }
    for name, message in cases.items():
        with pytest.raises(ak.UnsupportedError, match=message):
            ak.convert_file(tmp_path / name, tmp_path / "no.safetensors", naming="kohya")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(cases)
    for out, given in (("peft", {}), ("rank", {"rank": 1}), ("k.safetensors", {"naming": "kohya"})):
        report = ak.convert_file(tmp_path / "heads", tmp_path / out, heads="drop", **given)  # type: ignore[arg-type]
        found = ak.inspect_adapter(tmp_path / out)
        assert found.layers
        assert (report.heads, found.heads, found.labels) == ((), {}, None)


def test_names_that_become_one_are_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(2, 2)}), "a_b": nn.Linear(2, 2)})
    adapters = ak.attach(model)
    adapters.add("x", LoraConfig(r=1, target_modules=["a.b", "a_b"]))
    adapters.save("x", tmp_path / "x")
    with pytest.raises(ak.CheckpointError, match=r"'a\.b' and 'a_b' have the same name when '_' is written for '\.'"):
        ak.convert_file(tmp_path / "x", tmp_path / "no.safetensors", naming="kohya")


def test_old_names_of_diffusers_without_a_base_are_the_layers_of_each_part(tmp_path: Path) -> None:
    """diffusers called the layers of both models `to_q_lora`; those of the text encoder are `q_proj`."""
    file, noise = tmp_path / "a.safetensors", torch.Generator().manual_seed(0)
    parts = {
        "text_encoder": ("text_model.encoder.layers.1.self_attn.", text_encoder, 16),
        "unet": ("down_blocks.0.attn1.processor.", unet, 8),
    }
    tensors = {
        f"{part}.{path}to_{name}_lora.{which}.weight": torch.randn(shape, generator=noise)
        for part, (path, _, size) in parts.items()
        for name in ("q", "out")
        for which, shape in (("down", (2, size)), ("up", (size, 2)))
    }
    save_file(tensors, file)
    for part, (_, make, _) in parts.items():
        ak.convert_file(file, tmp_path / part, component=part)
        model = make()
        assert ak.attach(model).load(file, "x", component=part).ok
        torch.testing.assert_close(loaded(tmp_path / part, make), output(model), rtol=0, atol=1e-6)


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    saved(CONFIGS["lora"], tmp_path / "a")
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"naming": "x"}, ak.ConfigError, r"naming = 'x' must be one of 'peft', 'kohya', 'comfyui', 'lycoris'"),
        ({"naming": "kohya"}, ak.ConfigError, r"other programs' form is one file; give it a name that ends in \.safet"),
        (
            {"naming": "kohya", "as_component": "unet"},
            ak.ConfigError,
            r"as_component = 'unet' is none of naming='kohya': 'lora_unet'",
        ),
        ({"heads": "average"}, ak.ConfigError, "heads = 'average' must be 'keep' or 'drop'"),
        ({"to": "x"}, ak.UnknownNameError, "Unknown adapter method 'x'"),
        ({"to": "loha"}, ak.UsageError, "The method 'loha' cannot be a result"),
        ({"rank": 1, "energy": 0.5}, ak.ConfigError, "Give rank= or energy=, not both"),
        ({"rank": 99}, ak.ConfigError, "rank = 99 is larger than"),
        ({"out": tmp_path / "a"}, ak.ConfigError, "is an input"),
        ({"source": tmp_path / "none"}, ak.CheckpointError, "There is no folder"),
    ]
    for given, kind, message in cases:
        with pytest.raises(kind, match=message):
            ak.convert_file(**{"source": tmp_path / "a", "out": tmp_path / "out", **given})
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    there = tmp_path / "a.safetensors"
    ak.convert_file(tmp_path / "a", there, naming="kohya")
    before = there.read_bytes()
    with pytest.raises(ak.SaveError, match=r"a\.safetensors exists already\. Say overwrite=True"):
        ak.convert_file(tmp_path / "a", there, naming="lycoris")
    assert there.read_bytes() == before
    ak.convert_file(tmp_path / "a", there, naming="lycoris", overwrite=True)
    with pytest.raises(ak.SaveError, match=r"Nothing can be written in /proc/none"):
        ak.convert_file(tmp_path / "a", "/proc/none/x.safetensors", naming="kohya")
    without(tmp_path / "a", "to_q.lora_B")
    with pytest.raises(ak.CheckpointError, match="missing"):
        ak.convert_file(tmp_path / "a", tmp_path / "out")


def test_a_file_that_cannot_be_put_in_its_place_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(CONFIGS["lora"], tmp_path / "a")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ak.SaveError, match=r"x\.safetensors cannot be written: .*No space left.*is untouched"):
        ak.convert_file(tmp_path / "a", tmp_path / "x.safetensors", naming="kohya")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
