"""Commands that look: at adapters, and at what a config would adapt. They write nothing but their report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from adapterkit_command import parsing
from adapterkit_command.exits import Exit
from adapterkit_command.options import Base, Component, ExcludeModules, TargetModules, TargetRegex
from adapterkit_command.output import Columns, hanging
from adapterkit_command.running import Outcome, command

if TYPE_CHECKING:
    from adapterkit import AdapterDiff, AdapterInspection, Preview

PANEL = "Look"
# What is longer is cut in text: characters, entries shown of a long list, and rows of what is wrong.
_LONGEST, _FIRST, _MOST = 200, 3, 10
# Fields of a config that have a line of their own, or say nothing.
_NOT_SHOWN = ("base_model_name_or_path", "inference_mode", "peft_type")
_LARGEST = "adapterkit inspect ./adapters/mood --json | jq -r '.layers | sort_by(-.norm)[:5][].path'"


def _show_inspection(found: AdapterInspection) -> Iterator[RenderableType]:
    dtypes = ", ".join(found.dtypes)
    yield hanging("adapter", found.source)
    yield hanging("method", f"{found.method} ({found.provider})")
    yield hanging("base", found.base or "not named")
    unset: tuple[object, ...] = (None, False, "", [], {}, "none")
    config = [f"{k}={_brief(v)}" for k, v in found.config.items() if k not in _NOT_SHOWN and v not in unset]
    yield hanging("config", ", ".join(config))
    yield hanging("size", f"{found.parameters:,} parameters, {found.size:,} bytes, {dtypes}")
    for path, tensors in found.heads.items():
        yield hanging("head", f"{path}: {', '.join(f'{n} {_shape(s)}' for n, s in tensors.items())}")
    if found.labels is not None:
        yield hanging("labels", _brief(", ".join(found.labels.values())))
    for name, shape in found.shared.items():
        yield hanging("shared", f"{name} {_shape(shape)}")
    if found.biases:
        yield hanging("trained biases", _brief(list(found.biases)))
    yield Text()
    yield _layers(found)
    yield Text()
    if found.norm is not None:
        yield hanging("norm of all changes", f"{found.norm:.4g}")
    wrong = {"belongs to nobody": found.unknown, "missing": found.missing, "does not fit": found.mismatched}
    for label, rows in wrong.items():
        for row in rows[:_MOST]:
            yield hanging(label, row, style="red")
        if len(rows) > _MOST:
            yield hanging(label, f"and {len(rows) - _MOST:,} more", style="red")
    for note in found.notes:
        yield hanging("note", note, style="yellow")


def _layers(found: AdapterInspection) -> Columns:
    numbers = ("rank", "norm", "eff. rank", "90 %", "99 %")
    rows = [
        (
            layer.path,
            f"{layer.kind or '?'} {'?' if layer.shape is None else _shape(layer.shape)}",
            *(_number(n) for n in (layer.rank, layer.norm, layer.effective_rank)),
            *(_number(n) for n in (layer.rank_90, layer.rank_99)),
        )
        for layer in found.layers
    ]
    return Columns(("layer", "kind", *numbers), rows, wide=("layer",), right=numbers)


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


@command(
    PANEL,
    "inspect_adapter",
    {
        "An adapter's folder": "adapterkit inspect ./adapters/mood",
        "Its ranks alone, from the header": "adapterkit inspect ./adapters/mood --headers-only",
        "A file of another program, with the model's own paths": "adapterkit inspect lora.safetensors --base ./unet",
        "The five largest changes": _LARGEST,
    },
    show=_show_inspection,
)
def inspect(
    adapter: Annotated[str, typer.Argument(help="An adapter's folder, a hub id, or a file of another program.")],
    headers_only: Annotated[
        bool, typer.Option("--headers-only", help="Read no tensors: no norms, no effective ranks.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="The base model's folder or hub id; of it, only config.json is read.")
    ] = None,
    component: Annotated[
        str | None, typer.Option(help="Of a file for a whole pipeline, the part to look at, such as `unet`.")
    ] = None,
) -> AdapterInspection:
    """Show what an adapter's files hold: method, base, ranks, sizes, and how large its changes are.

    The base is never loaded. For each layer: its weight's rows and columns, the rank of the factors, the Frobenius norm
    of the change, its effective rank (the exponential of the entropy of the singular values), and how many singular
    values have 90 and 99 percent of it. A rank far above those is a rank not used.
    """
    import adapterkit as ak

    return ak.inspect_adapter(adapter, values=not headers_only, base=base, component=component)


def _show_preview(report: Preview) -> Iterator[RenderableType]:
    rows = [
        (g.path, f"{g.layers:,}", f"{g.kind} {g.in_features} -> {g.out_features}", f"{g.parameters:,}", g.rule)
        for g in report.groups
    ]
    titles = ("layers", "count", "kind", "each", "taken by")
    yield Columns(titles, rows, wide=("layers", "taken by"), right=("count", "each"))
    yield Text()
    for path, count in report.heads.items():
        yield hanging("trained in full", f"{path}, {count:,} parameters")
    if report.biases:
        yield hanging("trained biases", f"{report.biases:,} parameters")
    if report.shared:
        yield hanging("shared by all layers", f"{report.shared:,} parameters")
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
    target_modules: TargetModules = None,
    target_regex: TargetRegex = None,
    exclude_modules: ExcludeModules = None,
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


def _show_diff(diff: AdapterDiff) -> Iterator[RenderableType]:
    yield Text(str(diff).splitlines()[0], style="bold")
    if diff.methods[0] != diff.methods[1]:
        yield hanging("method", " | ".join(diff.methods))
    for label, fields in (("config", diff.config), ("header", diff.metadata)):
        for field, values in fields.items():
            yield hanging(f"{label} {field}", " | ".join(map(_brief, values)))
    for tensor in diff.tensors:
        apart = "" if tensor.distance is None else f", distance {tensor.distance:.2%}"
        yield hanging(tensor.key, f"{_tensor(tensor.a)} | {_tensor(tensor.b)}{apart}")
    others = [layer for layer in diff.layers if not layer.same(diff.tolerance)]
    if diff.layers:
        yield hanging("layers", f"{len(diff.layers) - len(others)} of {len(diff.layers)} have the same change")
    if others:
        yield Text()
        yield _layers_that_differ(diff, others)
    for note in diff.notes:
        yield hanging("note", note, style="yellow")


def _layers_that_differ(diff: AdapterDiff, layers: Sequence[Any]) -> Columns:
    numbers = ("distance", "cosine", "norm a", "norm b", "rank a", "rank b")
    rows = []
    for layer in layers:
        if all(layer.held):
            distance = "?" if layer.distance is None else f"{layer.distance:.2%}"
            found = (distance, *map(_number, (layer.cosine, *layer.norms, *layer.ranks)))
        else:
            found = (f"only {'a' if layer.held[0] else 'b'}", "-", *map(_number, (*layer.norms, *layer.ranks)))
        rows.append((layer.path, *found))
    return Columns(("layer", *numbers), rows, wide=("layer",), right=numbers)


def _brief(value: object) -> str:
    """A field's value, cut where it would fill the screen; with `--json` it is whole."""
    if isinstance(value, list | tuple) and len(str(value)) > _LONGEST:
        return f"[{', '.join(map(repr, value[:_FIRST]))}, ... {len(value):,} in all]"
    text = "not there" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _tensor(described: tuple[str, Sequence[int]] | None) -> str:
    return "none" if described is None else f"{described[0]} {_shape(described[1])}"


