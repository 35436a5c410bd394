"""Tiles of pages and of exact tokens as the kernels' numbers: codes unpacked, scales and zeros beside them."""

# Triton reads these functions as a language of its own: without annotations, and with tuples that grow.
# mypy: disable-error-code="no-untyped-def, assignment, no-redef"
# ruff: noqa: RUF005, SIM108, SIM300

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


LN2 = tl.constexpr(0.6931471805599453)


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
    """Scales of a token that a tile of a chunk can hold."""
    groups: int = max(chunk.block * chunk.lanes // chunk.channel_group, 1)
    return groups


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
    """Bytes or words of 16 bits [T, columns] of a plane, in each column the one that holds its lanes."""
    OFFSET: tl.constexpr = C.planes[PLANE][0]
    STRIDE: tl.constexpr = C.planes[PLANE][1]
    BITS: tl.constexpr = C.lanes * C.planes[PLANE][2]
    BLOCK: tl.constexpr = C.block
    column = tl.arange(0, BLOCK)
    if BITS == 16:
        at = (base + token * STRIDE + OFFSET).to(tl.pointer_type(tl.uint16))[:, None] + column[None, :]
    else:
        byte = column if BITS == 8 else column * BITS // 8  # the compiler sees neighbours only in the former
        at = (base + token * STRIDE + OFFSET)[:, None] + byte[None, :]
    return tl.load(at, mask=visible(seen, column, C), other=0)


@triton.jit
def row_word(row, seen, WORD: tl.constexpr, C: tl.constexpr):
    """Word uint32 [T] of tokens' rows; neighbours come from one load where they can."""
    if C.planes[0][1] % 8 == 0 and C.planes[0][0] % 8 == 0:
        both = tl.load(row.to(tl.pointer_type(tl.uint64)) + WORD // 2, mask=seen, other=0)
        return (both >> (WORD % 2 * 32)).to(tl.uint32)
    else:
        return tl.load(row.to(tl.pointer_type(tl.uint32)) + WORD, mask=seen, other=0)


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
def lane_numbers(planes, C: tl.constexpr, LANE: tl.constexpr, MIDDLE: tl.constexpr):
    """Codes less MIDDLE, float32 [T, columns]: exact, by way of a float whose last bit is worth 1."""
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
    """Scales and zeros float32 [T, groups, 1] of a chunk whose tokens have several; the zeros are those of code 0."""
    SCALE: tl.constexpr = C.scale
    ZERO: tl.constexpr = C.zero
    GROUPS: tl.constexpr = C.groups
    FIRST: tl.constexpr = C.inner // C.channel_group
    LIVE: tl.constexpr = C.columns * C.lanes // C.channel_group
    ROOM: tl.constexpr = C.block * C.lanes // C.channel_group
    group = tl.arange(0, ROOM)
    there = seen[:, None] & (group < LIVE)[None, :]
    at = (base + token * (GROUPS * 2))[:, None] + ((FIRST + group) * 2)[None, :]
    scale = halves(at, SCALE, there)
    if ZERO >= 0:
        zero = halves(at, ZERO, there)
    else:
        zero = tl.zeros_like(scale)
    return scale[:, :, None], zero[:, :, None]


@triton.jit
def block_numbers(planes, scale, zero, C: tl.constexpr, LANE: tl.constexpr):
    """Decoded numbers float32 [T, columns] of a lane, each group of channels by its scale and zero."""
    GROUP: tl.constexpr = C.channel_group // C.lanes
    x = lane_numbers(planes, C, LANE, 0 if C.zero >= 0 else C.middle)
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
def scale_places(base, token, seen, C: tl.constexpr):
    """Where scales [T, groups] of a chunk lie, and which there are."""
    SCALE: tl.constexpr = C.scale
    SIZE: tl.constexpr = 2 if C.scale_format == "bf16" else 1
    STRIDE: tl.constexpr = C.groups * SIZE
    FIRST: tl.constexpr = C.inner // C.channel_group
    LIVE: tl.constexpr = (C.columns * C.lanes + C.channel_group - 1) // C.channel_group
    ROOM: tl.constexpr = room_of(C)
    group = tl.arange(0, ROOM)
    there = seen[:, None] & (group < LIVE)[None, :]
    return (base + (SCALE + token * STRIDE))[:, None] + ((FIRST + group) * SIZE)[None, :], there


@triton.jit
def scale_codes(base, token, seen, C: tl.constexpr):
    """Bytes int32 [T, groups] of scales, and which there are."""
    at, there = scale_places(base, token, seen, C)
    return tl.load(at, mask=there, other=0).to(tl.int32), there


@triton.jit
def float_scales(base, token, seen, C: tl.constexpr):
    """Scales float32 [T, groups]; 0 where there is none."""
    FORMAT: tl.constexpr = C.scale_format
    if FORMAT == "bf16":
        at, there = scale_places(base, token, seen, C)
        return tl.load(at.to(tl.pointer_type(tl.bfloat16)), mask=there, other=0).to(tl.float32)
    else:
        code, there = scale_codes(base, token, seen, C)
        if FORMAT == "e4m3":
            return (code << 7).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        else:  # the exponent of a float32; that of 2^-127 is the first bit of a subnormal number
            found = tl.where(code > 0, code << 23, 1 << 22).to(tl.float32, bitcast=True)
            return tl.where(there, found, 0.0)


@triton.jit
def page_scale(base, token, seen, C: tl.constexpr):
    """The float32 [T] that multiplies all scales of a page."""
    PAGE: tl.constexpr = C.page_scale
    return tl.load((base + (PAGE + token * 0)).to(tl.pointer_type(tl.float32)), mask=seen, other=0)


@triton.jit
def float_grid(base, token, seen, C: tl.constexpr):
    """Scales of a chunk: float32 [T, groups, 1] below 2, times [T], a power of two where there are several."""
    scale = float_scales(base, token, seen, C)
    if C.page_scale >= 0:
        scale *= page_scale(base, token, seen, C)[:, None]
    factor = tl.max(scale, 1)
    if room_of(C) > 1:
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
