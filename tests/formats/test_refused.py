"""Files of programs that cannot be read: each is named, with the cause and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.models import build
from torch import nn

import adapterkit as ak

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
A, B = torch.ones(2, 8), torch.ones(8, 2)
LAYER = "transformer.h.0.attn.attn"
PEFT = '{"peft_type": "LORA", "r": 2, "target_modules": ["query"]}'

# A key of each program's files, and what the message says: what it is, and what to do.
KEYS: dict[str, tuple[str, str, str]] = {
    "deepspeed-chat": ("model.layers.0.q_proj.lora_right_weight", "DeepSpeed-Chat", "merges it into what it saves"),
    "nemo": (
        "model.decoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight",
        "NVIDIA NeMo",
        "Export it there",
    ),
    "megatron": (
        "module.decoder.layers.0.self_attention.linear_qkv.adapter.linear_out.weight",
        "NVIDIA NeMo or Megatron",
        "Export it there",
    ),
    "litgpt": (f"{LAYER}.lora_A", "LitGPT", "litgpt merge_lora"),
    "torchtune": ("layers.0.attn.q_proj.lora_a.weight", "torchtune's own names", "FullModelHFCheckpointer writes"),
    "torchtune mlp": ("layers.3.mlp.w1.lora_b.weight", "torchtune's own names", "give that folder"),
    "xlabs": ("double_blocks.0.processor.qkv_lora1.down.weight", "XLabs", "save_lora_adapter"),
    "cloneofsimo": ("unet:0:up", "cloneofsimo", "lora_add"),
    "adapters": (
        "bert.encoder.layer.0.attention.self.query.loras.imdb.lora_A",
        "AdapterHub",
        "model.merge_adapter(name)",
    ),
    "adapters bottleneck": (
        "bert.encoder.layer.0.output.adapters.imdb.adapter_down.0.weight",
        "AdapterHub",
        "model.merge_adapter(name)",
    ),
    "ip-adapter": ("ip_adapter.1.to_k_ip.weight", "an IP-Adapter", "pipe.load_ip_adapter"),
    "control-lora": ("lora_controlnet", "a Control-LoRA", "ComfyUI"),
    "lllite": ("lllite_unet_input_blocks_4_1_attn1_to_q.down.0.weight", "a ControlNet-LLLite", "sd-scripts"),
    "nunchaku": ("transformer_blocks.0.qkv_proj.lora_down", "Nunchaku packed", "it was converted from"),
    "textual inversion": ("emb_params", "a textual inversion", "pipe.load_textual_inversion"),
    "textual inversion of diffusers": ("<cat-toy>", "a textual inversion", "pipe.load_textual_inversion"),
    "textual inversion of SDXL": ("clip_g", "a textual inversion", "pipe.load_textual_inversion"),
    "bundled alone": ("bundle_emb.cat.string_to_param.*", "a textual inversion", "load_textual_inversion"),
}
PICKLES: dict[str, tuple[Any, str, str]] = {
    "list": ([B, A, B, A], "cloneofsimo", "lora_add"),
    "automatic1111": ({"string_to_param": {"*": A}, "name": "cat", "step": 3}, "a textual inversion", "load_textual"),
    "ip-adapter": ({"image_proj": {"proj.weight": A}, "ip_adapter": {"1.to_k_ip.weight": B}}, "IP-Adapter", "load_ip"),
    "zero": ({"optimizer_state_dict": {}, "ds_config": {}, "ds_version": "0.16"}, "DeepSpeed", "zero_to_fp32.py"),
}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 12\n"
CONTENTS: dict[str, tuple[str, bytes, str]] = {
    "git lfs": (
        WEIGHTS,
        LFS,
        "is a pointer of Git LFS, which stands for the file. Fetch the file itself: git lfs pull",
    ),
    "git lfs, pickle": (PICKLE, LFS, "git lfs pull"),
    "gguf": ("a.gguf", b"GGUF\x03\x00\x00\x00" + bytes(64), "is a GGUF file of llama.cpp. Give what it was made from"),
    "gguf by another name": ("a.safetensors", b"GGUF\x03\x00\x00\x00" + bytes(64), "convert_lora_to_gguf.py read"),
    "ggla": ("ggml-adapter-model.bin", b"algg\x01\x00\x00\x00" + bytes(64), "llama.cpp before GGUF"),
    "npz": ("adapters.npz", b"PK\x03\x04" + bytes(64), "as mlx-lm wrote until 2024"),
    "nemo": ("model.nemo", b"./model_config.yaml" + bytes(600), "is an archive of NVIDIA NeMo"),
    "tar": ("trained_model.tar", b"adapter_config.json" + bytes(600), "is an archive. Unpack it, and give the folder"),
    "zip": ("a.zip", b"PK\x03\x04" + bytes(64), "is an archive. Unpack it"),
    "tar.gz": ("a.tar.gz", b"\x1f\x8b\x08" + bytes(64), "is an archive. Unpack it"),
    "gzip by another name": (WEIGHTS, b"\x1f\x8b\x08" + bytes(64), "is an archive. Unpack it"),
    "keras": ("a.h5", b"\x89HDF\r\n\x1a\n" + bytes(64), "is an HDF5 file, as Keras writes them"),
    "page": ("a.safetensors", b"<!DOCTYPE html><html>", "is a web page"),
    "nothing": ("a.safetensors", b"", "is empty: 0 bytes"),
}


def refusals(place: Path) -> list[str]:
    """What loading and looking at it without a model say."""
    found = []
    for action in (lambda: ak.attach(build("bert")).load(place, "x"), lambda: ak.inspect_adapter(place)):
        with pytest.raises((ak.CheckpointError, ak.UnsupportedError)) as caught:
            action()
        found.append(str(caught.value))
    return found


@pytest.mark.parametrize(("key", "what", "cure"), KEYS.values(), ids=KEYS)
def test_program_is_named_with_what_to_do(key: str, what: str, cure: str, tmp_path: Path) -> None:
    save_file({key: A, f"{key}2": B}, tmp_path / "a.safetensors")
    for text in refusals(tmp_path / "a.safetensors"):
        assert f"a.safetensors is {what}" in text or what in text
        assert key.removeprefix("module.") in text
        assert cure in text


@pytest.mark.parametrize(("content", "what", "cure"), PICKLES.values(), ids=PICKLES)
def test_pickle_that_is_no_state_dict_is_named(content: Any, what: str, cure: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    for text in refusals(tmp_path / "a.pt"):
        assert what in text
        assert cure in text


@pytest.mark.parametrize(("name", "content", "said"), CONTENTS.values(), ids=CONTENTS)
def test_file_that_holds_something_else_is_named(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    if name in (WEIGHTS, PICKLE):
        (tmp_path / CONFIG).write_text(PEFT)
    for text in refusals(tmp_path if name in (WEIGHTS, PICKLE) else tmp_path / name):
        assert said in text
        assert "damaged" not in text


def empty(folder: Path) -> None:
    """PEFT's famous file of 443 bytes."""
    torch.save({}, folder / PICKLE)


