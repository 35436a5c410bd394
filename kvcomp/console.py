"""What commands print: text is text, whatever users and files wrote, and an error of kvcomp's is one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from kvcomp.errors import KvcompError
from kvcomp.text import quote, visible


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


@contextmanager
def explained() -> Iterator[None]:
    """Turns errors that kvcomp raises on purpose, and files that cannot be used, into one line and exit code 2."""
    try:
        yield
    except KvcompError as error:
        note("error", "bold red", str(error))
    except OSError as error:
        if error.filename is None or isinstance(error, BrokenPipeError):
            raise
        note("error", "bold red", f"{quote(str(error.filename))}: {error.strerror}.")
    else:
        return
    raise typer.Exit(2)


class _Explained:
    """A command whose arguments are UTF-8, and whose errors are explained."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for given in args:
            if any("\ud800" <= c <= "\udfff" for c in given):
                raise typer.BadParameter(f"{quote(given)} is not UTF-8.")
        parsed: list[str] = super().parse_args(ctx, args)  # type: ignore[misc]
        return parsed

    def invoke(self, ctx: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # a terminal may know fewer characters than a model
        with explained():
            return super().invoke(ctx)  # type: ignore[misc]


class Group(_Explained, TyperGroup):
    """Commands of one program."""


class Command(_Explained, TyperCommand):
    """A program of one command."""


def run(main: Callable[..., None]) -> None:
    """Run a module's only command."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(cls=Command)(main)
    app()
