"""What a selector computes before attention: estimates, shares, the largest, and pages of single tokens.

Plain PyTorch is the specification; on the CPU the C kernel does the same, several times faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomp.pages import PageLayout

from . import cpu


def code_dots(queries: Tensor, codes: Tensor, bits: int) -> Tensor:
    """[S, J, n * P] float32: queries [S, J, r] times the codes of every token, q . (c + 1/2 - 2^bits / 2).

    codes uint8 [S, n, rows, P]: with 8 bits, r rows of a channel each; with 4, r / 2 rows, of which row c has channel c
    in the low bits and channel r / 2 + c in the high ones.
    """
    queries = queries.float()
    offset = queries.sum(-1, keepdim=True) * (0.5 - 2 ** (bits - 1))
    if codes.is_cpu and cpu.library() is not None:
        return cpu.code_dots(queries, offset, codes, bits)
    flat = codes.transpose(1, 2).flatten(2)  # [S, rows, n * P]
    if bits == 8:
        return torch.baddbmm(offset, queries, flat.float())
    low, high = queries.chunk(2, -1)
    return torch.baddbmm(torch.baddbmm(offset, low, (flat & 15).float()), high, (flat >> 4).float())


def shares(logits: Tensor, counts: Tensor) -> Tensor:
    """[S, n] float32: the softmax over the first counts [S] of logits [S, G, n], averaged over G; 0 for the others.

    A head counts 0 where it has none, or logits that are not finite. The logits may be overwritten.
    """
    if logits.is_cpu and cpu.library() is not None:
        return cpu.shares(logits, counts)
    exists = torch.arange(logits.shape[-1], device=logits.device) < counts[:, None]
    right = (logits.isfinite() | ~exists[:, None]).all(-1, keepdim=True) & exists.any(-1)[:, None, None]
    each = logits.masked_fill(~exists[:, None], -torch.inf).softmax(-1)
    return torch.where(right, each, 0).mean(1)


def largest(x: Tensor, wanted: Tensor, least: int = 1) -> Tensor:
    """int64 [S, max wanted, or `least`]: where the wanted [S] largest of x [S, n] are, ascending, and then n - 1."""
    n, width = x.shape[1], max(int(wanted.max()), least)
    if x.is_cpu and cpu.library() is not None:
        return cpu.largest(x, wanted, width)
    top = x.topk(width, -1).indices
    surplus = torch.arange(width, device=x.device) >= wanted[:, None]
    return top.masked_fill(surplus, n).sort(-1).values.clamp_max(n - 1)


def regroup(layout: PageLayout, pool: Tensor, ids: Tensor, tokens: Tensor) -> Tensor:
    """Pages made of single tokens, where the layout is `tokenwise`: records [S * m, body_bytes] uint8.

    ids [S, n]: pages of each stream; tokens [S, m * P]: which of their n * P tokens, in the order wanted. Nothing else
    of the pool is read.
    """
    size = layout.page_size
    records = pool.new_empty(tokens.numel() // size, layout.body_bytes)
    if pool.is_cpu and cpu.library() is not None:
        cpu.regroup(layout, pool, ids, tokens, records)
        return records
    pages, places = ids.long().gather(1, tokens // size), tokens % size
    made = layout.views(records)
    for name, field in layout.views(pool).items():
        made[name].copy_(field[pages, places].view(len(records), size, *field.shape[2:]))
    return records
