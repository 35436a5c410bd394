"""Text that comes from users and files, as messages and terminals show it."""

from __future__ import annotations

import unicodedata

QUOTED = 200  # characters of a value that a message repeats
UNSEEN = ("Cc", "Cs")  # control characters, which terminals obey, and surrogates, which no file holds


def is_plain(text: str) -> bool:
    """Whether the text has neither control characters nor surrogates."""
    return text.isprintable() or not any(unicodedata.category(c) in UNSEEN for c in text)


def visible(text: str) -> str:
    """The text with control characters and surrogates written out, as in \\x1b; line ends and tabs stay."""
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode() if c not in "\n\t" and unicodedata.category(c) in UNSEEN else c
        for c in text
    )


def shorten(text: str, limit: int = QUOTED) -> str:
    """The text, or its start and its end where it has more than `limit` characters."""
    if len(text) <= limit:
        return text
    kept = limit - 5
    return f"{text[: kept - kept // 4]} ... {text[-(kept // 4) :]}"


def brief(text: str, limit: int = QUOTED) -> str:
    """The text in one line of at most `limit` characters, for a message that shows it without quotation marks."""
    return shorten(repr(shorten(text, limit))[1:-1], limit)


def quote(value: object, limit: int = QUOTED) -> str:
    """`repr(value)` for a message, of about `limit` characters at most, whatever the value is."""
    if isinstance(value, str):
        said = f" ({len(value):,} characters)" if len(value) > limit else ""
        return shorten(repr(shorten(value, limit)), limit) + said
    try:
        shown = shorten(repr(value), limit)
        return shown if shown.isprintable() else shorten(" ".join(shown.split()), limit)
    except (ValueError, RecursionError):  # more digits, or more levels, than Python writes out
        return f"a very large {type(value).__name__}"


def size_text(size: float) -> str:
    """A number of bytes, as in "1.25 MiB"."""
    for unit, at, digits in (("GiB", 30, 2), ("MiB", 20, 2), ("KiB", 10, 1)):
        if size >= 1 << at:
            return f"{size / (1 << at):.{digits}f} {unit}"
    return f"{size:.0f} B"
