"""Command lines: commands, options and values in any order, on small adapters and a small checkpoint."""

from __future__ import annotations

import contextlib
import random
import shutil
import traceback
from pathlib import Path

import transformers
from tests.fuzz.oracle import LONGEST, Finding, Hang, in_time
from tests.models import build
from typer.testing import CliRunner

import adapterkit as ak
from adapterkit_command.app import app
from adapterkit_command.running import Exit

COMMANDS = ["inspect", "preview", "diff", "report", "merge", "combine", "convert", "extract", "methods", "new"]
NEEDED = {
    "inspect": ["a"],
    "preview": ["base"],
    "diff": ["a", "b"],
    "report": ["a", "b", "-o", "out.html"],
    "merge": ["base", "a:0.5", "-o", "out"],
    "combine": ["a:0.5", "b", "-o", "out"],
    "convert": ["a", "-o", "out"],
    "extract": ["base", "base", "-o", "out", "--rank", "1"],
    "methods": [],
    "new": ["my_method"],
}
OPTIONS = [
    *("--json", "--debug", "--help", "-h", "--headers-only", "--base", "--component", "--tolerance", "--exit-code"),
    *("-o", "--out", "--name", "--title", "--heads", "--untie", "--safe", "--architecture", "--workers"),
    *("--resume", "--overwrite", "--method", "--rank", "--energy", "--density", "--space"),
    *("--majority-sign-method", "--seed", "--isotropize", "--to", "--same-base", "--dtype", "--naming"),
    *("--as-component", "--target-modules", "--folder", "--target-regex", "--exclude-modules", "--modules-to-save"),
    *("--r", "--lora-alpha", "--set", "--no-such", "--", "-"),
]
VALUES = [
    *("a", "b", "loha", "head", "base", "nothing", "a:", "a:x", "a:nan", "a:1e400", "b:-1", "a:0", ":", ":1"),
    *("base:2", "out", "out.safetensors", "out.html", "base/config.json", "a/adapter_config.json", "", " ", "."),
    *("é", "x" * 300, "0", "1", "2", "-1", "1.5", "nan", "inf", "1e9", "99999999999999999999", "true", "None"),
    *("[]", "{}", "r=2", "r=x", "lora", "vera", "linear", "ties", "tsv", "delta", "core", "factors", "float32"),
    *("int8", "bfloat16", "nonsense", "query", "query,value", "all-linear", "(", "(a|aa)+!", ".*", "keep", "drop"),
    *("average", "kohya", "peft", "unet"),
]


def world(folder: Path) -> None:
    """A checkpoint and adapters on it, in the folder that the commands run in."""
    transformers.utils.logging.disable_progress_bar()
    model = build("bert")
    model.save_pretrained(folder / "base")
    adapters = ak.attach(model)
    for name, method, fields in (
        ("a", "lora", {"r": 2, "target_modules": ["query"], "modules_to_save": None}),
        ("b", "lora", {"r": 1, "target_modules": ["query", "value"], "modules_to_save": None}),
        ("loha", "loha", {"r": 1, "target_modules": ["query"], "modules_to_save": None}),
        ("head", "lora", {"r": 1, "target_modules": ["key"]}),
    ):
        adapters.add(name, ak.config(method, **fields))
        adapters.save(name, folder / name)


def draw(dice: random.Random) -> list[str]:
    """A command that would work, with a few changes; or anything."""
    if dice.random() < 0.1:
        return [dice.choice([*COMMANDS, *OPTIONS, *VALUES]) for _ in range(dice.randint(0, 6))]
    command = dice.choice(COMMANDS)
    words = list(NEEDED[command])
    for _ in range(dice.choice([0, 1, 1, 2, 2, 3, 5])):
        place = dice.randint(0, len(words))
        match dice.randrange(6):
            case 0:
                words[place : place + 1] = [dice.choice(VALUES)]
            case 1:
                del words[place : place + 1]
            case 2:
                words.insert(place, dice.choice(VALUES))
            case 3:
                words.insert(place, f"{dice.choice(OPTIONS)}={dice.choice(VALUES)}")
            case _:
                words[place:place] = [dice.choice(OPTIONS), *dice.choices(VALUES, k=dice.choice([0, 1, 1]))]
    return [command, *words]


def check(words: list[str], folder: Path) -> bool:
    """Run a command line in a folder made by `world`; whether it did what it was asked.

    Raises:
        Finding: it ends by an exception, by the exit status of an internal fault, or not in time; or it changed one of
            the folders that were there.
    """
    before = _files(folder)
    with contextlib.chdir(folder):
        try:
            with in_time():
                done = CliRunner().invoke(app, words, env={"COLUMNS": "100", "HF_HUB_OFFLINE": "1"})
        except Hang:
            raise Finding(f"it takes longer than {LONGEST:g} s") from None
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        shown = "".join(traceback.format_exception(done.exception)[-3:])
        raise Finding(f"{type(done.exception).__name__} reaches the caller: {shown}") from done.exception
    if done.exit_code not in (Exit.OK, Exit.ERROR, Exit.USAGE, Exit.DIFFERENT):
        raise Finding(f"exit status {done.exit_code}: {done.output[-600:]}")
    named = {Path(word.split("=")[-1].split(":")[0]).parts[:1] for word in words}
    after = _files(folder)
    for path, state in before.items():
        replaced = "--overwrite" in words and path.parts[:1] in named
        if after.get(path) != state and not replaced:
            raise Finding(f"{path} was changed")
    _clean(folder, before)
    return done.exit_code == Exit.OK


def _files(folder: Path) -> dict[Path, tuple[int, int]]:
    return {
        path.relative_to(folder): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def _clean(folder: Path, before: dict[Path, tuple[int, int]]) -> None:
    """Remove what the command made, so that every command line finds the same folder."""
    if _files(folder) == before and {p.name for p in folder.iterdir()} == {path.parts[0] for path in before}:
        return
    for path in list(folder.iterdir()):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    world(folder)
