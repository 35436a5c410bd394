"""Pages written from K and V in basis coordinates; what codecs `encode` is its specification, bit for bit.

  uniform   zero = min x, scale = (max x - zero) / levels, code = round((x - zero) / scale); or symmetric, without zero
  codebook  norm = |x| / D^1/2, code = how many thresholds of the codebook x / |x| exceeds
  joint     codebooks of the same tokens, whose codes say together by how much their norm grows: `segments.Gain`
  floats    scale = max |x| / the format's largest number, in its own format, number = the nearest to x / scale; of
            two powers of two (E8M0) the one under which the block's squared error is less
  centred   uniform, codebook or floats of x less c, a mean over the page's tokens in float16; moved by the error of the
            first token, where tokens are coded one by one

Scales, zeros and norms are rounded to float16 first, and codes against what is stored. Divisions and square roots are
those of IEEE 754, and nothing is fused, so that codes are the specification's. Two things are not determined by it: the
sign of a zero that is 0, and the last bit of a norm, whose squares are summed in another order.

Grid: (page, tile of one of its segments). Moved: K and V once, the record once; where they are centred, each program
reads its channels of the whole page first, from caches. A single token is a page of one that
is written to its row of a record.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .encode_floats import floats_coded, page_most, put_floats
from .pack import HUGE, load, page_centre, place, programs, put_codes, put_halves, width
from .unpack import chunk

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
def put_uniform(record, x, tile, token, run, channel, seen, there, C: tl.constexpr):
    """Writes x float32 [T, G, R] on a uniform grid."""
    TOKENS: tl.constexpr = C.token_group
    GROUP: tl.constexpr = C.channel_group
    CHANNELS: tl.constexpr = C.channels
    SCALE: tl.constexpr = C.scale
    ZERO: tl.constexpr = C.zero
    zero, scale = uniform_grid(x, there, C)
    put_codes(record, uniform_codes(x, zero, scale, C).to(tl.int32), token, run, seen, C)
    ACROSS: tl.constexpr = C.tiles[1]
    if TOKENS > 1:
        row, shown = tile // ACROSS, tl.full((1, 1, 1), True, tl.int1)
    else:
        row, shown = token, seen
    if GROUP > 1:
        column, shown = run // GROUP, shown & (run < CHANNELS)
    else:
        column, shown = channel, shown & (channel < CHANNELS)
    at = (row * (CHANNELS // GROUP) + column) * 2
    put_halves(record, SCALE + at, scale, shown)
    if ZERO >= 0:
        put_halves(record, ZERO + at, zero.to(tl.float16), shown)


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
def put_codebook(record, x, thresholds, token, run, seen, C: tl.constexpr):
    """Writes x float32 [T, 1, R] as codes of a codebook and a norm for each token."""
    SCALE: tl.constexpr = C.scale
    norm, codes = codebook_codes(x, thresholds, C)
    put_codes(record, codes, token, run, seen, C)
    put_halves(record, SCALE + token * 2, norm, seen)


@triton.jit
def coded(x, thresholds, there, C: tl.constexpr):
    """x float32 [T, G, R] as its codes have it, where tokens are coded one by one."""
    KIND: tl.constexpr = C.kind
    if KIND == "codebook":
        FIRST: tl.constexpr = C.thresholds + C.levels
        norm, codes = codebook_codes(x, thresholds, C)
        found = tl.load(thresholds + FIRST + codes, mask=there, other=0) * norm.to(tl.float32)
    elif KIND == "floats":
        found = floats_coded(x, there, C)
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
def anchor(centre, x, page, thresholds, channel, live, DIM: tl.constexpr, PAGE: tl.constexpr, C: tl.constexpr):
    """The centre float16 [1, G, R], moved by the error of a page's first token under it."""
    FEW: tl.constexpr = min(PAGE, 4)
    c = centre.to(tl.float32)
    first = tl.where(live, load(x, page, 0, channel, live, DIM, PAGE, C).to(tl.float32) - c, 0)
    most = tl.zeros_like(c)
    for token in tl.static_range(1, FEW):
        most = tl.maximum(most, tl.abs(load(x, page, token, channel, live, DIM, PAGE, C).to(tl.float32) - c))
    error = first - coded(first, thresholds, live, C)
    error = tl.where(error == error, error, 0)
    c += tl.minimum(tl.maximum(error, -most), most)
    return tl.minimum(tl.maximum(c, -HUGE), HUGE).to(tl.float16)


