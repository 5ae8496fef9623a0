"""Write `docs/cli.md` from the help of the command `adapterkit`: `python docs/build_cli.py`."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import typer

from adapterkit_command.app import app
from adapterkit_command.running import Exit

PAGE = Path(__file__).parent / "cli.md"

INTRODUCTION = """
# The command `adapterkit`

Generated from the command's help by `docs/build_cli.py`; change the docstrings in `core/adapterkit_command/`, and the
text in the script.

`adapterkit COMMAND --help` says what follows here, and `adapterkit --install-completion` completes words. Where the
script is not on the path, `python -m adapterkit` is the same. Behind each command is one function of the library, which
its help names; what the command can do, Python can. It works for every installed method, third parties' included.
"""

HOW_TO = """
## How to

**Merge for serving.** The result is a model folder like the base's, for `from_pretrained`, vLLM or anything else:

```console
$ adapterkit merge ./llama ./adapters/mood --out ./llama-mood
```

It needs the memory of one layer and about the time of a copy. A run that was killed goes on with `--resume`. The head
that was trained with the adapter comes along, and so does its label set.

**Choose a rank.** Ask a trained adapter how much of its rank it uses, look at the page, and cut it:

```console
$ adapterkit inspect ./adapters/mood
$ adapterkit report ./adapters/mood --base ./llama --out mood.html
$ adapterkit convert ./adapters/mood --energy 0.99 --out ./adapters/mood-small
$ adapterkit diff ./adapters/mood ./adapters/mood-small
```

Before training, `targets` counts what a config makes of a model whose weights need not be there:

```console
$ adapterkit targets ./llama --target-modules all-linear --set r=16
```

**Combine two.** First see whether they go together, then choose the way, and what becomes of the heads:

```console
$ adapterkit report ./adapters/mood ./adapters/topic --out both.html
$ adapterkit combine ./adapters/mood:0.7 ./adapters/topic:0.3 --heads concat --out ./adapters/both
```

**Bring files from elsewhere**, or take them there:

```console
$ adapterkit convert style.safetensors --base ./unet --out ./adapters/style
$ adapterkit convert ./adapters/style --naming kohya --out style.safetensors
```

**Make a method of your own.** `new` writes a package that passes the test kit; from then on every command knows it:

```console
$ adapterkit new outer
$ pip install -e adapterkit-outer
$ adapterkit methods
```
"""

OUTPUT = """
## Output

A report goes to stdout; messages, notes and progress go to stderr. Tables are as wide as the terminal; in a pipe every
row is one line. There are colours only on terminals, and none if `NO_COLOR` is set.

With `--json` a report is one JSON value whose keys are the attributes of the function's report in Python, fields and
properties; numbers that are not finite are `null`. Keys are added, but not renamed or removed, before a major version.
An error is then a JSON object on stderr, `{"error": {"type": ..., "message": ..., "status": ...}}`; a mistake in the
command line itself (status 2) is text.
"""


def page() -> str:
    """The whole page."""
    group: Any = typer.main.get_command(app)
    parts = [
        INTRODUCTION,
        HOW_TO,
        OUTPUT,
        "## Exit status",
        _table(("status", "says"), [(str(int(e)), e.meaning) for e in Exit]),
    ]
    panels: dict[str, list[Any]] = {}
    for command in group.commands.values():
        panels.setdefault(command.rich_help_panel, []).append(command)
    for panel, commands in panels.items():
        parts += [f"## {panel}", *(section for command in commands for section in _sections(command))]
    return re.sub(r"\n{3,}", "\n\n", "\n\n".join(part.strip() for part in parts)) + "\n"


def _sections(command: Any) -> list[str]:
    shown = [parameter for parameter in command.params if parameter.name not in ("help", "as_json", "debug")]
    arguments = [p for p in shown if p.param_type_name == "argument"]
    options = [p for p in shown if p.param_type_name == "option"]
    usage = " ".join(("adapterkit", command.name, *map(_argument, arguments), *(["[OPTIONS]"] if options else [])))
    found = [f"### `{usage}`", _plain(command.help)]
    rows = [(f"`{_argument(p)}`", p.help) for p in arguments]
    rows += [(f"`{_option(p)}`", _plain(p.help) + _default(p)) for p in options]
    return [*found, _table(("", ""), rows) if rows else "", f"```console\n{_examples(command.epilog)}\n```"]


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return f"{name}..." if parameter.nargs != 1 else name


def _option(parameter: Any) -> str:
    value = "" if parameter.is_flag else f" {parameter.metavar or parameter.name.strip('_').upper()}"
    return ", ".join(parameter.opts) + value


def _default(parameter: Any) -> str:
    if parameter.required:
        return " Required."
    default = parameter.show_default if isinstance(parameter.show_default, str) else parameter.default
    return "" if parameter.is_flag or default is None or default == [] else f" Default: `{default}`."


def _examples(epilog: str) -> str:
    lines = [re.sub(r"^\[dim\](.*):\[/dim\]$", r"# \1", line.strip()) for line in epilog.splitlines() if line.strip()]
    return "\n".join(line.replace("\\[", "[") for line in lines)


def _plain(text: str | None) -> str:
    """Help's text without the escapes of its markup."""
    return inspect.cleandoc(text or "").replace("\\[", "[")


def _table(titles: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    cells = [(a, " ".join(b.split()).replace("|", "\\|")) for a, b in rows]
    return "\n".join([f"| {titles[0]} | {titles[1]} |", "|---|---|", *(f"| {a} | {b} |" for a, b in cells)])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
