"""Codes on grids, and what is subtracted from a page's tokens before: their centre, under which the first is exact."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .encode_floats import floats_coded
from .pack import HUGE, load, page_centre, place, width

TINY = tl.constexpr(2.0**-24)  # as in quantizers/grid.py


ROUNDING = tl.constexpr(1.5 * 2.0**23)  # added, it leaves no bits for fractions


@triton.jit
def uniform_grid(x, there, C: tl.constexpr):
    """Zeros float32 and scales float16 of the blocks of x float32 [T, G, R]."""
    TOKENS: tl.constexpr = C.token_group
    GROUP: tl.constexpr = C.channel_group
    LEVELS: tl.constexpr = C.levels
    HALF: tl.constexpr = C.levels // 2
    CUT: tl.constexpr = (1 - C.clip) / 2
    ZERO: tl.constexpr = C.zero
    low, high = tl.where(there, x, float("inf")), tl.where(there, x, float("-inf"))
    if GROUP > 1:
        low, high = tl.min(low, 2, keep_dims=True), tl.max(high, 2, keep_dims=True)
    if TOKENS > 1:
        low, high = tl.min(low, 0, keep_dims=True), tl.max(high, 0, keep_dims=True)
    if ZERO < 0:
        high = tl.maximum(-low, high)
        low = -high
    if CUT > 0:
        cut = (high - low) * CUT
        low, high = low + cut, high - cut
    if ZERO < 0:
        scale = tl.minimum(tl.maximum(tl.div_rn(high, HALF * 1.0), TINY), HUGE).to(tl.float16)
        zero = scale.to(tl.float32) * -HALF
    else:
        zero = tl.minimum(tl.maximum(low, -HUGE), HUGE).to(tl.float16).to(tl.float32)
        scale = tl.minimum(tl.maximum(tl.div_rn(high - zero, LEVELS * 1.0), TINY), HUGE).to(tl.float16)
    return zero, scale


@triton.jit
def uniform_codes(x, zero, scale, C: tl.constexpr):
    """Codes of x on a grid, as float32."""
    LEVELS: tl.constexpr = C.levels
    codes = tl.div_rn(x - zero, scale.to(tl.float32))
    return (tl.minimum(tl.maximum(codes, 0), LEVELS) + ROUNDING) - ROUNDING


@triton.jit
def exceeded(x, thresholds, C: tl.constexpr):
    """How many of a codebook's thresholds each of x exceeds, int32: a search by halves, for thresholds ascend."""
    FIRST: tl.constexpr = C.thresholds
    BITS: tl.constexpr = width(C)
    codes = tl.zeros_like(x).to(tl.int32)
    for i in tl.static_range(BITS):
        half = 1 << (BITS - 1 - i)
        codes = tl.where(x > tl.load(thresholds + (FIRST + half - 1) + codes), codes + half, codes)
    return codes


@triton.jit
def codebook_codes(x, thresholds, C: tl.constexpr):
    """Norms float16 [T, 1, 1] of x float32 [T, 1, R], and codes of its directions."""
    ROOT: tl.constexpr = C.channels**0.5
    norm = tl.div_rn(tl.sqrt_rn(tl.sum(x * x, 2, keep_dims=True)), ROOT)
    norm = tl.where(norm < HUGE, norm, HUGE).to(tl.float16)  # HUGE of no number, too
    unit = tl.div_rn(x, tl.maximum(norm.to(tl.float32) * ROOT, TINY))
    return norm, exceeded(unit, thresholds, C)


