"""CSV files that spreadsheets read as text and numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a cell begins with that a spreadsheet computes


def csv_text(rows: Iterable[Iterable[object]], digits: int = 4) -> str:
    """The rows as CSV, floats with so many digits. Text that a spreadsheet would take for a formula gets a quote."""
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows([_cell(value, digits) for value in row] for row in rows)
    return stream.getvalue()


def _cell(value: object, digits: int) -> object:
    if isinstance(value, float):
        return f"{value:.{digits}f}"
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
