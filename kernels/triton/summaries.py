"""What pages promise a query, from their summaries: Quest's bounds, or logits of mean keys.

  bound[r, i] = sum_d max(q[r, d] low[i, d], q[r, d] high[i, d]) = relu(q) . high - relu(-q) . low
  logit[r, i] = q[r] . mean[i]

Grid: (stream, block of pages). A program has all query rows of a stream. Moved: the summaries of each listed page once,
of the rest of the page nothing.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .attention import INTERPRETED


@triton.jit
def vectors(pages, offset, seen, at, D: tl.constexpr, BLOCK: tl.constexpr, CODED: tl.constexpr):
    """Channels [pages, BLOCK] of a vector from channel `at` on, without their scales, float32."""
    channel = at + tl.arange(0, BLOCK)
    there = seen[:, None] & (channel < D)[None, :]
    if CODED:
        from_ = (pages + offset).to(tl.pointer_type(tl.int8))[:, None] + channel[None, :]
    else:
        from_ = (pages + offset).to(tl.pointer_type(tl.float16))[:, None] + channel[None, :]
    return tl.load(from_, mask=there, other=0).to(tl.float32)


@triton.jit
def product(q, x, logits, EXACT: tl.constexpr):
    if EXACT or INTERPRETED:
        return tl.dot(q, x.trans(), logits, input_precision="tf32x3")
    else:
        return tl.dot(q.to(tl.float16), x.to(tl.float16).trans(), logits)


@triton.jit(do_not_specialize=["pages", "ids_stride"])
def scores_kernel(
    q,
    pool,
    ids,
    counts,
    out,
    rows,
    pages,
    ids_stride,
    D: tl.constexpr,
    BYTES: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SCALE: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGES: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Scores [S, R, n] float32 of pages, -inf where there is none.

    q [S, R, D]; pool uint8; ids [S, n]; counts [S]. HIGH: offset of the maxima in a page, and LOW of the minima, or -1:
    then HIGH is the mean's. SCALE: offset of float16 scales, each of RUN channels of int8, or -1: vectors are float16.
    """
    stream = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * PAGES + tl.arange(0, PAGES)
    row = tl.arange(0, ROWS)
    seen = slot < tl.load(counts + stream)
    page = pool + tl.load(ids + stream * ids_stride + slot, mask=seen, other=0).to(tl.int64) * BYTES
    most = tl.full((ROWS,), 1e-30, tl.float32)
    for at in tl.static_range(0, D, BLOCK):
        channel = at + tl.arange(0, BLOCK)
        there = (row < rows)[:, None] & (channel < D)[None, :]
        x = tl.load(q + (stream * rows + row[:, None]) * D + channel[None, :], mask=there, other=0).to(tl.float32)
        most = tl.maximum(most, tl.max(tl.abs(x), 1))
    # by a power of two, so that products of 16 bits neither overflow nor vanish
    norm = (((most.to(tl.int32, bitcast=True) >> 23) + 1) << 23).to(tl.float32, bitcast=True)
    logits = tl.zeros((ROWS, PAGES), tl.float32)
    for at in tl.static_range(0, D, BLOCK):
        channel = at + tl.arange(0, BLOCK)
        there = (row < rows)[:, None] & (channel < D)[None, :]
        x = tl.load(q + (stream * rows + row[:, None]) * D + channel[None, :], mask=there, other=0).to(tl.float32)
        x = x / norm[:, None]
        high = vectors(page, HIGH, seen, at, D, BLOCK, SCALE >= 0)
        if SCALE >= 0:
            from_ = (page + SCALE).to(tl.pointer_type(tl.float16))[:, None] + (channel // RUN)[None, :]
            scale = tl.load(from_, mask=seen[:, None] & (channel < D)[None, :], other=0).to(tl.float32)
            high *= scale
        if LOW >= 0:
            low = vectors(page, LOW, seen, at, D, BLOCK, SCALE >= 0)
            if SCALE >= 0:
                low *= scale
            logits = product(tl.maximum(x, 0), high, logits, EXACT)
            logits = product(tl.minimum(x, 0), low, logits, EXACT)
        else:
            logits = product(x, high, logits, EXACT)
    logits = tl.where(seen[None, :], logits * norm[:, None], float("-inf"))
    at = (stream * rows + row[:, None]) * pages + slot[None, :]
    tl.store(out + at, logits, mask=(row < rows)[:, None] & (slot < pages)[None, :])
