"""Options that several commands have, how their values are read, and what a shell completes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from kvcomp.errors import KvcompError
from kvcomp.integrations.options import completed_paths, one_of
from kvcomp.text import quote


def completed_shapes(incomplete: str) -> list[str]:
    """Models whose configs come with kvcomp, folders and .gguf files."""
    spec = find_spec("kvcomp.integrations")  # its folder, without what it imports
    (folder,) = spec.submodule_search_locations if spec and spec.submodule_search_locations else (".",)
    names = json.loads(Path(folder, "huggingface", "models.json").read_text("utf-8"))
    return [*one_of(*names)(incomplete), *completed_paths(incomplete)]


DIGITS = 12  # of a whole number: a million millions


def whole_numbers(option: str, given: Iterable[str], unit: str) -> tuple[int, ...]:
    """The positive whole numbers of an option that may be repeated, and hold several separated by commas."""
    parts = [part.strip() for text in given for part in text.split(",") if part.strip()]
    for part in parts:
        if not part.isdecimal() or len(part) > DIGITS or int(part) < 1:
            least = f" of at most {DIGITS} digits" if part.isdecimal() and len(part) > DIGITS else ""
            raise KvcompError(f"{option}: {quote(part)} is not a positive whole number of {unit}{least}.")
    return tuple(map(int, parts))
