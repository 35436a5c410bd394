"""Distributions compared with the dense ones (`fidelity`): a row per run, context, text and stack, and of all texts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from kvcomp.benchmarks import costs, likelihood
from kvcomp.benchmarks.intervals import accuracy_interval, mean_interval
from kvcomp.benchmarks.results import FIDELITY, Record, Run
from kvcomp.ledger import MIB

ALL = "all texts"
QUARTER = 4  # the first and the last quarter of the scored tokens are near the prompt's end and far from it
COLUMNS = {
    "bits": "bits held per cached number, with scales, summaries, sinks, window and unused room all counted",
    "MiB held": "memory that the cache occupies at the end of a text",
    "held ×": "how many times less than the dense cache that is",
    "read ×": "how many times less than the dense cache one decode step loads",
    "KL": "Kullback-Leibler divergence in nats, of the distribution of the next token after the stack's cache to that "
    "after the uncompressed one; mean over tokens, with its 95% interval: a bootstrap over windows",
    "1 - TVD": "what both distributions have in common, sum min(p, q), in percent; mean and 95% interval as above",
    "top-1": "how often both have the same most likely token, in percent",
    "near": "1 - TVD of the first quarter of the scored tokens, which follow the prompt closely",
    "far": "1 - TVD of the last quarter, whose distance to the prompt is larger: errors that grow show here",
    **costs.COLUMNS,
}


@dataclass(frozen=True)
class FidelityRow:
    """One stack on the windows of one text, or of all: shares are fractions, KL is in nats, intervals cover 95%."""

    run: str
    context: int
    task: str
    stack: str
    samples: int
    tokens: int  # whose predictions were compared
    effective_bits: float
    held_mib: float
    held_ratio: float  # dense bytes / held bytes
    read_ratio: float  # dense bytes / bytes read, per decode step
    kl: float
    kl_low: float | None  # None where the windows show no spread
    kl_high: float | None
    overlap: float  # 1 - TVD
    overlap_low: float
    overlap_high: float
    top1: float
    near: float
    far: float
    ms_per_token: float
    prefill_s: float
    prefill_own_s: float | None
    peak_mib: float | None


def summarize(runs: Sequence[Run], names: Sequence[str] = ("",)) -> list[FidelityRow]:
    """Return the rows of all runs by context, all texts together first where there are several."""
    rows = []
    for name, run in zip(names, runs, strict=True):
        groups: dict[tuple[int, str, str], list[Record]] = {}
        records = [record for record in run.records if record.metric == FIDELITY]
        several = {record.context for record in records if len({r.task for r in records}) > 1}
        for record in records:
            if record.context in several:
                groups.setdefault((record.context, ALL, record.stack), []).append(record)
        for record in records:
            groups.setdefault((record.context, record.task, record.stack), []).append(record)
        rows += [_row(name, task, group) for (_, task, _), group in groups.items()]
    return sorted(rows, key=lambda row: (row.context, row.task != ALL, row.task))


def _row(run: str, task: str, group: Sequence[Record]) -> FidelityRow:
    kl, overlap, top1, near, far = (
        [statistics.fmean(part(record)) for record in group]
        for part in (
            lambda record: record.kl,
            lambda record: record.overlap,
            lambda record: record.top1,
            lambda record: record.overlap[: _quarter(record)],
            lambda record: record.overlap[-_quarter(record) :],
        )
    )
    between, n = mean_interval(kl), len(group)
    low, high = accuracy_interval(overlap)
    return FidelityRow(
        run=run,
        context=group[0].context,
        task=task,
        stack=group[0].stack,
        samples=n,
        tokens=sum(len(record.kl or ()) for record in group),
        effective_bits=statistics.fmean(record.effective_bits for record in group),
        held_mib=sum(record.held for record in group) / n / MIB,
        held_ratio=sum(record.held_dense for record in group) / sum(record.held for record in group),
        read_ratio=sum(record.read_dense for record in group) / sum(record.read for record in group),
        kl=statistics.fmean(kl),
        kl_low=between and between.low,
        kl_high=between and between.high,
        overlap=statistics.fmean(overlap),
        overlap_low=low,
        overlap_high=high,
        top1=statistics.fmean(top1),
        near=statistics.fmean(near),
        far=statistics.fmean(far),
        **costs.medians(group),
    )


def _quarter(record: Record) -> int:
    return max(len(record.overlap or ()) // QUARTER, 1)


def cells(row: FidelityRow) -> dict[str, str]:
    """Return the text of every column of `COLUMNS`."""
    kl = f"{row.kl:.4f}"
    if row.kl_low is not None and row.kl_high is not None:
        kl += f" [{row.kl_low:.4f}, {row.kl_high:.4f}]"
    values = (
        f"{row.effective_bits:.2f}",
        f"{row.held_mib:.2f}",
        f"{row.held_ratio:.2f}",
        f"{row.read_ratio:.2f}",
        kl,
        f"{100 * row.overlap:.2f} [{100 * row.overlap_low:.1f}, {100 * row.overlap_high:.1f}]",
        f"{100 * row.top1:.1f}",
        f"{100 * row.near:.1f}",
        f"{100 * row.far:.1f}",
        *costs.cells(row).values(),
    )
    return dict(zip(COLUMNS, values, strict=True))


def shown(rows: Sequence[FidelityRow]) -> list[str]:
    """Return the columns that these rows have something for."""
    return likelihood.shown(rows, COLUMNS)


def tables(rows: Sequence[FidelityRow]) -> list[Table]:
    """Return two terminal tables for every context and text, the second of prefill and peak.

    The interval of KL and three columns are left to the page and the CSV.
    """
    columns = [column for column in COLUMNS if column not in ("MiB held", "near", "far")]
    return likelihood.tables(rows, columns, lambda row: cells(row) | {"KL": f"{row.kl:.4f}"})


def pooled(rows: Sequence[FidelityRow]) -> list[FidelityRow]:
    """Return a row per run, context and stack: that of all texts, or of the only one."""
    found = {(row.run, row.context, row.stack): row for row in reversed(rows)}
    return [row for row in rows if found[row.run, row.context, row.stack] is row]


def write_csv(rows: Sequence[FidelityRow], file: Path) -> None:
    """Write the rows; without peaks there is no column of them."""
    likelihood.write_csv(rows, file)
