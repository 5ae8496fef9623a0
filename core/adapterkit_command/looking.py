"""Commands that inspect adapters, methods, and what a config would adapt. They write nothing but their report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from adapterkit_command import arguments
from adapterkit_command.arguments import Base, Component, ExcludeModules, MaxRank, Server, TargetModules, TargetRegex
from adapterkit_command.running import Exit, command

if TYPE_CHECKING:
    from adapterkit import AdapterDiff, AdapterInspection, MethodsReport, Preview, ServingReport

PANEL = "Look"
_JQ = """adapterkit methods --json | jq -r '.methods[] | select(.name == "lora").prefix'"""


@command(
    PANEL,
    "inspect_adapter",
    {
        "An adapter's folder": "adapterkit inspect ./adapters/mood",
        "Its ranks alone, from the header": "adapterkit inspect ./adapters/mood --headers-only",
        "A file of another program, with the model's own paths": "adapterkit inspect lora.safetensors --base ./unet",
        "The five largest changes": "adapterkit inspect ./adapters/mood --sort norm --top 5",
    },
)
def inspect(
    adapter: Annotated[str, typer.Argument(help="An adapter's folder, a hub id, or a file of another program.")],
    headers_only: Annotated[
        bool, typer.Option("--headers-only", help="Read no tensors: no norms, no effective ranks.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="The base model's folder or hub id; its weights are not loaded.")
    ] = None,
    component: Component = None,
    sort: Annotated[
        Literal["path", "norm", "effective_rank", "rank", "parameters"],
        typer.Option(help="The order of the layers; all but paths begin with the largest."),
    ] = "path",
    top: Annotated[int | None, typer.Option(help="Show so many layers, the first in that order.", min=1)] = None,
) -> AdapterInspection:
    """Show what an adapter's files contain: method, base, ranks, sizes, and how large its changes are.

    The base is never loaded. The table shows for each layer the rows and columns of the weight, the rank of the
    factors, the Frobenius norm of the change, its effective rank (the exponential of the entropy of the singular
    values), and how many singular values hold 90 and 99 percent of the energy. If the rank is much larger than these,
    the adapter does not use it. In order of path, layers of many that differ only in the numbers of their path share a
    row with the smallest and the largest number.
    """
    import adapterkit as ak

    return ak.inspect_adapter(adapter, values=not headers_only, base=base, component=component, sort=sort, top=top)


@command(
    PANEL,
    "check_serving",
    {
        "Whether vLLM serves it": "adapterkit check ./adapters/mood --for vllm",
        "In a script, for a server with a limit": "adapterkit check ./mood --for sglang --max-rank 32 && echo yes",
    },
)
def check(
    adapter: Annotated[str, typer.Argument(help="An adapter's folder, a hub id, or a file of another program.")],
    *,
    server: Annotated[Server, typer.Option("--for", help="The server.")],
    max_rank: MaxRank = None,
) -> tuple[ServingReport, Exit]:
    """Check whether vLLM or SGLang serves an adapter as it is, by the server's own rules.

    A problem is what the server refuses, and also what it would silently leave out or scale otherwise. The exit status
    is 4 if there is one. `adapterkit convert --for` makes an adapter that the server serves, if there is one.
    """
    import adapterkit as ak

    found = ak.check_serving(adapter, server, max_rank=max_rank)
    return found, Exit.OK if found.ok else Exit.DIFFERENT


@command(
    PANEL,
    "preview",
    {
        "Query and value of every attention": "adapterkit targets ./llama --target-modules q_proj,v_proj --set r=16",
        "The last two layers only": "adapterkit targets ./llama --set layers_to_transform=[-2,-1]",
        "By an expression": "adapterkit targets ./bert --target-regex '.*attention.*(query|value)'",
        "Another method, on a model of the hub": "adapterkit targets org/model --method vera",
        "What a trained adapter's config selects": "adapterkit targets ./llama --config ./adapters/mood",
    },
)
def targets(
    model: Annotated[str, typer.Argument(help="A model's folder, or a hub id. Its weights are not read.")],
    target_modules: TargetModules = None,
    target_regex: TargetRegex = None,
    exclude_modules: ExcludeModules = None,
    method: Annotated[str | None, typer.Option(help="The adapter method.", show_default="lora")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field of the method's config; the value is JSON or text.", metavar="FIELD=VALUE"),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Start from an adapter's folder or adapter_config.json.", metavar="PATH")
    ] = None,
) -> Preview:
    """Show which layers a config would adapt, why, and how many parameters it would add.

    The model is built from its config.json without weights. This takes seconds for any size, and downloads no weights.
    A model of diffusers is told from the names in its files. Layers that differ only in the numbers of their path share
    a row.
    """
    fields = arguments.fields(set_ or ())
    named = {
        "target_modules": arguments.modules(target_modules, target_regex),
        "exclude_modules": arguments.names(exclude_modules),
    }
    fields |= {name: value for name, value in named.items() if value is not None}
    if config is not None and method is not None:
        raise typer.BadParameter("--config already names the method. Leave --method out.")
    import adapterkit as ak

    start = None if config is None else ak.read_config(config)
    try:
        made = ak.config(method or "lora", **fields) if start is None else start.replace(**fields)
    except (ak.ConfigError, ak.UnsupportedError) as error:
        raise ak.UsageError(str(error)) from error
    return ak.preview(model, made)


@command(
    PANEL,
    "diff_adapters",
    {
        "What differs": "adapterkit diff ./adapters/mood ./adapters/mood-2",
        "Whether a conversion changed anything, in a script": "adapterkit diff loha lora --exit-code && echo the same",
    },
)
def diff(
    a: Annotated[str, typer.Argument(help="An adapter's folder, a hub id, or a file of another program.")],
    b: Annotated[str, typer.Argument(help="The adapter to compare it with.")],
    *,
    tolerance: Annotated[
        float, typer.Option(help="Changes are equal up to this distance, relative to the larger one.", min=0)
    ] = 1e-5,
    base: Base = None,
    component: Component = None,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 4 unless both do the same, up to the tolerance.")
    ] = False,
) -> tuple[AdapterDiff, Exit]:
    """Show how two adapters differ: configs, the change of each layer, heads and labels.

    Changes are compared by their effect. Two adapters with the same effect count as the same, even if their factors or
    their methods differ.
    """
    import adapterkit as ak

    found = ak.diff_adapters(a, b, base=base, component=component, tolerance=tolerance)
    return found, Exit.DIFFERENT if exit_code and not found.same_function else Exit.OK


@command(
    PANEL,
    "write_report",
    {
        "Which layers matter, and which rank is enough": "adapterkit report ./adapters/mood --out mood.html",
        "Whether two can be merged": "adapterkit report ./adapters/mood ./adapters/topic --out both.html",
        "With sizes relative to the base's weights": "adapterkit report ./adapters/mood --base ./bert --out mood.html",
    },
    show=lambda made: "\n\n".join([*map(str, made["verdicts"]), f"written: {made['page']}"]),
)
def report(
    adapters: Annotated[list[str], typer.Argument(help="Folders, hub ids, or files of other programs.")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write; an existing page is replaced.")],
    base: Annotated[
        str | None, typer.Option(help="The base model's folder. Sizes are then relative to its weights.")
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(help="The name of an adapter in the report; once for each.", show_default="their folders'"),
    ] = None,
    title: Annotated[str | None, typer.Option(help="The page's title.")] = None,
) -> dict[str, Any]:
    """Write a page: which layers an adapter changes, which rank is enough, which adapters can be merged.

    The page is one HTML file without scripts that loads nothing from elsewhere. Its verdicts are also printed.
    """
    import adapterkit as ak

    return {
        "page": out,
        "verdicts": ak.write_report(adapters, out, base=base, names=name or None, title=title).verdicts,
    }


@command(PANEL, "describe_methods", {"What is installed": "adapterkit methods", "The prefix of LoRA's keys": _JQ})
def methods() -> MethodsReport:
    """List the installed adapter methods and extensions, and what each can do.

    merges: can be merged into a model's weights. combines: can be combined with adapters of any method, and converted.
    result: can be the method of a combination or conversion. foreign files: reads files of other programs. A plugin
    that fails is listed with the reason; the others work, and the exit status is still 0.
    """
    import adapterkit as ak

    return ak.describe_methods()
