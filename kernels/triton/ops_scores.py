"""Operators of `torch.ops.kvcomp` that score pages and tokens. As in `ops`, nothing looks into a tensor."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from kvcomp.kernels.placed import NOTHING
from kvcomp.operators import operator

from . import choose as choosing
from . import received, summaries, tokens
from .chunks import NARROWEST
from .launching import Launch
from .plan import blocked, split_keys

CHANNELS = 64  # of a product
SCORED = 64  # vectors of a program
ESTIMATED = 128  # tokens of a program
KEYS = 64  # at once
WARPS = 4
CHOSEN = 1024  # places that a program looks at at once
MOST_HEADS = 16  # of a stream, among which shares are averaged


def scores_constants(rows: int, dim: int, page_bytes: int, exact: bool) -> dict[str, Any]:
    """What `scores_kernel` is compiled for, and how."""
    return {
        "D": dim,
        "BYTES": page_bytes,
        "ROWS": blocked(rows),
        "BLOCK": min(max(triton.next_power_of_2(dim), NARROWEST), CHANNELS),
        "SLOTS": SCORED,
        "EXACT": exact,
        "num_warps": WARPS if rows <= NARROWEST else 2 * WARPS,
    }


def code_dots_constants(rows: int, rank: int, bits: int, page_size: int, page_bytes: int) -> dict[str, Any]:
    """As `scores_constants`, of `code_dots_kernel`."""
    return {
        "RANK": rank,
        "BITS": bits,
        "PAGE": page_size,
        "BYTES": page_bytes,
        "ROWS": blocked(rows),
        "BLOCK": min(max(triton.next_power_of_2(rank), NARROWEST), CHANNELS),
        "TOKENS": ESTIMATED,
        "num_warps": WARPS if rows <= NARROWEST else 2 * WARPS,
    }


def received_constants(queries: int, dim: int, hiding: bool, capped: bool, exact: bool) -> dict[str, Any]:
    """As `scores_constants`, of both kernels of `received`; `exact`: for float32, which takes the most room."""
    channels = CHANNELS // 2 if exact else CHANNELS
    return {
        "D": dim,
        "ROWS": blocked(queries),
        "COLUMNS": KEYS,
        "BLOCK": min(max(triton.next_power_of_2(dim), NARROWEST), channels),
        "HIDING": hiding,
        "SOFTCAP": capped,
        "num_warps": 2 * WARPS if exact else WARPS,
        "num_stages": 3,
    }


def _floats(queries: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, device=queries.device, dtype=torch.float32)


@operator("vector_dots", lambda queries, ids, each: _floats(queries, *queries.shape[1:3], ids.shape[1] * each))
def vector_dots(
    queries: Tensor, pool: Tensor, ids: Tensor, counts: Tensor, fields: list[int], each: int, scale: int, run: int
) -> Tensor:
    """float32 [S, R, n * each]: queries [F, S, R, D], one for each field, times the field's `each` vectors in the pages
    ids [S, n] of a pool uint8 [pages, bytes], summed over fields; -inf after a stream's counts [S].

    fields: offset of each in a page. scale: offset of the float16 scales of `run` channels of int8 each, or -1 where
    vectors are float16: then queries count with 22 bits, else with 11.
    """
    _, streams, rows, dim = queries.shape
    slots = ids.shape[1] * each
    out = _floats(queries, streams, rows, slots)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(queries):
        summaries.scores_kernel[(streams, triton.cdiv(slots, SCORED))](
            *(queries, pool, ids, counts, out, rows, slots, ids.stride(0)),
            **scores_constants(rows, dim, pool.shape[1], exact=scale == NOTHING),
            FIELDS=tuple(fields),
            EACH=each,
            SCALE=scale,
            RUN=run,
        )
    return out


@operator("code_dots", lambda queries, ids, page_size: _floats(queries, *queries.shape[:2], ids.shape[1] * page_size))
def code_dots(
    queries: Tensor, pool: Tensor, ids: Tensor, counts: Tensor, offset: int, bits: int, page_size: int
) -> Tensor:
    """float32 [S, J, n * P]: queries float32 [S, J, r] times what codes uint8 [r * bits / 8, P] stand for, which lie at
    `offset` in the pages ids [S, n] of a pool uint8 [pages, bytes]; 0 after a stream's counts [S]."""
    streams, rows, rank = queries.shape
    count = ids.shape[1] * page_size
    out = _floats(queries, streams, rows, count)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(queries):
        tokens.code_dots_kernel[(streams, triton.cdiv(count, ESTIMATED))](
            *(queries, pool, ids, counts, out, rows, count, ids.stride(0)),
            **code_dots_constants(rows, rank, bits, page_size, pool.shape[1]),
            OFFSET=offset,
        )
    return out


