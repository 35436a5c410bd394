"""The Triton kernels: pages written, whole or token by token, scored and attended to on GPUs.

The functions take what their specifications take; all else of this package needs triton, and is imported only then.
With TRITON_INTERPRET=1 set before triton is first imported, tensors on the host are served, too, slowly: for tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from kvcomp.attention import Part, Tokens
from kvcomp.errors import KvcompError
from kvcomp.kernels.placed import NOTHING
from kvcomp.layout import PageLayout
from kvcomp.segments import KVLayout, alone, memo

from . import chunks, ops, ops_records, ops_rotate, ops_scores, pieces, tiling
from .memory import floats, integers, pages_of, records, rows_of
from .plan import PROGRAMS, processors, split_pages


class Prepared(NamedTuple):
    """What kernels get to know of pages besides the pages, for one device.

    description: see `tiling`. k_codebook, v_codebook: the entries of all codebooks, in the dtypes of its products:
    float32 (tf32 in three terms) where `exact`, else 16 bits, summed in float32. body_bytes: what is read of a page.
    v_dim: channels of values. programs: of few rows, that a processor runs at once. several: whether keys are more than
    one chunk.
    """

    layout: PageLayout
    exact: bool
    description: str
    k_codebook: Tensor
    v_codebook: Tensor
    processors: int
    body_bytes: int
    v_dim: int
    programs: int
    several: bool


def prepared(sides: KVLayout, layout: PageLayout, exact: bool, device: torch.device) -> Prepared:
    """What kernels get to know of pages of this layout whose K and V are to be read as `sides` say; made once."""
    known, key = memo(sides), (Prepared, layout, exact, device)
    found: Prepared | None = known.get(key)
    if found is None:
        dtypes = (torch.float32, torch.float32) if exact else (torch.float16, torch.bfloat16)
        k_codebook, v_codebook = (
            chunks.codebooks(side, dtype, device) for side, dtype in zip(sides, dtypes, strict=True)
        )
        described = tiling.described(sides, layout)
        sizes = processors(device), layout.body_bytes, described.v_dim, ops.programs_of(described), len(described.k) > 1
        found = known.setdefault(key, Prepared(layout, exact, str(described), k_codebook, v_codebook, *sizes))
    return found


class Written(NamedTuple):
    """What kernels get to know of pages they write, on one device: description and thresholds, see `pieces`; inputs:
    numbers of a token of K and of V; alone: as `segments.alone`."""

    layout: PageLayout
    alone: bool
    inputs: tuple[int, int]
    description: str
    k_thresholds: Tensor
    v_thresholds: Tensor


def written(sides: KVLayout, layout: PageLayout, device: torch.device, single: bool = False) -> Written:
    """What kernels get to know of pages of this layout whose K and V are written as `sides` say, or of their single
    tokens; made once."""
    known, key = memo(sides), (Written, layout, device, single)
    found: Written | None = known.get(key)
    if found is None:
        text, inputs = str(pieces.described(sides, layout, single)), (sides[0].inputs, sides[1].inputs)
        found = known.setdefault(key, Written(layout, alone(sides), inputs, text, *pieces.thresholds(sides, device)))
    return found


def write_obstacle(sides: KVLayout) -> str | None:
    """Why the kernels cannot write pages; None: they can."""
    return pieces.obstacle(sides)


def write(pool: Tensor, ids: Tensor, keys: Tensor, values: Tensor, how: Written, rows: Tensor | None = None) -> None:
    """Encode keys [M, P, Dk] and values [M, P, Dv], as `Codec.kernel_input` gives them, into the pages ids [M] of a
    pool uint8 [pages, bytes_per_page or more]; below 0: into none. Summaries stay as they are.

    rows int64 [M]: keys [M, 1, Dk] and values [M, 1, Dv] are single tokens, written where these tokens of a page lie,
    of a layout that is `tokenwise`; `how` is for such, too. What is stored without a grid must come in the dtype of its
    field.
    """
    layout, on = how.layout, pool.device
    records(pool, layout.bytes_per_page)
    if rows is not None and not (layout.tokenwise and how.alone):
        raise KvcompError("single tokens cannot be written into pages whose tokens share scales or a centre")
    tokens = layout.page_size if rows is None else 1
    ids = integers("ids", ids.to(on), on, 1)
    rows = None if rows is None else integers("rows", rows, on, (len(ids),)).to(torch.int64)
    x = (
        floats(name, x, on, (len(ids), tokens, dim))
        for name, x, dim in zip(("keys", "values"), (keys, values), how.inputs, strict=True)
    )
    ops_records.write_pages(pool, ids.to(torch.int64), *x, how.k_thresholds, how.v_thresholds, how.description, rows)


class Pages(NamedTuple):
    """Pages of a pool uint8 [pages, body_bytes or more]: of ids [S, n] a stream's first counts [S]."""

    pool: Tensor
    ids: Tensor
    counts: Tensor
    prepared: Prepared


