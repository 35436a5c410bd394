"""`kvcomp report`: the report of one run made anew, or of several side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from kvcomp.errors import KvcompError

EXAMPLES = """Examples:

  kvcomp report out/bench

  kvcomp report out/before out/after --out out/comparison"""


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that were the --out of a bench.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of summary.csv and report.html.  \\[default: that of the run, if it is one]"),
    ] = None,
) -> None:
    """Make the report of a run anew from its finished samples, or compare runs.

    Of several runs there is a row per run and stack, its accuracy also as the difference to the same stack in the first
    run: paired over the samples that are the same, or unpaired where there are none. Settings that differ are named.
    Samples are only read, never changed.
    """
    from kvcomp.benchmarks import likelihood
    from kvcomp.benchmarks.report import publish, tables
    from kvcomp.benchmarks.results import read_run

    if out is None:
        if len(runs) > 1:
            raise KvcompError("out: the report of several runs needs a folder of its own: --out DIR.")
        out = runs[0]
    if (out / "config.json").exists() and (len(runs) > 1 or out.resolve() != runs[0].resolve()):
        raise KvcompError(
            f"out: {str(out)!r} is a run itself, whose report would be overwritten. Choose another --out."
        )
    comparison = publish([read_run(run) for run in runs], out)
    console = Console()
    if not console.is_terminal:
        console = Console(width=100 if len(runs) == 1 else 120)  # in a file, a row stays a line
    for table in [*tables(comparison.lines), *likelihood.tables(comparison.texts)]:
        console.print(table)
    if any(line.first and not line.first.paired for line in comparison.lines):
        console.print("* unpaired: other samples than the first run's", highlight=False)
    for setting, values in comparison.differing.items():
        said = "; ".join(f"{name}: {value}" for name, value in zip(comparison.names, values, strict=True))
        console.print(f"[bold]{escape(setting)}[/] differs: {escape(said)}", soft_wrap=True, highlight=False)
    for note in comparison.notes:
        console.print(escape(note), soft_wrap=True, highlight=False)
    console.print(f"Report: {escape(str(out / 'report.html'))}", soft_wrap=True, highlight=False)
