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

import triton
import triton.language as tl

from .encode_floats import put_floats
from .encode_shifts import (
    TINY,
    codebook_codes,
    exceeded,
    first_most,
    page_most,
    page_shift,
    uniform_codes,
    uniform_grid,
)
from .pack import HUGE, load, place, programs, put_codes, put_halves
from .unpack import chunk


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
def put_codebook(record, x, thresholds, token, run, seen, C: tl.constexpr):
    """Writes x float32 [T, 1, R] as codes of a codebook and a norm for each token."""
    SCALE: tl.constexpr = C.scale
    norm, codes = codebook_codes(x, thresholds, C)
    put_codes(record, codes, token, run, seen, C)
    put_halves(record, SCALE + token * 2, norm, seen)


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
        first = 0.0
        if (C.page_scale >= 0) & (C.centre >= 0):
            first = first_most(source, page, DIM, PAGE, C)
        if C.centre >= 0:
            CENTRE: tl.constexpr = C.centre
            ACROSS: tl.constexpr = C.tiles[1]
            centre = page_shift(source, page, first, thresholds, channel, live, DIM, PAGE, C)
            here = channel * 0 + tile < ACROSS  # of a number alone, triton 3.9's interpreter makes no mask
            put_halves(record, CENTRE + channel * 2, centre, live & here)
            x = tl.where(there, x.to(tl.float32) - centre.to(tl.float32), 0)
        token += shift
        if KIND == "numbers":
            put_numbers(record, x, token, channel, there, C)
        elif KIND == "codebook":
            put_codebook(record, x.to(tl.float32), thresholds, token, run, seen, C)
        elif KIND == "floats":
            most = 0.0
            if C.page_scale >= 0:
                most = page_most(source, page, first, thresholds, DIM, PAGE, C)
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
