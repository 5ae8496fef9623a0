"""`docs/cli.md` is what the help says, and its examples are command lines."""

from __future__ import annotations

import re
import shlex
import sys
from typing import Any

import pytest
import typer
from tests.command.conftest import ROOT

import adapterkit as ak
from adapterkit_command.app import app

sys.path.insert(0, str(ROOT / "docs"))
import build_cli

PAGE = build_cli.PAGE.read_text(encoding="utf-8")
GROUP: Any = typer.main.get_command(app)
EXAMPLES = re.findall(r"^\$ (adapterkit .*)$", PAGE, re.MULTILINE)


def test_the_page_is_what_the_help_says() -> None:
    assert build_cli.page() == PAGE, "python docs/build_cli.py"


def test_the_page_has_every_command_option_and_function() -> None:
    for name, command in GROUP.commands.items():
        assert command.rich_help_panel
        assert {"--json", "--debug"} <= {option for parameter in command.params for option in parameter.opts}
        assert all(parameter.help for parameter in command.params if parameter.name != "help"), name
        (section,) = re.findall(rf"^### `adapterkit {name}\b.*\n([^\0]*?)(?=^##|\Z)", PAGE, re.MULTILINE)
        for parameter in command.params:
            if parameter.name not in ("help", "as_json", "debug") and parameter.param_type_name == "option":
                assert parameter.opts[0] in section, (name, parameter.name)
        (function,) = re.findall(r"In Python: adapterkit\.(\w+)", section)
        assert function in ak.__all__


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_are_command_lines(line: str) -> None:
    """Each is parsed as it would be; nothing is run."""
    _, name, *arguments = shlex.split(re.split(r" (?:\||&&) ", line)[0])
    with GROUP.commands[name].make_context(name, arguments):
        pass


def test_every_command_has_an_example_in_the_page() -> None:
    assert {line.split()[1] for line in EXAMPLES} == set(GROUP.commands)
