"""Commands that make adapters and checkpoints, from files to files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

from adapterkit_command import parsing
from adapterkit_command.options import (
    WEIGHTED,
    Base,
    Component,
    Dtype,
    Energy,
    ExcludeModules,
    Out,
    Overwrite,
    Rank,
    TargetModules,
    TargetRegex,
    To,
)
from adapterkit_command.output import hanging
from adapterkit_command.progress import bytes_bar
from adapterkit_command.running import command

if TYPE_CHECKING:
    from adapterkit import MergeReport

PANEL = "Make"


@dataclass(frozen=True)
class Written:
    """What a command made: the folder, and the library's report."""

    folder: Path
    report: object


def show_written(made: Written) -> Iterator[RenderableType]:
    """The report, and where it is."""
    yield Text(str(made.report))
    yield hanging("written", str(made.folder))


@command(
    PANEL,
    "merge_checkpoint",
    {
        "For serving, the adapter worked in": "adapterkit merge ./llama ./adapters/mood --out ./llama-mood",
        "Two, by half each, in several threads": "adapterkit merge ./llama mood:0.5 topic:0.5 --workers 4 --out merged",
        "Go on after a kill": "adapterkit merge ./llama ./adapters/mood --out ./llama-mood --resume",
    },
)
def merge(  # noqa: PLR0913 - one parameter an option
    base: Annotated[str, typer.Argument(help="The model's folder, its .safetensors or index file, or a hub id.")],
    adapters: Annotated[
        list[str],
        typer.Argument(help="Folders, hub ids or other programs' files, each with its weight.", metavar=WEIGHTED),
    ],
    *,
    out: Out,
    heads: Annotated[
        str | None, typer.Option(help="Whose head is taken over, if several adapters have one: as it is written above.")
    ] = None,
    untie: Annotated[
        bool, typer.Option("--untie", help="Give a target whose weight is tied a weight of its own.")
    ] = False,
    safe: Annotated[bool, typer.Option("--safe", help="Fail if a merged value is not finite.")] = False,
    architecture: Annotated[
        str | None, typer.Option(help="The model's class, if the adapter's head is not in the one its config names.")
    ] = None,
    component: Component = None,
    workers: Annotated[int, typer.Option(help="How many threads work, each with a buffer.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what a run that was broken off had finished.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model that the folder holds.")] = False,
) -> MergeReport:
    """Merge adapters into a model's safetensors files, without loading the model.

    Tensor by tensor: memory stays that of the largest one, and it takes little longer than a copy. The result is, bit
    for bit, that of merging in memory; file names, dtypes, config and tokenizer stay as they are. The folder appears
    under its name when it is whole.
    """
    sources: Any = parsing.weighted(adapters)
    import adapterkit as ak

    with bytes_bar("merging") as progress:
        return ak.merge_checkpoint(
            base,
            sources,
            out,
            untie=untie,
            heads=heads,
            safe=safe,
            architecture=architecture,
            component=component,
            workers=workers,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )


