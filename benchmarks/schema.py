"""What a value read from JSON may be, said by type hints: one validator for records and configurations.

A hint is `str`, `int`, `float`, `bool`, one of them or None (`int | None`), `list[X]`, `dict[str, X]`, a `TypedDict`,
or `Annotated[X, rule]` with a `Range` of numbers or `NAME`. `Any` is a plain value or a list of them.
"""

from __future__ import annotations

import json
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any

from kvcomp.text import is_plain, quote

KINDS = {int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}
LARGEST = 1e300  # of a number where nothing else is said


class SchemaError(ValueError):
    """A value that is not what its hint says; the message names the field, the value and what would be accepted."""


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`; nan is none of them."""

    least: float
    most: float

    def __str__(self) -> str:
        return f" from {self.least:g} to {self.most:g}"


NAME = "name"  # text that is not empty and has no control characters


def parse_json(text: bytes) -> Any:
    """The value of a JSON text in UTF-8, with a byte order mark or without.

    Raises:
        SchemaError: it is no JSON, is nested too deeply, or has a key twice in an object.
    """
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_object)
    except SchemaError:
        raise
    except RecursionError:
        raise SchemaError("nested too deeply") from None
    except ValueError as error:  # also what is no UTF-8, and numbers of thousands of digits
        raise SchemaError(f"not JSON: {quote(str(error))[1:-1]}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise SchemaError(f"{quote(next(n for n in names if names.count(n) > 1))} is given twice")
    return found


def check(value: Any, hint: Any, field: str, rule: Any = None) -> Any:
    """The value, of which whole numbers are floats where the hint says float.

    Raises:
        SchemaError: it is not what the hint, or the rule, says.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return check(value, inner[0], field, inner[1])
    if origin in (types.UnionType, typing.Union):  # X | None
        return None if value is None else check(value, inner[0], field, rule)
    if typing.is_typeddict(hint):
        return _typed_dict(value, hint, field)
    if hint is Any:
        hint = type(value) if type(value) in (str, int, float, bool, types.NoneType) else list
        origin, inner = (list, (Any,)) if hint is list else (None, ())
    kind = origin or hint
    whole = type(value) is int and hint is float
    if type(value) is not kind and not whole:
        raise _wrong(value, kind, field, rule)
    if kind is list:
        return [check(item, inner[0], f"{field}[{at}]") for at, item in enumerate(value)]
    if kind is dict:
        return {
            check(key, str, f"a name in {field}", NAME): check(item, inner[1], f"{field}.{key}")
            for key, item in value.items()
        }
    if kind in (int, float):
        bounds = rule if isinstance(rule, Range) else Range(-LARGEST, LARGEST)
        if not bounds.least <= value <= bounds.most:  # nan is not
            raise _wrong(value, kind, field, bounds)
        return float(value) if hint is float else value
    if kind is str and not (is_plain(value) and value if rule == NAME else _is_utf8(value)):
        raise _wrong(value, kind, field, rule)
    return value


def _typed_dict(value: Any, hint: Any, field: str) -> dict[str, Any]:
    if type(value) is not dict:
        raise _wrong(value, dict, field)
    inside = f"{field}." if field else ""
    missing = sorted(hint.__required_keys__ - set(value))
    if missing:
        raise SchemaError(f"{inside}{missing[0]} is missing")
    hints = typing.get_type_hints(hint, include_extras=True)
    return {  # a later version may have added something
        check(key, str, f"a name in {field or 'it'}", NAME): check(item, hints.get(key, Any), f"{inside}{key}")
        for key, item in value.items()
    }


def _wrong(value: Any, kind: Any, field: str, rule: Any = None) -> SchemaError:
    if kind is str:
        expected = "text, not empty and without control characters" if rule == NAME else "text that UTF-8 can hold"
    else:
        expected = f"{KINDS.get(kind, 'a plain value')}{rule or ''}"
    return SchemaError(f"{field or 'it'} is {quote(value, 80)}, expected {expected}")


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)
