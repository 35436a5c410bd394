"""The kernels as operators of `torch.ops.kvcomp`, which torch.compile takes as they are and CUDA graphs record.

Nothing here looks into a tensor: what is launched follows from shapes alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kvcomp.attention import HIDDEN
from kvcomp.operators import operator

from . import attention, chunks, decode, merge, tiling
from .launching import Launch
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
    layout: tiling.Description, record_bytes: int, tokens: Exact, tokens_tile: int, rows: int, exact: bool
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


def warps_of(layout: tiling.Description, rows: int) -> int:
    """Of a program of so many rows."""
    if layout.by_rows:  # which more threads than tokens would unpack several times
        return max(rows // chunks.NARROWEST, 1)
    if rows > chunks.NARROWEST:
        return 8
    if layout.k_dim > chunks.WIDEST:
        return 4
    if len(layout.k) > 1:  # with one, 24 bytes spill on sm_100
        return 2
    return 1 if any(chunk.block < SHARED for chunk in layout.v) else 2


def registers_of(layout: tiling.Description, warps: int, exact: bool = False) -> int:
    """Of a thread, at most: as few as spill nothing on any chip, for more programs have room then."""
    both = (*layout.k, *layout.v)
    kinds = {chunk.kind for chunk in both}
    wide = chunks.NUMBERS in kinds or any(chunk.scale_format == "e8m0" for chunk in both)
    if exact or warps != 2 or layout.crowded or wide:
        return ALL_REGISTERS
    return MORE_REGISTERS if kinds & {chunks.FLOATS, chunks.CODEBOOK} else REGISTERS


def programs_of(layout: tiling.Description) -> int:
    """That a processor runs at once, of `chunks.NARROWEST` rows: one wave of them is launched."""
    warps = warps_of(layout, chunks.NARROWEST)
    each = -(-registers_of(layout, warps) // 8) * 8 * 32 * warps
    return min((1 << 16) // each, MOST_PROGRAMS)


def workspace_size(streams: int, rows: int, splits: int, v_dim: int) -> int:
    """Float32 numbers that `attend_pages` keeps between its two kernels; the exact tokens count as a split."""
    return streams * rows * splits * (v_dim + 1)


class Launches(NamedTuple):
    """What `attend_pages` launches. block: rows of a program; tiles: of a page, where their lse are kept."""

    attend: Launch
    merge: Launch
    block: int
    tiles: int


@lru_cache(4096)
def _launches(
    record_bytes: int,
    description: str,
    window: tuple[int, int, torch.dtype] | None,
    k_dim: int,
    v_dim: int,
    rows: int,
    exact: bool,
    separate: bool,
    prior: bool,
    bias: bool,
    token_bias: bool,
    skipped: bool,
    softcap: bool,
    lse_of_pages: bool,
    in_tokens: bool,
) -> Launches:
    """For pages of a description ("": there are none), and exact tokens of (channels of keys, of values, dtype)."""
    layout = tiling.parsed(description) if description else tiling.Description((), (), 0, tiling.TILE)
    block = blocked(rows, layout.centred, k_dim)
    tokens: Exact = (), ()
    tile = chunks.NARROWEST
    if window is not None:
        tokens = chunks.numbers(window[0], window[2]), chunks.numbers(window[1], window[2])
        tile = tokens_tile(window[0] * window[2].itemsize)
    if lse_of_pages:
        layout = tiling.within_pages(layout)
    constants = attention_constants(layout, record_bytes, tokens, tile, block, exact)
    constants |= {"BIAS": bias, "TOKEN_BIAS": token_bias, "SKIPPED": skipped, "SOFTCAP": softcap}
    constants |= {"LSE_OF_TILES": lse_of_pages, "IN_TOKENS": in_tokens}
    merged = {"PAGE": layout.page_size, "IN_TOKENS": in_tokens, "TOKENS": window is not None, "PRIOR": prior}
    widest = v_dim if window is None else window[1]
    merged |= {"SEPARATE": separate, "SPLITS": SPLITS, "BLOCK": triton.next_power_of_2(v_dim)}
    merged |= {"OTHER": triton.next_power_of_2(widest), "num_warps": MERGE_WARPS}
    tiles = layout.page_size // layout.tile if lse_of_pages else 0
    return Launches(Launch(attention.attend_kernel, constants), Launch(merge.merge_kernel, merged), block, tiles)


def _results(
    queries: Tensor, ids: Tensor | None, values: Tensor | None, description: str, lse_of_pages: bool, separate: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Memory for what `attend_pages` returns."""
    streams, rows, _ = queries.shape
    v_dim = tiling.parsed(description).v_dim if description or values is None else values.shape[2]
    pages = ids.shape[1] if lse_of_pages and ids is not None else 0
    out = torch.empty((streams, rows, v_dim), dtype=torch.float32, device=queries.device)
    lse = torch.empty((streams, rows), dtype=torch.float32, device=queries.device)
    if not (pages or separate):  # one for what there is none of costs less than three
        nothing = torch.empty((0,), dtype=torch.float32, device=queries.device)
        return out, lse, nothing, torch.empty_like(nothing), torch.empty_like(nothing)
    other = values.shape[2] if values is not None and separate else 0
    groups = torch.empty((streams, rows, pages), dtype=torch.float32, device=queries.device)
    return out, lse, groups, out.new_empty(streams, rows, other), torch.empty_like(lse)


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
    token_queries: Tensor | None = None,
    separate: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out [S, R, Dv], lse [S, R] and the lse of each page [S, R, n], all float32, of attention over pages (pool uint8
    [pages, bytes], ids [S, n], counts [S]), exact tokens (keys [S, N, Dk], values [S, N, Dv], token_counts [S]) and
    what came before (prior).

    queries [S, R, Dk], bias float32 [S, R], token_bias float32 [S, R, n * P]; description: of `tiling.Description`;
    k_codebook, v_codebook: as of `chunks.codebooks`; split_pages: pages that a split can hold; workspace: float32
    `workspace_size`; softcap 0: none; in_tokens: counts are of tokens; skipped int [S]:
    tokens at the start of a stream's first page that are not seen. What was not asked for is empty.

    token_queries [S, R, Dk']: of the exact tokens; None: `queries` are. separate: out is of pages alone; then come the
    attention over exact tokens times their share [S, R, Dv'], and the share of pages [S, R].
    """
    streams, rows, k_dim = queries.shape
    out, lse, groups, other, share = _results(queries, ids, values, description, lse_of_pages, separate)
    v_dim = wide = out.shape[2]
    pages = ids.shape[1] if ids is not None else 0
    shape = (pool.stride(0), description) if pages and pool is not None else (0, "")
    window = None
    strides = 0, 0
    if keys is not None and values is not None:
        window = keys.shape[2], values.shape[2], keys.dtype
        wide = max(wide, values.shape[2])
        strides = keys.stride(0) * keys.itemsize, values.stride(0) * values.itemsize
    flags = bias is not None, token_bias is not None, skipped is not None, softcap > 0, lse_of_pages, in_tokens
    how = _launches(*shape, window, k_dim, v_dim, rows, exact, separate, prior_out is not None, *flags)
    splits = -(-pages // split_pages) + (window is not None)
    tiles = pages * how.tiles
    lse_of_tiles = lse  # where nobody writes them
    if lse_of_pages:
        lse_of_tiles = queries.new_full((streams, rows, tiles), -torch.inf, dtype=torch.float32)
    needed = workspace_size(streams, rows, splits, wide)
    if workspace is None:
        workspace = torch.empty(needed, device=queries.device, dtype=torch.float32)
    if workspace.numel() < needed:
        raise ValueError(f"workspace has {workspace.numel()} numbers, and {needed} are needed: see workspace_size")
    partial_lse = workspace[streams * rows * splits * wide :]
    idle = queries  # stands for pointers that are not used
    how.attend(
        (streams * -(-rows // how.block), splits),
        queries.device,
        queries,
        *(idle if x is None else x for x in (token_queries, bias, token_bias, skipped, pool, ids, counts)),
        *(idle if x is None else x for x in (k_codebook, v_codebook, keys, values, token_counts)),
        *(workspace, partial_lse, lse_of_tiles, rows, k_dim, k_dim if window is None else window[0], wide),
        *(0 if ids is None else ids.stride(0), *strides, 0 if token_bias is None else token_bias.shape[2]),
        *(tiles, split_pages, scale, softcap),
    )
    how.merge(
        (streams * rows,),
        queries.device,
        *(workspace, partial_lse),
        *(idle if x is None else x for x in (prior_out, prior_lse, counts)),
        *(out, lse, other if separate else out, share if separate else lse),
        *(splits, split_pages, rows, wide, v_dim, wide if window is None else window[1]),
    )
    if lse_of_pages and pages:
        groups = lse_of_tiles.unflatten(-1, (pages, -1)).logsumexp(-1)
    return out, lse, groups, other, share


def _decoded(pool: Tensor, ids: Tensor, description: str, count: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Memory for what `decode_pages` returns."""
    layout = tiling.parsed(description)
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
    layout = tiling.within_pages(tiling.parsed(description))
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
