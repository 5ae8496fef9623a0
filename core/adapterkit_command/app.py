"""The whole command: its global options, and the modules that add commands to it."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from adapterkit_command import looking, making
from adapterkit_command.running import Debug, app, flowing

__all__ = ["app", "looking", "making"]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"adapterkit {version('adapterkit')}")
        raise typer.Exit


_HELP = """
Inspect, merge, combine and convert adapters of every installed method, from files.

Every command has examples: adapterkit COMMAND --help. Reports go to stdout, as text or with --json as JSON; messages
and progress go to stderr.
"""


@app.callback(help=flowing(_HELP))
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Debug = False,
) -> None:
    """The options before a command."""
