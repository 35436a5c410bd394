"""Values of command-line options that several commands read alike."""

from __future__ import annotations

from collections.abc import Iterable

from kvcomp.errors import KvcompError


def whole_numbers(option: str, given: Iterable[str], unit: str) -> tuple[int, ...]:
    """The positive whole numbers of an option that may be repeated, and hold several separated by commas."""
    parts = [part.strip() for text in given for part in text.split(",") if part.strip()]
    for part in parts:
        if not part.isdecimal() or int(part) < 1:
            raise KvcompError(f"{option}: {part!r} is not a positive whole number of {unit}.")
    return tuple(map(int, parts))
