"""How commands print figures: sizes with units, and `--json`, one object for programs instead of tables."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

import typer

EXIT_CODES = """Exit codes:

  0  done

  1  nothing to use: data check found a file that cannot be read, tune found no stack that meets the goal;
     with a traceback: a fault of kvcomp, please report it

  2  what was asked for cannot be done; the error says what would be accepted

  130  interrupted"""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs; its keys are listed below.")]


class Document:
    """The JSON object that a command prints: its keys, which stay from one release to the next, and what each means."""

    def __init__(self, **keys: str) -> None:
        self.keys = keys

    @property
    def help(self) -> str:
        """The keys, as a part of a command's help."""
        return "\n\n".join(["Keys of --json:", *(f"  {key}: {meaning}" for key, meaning in self.keys.items())])

    def print(self, **values: Any) -> None:
        """Print the object.

        Raises:
            TypeError: keys other than those that are documented.
        """
        if values.keys() != self.keys.keys():
            raise TypeError(f"keys {sorted(values)} are not those that are documented, {sorted(self.keys)}")
        print_json({key: values[key] for key in self.keys})


def print_json(document: dict[str, Any]) -> None:
    """Print a JSON object. Numbers that are not finite become null, which JSON has instead."""
    typer.echo(json.dumps(_plain(document), indent=2, allow_nan=False))


def size(nbytes: float) -> str:
    """Bytes with three digits and a decimal unit: 147456 -> "147 KB"."""
    for unit in ("B", "KB", "MB", "GB"):
        if float(f"{nbytes:.3g}") < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
