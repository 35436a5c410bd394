"""What a selector computes before attention: estimates, shares, the largest, and pages of single tokens."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kvcomp.layout import PageLayout, Summary
from kvcomp.segments import centres

from . import backends
from .backends import door
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


shares, choose, largest = door(reference.shares), door(reference.choose), door(reference.largest)


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
    pages, channels = tokens // layout.page_size, centres(sides[0])
    each = few_centres(ids.shape[1], tokens.shape[1])  # of each token, rather than of all pages
    ids = ids.gather(1, pages) if each else ids
    bias = rotated.new_zeros(*rotated.shape[:2], ids.shape[1])
    for field in layout.centres:
        held = layout.view(pool, field)[ids.long(), 0].float()  # [S, n, channels]
        bias += rotated[..., channels[field.name]] @ held.mT
    return bias if each else bias.gather(2, pages[:, None].expand(-1, rotated.shape[1], -1))


def few_centres(pages: int, tokens: int) -> bool:
    """Whether `token_bias` reads a centre for each of the tokens chosen, rather than those of all pages."""
    return tokens < pages
