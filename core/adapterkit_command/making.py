"""Commands that make adapters and checkpoints from files, and packages of methods."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from adapterkit_command import arguments
from adapterkit_command.arguments import (
    WEIGHTED,
    Base,
    Component,
    Dtype,
    Energy,
    ExcludeModules,
    MaxRank,
    Out,
    Overwrite,
    Rank,
    Server,
    TargetModules,
    TargetRegex,
    To,
)
from adapterkit_command.output import bytes_bar
from adapterkit_command.running import command

if TYPE_CHECKING:
    from adapterkit import MergeReport

PANEL = "Make"


def made(function: str, out: Path, **options: Any) -> dict[str, Any]:
    """Call the function of the library that writes `out`."""
    import torch

    import adapterkit as ak

    options["dtype"] = options["dtype"] and getattr(torch, options["dtype"])
    return {"folder": out, "report": getattr(ak, function)(out=out, **options)}


def written(made: dict[str, Any]) -> str:
    """The library's report, and where the result is."""
    return f"{made['report']}\nwritten: {made['folder']}"


@command(
    PANEL,
    "merge_checkpoint",
    {
        "For serving": "adapterkit merge ./llama ./adapters/mood --out ./llama-mood",
        "Two with half weight each": "adapterkit merge ./llama mood:0.5 topic:0.5 --out merged",
        "Continue after an interruption": "adapterkit merge ./llama ./adapters/mood --out ./llama-mood --resume",
    },
)
def merge(  # noqa: PLR0913 - one parameter an option
    base: Annotated[str, typer.Argument(help="The model's folder, its .safetensors or index file, or a hub id.")],
    adapters: Annotated[
        list[str],
        typer.Argument(
            help="Folders, hub ids or files of other programs, each with its weight (default 1).", metavar=WEIGHTED
        ),
    ],
    *,
    out: Out,
    heads: Annotated[
        str | None,
        typer.Option(help="If several adapters have a head, use the head of this one; write it as in PATH."),
    ] = None,
    untie: Annotated[
        bool, typer.Option("--untie", help="Untie a target if its weight is tied to another module.")
    ] = False,
    safe: Annotated[bool, typer.Option("--safe", help="Fail if a merged value is not finite.")] = False,
    architecture: Annotated[
        str | None,
        typer.Option(help="The model's class, if the class in its config has no place for the adapter's head."),
    ] = None,
    component: Component = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the files that an interrupted run has finished.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model in the folder.")] = False,
) -> MergeReport:
    """Merge adapters into a model's safetensors files, without loading the model.

    Layers are merged one by one, so only the adapters and one layer are in memory, and it takes little longer than a
    copy. The result equals merging in memory, bit for bit. File names, dtypes, config and tokenizer stay the same. The
    folder appears under its name when it is complete.
    """
    options = locals() | {"adapters": arguments.weighted(adapters)}
    import adapterkit as ak

    with bytes_bar("merging") as progress:
        return ak.merge_checkpoint(**options, progress=progress)


