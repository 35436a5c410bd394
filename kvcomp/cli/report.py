"""`kvcomp report`: the report of one run made anew, or of several side by side."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from kvcomp.console import results, styled
from kvcomp.errors import KvcompError
from kvcomp.text import quote, visible

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
    from kvcomp.benchmarks.report import publish, tables
    from kvcomp.benchmarks.results import read_run

    if out is None:
        if len(runs) > 1:
            raise KvcompError("out: the report of several runs needs a folder of its own: --out DIR.")
        out = runs[0]
    if os.path.exists(out / "config.json") and (len(runs) > 1 or os.path.realpath(out) != os.path.realpath(runs[0])):
        raise KvcompError(
            f"out: {quote(str(out))} is a run itself, whose report would be overwritten. Choose another --out."
        )
    comparison = publish([read_run(run) for run in runs], out)
    console = results(100 if len(runs) == 1 else 120)
    for table in tables(comparison):
        console.print(table)
    if any(line.first and not line.first.paired for line in comparison.lines):
        console.print("* unpaired: other samples than the first run's")
    for setting, values in comparison.differing.items():
        said = "; ".join(f"{name}: {value}" for name, value in zip(comparison.names, values, strict=True))
        console.print(Text.assemble(styled(setting, "bold"), " differs: ", visible(said)), soft_wrap=True)
    for note in comparison.notes:
        console.print(note, soft_wrap=True)
    console.print(f"Report: {out / 'report.html'}", soft_wrap=True)