@operator("attention_received", lambda queries, keys: _floats(queries, *queries.shape[:2], keys.shape[2]))
def attention_received(
    queries: Tensor,
    keys: Tensor,
    visible: Tensor | None,
    scale: float,
    softcap: float,
    most: bool,
    processors: int,
) -> Tensor:
    """float32 [B, Hq, n]: attention weights of the last w queries [B, Hq, w, D], their sums or where `most` is set
    their maxima, causal, over keys [B, Hkv, n, D] of the same dtype; visible bool [B, Hkv, n] hides keys, and a query
    that sees none gives 0. softcap 0: none."""
    batch, heads, rows, dim = queries.shape
    n, group = keys.shape[2], heads // keys.shape[1]
    out = _floats(queries, batch, heads, n)
    if out.numel() == 0:
        return out
    constants = received_constants(rows, dim, visible is not None, softcap > 0, queries.dtype == torch.float32)
    blocks, split = triton.cdiv(rows, constants["ROWS"]), split_keys(batch * heads, rows, n, processors)
    splits = triton.cdiv(n, split)
    partial = _floats(queries, batch * heads, rows, splits)
    hidden = queries if visible is None else visible.view(torch.uint8)
    with torch.cuda.device_of(queries):
        received.lse_kernel[(batch * heads * blocks, splits)](
            queries, keys, hidden, partial, rows, n, split, scale, softcap, group, **constants
        )
        lse = partial.logsumexp(-1)
        received.received_kernel[(batch * heads, triton.cdiv(n, KEYS))](
            queries, keys, hidden, lse, out, rows, n, scale, softcap, group, **constants, MOST=most
        )
    return out


def choose_constants(groups: int, unit: int, each: int) -> dict[str, Any]:
    """As `scores_constants`, of `choose_kernel`."""
    return {
        "UNIT": unit,
        "EACH": each,
        "GROUP": triton.next_power_of_2(groups),
        "BLOCK": CHOSEN,
        "num_warps": 2 * WARPS,
    }


@operator("choose", lambda logits, width: torch.empty(len(logits), width, dtype=torch.int64, device=logits.device))
def choose(
    logits: Tensor,
    counts: Tensor,
    wanted: Tensor,
    unit: int,
    each: int,
    width: int,
    first: int,
    last: int,
    scale: float,
) -> Tensor:
    """int64 [S, width]: of logits float32 [S, G, n * each], places of whose shares the wanted int64 [S] largest are
    read; counts [S] of pages, of `unit` places each; the first and last places in any case. See `choose.choose_kernel`.
    G is at most `MOST_HEADS`."""
    streams, groups, slots = logits.shape
    places = slots // each
    out = torch.empty(streams, width, dtype=torch.int64, device=logits.device)
    shares = _floats(logits, streams, places)
    _choose(groups, unit, each)(
        (streams,),
        logits.device,
        *(logits, counts, wanted, shares, out, groups, places, width, first, last, scale),
    )
    return out


@lru_cache(256)
def _choose(groups: int, unit: int, each: int) -> Launch:
    return Launch(choosing.choose_kernel, choose_constants(groups, unit, each))
