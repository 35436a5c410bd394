"""Pages decoded to numbers of 16 bits, for attention of many queries by matrix products of K and V as they are.

  k[t] = code * s + z + c,  v[t] likewise: in the coordinates of the basis, as `attention` reads them

Grid: (stream, page). Moved: each listed page once, and its numbers, written once. Tokens that a stream does not hold
are written as 0, with `HIDDEN` to be added to their logits.
"""

# Triton reads these functions as a language of its own: without annotations, and with tuples that grow.
# mypy: disable-error-code="no-untyped-def, assignment, no-redef"

from __future__ import annotations

import triton
import triton.language as tl

from .merge import tokens_held
from .pairs import lane_row
from .units import of_columns, unit_channels, unit_numbers
from .unpack import (
    block_grid,
    block_numbers,
    channel_grid,
    chunk,
    float_grid,
    float_numbers,
    lane_codes,
    lane_numbers,
    tile_numbers,
    tile_packed,
    token_grid,
    visible,
)


@triton.jit
def lane_decoded(packed, base, first, token, seen, codebook, C: tl.constexpr, LANE: tl.constexpr):
    """Numbers float32 [T, columns] of a lane."""
    KIND: tl.constexpr = C.kind
    CODEBOOK: tl.constexpr = C.codebook
    if KIND == "block":
        scale, zero = block_grid(base, token, seen, C)
        x = block_numbers(packed, scale, zero, C, LANE)
    elif KIND == "floats":
        scale, factor = float_grid(base, token, seen, C)
        x = float_numbers(packed, scale, C, LANE) * factor[:, None]
    elif KIND == "channel":
        scale, zero = channel_grid(base, first, C, LANE)
        x = lane_numbers(packed, C, LANE, C.middle) * scale[None, :] + zero[None, :]
    else:
        scale, zero = token_grid(base, token, seen, C)
        if KIND == "codebook":
            x = tl.load(codebook + CODEBOOK + lane_codes(packed, C, LANE)).to(tl.float32)
        else:
            x = lane_numbers(packed, C, LANE, C.middle)
        x = x * scale[:, None] + zero[:, None]
    if C.centre >= 0:
        x += lane_row(base, C.centre, C, LANE).to(tl.float32)[None, :]
    return x


@triton.jit
def store_side(out, base, first, token, seen, codebook, dim, SIDE: tl.constexpr):
    """A tile of tokens of K or V; out: of the tile's first token."""
    row = tl.arange(0, token.shape[0])
    for i in tl.static_range(len(SIDE)):
        C: tl.constexpr = chunk(SIDE, i)
        CHANNEL: tl.constexpr = C.channel
        LANES: tl.constexpr = C.lanes
        BLOCK: tl.constexpr = C.block
        COLUMNS: tl.constexpr = C.columns
        column = tl.arange(0, BLOCK)
        at = out + row[:, None] * dim + (CHANNEL + column * LANES)[None, :]
        there = (column < COLUMNS)[None, :] & (row >= 0)[:, None]
        if C.kind == "numbers":
            x = tile_numbers(base, token, seen, C).to(tl.float32)
            x = tl.where(visible(seen, column, C), x, 0)
            tl.store(at, x.to(out.dtype.element_ty), mask=there)
        elif C.kind == "units":
            x = unit_numbers(base, token, seen, codebook, C).to(tl.float32)
            x = of_columns(x) * token_grid(base, token, seen, C)[0][:, None]
            at = out + row[:, None] * dim + unit_channels(C)[None, :]
            tl.store(at, tl.where(seen[:, None], x, 0).to(out.dtype.element_ty), mask=there)
        else:
            packed = tile_packed(base, token, seen, C)
            for lane in tl.static_range(LANES):
                x = lane_decoded(packed, base, first, token, seen, codebook, C, lane)
                x = tl.where(seen[:, None], x, 0)
                tl.store(at + lane, x.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["count", "ids_stride", "first_page"])
def decode_kernel(
    pool,
    ids,
    counts,
    k_codebook,
    v_codebook,
    keys,
    values,
    hidden,
    count,
    ids_stride,
    first_page,
    k_dim,
    v_dim,
    K: tl.constexpr,
    V: tl.constexpr,
    PAGE: tl.constexpr,
    BYTES: tl.constexpr,
    TILE: tl.constexpr,
    IN_TOKENS: tl.constexpr,
    LOW: tl.constexpr,
):
    """pool uint8 in records of BYTES; ids [S, n]; counts [S] of pages or, IN_TOKENS, of tokens; of pages first_page and
    `count` more: keys [S, count P, Dk], values [S, count P, Dv], hidden [S, count P]: 0, or LOW of no token."""
    stream = tl.program_id(0).to(tl.int64)
    page = tl.program_id(1)
    held = tokens_held(counts, stream, PAGE, IN_TOKENS) - (first_page + page) * PAGE
    there = held > 0
    record = tl.load(ids + stream * ids_stride + first_page + page, mask=there, other=0).to(tl.int64) * BYTES
    row = (stream * count + page) * PAGE
    for first in tl.static_range(0, PAGE, TILE):
        token = first + tl.arange(0, TILE)
        seen = token < held
        tl.store(hidden + row + token, tl.where(seen, 0, LOW).to(hidden.dtype.element_ty))
        store_side(keys + (row + first) * k_dim, pool + record, first, token, seen, k_codebook, k_dim, K)
        store_side(values + (row + first) * v_dim, pool + record, first, token, seen, v_codebook, v_dim, V)
