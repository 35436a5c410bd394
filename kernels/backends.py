"""The registry of backends: an operation goes to the first that gives no reason why not; the reference gives none.

Nothing else asks what is installed, or where a tensor lies. Tests and checks choose the backends with `using`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvcomp.errors import KvcompWarning
from kvcomp.segments import memo

from .contract import MOST_ROWS, Backend, Case
from .cpu.backend import C
from .flashinfer import FlashInfer
from .reference.backend import Reference
from .triton_backend import Triton

Operation = TypeVar("Operation", bound=Callable[..., Any])
REFERENCE = Reference()
ALL: tuple[Backend, ...] = (FlashInfer(), Triton(), C(), REFERENCE)  # the fastest first
_order: ContextVar[tuple[Backend, ...]] = ContextVar("backends", default=ALL)  # of each thread
_known: dict[Any, tuple[Backend, ...]] = {}  # of operations without pages; others are remembered with their sides


@contextmanager
def using(*backends: Backend) -> Iterator[None]:
    """Inside, this thread asks these backends alone, in this order, and then the reference."""
    before = _order.set((*backends, REFERENCE))
    try:
        yield
    finally:
        _order.reset(before)


def reference_only() -> AbstractContextManager[None]:
    """Inside, this thread computes everything by the reference: what kernels are checked against."""
    return using()


def able(operation: str, case: Case) -> tuple[Backend, ...]:
    """The backends that serve an operation on pages, the fastest first; remembered for each case."""
    sides = case[0]
    if sides is None:
        return _able(operation, case)
    known, key = memo(sides), (operation, _order.get(), case[1:])
    found: tuple[Backend, ...] | None = known.get(key)
    return known.setdefault(key, _able(operation, case)) if found is None else found


def on(operation: str, device: torch.device, rows: int = 1) -> tuple[Backend, ...]:
    """As `able`, of operations that are the same for all pages, or on none."""
    key = operation, _order.get(), device, min(rows, MOST_ROWS + 1)
    found = _known.get(key)
    return _known.setdefault(key, _able(operation, Case(None, device, rows))) if found is None else found


def door(specification: Operation) -> Operation:
    """The operation that the reference specifies, by the first backend that serves it where its first tensor lies."""
    name = specification.__name__

    @wraps(specification)
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(on(name, x.device)[0], name)(x, *args, **kwargs)

    return call  # type: ignore[return-value]


def _able(operation: str, case: Case) -> tuple[Backend, ...]:
    return tuple(backend for backend, why in asked(operation, case) if why is None)


def asked(operation: str, case: Case) -> list[tuple[Backend, str | None]]:
    """Every backend for a device, the fastest first, and why it does not serve an operation.

    Warns, once in a process, where attention is left to the reference because something is not installed.
    """
    found = [(backend, _obstacle(backend, operation, case)) for backend in _order.get() if backend.serves(case.device)]
    if operation == "attend" and len(found) > 1 and all(why is not None for _, why in found[:-1]):
        backend, why = found[-2]
        if why is not None and why == backend.missing():
            _warn(why)
    return found


def _obstacle(backend: Backend, operation: str, case: Case) -> str | None:
    if not hasattr(backend, operation):
        return f"it has no kernel for {operation}"
    return backend.obstacle(operation, case)


def why_reference(operation: str, case: Case) -> str | None:
    """Why an operation on pages is left to the reference, or to the codec; None: it is not."""
    if next(iter(able(operation, case)), REFERENCE) is not REFERENCE:
        return None
    if len(_order.get()) == 1:
        return "it was asked for"
    reasons = [why for backend, why in asked(operation, case) if backend is not REFERENCE]
    return reasons[-1] if reasons else f"there is no other kernel for {case.device.type}"


@cache
def _warn(what: str) -> None:
    """Once in a process."""
    warnings.warn(what, KvcompWarning, stacklevel=2)
