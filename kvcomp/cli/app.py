"""The `kvcomp` command. Torch and transformers are imported by the commands that need them."""

from __future__ import annotations

import warnings
from typing import Annotated, Any

import typer

from kvcomp import __version__
from kvcomp.console import Group, note

from . import ask, bench, calibrate, data, doctor, generate, plan, report, serve, speed, stacks, tune
from .output import EXIT_CODES

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog=EXIT_CODES,
    help="""Compress the KV cache of a language model: keep fewer tokens, in fewer bits, and read fewer of them.

A [bold]stack[/] says how, in one line: stages joined by "+", each with its arguments.

  none                              the uncompressed cache
  kivi(bits=2)                      2-bit keys and values
  snapkv(keep=0.25) + kivi(bits=4)  a quarter of the tokens, in 4 bits
  kivi(bits=4) + quest(pages=16)    4 bits, and a decode step reads 16 pages

Start with [bold]kvcomp stacks[/], which lists the stages.""",
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"kvcomp {__version__}")
        raise typer.Exit


@app.callback()
def main(
    show: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    note("warning", "yellow", str(message))


app.command(epilog=stacks.EXAMPLES)(stacks.stacks)
app.command(epilog=generate.EPILOG)(generate.generate)
app.command(epilog=ask.EPILOG)(ask.ask)
app.command(epilog=bench.EPILOG)(bench.bench)
app.command(epilog=tune.EPILOG)(tune.tune)
app.command(epilog=report.EPILOG)(report.report)
app.command(epilog=plan.EPILOG)(plan.plan)
app.command(epilog=speed.EPILOG)(speed.speed)
app.command(epilog=serve.EPILOG, context_settings=serve.ANY_OPTION)(serve.serve)
app.command(epilog=doctor.EPILOG)(doctor.doctor)
app.command(epilog=calibrate.EPILOG)(calibrate.calibrate)
app.add_typer(data.app, name="data")