@command(
    PANEL,
    "combine_files",
    {
        "The sum of 0.7 of one and 0.3 of another": "adapterkit combine mood:0.7 topic:0.3 --heads mood --out both",
        "Take one away": "adapterkit combine mood topic:-0.5 --heads mood --out less",
        "TIES, at rank 16": "adapterkit combine a b --method ties --density 0.3 --rank 16 --heads concat --out ab",
    },
    show=show_written,
)
def combine(  # noqa: PLR0913 - one parameter an option
    adapters: Annotated[
        list[str],
        typer.Argument(help="Folders or hub ids, each with its weight after a colon (1 if none).", metavar=WEIGHTED),
    ],
    *,
    out: Out,
    method: Annotated[str, typer.Option(help="The way to combine; `adapterkit methods` lists all.")] = "linear",
    rank: Rank = None,
    energy: Energy = None,
    heads: Annotated[
        str | None,
        typer.Option(help="What becomes of the heads: an adapter's folder name, `average`, `concat` or `drop`."),
    ] = None,
    density: Annotated[float | None, typer.Option(help="The share of entries kept, for methods that prune.")] = None,
    space: Annotated[
        str, typer.Option(help="What is combined: `delta`, the change; `core`, its coordinates; `factors`, as PEFT.")
    ] = "delta",
    majority_sign_method: Annotated[
        str, typer.Option(help="For methods that elect signs: `total` or `frequency`.")
    ] = "total",
    seed: Annotated[int | None, typer.Option(help="For methods that draw.")] = None,
    isotropize: Annotated[bool, typer.Option("--isotropize", help="Give all singular values their mean.")] = False,
    to: To = "lora",
    base: Base = None,
    same_base: Annotated[
        bool, typer.Option("--same-base", help="Combine even if the configs name different base models.")
    ] = False,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> Written:
    """Combine adapters into one, by their files alone.

    Of any methods and ranks. With the method linear the result is exactly the weighted sum of the changes, and ranks
    add up unless you truncate.
    """
    sources: dict[Any, float] = parsing.weighted(adapters)
    signs: Any = majority_sign_method  # the function says what there is
    where: Any = space
    import adapterkit as ak

    report = ak.combine_files(
        sources,
        out,
        method=method,
        space=where,
        rank=rank,
        energy=energy,
        to=to,
        heads=heads,
        density=density,
        majority_sign_method=signs,
        seed=seed,
        isotropize=isotropize,
        same_base=same_base,
        base=base,
        dtype=parsing.dtype(dtype),
        overwrite=overwrite,
    )
    return Written(out, report)


@command(
    PANEL,
    "convert_file",
    {
        "LoHa as LoRA, exactly": "adapterkit convert ./adapters/loha --to lora --out ./adapters/lora",
        "Smaller: the rank that keeps 99 percent of each change": "adapterkit convert big --energy 0.99 --out small",
        "For kohya-ss": "adapterkit convert ./adapters/style --naming kohya --out style.safetensors",
        "From it, for a model's own paths": "adapterkit convert style.safetensors --base ./unet --out ./adapters/style",
    },
    show=show_written,
)
def convert(  # noqa: PLR0913 - one parameter an option
    adapter: Annotated[str, typer.Argument(help="An adapter's folder, a hub id, or a file of another program.")],
    *,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="The folder to write; a file that ends in .safetensors for other programs."),
    ],
    to: To = "lora",
    rank: Rank = None,
    energy: Energy = None,
    naming: Annotated[
        str, typer.Option(help="Whose names the tensors get: `peft`, `kohya`, `lycoris` or `diffusers`.")
    ] = "peft",
    base: Base = None,
    component: Component = None,
    as_component: Annotated[
        str | None, typer.Option(help="What the part is called in the output, such as `lora_te1`.")
    ] = None,
    heads: Annotated[str, typer.Option(help="What becomes of the heads: `keep` or `drop`.")] = "keep",
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> Written:
    """Convert an adapter to another method, to the names of another program, or both.

    Without a rank or energy the change stays exactly what it was; an adapter that has the method already keeps its
    tensors to the bit.
    """
    names: Any = naming
    kept: Any = heads
    import adapterkit as ak

    report = ak.convert_file(
        adapter,
        out,
        to=to,
        rank=rank,
        energy=energy,
        naming=names,
        base=base,
        component=component,
        as_component=as_component,
        heads=kept,
        dtype=parsing.dtype(dtype),
        overwrite=overwrite,
    )
    return Written(out, report)


@command(
    PANEL,
    "extract_files",
    {
        "The nearest adapter of rank 16 to a full fine-tune": "adapterkit extract bert bert-tuned --rank 16 --out a",
        "Some layers, by how much of the change they keep": "adapterkit extract base tuned --energy 0.9 "
        "--target-modules query,value --out a",
    },
    show=show_written,
)
def extract(  # noqa: PLR0913 - one parameter an option
    base: Annotated[str, typer.Argument(help="The base model's folder.")],
    tuned: Annotated[str, typer.Argument(help="The folder of the model that was fine-tuned from it.")],
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
            help="Modules taken over in full; `none` for none. Without it the task head is.",
            metavar="NAMES",
            show_default="auto",
        ),
    ] = None,
    to: To = "lora",
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> Written:
    """Make an adapter of the difference between two models, from their files.

    At each layer the best approximation of the change at the rank or energy that you ask for. One layer is in memory at
    a time.
    """
    chosen = parsing.modules(target_modules, target_regex, "--target-modules")
    heads = parsing.names(modules_to_save)
    import adapterkit as ak

    report = ak.extract_files(
        base,
        tuned,
        out,
        rank=rank,
        energy=energy,
        target_modules="all-linear" if chosen is None else chosen,
        exclude_modules=parsing.names(exclude_modules),
        modules_to_save="auto" if heads is None else None if heads == ["none"] else heads,
        to=to,
        dtype=parsing.dtype(dtype),
        overwrite=overwrite,
    )
    return Written(out, report)