def obstacle(sides: KVLayout) -> str | None:
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
    token_bias: Tensor | None = None,
    skipped: Tensor | None = None,
    token_queries: Tensor | None = None,
    back: Tensor | None = None,
) -> Part:
    """Attention of queries [S, R, Dk] over pages, exact tokens and what `prior` attended to; pages or tokens at least.

    All are in the coordinates of the queries, and so is the output. bias [S, R] and token_bias [S, R, n * P] as in
    `attention.attend`, for pages; skipped int [S]: tokens at the start of a stream's first page that are not seen.
    The groups are the lse of each page, as in the reference, where asked for.

    What is launched follows from shapes: ids may be wider than any count, for counts that change on the device, as in a
    CUDA graph, which needs those of tokens there, too; programs share evenly what a stream has, and those without a
    share end at once. Without pages, products are exact where queries are float32.

    pages_of_split: at most; by default as `plan.split_pages` says. workspace: float32 [`ops.workspace_size`] or more,
    to be used again; None: allocated. in_tokens: counts are of tokens, and the last page may be filled in part.

    token_queries: those of exact tokens, where queries are in the basis of the pages; back [Dv', Dv] or [n, Dv', Dv]:
    what maps values of the pages back, as in `Basis.inverse`; None: both have the same coordinates.
    """
    pool = ids = counts = k_codebook = v_codebook = None
    if scale < 0:  # kernels look for the largest product
        scale, queries = -scale, -queries
        bias, token_bias, token_queries = (None if x is None else -x for x in (bias, token_bias, token_queries))
    on = queries.device
    queries = floats("queries", queries, on, 3)
    streams, rows, k_dim = queries.shape
    exact, description, each, v_dim = queries.dtype == torch.float32, "", 1, None
    if pages is not None:
        pool, ids, counts, how = pages
        exact, description, k_codebook, v_codebook = how.exact, how.description, how.k_codebook, how.v_codebook
        if pool.device != on:
            raise KvcompError(f"pool lies on {pool.device}, and queries on {on}")
        records(pool, how.body_bytes)
        ids, counts = integers("ids", ids, on, 2), integers("counts", counts, on, (streams,)).contiguous()
        if len(ids) != streams:
            raise KvcompError(f"ids are of {len(ids)} streams, and queries of {streams}")
        sizes = ids.shape[1], how.layout.page_size, how.processors, k_dim
        programs = how.programs if rows <= chunks.NARROWEST else PROGRAMS
        each = pages_of_split or split_pages(streams, rows, *sizes, programs)
        v_dim = how.v_dim
    keys = values = held = None
    if tokens is not None:
        n = tokens.keys.shape[1]
        v_dim = tokens.values.shape[2] if v_dim is None else v_dim
        dims = (k_dim, v_dim) if token_queries is None else (token_queries.shape[2], tokens.values.shape[2])
        keys, values = (
            rows_of(name, x, on, (streams, n, dim))
            for name, x, dim in zip(("keys", "values"), tokens, dims, strict=False)
        )
        held = integers("counts of tokens", tokens.counts.to(on, non_blocking=True), on, (streams,)).contiguous()
    bias = None if bias is None else floats("bias", bias, on, (streams, rows), exact=True)
    if token_bias is not None and pages is not None:
        every = (streams, rows, pages.ids.shape[1] * pages.prepared.layout.page_size)
        token_bias = floats("bias of tokens", token_bias, on, every, exact=True)
    if skipped is not None:
        skipped = integers("skipped", skipped, on, (streams,)).contiguous()
    prior_out = prior_lse = None
    if prior is not None and v_dim is not None:
        prior_out = floats("out of prior", prior.out, on, (streams, rows, v_dim), exact=True)
        prior_lse = floats("lse of prior", prior.lse, on, (streams, rows), exact=True)
    separate = tokens is not None and back is not None
    if token_queries is not None:
        token_queries = floats("queries of tokens", token_queries, on, 3)
    paged = pool, ids, counts, k_codebook, v_codebook
    options = description, each, scale, softcap or 0.0, lse_of_pages, exact, in_tokens, token_bias, skipped
    out, lse, groups, other, share = ops.attend_pages(
        queries, bias, *paged, keys, values, held, prior_out, prior_lse, workspace, *options, token_queries, separate
    )
    if back is not None:
        out = ops_rotate.rotate(out, back, None, True, *((other, share) if separate else (None, None)))[0]
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
    after a stream's counts [S].

    Pages ids [S, n] of a pool uint8 [pages, bytes_per_page]. Fields are float16, or int8 where the layout has the field
    `scale` of the float16 numbers that runs of channels share. R is at most `plan.MOST_ROWS`.
    """
    shapes = {f.name: f.shape for f in layout.fields}
    *each, dim = shapes[next(iter(queries))]
    streams, rows, _ = next(iter(queries.values())).shape
    ids, counts = pages_of(pool, ids, counts, layout, streams, rows)
    coded = scale is not None and scale in shapes
    at, run = (layout.offsets[scale], dim // shapes[scale][-1]) if scale is not None and coded else (NOTHING, 1)
    stacked = torch.stack(
        [floats("queries", q, pool.device, (streams, rows, dim), exact=True) for q in queries.values()]
    )
    fields = [layout.offsets[name] for name in queries]
    dots: Tensor = ops_scores.vector_dots(stacked, pool, ids, counts, fields, prod(each), at, run)
    return dots


def code_dots(
    queries: Tensor, pool: Tensor, ids: Tensor, counts: Tensor, layout: PageLayout, field: str, bits: int
) -> Tensor:
    """float32 [S, J, n * P]: queries [S, J, r] times the codes uint8 [r * bits / 8, P] of each token in a `field`, as
    `select.code_dots`; 0 after a stream's counts [S].

    Pages ids [S, n] of a pool uint8 [pages, bytes_per_page]. J is at most `plan.MOST_ROWS`.
    """
    codes = next(f.shape[0] for f in layout.fields if f.name == field)
    x = floats("queries", queries, pool.device, (*queries.shape[:2], codes * 8 // bits), exact=True)
    ids, counts = pages_of(pool, ids, counts, layout, *x.shape[:2])
    dots: Tensor = ops_scores.code_dots(x, pool, ids, counts, layout.offsets[field], bits, layout.page_size)
    return dots


def regroup(layout: PageLayout, pool: Tensor, ids: Tensor, tokens: Tensor) -> Tensor:
    """As `select.regroup`."""
    tokens = integers("tokens", tokens, pool.device, 2).to(torch.int64)
    if tokens.shape[1] % layout.page_size:
        raise KvcompError(f"{tokens.shape[1]} tokens of a stream do not fill pages of {layout.page_size}")
    ids, _ = pages_of(pool, ids, None, layout, len(tokens))
    fields, size, _, body = ops_records.regrouped(layout)
    flat = [x for field in fields for x in field]
    records: Tensor = ops_records.regroup(pool, ids, tokens.contiguous(), flat, size, pool.shape[1], body)
    return records


def attention_received(
    queries: Tensor,
    keys: Tensor,
    scale: float,
    visible: Tensor | None = None,
    softcap: float | None = None,
    most: bool = False,
) -> Tensor:
    """float32 [B, Hq, n]: attention weights of the last w queries [B, Hq, w, D] over keys [B, Hkv, n, D], summed over
    the queries, or the `most` of any; causal; visible bool [B, Hkv, n] hides keys. A query that sees none gives 0."""
    visible = None if visible is None else visible.contiguous()
    on = processors(queries.device)
    votes: Tensor = ops_scores.attention_received(*_alike(queries, keys), visible, scale, softcap or 0.0, most, on)
    return votes


def _alike(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Both contiguous, and of one dtype."""
    batch, heads, _, dim = keys.shape
    exact = queries.dtype != keys.dtype
    if queries.dim() != 4 or queries.shape[1] % heads:
        raise KvcompError(f"queries {list(queries.shape)} are of no groups of the heads of keys {list(keys.shape)}")
    q = floats("queries", queries, keys.device, (batch, *queries.shape[1:3], dim), exact)
    return q, floats("keys", keys, keys.device, 4, exact)
