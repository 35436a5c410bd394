"""What a selector computes before attention: estimates, shares, the largest, and pages of single tokens."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kvcomp.layout import PageLayout, Summary
from kvcomp.segments import centres

from . import backends
from .contract import PageCodec
from .reference import select as reference
from .reference.select import by_unit, forced, scaled, vectors

__all__ = [
    "by_unit",
    "choose",
    "code_dots",
    "forced",
    "largest",
    "regroup",
    "scaled",
    "shares",
    "token_bias",
    "vector_dots",
    "vectors",
]


def vector_dots(
    queries: Tensor, summary: Mapping[str, Tensor], names: tuple[str, ...], scale: str | None = None
) -> Tensor:
    """[S, G, n * u] float32: queries [S, G, D] times the vectors of a field, u of each page.

    Of two fields the first is multiplied with what is negative in the queries, the second with the rest: their
    products with the least and the greatest of each channel add up to the most that any key between can give.

    Fields [S, n, D] or [S, n, u, D] are float16, or int8 codes of which each run of D / g shares a float16 number of
    the field `scale` [S, n, g] or [S, n, u, g].
    """
    if not isinstance(summary, Summary):
        return reference.vector_dots(queries, summary, names, scale)
    backend = backends.on("vector_dots", summary.pool.device, queries.shape[1])[0]
    return backend.vector_dots(queries, summary, names, scale)


def code_dots(queries: Tensor, summary: Mapping[str, Tensor], name: str, bits: int) -> Tensor:
    """[S, J, n * P] float32: queries [S, J, r] times the codes of every token, q . (c + 1/2 - 2^bits / 2).

    The field's codes are uint8 [S, n, rows, P]: with 8 bits, r rows of a channel each; with 4, r / 2 rows, of which row
    c has channel c in the low bits and channel r / 2 + c in the high ones.
    """
    if not isinstance(summary, Summary):
        return reference.code_dots(queries, summary, name, bits)
    backend = backends.on("code_dots", summary.pool.device, queries.shape[1])[0]
    return backend.code_dots(queries, summary, name, bits)


def shares(logits: Tensor, counts: Tensor) -> Tensor:
    """[S, n] float32: the softmax over the first counts [S] of logits [S, G, n], averaged over G; 0 for the others.

    A head counts 0 where it has none, or logits that are not finite. The logits may be overwritten.
    """
    return backends.on("shares", logits.device)[0].shares(logits, counts)


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
    backend = backends.on("choose", logits.device)[0]
    return backend.choose(logits, scale, counts, unit, wanted, width, pages, ends)


def largest(x: Tensor, wanted: Tensor, width: int) -> Tensor:
    """int64 [S, width]: where the wanted [S] <= width largest of x [S, n] are, ascending, and then n - 1."""
    return backends.on("largest", x.device)[0].largest(x, wanted, width)


def regroup(layout: PageLayout, pool: Tensor, ids: Tensor, tokens: Tensor) -> Tensor:
    """Pages made of single tokens, where the layout is `tokenwise`: records [S * m, body_bytes] uint8, with centres 0:
    attention over them needs the `token_bias`.

    ids [S, n]: pages of each stream; tokens [S, m * P]: which of their n * P tokens, in the order wanted. Nothing else
    of the pool is read.
    """
    records = backends.on("regroup", pool.device)[0].regroup(layout, pool, ids, tokens)
    for field in layout.centres:
        layout.view(records, field)[:] = 0
    return records


def token_bias(
    queries: Tensor, codec: PageCodec, layout: PageLayout, pool: Tensor, ids: Tensor, tokens: Tensor
) -> Tensor | None:
    """float32 [S, R, t]: q . c of queries [S, R, Dk] and the centre c of the page that each of tokens int64 [S, t] of
    pages ids [S, n] lies in; None: pages have no centres."""
    if not layout.centres:
        return None
    sides, (rotated, _) = codec.kernel_layouts(), codec.read_query(queries.float())
    assert sides is not None
    bias, channels = rotated.new_zeros(*rotated.shape[:2], ids.shape[1]), centres(sides[0])
    for field in layout.centres:
        held = layout.view(pool, field)[ids.long(), 0].float()  # [S, n, channels]
        bias += rotated[..., channels[field.name]] @ held.mT
    page = (tokens // layout.page_size)[:, None].expand(-1, rotated.shape[1], -1)
    return bias.gather(2, page)
