"""A decode step as one operator for graphs, which know a store by its name, and its tensors by their addresses."""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from kvcomp.operators import operator

_STORES: WeakValueDictionary[str, Any] = WeakValueDictionary()  # `FixedStore`s
_NUMBERS = count()


def published(store: Any) -> str:
    """A new name under which graphs find the store, as long as somebody holds it."""
    name = f"{next(_NUMBERS)}"
    _STORES[name] = store
    return name


def _results(queries: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    rows = queries.shape[:3]
    out = queries.new_empty(*rows, values.shape[-1], dtype=torch.float32)
    return out, queries.new_empty(rows, dtype=torch.float32)


@operator("decode_step", _results)
def decode_step(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    length: Tensor,
    store: str,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """`step` of the store with that name, whose tensors it changes, as one operator for graphs;
    softcap 0: none."""
    part = _STORES[store].step(queries, keys, values, mask, length, scale, softcap or None)
    return part.out, part.lse
