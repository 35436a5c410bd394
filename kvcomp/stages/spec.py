"""The text of a stack: `name(arg=value, ...) + name(...)`, read into stages and written from them."""

from __future__ import annotations

import ast
import keyword
import re
from dataclasses import fields
from typing import Any

from kvcomp.errors import SpecError
from kvcomp.text import quote, shorten

from .registry import find
from .stage import Stage

EXAMPLE = "'snapkv(keep=0.25) + kivi(bits=2)'"
LITERALS = {"true": True, "false": False, "none": None}  # words that are values, in any case
LONGEST = 10_000  # characters of a spec
GAP = re.compile(r"""('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|\s+""", re.DOTALL)
DEEP = (RecursionError, MemoryError)  # what Python's parser raises where expressions are nested too deeply


def parse(spec: str) -> tuple[Stage, ...]:
    """The stages that a spec describes, in its order.

    Raises:
        SpecError: bad syntax, an unknown stage or argument, or a value of the wrong type or range.
    """
    if not isinstance(spec, str) or not spec.strip():
        raise SpecError(f"stack spec {quote(spec)} is empty: expected something like {EXAMPLE}, or 'none'")
    if len(spec) > LONGEST:
        raise SpecError(f"stack spec {quote(spec)} is too long: expected at most {LONGEST:,} characters")
    text = GAP.sub(lambda found: found[1] or " ", spec.strip())  # a spec may span lines
    try:
        tree = ast.parse(text, mode="eval").body
        return tuple(_stage(node, spec) for node in _summands(tree))
    except DEEP:
        raise SpecError(f"stack spec {quote(spec)} is nested too deeply: expected something like {EXAMPLE}") from None
    except SpecError:
        raise
    except (SyntaxError, ValueError) as error:  # ValueError: characters that no source text can hold
        offset = getattr(error, "offset", None)
        where = f" at column {offset}" if offset else ""
        raise SpecError(f"stack spec {quote(spec)} does not parse{where}: expected something like {EXAMPLE}") from None


def text_of(stage: Stage, full: bool) -> str:
    """A stage as spec text: all that its arguments stand for, or the first one and those that are not the default."""
    values = stage.shown()
    if full:
        values = {f.name: _identity(stage, f.name) for f in fields(stage) if f.name not in stage.implied}
    texts = [f"{name}={value if _is_word(value) else repr(value)}" for name, value in values.items()]
    return f"{stage.name}({', '.join(texts)})" if texts else stage.name


def _identity(stage: Stage, argument: str) -> Any:
    """What an argument stands for; a file that cannot be read stands for its name."""
    try:
        return stage.identity(argument)
    except (OSError, RuntimeError, ValueError):  # RuntimeError: a home directory of no user
        return getattr(stage, argument)


def _summands(node: ast.expr) -> list[ast.expr]:
    found, left = [], [node]
    while left:
        node = left.pop()
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left += [node.left, node.right]
        else:
            found.append(node)
    return found[::-1]


def _stage(node: ast.expr, spec: str) -> Stage:
    """The stage that one summand of a spec describes."""
    if isinstance(node, ast.Name):
        name, keywords = node.id, []
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name, keywords = node.func.id, node.keywords
        if node.args:
            first = next(iter(fields(find(name))), None)
            advice = f"write {name}({first.name}={_source(node.args[0])})" if first else f"{name} takes no arguments"
            raise SpecError(f"{_source(node)!r} in {quote(spec)}: arguments are given by name: {advice}")
    else:
        raise SpecError(
            f"{_source(node)!r} in {quote(spec)} is no stage: expected name(arg=value, ...), as in {EXAMPLE}"
        )
    cls = find(name)
    arguments: dict[str, Any] = {}
    for given in keywords:
        argument = given.arg or "**"
        if argument in arguments:
            raise SpecError(f"{name}({shorten(argument, 80)}=...) is given twice in {quote(spec)}")
        arguments[argument] = _value(given.value, name, argument)
    return cls(**arguments)


def _source(node: ast.expr) -> str:
    return shorten(ast.unparse(node), 80)


def _value(node: ast.expr, stage: str, argument: str) -> Any:
    """A literal, or a bare word as a string; the stage checks its type."""
    if isinstance(node, ast.Name):
        return LITERALS.get(node.id.lower(), node.id)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):  # TypeError: a list as a key
        raise SpecError(
            f"{stage}({shorten(argument, 80)}={_source(node)}): expected a number, a word or a string"
        ) from None


def _is_word(value: Any) -> bool:
    """Whether a value can be written in a spec without quotation marks and still be read as a string."""
    bare = isinstance(value, str) and value.isidentifier() and not keyword.iskeyword(value)
    return bare and value.lower() not in LITERALS
