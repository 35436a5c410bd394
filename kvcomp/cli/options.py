"""Options that several commands have, how their values are read, and what a shell completes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from kvcomp.errors import KvcompError
from kvcomp.text import quote

PACKAGED = ("smollm2-135m",)  # aliases of models; a shell would wait too long for torch to name them


def one_of(*values: str) -> Callable[[str], list[str]]:
    """What a shell completes an option with: the values that start with what was typed, in upper or lower case."""

    def complete(incomplete: str) -> list[str]:
        found = [value for value in values if value.lower().startswith(incomplete.lower())]
        return [incomplete + value[len(incomplete) :] for value in found]  # shells take what continues the text alone

    return complete


def completed_models(incomplete: str) -> list[str]:
    """Aliases, folders and .gguf files."""
    return [*one_of(*PACKAGED)(incomplete), *_completed_paths(incomplete)]


def completed_shapes(incomplete: str) -> list[str]:
    """Models whose configs come with kvcomp, folders and .gguf files."""
    spec = find_spec("kvcomp.integrations")  # its folder, without what it imports
    (folder,) = spec.submodule_search_locations if spec and spec.submodule_search_locations else (".",)
    names = json.loads(Path(folder, "huggingface", "models.json").read_text("utf-8"))
    return [*one_of(*names)(incomplete), *_completed_paths(incomplete)]


def _completed_paths(incomplete: str) -> list[str]:
    typed = Path(incomplete).expanduser()
    folder = typed if incomplete.endswith("/") else typed.parent
    start = incomplete[: len(incomplete) - len("" if incomplete.endswith("/") else typed.name)]
    found = [] if not incomplete or not folder.is_dir() else sorted(folder.iterdir())
    paths = [f"{start}{path.name}{'/' * path.is_dir()}" for path in found if path.is_dir() or path.suffix == ".gguf"]
    return [path for path in paths if path.startswith(incomplete)]


Model = Annotated[
    str,
    typer.Option(
        help="The alias smollm2-135m, a .gguf file, a local folder, or a Hugging Face hub id.",
        autocompletion=completed_models,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or float16.  \\[default: float32 on a CPU, bfloat16 on a GPU]",
        autocompletion=one_of("float32", "bfloat16", "float16"),
    ),
]
DIGITS = 12  # of a whole number: a million millions


def whole_numbers(option: str, given: Iterable[str], unit: str) -> tuple[int, ...]:
    """The positive whole numbers of an option that may be repeated, and hold several separated by commas."""
    parts = [part.strip() for text in given for part in text.split(",") if part.strip()]
    for part in parts:
        if not part.isdecimal() or len(part) > DIGITS or int(part) < 1:
            least = f" of at most {DIGITS} digits" if part.isdecimal() and len(part) > DIGITS else ""
            raise KvcompError(f"{option}: {quote(part)} is not a positive whole number of {unit}{least}.")
    return tuple(map(int, parts))
