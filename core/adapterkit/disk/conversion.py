"""Converting an adapter's files: to another method's form, and from and to other programs' names: `ak.convert_file`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from adapterkit.combining import Choices, check_size
from adapterkit.contract import (
    DOTTED,
    FLAT,
    OPTIONAL,
    AdapterConfig,
    strip_file_prefix,
    without_values,
)
from adapterkit.disk.adapter_file import AdapterContent, AdapterFile, output_place
from adapterkit.disk.combination import combined, other_biases
from adapterkit.disk.model import Base
from adapterkit.errors import CheckpointError, SaveError, UnsupportedError, UsageError, usage
from adapterkit.files import (
    WEIGHTS_FILE,
    FactorSpool,
    ServerName,
    appearing,
    problems_of,
    server_named,
    write_folder,
    write_tensors,
)
from adapterkit.formats import MLX_WEIGHTS, layers_of, mlx_files, original_names
from adapterkit.model import BaseModules, layer_tensors, named_modules
from adapterkit.results import CombineReport
from adapterkit.tensors import default_modes

Naming = Literal["peft", "kohya", "comfyui", "lycoris", "diffusers", "mlx"]
# The name of a part of a pipeline by default, and the names that it may have.
_PARTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "kohya": ("lora_unet", FLAT),
    "comfyui": ("diffusion_model", DOTTED),
    "lycoris": ("lycoris", FLAT),
    "diffusers": ("unet", DOTTED),
}


@usage()
@default_modes()
def convert_file(  # noqa: PLR0913 - what to convert, to what, and where from and to
    source: str | Path,
    out: str | Path,
    *,
    to: str = "lora",
    rank: int | None = None,
    energy: float | None = None,
    naming: Naming = "peft",
    base: str | Path | nn.Module | None = None,
    component: str | None = None,
    as_component: str | None = None,
    heads: Literal["keep", "drop"] = "keep",
    server: ServerName | None = None,
    max_rank: int | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> CombineReport:
    """Convert an adapter by its files alone, to another method, to other names, or both.

    If the adapter is of the method `to` and no size is asked for, only names change, and its tensors stay bit for bit.
    Others are converted as by `Adapters.convert`: exactly, unless `rank` or `energy` truncates.

    Other programs' files are read and written: `"kohya"` (kohya-ss and others: `lora_unet_..._to_q.lora_down`),
    `"comfyui"` (`diffusion_model....to_q.lora_down`), `"lycoris"` (`lycoris_..._to_q`), `"diffusers"`
    (`unet....to_q.lora_A`, with the config in the header, as diffusers 0.34 and later write it) and `"mlx"` (a folder
    for mlx-lm, with one rank and one scale). `"kohya"` and `"comfyui"` write the names of the model's original code
    where these programs have them: of SDXL (`input_blocks_4_1_...`), Flux (`double_blocks_0_img_attn_qkv`), Wan,
    HunyuanVideo, Stable Diffusion 3 and others. Layers that are one there are joined: exactly, and LoRA with as many
    ranks as its layers have different factors A. Scalings are exact: alphas by layer, for rsLoRA too (to float32's
    rounding). Heads and trained biases have no names there. Methods join by the hook `formats`. [Which files can be
    read and written](docs/files.md) has all layouts.

    Args:
        source: an adapter folder, a hub id, or a file of another program.
        out: the folder to write; a file that ends in `.safetensors` for any naming but `"peft"` and `"mlx"`.
        to, rank, energy: see `Adapters.convert`.
        base: as for `combine_files`; needed where names have `_` for `.` and are not those of a model's original code,
            because they do not tell the layers' paths, and where several models have the adapter's names.
        component: of a source for a whole pipeline, the part to convert, as its keys begin: `"unet"`, `"lora_te1"`.
        as_component: what the part is called in the output; by default `"lora_unet"`, `"diffusion_model"`,
            `"lycoris"` or `"unet"`.
        heads: `"drop"` leaves the adapter's heads out, and with them its labels.
        server: write a folder that `"vllm"` or `"sglang"` serves (see `check_serving`): LoRA of one rank and one alpha.
            Lower ranks are padded with zeros and scalings are folded into B, so the change stays the same. What the
            server cannot serve is refused.
        max_rank: the server's `--max-lora-rank`.
        dtype: of the output's layers; `None`: the source's, or float32 where they are made anew.
        overwrite: replace what `out` holds.

    Raises:
        CheckpointError: the source is not an adapter, is damaged, or does not tell its layers' names or sizes.
        UnsupportedError: the method cannot be converted, or the naming has no place for what the adapter holds, or the
            server does not serve it.
        ConfigError, SaveError: bad arguments, or an output that is there, is the source, or cannot be written.
    """
    check_size(rank, energy)
    default = _check_names(naming, as_component, heads, server, max_rank)
    given = Base.of(base)
    opened = AdapterFile.open(source, given, component=component)
    opened.check_told()
    place = output_place(out, [opened.files.folder], dtype, overwrite=overwrite, file=naming in _PARTS)
    with FactorSpool(place.parent, opened.mapped.release) as spool:
        choices = Choices(to=to, rank=rank, energy=energy, heads=opened.name if heads == "keep" else heads)
        result, report = _converted(opened, choices, place.name, spool, given, server, max_rank)
        if naming == "peft":
            result.write(place, dtype, spool.release)
        elif naming == "mlx":
            paths = () if given is None else [path for path, _ in named_modules(given.model)]
            _write_mlx(result, place, dtype, paths, spool.release)
        else:
            tensors, metadata = _foreign(result, naming, as_component or default, given)
            dtypes = {} if dtype is None else {k: dtype for k, t in tensors.items() if t.dim() > 0}  # alphas stay
            try:
                with appearing(place, follow=True) as fresh:
                    write_tensors(tensors, fresh, {"format": "pt", **metadata}, dtypes, spool.release)
            except OSError as error:
                raise SaveError(f"{place} cannot be written: {error}. What was there before is untouched.") from error
    return report


def _check_names(naming: str, as_component: str | None, heads: str, server: str | None, max_rank: int | None) -> str:
    """Raise `ConfigError` if an argument of `convert_file` has a value that it cannot have.

    Returns:
        The name of the part of a pipeline by default.
    """
    if naming not in get_args(Naming):
        raise UsageError(f"naming = {naming!r} must be one of {', '.join(map(repr, get_args(Naming)))}.")
    default, known = _PARTS.get(naming, ("", ()))
    if as_component not in (None, *known):
        raise UsageError(
            f"as_component = {as_component!r} is none of naming={naming!r}: {', '.join(map(repr, known))}."
        )
    if heads not in ("keep", "drop"):
        raise UsageError(f"heads = {heads!r} must be 'keep' or 'drop'.")
    if server is not None:
        server_named(server, max_rank)
        if naming != "peft":
            raise UsageError(f"{server} reads PEFT's format alone: leave `naming` out.")
    return default


def _converted(
    opened: AdapterFile,
    choices: Choices,
    name: str,
    spool: FactorSpool,
    base: Base | None,
    server: ServerName | None,
    max_rank: int | None,
) -> tuple[AdapterContent, CombineReport]:
    """The adapter as it is, if it can stay so, or made anew from its changes."""
    if server is not None:
        _check_beside_layers(opened, choices, server)
    if opened.method.name == choices.to and choices.rank is None and choices.energy is None:
        report = _as_it_is(opened, name, choices)
        if not _problems(opened, server, max_rank):
            return opened, report
    result, report = combined([opened], [1.0], choices, name, spool, base, one_rank=server is not None)
    if problems := _problems(result, server, max_rank):
        raise UnsupportedError(f"{server} does not serve {str(opened.files.folder)!r}: {'; '.join(problems)}.")
    return result, report


def _problems(result: AdapterContent, server: ServerName | None, max_rank: int | None) -> list[str]:
    """Why the server would not serve what is about to be written."""
    if server is None:
        return []
    config, tensors = result.in_file()
    return problems_of(config.to_dict(), {key: tuple(t.shape) for key, t in tensors.items()}, server, max_rank)


def _check_beside_layers(opened: AdapterFile, choices: Choices, server: ServerName) -> None:
    """Raise `UnsupportedError` if there are trained biases, or heads that shall be kept."""
    if opened.biases:
        raise UnsupportedError(
            f"{server} does not serve trained biases, such as that of {next(iter(opened.biases))!r}. Merge the adapter "
            "into the model (ak.merge_checkpoint), and serve that."
        )
    if opened.heads and choices.heads != "drop":
        raise UnsupportedError(
            f"{server} does not serve what an adapter trains in full, such as {next(iter(opened.heads))!r}. "
            "heads='drop' leaves it out."
        )


def _as_it_is(opened: AdapterFile, name: str, choices: Choices) -> CombineReport:
    """Leave the adapter as its files have it, perhaps without its heads."""
    opened.check_fits()
    if choices.heads == "drop":
        if opened.biases:
            everywhere = opened.config.trained_biases == "all"
            opened.biases |= other_biases([opened], (), opened.biases, everywhere=everywhere)
        opened.heads = {}
    found = {path: opened.method.factors(without_values(layer)) for path, layer in opened.built.items()}
    ranks = {path: factors.rank for path, factors in found.items() if factors is not None}
    return CombineReport(name, opened.method.name, ranks, dict.fromkeys(ranks, 0.0), tuple(opened.heads))


def _write_mlx(
    result: AdapterContent,
    place: Path,
    dtype: torch.dtype | None,
    paths: Collection[str],
    release: Callable[[], None],
) -> None:
    """Write mlx-lm's folder."""
    if (place / WEIGHTS_FILE).exists():
        raise SaveError(f"{place} is an adapter in PEFT's format; give mlx-lm's a folder of its own.")
    config, held = _layers_alone(result, "mlx")
    fields, tensors = mlx_files(config, held, result.kinds, paths)
    dtypes = {} if dtype is None else dict.fromkeys(tensors, dtype)
    write_folder(place, fields, tensors, {}, partial(write_tensors, dtypes=dtypes, after=release), MLX_WEIGHTS)