@command(
    PANEL,
    "combine_files",
    {
        "A weighted sum": "adapterkit combine mood:0.7 topic:0.3 --heads mood --out both",
        "Subtract one": "adapterkit combine mood topic:-0.5 --heads mood --out less",
        "TIES, at rank 16": "adapterkit combine a b --method ties --density 0.3 --rank 16 --heads concat --out ab",
    },
    show=written,
)
def combine(  # noqa: PLR0913 - one parameter an option
    sources: Annotated[
        list[str],
        typer.Argument(help="Folders or hub ids, each with its weight (default 1).", metavar=WEIGHTED),
    ],
    *,
    out: Out,
    method: Annotated[str, typer.Option(help="The method of combination; `adapterkit methods` lists all.")] = "linear",
    rank: Rank = None,
    energy: Energy = None,
    heads: Annotated[
        str | None,
        typer.Option(help="Which head the result gets: an adapter's folder name, `average`, `concat` or `drop`."),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="The share of entries to keep, for methods that prune.", min=0, max=1)
    ] = None,
    space: Annotated[
        Literal["delta", "core", "factors"],
        typer.Option(
            help="What is combined: `delta`, the changes; `core`, their coordinates in common bases; `factors`, A and "
            "B separately, as in PEFT."
        ),
    ] = "delta",
    majority_sign_method: Annotated[
        Literal["total", "frequency"], typer.Option(help="How methods elect signs.")
    ] = "total",
    seed: Annotated[int | None, typer.Option(help="The seed for methods that draw random numbers.")] = None,
    isotropize: Annotated[
        bool, typer.Option("--isotropize", help="Replace all singular values by their mean.")
    ] = False,
    to: To = "lora",
    base: Base = None,
    same_base: Annotated[
        bool, typer.Option("--same-base", help="Combine even if the configs name different base models.")
    ] = False,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Combine adapters into one, from their files alone.

    The adapters may have any methods and ranks. With `--method linear` the result is exactly the weighted sum of the
    changes. Ranks add up unless you truncate.
    """
    return made("combine_files", **locals() | {"sources": arguments.weighted(sources)})


@command(
    PANEL,
    "convert_file",
    {
        "LoHa as LoRA, exactly": "adapterkit convert ./adapters/loha --to lora --out ./adapters/lora",
        "Smaller: the rank that keeps 99 percent of each change": "adapterkit convert big --energy 0.99 --out small",
        "For kohya-ss": "adapterkit convert ./adapters/style --naming kohya --out style.safetensors",
        "For vLLM": "adapterkit convert ./adapters/loha --for vllm --out ./adapters/served",
        "From another program": "adapterkit convert style.safetensors --base ./unet --out ./adapters/style",
    },
    show=written,
)
def convert(  # noqa: PLR0913 - one parameter an option
    source: Annotated[
        str, typer.Argument(help="An adapter's folder, a hub id, or a file of another program.", metavar="adapter")
    ],
    *,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="The folder to write, or for other programs a file that ends in .safetensors."
        ),
    ],
    to: To = "lora",
    rank: Rank = None,
    energy: Energy = None,
    naming: Annotated[
        Literal["peft", "kohya", "comfyui", "lycoris", "diffusers", "mlx"],
        typer.Option(help="The program whose naming the tensors get."),
    ] = "peft",
    base: Base = None,
    component: Component = None,
    as_component: Annotated[
        str | None, typer.Option(help="The name of the part in the output, such as `lora_te1`.")
    ] = None,
    heads: Annotated[Literal["keep", "drop"], typer.Option(help="What to do with the heads.")] = "keep",
    server: Annotated[Server | None, typer.Option("--for", help="Write what this server serves.")] = None,
    max_rank: MaxRank = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Convert an adapter to another method, to the naming of another program, or both.

    Without --rank or --energy the change stays exactly the same. An adapter that already has the method keeps its
    tensors, bit for bit.
    """
    return made("convert_file", **locals())


@command(
    PANEL,
    "extract_files",
    {
        "The nearest adapter of rank 16 to a full fine-tune": "adapterkit extract bert bert-tuned --rank 16 --out a",
        "Some layers, with 90 percent of the energy of each change": "adapterkit extract base tuned --energy 0.9 "
        "--target-modules query,value --out a",
    },
    show=written,
)
def extract(  # noqa: PLR0913 - one parameter an option
    base: Annotated[str, typer.Argument(help="The base model's folder or hub id.")],
    tuned: Annotated[str, typer.Argument(help="The fine-tuned model's folder or hub id.")],
    *,
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    target_modules: TargetModules = None,
    target_regex: TargetRegex = None,
    exclude_modules: ExcludeModules = None,
    modules_to_save: Annotated[
        list[str] | None,
        typer.Option(
            help="Modules to copy in full, or `none`; by default the task head.",
            metavar="NAMES",
            show_default="auto",
        ),
    ] = None,
    to: To = "lora",
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Make an adapter from the difference between two models, from their files.

    At each layer the adapter is the best approximation of the change with the given rank or energy. One layer is in
    memory at a time.
    """
    options = dict(locals())
    layers = arguments.modules(target_modules, options.pop("target_regex"))
    heads = arguments.names(modules_to_save)
    options["target_modules"] = "all-linear" if layers is None else layers
    options["exclude_modules"] = arguments.names(exclude_modules)
    options["modules_to_save"] = "auto" if heads is None else None if heads == ["none"] else heads
    return made("extract_files", **options)


_NEXT = """written: {folder}
Next: install it, and run the test kit on it.

  cd {folder}
  pip install -e '.[test,lint]'
  pytest"""


@command(
    PANEL,
    "new_package",
    {
        "A package for a method called outer, in ./adapterkit-outer": "adapterkit new outer",
        "In a folder of your choice": "adapterkit new outer --folder ~/code/outer",
    },
    show=lambda made: _NEXT.format(**made),
)
def new(
    name: Annotated[str, typer.Argument(help="The method's name: lower-case letters, digits, underscores.")],
    folder: Annotated[
        Path | None, typer.Option(help="The project's folder, which must not exist.", show_default="adapterkit-NAME")
    ] = None,
) -> dict[str, Path]:
    """Write a Python package with an adapter method of your own.

    The package contains a small method that works, with its packaging, tests and a workflow for GitHub. It installs and
    passes adapterkit's test kit as it is; change it into your method.
    """
    import adapterkit as ak

    return {"folder": ak.new_package(name, folder)}