@command(
    PANEL,
    "diff_adapters",
    {
        "What differs": "adapterkit diff ./adapters/mood ./adapters/mood-2",
        "Whether a conversion did the same, in a script": "adapterkit diff loha lora --exit-code && echo the same",
    },
    show=_show_diff,
)
def diff(
    a: Annotated[str, typer.Argument(help="An adapter's folder, a hub id, or a file of another program.")],
    b: Annotated[str, typer.Argument(help="Another.")],
    *,
    tolerance: Annotated[
        float, typer.Option(help="Changes are the same up to this distance, relative to the larger one.")
    ] = 1e-5,
    base: Base = None,
    component: Component = None,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 4 unless both do the same, up to the tolerance.")
    ] = False,
) -> AdapterDiff | Outcome:
    """Show what two adapters differ in: configs, the changes of each layer, heads and labels.

    Changes are compared as they act: two adapters that do the same by other factors, or by another method, are said to
    do the same.
    """
    import adapterkit as ak

    found = ak.diff_adapters(a, b, base=base, component=component, tolerance=tolerance)
    return Outcome(found, Exit.DIFFERENT if exit_code and not found.same_function else Exit.OK)


@dataclass(frozen=True)
class Page:
    """A report that was written.

    Attributes:
        page: the file.
        verdicts: its answers; every number is in the page, and those of one adapter in `inspect --json`.
    """

    page: Path
    verdicts: Sequence[Any]


def _show_page(made: Page) -> Iterator[RenderableType]:
    for verdict in made.verdicts:
        yield Text(f"{' and '.join(verdict.about)}: {verdict.headline}", style="bold")
        for line in (*verdict.reasons, *filter(None, [verdict.call])):
            yield Padding(Text(line), (0, 0, 0, 2))
        yield Text()
    yield hanging("written", str(made.page))


@command(
    PANEL,
    "write_report",
    {
        "Which layers matter, and which rank is enough": "adapterkit report ./adapters/mood --out mood.html",
        "Whether two can be merged": "adapterkit report ./adapters/mood ./adapters/topic --out both.html",
        "With sizes relative to the base's weights": "adapterkit report ./adapters/mood --base ./bert --out mood.html",
    },
    show=_show_page,
)
def report(
    adapters: Annotated[list[str], typer.Argument(help="Folders, hub ids, or files of other programs.")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write; one that is there is replaced.")],
    base: Annotated[
        str | None, typer.Option(help="The base model's folder: sizes are then relative to its weights.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="What an adapter is called; once for each.", show_default="their folders'")
    ] = None,
    title: Annotated[str | None, typer.Option(help="The page's title.")] = None,
) -> Page:
    """Write a page to look at: which layers an adapter changes, which rank is enough, which adapters go together.

    One HTML file without scripts that loads nothing from elsewhere. Its answers are printed too. Needs matplotlib:
    pip install 'adapterkit[report]'.
    """
    import adapterkit as ak

    return Page(out, ak.write_report(adapters, out, base=base, names=name or None, title=title).verdicts)
