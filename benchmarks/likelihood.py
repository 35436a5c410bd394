"""Texts scored by their likelihood (`perplexity`): a row per run, context, text and stack, apart from accuracies."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich import box
from rich.table import Table

from kvcomp.benchmarks import costs
from kvcomp.benchmarks.intervals import SAME, paired_interval
from kvcomp.benchmarks.results import NLL, Record, Run, write_text
from kvcomp.benchmarks.summary import DENSE
from kvcomp.benchmarks.tabular import csv_text

COLUMNS = {
    "bits": "bits held per cached number, with scales, summaries, sinks, window and unused room all counted",
    "held ×": "how many times less than the dense cache the cache occupies at the end of a text",
    "read ×": "how many times less than the dense cache one decode step loads",
    "perplexity": "exp of the mean negative log-likelihood of the scored tokens, predicted from the compressed cache",
    "× none": "perplexity over that of the uncompressed cache on the same texts, with its 95% interval: a bootstrap of "
    "the paired differences of log-likelihoods",
    **costs.COLUMNS,
}


@dataclass(frozen=True)
class TextRow:
    """One stack on the windows of one text. nll: nats per token; ratios to `none`: None where it did not run."""

    run: str
    context: int
    task: str
    stack: str
    samples: int
    effective_bits: float
    held_ratio: float  # dense bytes / held bytes
    read_ratio: float  # dense bytes / bytes read, per decode step
    nll: float
    perplexity: float
    ratio: float | None
    ratio_low: float | None  # None where the samples show no spread
    ratio_high: float | None
    ms_per_token: float
    prefill_s: float  # the dense one that stacks share; 0 for one that entered alone
    prefill_own_s: float | None  # what this stack added, or all of its own
    peak_mib: float | None  # of the cache and its decode steps


def summarize(runs: Sequence[Run], names: Sequence[str] = ("",)) -> list[TextRow]:
    """Return the rows of all runs by context and text, and then as they first appear; none without scored texts."""
    rows = []
    for name, run in zip(names, runs, strict=True):
        groups: dict[tuple[int, str, str], list[Record]] = {}
        for record in run.records:
            if record.metric == NLL:
                groups.setdefault((record.context, record.task, record.stack), []).append(record)
        for (context, task, _), group in groups.items():
            dense = {record.index: record.score for record in groups.get((context, task, DENSE), [])}
            rows.append(_row(name, group, dense))
    return sorted(rows, key=lambda row: (row.context, row.task))


def _row(run: str, group: Sequence[Record], dense: Mapping[int, float]) -> TextRow:
    first, nll = group[0], statistics.fmean(record.score for record in group)
    differences = [record.score - dense[record.index] for record in group if record.index in dense]
    ratio = low = high = None
    if differences and first.stack != DENSE:
        ratio = math.exp(statistics.fmean(differences))
        if max(differences) - min(differences) > SAME:
            low, high = (math.exp(end) for end in paired_interval(differences))
    return TextRow(
        run=run,
        context=first.context,
        task=first.task,
        stack=first.stack,
        samples=len(group),
        effective_bits=statistics.fmean(record.effective_bits for record in group),
        held_ratio=sum(r.held_dense for r in group) / sum(r.held for r in group),
        read_ratio=sum(r.read_dense for r in group) / sum(r.read for r in group),
        nll=nll,
        perplexity=math.exp(nll),
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        **costs.medians(group),
    )


def cells(row: TextRow) -> dict[str, str]:
    """Return the text of every column of `COLUMNS`."""
    ratio = "–" if row.ratio is None else f"{row.ratio:.3f}"
    if row.ratio_low is not None and row.ratio_high is not None:
        ratio += f" [{row.ratio_low:.3f}, {row.ratio_high:.3f}]"
    values = (
        f"{row.effective_bits:.2f}",
        f"{row.held_ratio:.2f}",
        f"{row.read_ratio:.2f}",
        f"{row.perplexity:.3f}" if row.perplexity < 100 else f"{row.perplexity:.1f}",
        ratio,
        *costs.cells(row).values(),
    )
    return dict(zip(COLUMNS, values, strict=True))


class OfText(costs.Costs, Protocol):
    """A row of a table of texts: what `tables` and `write_csv` need to know of it."""

    @property
    def run(self) -> str: ...
    @property
    def context(self) -> int: ...
    @property
    def task(self) -> str: ...
    @property
    def stack(self) -> str: ...
    @property
    def samples(self) -> int: ...


R = TypeVar("R", bound=OfText)


def shown(rows: Sequence[OfText], columns: Iterable[str] = COLUMNS) -> list[str]:
    """Return the columns that these rows have something for."""
    absent = set(costs.COLUMNS).difference(costs.present(rows))
    return [column for column in columns if column not in absent] if rows else []


def tables(rows: Sequence[R], columns: Iterable[str], cells: Callable[[R], dict[str, str]]) -> list[Table]:
    """Return two terminal tables of `columns` for every context and text, the second of prefill and peak."""
    main = [column for column in columns if column not in (costs.PREFILL, costs.PEAK)]
    made = []
    several = any(row.run for row in rows)
    for context, task in dict.fromkeys((row.context, row.task) for row in rows):
        chosen = [row for row in rows if (row.context, row.task) == (context, task)]
        title = f"{task}, {context} tokens, {chosen[0].samples} samples a stack"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        if several:
            table.add_column("run", overflow="fold")
        table.add_column("stack", min_width=18)
        for column in main:
            table.add_column(column, justify="right", no_wrap=True)
        for row in chosen:
            texts = cells(row)
            table.add_row(*([row.run] if several else []), row.stack, *(texts[column] for column in main))
        apart = [costs.Line(row.run, row.stack, row) for row in chosen]
        made += [table, costs.table(f"{task}, {context} tokens: further figures", apart)]
    return made


def write_csv(rows: Sequence[Any], file: Path) -> None:
    """Write the rows, dataclasses of one kind and at least one; without peaks there is no column of them."""
    absent = {"peak_mib"} if all(row.peak_mib is None for row in rows) else set()
    columns = [field.name for field in fields(rows[0]) if field.name not in absent]
    table = [columns, *([getattr(row, column) for column in columns] for row in rows)]
    write_text(file, csv_text(table, digits=6))
