"""Queries times a tile of keys, and weights times a tile of values, for each kind of chunk."""

# Triton reads these functions as a language of its own: without annotations, and with tuples that grow.
# mypy: disable-error-code="no-untyped-def, assignment, no-redef"
# ruff: noqa: RUF005, SIM300

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .pairs import (
    block_halves,
    channel_halves,
    codebook_halves,
    float_by,
    float_dtype,
    float_halves,
    lane_halves,
    lane_row,
)
from .units import of_columns as of_unit_columns
from .units import to_columns, unit_channels, unit_halves
from .unpack import (
    block_grid,
    channel_grid,
    dot,
    dtype_of,
    halves,
    tile_numbers,
    tile_packed,
    token_grid,
    visible,
)


@triton.jit
def load_queries(q, row, rows, channels, C: tl.constexpr):
    """A chunk's channels of queries, a tile float32 [R, columns] a lane."""
    CHANNEL: tl.constexpr = C.channel
    LANES: tl.constexpr = C.lanes
    COLUMNS: tl.constexpr = C.columns
    BLOCK: tl.constexpr = C.block
    column = tl.arange(0, BLOCK)
    there = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    found = ()
    for lane in tl.static_range(LANES):
        channel = unit_channels(C) if C.kind == "units" else CHANNEL + column * LANES + lane
        at = row[:, None] * channels + channel[None, :]
        x = tl.load(q + at, mask=there, other=0).to(tl.float32)
        found = found + (to_columns(x) if C.kind == "units" else x,)
    return found


@triton.jit
def largest(most, lanes):
    for i in tl.static_range(len(lanes)):
        most = tl.maximum(most, tl.max(tl.abs(lanes[i]), 1))
    return most


@triton.jit
def over(lanes, norm):
    found = ()
    for i in tl.static_range(len(lanes)):
        found = found + (lanes[i] / norm[:, None],)
    return found


@triton.jit
def total(lanes):
    found = tl.sum(lanes[0], 1)
    for i in tl.static_range(1, len(lanes)):
        found += tl.sum(lanes[i], 1)
    return found


@triton.jit
def centre_logits(logits, q, base, seen, C: tl.constexpr, EXACT: tl.constexpr, WITHIN: tl.constexpr):
    """Adds q . c [R, T] over a chunk's channels; WITHIN: the tile lies within one page."""
    CENTRE: tl.constexpr = C.centre
    LANES: tl.constexpr = C.lanes
    BLOCK: tl.constexpr = C.block
    COLUMNS: tl.constexpr = C.columns
    column = tl.arange(0, BLOCK)
    if WITHIN and not EXACT:  # as a product of all tokens alike: cheaper than sums over threads
        for i in tl.static_range(LANES):
            centre = tl.broadcast_to(lane_row(base, CENTRE, C, i)[None, :], (logits.shape[1], BLOCK))
            logits = dot(q[i], centre.trans(), logits, tl.float16)
    elif WITHIN:
        offset = tl.zeros_like(tl.sum(logits, 1))
        for i in tl.static_range(LANES):
            centre = halves(base, CENTRE + (column * LANES + i) * 2, column < COLUMNS)
            offset += tl.sum(q[i] * centre[None, :], 1)
        logits += offset[:, None]
    else:
        for i in tl.static_range(LANES):
            at = (CENTRE + (column * LANES + i) * 2)[None, :]
            centre = halves(base[:, None], at, visible(seen, column, C))
            logits = dot(q[i], centre.trans(), logits, tl.float32)
    return logits


@triton.constexpr_function
def share_norm(side: Any) -> bool:
    """Whether all channels of a side have a token's norm in common."""
    parts = [side[i] for i in range(len(side))]
    parts = [part.value if isinstance(part, tl.constexpr) else part for part in parts]
    known = all(c.kind in ("codebook", "units") and c.scale == parts[0].scale for c in parts)
    return known and (len(parts) > 1 or parts[0].kind == "units")


@triton.jit
def key_logits(
    logits, q, base, first, token, seen, codebook, C: tl.constexpr, EXACT: tl.constexpr, WITHIN: tl.constexpr,
    NORMED: tl.constexpr,
):  # fmt: skip
    """Adds q . k [R, T] over a chunk's channels, less their centre, and NORMED less norms; q: its lanes."""
    KIND: tl.constexpr = C.kind
    LANES: tl.constexpr = C.lanes
    DTYPE: tl.constexpr = dtype_of(C, EXACT, float_dtype(C, EXACT, tl.float16, True))
    SHARED: tl.constexpr = KIND == "channel" and C.channel_group == 1 and not EXACT
    if KIND == "numbers":
        logits = dot(q[0], tile_numbers(base, token, seen, C).to(DTYPE).trans(), logits, DTYPE)
    elif KIND == "units":
        logits = dot(q[0], unit_halves(base, token, seen, codebook, C, DTYPE).trans(), logits, DTYPE)
    else:
        packed = tile_packed(base, token, seen, C)
        if KIND == "block":
            scale, zero = block_grid(base, token, seen, C)
            for i in tl.static_range(LANES):
                x = block_halves(packed, scale, zero, C, i, DTYPE)
                logits = dot(q[i], x.trans(), logits, DTYPE)
        elif KIND == "floats":
            part = tl.zeros_like(logits)
            scale, factor = float_by(base, token, seen, C, DTYPE, WITHIN)
            for i in tl.static_range(LANES):
                part = dot(q[i], float_halves(packed, scale, C, i, DTYPE).trans(), part, DTYPE)
            logits += part * factor[None, :]
        elif SHARED:
            for i in tl.static_range(LANES):
                logits = dot(q[i], channel_halves(packed, base, first, C, i).trans(), logits, DTYPE)
        elif KIND == "channel":
            offset = tl.zeros_like(tl.sum(logits, 1))
            for i in tl.static_range(LANES):
                scale, zero = channel_grid(base, first, C, i)
                x = lane_halves(packed, C, i, C.middle, DTYPE)
                logits = dot(q[i] * scale[None, :], x.trans(), logits, DTYPE)
                offset += tl.sum(q[i] * zero[None, :], 1)
            logits += offset[:, None]
        else:
            part = logits
            if not NORMED:
                part = tl.zeros_like(logits)
                scale, zero = token_grid(base, token, seen, C)
            for i in tl.static_range(LANES):
                if KIND == "codebook":
                    x = codebook_halves(packed, codebook, C, i, DTYPE)
                else:
                    x = lane_halves(packed, C, i, C.middle, DTYPE)
                part = dot(q[i], x.trans(), part, DTYPE)
            if NORMED:
                logits = part
            else:
                logits += part * scale[None, :]
                if C.adds:
                    logits += total(q)[:, None] * zero[None, :]
    return logits


