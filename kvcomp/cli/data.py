"""`kvcomp data check`: what a folder for --data holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from kvcomp.console import results, styled

from .output import Document, Json

if TYPE_CHECKING:
    from kvcomp.benchmarks.data import Finding

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="The texts that benchmarks are made of.")
DOCUMENT = Document(
    folder="the folder as given",
    ready="tasks that can run",
    tasks="an object for each task: task, ready, count and unit of its content (null if generated), file (null if "
    "generated, missing or from the package), source (where the content comes from, or why it is missing)",
)


@app.command(epilog=f"Examples:\n\n  kvcomp data check ./texts\n\n{DOCUMENT.help}")
def check(
    folder: Annotated[Path, typer.Argument(help="The folder that bench would get as --data.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Print for every task where its text comes from and how much of it there is, or what to fetch.

    Exits with code 1 if a file is there but cannot be read.
    """
    from kvcomp.benchmarks import data, tasks

    found = {finding.source.name: finding for finding in data.check(folder)}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), highlight=False)
    table.add_column("task", no_wrap=True)
    table.add_column("content", justify="right", no_wrap=True)
    table.add_column("from", overflow="fold")
    damaged = False
    records: list[dict[str, Any]] = []
    for name in tasks.all_tasks():
        findings = [found[source.name] for source in tasks.find_task(name).sources]
        bad = [finding for finding in findings if finding.problem]
        texts = [finding for finding in findings if finding.source.listed]
        content, place, style = "–", "generated", "default"
        for finding in bad or texts:
            content, place, style = _describe(finding, folder)
        table.add_row(name, content, styled(place, "" if style == "default" else style))
        records.append(_record(name, bad, texts, place))
        damaged = damaged or any(finding.file for finding in bad)
    ready = sum(record["ready"] for record in records)
    if as_json:
        DOCUMENT.print(folder=str(folder), ready=ready, tasks=records)
    else:
        console = results(160)
        console.print(table)
        console.print(f"{ready} of {len(records)} tasks can run with --data {folder}", soft_wrap=True)
    if damaged:
        raise typer.Exit(1)


def _record(name: str, bad: list[Finding], texts: list[Finding], place: str) -> dict[str, Any]:
    """A task for programs."""
    shown = next(reversed(bad or texts), None)
    return {
        "task": name,
        "ready": not bad,
        "count": None if shown is None or bad else shown.count,
        "unit": None if shown is None else shown.source.unit,
        "file": None if shown is None or shown.file is None else str(shown.file),
        "source": place,
    }


def _describe(finding: Finding, folder: Path) -> tuple[str, str, str]:
    """Return how much there is of a source, where from, and in which colour to say so."""
    source = finding.source
    content = f"{finding.count:,} {source.unit}"
    if finding.problem and finding.file:
        return "–", finding.problem, "red"
    if finding.problem:
        return "–", finding.problem if source.fallback else f"missing: {source.fetch}", "yellow"
    if finding.file is None:
        return content, f"{source.fallback_name}: there is no {source.files[0]}", "yellow"
    return content, os.path.relpath(finding.file, os.path.expanduser(folder)), "green"
