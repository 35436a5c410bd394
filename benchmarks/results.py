"""What a run leaves behind: its configuration, a record per sample and stack, and their summary."""

from __future__ import annotations

import csv
import json
import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kvcomp.errors import KvcompError

MIB = 2**20
Z95 = 1.959964


class RunError(KvcompError):
    """A run that cannot start or continue as asked."""


@dataclass(frozen=True)
class Record:
    """One sample answered with one stack. Bytes: held at the end of the answer, read by its last step."""

    task: str
    context: int
    index: int
    stack: str
    hash: str
    score: float
    prediction: str
    references: list[str]
    depth: float | None
    tags: list[str]  # groups of its task that the sample belongs to
    origin: str  # the texts that the prompt was made of
    prompt_tokens: int
    new_tokens: int
    effective_bits: float
    held: int
    held_dense: int
    read: int
    read_dense: int
    ms_per_token: float  # median over the decode steps
    prefill_s: float  # the dense prefill that all stacks share

    @property
    def key(self) -> tuple[str, int, int, str]:
        return (self.task, self.context, self.index, self.hash)


class Results:
    """The folder of a run: `config.json`, and `samples.jsonl` that grows by a line per record.

    Opening a folder that holds the same configuration continues it; any other one is refused and left as it
    is. A new folder appears with its first record, so that a run that cannot start leaves nothing behind.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder = folder
        self.config = config
        self.records: list[Record] = []
        self._config_file = folder / "config.json"
        self._samples = folder / "samples.jsonl"
        if self._config_file.exists():
            self.config = _read_config(self._config_file)
            _require_same(self.config, config, folder)
            self.records = _read_records(self._samples)
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunError(f"out: {str(folder)!r} exists and holds no kvcomp run. Choose another --out.")

    def append(self, record: Record) -> None:
        """Write the record to disk before anything else can go wrong."""
        if not self._config_file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            scratch = self._config_file.with_suffix(".part")
            scratch.write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
            scratch.rename(self._config_file)
        with self._samples.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
        self.records.append(record)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"out: {str(file)!r} is not readable ({error}). Choose another --out.") from error
    if not isinstance(config, dict) or "settings" not in config:
        raise RunError(f"out: {str(file)!r} was not written by kvcomp bench. Choose another --out.")
    return config


def _require_same(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    differences = [
        f"{name}: {old.get(part, {}).get(name)!r} there, {new.get(part, {}).get(name)!r} now"
        for part in ("settings", "data", "versions", "machine")
        for name in dict.fromkeys([*old.get(part, {}), *new.get(part, {})])
        if old.get(part, {}).get(name) != new.get(part, {}).get(name)
    ]
    if differences:
        raise RunError(
            f"out: {str(folder)!r} holds a run with another configuration ({'; '.join(differences)}). "
            "Nothing was overwritten; choose another --out."
        )


def _read_records(file: Path) -> list[Record]:
    if not file.exists():
        return []
    lines = file.read_bytes().splitlines(keepends=True)
    names = {field.name for field in fields(Record)}
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            if set(values) != names or not line.endswith(b"\n"):
                raise ValueError("not a whole record")
        except (ValueError, TypeError) as error:
            if number < len(lines):
                raise RunError(f"out: line {number} of {str(file)!r} is damaged ({error}).") from error
            warnings.warn(f"{file}: the last line was cut short and is dropped; its sample runs again.", stacklevel=3)
            with file.open("r+b") as stream:
                stream.truncate(sum(map(len, lines[:-1])))
            break
        records.append(Record(**values))
    return records


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
    by_task: dict[str, float]  # and by "task tag" where samples have tags


def summarize(records: Sequence[Record]) -> list[Row]:
    """Return a row for every context and stack, in the order in which they first appear."""
    groups: dict[tuple[int, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.context, record.stack), []).append(record)
    rows = []
    for (context, stack), group in sorted(groups.items(), key=lambda item: item[0][0]):
        scores = [record.score for record in group]
        low, high = interval(scores)
        dense = {(r.task, r.index): r.score for r in groups.get((context, "none"), [])}
        paired = [r.score - dense[r.task, r.index] for r in group if (r.task, r.index) in dense]
        change = paired_interval(paired) if paired and stack != "none" else (None, None, None)
        by_task: dict[str, list[float]] = {}
        for record in group:
            for part in (record.task, *(f"{record.task} {tag}" for tag in record.tags)):
                by_task.setdefault(part, []).append(record.score)
        held, read = sum(r.held for r in group), sum(r.read for r in group)
        rows.append(
            Row(
                context=context,
                stack=stack,
                samples=len(group),
                effective_bits=statistics.fmean(r.effective_bits for r in group),
                held_mib=held / len(group) / MIB,
                held_ratio=sum(r.held_dense for r in group) / held,
                read_mib=read / len(group) / MIB,
                read_ratio=sum(r.read_dense for r in group) / read,
                accuracy=statistics.fmean(scores),
                accuracy_low=low,
                accuracy_high=high,
                change=change[0],
                change_low=change[1],
                change_high=change[2],
                ms_per_token=statistics.median(r.ms_per_token for r in group),
                by_task={part: statistics.fmean(scores) for part, scores in by_task.items()},
            )
        )
    return rows


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """Wilson's 95% score interval of a mean of scores in [0, 1]; it keeps a width when all scores agree."""
    n, mean = len(scores), statistics.fmean(scores)
    centre = (mean + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(mean * (1 - mean) / n + Z95**2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences in [-1, 1], and its 95% interval after Agresti and Min (2005).

    Their interval adds half an observation to each cell of the two-by-two table.
    """
    n = len(differences) + 2
    centre = sum(differences) / n
    half = Z95 * math.sqrt(max(0.0, (sum(d * d for d in differences) + 1) / n - centre**2) / n)
    return statistics.fmean(differences), max(-1.0, centre - half), min(1.0, centre + half)


def write_csv(rows: Sequence[Row], file: Path) -> None:
    """Write the rows, with a column of accuracy for every task."""
    tasks = list(dict.fromkeys(task for row in rows for task in row.by_task))
    columns = [field.name for field in fields(Row) if field.name != "by_task"]
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns + tasks)
        for row in rows:
            values = [getattr(row, column) for column in columns] + [row.by_task.get(task) for task in tasks]
            writer.writerow([f"{v:.4f}" if isinstance(v, float) else v for v in values])
