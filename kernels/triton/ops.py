"""The kernels as operators of `torch.ops.kvcomp`, which torch.compile takes as they are and CUDA graphs record.

Nothing here looks into a tensor: what is launched follows from shapes alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from kvcomp.attention import HIDDEN
from kvcomp.operators import operator

from . import attention, chunks, decode, merge
from .plan import MOST_PROGRAMS, blocked, tokens_tile

SPLITS = 16  # that a program merges at once
STAGES = 3
MERGE_WARPS = DECODE_WARPS = 4
SHARED = 32  # columns of values that two warps share; fewer would be computed by both
ALL_REGISTERS = 255  # of a thread
REGISTERS = 168  # where programs have 2 warps: 12 fit a processor
MORE_REGISTERS = 200  # where tiles would spill then: for 10


Exact = tuple[chunks.Chunks, chunks.Chunks]  # keys and values that are no pages


def attention_constants(
    layout: chunks.Description, record_bytes: int, tokens: Exact, tokens_tile: int, rows: int, exact: bool
) -> dict[str, Any]:
    """What a kernel of `attention` is compiled for, and how. record_bytes: from a page of the pool to the next; rows:
    of a program; `exact` takes the most room."""
    warps = warps_of(layout, rows)
    return {
        "K": layout.k,
        "V": layout.v,
        "TOKENS_K": tokens[0],
        "TOKENS_V": tokens[1],
        "PAGE": layout.page_size,
        "BYTES": record_bytes,
        "TILE": layout.tile,
        "TOKENS_TILE": tokens_tile,
        "ROWS": rows,
        "EXACT": exact,
        "num_warps": warps,
        "num_stages": STAGES,
        "maxnreg": registers_of(layout, warps, exact),
    }


def warps_of(layout: chunks.Description, rows: int) -> int:
    """Of a program of so many rows."""
    if rows > chunks.NARROWEST:
        return 8
    if layout.k_dim > chunks.WIDEST:
        return 4
    if len(layout.k) > 1:  # with one, 24 bytes spill on sm_100
        return 2
    return 1 if any(chunk.block < SHARED for chunk in layout.v) else 2


def registers_of(layout: chunks.Description, warps: int, exact: bool = False) -> int:
    """Of a thread, at most: as few as spill nothing on any chip, for more programs have room then."""
    both = (*layout.k, *layout.v)
    kinds = {chunk.kind for chunk in both}
    wide = chunks.NUMBERS in kinds or any(chunk.scale_format == "e8m0" for chunk in both)
    if exact or warps != 2 or layout.crowded or wide:
        return ALL_REGISTERS
    return MORE_REGISTERS if kinds & {chunks.FLOATS, chunks.CODEBOOK} else REGISTERS


def programs_of(layout: chunks.Description) -> int:
    """That a processor runs at once, of `chunks.NARROWEST` rows: one wave of them is launched."""
    warps = warps_of(layout, chunks.NARROWEST)
    each = -(-registers_of(layout, warps) // 8) * 8 * 32 * warps
    return min((1 << 16) // each, MOST_PROGRAMS)


def workspace_size(streams: int, rows: int, splits: int, v_dim: int) -> int:
    """Float32 numbers that `attend_pages` keeps between its two kernels; the exact tokens count as a split."""
    return streams * rows * splits * (v_dim + 1)


def _results(
    queries: Tensor, ids: Tensor | None, values: Tensor | None, description: str, lse_of_pages: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for what `attend_pages` returns."""
    streams, rows, _ = queries.shape
    v_dim = values.shape[2] if values is not None else chunks.parsed(description).v_dim
    pages = ids.shape[1] if lse_of_pages and ids is not None else 0
    shapes = (streams, rows, v_dim), (streams, rows), (streams, rows, pages)
    out, lse, groups = (torch.empty(shape, dtype=torch.float32, device=queries.device) for shape in shapes)
    return out, lse, groups