@triton.jit
def add_values(
    sums, p, keep, base, first, token, seen, codebook, C: tl.constexpr, EXACT: tl.constexpr, WITHIN: tl.constexpr,
    NORMED: tl.constexpr,
):  # fmt: skip
    """sums * keep + p v over a tile's tokens: a tile [R, columns] a lane, then what all channels gain [R], if any.
    NORMED: norms are in p."""
    KIND: tl.constexpr = C.kind
    LANES: tl.constexpr = C.lanes
    SHARED: tl.constexpr = KIND == "channel" and C.channel_group == 1 and not EXACT
    # probabilities of what is decoded whole are in float16; others have scales in them, which bfloat16 has the range of
    WHOLE: tl.constexpr = SHARED or KIND == "block"
    DTYPE: tl.constexpr = dtype_of(C, EXACT, float_dtype(C, EXACT, tl.float16 if WHOLE else tl.bfloat16, WITHIN))
    keeps = keep[:, None]
    found = ()
    if KIND == "numbers":
        found = found + (dot(p, tile_numbers(base, token, seen, C).to(DTYPE), sums[0] * keeps, DTYPE),)
    elif KIND == "units":
        found = found + (dot(p, unit_halves(base, token, seen, codebook, C, DTYPE), sums[0] * keeps, DTYPE),)
    else:
        packed = tile_packed(base, token, seen, C)
        if KIND == "block":
            scale, zero = block_grid(base, token, seen, C)
            for i in tl.static_range(LANES):
                x = block_halves(packed, scale, zero, C, i, DTYPE)
                found = found + (dot(p, x, sums[i] * keeps, DTYPE),)
        elif KIND == "floats":
            scale, factor = float_by(base, token, seen, C, DTYPE, WITHIN)
            if DTYPE == tl.float16:  # has no range for factors
                for i in tl.static_range(LANES):
                    x = dot(p, float_halves(packed, scale, C, i, DTYPE), tl.zeros_like(sums[i]), DTYPE)
                    found = found + (sums[i] * keeps + x * factor[None, :],)
            else:
                weights = p * factor[None, :]
                for i in tl.static_range(LANES):
                    x = float_halves(packed, scale, C, i, DTYPE)
                    found = found + (dot(weights, x, sums[i] * keeps, DTYPE),)
        elif SHARED:
            for i in tl.static_range(LANES):
                found = found + (dot(p, channel_halves(packed, base, first, C, i), sums[i] * keeps, DTYPE),)
        elif KIND == "channel":
            mass = tl.sum(p, 1)[:, None]
            for i in tl.static_range(LANES):
                scale, zero = channel_grid(base, first, C, i)
                x = dot(p, lane_halves(packed, C, i, C.middle, DTYPE), tl.zeros_like(sums[i]), DTYPE)
                found = found + (sums[i] * keeps + x * scale[None, :] + mass * zero[None, :],)
        else:
            weights = p
            if not NORMED:
                scale, zero = token_grid(base, token, seen, C)
                weights = p * scale[None, :]
            for i in tl.static_range(LANES):
                if KIND == "codebook":
                    x = codebook_halves(packed, codebook, C, i, DTYPE)
                else:
                    x = lane_halves(packed, C, i, C.middle, DTYPE)
                found = found + (dot(weights, x, sums[i] * keeps, DTYPE),)
            if C.adds:
                found = found + (sums[LANES] * keep + tl.sum(p * zero[None, :], 1),)
    return found


@triton.jit
def no_values(C: tl.constexpr, ROWS: tl.constexpr):
    """Where `add_values` starts."""
    LANES: tl.constexpr = C.lanes
    BLOCK: tl.constexpr = C.block
    found = ()
    for _ in tl.static_range(LANES):
        found = found + (tl.zeros((ROWS, BLOCK), tl.float32),)
    if C.adds:
        found = found + (tl.zeros((ROWS,), tl.float32),)
    return found


@triton.jit
def store_values(out, sums, mass, row, rows, channels, C: tl.constexpr):
    """A chunk's channels of the output: sums over the mass [R]."""
    CHANNEL: tl.constexpr = C.channel
    LANES: tl.constexpr = C.lanes
    COLUMNS: tl.constexpr = C.columns
    BLOCK: tl.constexpr = C.block
    column = tl.arange(0, BLOCK)
    there = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    for i in tl.static_range(LANES):
        x = of_unit_columns(sums[i]) if C.kind == "units" else sums[i]
        if C.adds:
            x += sums[LANES][:, None]
        channel = unit_channels(C) if C.kind == "units" else CHANNEL + column * LANES + i
        at = row[:, None] * channels + channel[None, :]
        tl.store(out + at, x / mass[:, None], mask=there)
