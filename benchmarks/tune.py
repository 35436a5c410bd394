"""Which stack to use for a model and a text: a grid of stacks measured by fidelity, their Pareto front, a choice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kvcomp.benchmarks.divergence import FidelityRow
from kvcomp.benchmarks.results import RunError
from kvcomp.files import read_text
from kvcomp.text import quote

DENSE = "none"
ROUNDING = 1e-9
GRID = (
    "int8",
    "fp8",
    "klt(bits=5)",
    "klt(bits=4)",
    "klt(bits=3)",
    "klt(bits=2)",
    "kivi(bits=4)",
    "kivi(bits=2)",
    "turboquant(bits=4)",
    "turboquant(bits=3)",
    "int(bits=4, basis=hadamard)",
    "nvfp4",
)


class Goal(NamedTuple):
    """What a user asks for: `held` times less than the dense cache, or a total-variation distance of at most `tvd`."""

    held: float | None = None
    tvd: float | None = None

    def met(self, row: FidelityRow) -> bool:
        """Whether a stack is small enough, or near enough to the dense model."""
        if self.held is not None:
            return row.held_ratio >= self.held
        return self.tvd is None or 1 - row.overlap <= self.tvd + ROUNDING

    def choose(self, rows: Sequence[FidelityRow]) -> FidelityRow | None:
        """The nearest of those that are small enough, or the smallest of those that are near enough; None: there is
        none."""
        met = [row for row in rows if self.met(row)]
        if self.held is not None:
            return max(met, key=lambda row: (row.overlap, row.held_ratio), default=None)
        return max(met, key=lambda row: (row.held_ratio, row.overlap), default=None)

    def nearest(self, rows: Sequence[FidelityRow]) -> FidelityRow:
        """What comes closest to a goal that nothing meets."""
        return max(rows, key=lambda row: row.held_ratio if self.held is not None else row.overlap)


def goal(held: str | None, tvd: str | None) -> Goal:
    """The goal of `--held 8x` or `--tvd 1%`; without either: a distance of 1 %.

    Raises:
        RunError: both are given, or one is no such number.
    """
    if held is not None and tvd is not None:
        raise RunError("held, tvd: only one of them can be the goal; give --held 8x or --tvd 1%.")
    if held is not None:
        return Goal(held=_number("held", held.strip().removesuffix("x"), held, "8x", 1, 10_000))
    text = "1%" if tvd is None else tvd.strip()
    share = _number("tvd", text.removesuffix("%"), text, "1% or 0.01", 0, 100 if text.endswith("%") else 1)
    return Goal(tvd=share / 100 if text.endswith("%") else share)


def _number(argument: str, digits: str, given: str, example: str, low: float, high: float) -> float:
    try:
        value = float(digits)
    except ValueError:
        value = float("nan")
    if not low < value <= high:
        raise RunError(f"{argument}: {quote(given)} is not like {example}: more than {low:g}, at most {high:g}.")
    return value


def front(rows: Sequence[FidelityRow]) -> list[FidelityRow]:
    """The rows than which no other is both smaller and nearer to the dense model, the largest caches first."""
    ordered = sorted(rows, key=lambda row: (row.held_ratio, row.overlap), reverse=True)
    found: list[FidelityRow] = []
    for row in ordered:
        if not found or row.overlap > found[-1].overlap:
            found.append(row)
    return found[::-1]


def write_texts(texts: Sequence[Path], folder: Path) -> None:
    """Write the texts, one after the other, where `kvcomp bench --data` looks for its text.

    Raises:
        RunError: a text cannot be read as UTF-8.
    """
    found = []
    for text in texts:
        try:
            found.append(read_text(text, "utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
            raise RunError(f"text: {quote(str(text))}: {reason}.") from error
    (folder / "perplexity.txt").write_text("\n\n".join(found), encoding="utf-8")
