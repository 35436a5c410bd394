"""Arguments of stages: their types, the field's names for them, and what a stage shows of them."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from decimal import Decimal
from difflib import get_close_matches
from functools import cache
from numbers import Integral, Real
from typing import Any, NamedTuple

from kvcomp.errors import SpecError
from kvcomp.text import quote

WINDOW = ("sinks", "recent", "residual_length")  # what belongs to `window(...)` wherever it is looked for


class Alias(NamedTuple):
    """Another name of a stage's argument: the one that papers, kvpress or transformers use.

    convert: the argument's value from the alias's number, and what values are accepted in words; None: the same value.
    """

    argument: str
    convert: Callable[[float], float | None] | None = None
    accepted: str = ""


def _rest(share: float) -> float | None:
    return float(1 - Decimal(repr(float(share)))) if 0 <= share < 1 else None  # 1 - 0.9 is 0.1, and not 0.0999...98


def dropped_share(argument: str) -> Alias:
    """The alias of a share to keep that gives the share to drop: 1 - the argument."""
    return Alias(argument, _rest, f"in [0, 1): the share that is dropped, where {argument} is what stays")


def aliases_of(stage: type) -> dict[str, Alias]:
    """Every alias that a stage class and its bases declare in `aliases`, by name."""
    found: dict[str, Alias] = {}
    for base in reversed(stage.__mro__):
        declared: Mapping[str, str | Alias] = vars(base).get("aliases", {})
        found |= {name: Alias(alias) if isinstance(alias, str) else alias for name, alias in declared.items()}
    own = {f.name for f in fields(stage)}
    return {name: alias for name, alias in found.items() if name not in own and alias.argument in own}


def canonical(stage: type, positional: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments by the names of the stage's fields; `positional` of them were given by position.

    Raises:
        SpecError: an argument that the stage has not, or one that is given twice.
    """
    name, known = label(stage), [f.name for f in fields(stage)]
    if positional > len(known):
        raise SpecError(f"{name} takes at most {len(known)} arguments, got {positional}")
    source = dict.fromkeys(known[:positional], "by position")  # how each argument was given
    found: dict[str, Any] = {}
    for argument, value in given.items():
        alias = None if argument in known else aliases_of(stage).get(argument)
        target = argument if alias is None else alias.argument
        if target not in known:
            raise SpecError(_unknown(name, argument, known, aliases_of(stage)))
        if target in source:
            raise SpecError(
                f"{name}: {target} is given twice, {source[target]} and as {argument}: leave one of them out"
            )
        source[target] = f"as {argument}"
        if alias is not None and alias.convert is not None and value is not None:
            number = converted(name, argument, value, (float,))
            value = alias.convert(number)
            if value is None:
                raise SpecError(f"{name}({argument}={number!r}): {argument} must be {alias.accepted}")
        found[target] = value
    return found


def _unknown(name: str, argument: str, known: list[str], aliases: Iterable[str]) -> str:
    near = get_close_matches(argument, [*known, *aliases], n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    if argument in WINDOW:
        recent = "sinks" if argument == "sinks" else "recent"
        hint = f"tokens in full precision are a stage of their own, {name} + window({recent}=...). "
    return f"{name} has no argument {quote(argument)}: {hint}It accepts: {', '.join(known) or 'none'}"


def label(stage: type) -> str:
    """The name of a stage class in specs, or that of the class where it is not registered."""
    return getattr(stage, "name", "") or stage.__name__


@cache
def types_of(stage: type) -> dict[str, tuple[type, ...]]:
    """The types that each field of a stage class accepts."""
    hints = typing.get_type_hints(stage)
    found = {}
    for f in fields(stage):
        hint = hints[f.name]
        union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        found[f.name] = typing.get_args(hint) if union else (hint,)
    return found


def converted(stage: str, argument: str, value: Any, accepted: tuple[type, ...]) -> Any:
    """The value as one of the accepted types: a whole number as a float where only that is accepted, NumPy's numbers
    as Python's.

    Raises:
        SpecError: another type, or a number that no float holds.
    """
    if not isinstance(value, bool) and isinstance(value, Integral):
        value = int(value)
    elif isinstance(value, Real) and not isinstance(value, Integral):
        value = float(value)
    if type(value) is int and float in accepted and int not in accepted:
        try:
            value = float(value)
        except OverflowError:
            raise SpecError(f"{stage}({argument}={quote(value)}): more than a float can hold") from None
    if type(value) not in accepted:
        names = " or ".join("None" if t is type(None) else t.__name__ for t in accepted)
        raise SpecError(f"{stage}({argument}={quote(value)}): expected {names}, got {type(value).__name__}")
    if value != value:
        raise SpecError(f"{stage}({argument}=nan): expected a number")
    return value


def documented(stage: type) -> str:
    """A stage class's docstring with its arguments, their aliases and what it raises, for `help` and notebooks."""
    text = inspect.cleandoc(stage.__doc__ or "")
    if "\nArgs:" in text:
        return text
    others: dict[str, list[str]] = {}
    for name, alias in aliases_of(stage).items():
        others.setdefault(alias.argument, []).append(f"1 - {name}" if alias.convert else name)
    lines = []
    for f in fields(stage):
        also = f" Also: {', '.join(others[f.name])}." if f.name in others else ""
        kind = f.type if isinstance(f.type, str) else getattr(f.type, "__name__", f.type)
        lines.append(f"    {f.name} ({kind}): {f.metadata.get('help', '')}. Default: {f.default!r}.{also}")
    arguments = "\n".join(["", "", "Args:", *lines]) if lines else ""
    return f"{text}{arguments}\n\nRaises:\n    SpecError: an argument of the wrong type or out of its range.\n"
