"""Names of stages: kvcomp's own, and those that other packages offer through the entry-point group `kvcomp.stages`."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from typing import TypeVar

from kvcomp.errors import KvcompWarning, SpecError
from kvcomp.text import quote

from .arguments import documented
from .stage import Stage

GROUP = "kvcomp.stages"
OWN_PACKAGES = ("kvcomp.quantizers", "kvcomp.policies", "kvcomp.sparse")
S = TypeVar("S", bound=type[Stage])
_stages: dict[str, type[Stage]] = {}


def register(name: str) -> Callable[[S], S]:
    """Class decorator: make a stage available in specs under `name`.

    Raises:
        SpecError: another class already owns the name.
    """

    def add(cls: S) -> S:
        owner = _stages.get(name)
        if owner is not None and (owner.__module__, owner.__qualname__) != (cls.__module__, cls.__qualname__):
            raise SpecError(f"stage name {name!r} is already taken by {owner.__module__}.{owner.__qualname__}")
        cls.name, cls.__doc__ = name, documented(cls)
        _stages[name] = cls
        return cls

    return add


@cache
def _load_all() -> None:
    """Import every module of the stage folders (one file a method) and every entry point of other packages."""
    for package in OWN_PACKAGES:
        root = importlib.import_module(package)
        for module in pkgutil.iter_modules(root.__path__):
            importlib.import_module(f"{package}.{module.name}")
    importlib.import_module("kvcomp.stages.window")
    for point in entry_points(group=GROUP):
        try:
            stage = point.load()
        except Exception as error:  # another package's fault must not take every stack down
            warnings.warn(
                f"stage {point.name!r} of {point.value} cannot be loaded: {error}", KvcompWarning, stacklevel=2
            )
        else:
            register(point.name)(stage)


def stages() -> dict[str, type[Stage]]:
    """Every known stage by name, in alphabetical order."""
    _load_all()
    return dict(sorted(_stages.items()))


def find(name: str) -> type[Stage]:
    """The stage class of that name.

    Raises:
        SpecError: no such stage; the message names the nearest valid ones.
    """
    known = stages()
    if name not in known:
        near = get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known stages: {', '.join(known)}"
        raise SpecError(f"unknown stage {quote(name)}: {hint}")
    return known[name]
