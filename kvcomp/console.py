"""What commands print: text is text, whatever users and files wrote; an error is what is wrong, and the way out.

Results go to stdout; notes, progress and errors to stderr. Nothing moves where stderr is no terminal.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from kvcomp.errors import KvcompError
from kvcomp.text import quote, visible

REFUSED = 2  # exit code of what cannot be done as asked
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)  # of a stream that takes no more
UsageError: Any = typer.BadParameter.__mro__[1]  # of the click that typer has, which may be its own
SENTENCE = re.compile(r"(?<=[.!?]) (?=[A-Z])")
T = TypeVar("T")


class Plain(Console):
    """A console on which a string is never markup, and control characters are written out; colours come as `Text`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text as it is; also that of table cells and titles."""
        return super().render_str(visible(text), **{**options, "markup": False, "emoji": False})


def styled(text: str, style: str) -> Text:
    """The text in a style of rich's, such as "bold red"."""
    return Text(visible(text), style)


def notes() -> Plain:
    """The console of what is no result."""
    return Plain(stderr=True)


def results(width: int) -> Plain:
    """The console of results; `width` characters wide where it is no terminal, so that in a file a row is a line."""
    console = Plain()
    return console if console.is_terminal else Plain(width=width)


def note(label: str, style: str, text: str) -> None:
    """One line of notes, `label: text`."""
    notes().print(Text.assemble(styled(f"{label}:", style), " ", visible(text)), soft_wrap=True)


def error(what: str, way_out: str = "") -> None:
    """An error in at most two lines: what is wrong, and what to do about it."""
    with suppress(OSError):  # the exit code says so, too
        note("error", "bold red", what.replace("\n", " "))
        if way_out:
            notes().print(visible(f"  {way_out}".replace("\n", " ")), soft_wrap=True)


def progress(*columns: str | ProgressColumn, console: Console | None = None) -> Progress:
    """A progress bar on stderr that is gone when it is done; nothing where stderr is no terminal.

    columns: what stands before the bar and after it; rich's format strings. Default: the description and the count.
    """
    console = console or notes()
    before: tuple[ProgressColumn, ...] = (TextColumn("{task.description}", markup=False),)
    shown = columns or (*before, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*shown, console=console, transient=True, disable=not console.is_terminal)


def track(items: Iterable[T], description: str, total: float | None = None) -> Iterator[T]:
    """The items, with a `progress` bar as they are used."""
    with progress() as bar:
        yield from bar.track(items, total=total, description=description)


@contextmanager
def waiting(description: str) -> Iterator[None]:
    """Shows on a terminal that something takes a while, and for how long it has; in a pipe, one line says so."""
    console = notes()
    if not console.is_terminal:
        console.print(f"{description} ...", soft_wrap=True)
    columns = (SpinnerColumn(), TextColumn("{task.description} ...", markup=False), TimeElapsedColumn())
    with progress(*columns, console=console) as bar:
        bar.add_task(visible(description), total=None)
        yield


@contextmanager
def explained() -> Iterator[None]:
    """Turns errors that kvcomp raises on purpose, options that are wrong and files that cannot be used into at most two
    lines, and exit code 2."""
    try:
        yield
    except KvcompError as failure:
        error(*SENTENCE.split(str(failure), maxsplit=1))
    except UsageError as failure:
        if type(failure).__name__ == "NoArgsIsHelpError":
            raise
        command = "kvcomp" if failure.ctx is None else failure.ctx.command_path
        error(failure.format_message(), f"`{command} --help` lists what it takes.")
    except OSError as failure:
        if failure.filename is not None:
            error(f"{quote(str(failure.filename))}: {failure.strerror}.")
        elif failure.errno in FULL:
            _discard_output()
            error(f"the output cannot be written: {failure.strerror}.")
        else:
            raise
    else:
        return
    raise typer.Exit(REFUSED)


def _discard_output() -> None:
    """Drop what stdout still holds, which would fail again when Python exits."""
    with suppress(OSError, ValueError, AttributeError):  # no file of the system's
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)


class _Explained:
    """A command whose arguments are UTF-8, and whose errors are explained."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        with explained():
            return super().make_context(*args, **options)  # type: ignore[misc]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for given in args:
            if any("\ud800" <= c <= "\udfff" for c in given):
                raise typer.BadParameter(f"{quote(given)} is not UTF-8.", ctx=ctx)
        parsed: list[str] = super().parse_args(ctx, args)  # type: ignore[misc]
        return parsed

    def invoke(self, ctx: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # a terminal may know fewer characters than a model
        with explained():
            result = super().invoke(ctx)  # type: ignore[misc]
            if sys.stdout is not None:
                sys.stdout.flush()
            return result


class Group(_Explained, TyperGroup):
    """Commands of one program."""


class Command(_Explained, TyperCommand):
    """A program of one command."""


def run(main: Callable[..., None]) -> None:
    """Run a module's only command."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(cls=Command)(main)
    app()
