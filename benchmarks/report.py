"""Runs as terminal tables and as one self-contained HTML page."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from kvcomp.benchmarks import costs, divergence, likelihood
from kvcomp.benchmarks.charts import PALETTE, Point, lines, scatter
from kvcomp.benchmarks.compare import Comparison, Difference, Line, compare
from kvcomp.benchmarks.results import Run, RunError, write_text
from kvcomp.benchmarks.summary import DEPTHS, Share, write_csv

COLUMNS = {
    "bits": "bits held per cached number, with scales, summaries, sinks, window and unused room all counted",
    "MiB held": "memory that the cache occupies at the end of an answer",
    "held ×": "how many times less than the dense cache that is",
    "MiB read": "cache bytes that one decode step loads, the scan of the summaries included",
    "read ×": "how many times less than the dense cache that is",
    "accuracy": "mean score over all samples, with its 95% interval (Wilson's; a bootstrap where scores are fractions)",
    "vs none": "accuracy minus that of the uncompressed cache on the same samples, with its 95% interval: a bootstrap "
    "of the paired differences, or a bound after Wilson where all pairs differ equally",
    **costs.COLUMNS,
}
ON_ANY = "#808080"  # ink of a picture that stands on a page of unknown colour
FIDELITY = ("kl", "overlap", "overlap_low", "overlap_high", "top1")  # columns of summary.csv, of `FidelityRow`
FIRST = "vs first run"
FIRST_MEANING = (
    "accuracy minus that of the same stack in the first run, with its 95% interval: paired as above over the common "
    "samples (“of 5”: 5 of them), or unpaired (Newcombe's) where there are none"
)


@dataclass(frozen=True)
class _Series:
    """A stack of a run, with the number that it has all over the page."""

    number: int
    run: str
    stack: str

    @property
    def colour(self) -> int:
        return (self.number - 1) % len(PALETTE)


def publish(runs: Sequence[Run], out: Path) -> Comparison:
    """Write `summary.csv` and `report.html` of one run, or of several side by side; return what they say.

    The Pareto pictures of the page are files too, `held_<context>.svg` and `read_<context>.svg`. Texts that were scored
    by their likelihood are a part of the page, and `perplexity.csv`.

    Raises RunError where `out` cannot be written.
    """
    require_libraries()
    comparison = compare(runs)
    more = _further(comparison, len(runs) > 1)
    if comparison.lines:
        write_csv([line.row for line in comparison.lines], out / "summary.csv", more)
    if comparison.texts:
        likelihood.write_csv(comparison.texts, out / "perplexity.csv")
    if comparison.fidelity:
        divergence.write_csv(comparison.fidelity, out / "fidelity.csv")
    write_text(out / "report.html", _page(runs, comparison))
    series = _series(comparison)
    for context, picture in _fidelity(comparison, series).items():
        write_text(out / f"fidelity_{context}.svg", picture.replace("currentColor", ON_ANY))
    for context in dict.fromkeys(line.row.context for line in comparison.lines):
        for name, picture in _pareto(
            [line for line in comparison.lines if line.row.context == context], series
        ).items():
            write_text(out / f"{name}_{context}.svg", picture.replace("currentColor", ON_ANY))
    return comparison


def _further(comparison: Comparison, several: bool) -> list[dict[str, object]]:
    """Columns of `summary.csv` beside those of its rows: of the first run, and of fidelity where there is any."""
    fidelity = {(row.run, row.context, row.stack): row for row in divergence.pooled(comparison.fidelity)}
    made: list[dict[str, object]] = []
    for line in comparison.lines:
        made.append({"run": line.run, **_first(line.first)} if several else {})
        if fidelity:
            row = fidelity.get((line.run, line.row.context, line.row.stack))
            made[-1] |= {name: row and getattr(row, name) for name in FIDELITY}
    return made


def _first(difference: Difference | None) -> dict[str, object]:
    names = ("first_change", "first_low", "first_high", "first_paired", "first_samples")
    return dict(zip(names, difference or [None] * len(names), strict=True))


def cells(line: Line) -> dict[str, str]:
    """Return the text of every column of `COLUMNS`, and of `FIRST` where there is more than one run."""
    row, change = line.row, "–"
    if row.change is not None and row.change_low is not None and row.change_high is not None:
        change = _change(row.change, row.change_low, row.change_high)
    values = (
        f"{row.effective_bits:.2f}",
        f"{row.held_mib:.2f}",
        f"{row.held_ratio:.2f}",
        f"{row.read_mib:.2f}",
        f"{row.read_ratio:.2f}",
        f"{100 * row.accuracy:.0f}% [{100 * row.accuracy_low:.0f}, {100 * row.accuracy_high:.0f}]",
        change,
        *costs.cells(row).values(),
    )
    texts = dict(zip(COLUMNS, values, strict=True))
    if line.run:
        first = line.first
        texts[FIRST] = "–"
        if first:
            of = "" if first.samples == row.samples else f" of {first.samples}"
            unpaired = "" if first.paired else " unpaired"
            texts[FIRST] = _change(first.mean, first.low, first.high) + of + unpaired
    return texts


def _shown(report: Sequence[Line]) -> list[str]:
    """Return the columns that these lines have something for."""
    absent = set(costs.COLUMNS).difference(costs.present([line.row for line in report]))
    return [column for column in cells(report[0]) if column not in absent] if report else []


def _change(mean: float, low: float, high: float) -> str:
    mean, low, high = (round(100 * value) for value in (mean, low, high))  # no "-0"
    return f"{mean:+d} [{low:+d}, {high:+d}]"


def require_libraries() -> None:
    """Raise RunError where the packages that make the page are missing."""
    if any(importlib.util.find_spec(package) is None for package in ("jinja2", "matplotlib", "scipy")):
        raise RunError('the report needs jinja2, matplotlib and scipy: pip install "kvcomp[demo]"')


def _page(runs: Sequence[Run], comparison: Comparison) -> str:
    """Return the page, with nothing in it that is loaded from elsewhere."""
    import jinja2

    report = comparison.lines
    series = _series(comparison)
    contexts = list(dict.fromkeys(line.row.context for line in report))
    meanings = {**COLUMNS, FIRST: FIRST_MEANING}
    columns = _shown(report)
    text_columns, fidelity_columns = likelihood.shown(comparison.texts), divergence.shown(comparison.fidelity)
    source = (files("kvcomp.benchmarks") / "templates" / "report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(
        sections=[_section(context, report, series, columns) for context in contexts],
        lengths=_lengths(contexts, report, series) if len(contexts) > 1 else None,
        depths=_depths(contexts, report, series),
        columns={column: meanings[column] for column in columns},
        texts=[(row, _choose(likelihood.cells(row), text_columns)) for row in comparison.texts],
        text_columns={column: likelihood.COLUMNS[column] for column in text_columns},
        fidelity=[
            (series[row.run, row.stack], row, _choose(divergence.cells(row), fidelity_columns))
            for row in comparison.fidelity
        ],
        fidelity_charts=_fidelity(comparison, series),
        fidelity_columns={column: divergence.COLUMNS[column] for column in fidelity_columns},
        first=FIRST,
        models=list(dict.fromkeys(run.config["settings"].get("model", "?") for run in runs)),
        runs=list(zip(comparison.names, (run.config for run in runs), strict=True)),
        comparison=comparison,
        palette=PALETTE,
    )


def _series(comparison: Comparison) -> dict[tuple[str, str], _Series]:
    keys = dict.fromkeys([line.series for line in comparison.lines] + [(r.run, r.stack) for r in comparison.fidelity])
    return {key: _Series(number, *key) for number, key in enumerate(keys, start=1)}


def _fidelity(comparison: Comparison, series: Mapping[tuple[str, str], _Series]) -> dict[int, str]:
    """1 - TVD over bytes held, as SVG, by context."""
    points: dict[int, list[Point]] = {}
    for row in divergence.pooled(comparison.fidelity):
        number = series[row.run, row.stack].number
        place = Point(number, row.held_mib, row.overlap, row.overlap_low, row.overlap_high)
        points.setdefault(row.context, []).append(place)
    return {context: scatter(found, "MiB held", "1 - TVD, %", whole=False) for context, found in points.items()}


def _choose(texts: Mapping[str, str], columns: Sequence[str]) -> dict[str, str]:
    return {column: texts[column] for column in columns}


def _section(
    context: int, report: Sequence[Line], series: Mapping[tuple[str, str], _Series], columns: Sequence[str]
) -> dict[str, Any]:
    """What the page says about one context: its table, its Pareto pictures, and its tasks below their means."""
    chosen = [line for line in report if line.row.context == context]
    groups = dict.fromkeys(group for line in chosen for group in line.row.by_group)
    tasks = dict.fromkeys(task for line in chosen for task in line.row.by_task)
    return {
        "context": context,
        "samples": sorted({line.row.samples for line in chosen}),
        "prompt_tokens": sorted({round(line.row.prompt_tokens) for line in chosen}),
        "rows": [(series[line.series], _choose(cells(line), columns)) for line in chosen],
        **_pareto(chosen, series),
        "series": [series[line.series] for line in chosen],
        "groups": {group: [line.row.by_group.get(group) for line in chosen] for group in groups},
        "tasks": {task: [line.row.by_task.get(task) for line in chosen] for task in tasks},
    }


def _pareto(chosen: Sequence[Line], series: Mapping[tuple[str, str], _Series]) -> dict[str, str]:
    """Accuracy over bytes held and over bytes read, as SVG."""
    return {
        "held": scatter([_point(line, series, line.row.held_mib) for line in chosen], "MiB held"),
        "read": scatter([_point(line, series, line.row.read_mib) for line in chosen], "MiB read per decode step"),
    }


def _point(line: Line, series: Mapping[tuple[str, str], _Series], x: float) -> Point:
    row = line.row
    return Point(series[line.series].number, x, row.accuracy, row.accuracy_low, row.accuracy_high)


def _lengths(
    contexts: Sequence[int], report: Sequence[Line], series: Mapping[tuple[str, str], _Series]
) -> dict[str, Any]:
    texts: dict[tuple[str, str], dict[int, str]] = {key: {} for key in series}
    for line in report:
        texts[line.series][line.row.context] = cells(line)["accuracy"]
    points = [_point(line, series, line.row.context) for line in report]
    return {
        "chart": lines(points, "tokens of context"),
        "rows": [
            (series[key], [(context, found.get(context, "–")) for context in contexts]) for key, found in texts.items()
        ],
    }


def _depths(
    contexts: Sequence[int], report: Sequence[Line], series: Mapping[tuple[str, str], _Series]
) -> list[dict[str, Any]]:
    """Return a map per series, of depth over length, and none where no sample has a depth."""
    made: dict[tuple[str, str], dict[int, dict[int, Share]]] = {}
    for line in report:
        if line.row.by_depth:
            made.setdefault(line.series, {})[line.row.context] = line.row.by_depth
    width = 100 // DEPTHS
    return [
        {
            "series": series[key],
            "contexts": [context for context in contexts if context in found],
            "rows": [
                (f"{width * place}–{width * (place + 1)}", [found[c].get(place) for c in contexts if c in found])
                for place in range(DEPTHS)
            ],
        }
        for key, found in made.items()
    ]
