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
from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum
from typing import Annotated, Any, NamedTuple, NoReturn

import typer
from rich.markup import escape

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


class Exit(IntEnum):
    """The exit statuses; scripts can rely on them."""

    OK = 0, "done"
    ERROR = 1, "the command failed; the message gives the reason, and nothing was changed"
    USAGE = 2, "the command line itself is wrong"
    INTERNAL = 3, "a bug in adapterkit or in another library; `--debug` shows the traceback"
    DIFFERENT = 4, "with `diff --exit-code`: the adapters differ"
    INTERRUPTED = 130, "interrupted by Ctrl-C"
    PIPE = 141, "the reader of the output closed it, as `head` does"

    meaning: str

    def __new__(cls, value: int, meaning: str) -> Exit:
        """A member is its number, and has a sentence."""
        member = int.__new__(cls, value)
        member._value_, member.meaning = value, meaning
        return member


class Outcome(NamedTuple):
    """A report with an exit status other than 0."""

    report: object
    status: Exit


def command(
    panel: str, calls: str, examples: Mapping[str, str], show: Callable[[Any], str] = str
) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Make a command of a function that returns a report.

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
            _run(functools.partial(function, **arguments), show, as_json, debug, options)

        _add_parameters(run, function, {"ctx": typer.Context, "as_json": Json, "debug": Debug})
        lines = (f"[dim]{escape(task)}:[/dim]\n  $ {escape(line)}" for task, line in examples.items())
        app.command(
            function.__name__,
            help=f"{flowing(function.__doc__)}\n\nIn Python: adapterkit.{calls}",
            epilog="\n\n".join(lines),
            rich_help_panel=panel,
        )(run)
        return function

    return register


def _add_parameters(run: Any, function: Callable[..., object], added: Mapping[str, Any]) -> None:
    """Give `run` the parameters of `function`, followed by those that every command has."""
    function.__annotations__.pop("return", None)  # a type of the library, which is imported only when it is needed
    signature = inspect.signature(function, eval_str=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    extra = [
        inspect.Parameter(name, keyword, annotation=kind, **({} if kind is typer.Context else {"default": False}))
        for name, kind in added.items()
    ]
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *extra])
    run.__annotations__ = {**function.__annotations__, **added}


def flowing(text: str | None) -> str:
    """A docstring with each paragraph on one line, so that a terminal of any width can wrap it."""
    paragraphs = inspect.cleandoc(text or "").split("\n\n")
    return escape("\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs))


def _run(
    call: Callable[[], object], show: Callable[[Any], str], as_json: bool, debug: bool, options: Mapping[str, str]
) -> None:
    status = Exit.OK
    try:
        with (
            _warnings_as_notes(),
            contextlib.redirect_stdout(sys.stderr),
        ):  # a plugin's prints are not part of the report
            report = call()
        if isinstance(report, Outcome):
            report, status = report
        print_json(report, sys.stdout) if as_json else print_text(show(report), sys.stdout)
        sys.stdout.flush()
    except (typer.Exit, typer.BadParameter):
        raise
    except KeyboardInterrupt:
        say("adapterkit", f"interrupted{'; continue with --resume' if 'resume' in options else ''}", "yellow")
        status = Exit.INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again at exit
        status = Exit.PIPE
    except Exception as error:  # noqa: BLE001 - every error of a program becomes a message and a status
        _fail(error, as_json, debug, options)
    if status:
        raise typer.Exit(status)


def _fail(error: Exception, as_json: bool, debug: bool, options: Mapping[str, str]) -> NoReturn:
    from adapterkit import AdapterError

    if debug:
        traceback.print_exception(error)
    expected = isinstance(error, AdapterError | OSError)
    message = as_options(str(error), options)
    status = Exit.ERROR if expected else Exit.INTERNAL
    if as_json:
        found = {"type": type(error).__name__, "message": message, "status": int(status)}
        print_json({"error": found}, sys.stderr)
    elif expected:
        say("error", message, "red")
    else:
        hint = "" if debug else " This is a bug. Run the command again with --debug, and report the traceback."
        say("internal error", f"{type(error).__name__}: {error}.{hint}", "red")
    raise typer.Exit(status)


def as_options(message: str, options: Mapping[str, str]) -> str:
    """A message with a function's arguments (`rank=4`) replaced by the command's options (`--rank 4`)."""
    named = {name.strip("_"): option for name, option in options.items() if option.startswith("--")}
    pattern = rf"\b({'|'.join(map(re.escape, named))})=(True\b|False\b|(?=[\w'\"\[{{-]))?"

    def option(found: re.Match[str]) -> str:
        return f"{'no ' * (found[2] == 'False')}{named[found[1]]}{' ' * (found[2] == '')}"

    return re.sub(pattern, option, message)


@contextlib.contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """Print each of Python's warnings as one line on stderr."""

    def note(message: Warning | str, *_: object, **__: object) -> None:
        say("note", " ".join(str(message).split()), "yellow")

    with warnings.catch_warnings():
        warnings.showwarning = note
        yield