@operator("attend_pages", _results, mutates=("workspace",))
def attend_pages(
    queries: Tensor,
    bias: Tensor | None,
    pool: Tensor | None,
    ids: Tensor | None,
    counts: Tensor | None,
    k_codebook: Tensor | None,
    v_codebook: Tensor | None,
    keys: Tensor | None,
    values: Tensor | None,
    token_counts: Tensor | None,
    prior_out: Tensor | None,
    prior_lse: Tensor | None,
    workspace: Tensor | None,
    description: str,
    split_pages: int,
    scale: float,
    softcap: float,
    lse_of_pages: bool,
    exact: bool,
    in_tokens: bool = False,
    token_bias: Tensor | None = None,
    skipped: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [S, R, Dv], lse [S, R] and the lse of each page [S, R, n], all float32, of attention over pages (pool uint8
    [pages, bytes], ids [S, n], counts [S]), exact tokens (keys [S, N, Dk], values [S, N, Dv], token_counts [S]) and
    what came before (prior).

    queries [S, R, Dk], bias float32 [S, R], token_bias float32 [S, R, n * P]; description: of `chunks.Description`;
    k_codebook, v_codebook: as of `chunks.codebooks`; split_pages: pages that a split can hold; workspace: float32
    `workspace_size`; softcap 0: none; n is 0 unless `lse_of_pages`; in_tokens: counts are of tokens; skipped int [S]:
    tokens at the start of a stream's first page that are not seen.
    """
    streams, rows, k_dim = queries.shape
    out, lse, groups = _results(queries, ids, values, description, lse_of_pages)
    v_dim = out.shape[2]
    layout, pages, splits = chunks.Description((), (), 0, chunks.TILE), 0, 0
    if ids is not None and ids.shape[1]:
        layout, pages = chunks.parsed(description), ids.shape[1]
        splits = triton.cdiv(pages, split_pages)
    block = blocked(rows, layout.centred, k_dim)
    tokens: Exact = (), ()
    strides, window = [0, 0], chunks.NARROWEST
    if keys is not None and values is not None:
        tokens = chunks.numbers(keys.shape[2], keys.dtype), chunks.numbers(values.shape[2], values.dtype)
        window = tokens_tile(keys.shape[2] * keys.itemsize)
        keys, values = keys.view(torch.uint8), values.view(torch.uint8)
        strides, splits = [keys.stride(0), values.stride(0)], splits + 1
    tiles = 0
    if lse_of_pages:
        layout = chunks.within_pages(layout)
        tiles = pages * (layout.page_size // layout.tile)
    lse_of_tiles = queries.new_full((streams, rows, tiles), -torch.inf, dtype=torch.float32)
    needed = workspace_size(streams, rows, splits, v_dim)
    if workspace is None:
        workspace = torch.empty(needed, device=queries.device, dtype=torch.float32)
    if workspace.numel() < needed:
        raise ValueError(f"workspace has {workspace.numel()} numbers, and {needed} are needed: see workspace_size")
    partial_lse = workspace[streams * rows * splits * v_dim :]
    idle = queries  # stands for pointers that are not used
    with torch.cuda.device_of(queries):
        attention.attend_kernel[(streams * triton.cdiv(rows, block), splits)](
            queries,
            *(idle if x is None else x for x in (bias, token_bias, skipped, pool, ids, counts, k_codebook, v_codebook)),
            *(idle if x is None else x for x in (keys, values, token_counts)),
            *(workspace, partial_lse, lse_of_tiles, rows, k_dim, v_dim),
            *(0 if ids is None else ids.stride(0), *strides, 0 if token_bias is None else token_bias.shape[2]),
            *(tiles, split_pages, scale, softcap),
            **attention_constants(layout, 0 if pool is None else pool.stride(0), tokens, window, block, exact),
            BIAS=bias is not None,
            TOKEN_BIAS=token_bias is not None,
            SKIPPED=skipped is not None,
            SOFTCAP=softcap > 0,
            LSE_OF_TILES=lse_of_pages,
            IN_TOKENS=in_tokens,
        )
        merge.merge_kernel[(streams * rows,)](
            *(workspace, partial_lse),
            *(idle if x is None else x for x in (prior_out, prior_lse, counts)),
            *(out, lse, splits, split_pages, rows, v_dim),
            PAGE=layout.page_size,
            IN_TOKENS=in_tokens,
            TOKENS=keys is not None,
            PRIOR=prior_out is not None,
            SPLITS=SPLITS,
            BLOCK=triton.next_power_of_2(v_dim),
            num_warps=MERGE_WARPS,
        )
    if lse_of_pages and pages:
        groups = lse_of_tiles.unflatten(-1, (pages, -1)).logsumexp(-1)
    return out, lse, groups


def _decoded(pool: Tensor, ids: Tensor, description: str, count: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Memory for what `decode_pages` returns."""
    layout = chunks.parsed(description)
    shapes = (layout.k_dim,), (layout.v_dim,), ()
    k, v, hidden = (
        torch.empty((len(ids), count * layout.page_size, *shape), dtype=dtype, device=pool.device) for shape in shapes
    )
    return k, v, hidden


@operator("decode_pages", _decoded)
def decode_pages(
    pool: Tensor,
    ids: Tensor,
    counts: Tensor,
    k_codebook: Tensor,
    v_codebook: Tensor,
    description: str,
    first: int,
    count: int,
    in_tokens: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """keys [S, count * P, Dk], values [S, count * P, Dv] and what hides tokens [S, count * P], in `dtype`, of `count`
    pages from `first` on of ids [S, n]: see `decode.decode_kernel`. The others are as of `attend_pages`."""
    layout = chunks.within_pages(chunks.parsed(description))
    keys, values, hidden = _decoded(pool, ids, description, count, dtype)
    with torch.cuda.device_of(pool):
        decode.decode_kernel[(len(ids), count)](
            *(pool, ids, counts, k_codebook, v_codebook, keys, values, hidden),
            count,
            ids.stride(0),
            first,
            layout.k_dim,
            layout.v_dim,
            K=layout.k,
            V=layout.v,
            PAGE=layout.page_size,
            BYTES=pool.stride(0),
            TILE=layout.tile,
            IN_TOKENS=in_tokens,
            LOW=HIDDEN,
            num_warps=DECODE_WARPS,
        )
    return keys, values, hidden
