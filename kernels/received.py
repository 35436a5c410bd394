"""The attention that keys receive from some queries: what policies vote with."""

from __future__ import annotations

from torch import Tensor

from . import backends
from .contract import Reduce


def received(
    queries: Tensor,
    keys: Tensor,
    scale: float,
    visible: Tensor | None = None,
    softcap: float | None = None,
    reduce: Reduce = "sum",
) -> Tensor:
    """Attention weights of the last w queries, their sum or with reduce="max" the largest: [b, Hq, n] float32.

    queries [b, Hq, w, D] of the last w tokens, keys [b, Hkv, n, D]; causal; visible bool [b, Hkv, n] hides keys, and a
    query that sees none gives 0. Neither backend holds all w * n weights.
    """
    return backends.on("received", queries.device)[0].received(queries, keys, scale, visible, softcap, reduce)
