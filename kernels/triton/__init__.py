"""The Triton kernels: pages written, whole or token by token, scored and attended to on GPUs.

The functions take what their specifications take; all else of this package needs triton, and is imported only then.
With TRITON_INTERPRET=1 set before triton is first imported, tensors on the host are served, too, slowly: for tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvcomp.attention import Part
from kvcomp.exact import Tokens
from kvcomp.kernel_layout import SideLayout, Sides
from kvcomp.pages import ALIGN, PageLayout

from . import chunks, ops, ops_records, ops_scores, pieces
from .chunks import NOTHING
from .plan import MOST_ROWS, processors, split_pages


class Prepared(NamedTuple):
    """What kernels are told of pages besides the pages, for one device.

    description: see `chunks`. k_book, v_book: the entries of all codebooks, in the dtypes of the kernel's products:
    float32 (tf32 in three terms) where `exact`, else 16 bits, summed in float32. body_bytes: what is read of a page.
    """

    layout: PageLayout
    sides: Sides
    exact: bool
    description: str
    k_book: Tensor
    v_book: Tensor
    processors: int
    body_bytes: int


_PREPARED: WeakKeyDictionary[SideLayout, dict[tuple[bool, torch.device], Prepared]] = WeakKeyDictionary()


def prepared(sides: Sides, layout: PageLayout, exact: bool, device: torch.device) -> Prepared:
    """What kernels are told of pages of this layout whose K and V are to be read as `sides` say; made once."""
    of_side = _PREPARED.setdefault(sides[1], {})
    known = of_side.get((exact, device))
    if known is None or known.layout is not layout or known.sides != sides:
        dtypes = (torch.float32, torch.float32) if exact else (torch.float16, torch.bfloat16)
        k_book, v_book = (chunks.books(side, dtype, device) for side, dtype in zip(sides, dtypes, strict=True))
        text = str(chunks.described(sides, layout))
        known = Prepared(layout, sides, exact, text, k_book, v_book, processors(device), layout.body_bytes)
        of_side[exact, device] = known
    return known


class Written(NamedTuple):
    """What kernels are told of pages that they write, for one device: description and middles, see `pieces`."""

    layout: PageLayout
    sides: Sides
    description: str
    k_middles: Tensor
    v_middles: Tensor


_WRITTEN: WeakKeyDictionary[SideLayout, dict[tuple[torch.device, bool], Written]] = WeakKeyDictionary()


def written(sides: Sides, layout: PageLayout, device: torch.device, single: bool = False) -> Written:
    """What kernels are told of pages of this layout whose K and V are to be written as `sides` say, or of their single
    tokens; made once."""
    of_side = _WRITTEN.setdefault(sides[1], {})
    known = of_side.get((device, single))
    if known is None or known.layout is not layout or known.sides != sides:
        text = str(pieces.described(sides, layout, single))
        known = of_side[device, single] = Written(layout, sides, text, *pieces.middles(sides, device))
    return known


def write_obstacle(sides: Sides) -> str | None:
    """Why the kernels cannot write pages; None: they can."""
    return pieces.obstacle(sides)


def write(pool: Tensor, ids: Tensor, keys: Tensor, values: Tensor, how: Written, rows: Tensor | None = None) -> None:
    """Encode keys [M, P, Dk] and values [M, P, Dv], as `Codec.kernel_input` gives them, into the pages ids [M] of a
    pool uint8 [pages, bytes_per_page or more]; below 0: into none. Summaries stay as they are.

    rows int64 [M]: keys [M, 1, Dk] and values [M, 1, Dv] are single tokens, written where these tokens of a page lie,
    of a layout that is `tokenwise`; `how` is for such, too. What is stored without a grid must come in the dtype of its
    field.
    """
    layout = how.layout
    _check_records(pool, layout.bytes_per_page)
    assert rows is None or layout.tokenwise
    tokens = layout.page_size if rows is None else 1
    assert keys.shape == (len(ids), tokens, how.sides[0].inputs)
    assert values.shape == (len(ids), tokens, how.sides[1].inputs)
    x = keys.contiguous(), values.contiguous()
    ops_records.write_pages(pool, ids.to(pool.device), *x, how.k_middles, how.v_middles, how.description, rows)


def _check_records(pool: Tensor, least: int) -> None:
    """Records of `least` bytes and whatever comes behind, where kernels may read words."""
    assert pool.dtype == torch.uint8
    assert pool.shape[1] >= least
    assert pool.stride(1) == 1
    assert pool.stride(0) % ALIGN == 0


class Pages(NamedTuple):
    """Pages of a pool uint8 [pages, body_bytes or more]: of ids [S, n] a stream's first counts [S]."""

    pool: Tensor
    ids: Tensor
    counts: Tensor
    prepared: Prepared


def obstacle(sides: Sides) -> str | None:
    """Why the kernels cannot read pages; None: they can."""
    return chunks.obstacle(sides)