def zero(folder: Path) -> None:
    save_file({f"base_model.model.x.lora_{n}.weight": torch.empty(0) for n in "AB"}, folder / WEIGHTS)


@pytest.mark.parametrize(("make", "said"), [(empty, "holds no tensors"), (zero, "DeepSpeed's ZeRO-3")])
def test_files_without_values_are_not_another_base(make: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(PEFT)
    make(tmp_path)
    for text in refusals(tmp_path):
        assert said in text
        assert "another base" not in text


def test_fine_tuned_model_is_not_an_adapter(tmp_path: Path) -> None:
    build("bert").save_pretrained(tmp_path)
    for text in refusals(tmp_path / "model.safetensors"):
        assert "holds whole weights" in text
        assert "ak.extract_files(base, tuned)" in text


def adapterhub(folder: Path) -> None:
    (folder / CONFIG).write_text(
        '{"config": {"architecture": "lora", "r": 8}, "hidden_size": 64, "model_class": "Bert"}'
    )
    torch.save({"bert.encoder.layer.0.attention.self.query.loras.a.lora_A": A}, folder / "pytorch_adapter.bin")


def zero_checkpoint(folder: Path) -> None:
    (folder / "global_step10").mkdir()
    (folder / "zero_to_fp32.py").touch()


def pointer_to_config(folder: Path) -> None:
    (folder / CONFIG).write_bytes(LFS)
    save_file({"base_model.model.x.lora_A.weight": A}, folder / WEIGHTS)


def lost_weights(folder: Path) -> None:
    (folder / CONFIG).write_text(PEFT)
    (folder / WEIGHTS).symlink_to("../../blobs/4d7a")


def lost_config(folder: Path) -> None:
    (folder / CONFIG).symlink_to("../../blobs/4d7a")
    save_file({"base_model.model.x.lora_A.weight": A}, folder / WEIGHTS)


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "adapters": (adapterhub, "AdapterHub"),
    "deepspeed": (zero_checkpoint, "python zero_to_fp32.py . OUT"),
    "litgpt": (lambda f: (f / "lit_model.pth.lora").touch(), "It is of LitGPT. Merge it"),
    "nemo": (lambda f: [(f / name).mkdir() for name in ("context", "weights")], "It is of NVIDIA NeMo. Export it"),
    "model": (lambda f: build("bert").save_pretrained(f), "It is a model. ak.extract_files(base, model)"),
    "one file": (lambda f: save_file({"x": A}, f / "style.safetensors"), "If style.safetensors is another program's"),
    "links into a hub's cache that was left behind": (
        lost_weights,
        f"{WEIGHTS} is a link to ../../blobs/4d7a, which is not there. Copy files, not",
    ),
    "a link for the config": (lost_config, f"{CONFIG} is a link to ../../blobs/4d7a, which is not there. Copy files"),
    "pointer": (pointer_to_config, "adapter_config.json is a pointer of Git LFS"),
}


@pytest.mark.parametrize(("make", "said"), FOLDERS.values(), ids=FOLDERS)
def test_folder_of_another_program_is_named(make: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    make(tmp_path)
    for text in refusals(tmp_path):
        assert said in text


def test_a_model_s_own_modules_are_no_sign(tmp_path: Path) -> None:
    """Names such as `adapters` and `adapter` are those of modules, too."""
    model = nn.ModuleDict({"adapters": nn.ModuleList([nn.Linear(4, 4)]), "adapter": nn.ModuleDict()})
    model["adapter"]["linear_in"] = nn.Linear(4, 4)  # type: ignore[operator]
    outer = nn.ModuleDict({"x": model})
    adapters = ak.attach(outer)
    adapters.add("a", ak.config("lora", r=2, target_modules=["0", "linear_in"]))
    assert adapters.load(adapters.save("a", tmp_path / "a"), "b").ok
