"""Pages written from K and V in basis coordinates; what codecs `encode` is its specification, bit for bit.

  uniform   zero = min x, scale = (max x - zero) / levels, code = round((x - zero) / scale); or symmetric, without zero
  codebook  norm = |x| / D^1/2, code = how many middles of the book x / |x| exceeds
  joint     codebooks of the same tokens, whose codes say together by how much their norm grows: `segments.Gain`
  floats    scale = max |x| / the format's largest number, in its own format, number = the nearest to x / scale; of
            two powers of two (E8M0) the one under which the block's squared error is less
  centred   uniform, codebook or floats of x less c, a mean over the page's tokens in float16

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

from .attention import chunk

TINY = tl.constexpr(2.0**-24)  # as in quantizers/grid.py
HUGE = tl.constexpr(65504.0)
NORMAL = tl.constexpr(2.0**-126)
ROUNDING = tl.constexpr(1.5 * 2.0**23)  # added, it leaves no room for fractions


@triton.constexpr_function
def programs(pieces: Any, i: int) -> int:
    """Programs of a page that write piece i."""
    return pieces[i].programs


@triton.jit
def place(page, tile, PAGE: tl.constexpr, C: tl.constexpr):
    """Tokens [T, 1, 1] of a page, first channels [1, G, 1] of runs and channels [1, G, R] of a tile of a piece, and
    which of its elements there are."""
    T: tl.constexpr = C.shape[0]
    G: tl.constexpr = C.shape[1]
    R: tl.constexpr = C.shape[2]
    STEP: tl.constexpr = C.step
    RUN: tl.constexpr = C.run
    CHANNELS: tl.constexpr = C.channels
    ACROSS: tl.constexpr = C.tiles[1]
    inner = tl.arange(0, T)[:, None, None]
    token = tile // ACROSS * STEP + inner
    run = (tile % ACROSS * G + tl.arange(0, G)[None, :, None]) * RUN
    lane = tl.arange(0, R)[None, None, :]
    channel = run + lane
    seen = (inner < STEP) & (token < PAGE)
    return token, run, channel, seen, (lane < RUN) & (channel < CHANNELS)


@triton.jit
def load(x, page, token, channel, there, DIM: tl.constexpr, PAGE: tl.constexpr, C: tl.constexpr):
    """Elements [T, G, R] of x [M, P, D]."""
    CHANNEL: tl.constexpr = C.channel
    return tl.load(x + ((page * PAGE + token) * DIM + CHANNEL + channel), mask=there, other=0)


@triton.jit
def sum_of_four(x, page, first, channel, live, DIM: tl.constexpr, PAGE: tl.constexpr, C: tl.constexpr):
    """Of tokens from `first` on, float32 [1, G, R]; 0 where it is no number."""
    a = load(x, page, first, channel, live, DIM, PAGE, C).to(tl.float32)
    b = load(x, page, first + 1, channel, live & (first + 1 < PAGE), DIM, PAGE, C).to(tl.float32)
    c = load(x, page, first + 2, channel, live & (first + 2 < PAGE), DIM, PAGE, C).to(tl.float32)
    d = load(x, page, first + 3, channel, live & (first + 3 < PAGE), DIM, PAGE, C).to(tl.float32)
    found = (a + b) + (c + d)
    return tl.where(found == found, found, 0.0)


@triton.jit
def page_centre(x, page, channel, live, DIM: tl.constexpr, PAGE: tl.constexpr, C: tl.constexpr):
    """The centre float16 [1, G, R] of channels in a page, as `quantizers.centred.centre`."""
    PARTS: tl.constexpr = (PAGE + 3) // 4
    TRIM: tl.constexpr = PAGE % 4 == 0 and PARTS > 2
    SHARE: tl.constexpr = 1.0 / (PAGE - 8 if TRIM else PAGE)
    total = tl.zeros_like(channel).to(tl.float32)
    if TRIM:
        a = sum_of_four(x, page, 0, channel, live, DIM, PAGE, C)
        b = sum_of_four(x, page, 4, channel, live, DIM, PAGE, C)
        low, high = tl.minimum(a, b), tl.maximum(a, b)
        for part in range(2, PARTS):
            found = sum_of_four(x, page, part * 4, channel, live, DIM, PAGE, C)
            total += tl.minimum(tl.maximum(found, low), high)
            low, high = tl.minimum(low, found), tl.maximum(high, found)
    else:
        for part in range(PARTS):
            total += sum_of_four(x, page, part * 4, channel, live, DIM, PAGE, C)
    mean = total * SHARE
    mean = tl.where(mean == mean, mean, 0.0)
    return tl.minimum(tl.maximum(mean, -HUGE), HUGE).to(tl.float16)


@triton.jit
def put_halves(record, at, x, there):
    """Numbers as float16, the first at the byte `at`."""
    tl.store((record + at).to(tl.pointer_type(tl.float16)), x, mask=there)


@triton.constexpr_function
def below(piece: Any, plane: int) -> int:
    """Bits of a piece's codes that are lower than those of a plane."""
    return sum(width for _, _, width in piece.planes[plane + 1 :])