def _layers_alone(result: AdapterContent, naming: str) -> tuple[AdapterConfig, dict[str, dict[str, Tensor]]]:
    """The config, and the tensors of each layer by PEFT's names.

    Raises:
        UnsupportedError: there are heads or trained biases.
    """
    advice = "heads='drop' leaves them out; PEFT's format (naming='peft') keeps them"
    for what, paths, do in (("heads", result.heads, advice), ("trained biases", result.biases, "Keep PEFT's format")):
        if paths:
            raise UnsupportedError(
                f"naming={naming!r} has no place for {what}, such as that of {next(iter(paths))!r}. {do}."
            )
    config, tensors = result.in_file()
    return config, layer_tensors(strip_file_prefix(tensors), result.method.key_rule(config), result.kinds)


def _foreign(
    result: AdapterContent, naming: str, part: str, base: Base | None
) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors, by whole keys, and the metadata of another program's file."""
    method = result.method
    config, held = _layers_alone(result, naming)
    found = method.write("kohya" if naming == "comfyui" else naming, config, held, result.kinds, part)
    if found is None:
        raise UnsupportedError(
            f"The method {method.name!r} has no form in naming={naming!r}. Convert it: to='lora' expresses every "
            "low-rank change."
        )
    layers, separator = found.tensors, "." if part in DOTTED else "_"
    if naming in ("kohya", "comfyui"):
        known = None if base is None else layers_of(BaseModules(base.model))
        layers = original_names(layers, result.kinds, known, separator)
    named: dict[str, Tensor] = {}
    owners: dict[str, str] = {}
    for path, own in layers.items():
        # transformers 5 has dropped a module of CLIP's text encoder, which these names have.
        encoder = naming != "diffusers" and ("clip" in part or part.startswith("lora_te"))
        inner = f"{OPTIONAL}.{path}" if encoder and path.startswith("encoder.layers.") else path
        module = part + separator + inner.replace(".", separator)
        other = owners.setdefault(module, path)
        if other != path:
            raise CheckpointError(
                f"{other!r} and {path!r} have the same name when '_' is written for '.', so naming={naming!r} cannot "
                "tell them apart."
            )
        named |= {f"{module}.{local}": tensor for local, tensor in own.items()}
    return named, found.metadata
