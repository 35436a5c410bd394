"""Decode attention over compressed pages; `reference.attend_pages` is its specification.

  logit[r, t] = softcap(scale * (q[r] . k[t] + bias[r, t])),  out[r] = sum_t softmax_t(logit[r, t]) v[t]

k and v are read as they are stored. With k = code * s + z, q . k = (q s) . code + q . z: scales and zeros that tokens
share fold into q, those of one token into its logit; on the V side into the outputs and the probabilities. Where a tile
has neither in common (several scales a token), its elements are scaled. Where keys of a page have a centre c, q . c is
added to their logits, in float32. bias: of a row, and of a row and token.

Grid: (stream * blocks of rows, split). A program has all query rows of a stream, up to 64, and a run of its pages; the
last split is the stream's exact tokens. Splits merge by log-sum-exp in a second kernel. Moved: each listed page once,
less its summaries; and a split's sums in float32, written and read once.
"""

# Triton reads these functions as a language of its own: without annotations, and with tuples that grow.
# mypy: disable-error-code="no-untyped-def, assignment, no-redef"
# ruff: noqa: RUF005, SIM108, SIM300

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from . import plan

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LEAST = tl.constexpr(plan.LEAST)
# With a stream's length: one kernel for all of them.
CHANGING = ["ids_stride", "bias_stride", "tiles", "split_pages", "splits"]
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # there, bfloat16 is multiplied as if it were integers


@triton.constexpr_function
def chunk(side: Any, i: int) -> Any:
    """Chunk i of a side; some versions of triton take no index of their own for a constant."""
    return side[i]


