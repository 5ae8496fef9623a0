"""How every command runs: its report is printed, its errors and warnings become messages and exit statuses."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand

from adapterkit_command.output import print_json, print_text, say

Json = Annotated[
    bool, typer.Option("--json", help="Print the report, or the error, as JSON.", rich_help_panel="Output")
]
Debug = Annotated[
    bool,
    typer.Option("--debug", envvar="ADAPTERKIT_DEBUG", help="Show the traceback of errors.", rich_help_panel="Output"),
]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _Command(TyperCommand):
    """A command that says what is wrong with an option in plain words."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            # The words of pydantic, with which typer reads values
            text = error.message.removeprefix("Value error, ").replace("Input should be", "it must be")
            error.message = text.partition(", unable to parse")[0]
            raise


class Exit(IntEnum):
    """The exit statuses; scripts can rely on them."""

    OK = 0
    ERROR = 1
    USAGE = 2
    INTERNAL = 3
    DIFFERENT = 4
    INTERRUPTED = 130
    PIPE = 141


MEANINGS = {
    Exit.OK: "done",
    Exit.ERROR: "the command failed because of a file, a model or the system; the message gives the reason, and "
    "nothing was changed",
    Exit.USAGE: "the command line itself is wrong: an argument or its value is missing, unknown or out of range",
    Exit.INTERNAL: "a bug in adapterkit or in another library; `--debug` shows the traceback",
    Exit.DIFFERENT: "with `diff --exit-code`: the adapters differ; with `check`: the server does not serve the adapter",
    Exit.INTERRUPTED: "interrupted by Ctrl-C",
    Exit.PIPE: "the reader of the output closed it, as `head` does",
}


# The commands by the functions of the library that they call.
_COMMANDS: dict[str, str] = {}


def command(
    panel: str, calls: str, examples: Mapping[str, str], show: Callable[[Any], str] = str
) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Make a command of a function that returns a report, or a report and an exit status.

    Args:
        panel: the group of commands under which help lists it.
        calls: the function of the library that does the work.
        examples: tasks, each with the command line for it.
        show: returns the report as text.
    """

    def register(function: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(function)
        def run(ctx: typer.Context, as_json: bool, debug: bool, **arguments: object) -> None:
            debug = debug or bool(ctx.parent and ctx.parent.params.get("debug"))
            options = {parameter.name or "": parameter.opts[0] for parameter in ctx.command.params}
            new = _missing_parent(arguments.get("out") or arguments.get("folder"))
            _run(functools.partial(function, **arguments), show, as_json, debug, options)
            if new is not None and new.is_dir():
                say("note", f"made the folder {new}", "yellow")

        _COMMANDS[calls] = _COMMANDS[function.__name__] = function.__name__
        function.__annotations__.pop("return", None)  # a type of the library, which is imported only when needed
        signature = inspect.signature(function, eval_str=True)
        described: Any = run
        described.__signature__ = signature.replace(
            parameters=[
                inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
                *signature.parameters.values(),
                inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, annotation=Json, default=False),
                inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, annotation=Debug, default=False),
            ]
        )
        added = {"ctx": typer.Context, "as_json": Json, "debug": Debug}
        described.__annotations__ = {**function.__annotations__, **added}
        lines = (f"[dim]{escape(task)}:[/dim]\n  $ {escape(line)}" for task, line in examples.items())
        app.command(
            function.__name__,
            cls=_Command,
            help=f"{flowing(function.__doc__)}\n\nIn Python: adapterkit.{calls}",
            epilog="\n\n".join(lines),
            rich_help_panel=panel,
        )(run)
        return function

    return register


def _missing_parent(out: object) -> Path | None:
    """The first folder on the way to an output that does not exist yet."""
    if not isinstance(out, Path):
        return None
    return next((folder for folder in reversed(out.parents) if not folder.exists()), None)


def flowing(text: str | None) -> str:
    """A docstring with each paragraph on one line, so that a terminal of any width can wrap it."""
    paragraphs = inspect.cleandoc(text or "").split("\n\n")
    return escape("\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs))


def _run(
    call: Callable[[], object], show: Callable[[Any], str], as_json: bool, debug: bool, options: Mapping[str, str]
) -> None:
    """Call, print the report, and exit; errors become a message and a status."""
    status = Exit.OK
    try:
        # What a plugin prints is not part of the report.
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.showwarning = functools.partial(_note, options)
            report = call()
        if isinstance(report, tuple):
            report, status = report
        print_json(report, sys.stdout) if as_json else print_text(show(report), sys.stdout)
        sys.stdout.flush()
    except typer.BadParameter:
        raise
    except KeyboardInterrupt:
        say("adapterkit", f"interrupted{'; continue with --resume' if 'resume' in options else ''}", "yellow")
        status = Exit.INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again at exit
        status = Exit.PIPE
    except (Exception, SystemExit) as error:  # noqa: BLE001 - no plugin ends a command without a word
        status = _failed(error, as_json, debug, options)
    if status:
        raise typer.Exit(status)


def _note(options: Mapping[str, str], message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning as one line on stderr."""
    say("note", as_options(" ".join(str(message).split()), options), "yellow")


def _failed(error: BaseException, as_json: bool, debug: bool, options: Mapping[str, str]) -> Exit:
    """Print the error, and return the status for it."""
    if debug:
        traceback.print_exception(error)
    message = as_options(str(error), options)
    status = _status(error)
    if as_json:
        print_json({"error": {"type": type(error).__name__, "message": message, "status": int(status)}}, sys.stderr)
    elif status is not Exit.INTERNAL:
        say("error", message, "red")
    else:
        hint = "" if debug else " This is a bug. Run the command again with --debug, and report the traceback."
        why = " ".join(str(error).split())
        say("internal error", f"{type(error).__name__}: {why}.{hint}", "red")
    return status


def _status(error: BaseException) -> Exit:
    ak: Any = sys.modules.get("adapterkit")  # not there if its own import failed
    if ak is None:
        return Exit.INTERNAL
    if isinstance(error, ak.UsageError | ak.UnknownNameError) and not isinstance(error, ak.CheckpointError):
        return Exit.USAGE
    return Exit.ERROR if isinstance(error, ak.AdapterError | OSError) else Exit.INTERNAL


def as_options(message: str, options: Mapping[str, str]) -> str:
    """A message in the words of the command line: `--rank 4` for `rank=4`, `adapterkit extract` for `ak.extract_files`.

    An argument that the command does not have is another command's option.
    """
    group: Any = typer.main.get_command(app)
    others = {parameter.name: parameter.opts[0] for other in group.commands.values() for parameter in other.params}
    named = {name.strip("_"): option for name, option in {**others, **options}.items() if option.startswith("--")}
    pattern = rf"\b({'|'.join(map(re.escape, named))})(?:=| = )(True\b|False\b|(?=[\w'\"\[({{.-]))?"

    def option(found: re.Match[str]) -> str:
        return f"{'no ' * (found[2] == 'False')}{named[found[1]]}{' ' * (found[2] == '')}"

    def called(found: re.Match[str]) -> str:
        return f"adapterkit {_COMMANDS[found[1]]}" if found[1] in _COMMANDS else found[0]

    return re.sub(pattern, option, re.sub(r"\bak\.(\w+)(\([^()]*\))?", called, message))