@triton.jit
def put_part(
    record, page, shift, source, norm, thresholds, tile, POWER: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Writes the codes of a part, and gives its two sums of the gain [T, 1, 1], without their weight."""
    LEVELS: tl.constexpr = C.levels
    FIRST: tl.constexpr = C.thresholds
    token, run, channel, seen, live = place(page, tile, PAGE, C)
    there = seen & live
    x = tl.div_rn(load(source, page, token, channel, there, DIM, PAGE, C), norm)
    codes = exceeded(x, thresholds, C)
    put_codes(record, codes, token + shift, run, seen, C)
    codebook = tl.load(thresholds + FIRST + LEVELS + codes, mask=there, other=0)
    other = codebook if POWER < 1 else x
    return tl.sum(x * x, 2, keep_dims=True), tl.sum(codebook * other, 2, keep_dims=True)


@triton.jit
def put_joint(record, page, shift, source, thresholds, tile, DIM: tl.constexpr, PAGE: tl.constexpr, C: tl.constexpr):
    """Writes tokens [T, 1, 1] of all parts, and their norm, which comes after the coordinates of `source`."""
    COUNT: tl.constexpr = len(C.parts)
    SCALE: tl.constexpr = C.parts[0].scale
    POWER: tl.constexpr = C.power
    MOST: tl.constexpr = C.most
    token, _, _, seen, _ = place(page, tile, PAGE, chunk(C.parts, 0))
    norm = tl.load(source + ((page * PAGE + token) * DIM + (DIM - 1)), mask=seen, other=0)
    least = tl.maximum(norm, TINY)
    own, coded = tl.zeros_like(norm), tl.zeros_like(norm)
    for i in tl.static_range(COUNT):
        a, b = put_part(record, page, shift, source, least, thresholds, tile, POWER, DIM, PAGE, chunk(C.parts, i))
        own += a * chunk(C.weights, i)
        coded += b * chunk(C.weights, i)
    gain = tl.minimum(tl.div_rn(own, tl.maximum(coded, TINY)), MOST)
    if POWER < 1:
        gain = tl.sqrt_rn(gain)
    norm *= gain
    put_halves(record, SCALE + (token + shift) * 2, tl.where(norm < HUGE, norm, HUGE).to(tl.float16), seen)


@triton.jit
def put_numbers(record, x, token, channel, there, C: tl.constexpr):
    """Writes x [T, 1, R] as it is."""
    OFFSET: tl.constexpr = C.planes[0][0]
    STRIDE: tl.constexpr = C.planes[0][1]
    at = (record + (OFFSET + token * STRIDE)).to(tl.pointer_type(x.dtype))
    tl.store(at + channel, x, mask=there)


@triton.jit
def clear(record, GAP: tl.constexpr):
    """Bytes of a gap become 0."""
    OFFSET: tl.constexpr = GAP[0]
    COUNT: tl.constexpr = GAP[1]
    byte = tl.arange(0, 16)
    tl.store(record + OFFSET + byte, tl.zeros((16,), tl.uint8), mask=byte < COUNT)


@triton.jit
def put(
    record, page, shift, keys, values, k_thresholds, v_thresholds, tile,
    K_DIM: tl.constexpr, V_DIM: tl.constexpr, PAGE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Writes a tile of a piece; shift: where in the record its first token goes."""
    KIND: tl.constexpr = C.kind
    DIM: tl.constexpr = V_DIM if C.side else K_DIM
    if C.side:
        source, thresholds = values, v_thresholds
    else:
        source, thresholds = keys, k_thresholds
    if KIND == "joint":
        put_joint(record, page, shift, source, thresholds, tile, DIM, PAGE, C)
    else:
        token, run, channel, seen, live = place(page, tile, PAGE, C)
        there = seen & live
        x = load(source, page, token, channel, there, DIM, PAGE, C)
        if C.centre >= 0:
            CENTRE: tl.constexpr = C.centre
            ACROSS: tl.constexpr = C.tiles[1]
            centre = page_centre(source, page, channel, live, DIM, PAGE, C)
            if anchored(C):
                centre = anchor(centre, source, page, thresholds, channel, live, DIM, PAGE, C)
            put_halves(record, CENTRE + channel * 2, centre, live & (tile < ACROSS))
            x = tl.where(there, x.to(tl.float32) - centre.to(tl.float32), 0)
        token += shift
        if KIND == "numbers":
            put_numbers(record, x, token, channel, there, C)
        elif KIND == "codebook":
            put_codebook(record, x.to(tl.float32), thresholds, token, run, seen, C)
        elif KIND == "floats":
            most = 0.0
            if C.page_scale >= 0:
                most = page_most(source, page, DIM, PAGE, C)
            put_floats(record, x.to(tl.float32), most, tile, token, run, seen, there, C)
        else:
            put_uniform(record, x.to(tl.float32), tile, token, run, channel, seen, there, C)


@triton.jit
def encode_kernel(
    keys, values, pool, ids, rows, k_thresholds, v_thresholds, PIECES: tl.constexpr, GAPS: tl.constexpr,
    K_DIM: tl.constexpr, V_DIM: tl.constexpr, PAGE: tl.constexpr, BYTES: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """keys [M, P, Dk] and values [M, P, Dv] into the pages ids [M] of a pool uint8 in records of BYTES, those below 0
    left out; SINGLE: of one token each (P = 1), which goes to rows [M] of its page. Grid: (M, programs of a page)."""
    page = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    number = tl.load(ids + page).to(tl.int64)
    if number < 0:
        return
    record = pool + number * BYTES
    shift = tl.load(rows + page).to(tl.int32) if SINGLE else 0
    if tile == 0:
        for i in tl.static_range(len(GAPS)):
            clear(record, chunk(GAPS, i))
    for i in tl.static_range(len(PIECES)):
        if (tile >= 0) & (tile < programs(PIECES, i)):
            put(
                record,
                page,
                shift,
                keys,
                values,
                k_thresholds,
                v_thresholds,
                tile,
                K_DIM,
                V_DIM,
                PAGE,
                chunk(PIECES, i),
            )
        tile -= programs(PIECES, i)
