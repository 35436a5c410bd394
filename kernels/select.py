"""What a selector computes before attention: estimates, shares, the largest, and pages of single tokens.

Plain PyTorch is the specification; on the CPU the C kernel does the same, several times faster, and on a GPU Triton
kernels compute estimates and make pages.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvcomp.kernel_layout import centre_of
from kvcomp.pages import PageLayout, Summary
from kvcomp.stages import Codec

from . import cpu
from .dispatch import MOST_ROWS, on_gpu


def vector_dots(
    queries: Tensor, summary: Mapping[str, Tensor], names: tuple[str, ...], scale: str | None = None
) -> Tensor:
    """[S, G, n * u] float32: queries [S, G, D] times the vectors of a field, u of each page.

    Of two fields the first is multiplied with what is negative in the queries, the second with the rest: their
    products with the least and the greatest of each channel add up to the most that any key between can give.

    Fields [S, n, D] or [S, n, u, D] are float16, or int8 codes of which each run of D / g shares a float16 number of
    the field `scale` [S, n, g] or [S, n, u, g].
    """
    held = _on_gpu(queries, summary)
    if held is None and isinstance(summary, Summary) and summary.pool.is_cpu and cpu.library() is not None:
        return cpu.vector_dots(queries, summary, names, scale)
    q = queries.float()
    each = (q,) if len(names) == 1 else (q.clamp(max=0), q.clamp(min=0))
    if held is not None:
        from . import triton

        return triton.vector_dots(dict(zip(names, each, strict=True)), *held, scale)
    dots = [x @ vectors(summary, n, scale).flatten(1, -2).transpose(1, 2) for x, n in zip(each, names, strict=True)]
    return dots[0] if len(dots) == 1 else dots[0] + dots[1]


def _on_gpu(queries: Tensor, summary: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, PageLayout] | None:
    """Pool, ids, counts and layout of pages whose summaries Triton reads where they lie, for few queries [S, R, D]."""
    if isinstance(summary, Summary) and on_gpu(summary.pool) and queries.shape[1] <= MOST_ROWS:
        return summary.pool, summary.ids, summary.counts, summary.layout
    return None


def vectors(summary: Mapping[str, Tensor], name: str, scale: str | None) -> Tensor:
    """The vectors of a field, as `vector_dots` has them, float32."""
    x = summary[name].float()
    return scaled(x, summary[scale]) if scale is not None and scale in summary else x


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """x [..., D] times the scale [..., g] of each run of D / g channels, float32."""
    return (x.unflatten(-1, (scale.shape[-1], -1)) * scale.float()[..., None]).flatten(-2)


def code_dots(queries: Tensor, summary: Mapping[str, Tensor], name: str, bits: int) -> Tensor:
    """[S, J, n * P] float32: queries [S, J, r] times the codes of every token, q . (c + 1/2 - 2^bits / 2).

    The field's codes are uint8 [S, n, rows, P]: with 8 bits, r rows of a channel each; with 4, r / 2 rows, of which row
    c has channel c in the low bits and channel r / 2 + c in the high ones.
    """
    if (held := _on_gpu(queries, summary)) is not None:
        from . import triton

        return triton.code_dots(queries, *held, name, bits)
    queries = queries.float()
    offset = queries.sum(-1, keepdim=True) * (0.5 - 2 ** (bits - 1))
    if isinstance(summary, Summary) and summary.pool.is_cpu and cpu.library() is not None:
        return cpu.code_dots(queries, offset, summary, name, bits)
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
    if logits.is_cpu and cpu.library() is not None:
        return cpu.shares(logits, counts)
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
    if logits.is_cpu and cpu.library() is not None:
        return cpu.choose(logits, scale, counts, unit, wanted, width, pages, ends)
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
    if x.is_cpu and cpu.library() is not None:
        return cpu.largest(x, wanted, width)
    top = x.topk(width, -1).indices
    surplus = torch.arange(width, device=x.device) >= wanted[:, None]
    return top.masked_fill(surplus, n).sort(-1).values.clamp_max(n - 1)


def regroup(layout: PageLayout, pool: Tensor, ids: Tensor, tokens: Tensor) -> Tensor:
    """Pages made of single tokens, where the layout is `tokenwise`: records [S * m, body_bytes] uint8, with centres 0:
    attention over them needs the `token_bias`.

    ids [S, n]: pages of each stream; tokens [S, m * P]: which of their n * P tokens, in the order wanted. Nothing else
    of the pool is read.
    """
    records = _regrouped(layout, pool, ids, tokens)
    for field in layout.centres:
        at = layout.offsets[field.name]
        records[:, at : at + field.nbytes] = 0
    return records


def _regrouped(layout: PageLayout, pool: Tensor, ids: Tensor, tokens: Tensor) -> Tensor:
    if on_gpu(pool):
        from . import triton

        return triton.regroup(layout, pool, ids, tokens)
    size = layout.page_size
    records = pool.new_empty(tokens.numel() // size, layout.body_bytes)
    if pool.is_cpu and cpu.library() is not None:
        cpu.regroup(layout, pool, ids, tokens, records)
        return records
    pages, places = ids.long().gather(1, tokens // size), tokens % size
    made, held = layout.views(records), layout.views(pool)
    for field in layout.token_fields:
        rows = held[field.name][pages, places]
        made[field.name].copy_(rows.view(len(records), size, *rows.shape[2:]))
    return records


def token_bias(
    queries: Tensor, codec: Codec, layout: PageLayout, pool: Tensor, ids: Tensor, tokens: Tensor
) -> Tensor | None:
    """float32 [S, R, t]: q . c of queries [S, R, Dk] and the centre c of the page that each of tokens int64 [S, t] of
    pages ids [S, n] lies in; None: pages have no centres."""
    if not layout.centres:
        return None
    sides, (rotated, _) = codec.kernel_sides(), codec.read_query(queries.float())
    assert sides is not None
    held, first = layout.views(pool), 0
    bias = rotated.new_zeros(*rotated.shape[:2], ids.shape[1])
    for segment in sides[0].segments:
        name = centre_of(segment)
        if name is not None:
            centres = held[name][ids.long(), 0].float()  # [S, n, channels]
            bias += rotated[..., first : first + segment.channels] @ centres.mT
        first += segment.channels
    page = (tokens // layout.page_size)[:, None].expand(-1, rotated.shape[1], -1)
    return bias.gather(2, page)
