"""The command `adapterkit`: it parses, calls one function of the library, and prints what that reports.

It is beside the library and not in it, because importing anything from `adapterkit` imports torch: help, completion
and mistakes in the command line are answered before that. It uses public names of `adapterkit` only.
"""

import io
import sys

from adapterkit_command.exits import Exit


def main() -> None:
    """Run the command with the process's arguments, and exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to fail
    try:
        from adapterkit_command.app import app

        app(prog_name="adapterkit")
    except KeyboardInterrupt:  # while the command itself is being imported
        sys.exit(Exit.INTERRUPTED)


__all__ = ["main"]
