"""Values of command-line options that several commands read alike."""

from __future__ import annotations

from collections.abc import Iterable

from kvcomp.errors import KvcompError
from kvcomp.text import quote

DIGITS = 12  # of a whole number: a million millions


def whole_numbers(option: str, given: Iterable[str], unit: str) -> tuple[int, ...]:
    """The positive whole numbers of an option that may be repeated, and hold several separated by commas."""
    parts = [part.strip() for text in given for part in text.split(",") if part.strip()]
    for part in parts:
        if not part.isdecimal() or len(part) > DIGITS or int(part) < 1:
            least = f" of at most {DIGITS} digits" if part.isdecimal() and len(part) > DIGITS else ""
            raise KvcompError(f"{option}: {quote(part)} is not a positive whole number of {unit}{least}.")
    return tuple(map(int, parts))
