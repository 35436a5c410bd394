"""The compiled C kernel: found, compared with the sources beside this file, and loaded through ctypes."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from kvcomp.errors import KvcompError

from .sources import digest

PACKAGE = __name__.rpartition(".")[0]
MISSING = (
    "the C kernel is not installed, so attention over compressed pages runs in PyTorch, several times slower: "
    "install kvcomp again where there is a C compiler (gcc or clang)"
)
STALE = (
    "the compiled C kernel comes from other C sources than those of this checkout, so attention over compressed pages "
    "runs in PyTorch, several times slower: rebuild it with `pip install .`, or `python setup.py build_ext --inplace`"
)


def load() -> tuple[ctypes.CDLL | None, str | None]:
    """The compiled kernel, or None and why there is none. torch is imported by then: they share its OpenMP.

    Beside C sources, in a checkout, only a library that was compiled from them counts: what structures look like may
    differ in another. That may be the one of an installed copy of kvcomp.
    """
    sources, why = digest(Path(__file__).parent), MISSING
    for path in candidates():
        try:
            found = ctypes.CDLL(str(path))
        except OSError:
            continue
        if sources is None or compiled_from(found) == sources:
            return declared(found), None
        why = STALE
    return None, why


@cache
def candidates() -> tuple[Path, ...]:
    """Where libraries are: beside this file, or in copies of kvcomp on the search path."""
    return tuple(dict.fromkeys(_candidates()))


def _candidates() -> Iterator[Path]:
    name = f"{PACKAGE}._attend"
    spec = find_spec(name)
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin)
    for entry in sys.path:
        spec = PathFinder.find_spec(name, [str(Path(entry, *PACKAGE.split(".")))])
        if spec is not None and spec.origin is not None:
            yield Path(spec.origin)


def compiled_from(library: ctypes.CDLL) -> str | None:
    """What `digest` said of the sources of a library; None for those that do not say it."""
    try:
        named = library.kvcomp_sources
    except AttributeError:
        return None
    named.argtypes, named.restype = [], c_char_p
    return str(named().decode())


def declared(found: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the signatures of its functions.

    They raise a MemoryError, or a KvcompError where counts, ids or places are beyond what there is.
    """
    number, place = c_int64, c_void_p
    three, five, six = [number] * 3, [number] * 5, [number] * 6
    signatures = {
        "kvcomp_attend": [c_char_p],
        "kvcomp_vector_dots": [c_char_p],
        "kvcomp_encode": [c_char_p],
        "kvcomp_code_dots": [*[place] * 3, number, number, place, number, place, *six, place],
        "kvcomp_choose": [place, c_float, place, *five, place, *three, place],
        "kvcomp_append": [*[place] * 5, *five],
        "kvcomp_shares": [place, place, *three, place],
        "kvcomp_largest": [place, place, *three, place],
        "kvcomp_regroup": [*[place, number, number] * 2, place, *three, place, place, number, place, number],
        "kvcomp_runs": [place, number, place, *three, place],
    }
    for name, takes in signatures.items():
        function = getattr(found, name)
        function.argtypes, function.restype, function.errcheck = takes, c_int, _checked
    return found


def _checked(code: int, *_: object) -> None:
    if code == 1:
        raise MemoryError("no memory for a step of attention over compressed pages")
    if code:
        raise KvcompError("counts, ids or places are below 0, or beyond what there is: the cache is damaged")
