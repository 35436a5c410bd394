"""Reports as tables of a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from kvcomp.benchmarks import costs, divergence, likelihood
from kvcomp.benchmarks.compare import Comparison, Line
from kvcomp.benchmarks.report import cells

APART = (costs.PREFILL, costs.PEAK)  # in a terminal they have a table of their own


def tables(comparison: Comparison) -> list[Table]:
    """Return the terminal tables of accuracies, perplexities and fidelities."""
    texts = [
        *likelihood.tables(comparison.texts, likelihood.COLUMNS, likelihood.cells),
        *divergence.tables(comparison.fidelity),
    ]
    return [*of_accuracy(comparison.lines), *texts]


def of_accuracy(report: Sequence[Line]) -> list[Table]:
    """Return two terminal tables for every context, the second of prefill, peak and means over groups of tasks.

    The intervals are left to the page and the CSV.
    """
    made = []
    for context in dict.fromkeys(line.row.context for line in report):
        chosen = [line for line in report if line.row.context == context]
        several = any(line.run for line in report)
        counts = sorted({line.row.samples for line in chosen})
        samples = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        title = f"{context} tokens, {samples} samples a stack"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        if several:
            table.add_column("run", overflow="fold")
        table.add_column("stack", min_width=18)
        shown = [column for column in cells(chosen[0]) if column not in APART]
        for column in shown:
            table.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
        for line in chosen:
            texts = cells(line)
            start = [line.run, line.row.stack] if several else [line.row.stack]
            table.add_row(*start, *(_short(texts[column]) for column in shown))
        apart = [
            costs.Line(line.run, row.stack, row, {name: f"{mean.accuracy:.0%}" for name, mean in row.by_group.items()})
            for line in chosen
            for row in [line.row]
        ]
        made += [table, costs.table(f"{context} tokens: further figures", apart)]
    return made


def _short(text: str) -> str:
    """Leave the interval out, and say "unpaired" with one sign."""
    return text.split(" [")[0] + (" *" if text.endswith("unpaired") else "")
