"""Operators of `torch.ops.kvcomp` on the window of exact tokens. As in `ops`, nothing looks into a tensor."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from kvcomp.operators import operator

from . import window
from .launching import Launch

WARPS = 1
MOVED, COLUMNS = 32, 64  # tokens and channels of a program at once


def append_constants(k_dim: int, v_dim: int) -> dict[str, Any]:
    """What `append_kernel` is compiled for, and how."""
    sizes = {"K_BLOCK": triton.next_power_of_2(k_dim), "V_BLOCK": triton.next_power_of_2(max(v_dim, 1))}
    return {"K_DIM": k_dim, "V_DIM": v_dim, **sizes, "num_warps": WARPS}


@operator("append_token", lambda: None, mutates=("k", "v", "counts"))
def append_token(k: Tensor, v: Tensor, counts: Tensor, keys: Tensor, values: Tensor) -> None:
    """One token of each stream, keys [B, H, 1, Dk] and values [B, H, 1, Dv], after the counts int64 [S] that k
    [S, slots, Dk] and v [S, slots, Dv] hold, which then are one more. Each slot of a stream is contiguous."""
    how = _append(k.shape[2], v.shape[2])
    how(
        (len(counts),),
        k.device,
        *(k, v, counts, keys, values, keys.shape[1], k.stride(0), v.stride(0)),
        *(*keys.stride()[:2], *values.stride()[:2]),
    )


@lru_cache(256)
def _append(k_dim: int, v_dim: int) -> Launch:
    return Launch(window.append_kernel, append_constants(k_dim, v_dim))


@operator("advance", lambda counts: torch.empty_like(counts), mutates=("k", "v", "counts", "pages", "seen"))
def advance(
    k: Tensor, v: Tensor, counts: Tensor, pages: Tensor, seen: Tensor, keys: Tensor, values: Tensor, each: int
) -> Tensor:
    """As `append_token`; int64 [S]: the record that the next page of a stream goes to, -1 where its slots are not all
    full. See `window.advance_kernel`."""
    ids = torch.empty_like(counts)
    how = _advance(k.shape[2], v.shape[2])
    how(
        (len(counts),),
        k.device,
        *(k, v, counts, pages, seen, ids, keys, values, keys.shape[1], k.stride(0), v.stride(0), k.shape[1], each),
        *(*keys.stride()[:2], *values.stride()[:2]),
    )
    return ids


@lru_cache(256)
def _advance(k_dim: int, v_dim: int) -> Launch:
    return Launch(window.advance_kernel, append_constants(k_dim, v_dim))


def shift_constants(k_dim: int, v_dim: int, page: int, sinks: int, recent: int, clean: bool) -> dict[str, Any]:
    """As `append_constants`, of `shift_kernel`."""
    sizes = {"SINKS": sinks, "RECENT": recent, "PAGE": page, "K_DIM": k_dim, "V_DIM": v_dim, "CLEAN": clean}
    rows = min(1 << page.bit_length() - 1, MOVED)
    return sizes | {"ROWS": rows, "COLUMNS": COLUMNS, "K_BLOCKS": -(-k_dim // COLUMNS), "num_warps": 4}


def _shifted(k: Tensor, v: Tensor, page: int) -> tuple[Tensor, Tensor]:
    keys, values = (x.new_empty(x.shape[0], page, x.shape[2]) for x in (k, v))
    return keys, values


@operator("shift_windows", _shifted, mutates=("k", "v", "counts", "pages"))
def shift_windows(
    k: Tensor, v: Tensor, counts: Tensor, pages: Tensor, ids: Tensor, page: int, sinks: int, recent: int, clean: bool
) -> tuple[Tensor, Tensor]:
    """keys [S, page, Dk], values [S, page, Dv]: the oldest page of each stream whose ids int64 [S] are not below 0, and
    anything of the others. See `window.shift_kernel`."""
    keys, values = _shifted(k, v, page)
    how = _shift(k.shape[2], v.shape[2], page, sinks, recent, clean)
    blocks = -(-k.shape[2] // COLUMNS) - (-v.shape[2] // COLUMNS)
    how((len(counts), blocks), k.device, *(k, v, ids, counts, pages, keys, values, k.stride(0), v.stride(0)))
    return keys, values


@lru_cache(256)
def _shift(k_dim: int, v_dim: int, page: int, sinks: int, recent: int, clean: bool) -> Launch:
    return Launch(window.shift_kernel, shift_constants(k_dim, v_dim, page, sinks, recent, clean))
