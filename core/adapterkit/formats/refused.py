"""Files that cannot be read as an adapter: what each is, why it cannot be read, and what to do instead."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from adapterkit.contract import FILE_PREFIX
from adapterkit.errors import CheckpointError, UnsupportedError, warn
from adapterkit.formats.layouts import CONFIG_FILE, AdapterFiles

_EXTRACT = "ak.extract_files(base, merged) then makes an adapter of the difference"


class _Program(NamedTuple):
    """An expression for keys of a program's files, what such a file is, and what to do."""

    keys: str
    what: str
    cure: str

    def refusal(self, place: Path, shown: str) -> UnsupportedError:
        """The error for a file of it, which shows by what it is known."""
        return UnsupportedError(f"{place} is {self.what} ({shown}). It cannot be read here. {self.cure}.")


_ZERO = (
    "Join the parts of that training's checkpoint with the script that DeepSpeed puts into its folder "
    "(python zero_to_fp32.py . OUT), and load what it writes"
)
_CLONEOFSIMO = _Program(
    r"^(unet|text_encoder)(:\d+)+:(up|down|alpha|rank)$",
    "a LoRA of cloneofsimo's lora package, which numbers the layers of a diffusers of 2022 and does not name them",
    f"Merge it there (lora_add MODEL LORA OUT 1.0 --mode upl) and load the result with diffusers; {_EXTRACT}",
)
_LITGPT = _Program(
    r"(^|\.)(transformer\.h\.\d+\.(attn|mlp)\.\w+|lm_head)\.lora_[AB]$",
    "LoRA of LitGPT, whose config is in another file and which has q, k and v in one layer",
    f"Merge it (litgpt merge_lora) and convert the result (litgpt convert_from_litgpt); {_EXTRACT}",
)
_NEMO = _Program(
    r"(^|\.)(adapter_layer\.lora_\w+|lora_\w+_adapter|adapter)\.linear_(in|out)\.weight$",
    "LoRA of NVIDIA NeMo or Megatron, which splits and joins layers by the settings of its training",
    "Export it there to Hugging Face's layout, merged or as PEFT's folder",
)
_ADAPTERHUB = _Program(
    r"\.(loras\.[^.]+\.lora_[AB]|adapters\.[^.]+\.adapter_(down|up)\.|prefix_tunings?\.)|^prefix_tuning\.",
    "an adapter of the library adapters (AdapterHub), which has its own modules",
    f"Merge it there (model.load_adapter(...), model.merge_adapter(name)) and save the model; {_EXTRACT}",
)
# A file is of a program if any of its keys has the form.
_PROGRAMS = (
    _Program(
        r"\.lora_(left|right)_weight$",
        "a checkpoint of DeepSpeed-Chat, whose LoRA has no scaling in the file",
        f"DeepSpeed-Chat merges it into what it saves at the end (convert_lora_to_linear_layer); {_EXTRACT}",
    ),
    _NEMO,
    _LITGPT,
    _Program(
        r"^layers\.\d+\.(attn|mlp|cross_attn)\.\w+\.(lora_[ab]\.weight|magnitude)$",
        "an adapter in torchtune's own names, without its alpha",
        "torchtune's FullModelHFCheckpointer writes adapter_model.safetensors and adapter_config.json beside it: give "
        "that folder",
    ),
    _Program(
        r"\.processor\.(qkv|proj)_lora[12]?\.(down|up)\.weight$",
        "a Flux LoRA of XLabs, whose processors compute q, k and v together",
        "Load it with diffusers (pipe.load_lora_weights) and save it there (pipe.transformer.save_lora_adapter)",
    ),
    _CLONEOFSIMO,
    _ADAPTERHUB,
    _Program(
        r"^(?!base_model\.).*\.(adapters\.(?!\d+\.)[^.]+\.[a-z]+_|adapter_(heads|biases)\.)",
        "the state dict of a model with adapterkit's adapters, without their configs",
        "Add the adapter with its config and load this with model.load_state_dict; adapters.save writes both",
    ),
    _Program(
        r"^(image_proj|ip_adapter)(\.|$)",
        "an IP-Adapter, which adds attention for images and is not a change of the model's weights",
        "Load it with diffusers: pipe.load_ip_adapter",
    ),
    _Program(
        r"^lllite_(unet|dit)_",
        "a ControlNet-LLLite, small networks for a control image and not a change of the model's weights",
        "Load it in ComfyUI or in kohya-ss' sd-scripts, which made it",
    ),
    _Program(
        r"^(transformer|single_transformer)_blocks\.\d+\.\w+\.lora_(down|up)$",
        "a LoRA that Nunchaku packed for its quantised models",
        "Give the file that it was converted from",
    ),
    _Program(
        r"^lora_controlnet$",
        "a Control-LoRA, which is a ControlNet's own weights beside factors",
        "Load it in ComfyUI, or take the ControlNet that it was made from",
    ),
    _Program(
        r"^(emb_params|string_to_param(\..*)?|clip_[lg]|<[^<>]+>)$|^bundle_emb\.",
        "a textual inversion: embeddings of new tokens, and no change of the model's weights",
        "Load it with diffusers: pipe.load_textual_inversion",
    ),
)
_ANY = re.compile("|".join(f"(?:{program.keys})" for program in _PROGRAMS))
# Keys of the embeddings of a new token, which OneTrainer puts beside a LoRA, begin so.
TOKENS = "bundle_emb."
# What safetensors files have before their header, and how pickles of torch begin: archives, and its old format.
_LENGTH_BYTES, _PICKLES = 8, (b"PK\x03\x04", b"\x80\x02\x8a")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_TENSOR_SUFFIXES = (".safetensors", *_PICKLE_SUFFIXES)
_OF_ADAPTERS = re.compile(r"lora|hada_|lokr_|adapter|oft_|vera_|ia3|boft|diff")
_PAGE = "is a web page: the download was not allowed, or the address is that of a page. Fetch the file itself"
# What a file begins with (in small letters) that is neither safetensors nor a pickle.
_ARCHIVE = "is an archive. Unpack it, and give the folder or the file in it"
_BEGINNINGS = (
    (
        b"version https://git-lfs",
        "is a pointer of Git LFS, which stands for the file. Fetch the file itself: git lfs pull, in the repository's "
        "folder",
    ),
    (
        b"gguf",
        "is a GGUF file of llama.cpp. Give what it was made from: the adapter folder that convert_lora_to_gguf.py "
        "read, or the model's folder of safetensors",
    ),
    (b"algg", "is an adapter of llama.cpp before GGUF. Give the PEFT folder that it was made from"),
    (b"\x93numpy", "is an array of NumPy. Give the folder that PEFT wrote"),
    *((begin, _ARCHIVE) for begin in (b"\x1f\x8b", b"bzh", b"\xfd7zxz", b"7z\xbc\xaf", b"rar!", b"\x28\xb5\x2f\xfd")),
    (b"\x89hdf", "is an HDF5 file, as Keras writes them. Give the file that another program wrote for torch"),
    (b"<!doctype", _PAGE),
    (b"<html", _PAGE),
)
_SUFFIXES = {
    ".npz": "is an archive of arrays, as mlx-lm wrote until 2024. Save the adapter with a later mlx-lm, which writes "
    "adapters.safetensors",
    **dict.fromkeys((".tar", ".zip"), _ARCHIVE),
    ".nemo": "is an archive of NVIDIA NeMo. Export the adapter there to Hugging Face's layout",
}
# Files beside an adapter that do not belong to it: a training's state, a merged model, converted files.
_KNOWN_BESIDE = re.compile(
    r"(\d+_)?adapters?[_.]|(pytorch_)?model(_\d+|_fsdp|-\d+-of-\d+)?\.|consolidated|ggml|pytorch_lora_weights\.|"
    r"optim|(lr_)?scheduler|(grad_)?scaler|rng_state|random_states|train(ing|er)?_(args|state)|sampler|dl_state|"
    r"global_step|checkpoint|base_state\.|batch_norms\."
)


