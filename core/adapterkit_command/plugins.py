"""Commands about methods: `methods`, `new`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.text import Text

from adapterkit_command.output import Columns, hanging
from adapterkit_command.running import command

if TYPE_CHECKING:
    from adapterkit import MethodsReport

PANEL = "Methods"
_JQ = """adapterkit methods --json | jq -r '.methods[] | select(.name == "lora").prefix'"""


def _show_methods(report: MethodsReport) -> Iterator[RenderableType]:
    titles = ("method", "package", "prefix", "merges", "combines", "result", "foreign")
    usable = [method for method in report.methods if not method.error]
    flags = [(m.merges, m.combines, m.results, m.foreign) for m in usable]
    yield Columns(
        titles,
        [
            (m.name, f"{m.package} {m.version or ''}".strip(), m.prefix, *("yes" if flag else "-" for flag in flags))
            for m, flags in zip(usable, flags, strict=True)
        ],
        wide=("package", "prefix"),
    )
    yield Text()
    for method in usable:
        yield hanging(f"hooks of {method.name}", ", ".join(method.hooks))
    yield Text()
    for extension in report.extensions:
        if not extension.error:
            adds = ", ".join((*extension.kinds, *extension.combiners)) or "wraps hooks"
            yield hanging(f"extension {extension.name}", f"{extension.package} {extension.version or ''}: {adds}")
    yield hanging("layer kinds", ", ".join(report.kinds))
    yield hanging("ways to combine", ", ".join(report.combiners))
    if report.switched_off:
        yield hanging("switched off", ", ".join(report.switched_off))
    for plugin in report.failed:
        yield hanging(f"cannot be used: {plugin.name}", plugin.error or "", style="red")


@command(
    PANEL,
    "describe_methods",
    {"What is installed": "adapterkit methods", "The prefix of LoRA's keys": _JQ},
    show=_show_methods,
)
def methods() -> MethodsReport:
    """List the installed adapter methods and extensions, and what each can do.

    merges: into a model's weights. combines: with adapters of any method, and converts. result: a combination or
    conversion can be of this method. foreign: reads files of other programs. A plugin that cannot be used is listed
    with the reason; it hinders no other, and the exit status is still 0.
    """
    import adapterkit as ak

    return ak.describe_methods()


def _show_new(made: dict[str, Path]) -> Iterator[RenderableType]:
    folder = made["folder"]
    yield hanging("written", str(folder))
    yield "Next: install it, and run the test kit on it.\n"
    yield f"  cd {folder}\n  pip install -e '.[test,lint]'\n  pytest"


@command(
    PANEL,
    "new_package",
    {
        "A package for a method called outer, in ./adapterkit-outer": "adapterkit new outer",
        "In a folder of your choice": "adapterkit new outer --folder ~/code/outer",
    },
    show=_show_new,
)
def new(
    name: Annotated[str, typer.Argument(help="The method's name: lower-case letters, digits, underscores.")],
    folder: Annotated[
        Path | None, typer.Option(help="The project's folder, which must not exist.", show_default="adapterkit-NAME")
    ] = None,
) -> dict[str, Path]:
    """Write a Python package with an adapter method of your own.

    It installs and passes adapterkit's test kit as it is: a small method that works, to be changed, with its
    packaging, tests and a workflow for GitHub.
    """
    import adapterkit as ak

    return {"folder": ak.new_package(name, folder)}
