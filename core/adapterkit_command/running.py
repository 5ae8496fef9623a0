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
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple, NoReturn

import typer
from rich.console import RenderableType
from rich.markup import escape

from adapterkit_command.exits import Exit
from adapterkit_command.output import print_json, print_text, say

Show = Callable[[Any], Iterable[RenderableType]]

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


class Outcome(NamedTuple):
    """A report, and an exit status that is not the usual one."""

    report: object
    status: Exit


def _as_text(report: object) -> list[RenderableType]:
    return [str(report)]


def command(
    panel: str, calls: str, examples: Mapping[str, str], show: Show = _as_text
) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Make a command of a function that returns a report.

    Args:
        panel: the group of commands that help shows it in.
        calls: the function of the library that stands behind it.
        examples: what one may want, and the command line that does it.
        show: the report as what rich can print; its text by default.
    """

    def register(function: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(function)
        def run(ctx: typer.Context, as_json: bool, debug: bool, **arguments: object) -> None:
            debug = debug or bool(ctx.parent and ctx.parent.params.get("debug"))
            options = {parameter.name or "": parameter.opts[0] for parameter in ctx.command.params}
            _run(functools.partial(function, **arguments), show, as_json, debug, options)

        _add_parameters(run, function, {"ctx": typer.Context, "as_json": Json, "debug": Debug})
        name = function.__name__.strip("_")
        app.command(
            name,
            help=f"{flowing(function.__doc__)}\n\nIn Python: adapterkit.{calls}",
            epilog=_epilog(examples),
            rich_help_panel=panel,
        )(run)
        return function

    return register


def _add_parameters(run: Any, function: Callable[..., object], added: Mapping[str, Any]) -> None:
    """Give `run` the parameters of `function` and, after them, those that every command has."""
    function.__annotations__.pop("return", None)  # the library's, which is not imported before it is needed
    signature = inspect.signature(function, eval_str=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    extra = [
        inspect.Parameter(name, keyword, annotation=kind, **({} if kind is typer.Context else {"default": False}))
        for name, kind in added.items()
    ]
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *extra])
    run.__annotations__ = {**function.__annotations__, **added}


def flowing(text: str | None) -> str:
    """A docstring with one line a paragraph, so that a terminal of any width can wrap it."""
    paragraphs = inspect.cleandoc(text or "").split("\n\n")
    return escape("\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs))


def _epilog(examples: Mapping[str, str]) -> str:
    return "\n\n".join(f"[dim]{escape(what)}:[/dim]\n  $ {escape(line)}" for what, line in examples.items())


def _run(call: Callable[[], object], show: Show, as_json: bool, debug: bool, options: Mapping[str, str]) -> None:
    status = Exit.OK
    try:
        with _warnings_as_notes(), contextlib.redirect_stdout(sys.stderr):  # what plugins print is no report
            report = call()
        if isinstance(report, Outcome):
            report, status = report
        print_json(report, sys.stdout) if as_json else print_text(show(report), sys.stdout)
        sys.stdout.flush()
    except (typer.Exit, typer.BadParameter):
        raise
    except KeyboardInterrupt:
        say("adapterkit", f"interrupted{'; --resume goes on from here' if 'resume' in options else ''}", "yellow")
        status = Exit.INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again at exit
        status = Exit.PIPE
    except Exception as error:  # noqa: BLE001 - the last resort of a program: it becomes a message and a status
        _fail(error, as_json, debug, options)
    if status:
        raise typer.Exit(status)


def _fail(error: Exception, as_json: bool, debug: bool, options: Mapping[str, str]) -> NoReturn:
    from adapterkit import AdapterError

    if debug:
        traceback.print_exception(error)
    users = isinstance(error, AdapterError | OSError)
    message = as_options(str(error), options)
    status = Exit.ERROR if users else Exit.INTERNAL
    if as_json:
        found = {"type": type(error).__name__, "message": message, "status": int(status)}
        print_json({"error": found}, sys.stderr)
    elif users:
        say("error", message, "red")
    else:
        hint = "" if debug else " This should not happen; run it again with --debug for the traceback, and report that."
        say("internal error", f"{type(error).__name__}: {error}.{hint}", "red")
    raise typer.Exit(status)


def as_options(message: str, options: Mapping[str, str]) -> str:
    """A message that speaks of a function's arguments (`rank=4`), in terms of the command's options (`--rank 4`)."""
    named = {name.strip("_"): option for name, option in options.items() if option.startswith("--")}
    pattern = rf"\b({'|'.join(map(re.escape, named))})=(True\b|False\b|(?=[\w'\"\[{{-]))?"

    def option(found: re.Match[str]) -> str:
        return f"{'no ' * (found[2] == 'False')}{named[found[1]]}{' ' * (found[2] == '')}"

    return re.sub(pattern, option, message)


@contextlib.contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """Python's warnings as one line each on stderr."""

    def note(message: Warning | str, *_: object, **__: object) -> None:
        say("note", " ".join(str(message).split()), "yellow")

    with warnings.catch_warnings():
        warnings.showwarning = note
        yield