def check_content(file: Path) -> bool:
    """Refuse a file that is not one of tensors, whatever it is called.

    Returns:
        Whether it is a pickle of torch, or a safetensors file.

    Raises:
        CheckpointError: says what it is, and what to do.
    """
    try:
        with file.open("rb") as opened:
            first = opened.read(64)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}.") from error
    if not first:
        raise CheckpointError(f"{file} is empty: 0 bytes. It was not written to its end; fetch or save it again.")
    if file.suffix in _SUFFIXES:
        raise CheckpointError(f"{file} {_SUFFIXES[file.suffix]}.")
    check_beginning(first, file)
    if first[_LENGTH_BYTES : _LENGTH_BYTES + 1] == b"{":
        return False
    return first.startswith(_PICKLES) or file.suffix in _PICKLE_SUFFIXES  # with the suffix alone it is damaged


def check_beginning(first: bytes, file: Path) -> None:
    """Raise `CheckpointError` if a file's first bytes are those of something else: of a pointer, of a page."""
    why = next((why for begin, why in _BEGINNINGS if first.lower().startswith(begin)), None)
    if why is not None:
        raise CheckpointError(f"{file} {why}.")


def check_config(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse the `adapter_config.json` of a program whose folders cannot be read.

    Raises:
        UnsupportedError: names the program.
    """
    if "peft_type" not in config and isinstance(config.get("config"), Mapping | str):
        raise _ADAPTERHUB.refusal(folder, "its adapter_config.json")


def what_else(folder: Path) -> str:
    """What a folder without an adapter's config is, and what to do, if it is known."""
    names = sorted(path.name for path in folder.iterdir())
    if any(re.match(r"zero_to_fp32\.py|global_step\d+|(bf16_)?zero_pp_rank|mp_rank_\d+", name) for name in names):
        return f" It is a checkpoint of DeepSpeed. {_ZERO}."
    if any(name.startswith("lit_model.pth") for name in names):
        return f" It is of LitGPT. {_LITGPT.cure}."
    if {"context", "weights"} <= {*names} or "model_config.yaml" in names:
        return f" It is of NVIDIA NeMo. {_NEMO.cure}."
    if "config.json" in names:
        return " It is a model. ak.extract_files(base, model) makes an adapter of its difference to a base."
    files = [name for name in names if name.endswith(_TENSOR_SUFFIXES)]
    return f" If {files[0]} is another program's adapter, give that file." if len(files) == 1 else ""


def check_loaded(loaded: Any, file: Path) -> None:
    """Refuse what a pickle holds where it is known and not names with tensors.

    Raises:
        UnsupportedError: says what it is, and what to do.
    """
    if isinstance(loaded, list) and loaded and all(isinstance(value, Tensor) for value in loaded):
        raise _CLONEOFSIMO.refusal(file, "a list of tensors")
    if not isinstance(loaded, Mapping):
        return
    if loaded.keys() & {"ds_version", "ds_config", "optimizer_state_dict"}:
        raise UnsupportedError(f"{file} is one process's part of a DeepSpeed checkpoint. {_ZERO}.")
    for name, value in loaded.items():
        if isinstance(value, Mapping):
            _check_keys([name, *(f"{name}.{key}" for key in value)], file)


def check_program(files: AdapterFiles) -> None:
    """Refuse tensors that hold nothing, and those of programs whose adapters cannot be read.

    Raises:
        CheckpointError: there are no tensors, they have no values, or they are of a PEFT folder and came without it.
        UnsupportedError: names the program.
    """
    place, tensors = files.folder, files.tensors
    if not tensors:
        raise CheckpointError(
            f"{place} holds no tensors. PEFT writes such a file where a script has replaced model.state_dict, as "
            "alpaca-lora's did, and where ZeRO-3 or FSDP hold the parameters. The checkpoints of that training may "
            "have them; else it has to be trained again."
        )
    empty = [key for key, tensor in tensors.items() if tensor.shape == (0,)]
    if len(empty) == len(tensors):
        raise CheckpointError(
            f"{place}: every tensor has shape (0,), such as {empty[0]!r}. It was saved under DeepSpeed's ZeRO-3, which "
            f"had not gathered the parameters. {_ZERO}; or save with stage3_gather_16bit_weights_on_model_save."
        )
    if files.config is None and any(key.startswith(FILE_PREFIX) for key in tensors):
        raise CheckpointError(
            f"{place} has PEFT's keys; the scaling that goes with them is in its {CONFIG_FILE}. Give the "
            "folder that holds both."
        )
    _check_keys([key for key in tensors if not key.startswith(TOKENS)] or tensors, place)


def _check_keys(keys: Iterable[object], place: Path) -> None:
    """Raise `UnsupportedError` if a key is of a program whose adapters cannot be read."""
    named = [key for key in keys if isinstance(key, str) and _ANY.search(key)]  # none, as a rule
    for program in _PROGRAMS if named else ():
        for key in named:
            if re.search(program.keys, key):
                raise program.refusal(place, repr(key))


def is_full_model(keys: Collection[str]) -> bool:
    """Whether a file has whole weights of layers, and nothing that looks like an adapter's."""
    whole = [key for key in keys if key.endswith((".weight", ".bias"))]
    return len(whole) > 0.9 * len(keys) and not any(_OF_ADAPTERS.search(key) for key in keys)


def warn_of_weights_beside(place: object, names: Iterable[str]) -> None:
    """Warn of files of tensors beside an adapter's that are not of a model or of a training's state.

    Args:
        names: of all files there.
    """
    files = sorted(name for name in names if name.endswith(_TENSOR_SUFFIXES) and not _KNOWN_BESIDE.match(name))
    if files:
        warn(
            f"{place} also holds weights beside the adapter: {', '.join(files)}. They are not read. If they were "
            "trained with the adapter (the projector of LLaVA, the embeddings of LongLoRA, a value head), put them "
            "into the base first."
        )
