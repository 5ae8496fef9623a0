"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

WEIGHTED = "PATH[:WEIGHT]"

Out = Annotated[Path, typer.Option("--out", "-o", help="The folder to write; it appears when it is complete.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the adapter that the folder holds.")]
Rank = Annotated[int | None, typer.Option(help="Truncate to this rank, as well as can be.")]
Energy = Annotated[
    float | None, typer.Option(help="Instead: to this share of the squared singular values, such as 0.99.")
]
To = Annotated[str, typer.Option(help="The method of the result.")]
Base = Annotated[
    str | None,
    typer.Option(help="The base model's folder, where the adapters' files do not tell its layers' sizes."),
]
Dtype = Annotated[str | None, typer.Option(help="Of the result: float32, bfloat16, ...", show_default="float32")]
Component = Annotated[
    str | None, typer.Option(help="Of a file for a whole pipeline, the part that is meant, such as `unet`.")
]
TargetModules = Annotated[
    list[str] | None,
    typer.Option(
        help="Names of layers: full paths, or their ends at a dot; several with commas, or the option again. "
        "`all-linear`: every linear layer but the output head.",
        metavar="NAMES",
    ),
]
TargetRegex = Annotated[
    str | None, typer.Option(help="Instead: an expression for the full path.", metavar="EXPRESSION")
]
ExcludeModules = Annotated[list[str] | None, typer.Option(help="Names of layers to leave out.", metavar="NAMES")]
