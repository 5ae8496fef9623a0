"""Commands about methods: `methods`, `new`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapterkit_command.running import command

if TYPE_CHECKING:
    from adapterkit import MethodsReport

PANEL = "Methods"
_JQ = """adapterkit methods --json | jq -r '.methods[] | select(.name == "lora").prefix'"""


@command(PANEL, "describe_methods", {"What is installed": "adapterkit methods", "The prefix of LoRA's keys": _JQ})
def methods() -> MethodsReport:
    """List the installed adapter methods and extensions, and what each can do.

    merges: can be merged into a model's weights. combines: can be combined with adapters of any method, and converted.
    result: can be the method of a combination or conversion. foreign files: reads files of other programs. A plugin
    that fails is listed with the reason; the others work, and the exit status is still 0.
    """
    import adapterkit as ak

    return ak.describe_methods()


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
