"""The Triton kernels: attention over compressed pages and scores of pages on GPUs.

`attend` and `scores` take what the reference takes; all else of this package needs triton, and is imported only then.
With TRITON_INTERPRET=1 set before triton is first imported, tensors on the host are served, too, slowly: for tests.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvcomp.attention import Part
from kvcomp.exact import Tokens
from kvcomp.kernel_layout import SideLayout, Sides
from kvcomp.pages import PageLayout

from . import chunks, ops
from .chunks import NOTHING
from .plan import MOST_ROWS, processors, split_pages


class Prepared(NamedTuple):
    """What kernels are told of pages besides the pages, for one device.

    description: see `chunks`. k_book, v_book: the entries of all codebooks, in the dtypes of the kernel's products:
    float32 (tf32 in three terms) where `exact`, else 16 bits, summed in float32.
    """

    layout: PageLayout
    sides: Sides
    exact: bool
    description: str
    k_book: Tensor
    v_book: Tensor
    processors: int


_PREPARED: WeakKeyDictionary[SideLayout, dict[tuple[bool, torch.device], Prepared]] = WeakKeyDictionary()


def prepared(sides: Sides, layout: PageLayout, exact: bool, device: torch.device) -> Prepared:
    """What kernels are told of pages of this layout whose K and V are to be read as `sides` say; made once."""
    of_side = _PREPARED.setdefault(sides[1], {})
    known = of_side.get((exact, device))
    if known is None or known.layout is not layout or known.sides != sides:
        dtypes = (torch.float32, torch.float32) if exact else (torch.float16, torch.bfloat16)
        k_book, v_book = (chunks.books(side, dtype, device) for side, dtype in zip(sides, dtypes, strict=True))
        text = str(chunks.described(sides, layout))
        known = Prepared(layout, sides, exact, text, k_book, v_book, processors(device))
        of_side[exact, device] = known
    return known


class Pages(NamedTuple):
    """Pages of a pool uint8 [pages, bytes_per_page]: of ids [S, n] a stream's first counts [S]."""

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
) -> Part:
    """Attention of queries [S, R, Dk] over pages, exact tokens and what `prior` attended to; pages or tokens at least.

    All are in the coordinates of the queries, and so is the output. bias [S, R] as in `attention.attend`, for pages.
    The groups are the lse of each page, as in the reference, where asked for.

    Without pages, products are exact where queries are float32. pages_of_split: by default as `plan.split_pages` says.
    workspace: float32 [`ops.workspace_size`] or more, to be used again; None: allocated.
    """
    pool = ids = counts = k_book = v_book = None
    exact, description, each = queries.dtype == torch.float32, "", 1
    if pages is not None:
        pool, ids, counts, how = pages
        exact, description, k_book, v_book = how.exact, how.description, how.k_book, how.v_book
        assert pool.dtype == torch.uint8
        assert pool.shape[1] == how.layout.bytes_per_page
        assert pool.is_contiguous()
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
    )
    return Part(out, lse, groups if lse_of_pages else None)


def scores(
    queries: Tensor,
    pool: Tensor,
    ids: Tensor,
    counts: Tensor,
    layout: PageLayout,
    high: str,
    low: str | None = None,
    scale: str | None = None,
) -> Tensor:
    """float32 [S, R, n]: what pages promise queries [S, R, D], unscaled; -inf behind a stream's counts [S].

    With the fields `low` and `high` of a page's minima and maxima the bound sum_d max(q_d low_d, q_d high_d); with the
    field `high` of its mean key alone, q . mean. Fields are float16, or int8 with the field `scale` of the float16
    scales that runs of channels share. R is at most `plan.MOST_ROWS`.
    """
    assert pool.is_contiguous()
    assert queries.shape[1] <= MOST_ROWS
    ids = ids if ids.stride(1) == 1 else ids.contiguous()
    shapes = {f.name: f.shape for f in layout.fields}
    offsets = [NOTHING if name is None else layout.offsets[name] for name in (low, high, scale)]
    run = 1 if scale is None else shapes[high][-1] // shapes[scale][-1]
    exact = queries.dtype == torch.float32
    return ops.page_scores(queries.contiguous(), pool, ids, counts, *offsets, run, exact)
