"""What a stack costs in time and memory: medians over samples, and how reports show them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from rich import box
from rich.table import Table

from kvcomp.benchmarks.results import Record
from kvcomp.ledger import MIB

TIME, PREFILL, PEAK = "ms/token", "prefill s", "peak MiB"
COLUMNS = {
    TIME: "median time of a decode step, whole model included, in this implementation on this machine",
    PREFILL: "median time of the prefill: the uncompressed one that the stacks of a prompt share + what this stack "
    "added to score, evict and encode; “alone”: all of its own, of a stack that takes the prompt in chunks",
    PEAK: "the most that the cache and its decode steps needed at once, in the median: what the cache held when "
    "decoding began + what memory grew by until the answer ended. Weights, other stacks' caches and the prefill are "
    "not in it. On a CPU it is resident memory of the process, to some MiB",
}


class Costs(Protocol):
    """A row with these fields; None where no sample knows."""

    @property
    def ms_per_token(self) -> float: ...
    @property
    def prefill_s(self) -> float: ...
    @property
    def prefill_own_s(self) -> float | None: ...
    @property
    def peak_mib(self) -> float | None: ...


def medians(group: Sequence[Record]) -> dict[str, Any]:
    """Return the fields of `Costs` of the samples of a stack."""
    own = [record.prefill_own_s for record in group if record.prefill_own_s is not None]
    peaks = [record.peak for record in group if record.peak is not None]
    return {
        "ms_per_token": statistics.median(record.ms_per_token for record in group),
        "prefill_s": statistics.median(record.prefill_s for record in group),
        "prefill_own_s": statistics.median(own) if own else None,
        "peak_mib": statistics.median(peaks) / MIB if peaks else None,
    }


def cells(row: Costs) -> dict[str, str]:
    """Return the text of every column of `COLUMNS`."""
    if row.prefill_own_s is None:
        prefill = _seconds(row.prefill_s)
    elif row.prefill_s:
        prefill = f"{_seconds(row.prefill_s)} + {_seconds(row.prefill_own_s)}"
    else:
        prefill = f"{_seconds(row.prefill_own_s)} alone"
    time = f"{row.ms_per_token:.0f}" if row.ms_per_token >= 10 else f"{row.ms_per_token:.1f}"
    return {TIME: time, PREFILL: prefill, PEAK: "–" if row.peak_mib is None else f"{row.peak_mib:.1f}"}


def present(rows: Sequence[Costs]) -> list[str]:
    """Return the columns that any of the rows has something for."""
    return [column for column in COLUMNS if column != PEAK or any(row.peak_mib is not None for row in rows)]


class Line(NamedTuple):
    """A row of a terminal table. further: texts by column, beside those of the costs."""

    run: str
    stack: str
    costs: Costs
    further: Mapping[str, str] = MappingProxyType({})


def table(title: str, rows: Sequence[Line]) -> Table:
    """Return a terminal table of prefill and peak, and what else the rows have."""
    several = any(row.run for row in rows)
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    if several:
        made.add_column("run", overflow="fold")
    made.add_column("stack", min_width=18)
    columns = [column for column in present([row.costs for row in rows]) if column != TIME]
    further = list(dict.fromkeys(name for row in rows for name in row.further))
    for column in (*columns, *further):
        made.add_column(column, justify="right", no_wrap=column in columns)
    for row in rows:
        texts = cells(row.costs)
        values = [*(texts[column] for column in columns), *(row.further.get(name, "–") for name in further)]
        made.add_row(*([row.run] if several else []), row.stack, *values)
    return made


def _seconds(value: float) -> str:
    digits = 1 if value >= 10 else 2 if value >= 0.1 else 3
    return f"{value:.{digits}f}"
