"""Write `docs/cli.md` from the help of the command `adapterkit`: `python docs/build_cli.py`."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import typer

from adapterkit_command.app import app
from adapterkit_command.running import MEANINGS

PAGE = Path(__file__).parent / "cli.md"

INTRODUCTION = """
# The command `adapterkit`

`docs/build_cli.py` generates this page from the command's help. To change it, edit the docstrings in
`core/adapterkit_command/` and the text in the script.

`adapterkit COMMAND --help` shows the same text, and `adapterkit --install-completion` installs completion. If the
script is not on the path, use `python -P -m adapterkit`: without `-P`, Python imports modules from the working
directory, which may be a downloaded one. Each command calls one function of the library, which its help
names, so Python can do the same. The commands work for every installed method, including third-party methods.
"""

HOW_TO = """
## How to

**Merge for serving.** The result is a model folder like the base's, for `from_pretrained`, vLLM or anything else:

```console
$ adapterkit merge ./llama ./adapters/mood --out ./llama-mood
```

It needs memory for the adapters and one layer, and about as much time as a copy. Continue an interrupted run with
`--resume`. The result includes the head that was trained with the adapter, and its label set.

**Choose a rank.** See how much of its rank a trained adapter uses, read the report, and truncate the adapter:

```console
$ adapterkit inspect ./adapters/mood
$ adapterkit report ./adapters/mood --base ./llama --out mood.html
$ adapterkit convert ./adapters/mood --energy 0.99 --out ./adapters/mood-small
$ adapterkit diff ./adapters/mood ./adapters/mood-small
```

Before training, `targets` shows what a config adds to a model. It does not need the weights of the model:

```console
$ adapterkit targets ./llama --target-modules all-linear --set r=16
```

**Combine two.** First see whether they can be merged, then choose the method and the heads:

```console
$ adapterkit report ./adapters/mood ./adapters/topic --out both.html
$ adapterkit combine ./adapters/mood:0.7 ./adapters/topic:0.3 --heads concat --out ./adapters/both
```

**Use files of other programs**, or write files for them:

```console
$ adapterkit convert style.safetensors --base ./unet --out ./adapters/style
$ adapterkit convert ./adapters/style --naming kohya --out style.safetensors
```

**Write your own method.** `new` writes a package that passes the test kit. Install it, and every command knows it:

```console
$ adapterkit new outer
$ pip install -e adapterkit-outer
$ adapterkit methods
```
"""

OUTPUT = """
## Output

Reports go to stdout; messages, notes and progress go to stderr. On a terminal, long lines are wrapped; in a pipe every
row is one line. Messages have colours only on terminals, and never if `NO_COLOR` is set.

With `--json` a report is one JSON value. Its keys are the attributes of the report in Python, fields and properties;
infinite numbers and NaN are `null`. Until the next major version keys may be added, but not renamed or removed.
Errors are then JSON objects on stderr, `{"error": {"type": ..., "message": ..., "status": ...}}`; mistakes that are
seen while the command line is parsed are text.
"""


def page() -> str:
    """The whole page."""
    group: Any = typer.main.get_command(app)
    parts = [
        INTRODUCTION,
        HOW_TO,
        OUTPUT,
        "## Exit status",
        _table(("status", "meaning"), [(str(int(status)), meaning) for status, meaning in MEANINGS.items()]),
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
