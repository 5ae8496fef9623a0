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
from typer.testing import Result

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
    "a wrong call": (ak.UsageError("Give one."), Exit.USAGE, "error: Give one.\n"),
    "an unknown name": (ak.UnknownNameError("Unknown method."), Exit.USAGE, "error: Unknown method.\n"),
    "a plugin that is not there": (ak.MissingMethodError("No method."), Exit.ERROR, "error: No method.\n"),
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


NOWHERE = "'nowhere' is not a folder here (working directory:"
# Command lines, each with a part of its message. There are no files `a`, `b` and `c`.
WRONG_CALLS = {
    "convert a --out b --naming nobody": "'--naming': 'nobody' is not one of 'peft',",
    "convert mood --out b --naming kohya": "give it a name that ends in .safetensors",
    "convert a --out b --rank 0": "'--rank': it must be greater than or equal to 1",
    "convert a --out b --rank four": "'--rank': it must be a valid integer",
    "convert a --out b --energy 2": "'--energy': it must be less than or equal to 1",
    "convert a --out b --rank 4 --energy 0.5": "Give --rank or --energy, not both.",
    "convert a --out b --heads both": "'--heads': 'both' is not one of 'keep', 'drop'",
    "convert a --out b --for vllm --max-rank 3": "--max-rank 3 must be one of 1, 8,",
    "convert mood --out mood": "mood is an input",
    "convert mood --out b --to vera": "Use --to 'lora', which can express every low-rank change",
    "convert mood --out b --to lorra": "Unknown adapter method 'lorra'.",
    "combine a b --out c --space outer": "'--space': 'outer' is not one of",
    "combine a b --out c --density -1": "'--density': it must be greater",
    "combine a b --out c --method cat": "here it is --method 'linear'",
    "combine a b --out c --method tie": "Did you mean 'ties'?",
    "combine a b --out c --method ties": "'ties' prunes. Pass --density, the share",
    "combine a b --out c --density 0.3": "so --density 0.3 has no effect",
    "combine a:nan b --out c": "The weight of 'a' is nan, but it must be a finite number",
    "combine a a --out c": "'a' is given twice",
    "combine mood topic --out c --heads nobody": "Unknown choice of heads 'nobody'",
    "extract a b --out c": "extract needs --rank or --energy",
    "extract a b --out c --rank 2 --to lorra": "Unknown adapter method 'lorra'.",
    "extract a b --out c --rank 2 --dtype int8": "'int8' is not one of 'float32', 'bfloat16', 'float16',",
    "extract a b --out c --rank 2 --target-regex (": "--target-regex (: missing )",
    "merge base mood --out base": "lie in each other; give the output a folder of its own",
    "merge base mood --out c --architecture Foo": "transformers has no model of the class 'Foo'",
    "merge base mood:1e39 --out c": "The weight of 'mood' is 1e+39, but it must be a finite number of float32",
    "merge a mood:much --out c": "'much' is not a number",
    "check a --for nginx": "'--for': 'nginx' is not one of",
    "check a --for vllm --max-rank 7": "--max-rank 7 must be one of",
    "inspect a --sort size": "'--sort': 'size' is not one of",
    "inspect a --top 0": "'--top': it must be greater than or equal to 1",
    "targets a --set rank=8": "no field 'rank'. Did you mean 'r'? Its fields: r, lora_alpha, ",
    "targets a --set r=0": "r = 0: a rank must be at least 1",
    "targets a --set lora_dropout=50": "lora_dropout = 50 must be a probability",
    "targets a --set task_type=CAUSALLM": "did you mean 'CAUSAL_LM'? PEFT knows",
    "targets a --set use_qalora=true": "an option of PEFT that adapterkit does not implement",
    "targets a --method lorra": "Did you mean 'lora'?",
    "diff a b --tolerance -1": "'--tolerance': it must be greater",
    "diff a b --tolerance 2": "--tolerance 2.0 must be a share",
    "report a a --out c.html": "An adapter is named twice: 'a', 'a'.",
    "new 9": "'9' cannot be a method's name",
    "new class": "'class' is a keyword of Python",
}
FAILS = {
    "inspect alien": "no plugin provides the method 'foo'",
    "inspect broken": "broken/adapter_config.json: LoraConfig: r = '8' is a str; it must be int.",
    "inspect nowhere": NOWHERE,
    "check nowhere --for vllm": NOWHERE,
    "targets nowhere": NOWHERE,
    "targets base --config nowhere": NOWHERE,
    "diff mood nowhere": NOWHERE,
    "report nowhere --out c.html": NOWHERE,
    "convert nowhere --out c": NOWHERE,
    "combine mood nowhere --out c --heads mood": NOWHERE,
    "merge nowhere mood --out c": NOWHERE,
    "merge base nowhere --out c": NOWHERE,
    "extract nowhere base --out c --rank 2": NOWHERE,
    "extract base nowhere --out c --rank 2": NOWHERE,
    "combine mood --heads mood --out topic": "Say --overwrite to replace it",
    "combine mood topic --out c": "Choose one of --heads 'mood', --heads 'topic'",
}


def one_line(done: Result) -> str:
    return " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize("line", WRONG_CALLS)
def test_a_wrong_call_is_2(line: str, here: Path) -> None:
    done = run(*line.split())
    assert (done.exit_code, done.stdout) == (Exit.USAGE, "")
    assert WRONG_CALLS[line] in one_line(done)


@pytest.mark.parametrize("line", FAILS)
def test_what_the_files_make_impossible_is_1(line: str, here: Path) -> None:
    for name, config in {"alien": {"peft_type": "FOO"}, "broken": {"peft_type": "LORA", "r": "8"}}.items():
        (here / name).mkdir()
        (here / name / "adapter_config.json").write_text(json.dumps(config))
        (here / name / "adapter_model.safetensors").symlink_to(here / "mood" / "adapter_model.safetensors")
    done = run(*line.split())
    assert (done.exit_code, done.stdout) == (Exit.ERROR, "")
    assert FAILS[line] in one_line(done)