def attend(
    queries: Tensor,
    pages: Pages | None,
    tokens: Tokens | None,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    prior: Part | None = None,
    lse_of_pages: bool = False,
    pages_of_split: int | None = None,
    workspace: Tensor | None = None,
    in_tokens: bool = False,
) -> Part:
    """Attention of queries [S, R, Dk] over pages, exact tokens and what `prior` attended to; pages or tokens at least.

    All are in the coordinates of the queries, and so is the output. bias [S, R] as in `attention.attend`, for pages.
    The groups are the lse of each page, as in the reference, where asked for.

    What is launched follows from shapes: ids may be wider than any count, for counts that change on the device, as in a
    CUDA graph, which needs those of tokens there, too; programs share evenly what a stream has, and those without a
    share end at once. Without pages, products are exact where queries are float32.

    pages_of_split: at most; by default as `plan.split_pages` says. workspace: float32 [`ops.workspace_size`] or more,
    to be used again; None: allocated. in_tokens: counts are of tokens, and the last page may be filled in part.
    """
    pool = ids = counts = k_book = v_book = None
    exact, description, each = queries.dtype == torch.float32, "", 1
    if pages is not None:
        pool, ids, counts, how = pages
        exact, description, k_book, v_book = how.exact, how.description, how.k_book, how.v_book
        _check_records(pool, how.body_bytes)
        ids = ids if ids.stride(1) == 1 else ids.contiguous()
        each = pages_of_split or split_pages(
            queries.shape[0], queries.shape[1], ids.shape[1], how.layout.page_size, how.processors
        )
    keys = values = held = None
    if tokens is not None:
        keys, values = (x if x.stride(1) == x.shape[2] and x.stride(2) == 1 else x.contiguous() for x in tokens[:2])
        held = tokens.counts.to(queries.device, non_blocking=True)
    out, lse, groups = ops.attend_pages(
        queries.contiguous(),
        None if bias is None else bias.float().contiguous(),
        pool,
        ids,
        counts,
        k_book,
        v_book,
        keys,
        values,
        held,
        None if prior is None else prior.out.contiguous(),
        None if prior is None else prior.lse.contiguous(),
        workspace,
        description,
        each,
        scale,
        softcap or 0.0,
        lse_of_pages,
        exact,
        in_tokens,
    )
    return Part(out, lse, groups if lse_of_pages else None)


def vector_dots(
    queries: Mapping[str, Tensor],
    pool: Tensor,
    ids: Tensor,
    counts: Tensor,
    layout: PageLayout,
    scale: str | None = None,
) -> Tensor:
    """float32 [S, R, n * u]: the sum over fields of queries [S, R, D] times the field's vectors, u of each page; -inf
    behind a stream's counts [S].

    Pages ids [S, n] of a pool uint8 [pages, bytes_per_page]. Fields are float16, or int8 where the layout has the field
    `scale` of the float16 numbers that runs of channels share. R is at most `plan.MOST_ROWS`.
    """
    assert pool.is_contiguous()
    assert all(q.shape[1] <= MOST_ROWS for q in queries.values())
    ids = ids if ids.stride(1) == 1 else ids.contiguous()
    shapes = {f.name: f.shape for f in layout.fields}
    *each, dim = shapes[next(iter(queries))]
    coded = scale is not None and scale in shapes
    at, run = (layout.offsets[scale], dim // shapes[scale][-1]) if scale is not None and coded else (NOTHING, 1)
    stacked = torch.stack([q.float() for q in queries.values()])
    fields = [layout.offsets[name] for name in queries]
    return ops_scores.vector_dots(stacked, pool, ids, counts, fields, prod(each), at, run)


def code_dots(
    queries: Tensor, pool: Tensor, ids: Tensor, counts: Tensor, layout: PageLayout, field: str, bits: int
) -> Tensor:
    """float32 [S, J, n * P]: queries [S, J, r] times the codes uint8 [r * bits / 8, P] of each token in a `field`, as
    `select.code_dots`; 0 behind a stream's counts [S].

    Pages ids [S, n] of a pool uint8 [pages, bytes_per_page]. J is at most `plan.MOST_ROWS`.
    """
    assert pool.is_contiguous()
    assert queries.shape[1] <= MOST_ROWS
    ids = ids if ids.stride(1) == 1 else ids.contiguous()
    x = queries.float().contiguous()
    return ops_scores.code_dots(x, pool, ids, counts, layout.offsets[field], bits, layout.page_size)


def regroup(layout: PageLayout, pool: Tensor, ids: Tensor, tokens: Tensor) -> Tensor:
    """As `select.regroup`."""
    assert pool.is_contiguous()
    assert tokens.shape[1] % layout.page_size == 0
    ids = ids if ids.stride(1) == 1 else ids.contiguous()
    fields, size, _, body = ops_records.regrouped(layout)
    flat = [x for field in fields for x in field]
    return ops_records.regroup(pool, ids, tokens.contiguous(), flat, size, pool.shape[1], body)


def attention_received(queries: Tensor, keys: Tensor, scale: float, visible: Tensor | None = None) -> Tensor:
    """float32 [B, Hq, n]: attention weights of the last w queries [B, Hq, w, D] over keys [B, Hkv, n, D], summed over
    the queries; causal; visible bool [B, Hkv, n] hides keys. A query that sees none adds 0."""
    visible = None if visible is None else visible.contiguous()
    return ops_scores.attention_received(*_alike(queries, keys), visible, scale, 0.0, False, processors(queries.device))


def most_attention_received(queries: Tensor, keys: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """float32 [B, Hq, n]: as `attention_received` with all keys visible, but the maximum over the queries."""
    on = processors(queries.device)
    return ops_scores.attention_received(*_alike(queries, keys), None, scale, softcap or 0.0, True, on)


def _alike(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Both contiguous, and of one dtype."""
    if queries.dtype != keys.dtype:
        queries, keys = queries.float(), keys.float()
    return queries.contiguous(), keys.contiguous()
