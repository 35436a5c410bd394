"""`kvcomp report`: the report of one run made again, or of several side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from kvcomp.console import results, styled
from kvcomp.errors import KvcompError
from kvcomp.integrations.options import one_of
from kvcomp.text import quote, visible

from .output import Document, Json

if TYPE_CHECKING:
    from kvcomp.benchmarks.compare import Comparison, Line

DOCUMENT = Document(
    rows="an object for each run, context and stack: run (empty if there is only one), the columns of summary.csv, "
    "by_group, by_task and by_depth (objects of accuracy and samples), and first, the difference to the same stack in "
    "the first run (mean, low, high, paired, samples), or null",
    texts="an object for each run, context, text and stack: the columns of perplexity.csv",
    fidelity="an object for each run, context, text and stack: the columns of fidelity.csv",
    differing="settings that differ between the runs: the value in each run",
    notes="remarks, such as tasks that were left out",
    report="path of report.html",
    exported="folders or files that --export of report wrote",
)
EPILOG = f"""Examples:

  kvcomp report out/bench

  kvcomp report out/before out/after --out out/comparison

  kvcomp report out/bench --export kvpress

{DOCUMENT.help}"""


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that were the --out of a bench.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of summary.csv and report.html.  \\[default: the run's, if there is only one]"),
    ] = None,
    export: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help="Write the runs in another format, too, into a folder of its name in --out: kvpress, as its "
            "leaderboard takes them, or mbe, cards of Matched-Budget Evaluation 0.1.0.",
            autocompletion=one_of("kvpress", "mbe"),
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make the report of a run again from its finished samples, or compare runs.

    Several runs give a row per run and stack, with its accuracy also as the difference to the same stack in the first
    run: paired over the samples that are the same, or unpaired where there are none. Settings that differ are named.
    Shards of a run (bench --shard) are one run, whether its folder is given or theirs.
    Samples are only read, never changed.
    """
    from kvcomp.benchmarks.exporting import find_format
    from kvcomp.benchmarks.merging import read_runs
    from kvcomp.benchmarks.report import publish

    if out is None:
        if len(runs) > 1:
            raise KvcompError("out: the report of several runs needs a folder of its own: --out DIR.")
        out = runs[0]
    if os.path.exists(out / "config.json") and (len(runs) > 1 or os.path.realpath(out) != os.path.realpath(runs[0])):
        raise KvcompError(
            f"out: {quote(str(out))} is a run itself, whose report would be overwritten. Choose another --out."
        )
    write = None if export is None else find_format(export)
    found = read_runs(runs)
    comparison = publish(found, out)
    made, other = write(found, out / str(export)) if write else ([], [])
    remarks = [*comparison.notes, *(f"not exported: {name}: {export} has no place for it" for name in other)]
    if as_json:
        print_json(replace(comparison, notes=remarks), out, made)
    else:
        remarks += [f"Exported: {path}" for path in made]
        print_tables(comparison, out, 100 if len(found) == 1 else 120, remarks)


def print_tables(comparison: Comparison, out: Path, width: int, remarks: Sequence[str] = ()) -> None:
    """The tables of a comparison, the settings that differ, and remarks."""
    from kvcomp.benchmarks.terminal import tables

    console = results(width)
    for table in tables(comparison):
        console.print(table)
    if any(line.first and not line.first.paired for line in comparison.lines):
        console.print("* unpaired: other samples than the first run's")
    for setting, values in comparison.differing.items():
        said = "; ".join(f"{name}: {value}" for name, value in zip(comparison.names, values, strict=True))
        console.print(Text.assemble(styled(setting, "bold"), " differs: ", visible(said)), soft_wrap=True)
    for remark in remarks:
        console.print(remark, soft_wrap=True)
    console.print(f"Report: {out / 'report.html'}", soft_wrap=True)


def print_json(comparison: Comparison, out: Path, exported: Sequence[Path] = ()) -> None:
    """A comparison for programs."""
    DOCUMENT.print(
        rows=[_record(line) for line in comparison.lines],
        texts=[asdict(row) for row in comparison.texts],
        fidelity=[asdict(row) for row in comparison.fidelity],
        differing=comparison.differing,
        notes=comparison.notes,
        report=str(out / "report.html"),
        exported=[str(path) for path in exported],
    )


def _record(line: Line) -> dict[str, Any]:
    row = asdict(line.row)
    for part in ("by_group", "by_task", "by_depth"):
        row[part] = {name: share._asdict() for name, share in getattr(line.row, part).items()}
    return {"run": line.run, **row, "first": line.first and line.first._asdict()}
