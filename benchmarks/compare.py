"""Several runs side by side: a line per run, stack and context, and what each differs in from the first run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from kvcomp.benchmarks import divergence, likelihood
from kvcomp.benchmarks.intervals import paired_interval, unpaired_interval
from kvcomp.benchmarks.merging import in_order
from kvcomp.benchmarks.records import fingerprint_of, remarks
from kvcomp.benchmarks.results import ACCURACY, Record, Run, RunError, differences
from kvcomp.benchmarks.summary import DENSE, Row, summarize
from kvcomp.text import visible


class Difference(NamedTuple):
    """Accuracy minus that of the same stack in the first run, with its 95% interval. samples: of this run."""

    mean: float
    low: float
    high: float
    paired: bool
    samples: int


@dataclass(frozen=True)
class Line:
    """A row of a report. run: the name of its run, empty where there is but one."""

    row: Row
    run: str = ""
    first: Difference | None = None  # to the first run; None in it, and where that has nothing comparable

    @property
    def series(self) -> tuple[str, str]:
        """What keeps its number and colour from context to context."""
        return self.run, self.row.stack


@dataclass(frozen=True)
class Comparison:
    """Lines by context, the settings that the runs differ in with a value per run, and what to know about pairing."""

    names: tuple[str, ...]
    lines: list[Line]
    differing: dict[str, list[str]]
    notes: list[str]
    texts: list[likelihood.TextRow]  # what has no accuracy: texts scored by their likelihood
    fidelity: list[divergence.FidelityRow]  # and by how much their distributions differ from the dense ones


def compare(runs: Sequence[Run]) -> Comparison:
    """Set the runs side by side, in the order given; one alone gives its rows and nothing else.

    Samples of two runs are the same where task, context, index, right answers, depth, texts, prompt length, seed and
    chat template are; differences are paired over those. Where a stack has none of them in the first run, they are
    unpaired, over the tasks of that context that both have. A run without the dense stack is measured against that
    of the first run that has it for the same model and samples. Only accuracies are compared.
    """
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise RunError("run: the same folder is given twice.")
    runs = [replace(run, records=in_order(run)) for run in runs]
    names = run_names(runs)
    several = names if len(runs) > 1 else ("",)
    texts, fidelity = likelihood.summarize(runs, several), divergence.summarize(runs, several)
    runs = [replace(run, records=[r for r in run.records if r.metric == ACCURACY]) for run in runs]
    lines = []
    for name, run in zip(names, runs, strict=True):
        for row in summarize(run.records, _dense(run, runs)):
            first = None if run is runs[0] else _difference(run, runs[0], row)
            lines.append(Line(row, name, first))
    if len(runs) == 1:
        lines = [replace(line, run="") for line in lines]
    notes = [
        _note(name, run, names[0], runs[0])
        for name, run in zip(names[1:], runs[1:], strict=True)
        if run.records and runs[0].records
    ]
    notes += [
        line if len(runs) == 1 else f"{n}: {line}"
        for n, run in zip(names, runs, strict=True)
        for line in remarks(run.config)
    ]
    return Comparison(names, sorted(lines, key=lambda line: line.row.context), _differing(runs), notes, texts, fidelity)


def run_names(runs: Sequence[Run]) -> tuple[str, ...]:
    """Name the runs by their folders, with a number where two have the same."""
    names = [visible(run.folder.resolve().name) for run in runs]
    return tuple(n if names.count(n) == 1 else f"{n} ({i})" for i, n in enumerate(names, start=1))


def _prompt(run: Run, record: Record) -> tuple[object, ...]:
    """What is equal for equal prompts; records do not keep the prompt itself."""
    settings = run.config["settings"]
    return (
        record.task,
        record.context,
        record.index,
        tuple(record.references),
        record.depth,
        record.origin,
        record.prompt_tokens,
        settings.get("seed"),
        settings.get("chat"),
    )


def _prompts(run: Run) -> set[tuple[object, ...]]:
    return {_prompt(run, record) for record in run.records}


def _dense(run: Run, runs: Sequence[Run]) -> list[Record] | None:
    """Return the dense records of another run that replace those that `run` lacks."""
    if any(record.stack == DENSE for record in run.records):
        return None
    prompts = _prompts(run)
    for other in runs:
        if _same_model(run, other):
            found = [r for r in other.records if r.stack == DENSE and _prompt(other, r) in prompts]
            if found:
                return found
    return None


def _same_model(run: Run, other: Run) -> bool:
    """Whether two runs name the same model, and note the same weights where both note any."""
    here, there = fingerprint_of(run.config), fingerprint_of(other.config)
    named = run.config["settings"].get("model") == other.config["settings"].get("model")
    return named and (here is None or there is None or here.same(there))


def _difference(run: Run, first: Run, row: Row) -> Difference | None:
    mine = [r for r in run.records if (r.context, r.stack) == (row.context, row.stack)]
    other = [r for r in first.records if (r.context, r.stack) == (row.context, row.stack)]
    there = {_prompt(first, r): r.score for r in other}
    pairs = [r.score - there[key] for r in mine if (key := _prompt(run, r)) in there]
    if pairs:
        return Difference(statistics.fmean(pairs), *paired_interval(pairs), paired=True, samples=len(pairs))
    tasks = {r.task for r in mine} & {r.task for r in other}
    scores, others = ([r.score for r in group if r.task in tasks] for group in (mine, other))
    if not scores:
        return None
    mean = statistics.fmean(scores) - statistics.fmean(others)
    return Difference(mean, *unpaired_interval(scores, others), paired=False, samples=len(scores))


def _note(name: str, run: Run, first_name: str, first: Run) -> str:
    mine, theirs = _prompts(run), _prompts(first)
    common = len(mine & theirs)
    if not common:
        return (
            f"{name} and {first_name} have no samples in common: differences between them are unpaired, over the "
            "tasks that both have, and their intervals wider."
        )
    return (
        f"{name} has {common} of its {len(mine)} prompts in common with {first_name}; differences between them are "
        "paired over the answers that both have."
    )


def _differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    names = dict.fromkeys(name for run in runs[1:] for name in differences(runs[0].config, run.config))
    flat = [
        {
            name: value
            for part in ("settings", "data", "versions", "machine")
            for name, value in run.config.get(part, {}).items()
        }
        for run in runs
    ]
    found = {name: [_text(values.get(name)) for values in flat] for name in names}
    weights = [(run.config.get("model") or {}).get("weights") for run in runs]
    if len({digest for digest in weights if digest}) > 1:
        found["weights"] = [digest[:12] if digest else "–" for digest in weights]
    return found


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "–" if value is None else json.dumps(value)