@triton.jit
def coded(x, most, thresholds, there, C: tl.constexpr):
    """x float32 [T, G, R] as its codes have it, where tokens are coded one by one; most: its largest magnitude."""
    KIND: tl.constexpr = C.kind
    if KIND == "codebook":
        FIRST: tl.constexpr = C.thresholds + C.levels
        norm, codes = codebook_codes(x, thresholds, C)
        found = tl.load(thresholds + FIRST + codes, mask=there, other=0) * norm.to(tl.float32)
    elif KIND == "floats":
        found = floats_coded(x, most, there, C)
    else:
        HALF: tl.constexpr = C.levels // 2
        ZERO: tl.constexpr = C.zero
        zero, scale = uniform_grid(x, there, C)
        codes = uniform_codes(x, zero, scale, C)
        found = (codes - HALF if ZERO < 0 else codes) * scale.to(tl.float32)
        if ZERO >= 0:
            found += zero
    return found


@triton.constexpr_function
def anchored(piece: Any) -> bool:
    """Whether a piece's centre is `quantizers.centred.anchored`."""
    return bool(piece.anchored)


@triton.jit
def first_most(x, page, DIM: tl.constexpr, PAGE: tl.constexpr, C: tl.constexpr):
    """The largest magnitude of a page's first token less the page's centre."""
    G: tl.constexpr = C.shape[1]
    R: tl.constexpr = C.shape[2]
    ACROSS: tl.constexpr = C.tiles[1]
    most = tl.zeros((1, G, R), tl.float32)
    for across in range(ACROSS):
        _token, _run, channel, _seen, live = place(page, across, PAGE, C)
        centre = page_centre(x, page, channel, live, DIM, PAGE, C).to(tl.float32)
        found = load(x, page, 0, channel, live, DIM, PAGE, C).to(tl.float32) - centre
        most = tl.maximum(most, tl.where(live, tl.abs(found), 0))
    return tl.max(tl.max(tl.max(most, 2), 1), 0)


@triton.jit
def page_shift(x, page, first, thresholds, channel, live, DIM: tl.constexpr, PAGE: tl.constexpr, C: tl.constexpr):
    """What is subtracted from channels in a page, float16 [1, G, R]: their centre, moved by the error of its first
    token where it is `anchored`; first: that token's largest magnitude, where it counts."""
    FEW: tl.constexpr = min(PAGE, 4)
    centre = page_centre(x, page, channel, live, DIM, PAGE, C)
    if anchored(C):
        c = centre.to(tl.float32)
        own = tl.where(live, load(x, page, 0, channel, live, DIM, PAGE, C).to(tl.float32) - c, 0)
        most = tl.zeros_like(c)
        for token in tl.static_range(1, FEW):
            most = tl.maximum(most, tl.abs(load(x, page, token, channel, live, DIM, PAGE, C).to(tl.float32) - c))
        error = own - coded(own, first, thresholds, live, C)
        error = tl.where(error == error, error, 0)
        c += tl.minimum(tl.maximum(error, -most), most)
        centre = tl.minimum(tl.maximum(c, -HUGE), HUGE).to(tl.float16)
    return centre


@triton.jit
def page_most(x, page, first, thresholds, DIM: tl.constexpr, PAGE: tl.constexpr, C: tl.constexpr):
    """The largest magnitude of a piece in a page, less what `page_shift` subtracts where it has a centre."""
    T: tl.constexpr = C.shape[0]
    G: tl.constexpr = C.shape[1]
    R: tl.constexpr = C.shape[2]
    DOWN: tl.constexpr = C.tiles[0]
    ACROSS: tl.constexpr = C.tiles[1]
    most = tl.zeros((T, G, R), tl.float32)
    for across in range(ACROSS):
        token, _run, channel, seen, live = place(page, across, PAGE, C)
        shift = tl.zeros_like(channel).to(tl.float32)
        if C.centre >= 0:
            shift = page_shift(x, page, first, thresholds, channel, live, DIM, PAGE, C).to(tl.float32)
        for down in range(DOWN):
            token, _run, channel, seen, live = place(page, down * ACROSS + across, PAGE, C)
            found = load(x, page, token, channel, seen & live, DIM, PAGE, C).to(tl.float32) - shift
            most = tl.maximum(most, tl.where(seen & live, tl.abs(found), 0))
    return tl.max(tl.max(tl.max(most, 2), 1), 0)
