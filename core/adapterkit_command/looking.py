"""Commands that look: at adapters, and at what a config would adapt. They write nothing but their report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.text import Text

from adapterkit_command import parsing
from adapterkit_command.output import hanging, table
from adapterkit_command.running import command

if TYPE_CHECKING:
    from adapterkit import Preview

PANEL = "Look"


def _show_preview(report: Preview) -> Iterator[RenderableType]:
    rows = [
        (g.path, f"{g.layers:,}", f"{g.kind} {g.in_features} -> {g.out_features}", f"{g.parameters:,}", g.rule)
        for g in report.groups
    ]
    titles = ("layers", "count", "kind", "each", "taken by")
    yield table(titles, rows, wide=("layers", "taken by"), right=("count", "each"))
    yield Text()
    for path, count in report.heads.items():
        yield hanging("trained in full", f"{path}, {count:,} parameters")
    if report.biases:
        yield hanging("trained biases", f"{report.biases:,} parameters")
    for path, reason in report.skipped:
        yield hanging("left out", f"{path}: {reason}")
    for rule in report.unmatched:
        yield hanging("matched nothing", rule, style="yellow")
    for note in report.notes:
        yield hanging("note", note)
    yield Text(report.summary(), style="bold")


@command(
    PANEL,
    "preview",
    {
        "Query and value of every attention": "adapterkit targets ./llama --target-modules q_proj,v_proj --set r=16",
        "The last two layers only": "adapterkit targets ./llama --set layers_to_transform=[-2,-1]",
        "By an expression": "adapterkit targets ./bert --target-regex '.*attention.*(query|value)'",
        "Another method, on a model of the hub": "adapterkit targets org/model --method vera",
        "What a trained adapter's config takes": "adapterkit targets ./llama --config ./adapters/mood",
    },
    show=_show_preview,
)
def targets(
    model: Annotated[str, typer.Argument(help="A model's folder, or a hub id. Its weights are not read.")],
    target_modules: Annotated[
        list[str] | None,
        typer.Option(
            help="Names of layers: full paths, or their ends at a dot; several with commas, or the option again. "
            "`all-linear`: every linear layer but the output head.",
            metavar="NAMES",
        ),
    ] = None,
    target_regex: Annotated[
        str | None, typer.Option(help="Instead: an expression for the full path.", metavar="EXPRESSION")
    ] = None,
    exclude_modules: Annotated[
        list[str] | None, typer.Option(help="Names of layers to leave out.", metavar="NAMES")
    ] = None,
    method: Annotated[str | None, typer.Option(help="The adapter method.", show_default="lora")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field of the method's config; values as in JSON.", metavar="FIELD=VALUE"),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Start from an adapter's folder or adapter_config.json.", metavar="PATH")
    ] = None,
) -> Preview:
    """Show which layers a config would adapt, why, and how many parameters that makes.

    The model is built without weights from its config.json, so it takes seconds for any size, and no download of
    weights. Layers that differ only in numbers of their path are one row.
    """
    fields = parsing.fields(set_ or ())
    named = {
        "target_modules": parsing.modules(target_modules, target_regex, "--target-modules"),
        "exclude_modules": parsing.names(exclude_modules),
    }
    fields |= {name: value for name, value in named.items() if value is not None}
    if config is not None and method is not None:
        raise typer.BadParameter("--config says the method; leave --method out.")
    import adapterkit as ak

    if config is not None:
        return ak.preview(model, ak.read_config(config).replace(**fields))
    return ak.preview(model, ak.config(method or "lora", **fields))
