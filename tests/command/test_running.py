"""How every command runs: reports and JSON, errors, warnings, exit statuses. In this process."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.command.conftest import run

import adapterkit as ak
from adapterkit_command.output import bytes_bar, jsonable, print_text
from adapterkit_command.running import MEANINGS, Exit, as_options

Raising = Callable[[BaseException], None]


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> Raising:
    """`raising(error)`: what stands behind `adapterkit methods` raises it."""

    def make(error: BaseException) -> None:
        def fail() -> NoReturn:
            raise error

        monkeypatch.setattr(ak, "describe_methods", fail)

    return make


def test_json_is_the_reports_attributes() -> None:
    done = run("methods", "--json")
    assert (done.exit_code, done.stderr) == (Exit.OK, "")
    report = json.loads(done.stdout)
    assert set(report) == {"methods", "extensions", "kinds", "combiners", "switched_off", "failed"}
    (lora,) = [method for method in report["methods"] if method["name"] == "lora"]
    assert set(lora) == {
        *("name", "package", "version", "config", "prefix", "hooks", "error"),
        *("merges", "combines", "results", "foreign"),
    }
    assert lora["prefix"] == "lora_"


FAILURES: dict[str, tuple[BaseException, Exit, str]] = {
    "a user's mistake": (ak.ConfigError("That [does] not go."), Exit.ERROR, "error: That [does] not go.\n"),
    "the system refuses": (
        PermissionError(13, "Permission denied", "/secret"),
        Exit.ERROR,
        "error: [Errno 13] Permission denied: '/secret'\n",
    ),
    "a bug": (
        ZeroDivisionError("oh"),
        Exit.INTERNAL,
        "internal error: ZeroDivisionError: oh. This is a bug. Run the command again with --debug, and report the "
        "traceback.\n",
    ),
    "Ctrl-C": (KeyboardInterrupt(), Exit.INTERRUPTED, "adapterkit: interrupted\n"),
}


@pytest.mark.parametrize(("error", "status", "message"), FAILURES.values(), ids=FAILURES.keys())
def test_an_error_is_a_message_and_a_status(error: BaseException, status: Exit, message: str, raising: Raising) -> None:
    raising(error)
    done = run("methods")
    assert (done.exit_code, done.stdout, done.stderr) == (status, "", message)


def test_a_users_mistake_in_json(raising: Raising) -> None:
    raising(ak.ConfigError("That does not go."))
    done = run("methods", "--json")
    assert (done.exit_code, done.stdout) == (Exit.ERROR, "")
    assert json.loads(done.stderr) == {"error": {"type": "ConfigError", "message": "That does not go.", "status": 1}}


@pytest.mark.parametrize("arguments", [("--debug", "methods"), ("methods", "--debug"), ("methods",)], ids=" ".join)
def test_debug_shows_the_traceback(
    arguments: tuple[str, ...], raising: Raising, monkeypatch: pytest.MonkeyPatch
) -> None:
    raising(ak.ConfigError("That does not go."))
    if len(arguments) == 1:
        monkeypatch.setenv("ADAPTERKIT_DEBUG", "1")
    done = run(*arguments)
    assert done.exit_code == Exit.ERROR
    assert "Traceback (most recent call last):" in done.stderr
    assert done.stderr.endswith("error: That does not go.\n")


def test_warnings_are_notes_of_one_line_and_prints_are_no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    described = ak.describe_methods()

    def noisy() -> ak.MethodsReport:
        print("a plugin talks")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("This is\n  probably not meant.", ak.AdapterWarning, stacklevel=1)
        return described

    monkeypatch.setattr(ak, "describe_methods", noisy)
    done = run("methods", "--json")
    assert json.loads(done.stdout)["kinds"]
    assert done.stderr == "a plugin talks\nnote: This is probably not meant.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("methds", "Did you mean 'methods'?"),
        ("methods --jsn", "No such option"),
        ("targets", "Missing"),
        ("targets m --set r", "give FIELD=VALUE"),
        ("targets m --config a --method lora", "--config already names the method. Leave --method out."),
    ],
)
def test_a_wrong_command_line_is_2(arguments: str, message: str) -> None:
    done = run(*arguments.split())
    assert (done.exit_code, done.stdout) == (Exit.USAGE, "")
    assert message in " ".join(done.stderr.split())


def test_exit_statuses_have_their_sentences() -> None:
    assert list(MEANINGS) == list(Exit) == [0, 1, 2, 3, 4, 130, 141]
    assert all(MEANINGS.values())


@dataclass(frozen=True)
class Part:
    place: Path
    share: float

    @property
    def double(self) -> float:
        return 2 * self.share


def test_json_of_a_report() -> None:
    report = {"a": Part(Path("x/y"), 0.5), "dtype": torch.bfloat16, "none": [None, math.nan, math.inf], 3: {"b", "a"}}
    assert jsonable(report) == {
        "a": {"place": "x/y", "share": 0.5, "double": 1.0},
        "dtype": "bfloat16",
        "none": [None, None, None],
        "3": ["a", "b"],
    }


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_only_a_terminal_wraps_lines_and_shows_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    text = "short\n  a.very.long.path.of.a.module  Linear  1,234"
    pipe, terminal = io.StringIO(), Terminal()
    print_text(text, pipe)
    print_text(text, terminal)
    assert pipe.getvalue() == f"{text}\n"
    assert terminal.getvalue() == "short\n  a.very.long.path.of.a.module\n      Linear  1,234\n"
    with bytes_bar("merging") as progress:
        assert progress is None
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "90")
    with bytes_bar("merging") as progress:
        assert progress is not None
        progress(500_000, 2_000_000)
    assert "0.5/2.0 MB" in terminal.getvalue()


@pytest.mark.filterwarnings("default")
def test_a_warning_is_in_the_words_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def warn() -> dict[str, str]:
        warnings.warn("Say component='unet'.", stacklevel=1)
        return {}

    monkeypatch.setattr(ak, "describe_methods", warn)
    assert "Say --component 'unet'." in run("methods").stderr


def test_a_merge_of_files_that_do_not_fit_names_no_argument_of_python(files: Path, tmp_path: Path) -> None:
    weights = shutil.copytree(files / "mood", tmp_path / "mood") / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, weights)
    done = run("merge", str(files / "base"), str(tmp_path / "mood"), "--out", str(tmp_path / "merged"))
    assert done.exit_code == Exit.ERROR
    assert "does not fit adapter 'mood'" in done.stderr
    assert "=" not in done.stderr


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("say resume=True", "say --resume"),
        ("merge with resume=False to begin anew", "merge with no --resume to begin anew"),
        ("take rank=4", "take --rank 4"),
        ("give base=, the folder", "give --base, the folder"),
        ("convert it with to='lora'", "convert it with --to 'lora'"),  # another command's
        ("ak.extract_files(base, tuned) makes one", "adapterkit extract makes one"),
        ("ak.attach(model) does not", "ak.attach(model) does not"),
    ],
)
def test_arguments_in_messages_become_options(message: str, said: str) -> None:
    assert as_options(message, {"resume": "--resume", "rank": "--rank", "base": "--base"}) == said


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", "a", "--out", "b", "--naming", "nobody"),
        ("convert", "a", "--out", "b", "--rank", "0"),
        ("convert", "a", "--out", "b", "--energy", "2"),
        ("convert", "a", "--out", "b", "--heads", "both"),
        ("combine", "a", "b", "--out", "c", "--space", "outer"),
        ("combine", "a", "b", "--out", "c", "--density", "-1"),
        ("check", "a", "--for", "nginx"),
        ("inspect", "a", "--sort", "size"),
        ("inspect", "a", "--top", "0"),
        ("diff", "a", "b", "--tolerance", "-1"),
    ],
    ids=lambda arguments: " ".join(arguments[-2:]),
)
def test_a_value_that_is_wrong_in_itself_exits_with_2_before_anything_is_read(
    arguments: tuple[str, ...],
) -> None:
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert arguments[-2] in done.output
