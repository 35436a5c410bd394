"""`--config FILE.yaml`: the options of a command from a file; those of the command line come first."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcomp.errors import KvcompError
from kvcomp.text import quote

LARGEST = 1 << 20  # bytes of a file
APART = ("config", "help")


def _take(context: typer.Context, file: Path | None) -> Path | None:
    """Make a file's options the defaults of the command's."""
    if file is not None and not context.resilient_parsing:
        context.default_map = {**(context.default_map or {}), **options_of(file, context.command)}
    return file


def options_of(file: Path, command: Any) -> dict[str, Any]:
    """The options that a YAML file has for a command, by the names of the command's parameters.

    Raises:
        KvcompError: no readable file, no mapping, an option that the command does not have, or a value that is neither
            one value nor, where the option may be repeated, a list of them.
    """
    import yaml

    told = f"config: {quote(str(file))}"
    try:
        if file.stat().st_size > LARGEST:
            raise KvcompError(f"{told} has more than {LARGEST} bytes, which no list of options has.")
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else "it is no UTF-8 text"
        raise KvcompError(f"{told} cannot be read: {why}.") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        raise KvcompError(
            f"{told} is no YAML{where}: {getattr(error, 'problem', None) or 'it cannot be read'}."
        ) from error
    if not isinstance(found, dict):
        raise KvcompError(f'{told} has no options: write one a line, such as "samples: 5".')
    known = {p.name: p for p in command.params if p.name not in APART and p.param_type_name == "option"}
    names = {flag.lstrip("-").replace("-", "_"): p.name for p in known.values() for flag in (*p.opts, p.name)}
    chosen: dict[str, Any] = {}
    for key, value in found.items():
        name = names.get(str(key).replace("-", "_"))
        if name is None:
            close = get_close_matches(str(key).replace("-", "_"), names, 1)
            hint = f": did you mean {close[0].replace('_', '-')!r}?" if close else "."
            raise KvcompError(f"{told} has {quote(key)}, which is no option of {command.name}{hint}")
        if name in chosen:
            raise KvcompError(f"{told} has {quote(key)} twice.")
        chosen[name] = _value(f"{told}: {key}", value, known[name])
    return {name: value for name, value in chosen.items() if value is not None}


def _value(told: str, value: Any, option: Any) -> Any:
    """A value as the command line would have it: text, but for flags."""
    if value is None:
        return None
    if option.is_flag:
        if not isinstance(value, bool):
            raise KvcompError(f"{told} is {quote(value)}, expected true or false.")
        return value
    several = value if isinstance(value, list) else [value]
    if isinstance(value, list) and not option.multiple:
        raise KvcompError(f"{told} is a list, and the option takes one value.")
    wrong = next((v for v in several if isinstance(v, bool) or not isinstance(v, (str, int, float))), None)
    if wrong is not None:
        expected = "text or a number" + (", or a list of these" if option.multiple else "")
        raise KvcompError(f"{told} has {quote(wrong)}, expected {expected}.")
    texts = [str(v) for v in several]
    return texts if option.multiple else texts[0]


Config = Annotated[
    Path | None,
    typer.Option(
        is_eager=True,
        callback=_take,
        show_default=False,
        help='A YAML file of options, such as "samples: 5" and "stack: \\[none, int8]"; those given here come first.',
    ),
]