@triton.constexpr_function
def dtype_of(chunk: Any, exact: bool, codes: Any) -> Any:
    """What a chunk is multiplied in: float32 where `exact`, numbers in their own dtype, codes in `codes`."""
    if exact:
        return tl.float32
    return {"": codes, "fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}[chunk.dtype]


@triton.constexpr_function
def stored(chunk: Any) -> Any:
    """A pointer to a chunk's numbers."""
    return tl.pointer_type({"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}[chunk.dtype])


@triton.constexpr_function
def room_of(chunk: Any) -> int:
    """Scales of a token that a tile of a chunk has room for."""
    return max(chunk.block * chunk.lanes // chunk.channel_group, 1)


@triton.jit
def dot(a, b, acc, DTYPE: tl.constexpr):
    if DTYPE == tl.float32:
        return tl.dot(a, b.to(DTYPE), acc, input_precision="tf32x3")
    elif INTERPRETED:
        return tl.dot(a.to(DTYPE).to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a.to(DTYPE), b, acc)


@triton.jit
def visible(seen, column, C: tl.constexpr):
    """Which of a tile's numbers [T, columns] there are."""
    COLUMNS: tl.constexpr = C.columns
    return seen[:, None] & (column < COLUMNS)[None, :]


@triton.jit
def halves(base, at, mask):
    return tl.load((base + at).to(tl.pointer_type(tl.float16)), mask=mask, other=0).to(tl.float32)


@triton.jit
def tile_bytes(base, token, seen, C: tl.constexpr, PLANE: tl.constexpr):
    """Bytes [T, columns] of a plane, in each column the one that holds its lanes."""
    OFFSET: tl.constexpr = C.planes[PLANE][0]
    STRIDE: tl.constexpr = C.planes[PLANE][1]
    BITS: tl.constexpr = C.lanes * C.planes[PLANE][2]
    BLOCK: tl.constexpr = C.block
    column = tl.arange(0, BLOCK)
    byte = column if BITS == 8 else column * BITS // 8  # the compiler sees neighbours only in the former
    at = (base + token * STRIDE + OFFSET)[:, None] + byte[None, :]
    return tl.load(at, mask=visible(seen, column, C), other=0)


@triton.jit
def tile_packed(base, token, seen, C: tl.constexpr):
    """Bytes [T, columns] of all planes."""
    COUNT: tl.constexpr = len(C.planes)
    planes = ()
    for i in tl.static_range(COUNT):
        planes = planes + (tile_bytes(base, token, seen, C, i),)
    return planes


@triton.jit
def plane_codes(packed, C: tl.constexpr, PLANE: tl.constexpr, LANE: tl.constexpr):
    """Codes int32 [T, columns] of a plane and a lane."""
    WIDTH: tl.constexpr = C.planes[PLANE][2]
    BITS: tl.constexpr = C.lanes * C.planes[PLANE][2]
    BLOCK: tl.constexpr = C.block
    codes = packed.to(tl.int32) >> (LANE * WIDTH)
    if BITS < 8:
        codes = codes >> (tl.arange(0, BLOCK) * BITS % 8)[None, :]
    return codes & ((1 << WIDTH) - 1)


@triton.jit
def lane_codes(planes, C: tl.constexpr, LANE: tl.constexpr):
    """Codes int32 [T, columns] of a lane."""
    COUNT: tl.constexpr = len(C.planes)
    codes = plane_codes(planes[0], C, 0, LANE)
    for i in tl.static_range(1, COUNT):
        codes = (codes << tl.constexpr(C.planes[i][2])) | plane_codes(planes[i], C, i, LANE)
    return codes


@triton.jit
def lane_numbers(planes, C: tl.constexpr, LANE: tl.constexpr):
    """Codes less the chunk's middle, float32 [T, columns]: exact, by way of a float whose last bit is worth 1."""
    MIDDLE: tl.constexpr = C.middle
    if C.whole:  # not shifted: the multiplication does that, with the subtraction in one instruction
        WIDTH: tl.constexpr = C.planes[0][2]
        SHIFT: tl.constexpr = LANE * WIDTH
        bits = planes[0].to(tl.int32) & (((1 << WIDTH) - 1) << SHIFT)
    else:
        SHIFT: tl.constexpr = 0
        bits = lane_codes(planes, C, LANE)
    UNIT: tl.constexpr = 1 / (1 << SHIFT)
    return (bits | 0x4B000000).to(tl.float32, bitcast=True) * UNIT - (8388608 * UNIT + MIDDLE)


@triton.jit
def token_grid(base, token, seen, C: tl.constexpr):
    """Scales and zeros float32 [T] of a chunk that has one of each a token; the zeros are the middle code's."""
    SCALE: tl.constexpr = C.scale
    ZERO: tl.constexpr = C.zero
    MIDDLE: tl.constexpr = C.middle
    GROUPS: tl.constexpr = C.groups
    GROUP: tl.constexpr = C.inner // C.channel_group
    at = (token * GROUPS + GROUP) * 2
    scale = halves(base, at + SCALE, seen)
    if ZERO >= 0:
        return scale, halves(base, at + ZERO, seen) + scale * MIDDLE
    else:
        return scale, tl.zeros_like(scale)


@triton.jit
def block_grid(base, token, seen, C: tl.constexpr):
    """Scales and zeros float32 [T, groups, 1] of a chunk whose tokens have several; zeros as of `token_grid`."""
    SCALE: tl.constexpr = C.scale
    ZERO: tl.constexpr = C.zero
    MIDDLE: tl.constexpr = C.middle
    GROUPS: tl.constexpr = C.groups
    FIRST: tl.constexpr = C.inner // C.channel_group
    LIVE: tl.constexpr = C.columns * C.lanes // C.channel_group
    ROOM: tl.constexpr = C.block * C.lanes // C.channel_group
    group = tl.arange(0, ROOM)
    there = seen[:, None] & (group < LIVE)[None, :]
    at = (base + token * (GROUPS * 2))[:, None] + ((FIRST + group) * 2)[None, :]
    scale = halves(at, SCALE, there)
    if ZERO >= 0:
        zero = halves(at, ZERO, there) + scale * MIDDLE
    else:
        zero = tl.zeros_like(scale)
    return scale[:, :, None], zero[:, :, None]


@triton.jit
def block_numbers(planes, scale, zero, C: tl.constexpr, LANE: tl.constexpr):
    """Decoded numbers float32 [T, columns] of a lane, each group of channels by its scale and zero."""
    GROUP: tl.constexpr = C.channel_group // C.lanes
    x = lane_numbers(planes, C, LANE)
    grouped = tl.reshape(x, (x.shape[0], x.shape[1] // GROUP, GROUP)) * scale + zero
    return tl.reshape(grouped, (x.shape[0], x.shape[1]))


@triton.jit
def channel_grid(base, first, C: tl.constexpr, LANE: tl.constexpr):
    """Scales and zeros float32 [columns] of a lane, which all tokens from `first` on share."""
    SCALE: tl.constexpr = C.scale
    ZERO: tl.constexpr = C.zero
    MIDDLE: tl.constexpr = C.middle
    GROUPS: tl.constexpr = C.groups
    GROUP: tl.constexpr = C.channel_group
    TOKENS: tl.constexpr = C.token_group
    INNER: tl.constexpr = C.inner
    LANES: tl.constexpr = C.lanes
    BLOCK: tl.constexpr = C.block
    COLUMNS: tl.constexpr = C.columns
    column = tl.arange(0, BLOCK)
    at = (first // TOKENS * GROUPS + (INNER + column * LANES + LANE) // GROUP) * 2
    scale = halves(base, at + SCALE, column < COLUMNS)
    if ZERO >= 0:
        return scale, halves(base, at + ZERO, column < COLUMNS) + scale * MIDDLE
    else:
        return scale, tl.zeros_like(scale)


@triton.jit
def float_numbers(planes, scale, C: tl.constexpr, LANE: tl.constexpr):
    """Numbers float32 [T, columns] of a lane, from bits of float16, times scales [T, groups, 1] if several."""
    FORMAT: tl.constexpr = C.format
    codes = lane_codes(planes, C, LANE)
    if FORMAT == "e4m3":
        bits, unit = (codes & 127) << 7 | (codes & 128) << 8, 256.0
    elif FORMAT == "e5m2":
        bits, unit = codes << 8, 1.0
    else:
        bits, unit = (codes & 7) << 9 | (codes & 8) << 12, 16384.0
    x = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * unit
    if scale.shape[1] > 1:
        grouped = tl.reshape(x, (x.shape[0], scale.shape[1], x.shape[1] // scale.shape[1])) * scale
        x = tl.reshape(grouped, (x.shape[0], x.shape[1]))
    return x


@triton.jit
def float_scales(at, there, C: tl.constexpr):
    """Scales float32 [T, groups] that lie at the bytes `at`; 0 where there is none."""
    FORMAT: tl.constexpr = C.scale_format
    if FORMAT == "bf16":
        return tl.load(at.to(tl.pointer_type(tl.bfloat16)), mask=there, other=0).to(tl.float32)
    else:
        code = tl.load(at, mask=there, other=0).to(tl.int32)
        if FORMAT == "e4m3":
            return (code << 7).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        else:  # the exponent of a float32; that of 2^-127 is the first bit of a subnormal number
            found = tl.where(code > 0, code << 23, 1 << 22).to(tl.float32, bitcast=True)
            return tl.where(there, found, 0.0)


@triton.jit
def float_grid(base, token, seen, C: tl.constexpr):
    """Scales of a chunk: float32 [T, groups, 1] below 2, times [T], a power of two where there are several."""
    SCALE: tl.constexpr = C.scale
    PAGE: tl.constexpr = C.page_scale
    SIZE: tl.constexpr = 2 if C.scale_format == "bf16" else 1
    STRIDE: tl.constexpr = C.groups * SIZE
    FIRST: tl.constexpr = C.inner // C.channel_group
    LIVE: tl.constexpr = (C.columns * C.lanes + C.channel_group - 1) // C.channel_group
    ROOM: tl.constexpr = room_of(C)
    group = tl.arange(0, ROOM)
    there = seen[:, None] & (group < LIVE)[None, :]
    scale = float_scales((base + (SCALE + token * STRIDE))[:, None] + ((FIRST + group) * SIZE)[None, :], there, C)
    if PAGE >= 0:
        scale *= tl.load((base + (PAGE + token * 0)).to(tl.pointer_type(tl.float32)), mask=seen, other=0)[:, None]
    factor = tl.max(scale, 1)
    if ROOM > 1:
        factor = (factor.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        factor = tl.maximum(factor, 1.1754943508222875e-38)
        scale = scale / factor[:, None]
    return scale[:, :, None], factor


@triton.jit
def tile_numbers(base, token, seen, C: tl.constexpr):
    """Numbers [T, columns] that are stored as such."""
    OFFSET: tl.constexpr = C.planes[0][0]
    STRIDE: tl.constexpr = C.planes[0][1]
    BLOCK: tl.constexpr = C.block
    POINTER: tl.constexpr = stored(C)
    column = tl.arange(0, BLOCK)
    at = (base + token * STRIDE + OFFSET).to(POINTER)[:, None] + column[None, :]
    return tl.load(at, mask=visible(seen, column, C), other=0)


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
        at = row[:, None] * channels + (CHANNEL + column * LANES + lane)[None, :]
        found = found + (tl.load(q + at, mask=there, other=0).to(tl.float32),)
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
def centre_logits(logits, q, base, seen, C: tl.constexpr, WITHIN: tl.constexpr):
    """Adds q . c [R, T] over a chunk's channels; WITHIN: the tile lies within one page."""
    CENTRE: tl.constexpr = C.centre
    LANES: tl.constexpr = C.lanes
    BLOCK: tl.constexpr = C.block
    COLUMNS: tl.constexpr = C.columns
    column = tl.arange(0, BLOCK)
    if WITHIN:
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


@triton.jit
def key_logits(
    logits, q, base, first, token, seen, book, C: tl.constexpr, EXACT: tl.constexpr, WITHIN: tl.constexpr
):  # fmt: skip
    """Adds q . k [R, T] over a chunk's channels; q: its lanes."""
    KIND: tl.constexpr = C.kind
    LANES: tl.constexpr = C.lanes
    BOOK: tl.constexpr = C.book
    DTYPE: tl.constexpr = dtype_of(C, EXACT, tl.float16)
    if KIND == "numbers":
        logits = dot(q[0], tile_numbers(base, token, seen, C).to(DTYPE).trans(), logits, DTYPE)
    else:
        packed = tile_packed(base, token, seen, C)
        if KIND == "block":
            scale, zero = block_grid(base, token, seen, C)
            for i in tl.static_range(LANES):
                x = block_numbers(packed, scale, zero, C, i)
                logits = dot(q[i], x.to(DTYPE).trans(), logits, DTYPE)
        elif KIND == "floats":
            part = tl.zeros_like(logits)
            scale, factor = float_grid(base, token, seen, C)
            for i in tl.static_range(LANES):
                part = dot(q[i], float_numbers(packed, scale, C, i).to(DTYPE).trans(), part, DTYPE)
            logits += part * factor[None, :]
        elif KIND == "channel":
            offset = tl.zeros_like(tl.sum(logits, 1))
            for i in tl.static_range(LANES):
                scale, zero = channel_grid(base, first, C, i)
                x = lane_numbers(packed, C, i).to(DTYPE)
                logits = dot(q[i] * scale[None, :], x.trans(), logits, DTYPE)
                offset += tl.sum(q[i] * zero[None, :], 1)
            logits += offset[:, None]
        else:
            part = tl.zeros_like(logits)
            scale, zero = token_grid(base, token, seen, C)
            for i in tl.static_range(LANES):
                if KIND == "book":
                    x = tl.load(book + BOOK + lane_codes(packed, C, i))
                else:
                    x = lane_numbers(packed, C, i).to(DTYPE)
                part = dot(q[i], x.trans(), part, DTYPE)
            logits += part * scale[None, :]
            if C.adds:
                logits += total(q)[:, None] * zero[None, :]
    if C.centre >= 0:
        logits = centre_logits(logits, q, base, seen, C, WITHIN)
    return logits


@triton.jit
def add_values(sums, p, keep, base, first, token, seen, book, C: tl.constexpr, EXACT: tl.constexpr):
    """sums * keep + p v over a tile's tokens: a tile [R, columns] a lane, then what all channels gain [R], if any."""
    KIND: tl.constexpr = C.kind
    LANES: tl.constexpr = C.lanes
    BOOK: tl.constexpr = C.book
    DTYPE: tl.constexpr = dtype_of(C, EXACT, tl.bfloat16)
    keeps = keep[:, None]
    found = ()
    if KIND == "numbers":
        found = found + (dot(p, tile_numbers(base, token, seen, C).to(DTYPE), sums[0] * keeps, DTYPE),)
    else:
        packed = tile_packed(base, token, seen, C)
        if KIND == "block":
            scale, zero = block_grid(base, token, seen, C)
            for i in tl.static_range(LANES):
                x = block_numbers(packed, scale, zero, C, i)
                found = found + (dot(p, x.to(DTYPE), sums[i] * keeps, DTYPE),)
        elif KIND == "floats":
            scale, factor = float_grid(base, token, seen, C)
            weights = p * factor[None, :]
            for i in tl.static_range(LANES):
                x = float_numbers(packed, scale, C, i).to(DTYPE)
                found = found + (dot(weights, x, sums[i] * keeps, DTYPE),)
        elif KIND == "channel":
            mass = tl.sum(p, 1)[:, None]
            for i in tl.static_range(LANES):
                scale, zero = channel_grid(base, first, C, i)
                x = dot(p, lane_numbers(packed, C, i).to(DTYPE), tl.zeros_like(sums[i]), DTYPE)
                found = found + (sums[i] * keeps + x * scale[None, :] + mass * zero[None, :],)
        else:
            scale, zero = token_grid(base, token, seen, C)
            weights = p * scale[None, :]
            for i in tl.static_range(LANES):
                if KIND == "book":
                    x = tl.load(book + BOOK + lane_codes(packed, C, i))
                else:
                    x = lane_numbers(packed, C, i).to(DTYPE)
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
        x = sums[i]
        if C.adds:
            x += sums[LANES][:, None]
        at = row[:, None] * channels + (CHANNEL + column * LANES + i)[None, :]
        tl.store(out + at, x / mass[:, None], mask=there)


@triton.jit
def tokens_held(counts, stream, PAGE: tl.constexpr, IN_TOKENS: tl.constexpr):
    held = tl.load(counts + stream).to(tl.int32)
    return held if IN_TOKENS else held * PAGE


@triton.jit
def tokens_of_split(held, splits, split_pages, PAGE: tl.constexpr):
    """Tokens of one of a stream's splits: even shares of what it holds, of `LEAST` tokens or more, at most those that a
    split has room for. A grid made for the longest stream there may be then serves short ones as well."""
    share = tl.maximum(tl.cdiv(tl.cdiv(held, PAGE), splits), tl.cdiv(LEAST, PAGE))
    return tl.minimum(share, split_pages) * PAGE


@triton.jit
def run(
    q,
    bias,
    token_bias,
    k_base,
    v_base,
    ids,
    first,
    last,
    k_book,
    v_book,
    out,
    lse,
    lse_of_tiles,
    row,
    rows,
    k_dim,
    v_dim,
    bias_stride,
    tiles,
    scale,
    softcap,
    K: tl.constexpr,
    V: tl.constexpr,
    PAGE: tl.constexpr,
    BYTES: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    EXACT: tl.constexpr,
    BIAS: tl.constexpr,
    TOKEN_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LSE_OF_TILES: tl.constexpr,
    IN_TOKENS: tl.constexpr,
):
    """Attention over tokens first to last of a stream, in pages; PAGE = 0: side by side. Logits are in base 2."""
    queries = ()
    most = tl.full((ROWS,), 1e-30, tl.float32)
    for i in tl.static_range(len(K)):
        queries = queries + (load_queries(q, row, rows, k_dim, chunk(K, i)),)
        most = largest(most, queries[i])
    if EXACT:
        factor = tl.full((ROWS,), scale, tl.float32)
    else:  # by the next power of two, so that products with scales fit float16
        norm = (((most.to(tl.int32, bitcast=True) >> 23) + 1) << 23).to(tl.float32, bitcast=True)
        normed = ()
        for i in tl.static_range(len(K)):
            normed = normed + (over(queries[i], norm),)
        queries = normed
        factor = norm * scale
    shift = tl.zeros((ROWS,), tl.float32)
    if BIAS:
        shift = tl.load(bias + row, mask=row < rows, other=0) * scale
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    sums = ()
    for i in tl.static_range(len(V)):
        sums = sums + (no_values(chunk(V, i), ROWS),)

    for at in range(first, last, TILE):
        token = at + tl.arange(0, TILE)  # [T]
        seen = token < last
        k_page, v_page, inner = k_base, v_base, at
        if PAGE > 0:
            if PAGE % TILE == 0:
                page = tl.load(ids + at // PAGE).to(tl.int64) * BYTES
                inner = at % PAGE
                token = inner + tl.arange(0, TILE)
                if not IN_TOKENS:
                    seen = tl.full((TILE,), True, tl.int1)
            else:
                page = tl.load(ids + token // PAGE, mask=seen, other=0).to(tl.int64) * BYTES
                token = token % PAGE
            k_page, v_page = k_base + page, v_base + page
        logits = tl.zeros((ROWS, TILE), tl.float32)
        for i in tl.static_range(len(K)):
            logits = key_logits(
                logits, queries[i], k_page, inner, token, seen, k_book, chunk(K, i), EXACT, PAGE % TILE == 0
            )  # fmt: skip
        logits = logits * factor[:, None] + shift[:, None]
        if TOKEN_BIAS:
            place = row[:, None] * bias_stride + (at + tl.arange(0, TILE))[None, :]
            logits += tl.load(token_bias + place, mask=(row < rows)[:, None] & seen[None, :], other=0) * scale
        if SOFTCAP:  # tanh(x) = 2 sigmoid(2 x) - 1
            logits = (tl.sigmoid(logits * (2 / softcap)) * 2 - 1) * softcap
        logits = tl.where(seen[None, :], logits * LOG2E, float("-inf"))
        highest = tl.max(logits, 1)
        if LSE_OF_TILES:
            own = tl.log2(tl.sum(tl.exp2(logits - highest[:, None]), 1)) + highest
            tl.store(lse_of_tiles + row.to(tl.int64) * tiles + at // TILE, own * LN2, mask=row < rows)
        highest = tl.maximum(highest, top)
        keep = tl.exp2(top - highest)
        p = tl.exp2(logits - highest[:, None])
        mass = mass * keep + tl.sum(p, 1)
        top = highest
        added = ()
        for i in tl.static_range(len(V)):
            added = added + (add_values(sums[i], p, keep, v_page, inner, token, seen, v_book, chunk(V, i), EXACT),)
        sums = added

    empty = mass == 0
    mass = tl.where(empty, 1, mass)
    tl.store(lse + row, tl.where(empty, float("-inf"), top + tl.log2(mass)), mask=row < rows)
    for i in tl.static_range(len(V)):
        store_values(out, sums[i], mass, row, rows, v_dim, chunk(V, i))


@triton.jit(do_not_specialize=CHANGING)
def attend_kernel(
    q,
    bias,
    token_bias,
    pool,
    ids,
    counts,
    k_book,
    v_book,
    keys,
    values,
    token_counts,
    out,
    lse,
    lse_of_tiles,
    rows,
    k_dim,
    v_dim,
    ids_stride,
    keys_stride,
    values_stride,
    bias_stride,
    tiles,
    split_pages,
    scale,
    softcap,
    K: tl.constexpr,
    V: tl.constexpr,
    TOKENS_K: tl.constexpr,
    TOKENS_V: tl.constexpr,
    PAGE: tl.constexpr,
    BYTES: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    EXACT: tl.constexpr,
    BIAS: tl.constexpr,
    TOKEN_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LSE_OF_TILES: tl.constexpr,
    IN_TOKENS: tl.constexpr,
):
    """One split of one stream. q [S, R, Dk], bias [S, R], token_bias [S, R, n * P], pool uint8 in records of BYTES,
    ids [S, n], counts [S] of pages or, IN_TOKENS, of tokens; keys, values: bytes of exact tokens, whose strides are in
    bytes; out float32 [S, splits, R, Dv], lse (base 2) [S, splits, R], lse_of_tiles [S, R, tiles]. Where a stream has
    no tokens for a split, nothing is written."""
    blocks = tl.cdiv(rows, ROWS)
    stream = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    if len(TOKENS_K) > 0:
        splits -= 1
    q += stream * rows * k_dim
    bias += stream * rows
    token_bias += stream * rows * bias_stride
    out += (stream * tl.num_programs(1) + split) * rows * v_dim
    lse += (stream * tl.num_programs(1) + split) * rows
    lse_of_tiles += stream * rows * tiles
    if split < splits:
        if len(K) > 0:
            held = tokens_held(counts, stream, PAGE, IN_TOKENS)
            each = tokens_of_split(held, splits, split_pages, PAGE)
            first = split * each
            if first < held:
                run(
                    q, bias, token_bias, pool, pool, ids + stream * ids_stride, first, tl.minimum(first + each, held),
                    k_book, v_book, out, lse, lse_of_tiles, row, rows, k_dim, v_dim, bias_stride, tiles, scale, softcap,
                    K, V, PAGE, BYTES, TILE, ROWS, EXACT, BIAS, TOKEN_BIAS, SOFTCAP, LSE_OF_TILES, IN_TOKENS,
                )  # fmt: skip
    elif len(TOKENS_K) > 0:
        run(
            q, bias, token_bias, keys + stream * keys_stride, values + stream * values_stride, ids, 0,
            tl.load(token_counts + stream).to(tl.int32), k_book, v_book, out, lse,
            lse_of_tiles, row, rows, k_dim, v_dim, bias_stride, tiles, scale, softcap,
            TOKENS_K, TOKENS_V, 0, 0, TOKENS_TILE, ROWS, EXACT, False, False, SOFTCAP, False, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=CHANGING)
def merge_kernel(
    partial,
    partial_lse,
    prior,
    prior_lse,
    counts,
    out,
    lse,
    splits,
    split_pages,
    rows,
    v_dim,
    PAGE: tl.constexpr,
    IN_TOKENS: tl.constexpr,
    TOKENS: tl.constexpr,
    PRIOR: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sum_i w_i out_i, w_i = exp(lse_i - lse), over splits and what came before. Grid: (stream * rows). partial [S,
    splits, R, Dv] with lse in base 2; prior and out [S, R, Dv], their lse [S, R] in base e. Of the splits of pages
    (PAGE = 0: there are none) those are read that were written, by the same counts [S]; TOKENS: the last is the exact
    tokens'."""
    at = tl.program_id(0).to(tl.int64)
    first = at // rows * splits * rows + at % rows
    channel = tl.arange(0, BLOCK)
    top = tl.full((), float("-inf"), tl.float32)
    mass = tl.zeros((), tl.float32)
    found = tl.zeros((BLOCK,), tl.float32)
    if PRIOR:
        top = tl.load(prior_lse + at) * LOG2E
        if top > float("-inf"):
            mass += 1
            found += tl.load(prior + at * v_dim + channel, mask=channel < v_dim, other=0)
    last = splits - 1 if TOKENS else splits
    live = 0
    if PAGE > 0:
        held = tokens_held(counts, at // rows, PAGE, IN_TOKENS)
        live = tl.cdiv(held, tokens_of_split(held, last, split_pages, PAGE))
    parts = live + 1 if TOKENS else live
    for begin in range(0, parts, SPLITS):
        part = begin + tl.arange(0, SPLITS)
        split = tl.where(part < live, part, last)
        logits = tl.load(partial_lse + first + split * rows, mask=part < parts, other=float("-inf"))
        highest = tl.maximum(tl.max(logits, 0), top)
        if highest > float("-inf"):
            weight = tl.exp2(logits - highest)
            there = (logits > float("-inf"))[:, None] & (channel < v_dim)[None, :]
            where = (first + split * rows)[:, None] * v_dim + channel[None, :]
            keep = tl.exp2(top - highest)
            found = found * keep + tl.sum(tl.load(partial + where, mask=there, other=0) * weight[:, None], 0)
            mass = mass * keep + tl.sum(weight, 0)
            top = highest
    mass = tl.where(top > float("-inf"), mass, 1)
    tl.store(lse + at, (top + tl.log2(mass)) * LN2)
    tl.store(out + at * v_dim + channel, found / mass, mask=channel < v_dim)
