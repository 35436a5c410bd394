"""The compiled C kernel of this machine, and what its functions return."""

from __future__ import annotations

import ctypes
from functools import cache

from .loading import MISSING, load

LEVELS = ("portable", "AVX2", "AVX-512")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where there is none; see `missing`. torch is imported by then: they share its
    OpenMP."""
    return _loaded()[0]


def missing() -> str:
    """Why there is no compiled kernel, and what to do."""
    return _loaded()[1] or MISSING


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str | None]:
    return load()


@cache
def functions() -> ctypes.CDLL:
    """The kernel's functions, where there is a `library`."""
    found = library()
    assert found is not None
    return found


@cache
def level() -> int:
    """The best of `LEVELS` on this machine."""
    return int(functions().kvcomp_level())
