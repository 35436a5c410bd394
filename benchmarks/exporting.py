"""Formats of others that a run is written in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from kvcomp.benchmarks import kvpress, mbe
from kvcomp.benchmarks.results import Run, RunError
from kvcomp.text import quote

Export = Callable[[Sequence[Run], Path], tuple[list[Path], list[str]]]  # what was written, and what had no place
FORMATS: dict[str, Export] = {"kvpress": kvpress.export, "mbe": mbe.export}


def find_format(name: str) -> Export:
    """Return what writes runs in the format of that name, or raise RunError."""
    if name not in FORMATS:
        raise RunError(f"export: {quote(name)} is no format: expected {', '.join(FORMATS)}.")
    return FORMATS[name]
