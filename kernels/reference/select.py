"""The specification of what a selector computes before attention: estimates, shares, the largest, pages of tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvcomp.layout import PageLayout


def vector_dots(queries: Tensor, summary: Mapping[str, Tensor], names: tuple[str, ...], scale: str | None) -> Tensor:
    """As `select.vector_dots`."""
    q = queries.float()
    each = (q,) if len(names) == 1 else (q.clamp(max=0), q.clamp(min=0))
    dots = [x @ vectors(summary, n, scale).flatten(1, -2).transpose(1, 2) for x, n in zip(each, names, strict=True)]
    return dots[0] if len(dots) == 1 else dots[0] + dots[1]


def vectors(summary: Mapping[str, Tensor], name: str, scale: str | None) -> Tensor:
    """The vectors of a field, as `select.vector_dots` has them, float32."""
    x = summary[name].float()
    return scaled(x, summary[scale]) if scale is not None and scale in summary else x


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """x [..., D] times the scale [..., g] of each run of D / g channels, float32."""
    numbers: Tensor = (x.unflatten(-1, (scale.shape[-1], -1)) * scale.float()[..., None]).flatten(-2)
    return numbers


def code_dots(queries: Tensor, summary: Mapping[str, Tensor], name: str, bits: int) -> Tensor:
    """As `select.code_dots`."""
    queries = queries.float()
    offset = queries.sum(-1, keepdim=True) * (0.5 - 2 ** (bits - 1))
    codes = summary[name]
    flat = codes.transpose(1, 2).flatten(2)  # [S, rows, n * P]
    if bits == 8:
        return torch.baddbmm(offset, queries, flat.float())
    low, high = queries.chunk(2, -1)
    return torch.baddbmm(torch.baddbmm(offset, low, (flat & 15).float()), high, (flat >> 4).float())


def shares(logits: Tensor, counts: Tensor) -> Tensor:
    """[S, n] float32: the softmax over the first counts [S] of logits [S, G, n], averaged over G; 0 for the others.

    A head counts 0 where it has none, or logits that are not finite. The logits may be overwritten.
    """
    exists = torch.arange(logits.shape[-1], device=logits.device) < counts[:, None]
    right = (logits.isfinite() | ~exists[:, None]).all(-1, keepdim=True) & exists.any(-1)[:, None, None]
    each = logits.masked_fill(~exists[:, None], -torch.inf).softmax(-1)
    return torch.where(right, each, 0).mean(1)


def choose(
    logits: Tensor,
    scale: float,
    counts: Tensor,
    unit: int,
    wanted: Tensor,
    width: int,
    pages: int,
    ends: tuple[int, int],
) -> Tensor:
    """int64 [S, width]: of what a stream's first counts [S] of `pages` pages hold, the wanted [S] of the largest
    `shares` by logits [S, G, pages * u] times scale, ascending; then the last place there is.

    unit 1: pages, by the sum of their u shares; else u: each by itself. ends: so many first and last pages are among
    them. The logits may be overwritten.
    """
    each = logits.shape[-1] // pages
    share = by_unit(shares(logits * scale, counts * each), pages, unit)
    return largest(forced(share, counts, unit, ends), wanted, width)


def by_unit(share: Tensor, pages: int, unit: int) -> Tensor:
    """Shares [S, pages * u] of what is chosen: with unit 1 pages [S, pages], by the sum of their u."""
    each = share.shape[-1] // pages
    return share if each == unit else share.unflatten(-1, (pages, each)).sum(-1)


def forced(share: Tensor, counts: Tensor, unit: int, ends: tuple[int, int]) -> Tensor:
    """Shares [S, n] with 2 added in the first and last pages of those that exist, and -1 where there are none."""
    place, end = torch.arange(share.shape[1], device=share.device), counts[:, None] * unit
    at_ends = (place < ends[0] * unit) | (place >= end - ends[1] * unit)
    return (share + 2.0 * at_ends).masked_fill(place >= end, -1)


def largest(x: Tensor, wanted: Tensor, width: int) -> Tensor:
    """int64 [S, width]: where the wanted [S] <= width largest of x [S, n] are, ascending, and then n - 1."""
    n = x.shape[1]
    top = x.topk(width, -1).indices
    surplus = torch.arange(width, device=x.device) >= wanted[:, None]
    return top.masked_fill(surplus, n).sort(-1).values.clamp_max(n - 1)


def regroup(layout: PageLayout, pool: Tensor, ids: Tensor, tokens: Tensor) -> Tensor:
    """As `select.regroup`, but for centres."""
    size = layout.page_size
    records = pool.new_empty(tokens.numel() // size, layout.body_bytes)
    pages, places = ids.long().gather(1, tokens // size), tokens % size
    made, held = layout.views(records), layout.views(pool)
    for field in layout.token_fields:
        rows = held[field.name][pages, places]
        made[field.name].copy_(rows.view(len(records), size, *rows.shape[2:]))
    return records
