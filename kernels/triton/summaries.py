"""What the vectors in pages' summaries promise queries: Quest's bounds, or logits of mean keys.

  dots[r, i] = sum over fields f of q_f[r] . x_f[i];  Quest's bound is min(q, 0) . low + max(q, 0) . high

Grid: (stream, block of vectors). A program has all query rows of a stream. Moved: the summaries of each listed page
once, of the rest of the page nothing.
"""

# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from .unpack import chunk, dot


@triton.jit
def vectors(pages, there, channel, CODED: tl.constexpr):
    """Channels [slots, BLOCK] of vectors that begin at `pages` [slots], without their scales, float32."""
    if CODED:
        from_ = pages.to(tl.pointer_type(tl.int8))[:, None] + channel[None, :]
    else:
        from_ = pages.to(tl.pointer_type(tl.float16))[:, None] + channel[None, :]
    return tl.load(from_, mask=there, other=0).to(tl.float32)


@triton.jit
def add_dots(dots, q, x, EXACT: tl.constexpr):
    """Adds q . x [R, slots]; q is a sum of two float16 numbers where `EXACT`, and x one."""
    x = x.to(tl.float16).trans()
    high = q.to(tl.float16)
    dots = dot(high, x, dots, tl.float16)
    if EXACT:
        dots = dot(q - high.to(tl.float32), x, dots, tl.float16)
    return dots


@triton.jit
def load_queries(q, field, row, rows, channel, D: tl.constexpr):
    """Channels [R, BLOCK] float32 of q_f, of q [F, S, R, D]."""
    there = (row < rows)[:, None] & (channel < D)[None, :]
    first = (field * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * rows
    return tl.load(q + (first + row[:, None]) * D + channel[None, :], mask=there, other=0).to(tl.float32)


@triton.jit(do_not_specialize=["slots", "ids_stride"])
def scores_kernel(
    q, pool, ids, counts, out, rows, slots, ids_stride, D: tl.constexpr, BYTES: tl.constexpr, FIELDS: tl.constexpr,
    EACH: tl.constexpr, SCALE: tl.constexpr, RUN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SLOTS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Dots [S, R, n * EACH] float32, -inf of pages that do not exist.

    q [F, S, R, D]; pool uint8; ids [S, n]; counts [S]. FIELDS: offset in a page of each field's EACH vectors. SCALE:
    offset of float16 scales, each of RUN channels of int8, or -1: vectors are float16.
    """
    CODED: tl.constexpr = SCALE >= 0
    SIZE: tl.constexpr = D if CODED else 2 * D  # bytes of a vector
    stream = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    row = tl.arange(0, ROWS)
    seen = slot // EACH < tl.load(counts + stream)
    page = pool + tl.load(ids + stream * ids_stride + slot // EACH, mask=seen, other=0).to(tl.int64) * BYTES
    most = tl.full((ROWS,), 1e-30, tl.float32)
    for f in tl.static_range(len(FIELDS)):
        for at in range(0, D, BLOCK):
            most = tl.maximum(most, tl.max(tl.abs(load_queries(q, f, row, rows, at + tl.arange(0, BLOCK), D)), 1))
    # by a power of two, so that products of 16 bits neither overflow nor vanish
    norm = (((most.to(tl.int32, bitcast=True) >> 23) + 1) << 23).to(tl.float32, bitcast=True)
    dots = tl.zeros((ROWS, SLOTS), tl.float32)
    for at in range(0, D, BLOCK):
        channel = at + tl.arange(0, BLOCK)
        there = seen[:, None] & (channel < D)[None, :]
        if CODED:
            scales = (page + (SCALE + slot % EACH * (D // RUN * 2))).to(tl.pointer_type(tl.float16))
            scale = tl.load(scales[:, None] + (channel // RUN)[None, :], mask=there, other=0).to(tl.float32)
        for f in tl.static_range(len(FIELDS)):
            x = vectors(page + (chunk(FIELDS, f) + slot % EACH * SIZE), there, channel, CODED)
            if CODED:
                x *= scale
            dots = add_dots(dots, load_queries(q, f, row, rows, channel, D) / norm[:, None], x, EXACT)
    dots = tl.where(seen[None, :], dots * norm[:, None], float("-inf"))
    at = (stream * rows + row[:, None]) * slots + slot[None, :]
    tl.store(out + at, dots, mask=(row < rows)[:, None] & (slot < slots)[None, :])
