"""What is written of a tile of a piece: where it lies, its numbers, and its codes packed into planes."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

HUGE = tl.constexpr(65504.0)


@triton.constexpr_function
def programs(pieces: Any, i: int) -> int:
    """Programs of a page that write piece i."""
    count: int = pieces[i].programs
    return count


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


@triton.constexpr_function
def width(piece: Any) -> int:
    """Bits of a piece's codes."""
    return sum(width for _, _, width in piece.planes)
