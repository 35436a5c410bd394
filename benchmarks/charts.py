"""Pictures of a report as SVG text, in the text colour of the page around them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

# One colour a series, dark enough for white numbers on it and light enough for a dark page.
PALETTE = ["#1f77b4", "#b85c00", "#227a22", "#d62728", "#7d55a8", "#8c564b", "#b34d95", "#666666", "#0e7c88"]
ACCURACY = "accuracy, %"
INK = "#0a0b0c"  # replaced by the page's own text colour, so that a chart follows light and dark


class Point(NamedTuple):
    """Where series `number` (from 1) lies: x, and accuracy with its interval, as fractions."""

    number: int
    x: float
    accuracy: float
    low: float
    high: float


def scatter(points: Sequence[Point], label: str, what: str = ACCURACY, whole: bool = True) -> str:
    """Draw accuracy (or `what` else, in percent) over x, logarithmic: a numbered point each, with its interval.

    whole: the axis goes from 0 to 100; otherwise from what the lowest point needs, so that small losses show.
    """
    low = None if whole else 100 * min(min(point.accuracy for point in points), 0.99)
    with _drawing(label, [point.x for point in points], label, what=what, low=low) as (axes, drawn):
        for point in points:
            _interval(axes, point, point.x)
            axes.plot([point.x], [100 * point.accuracy], "o", color=_colour(point), ms=9)
        _number(axes, points, within=None if low is None else 104 - low)
    return _svg(drawn)


def lines(points: Sequence[Point], label: str, what: str = ACCURACY, scale: float | None = 100) -> str:
    """Draw accuracy (or `what` else) over x, logarithmic: a line per series, its points and intervals side by side at
    each x. scale: of the axis, 100 for percent; None: plain numbers from 0."""
    numbers, xs_of_all = list(dict.fromkeys(point.number for point in points)), [point.x for point in points]
    with _drawing(label, xs_of_all, label, True, what, scale is not None) as (axes, drawn):
        for place, number in enumerate(numbers):
            shift = 1.02 ** (place - (len(numbers) - 1) / 2)
            mine = [point._replace(x=point.x * shift) for point in points if point.number == number]
            for point in mine:
                _interval(axes, point, point.x, scale or 1)
            xs, ys = [point.x for point in mine], [(scale or 1) * point.accuracy for point in mine]
            axes.plot(xs, ys, "o-", color=_colour(mine[0]), ms=6, lw=1.5)
        last = max(point.x for point in points)
        _number(axes, [point for point in points if point.x == last], scale or 1)
    return _svg(drawn)


def _colour(point: Point) -> str:
    return PALETTE[(point.number - 1) % len(PALETTE)]


def _interval(axes: Any, point: Point, x: float, scale: float = 100) -> None:
    axes.plot([x] * 2, [scale * point.low, scale * point.high], color=_colour(point), alpha=0.5, lw=2)


def _number(axes: Any, points: Sequence[Point], scale: float = 100, within: float | None = None) -> None:
    """Write each point's number beside it, higher where another one is in the way. within: the height of the axis."""
    written: list[tuple[float, float]] = []
    for point in points:
        x, y = point.x, scale * point.accuracy
        close = sum(
            1 / 1.2 < x / other < 1.2 and abs(y - height) < 0.12 * (within or scale) for other, height in written
        )
        axes.annotate(
            str(point.number), (x, y), (6 + 12 * (close // 3), 3 + 11 * (close % 3)), textcoords="offset points"
        )
        written.append((x, y))


@contextmanager
def _drawing(
    label: str,
    xs: Sequence[float],
    salt: str,
    exact: bool = False,
    what: str = ACCURACY,
    percent: bool = True,
    low: float | None = None,
) -> Iterator[tuple[Any, io.StringIO]]:
    """Give axes to draw on, and where their SVG will be. exact: ticks at the values instead of powers of two."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    drawn = io.StringIO()
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5, 3.4), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log", base=2)
        yield axes, drawn
        margin = 1.2 if exact else 1.5
        left, right = min(xs) / margin, max(xs) * margin
        axes.set_xlim(left, right)
        ticks = sorted(set(xs)) if exact else [2.0**power for power in range(-20, 30) if left <= 2.0**power <= right]
        axes.set_xticks(ticks, [f"{tick:g}" if tick < 1e6 else f"{tick:.0f}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        if low is not None:
            spare = 0.08 * (100 - low)
            axes.set_ylim(low - spare, 100 + 2 * spare)
        elif percent:
            axes.set_ylim(-4, 118)
            axes.set_yticks(range(0, 101, 20))
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(label)
        axes.set_ylabel(what)
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})


def _svg(drawn: io.StringIO) -> str:
    svg = drawn.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")
