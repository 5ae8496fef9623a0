"""The command `adapterkit`: it parses, calls one function of the library, and prints the report of that function.

It is not inside the library because every import from `adapterkit` imports torch. Help, completion and mistakes on the
command line are answered before that. The command uses public names of `adapterkit` only.
"""

import io
import os
import sys


def main() -> None:
    """Run the command with the arguments of the process, and exit."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the process was started without it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 - for the whole process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character must not make a command fail
    try:
        from adapterkit_command.app import app

        app(prog_name="adapterkit")
    except KeyboardInterrupt:  # while the command itself is being imported
        sys.exit(130)


__all__ = ["main"]
