"""The rows of a run as a terminal table and as one self-contained HTML page."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from kvcomp.benchmarks.results import Row, RunError

COLUMNS = {
    "bits": "bits held per cached number, with scales, summaries, sinks, window and unused room all counted",
    "MiB held": "memory that the cache occupies at the end of an answer",
    "held ×": "how many times less than the dense cache that is",
    "MiB read": "cache bytes that one decode step loads, the scan of the summaries included",
    "read ×": "how many times less than the dense cache that is",
    "accuracy": "share of right answers, with its 95% interval (Wilson)",
    "vs none": "accuracy minus that of the uncompressed cache on the same samples, with its 95% interval",
    "ms/token": "median time of a decode step, whole model included, in this implementation on this machine",
}
# One colour a stack, dark enough for white numbers on it and light enough for a dark page.
PALETTE = ["#1f77b4", "#b85c00", "#227a22", "#d62728", "#7d55a8", "#8c564b", "#b34d95", "#666666", "#0e7c88"]
INK = "#0a0b0c"  # replaced by the page's own text colour, so that a chart follows light and dark


def cells(row: Row) -> dict[str, str]:
    """Return the text of every column of `COLUMNS`."""
    change = "–"
    if row.change is not None and row.change_low is not None and row.change_high is not None:
        change = f"{100 * row.change:+.0f} [{100 * row.change_low:+.0f}, {100 * row.change_high:+.0f}]"
    values = (
        f"{row.effective_bits:.2f}",
        f"{row.held_mib:.2f}",
        f"{row.held_ratio:.2f}",
        f"{row.read_mib:.2f}",
        f"{row.read_ratio:.2f}",
        f"{100 * row.accuracy:.0f}% [{100 * row.accuracy_low:.0f}, {100 * row.accuracy_high:.0f}]",
        change,
        f"{row.ms_per_token:.0f}" if row.ms_per_token >= 10 else f"{row.ms_per_token:.1f}",
    )
    return dict(zip(COLUMNS, values, strict=True))


def tables(rows: Sequence[Row]) -> list[Table]:
    """Return a terminal table for every context; the intervals are left to the page and the CSV."""
    made = []
    for context in dict.fromkeys(row.context for row in rows):
        chosen = [row for row in rows if row.context == context]
        title = f"{context} tokens, {chosen[0].samples} samples a stack"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("stack", min_width=18)
        for column in COLUMNS:
            table.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
        for row in chosen:
            table.add_row(row.stack, *(text.split(" [")[0] for text in cells(row).values()))
        made.append(table)
    return made


def require_libraries() -> None:
    """Raise RunError where the packages that draw the page are missing."""
    if any(importlib.util.find_spec(package) is None for package in ("jinja2", "matplotlib")):
        raise RunError('the report needs jinja2 and matplotlib: pip install "kvcomp[demo]"')


def write_report(rows: Sequence[Row], config: dict[str, Any], file: Path) -> None:
    """Write the page, with nothing in it that is loaded from elsewhere."""
    import jinja2

    sections = []
    for context in dict.fromkeys(row.context for row in rows):
        chosen = [row for row in rows if row.context == context]
        sections.append(
            {
                "context": context,
                "rows": [(row, cells(row)) for row in chosen],
                "tasks": list(dict.fromkeys(task for row in chosen for task in row.by_task)),
                "held": _chart(chosen, "held_mib", "MiB held"),
                "read": _chart(chosen, "read_mib", "MiB read per decode step"),
            }
        )
    source = (files("kvcomp.benchmarks") / "templates" / "report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(source).render(sections=sections, columns=COLUMNS, config=config, palette=PALETTE)
    file.write_text(page, encoding="utf-8")


def _chart(rows: Sequence[Row], field: str, label: str) -> str:
    """Draw accuracy over `field` as an SVG: a point a row, numbered as in the table, with its interval."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": field,
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5, 3.4), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log", base=2)
        sizes = [getattr(row, field) for row in rows]
        for number, (size, row) in enumerate(zip(sizes, rows, strict=True)):
            colour, accuracy = PALETTE[number % len(PALETTE)], 100 * row.accuracy
            axes.plot([size] * 2, [100 * row.accuracy_low, 100 * row.accuracy_high], color=colour, alpha=0.5, lw=2)
            axes.plot([size], [accuracy], "o", color=colour, ms=9)
        written: list[tuple[float, float]] = []
        for number, (size, row) in enumerate(zip(sizes, rows, strict=True), start=1):
            place = (size, 100 * row.accuracy)
            close = sum(1 / 1.2 < size / x < 1.2 and abs(place[1] - y) < 12 for x, y in written)
            axes.annotate(str(number), place, (6, 3 + 11 * close), textcoords="offset points")
            written.append(place)
        axes.set_xlim(min(sizes) / 1.5, max(sizes) * 1.5)
        ticks = [2.0**power for power in range(-20, 30) if min(sizes) / 1.5 <= 2.0**power <= max(sizes) * 1.5]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(-4, 118)
        axes.set_yticks(range(0, 101, 20))
        axes.set_xlabel(label)
        axes.set_ylabel("accuracy, %")
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = drawn.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")