@triton.jit
def put_plane(record, codes, token, run, seen, C: tl.constexpr, PLANE: tl.constexpr):
    """Codes int32 [T, G, R] of a tile, packed into the bytes of a plane."""
    T: tl.constexpr = C.shape[0]
    G: tl.constexpr = C.shape[1]
    R: tl.constexpr = C.shape[2]
    RUN: tl.constexpr = C.run
    CHANNELS: tl.constexpr = C.channels
    OFFSET: tl.constexpr = C.planes[PLANE][0]
    STRIDE: tl.constexpr = C.planes[PLANE][1]
    WIDTH: tl.constexpr = C.planes[PLANE][2]
    EACH: tl.constexpr = 8 // WIDTH
    codes = (codes >> below(C, PLANE)) & ((1 << WIDTH) - 1)
    if EACH > 1:
        lane = tl.arange(0, EACH)[None, None, None, :] * WIDTH
        codes = tl.sum(tl.reshape(codes, (T, G, R // EACH, EACH)) << lane, 3)
    byte = tl.arange(0, R // EACH)[None, None, :]
    there = seen & (byte < RUN // EACH) & (run // EACH + byte < CHANNELS // EACH)
    tl.store(record + (OFFSET + token * STRIDE + run // EACH + byte), codes.to(tl.uint8), mask=there)


@triton.jit
def put_codes(record, codes, token, run, seen, C: tl.constexpr):
    """Codes int32 [T, G, R] of a tile, packed into the bytes of its planes."""
    COUNT: tl.constexpr = len(C.planes)
    for i in tl.static_range(COUNT):
        put_plane(record, codes, token, run, seen, C, i)


@triton.jit
def put_uniform(record, x, tile, token, run, channel, seen, there, C: tl.constexpr):
    """Writes x float32 [T, G, R] on a uniform grid."""
    TOKENS: tl.constexpr = C.token_group
    GROUP: tl.constexpr = C.channel_group
    CHANNELS: tl.constexpr = C.channels
    LEVELS: tl.constexpr = C.levels
    HALF: tl.constexpr = C.levels // 2
    CUT: tl.constexpr = (1 - C.clip) / 2
    SCALE: tl.constexpr = C.scale
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
    codes = tl.div_rn(x - zero, scale.to(tl.float32))
    codes = (tl.minimum(tl.maximum(codes, 0), LEVELS) + ROUNDING) - ROUNDING
    put_codes(record, codes.to(tl.int32), token, run, seen, C)
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


@triton.constexpr_function
def width(piece: Any) -> int:
    """Bits of a piece's codes."""
    return sum(width for _, _, width in piece.planes)


@triton.jit
def exceeded(x, middles, C: tl.constexpr):
    """How many of a book's middles each of x exceeds, int32: a search by halves, for middles ascend."""
    FIRST: tl.constexpr = C.middles
    BITS: tl.constexpr = width(C)
    codes = tl.zeros_like(x).to(tl.int32)
    for i in tl.static_range(BITS):
        half = 1 << (BITS - 1 - i)
        codes = tl.where(x > tl.load(middles + (FIRST + half - 1) + codes), codes + half, codes)
    return codes


@triton.jit
def put_book(record, x, middles, token, run, seen, C: tl.constexpr):
    """Writes x float32 [T, 1, R] as codes of a book and a norm for each token."""
    ROOT: tl.constexpr = C.channels**0.5
    SCALE: tl.constexpr = C.scale
    norm = tl.div_rn(tl.sqrt_rn(tl.sum(x * x, 2, keep_dims=True)), ROOT)
    norm = tl.where(norm < HUGE, norm, HUGE).to(tl.float16)  # where it is no number, too
    unit = tl.div_rn(x, tl.maximum(norm.to(tl.float32) * ROOT, TINY))
    put_codes(record, exceeded(unit, middles, C), token, run, seen, C)
    put_halves(record, SCALE + token * 2, norm, seen)


@triton.jit
def put_part(
    record, page, shift, source, norm, middles, tile, POWER: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Writes the codes of a part, and gives its two sums of the gain [T, 1, 1], without their weight."""
    LEVELS: tl.constexpr = C.levels
    FIRST: tl.constexpr = C.middles
    token, run, channel, seen, live = place(page, tile, PAGE, C)
    there = seen & live
    x = tl.div_rn(load(source, page, token, channel, there, DIM, PAGE, C), norm)
    codes = exceeded(x, middles, C)
    put_codes(record, codes, token + shift, run, seen, C)
    book = tl.load(middles + FIRST + LEVELS + codes, mask=there, other=0)
    other = book if POWER < 1 else x
    return tl.sum(x * x, 2, keep_dims=True), tl.sum(book * other, 2, keep_dims=True)


@triton.jit
def put_joint(record, page, shift, source, middles, tile, DIM: tl.constexpr, PAGE: tl.constexpr, C: tl.constexpr):
    """Writes tokens [T, 1, 1] of all parts, and their norm, which comes behind the coordinates of `source`."""
    COUNT: tl.constexpr = len(C.parts)
    SCALE: tl.constexpr = C.parts[0].scale
    POWER: tl.constexpr = C.power
    MOST: tl.constexpr = C.most
    token, _, _, seen, _ = place(page, tile, PAGE, chunk(C.parts, 0))
    norm = tl.load(source + ((page * PAGE + token) * DIM + (DIM - 1)), mask=seen, other=0)
    least = tl.maximum(norm, TINY)
    own, coded = tl.zeros_like(norm), tl.zeros_like(norm)
    for i in tl.static_range(COUNT):
        a, b = put_part(record, page, shift, source, least, middles, tile, POWER, DIM, PAGE, chunk(C.parts, i))
        own += a * chunk(C.weights, i)
        coded += b * chunk(C.weights, i)
    gain = tl.minimum(tl.div_rn(own, tl.maximum(coded, TINY)), MOST)
    if POWER < 1:
        gain = tl.sqrt_rn(gain)
    norm *= gain
    put_halves(record, SCALE + (token + shift) * 2, tl.where(norm < HUGE, norm, HUGE).to(tl.float16), seen)


@triton.constexpr_function
def of_format(name: str) -> tuple[int, int, float]:
    """Mantissa bits, the exponent of subnormal numbers and the largest number of a format."""
    return {"e4m3": (3, -6, 448.0), "e5m2": (2, -14, 57344.0), "e2m1": (1, 0, 6.0)}[name]


@triton.constexpr_function
def halvings(n: int) -> int:
    """log2 n."""
    return n.bit_length() - 1


@triton.jit
def float_sizes(x, FORMAT: tl.constexpr):
    """The nearest numbers of a format to |x|, ties to even, the largest beyond it."""
    BITS: tl.constexpr = of_format(FORMAT)[0]
    LEAST: tl.constexpr = of_format(FORMAT)[1]
    LARGEST: tl.constexpr = of_format(FORMAT)[2]
    size = tl.minimum(tl.abs(x), LARGEST)
    exponent = tl.maximum(size.to(tl.int32, bitcast=True) >> 23, 127 + LEAST)
    rounding = ((exponent - BITS + 23) << 23 | 1 << 22).to(tl.float32, bitcast=True)  # its last bit is worth a step
    return (size + rounding) - rounding


@triton.jit
def float_error(x, FORMAT: tl.constexpr):
    """Squared error [T, G, 1] of x [T, G, R] in a format, summed by halves as in quantizers/floats.py."""
    error = float_sizes(x, FORMAT) - tl.abs(x)
    error = error * error
    for i in tl.static_range(halvings(x.shape[2])):
        error = tl.sum(tl.reshape(error, (x.shape[0], x.shape[1], 2, x.shape[2] >> i + 1)), 2)
    return error


@triton.jit
def float_codes(x, FORMAT: tl.constexpr):
    """Codes int32 of the nearest numbers of a format, ties to even, the largest beyond it."""
    BITS: tl.constexpr = of_format(FORMAT)[0]
    LEAST: tl.constexpr = of_format(FORMAT)[1]
    size = float_sizes(x, FORMAT)
    unit = 2.0 ** (LEAST + 14)  # the format's numbers over this are those of float16 with the same bits
    bits = (size / unit).to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32) >> (10 - BITS)
    SIGN: tl.constexpr = 8 if FORMAT == "e2m1" else 128
    return tl.where(x.to(tl.int32, bitcast=True) < 0, bits | SIGN, bits)


@triton.jit
def page_most(x, page, DIM: tl.constexpr, PAGE: tl.constexpr, C: tl.constexpr):
    """The largest magnitude of a piece in a page, less its centre where it has one."""
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
            shift = page_centre(x, page, channel, live, DIM, PAGE, C).to(tl.float32)
        for down in range(DOWN):
            token, _run, channel, seen, live = place(page, down * ACROSS + across, PAGE, C)
            found = load(x, page, token, channel, seen & live, DIM, PAGE, C).to(tl.float32) - shift
            most = tl.maximum(most, tl.where(seen & live, tl.abs(found), 0))
    return tl.max(tl.max(tl.max(most, 2), 1), 0)


@triton.jit
def power(e8m0):
    """2^(e8m0 - 127) of int32 codes."""
    return tl.where(e8m0 > 0, e8m0 << 23, 1 << 22).to(tl.float32, bitcast=True)


@triton.jit
def put_floats(record, x, most, tile, token, run, seen, there, C: tl.constexpr):
    """Writes x float32 [T, G, R] as numbers of a format; most: the largest magnitude of the page, where it counts."""
    FORMAT: tl.constexpr = C.format
    SCALES: tl.constexpr = C.scale_format
    PAGE: tl.constexpr = C.page_scale
    CHANNELS: tl.constexpr = C.channels
    GROUP: tl.constexpr = C.channel_group
    COUNT: tl.constexpr = (CHANNELS + GROUP - 1) // GROUP
    SCALE: tl.constexpr = C.scale
    LARGEST: tl.constexpr = of_format(FORMAT)[2]
    largest = tl.max(tl.where(there, tl.abs(x), 0), 2, keep_dims=True)
    at, shown = token * COUNT + run // GROUP, seen & (run < CHANNELS)
    if SCALES == "bf16":
        scale = tl.minimum(tl.maximum(tl.div_rn(largest, LARGEST), NORMAL), 2.0**112)
        bits = scale.to(tl.int32, bitcast=True)
        stored = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # the nearest, ties to even: the interpreter truncates
        scale = (stored << 16).to(tl.float32, bitcast=True)
        tl.store((record + (SCALE + at * 2)).to(tl.pointer_type(tl.uint16)), stored.to(tl.uint16), mask=shown)
    else:
        if SCALES == "e8m0":
            stored = tl.minimum(tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 2, 0), 252)
            y = tl.div_rn(x, power(stored))
            stored += (float_error(y / 2, FORMAT) < float_error(y, FORMAT) / 4).to(tl.int32)
            stored = tl.minimum(stored, 252)
            scale = power(stored)
        else:
            page = tl.minimum(tl.maximum(tl.div_rn(most, LARGEST * 448.0), NORMAL), 2.0**115)
            stored = tl.div_rn(tl.div_rn(largest, LARGEST), page)
            stored = float_codes(tl.maximum(stored, 2.0**-9), "e4m3")
            scale = (stored << 7).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0 * page
            if tile == 0:
                tl.store((record + PAGE).to(tl.pointer_type(tl.float32)), page)
        tl.store(record + (SCALE + at), stored.to(tl.uint8), mask=shown)
    put_codes(record, float_codes(tl.div_rn(x, scale), FORMAT), token, run, seen, C)


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
    record, page, shift, keys, values, k_middles, v_middles, tile,
    K_DIM: tl.constexpr, V_DIM: tl.constexpr, PAGE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Writes a tile of a piece; shift: where in the record its first token goes."""
    KIND: tl.constexpr = C.kind
    DIM: tl.constexpr = V_DIM if C.side else K_DIM
    if C.side:
        source, middles = values, v_middles
    else:
        source, middles = keys, k_middles
    if KIND == "joint":
        put_joint(record, page, shift, source, middles, tile, DIM, PAGE, C)
    else:
        token, run, channel, seen, live = place(page, tile, PAGE, C)
        there = seen & live
        x = load(source, page, token, channel, there, DIM, PAGE, C)
        if C.centre >= 0:
            CENTRE: tl.constexpr = C.centre
            ACROSS: tl.constexpr = C.tiles[1]
            centre = page_centre(source, page, channel, live, DIM, PAGE, C)
            put_halves(record, CENTRE + channel * 2, centre, live & (tile < ACROSS))
            x = tl.where(there, x.to(tl.float32) - centre.to(tl.float32), 0)
        token += shift
        if KIND == "numbers":
            put_numbers(record, x, token, channel, there, C)
        elif KIND == "book":
            put_book(record, x.to(tl.float32), middles, token, run, seen, C)
        elif KIND == "floats":
            most = 0.0
            if C.page_scale >= 0:
                most = page_most(source, page, DIM, PAGE, C)
            put_floats(record, x.to(tl.float32), most, tile, token, run, seen, there, C)
        else:
            put_uniform(record, x.to(tl.float32), tile, token, run, channel, seen, there, C)


@triton.jit
def encode_kernel(
    keys,
    values,
    pool,
    ids,
    rows,
    k_middles,
    v_middles,
    PIECES: tl.constexpr,
    GAPS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BYTES: tl.constexpr,
    SINGLE: tl.constexpr,
):
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
            put(record, page, shift, keys, values, k_middles, v_middles, tile, K_DIM, V_DIM, PAGE, chunk(PIECES, i))
        tile -= programs(PIECES, i)
