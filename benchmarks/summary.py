"""The records of a run in numbers: a row per context and stack."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from kvcomp.benchmarks import costs
from kvcomp.benchmarks.intervals import accuracy_interval, paired_interval
from kvcomp.benchmarks.results import Record, write_text
from kvcomp.benchmarks.tabular import csv_text
from kvcomp.benchmarks.tasks import GROUPS
from kvcomp.ledger import MIB

DEPTHS = 10  # bins of equal width that needle depths are counted in
DENSE = "none"


class Share(NamedTuple):
    """A mean score, and of how many samples."""

    accuracy: float
    samples: int


@dataclass(frozen=True)
class Row:
    """One stack at one context, over all tasks. Accuracies are fractions; intervals cover 95%."""

    context: int
    stack: str
    samples: int
    effective_bits: float
    held_mib: float
    held_ratio: float  # dense bytes / held bytes
    read_mib: float
    read_ratio: float  # dense bytes / bytes read, per decode step
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    change: float | None  # accuracy minus that of `none` on the same samples; None where `none` did not run
    change_low: float | None
    change_high: float | None
    ms_per_token: float
    prefill_s: float  # the dense one that stacks share; 0 for one that entered alone
    prefill_own_s: float | None  # what this stack added, or all of its own; None where samples do not tell
    peak_mib: float | None  # of the cache and its decode steps; None where it could not be measured
    prompt_tokens: float
    by_group: dict[str, Share]  # means over the tasks of a group, and of its tags, each task counting the same
    by_task: dict[str, Share]  # and by "task tag" where samples have tags
    by_depth: dict[int, Share]  # by bin of depth, 0 at the start; empty where no sample has a depth


def summarize(records: Sequence[Record], dense: Sequence[Record] | None = None) -> list[Row]:
    """Return a row for every context and stack, by context and then as they first appear.

    dense: records of `none` on the same prompts, where they are not among `records`.
    """
    baseline = {
        (r.context, r.task, r.index): r.score for r in (records if dense is None else dense) if r.stack == DENSE
    }
    groups: dict[tuple[int, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.context, record.stack), []).append(record)
    return [_row(group, baseline) for _, group in sorted(groups.items(), key=lambda item: item[0][0])]


def _row(group: Sequence[Record], baseline: Mapping[tuple[int, str, int], float]) -> Row:
    context, stack, n = group[0].context, group[0].stack, len(group)
    scores = [record.score for record in group]
    low, high = accuracy_interval(scores)
    keys = [(r.context, r.task, r.index) for r in group]
    paired = [r.score - baseline[key] for r, key in zip(group, keys, strict=True) if key in baseline]
    change: tuple[float | None, ...] = (None, None, None)
    if paired and stack != DENSE:
        change = (statistics.fmean(paired), *paired_interval(paired))
    by_task: dict[str, list[float]] = {}
    by_depth: dict[int, list[float]] = {}
    for record in group:
        for part in (record.task, *(f"{record.task} {tag}" for tag in record.tags)):
            by_task.setdefault(part, []).append(record.score)
        if record.depth is not None:
            by_depth.setdefault(min(int(record.depth * DEPTHS), DEPTHS - 1), []).append(record.score)
    held, read = sum(r.held for r in group), sum(r.read for r in group)
    return Row(
        context=context,
        stack=stack,
        samples=n,
        effective_bits=statistics.fmean(r.effective_bits for r in group),
        held_mib=held / n / MIB,
        held_ratio=sum(r.held_dense for r in group) / held,
        read_mib=read / n / MIB,
        read_ratio=sum(r.read_dense for r in group) / read,
        accuracy=statistics.fmean(scores),
        accuracy_low=low,
        accuracy_high=high,
        change=change[0],
        change_low=change[1],
        change_high=change[2],
        **costs.medians(group),
        prompt_tokens=statistics.median(r.prompt_tokens for r in group),
        by_group=_means(_shares(by_task)),
        by_task=_shares(by_task),
        by_depth=_shares(by_depth),
    )


def _shares(groups: Mapping[Any, Sequence[float]]) -> dict[Any, Share]:
    return {name: Share(statistics.fmean(scores), len(scores)) for name, scores in groups.items()}


def _means(by_task: Mapping[str, Share]) -> dict[str, Share]:
    """Return the mean accuracy over the tasks of each group, by a name that tells how many there are; 2 at least."""
    made = {}
    for group, tasks in GROUPS.items():
        tags: dict[str, list[Share]] = {}
        for part, share in by_task.items():
            task, _, tag = part.partition(" ")
            if task in tasks:
                tags.setdefault(tag, []).append(share)
        for tag, shares in tags.items():
            if len(shares) > 1:
                name = f"mean of {len(shares)} {group} tasks" + (f", {tag}" if tag else "")
                made[name] = Share(statistics.fmean(s.accuracy for s in shares), sum(s.samples for s in shares))
    return made


def write_csv(rows: Sequence[Row], file: Path, more: Sequence[Mapping[str, Any]] | None = None) -> None:
    """Write the rows, with a column of accuracy for every group and task. more: further columns, a mapping per row.

    Without peaks there is no column of them.
    """
    further = [dict(values) for values in more] if more else [{} for _ in rows]
    parts = list(dict.fromkeys(part for row in rows for part in (*row.by_group, *row.by_task)))
    left_out = {"by_group", "by_task", "by_depth"}
    if all(row.peak_mib is None for row in rows):
        left_out.add("peak_mib")
    columns = [field.name for field in fields(Row) if field.name not in left_out]
    table: list[list[object]] = [[*(further[0] if further else ()), *columns, *parts]]
    for row, extra in zip(rows, further, strict=True):
        shares = (row.by_group.get(part) or row.by_task.get(part) for part in parts)
        values = [*extra.values(), *(getattr(row, column) for column in columns)]
        table.append([*values, *(share and share.accuracy for share in shares)])
    write_text(file, csv_text(table))
